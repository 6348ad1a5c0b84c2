"""Interrupts and terminations: a command stops at once, tidies up and says what it left."""

import signal
import sys
from pathlib import Path
from typing import Any

from sparsessm_plugin.files import resumable

INTERRUPTED = 130
EXIT_CODES = {"interrupted": INTERRUPTED, "terminated": 143}


class Terminated(BaseException):
    """A SIGTERM came; the command tidies up as after an interrupt."""


class Stopped(BaseException):
    """A command was stopped and says itself what that left behind."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


# Those that came. Libraries of C turn the exception into an ImportError while they are imported,
# and what only tries to import them passes over that.
_signals: list[int] = []


def catch_signals() -> None:
    """Let a terminated run tidy up like an interrupted one, whatever the last command left."""
    _signals.clear()
    _outputs.clear()
    resumable.clear()
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, frame: Any) -> None:
    _signals.append(number)
    check_signals()


def _unraisable(ignored: Any) -> None:
    """Say nothing of a stop that came within a destructor: it is looked for again."""
    if not isinstance(ignored.exc_value, (Terminated, KeyboardInterrupt)):
        sys.__unraisablehook__(ignored)


def lost_signal() -> str | None:
    """How the command was stopped, if it was and that was turned into another error."""
    if not _signals:
        return None
    return "terminated" if signal.SIGTERM in _signals else "interrupted"


def check_signals() -> None:
    """Stop, if that was asked for and got lost."""
    if _signals:
        raise Terminated if signal.SIGTERM in _signals else KeyboardInterrupt


# Output folders of the command, and which folder (inode) each was when the command began.
_outputs: dict[Path, int | None] = {}


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def will_write(folder: Path) -> None:
    """Note a folder that the command is to write, so that a stopped one can say whether it did."""
    _outputs[folder] = _inode(folder)


def what_is_left() -> str:
    """A result is moved into place whole, so that another folder stands there, or none is."""
    written = [path for path, before in _outputs.items() if _inode(path) not in (None, before)]
    if written:
        return f"{written[0]} was written before"
    if resumable:
        kept = ", ".join(sorted(map(str, resumable)))
        return f"nothing was written but {kept}, from which the same command goes on"
    return "nothing was written"
