import os

import pytest

from eagle_rpc.process.environment import prepare_environment, prepare_vllm, read_world, without_torchrun


def test_torchruns_variables_are_hidden_for_a_while_and_come_back(monkeypatch):
    hidden = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_NAME",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ]
    for name in hidden:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(KeyError), without_torchrun():
        assert not read_world().launched and os.environ["OMP_NUM_THREADS"] == "1"
        assert not set(hidden) & set(os.environ)
        raise KeyError
    assert [os.environ[name] for name in hidden] == ["7"] * len(hidden)


@pytest.mark.parametrize(
    ("set_by_user", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_asleep_unless_the_user_says_otherwise(monkeypatch, set_by_user, count):
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    prepare_environment()
    assert os.environ.get("GOMP_SPINCOUNT") == count


@pytest.mark.parametrize(("inside", "value"), [(True, "0"), (False, "1")])
def test_the_place_of_vllms_engine_is_ours_to_say_and_its_log_the_users(monkeypatch, inside, value):
    monkeypatch.setattr(os, "environ", {"VLLM_ENABLE_V1_MULTIPROCESSING": "x", "VLLM_LOGGING_LEVEL": "DEBUG"})
    prepare_vllm(in_this_process=inside)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == value
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
