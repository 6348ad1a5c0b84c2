"""Projections dealt out over ranks: each is solved on one of them, by the sums of all."""

from collections.abc import Iterable
from typing import Any

from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.offload.cache import CPUCache, DiskCache
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.families.prunable import PrunableWeight


def owners_of(projections: Iterable[PrunableWeight]) -> dict[str, int]:
    """The rank that solves each projection, so that all have about as much to do."""
    cost = {p.name: p.entries * p.shape[-1] for p in projections}
    return greedy_bin_packing(list(cost), distributed.world_size(), cost.__getitem__)[2]


def share_memory(projections: Iterable[PrunableWeight]) -> bool:
    """Whether ranks of one host hold one copy of the weights."""
    return any(isinstance(p.module._parameters, CPUCache | DiskCache) for p in projections)


def sum_to_owners(what: str, sums: dict[str, Tensor], owners: dict[str, int]) -> dict[str, Tensor]:
    """Sums over ranks, each on the rank that owns it, taken out of ``sums``."""
    own: dict[str, Tensor] = {}
    for owner in sorted(set(owners.values())):
        parts = {name: sums.pop(name, None) for name, o in owners.items() if o == owner}
        total = distributed.reduce_sum(what, parts, to=owner)
        if owner == distributed.rank():
            own = total
    return own


def of_all_ranks(what: str, own: dict[str, Any]) -> dict[str, Any]:
    """By name what each rank has found for the projections that it owns; JSON must hold it."""
    return {name: value for part in distributed.gather(what, own) for name, value in part.items()}
