"""Adapters that read the state-space mixers of transformers, one file a family."""

from sparsessm_plugin.mixers import falcon_mamba, jamba, mamba
from sparsessm_plugin.mixers.base import (
    MixerAdapter,
    MixerQuantities,
    MixerSizes,
    TensorAxis,
    find_mixers,
    get_adapter,
    is_mixer,
    iter_mixers,
    known_mixers,
    register_adapter,
)

__all__ = [
    "MixerAdapter",
    "MixerQuantities",
    "MixerSizes",
    "TensorAxis",
    "falcon_mamba",
    "find_mixers",
    "get_adapter",
    "is_mixer",
    "iter_mixers",
    "jamba",
    "known_mixers",
    "mamba",
    "register_adapter",
]
