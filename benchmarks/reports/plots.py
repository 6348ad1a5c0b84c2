"""Plots of README and documentation, made from the JSON in ``benchmarks/results``.

Loss against what is gained, a line a method, as SVG. Needs matplotlib.
"""

import io
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import matplotlib
from harness import load

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.tables import CRITERIA, by_criterion, projection_rows, structure_rows, whole_models

TITLES = {
    "states": "Perplexity against the share of states that stay, a line a method",
    "projections": "Perplexity against the share of zeros in the projections, a line a method",
    "recipes": "Perplexity against parameters that are gone or zero, a point a recipe",
    "structure": "Perplexity against the parameters that stay, a line a method",
    "speed": "Speed-up of decoding against the batch, a line a recipe",
    "step_kernel": "Speed-up of Mamba-2's decode step against the states that stay",
    "transitions": "Perplexity after half of A_log, a bar a criterion",
    "components": "Perplexity after 80 % of one component, a bar a component",
    "growth": "Seconds of pruning while samples, length, D, N or layers grow",
    "front": "What fewer states cost and save in Mamba-2",
}
_STYLE = {
    "svg.hashsalt": "sparsessm",  # the same file from the same numbers
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.facecolor": "white",  # legible on a dark page, too
}
_COLOURS = {
    "distilled": "#1a7f37",
    "output_energy": "#1f4e9c",
    "output_energy, no compensation": "#7fa6dd",
    "ghost": "#8250df",
    "paper": "#bc4c00",
    "last": "#999999",
    "magnitude": "#cf222e",
}


def svg(figure: Figure) -> bytes:
    """A figure as SVG without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def state_lines(axes: Axes, model: str, full: int) -> None:
    """Perplexity against the share of states, on one pair of axes."""
    cases = by_criterion([f"state_removal_quality_{model}"])
    for criterion in ("magnitude", "last", "paper", "ghost", *list(CRITERIA)[1::-1], "distilled"):
        points = [
            (int(case.rpartition(" ")[2]) / full, cells[criterion])
            for case, cells in cases.items()
            if criterion in cells
        ]
        points = sorted([(1.0, 1.0), *points])
        label = CRITERIA.get(criterion, criterion)
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=_COLOURS[criterion], label=label)
    axes.set_xlabel("share of the states that stay")
    axes.set_ylabel("perplexity, relative to dense")
    axes.invert_xaxis()


def states() -> Figure:
    """Two models beside each other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    state_lines(left, "mamba-25m", 16)
    left.set_title("mamba-25m (N 16)")
    left.set_ylim(0.99, 1.5)  # magnitude leaves the picture: 2.4 and 2.6
    state_lines(right, "mamba2-25m", 128)
    right.set_title("mamba2-25m (N 128)")
    right.legend(loc="upper left", fontsize=8)
    return figure


def projections() -> Figure:
    """Zeros in the projections of two models."""
    figure, pair = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    names = {
        "magnitude": "magnitude",
        "wanda": "Wanda",
        "SparseGPT uniform": "SparseGPT, uniform",
        "SparseGPT of LLM Compressor": "LLM Compressor's SparseGPT",
        "sparsegpt, optimal, mixer": "solver: sparsegpt",
        "defaults": "defaults",
    }
    for axes, model in zip(pair, ("mamba-25m", "mamba2-25m"), strict=True):
        rows = projection_rows(model)
        for method, label in names.items():
            own = {row["case"]: row["relative"] for row in rows if row["method"] == method}
            points = [(0.0, 1.0), *((int(c[:2]) / 100, v) for c, v in own.items() if "%" in c)]
            axes.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
        axes.set_yscale("log")
        axes.set_title(model)
        axes.set_xlabel("share of zeros in the projections")
    pair[0].set_ylabel("perplexity, relative to dense")
    pair[0].legend(fontsize=8)
    return figure


def structure() -> Figure:
    """Fewer layers, a narrower stream and the rest, a panel a model."""
    rows = structure_rows()
    models = sorted({row["model"] for row in rows})
    size = (5.5 * len(models), 3.6)
    figure, panels = plt.subplots(1, len(models), figsize=size, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["model"] == model:
                minutes = f", {row['minutes']:g} min" if row.get("minutes") else ""
                name = f"{row['axis']}: {row['method']}{minutes}"
                point = (fmean(row["parameters"]), fmean(row["corpus"]))
                lines.setdefault(name, []).append(point)
        for name, points in sorted(lines.items()):
            axes.plot(*zip(*sorted([*points, (1.0, 1.0)]), strict=True), "o-", ms=4, label=name)
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_title(model)
        axes.set_xlabel("share of the parameters that stay")
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("perplexity, relative to dense")
    return figure


def recipes() -> Figure:
    """All measured built-in recipes of two models."""
    figure, pair = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, model in zip(pair, ("mamba-25m", "mamba2-25m"), strict=True):
        runs = load(f"results_table_{model}")["models"][model]
        dense = runs["dense"]
        points: dict[str, list[tuple[float, float]]] = {}
        for run in runs.values():
            gone = dense["parameters"] - run["parameters"] + run["zeros"]
            ratio = perplexity(run) / perplexity(dense)
            if not run["recipe"].startswith("benchmarks/") and run is not dense:
                points.setdefault(run["recipe"], []).append((gone / dense["parameters"], ratio))
        for recipe, values in points.items():
            x, y = (fmean(v) for v in zip(*values, strict=True))
            axes.plot(x, y, "o", color=_COLOURS["output_energy"])
            axes.annotate(recipe, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set_title(model)
        axes.set_xlim(-0.03, 0.75)
        axes.set_xlabel("share of the parameters removed or zero")
    pair[0].set_ylabel("perplexity, relative to dense")
    return figure


def perplexity(run: dict[str, Any]) -> float:
    """On held-out text of the model's own kind."""
    return float(run["measures"]["corpus, perplexity"]["value"])


def speed() -> Figure:
    """Decoding of whole models from a CUDA graph."""
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    for shape, variants in whole_models().items():
        for variant, batches in variants.items():
            if variant != "dense":
                axes.plot(
                    list(batches), list(batches.values()), "o-", ms=4, label=f"{shape}, {variant}"
                )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequences decoded together")
    axes.set_ylabel("speed-up against dense")
    axes.legend(fontsize=8)
    return figure


def step_lines(axes: Axes) -> None:
    """The decode step alone, D 5120, states in bfloat16."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in load("state_removal_latency")["Mamba-2 decode step (selective_state_update)"]:
        width, kind, batch = row["labels"]
        if (width, kind) == ("5120", "bfloat16"):
            lines.setdefault(batch, []).append((row["states"], row["speedup"]))
    for batch, points in lines.items():
        x, y = zip(*points, strict=True)
        axes.plot([n / 128 for n in x], y, "o-", ms=4, label=f"batch {batch}")
    axes.set_xlabel("share of the states that stay")
    axes.set_ylabel("speed-up of the decode step")
    axes.invert_xaxis()
    axes.legend(fontsize=8)


def step_kernel() -> Figure:
    """The decode step alone."""
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    step_lines(axes)
    return figure


def transitions() -> Figure:
    """Half of A_log by each criterion, on text like the calibration text."""
    content = load("alog_quality_mamba-25m")
    figure, axes = plt.subplots(figsize=(7, 3.2))
    values: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        ratio = row["perplexity"]["wikitext2 test"] / content["dense"]["wikitext2 test"]
        values.setdefault(row["pruned_value"], {})[row["criterion"]] = ratio
    for shift, (meaning, cells) in zip((-0.2, 0.2), values.items(), strict=True):
        axes.barh([i + shift for i in range(len(cells))], list(cells.values()), 0.38, label=meaning)
        axes.set_yticks(range(len(cells)), list(cells))
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlim(0.95, 2.2)
    axes.set_xlabel("perplexity on WikiText-2, relative to dense")
    axes.legend(fontsize=8)
    return figure


def components() -> Figure:
    """80 % of one component alone."""
    content = load("gradient_quality")["components"]
    dense = fmean(load("whole_model_quality_mamba-25m")["rows"][0]["corpus"])
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for shift, key in ((-0.2, "gradient"), (0.2, "magnitude")):
        heights = [row[key]["corpus"] / dense - 1 for row in content]
        axes.barh([i + shift for i in range(len(content))], heights, 0.38, label=f"by {key}")
    axes.set_yticks(range(len(content)), [row["component"] for row in content])
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("perplexity, relative to dense, less 1")
    axes.legend(fontsize=8)
    return figure


def growth() -> Figure:
    """Seconds of a modifier while one thing grows, relative to where it began."""
    files = {"speed_cpu": "two CPU cores", "speed_gpu_growth": "an H100"}
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.4), sharey=True)
    panels = iter(panels)
    for name, where in files.items():
        for what, axes in load(name)["growth"]["seconds"].items():
            panel = next(panels)
            for axis, taken in axes.items():
                factors = [2**i for i in range(len(taken))]
                panel.plot(factors, [t / taken[0] for t in taken], marker="o", label=axis)
            panel.plot(factors, factors, color="gray", linestyle=":", label="linear")
            panel.set(xscale="log", yscale="log", title=f"{what}, {where}", xlabel="times as much")
            panel.set_xticks(factors, [str(factor) for factor in factors])
            panel.minorticks_off()
    panel.legend(fontsize=8)
    figure.axes[0].set_ylabel("times as long")
    return figure


def served_lines(axes: Axes) -> None:
    """Decoding of a whole model of the 2.7B shape, a line a batch."""
    for batch in (1, 32, 128, 256):
        models = next(
            row["models"]
            for row in load("serving_cuda")["rows"]
            if (row["shape"], row["what"], row["batch"]) == ("Mamba-2, 2.7B", "decode", batch)
        )
        states = [int(model["model"].removeprefix("N ")) for model in models]
        speedups = [model["speedup"] for model in models]
        axes.plot([n / states[0] for n in states], speedups, "o-", ms=4, label=f"batch {batch}")
    axes.set_xlabel("share of the states that stay")
    axes.set_ylabel("speed-up of decoding")
    axes.invert_xaxis()
    axes.legend(fontsize=8)


def front() -> Figure:
    """README's picture: what fewer states of Mamba-2 cost, and what they save."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    state_lines(left, "mamba2-25m", 128)
    left.set_title("cost: mamba2-25m, training-free and distilled")
    left.legend(fontsize=8)
    served_lines(right)
    right.set_title("gain: a whole 2.7B model on one GPU")
    figure.tight_layout(w_pad=3)
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "states": states,
    "projections": projections,
    "structure": structure,
    "recipes": recipes,
    "speed": speed,
    "step_kernel": step_kernel,
    "transitions": transitions,
    "components": components,
    "growth": growth,
    "front": front,
}


def plot(name: str) -> bytes:
    """A plot as SVG.

    :raises KeyError: if there is none of this name
    """
    with plt.rc_context(_STYLE):
        return svg(PLOTS[name]())


def all_plots() -> Iterator[tuple[str, bytes]]:
    """Names and SVG of all plots."""
    for name in PLOTS:
        yield name, plot(name)
