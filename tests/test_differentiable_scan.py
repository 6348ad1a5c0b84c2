"""The gradient of the scan against autograd through the reference, and through whole models."""

import pytest
import torch
from conftest import (
    DEVICE,
    SCAN_LEAVES,
    batches,
    random_heads,
    random_quantities,
    relative,
    scan_gradients,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin import fast_forward, find_mixers
from sparsessm_plugin.recurrence import differentiable, reference, ssd
from sparsessm_plugin.recurrence.quantities import MixerQuantities


def check(scan, quantities, oracle=reference.scan, tolerance=2e-5):
    expected = scan_gradients(oracle, quantities, torch.float64)
    for name, value in scan_gradients(scan, quantities).items():
        error = (value.double() - expected[name]).abs().max()
        assert error <= tolerance * expected[name].abs().max(), name  # both 0 after one step


# one step; whole chunks and a rest; more channels than a block and fewer; one state
@pytest.mark.parametrize("length", [1, 15, 16, 33])
@pytest.mark.parametrize(("channels", "states"), [(3, 1), (64, 4), (70, 5)])
def test_cpu_gradients(length, channels, states):
    check(differentiable.scan, random_quantities(2, length, channels, states))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    channels=st.integers(1, 8),
    states=st.integers(1, 4),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 9),
    masked=st.booleans(),
)
@settings(max_examples=25)
def test_gradients_of_any_shape(batch, length, channels, states, chunk, seed, masked):
    q = random_quantities(batch, length, channels, states, seed, masked)
    check(differentiable.scan, q)
    check(lambda q: differentiable.in_chunks(q, chunk), q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scan", [differentiable.scan, differentiable.in_chunks])
def test_gpu_gradients(scan):
    """mamba-ssm's kernel where it is installed, and plain torch."""

    def on_gpu(q):
        moved = {k: v.cuda() for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
        return scan(type(q)(**moved)).cpu()

    check(on_gpu, random_quantities(2, 150, 70, 16), tolerance=1e-4)
    if scan is differentiable.scan:
        heads = random_heads(2, 150)
        check(on_gpu, heads, oracle=lambda q: ssd.scan(q, chunk=1), tolerance=1e-4)


def test_states_that_forget_at_once():
    """A memoryless A_log: exp(dt A) is 0, and nothing that the gradient is made of overflows."""
    q = random_quantities(2, 40, 5, 3)
    q.A[1:3] = -torch.tensor(38.0).exp()
    for scan in (differentiable.scan, differentiable.in_chunks):
        result = scan_gradients(scan, q)
        assert all(torch.isfinite(value).all() for value in result.values())
        assert result["A"][1:3].abs().max() < 1e-30  # the CPU's exp ends at 1e-38
        check(scan, q)


def test_chunked_gradients_of_heads():
    q = random_heads(2, 70, masked=True)
    check(
        differentiable.scan,
        q,
        oracle=lambda q: ssd.scan(q, chunk=1),
    )


def test_gradcheck_in_double():
    q = random_quantities(1, 7, 2, 3)
    leaves = [getattr(q, name).double().requires_grad_(True) for name in SCAN_LEAVES]
    assert torch.autograd.gradcheck(
        lambda *x: differentiable.in_chunks(
            MixerQuantities(**dict(zip(SCAN_LEAVES, x, strict=True)), z=q.z.double()), chunk=3
        ),
        leaves,
    )


def test_only_what_needs_a_gradient_gets_one():
    q = random_quantities(1, 20, 4, 3)
    q.A.requires_grad_(True)
    differentiable.scan(q).sum().backward()
    assert q.A.grad is not None
    assert q.u.grad is None


def test_gradients_do_not_depend_on_threads():
    q = random_quantities(2, 50, 200, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = scan_gradients(differentiable.scan, q)
        torch.set_num_threads(2)
        two = scan_gradients(differentiable.scan, q)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(two[name], value) for name, value in one.items())


def model_gradients(model, ready):
    model.zero_grad(set_to_none=True)
    for batch in ready:
        logits = model(**batch, use_cache=False).logits
        (
            logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
        ).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers' own forward may need CUDA")
def test_gradients_of_a_model(family):
    """Every family's own forward, in torch alone, has the same gradients."""
    model, ready = tiny_model(family), batches(1, length=10, padded=True)
    expected = model_gradients(model, ready)
    with fast_forward(model, gradients=True):
        result = model_gradients(model, ready)
        with torch.no_grad():  # and the fast scan where nothing is to be differentiated
            model(**ready[0], use_cache=False)
    assert result.keys() == expected.keys()
    mixers = [a.mixer for a in find_mixers(model)]
    assert all(p.grad is not None for m in mixers for p in m.parameters())
    for name, value in expected.items():
        assert relative(result[name], value) < 1e-3, name
    assert all("forward" not in vars(m) for m in mixers)


def test_without_the_option_gradients_go_through_the_models_own_forward(monkeypatch):
    model = tiny_model("mamba").to(DEVICE)
    ready = [{k: v.to(DEVICE) for k, v in batch.items()} for batch in batches(1, length=4)]
    monkeypatch.setattr(
        differentiable, "scan", lambda q: pytest.fail("the differentiable scan was used")
    )
    with fast_forward(model):
        model_gradients(model, ready)
