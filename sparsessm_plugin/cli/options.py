"""Options that several commands have, and how their values are read."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from sparsessm_plugin.errors import SparseSSMError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


MOST = 2**31 - 1  # of what is counted


def complete_recipe(incomplete: str) -> list[str]:
    """Built-in recipes, for the shell."""
    from sparsessm_plugin.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def completes(*values: str) -> Any:
    """Offer these values to the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("auto", "none", "cpu", "disk")
PIPELINES = ("independent", "sequential", "basic", "datafree")
ModelArgument = Annotated[
    str, typer.Argument(help="Folder, hub name, or mamba-demo-4m (comes with the package).")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", autocompletion=completes(*DEVICES))]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (as saved), float32, bfloat16 or float16.", autocompletion=completes(*DTYPES)
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="Where weights wait for their layer's turn: none (on the device), cpu, disk, or auto: "
        "the first of these with room.",
        autocompletion=completes(*OFFLOADS),
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(help="For weights on disk that have changed; default: beside the result."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's code run.")]
Unused = Annotated[
    bool,
    typer.Option(
        "--allow-unused-tensors", help="Load checkpoints with tensors that the model lacks."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and no tables.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show libraries' logs and warnings, and tracebacks.")
]
Result = Annotated[
    Path, typer.Option(help="Folder for the result; only an earlier result is replaced.")
]
REPORT = typer.Option(help="Write a report to this new .json file.")
CALIBRATION = typer.Option(help="Text file, JSON lines with `text`, or name[:config[:split]].")
NumSamples = Annotated[int, typer.Option(min=1, max=MOST, help="Calibration windows.")]
Seed = Annotated[int, typer.Option(max=2**63 - 1, help="Of the draw of calibration windows.")]
Pipeline = Annotated[
    str,
    typer.Option(
        help="independent, sequential, basic or datafree.", autocompletion=completes(*PIPELINES)
    ),
]
TextField = Annotated[str, typer.Option(help="Key of the text in JSON lines.")]
SeqLength = Annotated[int, typer.Option(min=2, max=MOST, help="Tokens a window.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Windows a forward pass.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="recall (of the first --text), tasks of lm-eval, or blimp_local, piqa_local, "
        "arc_easy_local, lambada_local; with commas or repeated."
    ),
]
TasksData = Annotated[
    Path | None, typer.Option(help="Folder that the *_local tasks read; docs/evaluation.md.")
]
Limit = Annotated[int | None, typer.Option(min=1, max=MOST, help="Documents a task at most.")]
TasksBatchSize = Annotated[
    int, typer.Option(min=1, max=MOST, help="Sequences a forward pass, for tasks.")
]


# Panels of the help, and the parameters whose options stand in each; others are the command's own.
PANELS = {
    "Text": (
        *("calibration", "text", "text_field", "num_samples", "eval_samples", "max_seq_length"),
        *("batch_size", "seed", "seeds"),
    ),
    "Tasks": ("tasks", "tasks_data", "limit", "tasks_batch_size"),
    "Model": (
        "device",
        "offload",
        "offload_folder",
        "dtype",
        "trust_remote_code",
        "allow_unused_tensors",
    ),
    "Result": ("output", "plot", "keep", "as_json", "verbose"),
}
OWN_PANEL = "Options"


def group_options(command: Any) -> None:
    """Let the help of a command show its options in panels.

    :param command: a function whose parameters are annotated with typer's options
    """
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for option in getattr(hint, "__metadata__", ()):
            if isinstance(option, OptionInfo):
                option.rich_help_panel = panels.get(name, OWN_PANEL)


def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SparseSSMError(f"{option} must be one of {', '.join(allowed)}, got {shown(value)}")


@contextmanager
def of_option(option: str) -> "Iterator[None]":
    """Let an error say which option's value it is about."""
    try:
        yield
    except SparseSSMError as error:
        if str(error).startswith(option):
            raise
        raise SparseSSMError(f"{option}: {error}") from error


@contextmanager
def as_options(*options: str) -> "Iterator[None]":
    """Let an error that begins with the name of a parameter begin with its option instead."""
    try:
        yield
    except SparseSSMError as error:
        for option in options:
            if str(error).startswith(f"{option[2:]} "):
                raise SparseSSMError(f"--{error}") from error
        raise


def shares_of(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SparseSSMError(
            f"--sparsities must be numbers between 0 and 1 with commas, got {shown(text)}"
        ) from error


def numbers_of(option: str, text: str, least: int = 0) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    digits = all(part.isascii() and part.isdecimal() and len(part) <= 10 for part in parts)
    if not digits or not all(least <= int(part) <= MOST for part in parts):
        raise SparseSSMError(
            f"{option} must be whole numbers from {least} to {MOST} with commas between them, "
            f"got {shown(text)}"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def split_names(option: str, values: list[str] | None, once: bool = False) -> list[str]:
    """An option that may be repeated and may hold commas, as one list without repeats.

    :param once: refuse repeats
    """
    names = [name.strip() for value in values or [] for name in value.split(",")]
    if not all(names):
        raise SparseSSMError(f"{option} holds an empty name, got {shown(','.join(values or []))}")
    for name in names if once else ():
        if names.count(name) > 1:
            raise SparseSSMError(f"{option}: {shown(name)} is given twice")
    return list(dict.fromkeys(names))


def named(sources: list[str], option: str = "--text") -> dict[str, str]:
    """NAME=SOURCE, or SOURCE alone, which is then its own name."""
    named: dict[str, str] = {}
    for source in sources:
        name, separator, where = source.partition("=")
        if not separator or os.path.exists(source):
            name = where = source
        if not name or not where:
            raise SparseSSMError(f"{option} must be SOURCE or NAME=SOURCE, got {shown(source)}")
        if name in named:
            raise SparseSSMError(f"{option}: two are called {shown(name)}; give NAME=SOURCE")
        named[name] = where
    return named


def new_file(option: str, path: Path | None, *suffixes: str) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise SparseSSMError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if path.exists() or path.is_symlink():
        raise SparseSSMError(f"{option} {path} exists; choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SparseSSMError(f"{option} {path}: {path.parent} is no folder to write to")


def not_the_model(output: Path, model: str) -> None:
    if output.resolve() in (Path(model).resolve(), *Path(model).resolve().parents):
        raise SparseSSMError(f"--output {output} is or holds the model {model}")


def repeated(arguments: list[str]) -> list[str]:
    """``compare MODEL --recipes A B`` as ``compare MODEL --recipes A --recipes B``.

    Only where the model comes first, so that it is not taken for a recipe.
    """
    if arguments[:1] != ["compare"] or arguments[1:2] == [] or arguments[1].startswith("-"):
        return arguments
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--recipes", "--text", "--tasks") else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def command_line(command: Any, values: "Mapping[str, Any]") -> list[str]:
    """What to give to another command, by its own declarations, so that it gets these values.

    :param command: a command of typer's or click's, as a context's group has it
    :param values: by the names of parameters; those that the command lacks are left out, and so
        are arguments, None, switches that are off and empty lists
    """
    line: list[str] = []
    for parameter in command.params:
        value = values.get(parameter.name)
        if parameter.param_type_name != "option" or value is None or value is False:
            continue
        option = parameter.opts[0]
        if parameter.is_flag:
            line.append(option)
            continue
        for single in value if parameter.multiple else [value]:
            line += [option, str(single)]
    return line
