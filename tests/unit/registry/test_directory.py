import itertools

import pytest
from registry_cases import TTL, Clock, target

from eagle_rpc.errors import InvalidRequest, NameTaken
from eagle_rpc.registry import Directory, IdFile
from eagle_rpc.registry.directory import RunningClock
from eagle_rpc.registry.record import from_json, record_from_json


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ids(tmp_path) -> IdFile:
    return IdFile(tmp_path / "ids")


@pytest.fixture
def directory(ids, clock) -> Directory:
    return Directory(ids, ttl=TTL, clock=clock)


def names(directory: Directory) -> list[tuple[str, str]]:
    return [(one.record.name, one.record.incarnation[:1]) for one in directory.sightings() if one.living]


def test_a_living_name_is_refused_to_another_incarnation_and_its_holder_named(directory, clock):
    directory.announce(target(incarnation="a"))
    clock.now += 1.5
    with pytest.raises(
        NameTaken, match=r"target0 .*incarnation a0000000.*heard of 1\.5 s ago, dead after 3 s"
    ):
        directory.announce(target(incarnation="b", id=2))
    assert names(directory) == [("target0", "a")]


def test_peers_get_the_living_targets_first(directory, clock):
    directory.announce(target(3))
    clock.now += TTL / 2
    living = [
        target(2),
        target(11),
        target(4, role="trainer", run="one"),
        target(0, role="trainer", run="two"),
    ]
    for record in reversed(living):
        directory.announce(record)
    clock.now += TTL / 2
    assert [record_from_json(one) for one in from_json(directory.living())["records"]] == sorted(
        living, key=lambda record: record.place
    )


def test_names_belong_to_a_role_and_a_job(directory):
    directory.announce(target(incarnation="a"))
    directory.announce(target(incarnation="b", role="trainer", run="one"))
    directory.announce(target(incarnation="c", role="trainer", run="two"))
    assert len(directory.sightings()) == 3


def test_a_beat_renews_the_status_and_the_time(directory, clock):
    directory.announce(target(incarnation="a"))
    clock.now += 2
    directory.announce(target(incarnation="a", status={"step": 2}))
    clock.now += 2
    (seen,) = directory.sightings()
    assert (seen.record.status, seen.seconds_silent, seen.living) == ({"step": 2}, 2, True)


def test_a_silent_holder_is_shown_as_silent_then_superseded_and_ends_itself(directory, clock):
    directory.announce(target(incarnation="a"))
    clock.now += TTL
    (silent,) = directory.sightings()
    assert (silent.living, silent.seconds_silent) == (False, TTL)
    assert from_json(directory.living())["records"] == []
    directory.announce(target(incarnation="b", id=2))
    assert names(directory) == [("target0", "b")]
    with pytest.raises(NameTaken, match="incarnation b"):
        directory.announce(target(incarnation="a"))


def test_a_worker_that_was_silent_keeps_its_name_if_nobody_took_it(directory, clock):
    directory.announce(target(incarnation="a"))
    clock.now += 2 * TTL
    directory.announce(target(incarnation="a"))
    assert names(directory) == [("target0", "a")]


def test_the_silent_are_forgotten_in_the_end(directory, clock):
    directory.announce(target(incarnation="a"))
    clock.now += 10 * TTL - 0.1
    assert len(directory.sightings()) == 1
    clock.now += 0.1
    assert directory.sightings() == []


def test_withdrawing_frees_the_name_at_once_and_only_that_incarnations(directory):
    directory.announce(target(incarnation="a"))
    directory.withdraw("b" * 16)
    assert names(directory) == [("target0", "a")]
    directory.withdraw(target(incarnation="a").incarnation)
    directory.announce(target(incarnation="c", id=2))
    assert names(directory) == [("target0", "c")]


def test_after_a_restart_a_newcomer_waits_until_living_workers_have_beaten(ids, directory, clock):
    holder = ids.next()
    directory.announce(target(incarnation="a", id=holder))
    restarted = Directory(ids, ttl=TTL, clock=clock)
    newcomer = target(incarnation="b", id=ids.next())
    with pytest.raises(NameTaken, match=r"free in 3\.0 s"):
        restarted.announce(newcomer)
    clock.now += 1
    restarted.announce(target(incarnation="a", id=holder))
    clock.now += TTL - 0.5
    with pytest.raises(NameTaken, match="incarnation a"):
        restarted.announce(newcomer)
    assert names(restarted) == [("target0", "a")]


def test_after_a_restart_a_name_that_nobody_claims_is_free_after_the_time_to_live(ids, directory, clock):
    ids.next()
    restarted = Directory(ids, ttl=TTL, clock=clock)
    clock.now += TTL
    restarted.announce(target(incarnation="b", id=ids.next()))
    assert names(restarted) == [("target0", "b")]


def test_a_registry_that_never_had_workers_admits_them_at_once(ids, directory):
    directory.announce(target(id=ids.next()))
    assert len(directory.sightings()) == 1


def test_silence_while_the_registry_stood_still_does_not_count(ids):
    wall = Clock()
    directory = Directory(ids, ttl=TTL, clock=RunningClock(wall))

    def run(seconds: float) -> None:
        for _ in range(round(seconds)):
            wall.now += 1
            directory.clock()

    directory.announce(target(0))
    run(1)
    directory.announce(target(1))
    wall.now += 100
    assert [(one.living, one.seconds_silent) for one in directory.sightings()] == [(True, 1), (True, 0)]
    run(TTL - 1)
    assert [one.living for one in directory.sightings()] == [False, True]


def test_all_records_together_are_bounded(directory):
    large = {"text": "x" * 250_000}
    with pytest.raises(InvalidRequest, match="together"):
        for number in itertools.count():
            directory.announce(target(number, status=large))
    held = len(directory.sightings())
    assert 50 < held < 110
    # Those who are in stay in.
    directory.announce(target(0, status=large))
    assert len(directory.sightings()) == held


def test_one_record_is_bounded(directory):
    with pytest.raises(InvalidRequest, match="at most 262144 bytes"):
        directory.announce(target(status={"text": "x" * 300_000}))


def test_who_knows_the_living_workers_is_told_only_that_nothing_changed(directory, clock):
    directory.announce(target(1))
    first = from_json(directory.living())
    directory.announce(target(1, status={"step": 2}))  # peers do not see it
    assert from_json(directory.living(first["digest"])) == {"digest": first["digest"], "records": None}
    for change in (
        lambda: directory.announce(target(2)),
        lambda: directory.announce(target(2, status={"draining": True})),
        lambda: directory.withdraw(target(2).incarnation),
        lambda: setattr(clock, "now", clock.now + TTL),
        lambda: directory.announce(target(1)),
    ):
        known = from_json(directory.living())["digest"]
        change()
        assert from_json(directory.living(known))["records"] is not None


def test_a_worker_that_is_to_drain_hears_it_with_each_announcement_and_its_successor_does_not(directory):
    first, other = target(incarnation="a"), target(1, incarnation="c")
    assert not directory.announce(first) and not directory.announce(other)
    directory.drain([first.incarnation, "0123456789abcdef"])
    assert [directory.announce(first), directory.announce(first), directory.announce(other)] == [
        True,
        True,
        False,
    ]
    directory.withdraw(first.incarnation)
    assert not directory.announce(target(incarnation="b"))


def test_a_trainer_is_not_drained_nor_are_those_that_are_named_beside_it(directory):
    trainer, served = target(incarnation="a", role="trainer", run="one"), target(incarnation="b")
    directory.announce(trainer)
    directory.announce(served)
    with pytest.raises(InvalidRequest, match="only targets and stages are drained, target0 is a trainer"):
        directory.drain([served.incarnation, trainer.incarnation])
    assert not directory.announce(served)
