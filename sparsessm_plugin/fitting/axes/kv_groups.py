"""Key and value heads of the attention of hybrids, with their queries."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of


@register_axis
class KeyValueGroups(Axis):
    """Key and value heads, as many in every attention."""

    name = "kv_groups"
    order = 40
    modifier = "AttentionRemovalModifier"

    def length(self, model: nn.Module) -> int | None:
        adapter = get_model_adapter(model)
        return adapter.axis_length(self.name) if self.name in adapter.axis_names else None

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, 1, (6, 4, 2))

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        return get_model_adapter(model).unit_field_values(self.name, size)
