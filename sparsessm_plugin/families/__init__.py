"""What a mixer and a model are: adapters that read those of transformers, one file a family.

Nothing is imported before one of the names is asked for: ``families.catalog`` is read without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsessm_plugin.families.base import (
        MixerAdapter,
        MixerProjection,
        MixerSizes,
        TensorAxis,
        get_tensor,
        read_out,
        router_names,
    )
    from sparsessm_plugin.families.model import (
        Layer,
        ModelAdapter,
        get_model_adapter,
        known_models,
        register_model,
    )
    from sparsessm_plugin.families.parts import Part, UnitBlock, find_parts, register_part
    from sparsessm_plugin.families.registry import (
        check_not_quantized,
        find_mixers,
        get_adapter,
        is_mixer,
        iter_mixers,
        known_mixers,
        register_adapter,
    )

_MODULES = ("base", "registry", "model", "parts")

__all__ = [
    "Layer",
    "MixerAdapter",
    "MixerProjection",
    "MixerSizes",
    "ModelAdapter",
    "Part",
    "TensorAxis",
    "UnitBlock",
    "check_not_quantized",
    "find_mixers",
    "find_parts",
    "get_adapter",
    "get_model_adapter",
    "get_tensor",
    "is_mixer",
    "iter_mixers",
    "known_mixers",
    "known_models",
    "read_out",
    "register_adapter",
    "register_model",
    "register_part",
    "router_names",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        found = getattr(import_module(f"{__name__}.{module}"), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
