"""The scan backends against each other, and the statistics against their definitions."""

import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import (
    DEVICE,
    STATISTICS,
    fresh_process,
    one_step_at_a_time,
    random_heads,
    random_quantities,
    relative,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from sparsessm_plugin import fast_forward
from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.backends.vectors import exp
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan, ssd
from sparsessm_plugin.recurrence.quantities import HeadQuantities, MixerQuantities


def collect(quantities, request, backend=None):
    channels, states = quantities.A.shape
    statistics = ScanStatistics(request, channels, states)
    y = scan(quantities, statistics, backend)
    return y, statistics


@njit
def exp_compiled(x):
    return exp(x)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.sampled_from([1, 3, 63, 64, 65, 130]),
    states=st.integers(1, 9),
    masked=st.booleans(),
    per_step=st.booleans(),
    pruned_value=st.sampled_from(["zero", "memoryless"]),
    seed=st.integers(0, 1000),
)
def test_cpu_agrees_with_the_reference(
    batch, length, channels, states, masked, per_step, pruned_value, seed
):
    q = random_quantities(batch, length, channels, states, seed, masked)
    request = StatisticsRequest(True, True, pruned_value, per_step)
    y, fast = collect(q, request)
    expected, slow = collect(q, request, REFERENCE)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert fast.tokens == slow.tokens
    for name in STATISTICS:
        a, b = getattr(fast, name), getattr(slow, name)
        assert a.shape == b.shape == ((length,) if per_step else ()) + (channels, states)
        assert torch.linalg.norm((a - b).double()) <= 1e-4 * torch.linalg.norm(b.double())


def test_statistics_are_their_definitions():
    """Against a float64 loop over single entries, written from the formulas alone."""
    q = random_quantities(2, 7, 3, 2, seed=5, masked=True)
    gate = torch.nn.functional.silu(q.z).double()
    for pruned_value in ("zero", "memoryless"):
        _, statistics = collect(q, StatisticsRequest(True, True, pruned_value, per_step=True))
        expected = {name: torch.zeros(7, 3, 2, dtype=torch.float64) for name in STATISTICS}
        for b in range(2):
            for d in range(3):
                for n in range(2):
                    h = pruned = 0.0
                    for t in range(7):
                        dt = float(q.dt[b, t, d])
                        decay = np.exp(dt * float(q.A[d, n]))
                        drive = dt * float(q.B[b, t, n]) * float(q.u[b, t, d])
                        before = h
                        h = decay * h + drive
                        pruned = (np.exp(-dt) if pruned_value == "zero" else 0.0) * pruned + drive
                        if not q.mask[b, t]:
                            continue
                        expected["state_energy"][t, d, n] += before**2
                        expected["transition"][t, d, n] += decay
                        error = float(q.C[b, t, n]) * (pruned - h) * float(gate[b, t, d])
                        expected["output_error"][t, d, n] += error**2
        for name in STATISTICS:
            assert relative(getattr(statistics, name), expected[name]) < 1e-5


def test_output_error_is_what_pruning_one_entry_does():
    """The score of an entry equals the squared change of the gated output, by running both."""
    q = random_quantities(2, 12, 4, 3, seed=2)
    for pruned_value, value in (("zero", 0.0), ("memoryless", 38.0)):
        _, statistics = collect(q, StatisticsRequest(output_error=pruned_value))
        y = scan(q) * q.gate
        for d, n in ((0, 0), (1, 2), (3, 1)):
            A = q.A.clone()
            A[d, n] = -np.exp(value)
            changed = scan(MixerQuantities(**{**vars(q), "A": A})) * q.gate
            error = (changed - y).double().square().sum()
            assert statistics.output_error[d, n] == pytest.approx(float(error), rel=1e-3)


def test_sums_are_the_sum_of_the_steps():
    q = random_quantities(2, 9, 5, 4, masked=True)
    _, steps = collect(q, StatisticsRequest(True, True, "zero", per_step=True))
    _, sums = collect(q, StatisticsRequest(True, True, "zero", per_step=False))
    for name in STATISTICS:
        assert relative(getattr(steps, name).sum(0), getattr(sums, name)) < 1e-5


@pytest.mark.parametrize("backend", [None, REFERENCE])
@pytest.mark.parametrize("per_step", [False, True])
def test_batches_of_different_length_add_up(backend, per_step):
    request = StatisticsRequest(True, True, "zero", per_step)
    together = ScanStatistics(request, 5, 3)
    parts = []
    for length, seed in ((4, 1), (9, 2), (6, 3)):
        q = random_quantities(2, length, 5, 3, seed)
        scan(q, together, backend)
        parts.append(collect(q, request, backend)[1])
    assert together.tokens == 2 * (4 + 9 + 6)
    assert together.steps == 9
    for name in STATISTICS:
        expected = torch.zeros_like(getattr(together, name))
        for part in parts:
            value = getattr(part, name)
            if per_step:
                expected[: len(value)] += value
            else:
                expected += value
        assert relative(getattr(together, name), expected) < 1e-6


def test_padding_adds_nothing_to_the_statistics():
    """A padded batch and its rows without padding give the same statistics."""
    q = random_quantities(2, 10, 6, 3)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:] = False
    padded = MixerQuantities(**{**vars(q), "mask": mask, "u": q.u * mask[..., None]})
    request = StatisticsRequest(True, True, "zero")
    _, statistics = collect(padded, request)
    separate = ScanStatistics(request, 6, 3)
    for row, length in ((0, 6), (1, 10)):
        cut = {k: getattr(q, k)[row : row + 1, :length] for k in ("u", "dt", "B", "C", "z")}
        scan(MixerQuantities(**cut, A=q.A, D=q.D), separate)
    assert statistics.tokens == separate.tokens == 16
    for name in STATISTICS:
        assert relative(getattr(statistics, name), getattr(separate, name)) < 1e-6


def test_result_does_not_depend_on_the_number_of_threads():
    q = random_quantities(3, 30, 150, 4)
    request = StatisticsRequest(True, True, "zero")
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, statistics = collect(q, request)
            results.append([y] + [getattr(statistics, name) for name in STATISTICS])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_place_for_compiled_code():
    """A read-only installation compiles in every process instead of failing."""
    script = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import sparsessm_plugin.recurrence.cpu
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_exponential_is_accurate():
    x = -np.concatenate([np.geomspace(1e-8, 87, 5000), [0.0, 1e3, 1e30]]).astype(np.float32)
    result = np.array([exp_compiled(v) for v in x])
    expected = np.exp(x.astype(np.float64))
    normal = expected > 1e-37
    assert np.max(np.abs(result[normal] / expected[normal] - 1)) < 2e-7
    assert np.all(result[~normal] < 1.1e-37)
    assert np.isnan(exp_compiled(np.float32("nan")))


def test_nan_shows_up_in_the_statistics():
    q = random_quantities(1, 6, 3, 2)
    q.dt[0, 2, 1] = float("nan")
    for backend in (None, REFERENCE):
        for per_step in (False, True):
            request = StatisticsRequest(True, True, "zero", per_step)
            y, statistics = collect(q, request, backend)
            assert not statistics.is_finite()
            assert torch.isnan(y).any()


def test_memory_has_no_batch_axis():
    request = StatisticsRequest(True, True, "zero", per_step=True)
    sizes = []
    for batch in (1, 8):
        _, statistics = collect(random_quantities(batch, 5, 4, 3), request)
        sizes.append(sum(getattr(statistics, name).numel() for name in STATISTICS))
    assert sizes[0] == sizes[1] == 3 * 5 * 4 * 3


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 53])
def test_chunked_scan_is_the_recurrence(length, groups):
    q = random_heads(2, length, groups)
    expected, every_state = one_step_at_a_time(q)
    y, states = ssd.scan_with_states(q, chunk=16)
    assert y.shape == q.u.shape
    assert y.dtype == torch.float32
    assert relative(y, expected) < 1e-6
    ends = every_state[:, 15::16]  # a chunk that is not whole has no end
    assert states.shape == ends.shape == (2, length // 16, q.u.shape[2], 5)
    assert length < 16 or relative(states, ends) < 1e-6
    assert torch.equal(ssd.scan(q, chunk=16), y)


def test_chunked_scan_is_what_scan_runs():
    for length in (ssd.CHUNK - 1, 2 * ssd.CHUNK + 5):
        q = random_heads(1, length)
        assert torch.equal(scan(q), ssd.scan(q))
        assert relative(scan(q), one_step_at_a_time(q)[0]) < 1e-6


@pytest.mark.parametrize(
    "decay",
    [
        lambda dt: dt * 1e-6,  # nothing is forgotten
        lambda dt: dt * 1e4,  # everything is, at once
        # one step forgets everything and the next ones do not: their decays must not drown in
        # the sum over the chunk
        lambda dt: torch.where(torch.arange(dt.shape[1])[:, None] % 20 == 3, dt * 1e4, dt * 0.1),
    ],
    ids=["tiny", "large", "mixed"],
)
def test_chunked_scan_with_extreme_decays(decay):
    q = random_heads(2, 100)
    q.dt, q.D = decay(q.dt), torch.zeros(4)  # the skip would hide what the states add
    expected, every_state = one_step_at_a_time(q)
    y, states = ssd.scan_with_states(q, chunk=32)
    assert relative(y, expected) < 1e-5
    assert relative(states, every_state[:, 31::32]) < 1e-5


def test_chunked_scan_is_differentiable():
    names = ("u", "dt", "A", "B", "C", "D")
    gradients = []
    for run in (one_step_at_a_time, lambda q: ssd.scan_with_states(q, chunk=8)):
        q = random_heads(2, 21, groups=2)
        for name in names:
            getattr(q, name).requires_grad_()
        y, _ = run(q)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        gradients.append([getattr(q, name).grad for name in names])
    for name, expected, result in zip(names, *gradients, strict=True):
        assert relative(result, expected) < 1e-5, name


def test_padding_changes_nothing_in_the_chunked_scan():
    """On the right it comes after everything; on the left it adds nothing to the state."""
    q = random_heads(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 25:] = mask[1, :18] = False
    # as the adapters have it: a padded step has a dt all the same
    padded = {name: getattr(q, name) * mask[..., None, None] for name in ("B", "C")}
    padded["u"] = q.u * mask[..., None]
    y = ssd.scan(HeadQuantities(**{**vars(q), **padded, "mask": mask}), chunk=16)
    for row in range(2):
        cut = {k: getattr(q, k)[row : row + 1, mask[row]] for k in ("u", "dt", "B", "C", "z")}
        expected = ssd.scan(HeadQuantities(**cut, A=q.A, D=q.D), chunk=16)
        assert relative(y[row : row + 1, mask[row]], expected) < 1e-6
    assert (y[~mask] == 0).all()


def test_statistics_need_an_entry_a_state():
    statistics = ScanStatistics(StatisticsRequest(True), 16, 5)
    with pytest.raises(SparseSSMError, match="one entry a state; Mamba-2 has one a head"):
        scan(random_heads(1, 4), statistics)


@pytest.mark.parametrize("padded", [False, True])
def test_fast_forward_gives_the_models_own_logits(family, padded):
    model = tiny_model(family)
    ids = torch.randint(1, 96, (2, 21))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 15:] = 0
    with torch.no_grad():
        model.to(DEVICE)
        expected = model(ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits
        expected = expected.cpu()
        model.cpu()
        with fast_forward(model):
            result = model(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert relative(result[real], expected[real]) < 1e-4


def test_fast_forward_leaves_cached_calls_to_the_model(family, monkeypatch):
    model = tiny_model(family).to(DEVICE)
    ids = torch.randint(1, 96, (2, 9), device=DEVICE)
    calls = []
    module = import_module("sparsessm_plugin.families.fast_forward")
    read_out = module.read_out
    monkeypatch.setattr(module, "read_out", lambda a, q: calls.append(q) or read_out(a, q))

    def prefill_and_step():
        first = model(ids[:, :8], use_cache=True)
        cache = "cache_params" if "cache_params" in first else "past_key_values"
        second = model(ids[:, 8:], use_cache=True, **{cache: first[cache]})
        return first.logits, second.logits

    with torch.no_grad():
        expected = prefill_and_step()
        with fast_forward(model):
            result = prefill_and_step()
            assert not calls
            if DEVICE == "cpu":
                model(ids, use_cache=False)
                assert len(calls) == len(find_mixers(model))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_fast_forward_always_restores():
    model = tiny_model("mamba")
    mixer = model.backbone.layers[0].mixer
    before = mixer.forward

    def fail():
        with fast_forward(model):
            assert "forward" in vars(mixer)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert "forward" not in vars(mixer)
    assert mixer.forward == before


def test_fast_forward_keeps_what_others_put_on_the_instance():
    model = tiny_model("mamba")
    mixer = model.backbone.layers[0].mixer
    mixer.forward = type(mixer).forward.__get__(mixer)
    wrapper = mixer.forward
    with fast_forward(model), fast_forward(model):
        assert mixer.forward is not wrapper
    assert mixer.forward is wrapper


def test_fast_forward_leaves_generation_and_training_alone():
    model = tiny_model("mamba").to(DEVICE)
    ids = torch.randint(1, 96, (1, 7), device=DEVICE)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradient = model.backbone.layers[0].mixer.A_log.grad.clone()
    model.zero_grad()
    with fast_forward(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
        model(ids, labels=ids, use_cache=False).loss.backward()
    # CUDA kernels sum gradients in no fixed order
    assert relative(model.backbone.layers[0].mixer.A_log.grad, gradient) < 1e-5


def test_fast_forward_ignores_models_without_known_mixers():
    with fast_forward(torch.nn.Linear(2, 2)):
        pass


def test_offered_scan_is_used_once():
    from sparsessm_plugin.families.fast_forward import offer

    model = tiny_model("mamba")
    adapter = find_mixers(model)[0]
    hidden_states = torch.randn(1, 5, 32)
    with torch.no_grad(), fast_forward(model):
        expected = adapter.mixer(hidden_states)
        nothing = torch.zeros_like(adapter.quantities(hidden_states).u)
        offer(adapter.mixer, hidden_states, None, nothing)
        assert (adapter.mixer(hidden_states) == 0).all()  # taken at its word
        assert torch.equal(adapter.mixer(hidden_states), expected)
        offer(adapter.mixer, hidden_states, None, nothing)
        other = hidden_states.clone()  # not the very input: the offer does not count
        assert torch.equal(adapter.mixer(other), expected)


def test_scan_leaves_the_number_of_threads_alone():
    """numba and torch may share one OpenMP, where setting one number sets both."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        adapter = find_mixers(tiny_model("mamba"))[0]
        with torch.no_grad():
            scan(adapter.quantities(torch.randn(1, 5, adapter.sizes.hidden_size)))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


FIRST_USE = """
import torch
torch.set_num_threads(1)
assert torch.get_num_threads() == 1  # and makes torch ready for parallel work
from sparsessm_plugin.backends.vectors import threads_of_torch
with threads_of_torch():
    pass
print(torch.get_num_threads())
"""


def test_the_first_scan_of_a_process_leaves_torch_its_threads():
    """numba starts its own, and where both share OpenMP that changes torch's number."""
    assert fresh_process(FIRST_USE, NUMBA_NUM_THREADS="2") == 1
