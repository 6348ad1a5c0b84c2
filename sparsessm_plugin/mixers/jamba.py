"""Jamba (arXiv 2403.19887): Mamba layers among attention layers, learned norms on dt, B, C."""

from sparsessm_plugin.mixers.base import register_adapter
from sparsessm_plugin.mixers.mamba1 import NormedMamba1Adapter


@register_adapter
class JambaAdapter(NormedMamba1Adapter):
    """The Mamba-1 layout with learned norms and its own names in the config."""

    family = "jamba"
    mixer_class = "JambaMambaMixer"
    state_size_field = "mamba_d_state"
    expand_field = "mamba_expand"
