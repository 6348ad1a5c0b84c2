"""What a state-space mixer is to the rest of the package.

Nothing outside :mod:`sparsessm_plugin.mixers` knows an attribute name of transformers.

Shapes: b batch, L sequence length, D channels (``intermediate_size``), N state size,
R rank of dt (``time_step_rank``), K width of the convolution.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError


@dataclass(frozen=True)
class MixerSizes:
    """The sizes of a mixer, read from its tensors and not from its config."""

    hidden_size: int
    intermediate_size: int  # D
    state_size: int  # N
    time_step_rank: int  # R
    conv_kernel_size: int  # K


@dataclass
class MixerQuantities:
    """The quantities of the selective recurrence (Mamba, arXiv 2312.00752, Algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, elementwise over (D, N)
    y_t = sum_n C_{t,n} h_{t,:,n} + D u_t

    All tensors but ``inputs`` are float32. Padded positions have u = 0.

    :param u: (b, L, D) scan input, after conv1d and activation
    :param dt: (b, L, D) step size, after bias and softplus, > 0
    :param A: (D, N) continuous-time transition, < 0
    :param B: (b, L, N) input projection, after the family's norm if it has one
    :param C: (b, L, N) output projection, likewise
    :param D: (D,) skip connection
    :param z: (b, L, D) gate before its activation
    :param mask: (b, L) bool, False at padding; None where nothing is padded
    :param inputs: per projection, the tensor its weight multiplies, in the model's dtype:
        in_proj (b, L, hidden_size), conv1d (b, L, D), x_proj (b, L, D), dt_proj (b, L, R)
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    mask: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gate(self) -> Tensor:
        """(b, L, D) silu(z), the factor between the scan output y and out_proj."""
        return nn.functional.silu(self.z)


@dataclass(frozen=True)
class TensorAxis:
    """A range along one dimension of one tensor that an axis of the mixer runs along.

    :param tensor: dotted name inside the mixer, e.g. ``x_proj.weight``
    :param dim: dimension of the tensor
    :param start: first index of the range; it holds as many entries as the axis is long
    """

    tensor: str
    dim: int
    start: int = 0


class MixerAdapter(ABC):
    """Reads one mixer module of one family.

    :param mixer: the module, e.g. a ``transformers`` ``MambaMixer``
    :param name: its dotted name in the model, for messages and reports
    """

    family: ClassVar[str]
    mixer_class: ClassVar[str]
    projections: ClassVar[tuple[str, ...]]

    def __init__(self, mixer: nn.Module, name: str = "mixer"):
        # Any: nn.Module types every attribute as Tensor | Module
        self.mixer: Any = mixer
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.sizes})"

    @property
    @abstractmethod
    def sizes(self) -> MixerSizes:
        """Sizes of the mixer as its tensors have them."""

    @property
    def A_log(self) -> nn.Parameter:
        """(D, N) parameter with A = -exp(A_log)."""
        return self.mixer.A_log

    @property
    @abstractmethod
    def out_norm(self) -> Tensor:
        """(D,) float32 Euclidean norm of each column of out_proj."""

    @abstractmethod
    def quantities(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> MixerQuantities:
        """Compute the quantities of the recurrence from what entered the mixer.

        :param hidden_states: (b, L, hidden_size)
        :param attention_mask: (b, L), zero at padding, or None
        """

    @abstractmethod
    def output(self, quantities: MixerQuantities, y: Tensor) -> Tensor:
        """Turn the scan output into the mixer's output.

        :param y: (b, L, D) output of the recurrence, skip connection included
        :return: (b, L, hidden_size) in the dtype of the model
        """

    @abstractmethod
    def axes(self, axis: str) -> list[TensorAxis]:
        """Every tensor range that shrinks when the axis does.

        :param axis: ``state`` or ``channels``
        """

    @abstractmethod
    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        """Write a new size of an axis into the module's attributes; tensors stay.

        :return: the config fields that must change for the model to load again
        """


_ADAPTERS: dict[str, type[MixerAdapter]] = {}
_Adapter = TypeVar("_Adapter", bound=type[MixerAdapter])


def register_adapter(adapter: _Adapter) -> _Adapter:
    """Class decorator: use this adapter for modules of class ``adapter.mixer_class``."""
    _ADAPTERS[adapter.mixer_class] = adapter
    return adapter


def known_mixers() -> tuple[str, ...]:
    """Class names of the mixers that have an adapter."""
    return tuple(sorted(_ADAPTERS))


def is_mixer(module: nn.Module) -> bool:
    """Whether the module holds a state transition, known to this package or not."""
    return isinstance(getattr(module, "A_log", None), Tensor)


def get_adapter(mixer: nn.Module, name: str = "mixer") -> MixerAdapter:
    """Wrap a mixer module in the adapter of its family.

    :raises SparseSSMError: no adapter for the module's class; lists the known ones
    """
    for cls in type(mixer).__mro__:
        if cls.__name__ in _ADAPTERS:
            return _ADAPTERS[cls.__name__](mixer, name)
    raise SparseSSMError(
        f"module {name!r} is a {type(mixer).__name__}, which is not a known state-space mixer; "
        f"known: {', '.join(known_mixers())}"
    )


def iter_mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every state-space mixer, known or unknown, in model order."""
    for name, module in model.named_modules():
        if is_mixer(module):
            yield name, module


def find_mixers(model: nn.Module) -> list[MixerAdapter]:
    """Adapters of all state-space mixers of a model, in model order.

    :raises SparseSSMError: the model has no mixer, or one of an unknown class
    """
    adapters = [get_adapter(module, name) for name, module in iter_mixers(model)]
    if not adapters:
        raise SparseSSMError(
            f"{type(model).__name__} has no state-space mixer; known: {', '.join(known_mixers())}"
        )
    return adapters


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(b, L) bool mask of the real positions, or None where nothing is padded.

    :raises SparseSSMError: the mask is not (b, L)
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise SparseSSMError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a mixer needs "
            f"(batch, {length})"
        )
    mask = attention_mask.to(torch.bool)
    return None if bool(mask.all()) else mask
