"""Which adapter reads which mixer, and the mixers of a model."""

from collections.abc import Iterator
from typing import TypeVar

from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import OffloadCache
from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import MixerAdapter
from sparsessm_plugin.registry import Registry

_ADAPTERS: Registry[type[MixerAdapter]] = Registry("mixer", "sparsessm_plugin.families")
# what is known and has no adapter, and why
_REFUSED = {
    "KimiLinearForgetGate": (
        "gates each key dimension of Kimi Linear, whose config gives keys and values one "
        "linear_head_dim: no stock loader takes one without the other"
    )
}
_Adapter = TypeVar("_Adapter", bound=type[MixerAdapter])


def register_adapter(adapter: _Adapter) -> _Adapter:
    """Class decorator: use this adapter for modules of class ``adapter.mixer_class``."""
    _ADAPTERS.register(adapter.mixer_class, adapter)
    return adapter


def known_mixers() -> tuple[str, ...]:
    """Class names of the mixers that have an adapter."""
    return tuple(_ADAPTERS)


def is_mixer(module: nn.Module) -> bool:
    """Whether the module holds a state transition, known to this package or not."""
    return isinstance(getattr(module, "A_log", None), Tensor)


def get_adapter(mixer: nn.Module, name: str = "mixer") -> MixerAdapter:
    """Wrap a mixer module in the adapter of its family.

    :param mixer: as a model holds it
    :param name: what messages call it
    :raises SparseSSMError: no adapter for the module's class; lists the known ones
    """
    for cls in type(mixer).__mro__:
        if cls.__name__ in _ADAPTERS:
            return _ADAPTERS[cls.__name__](mixer, name)
        if cls.__name__ in _REFUSED:
            raise SparseSSMError(f"{name} {_REFUSED[cls.__name__]}; it is not supported")
    raise SparseSSMError(
        f"module {name!r} is a {type(mixer).__name__}, which is not a known state-space mixer; "
        f"known: {', '.join(known_mixers())}"
    )


def iter_mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every state-space mixer, known or unknown, in model order."""
    for name, module in model.named_modules():
        if is_mixer(module):
            yield name, module


def adapters_in(model: nn.Module) -> list[MixerAdapter]:
    """Adapters of the state-space mixers of a model or a layer, in its order; there may be none.

    :raises SparseSSMError: one is of an unknown class
    """
    return [get_adapter(module, name) for name, module in iter_mixers(model)]


def find_mixers(model: nn.Module) -> list[MixerAdapter]:
    """Adapters of all state-space mixers of a model, in model order.

    :raises SparseSSMError: the model has no mixer, or one of an unknown class
    """
    adapters = adapters_in(model)
    if not adapters:
        raise SparseSSMError(
            f"{type(model).__name__} has no state-space mixer; known: {', '.join(known_mixers())}"
        )
    return adapters


def check_not_quantized(model: nn.Module) -> None:
    """Refuse a checkpoint that is stored quantized: what its integers stand for is not pruned.

    :param model: as loaded; of one on the meta device the config is asked
    :raises SparseSSMError: naming the first such weight
    """
    advice = "is stored quantized; prune a model first, then quantize it"
    said = getattr(getattr(model, "config", None), "quantization_config", None)
    meta = not any(isinstance(module._parameters, OffloadCache) for module in model.modules())
    for name, mixer in iter_mixers(model):
        with disable_onloading():
            named = list(mixer.named_parameters())
        for own, parameter in named:
            if meta and parameter.is_meta and said is not None:
                raise SparseSSMError(f"the model {advice}")
            matrix = own.rpartition(".")[2] in ("weight", "weight_packed")
            if matrix and (not parameter.is_floating_point() or parameter.dtype.itemsize < 2):
                raise SparseSSMError(f"{name}.{own} {advice}")
