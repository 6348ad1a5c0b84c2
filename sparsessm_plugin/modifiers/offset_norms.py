"""Norms that LLM Compressor has exchanged for a calibration come back as what they were.

Where a norm multiplies by 1 + weight, as in Qwen3.5, LLM Compressor puts one that multiplies by
its weight in its place, and at the end puts each back by its name.

In half precision 1 + weight is rounded, so that a norm that nobody has changed would come back
with other weights. And layers that stay when others are removed have other names by then: a norm
would come back in another layer or nowhere, and one whose name no norm had before, as the query
norm of an attention layer that follows a removed mixer, would stay exchanged, and be saved as
1 + weight.

A pipeline lets weights in main memory be copied to the GPU when they are used; the norms that
were put aside meanwhile would come back without that, and the model could not compute.
"""

from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import OffloadCache
from llmcompressor.modeling.offset_norm import NormCalibrationModule
from torch import nn


def keep_weights(model: nn.Module) -> None:
    """Let each norm that no modifier changes come back with the weight that it had.

    Again, and without such norms, it changes nothing.

    :param model: of a run of LLM Compressor, before anything has changed
    """
    for norm in _norms(model).values():
        # instance attributes, and no modules: nothing else sees them
        vars(norm).setdefault("restore", partial(_restored, norm))


def keep_names(model: nn.Module) -> None:
    """Let each norm come back where it stands when LLM Compressor is done.

    Again, and without such norms, it changes nothing.

    :param model: of a run of LLM Compressor, before layers are removed
    """
    keep_weights(model)
    norms = _norms(model)
    if norms and "set_submodule" not in vars(model):
        vars(model)["set_submodule"] = partial(_set_submodule, model, norms, list(norms)[-1])


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NormCalibrationModule)}


def _restored(norm: Any, original: Any) -> Any:
    """The norm in the convention and the class that it came with, known to ``norm`` from then."""
    own, before, place = norm.weight.detach(), original.weight.detach(), norm._parameters
    exchanged = (1.0 + before.float()).to(own.dtype).to(own.device)
    if not torch.equal(own, exchanged):
        original = type(norm).restore(norm, original)
    if isinstance(place, OffloadCache) and not isinstance(original._parameters, OffloadCache):
        offload_module(original, place.onload_device, place.offload_device)
    vars(norm)["restored"] = original
    return original


def _set_submodule(
    model: nn.Module,
    norms: dict[str, nn.Module],
    last: str,
    name: str,
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """As the model's own, but for norms, which all come back with the last one."""
    if all(vars(norm).get("restored") is not module for norm in norms.values()):
        type(model).set_submodule(model, name, module, *args, **kwargs)
    elif name == last:
        del vars(model)["set_submodule"]
        for place, norm in _norms(model).items():
            type(model).set_submodule(model, place, vars(norm)["restored"])
