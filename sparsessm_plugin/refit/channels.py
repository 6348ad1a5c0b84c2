"""Which channels to remove together, when the weight that reads them is fitted again.

For y = W x with Gram matrix ``sum x x^T``, removing the inputs of a set S and refitting W costs
``tr(W_S ([gram^-1]_SS)^-1 W_S^T)`` (optimal brain surgeon, for whole columns). Greedy backward
elimination with Schur updates keeps both W and the inverse up to date.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LinearTerm:
    """One weight that reads the channels, and how much its error counts.

    :param gram: (D, D) sum of x x^T over the calibration
    :param weight: (out, D), rows scaled as their errors count
    """

    gram: Tensor
    weight: Tensor


def eliminate_blocks(
    terms: list[LinearTerm], blocks: Tensor, remove: int, groups: int = 1, damping: float = 1e-2
) -> list[int]:
    """Greedy choice of blocks of channels, the cost summed over all weights that read them.

    :param terms: the weights, all over the same D channels
    :param blocks: (n, size) channels of each block; the n blocks are disjoint
    :param remove: blocks to remove; ``groups`` must divide it
    :param groups: equal parts of the n blocks that must lose equally many
    :param damping: relative to the mean diagonal entry of each Gram matrix
    :return: removed blocks, ascending
    """
    count, size = blocks.shape
    per_group = count // groups
    group_of = torch.arange(count, device=blocks.device) // per_group
    gone = torch.zeros(count, dtype=torch.bool, device=blocks.device)
    inverses, weights = [], []
    for term in terms:
        D = len(term.gram)
        damped = term.gram.double().clone()
        damped.diagonal().add_(damping * damped.diagonal().mean() + 1e-30)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(damped)))
        weights.append(term.weight.double().clone())
        assert weights[-1].shape[1] == D
    left = [remove // groups] * groups
    for _ in range(remove):
        cost = torch.zeros(count, dtype=torch.float64, device=blocks.device)
        for inverse, weight in zip(inverses, weights, strict=True):
            if size == 1:
                entry = inverse.diagonal()[blocks[:, 0]]
                cost += weight.square().sum(0)[blocks[:, 0]] / entry.clamp(min=1e-300)
            else:
                inner = inverse[blocks[:, :, None], blocks[:, None, :]]  # (n, size, size)
                inner[gone] = torch.eye(size, dtype=inner.dtype, device=inner.device)
                columns = weight[:, blocks].transpose(0, 1)  # (n, out, size)
                solved = torch.linalg.solve(inner, columns.transpose(1, 2))  # (n, size, out)
                cost += (columns.transpose(1, 2) * solved).sum((1, 2))
        full = torch.tensor([n == 0 for n in left], device=blocks.device)
        best = int(cost.masked_fill(gone | full[group_of], math.inf).argmin())
        gone[best] = True
        left[best // per_group] -= 1
        S = blocks[best]
        for k, (inverse, weight) in enumerate(zip(inverses, weights, strict=True)):
            # rows of inverse that leave, through the inverse of their own block
            through = torch.linalg.solve(inverse[S][:, S], inverse[S])  # (size, D)
            weights[k] = weight - weight[:, S] @ through
            inverses[k] = inverse - inverse[:, S] @ through
            weights[k][:, S] = 0
            inverses[k][S], inverses[k][:, S] = 0, 0
            inverses[k][S, S] = 1
    return gone.nonzero().flatten().tolist()


def refit(gram: Tensor, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """W over the kept inputs that reproduces W over all of them best.

    :param gram: (D, D) sum of x x^T
    :param weight: (out, D)
    :param kept: (K,) indices
    :param ridge: relative to the mean diagonal entry; pulls towards the columns as they are
    :return: (out, K)
    """
    gram, weight = gram.double(), weight.double()
    inner = gram[kept][:, kept].clone()
    error = weight @ gram[:, kept] - weight[:, kept] @ inner
    inner.diagonal().add_(ridge * inner.diagonal().mean() + 1e-30)
    return weight[:, kept] + torch.cholesky_solve(error.T, torch.linalg.cholesky(inner)).T
