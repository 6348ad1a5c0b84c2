"""Width of the residual stream."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of, tile_of


@register_axis
class Hidden(Axis):
    """hidden_size; heads go along where the loader ties them and all cannot stay."""

    name = "hidden"
    order = 20
    modifier = "WidthRemovalModifier"
    affine = False  # heads that go along make in_proj quadratic in it

    def length(self, model: nn.Module) -> int | None:
        return get_model_adapter(model).hidden_size

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, tile_of(length))

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        adapter = get_model_adapter(model)
        return adapter.hidden_fields(size, adapter.channels_beside(size))
