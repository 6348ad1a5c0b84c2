"""What each channel, head or channel of every head matters, by the weights that it owns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.families import MixerAdapter, get_tensor
from sparsessm_plugin.registry import Registry

# an adapter and one of its axes -> (indices of the axis,), lower goes first
ChannelScore = Callable[[MixerAdapter, str], Tensor]


@dataclass(frozen=True)
class ChannelCriterion:
    """How channels, heads or channels of every head are chosen.

    :param score: see :data:`ChannelScore`; None where indices are judged together by what
        out_proj and x_proj lose (:func:`sparsessm_plugin.refit.channels.eliminate_blocks`)
    :param statistics: what it reads of the calibration; empty if it needs no data
    """

    score: ChannelScore | None
    statistics: frozenset[str] = frozenset()

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return bool(self.statistics)


CHANNEL_CRITERIA: Registry[ChannelCriterion] = Registry(
    "saliency of channels", "sparsessm_plugin.criteria"
)
CHANNEL_CRITERIA.register("output_energy", ChannelCriterion(None, frozenset({"gram"})))


def register_channel_criterion(name: str) -> Callable[[ChannelScore], ChannelScore]:
    """Decorator: make a score of weights known as a criterion for channels."""

    def register(score: ChannelScore) -> ChannelScore:
        CHANNEL_CRITERIA.register(name, ChannelCriterion(score))
        return score

    return register


@register_channel_criterion("magnitude")
def magnitude(adapter: MixerAdapter, axis: str) -> Tensor:
    """Norm of all weight matrices' entries that an index owns."""
    return _norm(adapter, axis, whole=True)


@register_channel_criterion("out_proj_norm")
def out_proj_norm(adapter: MixerAdapter, axis: str) -> Tensor:
    """Norm of an index's columns of out_proj."""
    return _norm(adapter, axis, whole=False)


def _norm(adapter: MixerAdapter, axis: str, whole: bool) -> Tensor:
    length = adapter.axis_length(axis)
    total = torch.zeros(length, dtype=torch.float64, device=adapter.A_log.device)
    for where in adapter.axes(axis):
        tensor = get_tensor(adapter.mixer, where.tensor)
        vector = 2 if where.tensor in adapter.stacked else 1  # dimensions of one
        if tensor is None or tensor.ndim <= vector or where.tensor in ("A_log", "mup_vector"):
            continue
        if not whole and where.tensor != f"{adapter.exit_kind}.weight":
            continue
        squares = adapter.entries_along(where).double().square().sum(1)
        total += torch.stack([squares[where.positions([i])].sum() for i in range(length)])
    return total.sqrt()
