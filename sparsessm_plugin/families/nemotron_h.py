"""Nemotron-H (arXiv 2504.03624): Mamba-2, attention and MLP layers by turns."""

from typing import Any

from sparsessm_plugin.families.registry import register_adapter
from sparsessm_plugin.families.zamba2 import Zamba2Adapter


@register_adapter
class NemotronHAdapter(Zamba2Adapter):
    """Zamba2's mixer; its loader makes as many channels as heads and head_dim say."""

    family = "nemotron_h"
    mixer_class = "NemotronHMamba2Mixer"
    state_size_field = "ssm_state_size"
    num_heads_field = "mamba_num_heads"
    head_dim_field = "mamba_head_dim"

    def channel_fields(self, num_heads: int, head_dim: int) -> dict[str, Any]:
        return {self.num_heads_field: num_heads, self.head_dim_field: head_dim}
