"""Speed and memory of the draft's training on one GPU: seven TTT steps on random supervision of real shapes.

    python benchmarks/trainer.py --out DIR [--shapes llama qwen3] [--sizes 4x2048 ...] [--systems fused reference ...]
        [--supervised-share 0.9] [--answers 1] [--mix questions documents tools all] [--precision bf16]

A row holds turns of equal length, and the last part of each is the answer, which is supervised: with
`--supervised-share 0.5 --answers 1` the second half of the row. `--answers 0` supervises single tokens at random.
`--mix` supervises answers as chats have them instead (`mixes.py`), each named mix in turn.
For every shape, size and system: tokens/s, TFLOP/s and their share of a measured matrix product's, peak
memory above the resident bytes; with --profile the GPU's time by kind of kernel. Medians after warm-up; the
figures go to the screen and to DIR/trainer.json. Legend: B batch, T sequence, H hidden.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Results, arguments_of, kernel_times, matrix_ceiling, measure, size_of
from mixes import MIXES, mask_of_mix
from shapes import SHAPES
from transformers import AutoConfig

from eagle_rpc import supervision
from eagle_rpc.config.choices import Optimiser, Precision
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig, Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep
from eagle_rpc.supervision import Eagle3TargetBatch, TargetShape, TokenBatch, shifted_loss_mask
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

# Forward and backward: the fused step, the same with the feed-forward block recomputed, the reference. A
# learner's whole optimiser step: on one micro-batch, on one recomputed, on four; with Muon, with averaged weights.
SYSTEMS = (
    *("fused", "fused_recompute", "reference"),
    *("optimiser", "optimiser_recompute", "optimiser_accumulated", "optimiser_muon", "optimiser_average"),
)
ACCUMULATED = 4
STEPS = 7
GPU = torch.device("cuda")


def make_draft(shape: str) -> Eagle3Draft:
    """On the GPU, fp32 weights, bf16 embedding, as a trainer holds it."""
    target_config = AutoConfig.for_model(**SHAPES[shape])
    config = Eagle3DraftConfig.from_target(TargetShape.of(target_config), draft_vocab_size=32000)
    torch.manual_seed(0)
    with torch.device("cuda"):
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16).normal_(std=0.02)
        draft = Eagle3Draft(config, embedding)
    for parameter in draft.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return draft


def make_loss_mask(batch: int, length: int, share: float, answers: int, mix: str | None) -> torch.Tensor:
    """[B, T] bool, of a mix or with about `share` of it true; see the top of this file."""
    if mix is not None:
        return mask_of_mix(mix, batch, length)
    if answers == 0:
        return torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < share
    turn = length / answers
    return (torch.arange(length) % turn >= (1 - share) * turn).expand(batch, length).contiguous()


def make_batch(draft: Eagle3Draft, loss_mask: torch.Tensor, encoding: str) -> Eagle3TargetBatch:
    """Random supervision at the rows of the mask [B, T]; as in training, tokens are on the CPU."""
    batch, length = loss_mask.shape
    config, generator = draft.config, torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    ids = torch.randint(config.vocab_size, (batch, length))
    tokens = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=loss_mask)
    rows = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1).cuda()
    if encoding == "hidden":
        head = supervision.DraftHead(weight=normal(config.draft_vocab_size, config.hidden_size) * 0.03)
        targets: Any = supervision.ProjectedTargets(normal(len(rows), config.hidden_size), head)
    else:
        targets = supervision.StoredLogits(2 * normal(len(rows), config.draft_vocab_size))
    return Eagle3TargetBatch(
        tokens=tokens,
        aux_hidden_states=normal(batch, length, 3 * config.hidden_size),
        supervised_rows=rows,
        targets=targets,
        log_normalizer=torch.full((len(rows),), 15.0, device="cuda"),
        argmax=torch.randint(config.draft_vocab_size, (len(rows),), device="cuda", generator=generator),
    )


def flops_per_token(config: Eagle3DraftConfig, length: int) -> float:
    """Of seven steps, forward and backward, at all rows: saved work does not lower the number."""
    hidden, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    step = 2 * hidden * hidden + 4 * hidden * keys + hidden * hidden
    step += 3 * hidden * config.intermediate_size + config.draft_vocab_size * hidden
    return 6 * (3 * hidden * hidden + STEPS * step) + STEPS * 6 * hidden * length


KINDS = (
    # Kind of kernel, and parts of its names; the first match counts.
    ("own slots", ("_own_slots",)),
    ("loss", ("_judge_kernel",)),
    ("rounding to fp8", ("_largest_kernel", "_rounding_kernel")),
    ("row formulas", ("_rms_norm", "_swiglu", "_add_and_rotate", "_rotate_back", "_sum_shifted")),
    ("causal attention", ("flash", "cudnn", "fmha")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "xmma", "splitK")),
    ("optimiser", ("multi_tensor", "FusedAdam")),
    ("copies and fills", ("copy", "Memcpy", "Memset", "fill", "index")),
)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["llama"], choices=["llama", "qwen3"])
    parser.add_argument("--sizes", nargs="+", default=["4x2048", "1x2048"])
    parser.add_argument("--systems", nargs="+", default=["fused"], choices=SYSTEMS)
    parser.add_argument("--encoding", default="hidden", choices=["hidden", "logits"])
    parser.add_argument("--supervised-share", type=float, default=0.9, help="of the tokens")
    parser.add_argument("--answers", type=int, default=1, help="supervised blocks of a row")
    parser.add_argument(
        "--mix", nargs="+", default=[None], choices=MIXES, help="instead of share and answers"
    )
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=[one.name for one in Precision])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    results = Results(options.out / "trainer.json", GPU)
    ceiling = matrix_ceiling(GPU)
    results.add(ceiling_teraflops=ceiling)
    asked = (options.shapes, options.sizes, options.systems, options.precision, options.mix)
    for shape, size, system, precision, mix in itertools.product(*asked):
        name = {"shape": shape, "size": size, "system": system, "encoding": options.encoding}
        name["precision"] = precision
        if mix is None:
            name |= {"supervised_share": options.supervised_share, "answers": options.answers}
        else:
            name |= {"mix": mix}
        try:
            measure_system(name, options, results, ceiling)
        except torch.cuda.OutOfMemoryError:
            results.add(**name, out_of_memory=True)
        gc.collect()
        torch.cuda.empty_cache()


def measure_system(
    name: dict[str, Any], options: argparse.Namespace, results: Results, ceiling: float
) -> None:
    rows, length = size_of(name["size"])
    draft = make_draft(name["shape"])
    for parameter in draft.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    loss_mask = make_loss_mask(rows, length, options.supervised_share, options.answers, name.get("mix"))
    batch = make_batch(draft, loss_mask, options.encoding)
    run, micro_batches = make_run(draft, name["system"], batch, Precision[name["precision"]])
    started = time.monotonic()
    run()
    torch.cuda.synchronize()
    first_seconds = time.monotonic() - started
    tokens = rows * length * micro_batches
    slow = tokens > 10000 or name["system"] == "reference"
    figures = measure(run, tokens, flops_per_token(draft.config, length), ceiling, slow=slow, device=GPU)
    supervised = float(loss_mask.float().mean())
    results.add(**name, supervised=supervised, first_run_seconds=first_seconds, **figures)
    if options.profile:
        times, longest = kernel_times(run, KINDS)
        results.add(**name, kernel_milliseconds=times)
        print("\n".join(longest), flush=True)


def make_run(
    draft: Eagle3Draft, system: str, batch: Eagle3TargetBatch, precision: Precision
) -> tuple[Callable[[], Any], int]:
    """The function to time, and its number of micro-batches. The reference has no other precision than bf16."""
    recompute = system.endswith("_recompute")
    if system.startswith("optimiser"):
        config = TrainConfig(
            recompute_mlp=recompute,
            precision=precision,
            optimiser=Optimiser.muon if system == "optimiser_muon" else Optimiser.adamw,
            ema_decay=0.999 if system == "optimiser_average" else None,
        )
        learner = Learner(draft, config, DraftConfig(ttt_steps=STEPS), TrainerGroup(), total_steps=10**6)
        micro_batches = ACCUMULATED if system == "optimiser_accumulated" else 1
        return lambda: learner.learn([batch] * micro_batches), micro_batches
    objective = Objective(steps=STEPS, step_decay=0.8)
    if system == "reference":
        step: ReferenceStep | FusedStep = ReferenceStep(draft, objective, autocast=torch.bfloat16)
    else:
        fp8 = precision is Precision.fp8
        step = FusedStep(draft, objective, dtype=torch.bfloat16, recompute_mlp=recompute, fp8=fp8)
    denominators = count_rows(batch, STEPS)
    return lambda: step.add_gradients(batch, denominators), 1


if __name__ == "__main__":
    main()
