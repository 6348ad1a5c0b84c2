"""The picture of ``sparsessm demo``: what each recipe costs, and what it gains."""

import math
import os
from collections.abc import Callable

from sparsessm_plugin.evaluation.latency import check_matplotlib
from sparsessm_plugin.files import write_figure
from sparsessm_plugin.recipes.demo import DemoResult, Row

GAINS: dict[str, Callable[[Row, Row], float]] = {
    "weight bytes": lambda row, dense: row.weight_bytes / dense.weight_bytes,
    "state bytes": lambda row, dense: row.state_bytes / dense.state_bytes,
    # of W8A8 nothing: stock transformers computes it in floating point
    "seconds a token": lambda row, dense: (
        math.nan if row.quantized else dense.tokens_per_second / row.tokens_per_second
    ),
}


def label(row: Row) -> str:
    """What a row is called."""
    return f"{row.name} + W8A8" if row.quantized else row.name


def plot_demo(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Draw perplexity over the dense model's, and what is left of bytes and time, as a PNG file.

    The file appears complete or not at all.

    :raises SparseSSMError: matplotlib is missing, or the file cannot be written
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    dense, rows = result.rows[0], result.rows[1:]
    places = list(range(len(rows)))[::-1]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.4), layout="constrained")
    loss, gain = figure.subplots(1, 2, sharey=True)
    losses = [100 * (row.perplexity / dense.perplexity - 1) for row in rows]
    loss.barh(places, losses, color="tab:red", alpha=0.7)
    for place, percent in zip(places, losses, strict=True):
        loss.text(max(0.0, percent), place, f" {percent:+.1f} %", va="center")
    loss.set_xlim(min(0.0, *losses), 1.2 * max(1.0, *losses))
    loss.set_yticks(places, [label(row) for row in rows])
    loss.set_title("perplexity against dense, in %")
    for shift, (name, of) in zip((0.26, 0, -0.26), GAINS.items(), strict=True):
        left = [of(row, dense) for row in rows]
        gain.barh([place + shift for place in places], left, height=0.26, label=name, alpha=0.8)
    gain.set_title("share of the dense model that is left")
    gain.legend(fontsize="small")
    for panel in (loss, gain):
        panel.grid(axis="x", alpha=0.3)
    gain.axvline(1, color="black", linewidth=1)
    write_figure(path, figure, dpi=130)
