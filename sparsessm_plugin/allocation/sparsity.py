"""How many zeros each projection gets, so that all together have the sparsity asked for.

Every function returns whole numbers of zeros whose sum is exactly ``round(sparsity * sum(sizes))``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from sparsessm_plugin.errors import SparseSSMError

# between measured points of a curve, as a share of a module's entries
_STEP = 0.005


def uniform_allocation(sizes: Sequence[int], sparsity: float) -> list[int]:
    """The same share of every module, to within one entry.

    :param sizes: entries a module
    :param sparsity: share of zeros over all modules, in [0, 1)
    :raises SparseSSMError: sparsity outside of [0, 1)
    """
    _check(sizes, sparsity)
    return _whole([sparsity * size for size in sizes])


def paper_allocation(
    sensitivities: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float
) -> list[int]:
    """SparseSSM's Eq. 7 (arXiv 2506.09613) for the modules of one kind.

    Modules are ranked by sensitivity; what is kept rises evenly with the rank, from
    1 - p - alpha to 1 - p + alpha. Where modules differ in size, all shares are shifted alike so
    that the mean by entries is p.

    :param sensitivities: trace of each module's Hessian
    :param sizes: entries a module
    :param sparsity: p, share of zeros over all modules, in [0, 1)
    :param alpha: how far a module's share may be from p
    :raises SparseSSMError: a module's sparsity would lie outside of [0, 1)
    """
    _check(sizes, sparsity)
    if len(sizes) < 2:
        return uniform_allocation(sizes, sparsity)
    rank = {i: r for r, i in enumerate(sorted(range(len(sizes)), key=lambda i: sensitivities[i]))}
    shares = [sparsity + alpha * (1 - 2 * rank[i] / (len(sizes) - 1)) for i in range(len(sizes))]
    zeros = sum(share * size for share, size in zip(shares, sizes, strict=True))
    shift = sparsity - zeros / sum(sizes)
    shares = [share + shift for share in shares]
    if not all(-1e-9 <= share < 1 for share in shares):
        worst = max(shares, key=lambda share: abs(share - 0.5))
        raise SparseSSMError(
            f"alpha {alpha} drives the sparsity of a module to {worst:.3f}; every one must lie in "
            "[0, 1)"
        )
    return _whole([max(0.0, s) * size for s, size in zip(shares, sizes, strict=True)])


def optimal_allocation(
    sparsities: Sequence[float],
    losses: Sequence[Sequence[float]],
    sizes: Sequence[int],
    sparsity: float,
    *,
    lowest: float | Sequence[float] = 0.0,
    highest: float | None = None,
) -> list[int]:
    """Minimise the summed loss of all modules at a given number of zeros.

    A loss is known at some sparsities and interpolated between them, log loss over log
    sparsity, as it grows by powers. On the lower convex hulls of these curves zeros are handed out
    where the next one costs least, which is optimal for convex curves (Lagrange: at the optimum
    all slopes are equal).

    :param sparsities: (S,) ascending, in (0, 1)
    :param losses: for each module (S,) loss at these sparsities, at least 0; 0 at sparsity 0
    :param sizes: entries a module
    :param sparsity: share of zeros over all modules, in [0, 1)
    :param lowest: no module below this share; for all, or one each, such as what is zero already
    :param highest: no module above this share, unless ``lowest`` says so; default the last of
        ``sparsities``
    :raises SparseSSMError: bounds that exclude ``sparsity`` or go beyond ``sparsities``
    """
    _check(sizes, sparsity)
    highest = sparsities[-1] if highest is None else highest
    lows = [lowest] * len(sizes) if isinstance(lowest, int | float) else list(lowest)
    least = sum(low * size for low, size in zip(lows, sizes, strict=True)) / sum(sizes)
    if not (min(lows) >= 0 and least - 1e-9 <= sparsity <= highest <= sparsities[-1]):
        raise SparseSSMError(
            f"sparsity {sparsity} must lie between {least:g} and {highest:g}, the bounds of the "
            f"modules, and these between 0 and {sparsities[-1]}, where the losses are known"
        )
    segments = []
    for i, (curve, size, low) in enumerate(zip(losses, sizes, lows, strict=True)):
        shares = _steps(low, highest) if low < highest else [low]
        points = [(share * size, _interpolate(sparsities, curve, share)) for share in shares]
        for (x, loss), (next_x, next_loss) in pairwise(_lower_hull(points)):
            if next_x > x:
                segments.append(((next_loss - loss) / (next_x - x), next_x - x, i))
    zeros = [low * size for low, size in zip(lows, sizes, strict=True)]
    left = max(0.0, sparsity * sum(sizes) - sum(zeros))
    for _, width, i in sorted(segments):
        taken = min(width, left)
        zeros[i] += taken
        left -= taken
    return _whole(zeros)


def _check(sizes: Sequence[int], sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise SparseSSMError(f"sparsity must lie in [0, 1), got {sparsity}")
    if not sizes or min(sizes) < 1:
        raise SparseSSMError(f"every module needs at least one entry, got sizes {list(sizes)}")


def _whole(zeros: Sequence[float]) -> list[int]:
    """Whole numbers with the rounded sum of the given ones, each less than one away."""
    ends, total = [0], 0.0
    for value in zeros:
        total += value
        ends.append(round(total))
    return [end - start for start, end in pairwise(ends)]


def _steps(lowest: float, highest: float) -> list[float]:
    count = max(1, math.ceil((highest - lowest) / _STEP - 1e-9))
    return [lowest + (highest - lowest) * i / count for i in range(count + 1)]


def _interpolate(sparsities: Sequence[float], losses: Sequence[float], at: float) -> float:
    """A loss between its measured points; below the first it falls as the cube.

    The losses of SparseGPT on trained projections fall about so below 30 %.
    """
    if at <= 0:
        return 0.0
    if at >= sparsities[-1]:
        return losses[-1]
    if at <= sparsities[0]:
        return losses[0] * (at / sparsities[0]) ** 3
    i = next(k for k in range(1, len(sparsities)) if at <= sparsities[k] + 1e-12)
    (a, b), (x, y) = sparsities[i - 1 : i + 1], losses[i - 1 : i + 1]
    t = math.log(at / a) / math.log(b / a)
    if x <= 0 or y <= 0:
        return x + t * (y - x)
    return math.exp((1 - t) * math.log(x) + t * math.log(y))


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points in ascending order."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (a, b), (c, d) = hull[-2:]
            if (d - b) * (x - a) < (y - b) * (c - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull
