"""The loss against the target's cost: single axes beside the mixes."""

import os

from sparsessm_plugin.evaluation.latency import check_matplotlib
from sparsessm_plugin.files import write_figure
from sparsessm_plugin.fitting.whole import FitResult

SUFFIXES = (".png", ".svg")
_LEAST = 1e-5  # nats a token, below which the scale does not show a loss


def plot_fit(result: FitResult, path: str | os.PathLike[str]) -> None:
    """Draw loss against the cost of the first target, as a PNG or SVG file.

    Lines are single axes, their measured sizes as dots, and the best of all mixes as predicted;
    crosses are mixes that were tried, the star is the model that came out.

    :raises SparseSSMError: matplotlib is missing, or the file cannot be written
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    plan = result.plan
    kind = next(iter(plan.costs))
    # without pyplot: no window system is asked for, no figure outlives this call
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    for axis in dict.fromkeys(row.axis for row in plan.rows):
        rows = sorted((r for r in plan.rows if r.axis == axis), key=lambda r: r.costs[kind])
        costs = [row.costs[kind] for row in rows]
        (line,) = panel.plot(costs, [max(row.loss, _LEAST) for row in rows], label=axis)
        measured = [row for row in rows if row.measured]
        panel.plot(
            [row.costs[kind] for row in measured],
            [max(row.loss, _LEAST) for row in measured],
            "o",
            color=line.get_color(),
        )
    points = [(cost, loss) for cost, loss in plan.front if loss > 0]
    if points:
        costs = [cost for cost, _ in points]
        losses = [max(loss, _LEAST) for _, loss in points]
        panel.plot(costs, losses, "k--", label="mixes, predicted")
    if plan.candidates:
        panel.plot(
            [candidate.costs[kind] for candidate in plan.candidates],
            [max(candidate.loss, _LEAST) for candidate in plan.candidates],
            "kx",
            label="mixes, tried",
        )
    label = "result, distilled" if plan.distill_minutes else "result"
    panel.plot([result.costs[kind]], [max(result.loss, _LEAST)], "r*", markersize=12, label=label)
    panel.set_yscale("log")
    panel.set_xlabel("time / dense" if kind == "speed" else f"{kind} / dense")
    panel.set_ylabel("divergence from the dense model, nats a token")
    panel.set_title(", ".join(plan.targets), fontsize="medium")
    panel.grid(alpha=0.3)
    panel.legend()
    write_figure(path, figure, dpi=150)
