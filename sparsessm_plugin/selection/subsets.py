"""Which states to remove together, given what each pair of them adds to the output."""

import math
from collections.abc import Iterator
from itertools import combinations, islice

import torch
from torch import Tensor

# all subsets are tried up to this many states: 16 choose 8 = 12,870
EXHAUSTIVE = 16
_CHUNK = 4096


def removal_cost(gram: Tensor, removed: Tensor) -> Tensor:
    """1_S^T gram 1_S of several sets.

    :param gram: (N, N) symmetric
    :param removed: (sets, N) bool
    :return: (sets,)
    """
    x = removed.to(gram.dtype)
    return ((x @ gram) * x).sum(-1)


def best_subsets(gram: Tensor, remove: int, count: int = 1) -> Tensor:
    """The cheapest sets of a size among all of them.

    :param gram: (N, N), N at most :data:`EXHAUSTIVE`
    :param remove: size of the sets
    :param count: how many to return
    :return: (count or fewer, N) bool, cheapest first
    """
    N = len(gram)
    best, costs = [], []
    subsets: Iterator[tuple[int, ...]] = combinations(range(N), remove)
    while chunk := list(islice(subsets, _CHUNK)):
        removed = torch.zeros(len(chunk), N, dtype=torch.bool, device=gram.device)
        removed.scatter_(1, torch.tensor(chunk, dtype=torch.long, device=gram.device), True)
        cost = removal_cost(gram, removed)
        order = cost.argsort(stable=True)[:count]
        best.append(removed[order])
        costs.append(cost[order])
    return torch.cat(best)[torch.cat(costs).argsort(stable=True)[:count]]


def eliminate(gram: Tensor, remove: int) -> Tensor:
    """A cheap set for large N: backward elimination, then exchanges until none helps.

    The cost of a set counts the states as they are, without a rescaling of those that stay
    (which a Schur complement would assume): where SiLU stands between the projection and C
    no scale can be folded in, and sets chosen that way were measured to be worse.

    :param gram: (N, N)
    :param remove: size of the set
    :return: (N,) bool
    """
    device = gram.device
    gram = gram.cpu()  # every step asks for a value, for which a GPU would have to wait
    diagonal = gram.diagonal()
    x = torch.zeros_like(diagonal)
    linear = diagonal.clone()  # cost of removing one more
    for _ in range(remove):
        i = int(linear.masked_fill(x > 0, math.inf).argmin())
        x[i] = 1
        linear = linear + 2 * gram[i]
    tolerance = 1e-12 * float(gram.abs().sum())
    for _ in range(10 * len(x)):
        together = gram @ x
        # put i back, remove j instead
        change = (diagonal - 2 * together)[:, None] + (diagonal + 2 * together)[None, :]
        change = change - 2 * gram
        change = change.masked_fill(~((x[:, None] > 0) & (x[None, :] == 0)), math.inf)
        best = int(change.argmin())
        if not float(change.flatten()[best]) < -tolerance:
            break
        x[best // len(x)], x[best % len(x)] = 0, 1
    return (x > 0).to(device)


def choose(gram: Tensor, remove: int) -> Tensor:
    """The best set if all can be tried, a cheap one otherwise: (N,) bool."""
    if len(gram) <= EXHAUSTIVE:
        return best_subsets(gram, remove)[0]
    return eliminate(gram, remove)
