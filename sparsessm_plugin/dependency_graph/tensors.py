"""Entries removed from a module's tensors, and tensors put in the place of others."""

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload.cache import OffloadCache
from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError


@dataclass(frozen=True)
class TensorChange:
    """What is removed from one dimension of one tensor.

    :param tensor: dotted name inside the mixer
    :param dim: dimension of the tensor
    :param positions: entries that go, ascending
    :param old_size: entries before
    :param slices: over how many slices along the first dimension positions count on, slice after
        slice, each of which loses equally many; 1 where they count along ``dim`` alone
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    old_size: int
    slices: int = 1

    @property
    def new_size(self) -> int:
        """What the dimension has left."""
        return self.old_size - len(self.positions)

    def __str__(self) -> str:
        where = f"{self.tensor} dim {self.dim}"
        return f"{where} {format_ranges(self.positions)} {self.old_size} -> {self.new_size}"


def format_ranges(positions: Iterable[int]) -> str:
    """Ascending positions in short, ``[16:20, 24]`` for 16, 17, 18, 19 and 24."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    parts = (str(first) if end == first + 1 else f"{first}:{end}" for first, end in runs)
    return f"[{', '.join(parts)}]"


def without(tensor: Tensor, changes: Iterable[TensorChange]) -> Tensor:
    """A copy without the removed entries, of the same kind and with what hangs on the tensor.

    :param changes: one for each dimension that loses entries
    :return: contiguous, with storage of its own
    """
    value, grad = tensor.detach(), tensor.grad
    for change in changes:
        kept = torch.ones(change.old_size, dtype=torch.bool)
        kept[list(change.positions)] = False
        index = kept.nonzero().flatten().to(value.device)
        value = _select(value, change, index)
        grad = None if grad is None else _select(grad, change, index)
    value = value.contiguous()
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        value.grad = grad
    # marks such as `_no_weight_decay` on A_log
    value.__dict__.update(tensor.__dict__)
    return value


def _select(tensor: Tensor, change: TensorChange, index: Tensor) -> Tensor:
    if change.slices == 1:
        return tensor.index_select(change.dim, index)
    flat = tensor.movedim(change.dim, 1).flatten(0, 1).index_select(0, index)
    return flat.unflatten(0, (change.slices, -1)).movedim(1, change.dim)


def replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer of another shape in the place of one, offloaded or not.

    :param name: dotted name inside the module
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
    entries = held.offloaded_values if isinstance(held, OffloadCache) else held
    order, requires_grad = list(entries), entries[leaf].requires_grad
    # an offload cache forgets the old tensor, and its file, only when it is deleted
    del held[leaf]
    held[leaf] = tensor
    # moving a tensor to where it is kept loses this
    entries[leaf].requires_grad_(requires_grad)
    for key in order:
        entries[key] = entries.pop(key)


def check_indices(name: str, axis: str, indices: Iterable[int], length: int) -> tuple[int, ...]:
    """Indices of an axis in ascending order.

    :param name: of what has the axis, for messages
    :param length: of the axis
    :raises SparseSSMError: they are none, no whole numbers, out of range, or given twice
    """
    try:
        checked = sorted(operator.index(index) for index in indices)
    except TypeError as error:
        raise SparseSSMError(f"{name}: indices of {axis} must be whole numbers") from error
    if not checked:
        raise SparseSSMError(f"{name}: no indices of {axis} to remove; give at least one")
    for index in (checked[0], checked[-1]):
        if not 0 <= index < length:
            raise SparseSSMError(f"{name}: {axis} has no index {index}; allowed: 0 to {length - 1}")
    twice = [index for index, count in Counter(checked).items() if count > 1]
    if twice:
        raise SparseSSMError(f"{name}: index {twice[0]} of {axis} is given more than once")
    return tuple(checked)
