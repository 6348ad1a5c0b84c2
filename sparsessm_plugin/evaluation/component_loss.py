"""How much a model suffers when one of its parts alone is pruned.

One pass over the calibration text gives what pruning needs. Then one part after the other is
pruned, the perplexity of other text is measured, and the part is restored: a kind of weight in all
layers, everything in one layer, or a single weight.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import Tensor, nn

from sparsessm_plugin.criteria import SALIENCIES, SaliencyInputs, Unstructured
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.evaluation.latency import check_matplotlib
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.families import MixerAdapter, find_mixers, read_out
from sparsessm_plugin.families.fast_forward import fast_forward, offer
from sparsessm_plugin.files import write_figure
from sparsessm_plugin.methods.base import check_finite_input, what_enters
from sparsessm_plugin.methods.projections import (
    ProjectionSettings,
    gram_of,
    input_of,
    matching_projections,
)
from sparsessm_plugin.recurrence import ScanStatistics
from sparsessm_plugin.solvers.objective import relative_error
from sparsessm_plugin.solvers.projections import SOLVERS

BY = ("kind", "layer", "module")
_A_LOG = "A_log"
_SALIENCY = "output_error"
_LEAST_SHOWN = 1e-3  # of the perplexity ratio minus 1, where the colours of a plot begin
_MOST_WRITTEN = 24  # columns that still have room for numbers
_DARK = 0.65  # of the colours, from where on ink is white


@dataclass(frozen=True)
class Measurement:
    """What a model loses when one part of it is pruned and all else is dense.

    :param by: ``kind`` (in all layers), ``layer`` (all kinds) or ``module`` (one of both)
    :param kind: ``in_proj``, for instance; None by layer
    :param layer: name of the mixer; None by kind
    :param sparsity: share of the entries that was pruned
    :param entries: entries of the part
    :param perplexity: of the held-back text
    :param ratio: to the dense model's
    :param relative_error: ``|(W - W') X|^2 / |W X|^2`` on the calibration inputs, mean over the
        part's projections; None for A_log alone, which multiplies nothing
    """

    by: str
    kind: str | None
    layer: str | None
    sparsity: float
    entries: int
    perplexity: float
    ratio: float
    relative_error: float | None


@dataclass(frozen=True)
class ComponentLoss:
    """Result of :func:`measure_component_loss`.

    :param kinds: A_log where it is pruned, and the projections in the order of the data
    :param layers: names of the mixers
    :param sparsities: ascending
    :param solver: what projections were pruned with
    :param dense: perplexity of the dense model
    :param measurements: one a part and sparsity
    :param seconds: of the pass over the calibration text, and of all the rest
    """

    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    sparsities: tuple[float, ...]
    solver: str
    dense: float
    measurements: tuple[Measurement, ...]
    seconds: Mapping[str, float]

    @property
    def middle(self) -> float:
        """The sparsity at which single modules are measured."""
        return middle(self.sparsities)

    def ratio(self, by: str, kind: str | None, layer: str | None, sparsity: float) -> float:
        """Perplexity over the dense one; NaN if it was not measured."""
        for found in self.measurements:
            if (found.by, found.kind, found.layer, found.sparsity) == (by, kind, layer, sparsity):
                return found.ratio
        return math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            "kinds": list(self.kinds),
            "layers": list(self.layers),
            "sparsities": list(self.sparsities),
            "solver": self.solver,
            "dense_perplexity": self.dense,
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "seconds": dict(self.seconds),
        }


@dataclass(frozen=True, eq=False)
class _Part:
    """One weight, and how to prune it: sparsity -> new value, relative error."""

    kind: str
    layer: str
    module: nn.Module
    tensor: str
    prune: Callable[[float], tuple[Tensor, float | None]]

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.tensor).detach()


def middle(sparsities: Sequence[float]) -> float:
    """The median, or the upper of two."""
    return sorted(sparsities)[len(sparsities) // 2]


def hold_back(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split windows into those to calibrate on and the last ones, to measure on.

    :param samples: (windows, length)
    :param count: how many to hold back; a quarter, if there are few
    :raises SparseSSMError: less than two windows
    """
    if len(samples) < 2:
        raise SparseSSMError(
            f"one window of {samples.shape[1]} tokens cannot be calibrated on and held back; give "
            "more text, a smaller --max-seq-length, or --text"
        )
    count = min(count, max(1, len(samples) // 4))
    return samples[:-count], samples[-count:]


@torch.no_grad()
def measure_component_loss(
    model: Any,
    calibration: Iterable[Mapping[str, Tensor]],
    samples: Tensor,
    sparsities: Sequence[float] = (0.3, 0.5, 0.7),
    solver: str = "sparsegpt",
    by: Sequence[str] = BY,
    batch_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> ComponentLoss:
    """Prune parts of a model one at a time and measure the perplexity.

    Parts are the projections of the mixers and, where it has an entry for every state, A_log, whose
    pruned entries become 0. A projection is to reproduce what it gives in the dense model. All
    Hessians are held at once. The model is as it was afterwards, whatever happens.

    :param model: transformers causal language model
    :param calibration: batches for the model's forward
    :param samples: (windows, length) token ids to measure the perplexity on
    :param sparsities: each in (0, 1)
    :param solver: ``sparsegpt``, ``alps``, ``wanda`` or ``magnitude``
    :param by: any of ``kind``, ``layer``, and ``module``: single weights, at the middle sparsity
    :param batch_size: windows a forward pass
    :param progress: called with 1 after each measurement, see :func:`count_measurements`
    :raises SparseSSMError: bad settings, an unknown model, no tokens, values that are not finite
    """
    check_settings(sparsities, solver, by)
    sparsities = sorted(set(sparsities))
    training = model.training
    model.eval()
    try:
        started = time.perf_counter()
        parts = _gather(model, calibration, solver)
        gathered = time.perf_counter()
        dense = evaluate_perplexity(model, samples, batch_size).perplexity
        measurements = []
        for sparsity in sparsities:
            groups = [
                group
                for kind in by
                for group in _groups(parts, kind)
                if kind != "module" or sparsity == middle(sparsities)
            ]
            needed = {part for _, _, _, members in groups for part in members}
            pruned = {part: part.prune(sparsity) for part in parts if part in needed}
            for kind_of_group, kind, layer, members in groups:
                with _replaced({part: pruned[part][0] for part in members}):
                    perplexity = evaluate_perplexity(model, samples, batch_size).perplexity
                errors = [e for part in members if (e := pruned[part][1]) is not None]
                measurements.append(
                    Measurement(
                        by=kind_of_group,
                        kind=kind,
                        layer=layer,
                        sparsity=sparsity,
                        entries=sum(part.value.numel() for part in members),
                        perplexity=perplexity,
                        ratio=perplexity / dense,
                        relative_error=sum(errors) / len(errors) if errors else None,
                    )
                )
                if progress is not None:
                    progress(1)
    finally:
        model.train(training)
    return ComponentLoss(
        kinds=tuple(dict.fromkeys(part.kind for part in parts)),
        layers=tuple(dict.fromkeys(part.layer for part in parts)),
        sparsities=tuple(sparsities),
        solver=solver,
        dense=dense,
        measurements=tuple(measurements),
        seconds={
            "calibration": round(gathered - started, 3),
            "measurements": round(time.perf_counter() - gathered, 3),
        },
    )


def check_settings(sparsities: Sequence[float], solver: str, by: Sequence[str]) -> None:
    """Refuse what :func:`measure_component_loss` cannot do, before a model is loaded.

    :raises SparseSSMError: naming the value and what is allowed
    """
    if not sparsities or not all(0.0 < sparsity < 1.0 for sparsity in sparsities):
        raise SparseSSMError(
            f"sparsities must be between 0 and 1, both excluded, got {list(sparsities)}"
        )
    if solver not in SOLVERS:
        raise SparseSSMError(f"solver must be one of {', '.join(SOLVERS)}, got {shown(solver)}")
    if not by or not set(by) <= set(BY):
        raise SparseSSMError(f"by must be any of {', '.join(BY)}, got {', '.join(by) or 'nothing'}")


def count_measurements(model: nn.Module, sparsities: Sequence[float], by: Sequence[str]) -> int:
    """How many measurements :func:`measure_component_loss` will make; the meta device will do."""
    adapters = find_mixers(model)
    kinds = {p.kind: None for p in _projections(model)}
    single = len(_projections(model))
    if with_A_log := [a for a in adapters if a.has_state_transitions]:
        kinds[_A_LOG] = None
        single += len(with_A_log)
    counts = {"kind": len(kinds), "layer": len(adapters)}
    several = sum(counts[kind] for kind in set(by) if kind in counts)
    return several * len(set(sparsities)) + (single if "module" in by else 0)


# -- what can be pruned ------------------------------------------------------------------


def _projections(model: nn.Module) -> list[Any]:
    settings = ProjectionSettings(sparsity=0.5)
    return list(matching_projections(model, settings, "sparsessm component-loss"))


def _gather(model: Any, calibration: Iterable[Mapping[str, Tensor]], solver: str) -> list[_Part]:
    """Run the dense model over the data; its parts, each with what pruning it needs."""
    adapters = find_mixers(model)
    projections = _projections(model)
    hessians: dict[str, Tensor] = {}
    statistics: dict[str, ScanStatistics] = {}
    request = SALIENCIES[_SALIENCY].request("mean", "zero")

    def observe(
        adapter: MixerAdapter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden_states, attention_mask = what_enters(args, kwargs)
        check_finite_input(adapter.name, hidden_states)
        quantities = adapter.quantities(hidden_states, attention_mask)
        if adapter.has_state_transitions and adapter.name not in statistics:
            channels, states = adapter.A_log.shape
            statistics[adapter.name] = ScanStatistics(
                request, channels, states, device=quantities.u.device
            )
        out_input = read_out(adapter, quantities, statistics.get(adapter.name))
        offer(adapter.mixer, hidden_states, attention_mask, out_input)
        for p in projections:
            if p.adapter.name == adapter.name:
                x = input_of(p.kind, quantities, out_input)
                products = gram_of(p, x, x, quantities.mask)
                hessians[p.name] = hessians[p.name] + products if p.name in hessians else products

    handles = [
        a.mixer.register_forward_pre_hook(partial(observe, a), with_kwargs=True) for a in adapters
    ]
    try:
        with fast_forward(model):
            for batch in calibration:
                model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not hessians:
        raise SparseSSMError("there is no calibration text")
    parts = []
    for adapter in adapters:
        if adapter.has_state_transitions:
            prune = partial(_prune_A_log, adapter, statistics[adapter.name])
            parts.append(_Part(_A_LOG, adapter.name, adapter.mixer, _A_LOG, prune))
        own = {p.kind: p for p in projections if p.adapter.name == adapter.name}
        for p in (own[kind] for kind in adapter.projections):
            solve = partial(_prune_projection, p, hessians[p.name], solver)
            parts.append(_Part(p.kind, adapter.name, p.module, p.attribute, solve))
    return parts


def _prune_projection(
    projection: Any, hessian: Tensor, solver: str, sparsity: float
) -> tuple[Tensor, float]:
    weight = projection.weight
    try:
        solved = SOLVERS[solver](weight.float(), hessian, sparsity)
    except SparseSSMError as error:
        raise SparseSSMError(f"{projection.name} cannot be pruned: {error}") from error
    stored = solved.weight.to(weight.dtype)
    return stored, relative_error(weight, stored, hessian)


def _prune_A_log(
    adapter: MixerAdapter, statistics: ScanStatistics, sparsity: float
) -> tuple[Tensor, None]:
    A_log = adapter.A_log.detach()
    if not statistics.is_finite():
        raise SparseSSMError(f"{adapter.name}: NaN or infinite values in its recurrence")
    inputs = SaliencyInputs(
        A_log=A_log.float(),
        out_norm=adapter.out_norm,
        output_error=statistics.output_error,
    )
    score = SALIENCIES[_SALIENCY].score(inputs)
    pruned = Unstructured(sparsity).lowest(score[None])[0]
    kept = torch.where(pruned, A_log.new_tensor(PRUNED_VALUES["zero"]), A_log)
    return kept.view_as(adapter.mixer.A_log), None


def _groups(
    parts: Sequence[_Part], by: str
) -> Iterator[tuple[str, str | None, str | None, list[_Part]]]:
    """By, kind, layer and members of what is pruned together."""
    members: dict[tuple[str | None, str | None], list[_Part]] = {}
    for part in parts:
        key = (part.kind if by != "layer" else None, part.layer if by != "kind" else None)
        members.setdefault(key, []).append(part)
    for (kind, layer), group in members.items():
        yield by, kind, layer, group


@contextmanager
def _replaced(values: Mapping[_Part, Tensor]) -> Iterator[None]:
    """The model with other values; they are put back on exit."""
    dense = {part: part.value.clone() for part in values}
    try:
        for part, value in values.items():
            update_offload_parameter(part.module, part.tensor, value)
        yield
    finally:
        for part, value in dense.items():
            update_offload_parameter(part.module, part.tensor, value)


# -- tables and the picture ---------------------------------------------------------------


@dataclass(frozen=True)
class RatioTable:
    """Perplexity ratios of one way to divide the model.

    :param title: what was pruned
    :param rows: kinds or layers, and what they are
    :param columns: sparsities or layers, and what they are
    :param ratios: row by row
    """

    title: str
    rows: tuple[str, tuple[str, ...]]
    columns: tuple[str, tuple[str, ...]]
    ratios: tuple[tuple[float, ...], ...]


def ratio_tables(losses: ComponentLoss) -> list[RatioTable]:
    """Everything that was measured, as tables for a person."""
    s = losses
    by_sparsity = "sparsity", tuple(f"{sparsity:.0%}" for sparsity in s.sparsities)
    layers = "layer", tuple(_layer_number(name, i) for i, name in enumerate(s.layers))
    kinds = "kind", s.kinds
    tables = [
        RatioTable(title, rows, columns, tuple(tuple(row) for row in ratios))
        for title, rows, columns, ratios in (
            (
                "a kind, in all layers",
                kinds,
                by_sparsity,
                [[s.ratio("kind", kind, None, p) for p in s.sparsities] for kind in s.kinds],
            ),
            (
                "all kinds of a layer",
                layers,
                by_sparsity,
                [[s.ratio("layer", None, name, p) for p in s.sparsities] for name in s.layers],
            ),
            (
                f"a kind in a layer, {s.middle:.0%}",
                kinds,
                layers,
                [[s.ratio("module", k, name, s.middle) for name in s.layers] for k in s.kinds],
            ),
        )
    ]
    return [table for table in tables if not math.isnan(table.ratios[0][0])]


def plot_component_loss(losses: ComponentLoss, path: str | os.PathLike[str]) -> None:
    """Draw the tables as heat maps into a PNG file.

    The file appears complete or not at all.

    :raises SparseSSMError: matplotlib is missing, or the file cannot be written
    """
    check_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    tables = ratio_tables(losses)
    highest = max(measurement.ratio for measurement in losses.measurements) - 1
    norm = LogNorm(_LEAST_SHOWN, max(highest, 10 * _LEAST_SHOWN), clip=True)
    widths = [max(3, len(table.columns[1])) for table in tables]
    height = max(len(table.rows[1]) for table in tables)
    # without pyplot: no window system is asked for, no figure outlives this call
    figure = Figure(
        figsize=(1.5 + len(tables) + 0.55 * sum(widths), 1.8 + 0.4 * height), layout="constrained"
    )
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    for panel, table in zip(axes, tables, strict=True):
        increases = [[max(ratio - 1, _LEAST_SHOWN) for ratio in row] for row in table.ratios]
        image = panel.imshow(increases, norm=norm, cmap="YlOrRd", aspect="auto")
        panel.set_xticks(range(len(table.columns[1])), table.columns[1])
        panel.set_yticks(range(len(table.rows[1])), table.rows[1])
        panel.set_xlabel(table.columns[0])
        panel.set_ylabel(table.rows[0])
        panel.set_title(table.title, fontsize="medium")
        if len(table.columns[1]) > _MOST_WRITTEN:
            continue
        for y, row in enumerate(table.ratios):
            for x, ratio in enumerate(row):
                ink = "white" if norm(increases[y][x]) > _DARK else "black"
                text = f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"
                panel.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="perplexity / dense - 1")
    write_figure(path, figure, dpi=150)


def _layer_number(name: str, index: int) -> str:
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else str(index)
