"""LLM Compressor modifiers: lifecycle only, the mathematics is elsewhere."""

from sparsessm_plugin.modifiers import conflicts  # which every modifier asks before it acts
from sparsessm_plugin.modifiers.channel_removal import ChannelRemovalModifier
from sparsessm_plugin.modifiers.gradient_magnitude import GradientMagnitudeModifier
from sparsessm_plugin.modifiers.layer_removal import LayerRemovalModifier
from sparsessm_plugin.modifiers.sensitivity import SensitivitySparseGPTModifier
from sparsessm_plugin.modifiers.sparse_gptq import SparseGPTQModifier
from sparsessm_plugin.modifiers.sparsessm import SparseSSMModifier
from sparsessm_plugin.modifiers.state_removal import StateRemovalModifier
from sparsessm_plugin.modifiers.unit_removal import AttentionRemovalModifier, MLPRemovalModifier
from sparsessm_plugin.modifiers.width_removal import WidthRemovalModifier

__all__ = [
    "AttentionRemovalModifier",
    "ChannelRemovalModifier",
    "GradientMagnitudeModifier",
    "LayerRemovalModifier",
    "MLPRemovalModifier",
    "SensitivitySparseGPTModifier",
    "SparseGPTQModifier",
    "SparseSSMModifier",
    "StateRemovalModifier",
    "WidthRemovalModifier",
    "conflicts",
]
