"""What a search found: tables, the mixes that were tried, and the recipe of the best."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.fitting.choice import Array, front
from sparsessm_plugin.fitting.losses import HeldBack
from sparsessm_plugin.fitting.prepare import Excluded, Prepared
from sparsessm_plugin.fitting.search import Search

_LEAST_ROWS = 8


@dataclass(frozen=True)
class Row:
    """A size of an axis.

    :param axis: its name
    :param size: what stays
    :param costs: share of the dense cost, by kind of target, if this axis alone shrinks
    :param loss: nats a token
    :param measured: or taken from the sizes around it
    :param seconds: that measuring it took
    """

    axis: str
    size: int
    costs: dict[str, float]
    loss: float
    measured: bool
    seconds: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A mix that was tried.

    :param sizes: by axis, of those that shrink
    :param costs: share of the dense cost, by kind of target
    :param predicted: loss from the tables, nats a token
    :param loss: measured, before any distillation
    :param seconds: that it took
    :param distilled: loss after a short distillation; None where it had none
    """

    sizes: dict[str, int]
    costs: dict[str, float]
    predicted: float
    loss: float
    seconds: float
    distilled: float | None = None


@dataclass
class Plan:
    """What was found.

    :param targets: as the user wrote them
    :param dense: the model's sizes, by axis
    :param sizes: chosen, of the axes that shrink
    :param recipe: YAML that ``oneshot()`` makes the same sizes by
    :param costs: share of the dense cost by kind of target, predicted
    :param predicted: loss from the tables, and from what other mixes had lost, before it was tried
    :param loss: of the chosen mix on text held back, before distillation; None if not tried
    :param overlap: of the errors of two axes, see :func:`mixed_losses`
    :param rows: loss tables
    :param candidates: mixes that were tried, in that order
    :param alone: by axis, the size that reaches the targets alone, its loss, and whether this was
        measured
    :param excluded: sizes that could not be chosen, and why
    :param distill_minutes: of the recipe
    :param seconds: that the search took
    :param front: (cost, predicted loss) of the mixes that none beats, for the first target
    :param speed: how times were predicted; None where no speed was asked for
    """

    targets: tuple[str, ...]
    dense: dict[str, int]
    sizes: dict[str, int]
    recipe: str
    costs: dict[str, float]
    predicted: float
    loss: float | None
    overlap: float
    rows: list[Row]
    candidates: list[Candidate]
    alone: dict[str, dict[str, Any]]
    excluded: list[dict[str, Any]]
    distill_minutes: float
    seconds: float
    front: list[tuple[float, float]] = field(default_factory=list)
    speed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {**asdict(self), "front": [list(point) for point in self.front]}


def split(
    batches: Sequence[Any], source: str = "the calibration text"
) -> tuple[list[Any], list[Any]]:
    """Batches to fit by, and about an eighth, the last, to measure on.

    :param batches: what ``model(**batch)`` takes
    :param source: what messages call the text
    :raises SparseSSMError: too few
    """
    count = max(1, round(len(batches) / 8))
    if len(batches) < 2 or sum(len(batch["input_ids"]) for batch in batches) < _LEAST_ROWS:
        rows = sum(len(batch["input_ids"]) for batch in batches)
        raise SparseSSMError(
            f"{source} gives {rows} windows in {len(batches)} batches, and fit needs at least "
            f"{_LEAST_ROWS} in 2: one part to fit by and one to measure on; give more text, "
            "shorter windows or smaller batches"
        )
    return list(batches[:-count]), list(batches[-count:])


def make_plan(
    prepared: Prepared,
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    held_back: HeldBack,
    started: float | None = None,
) -> Plan:
    """Measure what each axis loses, choose, and try the best mixes.

    :param prepared: sizes and costs
    :param model: dense; as it was in the end
    :param batches: to choose and fit by
    :param held_back: to measure on
    :param started: by :func:`time.monotonic`, when the minutes began; default now
    :raises SparseSSMError: no axis can be tried at all
    """
    search = Search(prepared, model, batches, held_back, started or time.monotonic())
    try:
        search.measure_tables()
        mix = search.choose()
        return _plan(search, mix)
    finally:
        search.trials.copies.give_back()


def _plan(search: Search, mix: tuple[int, ...]) -> Plan:
    prepared = search.prepared
    sizes, tried = search.space.sizes(mix), search.tried.get(mix)
    recipe, distilled = search.recipe(sizes)
    tables, costs = search.tables(), prepared.costs()
    targets = prepared.settings.targets
    predicted = search.predictions.get(mix, float(search.losses()[mix]))
    kinds = [target.kind for target in targets]

    def costs_of(where: tuple[int, ...]) -> dict[str, float]:
        return {kind: float(cost[where]) for kind, cost in zip(kinds, costs, strict=True)}

    return Plan(
        targets=tuple(target.text for target in targets),
        dense=search.dense_sizes,
        sizes=sizes,
        recipe=recipe,
        costs=costs_of(mix),
        predicted=predicted,
        loss=None if tried is None else tried.loss,
        overlap=search.overlap(),
        rows=_rows(search, tables, costs_of),
        candidates=[
            Candidate(
                found.sizes,
                costs_of(m),
                search.predictions[m],
                found.loss,
                found.seconds,
                search.distilled.get(m),
            )
            for m, found in search.tried.items()
            if m in search.predictions
        ],
        alone=_alone(search, tables, costs),
        excluded=_excluded(search),
        distill_minutes=distilled,
        seconds=60 * search.minutes,
        front=_front(search.losses(), costs[0]),
        speed=_speed(prepared, mix),
    )


def _rows(search: Search, tables: Sequence[Array], costs_of: Any) -> list[Row]:
    rows = []
    for place, (ladder, table) in enumerate(zip(search.space.ladders, tables, strict=True)):
        for step, size in enumerate(ladder.sizes[1:], 1):
            mix = search.space.alone(place, step)
            tried = search.measured[place].get(step)
            seconds = None if tried is None else round(tried.seconds, 3)
            loss = float(table[step])
            if math.isfinite(loss):
                rows.append(Row(ladder.axis, size, costs_of(mix), loss, tried is not None, seconds))
    return rows


def _excluded(search: Search) -> list[dict[str, Any]]:
    found = list(search.prepared.excluded)
    for ladder, measured in zip(search.space.ladders, search.measured, strict=True):
        if not measured:
            found.append(Excluded(ladder.axis, None, "no size of it was measured in the minutes"))
    return [asdict(entry) for entry in found]


def _alone(
    search: Search, tables: Sequence[Array], costs: Sequence[Array]
) -> dict[str, dict[str, Any]]:
    limits, found = search.prepared.limits(), {}
    for place, (ladder, table) in enumerate(zip(search.space.ladders, tables, strict=True)):
        for step, size in enumerate(ladder.sizes[1:], 1):
            mix, loss = search.space.alone(place, step), float(table[step])
            reached = all(c[mix] <= limit for c, limit in zip(costs, limits, strict=True))
            if reached and math.isfinite(loss):
                found[ladder.axis] = {
                    "size": size,
                    "loss": loss,
                    "measured": step in search.measured[place],
                }
                break
    return found


def _speed(prepared: Prepared, mix: tuple[int, ...]) -> dict[str, Any] | None:
    model = prepared.speed
    if model is None:
        return None
    return {
        "workload": str(model.workload),
        "device": model.device,
        "weights": dict(zip(model.features, map(float, model.weights), strict=True)),
        "largest_error": model.error(),
        "share_before_timing": prepared.predicted.get(mix),
        "timed": [asdict(entry) for entry in model.timed],
    }


def _front(losses: Array, cost: Array) -> list[tuple[float, float]]:
    return [(float(cost[mix]), float(losses[mix])) for mix in front(losses, cost)]
