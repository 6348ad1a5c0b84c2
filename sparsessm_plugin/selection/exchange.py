"""Which indices stay, when what a set costs can be measured but only guessed for its neighbours."""

from collections.abc import Callable

import torch
from torch import Tensor

_SHARE = 8  # one in so many is exchanged at first


def exchange(
    start: Tensor,
    changes: Callable[[Tensor], Tensor],
    cost: Callable[[Tensor], float],
    rounds: int,
) -> Tensor:
    """Exchange indices that stay for others, as long as that makes the set cheaper.

    Several pairs at once, those that promise most; half as many where that has failed.

    :param start: (groups, size) bool, True where an index stays; equally many in each group
    :param changes: what the cost of a set is expected to change by, (groups, size): for an index
        that stays if it goes, for one that has gone if it comes back
    :param cost: of a set, measured
    :param rounds: sets that are measured, at most
    :return: (groups, size) bool, no more costly than ``start``
    """
    kept, best, expected = start, cost(start), changes(start)
    most = max(1, int(start[0].sum()) // _SHARE)
    for _ in range(rounds):
        trial = _exchanged(kept, expected, most)
        measured = best if torch.equal(trial, kept) else cost(trial)
        if measured < best:
            kept, best, expected = trial, measured, changes(trial)
        elif most > 1:
            most //= 2
        else:
            break
    return kept


def _exchanged(kept: Tensor, expected: Tensor, most: int) -> Tensor:
    """The set after at most so many exchanges in each group that are expected to pay."""
    result = kept.clone()
    for group, stays in enumerate(kept):
        out = expected[group].masked_fill(~stays, torch.inf).sort(stable=True)
        back = expected[group].masked_fill(stays, torch.inf).sort(stable=True)
        pays = (out.values + back.values)[:most] < 0
        result[group, out.indices[:most][pays]] = False
        result[group, back.indices[:most][pays]] = True
    return result
