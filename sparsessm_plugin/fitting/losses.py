"""What a mix of sizes loses: the divergence of its predictions from the dense model's."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.cost import has_room, kept
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.fitting.axes import in_order
from sparsessm_plugin.fitting.costs import stored_bytes
from sparsessm_plugin.methods.model_removal import ModelRemovalSettings
from sparsessm_plugin.methods.run import run_in_turn
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
        self._model = model
        if self.device.type == "cuda" and not has_room(self.device, stored_bytes(model)):
            model.to("cpu")

    def new(self) -> Any:
        """One on the model's device."""
        return copy.deepcopy(self._model).to(self.device)

    def give_back(self) -> Any:
        """The dense model, where it was."""
        return self._model.to(self.device)


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


@dataclass
class Trials:
    """Removes from copies what mixes say, with the closed-form fits, and measures the loss.

    :param copies: of the dense model
    :param batches: of all the text
    :param used: how many of them, the first, removals choose and fit by
    :param held_back: to measure on
    """

    copies: Copies
    batches: Sequence[Mapping[str, Any]]
    used: int
    held_back: HeldBack

    def fields(self, sizes: Mapping[str, int], minutes: float = 0.0) -> dict[str, dict[str, Any]]:
        """The fields of each axis's modifier, in the order of a recipe; the last one distils.

        :param sizes: by axis
        :param minutes: of distillation
        """
        axes = in_order(sizes)
        found = {axis.name: axis.fields(sizes[axis.name]) for axis in axes}
        if self.used < len(self.batches):
            for own in found.values():
                own["calibration_batches"] = self.used
        if minutes:
            # what suits the removals that change most, though another one comes last
            classes = [axis.modifier_class for axis in axes]
            by = next((cls for cls in classes if issubclass(cls, ModelRemovalSettings)), None)
            own = found[axes[-1].name]
            if by is not None and not issubclass(classes[-1], ModelRemovalSettings):
                own["distill_weights"] = by.fitted_by_default
                own["distill_learning_rate"] = by.model_fields["distill_learning_rate"].default
            own["distill_minutes"] = minutes
        return found

    def measure(self, sizes: Mapping[str, int], minutes: float = 0.0) -> Tried:
        """Of a mix.

        :param sizes: by axis
        :param minutes: of distillation, on all the text
        :raises SparseSSMError: a modifier cannot make it
        """
        started = time.perf_counter()
        model = self.copies.new()
        with _unheard():
            layers = self._remove(model, sizes, minutes)
        seconds = time.perf_counter() - started
        return Tried(dict(sizes), self.held_back.divergence(model), seconds, layers)

    def _remove(
        self, model: Any, sizes: Mapping[str, int], minutes: float
    ) -> tuple[int, ...] | None:
        """The removal of a mix; indices of the layers that stay, where some go."""
        axes, fields = in_order(sizes), self.fields(sizes, minutes)
        methods = [a.modifier_class(**fields[a.name]).new_method() for a in axes]
        before = {axis.name: axis.length(model) for axis in axes}
        batches = self.batches if minutes else self.batches[: self.used]
        results = run_in_turn(methods, model, batches)
        for axis, result in zip(axes, results, strict=True):
            if axis.name == "layers":
                gone = {i for entry in result.layers for i in entry.removed}
                return tuple(i for i in range(before["layers"] or 0) if i not in gone)
        return None


@contextmanager
def _unheard() -> Iterator[None]:
    """The last pass says once more what methods say of a model and its data."""
    logger.disable("sparsessm_plugin.methods")
    try:
        yield
    finally:
        logger.enable("sparsessm_plugin.methods")
