"""What the commands say: results on stdout, messages and bars on stderr."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sparsessm_plugin.errors import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# closed before the command began, by `>&-`: what is written there goes nowhere
for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115

# NO_COLOR asks rich for no colours; bold and italic are escapes, too
_plain: "dict[str, Any]" = {"color_system": None} if os.environ.get("NO_COLOR") else {}
# piped output is for programs and files: its tables are not squeezed into 80 columns
out = Console(width=None if sys.stdout.isatty() else 160, **_plain)
err = Console(stderr=True, **_plain)
_LONGEST = 2000  # characters of a message


def show(level: str, message: str) -> None:
    """One line on stderr; of what it quotes, no more than anybody reads."""
    text = cut(" ".join(cut(word) for word in message.split()), _LONGEST)
    text = text.encode("utf-8", "backslashreplace").decode()  # names of files may be any bytes
    color = {"error": "bold red", "critical": "bold red", "warning": "yellow"}.get(level, "dim")
    err.print(f"[{color}]{level}:[/] {escape(text)}", soft_wrap=True, highlight=False)


def print_json(content: Any) -> None:
    """The one result of a command that was asked for ``--json``."""
    from sparsessm_plugin.files import to_json

    sys.stdout.write(to_json(content))


def say_replaced(path: Path) -> None:
    """There was nothing when the command began."""
    if os.path.lexists(path):
        show("warning", f"{path} was written by another process meanwhile; it is replaced")


def quiet(verbose: bool) -> None:
    """Keep the libraries' logs and, where nobody watches, their progress bars off the screen."""
    from sparsessm_plugin.messages import show_messages

    show_messages(show, verbose)
    if verbose:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def progress(label: str, total: int) -> "Iterator[Callable[[int], None]]":
    from sparsessm_plugin.progress import Stage
    from sparsessm_plugin.progress import shown as bars_shown

    with bars_shown(err), Stage(escape(label), total) as stage:
        yield stage.advance
