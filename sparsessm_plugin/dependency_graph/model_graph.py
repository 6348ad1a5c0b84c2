"""The dependency graph of a whole model, and the groups of tensor ranges that go together."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as with_values
from typing import Any

import torch
import torch_pruning
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

from sparsessm_plugin.dependency_graph.config import set_language_fields
from sparsessm_plugin.dependency_graph.graph import MixerDependencyGraph
from sparsessm_plugin.dependency_graph.stream import (
    ModelSurrogate,
    Node,
    Recorder,
    make_node_pruners,
)
from sparsessm_plugin.dependency_graph.tensors import (
    TensorChange,
    check_indices,
    format_ranges,
    replace,
    without,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import (
    Layer,
    MixerAdapter,
    ModelAdapter,
    check_not_quantized,
    get_model_adapter,
    get_tensor,
)
from sparsessm_plugin.families.base import MixerSizes

Indices = Iterable[int] | Mapping[str, Iterable[int]]


class ModelAxisGroup(torch_pruning.dependency.Group):
    """Everything that goes when indices of an axis of the model go.

    Items are the (dependency, indices) pairs of torch_pruning, none for whole layers. Made by
    :meth:`ModelDependencyGraph.get_axis_group`. Once the model has lost anything, the group is
    stale and prunes no more.
    """

    def __init__(
        self,
        graph: "ModelDependencyGraph",
        axis: str,
        indices: dict[str, tuple[int, ...]],
        items: Iterable[Any] = (),
        channels: Mapping[str, tuple[int, ...]] | None = None,
        along: str | None = None,
    ):
        super().__init__()
        self._group = list(items)
        self._DG = graph
        self.axis = axis
        # by module for units, under the model's name otherwise
        self.indices = indices
        # indices of an axis of the mixers that go along
        self.channels = dict(channels or {})
        self.along = along
        self.old_size: int = graph.adapter.axis_length(axis)
        self.changes: tuple[TensorChange, ...] = ()
        self.layers: tuple[Layer, ...] = ()
        # what the config says since prune(), for those that write another config file
        self.config_fields: dict[str, Any] = {}
        self.signature = graph.signature()

    @property
    def new_size(self) -> int:
        """Indices that the axis keeps."""
        return self.old_size - len(next(iter(self.indices.values())))

    @property
    def is_stale(self) -> bool:
        """Whether the model has changed since the group was made."""
        return self._DG.signature() != self.signature

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Remove the group from the model's tensors and modules, and say so in its config.

        Afterwards :attr:`config_fields` holds the fields that have changed. Nothing has
        changed if the removal is refused.

        :param idxs: other indices of the same axis, instead of the group's own
        :param record_history: of no effect; torch_pruning passes it
        :raises SparseSSMError: nothing would remain, the family's loader could not make what
            remains, or the group is stale
        """
        group = self if idxs is None else self._DG.get_axis_group(self.axis, idxs)
        self.config_fields = self._DG.remove(group)

    def __str__(self) -> str:
        """One line for the axis and one for every layer or tensor dimension that loses entries."""
        lines = []
        distinct = set(self.indices.values())
        shown = format_ranges(distinct.pop()) if len(distinct) == 1 else "of each module"
        name = self._DG.adapter.name
        lines.append(f"{name}: {self.axis} {shown} {self.old_size} -> {self.new_size}")
        lines += [f"  {layer.name} ({layer.kind})" for layer in self.layers]
        return "\n".join([*lines, *(f"  {change}" for change in self.changes)])


class ModelDependencyGraph:
    """Which tensor ranges of a model go together, from tracing its data flow.

    The graph may be kept after a removal: indices then count in the smaller model. Making one
    changes nothing in the model and needs no gradients of it.

    :param model: a transformers model with lm_head
    :raises SparseSSMError: a model of unknown class, with a module of unknown make, or one that
        is stored quantized
    """

    def __init__(self, model: nn.Module):
        check_not_quantized(model)
        self.model = model
        self.adapter: ModelAdapter = get_model_adapter(model)
        self._recorder = Recorder()
        self._traced: tuple[Any, ModelSurrogate, torch_pruning.DependencyGraph] | None = None

    def get_axis_group(
        self,
        axis: str,
        removed: Indices,
        channels: Mapping[str, Iterable[int]] | None = None,
        along: str | None = None,
    ) -> ModelAxisGroup:
        """The group of the given indices of an axis.

        :param axis: one of the adapter's ``axis_names``
        :param removed: indices of the axis; of units, the same in every module, or as many of
            each by the module's name (:attr:`UnitBlock.name`)
        :param channels: with ``hidden``, indices of an axis of every mixer that go along, by the
            mixer's name, for loaders that tie the two
        :param along: that axis, one of ``ways_along`` of the adapter; default whole heads
            (channels in the Mamba-1 layout)
        :raises SparseSSMError: no such axis or module; or indices that are none, out of range,
            given twice, or not equally many of each module
        """
        adapter = self.adapter
        adapter.check_axis(axis)
        if channels is not None and axis != "hidden":
            raise SparseSSMError(f"{adapter.name}: channels go along with hidden, not with {axis}")
        if axis in ("hidden", "layers"):
            if isinstance(removed, Mapping):
                raise SparseSSMError(f"{adapter.name}: {axis} takes indices, not modules' names")
            length = adapter.axis_length(axis)
            indices = {adapter.name: check_indices(adapter.name, axis, removed, length)}
            if axis == "layers":
                group = ModelAxisGroup(self, axis, indices)
                group.layers = tuple(adapter.layers[i] for i in indices[adapter.name])
                return group
            return self._hidden_group(indices, channels or {}, along)
        return self._unit_group(axis, removed)

    def remove(self, group: ModelAxisGroup) -> dict[str, Any]:
        """Carry out what :meth:`ModelAxisGroup.prune` promises; returns the config fields."""
        adapter, axis = self.adapter, group.axis
        if group.is_stale:
            raise SparseSSMError(
                f"{adapter.name}: the group of {axis} is from before the model became smaller; "
                "ask for a new one"
            )
        if group.new_size < 1:
            raise SparseSSMError(
                f"{adapter.name}: removing {group.old_size} of {group.old_size} {axis} leaves "
                "nothing"
            )
        # each of these refuses, while nothing has changed yet, what no loader could make
        gone = group.indices.get(adapter.name, ())
        kept = [i for i in range(group.old_size) if i not in set(gone)]
        mixers = {mixer.name: mixer for mixer in adapter.mixers} if group.channels else {}
        if axis == "hidden":
            fields = adapter.hidden_fields(group.new_size, _sizes_left(mixers, group))
        elif axis == "layers":
            fields = adapter.layer_fields(kept)
        else:
            fields = adapter.unit_field_values(axis, group.new_size)
        set_language_fields(copy.deepcopy(self.model.config), fields)

        self._replace(group.changes)
        if axis == "hidden":
            adapter.set_hidden(group.new_size)
            for mixer in mixers.values():
                assert group.along is not None
                mixer.set_size(group.along, mixer.axis_length(group.along))
        elif axis == "layers":
            adapter.set_layers(kept)
        else:
            adapter.set_units(axis, group.new_size)
        set_language_fields(self.model.config, fields)
        return fields

    def signature(self) -> tuple[Any, ...]:
        """What changes whenever the model loses anything: names and shapes of its tensors."""
        with disable_onloading():
            return tuple((name, p.shape) for name, p in self.model.named_parameters())

    def _hidden_group(
        self,
        indices: dict[str, tuple[int, ...]],
        channels: Mapping[str, Iterable[int]],
        along: str | None,
    ) -> ModelAxisGroup:
        surrogate, graph = self._trace()
        entries = next(iter(indices.values()))
        items: list[Any] = []
        written: set[nn.Module] = set()
        # a stream that no data flow ties to the embedding's, inside of a shared block, is as
        # wide by the loader's doing, and loses the same entries
        for root in surrogate.stream.roots:
            if root not in written:
                items += self._items(root, entries)
                written |= {
                    dependency.target.module
                    for dependency, _ in items
                    if graph.is_out_channel_pruning_fn(dependency.handler)
                }
        gone: dict[str, tuple[int, ...]] = {}
        changes: list[TensorChange] = []
        if channels:
            along = along or whole_axis(self.adapter.mixers[0])
            gone, changes = self._channels_along(channels, along)
        group = ModelAxisGroup(self, "hidden", indices, items, gone, along)
        group.changes = _merge((*self._collect(items), *changes))
        return group

    def _unit_group(self, axis: str, removed: Indices) -> ModelAxisGroup:
        surrogate, _ = self._trace()
        blocks = {block.name: block for block in self.adapter.blocks(axis)}
        if not isinstance(removed, Mapping):
            removed = dict.fromkeys(blocks, tuple(removed))
        _check_names(self.adapter.name, axis, removed, blocks)
        indices = {
            name: check_indices(name, axis, removed[name], block.length)
            for name, block in blocks.items()
        }
        _check_equal(axis, indices)
        items = []
        for name, block in blocks.items():
            items += self._items(surrogate.units_of(block).root, indices[name])
        group = ModelAxisGroup(self, axis, indices, items)
        group.changes = self._collect(items)
        return group

    def _channels_along(
        self, channels: Mapping[str, Iterable[int]], axis: str
    ) -> tuple[dict[str, tuple[int, ...]], list[TensorChange]]:
        """The indices of an axis of each mixer, checked, and what they take with them."""
        mixers = {mixer.name: mixer for mixer in self.adapter.mixers}
        _check_names(self.adapter.name, "channels", channels, mixers)
        gone, changes = {}, []
        for name, mixer in mixers.items():
            group = MixerDependencyGraph(mixer).get_axis_group(axis, channels[name])
            gone[name] = group.indices
            changes += [with_values(c, tensor=f"{name}.{c.tensor}") for c in group.changes]
        _check_equal(axis, gone)
        return gone, changes

    def _trace(self) -> tuple[ModelSurrogate, torch_pruning.DependencyGraph]:
        """The traced graph of the model as it is now."""
        signature = self.signature()
        if self._traced is None or self._traced[0] != signature:
            # autograd is what is traced; offloaded tensors need not be fetched for their shapes
            with torch.inference_mode(False), torch.enable_grad(), disable_onloading():
                surrogate = ModelSurrogate(self.adapter)
                graph = torch_pruning.DependencyGraph().build_dependency(
                    surrogate,
                    example_inputs=(),
                    customized_pruners=make_node_pruners(self._recorder),
                    verbose=False,
                )
            self._traced = (signature, surrogate, graph)
        return self._traced[1:]

    def _items(self, root: Node, indices: Sequence[int]) -> list[Any]:
        """The (dependency, indices) pairs of torch_pruning that start from a node."""
        graph = self._trace()[1]
        pruner = graph.get_pruner_of_module(root)
        return graph.get_pruning_group(root, pruner.prune_out_channels, list(indices)).items

    def _collect(self, items: Iterable[Any]) -> tuple[TensorChange, ...]:
        """What the nodes remove, each tensor dimension once; changes nothing."""
        self._recorder.positions = {}
        for dependency, indices in items:
            # nodes between ours are operations without tensors
            if isinstance(dependency.target.module, Node):
                dependency(indices)
        collected, self._recorder.positions = self._recorder.positions, {}
        names = self.adapter.first_names()
        merged: dict[tuple[str, int], set[int]] = {}
        for (tensor, dim), positions in collected.items():
            merged.setdefault((names[tensor], dim), set()).update(positions)
        with disable_onloading():
            return tuple(
                TensorChange(name, dim, tuple(sorted(found)), self._tensor(name).shape[dim])
                for (name, dim), found in sorted(merged.items())
            )

    def _replace(self, changes: Iterable[TensorChange]) -> None:
        """Put smaller tensors in the place of those that change, under all of their names."""
        by_tensor: dict[str, list[TensorChange]] = {}
        for change in changes:
            by_tensor.setdefault(change.tensor, []).append(change)
        aliases: dict[str, list[str]] = {}
        for name, first in self.adapter.first_names().items():
            aliases.setdefault(first, []).append(name)
        with torch.inference_mode(False), torch.no_grad():
            smaller = {
                name: without(self._tensor(name), parts) for name, parts in by_tensor.items()
            }
            for name, tensor in smaller.items():
                for alias in aliases.get(name, [name]):
                    replace(self.model, alias, tensor)
                    _say_features(self.model, alias, tensor)

    def _tensor(self, name: str) -> Tensor:
        tensor = get_tensor(self.model, name)
        assert tensor is not None
        return tensor


def whole_axis(mixer: MixerAdapter) -> str:
    """The axis of a mixer whose indices are whole heads, or single channels without heads."""
    whole = ("heads", "value_heads")
    return next((axis for axis in whole if axis in mixer.axis_names), "channels")


def _sizes_left(mixers: Mapping[str, MixerAdapter], group: ModelAxisGroup) -> MixerSizes | None:
    """Sizes of every mixer once what goes along is gone, None where nothing does."""
    for name, indices in group.channels.items():
        mixer, axis = mixers[name], group.along
        assert axis is not None
        return mixer.sizes.keeping(axis, mixer.axis_length(axis) - len(indices))
    return None


def _merge(changes: Iterable[TensorChange]) -> tuple[TensorChange, ...]:
    return tuple(sorted(changes, key=lambda change: (change.tensor, change.dim)))


def _say_features(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Write the shape of a new weight into the module that holds it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = tensor.shape
    elif leaf == "weight" and isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = tensor.shape


def _check_names(
    model: str, axis: str, given: Mapping[str, Any], allowed: Mapping[str, Any]
) -> None:
    for name in given:
        if name not in allowed:
            raise SparseSSMError(f"{model}: {name!r} has no {axis}; allowed: {', '.join(allowed)}")
    for name in allowed:
        if name not in given:
            raise SparseSSMError(
                f"{model}: no {axis} of {name} are given; every module must lose equally many"
            )


def _check_equal(axis: str, indices: Mapping[str, Sequence[int]]) -> None:
    counts = {name: len(found) for name, found in indices.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise SparseSSMError(f"every module must lose equally many {axis}, not {listed}")
