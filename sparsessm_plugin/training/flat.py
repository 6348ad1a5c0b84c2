"""Weights that are trained, side by side in memory, with gradients, float32 copies and moments.

A step is then a few kernels over all weights, however many tensors there are.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from sparsessm_plugin.training import muon

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch's own
_ALIGNED = 64  # numbers between the starts of two tensors: kernels want whole vectors
# Numbers of which a step makes float32 gradients at once, where gradients are in half precision.
_CHUNK = 2**24


@dataclass
class _Place:
    """Where a parameter stands among the numbers of its group."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    home: Tensor  # the memory that is the model's own

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


@dataclass
class _Group:
    """The parameters of one dtype."""

    dtype: torch.dtype
    places: list[_Place] = field(default_factory=list)
    size: int = 0
    matrices: int = 0  # the first so many numbers are stepped by Muon
    # shape of these matrices, where the first starts, how many there are, numbers between them
    stacks: list[tuple[torch.Size, int, int, int]] = field(default_factory=list)
    # (size,) each: what the model computes with, its gradient, float32 weights (where the dtype
    # is float32 they are the former), the first moment; the second without the matrices
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))
    masters: Tensor = field(default_factory=lambda: torch.empty(0))
    moments: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    steps: list[Tensor] = field(default_factory=list)  # that each chunk has been moved by

    def allocate(self, device: torch.device) -> None:
        whole = {"dtype": torch.float32, "device": device}
        self.masters = torch.zeros(self.size, **whole)  # type: ignore[call-overload]
        self.weights = self.masters
        if self.dtype != torch.float32:
            self.weights = torch.zeros(self.size, dtype=self.dtype, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self.moments = torch.zeros_like(self.masters), torch.zeros_like(self.of_adam(self.masters))
        count = max(1, math.ceil((self.size - self.matrices) / _CHUNK))
        self.steps = [torch.zeros((), **whole) for _ in range(count)]  # type: ignore[call-overload]

    def of_adam(self, flat: Tensor) -> Tensor:
        """The numbers that Adam steps, of all."""
        return flat[self.matrices :]

    def add_matrix(self, shape: torch.Size, start: int, between: int) -> None:
        """Let a parameter that starts behind all others be stepped by Muon."""
        self.matrices = start + between
        if self.stacks:
            last, first, count, width = self.stacks[-1]
            if last == shape and (count + 1) * shape.numel() <= _CHUNK:
                self.stacks[-1] = last, first, count + 1, width
                return
        self.stacks.append((shape, start, 1, between))

    def stacked(self, flat: Tensor) -> Iterator[Tensor]:
        """(n, rows, columns) of the matrices that Muon steps, those of one shape together."""
        for shape, start, count, between in self.stacks:
            yield flat.as_strided((count, *shape), (between, shape[1], 1), start)


class FlatWeights:
    """Float32 weights and an optimizer for parameters of a model, which computes with copies.

    The optimizer is Adam, and Muon for some matrices. Bytes a weight beside the model's own: 16,
    or 12 where Muon has it, of which the copy that is computed with and its gradient take 8 in
    float32 and 4 in half precision, where float32 weights add 4. The model's own memory stays as
    it was until :meth:`write_back`.

    :param parameters: by name, floating point, all on one device; those that share their memory
        stay one
    :param matrices: names of those of two dimensions that Muon steps
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], matrices: Collection[str] = ()
    ) -> None:
        self.device = next(iter(parameters.values())).device
        groups: dict[torch.dtype, _Group] = {}
        shared: dict[Any, int] = {}
        # matrices come first, those of one shape one behind the other
        found = [(n, p) for n, p in parameters.items() if n in matrices and p.numel()]
        found.sort(key=lambda entry: tuple(entry[1].shape))
        rest = [(n, p) for n, p in parameters.items() if n not in matrices or not p.numel()]
        for name, parameter in found + rest:
            group = groups.setdefault(parameter.dtype, _Group(parameter.dtype))
            home = parameter.data
            key = (home.data_ptr(), home.dtype, home.shape, home.stride()) if home.numel() else name
            if key not in shared:
                shared[key] = group.size
                between = math.ceil(home.numel() / _ALIGNED) * _ALIGNED
                group.size += between
                if name in matrices and home.numel():
                    group.add_matrix(home.shape, shared[key], between)
            group.places.append(_Place(name, parameter, home.shape, shared[key], home))
        self._groups = list(groups.values())
        for group in self._groups:
            group.allocate(self.device)
        self.take()

    @property
    def numbers(self) -> int:
        """How many there are, gaps between tensors among them."""
        return sum(group.size for group in self._groups)

    @torch.no_grad()
    def take(self) -> None:
        """Begin from the model's own weights; moments stay."""
        for group in self._groups:
            for place in group.places:
                place.of(group.masters).copy_(place.home)
            _to_weights(group)

    @torch.no_grad()
    def write_back(self) -> None:
        """Let the model's own memory hold the weights as they are now."""
        for group in self._groups:
            for place in group.places:
                place.home.copy_(place.of(group.weights))

    def forget(self) -> None:
        """Take the moments back to the start."""
        for group in self._groups:
            for tensor in (*group.moments, *group.steps):
                tensor.zero_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model compute with these weights; the memory of its own comes back on exit."""
        places = [(group, place) for group in self._groups for place in group.places]
        for _, place in places:  # since the last time the model may have been moved
            place.home = place.parameter.data
        try:
            for group, place in places:
                place.parameter.data = place.of(group.weights)
            self.clear_gradients()
            yield
        finally:
            for _, place in places:
                place.parameter.grad, place.parameter.data = None, place.home

    def clear_gradients(self) -> None:
        """Gradients of zero, into which the next backward pass adds."""
        for group in self._groups:
            group.gradients.zero_()
            if group.places[0].parameter.grad is None:
                for place in group.places:
                    place.parameter.grad = place.of(group.gradients)

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients, a tensor for each dtype."""
        return [group.gradients for group in self._groups]

    def masks(self, pruned: Mapping[str, Tensor]) -> "list[Tensor | None]":
        """Where weights are pruned, for :meth:`step`.

        :param pruned: bool by name, True where a weight is zero and stays so
        """
        masks: list[Tensor | None] = []
        for group in self._groups:
            found = [place for place in group.places if place.name in pruned]
            mask = torch.zeros(group.size, dtype=torch.bool, device=self.device) if found else None
            for place in found:
                place.of(mask).copy_(pruned[place.name])  # type: ignore[arg-type]
            masks.append(mask)
        return masks

    @torch.no_grad()
    def zero(self, masks: "list[Tensor | None]") -> None:
        """Set pruned weights to zero."""
        for group, mask in zip(self._groups, masks, strict=True):
            if mask is not None:
                group.masters.masked_fill_(mask, 0.0)
                _to_weights(group)

    @torch.no_grad()
    def step(
        self, learning_rate: float | Tensor, clip: float, masks: "list[Tensor | None]"
    ) -> Tensor:
        """A step along the gradients, unless they are no numbers; nothing waits for it.

        :param learning_rate: of this step; where steps are captured a float32 scalar on the device
        :param clip: norm of all gradients that the step goes along
        :param masks: of :meth:`masks`
        :return: float64 scalar, the norm as it was; NaN or infinite where no step was taken
        """
        squares = []
        for group, mask in zip(self._groups, masks, strict=True):
            if mask is not None:
                group.gradients.masked_fill_(mask, 0.0)
            # in float64 no square of a float32 number is too large
            squares += [
                torch.linalg.vector_norm(part, dtype=torch.float64).square()
                for part in group.gradients.split(_CHUNK)
            ]
        norm = torch.stack(squares).sum().sqrt()
        divisor = (norm / clip).clamp(min=1.0).float()
        skipped = (~norm.isfinite()).float()
        for group, mask in zip(self._groups, masks, strict=True):
            stacks = (group.masters, group.gradients, group.moments[0])
            for matrices, gradients, momentum in zip(*map(group.stacked, stacks), strict=True):
                # what is skipped must not reach the momentum, and 0 times NaN is NaN
                scaled = (gradients.float() / divisor).masked_fill(skipped.bool(), 0.0)
                muon.step(matrices, scaled, momentum, learning_rate, 1.0 - skipped)
            parts = zip(
                group.of_adam(group.masters).split(_CHUNK),
                group.of_adam(group.gradients).split(_CHUNK),
                group.of_adam(group.moments[0]).split(_CHUNK),
                group.moments[1].split(_CHUNK),
                group.steps,
                strict=True,
            )
            for master, gradient, m, v, steps in parts:
                adam(
                    [master],
                    [gradient.float()],
                    [m],
                    [v],
                    [],
                    [steps],
                    fused=True,
                    grad_scale=divisor,
                    found_inf=skipped,
                    amsgrad=False,
                    beta1=_BETAS[0],
                    beta2=_BETAS[1],
                    lr=learning_rate,
                    weight_decay=0.0,
                    eps=_EPSILON,
                    maximize=False,
                )
            if mask is not None:  # the moments of what was pruned last still move it
                group.masters.masked_fill_(mask, 0.0)
            _to_weights(group)
        return norm

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Copies of all that a step changes, for :meth:`restore`."""
        return [tensor.clone() for group in self._groups for tensor in _state(group)]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Be as at the snapshot."""
        tensors = [tensor for group in self._groups for tensor in _state(group)]
        for tensor, saved in zip(tensors, snapshot, strict=True):
            tensor.copy_(saved)

    # -- as a file ---------------------------------------------------------------------

    def state(self, moments: bool = True) -> list[dict[str, Any]]:
        """All that a later process needs to go on; tensors that the next step changes.

        :param moments: also those of the optimizer
        """
        return [
            {
                "dtype": str(group.dtype),
                "masters": group.masters,
                "moments": list(group.moments) if moments else [],
                "steps": [float(steps) for steps in group.steps],
            }
            for group in self._groups
        ]

    def described(self) -> list[list[Any]]:
        """Names, shapes and starts, by which another process knows a state of the same weights."""
        return [
            [place.name, list(place.shape), str(group.dtype), place.start, group.matrices]
            for group in self._groups
            for place in group.places
        ]

    @torch.no_grad()
    def load(self, state: list[dict[str, Any]]) -> None:
        """Go on from what :meth:`state` gave."""
        for group, saved in zip(self._groups, state, strict=True):
            group.masters.copy_(saved["masters"])
            for moment, value in zip(group.moments, saved["moments"], strict=False):
                moment.copy_(value)
            for steps, value in zip(group.steps, saved["steps"], strict=True):
                steps.fill_(value)
            _to_weights(group)

    def sample(self, count: int = 4096) -> Tensor:
        """Some of the weights, evenly spread, float32 on the CPU."""
        picked = [group.masters[:: max(1, math.ceil(group.size / count))] for group in self._groups]
        return torch.cat(picked).cpu()


def _to_weights(group: _Group) -> None:
    if group.weights is not group.masters:
        group.weights.copy_(group.masters)


def _state(group: _Group) -> list[Tensor]:
    own = [] if group.weights is group.masters else [group.weights]
    return [group.masters, *own, *group.moments, *group.steps]
