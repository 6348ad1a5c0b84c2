"""The solvers' kernels against plain torch: numba, and Triton on a GPU or in its interpreter."""

from importlib import import_module

import pytest
import torch
from conftest import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import CUDA, DEVICE, kernels_run

from sparsessm_plugin.backends import precision
from sparsessm_plugin.backends.precision import Factor, split_tf32, tf32
from sparsessm_plugin.selection.masks import keep_largest, keep_largest_of_each
from sparsessm_plugin.solvers.kernels import sweep, sweep_reference
from sparsessm_plugin.solvers.objective import (
    damped_inverse_cholesky,
    dense_target,
    gram,
    objective,
    relative_error,
    row_errors,
    window_gram,
)
from sparsessm_plugin.solvers.sparsegpt import sparsegpt
from sparsessm_plugin.solvers.wanda import wanda

CPU, GPU = "sparsessm_plugin.solvers.cpu", "sparsessm_plugin.solvers.gpu"


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


@settings(max_examples=60, derandomize=True)
@given(out=st.integers(1, 150), **SHAPES)
def test_numba(out, **shape):
    check_backend(CPU, "cpu", out, **shape)


@kernels_run
@settings(max_examples=60 if CUDA else 12, derandomize=True)
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


@settings(max_examples=40)
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
        expected[scores.cpu().argsort(stable=True)[size - count :]] = True
        assert torch.equal(keep_largest(scores, count).cpu(), expected)
    together = keep_largest_of_each(scores.expand(3, -1), torch.tensor(counts, device=DEVICE))
    assert torch.equal(together, torch.stack([keep_largest(scores, c) for c in counts]))


# -- sums of products ----------------------------------------------------------------------


@settings(max_examples=60, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    kernel=st.integers(1, 5),
    own=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gram_of_windows(batch, length, kernel, own, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, length, 3, generator=generator, dtype=torch.float64)
    right = left if own else torch.randn(left.shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, length, generator=generator) > 0.3 if padded else None
    a, b = (
        torch.nn.functional.pad(x, (0, 0, kernel - 1, 0)).unfold(1, kernel, 1)
        for x in (left, right)
    )
    counted = torch.ones(batch, length) if mask is None else mask
    expected = torch.einsum("btdi,btdj,bt->dij", a, b, counted.double())
    torch.testing.assert_close(window_gram(left, right, kernel, mask), expected)


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "kernel", "own", "padded"),
    [(1, 4, False, False), (17, 4, False, True), (35, 3, True, False), (7, 1, False, True)],
)
def test_triton_sums_products_of_windows(length, kernel, own, padded, dtype, monkeypatch):
    gpu = import_module(GPU)
    monkeypatch.setattr(gpu, "_STEPS", 16)
    monkeypatch.setattr(gpu, "_window_products", Guarded(gpu._window_products))
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, length, 2, 130, generator=generator).to(DEVICE, dtype)
    left, right = both.unbind(2)  # views
    right = left if own else right
    mask = (torch.rand(2, length, generator=generator) > 0.3).to(DEVICE) if padded else None
    found = gpu.window_products(left, right, kernel, mask)
    mask = None if mask is None else mask.cpu()
    expected = window_gram(left.double().cpu(), right.double().cpu(), kernel, mask)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)


def to_tf32(x, nearest):
    """Keep 10 bits of mantissa, as tensor cores read float32."""
    bits = x.float().view(torch.int32) + (1 << 12 if nearest else 0)
    return (bits & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_tf32_changes_the_error_of_what_is_pruned_by_less_than_a_thousandth(nearest, decay):
    """The reconstruction error that sums of rounded inputs give against the true one."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(128, 128, generator=generator)
    mixing *= torch.arange(1, 129).pow(-decay / 2) * 2
    x = torch.randn(2000, 128, generator=generator) @ mixing.T
    x += torch.randn(128, generator=generator)  # activations have a mean
    weight = torch.randn(64, 128, generator=generator)
    exact = gram(x, x)
    rounded = to_tf32(x, nearest)
    rounded = (rounded.double().T @ rounded.double()).float()
    for sparsity in (0.5, 0.8):
        pruned = sparsegpt(weight, exact, sparsity).weight
        seen = float(objective(weight, pruned, rounded))
        assert seen == pytest.approx(float(objective(weight, pruned, exact)), rel=1e-3)
        # what is pruned with the rounded sums is no worse by the true ones
        other = sparsegpt(weight, rounded, sparsity).weight
        found, best = (float(objective(weight, w, exact)) for w in (other, pruned))
        assert found == pytest.approx(best, rel=5e-3)


def test_sums_on_tensor_cores_leave_the_settings_alone():
    before = torch.backends.cuda.matmul.fp32_precision
    with tf32():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
    with pytest.raises(ValueError, match="stop"), tf32():
        raise ValueError("stop")
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_products_in_three_parts_are_as_exact_as_float32():
    """The split itself, with products as tensor cores take them."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 64, generator=generator) for _ in range(2))
    (xh, xl), (yh, yl) = split_tf32(x), split_tf32(y)
    for part in (xh, yh):
        assert torch.equal(to_tf32(part, False), part)
    assert torch.equal(xh + xl, x)
    parts = [(xl, yh), (xh, yl), (xh, yh)]
    found = sum(to_tf32(a, False).double() @ to_tf32(b, False).double() for a, b in parts)
    scale = x.abs().double() @ y.abs().double()
    assert float(((found - x.double() @ y.double()).abs() / scale).max()) < 2.0**-20


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_products_on_tensor_cores():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 2000, generator=generator).cuda() for _ in range(2))
    scale = (x.abs() @ y.abs().T).double()
    exact = x.double() @ y.double().T
    assert float(((Factor(y.T).after(x) - exact).abs() / scale).max()) < 1e-6
    assert float(((gram(x.T, y.T) - exact).abs() / scale).max()) < 1e-3
    x, y = x.view(3, 100, 2000), y.view(3, 100, 2000)
    batched = Factor(y.mT).after(x)
    for i in range(3):
        block = (slice(100 * i, 100 * i + 100),) * 2
        assert float(((batched[i] - exact[block]).abs() / scale[block]).max()) < 1e-6


@pytest.fixture
def as_tensor_cores(monkeypatch):
    """Split products, of what tensor cores read."""
    if CUDA:
        return

    def parts(x):
        high, low = split_tf32(x)
        return high, to_tf32(low, False)

    monkeypatch.setattr(precision, "_splits", lambda matrix: matrix.dtype == torch.float32)
    monkeypatch.setattr(precision, "split_tf32", parts)


def hard_problem(n=256, rows=96, share=0.999):
    """A weight and a Hessian with so much of its trace in one direction."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) * 0.1
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(n))
    hessian = x.T @ x
    loud = torch.rand(n, generator=generator, dtype=torch.float64)
    loud *= (hessian.trace() * share / (1 - share)).sqrt() / loud.norm()
    hessian += loud[:, None] * loud
    return torch.randn(rows, n, generator=generator), hessian.float()


def exact_row_errors(weight, pruned, hessian):
    change = weight.double() - pruned.double()
    return ((change @ hessian.double()) * change).sum(-1)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_errors_by_split_products_are_those_of_float64(leading, as_tensor_cores):
    """Though one direction, which the solver leaves nothing in, holds all but a thousandth."""
    weight, hessian = (x.expand(*leading, -1, -1).to(DEVICE) for x in hard_problem())
    random = weight * (torch.arange(weight.shape[-1], device=DEVICE) % 2)
    pruned = sparsegpt(weight, hessian, 0.5).weight
    exact = exact_row_errors(weight, pruned, hessian)
    assert exact.sum() < 2e-3 * exact_row_errors(weight, random, hessian).sum()
    found = row_errors(weight, pruned, hessian)
    assert found.dtype == torch.float64
    assert not torch.equal(found, exact)  # they were split
    torch.testing.assert_close(found, exact, rtol=3e-3, atol=0)
    torch.testing.assert_close(
        objective(weight, pruned, hessian).sum(), exact.sum(), rtol=5e-4, atol=0
    )
    energy = exact_row_errors(weight, torch.zeros_like(weight), hessian).sum()
    share = relative_error(weight, pruned, hessian)
    assert share == pytest.approx(float(exact.sum() / energy), rel=5e-4)
    half = exact_row_errors(weight.bfloat16(), random.bfloat16(), hessian)
    found = row_errors(weight.bfloat16(), random.bfloat16(), hessian)
    torch.testing.assert_close(found.sum(), half.sum(), rtol=1e-5, atol=0)


def test_errors_of_float64_are_never_split(as_tensor_cores):
    weight, hessian = (x.to(DEVICE) for x in hard_problem(32, 4))
    pruned = weight.round()
    exact = exact_row_errors(weight, pruned, hessian)
    for i in range(3):
        tensors = [weight, pruned, hessian]
        tensors[i] = tensors[i].double()
        assert torch.equal(row_errors(*tensors), exact)


def test_a_relative_error_splits_the_hessian_once(as_tensor_cores, monkeypatch):
    made = []

    class Counted(Factor):
        def __init__(self, matrix):
            made.append(matrix)
            super().__init__(matrix)

    monkeypatch.setattr("sparsessm_plugin.solvers.objective.Factor", Counted)
    weight, hessian = (x.to(DEVICE) for x in hard_problem(32, 4))
    relative_error(weight, weight.round(), hessian)
    assert len(made) == 1


@pytest.mark.parametrize("spread", [1e3, 1e6])
@pytest.mark.parametrize("dampening", [0.0, 0.01])
def test_dense_target_by_split_products(spread, dampening, as_tensor_cores):
    """Its output, beside that in float64, with a Hessian of such a condition."""
    generator = torch.Generator().manual_seed(0)
    n = 256
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    sizes = spread ** -(torch.arange(n) / (2 * n - 2)).double()
    now = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * sizes @ turn.T
    noise = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * sizes @ turn.T
    gram_now, cross = ((x.T @ now).float().to(DEVICE) for x in (now, now + 0.1 * noise))
    weight = torch.randn(48, n, generator=generator).to(DEVICE)
    inverse = damped_inverse_cholesky(gram_now, dampening)
    found = dense_target(weight, gram_now, cross, inverse)
    exact = dense_target(weight.double(), gram_now, cross, inverse)
    assert found.dtype == torch.float32
    assert exact.dtype == torch.float64
    wrong = exact_row_errors(exact, found, gram_now).sum()
    moved = exact_row_errors(exact, weight, gram_now).sum()
    assert float((wrong / moved).sqrt()) < 3e-4
    assert not torch.equal(found, exact.float())  # they were split


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_wanda_on_a_gpu_keeps_what_it_keeps_on_a_cpu(structure):
    """But for scores that float32 takes for equal."""
    weight, hessian = hard_problem(512, 300)
    expected = wanda(weight, hessian, 0.6, structure)
    found = wanda(weight.cuda(), hessian.cuda(), 0.6, structure)
    assert torch.equal(found.mask.sum(1).cpu(), expected.mask.sum(1))
    assert float((found.mask.cpu() ^ expected.mask).double().mean()) < 1e-4
    assert found.error == pytest.approx(expected.error, rel=1e-3)
