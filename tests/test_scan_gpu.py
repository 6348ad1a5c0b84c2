"""The Triton scan against the reference: on a GPU, and without one in Triton's interpreter.

The interpreter must be chosen before Triton is imported, and it runs kernels on tensors of the
CPU; so these tests run once more in a process of their own.
"""

import sys
import warnings
from functools import partial
from importlib import import_module, util

import pytest
import torch
from conftest import FAMILIES, STATISTICS, Guarded, random_quantities, relative, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import CUDA, DEVICE, INTERPRETER, compiled_for_hopper, kernels_run

from sparsessm_plugin import fast_forward
from sparsessm_plugin import recurrence as package
from sparsessm_plugin.backends import choice
from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.errors import SparseSSMWarning
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan, scan_states
from sparsessm_plugin.recurrence.quantities import MixerQuantities

GPU = "cuda"
MODULE = "sparsessm_plugin.recurrence.gpu"

# the interpreter takes milliseconds a step
examples = settings(max_examples=40 if CUDA else 8, derandomize=True)


def on_device(q, dtype=None):
    """The quantities where kernels run; u, dt, B, C and z in another dtype."""
    moved = {k: v.to(DEVICE) for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    for name in ("u", "dt", "B", "C", "z"):
        moved[name] = moved[name].to(dtype or torch.float32)
    return MixerQuantities(**moved)


def compare(q, request, tolerance, dtype=None):
    """The kernels against the reference in float64, on the very numbers the kernels get."""
    there = on_device(q, dtype)
    exact = {k: v.cpu() for k, v in vars(there).items() if isinstance(v, torch.Tensor)}
    exact = {k: v if k == "mask" else v.double() for k, v in exact.items()}
    channels, states = q.A.shape
    result = ScanStatistics(request, channels, states, device=DEVICE)
    expected = ScanStatistics(request, channels, states)
    y = scan(there, result, GPU)
    assert y.dtype == torch.float32
    y_expected = scan(MixerQuantities(**exact), expected, REFERENCE)
    assert torch.linalg.norm(y.cpu() - y_expected) <= tolerance * torch.linalg.norm(y_expected)
    assert result.tokens == expected.tokens
    for name in STATISTICS:
        a, b = getattr(result, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # where nothing is lost at all, rounding of products may still leave a trace
            assert torch.linalg.norm(a.cpu() - b) <= tolerance * torch.linalg.norm(b) + 1e-12, name
    return result


@kernels_run
@examples
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 24 if not CUDA else 400),
    channels=st.sampled_from([1, 3, 31, 32, 33] if not CUDA else [1, 31, 33, 130, 515]),
    states=st.sampled_from([1, 2, 3, 5, 8, 16, 17]),
    masked=st.booleans(),
    per_step=st.booleans(),
    pruned_value=st.sampled_from(["zero", "memoryless"]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    batch, length, channels, states, masked, per_step, pruned_value, seed
):
    q = random_quantities(batch, length, channels, states, seed, masked)
    compare(q, StatisticsRequest(True, True, pruned_value, per_step), 1e-5)


@kernels_run
@pytest.mark.parametrize("states", [64, 100, 256])
def test_many_states(states):
    q = random_quantities(1, 18 if not CUDA else 300, 5, states, masked=True)
    compare(q, StatisticsRequest(True, True, "zero"), 1e-5)


@kernels_run
@pytest.mark.parametrize(
    "request_",
    [
        StatisticsRequest(state_energy=True),
        StatisticsRequest(state_energy=True, transition=True, per_step=True),
        StatisticsRequest(output_error="memoryless", per_step=True),
        StatisticsRequest(output_error="zero"),
    ],
)
def test_only_what_is_asked_for(request_):
    compare(random_quantities(2, 20, 6, 4), request_, 1e-5)


@kernels_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_and_float32_is_summed(dtype):
    q = random_quantities(2, 35, 34 if CUDA else 18, 5, masked=True)
    compare(q, StatisticsRequest(True, True, "zero"), 1e-5, dtype)


@kernels_run
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("pruned_value", ["zero", "memoryless"])
def test_chunks_hand_their_states_on(count, pruned_value, monkeypatch):
    """Slow transitions, so that a chunk still feels the ones before it; the last one is short."""
    gpu = import_module(MODULE)
    length = 27
    monkeypatch.setattr(gpu, "_chunk", lambda length, wanted: -(-length // count))
    q = random_quantities(2, length, 3, 2)
    q.A, q.dt = q.A * 0.01, q.dt * 3
    compare(q, StatisticsRequest(True, True, pruned_value), 1e-5)
    compare(q, StatisticsRequest(True, True, pruned_value, per_step=True), 1e-5)


@kernels_run
@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize(
    ("length", "channels", "states"),
    # one of everything; and blocks and chunks that are not full, with 1 and 4 lanes a channel
    [(1, 1, 1), (5, 33, 2), (6, 9, 16), (11, 5, 40)] + [(18, 33, 16), (23, 5, 40)] * CUDA,
)
def test_nothing_is_touched_outside_of_the_tensors(length, channels, states, chunk, monkeypatch):
    gpu = import_module(MODULE)
    monkeypatch.setattr(gpu, "_chunk", lambda length, wanted: chunk)
    for name in ("_end_chunks", "_hand_on", "_scan", "_sum_products"):
        monkeypatch.setattr(gpu, name, Guarded(getattr(gpu, name)))
    q = random_quantities(3, length, channels, states, masked=True)
    for per_step in (False, True):
        compare(q, StatisticsRequest(True, True, "zero", per_step), 1e-5)
    y, h = scan_states(on_device(q), 3, GPU)
    assert torch.isfinite(y).all()
    assert torch.isfinite(h).all()
    if states <= package.MOST_PRODUCTS:
        sums = package.scan_products(on_device(q), torch.ones_like(q.u).to(DEVICE), 4, GPU)
        assert all(torch.isfinite(x).all() for x in sums)


@pytest.mark.parametrize("sequences", range(1, 12))
def test_sequences_are_taken_together(sequences):
    """All of them once, in order, in groups of few sizes."""
    gpu = pytest.importorskip(MODULE)
    groups = gpu._groups(sequences)
    assert [i for own in groups for i in range(own.start, own.stop)] == list(range(sequences))
    assert {own.stop - own.start for own in groups} <= {1, 2, gpu.SEQUENCES}


@pytest.mark.skipif(INTERPRETER, reason="nothing is compiled")
@pytest.mark.parametrize("states", [4, 16])
@pytest.mark.parametrize("kernel", ["default", "frequency", "no statistics", "kept", "ends"])
def test_no_value_moves_through_shared_memory_on_hopper(kernel, states, tmp_path, monkeypatch):
    """Each thread loads what it needs itself, its states of B and C in vectors.

    Triton chooses which thread has what, and tiles of another shape would cost a barrier a step.
    """
    gpu = pytest.importorskip(MODULE)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"ERROR": 0, "GATED": True, "KEEP": 0, "SEQUENCES": 1, "STEPS": gpu.STEPS}
    fixed |= dict.fromkeys(("ENERGY", "TRANSITION", "PER_STEP", "MASKED", "UNEVEN"), False)
    fixed |= {
        "default": {"ERROR": 1},
        "frequency": {"ENERGY": True, "PER_STEP": True, "SEQUENCES": gpu.SEQUENCES},
        "kept": {"KEEP": gpu.STEPS},
        "ends": {"ERROR": 1},
    }.get(kernel, {})
    fixed |= gpu._tiling(states)
    run = gpu._end_chunks if kernel == "ends" else gpu._scan
    fixed = {name: value for name, value in fixed.items() if name in run.arg_names}
    types = dict.fromkeys(gpu._SIZES, "i32") | dict.fromkeys(("u", "z", "y"), "*bf16")
    compiled = compiled_for_hopper(run, types | {"mask": "*u8"}, fixed, num_warps=1)
    assert compiled.metadata.shared == 0
    assert "bar.sync" not in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


@kernels_run
def test_forgets_at_once_and_never():
    """Pruned entries that keep nothing (A_log 38), and a time step of almost zero."""
    q = random_quantities(1, 50, 3, 2)
    q.A[0], q.A[1, 0] = -torch.tensor(38.0).exp(), -1e-8
    q.dt[:, 10:20] = 1e-6
    q.dt[:, 30] = 100.0
    for pruned_value in ("zero", "memoryless"):
        result = compare(q, StatisticsRequest(True, True, pruned_value), 1e-5)
        assert result.is_finite()


@kernels_run
def test_what_is_padded_may_be_anything():
    """NaN in the gate of padding spreads nowhere."""
    q = random_quantities(2, 20, 4, 3, masked=True)
    request = StatisticsRequest(True, True, "zero")
    expected = compare(q, request, 1e-5)
    q.z = q.z.masked_fill(~q.mask[..., None], torch.nan)
    result = compare(q, request, 1e-5)
    assert all(torch.equal(getattr(result, n), getattr(expected, n)) for n in STATISTICS)


@kernels_run
@pytest.mark.parametrize("per_step", [False, True])
def test_two_runs_give_the_same_bits(per_step):
    """And batches of other lengths add to the same sums."""
    channels = 33 if CUDA else 9
    batches = [random_quantities(2, n, channels, 5, seed) for seed, n in enumerate((5, 33))]
    request = StatisticsRequest(True, True, "zero", per_step)
    runs = []
    for backend in (GPU, GPU, REFERENCE):
        statistics = ScanStatistics(request, channels, 5, device=DEVICE)
        for q in batches:
            scan(on_device(q), statistics, backend)
        runs.append([getattr(statistics, name) for name in STATISTICS])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(relative(a, b) < 1e-5 for a, b in zip(runs[0], runs[2], strict=True))


@kernels_run
@pytest.mark.parametrize("every", [1, 3, 16, 40, 50])
def test_kept_states(every):
    channels = 33 if CUDA else 17
    q = random_quantities(2, 40, channels, 5, masked=True)
    y, h = scan_states(on_device(q), every, GPU)
    expected, states = scan_states(q, every, REFERENCE)
    assert h.shape == states.shape == (2, 40 // every, channels, 5)
    assert relative(y.cpu(), expected) < 1e-5
    if h.numel():
        assert relative(h.cpu(), states) < 1e-5


@kernels_run
@pytest.mark.parametrize("every", [1, 4, 60])
@pytest.mark.parametrize(("batch", "channels", "states"), [(2, 35, 5), (1, 7, 16), (1, 3, 20)])
def test_products_are_those_of_the_kept_states(batch, channels, states, every):
    q = random_quantities(batch, 38, channels, states, masked=batch > 1)
    weight = torch.rand(q.u.shape)
    gram, skip, energy = (
        x.cpu() for x in package.scan_products(on_device(q), weight.to(DEVICE), every, GPU)
    )
    at = slice(every - 1, 38 // every * every, every)
    _, h = scan_states(q, every, REFERENCE)
    h = h.double() * (1 if q.mask is None else q.mask[:, at, None, None])
    phi = h * q.C[:, at, None] * weight[:, at, :, None]
    expected = torch.einsum("btdn,btdm->nm", phi, phi)
    assert torch.linalg.norm(gram - expected) <= 1e-5 * torch.linalg.norm(expected)
    expected = torch.einsum("btdn,btd->dn", phi, (weight * q.u)[:, at].double())
    assert torch.linalg.norm(skip - expected) <= 1e-5 * torch.linalg.norm(expected)
    expected = h.square().sum((0, 1, 2))
    assert torch.linalg.norm(energy - expected) <= 1e-5 * torch.linalg.norm(expected)


@kernels_run
def test_states_are_judged_the_same_without_keeping_them(monkeypatch):
    module = import_module("sparsessm_plugin.methods.state_sums")
    model = tiny_model("jamba", hidden_size=32 if CUDA else 8)
    adapter = find_mixers(model.to(DEVICE))[0]
    inputs = CalibrationInputs()
    inputs.add(torch.randn(2, 12, adapter.sizes.hidden_size), None)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    inputs.add(torch.randn(2, 9, adapter.sizes.hidden_size), mask)
    found = []
    for scan_them in (lambda *args: None, partial(package.scan_products, backend=GPU)):
        monkeypatch.setattr(module, "scan_products", scan_them)
        with torch.no_grad():
            found.append(module.gather(adapter, inputs))
    kept, summed = found
    assert kept.samples == summed.samples
    for name in ("gram", "skip", "skip_energy", "state_energy", "C_energy"):
        a, b = getattr(summed, name), getattr(kept, name)
        assert a.shape == b.shape
        assert relative(a, b) < 1e-5, name


@kernels_run
def test_views_need_not_be_contiguous():
    q = random_quantities(2, 20, 6, 4, masked=True)
    for name in ("u", "dt", "B", "C", "z"):
        value = getattr(q, name)
        setattr(q, name, value.transpose(1, 2).contiguous().transpose(1, 2))
    q.mask, q.A = q.mask.t().contiguous().t(), q.A.t().contiguous().t()
    compare(q, StatisticsRequest(True, True, "zero"), 1e-5)


@kernels_run
@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_fast_forward_gives_the_models_own_logits(family, monkeypatch):
    module = import_module("sparsessm_plugin.families.fast_forward")
    monkeypatch.setattr(
        module, "read_out", lambda adapter, q: adapter.out_input(q, scan(q, backend=GPU))
    )
    monkeypatch.setattr(module, "scans_in_kernels", lambda mixer: False)
    model = tiny_model(family, hidden_size=32 if CUDA else 16).to(DEVICE)
    ids = torch.randint(1, 96, (2, 18), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        with fast_forward(model):
            result = model(ids, attention_mask=mask, use_cache=False).logits
    assert relative(result[mask.bool()], expected[mask.bool()]) < 1e-4


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_may_be_a_part_of_a_wider_tensor(dtype, monkeypatch):
    monkeypatch.setattr(import_module(MODULE), "_chunk", lambda length, wanted: 12)
    length, channels = (35, 34) if CUDA else (19, 18)
    q = on_device(random_quantities(2, length, channels, 5, masked=True), dtype)
    q.z = torch.stack([torch.full_like(q.z, torch.nan), q.z], 2)[:, :, 1]
    y = scan(q, backend=GPU)
    gated = import_module(MODULE).scan(q, gated=dtype)
    assert gated.dtype == dtype
    torch.testing.assert_close(gated, (y * q.gate).to(dtype))


@kernels_run
@examples
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    channels=st.sampled_from([1, 5, 127, 128, 130]),
    kernel=st.integers(1, 5),
    biased=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_steps_of_single_channels(batch, length, channels, kernel, biased, padded, dtype, seed):
    """The convolution and the step size, of rows that lie in a wider tensor."""
    gpu = import_module("sparsessm_plugin.backends.gpu")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 2 * channels, generator=generator).to(DEVICE, dtype)
    x[..., :channels] = torch.nan
    x = x[..., channels:]
    weight = torch.randn(channels, 1, kernel, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(channels, generator=generator).to(DEVICE, dtype) if biased else None
    mask = (torch.rand(batch, length, generator=generator) > 0.3).to(DEVICE) if padded else None
    exact = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = torch.nn.functional.conv1d(
        exact[0].transpose(1, 2), *exact[1:], padding=kernel - 1, groups=channels
    )[..., :length]
    expected = torch.nn.functional.silu(expected).transpose(1, 2)
    if mask is not None:
        expected = expected * mask[..., None]
    found = gpu.convolve(x, weight, bias, mask)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    value = 8 * exact[0] + (0 if bias is None else exact[2])
    found = gpu.softplus(8 * x, bias)
    assert found.dtype == torch.float32
    expected = torch.nn.functional.softplus(value, threshold=40)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@kernels_run
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_quantities_are_those_without_kernels(family, monkeypatch):
    modules = [import_module(f"sparsessm_plugin.families.{name}") for name in ("base", "mamba1")]
    gpu = import_module("sparsessm_plugin.backends.gpu")
    adapter = find_mixers(tiny_model(family).to(DEVICE))[0]
    hidden_states = torch.randn(2, 19, adapter.sizes.hidden_size, device=DEVICE)
    mask = torch.ones(2, 19, dtype=torch.long, device=DEVICE)
    mask[0, :5] = 0
    found = []
    with torch.no_grad():
        for kernels in (None, gpu):
            for module in modules:
                monkeypatch.setattr(module, "kernels_for", lambda x, kernels=kernels: kernels)
            q = vars(adapter.quantities(hidden_states, mask))
            found.append({**q, **q["inputs"]})
    for name, value in found[0].items():
        if isinstance(value, torch.Tensor) and name != "mask":
            assert relative(found[1][name], value) < 1e-5, name


@pytest.mark.parametrize(
    ("family", "device", "bound", "backend", "replaced", "in_half"),
    [
        ("mamba", "cpu", True, REFERENCE, True, True),  # what is bound refuses the CPU
        ("mamba", "cuda", True, GPU, False, True),
        ("mamba", "cuda", True, REFERENCE, False, False),
        ("mamba", "cuda", False, GPU, True, True),
        ("mamba", "cuda", False, REFERENCE, False, False),
        ("mamba2", "cuda", True, GPU, False, False),
        ("mamba2", "cuda", False, REFERENCE, True, True),
    ],
)
def test_where_fast_forward_replaces(
    family, device, bound, backend, replaced, in_half, monkeypatch
):
    module = import_module("sparsessm_plugin.families.fast_forward")
    monkeypatch.setattr(module, "scans_in_kernels", lambda mixer: bound)
    monkeypatch.setattr(module, "backend_for", lambda device: backend)
    forward = module._Forward(find_mixers(tiny_model(family))[0])
    with torch.no_grad():
        for dtype, expected in ((torch.float32, replaced), (torch.bfloat16, in_half)):
            assert forward._takes_over(torch.device(device), dtype) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_that_scan_are_told_apart(family, monkeypatch):
    """Bound for the convolution or for decoding alone, they leave the scan in plain torch."""
    module = import_module("sparsessm_plugin.families.kernels")
    mixer = find_mixers(tiny_model(family))[0].mixer
    scans = [name for name in module.bound_kernels(mixer) if "scan" in name]
    assert scans
    bound = {"causal_conv1d_fn": "causal_conv1d", "selective_state_update": "mamba_ssm"}
    monkeypatch.setattr(module, "_bound_in", lambda name: {**bound, scans[0]: "torch"})
    assert not module.scans_in_kernels(mixer)
    monkeypatch.setattr(module, "_bound_in", lambda name: {**bound, scans[0]: "mamba_ssm"})
    assert module.scans_in_kernels(mixer)


# -- without Triton ----------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """No backend chosen and nothing warned of yet."""
    choice.backend_for.cache_clear()
    monkeypatch.setattr(choice, "_warned", set())
    yield
    choice.backend_for.cache_clear()


def chosen(*devices):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [choice.backend_for(torch.device(d)) for d in devices]
    return names, [str(w.message) for w in caught if w.category is SparseSSMWarning]


def test_no_triton(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, choice.BACKENDS["cuda"], raising=False)
    names, messages = chosen("cuda:0", "cuda:1", "cpu", "meta")
    assert names == [REFERENCE, REFERENCE, "cpu", REFERENCE]
    assert len(messages) == 1
    assert "plain torch" in messages[0]
    assert "triton" in messages[0]


@pytest.mark.skipif(util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("capability", [(6, 1), (5, 2)])
def test_old_gpu(fresh, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    names, messages = chosen("cuda:0", "cuda:1")
    assert names == [REFERENCE, REFERENCE]
    assert len(messages) == 1
    assert f"the GPU has {capability[0]}.{capability[1]}" in messages[0]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_this_gpu_uses_triton(fresh):
    assert chosen("cuda") == ([GPU], [])
