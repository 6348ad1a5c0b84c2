"""What each unit of an MLP, or each kv group of attention, matters by the weights that it owns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsessm_plugin.families import UnitBlock, get_tensor
from sparsessm_plugin.registry import Registry

# a model and one of its blocks -> (units,), lower goes first
UnitScore = Callable[[nn.Module, UnitBlock], Tensor]


@dataclass(frozen=True)
class UnitCriterion:
    """How units are chosen.

    :param score: see :data:`UnitScore`; None where units are judged together by what the
        weight that reads them loses (:func:`sparsessm_plugin.refit.channels.eliminate_blocks`)
    """

    score: UnitScore | None


UNIT_CRITERIA: Registry[UnitCriterion] = Registry("saliency of units", "sparsessm_plugin.criteria")
UNIT_CRITERIA.register("output_energy", UnitCriterion(None))


def register_unit_criterion(name: str) -> Callable[[UnitScore], UnitScore]:
    """Decorator: make a score of weights known as a criterion for units."""

    def register(score: UnitScore) -> UnitScore:
        UNIT_CRITERIA.register(name, UnitCriterion(score))
        return score

    return register


@register_unit_criterion("magnitude")
def magnitude(model: nn.Module, block: UnitBlock) -> Tensor:
    """Norm of all weights that make or read a unit."""
    total = torch.zeros(block.length, dtype=torch.float64)
    for where in block.axes:
        tensor = get_tensor(model, where.tensor)
        assert tensor is not None
        if tensor.ndim < 2:
            continue
        squares = tensor.detach().double().movedim(where.dim, 0).flatten(1).square().sum(1).cpu()
        entries = torch.tensor([where.positions([i]) for i in range(block.length)])
        total += squares[entries].sum(1)
    return total.sqrt()


@register_unit_criterion("last")
def last(model: nn.Module, block: UnitBlock) -> Tensor:
    """The last units go."""
    return torch.arange(block.length, 0, -1, dtype=torch.float64)


@register_unit_criterion("random")
def random(model: nn.Module, block: UnitBlock) -> Tensor:
    """Any units go, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(block.length, generator=generator, dtype=torch.float64)
