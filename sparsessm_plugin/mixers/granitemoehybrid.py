"""GraniteMoeHybrid: Mamba-2 layers among attention layers, each with experts."""

from sparsessm_plugin.mixers.bamba import BambaAdapter
from sparsessm_plugin.mixers.base import register_adapter


@register_adapter
class GraniteMoeHybridAdapter(BambaAdapter):
    """Bamba's mixer under another name."""

    family = "granitemoehybrid"
    mixer_class = "GraniteMoeHybridMambaLayer"
