"""The fused step against the reference: the losses of the same 300 optimiser steps.

    python benchmarks/loss_curve.py --out DIR [--precision fp8]

Both start from one draft and see the same batches of a target whose next token depends on the last two.
Losses of all steps, and the largest and the last distances to the reference in fp32, of the fused step and of
the reference in bf16, go to DIR/loss_curve.json; with `--precision fp8` also those of the fused step in fp8.
Legend: B batch, T sequence, V target vocab, K draft vocab, H hidden.
"""

import copy
import json
from pathlib import Path

import torch
from measuring import arguments_of, environment
from shapes import architecture
from torch import Tensor
from transformers import AutoConfig

from eagle_rpc.config.choices import DType, Precision
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.supervision import Eagle3TargetBatch, StoredLogits, TargetShape, TokenBatch, shifted_loss_mask
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

VOCAB, DRAFT_VOCAB, HIDDEN, BATCH, LENGTH, OPTIMISER_STEPS = 1024, 512, 512, 8, 512, 300

_LAST = 30


class BigramTarget:
    """Its logits are the sum of two tables' rows: of the last token, and of the token before."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cuda").manual_seed(0)
        self._last, self._before = (2 * self._normal(VOCAB, DRAFT_VOCAB) for _ in range(2))
        self._aux = self._normal(VOCAB, 3 * HIDDEN)
        self.embedding = self._normal(VOCAB, HIDDEN)

    def batch(self) -> Eagle3TargetBatch:
        """The next batch, of random tokens."""
        ids = torch.randint(VOCAB, (BATCH, LENGTH), device="cuda", generator=self._generator)
        tokens = TokenBatch(
            input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=torch.ones_like(ids)
        )
        rows = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1)
        logits_BTK = self._last[ids] + self._before[ids.roll(1, dims=1)]
        logits_NK = logits_BTK.flatten(0, 1)[rows + 1].bfloat16()
        return Eagle3TargetBatch(
            tokens=tokens,
            aux_hidden_states=self._aux[ids].bfloat16(),
            supervised_rows=rows,
            targets=StoredLogits(logits_NK),
            log_normalizer=logits_NK.float().logsumexp(dim=-1),
            argmax=logits_NK.argmax(dim=-1),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=self._generator)


def losses_of(
    draft: Eagle3Draft, *, fused: bool, autocast: DType | None, precision: Precision = Precision.bf16
) -> list[float]:
    """The objective at every optimiser step, of a copy of the draft."""
    form = {"autocast": autocast, "fused": fused, "precision": precision}
    config = TrainConfig(learning_rate=2e-3, warmup_share=0.1, **form)
    learner = Learner(copy.deepcopy(draft), config, DraftConfig(), TrainerGroup(), OPTIMISER_STEPS)
    target, losses = BigramTarget(), []
    for _ in range(OPTIMISER_STEPS):
        sums = learner.learn([target.batch()]).sums.on_host()
        losses.append(float((sums["loss_sums"] / sums["rows"]).mean()))
    return losses


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=[choice.name for choice in Precision], default="bf16")
    options = parser.parse_args()
    shape = {"hidden": HIDDEN, "width": 2 * HIDDEN, "layers": 1, "heads": 8, "key_heads": 2, "vocab": VOCAB}
    target_config = AutoConfig.for_model(
        **architecture("llama", **shape, positions=LENGTH, rms_norm_eps=1e-5)
    )
    config = Eagle3DraftConfig.from_target(TargetShape.of(target_config), draft_vocab_size=DRAFT_VOCAB)
    draft = Eagle3Draft(config, BigramTarget().embedding)
    draft.initialise(seed=0)
    draft = draft.cuda()
    curves = {
        "fused": losses_of(draft, fused=True, autocast=DType.bfloat16),
        "reference_bf16": losses_of(draft, fused=False, autocast=DType.bfloat16),
        "reference_fp32": losses_of(draft, fused=False, autocast=None),
    }
    if options.precision == "fp8":
        form = {"autocast": DType.bfloat16, "precision": Precision.fp8}
        curves["fused_fp8"] = losses_of(draft, fused=True, **form)
    exact = torch.tensor(curves["reference_fp32"])
    relative = {
        name: (torch.tensor(curve) - exact) / exact
        for name, curve in curves.items()
        if name != "reference_fp32"
    }
    distances = {name: float(curve.abs().max()) for name, curve in relative.items()}
    # The mean of the last steps: single ones differ by rounding alone.
    last = {name: float(curve[-_LAST:].mean()) for name, curve in relative.items()}
    content = {
        **environment(torch.device("cuda")),
        "largest_relative_distance_to_reference_fp32": distances,
        "mean_relative_distance_of_the_last_steps": last,
        "losses": curves,
    }
    (options.out / "loss_curve.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    for step in (0, 9, 49, 99, 199, 299):
        print(
            f"step {step + 1:3d} " + " ".join(f"{name} {curve[step]:.4f}" for name, curve in curves.items())
        )
    print("largest distance to fp32:", distances)
    print(f"mean distance of the last {_LAST} steps:", last)


if __name__ == "__main__":
    main()
