"""Which stage of pruning runs, how far it is, and how long it will still take.

Modifiers say what they work on; they do not know where it is shown. Inside :func:`shown` it is
a bar on the screen or, where that is no terminal, a plain line now and then; anywhere else a line
in the log.
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

LINE_EVERY = 20.0  # seconds between two plain lines, of whatever stages

_shown: "list[Progress | _Lines]" = []


class _Lines:
    """Plain lines for a file or a pipe, the first one after some time: short work needs none."""

    def __init__(self, console: "Console"):
        self._console = console
        self._latest = time.monotonic()

    def say(self, stage: "Stage") -> None:
        now = time.monotonic()
        if now - self._latest < LINE_EVERY:
            return
        self._latest = now
        self._console.print(f"progress: {stage.described()}", highlight=False, soft_wrap=True)


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
        self._what = ""
        place = _shown[-1] if _shown else None
        self._lines = place if isinstance(place, _Lines) else None
        self._bars = None if isinstance(place, _Lines) else place
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
        self._what = what
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=f"{self.name}: {what}")
        elif self._lines is not None:
            self._lines.say(self)

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        self._begin()
        self.done += steps
        self.latest = time.monotonic()
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, steps)
        elif self._lines is not None:
            self._lines.say(self)
        elif self.latest - self._logged >= _LOG_EVERY:
            self._logged = self.latest
            logger.info(self.described())

    def described(self) -> str:
        """What is worked on, how far it is, and the time left, in one line."""
        what = f"{self.name}: {self._what}" if self._what else self.name
        of = "" if self.total is None else f" of {self.total}"
        return f"{what}: {self.done}{of}, {clock(self.left())} left"

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
    """Show the stages that begin inside as bars; on a console that is no terminal, in plain lines.

    The screen is as before when the context ends, by an error as well.
    """
    if not console.is_terminal:
        _shown.append(_Lines(console))
        try:
            yield
        finally:
            _shown.pop()
        return
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
