"""The table and the plot of a comparison, from the numbers of its runs."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sparsessm_plugin.files import write_figure

DENSE = "dense"  # the model as it was


def measures(
    perplexity: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    asked_for: Iterable[str],
) -> dict[str, dict[str, Any]]:
    """The numbers that a table shows: perplexities, and the metrics of the tasks asked for.

    :param perplexity: name of a text -> numbers, as ``Perplexity.to_dict`` gives them
    :param tasks: name of a task -> numbers, as ``TaskResult.to_dict`` gives them
    :param asked_for: names of tasks, groups or tags; a tag stands for tasks of other names
    """
    found: dict[str, dict[str, Any]] = {
        f"{name}, perplexity": {
            "value": numbers["perplexity"],
            "stderr": None,
            "higher_is_better": False,
        }
        for name, numbers in perplexity.items()
    }
    inner = {name for numbers in tasks.values() for name in numbers["subtasks"]}
    wanted = set(asked_for)
    for name, numbers in tasks.items():
        if name in wanted or name not in inner:
            for metric, number in numbers["metrics"].items():
                found[f"{name}, {metric}"] = dict(number)
    return found


@dataclass(frozen=True)
class Spread:
    """Mean over runs that differ in their seed.

    :param half_range: half of highest - lowest; None for one run
    """

    mean: float
    half_range: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        half = (max(values) - min(values)) / 2 if len(values) > 1 else None
        return cls(mean(values), half)


@dataclass(frozen=True)
class Row:
    """One recipe of a table.

    Shares are of the parameters of the dense model.

    :param removed: share of the parameters that are no longer there
    :param zeros: share that is there and 0
    :param measures: by name
    :param stderr: of measures in a single run, where known
    :param ratio: of measures to the dense model, where less is better
    :param seconds: of pruning
    :param peak_memory: of pruning, bytes
    """

    label: str
    runs: int
    parameters: Spread
    removed: Spread
    zeros: Spread
    measures: Mapping[str, Spread]
    stderr: Mapping[str, float]
    ratio: Mapping[str, float]
    seconds: Spread | None = None
    peak_memory: Spread | None = None
    command: str = ""


def summarize(dense: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for the dense model and one for each recipe, over its seeds; failed runs left out.

    :param dense: parameters, zeros and measures
    :param runs: the same, with recipe, seed, seconds and peak_memory_bytes
    """
    rows = [_row(DENSE, [dense], dense)]
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if "error" not in run:
            by_label.setdefault(run["recipe"], []).append(run)
    return rows + [_row(label, same, dense) for label, same in by_label.items()]


def _number(value: float | None) -> float:
    """JSON holds null in the place of a number that is not finite."""
    return math.nan if value is None else value


def _row(label: str, runs: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> Row:
    def spread(numbers: Iterable[float]) -> Spread:
        return Spread.of(list(numbers))

    first, total = runs[0], dense["parameters"]
    measured = {
        name: spread(_number(run["measures"][name]["value"]) for run in runs)
        for name in first["measures"]
    }
    pruned = label != DENSE
    return Row(
        label=label,
        runs=len(runs),
        parameters=spread(run["parameters"] for run in runs),
        removed=spread(1 - run["parameters"] / total for run in runs),
        zeros=spread(run["zeros"] / total for run in runs),
        measures=measured,
        stderr={
            name: number["stderr"]
            for name, number in first["measures"].items()
            if len(runs) == 1 and number["stderr"] is not None
        },
        ratio={
            name: value.mean / _number(dense["measures"][name]["value"])
            for name, value in measured.items()
            if pruned and not dense["measures"][name]["higher_is_better"]
        },
        seconds=spread(run["seconds"] for run in runs) if pruned else None,
        peak_memory=spread(run["peak_memory_bytes"] for run in runs) if pruned else None,
        command=str(first.get("command", "")),
    )


def markdown(rows: Sequence[Row], commands: bool = False) -> str:
    """A table of Markdown, with what its columns mean below.

    :param commands: add the command of each row
    """
    names = list(rows[0].measures)
    header = ["recipe", "seeds", "parameters", "removed", "zeros", "removed or zero", *names]
    header += ["seconds", "peak memory", *(["command"] if commands else [])]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            row.label,
            str(row.runs) if row.label != DENSE else "",
            f"{row.parameters.mean:,.0f}",
            f"{row.removed.mean:.1%}",
            f"{row.zeros.mean:.1%}",
            f"{row.removed.mean + row.zeros.mean:.1%}",
            *(_cell(row, name) for name in names),
            f"{row.seconds.mean:.1f}" if row.seconds else "",
            f"{row.peak_memory.mean / 2**20:,.0f} MiB" if row.peak_memory else "",
            *([f"`{row.command}`" if row.command else ""] if commands else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + (
        "\n\nShares are of the dense model's parameters. ± is half of (highest - lowest) over the "
        "seeds or, for a single run of a task, lm-eval's standard error. In brackets the ratio to "
        "the dense model. Seconds and peak memory are those of pruning."
    )


def _cell(row: Row, name: str) -> str:
    value = row.measures[name]
    digits = 4 if value.mean < 2 else 2  # shares, or perplexities
    error = value.half_range if value.half_range is not None else row.stderr.get(name)
    text = f"{value.mean:.{digits}f}"
    if error is not None:
        text += f" ± {error:.{digits}f}"
    return text + (f" ({row.ratio[name]:.3f})" if name in row.ratio else "")


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw each measure against parameters, zeros and seconds, as a PNG file.

    The dense model is the line. The bars are the half ranges over the seeds. The file appears
    complete or not at all.

    :raises SparseSSMError: matplotlib is missing, or the file cannot be written
    """
    from sparsessm_plugin.evaluation.latency import check_matplotlib

    check_matplotlib()
    from matplotlib.figure import Figure

    dense, pruned = rows[0], rows[1:]
    names = list(dense.measures)
    columns: list[tuple[str, Callable[[Row], float]]] = [
        ("parameters", lambda row: row.parameters.mean),
        ("zeros, share of the dense parameters", lambda row: row.zeros.mean),
        ("seconds of pruning", lambda row: row.seconds.mean if row.seconds else 0.0),
    ]
    # without pyplot: no window system is asked for, no figure outlives this call
    figure = Figure(figsize=(4.2 * len(columns), 3 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), len(columns), squeeze=False)
    for line, name in zip(panels, names, strict=True):
        for panel, (label, position) in zip(line, columns, strict=True):
            for number, row in enumerate(pruned):
                panel.errorbar(
                    [position(row)],
                    [row.measures[name].mean],
                    yerr=[row.measures[name].half_range or 0.0],
                    marker="osD^v<>P*X"[number // 10 % 10],
                    capsize=3,
                    linestyle="none",
                    color=f"C{number % 10}",
                    label=row.label,
                )
            panel.axhline(dense.measures[name].mean, color="black", linewidth=0.8, label=DENSE)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(name)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    write_figure(path, figure, dpi=120)
