"""A model alone, without what other modifiers have put on it; afterwards all is as it was.

LLM Compressor's contexts switch on at their end, even inside of one another: after the inner one
hooks would observe, and scales that nothing has set yet would quantize, what the outer one is
there for.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import torch.fx._symbolic_trace as symbolic_trace
from compressed_tensors.utils import patch_attr, patch_attrs
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import disable_cache, eval_context
from torch import nn


@contextmanager
def hooks_disabled(keep: Set[Any] = frozenset()) -> Iterator[None]:
    """No hooks of modifiers, but those of some handles."""
    with (
        patch_attr(HooksMixin, "_HOOKS_DISABLED", True),
        HooksMixin.disable_hooks(keep=set(keep)),
    ):
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
        eval_context(model),
        disable_cache(model),
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
