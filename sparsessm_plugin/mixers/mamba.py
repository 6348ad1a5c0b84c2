"""Mamba (arXiv 2312.00752)."""

from sparsessm_plugin.mixers.base import register_adapter
from sparsessm_plugin.mixers.mamba1 import Mamba1Adapter


@register_adapter
class MambaAdapter(Mamba1Adapter):
    """The Mamba-1 layout as it is."""

    family = "mamba"
    mixer_class = "MambaMixer"
