"""What ADMM keeps between steps: Triton's kernels against plain torch, and the whole of ALPS."""

from importlib import import_module

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import CUDA, DEVICE, INTERPRETER, kernels_run

from sparsessm_plugin.backends.precision import add_half_product
from sparsessm_plugin.selection.masks import choose_mask
from sparsessm_plugin.solvers.alternation import UNIT_OF_PULL, AlternationInTorch, half_sum


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@kernels_run
@settings(
    max_examples=60 if CUDA else 10,
    derandomize=True,
    phases=[Phase.generate] if INTERPRETER else list(Phase),
)
@given(
    problems=st.integers(1, 2),
    out=st.integers(1, 40),
    groups=st.integers(1, 12),
    rule=st.sampled_from([(0.5, "0:0"), (0.83, "0:0"), (0.5, "2:4"), (1 / 3, "1:3"), (0.5, "4:8")]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_triton_takes_sums_apart_as_torch_does(problems, out, groups, rule, masked, seed):
    size = max(int(rule[1][2:]), 3) * groups
    weight = normal(problems, out, size, seed=seed)
    keep = normal(problems, out, size, seed=seed + 1) > -1 if masked else None
    expected = AlternationInTorch(weight, *rule, keep)
    kernels = import_module("sparsessm_plugin.solvers.alternation_gpu")
    on_gpu = [weight.to(DEVICE), *rule, None if keep is None else keep.to(DEVICE)]
    found = kernels.AlternationOnGPU(*on_gpu)
    total, scale = weight, 0.0
    for step in range(6):
        reference = expected.split(scale)
        parts = found.split(scale)
        # the second is stored in half precision, which keeps 11 bits
        base, rest = parts[0].cpu(), parts[1].cpu().float() / found.unit
        assert parts[1].dtype == torch.float16
        wrong = [
            ~torch.isclose(base, reference[0], atol=1e-6),
            ~torch.isclose(rest, reference[1], rtol=2.0**-11, atol=1e-5),
        ]
        # A threshold that is interpolated between counts may be off by a few entries: a GPU
        # rounds the values that it counts at otherwise (exp2, fused multiply-adds).
        assert int((wrong[0] | wrong[1]).sum()) <= (4 if rule[1] == "0:0" else 0), step
        # as a product does: what was given is overwritten
        total = reference[0] + 0.1 * normal(*weight.shape, seed=seed + 2 + step) / (1 + step)
        scale = 0.8
        expected.project(total)
        found.project(parts[0].copy_(total))
        if step % 2:
            kept = int(choose_mask(total.abs(), *rule, keep=keep).sum())
            assert abs(found.changed() - expected.changed()) * max(kept, 1) <= 8
    for a, b in zip(found.result(), expected.result(), strict=True):
        assert torch.equal(a.cpu(), b)


@kernels_run
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_triton_keeps_a_step_of_any_size_within_half_precision(scale):
    """A whole step, ``W' + U``, against float64: nothing over- or underflows."""
    weight = normal(6, 32, seed=0)
    weight[0] *= 1e-4  # as rows are of very different size
    mixing = normal(32, 32, seed=1)
    H = mixing @ mixing.T + torch.eye(32)
    pull = torch.linalg.inv(H.double() + 0.1 * torch.eye(32)) * 0.1
    kernels = import_module("sparsessm_plugin.solvers.alternation_gpu")
    state = kernels.AlternationOnGPU((weight * scale).to(DEVICE), 0.5, "0:0", None)
    base, rest = state.split(0.0)
    half = half_sum(pull.float()[None].to(DEVICE), torch.ones(1, device=DEVICE))
    total = add_half_product(base, rest, half, 1 / (state.unit * UNIT_OF_PULL)).cpu().double()
    sparse = weight * choose_mask(weight.abs(), 0.5)
    expected = weight.double() + (sparse - weight).double() @ pull
    rounded = (sparse - weight).double().abs() @ pull.abs()
    assert float(((total / scale - expected).abs() / (rounded + weight.abs())).max()) < 2.0**-10


@kernels_run
@pytest.mark.parametrize("shape", [(3, 5), (2, 40, 40)])
def test_triton_adds_up_matrices_in_one_pass(shape):
    matrices, weights = normal(7, *shape, seed=0), normal(7, seed=1)
    weights /= torch.tensordot(weights, matrices, 1).abs().max()
    found = half_sum(matrices.to(DEVICE), weights.to(DEVICE)).cpu()
    expected = torch.tensordot(weights, matrices, 1)
    torch.testing.assert_close(found.float() / UNIT_OF_PULL, expected, rtol=2.0**-10, atol=1e-6)
