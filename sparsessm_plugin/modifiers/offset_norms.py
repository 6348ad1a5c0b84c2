"""Norms that LLM Compressor has exchanged for a calibration, in a model that loses layers.

Where a norm multiplies by 1 + weight, as in Qwen3.5, LLM Compressor puts one that multiplies by
its weight in its place, and at the end puts each back by its name. Layers that stay have other
names by then: the norms of one layer would come back in another, and for the last there is none.
"""

from functools import partial
from typing import Any

from llmcompressor.modeling.offset_norm import NormCalibrationModule
from torch import nn


def keep_names(model: nn.Module) -> None:
    """Let every name get back the norm that stands there when LLM Compressor is done.

    To be called before layers are removed; again, and without such norms, it changes nothing.

    :param model: of a run of LLM Compressor
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, NormCalibrationModule)}
    fresh = {n: m for n, m in norms.items() if "restore" not in vars(m)}
    for name, norm in fresh.items():
        # instance attributes, and no modules: nothing else sees them
        vars(norm)["restore"] = partial(_restored, model, name)
    if fresh and "set_submodule" not in vars(model):
        vars(model)["set_submodule"] = partial(_set_submodule, model, list(norms)[-1])


def _restored(model: nn.Module, name: str, original: Any) -> Any:
    """The norm that stands at a name, in the convention and the class that it came with."""
    try:
        norm: Any = model.get_submodule(name)
    except AttributeError:  # of a layer that is gone
        return original
    return type(norm).restore(norm, original)


def _set_submodule(model: nn.Module, last: str, name: str, *args: Any, **kwargs: Any) -> None:
    """As the model's own, for names that there are; goes away with the last one."""
    if name == last:
        del vars(model)["set_submodule"]
    try:
        model.get_submodule(name)
    except AttributeError:
        return
    type(model).set_submodule(model, name, *args, **kwargs)
