"""GraniteMoeHybrid: Mamba-2 layers among attention layers, each with experts."""

from sparsessm_plugin.families.bamba import BambaAdapter
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class GraniteMoeHybridAdapter(BambaAdapter):
    """Bamba's mixer under another name."""

    family = "granitemoehybrid"
    mixer_class = "GraniteMoeHybridMambaLayer"
