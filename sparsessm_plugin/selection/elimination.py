"""Which indices stay when all go one after the other, judged anew in rounds."""

from collections.abc import Callable

import torch
from torch import Tensor


def eliminate_in_rounds(
    cost: Callable[[Tensor], Tensor],
    groups: int,
    size: int,
    keep: int,
    most: int,
    device: torch.device | None = None,
) -> Tensor:
    """Take indices away, the cheapest ones first, until so many are left in each group.

    :param cost: of taking away each index as well, (groups, size), where (groups, size) bool says
        which are still there; what it says of the others is not looked at
    :param groups: that lose equally many
    :param size: indices in each
    :param keep: indices that stay in each
    :param most: indices that go in one round, in each group
    :return: (groups, size) bool, True where an index stays
    """
    alive = torch.ones(groups, size, dtype=torch.bool, device=device)
    left = size
    while left > keep:
        count = min(most, left - keep)
        scores = cost(alive).double().masked_fill(~alive, torch.inf)
        # stable: ties go to the lower index
        going = scores.argsort(dim=1, stable=True)[:, :count]
        alive = alive.scatter(1, going, False)
        left -= count
    return alive
