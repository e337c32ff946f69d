"""Greedy decoding with a draft inside a serving engine, which counts its drafts and accepted guesses.

Runs as a program in the engine's environment, which need not hold this package: `PYTHON engine_side.py WORK OUTCOME`,
two JSON files. So it imports the standard library and, late, the engine. SGLang's side was written from its
documentation (0.5.23) and not run.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DecodingWork:
    """Prompts to decode, one at a time: other batch shapes round differently."""

    engine: str  # "vllm" or "sglang"
    target: str  # directory
    draft: str  # directory of an export
    dtype: str  # as "float32"
    prompts: list[list[int]]  # token ids
    max_new_tokens: int
    num_draft_tokens: int
    stop_token_ids: list[int]

    @property
    def most_tokens(self) -> int:
        """Of a prompt, its answer, and guesses beyond its end."""
        return max(map(len, self.prompts)) + self.max_new_tokens + self.num_draft_tokens + 64


@dataclass(frozen=True)
class DecodingOutcome:
    """What an engine decoded, with an element for each prompt."""

    version: str
    texts: list[list[int]]  # token ids
    num_drafts: list[int]
    accepted_per_position: list[list[int]]

    @property
    def counts(self) -> tuple[int, list[int]]:
        """Drafts and accepted guesses by position, of all prompts."""
        return sum(self.num_drafts), [sum(column) for column in zip(*self.accepted_per_position, strict=True)]

    @property
    def accept_length(self) -> float:
        """Tokens of a target call: 1 + accepted guesses / drafts."""
        drafts, accepted = self.counts
        return 1 + sum(accepted) / max(drafts, 1)


def decode_in_vllm(work: DecodingWork) -> DecodingOutcome:
    """By vLLM's counters, read after each prompt."""
    # 1 GiB for keys and values on a CPU; no connections to other hosts.
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        os.environ[name] = "1"
    import vllm

    k = work.num_draft_tokens
    llm = vllm.LLM(
        model=work.target,
        skip_tokenizer_init=True,
        dtype=work.dtype,
        max_model_len=work.most_tokens,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": work.draft, "num_speculative_tokens": k},
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=work.max_new_tokens,
        stop_token_ids=work.stop_token_ids,
        detokenize=False,
    )

    def counters() -> list[int]:
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        drafts = metrics.get("vllm:spec_decode_num_drafts")
        accepted = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
        return [drafts.value if drafts else 0, *(accepted.values if accepted else [0] * k)]

    texts, readings = list[list[int]](), [counters()]
    for prompt_ids in work.prompts:
        answers = llm.generate([{"prompt_token_ids": prompt_ids}], sampling, use_tqdm=False)
        texts.append(list(answers[0].outputs[0].token_ids))
        readings.append(counters())
    steps = [
        [now - before for now, before in zip(later, earlier, strict=True)]
        for earlier, later in pairwise(readings)
    ]
    return DecodingOutcome(vllm.__version__, texts, [step[0] for step in steps], [step[1:] for step in steps])


def decode_in_sglang(work: DecodingWork) -> DecodingOutcome:
    """By the histogram of accepted guesses that SGLang gives with each answer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import sglang

    k = work.num_draft_tokens
    engine = sglang.Engine(
        model_path=work.target,
        skip_tokenizer_init=True,
        dtype=work.dtype,
        context_length=work.most_tokens,
        max_running_requests=1,
        # The one attention of SGLang that takes fp32.
        attention_backend="triton",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=work.draft,
        speculative_num_steps=k,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=k + 1,
    )
    sampling = {
        "temperature": 0.0,
        "max_new_tokens": work.max_new_tokens,
        "stop_token_ids": work.stop_token_ids,
    }
    answers = [engine.generate(input_ids=prompt_ids, sampling_params=sampling) for prompt_ids in work.prompts]
    engine.shutdown()
    found = [_of_histogram(answer["meta_info"], k) for answer in answers]
    return DecodingOutcome(
        sglang.__version__,
        [list(answer["output_ids"]) for answer in answers],
        [drafts for drafts, _ in found],
        [accepted for _, accepted in found],
    )


def _of_histogram(figures: dict[str, Any], k: int) -> tuple[int, list[int]]:
    """Drafts, and those of them that accepted at least 1, 2, ... k guesses; element n of the histogram: exactly n."""
    histogram = figures.get("spec_accept_histogram") or figures["spec_correct_drafts_histogram"]
    exactly = [*histogram, *[0] * (k + 1 - len(histogram))]
    at_least = list(accumulate(reversed(exactly)))[::-1]
    return at_least[0], at_least[1:]


SIDES = {"vllm": decode_in_vllm, "sglang": decode_in_sglang}
"""The engines that can be asked, by the name of their package."""


def _main(asked: str, answered: str) -> None:
    work = DecodingWork(**json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(asdict(SIDES[work.engine](work))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
