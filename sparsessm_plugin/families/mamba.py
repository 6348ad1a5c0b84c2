"""Mamba (arXiv 2312.00752)."""

from typing import Any

from sparsessm_plugin.families.mamba1 import Mamba1Adapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class MambaAdapter(Mamba1Adapter):
    """The Mamba-1 layout as it is."""

    family = "mamba"
    mixer_class = "MambaMixer"

    def channel_fields(self, channels: int) -> dict[str, Any]:
        # `expand` must be whole; an `intermediate_size` in the file takes precedence over it
        return {"intermediate_size": channels}
