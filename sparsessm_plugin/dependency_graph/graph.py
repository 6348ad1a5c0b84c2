"""The dependency graph of a mixer, and the groups of tensor ranges that go together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch_pruning
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

from sparsessm_plugin.dependency_graph.layouts import make_surrogate
from sparsessm_plugin.dependency_graph.surrogate import Surrogate
from sparsessm_plugin.dependency_graph.tensors import (
    TensorChange,
    check_indices,
    format_ranges,
    replace,
    without,
)
from sparsessm_plugin.dependency_graph.views import Recorder, View, make_pruners
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, get_tensor


class _Surrogates(nn.ModuleDict):
    """One surrogate for each axis, traced into one graph of as many unconnected parts."""

    def forward(self) -> list[Tensor]:
        return [surrogate.trace() for surrogate in self.surrogates()]

    def surrogates(self) -> list[Surrogate]:
        return [module for module in self.values() if isinstance(module, Surrogate)]


class AxisGroup(torch_pruning.dependency.Group):
    """Everything that goes when indices of an axis go.

    Items are the (dependency, indices) pairs of torch_pruning. Made by
    :meth:`MixerDependencyGraph.get_axis_group`. A group belongs to the mixer as it was then:
    once the mixer has lost anything, the group is stale and prunes no more.
    """

    def __init__(self, graph: "MixerDependencyGraph", items: Iterable[Any]):
        super().__init__()
        self._group = list(items)
        self._DG = graph
        root, indices = self._group[0]
        layout = root.target.module.layout
        self.axis: str = layout.axis
        self.indices: tuple[int, ...] = tuple(sorted(indices))
        self.old_size: int = graph.adapter.axis_length(self.axis)
        self.changes: tuple[TensorChange, ...] = graph.collect_changes(self)
        # what the config must say for the model to load again; filled by prune()
        self.config_fields: dict[str, Any] = {}
        self._sizes = graph.adapter.sizes

    @property
    def new_size(self) -> int:
        """Indices that the axis keeps."""
        return self.old_size - len(self.indices)

    @property
    def is_stale(self) -> bool:
        """Whether the mixer has changed since the group was made."""
        return self._DG.adapter.sizes != self._sizes

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group from the mixer's tensors and write the new sizes into its modules.

        Afterwards :attr:`config_fields` holds the config fields that must follow. Nothing has
        changed if the removal is refused.

        :param idxs: other indices of the same axis, instead of the group's own
        :param record_history: whether the graph notes the removal in its ``pruning_history``
        :raises SparseSSMError: nothing would remain, the family's loader could not make what
            remains, or the group is stale
        """
        if idxs is not None:
            other = self._DG.get_axis_group(self.axis, idxs)
            other.prune(record_history=record_history)
            self.config_fields = other.config_fields
            return
        graph = self._DG
        self.config_fields = graph.remove(self)
        if record_history:
            root = self._group[0].dep.target.module
            graph._pruning_history.append((graph._module2name[root], True, list(self.indices)))

    def __str__(self) -> str:
        """One line for the axis and one for every tensor dimension that loses entries."""
        head = f"{self.axis} {format_ranges(self.indices)} {self.old_size} -> {self.new_size}"
        return "\n".join([f"{self._DG.adapter.name}: {head}", *(f"  {c}" for c in self.changes)])


class MixerDependencyGraph(torch_pruning.DependencyGraph):
    """Which tensor ranges of a mixer go together, from tracing its data flow.

    The graph may be kept after a removal: indices then count in the smaller mixer. Making one
    changes nothing in the mixer and needs no gradients of it.

    :param adapter: the mixer
    :raises SparseSSMError: no data flow is known for the adapter's layout
    """

    def __init__(self, adapter: MixerAdapter):
        super().__init__()
        self.adapter = adapter
        self._recorder = Recorder()
        surrogates = _Surrogates(
            {axis: make_surrogate(adapter, axis) for axis in adapter.axis_names}
        )
        # autograd is what is traced; offloaded tensors need not be fetched for their shapes
        with torch.inference_mode(False), torch.enable_grad(), disable_onloading():
            self.build_dependency(
                surrogates,
                example_inputs=(),
                customized_pruners=make_pruners(self._recorder),
                verbose=False,
            )

    def get_axis_group(self, axis: str, indices: Iterable[int]) -> AxisGroup:
        """The group of the given indices of an axis.

        :param axis: one of the adapter's ``axis_names``
        :param indices: positions along the axis, as ``adapter.axes(axis)`` counts them; with G
            groups, as many states, or heads, of each group
        :raises SparseSSMError: no such axis; or indices that are none, out of range, given
            twice, or not equally many of each group
        """
        self.adapter.check_axis(axis)
        checked = self._check_indices(axis, indices)
        surrogate = self.model[axis]
        root = surrogate.root
        return self.get_pruning_group(
            root, self.get_pruner_of_module(root).prune_out_channels, checked
        )

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> AxisGroup:
        """The group that starts from a view; see torch_pruning.

        :param module: a view of the traced surrogates
        :param pruning_fn: ``prune_out_channels`` or ``prune_in_channels`` of its pruner
        :param idxs: indices of the axis
        """
        group = super().get_pruning_group(module, pruning_fn, idxs)
        return AxisGroup(self, group.items)

    def check_pruning_group(self, group: AxisGroup) -> bool:
        """Whether something would remain of every tensor of the group."""
        return bool(group.changes) and super().check_pruning_group(group)

    def collect_changes(self, group: AxisGroup) -> tuple[TensorChange, ...]:
        """What the views of a group remove, each tensor dimension once; changes nothing."""
        self._recorder.positions = {}
        for dependency, indices in group.items:
            # nodes between the views are operations without tensors
            if isinstance(dependency.target.module, View):
                dependency(indices)
        collected, self._recorder.positions = self._recorder.positions, {}
        with disable_onloading():
            return tuple(
                self._change(tensor, dim, positions)
                for (tensor, dim), positions in sorted(collected.items())
            )

    def remove(self, group: AxisGroup) -> dict[str, Any]:
        """Carry out what :meth:`AxisGroup.prune` promises; returns the config fields."""
        adapter, axis = self.adapter, group.axis
        if group.is_stale:
            raise SparseSSMError(
                f"{adapter.name}: the group of {axis} is from before the mixer became smaller; "
                "ask for a new one"
            )
        if not self.check_pruning_group(group):
            raise SparseSSMError(
                f"{adapter.name}: removing {len(group.indices)} of {group.old_size} {axis} "
                "leaves nothing"
            )
        new_size = adapter.size_of(axis, group.new_size)
        # refuses, while nothing has changed yet, what no loader could make
        adapter.size_fields(axis, new_size)

        by_tensor: dict[str, list[TensorChange]] = {}
        for change in group.changes:
            by_tensor.setdefault(change.tensor, []).append(change)
        with torch.inference_mode(False), torch.no_grad():
            smaller = {
                name: without(self._tensor(name), changes) for name, changes in by_tensor.items()
            }
            for name, tensor in smaller.items():
                replace(adapter.mixer, name, tensor)
        return adapter.set_size(axis, new_size)

    def _change(self, tensor: str, dim: int, positions: Iterable[int]) -> TensorChange:
        shape = self._shape(tensor)
        slices = shape[0] if tensor in self.adapter.stacked else 1
        return TensorChange(tensor, dim, tuple(sorted(positions)), slices * shape[dim], slices)

    def _tensor(self, name: str) -> Tensor:
        tensor = get_tensor(self.adapter.mixer, name)
        assert tensor is not None
        return tensor

    def _shape(self, name: str) -> torch.Size:
        return self._tensor(name).shape

    def _check_indices(self, axis: str, indices: Iterable[int]) -> list[int]:
        name, length = self.adapter.name, self.adapter.axis_length(axis)
        checked = list(check_indices(name, axis, indices, length))
        groups = self.adapter.groups_of(axis)
        if groups > 1:
            counts = Counter(index // (length // groups) for index in checked)
            per_group = [counts[group] for group in range(groups)]
            if len(set(per_group)) > 1:
                raise SparseSSMError(
                    f"{name}: the {groups} groups must lose equally many of {axis}, "
                    f"not {', '.join(map(str, per_group))}"
                )
        return checked
