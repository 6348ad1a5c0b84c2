"""Steps along the gradients of a model's weights, taken back where they do not help."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.cost import kept
from sparsessm_plugin.distributed import reduce_sum, total, world_size
from sparsessm_plugin.training.gradients import (
    LossFunction,
    differentiable,
    loss_of,
    positions,
    to_device,
)
from sparsessm_plugin.training.non_finite import (
    NonFiniteError,
    NonFiniteGradients,
    first_non_finite,
)

_CLIP = 1.0  # norm of the gradient of all parameters that a tuning step goes along
_MEASURED = 8  # batches whose loss is looked at before and after the steps
_WARM_UP = 0.1  # share of the tuning steps over which the learning rate rises


@dataclass(frozen=True)
class Tuning:
    """What some steps of a :class:`Tuner` did.

    :param before: loss before the steps
    :param after: loss after them, NaN where their gradients were no numbers
    :param loss: mean loss of the batches that the steps went along
    :param diverged: the loss did not fall, and the weights are what they were before
    """

    before: float
    after: float
    loss: float
    diverged: bool


class Tuner:
    """Adam on float32 copies of a model's weights, some of which stay zero.

    The learning rate rises over the first tenth of all steps and falls along a cosine. Memory: 16
    bytes a weight (copy, gradient, two moments) beside the model and its own gradients, and 4 more
    for the weights as they were.

    :param model: changed in place, weights and nothing else
    :param parameters: what is tuned, by name
    :param batches: taken in turn
    :param steps: over all calls of :meth:`run`
    :param learning_rate: the highest
    :param loss_fn: see :func:`loss_of`
    :param non_finite: counts the batches that are skipped
    :param measure: gives the loss that steps are to lower; default the mean over the first batches
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Sequence[Any],
        steps: int,
        learning_rate: float,
        *,
        loss_fn: LossFunction | None = None,
        non_finite: NonFiniteGradients | None = None,
        measure: Callable[[], float] | None = None,
    ):
        self.model = model
        self.parameters = dict(parameters)
        self.batches = batches
        self.loss_fn = loss_fn
        self.non_finite = non_finite or NonFiniteGradients()
        self.measure = measure
        self.done = 0
        self._usable: frozenset[int] | None = None
        self._copies = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self._adam = torch.optim.Adam(self._copies.values(), lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: _learning_rate_share(step, steps)
        )

    def run(self, steps: int, pruned: Mapping[str, Tensor]) -> Tuning:
        """Take some steps, and take them back where they do not lower the loss.

        The loss is the mean over the first batches, where there are many.

        :param steps: how many
        :param pruned: bool by name, True where a weight is zero and stays so
        :raises NonFiniteError: the loss is not finite before the first step
        :raises SparseSSMError: see :func:`loss_of`
        """
        self._usable = None
        before = self._measured()
        if not math.isfinite(before):
            where = self._where_it_begins()
            raise NonFiniteError(
                f"the loss is {before:g} before the first gradient step"
                f"{f', which begins in {where}' if where else ''}; nothing can be tuned"
            )
        for name, mask in pruned.items():
            self._copies[name].masked_fill_(mask, 0.0)
        earlier = {name: kept(copy.clone()) for name, copy in self._copies.items()}
        skipped = len(self.non_finite.skipped)
        loss = after = math.nan
        lower = False
        try:
            with suppress(NonFiniteError):
                loss = self.take(steps, pruned)
                after = self._measured()
            lower = after < before
        finally:
            if not lower:
                del self.non_finite.skipped[skipped:]
                self._adam.state.clear()
                with torch.no_grad():
                    for name, copy in self._copies.items():
                        copy.copy_(earlier[name])
                        self.parameters[name].copy_(copy)
        return Tuning(before, after, loss, diverged=not lower)

    def _measured(self) -> float:
        with torch.no_grad():
            return self._mean_loss() if self.measure is None else self.measure()

    def _mean_loss(self) -> float:
        device = next(iter(self.parameters.values())).device
        losses: dict[int, float] = {}
        summed = weight = 0.0
        most = max(map(positions, self.batches), default=0)
        with differentiable(self.model, self.parameters.values(), most):
            for i, batch in enumerate(self.batches[:_MEASURED]):
                if self._usable is not None and i not in self._usable:
                    continue
                loss, count = loss_of(self.model, to_device(batch, device), self.loss_fn)
                # a batch that is skipped says nothing before the steps, and so nothing after them
                if count and (self._usable is not None or math.isfinite(float(loss.detach()))):
                    losses[i] = float(loss.detach())
                    summed, weight = summed + count * losses[i], weight + count
        if self._usable is None:
            self._usable = frozenset(losses)
        summed, weight = total("loss of the batches", summed, weight)
        return summed / weight if weight else math.nan

    def _where_it_begins(self) -> str | None:
        """In the first of the batches whose loss is not finite; None if another rank has it."""
        device = next(iter(self.parameters.values())).device
        with differentiable(self.model, self.parameters.values()):
            for batch in self.batches[:_MEASURED]:
                where = first_non_finite(
                    self.model, partial(loss_of, self.model, to_device(batch, device), self.loss_fn)
                )
                if where is not None:
                    return where
        return None

    def take(self, steps: int, pruned: Mapping[str, Tensor]) -> float:
        """Take some steps, wherever they lead.

        :param steps: how many
        :param pruned: bool by name, True where a weight is zero and stays so
        :return: the mean loss of the batches that were used
        :raises SparseSSMError: see :func:`loss_of`
        """
        device = next(iter(self.parameters.values())).device
        losses = []
        # steps are far coarser than what TF32 rounds away
        most = max(map(positions, self.batches), default=0)
        with differentiable(self.model, self.parameters.values(), most), tf32():
            for _ in range(steps):
                batch = to_device(self.batches[self.done % len(self.batches)], device)
                self.done += 1
                loss, count = loss_of(self.model, batch, self.loss_fn)
                if count:
                    loss.backward()
                if self._step(pruned, batch) and count:
                    losses.append(float(loss.detach()))
                self._schedule.step()
        return sum(losses) / len(losses) if losses else math.nan

    def _step(self, pruned: Mapping[str, Tensor], batch: Any) -> bool:
        for name, p in self.parameters.items():
            grad = torch.zeros_like(self._copies[name]) if p.grad is None else p.grad.float()
            p.grad = None
            self._copies[name].grad = grad
        copies: Any = self._copies
        if world_size() > 1:
            reduce_sum("a tuning step", {name: copy.grad for name, copy in copies.items()})
            for copy in copies.values():
                copy.grad /= world_size()
        loss = partial(loss_of, self.model, batch, self.loss_fn)
        if self.non_finite.found(self.model, copies, loss):
            return False
        for name, mask in pruned.items():
            copies[name].grad.masked_fill_(mask, 0.0)
        nn.utils.clip_grad_norm_(copies.values(), _CLIP)
        self._adam.step()
        with torch.no_grad():
            for name, mask in pruned.items():  # the moments of what was pruned last still move it
                copies[name].masked_fill_(mask, 0.0)
            torch._foreach_copy_(list(self.parameters.values()), list(copies.values()))
        return True


def _learning_rate_share(step: int, steps: int) -> float:
    warm_up = max(1.0, _WARM_UP * steps)
    if step < warm_up:
        return (step + 1) / warm_up if warm_up > 1 else 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1.0, steps - warm_up)))
