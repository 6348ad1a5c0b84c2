"""Bamba: Mamba-2 layers among attention layers."""

from sparsessm_plugin.families.mamba2 import Mamba2Adapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class BambaAdapter(Mamba2Adapter):
    """The Mamba-2 layout with its own names in the config."""

    family = "bamba"
    mixer_class = "BambaMixer"
    state_size_field = "mamba_d_state"
    num_heads_field = "mamba_n_heads"
    head_dim_field = "mamba_d_head"
    expand_field = "mamba_expand"
