"""A model alone, without what other modifiers have put on it; afterwards all is as it was.

LLM Compressor's contexts switch on at their end, even inside of one another: after the inner one
hooks would observe, and scales that nothing has set yet would quantize, what the outer one is
there for.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import disable_cache, eval_context
from torch import nn

_ENABLED = "quantization_enabled"  # as compressed-tensors reads it of every module


@contextmanager
def hooks_disabled(keep: Set[Any] = frozenset()) -> Iterator[None]:
    """No hooks of modifiers, but those of some handles."""
    before = HooksMixin._HOOKS_DISABLED
    try:
        with HooksMixin.disable_hooks(keep=set(keep)):
            yield
    finally:
        HooksMixin._HOOKS_DISABLED = before


@contextmanager
def quantization_disabled(model: nn.Module) -> Iterator[None]:
    """No module quantizes what goes through it."""
    modules = list(model.modules())
    before = [getattr(module, _ENABLED, True) for module in modules]
    try:
        for module in modules:
            setattr(module, _ENABLED, False)
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            setattr(module, _ENABLED, enabled)


def of_quantization(name: str) -> bool:
    """Whether a quantization stage has put this parameter beside a weight; empty until it runs."""
    return name.endswith(("_scale", "_zero_point"))


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The model's own predictions: no hooks, caches, quantization or gradients."""
    with (
        hooks_disabled(),
        eval_context(model),
        disable_cache(model),
        quantization_disabled(model),
        torch.no_grad(),
    ):
        yield
