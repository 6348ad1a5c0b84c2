"""The command ``sparsessm``: one file a command; here their names, exit codes and errors."""

import os
import sys
import traceback
from typing import Annotated

import typer

from sparsessm_plugin.backends.allocator import keep_freed_memory
from sparsessm_plugin.cli import (
    bench,
    compare,
    component_loss,
    demo,
    evaluate,
    export,
    fit,
    inspect,
    prune,
    recipes,
    stopping,
)
from sparsessm_plugin.cli.console import out, show
from sparsessm_plugin.cli.options import group_options, repeated
from sparsessm_plugin.errors import SparseSSMError, cut
from sparsessm_plugin.processes import end_with_parent, wait_passively

app = typer.Typer(
    help="Prune state-space language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# in the order of the help
for _command in (
    prune.prune,
    fit.fit,
    evaluate.evaluate,
    compare.compare,
    recipes.recipes,
    inspect.inspect,
    bench.bench,
    component_loss.component_loss,
    export.export,
    demo.demo,
):
    group_options(_command)
    app.command()(_command)


def _print_version(asked: bool) -> None:
    if asked:
        from sparsessm_plugin import __version__

        out.print(f"sparsessm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _of_every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass  # its help is the app's


def main() -> None:
    """Entry point: mistakes become one line and exit code 1 or 2, an interrupt 130."""
    wait_passively()  # before anything imports torch
    stopping.catch_signals()
    keep_freed_memory()
    if os.environ.get("NO_COLOR"):  # the help of typer keeps bold and italic
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None
    arguments = sys.argv[1:]
    try:
        end_with_parent()
        # typer shows the help itself; else it would frame what is wrong over several lines
        code = app(repeated(arguments), standalone_mode=not arguments)
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as end:
        # typer has turned a KeyboardInterrupt into this
        if end.code == stopping.EXIT_CODES["interrupted"]:
            _fail_stopped("interrupted")
        raise
    except stopping.Terminated:
        _fail_stopped("terminated")
    except stopping.Stopped as stop:
        _fail(str(stop), stop.code)
    except Exception as error:
        if (stopped := stopping.lost_signal()) is not None:
            _fail_stopped(stopped)
        if "--verbose" in arguments:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # typer's own, of some argument
            _fail(error.format_message(), 2)
        if isinstance(error, OSError):
            _fail(str(error), 1)
        cause = _our_error(error) or _memory_error(error)
        if cause is None:  # a defect, which its line alone does not explain
            said = cut(" ".join(str(error).split()), 400)
            cause = f"{type(error).__name__}: {said} (--verbose shows where)"
        _fail(str(cause), 1)


def _our_error(error: BaseException | None) -> SparseSSMError | None:
    """Our own error where LLM Compressor has wrapped it in one that quotes source code."""
    while error is not None and not isinstance(error, SparseSSMError):
        error = error.__cause__
    return error


def _memory_error(error: BaseException) -> str | None:
    """What to say where a GPU's memory does not suffice for a model, or for its evaluation."""
    from sparsessm_plugin.cost import shortage

    short = shortage(error, None)
    return None if short is None else f"{short}; give a smaller --batch-size or --max-seq-length"


def _fail_stopped(how: str) -> None:
    _fail(f"{how}; {stopping.what_is_left()}", stopping.EXIT_CODES[how])


def _fail(message: str, code: int) -> None:
    show("error", message)
    sys.exit(code)
