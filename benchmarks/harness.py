"""What all experiments share: what one is, its numbers while it runs, result files, tables.

Needs no torch, so that tables and plots are made without it.
"""

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sparsessm_plugin.files import write_bytes, write_json

# before any of these libraries is imported
QUIET = {
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
Row = dict[str, Any]


class Configuration(BaseModel):
    """Fields of an experiment; each is an option of its command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    remark: str = Field("", description="how it was made, for the head of the table")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One file of ``experiments/``; its name is that of the file.

    :param measures: what it measures, in a line
    :param device: ``CPU``, ``GPU`` or ``CPU or GPU``
    :param seconds: that all of it takes on that device, about
    :param subjects: shapes or models
    :param run: measures into ``job.numbers`` and yields after every row, which is then saved
    :param render: Markdown from the numbers and the configuration
    :param results: result files, and how the configuration of each differs from the defaults
    :param quick: the same of runs of a minute on a CPU; a name that is not in ``results`` is
        compared with nothing
    :param ratios: what is compared with the documentation, by label
    :param extends: fields that say which rows are made and not how; others must stay as they are
        when a run goes on from its file
    :param alone: whether it wants a GPU for itself
    """

    measures: str
    device: str
    seconds: float
    subjects: str
    run: "Callable[[Job], Iterable[Any]]"
    render: Callable[[dict[str, Any], Any], str]
    configuration: type[Configuration] = Configuration
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quick: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ratios: Callable[[dict[str, Any]], dict[str, float]] | None = None
    extends: tuple[str, ...] = ()
    alone: bool = True


def names() -> list[str]:
    """Of all experiments."""
    return sorted(module.name for module in iter_modules([str(HERE / "experiments")]))


def experiment(name: str) -> Experiment:
    """The experiment of this name."""
    found: Experiment = import_module(f"experiments.{name}").EXPERIMENT
    return found


def configured(one: Experiment, result: str, content: Mapping[str, Any] | None = None) -> Any:
    """The configuration that a result file was made with: it says so, or the experiment does.

    :param content: of the file; None to look whether there is one
    """
    if content is None:
        content = load(result) if (RESULTS / f"{result}.json").exists() else {}
    return one.configuration(**content.get("configuration", one.results.get(result, {})))


def load(name: str) -> Any:
    """A result file by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# -- while it runs -------------------------------------------------------------------------


class Job:
    """One run of an experiment.

    :param name: of the result files
    :param numbers: what an earlier run has measured; what this one does is put there
    :param budget: seconds after which no new row begins
    :param part: (i, n): only every n-th run, from the i-th
    :param kept: whether result files are written
    """

    def __init__(
        self,
        name: str,
        configuration: Any,
        numbers: dict[str, Any] | None = None,
        budget: float = float("inf"),
        part: tuple[int, int] = (0, 1),
        kept: bool = False,
    ):
        self.name, self.configuration, self.budget = name, configuration, budget
        self.numbers = {} if numbers is None else numbers
        self.numbers.pop("failures", None)
        self.part, self.seen = part, -1
        self.kept = kept and os.environ.get("RANK", "0") == "0"
        self.started = time.monotonic()

    @property
    def failures(self) -> dict[str, str]:
        """What could not be measured, and why."""
        found: dict[str, str] = self.numbers.setdefault("failures", {})
        return found

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def mine(self) -> bool:
        """Whether the next run is this process's: asked once a run, by all in the same order."""
        self.seen += 1
        return self.seen % self.part[1] == self.part[0]

    def in_time(self, what: str, needs: float = 0.0) -> bool:
        """Whether there is time for one more row."""
        enough = self.spent + needs <= self.budget
        if not enough:
            print(f"left out: {what}", flush=True)
        return enough

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """Note a failure, so that the next case still runs; of a GPU that is gone none would."""
        try:
            yield
        except Exception as error:
            if not gpu_answers():
                raise
            traceback.print_exc()
            self.note(what, first_line(error))
        if "torch" in sys.modules:
            release_memory()

    def cases(self, section: str, wanted: Iterable[Any]) -> Iterator[Any]:
        """What there is time for; a failure says that the rest was left out."""
        for one in wanted:
            if self.spent > self.budget:
                self.note(section, f"stopped after {self.budget:.0f} s, the rest was not measured")
                return
            yield one

    def note(self, what: str, failure: str) -> None:
        """Add a failure."""
        print(f"FAILED {what}: {failure}", flush=True)
        self.failures[what] = failure

    def keep(self) -> None:
        """Write the numbers so far."""
        if self.kept:
            write_json(RESULTS / f"{self.name}.json", self.content())

    def content(self) -> dict[str, Any]:
        """What the result file holds."""
        chosen = self.configuration.model_dump(mode="json")
        numbers = {k: v for k, v in self.numbers.items() if k not in ("configuration", "versions")}
        found = self.numbers.get("versions") or machine()
        return {"configuration": chosen, **numbers, "versions": found}


def execute(one: Experiment, job: Job) -> None:
    """Run an experiment, saving after every row; an interrupt does not lose what is done."""
    try:
        for told in one.run(job):
            if told is not None:
                print(told, flush=True)
            job.keep()
    finally:
        if job.numbers:
            job.keep()
            text = rendered(one, job.content(), job.configuration)
            if job.kept:
                write_bytes(RESULTS / f"{job.name}.md", text.encode())
            if os.environ.get("RANK", "0") == "0":
                print(text)


def rendered(one: Experiment, content: dict[str, Any], configuration: Any) -> str:
    """The Markdown file of a result."""
    made = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    parts = [configuration.remark, one.render(content, configuration).strip(), f"Made with {made}"]
    return "\n\n".join(filter(None, parts)) + "\n"


def first_line(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def gpu_answers() -> bool:
    """Whether the GPU, where one is in use, still computes for this process.

    A kernel that fails while it runs ends that, and says so wherever the GPU is asked next: what
    came first must be shown, and no case is to blame.
    """
    if "torch" not in sys.modules:
        return True
    import torch

    from sparsessm_plugin.backends.choice import answers

    return not torch.cuda.is_initialized() or answers(torch.device("cuda"))


def release_memory() -> None:
    """Give a GPU's memory back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- result files --------------------------------------------------------------------------


def begin(one: Experiment, name: str, configuration: Any) -> dict[str, Any]:
    """What to go on from: nothing, or what an earlier run of this result file has measured."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found, here = content.pop("versions"), machine()
    if differing := [k for k in here if found.get(k) != here[k] and k != "cpu"]:
        raise SystemExit(f"{path} was made with other {', '.join(differing)}")
    chosen = configuration.model_dump(mode="json")
    before = configured(one, name, content).model_dump(mode="json")
    content.pop("configuration", None)
    free = ("remark", *one.extends)
    if differing := [k for k in chosen if k not in free and before[k] != chosen[k]]:
        told = ", ".join(f"{k} {before[k]}" for k in differing)
        raise SystemExit(f"{path} was made with another configuration: {told}")
    return content


def merge(paths: Iterable[Path]) -> dict[str, Any]:
    """Several result files put together; rows of one case are one row, a seed is taken once."""
    merged: dict[str, Any] = {}
    for path in paths:
        part = json.loads(path.read_text(encoding="utf-8"))
        found = merged.get("versions", part["versions"])
        if differing := [k for k, v in part["versions"].items() if found.get(k) != v]:
            print(f"{path}: other {', '.join(differing)} than the files before", flush=True)
        _merge_into(merged, part)
    return merged


def _merge_into(merged: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name == "rows":
            for row in value:
                _merge_row(merged.setdefault("rows", []), row)
        elif isinstance(value, dict) and name not in ("versions", "configuration"):
            _merge_into(merged.setdefault(name, {}), value)
        else:
            merged.setdefault(name, value)


def _merge_row(rows: list[Row], row: Row) -> None:
    key = {k: v for k, v in row.items() if not isinstance(v, list)}
    same = next((r for r in rows if all(r.get(k) == v for k, v in key.items())), None)
    if same is None:
        rows.append(row)
        return
    new = [i for i, seed in enumerate(row["seeds"]) if seed not in same["seeds"]]
    missing = [None] * len(same["seeds"])
    for name in [name for name, value in row.items() if isinstance(value, list)]:
        same[name] = same.get(name, missing) + [row[name][i] for i in new]
    for name in [name for name, value in same.items() if isinstance(value, list)]:
        same[name] += [None] * (len(same["seeds"]) - len(same[name]))


def owner(result: str) -> str | None:
    """The experiment that a result file is of; None for what lies beside results."""
    own = [name for name in names() if result in experiment(name).results]
    beginning = [name for name in names() if result.startswith(name)]
    return (own or sorted(beginning, key=len, reverse=True) or [None])[0]


# -- the machine ---------------------------------------------------------------------------


def assets() -> Path:
    """Checkpoints and texts, from the environment variable SPARSESSM_ASSETS."""
    root = Path(os.environ.get("SPARSESSM_ASSETS", ROOT.parent / "shared"))
    if not (root / "models").is_dir():
        raise SystemExit(f"{root} holds no models; set SPARSESSM_ASSETS")
    return root


def machine() -> dict[str, str]:
    """Versions and processors."""
    from sparsessm_plugin.recipes.versions import versions

    return {**versions(), "cpu": f"{cpu_name()}, {os.cpu_count()} cores"}


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of packages that may be missing."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    """The processor as Linux names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def needs_gpu() -> None:
    """Stop where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --quick runs the logic without one")


# -- tables --------------------------------------------------------------------------------


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def section(title: str, text: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A heading, what the table below it shows, and the table."""
    return "\n\n".join(filter(None, [f"## {title}", text, markdown(head, rows)]))


def not_measured(content: Mapping[str, Any]) -> str:
    """What failed, or nothing."""
    failures = [f"- {name}: {text}" for name, text in content.get("failures", {}).items()]
    return "## Not measured\n\n" + "\n".join(failures) if failures else ""


def joined(*parts: str) -> str:
    """Paragraphs, without empty ones."""
    return "\n\n".join(filter(None, parts))
