"""Random drafts and batches for tests that compare two ways to compute the TTT objective."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle_rpc.draft import LOSSES, Eagle3Draft, Eagle3DraftConfig, Objective
from eagle_rpc.draft.live_slots import LiveSlots
from eagle_rpc.supervision import (
    DraftHead,
    Eagle3TargetBatch,
    ProjectedTargets,
    StoredLogits,
    TokenBatch,
    shifted_loss_mask,
)

VOCAB, DRAFT_VOCAB, TARGET_HIDDEN = 97, 61, 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """The settings of one comparison."""

    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    hidden_size: int = 48
    batch: int = 2
    length: int = 19
    packed: bool = False
    projected: bool = False  # targets from hidden states instead of stored logits
    blocks: int | None = (
        None  # of supervised tokens in the loss mask of a row, at most; None: nine tokens of ten, at random
    )
    supervised_share: float = 0.7
    norm_before_residual: bool = False
    aux_layers: int = 3
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    num_layers: int = 1
    window: int | None = None
    seed: int = 0


def random_case(seed: int) -> tuple[Case, Objective]:
    """A small case, and an objective of one to eight steps with any of the losses."""
    draw = random.Random(seed)
    heads, group = draw.choice([1, 2]), draw.choice([1, 3])
    case = Case(
        heads=heads * group,
        key_heads=heads,
        head_dim=8,
        hidden_size=16,
        batch=draw.randint(1, 3),
        length=draw.randint(2, 32),
        packed=draw.random() < 0.4,
        blocks=draw.choice([None, 0, 1, 1, 1, 2, 2, 3, 4]),
        supervised_share=draw.choice([0.0, 0.5, 0.9, *[1.0] * 5]),
        norm_before_residual=draw.random() < 0.5,
        seed=seed,
        aux_layers=draw.choice([1, 2, 3, 3, 5]),
        norm_before_fc=draw.random() < 0.3,
        fc_norm=draw.random() < 0.4,
        norm_output=draw.random() < 0.5,
    )
    steps = draw.choice([1, 1, 2, 2, 3, 4, 5, 6, 7, 8])
    window = draw.choice([None, None, steps, steps + draw.randint(1, 8)])
    case = replace(case, window=window, num_layers=draw.choice([1, 1, 1, 2]))
    return case, Objective(steps=steps, step_decay=0.7, loss=draw.choice(sorted(LOSSES)))


def case_draft(case: Case) -> Eagle3Draft:
    """Random fp32 weights: large enough that every term matters, with norms away from one."""
    generator = torch.Generator().manual_seed(case.seed)
    config = Eagle3DraftConfig(
        hidden_size=case.hidden_size,
        intermediate_size=2 * case.hidden_size,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        head_dim=case.head_dim,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        rope_scaling=None,
        max_position_embeddings=4096,
        norm_before_residual=case.norm_before_residual,
        num_aux_layers=case.aux_layers,
        norm_before_fc=case.norm_before_fc,
        fc_norm=case.fc_norm,
        norm_output=case.norm_output,
        num_layers=case.num_layers,
        sliding_window=case.window,
    )
    draft = Eagle3Draft(config, torch.randn(VOCAB, case.hidden_size, generator=generator))
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                offset, scale = (
                    (1.0, 0.3) if parameter.dim() == 1 else (0.0, 1.5 * parameter.shape[-1] ** -0.5)
                )
                parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return draft


def case_batch(case: Case) -> Eagle3TargetBatch:
    """Rows of one chat, or with `packed` of a few, then padding; supervised rows drawn from the loss mask."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    shape = (case.batch, case.length)
    real = torch.randint(case.length // 2, case.length + 1, (case.batch, 1), generator=generator)
    attention_mask = (torch.arange(case.length) < real).long()
    if case.blocks is None:
        loss_mask = attention_mask * (torch.rand(shape, generator=generator) < 0.9)
    else:
        ends = torch.randint(case.length + 1, (case.batch, 2 * case.blocks, 1), generator=generator)
        loss_mask = attention_mask * ((torch.arange(case.length) >= ends).sum(dim=1) % 2)
    segment_ids = None
    if case.packed:
        starts = torch.rand(shape, generator=generator) < 4 / case.length
        segment_ids = (starts | (torch.arange(case.length) == real)).long().cumsum(dim=1)
    tokens = TokenBatch(
        input_ids=torch.randint(VOCAB, shape, generator=generator),
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        segment_ids=segment_ids,
    )
    candidates = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1)
    rows = candidates[torch.rand(len(candidates), generator=generator) < case.supervised_share]
    if case.projected:
        head = DraftHead(weight=torch.randn(DRAFT_VOCAB, TARGET_HIDDEN, generator=generator))
        targets = ProjectedTargets(torch.randn(len(rows), TARGET_HIDDEN, generator=generator), head)
    else:
        targets = StoredLogits(3 * torch.randn(len(rows), DRAFT_VOCAB, generator=generator))
    logits_NK = targets.logits(slice(None))
    return Eagle3TargetBatch(
        tokens=tokens,
        aux_hidden_states=torch.randn(*shape, case.aux_layers * case.hidden_size, generator=generator),
        supervised_rows=rows,
        targets=targets,
        log_normalizer=logits_NK.logsumexp(dim=-1) + torch.rand(len(rows), generator=generator),
        argmax=logits_NK.argmax(dim=-1),
    )


def every_slot(length: int) -> LiveSlots:
    """All slots of one chat."""
    return LiveSlots(places=torch.arange(length), chat_lengths=[length], live_lengths=[length])


def on_device(batch: Eagle3TargetBatch, device: str) -> Eagle3TargetBatch:
    """The same batch on another device; its tokens stay, as those that a trainer sent."""
    targets = batch.targets
    if isinstance(targets, ProjectedTargets):
        moved = ProjectedTargets(targets.values.to(device), targets.head.to(torch.device(device)))
    else:
        assert isinstance(targets, StoredLogits)
        moved = StoredLogits(targets.values.to(device))
    return Eagle3TargetBatch(
        tokens=batch.tokens,
        aux_hidden_states=batch.aux_hidden_states.to(device),
        supervised_rows=batch.supervised_rows.to(device),
        targets=moved,
        log_normalizer=batch.log_normalizer.to(device),
        argmax=batch.argmax.to(device),
    )


def gradients(draft: Eagle3Draft) -> dict[str, Tensor]:
    """Copies of the gradients of trainable parameters, by name. The draft's own gradients are then cleared."""
    copies = {
        name: parameter.grad.clone()
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }
    draft.zero_grad(set_to_none=True)
    return copies
