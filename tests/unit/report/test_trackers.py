"""Each tracker through its own library, without a network; those that are not installed are skipped."""

import pytest

from eagle_rpc.config.choices import TrackerName
from eagle_rpc.errors import ConfigError
from eagle_rpc.report.trackers import TrackedRun, flat, open_trackers, require_installed


def track(path, name, steps, *, last_step=0):
    run = TrackedRun(
        name="a-run",
        directory=path,
        settings={"train": {"batch_size": 4, "betas": [0.9]}},
        last_step=last_step,
    )
    (tracker,) = open_trackers([name], run)
    for step in steps:
        tracker.write(step, {"loss": 10.0 - step, "validation/loss": 20.0 - step})
    tracker.close()


def test_a_library_that_is_absent_is_told_with_its_extra_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else object())
    require_installed([TrackerName.tensorboard, TrackerName.wandb])
    with pytest.raises(ConfigError, match=r"report\.trackers=mlflow .* pip install 'eagle-rpc\[mlflow\]'"):
        require_installed([TrackerName.tensorboard, TrackerName.mlflow])


def test_settings_have_one_name_each():
    assert flat({"train": {"betas": [0.9]}, "seed": 1}) == {"train.betas": [0.9], "seed": 1}


def test_wandb_keeps_an_offline_run_and_goes_on_with_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(tmp_path, TrackerName.wandb, [1, 2])
    identity = (tmp_path / "wandb.id").read_text()
    track(tmp_path, TrackerName.wandb, [3], last_step=2)
    kept = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(kept) == 2 and all(name.endswith(identity) for name in kept)
    assert all(list((tmp_path / "wandb" / name).glob("*.wandb")) for name in kept)


def test_mlflow_has_the_figures_of_a_run_that_went_on_under_one_id(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    track(tmp_path, TrackerName.mlflow, [1, 2])
    track(tmp_path, TrackerName.mlflow, [3], last_step=2)
    client = mlflow.tracking.MlflowClient()
    run = (tmp_path / "mlflow.id").read_text()
    history = client.get_metric_history(run, "validation/loss")
    assert [(point.step, point.value) for point in history] == [(1, 19.0), (2, 18.0), (3, 17.0)]
    found = client.get_run(run)
    assert found.data.params["train.batch_size"] == "4" and found.info.status == "FINISHED"


def test_trackio_has_the_figures_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    track(tmp_path, TrackerName.trackio, [1, 2])
    assert list((tmp_path / "trackio").rglob("*.db"))
