"""Which stage of pruning runs, how far it is, and how long it will still take.

Modifiers say what they work on; they do not know where it is shown. Inside :func:`shown` it is
a bar on the screen, anywhere else a line in the log now and then.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_LOG_EVERY = 10.0  # seconds between two lines in the log

_shown: "list[Progress]" = []


class Stage:
    """A part of a run, in steps that take about the same time.

    :param name: of the stage, e.g. of a modifier
    :param total: steps, None if nobody knows
    """

    def __init__(self, name: str, total: int | None):
        self.name = name
        self.total = total
        self.done = 0
        self.latest = self._logged = time.monotonic()
        self.started: float | None = None  # when the first step begins, not when it is announced
        self._bars = _shown[-1] if _shown else None
        self._task: TaskID | None = None
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, stage=self)

    def __enter__(self) -> "Stage":
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def at(self, what: str) -> None:
        """Say what is being worked on."""
        self._begin()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=f"{self.name}: {what}")

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        self._begin()
        self.done += steps
        self.latest = time.monotonic()
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, steps)
        elif self.latest - self._logged >= _LOG_EVERY:
            self._logged = self.latest
            of = "" if self.total is None else f" of {self.total}"
            logger.info(f"{self.name}: {self.done}{of}, {clock(self.left())} left")

    def left(self) -> float | None:
        """Seconds to go if the other steps take what the steps so far took; None if unknown."""
        if not self.done or self.total is None or self.started is None:
            return None
        each = (self.latest - self.started) / self.done
        since = time.monotonic() - self.latest
        return max(0.0, each * (self.total - self.done) - since)

    def _begin(self) -> None:
        if self.started is None:
            self.started = time.monotonic()

    def close(self) -> None:
        """Take the stage off the screen, done or not; safe to call again."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


@contextmanager
def shown(console: "Console") -> Iterator[None]:
    """Show the stages that begin inside as bars; on a console that is no terminal, nothing.

    The screen is as before when the context ends, by an error as well.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{clock(task.fields['stage'].left())} left", style="progress.remaining")

    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        Left(),
        console=console,
        transient=True,
        redirect_stdout=False,  # some library would keep the stand-in for ever
        disable=not console.is_terminal,
    ) as bars:
        _shown.append(bars)
        try:
            yield
        finally:
            _shown.pop()


def clock(seconds: float | None) -> str:
    """``1:02:03``, or ``-:--`` if nobody knows."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
