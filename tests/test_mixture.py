"""Rows of B and C as mixtures of the old ones: cases in which the answer is known."""

from itertools import pairwise

import pytest
import torch
from conftest import tiny_model

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods.outputs import dense_outputs, relative_error
from sparsessm_plugin.methods.removal import remove
from sparsessm_plugin.methods.state_fits import fit_D, mix_rows, write_rows
from sparsessm_plugin.methods.state_sums import gather, gather_mixtures, mixing_gram
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.refit.compensation import mix_C
from sparsessm_plugin.refit.mixture import MixtureProblem, best_mixture, fit_mixtures

R = 4  # time_step_rank of the tiny model
N = 8


@pytest.fixture
def adapter():
    adapter = find_mixers(tiny_model("mamba"))[0].float_clone()
    with torch.no_grad():
        # states 0 and 1 decay alike, so one state can hold what both did
        adapter.mixer.A_log[:, 1] = adapter.mixer.A_log[:, 0]
    return adapter


def inputs_of(adapter, padded=False):
    inputs = CalibrationInputs()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 256, adapter.sizes.hidden_size, generator=generator)
    mask = None
    if padded:
        mask = torch.ones(8, 256, dtype=torch.long)
        mask[:4, :100] = 0
    inputs.add(hidden, mask)
    return inputs


KEPT = torch.tensor([[0, 2, 3, 4, 5, 6, 7]])


def shrink(adapter, with_B):
    """Error that is left after state 1 has gone and the rest was fitted."""
    inputs = inputs_of(adapter)
    with torch.no_grad():
        targets = dense_outputs(adapter, inputs)
        small = remove(adapter, "state", [1])
        before = relative_error(small, inputs, targets)
        if with_B:
            rows = mix_rows(adapter, inputs, KEPT, with_D=False)
            write_rows(adapter, small, rows.B, rows.C)
        else:
            M, _ = mix_C(mixing_gram(gather(adapter, inputs, mixing=True), with_D=False), KEPT)
            write_rows(adapter, small, None, M[0])
        return before, relative_error(small, inputs, targets)


def test_C_takes_over_a_state_with_the_same_B(adapter):
    """h_1 = 2 h_0, so C_0 + 2 C_1 on state 0 says it all."""
    with torch.no_grad():
        adapter.mixer.x_proj.weight[R + 1] = 2 * adapter.mixer.x_proj.weight[R]
    before, after = shrink(adapter, with_B=False)
    assert before > 1e-4
    assert after < 1e-5 * before


def test_B_takes_over_a_state_with_the_same_C(adapter):
    """C_1 = 2 C_0, so a state driven by B_0 + 2 B_1 says it all; C alone cannot."""
    with torch.no_grad():
        rows = adapter.mixer.x_proj.weight
        rows[R + N + 1] = 2 * rows[R + N]
    before, after_C = shrink(adapter, with_B=False)
    _, after_B = shrink(adapter, with_B=True)
    # fitted in turn with C and with a little ridge, so not to the last digit
    assert after_B < 1e-3 * before
    assert after_C > 1e-2 * before


def test_fitting_B_never_hurts(adapter):
    _, after_C = shrink(adapter, with_B=False)
    _, after_B = shrink(adapter, with_B=True)
    assert after_B < after_C


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_D", [False, True])
def test_the_sums_give_the_error_that_the_new_rows_leave(adapter, padded, with_D):
    """cost * energy is the squared change of y, weighted, that a scan with the rows measures."""
    inputs = inputs_of(adapter, padded)
    with torch.no_grad():
        statistics = gather_mixtures(adapter, inputs)
        problem = statistics.problem(with_D)
        kept = torch.tensor([0, 3, 5])
        unit = torch.eye(N, dtype=torch.float64)[kept]
        P, Q, cost = fit_mixtures(problem.of(kept), unit, unit, rounds=3)
        small = remove(adapter, "state", [1, 2, 4, 6, 7])
        write_rows(adapter, small, P, Q)
        if with_D:
            fit_D(adapter, small, inputs)
        q, s = (a.quantities(*inputs.get(0, torch.device("cpu"))) for a in (adapter, small))
        weight = q.gate * adapter.out_norm
        error, whole = (scan(q) - scan(s)) * weight, (scan(q) - q.D * q.u) * weight
        every = int(statistics_step(q, inputs))
        error, whole = error[:, every - 1 :: every], whole[:, every - 1 :: every]
        if q.mask is not None:
            error, whole = (t[q.mask[:, every - 1 :: every]] for t in (error, whole))
    tolerance = 1e-3 if not with_D else 2e-2  # fit_D looks at every step
    measured = float(error.double().square().sum())
    assert measured == pytest.approx(cost * problem.energy, rel=tolerance)
    if not with_D:
        assert float(whole.double().square().sum()) == pytest.approx(problem.energy, rel=1e-4)


def statistics_step(q, inputs):
    """Steps from one look to the next, as the modifier takes them for so little text."""
    return max(1, min(16, inputs.tokens // 1024))


def random_problem(K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(400, K * N * N, generator=generator, dtype=torch.float64)
    y = features[:, :: K * N + 3].sum(1) + torch.randn(400, generator=generator).double()
    gram = (features.T @ features).view(K, N, N, K, N, N)
    cross = (features.T @ y).view(K, N, N)
    return features, y, MixtureProblem(gram, cross, float(y.square().sum()))


def test_each_half_round_is_least_squares():
    features, y, problem = random_problem(K=2)
    generator = torch.Generator().manual_seed(1)
    P, Q = torch.randn(2, 2, N, generator=generator, dtype=torch.float64)
    new_P, new_Q, cost = fit_mixtures(problem, P, Q, rounds=1, ridge=0.0)
    F = features.view(-1, 2, N, N)
    by_P = torch.einsum("tkji,kj->tki", F, P).flatten(1)
    expected = torch.linalg.lstsq(by_P, y[:, None]).solution[:, 0]
    torch.testing.assert_close(new_Q.flatten(), expected, rtol=1e-5, atol=1e-6)
    by_Q = torch.einsum("tkji,ki->tkj", F, new_Q).flatten(1)
    expected = torch.linalg.lstsq(by_Q, y[:, None]).solution[:, 0]
    torch.testing.assert_close(new_P.flatten(), expected, rtol=1e-5, atol=1e-6)
    left = (y - by_Q @ new_P.flatten()).square().sum()
    assert cost * problem.energy == pytest.approx(float(left), rel=1e-6)


def test_rounds_never_raise_the_cost():
    _, _, problem = random_problem(K=3)
    P = Q = torch.eye(N, dtype=torch.float64)[:3]
    costs = []
    for _ in range(8):
        P, Q, cost = fit_mixtures(problem, P, Q, rounds=1)
        costs.append(cost)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_the_cheapest_set_is_taken():
    _, _, problem = random_problem(K=N)
    candidates = torch.tensor([[0, 1], [2, 5], [4, 7], [3, 6]])
    kept, P, Q, cost = best_mixture(problem, candidates, rounds=4, tolerance=0.0)
    unit = torch.eye(N, dtype=torch.float64)
    alone = [fit_mixtures(problem.of(c), unit[c], unit[c], 4)[2] for c in candidates]
    assert cost == pytest.approx(min(alone))
    assert kept.tolist() == candidates[alone.index(min(alone))].tolist()
    assert P.shape == Q.shape == (2, N)


def test_expanded_states_reproduce_the_dense_ones(adapter):
    """With every state kept and rows as they are, every row is already the best one."""
    inputs = inputs_of(adapter)
    with torch.no_grad():
        rows = mix_rows(adapter, inputs, torch.arange(N)[None], with_D=True)
        same = adapter.float_clone()
        write_rows(adapter, same, rows.B, rows.C)
        assert relative_error(same, inputs, dense_outputs(adapter, inputs)) < 1e-6


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_few_tokens_do_not_drive_the_mixtures_to_any_size(tokens):
    """They are fitted exactly in a round or two; what is left to follow then is rounding."""
    adapter = find_mixers(tiny_model("mamba", hidden_size=128, state_size=16))[0].float_clone()
    inputs = CalibrationInputs()
    generator = torch.Generator().manual_seed(0)
    inputs.add(torch.randn(1, tokens, 128, generator=generator), None)
    with torch.no_grad():
        rows = mix_rows(adapter, inputs, torch.arange(0, 16, 2)[None], with_D=True)
    for mixture in (rows.B, rows.C):
        assert float(mixture.abs().max()) < 1e4
