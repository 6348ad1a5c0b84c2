"""Channels of the mixers, or channels of their heads."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of, tile_of


@register_axis
class Channels(Axis):
    """D of every Mamba-1 mixer; P of every head in the Mamba-2 layout, dv in gated delta nets."""

    name = "channels"
    order = 50
    modifier = "ChannelRemovalModifier"

    def length(self, model: nn.Module) -> int | None:
        mixer = find_mixers(model)[0]
        return mixer.axis_length(mixer.channel_axis)

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, tile_of(length))

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        mixer = find_mixers(model)[0]
        return mixer.size_fields(mixer.channel_axis, size)
