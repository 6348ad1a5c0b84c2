"""How sparsity is shared out: against counting by hand and against all possibilities."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin.allocation.sparsity import (
    optimal_allocation,
    paper_allocation,
    uniform_allocation,
)
from sparsessm_plugin.errors import SparseSSMError

GRID = [0.1, 0.3, 0.5, 0.7, 0.9]
SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


def power(scale, exponent):
    return [scale * s**exponent for s in GRID]


@given(SIZES, st.floats(0, 0.99))
def test_uniform_is_exact(sizes, sparsity):
    zeros = uniform_allocation(sizes, sparsity)
    assert sum(zeros) == round(sparsity * sum(sizes))
    assert all(abs(z - sparsity * n) < 1.01 for z, n in zip(zeros, sizes, strict=True))


@settings(max_examples=30)
@given(SIZES, st.floats(0, 0.9), st.data())
def test_optimal_is_exact_and_within_bounds(sizes, sparsity, data):
    losses = [power(data.draw(st.floats(1e-6, 1e6)), data.draw(st.floats(0.5, 6))) for _ in sizes]
    low = data.draw(st.floats(0, sparsity))
    high = data.draw(st.floats(sparsity, 0.9))
    zeros = optimal_allocation(GRID, losses, sizes, sparsity, lowest=low, highest=high)
    assert sum(zeros) == round(sparsity * sum(sizes))
    for z, n in zip(zeros, sizes, strict=True):
        assert low * n - 1.01 <= z <= high * n + 1.01


def test_paper_by_hand():
    # five modules of 100: kept 40, 45, 50, 55, 60 % from the least to the most sensitive
    zeros = paper_allocation([3.0, 9.0, 1.0, 5.0, 7.0], [100] * 5, 0.5, 0.1)
    assert zeros == [55, 40, 60, 50, 45]
    assert paper_allocation([1.0, 2.0], [100, 100], 0.5, 0.0) == [50, 50]
    assert paper_allocation([1.0], [100], 0.3, 0.2) == [30]
    # of different sizes: 60 of 100 and 120 of 300 would be 180 zeros, so both shares rise by 5 %
    assert paper_allocation([1.0, 2.0], [100, 300], 0.5, 0.1) == [65, 135]


def test_paper_refuses_an_alpha_that_leaves_the_range():
    with pytest.raises(SparseSSMError, match=r"alpha 0\.4 drives the sparsity of a module to 1"):
        paper_allocation([1.0, 2.0], [10, 10], 0.7, 0.4)
    with pytest.raises(SparseSSMError, match=r"alpha 0\.4 drives"):
        paper_allocation([1.0, 2.0], [10, 10], 0.3, 0.4)


def test_equal_curves_are_shared_alike():
    # loss over entries: a module four times as large with four times the loss is the same
    zeros = optimal_allocation(GRID, [power(1, 3), power(4, 3)], [1000, 4000], 0.5)
    assert zeros[0] == pytest.approx(500, abs=10)
    assert sum(zeros) == 2500


def test_optimum_of_two_power_laws():
    # a s^3 + b r^3 with s + r = 1: s / r = sqrt(b / a) at the optimum
    zeros = optimal_allocation(GRID, [power(4, 3), power(1, 3)], [10000, 10000], 0.5)
    assert zeros[0] / zeros[1] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.55, 0.8])
def test_optimal_equals_brute_force_and_beats_uniform(sparsity):
    curves = [(4.0, 2.0), (1.0, 3.0), (0.2, 5.0)]
    sizes = [20, 20, 40]
    losses = [power(*c) for c in curves]

    def loss(zeros):
        shares = [z / n for z, n in zip(zeros, sizes, strict=True)]
        return sum(a * s**k for (a, k), s in zip(curves, shares, strict=True))

    budget = round(sparsity * sum(sizes))
    best = min(
        loss(zeros)
        for zeros in itertools.product(*(range(round(0.9 * n) + 1) for n in sizes))
        if sum(zeros) == budget
    )
    # below the first point of the grid a cube is assumed, so stay above it
    found = loss(optimal_allocation(GRID, losses, sizes, sparsity, lowest=0.1))
    assert best <= found + 1e-12
    lowest = min(
        loss(zeros)
        for zeros in itertools.product(*(range(round(0.1 * n), round(0.9 * n) + 1) for n in sizes))
        if sum(zeros) == budget
    )
    assert found <= 1.02 * lowest  # zeros are whole numbers of a few entries
    assert found <= loss(uniform_allocation(sizes, sparsity)) * (1 + 1e-9)


def test_curves_that_are_not_convex():
    # the second costs nothing more once it has lost half: better there than in between
    zeros = optimal_allocation(
        GRID, [[1, 2, 3, 4, 5.0], [1, 3, 3, 3, 3.0]], [100, 100], 0.45, lowest=0.1
    )
    assert zeros == [10, 80]


def test_what_is_zero_already_counts():
    zeros = optimal_allocation(
        GRID, [power(1, 3), power(1, 3), power(1, 3)], [100] * 3, 0.5, lowest=[0.95, 0.0, 0.0]
    )
    assert zeros[0] == 95
    assert sum(zeros) == 150
    assert abs(zeros[1] - zeros[2]) <= 1


def test_losses_of_zero():
    zeros = optimal_allocation(GRID, [[0.0] * 5, power(1, 3)], [100, 100], 0.45)
    assert zeros == [90, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "must lie in [0, 1), got 1.0"),
        ({"sparsity": 0.95}, "must lie between"),
        ({"lowest": 0.6}, "must lie between"),
        ({"highest": 0.4}, "must lie between"),
        ({"sizes": [0, 4]}, "at least one entry"),
    ],
)
def test_refusals(changes, message):
    arguments = {"sizes": [10, 10], "sparsity": 0.5, **changes}
    with pytest.raises(SparseSSMError) as error:
        optimal_allocation(GRID, [power(1, 2)] * 2, **arguments)
    assert message in str(error.value)
