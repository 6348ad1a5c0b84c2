"""What zeros in each projection do to the predictions of a model, at several sparsities."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsessm_plugin.allocation.probe import LayerProbe, Probe
from sparsessm_plugin.backends.lanes import Lane
from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.progress import Stage
from sparsessm_plugin.solvers.projections import SOLVERS
from sparsessm_plugin.solvers.sparsegpt import error_curve, hasty_error_curve

_CURVE = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
# From the last of these on, and up to a sparsity of 1, whose error is the output's whole energy.
_SPARSE_CURVE = (0.97, 0.98, 0.99, 0.995, 1.0)
_LANES = 4  # projections whose curves a GPU computes at once
_ROWS, _BLOCKS = 64, 20  # of more inputs than 20 blocks have, blocks are larger
# Of wider projections a curve looks at so many inputs; and as many does it take tokens for.
CURVE_INPUTS = 1280
# The optimal allocation raises no projection's sparsity further than this above the mean.
_MOST_MORE = 0.3
_LEAST_KEPT = 0.25  # where the curve goes further, of the share that is kept on average
_PROBE_SPARSITY = 0.5  # that each projection's harm is measured at
_LEAST_DIVERGENCE = 1e-9  # nats a token


def curve_for(sparsity: float) -> tuple[float, ...]:
    """The sparsities at which losses are measured; more of them where few entries stay."""
    return _CURVE if sparsity < _CURVE[-1] else (*_CURVE, *_SPARSE_CURVE)


def highest_for(sparsity: float) -> float:
    """The sparsity that no projection exceeds, within :func:`curve_for`."""
    if sparsity < _CURVE[-1]:
        return min(_CURVE[-1], sparsity + _MOST_MORE)
    return 1 - _LEAST_KEPT * (1 - sparsity)


class _Begun(NamedTuple):
    """A curve that a lane may still compute, and what it reads."""

    name: str
    weight: Tensor
    hessian: Tensor
    lane: Lane
    curve: Tensor
    exists: Tensor


class LossMeter:
    """How far zeros move the predictions of a model, projection by projection.

    The error that SparseGPT leaves, times what a unit of squared output error of the
    projection does. For that each is pruned alone for a moment, by Wanda as that costs
    nothing, and the divergence from the dense model's predictions on a little of the data is
    divided by the error made. It grows with the error evenly enough: SparseGPT at another
    sparsity gives about the same.

    :param probe: of the model
    :param sparsity: that will be asked for; see :func:`curve_for`
    :param block_size: of SparseGPT, at least
    :param dampening_frac: of SparseGPT
    :param who: for the progress that is shown
    """

    def __init__(
        self,
        probe: Probe | LayerProbe,
        sparsity: float,
        *,
        block_size: int,
        dampening_frac: float,
        who: str,
    ) -> None:
        self.probe = probe
        self._curve = curve_for(sparsity)
        self._block_size = block_size
        self._dampening_frac = dampening_frac
        self._who = who
        self._curves: dict[str, list[float]] = {}  # by name of the projection
        self._errors: dict[str, Tensor] = {}  # by name of the parameter
        self._tensors: dict[str, str] = {}  # of the projection -> of the parameter
        self._begun: list[_Begun] = []  # in the last call

    @torch.no_grad()
    def add(
        self,
        projections: Sequence[PrunableWeight],
        hessians: Mapping[str, Tensor],
        everywhere: Collection[str] = (),
    ) -> None:
        """Measure these projections, in the order of the model.

        A GPU may still be at it when this returns; :meth:`losses` waits.

        :param hessians: (..., in, in) of each projection, by name
        :param everywhere: names of projections that several layers use
        """
        self._end_curves()
        by_tensor = {p.parameter_name: p for p in projections}

        def pruned(tensor: str) -> Tensor:
            projection = by_tensor[tensor]
            weight = projection.weight
            hessian = hessians[projection.name].to(weight.device)
            solved = SOLVERS["wanda"](weight, hessian, _PROBE_SPARSITY)
            self._errors[tensor] = solved.squared_error
            return solved.weight

        shared = {tensor for tensor, p in by_tensor.items() if p.name in everywhere}
        mixers = {p.mixer for p in projections}
        who = f"{self._who}: {mixers.pop()}" if len(mixers) == 1 else self._who
        with Stage(f"{who}: what a loss does", len(projections)) as stage:
            self.probe.try_out(list(by_tensor), pruned, lambda name: stage.advance(), shared)
        with Stage(f"{who}: sparsities", len(projections)) as stage:
            for number, (tensor, projection) in enumerate(by_tensor.items()):
                stage.at(projection.name)
                self._begin_curve(projection, hessians[projection.name], number)
                self._tensors[projection.name] = tensor
                stage.advance()
        if not isinstance(self.probe, LayerProbe):  # many layers' Hessians are not held for it
            self._end_curves()

    def _begin_curve(self, projection: PrunableWeight, hessian: Tensor, number: int) -> None:
        """Let a GPU compute the error at each sparsity beside that of others."""
        weight = projection.weight  # a copy where weights are elsewhere, which a lane still reads
        there = hessian.to(weight.device)
        lane, how = Lane(weight.device, number % _LANES), self._how(weight)
        with lane.work():
            curve, exists = hasty_error_curve(weight.float(), there, self._curve, **how)
        self._begun.append(_Begun(projection.name, weight, there, lane, curve, exists))
        if there is not hessian:  # Hessians wait in main memory as there is no room for them
            self._end_curves()

    def _how(self, weight: Tensor) -> dict[str, Any]:
        """How a curve is computed."""
        return {
            "rows": _ROWS,
            "inputs": CURVE_INPUTS,
            "block_size": max(self._block_size, min(weight.shape[-1], CURVE_INPUTS) // _BLOCKS),
            "dampening_frac": self._dampening_frac,
        }

    def _end_curves(self) -> None:
        """Let what follows begin after the lanes' work, and look at it."""
        begun, self._begun = self._begun, []
        for one in begun:
            one.lane.join()
        for one in begun:
            curve = one.curve
            if not bool(one.exists):
                how = self._how(one.weight)
                curve = error_curve(one.weight.float(), one.hessian, self._curve, **how)
            self._curves[one.name] = curve.tolist()

    def losses(self) -> dict[str, list[float]]:
        """Of all that were added: a loss in nats a token for each sparsity of the curve."""
        moved = self.probe.moved()
        self._end_curves()
        found = {}
        for name, curve in self._curves.items():
            tensor = self._tensors[name]
            harm = max(moved[tensor], _LEAST_DIVERGENCE) / max(float(self._errors[tensor]), 1e-30)
            found[name] = [harm * loss for loss in curve]
        return found
