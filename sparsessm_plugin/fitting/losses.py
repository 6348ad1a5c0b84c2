"""What a mix of sizes loses: the divergence of its predictions from the dense model's."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.cost import has_room, kept
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.fitting.axes import AXES, Axis, in_order
from sparsessm_plugin.fitting.costs import stored_bytes
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.training.divergence import divergences
from sparsessm_plugin.training.gradients import to_device

_REFERENCE_BYTES = 2**30  # of the dense model's predictions that are held


class HeldBack:
    """Text that no fit sees, and what the dense model predicts for it.

    :param model: dense
    :param batches: as many of them are used as the predictions have room for
    :raises SparseSSMError: predictions that are NaN or infinite
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        vocabulary = model.get_input_embeddings().num_embeddings
        self._held: list[tuple[dict[str, Any], Tensor]] = []
        used = 0
        for batch in batches:
            used += 2 * vocabulary * batch["input_ids"].numel()
            if self._held and used > _REFERENCE_BYTES:
                break
            logits = _logits(model, batch)
            if not bool(torch.isfinite(logits).all()):
                raise SparseSSMError(
                    "the dense model predicts NaN or infinite values for the calibration text"
                )
            # window by window: float32 logits of a whole batch would be large
            rows = [row.float().log_softmax(-1).clamp(min=-3e4).half() for row in logits]
            self._held.append((dict(batch), kept(torch.stack(rows))))

    @property
    def tokens(self) -> int:
        """How many are measured on."""
        return sum(batch["input_ids"].numel() for batch, _ in self._held)

    def divergence(self, model: Any) -> float:
        """Mean Kullback-Leibler divergence from the dense predictions, nats a token."""
        total, count = 0.0, 0
        for batch, reference in self._held:
            pairs = zip(reference, _logits(model, batch), strict=True)
            rows = [divergences(expected.to(found.device), found) for expected, found in pairs]
            each, mask = torch.stack(rows), batch.get("attention_mask")
            if mask is not None:
                each = each[mask.to(each.device).bool()]
            total += float(each.double().sum())
            count += each.numel()
        return total / max(count, 1)


@torch.no_grad()
def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """(b, L, vocabulary) in the dtype of the model."""
    ready = {k: v for k, v in to_device(dict(batch), model.device).items() if k != "labels"}
    training = model.training
    model.eval()
    try:
        with fast_forward(model), fast_products(model.device):
            logits: Tensor = model(**ready, use_cache=False).logits
    finally:
        model.train(training)
    return logits


class Copies:
    """Copies of the dense model to try things on; it waits in main memory if there is no room.

    :param model: the dense model; stays as it is
    """

    def __init__(self, model: Any) -> None:
        self.device = model.device
        self.model = model
        if self.device.type == "cuda" and not has_room(self.device, stored_bytes(model)):
            model.to("cpu")

    def new(self) -> Any:
        """One on the model's device."""
        return copy.deepcopy(self.model).to(self.device)

    def give_back(self) -> Any:
        """The dense model, where it was."""
        return self.model.to(self.device)


@dataclass(frozen=True)
class Tried:
    """What became of a copy of the model.

    :param sizes: by axis
    :param loss: on the text that was held back, nats a token
    :param seconds: of removal and fits
    :param kept: indices of the layers that stay; None if all do
    """

    sizes: dict[str, int]
    loss: float
    seconds: float
    kept: tuple[int, ...] | None = None


Steps = tuple[tuple[str, int], ...]  # axes and the sizes that they were made, in order
_BREADTH = ("all", "all_but_vocabulary", "mixers")
_HELD_BYTES = 2**31  # of models that are held


class Shared:
    """What trials have in common: models after the first of their removals, and their sums.

    :param limit: bytes of models that are held; those used longest ago go first
    """

    def __init__(self, limit: float = _HELD_BYTES) -> None:
        self._limit = limit
        self._models: dict[Steps, Any] = {}
        self.carried: dict[tuple[Steps, str], Any] = {}
        self.layers: dict[Steps, tuple[int, ...]] = {}  # indices that stay

    def longest(self, steps: Steps) -> int:
        """How many of these steps, from the first on, a model is held of."""
        return next((n for n in range(len(steps), 0, -1) if steps[:n] in self._models), 0)

    def copy(self, steps: Steps) -> Any:
        """A copy of the model held after exactly these steps."""
        self._models[steps] = self._models.pop(steps)  # used last
        return copy.deepcopy(self._models[steps])

    def hold(self, steps: Steps, model: Any) -> None:
        """Hold a copy of a model, if there is room."""
        size = stored_bytes(model)
        on_gpu = model.device.type == "cuda"
        if size > self._limit or (on_gpu and not has_room(model.device, size)):
            return
        self._models[steps] = copy.deepcopy(model)
        while sum(map(stored_bytes, self._models.values())) > self._limit:
            del self._models[next(iter(self._models))]


def distillation_fields(axes: Sequence[Axis], minutes: float) -> dict[str, Any]:
    """Fields of the last of some removals, by which it distils as suits what changed most.

    :param axes: in the order of their removals
    :param minutes: of distillation
    """
    found: dict[str, Any] = {"distill_minutes": minutes}
    classes = [axis.modifier_class for axis in axes]
    weights = [getattr(cls, "fitted_by_default", _BREADTH[-1]) for cls in classes]
    widest = classes[weights.index(min(weights, key=_BREADTH.index))]
    if weights[classes.index(widest)] != weights[-1]:
        found["distill_weights"] = widest.fitted_by_default
        for name in ("distill_learning_rate", "distill_optimizer"):
            found[name] = widest.model_fields[name].default
    return found


class Effort(NamedTuple):
    """How long removals fit.

    :param used: how many of the batches, the first, they choose and fit by
    :param quick: whether each axis leaves out its longest fits
    """

    used: int
    quick: bool


@dataclass
class Trials:
    """Removes from copies what mixes say, with the closed-form fits, and measures the loss.

    Mixes that begin alike share what they begin with; see :class:`Shared`.

    :param copies: of the dense model
    :param batches: of all the text
    :param used: how many of them, the first, a trial chooses and fits by
    :param held_back: to measure on
    :param recipe_uses: how many the recipe's removals choose and fit by; default as many
    :param way: more fields of the modifier that makes an axis so long, as :meth:`Shapes.way`

    Attributes: ``seconds``, how long a whole removal along each axis took the last time, and
    ``measuring``, how long measuring the loss did.
    """

    copies: Copies
    batches: Sequence[Mapping[str, Any]]
    used: int
    held_back: HeldBack
    recipe_uses: int | None = None
    way: Callable[[Axis, int], dict[str, Any]] = lambda axis, size: {}
    shared: Shared = field(default_factory=Shared)
    seconds: dict[str, float] = field(default_factory=dict)
    measuring: float = 0.0

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """Of a recipe, the one that loses least first; the last one is that of a trial."""
        texts = (self.recipe_uses or self.used, self.used)  # a fit more is worth more than text
        return tuple(Effort(used, quick) for quick in (False, True) for used in texts)

    def fields(
        self, sizes: Mapping[str, int], minutes: float = 0.0, effort: Effort | None = None
    ) -> dict[str, dict[str, Any]]:
        """The fields of each axis's modifier, in the order of a recipe; the last one distils.

        :param sizes: by axis
        :param minutes: of distillation
        :param effort: of the removals; default the first of ``efforts``
        """
        used, quick = effort or self.efforts[0]
        axes = in_order(sizes)
        found = {
            axis.name: axis.fields(sizes[axis.name]) | self.way(axis, sizes[axis.name])
            for axis in axes
        }
        for axis in axes:
            if quick or axis.slower == 1:
                found[axis.name] |= axis.quick_fields(self.copies.model, self.copies.device)
        if used < len(self.batches):
            for own in found.values():
                own["calibration_batches"] = used
        if minutes:
            found[axes[-1].name] |= distillation_fields(axes, minutes)
        return found

    def measure(self, sizes: Mapping[str, int], minutes: float = 0.0) -> Tried:
        """Of a mix.

        :param sizes: by axis
        :param minutes: of distillation, on all the text
        :raises SparseSSMError: a modifier cannot make it
        """
        started = time.perf_counter()
        with _unheard():
            model, layers = self._remove(sizes, minutes)
        removed = time.perf_counter()
        loss = self.held_back.divergence(model)
        self.measuring = time.perf_counter() - removed
        return Tried(dict(sizes), loss, removed - started, layers)

    def _remove(
        self, sizes: Mapping[str, int], minutes: float
    ) -> tuple[Any, tuple[int, ...] | None]:
        """A smaller copy of the model, and the indices of the layers that stay, if some go."""
        steps = _steps(sizes)
        fields = self.fields(sizes, minutes, self.efforts[-1])
        done = self.shared.longest(steps[:-1] if minutes else steps)
        model = self.shared.copy(steps[:done]) if done else self.copies.new()
        methods = [AXES[n].modifier_class(**fields[n]).new_method() for n, _ in steps[done:]]
        data = CalibrationBatches.draw(
            "fit", self.batches if minutes else self.batches[: self.used]
        )
        try:
            if minutes and len(steps) > 1:
                dense = self.copies.new()
                methods[-1].prepare(dense)
                methods[-1].foresee(data)  # the dense model's predictions
                del dense
            for number, method in enumerate(methods, done):
                last = number + 1 == len(steps)
                self._step(method, model, data, steps[: number + 1], hold=not (minutes and last))
        finally:
            for method in methods:
                method.release()
        return model, self.shared.layers.get(steps[:1])

    def _step(
        self, method: Any, model: Any, data: CalibrationBatches, steps: Steps, hold: bool
    ) -> None:
        (name, _), key = steps[-1], (steps[:-1], steps[-1][0])
        method.carried = self.shared.carried.get(key)
        handed = method.carried is not None
        length, started = AXES[name].length(model), time.perf_counter()
        result = run(method, model, data)
        taken = time.perf_counter() - started
        if hold:
            # the first time kernels are compiled, too
            self.seconds[name] = max(taken, self.seconds.get(name, 0.0)) if handed else taken
            self.shared.hold(steps, model)
        if method.carried is not None:
            self.shared.carried[key] = method.carried
        if name == "layers":
            gone = {i for entry in result.layers for i in entry.removed}
            self.shared.layers[steps] = tuple(i for i in range(length or 0) if i not in gone)

    def removal_seconds(self, sizes: Mapping[str, int], effort: Effort | None = None) -> float:
        """About how long the removals of a recipe take, as those of trials did.

        :param sizes: by axis
        :param effort: of the removals; default the first of ``efforts``
        """
        used, quick = effort or self.efforts[0]
        slower = {name: 1.0 if quick else AXES[name].slower for name in sizes}
        return used / self.used * sum(self._seconds_of(name) * slower[name] for name in sizes)

    def trial_seconds(self, sizes: Mapping[str, int]) -> float:
        """About how long a trial takes, without what it shares with earlier ones."""
        steps = _steps(sizes)
        left = steps[self.shared.longest(steps) :]
        return sum(self._seconds_of(name) for name, _ in left) + self.measuring

    def _seconds_of(self, name: str) -> float:
        """Of a removal along an axis; along one that was never tried, those of the longest."""
        return self.seconds.get(name, max(self.seconds.values(), default=0.0))


def _steps(sizes: Mapping[str, int]) -> Steps:
    return tuple((axis.name, sizes[axis.name]) for axis in in_order(sizes))


@contextmanager
def _unheard() -> Iterator[None]:
    """The last pass says once more what methods say of a model and its data."""
    logger.disable("sparsessm_plugin.methods")
    try:
        yield
    finally:
        logger.enable("sparsessm_plugin.methods")
