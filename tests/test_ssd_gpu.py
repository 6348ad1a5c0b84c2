"""Triton's scan of the Mamba-2 layout and its gradient: on a GPU, or in Triton's interpreter.

As in ``test_scan_gpu``, the interpreter needs a process of its own.
"""

import re
import warnings
from importlib import import_module

import pytest
import torch
from conftest import SCAN_LEAVES, Guarded, random_heads, scan_gradients
from interpreter import CUDA, DEVICE, INTERPRETER, compiled_for_hopper, kernels_run
from torch.utils.checkpoint import checkpoint

from sparsessm_plugin.errors import SparseSSMWarning
from sparsessm_plugin.recurrence import differentiable, ssd

KERNELS = ("_end_chunks", "_hand_on", "_outputs", "_gradients")


def kernels():
    return import_module("sparsessm_plugin.recurrence.ssd_gpu")


def on_device(q):
    moved = {k: v.to(DEVICE) for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    return kernels().scan(type(q)(**moved)).cpu()


def check(q, tolerance=2e-5):
    expected = scan_gradients(lambda q: ssd.scan(q, chunk=1), q, torch.float64)
    for name, value in scan_gradients(on_device, q).items():
        assert value.dtype == torch.float32
        error = (value.double() - expected[name]).abs().max()
        assert error <= tolerance * expected[name].abs().max(), name  # both 0 after one step


# one step; a chunk, less and more; groups; several tiles of states; sides longer than 16
@kernels_run
@pytest.mark.parametrize(
    ("batch", "length", "shape"),
    [
        (1, 1, {"groups": 1, "per_group": 1, "P": 1, "N": 1}),
        (2, 64, {"groups": 1, "per_group": 2}),
        (1, 130, {"groups": 2, "per_group": 3, "P": 17, "N": 70}),
        (2, 150, {"groups": 3, "per_group": 1, "P": 32, "N": 16}),
    ],
)
def test_gradients(batch, length, shape):
    check(random_heads(batch, length, **shape))


# what removal leaves: heads and states of any size, and a last chunk that is not full
@kernels_run
@pytest.mark.parametrize(
    ("length", "shape"),
    [
        (66, {"groups": 1, "per_group": 2, "P": 16, "N": 64}),
        (64, {"groups": 2, "per_group": 2, "P": 8, "N": 48}),
        (65, {"groups": 1, "per_group": 1, "P": 24, "N": 16}),
        (63, {"groups": 2, "per_group": 1, "P": 48, "N": 12}),
        (67, {"groups": 1, "per_group": 1, "P": 54, "N": 65}),
    ],
)
def test_nothing_is_touched_outside_of_the_tensors(length, shape, monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(kernels(), name, Guarded(getattr(kernels(), name)))
    check(random_heads(2, length, **shape))


def products(name, channels, states):
    """Columns of the tensor cores' products of a kernel, as compiled for Hopper."""
    pytest.importorskip("triton")
    kernel = getattr(kernels(), name)
    block_p, block_n = kernels()._blocks(channels, states)
    fixed = {"STEPS": kernels().STEPS, "BLOCK_P": block_p, "BLOCK_N": block_n}
    fixed |= {"PRECISION": "tf32", "C_SIDE": False}
    types = dict.fromkeys((*kernels()._SIZES, "channels", "states"), "i32") | {"logarithm": "*fp64"}
    multiples = [name for name, n in (("channels", channels), ("states", states)) if n % 16 == 0]
    options = {"num_warps": kernels()._WARPS, "num_stages": 1}
    compiled = compiled_for_hopper(kernel, types, fixed, multiples, **options)
    return [int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k8", compiled.asm["ptx"])]


@pytest.mark.skipif(INTERPRETER, reason="nothing is compiled")
@pytest.mark.parametrize("shape", [(16, 64), (5, 3)])
def test_no_product_reads_past_its_tile_on_hopper(shape, tmp_path, monkeypatch):
    """Of 8 columns it does: see ``_SHORTEST``."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    columns = [n for name in ("_outputs", "_gradients") for n in products(name, *shape)]
    assert columns
    assert min(columns) >= 16


@kernels_run
def test_slow_states_hand_on_and_back_over_many_chunks():
    q = random_heads(1, 300, groups=1)
    q.A = q.A * 0.01
    check(q)


@kernels_run
def test_steps_that_forget_everything():
    """Logarithms of which float32 would hold no small steps."""
    q = random_heads(1, 100)
    q.dt[:, 20] = 1e9
    check(q)


@kernels_run
def test_half_precision_comes_in_and_its_gradients_leave():
    q = random_heads(1, 70)
    half = {name: getattr(q, name).bfloat16().float() for name in ("u", "B", "C")}
    exact = type(q)(**{**vars(q), **half})
    expected = scan_gradients(on_device, exact)
    leaves = {
        name: getattr(exact, name)
        .to(DEVICE, torch.bfloat16 if name in half else torch.float32)
        .requires_grad_(True)
        for name in SCAN_LEAVES
    }
    y = kernels().scan(type(q)(**leaves, z=exact.z))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weights.to(DEVICE)).sum().backward()
    for name, leaf in leaves.items():
        rounded = 2**-7 if name in half else 1e-6
        error = (leaf.grad.cpu().float() - expected[name]).abs().max()
        assert leaf.grad.dtype == leaf.dtype
        assert error <= rounded * expected[name].abs().max(), name


@kernels_run
def test_the_same_bits_every_time():
    q = random_heads(1, 70)
    once, again = scan_gradients(on_device, q), scan_gradients(on_device, q)
    assert all(torch.equal(again[name], value) for name, value in once.items())


@kernels_run
def test_what_they_have_no_code_for():
    q = random_heads(1, 3)
    assert kernels().takes(q)
    assert not kernels().takes(type(q)(**{**vars(q), "u": q.u.double()}))
    assert not kernels().takes(random_heads(1, 2, 1, 1, P=kernels().MOST_CHANNELS + 1))


@kernels_run
def test_kernels_that_compute_something_else_are_not_used(monkeypatch):
    q = random_heads(1, 3)
    kernels()._usable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = {k: v.to(DEVICE) for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
        assert kernels().usable(type(q)(**moved))
    kernels()._usable.cache_clear()
    monkeypatch.setattr(kernels(), "scan", lambda q: 1.1 * ssd.scan(q))
    with pytest.warns(SparseSSMWarning, match="from plain torch, relative"):
        assert not kernels().usable(type(q)(**moved))
    kernels()._usable.cache_clear()


@kernels_run
@pytest.mark.parametrize("inference", [False, True])
def test_whoever_asks_first_gets_the_same_answer(inference):
    """A layer in inference mode; one that is checkpointed, in which its own tensors count only."""
    own = random_heads(1, 70)
    moved = {k: v.to(DEVICE) for k, v in vars(own).items() if isinstance(v, torch.Tensor)}

    def layer(u):
        q = type(own)(**{**moved, "u": u})
        return kernels().scan(q) if kernels().usable(q) else torch.full_like(u, torch.nan)

    u = moved["u"].clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(kernels().scan(type(own)(**{**moved, "u": u})).sum(), u)
    kernels()._usable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.inference_mode(inference):
            if inference:
                layer(u.detach())
        found = checkpoint(layer, u, use_reentrant=False)
        found.sum().backward()
    assert torch.equal(u.grad, expected)


@kernels_run
def test_a_gpu_that_kernels_have_lost_is_no_reason_for_plain_torch(monkeypatch):
    def fail(q):
        raise RuntimeError("an illegal memory access was encountered\nSearch for")

    q = random_heads(1, 3)
    moved = {k: v.to(DEVICE) for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    monkeypatch.setattr(kernels(), "scan", fail)
    monkeypatch.setattr(kernels(), "answers", lambda device: False)
    kernels()._usable.cache_clear()
    with pytest.raises(RuntimeError, match=r"can no longer use .*: an illegal memory access.*\Z"):
        kernels().usable(type(q)(**moved))
    kernels()._usable.cache_clear()


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_differentiable_scan_takes_them(monkeypatch):
    calls = []
    own = kernels().scan
    monkeypatch.setattr(kernels(), "scan", lambda q: calls.append(1) or own(q))
    q = random_heads(1, 20)
    moved = {k: v.cuda() for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    differentiable.scan(type(q)(**moved))
    assert calls
