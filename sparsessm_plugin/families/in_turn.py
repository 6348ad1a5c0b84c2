"""Weights one after the other: a model may keep them on disk, and each read makes a copy.

``named_parameters`` and ``state_dict`` hold all that they have given until they end, and know a
tensor that stands in two places by its identity, which copies do not share.
"""

from collections.abc import Iterator

from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import OffloadCache
from torch import Tensor, nn


def parameter_names(model: nn.Module) -> list[str]:
    """Of every parameter once, in model order; none is read."""
    with disable_onloading():
        return [name for name, _ in model.named_parameters()]


def parameters_in_turn(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, with its name, read when its turn comes.

    :param model: or a part of one, with its weights wherever they are
    """
    for name in parameter_names(model):
        yield name, model.get_parameter(name)


def tensors_in_turn(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Likewise every parameter and buffer that ``state_dict`` names."""
    with disable_onloading():
        names = list(model.state_dict(keep_vars=True))
    for name in names:
        path, _, leaf = name.rpartition(".")
        yield name, getattr(model.get_submodule(path), leaf)


def on_disk(model: nn.Module) -> bool:
    """Whether any weight of a model is read from disk when it is needed."""
    caches = (module._parameters for module in model.modules())
    return any(isinstance(c, OffloadCache) and str(c.offload_device) == "disk" for c in caches)
