"""From sizes and costs to the mix of least loss: tables, a choice, and trials of the best."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import yaml
from loguru import logger

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.fitting.axes import AXES, in_order
from sparsessm_plugin.fitting.choice import (
    Array,
    best_mixes,
    fit_overlap,
    front,
    interpolated,
    mixed_losses,
)
from sparsessm_plugin.fitting.losses import Copies, HeldBack, Trials, Tried
from sparsessm_plugin.fitting.prepare import Prepared, sizes_of
from sparsessm_plugin.progress import Stage

_FOR_TABLES, _FOR_TRIALS = 0.35, 0.55  # shares of the time at which each is to be done
_LEAST_TRIED, _MOST_TRIED = 3, 5
_TIMED_AT_ONCE, _TIMINGS = 3, 3
# What a layer's fit reads at most: more says little more, and takes its time from distillation.
_TOKENS = {"cuda": 2**17, "cpu": 2**15}
_LEAST_ROWS = 8
_LEAST_MINUTES = 0.05  # of a distillation
# Of all minutes, those that a finalist is distilled for, and when all finalists are to be done.
_FINALIST, _FOR_FINALISTS = 0.06, 0.75
# Distillation takes more from what loses much: finalists are also the best by roots of the losses.
_ROOTS = (0.5, 0.25)


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
    :param predicted: loss from the tables before and after the correction for axes that interact
    :param loss: of the chosen mix on text held back, before distillation; None if not tried
    :param overlap: of the errors of two axes, see :func:`mixed_losses`
    :param rows: loss tables
    :param candidates: mixes that were tried, in that order
    :param alone: by axis, the size that reaches the targets alone and its loss
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
    alone: dict[str, dict[str, float]]
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
    search = _Search(prepared, model, batches, held_back, started or time.monotonic())
    try:
        search.measure_tables()
        mix = search.choose()
        return search.plan(mix)
    finally:
        search.trials.copies.give_back()


class _Search:
    def __init__(
        self,
        prepared: Prepared,
        model: Any,
        batches: Sequence[Mapping[str, Any]],
        held_back: HeldBack,
        started: float,
    ) -> None:
        self.prepared = prepared
        self.space = prepared.space
        self.started = started
        self.dense_sizes = sizes_of(model)
        used = _first_tokens(batches, _TOKENS.get(prepared.device.type, 2**15))
        self.trials = Trials(Copies(model), batches, used, held_back)
        self.measured: list[dict[int, Tried]] = [{} for _ in self.space.ladders]
        self.tried: dict[tuple[int, ...], Tried] = {}
        self.failed: dict[tuple[int, ...], SparseSSMError] = {}
        self.predictions: dict[tuple[int, ...], float] = {}
        self.distilled: dict[tuple[int, ...], float] = {}

    @property
    def minutes(self) -> float:
        """That have passed."""
        return (time.monotonic() - self.started) / 60

    def is_late(self, share: float) -> bool:
        """Whether more than a share of all the time has passed."""
        return self.minutes > share * self.prepared.settings.minutes

    # -- single axes -----------------------------------------------------------------

    def measure_tables(self) -> None:
        """Try sizes of each axis alone, the middle ones first, as long as there is time."""
        orders = [_order(len(ladder.sizes) - 1) for ladder in self.space.ladders]
        rounds = max(map(len, orders), default=0)
        total = sum(map(len, orders))
        with Stage("loss of single axes", total) as stage:
            for turn in range(rounds):
                for place, order in enumerate(orders):
                    # one size of each axis at least, whatever the time
                    needed = not self.measured[place] or not self.is_late(_FOR_TABLES)
                    if turn < len(order) and needed:
                        self._measure_one(place, order[turn], stage)
                    elif turn < len(order):
                        stage.advance()
        if not any(self.measured):
            raise next(iter(self.failed.values()))

    def _measure_one(self, place: int, step: int, stage: Stage) -> None:
        ladder = self.space.ladders[place]
        size = ladder.sizes[step]
        stage.at(f"{ladder.axis} {size} of {ladder.sizes[0]}")
        mix = tuple(step if p == place else 0 for p in range(len(self.space.ladders)))
        self._try(mix)
        stage.advance()

    def _try(self, mix: tuple[int, ...]) -> None:
        if mix in self.tried or mix in self.failed:
            return
        try:
            self.tried[mix] = self.trials.measure(self.space.sizes(mix))
        except SparseSSMError as error:
            self.failed[mix] = error
            logger.info(f"{self.prepared.described(mix)} cannot be made: {error}")
            return
        shrunk = [place for place, step in enumerate(mix) if step]
        if len(shrunk) == 1:
            self.measured[shrunk[0]][mix[shrunk[0]]] = self.tried[mix]
        size, kept = self.space.sizes(mix).get("layers"), self.tried[mix].kept
        if size is not None and kept is not None and self.space.kept[size] != kept:
            self.space.kept[size] = kept
            self.prepared.forget_counts()

    def tables(self) -> list[Array]:
        """Loss at every size of each axis."""
        return [
            interpolated(
                ladder.sizes, {ladder.sizes[i]: max(t.loss, 0.0) for i, t in found.items()}
            )
            for ladder, found in zip(self.space.ladders, self.measured, strict=True)
        ]

    # -- mixes -----------------------------------------------------------------------

    def overlap(self) -> float:
        """As the mixes tell it that were tried."""
        tables = self.tables()
        mixes = []
        for mix, found in self.tried.items():
            single = [table[i] for table, i in zip(tables, mix, strict=True) if i]
            if len(single) > 1 and all(math.isfinite(loss) for loss in single):
                mixes.append((single, found.loss))
        return fit_overlap(mixes)

    def losses(self) -> Array:
        """Predicted of every mix, and measured where it was tried; infinite if it failed."""
        losses = mixed_losses(self.tables(), self.overlap())
        for mix, found in self.tried.items():
            losses[mix] = found.loss
        for mix in self.failed:
            losses[mix] = np.inf
        return losses

    def choose(self) -> tuple[int, ...]:
        """The mix of least loss within the limits, the best ones by what they really lose."""
        limits = self.prepared.limits()
        with Stage("best mixes", _MOST_TRIED) as stage:
            tries = 0
            while True:
                best = self._best(limits)
                untried = [mix for mix in best if mix not in self.tried]
                settled = bool(best) and best[0] in self.tried
                if not untried or tries >= _MOST_TRIED or (settled and tries >= _LEAST_TRIED):
                    break
                if tries and self.is_late(_FOR_TRIALS):
                    break
                self._try_mix(untried[0], stage)
                tries += 1
                stage.advance()
        best = self._best(limits)
        if not best:
            raise SparseSSMError(
                "none of the mixes that were to reach the targets could be made: "
                + "; ".join(dict.fromkeys(map(str, self.failed.values())))
            )
        tried = [mix for mix in best if mix in self.tried]
        chosen = min(tried, key=lambda mix: self.tried[mix].loss) if tried else best[0]
        return self._after_distillation(chosen)

    def _try_mix(self, mix: tuple[int, ...], stage: Stage) -> None:
        stage.at(self.prepared.described(mix))
        predicted = float(mixed_losses(self.tables(), self.overlap())[mix])
        self.predictions.setdefault(mix, predicted)
        self._try(mix)

    def _after_distillation(self, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """The best of a few mixes once each was distilled for a while, where there is time."""
        minutes = _FINALIST * self.prepared.settings.minutes
        seconds = max((t.seconds for t in self.tried.values()), default=0.0)
        needed = (1 + len(_ROOTS)) * (minutes + 2.5 * seconds / 60)
        share = (self.minutes + needed) / self.prepared.settings.minutes
        if minutes < _LEAST_MINUTES or share > _FOR_FINALISTS or not self._distils():
            return chosen
        with Stage("finalists, distilled", 1 + len(_ROOTS)) as stage:
            finalists = [chosen]
            for root in _ROOTS:
                mix = self._best_by(root)
                if mix is not None and mix not in finalists:
                    self._try_mix(mix, stage)
                    finalists += [mix] if mix in self.tried else []
            if len(finalists) < 2:
                return chosen
            for mix in finalists:
                stage.at(self.prepared.described(mix))
                sizes = self.space.sizes(mix)
                self.predictions.setdefault(mix, self.tried[mix].loss)
                self.distilled[mix] = self.trials.measure(sizes, minutes).loss
                stage.advance()
        return min(finalists, key=lambda mix: self.distilled[mix])

    def _distils(self) -> bool:
        classes = (AXES[ladder.axis].modifier_class for ladder in self.space.ladders)
        return all("distill_minutes" in cls.model_fields for cls in classes)

    def _best_by(self, root: float) -> tuple[int, ...] | None:
        """The mix of least loss if each axis lost a root of what it loses."""
        losses = mixed_losses([table**root for table in self.tables()])
        for mix in self.failed:
            losses[mix] = np.inf
        limits = self.prepared.limits()
        for _ in range(_TIMINGS):
            best = best_mixes(losses, self.prepared.costs(), limits)
            if not best or self.prepared.is_timed(best[0]):
                return best[0] if best else None
            self.prepared.know_times(best)
        return None

    def _best(self, limits: Sequence[float]) -> list[tuple[int, ...]]:
        """Mixes within the limits, best first; of the first few all costs are exact."""
        for _ in range(_TIMINGS):
            best = best_mixes(self.losses(), self.prepared.costs(), limits, 4 * _MOST_TRIED)
            first = best[:_TIMED_AT_ONCE]
            for mix in first:
                self._count(mix)
            if all(self.prepared.is_timed(mix) for mix in first[:1]):
                break
            self.prepared.know_times(first)
        allowed = best_mixes(self.losses(), self.prepared.costs(), limits, 4 * _MOST_TRIED)
        # one whose time was only predicted may still miss the limit
        return [m for m in allowed if self.prepared.is_timed(m)] or allowed

    def _count(self, mix: tuple[int, ...]) -> None:
        try:
            self.prepared.know_counts(mix)
        except SparseSSMError as error:
            self.failed.setdefault(mix, error)

    # -- the plan --------------------------------------------------------------------

    def plan(self, mix: tuple[int, ...]) -> Plan:
        """What to do, and how it was found."""
        sizes, tried = self.space.sizes(mix), self.tried.get(mix)
        needed = 0.0 if tried is None else 1.2 * tried.seconds / 60
        left = self.prepared.settings.minutes - self.minutes - needed
        recipe, distilled = self._recipe(sizes, left)
        tables, costs = self.tables(), self.prepared.costs()
        targets = self.prepared.settings.targets
        single = [float(table[i]) for table, i in zip(tables, mix, strict=True) if i]
        losses = mixed_losses(tables, self.overlap())
        kinds = [target.kind for target in targets]

        def costs_of(where: tuple[int, ...]) -> dict[str, float]:
            return {kind: float(cost[where]) for kind, cost in zip(kinds, costs, strict=True)}

        return Plan(
            targets=tuple(target.text for target in targets),
            dense=self.dense_sizes,
            sizes=sizes,
            recipe=recipe,
            costs=costs_of(mix),
            predicted=sum(single),
            loss=None if tried is None else tried.loss,
            overlap=self.overlap(),
            rows=self._rows(tables, costs_of),
            candidates=[
                Candidate(
                    found.sizes,
                    costs_of(m),
                    self.predictions[m],
                    found.loss,
                    found.seconds,
                    self.distilled.get(m),
                )
                for m, found in self.tried.items()
                if m in self.predictions
            ],
            alone=self._alone(tables, costs),
            excluded=[asdict(entry) for entry in self.prepared.excluded],
            distill_minutes=distilled,
            seconds=60 * self.minutes,
            front=_front(losses, costs[0]),
            speed=self._speed(mix),
        )

    def _recipe(self, sizes: Mapping[str, int], minutes: float) -> tuple[str, float]:
        """YAML, and the minutes of distillation in it."""
        last = in_order(sizes)[-1].modifier_class
        able = "distill_minutes" in last.model_fields and minutes >= _LEAST_MINUTES
        distilled = round(minutes, 2) if able else 0.0
        fields = self.trials.fields(sizes, distilled)
        modifiers = {AXES[name].modifier_class.__name__: own for name, own in fields.items()}
        asked = ", ".join(target.text for target in self.prepared.settings.targets)
        content = {"removal_stage": {"removal_modifiers": modifiers}}
        body = yaml.safe_dump(content, sort_keys=False)
        return f"# Found by `sparsessm fit` for {asked}.\n{body}", distilled

    def _rows(self, tables: Sequence[Array], costs_of: Any) -> list[Row]:
        rows = []
        for place, (ladder, table) in enumerate(zip(self.space.ladders, tables, strict=True)):
            for step, size in enumerate(ladder.sizes[1:], 1):
                mix = tuple(step if p == place else 0 for p in range(len(tables)))
                tried = self.measured[place].get(step)
                seconds = None if tried is None else round(tried.seconds, 3)
                loss = float(table[step])
                rows.append(Row(ladder.axis, size, costs_of(mix), loss, tried is not None, seconds))
        return rows

    def _alone(
        self, tables: Sequence[Array], costs: Sequence[Array]
    ) -> dict[str, dict[str, float]]:
        limits, found = self.prepared.limits(), {}
        for place, (ladder, table) in enumerate(zip(self.space.ladders, tables, strict=True)):
            for step, size in enumerate(ladder.sizes[1:], 1):
                mix = tuple(step if p == place else 0 for p in range(len(tables)))
                if all(c[mix] <= limit for c, limit in zip(costs, limits, strict=True)):
                    found[ladder.axis] = {"size": size, "loss": float(table[step])}
                    break
        return found

    def _speed(self, mix: tuple[int, ...]) -> dict[str, Any] | None:
        model = self.prepared.speed
        if model is None:
            return None
        return {
            "workload": str(model.workload),
            "device": model.device,
            "weights": dict(zip(model.features, map(float, model.weights), strict=True)),
            "largest_error": model.error(),
            "share_before_timing": self.prepared.predicted.get(mix),
            "timed": [asdict(entry) for entry in model.timed],
        }


def _front(losses: Array, cost: Array) -> list[tuple[float, float]]:
    return [(float(cost[mix]), float(losses[mix])) for mix in front(losses, cost)]


def _order(steps: int) -> list[int]:
    """Steps 1 to so many: the middle, the last, the first, then what halves the gaps."""
    if steps < 1:
        return []
    order = list(dict.fromkeys([(steps + 1) // 2, steps, 1]))
    return order + [step for step in range(1, steps + 1) if step not in order]


def _first_tokens(batches: Sequence[Mapping[str, Any]], tokens: int) -> int:
    """How many batches hold so many tokens; at least one, at most all."""
    used = 0
    for number, batch in enumerate(batches, 1):
        used += batch["input_ids"].numel()
        if used >= tokens:
            return number
    return len(batches)
