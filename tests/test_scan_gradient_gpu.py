"""The Triton gradient of the scan against the reference's: on a GPU, or in Triton's interpreter.

As in ``test_scan_gpu``, the interpreter needs a process of its own.
"""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import SCAN_LEAVES, random_quantities, scan_gradients

from sparsessm_plugin.recurrence import differentiable, reference
from sparsessm_plugin.recurrence.quantities import GroupedQuantities, MixerQuantities

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"

kernels_run = pytest.mark.skipif(
    not (CUDA or INTERPRETER), reason="no CUDA device; run in the interpreter by another test"
)


def test_in_tritons_interpreter():
    if CUDA or INTERPRETER:
        pytest.skip("the tests run here")
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 has no loops with NumPy 2.4")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=os.path.dirname(__file__),
    )


def kernels():
    return import_module("sparsessm_plugin.recurrence.gpu_gradient")


def on_device(q):
    moved = {k: v.to(DEVICE) for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    return kernels().scan(type(q)(**moved)).cpu()


def check(q, tolerance=2e-5):
    expected = scan_gradients(reference.scan, q, torch.float64)
    for name, value in scan_gradients(on_device, q).items():
        assert value.dtype == torch.float32
        error = (value.double() - expected[name]).abs().max()
        assert error <= tolerance * expected[name].abs().max(), name  # both 0 after one step


# one step; a chunk, less and more; many of them; several blocks of channels
@kernels_run
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(1, 1, 1, 1), (2, 15, 3, 2), (1, 16, 33, 3), (1, 35, 2, 5)]
    + ([(3, 700, 130, 16), (2, 100, 70, 64), (1, 40, 33, 300)] if CUDA else []),
)
def test_gradients(batch, length, channels, states):
    check(random_quantities(batch, length, channels, states))


@kernels_run
def test_slow_states_hand_back_over_many_chunks():
    """Every gradient feels steps in all chunks."""
    q = random_quantities(1, 67, 3, 2)
    q.A, q.dt = q.A * 0.01, q.dt * 3
    check(q)


@kernels_run
def test_states_that_forget_at_once():
    q = random_quantities(1, 34, 3, 2)
    q.A[1:2] = -torch.tensor(38.0).exp()
    result = scan_gradients(on_device, q)
    assert all(torch.isfinite(value).all() for value in result.values())
    assert result["A"][1:2].abs().max() < 1e-30
    check(q)


@kernels_run
def test_half_precision_comes_in_and_its_gradients_leave():
    q = random_quantities(1, 20, 5, 3)
    half = {name: getattr(q, name).bfloat16().float() for name in ("u", "B", "C")}
    exact = MixerQuantities(**{**vars(q), **half})
    expected = scan_gradients(on_device, exact)
    leaves = {
        name: getattr(exact, name)
        .to(DEVICE, torch.bfloat16 if name in half else torch.float32)
        .requires_grad_(True)
        for name in SCAN_LEAVES
    }
    y = kernels().scan(MixerQuantities(**leaves, z=exact.z))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weights.to(DEVICE)).sum().backward()
    for name, leaf in leaves.items():
        rounded = 2**-8 if name in half else 1e-6
        error = (leaf.grad.cpu().float() - expected[name]).abs().max()
        assert leaf.grad.dtype == leaf.dtype
        assert error <= rounded * expected[name].abs().max(), name


@kernels_run
def test_the_same_bits_every_time():
    q = random_quantities(2, 17, 33, 1)
    once, again = scan_gradients(on_device, q), scan_gradients(on_device, q)
    assert all(torch.equal(again[name], value) for name, value in once.items())


@kernels_run
def test_what_they_have_no_code_for():
    q = random_quantities(1, 3, 2, 2)
    assert kernels().takes(q)
    double = MixerQuantities(**{name: getattr(q, name).double() for name in SCAN_LEAVES}, z=q.z)
    assert not kernels().takes(double)
    grouped = GroupedQuantities(**vars(q))
    assert not kernels().takes(grouped)
    assert not kernels().takes(random_quantities(1, 2, 1, kernels().MOST_STATES + 1))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_differentiable_scan_takes_them(monkeypatch):
    calls = []
    monkeypatch.setattr(differentiable.kernels, "available", lambda q: False)
    own = kernels().scan
    monkeypatch.setattr(kernels(), "scan", lambda q: calls.append(1) or own(q))
    q = random_quantities(1, 20, 5, 3)
    moved = {k: v.cuda() for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    differentiable.scan(MixerQuantities(**moved))
    assert calls
