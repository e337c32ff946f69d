import io
import logging

from eagle_rpc.report.progress import Progress, in_words

TEXT = "loss 2.346"


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
    progress = Progress("step", 9, done=4, stream=io.StringIO(), clock=clock)
    for _ in range(5):
        clock.seconds += 4.0
        progress.advance(lambda: asked.append(clock.seconds) or TEXT)
    progress.close()
    assert asked == [12.0, 20.0]
    assert caplog.messages == [f"step 7/9, 8 s to go: {TEXT}", f"step 9/9: {TEXT}"]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    clock, terminal = Clock(), Terminal()
    progress = Progress("step", 9, done=7, stream=terminal, clock=clock)
    for _ in range(2):
        clock.seconds += 1.0
        progress.advance(lambda: TEXT)
    progress.close()
    shown = terminal.getvalue()
    assert "7/9" in shown and "9/9" in shown
    assert TEXT in shown


def test_a_text_is_not_asked_for_faster_than_they_can_be_read():
    clock, asked = Clock(), []
    progress = Progress("step", 1000, stream=Terminal(), clock=clock)
    for _ in range(100):
        clock.seconds += 0.01
        progress.advance(lambda: asked.append(1) or TEXT)
    progress.close()
    assert len(asked) <= 2


def test_nothing_is_shown_or_asked_for_by_workers_that_show_nothing(caplog):
    caplog.set_level(logging.INFO, logger="eagle_rpc")
    clock, terminal, asked = Clock(), Terminal(), []
    progress = Progress("step", 2, shown=False, stream=terminal, clock=clock)
    for _ in range(2):
        clock.seconds += 60.0
        progress.advance(lambda: asked.append(1) or TEXT)
    progress.close()
    assert (terminal.getvalue(), caplog.messages, asked) == ("", [], [])


def test_work_of_unknown_size_is_named_and_counted(caplog):
    caplog.set_level(logging.INFO, logger="eagle_rpc")
    clock = Clock()
    progress = Progress("chat", None, title="reading chats.jsonl", stream=io.StringIO(), clock=clock)
    clock.seconds += 10.0
    progress.advance(count=300)
    assert caplog.messages == ["reading chats.jsonl: chat 300"]


def test_durations_are_in_words():
    assert [in_words(seconds) for seconds in (0.4, 89, 90, 5399, 5400, 90000)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "25.0 h",
    ]


def test_units_under_way_count_for_the_time_to_go(caplog):
    caplog.set_level(logging.INFO, logger="eagle_rpc")
    clock = Clock()
    progress = Progress("chat", 41, stream=io.StringIO(), clock=clock)
    clock.seconds += 20.0
    progress.advance(under_way=9.0)
    assert caplog.messages == ["chat 1/41, 62 s to go"]
