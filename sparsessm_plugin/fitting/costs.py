"""What a model of given sizes costs, counted from its tensors, for every mix of sizes at once."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from compressed_tensors.offload import disable_onloading
from numpy.typing import NDArray
from torch import nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.families.parts import Attention
from sparsessm_plugin.fitting.axes import AXES
from sparsessm_plugin.fitting.axes.layers import signatures
from sparsessm_plugin.fitting.shapes import Shapes, Sizes

Array = NDArray[np.float64]
# What is counted, in this order: `recurrent` and `attention` are bytes a sequence and a token,
# `attending` are layers with attention.
QUANTITIES = (
    "parameters",
    "memory",
    "recurrent",
    "attention",
    "layers",
    "layer_bytes",
    "head",
    "attending",
)
_RECURRENT = 4  # bytes of an entry of the recurrent state: float32 whatever the model's dtype
_LAYERS = "layers"


@dataclass(frozen=True)
class Census:
    """Counts of one model.

    :param outside: (quantities,) of what stands outside of the layers
    :param layers: (layers, quantities) of each layer; tensors of several layers count in the first
    """

    outside: Array
    layers: Array

    @classmethod
    def of(cls, model: nn.Module) -> "Census":
        """Of a transformers model; the meta device will do."""
        adapter = get_model_adapter(model)
        layers = adapter.layers
        outside, inside = np.zeros(len(QUANTITIES)), np.zeros((len(layers), len(QUANTITIES)))
        owners = {f"{layer.name}.": layer.index for layer in layers}
        with disable_onloading():
            named = list(model.named_parameters())  # a shared one by its first name
        for name, parameter in named:
            owner = next((i for prefix, i in owners.items() if name.startswith(prefix)), None)
            row = outside if owner is None else inside[owner]
            row[:2] += parameter.numel(), parameter.nbytes
            if owner is not None:
                row[5] += parameter.nbytes
        head: Any = adapter.model.get_output_embeddings()
        outside[6] = head.weight.nbytes if head is not None else 0
        mixers = {mixer.name: mixer for mixer in adapter.mixers}
        for layer in layers:
            row = inside[layer.index]
            row[4], row[7] = 1, layer.has("attention")
            for part in layer.parts:
                if part.name in mixers:
                    sizes = mixers[part.name].sizes
                    conv = mixers[part.name].mixer.conv1d.weight
                    row[2] += sizes.intermediate_size * sizes.state_size * _RECURRENT
                    row[2] += conv.shape[0] * conv.shape[-1] * conv.element_size()
                elif isinstance(part, Attention):
                    entry = next(part.module.parameters()).element_size()
                    row[3] += 2 * part.num_key_value_heads * part.head_dim * entry
        return cls(outside, inside)

    def total(self, kept: Iterable[int] | None = None) -> Array:
        """(quantities,) of the model with the kept layers; default all."""
        chosen = self.layers if kept is None else self.layers[list(kept)]
        summed: Array = self.outside + chosen.sum(0)
        return summed


@dataclass(frozen=True)
class Ladder:
    """The sizes of an axis to choose from, the largest first: what the model has."""

    axis: str
    sizes: tuple[int, ...]


class Space:
    """All mixes of the sizes of some axes, and what each is counted to cost.

    Attributes: ``ladders``; ``kept``, by number of layers the indices that stay.

    :param shapes: of the model
    :param ladders: in any order
    """

    def __init__(self, shapes: Shapes, ladders: Sequence[Ladder]) -> None:
        self.shapes = shapes
        self.ladders = tuple(ladders)
        self.kept: dict[int, tuple[int, ...]] = {}
        self.dense = Census.of(shapes.dense)
        self._grid: Array | None = None
        self._counted, self._like = self._one_of_each()
        for ladder in self.ladders:
            if ladder.axis == _LAYERS:
                layers: Any = AXES[_LAYERS]
                self.kept = {n: layers.kept(shapes.dense, n) for n in ladder.sizes[1:]}
                self.kept[ladder.sizes[0]] = tuple(range(ladder.sizes[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many sizes each axis has."""
        return tuple(len(ladder.sizes) for ladder in self.ladders)

    def sizes(self, mix: Sequence[int]) -> dict[str, int]:
        """The sizes of a mix, given by a place in each ladder; of axes that shrink only."""
        pairs = zip(self.ladders, mix, strict=True)
        return {ladder.axis: ladder.sizes[place] for ladder, place in pairs if place}

    def alone(self, place: int, step: int) -> tuple[int, ...]:
        """The mix in which one axis shrinks, by its place and that of its size in the ladder."""
        last = len(self.ladders[place].sizes) - 1
        return tuple(
            (last if step < 0 else step) if p == place else 0 for p in range(len(self.ladders))
        )

    def count(self, sizes: Sizes) -> Array:
        """(quantities,) of the one model of these sizes, made for it.

        :raises SparseSSMError: the loader cannot make it
        """
        return Census.of(self.shapes.model(sizes, self.kept_of(sizes))).total()

    def kept_of(self, sizes: Sizes) -> tuple[int, ...] | None:
        """Indices of the layers that stay; None if all do."""
        return self.kept.get(sizes[_LAYERS]) if _LAYERS in sizes else None

    def quantities(self) -> Array:
        """(*shape, quantities) of every mix; NaN where the loader cannot make the model."""
        if self._grid is None:
            self._grid = self._all_layers()
        grid = self._grid  # (*other axes, 1 + layers, quantities)
        place = self._place_of_layers()
        if place is None:
            summed: Array = grid.sum(-2)
            return summed
        parts = []
        for size in self.ladders[place].sizes:
            rows = [0, *(1 + i for i in self.kept[size])]
            parts.append(grid[..., rows, :].sum(-2))
        return np.stack(parts, axis=place)

    def _one_of_each(self) -> tuple[Shapes, list[int]]:
        """Shapes with one layer of each kind, and which of them each layer is like.

        All layers, where some share tensors or no config says so few.
        """
        every = list(range(len(self.dense.layers)))
        kinds = signatures(get_model_adapter(self.shapes.dense))
        chosen = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))
        try:
            short = self.shapes.only(tuple(chosen))
            found = Census.of(short.dense)
        except SparseSSMError:
            return self.shapes, every
        like = [chosen.index(kinds.index(kind)) for kind in kinds]
        same = np.array_equal(found.layers[like], self.dense.layers)
        if same and np.array_equal(found.outside, self.dense.outside):
            return short, like
        return self.shapes, every

    def _place_of_layers(self) -> int | None:
        names = [ladder.axis for ladder in self.ladders]
        return names.index(_LAYERS) if _LAYERS in names else None

    def _all_layers(self) -> Array:
        """Counts of each layer, and before them of the rest, for mixes of the other axes.

        Counts are affine in every size but hidden_size, so that the ends of a ladder suffice.
        """
        others = [ladder for ladder in self.ladders if ladder.axis != _LAYERS]
        nodes = [
            (0, len(one.sizes) - 1) if AXES[one.axis].affine else tuple(range(len(one.sizes)))
            for one in others
        ]
        try:
            grid = self._at(others, nodes)
        except SparseSSMError:  # a corner that no loader makes: count every mix by itself
            nodes = [tuple(range(len(ladder.sizes))) for ladder in others]
            return self._at(others, nodes, skip=True)
        for place, (ladder, ends) in enumerate(zip(others, nodes, strict=True)):
            if AXES[ladder.axis].affine:
                first, last = (ladder.sizes[end] for end in ends)
                share = (first - np.array(ladder.sizes, dtype=float)) / max(1, first - last)
                low, high = (np.take(grid, [end], axis=place) for end in (0, -1))
                weight = share.reshape([-1 if i == place else 1 for i in range(grid.ndim)])
                grid = low + weight * (high - low)
        return grid

    def _at(
        self, ladders: Sequence[Ladder], nodes: Sequence[tuple[int, ...]], skip: bool = False
    ) -> Array:
        depth = 1 + len(self.dense.layers)
        grid = np.full((*map(len, nodes), depth, len(QUANTITIES)), np.nan)
        for index in itertools.product(*(range(len(n)) for n in nodes)):
            sizes = {
                ladder.axis: ladder.sizes[own[i]]
                for ladder, own, i in zip(ladders, nodes, index, strict=True)
                if own[i]
            }
            try:
                census = Census.of(self._counted.model(sizes))
            except SparseSSMError:
                if not skip:
                    raise
                continue
            grid[index] = np.concatenate([census.outside[None], census.layers[self._like]])
        return grid


def state_bytes(quantities: Array, length: int) -> Array:
    """Bytes of the cache of one sequence of so many tokens: (..., quantities) -> (...)."""
    found: Array = quantities[..., 2] + length * quantities[..., 3]
    return found


def counted(kind: str, quantities: Array, length: int) -> Array:
    """``parameters``, ``memory`` or ``state`` of every model: (..., quantities) -> (...)."""
    if kind == "state":
        return state_bytes(quantities, length)
    found: Array = quantities[..., ("parameters", "memory").index(kind)]
    return found


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the weights, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())
