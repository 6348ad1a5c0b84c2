"""The search for a mix: losses of single axes, and trials of the mixes they make look best."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from loguru import logger

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.fitting.axes import AXES, in_order
from sparsessm_plugin.fitting.choice import (
    OVERLAP,
    Array,
    best_mixes,
    corrected,
    fit_overlap,
    interpolated,
    mixed_losses,
)
from sparsessm_plugin.fitting.losses import Copies, HeldBack, Trials, Tried
from sparsessm_plugin.fitting.prepare import Prepared, sizes_of
from sparsessm_plugin.progress import Stage

_FOR_TABLES, _FOR_TRIALS = 0.35, 0.55  # shares of the time at which each is to be done
_LEAST_TRIED, _MOST_TRIED = 3, 8
_TIMED_AT_ONCE, _TIMINGS = 3, 3
_MOST_FAILED = 99  # mixes, after which no better ones are looked for
# What the fits of a recipe read at most: more says little more, and takes its time from
# distillation. Trials are many, and read less.
_TOKENS = {"cuda": 2**17, "cpu": 2**15}
_TRIAL_TOKENS = {"cuda": 2**16, "cpu": 3 * 2**12}
_LEAST_MINUTES = 0.05  # of a distillation
# Of all minutes, those that a finalist is distilled for, and when all finalists are to be done.
_FINALIST, _FOR_FINALISTS = 0.06, 0.8
_LONGER = 1.2  # removals of a recipe than foreseen, at most
# Distillation evens out what axes lose. Finalists are also the best mixes with the loss of each
# axis, per square of the cost that it saves, raised to these powers.
_EVEN = (0.5, 0.25)


class Search:
    """Measures what each axis loses, chooses, and tries the best mixes.

    :param prepared: sizes and costs
    :param model: dense; :meth:`Copies.give_back` of ``trials.copies`` puts it where it was
    :param batches: to choose and fit by
    :param held_back: to measure on
    :param started: by :func:`time.monotonic`, when the minutes began
    """

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
        kind = prepared.device.type
        tokens = prepared.settings.search_tokens or _TRIAL_TOKENS.get(kind, 2**13)
        self.trials = Trials(
            Copies(model),
            batches,
            _first_tokens(batches, tokens),
            held_back,
            _first_tokens(batches, max(tokens, _TOKENS.get(kind, 2**15))),
            self.space.shapes.way,
        )
        self.measured: list[dict[int, Tried]] = [{} for _ in self.space.ladders]
        self.tried: dict[tuple[int, ...], Tried] = {}
        self.failed: dict[tuple[int, ...], SparseSSMError] = {}
        self.predictions: dict[tuple[int, ...], float] = {}
        self.distilled: dict[tuple[int, ...], float] = {}
        self._said_short = False

    @property
    def minutes(self) -> float:
        """That have passed."""
        return (time.monotonic() - self.started) / 60

    def is_late(self, share: float) -> bool:
        """Whether more than a share of all the time has passed."""
        return self.minutes > share * self.prepared.settings.minutes

    def has_time(self, seconds: float) -> bool:
        """Whether what is foreseen to take so long ends within the minutes."""
        return self.minutes + seconds / 60 <= self.prepared.settings.minutes

    def _best_known(self) -> tuple[int, ...] | None:
        """The mix of least loss that reaches the targets, of axes that were measured."""
        best = best_mixes(self.losses(), self.prepared.costs(), self.prepared.limits())
        return best[0] if best else None

    def _rest(self, mix: tuple[int, ...]) -> float:
        """Seconds of what is done in any case: a mix is tried, and made by the recipe."""
        sizes = self.space.sizes(mix)
        made = _LONGER * self.trials.removal_seconds(sizes, self.trials.efforts[-1])
        return made if mix in self.tried else made + self.trials.trial_seconds(sizes)

    def _say_if_short(self) -> None:
        """Say once that even what is done in any case does not end within the minutes."""
        best = self._best_known()
        if best is None or self._said_short or self.has_time(self._rest(best)):
            return
        self._said_short = True
        logger.warning(
            f"{self.prepared.settings.minutes:g} minutes are too few: the least, to measure axes "
            "until a mix of them reaches the targets, to try that mix and to make it, takes about "
            f"{self.minutes + self._rest(best) / 60:.3g}"
        )

    # -- single axes -----------------------------------------------------------------

    def measure_tables(self) -> None:
        """Try sizes of each axis alone, the middle ones first, as long as there is time.

        In any case as many axes as it takes until some mix of them reaches the targets.
        """
        orders = [_order(len(ladder.sizes) - 1) for ladder in self.space.ladders]
        rounds = max(map(len, orders), default=0)
        places = sorted(range(len(orders)), key=self._turn)
        with Stage("loss of single axes", sum(map(len, orders))) as stage:
            for turn in range(rounds):
                for place in places:
                    if turn >= len(orders[place]):
                        continue
                    step = orders[place][turn]
                    if self._is_to_be_measured(place, step):
                        self._measure_one(place, step, stage)
                        self._say_if_short()
                    else:
                        stage.advance()
        if not any(self.measured):
            raise next(iter(self.failed.values()))

    def _turn(self, place: int) -> tuple[bool, bool]:
        """First axes that reach the targets alone; layers, whose sets are compared, last of all."""
        end = self.space.alone(place, -1)
        limits = zip(self.prepared.costs(), self.prepared.limits(), strict=True)
        alone = all(cost[end] <= limit for cost, limit in limits)
        return self.space.ladders[place].axis == "layers", not alone

    def _is_to_be_measured(self, place: int, step: int) -> bool:
        if self.measured[place] and self.is_late(_FOR_TABLES):
            return False
        best = self._best_known()
        if best is None:  # this axis may be what is missing
            return True
        sizes = self.space.sizes(self.space.alone(place, step))
        return self.has_time(self.trials.trial_seconds(sizes) + self._rest(best))

    def _measure_one(self, place: int, step: int, stage: Stage) -> None:
        ladder = self.space.ladders[place]
        stage.at(f"{ladder.axis} {ladder.sizes[step]} of {ladder.sizes[0]}")
        self._try(self.space.alone(place, step))
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
        tables = self.tables()
        tried = {mix: found.loss for mix, found in self.tried.items()}
        losses = corrected(mixed_losses(tables, self.overlap()), tables, tried)
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
                if tries == 1:  # that a mix is better is not to be taken on trust
                    untried = self._best_alone(limits) + untried
                if not untried or tries >= _MOST_TRIED or (settled and tries >= _LEAST_TRIED):
                    break
                if tries and self.is_late(_FOR_FINALISTS if tries == 1 else _FOR_TRIALS):
                    break
                if tries and not self.has_time(self._rest(untried[0])):
                    break
                layers = self._layers_alone(untried[0])
                if layers is not None:  # which ones stay decides what the mix costs
                    self._try(layers)
                    continue
                self._try_mix(untried[0], stage)
                tries += 1
                stage.advance()
        best = self._best(limits)
        if not best and not self.failed:
            try:
                self.prepared.check_reached(self.prepared.settings.targets)
            except SparseSSMError as error:
                raise SparseSSMError(f"of the layers that suit the data, {error}") from error
            raise SparseSSMError(
                "the mixes that were predicted to reach the targets miss them once they are timed; "
                "ask for less, or give more --minutes"
            )
        if not best:
            raise SparseSSMError(
                "none of the mixes that were to reach the targets could be made: "
                + "; ".join(dict.fromkeys(map(str, self.failed.values())))
            )
        tried = [mix for mix in best if mix in self.tried]
        chosen = min(tried, key=lambda mix: self.tried[mix].loss) if tried else best[0]
        return self._after_distillation(chosen)

    def _layers_alone(self, mix: tuple[int, ...]) -> tuple[int, ...] | None:
        """The layers that a mix removes, which it begins with, if that has not been tried yet."""
        names = [ladder.axis for ladder in self.space.ladders]
        alone = tuple(
            step if name == "layers" else 0 for name, step in zip(names, mix, strict=True)
        )
        return None if not any(alone) or alone in {**self.tried, **self.failed} else alone

    def _best_alone(self, limits: Sequence[float]) -> list[tuple[int, ...]]:
        """The best mix in which one axis shrinks, where it is within the limits and not tried."""
        losses, costs = self.losses(), self.prepared.costs()
        best = best_mixes(np.where(self._alone(), losses, np.inf), costs, limits)
        return [mix for mix in best if mix not in self.tried]

    def _alone(self) -> Any:
        """Of every mix, whether one axis alone shrinks."""
        shrunk = np.zeros(self.space.shape, dtype=int)
        for place, length in enumerate(self.space.shape):
            view = [-1 if p == place else 1 for p in range(shrunk.ndim)]
            shrunk += (np.arange(length) > 0).reshape(view)
        return shrunk == 1

    def _try_mix(self, mix: tuple[int, ...], stage: Stage) -> None:
        stage.at(self.prepared.described(mix))
        predicted = float(self.losses()[mix])
        self.predictions.setdefault(mix, predicted)
        self._try(mix)

    def _after_distillation(self, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """The best of a few mixes once each was distilled for a while, where there is time."""
        minutes = _FINALIST * self.prepared.settings.minutes
        seconds = max((t.seconds for t in self.tried.values()), default=0.0)
        most = 2 + len(_EVEN)
        needed = most * (minutes + 2 * seconds / 60)
        share = (self.minutes + needed) / self.prepared.settings.minutes
        if minutes < _LEAST_MINUTES or share > _FOR_FINALISTS or not self._distils():
            return chosen
        with Stage("finalists, distilled", most) as stage:
            finalists = [chosen]
            limits, costs = self.prepared.limits(), self.prepared.costs()
            alone = best_mixes(np.where(self._alone(), self.losses(), np.inf), costs, limits)
            for mix in (*alone, *map(self._best_by, _EVEN)):
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

    def _best_by(self, power: float) -> tuple[int, ...] | None:
        """The mix of least loss if what axes lose were evened out by a power below 1."""
        tables, cost = self.tables(), self.prepared.costs()[0]
        for place, table in enumerate(tables):
            own = (0,) * place + (slice(None),) + (0,) * (cost.ndim - place - 1)
            saved = 1 - cost[own]
            known = [i for i in self.measured[place] if saved[i] > 0 and 0 < table[i] < np.inf]
            if known:
                rate = np.exp(np.mean(np.log(table[known] / saved[known] ** 2)))
                table *= rate ** (power - 1)
        losses = mixed_losses(tables, OVERLAP)
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
        timings = 0
        while True:
            best = best_mixes(self.losses(), self.prepared.costs(), limits, 4 * _MOST_TRIED)
            first = best[:_TIMED_AT_ONCE]
            failed = len(self.failed)
            for mix in first:
                self._count(mix)
            if failed < len(self.failed) < _MOST_FAILED:
                continue
            if timings == _TIMINGS or all(self.prepared.is_timed(mix) for mix in first[:1]):
                break
            self.prepared.know_times(first)
            timings += 1
        allowed = best_mixes(self.losses(), self.prepared.costs(), limits, 4 * _MOST_TRIED)
        # one whose time was only predicted may still miss the limit
        return [m for m in allowed if self.prepared.is_timed(m)] or allowed

    def _count(self, mix: tuple[int, ...]) -> None:
        try:
            self.prepared.know_counts(mix)
        except SparseSSMError as error:
            self.failed.setdefault(mix, error)

    # -- the recipe ------------------------------------------------------------------

    def recipe(self, sizes: Mapping[str, int]) -> tuple[str, float]:
        """YAML, and the minutes of distillation in it: those that its removals leave."""
        efforts = self.trials.efforts
        needed = [_LONGER * self.trials.removal_seconds(sizes, effort) for effort in efforts]
        fits = [i for i, seconds in enumerate(needed) if self.has_time(seconds)]
        chosen = fits[0] if fits else -1
        minutes = self.prepared.settings.minutes - self.minutes - needed[chosen] / 60
        last = in_order(sizes)[-1].modifier_class
        able = "distill_minutes" in last.model_fields and minutes >= _LEAST_MINUTES
        distilled = round(minutes, 2) if able else 0.0
        fields = self.trials.fields(sizes, distilled, efforts[chosen])
        if distilled and self.prepared.settings.generated:
            fields[list(fields)[-1]]["distill_generated"] = self.prepared.settings.generated
        modifiers = {AXES[name].modifier_class.__name__: own for name, own in fields.items()}
        asked = ", ".join(target.text for target in self.prepared.settings.targets)
        content = {"removal_stage": {"removal_modifiers": modifiers}}
        body = yaml.safe_dump(content, sort_keys=False)
        return f"# Found by `sparsessm fit` for {asked}.\n{body}", distilled


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
