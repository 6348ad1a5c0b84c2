"""Intermediate units of the MLPs of hybrids."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of, tile_of


@register_axis
class MLP(Axis):
    """Intermediate units, as many in every MLP."""

    name = "mlp"
    order = 30
    modifier = "MLPRemovalModifier"

    def length(self, model: nn.Module) -> int | None:
        adapter = get_model_adapter(model)
        return adapter.axis_length(self.name) if self.name in adapter.axis_names else None

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, tile_of(length), (7, 6, 5, 4, 3, 2))

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        return get_model_adapter(model).unit_field_values(self.name, size)
