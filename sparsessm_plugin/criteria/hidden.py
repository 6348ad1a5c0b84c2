"""What a narrower residual stream loses, and which entries of it matter by weights alone.

Every norm divides the stream by its root mean square; call the result n, M entries. A narrower
stream holds V^T n for one V (M, K) in the whole model, and a fitted reader sees B V^T n, where
B = C V (V^T C V)^-1 tells n from it as well as a linear map can (C = E n n^T). An error e of n
costs e^T G e, where G is the mean outer product of the loss's gradients for n: the Fisher
information, half of e^T G e is the divergence of the predictions to second order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsessm_plugin.families import ModelAdapter, get_tensor
from sparsessm_plugin.registry import Registry

_DAMPING = 1e-6  # of V^T C V, relative to its mean diagonal entry


@dataclass(frozen=True)
class Reading:
    """What one norm of the stream gives, and what an error of it costs.

    :param covariance: (M, M) mean of n n^T over calibration tokens, float64
    :param metric: (M, M) mean outer product of the loss's gradients for n, float64
    :param fitted: whether the weights that read n are fitted; those of a tied head, which are
        the embedding's, are not, and read V V^T n
    """

    covariance: Tensor
    metric: Tensor
    fitted: bool = True

    @property
    def size(self) -> Tensor:
        """Mean square of n, summed over its entries."""
        return self.covariance.diagonal().sum()

    @property
    def energy(self) -> Tensor:
        """What it would cost to lose n altogether."""
        return (self.metric * self.covariance).sum()


def loss_of_basis(basis: Tensor, readings: list[Reading]) -> Tensor:
    """What a narrow stream loses at all norms together; can be differentiated for the basis.

    :param basis: (M, K) of full rank; only the space that it spans matters
    :return: scalar
    """
    total = basis.new_zeros(())
    for reading in readings:
        C, G = reading.covariance, reading.metric
        CV = C @ basis
        inner = basis.T @ CV
        if reading.fitted:
            inner = inner + _DAMPING * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
            seen = torch.linalg.solve(inner, CV.T @ G @ CV).diagonal().sum()
        else:
            # (V V^T n without the part of n outside of V), V made orthonormal
            gram = basis.T @ basis
            GV = G @ basis
            across = torch.linalg.solve(gram, GV.T @ CV)
            both = torch.linalg.solve(gram, basis.T @ GV) @ torch.linalg.solve(gram, inner)
            seen = 2 * across.diagonal().sum() - both.diagonal().sum()
        total = total + reading.energy - seen
    return total


# what a model's weights say of each entry of its stream -> (M,), lower goes first
HiddenScore = Callable[[ModelAdapter], Tensor]


@dataclass(frozen=True)
class HiddenCriterion:
    """How the entries of the stream that stay are chosen.

    :param score: see :data:`HiddenScore`; None where they are chosen together by what is lost
        at the norms (:func:`loss_of_basis`)
    """

    score: HiddenScore | None


HIDDEN_CRITERIA: Registry[HiddenCriterion] = Registry(
    "saliency of the hidden size", "sparsessm_plugin.criteria"
)
HIDDEN_CRITERIA.register("output_energy", HiddenCriterion(None))


def register_hidden_criterion(name: str) -> Callable[[HiddenScore], HiddenScore]:
    """Decorator: make a score of weights known as a criterion for entries of the stream."""

    def register(score: HiddenScore) -> HiddenScore:
        HIDDEN_CRITERIA.register(name, HiddenCriterion(score))
        return score

    return register


@register_hidden_criterion("magnitude")
def magnitude(adapter: ModelAdapter) -> Tensor:
    """Norm of all weights that read or write an entry."""
    size = adapter.hidden_size
    total: Tensor | None = None
    for where in adapter.axes("hidden"):
        tensor = get_tensor(adapter.model, where.tensor)
        assert tensor is not None
        if tensor.ndim < 2:  # norms and biases
            continue
        energy = tensor.detach().double().movedim(where.dim, 0).flatten(1).square().sum(1)
        energy = energy.view(-1, size).sum(0)  # where the stream comes twice
        total = energy if total is None else total + energy
    assert total is not None
    return total.sqrt()


@register_hidden_criterion("last")
def last(adapter: ModelAdapter) -> Tensor:
    """The last entries go."""
    return torch.arange(adapter.hidden_size, 0, -1, dtype=torch.float64)


@register_hidden_criterion("random")
def random(adapter: ModelAdapter) -> Tensor:
    """Any entries go, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(adapter.hidden_size, generator=generator, dtype=torch.float64)


def norm_scale(norm: nn.Module) -> Tensor:
    """(M,) float64 by which an RMSNorm multiplies each entry of a stream of root mean square 1.

    Some families store it less one.
    """
    weight = norm.weight
    assert isinstance(weight, Tensor)
    ones = torch.ones((1, 1, len(weight)), dtype=torch.float32, device=weight.device)
    output = norm(ones)[0, 0].double()
    # epsilon makes it a little less
    stored = weight.detach().double()
    offset = (output - stored).mean().round()
    return stored + offset
