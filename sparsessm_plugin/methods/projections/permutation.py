"""The order of channels that loses least to the groups of n:m, for every axis of a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.dependency_graph.permutation import (
    STREAM,
    ChannelOrder,
    channel_orders,
    is_movable,
    permute,
)
from sparsessm_plugin.families import get_tensor
from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.methods.projections.dense import DensePass
from sparsessm_plugin.selection.columns import lost_in_groups, order_columns
from sparsessm_plugin.selection.masks import parse_structure

# Calibration tokens whose inputs are looked at; only sums of their squares are needed.
_TOKENS = 4096
# Scores that are looked at to choose one order; of more, every k-th row of each weight.
_MOST_SCORES = 2**22
# Models of which a method of the same run holds what entered the dense mixers.
_KEPT_STREAMS: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class PermutedAxis:
    """What became of the order of some channels.

    :param name: of the mixer or module, and what they are
    :param channels: how many
    :param lost: what the zeros would cost in the order that was chosen, over what they would in
        the order that there was; by the sums of the weights' squares times those of their inputs,
        without any making up for them. 1 where the order stayed
    """

    name: str
    channels: int
    lost: float

    @property
    def moves_stream(self) -> bool:
        """Whether the entries of the residual stream have another order than before."""
        return self.name == "hidden" and self.lost < 1


@contextmanager
def stream_kept(model: nn.Module) -> Iterator[None]:
    """Leave the residual stream of a model in its order: its entries are held somewhere."""
    _KEPT_STREAMS.add(model)
    try:
        yield
    finally:
        _KEPT_STREAMS.discard(model)


def permute_channels(
    model: nn.Module,
    projections: Sequence[PrunableWeight],
    structure: str,
    dense: DensePass | None,
) -> list[PermutedAxis]:
    """Put the channels of a model into the order in which groups of n:m lose least, in place.

    A zero at w costs ``w^2 sum x^2``, as Wanda has it (arXiv 2306.11695); each weight counts by
    what it loses in the order that there is. An order stays where the channels of a head make no
    whole groups, or a weight has n:m zeros along them already.

    :param model: transformers model
    :param projections: that are to be pruned
    :param structure: ``"n:m"``
    :param dense: lets data pass the model; without it all inputs count as equally large
    """
    n, m = parse_structure(structure)
    orders = _deciding(model, projections, n, m)
    seen = {p.name: p for _, readers in orders for p in readers}
    energies = dense.energies(list(seen.values()), _TOKENS) if dense and seen else {}
    results, chosen = [], []
    for order, readers in orders:
        scores = _scores(order, readers, energies, n, m)
        choose = partial(_choose, scores, n, m, order.blocks)
        indices, lost = distributed.share(f"order of {order.name}", choose)
        results.append(PermutedAxis(order.name, order.length, float(lost)))
        if float(lost) < 1:
            chosen.append((order, indices))
    permute(model, chosen)
    return results


def _deciding(
    model: nn.Module, projections: Sequence[PrunableWeight], n: int, m: int
) -> list[tuple[ChannelOrder, list[PrunableWeight]]]:
    """The orders that decide about groups of n:m and may change, with the weights of these."""
    by_tensor = {p.parameter_name: p for p in projections}
    found = []
    for order in channel_orders(model):
        if order.name == STREAM and model in _KEPT_STREAMS:
            continue
        if order.length // order.blocks % m or not is_movable(model, order):
            continue
        readers = [
            by_tensor[name]
            for (name, dim), places in order.places.items()
            if name in by_tensor
            and dim == len(by_tensor[name].shape) - 1
            and _makes_groups(places, m)
        ]
        if readers and not any(_has_groups(model, where, n, m) for where in order.places):
            found.append((order, readers))
    return found


def _choose(scores: Tensor, n: int, m: int, blocks: int) -> list[Tensor]:
    """An order, and what it loses over what the one does that there is."""
    indices = order_columns(scores, n, m, blocks)
    now = lost_in_groups(scores[:, indices.to(scores.device)], n, m)
    before = lost_in_groups(scores, n, m)
    lost = now / before if float(before) > 0 else torch.ones_like(now)
    return [indices, lost.double().cpu()]


def _scores(
    order: ChannelOrder,
    readers: Sequence[PrunableWeight],
    energies: Mapping[str, Tensor],
    n: int,
    m: int,
) -> Tensor:
    """(rows, channels) what a zero of each row of the weights costs."""
    total = sum(
        order.places[p.parameter_name, len(p.shape) - 1].numel() * p.shape[-2] for p in readers
    )
    step = -(-total // _MOST_SCORES)
    found = []
    for p in readers:
        weight = p.weight[..., ::step, :].float()
        energy = energies.get(p.name)
        scores = weight.square()
        if energy is not None:
            energy = (energy / energy.mean().clamp(min=1e-30)).to(scores)
            scores = scores * energy[..., None, :]
        if scores.ndim == 3:  # a matrix for each head: the columns of all, side by side
            scores = scores.transpose(0, 1).flatten(1)
        places = order.places[p.parameter_name, len(p.shape) - 1]
        rows = torch.cat([scores[:, part.to(scores.device)] for part in places])
        lost = lost_in_groups(rows, n, m)
        found.append(rows / lost if float(lost) > 0 else torch.zeros_like(rows))
    device = found[0].device
    return torch.cat([rows.to(device) for rows in found])


def _makes_groups(places: Tensor, m: int) -> bool:
    """Whether every m neighbouring channels are a group of the tensor."""
    groups = places.unflatten(-1, (-1, m))
    return bool(((groups[..., :1] % m == 0) & (groups.diff(dim=-1) == 1).all(-1, True)).all())


def _has_groups(model: nn.Module, where: tuple[str, int], n: int, m: int) -> bool:
    """Whether a weight has n zeros in every group along its inputs, which another order mixes."""
    name, dim = where
    tensor = get_tensor(model, name)
    assert tensor is not None
    if tensor.ndim < 2 or dim != tensor.ndim - 1 or tensor.shape[-1] % m:
        return False
    zeros = (tensor.detach().unflatten(-1, (-1, m)) == 0).sum(-1)
    return bool((zeros >= n).all())
