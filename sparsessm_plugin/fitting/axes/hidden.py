"""Width of the residual stream."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of, tile_of
from sparsessm_plugin.methods.channels_along import choose_along


@register_axis
class Hidden(Axis):
    """hidden_size; where a loader ties the channels, some go along."""

    name = "hidden"
    order = 20
    modifier = "WidthRemovalModifier"
    affine = False  # channels that go along make in_proj quadratic in it

    def length(self, model: nn.Module) -> int | None:
        return get_model_adapter(model).hidden_size

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, tile_of(length))

    def way(self, model: nn.Module, size: int, runtime: str) -> dict[str, Any]:
        adapter = get_model_adapter(model)
        if adapter.expand_field is None:
            return {}
        # all channels beside half of the stream would cost more than fewer beside more of it
        axis = choose_along(adapter, size, runtimes=(runtime,), kept_last=True).axis
        return {"channels": {None: "kept", "channels": "along"}.get(axis, axis)}

    def config_fields(
        self, model: nn.Module, size: int, channels: str | None = None
    ) -> dict[str, Any]:
        adapter = get_model_adapter(model)
        return adapter.hidden_fields(size, choose_along(adapter, size, channels).sizes)
