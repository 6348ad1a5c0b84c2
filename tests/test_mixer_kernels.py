"""The mixers' kernels on the CPU against torch's own functions."""

from contextlib import nullcontext

import pytest
import torch
from conftest import DEVICE, FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsessm_plugin import fast_forward
from sparsessm_plugin.backends import cpu, products, vectors
from sparsessm_plugin.backends.choice import kernels_for
from sparsessm_plugin.families import find_mixers, read_out
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan

sizes = st.sampled_from([1, 2, 15, 16, 17, 64, 65, 513])


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float(torch.linalg.norm((a - b).double()) / torch.linalg.norm(b.double()))


def wide_part(generator, batch, length, channels, wider, transposed=False):
    """(b, L, D) of a tensor with other channels before and after it."""
    if transposed:
        return torch.randn(batch, channels, length, generator=generator).transpose(1, 2)
    x = torch.randn(batch, length, channels + 2 * wider, generator=generator)
    return x[..., wider : wider + channels]


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=sizes,
    channels=sizes,
    kernel=st.integers(1, 5),
    wider=st.integers(0, 3),
    transposed=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolution_is_torchs(
    batch, length, channels, kernel, wider, transposed, biased, masked, seed
):
    g = torch.Generator().manual_seed(seed)
    x = wide_part(g, batch, length, channels, wider, transposed)
    weight = torch.randn(channels, 1, kernel, generator=g)
    bias = torch.randn(channels, generator=g) if biased else None
    mask = torch.rand(batch, length, generator=g) > 0.3 if masked else None
    expected = F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel - 1, groups=channels)
    expected = F.silu(expected[..., :length]).transpose(1, 2)
    if mask is not None:
        expected = expected * mask[..., None]
    result = cpu.convolve(x, weight, bias, mask)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    length=sizes,
    channels=sizes,
    wider=st.integers(0, 3),
    transposed=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_softplus_is_torchs(batch, length, channels, wider, transposed, biased, seed):
    g = torch.Generator().manual_seed(seed)
    x = 10 * wide_part(g, batch, length, channels, wider, transposed)
    bias = torch.randn(channels, generator=g) if biased else None
    expected = F.softplus(x if bias is None else x + bias)
    torch.testing.assert_close(cpu.softplus(x, bias), expected, rtol=2e-6, atol=1e-30)


def test_softplus_and_silu_over_their_whole_range():
    x = torch.cat([torch.linspace(-86, 100, 2000), torch.linspace(-1e-3, 1e-3, 500)])
    exact = torch.log1p(x.double().exp())
    result = cpu.softplus(x.view(1, -1, 1), None).view(-1)
    assert ((result.double() - exact).abs() / exact).max() < 1e-6
    exact = x.double() * x.double().sigmoid()
    result = cpu.convolve(x.view(1, -1, 1), torch.ones(1, 1, 1), None, None).view(-1)
    assert ((result.double() - exact).abs() <= 1e-6 * exact.abs() + 1e-36).all()


def test_infinite_and_missing_numbers():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(1, 1, 3)
    result = cpu.softplus(x, None).flatten()
    assert result[0].isnan()
    assert result[1].isinf()
    assert 0 <= result[2] < 1e-37
    result = cpu.convolve(x[..., :2], torch.ones(2, 1, 1), None, None).flatten()
    assert result[0].isnan()
    assert result[1].isinf()


def test_rows_of_a_wider_tensor_are_not_copied():
    x = torch.randn(3, 5, 8)
    rows, width = vectors.as_rows(x[..., 2:6])
    assert width == 8
    assert len(rows) == 14 * 8 + 4
    assert rows.ctypes.data == x.data_ptr() + 2 * x.element_size()
    for strange in (x[:, :, 1:2], x[:, 2:3], x[::2], x.transpose(0, 1), x[:1, :1], x[:, :0]):
        rows, width = vectors.as_rows(strange)
        for i, row in enumerate(strange.flatten(0, 1)):
            assert rows[i * width : i * width + len(row)].tolist() == row.tolist()


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = torch.randn(2, 70, 90), torch.randn(90, 1, 4), torch.randn(90)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((cpu.convolve(x, weight, bias, None), cpu.softplus(x, bias)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
@pytest.mark.parametrize("family", FAMILIES)
def test_mixers_compute_the_same_without_kernels(family, device, monkeypatch):
    x = torch.randn(2, 21, 32, device=device)
    mask = torch.ones(2, 21, device=device)
    mask[1, 13:] = 0
    most = 1e-5 if device == "cpu" else 2e-3  # a GPU may convolve in TF32
    for adapter in find_mixers(tiny_model(family).to(device)):
        found = []
        with torch.no_grad():
            for kernels in (True, False):
                with monkeypatch.context() as patch:
                    if not kernels:
                        patch.setattr("sparsessm_plugin.families.base.kernels_for", lambda x: None)
                        patch.setattr(
                            "sparsessm_plugin.families.mamba1.kernels_for", lambda x: None
                        )
                    found.append(adapter.quantities(x, mask))
        for name in ("u", "dt", "A", "B", "C", "D", "z"):
            assert relative(*(getattr(q, name) for q in found)) < most
        for name in found[0].inputs:
            assert relative(*(q.inputs[name] for q in found)) < most


def test_where_kernels_run():
    x = torch.randn(1, 2, 3)
    assert kernels_for(x) is None  # with gradients
    with torch.no_grad():
        assert kernels_for(x) is cpu
        assert kernels_for(x.bfloat16()) is None
        assert kernels_for(x.to("meta")) is None


@pytest.mark.parametrize("request_", [None, StatisticsRequest(True, True, "zero")])
def test_gate_inside_the_scan_is_the_gate_after_it(mamba1_family, request_):
    for adapter in find_mixers(tiny_model(mamba1_family)):
        with torch.no_grad():
            q = adapter.quantities(torch.randn(2, 21, 32))
            kept = [ScanStatistics(request_, *q.A.shape) if request_ else None for _ in range(2)]
            gated = read_out(adapter, q, kept[0])
            assert relative(gated, adapter.out_input(q, scan(q, kept[1]))) < 1e-6
        if request_:
            assert torch.equal(kept[0].output_error, kept[1].output_error)


# -- products ----------------------------------------------------------------------------------


@pytest.fixture
def in_onednn(monkeypatch):
    """Every product goes to oneDNN, on any processor; a list of the shapes that did."""
    monkeypatch.setattr(products, "worthwhile", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 1)
    taken, linear = [], products.linear

    def counted(x, weight, bias=None):
        taken.append((*x.shape, len(weight)))
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "linear", counted)
    return taken


@settings(max_examples=60)
@given(
    lead=st.lists(st.sampled_from([1, 2, 3, 16, 17]), min_size=1, max_size=3),
    inputs=st.sampled_from([1, 3, 16, 65]),
    outputs=st.sampled_from([1, 2, 16, 63]),
    biased=st.booleans(),
    part=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_is_torchs(lead, inputs, outputs, biased, part, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, inputs + 2 * part, generator=g)[..., part : part + inputs]
    weight = torch.randn(outputs, inputs, generator=g)
    bias = torch.randn(outputs, generator=g) if biased else None
    with torch.no_grad():
        result = products.linear(x, weight, bias)
    torch.testing.assert_close(result, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert result.is_contiguous()


@pytest.mark.parametrize(
    ("capability", "cpuinfo", "expected"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", True),
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("AVX2", "vendor_id : AuthenticAMD", False),
        ("AVX512", None, False),
    ],
)
def test_which_processors_gain(monkeypatch, capability, cpuinfo, expected):
    def read_text(path, encoding):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(products.Path, "read_text", read_text)
    assert products.worthwhile.__wrapped__() is expected


@pytest.mark.parametrize("biased", [True, False])
def test_large_results_are_made_in_parts(monkeypatch, biased):
    monkeypatch.setattr(products, "_LARGE", 1)
    monkeypatch.setattr(products, "_PIECE", 33 * 64)
    x, weight = torch.randn(3, 11, 20), torch.randn(150, 20)
    bias = torch.randn(150) if biased else None
    with torch.no_grad():
        result = products.linear(x, weight, bias)
    torch.testing.assert_close(result, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_modules_are_called_as_modules(in_onednn):
    linear = torch.nn.Linear(8, 5)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        result = products.project(linear, x)
        assert seen[0] is result
        assert relative(result, linear(x)) < 1e-6
    assert in_onednn == [(2, 3, 8, 5)]


class Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_the_mode_is_left_on_errors(in_onednn):
    outside = torch.overrides._get_current_function_mode_stack
    x = torch.randn(4, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match="broken"):
        products.project(Broken(), x)
    assert outside() == []
    with torch.no_grad(), pytest.raises(RuntimeError):  # shapes that do not fit
        products.project(torch.nn.Linear(7, 5), x)
    assert outside() == []
    with torch.no_grad():
        F.linear(x, torch.randn(3, 8))
    assert in_onednn == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)),
        lambda: (torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()),
        lambda: (torch.randn(4, 8, device="meta"), torch.randn(3, 8, device="meta")),
        lambda: (torch.randn(8), torch.randn(3, 8)),
        lambda: (torch.randn(4, 8), torch.randn(3, 8).to_sparse()),
        lambda: (torch.randn(4, 8), torch.randn(8, 3).T),
        lambda: (torch.randn(0, 8), torch.randn(3, 8)),
    ],
)
def test_other_products_are_left_alone(in_onednn, make):
    x, weight = make()
    with torch.no_grad(), products.OneDNNLinear():
        result = F.linear(x, weight)
    assert in_onednn == []
    assert result.shape == (*x.shape[:-1], 3)


@pytest.mark.filterwarnings("ignore:TF32")
def test_gradients_and_a_switched_off_library_leave_products_alone(in_onednn):
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    with products.OneDNNLinear():
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), products.OneDNNLinear():
        F.linear(x, weight)
    assert isinstance(products.fast_products(x.device), nullcontext)  # with gradients
    with torch.no_grad():
        assert isinstance(products.fast_products(torch.device("meta")), nullcontext)
        assert isinstance(products.fast_products(x.device), TorchFunctionMode)
    assert in_onednn == []


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_products_in_onednn(family, in_onednn):
    model = tiny_model(family).to(DEVICE)
    ids = torch.randint(1, 96, (2, 24))
    with torch.no_grad():
        expected = model(ids.to(DEVICE), use_cache=False).logits.cpu()
        model.cpu()
        assert in_onednn == []
        with fast_forward(model):
            result = model(ids, use_cache=False).logits
            assert len(in_onednn) >= 2 * len(find_mixers(model))
            with products.fast_products(model.device):
                again = model(ids, use_cache=False).logits
    assert in_onednn[-1][-1] == 96  # lm_head
    assert relative(result, expected) < 1e-4
    assert relative(again, expected) < 1e-4
