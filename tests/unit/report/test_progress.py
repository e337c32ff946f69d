import io
import logging

from eagle_rpc.report.progress import TrainingProgress

FIGURES = {
    "loss": 2.3456,
    "accuracy": [0.25, 0.1],
    "simulated_accept_length": 1.5,
    "tokens_per_second": 812.4,
    "wait_share": 0.125,
}
LINE = "loss 2.346, accuracy 0.250, accept length 1.50, 812 tok/s, waiting 12%"


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(caplog):
    caplog.set_level(logging.INFO, logger="eagle_rpc")
    clock, asked = Clock(), []
    progress = TrainingProgress(9, first_step=4, stream=io.StringIO(), clock=clock)
    for _ in range(5):
        clock.seconds += 4.0
        progress.advance(lambda: asked.append(clock.seconds) or FIGURES)
    progress.close()
    assert asked == [12.0, 20.0]
    assert caplog.messages == [f"step 7/9: {LINE}", f"step 9/9: {LINE}"]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    clock, terminal = Clock(), Terminal()
    progress = TrainingProgress(9, first_step=7, stream=terminal, clock=clock)
    for _ in range(2):
        clock.seconds += 1.0
        progress.advance(lambda: FIGURES)
    progress.close()
    shown = terminal.getvalue()
    assert "7/9" in shown and "9/9" in shown
    assert LINE in shown


def test_figures_are_not_asked_for_faster_than_they_can_be_read():
    clock, asked = Clock(), []
    progress = TrainingProgress(1000, stream=Terminal(), clock=clock)
    for _ in range(100):
        clock.seconds += 0.01
        progress.advance(lambda: asked.append(1) or FIGURES)
    progress.close()
    assert len(asked) <= 2
