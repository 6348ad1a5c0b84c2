"""The parts that the layers of a model are made of, recognised by their tensors.

A part is a module between two points of the residual stream: a norm, a state-space mixer,
attention, an MLP, a mixture of experts. It says which of its tensor dimensions read the stream,
which write to it, and which units of its own may go: the intermediate units of an MLP, the kv
groups of attention.

Tensor names are dotted names in the model. M is hidden_size, F an intermediate size, E the
number of experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import TensorAxis, get_tensor
from sparsessm_plugin.families.registry import get_adapter, is_mixer


@dataclass(frozen=True)
class UnitBlock:
    """The units of one module that stand side by side and may go one by one.

    Index i of the block is an intermediate unit of an MLP, or of every expert that shares a
    tensor, or a key and value head with the queries that read it.

    :param kind: ``mlp``, ``experts``, ``shared_experts`` or ``kv_groups``
    :param name: dotted name of the module
    :param length: how many units the tensors have
    :param rows: tensor ranges that make the units
    :param columns: tensor ranges that read them
    :param resize: writes a new length into the module's attributes
    """

    kind: str
    name: str
    length: int
    rows: tuple[TensorAxis, ...]
    columns: tuple[TensorAxis, ...]
    resize: Callable[[int], None]

    @property
    def axes(self) -> tuple[TensorAxis, ...]:
        """Every tensor range that shrinks when units go."""
        return self.rows + self.columns


class Part(ABC):
    """One module of a layer.

    :param name: dotted name in the model
    :param module: the module
    """

    kind: ClassVar[str]
    # attributes in which transformers' modules keep the width of what they read
    width_attributes: ClassVar[tuple[str, ...]] = ("hidden_size",)
    # whether the module returns attention weights beside its output
    returns_pair: ClassVar[bool] = False

    def __init__(self, name: str, module: Any):
        self.name = name
        # Any: nn.Module types every attribute as Tensor | Module
        self.module: Any = module

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @staticmethod
    @abstractmethod
    def matches(module: Any) -> bool:
        """Whether a module is such a part."""

    def reads(self) -> list[TensorAxis]:
        """Tensor dimensions that the width of the part's input runs along."""
        return []

    def writes(self) -> list[TensorAxis]:
        """Tensor dimensions that hidden_size runs along at the part's output."""
        return []

    def blocks(self) -> list[UnitBlock]:
        """The units of the part that may go."""
        return []

    def set_width(self, width: int) -> None:
        """Write the new width of the input into the module's attributes; tensors stay."""
        set_existing(self.module, self.width_attributes, width)

    def size(self, axis: TensorAxis) -> int:
        """The size of the tensor dimension that a range stands in."""
        tensor = get_tensor(self.module, axis.tensor.removeprefix(f"{self.name}."))
        assert tensor is not None
        return tensor.shape[axis.dim]

    @property
    def width(self) -> int | None:
        """Entries of the part's input, None where it reads nothing."""
        reads = self.reads()
        return self.size(reads[0]) if reads else None

    def ranges(self, dim: int, *tensors: str, **shape: int) -> list[TensorAxis]:
        """A range along one dimension of each of the named tensors that the module has."""
        return [
            TensorAxis(f"{self.name}.{tensor}", dim, **shape)
            for tensor in tensors
            if get_tensor(self.module, tensor) is not None
        ]


class Embedding(Part):
    """The token embedding (vocabulary, M), which begins the stream."""

    kind = "embedding"
    width_attributes = ()

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.Embedding)

    def writes(self) -> list[TensorAxis]:
        return self.ranges(1, "weight")


class Head(Part):
    """lm_head (vocabulary, M), which reads what the final norm makes of the stream."""

    kind = "head"
    width_attributes = ()

    @staticmethod
    def matches(module: Any) -> bool:
        return False  # found through the model, not through its class

    def reads(self) -> list[TensorAxis]:
        return self.ranges(1, "weight")


class Norm(Part):
    """An RMSNorm: what goes in comes out, entry by entry.

    ``offset`` is what its forward pass adds to the weight: 1 where transformers keeps the
    weight zero-centred, so that scaling by s takes ``(offset + weight) * s - offset``.
    """

    kind = "norm"
    width_attributes = ()

    @staticmethod
    def matches(module: Any) -> bool:
        # the second while LLM Compressor has it in the place of a zero-centred one
        names = ("RMSNorm", "OffsetNorm")
        return type(module).__name__.endswith(names) and module.weight.ndim == 1

    @property
    def offset(self) -> float:
        """What the module adds to its weight."""
        return norm_offset(self.module)

    def reads(self) -> list[TensorAxis]:
        return self.ranges(0, "weight")


class Mixer(Part):
    """A state-space mixer; its insides are a matter of its own adapter."""

    kind = "mixer"

    @staticmethod
    def matches(module: Any) -> bool:
        return is_mixer(module)

    def reads(self) -> list[TensorAxis]:
        adapter = get_adapter(self.module, self.name)
        return self.ranges(1, *(f"{kind}.weight" for kind in adapter.entry_kinds))

    def writes(self) -> list[TensorAxis]:
        kind = get_adapter(self.module, self.name).exit_kind
        return self.ranges(0, f"{kind}.weight", f"{kind}.bias")


class Linear(Part):
    """A linear layer between two places of width M, as after Zamba's shared block."""

    kind = "linear"
    width_attributes = ()

    @staticmethod
    def matches(module: Any) -> bool:
        return isinstance(module, nn.Linear)

    def reads(self) -> list[TensorAxis]:
        return self.ranges(1, "weight")

    def writes(self) -> list[TensorAxis]:
        return self.ranges(0, "weight", "bias")


class Attention(Part):
    """Attention whose query heads share key and value heads in groups of equal size."""

    kind = "attention"
    width_attributes = ("attention_hidden_size",)
    returns_pair = True
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    @staticmethod
    def matches(module: Any) -> bool:
        return all(hasattr(module, name) for name in (*Attention.projections, "o_proj"))

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters, as wide as the input, add to q, k and v (Zamba2)."""
        return hasattr(self.module, "linear_q_adapter_list")

    @property
    def head_dim(self) -> int:
        """Entries of a head."""
        return self.module.head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, as the tensors have them."""
        return self.module.k_proj.weight.shape[0] // self.head_dim

    @property
    def num_heads(self) -> int:
        """Query heads, as the tensors have them."""
        return self.module.o_proj.weight.shape[1] // self.head_dim

    def reads(self) -> list[TensorAxis]:
        result = self.ranges(1, *(f"{name}.weight" for name in self.projections))
        for letter in "qkv" if self.has_adapters else "":
            result += adapter_ranges(self, f"linear_{letter}_adapter_list", 0, 1)
        return result

    def writes(self) -> list[TensorAxis]:
        return self.ranges(0, "o_proj.weight", "o_proj.bias")

    def blocks(self) -> list[UnitBlock]:
        groups, head_dim = self.num_key_value_heads, self.head_dim
        queries = self.num_heads // groups * head_dim  # entries a group
        # q_proj may make a gate beside each query head
        made = self.module.q_proj.weight.shape[0] // groups
        rows = []
        for name, block in zip(self.projections, (made, head_dim, head_dim), strict=True):
            rows += self.ranges(0, f"{name}.weight", f"{name}.bias", block=block)
            if self.has_adapters:
                adapters = f"linear_{name[0]}_adapter_list"
                rows += adapter_ranges(self, adapters, 1, 0, block=block)
        for name, block in (("q_norm", queries), ("k_norm", head_dim)):
            norm = get_tensor(self.module, f"{name}.weight")
            if norm is not None and len(norm) == block * groups:  # else one for every head
                rows += self.ranges(0, f"{name}.weight", block=block)
        columns = self.ranges(1, "o_proj.weight", block=queries)
        # the number of heads stands nowhere in the module: it reshapes by head_dim
        return [
            UnitBlock(
                "kv_groups",
                self.name,
                self.num_key_value_heads,
                tuple(rows),
                tuple(columns),
                lambda length: None,
            )
        ]


class MLP(Part):
    """A dense MLP, gated or not, its gate and up rows in one tensor or in two."""

    kind = "mlp"
    fused: ClassVar[tuple[str, ...]] = ("gate_up_proj", "input_linear")
    outputs: ClassVar[tuple[str, ...]] = ("down_proj", "output_linear")

    def __init__(self, name: str, module: Any, unit_kind: str = "mlp"):
        super().__init__(name, module)
        self.unit_kind = unit_kind

    @staticmethod
    def matches(module: Any) -> bool:
        return any(isinstance(getattr(module, name, None), nn.Linear) for name in MLP.outputs)

    def reads(self) -> list[TensorAxis]:
        names = ("gate_proj", "up_proj", *self.fused)
        result = self.ranges(1, *(f"{name}.weight" for name in names))
        return result + adapter_ranges(self, "gate_up_proj_adapter_list", 0, 1)

    def writes(self) -> list[TensorAxis]:
        return self.ranges(0, *(f"{name}.{t}" for name in self.outputs for t in ("weight", "bias")))

    def blocks(self) -> list[UnitBlock]:
        columns = self.ranges(1, *(f"{name}.weight" for name in self.outputs))
        length = self.size(columns[0])
        names = [f"{name}.{t}" for name in ("gate_proj", "up_proj") for t in ("weight", "bias")]
        rows = self.ranges(0, *names)
        fused = {"repeat": 2, "stride": length}  # the rows of the gate, then those of up
        rows += self.ranges(
            0, *(f"{name}.{t}" for name in self.fused for t in ("weight", "bias")), **fused
        )
        rows += adapter_ranges(self, "gate_up_proj_adapter_list", 1, 0, **fused)
        return [
            UnitBlock(self.unit_kind, self.name, length, tuple(rows), tuple(columns), self._resize)
        ]

    @property
    def _names_width_input_size(self) -> bool:
        # Granite's MLP calls M input_size, and F hidden_size
        return hasattr(self.module, "input_size")

    def set_width(self, width: int) -> None:
        name = "input_size" if self._names_width_input_size else "hidden_size"
        set_existing(self.module, (name,), width)

    def _resize(self, length: int) -> None:
        name = "hidden_size" if self._names_width_input_size else "intermediate_size"
        set_existing(self.module, (name,), length)


class Experts(Part):
    """A mixture of experts with its router, and the expert that sees every token if there is one.

    The experts' weights are (E, rows, columns) tensors, or modules of their own while LLM
    Compressor has taken them apart.
    """

    kind = "moe"
    width_attributes = ("hidden_dim", "input_size")

    @staticmethod
    def matches(module: Any) -> bool:
        return hasattr(module, "experts") and Experts._router(module) is not None

    @staticmethod
    def _router(module: Any) -> str | None:
        return next((name for name in ("router", "gate") if hasattr(module, name)), None)

    @property
    def _is_latent(self) -> bool:
        # Nemotron-H may let its experts work on a projection of the stream
        return isinstance(getattr(self.module, "fc1_latent_proj", None), nn.Linear)

    def _apart(self) -> list[MLP]:
        """The experts that are modules of their own."""
        return [
            MLP(f"{self.name}.experts.{name}", module, "experts")
            for name, module in self.module.experts.named_children()
            if MLP.matches(module)
        ]

    def _shared(self) -> list[MLP]:
        """The expert that sees every token, if there is one."""
        return [
            MLP(f"{self.name}.{name}", getattr(self.module, name), "shared_experts")
            for name in ("shared_experts", "shared_expert")
            if hasattr(self.module, name)
        ]

    def _on_stream(self) -> list[MLP]:
        """The MLPs of the part that read and write the stream themselves."""
        return self._shared() if self._is_latent else self._apart() + self._shared()

    def reads(self) -> list[TensorAxis]:
        # the shared expert may have a gate of its own
        result = self.ranges(1, f"{self._router(self.module)}.weight", "shared_expert_gate.weight")
        if self._is_latent:
            result += self.ranges(1, "fc1_latent_proj.weight")
        else:
            result += self.ranges(2, "experts.gate_up_proj", "experts.up_proj")
        return result + [axis for mlp in self._on_stream() for axis in mlp.reads()]

    def writes(self) -> list[TensorAxis]:
        if self._is_latent:
            result = self.ranges(0, "fc2_latent_proj.weight", "fc2_latent_proj.bias")
        else:
            result = self.ranges(1, "experts.down_proj")
        return result + [axis for mlp in self._on_stream() for axis in mlp.writes()]

    def blocks(self) -> list[UnitBlock]:
        result = [block for mlp in self._shared() for block in mlp.blocks()]
        columns = self.ranges(2, "experts.down_proj")
        if columns:
            length = self.size(columns[0])
            rows = self.ranges(1, "experts.gate_up_proj", repeat=2, stride=length)
            rows += self.ranges(1, "experts.up_proj")
            name = f"{self.name}.experts"
            result.append(
                UnitBlock("experts", name, length, tuple(rows), tuple(columns), self._resize)
            )
        for mlp in self._apart():
            for block in mlp.blocks():
                result.append(replace(block, resize=partial(self._resize_apart, block)))
        return result

    def set_width(self, width: int) -> None:
        super().set_width(width)
        for name in ("experts", self._router(self.module)):
            set_existing(getattr(self.module, str(name)), ("hidden_dim",), width)
        for mlp in self._on_stream():
            mlp.set_width(width)

    def _resize(self, length: int) -> None:
        set_existing(self.module, ("ffn_dim",), length)
        set_existing(self.module.experts, ("intermediate_dim", "intermediate_size"), length)

    def _resize_apart(self, block: UnitBlock, length: int) -> None:
        block.resize(length)
        self._resize(length)


# norms that multiply by 1 + weight
_ZERO_CENTRED = ("Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")
# in the order in which they are tried
_PARTS: list[type[Part]] = [Mixer, Attention, Experts, MLP, Norm, Linear]
_Part = TypeVar("_Part", bound=type[Part])


def register_part(part: _Part) -> _Part:
    """Class decorator: look for such parts in layers, before those that are known already."""
    _PARTS.insert(0, part)
    return part


def find_parts(module: nn.Module, name: str) -> Iterator[Part]:
    """The parts of a layer, in the order of its modules.

    :param module: the layer, or a module of it
    :param name: its dotted name in the model
    :raises SparseSSMError: a module with parameters that is no part that is known
    """
    for part in _PARTS:
        if part.matches(module):
            yield part(name, module)
            return
    own = next((leaf for leaf, _ in module.named_parameters(recurse=False)), None)
    if own is not None:
        raise SparseSSMError(
            f"{name}.{own}: the layers of a model are made of mixers, attention, MLPs, experts, "
            f"norms and linear layers; a {type(module).__name__} is none of them"
        )
    for child, submodule in module.named_children():
        yield from find_parts(submodule, f"{name}.{child}")


def adapter_ranges(part: Part, adapters: str, position: int, dim: int, **shape: int) -> Any:
    """A range along one dimension of the first or the second layer of each low-rank adapter.

    :param adapters: name of the list, with an identity where another block has the adapter
    :param position: 0 for the layer that reads the input, 1 for the one that adds to the output
    """
    count = len(getattr(part.module, adapters, ()))
    return part.ranges(
        dim, *(f"{adapters}.{index}.{position}.weight" for index in range(count)), **shape
    )


def norm_offset(module: Any) -> float:
    """What a norm of transformers adds to its weight: 1 in families with zero-centred weights."""
    return 1.0 if type(module).__name__ in _ZERO_CENTRED else 0.0


def set_existing(module: Any, names: Iterable[str], value: int) -> None:
    """Set those of the named attributes that a module has."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)
