"""Supervision of an accumulated step that waits in host memory: the GPU holds no more of it with more micro-batches."""

from collections.abc import Iterator

import torch
from gpu_marks import ON_A_GPU
from support.ttt_cases import Case, case_batch, on_device

from eagle_rpc.supervision import Eagle3TargetBatch
from eagle_rpc.train.step_supervision import StepSupervision

pytestmark = ON_A_GPU

STEPS = 7


def case(seed: int) -> Case:
    return Case(head_dim=64, hidden_size=256, batch=8, length=512, projected=seed % 2 == 0, seed=seed)


def arriving(count: int) -> Iterator[Eagle3TargetBatch]:
    return (on_device(case_batch(case(seed)), "cuda") for seed in range(count))


def held(count: int, *, offload: bool) -> int:
    """Bytes on the GPU once all micro-batches are here."""
    before = torch.cuda.memory_allocated()
    supervision = StepSupervision(arriving(count), STEPS, offload=offload)
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated() - before
    assert len(supervision) == count
    return used


def test_the_gpu_holds_little_more_for_four_times_the_micro_batches():
    one, twelve = held(1, offload=True), held(12, offload=True)
    assert twelve < 1.5 * one
    assert held(12, offload=False) > 8 * one


def test_what_waited_comes_back_with_the_same_bits():
    supervision = StepSupervision(arriving(5), STEPS, offload=True)
    for seed in range(5):
        back, expected = supervision.take(), on_device(case_batch(case(seed)), "cuda")
        assert back.aux_hidden_states.is_cuda and torch.equal(
            back.aux_hidden_states, expected.aux_hidden_states
        )
        assert torch.equal(back.targets.logits(slice(None)), expected.targets.logits(slice(None)))
