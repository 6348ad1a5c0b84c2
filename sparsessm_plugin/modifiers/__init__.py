"""LLM Compressor modifiers: lifecycle only, the mathematics is elsewhere."""

from sparsessm_plugin.modifiers.channel_removal import ChannelRemovalModifier
from sparsessm_plugin.modifiers.sparsessm import SparseSSMModifier
from sparsessm_plugin.modifiers.state_removal import StateRemovalModifier

__all__ = ["ChannelRemovalModifier", "SparseSSMModifier", "StateRemovalModifier"]
