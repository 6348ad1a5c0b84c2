"""LLM Compressor modifiers: lifecycle only, the mathematics is elsewhere."""

from sparsessm_plugin.modifiers.sparsessm import SparseSSMModifier

__all__ = ["SparseSSMModifier"]
