"""Fit weights of one layer to that layer's dense output by gradient steps.

For what has no closed form: in the Mamba-2 layout a SiLU stands between in_proj and C. The
loss is the layer's own output error on calibration inputs; there is no label, and nothing is
propagated through the model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from sparsessm_plugin.backends.capture import CapturedStep, capture

_WORTHWHILE = 16  # steps from which on a CUDA graph, which costs a few, is made of one
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch's own


def reconstruct(
    parameters: Sequence[tuple[nn.Parameter, Tensor | None]],
    loss: Callable[[Any], Tensor],
    batches: int,
    steps: int,
    learning_rate: float = 1e-3,
    combine: Callable[[list[Tensor]], None] | None = None,
    batch_of: Callable[[int], Mapping[str, Tensor | None]] | None = None,
) -> None:
    """Minimise the mean of ``loss`` over the batches with Adam and a cosine schedule.

    :param parameters: leaf parameters, each with a mask of the entries that may change (None
        for all), which broadcasts against it; of those in half precision the steps are added up
        in float32, but for ``batch_of`` on a GPU, which takes float32 alone
    :param loss: of batch i, or of what ``batch_of`` gives for it, a scalar that depends on the
        parameters; of order 1 or less
    :param batches: how many batches there are; they take turns
    :param steps: gradient steps
    :param learning_rate: of Adam at the first step
    :param combine: changes each step's gradients in place, before it is taken; adds them up over
        processes, say
    :param batch_of: batch i; a GPU then takes steps along batches of one shape, and with a mask of
        None, as one CUDA graph
    """
    weights = [parameter for parameter, _ in parameters]
    if not weights or steps < 1:
        return
    flags = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        if batch_of is not None and weights[0].device.type == "cuda" and combine is None:
            _on_gpu(_Adam(parameters), loss, batch_of, batches, steps, learning_rate)
            steps = 0
        exact = [w if w.dtype == torch.float32 else w.detach().float() for w in weights]
        optimizer = torch.optim.Adam(exact, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for step in range(steps):
            for weight in weights:
                weight.grad = None
            number = step % batches
            loss(number if batch_of is None else batch_of(number)).backward()
            for own, weight in zip(exact, weights, strict=True):
                if own is not weight:
                    own.grad = None if weight.grad is None else weight.grad.float()
            if combine is not None:
                combine([w.grad for w in exact if w.grad is not None])
            for own, (_, mask) in zip(exact, parameters, strict=True):
                if mask is not None and own.grad is not None:
                    own.grad.mul_(mask)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for own, weight in zip(exact, weights, strict=True):
                    if own is not weight:
                        weight.copy_(own)
    for weight, flag in zip(weights, flags, strict=True):
        weight.grad = None
        weight.requires_grad_(flag)


class _Adam:
    """Weights and moments in memory that stays where it is, so that a graph may hold a step."""

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, Tensor | None]]) -> None:
        self._weights = [weight for weight, _ in parameters]
        self._masks = [mask for _, mask in parameters]
        self._moments = [[torch.zeros_like(w) for w in self._weights] for _ in range(2)]
        self.device = self._weights[0].device
        self._steps = [torch.zeros((), device=self.device) for _ in self._weights]
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)

    @property
    def gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self._weights if weight.grad is not None]

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> Tensor:
        """Along the gradients; returns their norm."""
        for gradient, mask in zip(self.gradients, self._masks, strict=True):
            if mask is not None:
                gradient.mul_(mask)
        norm = nn.utils.get_total_norm(self.gradients)
        adam(
            [weight.detach() for weight in self._weights],
            self.gradients,
            self._moments[0],
            self._moments[1],
            [],
            self._steps,
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=learning_rate,
            weight_decay=0.0,
            eps=_EPSILON,
            maximize=False,
        )
        return norm

    def _state(self) -> list[Tensor]:
        weights = [weight.detach() for weight in self._weights]
        return [*weights, *self._moments[0], *self._moments[1], *self._steps]

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._state()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        for tensor, saved in zip(self._state(), snapshot, strict=True):
            tensor.copy_(saved)


def _on_gpu(
    weights: _Adam,
    loss: Callable[[Any], Tensor],
    batch_of: Callable[[int], Mapping[str, Tensor | None]],
    batches: int,
    steps: int,
    learning_rate: float,
) -> None:
    def gradients(batch: Any) -> Tensor:
        for gradient in weights.gradients:
            gradient.zero_()
        value = loss(batch)
        value.backward()
        return value.detach()

    captured: CapturedStep | None = None
    may_capture = steps >= _WORTHWHILE
    for step in range(steps):
        rate = 0.5 * learning_rate * (1 + math.cos(math.pi * step / steps))
        batch = batch_of(step % batches)
        if may_capture and captured is None and batch.get("mask") is None:
            who = "reconstruct"
            captured = capture(who, gradients, weights.step, weights, batch, rate)
            may_capture = captured is not None
            if captured is not None:  # which has taken the step
                continue
        if captured is not None and captured.takes(batch):
            captured(batch, rate)
        else:
            gradients(batch)
            weights.step(rate)
