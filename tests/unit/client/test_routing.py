from types import SimpleNamespace

from eagle_rpc.client.routing import Router


def replicas(*outstanding: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=f"target{i}", num_outstanding=n) for i, n in enumerate(outstanding)]


def chosen(router: Router, count: int) -> list[str]:
    return [router.choose().name for _ in range(count)]


def test_equally_loaded_replicas_take_turns():
    assert chosen(Router(replicas(0, 0, 0), offset=0), 4) == ["target0", "target1", "target2", "target0"]


def test_trainers_begin_at_different_replicas():
    assert [Router(replicas(0, 0), offset=index).choose().name for index in range(3)] == ["target0", "target1", "target0"]


def test_the_least_loaded_replica_is_preferred_over_the_one_in_turn():
    assert chosen(Router(replicas(2, 2, 1), offset=0), 1) == ["target2"]
