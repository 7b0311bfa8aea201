"""What a run shows while it goes: a progress bar on a terminal, or one plain log line per log step elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.table import Column

from megavlm.observe.formats import format_clock, format_number, format_rate
from megavlm.observe.metrics import StepMetrics

logger = logging.getLogger(__name__)


class Progress:
    """Progress of a run on the one rank that speaks, as a context manager.

    Args:
        total_steps: the step at which training ends.
        start_step: steps done already (more than 0 after a resume); the ETA is measured from here.
        enabled: False on every rank but one: nothing is shown there.
        bar: False: log lines even on a terminal.
        console: where the bar goes; None: stderr, if that is a terminal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        enabled: bool,
        bar: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._enabled = enabled
        self._clock = clock
        self._start_s = clock()
        is_terminal = sys.stderr.isatty() if console is None else console.is_terminal
        self._bar = _make_bar(console or Console(stderr=True)) if enabled and bar and is_terminal else None
        self._task = rich.progress.TaskID(0)

    def __enter__(self) -> "Progress":
        self._start_s = self._clock()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "step", total=self._total_steps, completed=self._start_step, values="waiting for the first step"
            )
            self._bar.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, metrics: StepMetrics) -> None:
        """Show one log step: a new state of the bar, or one log line."""
        if not self._enabled:
            return
        values = self._describe(metrics)
        if self._bar is None:
            logger.info("step %d/%d  %s", metrics.step, self._total_steps, values)
        else:
            self._bar.update(self._task, completed=metrics.step, values=values, refresh=True)

    def note(self, text: str) -> None:
        """Say one line above the bar (or in the log), e.g. that a checkpoint was saved."""
        if not self._enabled:
            return
        if self._bar is None:
            logger.info("%s", text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def eta_s(self, step: int) -> float:
        """Seconds left after `step`, at the mean pace of this attempt, evaluations and saves included."""
        num_done = step - self._start_step
        if num_done <= 0:
            return math.nan
        return (self._clock() - self._start_s) / num_done * max(0, self._total_steps - step)

    def _describe(self, metrics: StepMetrics) -> str:
        return (
            f"loss {format_number(metrics.loss)}  {format_rate(metrics.tokens_per_second)} tokens/s  "
            f"{format_rate(metrics.images_per_second)} images/s  ETA {format_clock(self.eta_s(metrics.step))}"
        )


def _make_bar(console: Console) -> rich.progress.Progress:
    # Drawn on every update and never by a thread of its own: a thread that holds the console's lock while a data
    # loader forks its workers would leave them a lock that nobody releases.
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}"),
        rich.progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        rich.progress.TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        auto_refresh=False,
        expand=True,
    )
