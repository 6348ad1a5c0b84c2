"""What is known of a target before a weight is read: sizes, costs, whether it can be reached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import nn

from sparsessm_plugin.checkpoints.runtimes import RUNTIMES, kernel_problems, runtime_problems
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.kernels import bound_kernels
from sparsessm_plugin.fitting.axes import AXES, Axis, in_order
from sparsessm_plugin.fitting.choice import MOST_MIXES, best_mixes, nearest_mix
from sparsessm_plugin.fitting.costs import Array, Ladder, Space, counted
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import Target
from sparsessm_plugin.fitting.timing import SpeedModel, Timed, Workload, measured_speedups
from sparsessm_plugin.fitting.timing import speed_model as fit_speed_model

_LOOKED_AT = 24  # mixes, for one that the runtime takes


@dataclass(frozen=True)
class FitSettings:
    """What is asked for.

    :param targets: all are to be reached
    :param runtime: that must load the sizes
    :param workload: what is timed for a speed; its length also counts an attention cache
    :param minutes: that the whole may take once the model is loaded
    :param axes: to choose from; None for all that there are
    :param search_tokens: of calibration text that a trial chooses and fits by; None for what suits
        the device
    :param generated: tokens that the dense model writes for the distillation
    """

    targets: tuple[Target, ...]
    runtime: str = "transformers"
    workload: Workload = field(default_factory=Workload)
    minutes: float = 10.0
    axes: tuple[str, ...] | None = None
    search_tokens: int | None = None
    generated: int = 0

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise SparseSSMError(
                f"--runtime must be one of {', '.join(RUNTIMES)}, got {shown(self.runtime)}"
            )
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise SparseSSMError(f"--minutes must be above 0, got {self.minutes}")
        if self.search_tokens is not None and self.search_tokens < 1:
            raise SparseSSMError(f"--search-tokens must be at least 1, got {self.search_tokens}")
        if self.generated < 0:
            raise SparseSSMError(f"--generated must be at least 0, got {self.generated}")
        for name in self.axes or ():
            if name not in AXES:
                raise SparseSSMError(
                    f"--axes must be any of {', '.join(sorted(AXES))}, got {shown(name)}"
                )


@dataclass(frozen=True)
class Excluded:
    """A size, or an axis, that cannot be chosen, and why."""

    axis: str
    size: int | None
    reason: str


class Prepared:
    """Sizes and costs of a model for some targets.

    Attributes: ``space``, all mixes; ``excluded``; ``speed``, where a speed is asked for;
    ``predicted``, the share of the dense time that a mix was to take before it was timed.

    :param shapes: of the model
    :param settings: what is asked for
    :param device: where speeds are measured
    :raises SparseSSMError: a runtime that cannot load the model, nothing that can become smaller,
        or a target that no mix reaches, with the nearest
    """

    def __init__(self, shapes: Shapes, settings: FitSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        find_mixers(shapes.dense)  # raises, and says which are known, where there are none
        shapes = shapes.on(settings.runtime)
        # what keeps the runtime from the model as it is; a smaller one may be free of it
        self._problems = runtime_problems(settings.runtime, shapes.dense)
        timed = any(target.kind == "speed" for target in settings.targets)
        # speeds are those of transformers' forward pass, whatever the runtime
        self._spares_kernels = (settings.runtime == "transformers" or timed) and not (
            kernel_problems(shapes.dense)
        )
        self._kernel_problem: str | None = None  # of the first size that was left out for it
        try:
            self._prepare(shapes)
        except SparseSSMError:
            bound = set(bound_kernels(shapes.dense).values()) - {"torch"}
            if self._kernel_problem is None or (timed and bound):  # these could not be timed
                raise
            self._spares_kernels = False
            self._prepare(shapes)
            logger.warning(
                "no sizes that causal-conv1d takes reach the targets, so others may be chosen, on "
                "which stock transformers fails on a GPU where causal-conv1d is installed: "
                f"{self._kernel_problem}"
            )

    def _prepare(self, shapes: Shapes) -> None:
        self.speed: SpeedModel | None = None
        self.excluded: list[Excluded] = []
        self._taken: set[nn.Module] = set()  # by the runtime
        self._cured: dict[str, int] = {}  # by axis: the largest size that is
        ladders = self._ladders(shapes)
        if self._problems and not self._cured:
            raise SparseSSMError(
                f"{self.settings.runtime} cannot load this model: {self._problems[0]}"
            )
        if not ladders:
            why = f": {self.excluded[0].reason}" if self.excluded else ""
            raise SparseSSMError(f"nothing of this model can become smaller{why}")
        self.space = Space(shapes, self._affordable(ladders))
        self._known: dict[str, dict[tuple[int, ...], float]] = {}
        self.predicted: dict[tuple[int, ...], float] = {}
        counts = [t for t in self.settings.targets if t.kind != "speed"]
        self.check_reached(counts)
        if len(counts) < len(self.settings.targets):
            self.speed = fit_speed_model(self.space, self.settings.workload, self.device)
            self.check_reached(self.settings.targets)
        self._drop_needless()
        self._check_together()

    # -- costs of all mixes ----------------------------------------------------------

    def costs(self, targets: Sequence[Target] | None = None) -> list[Array]:
        """The cost of every mix, as a share of the dense model's, one array a target.

        What was counted or timed of single mixes stands in the place of what was predicted.
        """
        quantities = self.space.quantities()
        dense = self.space.dense.total()
        found = []
        for target in self.settings.targets if targets is None else targets:
            if target.kind == "speed":
                assert self.speed is not None
                cost = self.speed.share(quantities, dense)
                cost[(0,) * cost.ndim] = 1.0
            else:
                length = self.settings.workload.length
                whole = float(counted(target.kind, dense, length))
                cost = counted(target.kind, quantities, length) / whole
            for mix, value in self._known.get(target.kind, {}).items():
                cost[mix] = value
            found.append(np.where(self._loads(), cost, np.inf))
        return found

    def _loads(self) -> NDArray[np.bool_]:
        """Whether the runtime takes each mix, as far as single axes tell."""
        loads = np.full(self.space.shape, not self._problems)
        for place, ladder in enumerate(self.space.ladders):
            if self._problems and ladder.axis in self._cured:
                cured = np.array([size <= self._cured[ladder.axis] for size in ladder.sizes])
                loads |= cured.reshape([-1 if p == place else 1 for p in range(loads.ndim)])
        return loads

    def limits(self, targets: Sequence[Target] | None = None) -> list[float]:
        """The largest share of the dense cost that reaches each target."""
        dense, found = self.space.dense.total(), []
        for target in self.settings.targets if targets is None else targets:
            if target.kind == "speed":
                found.append(target.limit(1.0))
            else:
                whole = float(counted(target.kind, dense, self.settings.workload.length))
                found.append(target.limit(whole) / whole)
        return found

    def know_counts(self, mix: tuple[int, ...]) -> None:
        """Count one mix by itself, as its loader makes it.

        :raises SparseSSMError: no loader makes it, or the runtime does not take it
        """
        sizes = self.space.sizes(mix)
        quantities, dense = self.space.count(sizes), self.space.dense.total()
        self._check_runtime(self.space.shapes.model(sizes, self.space.kept_of(sizes)), mix)
        for target in self.settings.targets:
            if target.kind != "speed":
                length = self.settings.workload.length
                share = counted(target.kind, quantities, length) / counted(
                    target.kind, dense, length
                )
                self._known.setdefault(target.kind, {})[mix] = float(share)

    def _check_runtime(self, model: nn.Module, mix: tuple[int, ...]) -> None:
        if model in self._taken:
            return
        if self._spares_kernels and (refused := kernel_problems(model)):
            self._kernel_problem = self._kernel_problem or refused[0]
            raise SparseSSMError(f"{self.described(mix)}: {refused[0]}")
        problems = runtime_problems(self.settings.runtime, model)
        new = [problem for problem in problems if problem not in self._problems]
        if new and len(problems) > len(self._problems):
            raise SparseSSMError(
                f"{self.settings.runtime} takes each of these sizes, but not all of them together "
                f"({self.described(mix)}): {new[0]}"
            )
        self._taken.add(model)

    def forget_counts(self) -> None:
        """Count mixes anew: other layers stay than was thought."""
        self._known = {kind: known for kind, known in self._known.items() if kind == "speed"}

    def know_times(self, mixes: Sequence[tuple[int, ...]]) -> list[Timed]:
        """Time some mixes beside the dense model; the speed model learns from it."""
        if self.speed is None:
            return []
        known = self._known.setdefault("speed", {})
        new = [mix for mix in mixes if mix not in known]
        if not new:
            return []
        sizes = [self.space.sizes(mix) for mix in new]
        quantities, dense = self.space.quantities(), self.space.dense.total()
        shares = self.speed.share(quantities, dense)
        self.predicted |= {mix: float(shares[mix]) for mix in new}
        timed, speedups = measured_speedups(self.space, sizes, self.settings.workload, self.device)
        self.speed.learn(timed)
        known |= {mix: 1 / speedup for mix, speedup in zip(new, speedups, strict=True)}
        return timed

    def is_timed(self, mix: tuple[int, ...]) -> bool:
        """Whether the speed of a mix is measured, or nobody asks for it."""
        return self.speed is None or mix in self._known.get("speed", {})

    # -- what there is to choose from ------------------------------------------------

    def _ladders(self, shapes: Shapes) -> list[Ladder]:
        chosen = in_order(AXES if self.settings.axes is None else self.settings.axes)
        ladders = []
        for axis in chosen:
            if axis.modifier_class is None:
                continue
            try:
                length = axis.length(shapes.dense)
            except SparseSSMError as error:
                self.excluded.append(Excluded(axis.name, None, str(error)))
                continue
            if length is None:
                if self.settings.axes is not None:
                    raise SparseSSMError(f"axis {axis.name}: the model has no such axis")
                continue
            sizes = [s for s in axis.sizes(length) if self._can_be(axis, s, shapes)]
            if sizes:
                ladders.append(Ladder(axis.name, (length, *sizes)))
        return ladders

    def _can_be(self, axis: Axis, size: int, shapes: Shapes) -> bool:
        """Whether modifier, loader and runtime take a size."""
        try:
            modifier = axis.modifier_class(**axis.fields(size), **shapes.way(axis, size))
            modifier.matching_mixers(shapes.dense)
            model = shapes.model({axis.name: size})
            problems = runtime_problems(self.settings.runtime, model)
            new = [problem for problem in problems if problem not in self._problems]
            if self._problems and new and len(problems) <= len(self._problems):
                new = []  # the same, of other numbers
            reason = f"{self.settings.runtime}: {new[0]}" if new else None
            if self._problems and not problems:
                self._cured[axis.name] = max(size, self._cured.get(axis.name, 0))
            if reason is None and self._spares_kernels and (refused := kernel_problems(model)):
                reason = f"transformers: {refused[0]}"
                self._kernel_problem = self._kernel_problem or refused[0]
        except ValueError as error:  # pydantic's and this package's
            reason = " ".join(str(error).split())
        if reason is not None:
            self.excluded.append(Excluded(axis.name, size, reason))
        return reason is None

    @staticmethod
    def _affordable(ladders: list[Ladder]) -> list[Ladder]:
        """Fewer sizes where there would be more mixes than can be looked at."""
        while math.prod(len(ladder.sizes) for ladder in ladders) > MOST_MIXES:
            longest = max(range(len(ladders)), key=lambda i: len(ladders[i].sizes))
            sizes = ladders[longest].sizes
            ladders[longest] = Ladder(ladders[longest].axis, (sizes[0], *sizes[2::2]))
        return ladders

    # -- whether it is enough --------------------------------------------------------

    def check_reached(self, targets: Sequence[Target]) -> None:
        """Refuse targets that no mix reaches, as costs are known now.

        :raises SparseSSMError: naming the nearest
        """
        if not targets:
            return
        costs, limits = self.costs(targets), self.limits(targets)
        near = nearest_mix(costs, limits)
        missed = [i for i, cost in enumerate(costs) if cost[near] > limits[i]]
        if not missed:
            return
        target, share = targets[missed[0]], float(costs[missed[0]][near])
        raise SparseSSMError(
            f"no mix of sizes reaches {target.text}: the nearest is {self.said(target, share)}, "
            f"with {self.described(near)}"
        )

    def _check_together(self) -> None:
        """Refuse targets that only mixes reach that the runtime does not take.

        Looked at are those that take about as much of each axis.
        """
        costs, limits = self.costs(), self.limits()
        taken = np.zeros(self.space.shape)
        for place, ladder in enumerate(self.space.ladders):
            gone = 1 - np.array(ladder.sizes) / ladder.sizes[0]
            taken = taken + (gone**2).reshape([-1 if p == place else 1 for p in range(taken.ndim)])
        refusal: SparseSSMError | None = None
        for mix in best_mixes(taken, costs, limits, _LOOKED_AT):
            try:
                return self.know_counts(mix)
            except SparseSSMError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    def said(self, target: Target, share: float) -> str:
        """A cost in the words of its target."""
        if target.kind == "speed":
            return f"speed={1 / share:.3g}"
        if target.most is None:
            return f"{target.kind}={share:.3g}"
        dense = counted(target.kind, self.space.dense.total(), self.settings.workload.length)
        return f"{target.kind}={share * float(dense):,.0f}"

    def described(self, mix: tuple[int, ...]) -> str:
        """The sizes of a mix, as a list for a person."""
        pairs = [
            f"{ladder.axis} {ladder.sizes[0]} -> {ladder.sizes[place]}"
            for ladder, place in zip(self.space.ladders, mix, strict=True)
            if place
        ]
        return ", ".join(pairs) or "nothing removed"

    def _drop_needless(self) -> None:
        """Sizes far below the one that reaches all targets alone are of no use."""
        costs, limits = self.costs(), self.limits()
        reached = np.all([c <= most for c, most in zip(costs, limits, strict=True)], axis=0)
        ladders = []
        for place, ladder in enumerate(self.space.ladders):
            alone = [
                reached[tuple(i if p == place else 0 for p in range(reached.ndim))]
                for i in range(len(ladder.sizes))
            ]
            last = alone.index(True) if True in alone else len(alone) - 1
            ladders.append(Ladder(ladder.axis, ladder.sizes[: last + 2]))
        self.space = Space(self.space.shapes, ladders)


def sizes_of(model: nn.Module) -> dict[str, int]:
    """The size of every axis that a model has."""
    found: dict[str, Any] = {}
    for axis in in_order(AXES):
        try:
            found[axis.name] = axis.length(model)
        except SparseSSMError:
            continue
    return {name: size for name, size in found.items() if size is not None}
