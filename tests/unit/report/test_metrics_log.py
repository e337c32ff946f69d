import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eagle_rpc.config.choices import TrackerName
from eagle_rpc.report.metrics_log import MetricsLog, read_metrics, truncate_after
from eagle_rpc.report.trackers import TrackedRun, open_trackers


def trackers(path, last_step):
    run = TrackedRun(name="run", directory=path, settings={}, last_step=last_step)
    return open_trackers([TrackerName.tensorboard], run)


def write_steps(path, steps, *, last_step=0, loss=lambda step: step / 2):
    log = MetricsLog(path / "metrics.jsonl", trackers(path, last_step), last_step=last_step)
    for step in steps:
        log.write(step, {"loss": loss(step), "accuracy": [0.25, 0.125]})
    log.close()


def test_a_line_is_readable_while_the_log_is_open(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, {"loss": 1.5, "accuracy": [0.5]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 1.5, "accuracy": [0.5]}
    log.close()


def test_going_on_from_a_step_drops_what_came_after_it(tmp_path):
    write_steps(tmp_path, [2, 4, 6])
    write_steps(tmp_path, [6, 8], last_step=4, loss=lambda step: -step)
    lines = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == [(2, 1.0), (4, 2.0), (6, -6), (8, -8)]


def test_tensorboard_shows_the_same_after_going_on(tmp_path):
    write_steps(tmp_path, [2, 4, 6])
    write_steps(tmp_path, [5, 8], last_step=4, loss=lambda step: -step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (2, 1.0),
        (4, 2.0),
        (5, -5.0),
        (8, -8.0),
    ]
    assert events.Scalars("accuracy/1")[0].value == 0.125


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1]
    truncate_after(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n'


def test_floats_survive_truncation_bit_for_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "loss": 0.1 + 0.2, "rate": 1e-300 / 3}) + "\n"
    path.write_text(line)
    truncate_after(path, 1)
    assert path.read_text() == line
