"""States of the mixers, key dims of gated delta nets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of


@register_axis
class States(Axis):
    """N of every mixer. Last, as its fit sees the mixers as they stay."""

    name = "states"
    order = 60
    modifier = "StateRemovalModifier"
    slower = 5.0

    def length(self, model: nn.Module) -> int | None:
        return find_mixers(model)[0].sizes.state_size

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, 1, (6, 4, 3, 2, 1))

    def quick_fields(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        # without mixtures of rows and reconstruction, which a recipe has: a little too dark
        selective = find_mixers(model)[0].recurrence == "selective"
        return {"compensate": ["D", "out_proj"] if selective else ["out_proj"]}

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        mixer = find_mixers(model)[0]
        return mixer.size_fields(mixer.state_axis, size)
