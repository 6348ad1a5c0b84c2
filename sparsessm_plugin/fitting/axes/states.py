"""States of the mixers, key dims of gated delta nets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of
from sparsessm_plugin.methods.state_settings import MOST_MIXED

_SHORT = {"reconstruct_steps": 40}


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
        # the longest of the fits is left out or cut short: a little too dark
        mixer = find_mixers(model)[0]
        if mixer.recurrence != "selective":
            return _SHORT if device.type == "cuda" else {"compensate": ["out_proj"]}
        if device.type == "cuda" and mixer.mixes_C and mixer.sizes.state_size <= MOST_MIXED:
            return {"compensate": ["D", "C", "out_proj"]}
        short = device.type == "cuda" and not (mixer.mixes_C or mixer.norms_state)
        return _SHORT if short else {"compensate": ["D", "out_proj"]}

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        mixer = find_mixers(model)[0]
        return mixer.size_fields(mixer.state_axis, size)
