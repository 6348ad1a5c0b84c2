"""What a model is: layers, residual stream, norms, embeddings, MLP, attention, config fields."""

from sparsessm_plugin.families import models
from sparsessm_plugin.families.model import (
    Layer,
    ModelAdapter,
    get_model_adapter,
    known_models,
    register_model,
)
from sparsessm_plugin.families.parts import Part, UnitBlock, find_parts, register_part

__all__ = [
    "Layer",
    "ModelAdapter",
    "Part",
    "UnitBlock",
    "find_parts",
    "get_model_adapter",
    "known_models",
    "models",
    "register_model",
    "register_part",
]
