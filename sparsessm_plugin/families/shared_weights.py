"""Weights that several layers multiply by, such as those of Zamba's attention blocks."""

from collections import Counter

from compressed_tensors.offload import disable_onloading
from torch import nn


def weight_holders(model: nn.Module) -> dict[str, list[str]]:
    """By name of a layer, the names of all that hold the same weight, in model order.

    Of layers that share a weight with no other there is no entry.
    """
    holders: dict[int, list[str]] = {}
    with disable_onloading():  # the parameters themselves, wherever they are
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                holders.setdefault(id(weight), []).append(name)
    return {name: names for names in holders.values() if len(names) > 1 for name in names}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every parameter's name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    with disable_onloading():
        named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    return {name: first[id(parameter)] for name, parameter in named}


def of_several_names(model: nn.Module) -> set[int]:
    """Identities of modules that stand in several places of the model."""
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}
