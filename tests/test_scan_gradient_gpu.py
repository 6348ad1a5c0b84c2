"""The Triton gradient of the scan against the reference's: on a GPU, or in Triton's interpreter.

As in ``test_scan_gpu``, the interpreter needs a process of its own.
"""

from importlib import import_module

import pytest
import torch
from conftest import SCAN_LEAVES, Guarded, random_quantities, scan_gradients
from interpreter import CUDA, DEVICE, INTERPRETER, kernels_run

from sparsessm_plugin.recurrence import differentiable, reference
from sparsessm_plugin.recurrence.quantities import GroupedQuantities, MixerQuantities

LAUNCHED = {
    "backends.gpu": ("_convolve", "_softplus"),
    "backends.gpu_gradient": (
        "_convolve_back",
        "_correlate",
        "_softplus_back",
        "_norm",
        "_norm_back",
    ),
    "recurrence.gpu_gradient": ("_hand_over", "_hand_back", "_gradients"),
}


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """No kernel of these tests touches anything outside of its tensors."""
    for module, names in LAUNCHED.items() if CUDA or INTERPRETER else ():
        module = import_module(f"sparsessm_plugin.{module}")
        for name in names:
            monkeypatch.setattr(module, name, Guarded(getattr(module, name)))


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


def channel_kernels():
    return import_module("sparsessm_plugin.backends.gpu_gradient")


def apart(found, expected):
    scale = expected.abs().max()
    return float((found.cpu().double() - expected).abs().max() / scale) if scale else 0.0


def leaf(x, dtype=None):
    return x.detach().to(DEVICE if dtype is None else "cpu", dtype, copy=True).requires_grad_(True)


@kernels_run
@pytest.mark.parametrize(("length", "channels", "K"), [(1, 1, 4), (35, 3, 4), (40, 130, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_convolution(length, channels, K, masked):
    g = torch.Generator().manual_seed(0)
    both = torch.randn(2, length, 2 * channels, generator=g)
    weight, bias = torch.randn(channels, 1, K, generator=g), torch.randn(channels, generator=g)
    mask = (torch.rand(2, length, generator=g) > 0.3) if masked else None
    back = torch.randn(2, length, channels, generator=g)

    def run(convolve, dtype=None):
        leaves = [leaf(x, dtype) for x in (both, weight, bias)]
        x = leaves[0].chunk(2, dim=-1)[1]  # rows of a wider tensor
        y = convolve(x, *leaves[1:], None if mask is None else mask.to(x.device))
        (y * back.to(y)).sum().backward()
        return [y.detach(), *(x.grad for x in leaves)]

    def plain(x, weight, bias, mask):
        x = torch.nn.functional.conv1d(
            x.transpose(1, 2), weight, bias, padding=K - 1, groups=channels
        )[..., :length]
        x = torch.nn.functional.silu(x).transpose(1, 2)
        return x if mask is None else x * mask[..., None]

    expected = run(plain, torch.float64)
    for one, other in zip(run(channel_kernels().convolve), expected, strict=True):
        assert apart(one, other) < 2e-6


@kernels_run
@pytest.mark.parametrize(("length", "channels", "groups"), [(1, 1, 1), (19, 12, 2), (3, 300, 1)])
def test_gated_norm(length, channels, groups):
    g = torch.Generator().manual_seed(0)
    y, weight = torch.randn(2, length, channels, generator=g), torch.rand(channels, generator=g)
    both = torch.randn(2, length, 2 * channels, generator=g)
    back = torch.randn(2, length, channels, generator=g)

    def run(norm, dtype=None):
        leaves = [leaf(x, dtype) for x in (y, both, weight)]
        z = leaves[1].chunk(2, dim=-1)[1]  # rows of a wider tensor
        out = norm(leaves[0], z, leaves[2], groups, 1e-3, leaves[0].dtype)
        (out * back.to(out)).sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    def plain(y, z, weight, groups, epsilon, dtype):
        x = (y * torch.nn.functional.silu(z)).unflatten(-1, (groups, -1))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        return x.flatten(-2) * weight

    expected = run(plain, torch.float64)
    for one, other in zip(run(channel_kernels().gated_norm), expected, strict=True):
        assert apart(one, other) < 2e-6


@kernels_run
@pytest.mark.parametrize("with_bias", [False, True])
def test_softplus(with_bias):
    g = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(2, 35, 5, generator=g)
    x[0, :9] = torch.linspace(-30, 30, 9)[:, None]
    bias = torch.randn(5, generator=g) if with_bias else None

    def run(softplus, dtype=None):
        leaves = [leaf(t, dtype) for t in (x, bias) if t is not None]
        y = softplus(leaves[0], leaves[1] if with_bias else None)
        y.log().sum().backward()  # small outputs count as much as large ones
        return [y.detach().log(), *(x.grad for x in leaves)]

    def plain(x, bias):
        return torch.nn.functional.softplus(x if bias is None else x + bias)

    for one, other in zip(run(channel_kernels().softplus), run(plain, torch.float64), strict=True):
        assert apart(one, other) < 5e-6


@kernels_run
@pytest.mark.parametrize(("length", "channels"), [(1, 3), (20, 33)])
def test_the_gate_in_the_same_kernels(length, channels):
    q = random_quantities(1, length, channels, 2)
    wide = torch.randn(1, length, 2 * channels, generator=torch.Generator().manual_seed(3))
    back = torch.randn(q.u.shape, generator=torch.Generator().manual_seed(9))

    def run(scan, dtype=None):
        leaves = {name: leaf(getattr(q, name), dtype) for name in SCAN_LEAVES}
        both = leaf(wide, dtype)
        z = both.chunk(2, dim=-1)[1]
        y = scan(MixerQuantities(**leaves, z=z))
        (y * back.to(y)).sum().backward()
        return [y.detach(), both.grad, *(x.grad for x in leaves.values())]

    def plain(q):
        return reference.scan(q) * torch.nn.functional.silu(q.z)

    def ours(q):
        return kernels().gated_scan(q, torch.float32)

    for one, other in zip(run(ours), run(plain, torch.float64), strict=True):
        assert apart(one, other) < 2e-5


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
