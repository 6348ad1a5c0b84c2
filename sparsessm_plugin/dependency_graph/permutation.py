"""Channels that may stand in any order, with all that has to follow, and their reordering.

The order of a mixer's channels, of the residual stream's entries and of an MLP's units means
nothing: whoever makes them and whoever reads them may agree on another one, and the model computes
the same. Which tensor ranges belong together, the adapters say (:meth:`MixerAdapter.axes`,
:meth:`ModelAdapter.axes`), as they do for a removal.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import (
    MixerAdapter,
    ModelAdapter,
    TensorAxis,
    find_mixers,
    get_model_adapter,
    get_tensor,
)
from sparsessm_plugin.families.shared_weights import first_names

STREAM = "hidden"  # name of the order of the residual stream's entries
_Where = tuple[str, int]  # name of a tensor in the model, and a dimension of it


@dataclass(frozen=True)
class ChannelOrder:
    """Channels whose order may be chosen.

    :param name: of the mixer or module that they belong to, and what they are
    :param length: how many
    :param places: by tensor and dimension, (copies, length) int64: where each of them stands, as
        often as it does
    :param blocks: equal neighbouring parts that no channel may leave
    :param stacked: tensors whose positions count on from one slice of the first dimension to the
        next
    """

    name: str
    length: int
    places: Mapping[_Where, Tensor]
    blocks: int = 1
    stacked: frozenset[str] = field(default_factory=frozenset)


def channel_orders(model: nn.Module) -> list[ChannelOrder]:
    """All orders of a model that may be chosen.

    Of a mixer its channels, within a head where there are heads; the entries of the residual
    stream, one order for the whole model; the units of MLPs and of experts. Of a model that has
    no :class:`ModelAdapter`, those of the mixers alone.

    :param model: transformers model
    """
    orders = [_of_mixer(adapter) for adapter in find_mixers(model)]
    try:
        adapter = get_model_adapter(model)
        names = adapter.first_names()
        orders += _of_model(adapter, names)
    except SparseSSMError:
        return orders
    tied = {name for name, first in names.items() if name != first}
    return [order for order in orders if not tied & {tensor for tensor, _ in order.places}]


def permute(model: nn.Module, chosen: Iterable[tuple[ChannelOrder, Tensor]]) -> None:
    """Put channels into other orders, in place; the model then computes the same.

    Tensors keep their identity. Over ranks, the first one's are taken.

    :param model: as :func:`channel_orders` saw it
    :param chosen: each with (length,) int64: at place i then stands what stood at ``order[i]``
    """
    selections: dict[str, dict[int, Tensor]] = {}
    stacked: set[str] = set()
    for order, chosen_order in chosen:
        stacked |= order.stacked
        for (name, dim), places in order.places.items():
            tensor = get_tensor(model, name)
            assert tensor is not None
            size = tensor.shape[dim] * (tensor.shape[0] if name in order.stacked else 1)
            by_dim = selections.setdefault(name, {})
            index = by_dim.setdefault(dim, torch.arange(size))
            index[places.flatten()] = places[:, chosen_order].flatten()
    # all at once: ranks of one host may hold one copy of a tensor, which none may read again
    # once another has begun to write
    aliases: dict[str, list[str]] = {}
    for name, first in first_names(model).items():
        aliases.setdefault(first, []).append(name)
    for name, by_dim in selections.items():
        compute = partial(_selected, model, name, by_dim, name in stacked)
        (value,) = distributed.share(f"order of {name}", compute)
        for alias in aliases.get(name, [name]):
            path, _, leaf = alias.rpartition(".")
            update_offload_parameter(model.get_submodule(path), leaf, value)


def is_movable(model: nn.Module, order: ChannelOrder) -> bool:
    """Whether all tensors of an order are the modules' own, and not made of several.

    A layer that an adapter of another library stands around has further tensors with channels.
    """
    for name, _ in order.places:
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if leaf not in owner._parameters and leaf not in owner._buffers:
            return False
    return True


@torch.no_grad()
def _selected(
    model: nn.Module, name: str, by_dim: Mapping[int, Tensor], stacked: bool
) -> list[Tensor]:
    value = get_tensor(model, name)
    assert value is not None
    value = value.detach()
    for dim, index in by_dim.items():
        index = index.to(value.device)
        if stacked:
            slices = len(value)
            flat = value.movedim(dim, 1).flatten(0, 1).index_select(0, index)
            value = flat.unflatten(0, (slices, -1)).movedim(1, dim)
        else:
            value = value.index_select(dim, index)
    return [value.contiguous()]


def _of_mixer(adapter: MixerAdapter) -> ChannelOrder:
    axis = adapter.channel_axis
    ranges, length = adapter.axes(axis), adapter.axis_length(axis)
    prefix = f"{adapter.name}." if adapter.name else ""
    # a tensor that all heads share keeps them in one order
    heads = adapter.sizes.num_heads
    by_head = axis == "head_dim" and all(where.repeat == heads for where in ranges)
    if by_head:
        length, blocks = heads * length, heads
    else:
        blocks = adapter.groups_of(axis) if axis == "channels" else 1
    grids: dict[_Where, list[Tensor]] = {}
    for where in ranges:
        grid = where.grid(length // heads if by_head else length)
        # (copies, channels): of each head its own
        places = grid.transpose(0, 1).flatten(1) if by_head else grid.flatten(0, 1)
        grids.setdefault((f"{prefix}{where.tensor}", where.dim), []).append(places)
    return ChannelOrder(
        f"{prefix}{axis}",
        length,
        {where: torch.cat(places) for where, places in grids.items()},
        blocks,
        frozenset(f"{prefix}{name}" for name in adapter.stacked),
    )


def _of_model(adapter: ModelAdapter, names: Mapping[str, str]) -> list[ChannelOrder]:
    orders = []
    if adapter.base is adapter.model.base_model:  # else an encoder writes into the stream, too
        ranges = adapter.axes("hidden")
        orders.append(_of_ranges(STREAM, adapter.hidden_size, ranges, names))
    for axis in adapter.axis_names:
        if axis in ("hidden", "layers", "kv_groups"):  # a kv group is a whole head
            continue
        for block in adapter.blocks(axis):
            orders.append(_of_ranges(f"{block.name}.{axis}", block.length, block.axes, names))
    return orders


def _of_ranges(
    name: str, length: int, ranges: Iterable[TensorAxis], names: Mapping[str, str]
) -> ChannelOrder:
    grids: dict[_Where, list[Tensor]] = {}
    for where in ranges:
        key = (names[where.tensor], where.dim)
        grids.setdefault(key, []).append(where.grid(length).flatten(0, 1))
    return ChannelOrder(name, length, {where: torch.cat(found) for where, found in grids.items()})
