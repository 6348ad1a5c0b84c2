"""FalconMamba (arXiv 2410.05355): weightless RMS norms on dt, B and C."""

from sparsessm_plugin.mixers.base import register_adapter
from sparsessm_plugin.mixers.mamba1 import NormedMamba1Adapter


@register_adapter
class FalconMambaAdapter(NormedMamba1Adapter):
    """The Mamba-1 layout with norms that have no parameters."""

    family = "falcon_mamba"
    mixer_class = "FalconMambaMixer"
