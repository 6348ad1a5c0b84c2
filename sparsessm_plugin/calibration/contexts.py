"""A model alone, without what other modifiers have put on it; afterwards all is as it was.

LLM Compressor's contexts switch on at their end, even inside of one another: after the inner one
hooks would observe, and scales that nothing has set yet would quantize, what the outer one is
there for.
"""

import sys
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import Any

import torch
import torch.fx._symbolic_trace as symbolic_trace
from compressed_tensors.utils import patch_attr, patch_attrs
from torch import nn


@contextmanager
def hooks_disabled(keep: Set[Any] = frozenset()) -> Iterator[None]:
    """No hooks of LLM Compressor's modifiers, but those of some handles."""
    module = sys.modules.get("llmcompressor.modifiers.utils.hooks")
    if module is None:  # nobody has any
        yield
        return
    mixin = module.HooksMixin
    with patch_attr(mixin, "_HOOKS_DISABLED", True), mixin.disable_hooks(keep=set(keep)):
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and no cache."""
    training = model.training
    with ExitStack() as stack:
        if hasattr(model, "config"):
            text_config = getattr(model.config, "text_config", model.config)
            stack.enter_context(patch_attr(text_config, "use_cache", False))
        stack.callback(model.train, training)
        model.eval()
        yield


@contextmanager
def quantization_disabled(model: nn.Module) -> Iterator[None]:
    """No module quantizes what goes through it."""
    with patch_attrs(model.modules(), "quantization_enabled", repeat(False)):
        yield


def of_quantization(name: str) -> bool:
    """Whether a quantization stage has put this parameter beside a weight; empty until it runs."""
    return name.endswith(("_scale", "_zero_point"))


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The model's own predictions: no hooks, caches, quantization or gradients."""
    with (
        hooks_disabled(),
        evaluating(model),
        quantization_disabled(model),
        torch.no_grad(),
    ):
        yield


def forget_traces() -> None:
    """Let go of every model that LLM Compressor has traced in this process.

    It compiles the forward of a model in a namespace of its own, which holds the model, and wraps
    functions there by ``torch.fx.wrap``, which keeps the namespace for all later traces.
    """
    wrapped = symbolic_trace._wrapped_fns_to_patch
    for key in [key for key, namespace in wrapped.items() if "torch.fx.wrap" in namespace]:
        del wrapped[key]
