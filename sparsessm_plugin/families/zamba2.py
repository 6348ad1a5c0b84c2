"""Zamba2 (arXiv 2411.15242): Mamba-2 layers, some of them fed by shared attention."""

from sparsessm_plugin.families.mamba2 import Mamba2Adapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class Zamba2Adapter(Mamba2Adapter):
    """The Mamba-2 layout with a norm that runs over each group of heads apart."""

    family = "zamba2"
    mixer_class = "Zamba2MambaMixer"
    state_size_field = "mamba_d_state"
    num_heads_field = "n_mamba_heads"
    head_dim_field = "mamba_headdim"
    expand_field = "mamba_expand"

    def norm_groups(self) -> int:
        return self.mixer.n_groups
