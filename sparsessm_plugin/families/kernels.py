"""Which kernels transformers has bound for the mixers of a model, and which sizes they refuse."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import nn

from sparsessm_plugin.families.base import MixerAdapter, MixerSizes
from sparsessm_plugin.families.registry import get_adapter, iter_mixers, known_mixers

_CONV_MULTIPLE = 8  # csrc/causal_conv1d.cpp of causal-conv1d 1.7.0, channels in the last dimension
_KEPT = {"func_name", "implementation", "is_new_implementation", "torch_function"}


def bound_kernels(model: nn.Module) -> dict[str, str]:
    """Which package each kernel function comes from that the model's mixers may call.

    :return: e.g. ``{"selective_scan_fn": "mamba_ssm"}``, or ``"torch"`` where transformers'
        reference stands in; empty where this version of transformers does not tell
    """
    found: dict[str, str] = {}
    for module in {type(mixer).__module__ for _, mixer in iter_mixers(model)}:
        found |= _bound_in(module)
    return found


def scans_in_kernels(mixer: nn.Module) -> bool:
    """Whether a whole sequence of this mixer runs in a fused scan instead of in plain torch."""
    kernels = _bound_in(type(mixer).__module__)
    whole = (name for name in kernels if "scan" in name or name == "chunk_gated_delta_rule")
    return any(kernels[name] != "torch" for name in whole)


def refused_width(adapter: MixerAdapter, sizes: MixerSizes | None = None) -> int | None:
    """A width of a mixer that causal-conv1d does not take on a GPU, bound or not.

    :param adapter: of the mixer
    :param sizes: that it is about to have; default those that it has
    :return: a number of channels that 8 does not divide; None if it takes the mixer
    """
    if not adapter.convolves_by_channel:
        return None
    sizes = sizes or adapter.sizes
    D = sizes.intermediate_size
    widths = [D]
    if not adapter.has_state_transitions:
        widths = [D + 2 * sizes.n_groups * sizes.state_size]
        if adapter.recurrence == "selective":
            # It reads a part of every row of in_proj, behind the D channels of the gate: rows that
            # are no whole vectors it refuses, and where a part begins inside of one it does not ask
            widths += [D + widths[0] + sizes.num_heads, D]
    return next((width for width in widths if width % _CONV_MULTIPLE), None)


def kernels_refuse(adapter: MixerAdapter) -> bool:
    """Whether transformers has bound a convolution that fails on a mixer of these sizes."""
    kernels = _bound_in(type(adapter.mixer).__module__)
    bound = any(kernels[name] != "torch" for name in kernels if _convolves(name))
    return bound and refused_width(adapter) is not None


def refused_mixer(model: nn.Module) -> tuple[str, int] | None:
    """Name and width of the first mixer on which a bound convolution fails."""
    for name, mixer in iter_mixers(model):
        if type(mixer).__name__ in known_mixers():
            adapter = get_adapter(mixer, name)
            if kernels_refuse(adapter):
                width = refused_width(adapter)
                assert width is not None
                return name, width
    return None


@contextmanager
def convolution_in_torch(mixer: nn.Module) -> Iterator[None]:
    """Let transformers' forward of a mixer convolve whole sequences by its reference in torch."""
    module: Any = sys.modules[type(mixer).__module__]
    with ExitStack() as stack:
        for name, cells in _wrappers(module.__name__).items():
            if _convolves(cells["func_name"]):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, cells["torch_function"])
        yield


def _convolves(name: str) -> bool:
    """Whether a kernel function convolves sequences; one token at a time any width will do."""
    return "conv1d" in name and not name.endswith("_update")


@cache
def _bound_in(module: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for cells in _wrappers(module).values():
        package = cells["implementation"].__module__.partition(".")[0]
        found[cells["func_name"]] = package if cells["is_new_implementation"] else "torch"
    return found


@cache
def _wrappers(module: str) -> dict[str, dict[str, Any]]:
    """By its name in a module, what transformers' wrapper of each kernel function holds."""
    found: dict[str, dict[str, Any]] = {}
    for name, function in vars(sys.modules[module]).items():
        if not inspect.isfunction(function) or not function.__closure__:
            continue
        # transformers keeps what it chose only in the closure of its wrapper
        cells = dict(inspect.getclosurevars(function).nonlocals)
        if set(cells) >= _KEPT:
            found[name] = cells
    return found
