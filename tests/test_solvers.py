"""Choices and new weights against brute force and plain least squares."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsessm_plugin.criteria.states import StateStatistics
from sparsessm_plugin.refit.compensation import (
    RIDGES,
    Regression,
    best_ridge,
    mix_C,
    ridge_update,
    skip_update,
    without_skip,
)
from sparsessm_plugin.refit.reconstruction import reconstruct
from sparsessm_plugin.selection.subsets import (
    EXHAUSTIVE,
    best_subsets,
    choose,
    eliminate,
    removal_cost,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(N, seed, rank=None):
    """Of correlated columns, so that sets are worth more or less than their members."""
    x = normal(rank or 2 * N, N, seed=seed) @ (torch.eye(N) + normal(N, N, seed=seed + 1) / 2)
    return x.T @ x


def cost_of(gram, indices):
    indices = torch.tensor(indices, dtype=torch.long)
    return float(gram[indices][:, indices].sum())


def all_costs(gram, remove):
    return {s: cost_of(gram, s) for s in combinations(range(len(gram)), remove)}


def indices_of(chosen):
    return tuple(chosen.nonzero().flatten().tolist())


# -- subsets -----------------------------------------------------------------------------


def test_cost_is_the_sum_over_pairs():
    gram = gram_of(5, 0)
    removed = torch.zeros(2, 5, dtype=torch.bool)
    removed[0, [1, 3]] = removed[1, [0, 2, 4]] = True
    expected = [cost_of(gram, [1, 3]), cost_of(gram, [0, 2, 4])]
    assert removal_cost(gram, removed).tolist() == pytest.approx(expected)


@settings(max_examples=30)
@given(data=st.data(), N=st.integers(1, 9), seed=st.integers(0, 999), count=st.integers(1, 5))
def test_best_subsets_are_those_of_brute_force(data, N, seed, count):
    remove = data.draw(st.integers(0, N))
    gram = gram_of(N, seed)
    costs = sorted(all_costs(gram, remove).values())
    found = best_subsets(gram, remove, count)
    assert found.sum(1).tolist() == [remove] * min(count, len(costs))
    assert len({indices_of(f) for f in found}) == len(found)
    ours = [cost_of(gram, indices_of(f)) for f in found]
    assert ours == pytest.approx(costs[: len(found)], rel=1e-9, abs=1e-9)


def test_best_subsets_over_several_chunks():
    gram = gram_of(16, 3)  # 12,870 sets of 8
    found = best_subsets(gram, 8, 3)
    costs = sorted(all_costs(gram, 8).values())[:3]
    assert [cost_of(gram, indices_of(f)) for f in found] == pytest.approx(costs)


def backward_elimination(gram, remove):
    """Take away what adds least, again and again."""
    gone = []
    for _ in range(remove):
        rest = [i for i in range(len(gram)) if i not in gone]
        gone.append(min(rest, key=lambda i: cost_of(gram, [*gone, i])))
    return gone


@settings(max_examples=40)
@given(data=st.data(), N=st.integers(2, 24), rank=st.integers(1, 30), seed=st.integers(0, 999))
def test_elimination_is_never_worse_than_the_plain_one(data, N, rank, seed):
    remove = data.draw(st.integers(1, N - 1))
    gram = gram_of(N, seed, rank)
    chosen = indices_of(eliminate(gram, remove))
    assert len(chosen) == remove
    slack = 1e-9 * float(gram.abs().sum())
    assert cost_of(gram, chosen) <= cost_of(gram, backward_elimination(gram, remove)) + slack
    # no exchange of two states helps
    for i in chosen:
        for j in set(range(N)) - set(chosen):
            other = [k for k in chosen if k != i] + [j]
            assert cost_of(gram, chosen) <= cost_of(gram, other) + slack


def test_elimination_mostly_finds_the_best_set():
    best = 0
    for seed in range(40):
        gram = gram_of(9, seed)
        cost = cost_of(gram, indices_of(eliminate(gram, 4)))
        best += cost <= min(all_costs(gram, 4).values()) * (1 + 1e-9)
    assert best >= 30


def test_twins_that_cancel_go_together():
    """Each costs a lot, both together nothing: scores of single states cannot see it."""
    features = normal(50, 6)
    features[:, 4] = -features[:, 1]
    features[:, [1, 4]] *= 10
    gram = features.T @ features
    assert indices_of(choose(gram, 2)) == (1, 4)


def test_many_states_are_eliminated():
    assert EXHAUSTIVE == 16
    gram = gram_of(17, 5)
    assert torch.equal(choose(gram, 5), eliminate(gram, 5))
    assert torch.equal(choose(gram[:16, :16], 5), best_subsets(gram[:16, :16], 5)[0])


# -- closed forms ------------------------------------------------------------------------

T, D, N = 40, 6, 4


def mixing_problem(seed=0, skip=False):
    """Samples, their statistics, and the explicit features h_k C_j as columns.

    :return: statistics, features (T * D, N, N), output (T * D,), u as (T * D, D) columns
    """
    h, C, u, weight = (
        normal(*shape, seed=seed + i) for i, shape in enumerate([(T, D, N), (T, N), (T, D), (T, D)])
    )
    statistics = StateStatistics(mixing=True)
    statistics.add(h, C[:, None], u, weight)
    features = weight[..., None, None] * h[..., :, None] * C[:, None, None, :]
    output = weight * (h * C[:, None]).sum(-1)
    columns = torch.diag_embed(weight * u)  # each channel has an entry of D of its own
    return statistics, features.flatten(0, 1), output.flatten(), columns.flatten(0, 1)


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2]])
def test_mixed_rows_are_least_squares(kept):
    statistics, features, output, _ = mixing_problem()
    M, left = mix_C(statistics.mixing, torch.tensor([kept]), ridge=0)
    columns = features[:, kept].flatten(1)
    solution = torch.linalg.lstsq(columns, output[:, None]).solution[:, 0]
    torch.testing.assert_close(M[0].flatten(), solution, rtol=1e-5, atol=1e-6)
    error = float((output - columns @ solution).square().sum())
    assert float(left[0]) == pytest.approx(error, rel=1e-6)
    unmixed = output - features[:, kept, kept].sum(1)
    assert error < float(unmixed.square().sum())


def test_several_sets_at_once():
    statistics, *_ = mixing_problem()
    kept = torch.tensor([[0, 1], [2, 3], [0, 3]])
    M, left = mix_C(statistics.mixing, kept)
    for i in range(3):
        alone = mix_C(statistics.mixing, kept[i : i + 1])
        torch.testing.assert_close(M[i], alone[0][0])
        torch.testing.assert_close(left[i], alone[1][0])


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0, 1e6])
def test_ridge_leads_from_least_squares_to_the_rows_as_they_are(ridge):
    statistics, features, output, _ = mixing_problem()
    kept = [0, 2]
    M, left = mix_C(statistics.mixing, torch.tensor([kept]), ridge)
    rows = torch.eye(N, dtype=torch.float64)[kept]
    free = mix_C(statistics.mixing, torch.tensor([kept]), 0.0)[1]
    unmixed = float((output - features[:, kept, kept].sum(1)).square().sum())
    assert float(free[0]) <= float(left[0]) * (1 + 1e-9)
    assert float(left[0]) <= unmixed * (1 + 1e-9)
    if ridge == 1e6:
        torch.testing.assert_close(M[0], rows, rtol=0, atol=1e-4)


def test_nothing_removed_is_the_identity():
    statistics, *_ = mixing_problem()
    M, left = mix_C(statistics.mixing, torch.arange(N)[None])
    torch.testing.assert_close(M[0], torch.eye(N, dtype=torch.float64))
    assert abs(float(left[0])) < 1e-9 * float(statistics.gram.abs().sum())


def test_states_that_never_act_need_no_inverse():
    statistics = StateStatistics(mixing=True)
    h = normal(T, D, N)
    h[..., 1] = 0
    statistics.add(h, normal(T, 1, N, seed=1), normal(T, D, seed=2), torch.ones(T, D).double())
    M, left = mix_C(statistics.mixing, torch.tensor([[0, 1], [1, 2]]))
    assert torch.isfinite(M).all()
    assert (left >= 0).all()
    silent = mix_C(torch.zeros(N, N, N, N, dtype=torch.float64), torch.tensor([[0, 1]]))
    assert torch.isfinite(silent[0]).all()


def test_what_the_skip_connection_takes_over():
    """Against the regression on u that without_skip leaves out of the Gram matrix."""
    statistics, features, output, columns = mixing_problem()
    left_of = features.flatten(1)
    fitted = torch.linalg.lstsq(columns, left_of).solution
    rest = left_of - columns @ fitted
    ours = without_skip(
        statistics.mixing.reshape(N * N, N * N),
        statistics.mixing_skip.flatten(1),
        statistics.skip_energy,
    )
    torch.testing.assert_close(ours, rest.T @ rest)
    update = skip_update((columns * output[:, None]).sum(0), statistics.skip_energy)
    expected = torch.linalg.lstsq(columns, output[:, None]).solution[:, 0]
    torch.testing.assert_close(update, expected)


def test_rows_and_skip_are_fitted_together():
    """Mixing on what D leaves, then D: as one regression on both."""
    statistics, features, output, columns = mixing_problem()
    kept = [1, 2]
    reduced = without_skip(
        statistics.mixing.reshape(N * N, N * N),
        statistics.mixing_skip.flatten(1),
        statistics.skip_energy,
    )
    M, left = mix_C(reduced.view(N, N, N, N), torch.tensor([kept]), ridge=0)
    both = torch.cat([features[:, kept].flatten(1), columns], 1)
    solution = torch.linalg.lstsq(both, output[:, None]).solution[:, 0]
    torch.testing.assert_close(M[0].flatten(), solution[: 2 * N], rtol=1e-5, atol=1e-6)
    error = float((output - both @ solution).square().sum())
    assert float(left[0]) == pytest.approx(error, rel=1e-5)


def test_channels_without_a_signal_keep_their_skip_connection():
    energy = torch.tensor([0.0, 2.0], dtype=torch.float64)
    lost = torch.tensor([0.0, 3.0], dtype=torch.float64)
    assert skip_update(lost, energy).tolist() == [0.0, 1.5]
    gram = torch.eye(2, dtype=torch.float64)
    skip = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert without_skip(gram, skip, energy).tolist() == [[0.5, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 10.0])
def test_weight_update_is_ridge_regression(ridge):
    x, error = normal(30, 5), normal(30, 3, seed=1)
    update = ridge_update(x.T @ x, error.T @ x, ridge)
    # as ordinary least squares: one more row for each input, with target zero
    strength = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, strength * torch.eye(5, dtype=torch.float64)])
    targets = torch.cat([error, torch.zeros(5, 3, dtype=torch.float64)])
    torch.testing.assert_close(update, torch.linalg.lstsq(rows, targets).solution.T)


def test_weight_of_silent_inputs_stays():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert ridge_update(zero, zero[:2], 1e-2).tolist() == [[0.0] * 3] * 2


# -- gradient steps ----------------------------------------------------------------------


@pytest.fixture
def problem():
    """A weight, inputs in three batches, the output it should have, and the loss of a batch."""
    weight = nn.Parameter(normal(3, 4).float(), requires_grad=False)
    x = normal(3, 10, 4, seed=1).float()
    targets = x @ (weight.detach() + 0.1 * normal(3, 4, seed=2).float()).T

    def loss(i):
        return (targets[i] - x[i] @ weight.T).square().mean()

    return weight, loss


def mean_loss(loss):
    with torch.no_grad():
        return sum(float(loss(i)) for i in range(3)) / 3


@pytest.mark.parametrize("grad", [False, True])
def test_reconstruction_lowers_the_loss(problem, grad):
    weight, loss = problem
    weight.requires_grad_(grad)
    before = mean_loss(loss)
    with torch.no_grad():  # as compress() calls it
        reconstruct([(weight, None)], loss, 3, 200, learning_rate=1e-2)
    assert mean_loss(loss) < 0.1 * before
    assert weight.requires_grad is grad
    assert weight.grad is None


def test_masked_entries_stay_as_they_are(problem):
    weight, loss = problem
    old = weight.detach().clone()
    mask = torch.tensor([True, False, True])[:, None]
    reconstruct([(weight, mask)], loss, 3, 5)
    assert torch.equal(weight[1], old[1])
    assert (weight[[0, 2]] != old[[0, 2]]).all()


def test_small_steps_add_up_in_half_precision(problem):
    """Of 1e-3 alone, bfloat16 weights of order 1 would not move."""
    weight, _ = problem
    half = torch.nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    before = half.detach().clone()
    reconstruct([(half, None)], lambda i: (half.float() - 3).square().mean(), 1, 100, 1e-3)
    moved = (half - before).float().abs()
    assert half.dtype == torch.bfloat16
    assert float(moved.mean()) == pytest.approx(0.05, rel=0.3)  # half of 100 steps, by the cosine


def test_nothing_to_do(problem):
    weight, loss = problem
    old = weight.detach().clone()
    reconstruct([], loss, 3, 5)
    reconstruct([(weight, None)], loss, 3, 0)
    assert torch.equal(weight, old)
    assert not weight.requires_grad


def test_batches_take_turns(problem):
    weight, loss = problem
    seen = []
    reconstruct([(weight, None)], lambda i: (seen.append(i), loss(i))[1], 3, 7)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def regressions(samples, noise, seed=0):
    """Two draws of one linear law from 6 inputs to 2 outputs."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.randn(2, 6, generator=generator)
    pair = []
    for count in (samples, 400):
        x = torch.randn(count, 6, generator=generator)
        error = x @ law.T + noise * torch.randn(count, 2, generator=generator)
        pair.append((x, error, Regression(torch.zeros(2, 6))))
        pair[-1][2].add(x.view(-1, 2, 6), error.view(-1, 2, 2))
    return pair


def test_the_gain_of_a_change_is_the_squared_error_it_takes_away():
    (x, error, sums), (_, _, others) = regressions(40, noise=0.5)
    change = sums.solve(1e-2)
    left = (error - x @ change.T.float()).square().sum()
    assert sums.gain(change) == pytest.approx(float(error.square().sum() - left), rel=1e-4)
    both = sums + others
    torch.testing.assert_close(both.gram, sums.gram + others.gram)
    torch.testing.assert_close(both.cross, sums.cross + others.cross)


def test_noise_and_little_data_ask_for_a_stronger_ridge():
    plenty, held = (r[2] for r in regressions(400, noise=0.01))
    assert best_ridge(plenty, held, RIDGES) == min(RIDGES)
    scarce, held = (r[2] for r in regressions(8, noise=3.0))
    chosen = best_ridge(scarce, held, RIDGES)
    assert chosen is None or chosen > min(RIDGES)


def test_a_fit_that_helps_nobody_else_is_not_taken():
    fitted, held = (r[2] for r in regressions(40, noise=0.1))
    opposite = Regression(torch.zeros(2, 6))
    opposite.gram, opposite.cross = held.gram, -held.cross
    assert best_ridge(fitted, opposite, RIDGES) is None
