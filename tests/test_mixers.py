"""Adapters against the modules that they describe."""

import pytest
import torch
from conftest import DEVICE, tiny_model
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.mixers import find_mixers, get_adapter, known_mixers
from sparsessm_plugin.scan import REFERENCE, scan


def module_output(adapter, hidden_states, attention_mask):
    """What the module itself computes, on the CPU again."""
    mixer = adapter.mixer.to(DEVICE)
    mask = None if attention_mask is None else attention_mask.to(DEVICE)
    try:
        with torch.no_grad():
            return mixer(hidden_states.to(DEVICE), attention_mask=mask).cpu()
    finally:
        mixer.cpu()


def masks(batch, length):
    ragged = torch.ones(batch, length)
    ragged[0, length // 2 :] = 0  # padded on the right
    ragged[1, :3] = 0  # padded on the left
    return {"none": None, "all real": torch.ones(batch, length), "ragged": ragged}


@pytest.mark.parametrize("backend", [None, REFERENCE])
@pytest.mark.parametrize("mask", ["none", "all real", "ragged"])
def test_adapter_recomputes_the_mixer(family, mask, backend):
    model = tiny_model(family)
    for adapter in find_mixers(model):
        hidden_states = torch.randn(3, 17, adapter.sizes.hidden_size)
        attention_mask = masks(3, 17)[mask]
        expected = module_output(adapter, hidden_states, attention_mask)
        with torch.no_grad():
            quantities = adapter.quantities(hidden_states, attention_mask)
            result = adapter.output(quantities, scan(quantities, backend=backend))
        assert torch.linalg.norm(result - expected) <= 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True},
        {"use_conv_bias": False},
        {"conv_kernel": 2, "state_size": 5, "hidden_size": 24, "time_step_rank": 3},
        pytest.param(
            {"hidden_act": "gelu"},
            marks=pytest.mark.skipif(
                DEVICE == "cuda", reason="the CUDA convolution knows silu only"
            ),
        ),
    ],
    ids=str,
)
def test_adapter_follows_the_config(changes):
    """Odd sizes, biases and activations; gelu only in the convolution, the gate stays silu."""
    model = tiny_model("mamba", **changes)
    adapter = find_mixers(model)[0]
    hidden_states = torch.randn(2, 9, adapter.sizes.hidden_size)
    expected = module_output(adapter, hidden_states, None)
    with torch.no_grad():
        quantities = adapter.quantities(hidden_states)
        result = adapter.output(quantities, scan(quantities))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_adapter_recomputes_a_trained_mixer(assets):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets / "models" / "mamba-6m").eval()
    for adapter in find_mixers(model):
        hidden_states = torch.randn(2, 40, adapter.sizes.hidden_size)
        expected = module_output(adapter, hidden_states, None)
        with torch.no_grad():
            quantities = adapter.quantities(hidden_states)
            result = adapter.output(quantities, scan(quantities))
        assert torch.linalg.norm(result - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_quantities_are_what_they_are_called(family):
    adapter = find_mixers(tiny_model(family))[0]
    sizes = adapter.sizes
    q = adapter.quantities(torch.randn(2, 11, sizes.hidden_size))
    D, N, R = sizes.intermediate_size, sizes.state_size, sizes.time_step_rank
    assert q.u.shape == q.dt.shape == q.z.shape == (2, 11, D)
    assert q.B.shape == q.C.shape == (2, 11, N)
    assert q.A.shape == (D, N)
    assert (q.dt > 0).all()
    assert (q.A < 0).all()
    assert all(t.dtype == torch.float32 for t in (q.u, q.dt, q.A, q.B, q.C, q.D, q.z))
    # each input times its weight gives what the recurrence uses
    projected = adapter.mixer.in_proj(q.inputs["in_proj"])
    torch.testing.assert_close(projected[..., D:], q.z)
    dt = q.inputs["dt_proj"] @ adapter.mixer.dt_proj.weight.T + adapter.mixer.dt_proj.bias
    torch.testing.assert_close(nn.functional.softplus(dt), q.dt)
    assert q.inputs["dt_proj"].shape == (2, 11, R)
    convolved = adapter.mixer.conv1d(q.inputs["conv1d"].transpose(1, 2))[..., :11]
    torch.testing.assert_close(adapter.mixer.act(convolved).transpose(1, 2), q.inputs["x_proj"])


def test_padding_adds_nothing_to_u(family):
    adapter = find_mixers(tiny_model(family))[0]
    mask = torch.ones(2, 10)
    mask[0, 6:] = 0
    q = adapter.quantities(torch.randn(2, 10, adapter.sizes.hidden_size), mask)
    assert (q.u[0, 6:] == 0).all()
    assert q.mask is not None
    assert q.mask.sum() == 16


def test_bfloat16_model_gives_float32_quantities(family):
    model = tiny_model(family)
    adapter = find_mixers(model)[0]
    hidden_states = torch.randn(2, 12, adapter.sizes.hidden_size)
    exact = module_output(adapter, hidden_states, None)
    model.to(torch.bfloat16)
    with torch.no_grad():
        q = adapter.quantities(hidden_states.bfloat16())
        result = adapter.output(q, scan(q))
    assert q.u.dtype == torch.float32
    assert result.dtype == torch.bfloat16
    assert torch.linalg.norm(result.float() - exact) <= 0.05 * torch.linalg.norm(exact)


def narrow(mixer, ranges, keep):
    """Keep the given indices of an axis in every tensor range that carries it."""
    by_tensor = {}
    for axis in ranges:
        by_tensor.setdefault((axis.tensor, axis.dim), []).append(axis.start)
    length = mixer.A_log.shape[keep["dim"]]  # before A_log itself is narrowed
    for (tensor, dim), starts in by_tensor.items():
        owner, _, name = tensor.rpartition(".")
        module = mixer.get_submodule(owner) if owner else mixer
        value = getattr(module, name)
        dropped = {s + i for s in starts for i in range(length) if i not in keep["indices"]}
        index = torch.tensor([i for i in range(value.shape[dim]) if i not in dropped])
        narrowed = value.detach().index_select(dim, index)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(narrowed))
        else:
            setattr(module, name, narrowed)


def test_axes_name_everything_that_carries_the_state():
    """Narrowing the named ranges equals zeroing the B rows, in a family without norms."""
    keep = [0, 2, 3, 7]
    dense, small = tiny_model("mamba"), tiny_model("mamba")
    hidden_states = torch.randn(2, 13, 32)
    for adapter in find_mixers(dense):
        sizes = adapter.sizes
        with torch.no_grad():
            for n in set(range(8)) - set(keep):
                adapter.mixer.x_proj.weight[sizes.time_step_rank + n] = 0
    for adapter in find_mixers(small):
        narrow(adapter.mixer, adapter.axes("state"), {"dim": 1, "indices": keep})
        assert adapter.set_size("state", 4) == {"state_size": 4}
    for big, little in zip(find_mixers(dense), find_mixers(small), strict=True):
        assert little.sizes.state_size == 4
        torch.testing.assert_close(
            module_output(little, hidden_states, None), module_output(big, hidden_states, None)
        )


def test_axes_name_everything_that_carries_the_channels(family):
    """Narrowing equals zeroing out_proj columns and what x_proj reads from those channels."""
    keep = list(range(0, 64, 2))
    dense, small = tiny_model(family, seed=3), tiny_model(family, seed=3)
    hidden_states = torch.randn(2, 13, 32)
    drop = [d for d in range(64) if d not in keep]
    for big, little in zip(find_mixers(dense), find_mixers(small), strict=True):
        with torch.no_grad():
            big.mixer.out_proj.weight[:, drop] = 0
            big.mixer.x_proj.weight[:, drop] = 0
        narrow(little.mixer, little.axes("channels"), {"dim": 0, "indices": keep})
        assert list(little.set_size("channels", 32).values()) == [1.0]
        torch.testing.assert_close(
            module_output(little, hidden_states, None), module_output(big, hidden_states, None)
        )


def test_unknown_axis():
    adapter = find_mixers(tiny_model("mamba"))[0]
    with pytest.raises(SparseSSMError, match="allowed: state, channels"):
        adapter.axes("heads")
    with pytest.raises(SparseSSMError, match="allowed: state, channels"):
        adapter.set_size("heads", 2)


def test_unknown_mixer_lists_the_known_ones():
    config = Mamba2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8
    )
    with pytest.raises(SparseSSMError) as error:
        find_mixers(Mamba2ForCausalLM(config))
    assert "Mamba2Mixer" in str(error.value)
    assert all(name in str(error.value) for name in known_mixers())
    assert "\n" not in str(error.value)


def test_model_without_mixers():
    with pytest.raises(SparseSSMError, match="has no state-space mixer"):
        find_mixers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SparseSSMError, match="not a known state-space mixer"):
        get_adapter(nn.Linear(2, 2), "layer")


def test_mask_of_the_wrong_shape():
    adapter = find_mixers(tiny_model("mamba"))[0]
    with pytest.raises(SparseSSMError, match=r"attention_mask has shape \(2, 9\)"):
        adapter.quantities(torch.randn(2, 8, 32), torch.ones(2, 9))
