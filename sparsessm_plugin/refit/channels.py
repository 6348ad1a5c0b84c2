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
    device = blocks.device
    group_of = torch.arange(count, device=device) // (count // groups)
    gone = torch.zeros(count, dtype=torch.bool, device=device)
    left = torch.full((groups,), remove // groups, device=device)
    eye = torch.eye(size, dtype=torch.float64, device=device)
    inverses, weights = [], []
    for term in terms:
        damped = term.gram.double().clone()
        damped.diagonal().add_(damping * damped.diagonal().mean() + 1e-30)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(damped)))
        weights.append(term.weight.double().clone())
        assert weights[-1].shape[1] == len(damped)
    # Nothing below asks the device for a value: a GPU gets all steps at once and never waits.
    for _ in range(remove):
        cost = torch.zeros(count, dtype=torch.float64, device=device)
        for inverse, weight in zip(inverses, weights, strict=True):
            if size == 1:
                entry = inverse.diagonal()[blocks[:, 0]]
                cost += weight.square().sum(0)[blocks[:, 0]] / entry.clamp(min=1e-300)
            else:
                inner = inverse[blocks[:, :, None], blocks[:, None, :]]  # (n, size, size)
                inner = torch.where(gone[:, None, None], eye, inner)
                columns = weight[:, blocks].permute(1, 2, 0)  # (n, size, out)
                solved, _ = torch.linalg.solve_ex(inner, columns)
                cost += (columns * solved).sum((1, 2))
        full = (left == 0)[group_of]
        best = cost.masked_fill(gone | full, math.inf).argmin().view(1)
        gone.index_fill_(0, best, True)
        left.index_add_(0, group_of[best], -torch.ones_like(best))
        S = blocks[best][0]
        for inverse, weight in zip(inverses, weights, strict=True):
            # rows of inverse that leave, through the inverse of their own block
            rows = inverse.index_select(0, S)  # (size, D)
            own = rows.index_select(1, S)
            through = rows / own if size == 1 else torch.linalg.solve_ex(own, rows)[0]
            weight.addmm_(weight.index_select(1, S), through, alpha=-1)
            weight.index_fill_(1, S, 0)
            inverse.addmm_(rows.T, through, alpha=-1)
            inverse.index_fill_(0, S, 0).index_fill_(1, S, 0)
            inverse.diagonal().index_fill_(0, S, 1)
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
