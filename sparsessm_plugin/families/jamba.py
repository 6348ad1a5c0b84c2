"""Jamba (arXiv 2403.19887): Mamba layers among attention layers, learned norms on dt, B, C."""

from typing import Any

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.mamba1 import NormedMamba1Adapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class JambaAdapter(NormedMamba1Adapter):
    """The Mamba-1 layout with learned norms and its own names in the config."""

    family = "jamba"
    mixer_class = "JambaMambaMixer"
    state_size_field = "mamba_d_state"

    def channel_fields(self, channels: int) -> dict[str, Any]:
        hidden_size = self.sizes.hidden_size
        if channels % hidden_size:
            raise SparseSSMError(
                f"{self.name}: the loader of jamba makes mamba_expand * hidden_size channels with "
                f"a whole mamba_expand; {channels} is no multiple of {hidden_size}"
            )
        return {"mamba_expand": channels // hidden_size}

    def scale_state(self, factor: float) -> None:
        self.mixer.c_layernorm.weight.mul_(factor)
