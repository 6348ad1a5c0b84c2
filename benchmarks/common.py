"""What the benchmarks share: assets, versions, result files."""

import argparse
import json
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparsessm_plugin.files import write_json
from sparsessm_plugin.recipes.pruning import versions

RESULTS = Path(__file__).parent / "results"


def assets() -> Path:
    """Checkpoints and texts, from the environment variable SPARSESSM_ASSETS."""
    root = Path(os.environ.get("SPARSESSM_ASSETS", Path(__file__).parents[2] / "shared"))
    if not (root / "models").is_dir():
        raise SystemExit(f"{root} holds no models; set SPARSESSM_ASSETS")
    return root


def perplexities(model: Any, tests: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Perplexity on each text, given as windows."""
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity

    return {
        kind: evaluate_perplexity(model, samples, batch_size).perplexity
        for kind, samples in tests.items()
    }


RECALL = ("lookup", "repeat", "bigram")


def recall_probes(source: Any, tokenizer: Any, text: torch.Tensor, sequences: int) -> list[Any]:
    """Probes of recall, as ``evaluate --tasks recall`` asks them; none of no sequences.

    :param source: a checkpoint, of which the number of tokens is read
    :param text: (tokens,) ids of the text whose spans are repeated
    """
    from sparsessm_plugin.evaluation.recall import make_probes, vocabulary_of

    if not sequences:
        return []
    rows = source.load_skeleton().get_input_embeddings().num_embeddings
    return make_probes(vocabulary_of(tokenizer, rows), text, sequences=sequences)


def recalled(model: Any, probes: list[Any]) -> dict[str, float | None]:
    """Perplexity of the answers of each probe, mean over the distances; None where not asked."""
    from sparsessm_plugin.evaluation.recall import evaluate_recall

    losses: dict[str, list[float]] = {name: [] for name in RECALL}
    for each in evaluate_recall(model, probes):
        losses[each.name].append(each.loss)
    return {
        name: math.exp(statistics.mean(values)) if values else None
        for name, values in losses.items()
    }


def row_of(rows: list[dict[str, Any]], key: dict[str, Any], kinds: Iterable[str]) -> dict[str, Any]:
    """The row with this key, made with empty lists, one entry a run, if it is new.

    :param kinds: texts; each has a list, and so have seconds and seeds
    """
    kinds = tuple(kinds)
    for row in rows:
        if all(row.get(k) == v for k, v in key.items()):
            for name in kinds:  # what an earlier call did not measure
                row.setdefault(name, [None] * len(row["seeds"]))
            return row
    rows.append({**key, **{name: [] for name in (*kinds, "seconds", "seeds")}})
    return rows[-1]


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    """Let several processes share the runs, and put what they made together."""
    parser.add_argument("--part", default="0/1", help="i/n: only every n-th run, from the i-th")
    parser.add_argument("--merge", nargs="+", type=Path, help="only put .json results together")
    parser.add_argument("--remark", default="", help="how they were made, for the table's head")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")


def begin(options: Any) -> dict[str, Any]:
    """What to go on from: nothing, or what an earlier call has measured."""
    path = RESULTS / f"{options.name}.json"
    if not options.resume or not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_versions(path, content.pop("versions"))
    return content


def check_versions(path: Path, found: dict[str, str]) -> None:
    """Do not go on from what other versions, or another kind of device, have measured."""
    here = machine()
    differing = [k for k in here if found.get(k) != here[k] and k != "cpu"]
    if differing:
        raise SystemExit(f"{path} was made with other {', '.join(differing)}")


class Part:
    """Which runs are this process's: asked once a run, in the same order everywhere."""

    def __init__(self, text: str):
        self.own, self.all = (int(number) for number in text.split("/"))
        self.seen = -1

    def next(self) -> bool:
        """Whether the next run is ours."""
        self.seen += 1
        return self.seen % self.all == self.own


def merge(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of several results, those of one case put together, and the machine they name.

    A seed that is there already is not taken again.
    """
    rows: list[dict[str, Any]] = []
    found: dict[str, str] = {}
    for path in paths:
        part = json.loads(path.read_text(encoding="utf-8"))
        if found and part["versions"] != found:
            differing = [k for k, v in part["versions"].items() if found.get(k) != v]
            print(f"{path}: other {', '.join(differing)} than the files before", flush=True)
        found = found or part["versions"]
        for row in part["rows"]:
            key = {k: v for k, v in row.items() if not isinstance(v, list)}
            same = next((r for r in rows if all(r.get(k) == v for k, v in key.items())), None)
            if same is None:
                rows.append(row)
            else:
                new = [i for i, seed in enumerate(row["seeds"]) if seed not in same["seeds"]]
                missing = [None] * len(same["seeds"])
                for name in [name for name, value in row.items() if isinstance(value, list)]:
                    same[name] = same.get(name, missing) + [row[name][i] for i in new]
                for name in [name for name, value in same.items() if isinstance(value, list)]:
                    same[name] += [None] * (len(same["seeds"]) - len(same[name]))
    return rows, found


def cpu_name() -> str:
    """The processor as Linux names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save(
    name: str, markdown: str, numbers: dict[str, object], found: dict[str, str] | None = None
) -> None:
    """Write ``results/<name>.md`` and ``.json`` with the versions, and print the former.

    :param found: versions and machine of numbers that were made elsewhere
    """
    found = found or machine()
    lines = [markdown.rstrip(), "", "Made with " + ", ".join(f"{k} {v}" for k, v in found.items())]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    write_json(RESULTS / f"{name}.json", {**numbers, "versions": found})
    print(text)


def keep(name: str, numbers: dict[str, Any]) -> None:
    """Write what was measured so far; :func:`save` does it again at the end."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {**numbers, "versions": machine()})


def machine() -> dict[str, str]:
    """Versions and processors."""
    return {**versions(), "cpu": f"{cpu_name()}, {os.cpu_count()} cores"}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class OutOfTime(Exception):
    """The budget is used up; what follows is left out and said so."""


class Result:
    """Tables and numbers of all sections, and what went wrong in them."""

    def __init__(self, budget: float, name: str = ""):
        self.budget = budget
        self.name = name
        self.started = time.monotonic()
        self.parts: list[str] = []
        self.numbers: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    def section(self, name: str, work: Callable[["Result"], None]) -> None:
        """Run one section; a failure in it is noted and the next one still runs."""
        started = time.monotonic()
        try:
            work(self)
        except OutOfTime:
            self.note(name, f"stopped after {self.budget:.0f} s, the rest was not measured")
        except Exception as error:
            traceback.print_exc()
            self.note(name, first_line(error))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"[{name}: {time.monotonic() - started:.0f} s]", flush=True)

    def case(self, name: str, work: Callable[[], None]) -> None:
        """Run one case of a section; a failure in it is noted and the next one still runs."""
        if time.monotonic() - self.started > self.budget:
            raise OutOfTime
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.note(name, first_line(error))

    def note(self, name: str, failure: str) -> None:
        print(f"FAILED {name}: {failure}", flush=True)
        self.failures[name] = failure

    def table(self, title: str, text: str, header: list[str], rows: list[list[str]]) -> None:
        lines = [f"## {title}", "", *([text, ""] if text else [])]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.parts.append("\n".join(lines))
        print("\n" + self.parts[-1] + "\n", flush=True)
