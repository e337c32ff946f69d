"""The targets of a large service that one trainer uses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from fake_membership import SETTINGS, FakeMembership, FakeTarget
from support.tiny_target import tiny_batch
from support.waiting import until

from eagle_rpc.client import ClientSettings
from eagle_rpc.client.nearest import nearest
from eagle_rpc.rpc import TargetAddress


def settings(trainer: int, most: int | None) -> ClientSettings:
    return replace(ClientSettings(**SETTINGS), index=trainer, most_targets=most)


def addresses(*indices: int) -> list[TargetAddress]:
    return [TargetAddress(name=f"target{index}", incarnation=f"process{index}") for index in indices]


def test_few_targets_are_all_used():
    assert nearest(addresses(*range(3)), settings(0, 3)) == addresses(*range(3))
    assert nearest(addresses(*range(9)), settings(0, None)) == addresses(*range(9))


def test_trainers_spread_over_all_targets():
    chosen = [nearest(addresses(*range(64)), settings(trainer, 8)) for trainer in range(256)]
    counts = Counter(one.name for near in chosen for one in near)
    assert len(counts) == 64 and {len(near) for near in chosen} == {8}
    assert min(counts.values()) >= 28 and max(counts.values()) <= 36  # 32 in the mean


def test_a_lost_target_changes_one_choice_of_its_own_trainers_only():
    whole, rest = addresses(*range(20)), addresses(*range(19))
    for trainer in range(50):
        before, after = (
            {one.name for one in nearest(listed, settings(trainer, 4))} for listed in (whole, rest)
        )
        assert len(before - after) == ("target19" in before)


def test_a_trainer_moves_to_a_nearer_target_that_joins_and_leaves_the_other_one(server, opened: Callable):
    names = [f"target{index}" for index in range(2)]
    near = nearest(addresses(0, 1), settings(0, 1))[0].name
    far = next(name for name in names if name != near)
    membership = FakeMembership(FakeTarget(far, server))
    backend = opened(membership, most_targets=1)

    def used() -> list[str]:
        return [one["name"] for one in backend.status()["targets"]]

    assert used() == [far]
    membership.known.append(FakeTarget(near, server))
    until(lambda: used() == [near], "the trainer moves", seconds=20)
    backend.generate_batch(*vars_of(tiny_batch(0)))
    assert membership.known[1].num_requests == 1 and membership.num_lost == 0


def vars_of(batch):
    return batch.input_ids, batch.attention_mask, batch.loss_mask
