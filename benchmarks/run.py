"""All benchmarks: ``python benchmarks/run.py list`` says what there is.

python benchmarks/run.py NAME --help                  # its fields as options
python benchmarks/run.py NAME --name RESULT --resume  # a result file as it was made, to its end
python benchmarks/run.py NAME --name RESULT --render  # only its tables, from its numbers
python benchmarks/run.py NAME --quick                 # small, on a CPU, saved nowhere
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import harness
import typer
from harness import Experiment, Job
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.files import write_bytes, write_json

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


# -- an experiment as a command ------------------------------------------------------------


class Common(BaseModel):
    """Options of every experiment."""

    name: str = Field("", description="of the result files")
    resume: bool = Field(False, description="go on from the result file")
    render: bool = Field(False, description="only write the tables of the result file")
    quick: bool = Field(False, description="small, on a CPU, saved nowhere")
    budget: float = Field(float("inf"), description="seconds after which no new row begins")
    part: str = Field(
        "0/1", pattern=r"^\d+/[1-9]\d*$", description="i/n: only every n-th run, from the i-th"
    )
    merge: list[Path] = Field([], description="only put these .json files together")


def option_type(annotation: Any) -> Any:
    """What typer is told of a field; what exactly is allowed, pydantic knows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return option_type(next(a for a in arguments if a is not NoneType))
    if origin in (list, tuple):
        return list[option_type(arguments[0])]  # type: ignore[misc]
    return str if origin is Literal else annotation


def option(field: str, about: FieldInfo) -> inspect.Parameter:
    """The option of a field; one that is not given is None, so that presets are known from it."""
    help_ = about.description or ""
    if (default := about.get_default(call_default_factory=True)) not in (None, "", False, []):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        help_ += f" [default: {shown}]"
    hint = Annotated[option_type(about.annotation) | None, typer.Option(help=help_)]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field, kind, default=None, annotation=hint)


def command_of(name: str) -> Callable[..., None]:
    """A function whose parameters are the fields of an experiment and what all have in common."""
    one = harness.experiment(name)
    about = f"{one.measures} ({one.device}, about {one.seconds:g} s: {one.subjects})."
    files = ", ".join(one.results) or "none"

    def work(given: dict[str, Any]) -> None:
        common = {k: given.pop(k) for k in Common.model_fields if k in given}
        run_experiment(name, one, given, Common(**common))

    fields = {**one.configuration.model_fields, **Common.model_fields}
    return command_from(fields, f"{about}\n\nKnown to --name: {files}.", work)


def demo_checkpoint() -> Callable[..., None]:
    """The command that makes the packaged checkpoint."""
    from demo_checkpoint import Fields, make

    return command_from(
        Fields.model_fields,
        "Make the packaged demo checkpoint out of a larger one.",
        lambda given: make(Fields(**given)),
    )


def command_from(
    fields: dict[str, FieldInfo], help_: str, work: Callable[[dict[str, Any]], None]
) -> Callable[..., None]:
    """A command whose options are fields.

    :param work: what it does with the fields that were given
    """
    parameters = [option(field, about) for field, about in fields.items()]

    def command(**options: Any) -> None:
        work({k: v for k, v in options.items() if v is not None and v != []})

    command.__doc__ = help_
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def run_experiment(name: str, one: Experiment, given: dict[str, Any], common: Common) -> None:
    """What the command of an experiment does.

    :param given: fields that were given as options
    """
    result = common.name or next(iter(one.results), name)
    if common.merge:
        content = harness.merge(common.merge)
        made = content.get("configuration", one.results.get(result, {}))
        content["configuration"] = {**made, **given}
        write_json(harness.RESULTS / f"{result}.json", content)
    if common.merge or common.render:
        print(render_result(name, result))
        return
    if common.quick:
        result = result if result in one.quick else next(iter(one.quick))
        preset = dict(one.quick[result])
    else:
        preset = harness.configured(one, result).model_dump(exclude_unset=True)
        if not common.resume:  # it tells how the earlier run was made
            preset.pop("remark", None)
    configuration = one.configuration(**{**preset, **given})
    own, parts = (int(number) for number in common.part.split("/"))
    if parts > 1 and not common.name:
        result += f"_part{own}"
    numbers = harness.begin(one, result, configuration) if common.resume else {}
    job = Job(result, configuration, numbers, common.budget, (own, parts), not common.quick)
    harness.execute(one, job)
    raise SystemExit(1 if job.failures else 0)


def render_result(name: str, result: str) -> str:
    """Write the Markdown of a result file."""
    if not (path := harness.RESULTS / f"{result}.json").exists():
        raise SystemExit(f"error: there is no {path}")
    content = harness.load(result)
    one = harness.experiment(name)
    text = harness.rendered(one, content, harness.configured(one, result, content))
    write_bytes(harness.RESULTS / f"{result}.md", text.encode())
    return text


def spread(arguments: list[str], several: set[str]) -> list[str]:
    """``--models A B`` as ``--models A --models B``.

    :param several: options that may be repeated
    """
    found: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            option = argument if argument in several else None
        elif option is not None and found[-1] != option:
            found.append(option)
        found.append(argument)
    return found


# -- all of them ---------------------------------------------------------------------------


@app.command("list")
def list_experiments() -> None:
    """What there is: what is measured, where, how long it takes, and into which files."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("name", no_wrap=True),
        *("measures", "device", "seconds", "shapes, models"),
        Column("results", overflow="fold"),
        show_lines=True,
    )
    for name in harness.names():
        one = harness.experiment(name)
        results = "\n".join(one.results)
        table.add_row(name, one.measures, one.device, f"{one.seconds:g}", one.subjects, results)
    Console().print(table)


@app.command()
def render() -> None:
    """Write the tables of all result files anew from their numbers."""
    for path in sorted(harness.RESULTS.glob("*.json")):
        if "versions" in harness.load(path.stem):
            render_result(harness.owner(path.stem), path.stem)


@app.command()
def readme() -> None:
    """Write README's table and picture anew from the result files."""
    from reports.readme import write

    write()


@app.command()
def plots(
    output: Annotated[Path, typer.Option(help="folder")] = Path("build/plots"),
) -> None:
    """Draw the plots of the documentation, as SVG."""
    from reports.plots import all_plots

    output.mkdir(parents=True, exist_ok=True)
    for name, svg in all_plots():
        write_bytes(output / f"{name}.svg", svg)


@app.command("all")
def run_all(
    seconds: Annotated[float, typer.Option(help="for all of it")] = 3600,
    results: Annotated[list[str] | None, typer.Option(help="result files; default all")] = None,
    gpus: Annotated[list[str] | None, typer.Option(help="default all")] = None,
    logs: Annotated[Path, typer.Option(help="folder for a log of each")] = Path("build/benchmarks"),
) -> None:
    """Go on with all result files on the GPUs at hand, until a time is up."""
    import torch
    from every import jobs
    from every import run_all as run_jobs

    found = gpus or [str(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise SystemExit("there is no CUDA device; run one with --quick on a CPU")
    run_jobs(seconds, results or list(jobs()), found, logs)


@app.command()
def quick(
    budget: Annotated[float, typer.Option(help="seconds after which no row begins")] = 500,
    only: Annotated[list[str] | None, typer.Option(help="experiments; default all")] = None,
) -> None:
    """Measure what the documentation states for a CPU, smaller, and show both beside each other."""
    from stated import compare

    print(compare(budget, only or harness.names()))


def main() -> None:
    """Add the commands that are asked for, and run one."""
    asked = sys.argv[1:2]
    every = harness.names() if asked in ([], ["--help"]) else []
    wanted = [name for name in harness.names() if name in asked] or every
    several = {"--results", "--gpus", "--only"}
    commands = {name: command_of(name) for name in wanted}
    if asked in ([], ["--help"], ["demo-checkpoint"]):
        commands["demo-checkpoint"] = demo_checkpoint()
    for name, command in commands.items():
        app.command(name)(command)
        several |= {
            f"--{parameter.name.replace('_', '-')}"
            for parameter in inspect.signature(command).parameters.values()
            if "list[" in str(parameter.annotation)
        }
    try:
        app(spread(sys.argv[1:], several))
    except ValidationError as error:
        first = error.errors()[0]
        field = "-".join(map(str, first["loc"])).replace("_", "-")
        raise SystemExit(f"error: --{field}: {first['msg']}, got {first['input']!r}") from None
    except SparseSSMError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
