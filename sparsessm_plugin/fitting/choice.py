"""Which mix of sizes reaches the targets at the least predicted loss: all mixes, exactly."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_MIXES = 1_000_000
OVERLAP = 0.2  # before any mix was tried; measured 0.0 to 0.3
_NEAR = 0.1  # squared distance of mixes that tell of each other, as a share of the loss
_DOUBT = 0.3  # how little a single mix tells even of itself


def mixed_losses(losses: Sequence[Array], overlap: float = 0.0) -> Array:
    """Predicted loss of every mix from the losses of single axes.

    If removals change the predictions by e_i, the divergence is about a square of their sum:
    sum_i l_i + 2 overlap sum_(i<j) sqrt(l_i l_j), where overlap 0 adds the losses up and a
    positive one says that the errors point the same way.

    :param losses: of each axis (sizes,), zero at the dense size
    :param overlap: mean cosine between errors of two axes
    :return: (sizes of the first axis, sizes of the second, ...)
    """
    total = np.zeros([len(own) for own in losses])
    roots = np.zeros_like(total)
    for place, own in enumerate(losses):
        view = [-1 if i == place else 1 for i in range(len(losses))]
        total = total + own.reshape(view)
        roots = roots + np.sqrt(np.maximum(own, 0)).reshape(view)
    with np.errstate(invalid="ignore"):  # of an axis that was not measured, infinity less itself
        found: Array = total + overlap * (roots**2 - total)
    return np.maximum(found, 0)


def fit_overlap(mixes: Sequence[tuple[Sequence[float], float]], strength: float = 1.0) -> float:
    """The overlap that explains measured mixes best, by least squares on relative errors.

    :param mixes: the single losses of a mix, and its measured loss
    :param strength: of the prior at :data:`OVERLAP`, in mixes of full interaction
    """
    below = 0.1 * strength
    above = below * OVERLAP
    for single, measured in mixes:
        alone = sum(single)
        pairs = sum(np.sqrt(loss) for loss in single) ** 2 - alone
        if alone <= 0 or pairs <= 0:
            continue
        above += pairs * (measured - alone) / alone**2
        below += (pairs / alone) ** 2
    return float(np.clip(above / below, -0.9, 2.0)) if below else OVERLAP


def corrected(
    predicted: Array, losses: Sequence[Array], tried: Mapping[tuple[int, ...], float]
) -> Array:
    """Predicted losses times what the mixes nearby that were tried lost more than predicted.

    Nearness is that of the errors, whose lengths are the roots of the single losses.

    :param predicted: of every mix
    :param losses: of each axis (sizes,), from which they were predicted
    :param tried: measured losses of some mixes
    :return: as ``predicted``, and measured where a mix was tried
    """
    above = np.zeros_like(predicted)
    weights = np.full_like(predicted, _DOUBT)
    for mix, loss in tried.items():
        if not (np.isfinite(predicted[mix]) and predicted[mix] > 0 and loss > 0):
            continue
        distance = np.zeros_like(predicted)
        for place, own in enumerate(losses):
            root = np.sqrt(np.where(np.isfinite(own), own, 1e6))
            view = [-1 if i == place else 1 for i in range(predicted.ndim)]
            distance = distance + np.square(root - root[mix[place]]).reshape(view)
        weight = np.exp(-distance / (2 * _NEAR * predicted[mix]))
        above += weight * np.log(loss / predicted[mix])
        weights += weight
    found: Array = predicted * np.exp(above / weights)
    for mix, loss in tried.items():
        found[mix] = loss
    return found


def best_mixes(
    losses: Array, costs: Sequence[Array], limits: Sequence[float], count: int = 1
) -> list[tuple[int, ...]]:
    """The mixes of least loss among those within all limits, best first.

    Left out is what removes more than it has to: along an axis, the next larger size would do.
    Of equal losses the one of least cost comes first.

    :param losses: of every mix; NaN or infinite where it cannot be made
    :param costs: of every mix, of the same shape, one array a limit
    :param limits: largest cost that is allowed
    :param count: how many at most
    """
    allowed = np.isfinite(losses)
    for cost, limit in zip(costs, limits, strict=True):
        with np.errstate(invalid="ignore"):
            allowed &= cost <= limit * (1 + 1e-12)
    needed = allowed.copy()
    for axis in range(allowed.ndim):
        larger = np.roll(allowed, 1, axis)
        larger[(slice(None),) * axis + (0,)] = False  # nothing is larger than the dense size
        needed &= ~larger
    allowed = needed
    places = np.argwhere(allowed)
    order = np.lexsort((*(cost[allowed] for cost in reversed(costs)), losses[allowed]))
    return [tuple(int(i) for i in places[place]) for place in order[:count]]


def nearest_mix(costs: Sequence[Array], limits: Sequence[float]) -> tuple[int, ...]:
    """The mix that misses the limits least: the least largest ratio of cost to limit."""
    missed = np.max([c / limit for c, limit in zip(costs, limits, strict=True)], axis=0)
    missed = np.where(np.isfinite(missed), missed, np.inf)
    return tuple(int(i) for i in np.unravel_index(int(missed.argmin()), missed.shape))


def front(losses: Array, costs: Array) -> list[tuple[int, ...]]:
    """Mixes that no other one beats in loss and cost, from the dearest to the cheapest."""
    finite = np.isfinite(losses) & np.isfinite(costs)
    places = np.argwhere(finite)
    order = np.lexsort((losses[finite], costs[finite]))  # cheapest first
    chosen, least = [], np.inf
    for place in order:
        index = tuple(int(i) for i in places[place])
        if losses[index] < least:
            chosen.append(index)
            least = losses[index]
    return chosen[::-1]


def interpolated(sizes: Sequence[int], measured: dict[int, float]) -> Array:
    """Loss at every size of a ladder from those that were measured.

    Between two of them, and beyond, as a power of the share that is removed; a single one is
    taken as the square of the share. Never falling with what is removed.

    :param sizes: the largest first, which is the dense one
    :param measured: by size; without any all is infinite
    """
    dense, shares = sizes[0], 1 - np.array(sizes, dtype=float) / sizes[0]
    losses = np.full(len(sizes), np.inf)
    losses[0] = 0.0
    known = sorted((1 - size / dense, max(loss, 1e-9)) for size, loss in measured.items())
    if not known:
        return losses
    x, y = (np.log(np.array(column)) for column in zip(*known, strict=True))
    for place, share in enumerate(shares[1:], 1):
        at = np.log(share)
        if len(x) == 1:
            value = y[0] + 2 * (at - x[0])
        else:
            i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
            slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
            value = y[i] + max(slope, 0.0) * (at - x[i])
        losses[place] = np.exp(value)
    for size, loss in measured.items():
        losses[list(sizes).index(size)] = max(loss, 0.0)
    return losses
