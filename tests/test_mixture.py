"""Rows of B and C as mixtures of the old ones: cases in which the answer is known."""

import pytest
import torch
from conftest import tiny_model

from sparsessm_plugin.mixers import find_mixers
from sparsessm_plugin.modifiers.removal import (
    CalibrationInputs,
    dense_outputs,
    relative_error,
    remove,
)
from sparsessm_plugin.modifiers.state_removal import fit_C, fit_mixture, gather, mixing_gram
from sparsessm_plugin.solvers.compensation import fit_features

R = 4  # time_step_rank of the tiny model


@pytest.fixture
def adapter():
    adapter = find_mixers(tiny_model("mamba"))[0].float_clone()
    with torch.no_grad():
        # states 0 and 1 decay alike, so one state can hold what both did
        adapter.mixer.A_log[:, 1] = adapter.mixer.A_log[:, 0]
    return adapter


def inputs_of(adapter):
    inputs = CalibrationInputs()
    generator = torch.Generator().manual_seed(0)
    inputs.add(torch.randn(8, 256, adapter.sizes.hidden_size, generator=generator), None)
    return inputs


def shrink(adapter, with_B):
    """Error that is left after state 1 has gone and the rest was fitted."""
    inputs = inputs_of(adapter)
    with torch.no_grad():
        targets = dense_outputs(adapter, inputs)
        statistics = gather(adapter, inputs, mixing=True)
        small = remove(adapter, "state", [1])
        before = relative_error(small, inputs, targets)
        M_C = fit_C(adapter, small, mixing_gram(statistics, with_D=False), [1])
        if with_B:
            M_B = torch.eye(8, dtype=torch.float64)[[0, 2, 3, 4, 5, 6, 7]]
            fit_mixture(adapter, small, inputs, M_B, "B", with_D=False)
            fit_mixture(adapter, small, inputs, M_C, "C", with_D=False)
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
        rows[R + 8 + 1] = 2 * rows[R + 8]
    before, after_C = shrink(adapter, with_B=False)
    inputs = inputs_of(adapter)
    with torch.no_grad():
        targets = dense_outputs(adapter, inputs)
        small = remove(adapter, "state", [1])
        M = torch.eye(8, dtype=torch.float64)[[0, 2, 3, 4, 5, 6, 7]]
        M = fit_mixture(adapter, small, inputs, M, "B", with_D=False)
        after_B = relative_error(small, inputs, targets)
    torch.testing.assert_close(M[0, :2], torch.tensor([1.0, 2.0]).double(), rtol=1e-3, atol=1e-3)
    assert after_B < 1e-5 * before
    assert after_C > 1e-2 * before


def test_fitting_B_never_hurts(adapter):
    _, after_C = shrink(adapter, with_B=False)
    _, after_B = shrink(adapter, with_B=True)
    assert after_B < after_C


def test_expanded_states_reproduce_the_dense_ones(adapter):
    """With nothing removed and rows as they are, every row is already the best one."""
    inputs = inputs_of(adapter)
    with torch.no_grad():
        same = adapter.float_clone()
        unit = torch.eye(8, dtype=torch.float64)
        for which in ("B", "C"):
            M = fit_mixture(adapter, same, inputs, unit, which, with_D=True)
            torch.testing.assert_close(M, unit, rtol=1e-4, atol=1e-4)


def test_fit_features_is_least_squares():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    parts = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    both = torch.cat([features, parts], dim=1)
    M = fit_features(both.T @ both, torch.zeros(2, 3, dtype=torch.float64), ridge=0.0)
    expected = torch.linalg.lstsq(features, parts.sum(1, keepdim=True)).solution
    torch.testing.assert_close(M.flatten(), expected[:, 0], rtol=1e-5, atol=1e-7)
