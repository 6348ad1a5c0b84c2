"""In which order columns make up the groups of n:m, so that the zeros of all groups cost least.

A row of a group loses its n lowest scores. Columns that matter to the same rows do best in
different groups (arXiv 2110.15352, "Channel Permutations for N:M Sparsity").
"""

import torch
from torch import Tensor

from sparsessm_plugin.selection.masks import keep_in_groups, ranks_in_groups

# Groups among which columns are dealt out anew at once. All groups of a wide weight would be dealt
# out at a cost of the cube of their number; which groups meet is drawn anew in every round.
_TOGETHER = 64
_ROUNDS = 16
# The search ends with a round that takes less than this share of what the first order loses.
_LEAST_GAIN = 3e-3


def lost_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """() sum of the n lowest scores of every m neighbouring columns of every row.

    :param scores: (rows, columns) not negative
    """
    return scores.masked_fill(keep_in_groups(scores, n, m), 0).sum()


def order_columns(scores: Tensor, n: int, m: int, blocks: int = 1) -> Tensor:
    """An order of the columns whose groups of n:m lose little, by :func:`lost_in_groups`.

    The columns are first dealt out by their sums, so that every group has strong and weak ones.
    Then one column of each group at a time goes to the group where it costs least: all of them
    together, exactly, as an assignment. Its costs are distances: the rest of a group loses
    ``r_1 + ... + r_(n-1) + min(r_n, s)`` of a row with a further score s, where r are the rest's
    scores in ascending order, and ``min(a, b) = (a + b - |a - b|) / 2``.

    :param scores: (rows, columns) not negative; what a zero at each entry costs
    :param n: zeros of a group
    :param m: columns of a group
    :param blocks: equal neighbouring parts that no column leaves, each of whole groups
    :return: (columns,) int64 on the CPU: at place i stands column ``order[i]``. Never worse than
        the order that there is
    """
    columns = scores.shape[1]
    groups = columns // m
    scores = scores.float()
    # in units in which sums of many rows neither under- nor overflow
    scores = scores / scores.mean().clamp(min=torch.finfo(torch.float32).tiny)
    order = _dealt(scores.sum(0).double().cpu(), m, blocks).view(groups, m)
    before = float(lost_in_groups(scores, n, m))
    lost = float(lost_in_groups(scores[:, order.flatten().to(scores.device)], n, m))
    generator = torch.Generator().manual_seed(0)
    best, least = order.clone(), lost
    for _ in range(_ROUNDS):
        for part in _parts(groups // blocks, blocks, generator):
            order[part] = _dealt_anew(scores, order[part], n, m)
        now = float(lost_in_groups(scores[:, order.flatten().to(scores.device)], n, m))
        if now < least:
            best, least = order.clone(), now
        if lost - now < _LEAST_GAIN * before:
            break
        lost = now
    return best.flatten() if least < before else torch.arange(columns)


def _dealt(sums: Tensor, m: int, blocks: int) -> Tensor:
    """(columns,) the columns of every block dealt out to its groups, forth and back."""
    size = len(sums) // blocks
    ranked = sums.view(blocks, size).argsort(dim=-1, descending=True, stable=True)
    hands = ranked.view(blocks, m, size // m).clone()
    hands[:, 1::2] = hands[:, 1::2].flip(-1)
    first = size * torch.arange(blocks)[:, None, None]
    return (hands + first).transpose(1, 2).flatten()


def _parts(size: int, blocks: int, generator: torch.Generator) -> list[Tensor]:
    """(parts, groups) indices of groups that may exchange columns now, in tensors of one width.

    :param size: groups of a block
    """
    drawn = torch.stack([torch.randperm(size, generator=generator) for _ in range(blocks)])
    drawn += size * torch.arange(blocks)[:, None]
    return list(drawn.split(_TOGETHER, dim=1))


def _dealt_anew(scores: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """The same columns, after each group has given away each of its columns once.

    :param order: (parts, groups, m) columns; they stay in their part
    :return: likewise
    """
    from scipy.optimize import linear_sum_assignment

    order = order.clone()
    for place in range(m):
        values = scores[:, order.flatten().to(scores.device)].view(-1, *order.shape)
        rest = [i for i in range(m) if i != place]
        others = values[..., rest]  # (rows, parts, groups, m - 1)
        if scores.is_cuda:  # where a selection of its own for each row and group is slow
            bound = others.masked_fill(ranks_in_groups(others) != n - 1, 0).sum(-1)
        else:
            bound = others.kthvalue(n, dim=-1).values
        bound, moved = (x.permute(1, 2, 0).contiguous() for x in (bound, values[..., place]))
        # what a group loses with a column, but for what it loses with any: (parts, groups, columns)
        both = bound.sum(-1)[..., :, None] + moved.sum(-1)[..., None, :]
        costs = (both - torch.cdist(bound, moved, p=1.0)).cpu()
        for part, cost in enumerate(costs):
            _, chosen = linear_sum_assignment(cost.numpy())
            order[part, :, place] = order[part, torch.from_numpy(chosen), place]
    return order
