"""The solvers' kernels against plain torch: numba, and Triton on a GPU or in its interpreter."""

import os
import subprocess
import sys
from importlib import import_module, util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin.solvers.kernels import sweep, sweep_reference
from sparsessm_plugin.solvers.masks import keep_largest, keep_largest_of_each

CPU, GPU = "sparsessm_plugin.solvers.cpu", "sparsessm_plugin.solvers.gpu"
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"

kernels_run = pytest.mark.skipif(
    not (CUDA or INTERPRETER), reason="no CUDA device; run in the interpreter by another test"
)


def test_in_tritons_interpreter():
    if CUDA or INTERPRETER:
        pytest.skip("the tests run here")
    if util.find_spec("triton") is None:
        pytest.skip("no Triton")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=os.path.dirname(__file__),
    )


def compare(name, device, problems, shared, size, out, start, stop, group, dtype, seed):
    """A backend against the reference: the mask to the bit, the rest up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(problems, size, out, generator=generator, dtype=torch.float64)
    factor = torch.randn(1 if shared else problems, size, size, generator=generator)
    factor = (0.3 * factor).triu(1).double() + torch.diag_embed(0.5 + factor.diagonal(0, 1, 2) ** 2)
    kept = torch.rand(problems, size, out, generator=generator) > 0.4
    zeros = torch.randint(0, group + 1, (problems,), generator=generator).int()
    expected, mask = weight.clone(), kept.clone()
    lost = sweep_reference(expected, mask, factor, start, stop, group, zeros)
    w, k, U = weight.to(device, dtype), kept.to(device), factor.to(device, dtype)
    errors = torch.full_like(lost, torch.nan, dtype=dtype, device=device)
    import_module(name).sweep(w, k, U, errors, start, stop, group, zeros.to(device))
    assert torch.equal(k.cpu(), mask)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    tolerance = tolerance or {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(w.cpu().double(), expected, **tolerance)
    torch.testing.assert_close(errors.cpu().double(), lost, **tolerance)
    assert not w[:, start:stop][~k[:, start:stop]].any()
    for part in (slice(0, start), slice(stop, size)):
        assert torch.equal(w[:, part].cpu(), weight[:, part].to(dtype))


SHAPES = {
    "problems": st.integers(1, 3),
    "shared": st.booleans(),
    "group": st.sampled_from([0, 2, 4, 5]),
    "groups": st.integers(1, 3),
    "before": st.integers(0, 2),
    "after": st.integers(0, 5),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "seed": st.integers(0, 99),
}


def check_backend(name, device, out, problems, shared, group, groups, before, after, dtype, seed):
    unit = group or 3
    start, stop = before * unit, (before + groups) * unit
    compare(name, device, problems, shared, stop + after, out, start, stop, group, dtype, seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(out=st.integers(1, 150), **SHAPES)
def test_numba(out, **shape):
    check_backend(CPU, "cpu", out, **shape)


@kernels_run
@settings(max_examples=60 if CUDA else 12, deadline=None, derandomize=True)
@given(out=st.integers(1, 40), **SHAPES)
def test_triton(out, **shape):
    check_backend(GPU, DEVICE, out, **shape)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("group", [0, 4])
def test_triton_on_a_whole_block(group):
    compare(GPU, "cuda", 2, True, 300, 1000, 128, 256, group, torch.float64, 0)


@pytest.mark.parametrize("group", [0, 3])
def test_devices_without_a_backend_use_torch(monkeypatch, group):
    """As on a GPU without Triton."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    kept = torch.rand(2, 9, 5, generator=generator) > 0.5
    factor = torch.eye(9).double()[None] + torch.ones(9, 9).double().triu(1) / 9
    zeros = torch.tensor([1, 2], dtype=torch.int32)
    results = []
    for backends in ({"cpu": CPU}, {}):
        monkeypatch.setattr("sparsessm_plugin.solvers.kernels._BACKENDS", backends)
        w, k = weight.clone(), kept.clone()
        results.append((w, k, sweep(w, k, factor, 3, 9, group, zeros)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.equal(results[0][0], weight)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 300),
    share=st.floats(0, 1),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_largest_scores_are_those_of_a_stable_sort(size, share, ties, dtype, seed):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
    scores = (scores.round() if ties else scores).to(DEVICE, dtype)
    counts = [round(share * size), size // 2, 0]
    for count in counts:
        expected = torch.zeros(size, dtype=torch.bool)
        expected[scores.cpu().argsort(descending=True, stable=True)[:count]] = True
        assert torch.equal(keep_largest(scores, count).cpu(), expected)
    together = keep_largest_of_each(scores.expand(3, -1), counts)
    assert torch.equal(together, torch.stack([keep_largest(scores, c) for c in counts]))
