"""FalconMamba (arXiv 2410.05355): weightless RMS norms on dt, B and C."""

from typing import Any

from sparsessm_plugin.families.mamba1 import NormedMamba1Adapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class FalconMambaAdapter(NormedMamba1Adapter):
    """The Mamba-1 layout with norms that have no parameters."""

    family = "falcon_mamba"
    mixer_class = "FalconMambaMixer"

    def channel_fields(self, channels: int) -> dict[str, Any]:
        return {"intermediate_size": channels}  # as for Mamba

    def scale_state(self, factor: float) -> None:
        # nothing behind the norms can hold the factor, so it goes to where y ends
        self.mixer.D.div_(factor)
        self.mixer.out_proj.weight.mul_(factor)
