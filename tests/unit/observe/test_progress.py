import io
import logging
import math

import pytest
from rich.console import Console

from megavlm.observe.formats import (
    format_clock,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_rate,
)
from megavlm.observe.metrics import StepMetrics
from megavlm.observe.progress import Progress


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def step_metrics(step, loss=0.41273):
    return StepMetrics(
        step=step,
        loss=loss,
        num_tokens=10.0,
        grad_norm=1.0,
        grad_norms={},
        learning_rates={},
        tokens_per_second=12345.0,
        images_per_second=87.3,
        step_s=2.0,
        consumed_samples=step,
    )


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)


def test_without_a_terminal_there_is_one_log_line_per_step(caplog):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO, logger="megavlm.observe.progress"):
        with Progress(400, 100, True, console=console, clock=clock) as progress:
            clock.now_s += 40.0
            progress.update(step_metrics(120))
            progress.note("saved checkpoint [120]")
    assert console.file.getvalue() == ""
    assert caplog.messages == [
        "step 120/400  loss 0.4127  12.3k tokens/s  87.3 images/s  ETA 0:09:20",
        "saved checkpoint [120]",
    ]


def test_on_a_terminal_there_is_a_bar_and_no_log_line(caplog):
    console = terminal()
    with caplog.at_level(logging.INFO, logger="megavlm.observe.progress"):
        with Progress(400, 0, True, console=console, clock=Clock()) as progress:
            progress.update(step_metrics(120))
            progress.note("saved checkpoint [bold]120[/bold]")
    shown = console.file.getvalue()
    assert "step 120/400" in shown
    assert "loss 0.4127" in shown and "12.3k tokens/s" in shown and "87.3 images/s" in shown
    assert "saved checkpoint [bold]120[/bold]" in shown
    assert not caplog.messages


def test_other_ranks_show_nothing(caplog):
    console = terminal()
    with caplog.at_level(logging.INFO, logger="megavlm.observe.progress"):
        with Progress(400, 0, False, console=console) as progress:
            progress.update(step_metrics(1))
            progress.note("saved")
    assert console.file.getvalue() == ""
    assert not caplog.messages


def test_the_bar_can_be_turned_off_on_a_terminal(caplog):
    console = terminal()
    with caplog.at_level(logging.INFO, logger="megavlm.observe.progress"):
        with Progress(400, 0, True, bar=False, console=console) as progress:
            progress.update(step_metrics(1))
    assert console.file.getvalue() == ""
    assert len(caplog.messages) == 1


def test_the_cursor_comes_back_when_the_run_fails():
    console = terminal()
    with pytest.raises(KeyError):
        with Progress(4, 0, True, console=console):
            raise KeyError("x")
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_eta_counts_only_the_steps_of_this_attempt():
    clock = Clock()
    with Progress(1000, 900, True, bar=False, clock=clock) as progress:
        assert math.isnan(progress.eta_s(900))
        clock.now_s += 30.0
        assert progress.eta_s(910) == pytest.approx(270.0)
        assert progress.eta_s(1000) == 0.0


def test_a_loss_that_is_not_a_number_is_shown_as_such(caplog):
    with caplog.at_level(logging.INFO, logger="megavlm.observe.progress"):
        with Progress(4, 0, True, bar=False) as progress:
            progress.update(step_metrics(1, math.nan))
    assert "loss NaN" in caplog.text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_number, 0.0, "0"),
        (format_number, 0.41273, "0.4127"),
        (format_number, 12345.6, "12,346"),
        (format_number, 3e-5, "3.00e-05"),
        (format_number, -math.inf, "-∞"),
        (format_count, 99_999, "99,999"),
        (format_count, 123_456, "123k"),
        (format_count, 999_999, "1M"),
        (format_count, 7.89e9, "7.89B"),
        (format_rate, 0.531, "0.531"),
        (format_rate, 870.4, "870"),
        (format_rate, 12345, "12.3k"),
        (format_duration, 0.53, "0.53 s"),
        (format_duration, 59.6, "1 min 00 s"),
        (format_duration, 7320, "2 h 02 min"),
        (format_duration, 200_000, "2 d 07 h"),
        (format_clock, 3725, "1:02:05"),
        (format_clock, math.nan, "-:--:--"),
        (format_percent, 0.0, "0%"),
        (format_percent, 1.0, "100%"),
        (format_percent, 0.9999, "> 99.9%"),
        (format_percent, 0.0001, "< 0.1%"),
        (format_percent, 0.925, "92.5%"),
    ],
)
def test_formats(function, value, text):
    assert function(value) == text
