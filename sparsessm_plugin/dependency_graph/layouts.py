"""Which surrogate stands for which mixer."""

from sparsessm_plugin.dependency_graph.delta_surrogate import DeltaNetSurrogate
from sparsessm_plugin.dependency_graph.surrogate import (
    Mamba1Surrogate,
    Mamba2Surrogate,
    Surrogate,
    ZambaSurrogate,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.families.delta_net import DeltaNetAdapter
from sparsessm_plugin.families.mamba1 import Mamba1Adapter
from sparsessm_plugin.families.mamba2 import Mamba2Adapter
from sparsessm_plugin.families.zamba import ZambaAdapter

# the first that fits
_SURROGATES: tuple[tuple[type[MixerAdapter], type[Surrogate]], ...] = (
    (ZambaAdapter, ZambaSurrogate),
    (Mamba1Adapter, Mamba1Surrogate),
    (Mamba2Adapter, Mamba2Surrogate),
    (DeltaNetAdapter, DeltaNetSurrogate),
)


def make_surrogate(adapter: MixerAdapter, axis: str) -> Surrogate:
    """The surrogate of a mixer for one of its axes.

    :raises SparseSSMError: no surrogate for the layout of the adapter
    """
    for kind, surrogate in _SURROGATES:
        if isinstance(adapter, kind):
            return surrogate(adapter, axis)
    raise SparseSSMError(f"{adapter.family} has no dependency graph")
