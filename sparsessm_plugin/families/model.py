"""What a language model with state-space mixers is to the rest of the package.

A model is a residual stream of hidden_size entries that an embedding begins, that every layer
reads and adds to, and that a final norm and lm_head read at the end. A :class:`ModelAdapter`
says what its layers are, which tensor ranges run along each axis of the model, and how a new
size is written into the modules and into the config:

- ``hidden``: entries of the residual stream; one index set for the whole model
- ``layers``: whole residual blocks
- ``mlp``, ``experts``, ``shared_experts``: intermediate units, as many in every block
- ``kv_groups``: key and value heads with their query heads, as many in every attention
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import MixerAdapter, MixerSizes, TensorAxis
from sparsessm_plugin.families.parts import (
    Attention,
    Embedding,
    Experts,
    Head,
    Mixer,
    Norm,
    Part,
    UnitBlock,
    find_parts,
    set_existing,
)
from sparsessm_plugin.families.registry import get_adapter
from sparsessm_plugin.families.shared_weights import first_names
from sparsessm_plugin.registry import Registry


@dataclass(frozen=True)
class Layer:
    """One residual block of a model.

    :param index: its place in the model
    :param name: dotted name
    :param kind: ``mixer``, ``attention``, ``mlp`` or ``moe`` where that is all; ``pair`` where
        an MLP or experts follow a mixer or attention; ``parallel`` where mixer and attention
        read the same norm, and ``hybrid`` where shared attention feeds the mixer
    :param parts: its modules in their order
    """

    index: int
    name: str
    kind: str
    parts: tuple[Part, ...]

    def has(self, kind: str) -> bool:
        """Whether a part of this kind is in the layer."""
        return any(part.kind == kind for part in self.parts)


class ModelAdapter:
    """Reads one model of one family.

    :param model: a ``transformers`` model with lm_head
    """

    family: ClassVar[str]
    model_class: ClassVar[str]
    # config field of the size, for every kind of units
    unit_fields: ClassVar[dict[str, str]] = {}
    # kinds of units that are counted by another kind's field
    same_units: ClassVar[dict[str, str]] = {}
    head_dim_field: ClassVar[str] = "head_dim"
    # config field that ties the channels of the mixers to hidden_size, as a whole multiple
    expand_field: ClassVar[str | None] = None
    # what a layer is called that has a mixer and attention
    joint_kind: ClassVar[str] = "parallel"
    # whether the family's forward pass asks the cache of an attention layer for the position
    needs_attention: ClassVar[bool] = True
    # whether all that reads the stream reads a norm of it, and nothing is normalised after that
    pre_norm: ClassVar[bool] = True

    def __init__(self, model: nn.Module):
        # Any: nn.Module types every attribute as Tensor | Module
        self.model: Any = model
        self.base: Any = self.model.base_model
        if not hasattr(self.base, "layers"):  # the language model beside an image encoder
            self.base = getattr(self.base, "language_model", self.base)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.axis_length('layers')} layers of {self.hidden_size}, "
            f"axes {', '.join(self.axis_names)})"
        )

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        """The config of the language model."""
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """M, as the embedding has it."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The residual blocks, in model order.

        :raises SparseSSMError: a module of unknown make in one of them
        """
        prefix = self._names[id(self.base.layers)]
        result = []
        for index, module in enumerate(self.base.layers):
            name = f"{prefix}.{index}"
            parts = tuple(find_parts(module, name))
            result.append(Layer(index, name, self._kind(parts), parts))
        return tuple(result)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part of the model: embedding, those of the layers, final norm, lm_head."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        norms = [child for child in self.base.children() if Norm.matches(child)]
        return (
            Embedding(self._names[id(embedding)], embedding),
            *(part for layer in self.layers for part in layer.parts),
            *(Norm(self._names[id(norm)], norm) for norm in norms),
            *([] if head is None else [Head(self._names[id(head)], head)]),
        )

    @property
    def mixers(self) -> tuple[MixerAdapter, ...]:
        """Adapters of the mixers, in model order."""
        parts = (part for layer in self.layers for part in layer.parts)
        return tuple(get_adapter(p.module, p.name) for p in parts if isinstance(p, Mixer))

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The axes that this model has."""
        units = dict.fromkeys(block.kind for block in self._blocks())
        return ("hidden", "layers", *units)

    def blocks(self, axis: str) -> tuple[UnitBlock, ...]:
        """The modules whose units make up an axis; those that share their tensors once.

        :raises SparseSSMError: no such axis, or one without units
        """
        self.check_axis(axis)
        if axis in ("hidden", "layers"):
            raise SparseSSMError(f"{self.name}: {axis} has no units that a module could choose")
        return tuple(block for block in self._blocks() if block.kind == axis)

    def layers_with(self, axis: str) -> tuple[int, ...]:
        """Indices of the layers with modules whose units make up an axis, shared ones too."""
        return tuple(
            layer.index
            for layer in self.layers
            if any(self._axis_of(b) == axis for part in layer.parts for b in part.blocks())
        )

    def axis_length(self, axis: str) -> int:
        """How many indices an axis has.

        :raises SparseSSMError: no such axis, or modules with unequal numbers of units
        """
        self.check_axis(axis)
        if axis == "hidden":
            return self.hidden_size
        if axis == "layers":
            return len(self.base.layers)
        lengths = {block.length: block.name for block in self.blocks(axis)}
        if len(lengths) > 1:
            (a, first), (b, second) = list(lengths.items())[:2]
            raise SparseSSMError(f"{first} has {a} {axis}, {second} has {b}; a config says one")
        return next(iter(lengths))

    def axes(self, axis: str) -> list[TensorAxis]:
        """Every tensor range that shrinks when the axis does; none for whole layers.

        A tensor that stands under several names, as a tied lm_head, counts by its first.

        :raises SparseSSMError: the model has no such axis
        """
        self.check_axis(axis)
        if axis == "layers":
            return []
        if axis != "hidden":
            return [r for block in self.blocks(axis) for r in block.axes]
        ranges = []
        for part in self.parts:
            for entry in part.reads():
                # where the stream is concatenated with the embedding, it comes twice
                repeat = part.size(entry) // self.hidden_size
                stride = self.hidden_size if repeat > 1 else 0
                ranges.append(replace(entry, repeat=repeat, stride=stride))
            ranges += part.writes()
        names = self.first_names()
        return list(dict.fromkeys(replace(r, tensor=names[r.tensor]) for r in ranges))

    @property
    def stream_norms(self) -> tuple[str, ...]:
        """Names of the norm weights that run over the hidden axis."""
        names = self.first_names()
        found = (f"{part.name}.weight" for part in self.parts if isinstance(part, Norm))
        return tuple(dict.fromkeys(names[name] for name in found))

    @property
    def norm_offset(self) -> float:
        """What the norms of ``stream_norms`` add to their weights.

        A norm scales entry i by ``norm_offset + weight[i]``. Who changes that by a factor s sets
        the weight to ``(norm_offset + weight) * s - norm_offset``.
        """
        return next((part.offset for part in self.parts if isinstance(part, Norm)), 0.0)

    def first_names(self) -> dict[str, str]:
        """Every parameter's name -> the first name of the same parameter."""
        return first_names(self.model)

    # how sizes are written

    def hidden_fields(self, size: int, along: MixerSizes | None = None) -> dict[str, Any]:
        """The config fields from which the loader makes this hidden_size; changes nothing.

        :param size: the new hidden_size
        :param along: of every mixer, if its channels shrink along; see :meth:`ways_along`
        :raises SparseSSMError: the loader cannot make it
        """
        self._check_experts("hidden", size)
        fields: dict[str, Any] = {"hidden_size": size}
        for attention in self._attentions()[:1]:
            # otherwise the loader divides the new hidden_size by the heads
            fields[self.head_dim_field] = attention.head_dim
        for mixer in self.mixers[:1]:
            fields |= self.mixer_fields(mixer, size, along or mixer.sizes)
        return fields

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        """The config fields from which the loader makes mixers of these channels.

        :param mixer: one of them as it is
        :param hidden_size: of the model
        :param sizes: channels and heads that the mixers are to have
        :raises SparseSSMError: the loader cannot make them
        """
        fields: dict[str, Any] = {}
        channels = sizes.intermediate_size
        if self.expand_field is not None:
            expand, rest = divmod(channels, hidden_size)
            if rest or not expand:
                wanted = channels // hidden_size * hidden_size or hidden_size
                raise SparseSSMError(
                    f"{self.name}: the loader of {self.family} makes {self.expand_field} * "
                    f"hidden_size channels with a whole {self.expand_field}; {channels} channels "
                    f"are no multiple of hidden_size={hidden_size}, {wanted} would be: let heads "
                    "or channels go along"
                )
            fields[self.expand_field] = expand
        if "heads" in mixer.axis_names:
            fields[str(getattr(mixer, "num_heads_field"))] = sizes.num_heads  # noqa: B009
            fields[str(getattr(mixer, "head_dim_field"))] = sizes.head_dim  # noqa: B009
        return fields

    def ways_along(self, hidden_size: int) -> dict[str, int]:
        """How the channels of every mixer can shrink in the ratio of the hidden_size.

        :return: axis of the mixers (``head_dim``, ``heads``; ``channels`` in the Mamba-1 layout)
            -> indices of it that stay; empty where the loader does not tie the two
        :raises SparseSSMError: neither whole heads nor equal ones make so many channels
        """
        if self.expand_field is None or not self.mixers:
            return {}
        mixer = self.mixers[0]
        sizes, D = mixer.sizes, mixer.sizes.intermediate_size
        expand = D // sizes.hidden_size
        found: dict[str, int] = {}
        least: dict[str, int] = {}
        for axis in ("head_dim", "heads", "channels"):
            if axis in mixer.axis_names:
                one = D // mixer.axis_length(axis) * mixer.groups_of(axis)
                least[axis] = one // gcd(one, expand)
                if hidden_size % least[axis] == 0:
                    found[axis] = expand * hidden_size * mixer.axis_length(axis) // D
        if not found:
            heads = sizes.num_heads if "heads" in mixer.axis_names else sizes.n_groups
            what = f"are not {heads} equal heads"
            if "heads" in mixer.axis_names:
                what = (
                    f"are neither {heads} equal heads nor whole heads of {sizes.head_dim} in "
                    f"{sizes.n_groups} groups"
                )
            raise SparseSSMError(
                f"{self.name}: hidden_size={hidden_size} goes with {expand * hidden_size} "
                f"channels, which {what}; take a multiple of "
                f"{' or '.join(map(str, sorted(set(least.values()))))}"
            )
        return found

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        """The config fields from which the loader makes the kept layers; changes nothing.

        :param kept: indices of the layers that stay, ascending
        :raises SparseSSMError: nothing is kept, or the config cannot say what is
        """
        if not kept:
            raise SparseSSMError(f"{self.name}: no layer would remain")
        layers = self.layers
        attends = [layer.has("attention") for layer in layers]
        if self.needs_attention and any(attends) and not any(attends[i] for i in kept):
            raise SparseSSMError(
                f"{self.name}: no layer with attention would remain, and {self.family} of "
                "transformers cannot generate without one: keep at least one of "
                f"{', '.join(str(i) for i, has in enumerate(attends) if has)}"
            )
        return {"num_hidden_layers": len(kept)}

    def unit_field_values(self, axis: str, size: int) -> dict[str, Any]:
        """The config fields from which the loader makes this many units; changes nothing.

        :param axis: an axis of units
        :param size: intermediate units, or key and value heads
        :raises SparseSSMError: nothing would remain, or the loader cannot make it
        """
        self.check_axis(axis)
        if size < 1:
            raise SparseSSMError(f"{self.name}: no {axis} would remain")
        if axis != "kv_groups":
            self._check_experts(axis, size)
            return {self.unit_fields[axis]: size}
        attention = self._attentions()[0]
        queries = attention.num_heads // attention.num_key_value_heads
        return {
            "num_attention_heads": size * queries,
            "num_key_value_heads": size,
            self.head_dim_field: attention.head_dim,
        }

    def set_hidden(self, size: int) -> None:
        """Write a new hidden_size, which the tensors have already, into all modules."""
        for part in self.parts:
            width = part.width  # twice the size where the stream comes twice
            if width is not None:
                part.set_width(width)
        for layer in self.base.layers:
            set_existing(layer, ("hidden_size",), size)

    def set_units(self, axis: str, size: int) -> None:
        """Write a new number of units into the attributes of all modules; tensors stay."""
        for part in self.parts:  # those that share their tensors too
            for block in part.blocks():
                if self._axis_of(block) == axis:
                    block.resize(size)

    def set_layers(self, kept: Sequence[int]) -> None:
        """Take the other layers out of the model and count those that remain from 0."""
        for index in reversed(range(len(self.base.layers))):
            if index not in kept:
                del self.base.layers[index]
        for index, (old, layer) in enumerate(zip(kept, self.base.layers, strict=True)):
            for module in layer.modules():
                # a cache is asked by this index; modules that are shared have none
                if getattr(module, "layer_idx", None) == old:
                    module.layer_idx = index

    def run_layer(self, layer: Any, index: int, stream: Tensor, embedded: Tensor) -> Tensor:
        """The stream after a layer; for tracing.

        :param layer: the layer, or a stand-in with its forward pass
        :param index: its place in the model
        :param stream: (b, L, M) before the layer
        :param embedded: (b, L, M) the embedding's output
        """
        output = layer(stream)
        return output[0] if isinstance(output, tuple) else output

    def check_axis(self, axis: str) -> None:
        """Refuse an axis that the model does not have.

        :raises SparseSSMError: naming those that it has
        """
        if axis not in self.axis_names:
            raise SparseSSMError(
                f"{self.name} has no axis {axis!r}; allowed: {', '.join(self.axis_names)}"
            )

    @property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    def _attentions(self) -> list[Attention]:
        parts = (part for layer in self.layers for part in layer.parts)
        return [part for part in parts if isinstance(part, Attention)]

    def _check_experts(self, axis: str, size: int) -> None:
        """Refuse experts whose rows torch's grouped product cannot take.

        :raises SparseSSMError: naming the multiple that it takes
        """
        for part in self.parts:
            of_axis = axis == "hidden" or any(self._axis_of(b) == axis for b in part.blocks())
            if not isinstance(part, Experts) or not of_axis or not part.blocks():
                continue
            weight = next(part.module.experts.parameters())
            multiple = 16 // weight.element_size()
            if size % multiple:
                raise SparseSSMError(
                    f"{self.name}: {size} {axis} are no multiple of {multiple}: transformers "
                    f"multiplies experts of {weight.dtype} in rows of 16 bytes"
                )

    def _kind(self, parts: Iterable[Part]) -> str:
        kinds = {part.kind for part in parts} & {"mixer", "attention", "mlp", "moe"}
        if {"mixer", "attention"} <= kinds:
            return self.joint_kind
        return "pair" if len(kinds) > 1 else next(iter(kinds), "empty")

    def _axis_of(self, block: UnitBlock) -> str:
        return self.same_units.get(block.kind, block.kind)

    def _blocks(self) -> list[UnitBlock]:
        names, seen, result = self.first_names(), set(), []
        for part in self.parts:
            for block in part.blocks():
                first = names[block.columns[0].tensor]
                if first in seen:  # a shared module under another name
                    continue
                seen.add(first)
                result.append(replace(block, kind=self._axis_of(block)))
        return result


_MODELS: Registry[type[ModelAdapter]] = Registry("model", "sparsessm_plugin.families")
_Adapter = TypeVar("_Adapter", bound=type[ModelAdapter])


def register_model(adapter: _Adapter) -> _Adapter:
    """Class decorator: use this adapter for models of class ``adapter.model_class``."""
    _MODELS.register(adapter.model_class, adapter)
    return adapter


def known_models() -> tuple[str, ...]:
    """Class names of the models that have an adapter."""
    return tuple(_MODELS)


def get_model_adapter(model: nn.Module) -> ModelAdapter:
    """Wrap a model in the adapter of its family.

    :raises SparseSSMError: no adapter for the model's class; lists the known ones
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _MODELS:
            return _MODELS[cls.__name__](model)
    raise SparseSSMError(
        f"no layers are known of a {type(model).__name__}; known: {', '.join(known_models())}"
    )
