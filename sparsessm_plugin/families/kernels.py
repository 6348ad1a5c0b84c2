"""Which kernels transformers has bound for the mixers of a model."""

import inspect
import sys
from functools import cache

from torch import nn

from sparsessm_plugin.families.registry import iter_mixers


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


@cache
def _bound_in(module: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for function in vars(sys.modules[module]).values():
        if not inspect.isfunction(function) or not function.__closure__:
            continue
        # transformers keeps what it chose only in the closure of its wrapper
        cells = inspect.getclosurevars(function).nonlocals
        if {"func_name", "implementation", "is_new_implementation"} <= set(cells):
            package = cells["implementation"].__module__.partition(".")[0]
            found[cells["func_name"]] = package if cells["is_new_implementation"] else "torch"
    return found
