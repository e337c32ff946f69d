"""What a step holds of its supervision, with the host's memory told apart from the device's by copies."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from support.ttt_cases import Case, case_batch
from training_cases import OBJECTIVE, RandomPlan, TableTarget, random_draft, train_config

from eagle_rpc.draft import count_rows
from eagle_rpc.supervision import Eagle3TargetBatch, StoredProbs
from eagle_rpc.train import TrainerGroup, step_supervision
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.step_supervision import StepSupervision

ACCUMULATION = 6


class Device:
    """Counts large tensors that are alive on it."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref] = []

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        self._seen.append(weakref.ref(tensor))
        return tensor

    @property
    def num_batches(self) -> int:
        """Each has two: hidden states and the targets' values."""
        alive = sum(reference() is not None for reference in self._seen)
        assert alive % 2 == 0
        return alive // 2


@pytest.fixture
def device(monkeypatch) -> Device:
    device, on_host = Device(), weakref.WeakValueDictionary()

    def to_host(tensor):
        copy = tensor.clone()
        on_host[id(copy)] = copy
        return copy

    def to_device(tensor, place):
        return device.note(tensor.clone()) if on_host.get(id(tensor)) is tensor else tensor

    monkeypatch.setattr(step_supervision, "to_host", to_host)
    monkeypatch.setattr(step_supervision, "to_device", to_device)
    return device


def arriving(device: Device) -> Iterator[Eagle3TargetBatch]:
    target, plan = TableTarget(), RandomPlan()
    for index in range(ACCUMULATION):
        yield target.supervise(plan.batch(index)).map_large(device.note)


def learn_and_watch(device: Device, *, offload: bool) -> tuple[str, list[int], list[int]]:
    """The learner's digest after a step, batches on the device after each arrival, and in each micro-batch's
    computation.
    """
    learner = Learner(
        random_draft(), train_config(offload_supervision=offload), OBJECTIVE, TrainerGroup(), total_steps=4
    )
    arrived, computed = [], []
    add_gradients = learner._ttt.add_gradients

    def watched(batch, denominators):
        computed.append(device.num_batches)
        return add_gradients(batch, denominators)

    def watch_arrivals(batches):
        for batch in batches:
            arrived.append(device.num_batches)
            yield batch
            del batch

    learner._ttt.add_gradients = watched
    learner.learn(watch_arrivals(arriving(device)))
    return learner.digest(), arrived, computed


def test_the_device_holds_one_micro_batch_and_the_one_that_arrives(device):
    kept, _, all_at_once = learn_and_watch(device, offload=False)
    assert all_at_once == list(range(ACCUMULATION, 0, -1))
    offloaded, arrived, computed = learn_and_watch(device, offload=True)
    assert arrived == [1] + [2] * (ACCUMULATION - 1)
    assert computed == [1] * ACCUMULATION
    assert offloaded == kept


def test_nothing_of_a_step_is_left_when_it_is_done(device):
    learn_and_watch(device, offload=True)
    assert device.num_batches == 0


def test_rows_are_counted_over_all_micro_batches():
    batches = [case_batch(Case(seed=seed, packed=seed == 2)) for seed in range(3)]
    supervision = StepSupervision(iter(batches), 4, offload=False)
    assert torch.equal(supervision.row_counts, sum(count_rows(batch, 4) for batch in batches))
    assert len(supervision) == 3 and supervision.take().tokens is batches[0].tokens and len(supervision) == 2


@pytest.mark.parametrize("projected", [False, True])
def test_what_waits_on_the_host_comes_back_unchanged(projected, monkeypatch):
    monkeypatch.setattr(step_supervision, "to_host", torch.clone)
    batches = [case_batch(Case(seed=seed, projected=projected)) for seed in range(2)]
    if not projected:
        batches[1].targets = StoredProbs(batches[1].targets.probs(slice(None)))
    supervision = StepSupervision(batches, 4, offload=True)
    for batch in batches:
        back = supervision.take()
        assert torch.equal(back.aux_hidden_states, batch.aux_hidden_states)
        assert torch.equal(back.targets.logits(slice(None)), batch.targets.logits(slice(None)))
        assert torch.equal(back.supervised_rows, batch.supervised_rows) and type(back.targets) is type(
            batch.targets
        )
