"""The best set of indices by a loss of whole sets, in few evaluations."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import comb

Set = tuple[int, ...]  # ascending

# Sets that are all tried, rather than searched.
EXHAUSTIVE = 64
# Sets that are looked at, without an evaluation, for one that is allowed.
_LOOKED_AT = 3000
_SWAP_ROUNDS = 3


def allowed_sets(length: int, size: int, allowed: Callable[[Set], bool]) -> Iterator[Set]:
    """Sets of indices below ``length`` that are allowed, among the first few thousand.

    Neighbours and indices at equal distances come first, which is what patterns of layers allow.

    :param length: of the axis
    :param size: of a set
    :param allowed: whether a set may be taken; costs little
    """
    seen: set[Set] = set()
    for count, found in enumerate(_in_order(length, size)):
        if count >= _LOOKED_AT:
            return
        if found not in seen:
            seen.add(found)
            if allowed(found):
                yield found


def _in_order(length: int, size: int) -> Iterator[Set]:
    for step in range(1, length):
        last = length - (size - 1) * step
        for start in range(max(0, last)):
            yield tuple(range(start, start + size * step, step))
    yield from combinations(range(length), size)


def search_sets(
    length: int,
    size: int,
    loss: Callable[[Set], float],
    allowed: Callable[[Set], bool],
    width: int,
    swaps: bool = True,
) -> Set:
    """The set of indices with the lowest loss, or one that is nearly as good.

    All sets are tried where there are few. Otherwise the set grows by one index at a time: every
    index is tried once alone, later only the ``width`` that were best alone beside the best set so
    far; then single indices of it are exchanged as long as that helps. Only the last set need be
    allowed.

    :param length: of the axis
    :param size: of the set, 1 or more
    :param loss: of a set; asked once for each
    :param allowed: whether the result may be this set
    :param width: how many ways to go on are tried at each step
    :param swaps: whether indices are exchanged at the end
    :raises ValueError: no set is allowed
    """
    known: dict[Set, float] = {}

    def of(found: Set) -> float:
        if found not in known:
            known[found] = loss(found)
        return known[found]

    if comb(length, size) <= EXHAUSTIVE and swaps:
        everything = [s for s in combinations(range(length), size) if allowed(s)]
        return _best(everything, of)
    alone = {i: of((i,)) for i in range(length) if size > 1 or allowed((i,))}
    if size == 1:
        return _best([(i,) for i in alone], of)
    order = sorted(alone, key=lambda i: (alone[i], i))
    best: Set = (order[0],)
    while len(best) < size:
        last = len(best) + 1 == size
        longer = [_with(best, i) for i in order if i not in best]
        if last:
            longer = [s for s in longer if allowed(s)]
        if not longer:
            break
        best = _best(longer[:width] if swaps else longer, of)
    if len(best) < size:
        some = list(allowed_sets(length, size, allowed))
        some.sort(key=lambda s: sum(alone[i] for i in s))
        best = _best(some[:width], of)
    for _ in range(_SWAP_ROUNDS if swaps else 0):
        others = [s for s in _exchanged(best, order, width) if allowed(s)]
        better = _best([best, *others], of)
        if better == best:
            break
        best = better
    return best


def _exchanged(chosen: Set, order: Sequence[int], width: int) -> Iterator[Set]:
    """Sets with another index in the place of one: a neighbour on each side, or a good one."""
    for i in chosen:
        free = [j for j in sorted(order) if j not in chosen]
        below, above = [j for j in free if j < i][-1:], [j for j in free if j > i][:1]
        rest = [index for index in chosen if index != i]
        for j in dict.fromkeys((*below, *above)):
            yield _with(tuple(rest), j)
    weakest = max(chosen, key=order.index)  # it was worst alone
    rest = [index for index in chosen if index != weakest]
    for j in [j for j in order if j not in chosen][:width]:
        yield _with(tuple(rest), j)


def _with(found: Set, index: int) -> Set:
    return tuple(sorted((*found, index)))


def _best(sets: Sequence[Set], loss: Callable[[Set], float]) -> Set:
    if not sets:
        raise ValueError("no set is allowed")
    return min(sets, key=lambda s: (loss(s), s))
