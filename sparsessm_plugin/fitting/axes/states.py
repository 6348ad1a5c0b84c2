"""States of the mixers, key dims of gated delta nets."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of


@register_axis
class States(Axis):
    """N of every mixer. Last, as its fit sees the mixers as they stay."""

    name = "states"
    order = 60
    modifier = "StateRemovalModifier"

    def length(self, model: nn.Module) -> int | None:
        return find_mixers(model)[0].sizes.state_size

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, 1, (6, 4, 3, 2, 1))

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        mixer = find_mixers(model)[0]
        return mixer.size_fields(mixer.state_axis, size)
