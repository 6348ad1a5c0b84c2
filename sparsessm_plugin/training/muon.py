"""Steps of equal size in every direction of a matrix, after Muon."""

import math

import torch
from torch import Tensor

MOMENTUM = 0.95
# Of the polynomial that takes singular values to about 1, and how often it is applied.
_COEFFICIENTS, _TIMES = (3.4445, -4.7750, 2.0315), 5
# Root mean square of a step at learning rate 1. Adam's is about 0.2; twice that was measured to be
# better where both share a rate.
_SIZE = 0.4
_EPSILON = 1e-7


def step(
    matrices: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    learning_rate: float | Tensor,
    taken: Tensor,
) -> None:
    """A step of Muon (K. Jordan, 2024) for matrices of one shape, in place.

    The mean of past gradients, with Nesterov's look ahead, is replaced by the orthogonal matrix
    nearest to it. Its entries are scaled to twice the size of Adam's steps (after arXiv 2502.16982,
    section 2.2), so that both take the same learning rates. As ``torch.optim.Muon`` with
    ``adjust_lr_fn="match_rms_adamw"`` at twice the rate, for many matrices at once, and nothing
    waits for a GPU.

    :param matrices: (n, rows, columns) float32
    :param gradients: likewise, all of them numbers
    :param momentum: likewise
    :param taken: float32 scalar, 1 where the step is taken, 0 where all stays as it is
    """
    rows, columns = matrices.shape[-2:]
    momentum.lerp_(gradients, (1 - MOMENTUM) * taken)
    direction = orthogonalized(torch.lerp(gradients, momentum, MOMENTUM))
    scale = _SIZE * math.sqrt(max(rows, columns)) * learning_rate * taken
    matrices.sub_(direction.float() * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices with the singular vectors of others and singular values near 1.

    By Newton-Schulz iterations, in bfloat16 on GPUs, which do not need more.

    :param matrices: (n, rows, columns) float32
    :return: likewise
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if is_tall else matrices
    if found.is_cuda:
        found = found.bfloat16()
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_TIMES):
        gram = found @ found.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, gram, found, beta=a)
    return found.mT if is_tall else found
