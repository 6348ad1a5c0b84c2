"""Linear layers outside of mixers, which several places of a model may share."""

from collections.abc import Iterable

from torch import nn

from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.families.shared_weights import of_several_names


class PendingLinears:
    """The Linear layers outside of mixers that are still to prune, each after its last use.

    :param model: a layer of it that several places share under one name may be called again
    :param projections: to prune
    """

    def __init__(self, model: nn.Module, projections: Iterable[PrunableWeight]) -> None:
        self.pending = {p.name: p for p in projections if p.adapter is None}
        self._called_again = of_several_names(model)
        self._done: set[int] = set()

    def several(self, projection: PrunableWeight) -> bool:
        """Whether several places of the model use a weight."""
        return bool(projection.others) or id(projection.module) in self._called_again

    def after(self, modules: Iterable[nn.Module]) -> list[PrunableWeight]:
        """What can be pruned once all data has passed these modules."""
        self._done |= {id(m) for m in modules if id(m) not in self._called_again}
        return [
            p
            for p in self.pending.values()
            if all(id(module) in self._done for module in p.uses.values())
        ]
