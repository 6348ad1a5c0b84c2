"""Adapters against the modules that they describe."""

import pytest
import torch
from conftest import (
    DEVICE,
    MAMBA1,
    MAMBA2,
    module_output,
    recomputed,
    relative,
    silence_channels,
    silence_states,
    tiny_model,
)
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import TensorAxis, find_mixers, get_adapter, known_mixers
from sparsessm_plugin.recurrence import scan

# on a GPU the fused scans of Mamba-2 multiply in tf32, as Triton does unless told otherwise
CLOSE = 1e-4 if DEVICE == "cpu" else 3e-4


def masks(batch, length):
    ragged = torch.ones(batch, length)
    ragged[0, length // 2 :] = 0  # padded on the right
    ragged[1, :3] = 0  # padded on the left
    return {"none": None, "all real": torch.ones(batch, length), "ragged": ragged}


@pytest.mark.parametrize("mask", ["none", "all real", "ragged"])
def test_adapter_recomputes_the_mixer(family, mask):
    for adapter in find_mixers(tiny_model(family)):
        hidden_states = torch.randn(3, 17, adapter.sizes.hidden_size)
        attention_mask = masks(3, 17)[mask]
        expected = module_output(adapter, hidden_states, attention_mask)
        # the Mamba-2 layout has one scan and no backends
        for backend in (None, REFERENCE) if family in MAMBA1 else (None,):
            result = recomputed(adapter, hidden_states, attention_mask, backend)
            assert relative(result, expected) < CLOSE


ODD = {"hidden_size": 24, "conv_kernel": 2, "state_size": 5}
CLAMPED = {"time_step_limit": (0.5, 1.0)}
NORMED = {"mamba_rms_norm": True, "mamba_norm_before_gate": True}
CHANGES = [
    *(("mamba", c) for c in ({"use_bias": True}, {"use_conv_bias": False})),
    ("mamba", {**ODD, "time_step_rank": 3}),
    ("mamba", {"hidden_act": "gelu"}),
    ("falcon_mamba", {"use_bias": True, "use_conv_bias": False}),
    ("jamba", {"mamba_proj_bias": True, "mamba_conv_bias": False}),
    *(("zamba", {"n_mamba_heads": heads}) for heads in (1, 4)),
    ("zamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 3}),
    ("zamba", {"hidden_mamba_act": "gelu", "mamba_d_conv": 2, "mamba_d_state": 5}),
    *(("mamba2", c) for c in ({"use_bias": True}, {"use_conv_bias": False}, CLAMPED)),
    ("mamba2", {**ODD, "num_heads": 3, "head_dim": 16, "n_groups": 3}),
    ("mamba2", {"hidden_act": "gelu"}),
    *((f, {"mamba_proj_bias": True}) for f in ("bamba", "granitemoehybrid", "falcon_h1")),
    *((f, {"mamba_conv_bias": False}) for f in ("bamba", "granitemoehybrid", "falcon_h1")),
    *((f, CLAMPED) for f in ("bamba", "granitemoehybrid", "falcon_h1")),
    ("zamba2", {"add_bias_linear": True}),
    *((f, {"time_step_min": 0.8}) for f in ("zamba2", "nemotron_h")),
    *(("nemotron_h", c) for c in ({"use_bias": True}, {"use_conv_bias": False})),
    ("nemotron_h", {"mamba_num_heads": 6, "mamba_head_dim": 7, "conv_kernel": 3}),
    *(
        (family, {name: groups})
        for family, name in (
            ("mamba2", "n_groups"),
            ("bamba", "mamba_n_groups"),
            ("zamba2", "mamba_ngroups"),
            ("falcon_h1", "mamba_n_groups"),
            ("nemotron_h", "n_groups"),
        )
        for groups in (1, 4)
    ),
    *(("falcon_h1", {"mamba_rms_norm": False, "mamba_n_groups": groups}) for groups in (1, 2)),
    *(("falcon_h1", {**NORMED, "mamba_n_groups": groups}) for groups in (1, 2)),
    ("falcon_h1", {"projectors_bias": True, "mamba_d_ssm": 30, "mamba_n_heads": 6,
                   "mamba_d_head": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=str)
def test_adapter_follows_the_config(family, changes):
    """Biases, groups, norms, clamped steps, odd sizes; gelu only where the convolution ends."""
    if DEVICE == "cuda" and "gelu" in changes.values():
        pytest.skip("the CUDA convolution knows silu only")
    adapter = find_mixers(tiny_model(family, **changes))[0]
    hidden_states = torch.randn(2, 19, adapter.sizes.hidden_size)
    expected = module_output(adapter, hidden_states)
    assert relative(recomputed(adapter, hidden_states), expected) < CLOSE
    if "time_step_limit" in changes or "time_step_min" in changes:
        dt = adapter.quantities(hidden_states).dt
        low, high = adapter.mixer.time_step_limit
        clamped = (dt == low) | (dt == high)
        assert clamped.any()
        assert not clamped.all()


@pytest.mark.parametrize("checkpoint", ["mamba-6m", "mamba2-6m"])
def test_adapter_recomputes_a_trained_mixer(assets, checkpoint):
    folder = assets / "models" / checkpoint
    if not folder.is_dir():
        pytest.skip(f"no {checkpoint} among the checkpoints")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for adapter in find_mixers(model):
        hidden_states = torch.randn(1, 40, adapter.sizes.hidden_size)
        expected = module_output(adapter, hidden_states)
        assert relative(recomputed(adapter, hidden_states), expected) < CLOSE


def test_quantities_are_what_they_are_called(family):
    adapter = find_mixers(tiny_model(family))[0]
    mixer, sizes = adapter.mixer, adapter.sizes
    assert adapter.family == family
    D, N, R = sizes.intermediate_size, sizes.state_size, sizes.time_step_rank
    H, G = sizes.num_heads, sizes.n_groups
    assert H * sizes.head_dim == D
    hidden_states = torch.randn(2, 11, sizes.hidden_size)
    q = adapter.quantities(hidden_states)
    assert all(t.dtype == torch.float32 for t in (q.u, q.dt, q.A, q.B, q.C, q.D, q.z))
    assert q.u.shape == q.z.shape == (2, 11, D)
    assert q.dt.shape == (2, 11, H)
    assert q.D.shape == (H,)
    assert (q.dt > 0).all()
    assert (q.A < 0).all()
    # each input times its weight gives what the recurrence uses
    assert set(q.inputs) == set(adapter.projections) - {"out_proj"}
    projected = mixer.in_proj(q.inputs["in_proj"])
    convolved = mixer.conv1d(q.inputs["conv1d"].transpose(1, 2))[..., :11]
    convolved = mixer.act(convolved).transpose(1, 2)
    if family == "zamba":
        assert adapter.has_state_transitions
        assert q.A.shape == (D, N)
        assert q.B.shape == q.C.shape == (2, 11, G, N)
        assert q.inputs["dt_proj"].shape == (2, 11, G, R)
        torch.testing.assert_close(projected[..., 0::2], q.inputs["conv1d"])
        torch.testing.assert_close(projected[..., 1::2], q.z)
        torch.testing.assert_close(convolved, q.inputs["x_proj"].flatten(-2))
        parts = []
        for g in range(G):
            made = q.inputs["x_proj"][:, :, g] @ mixer.x_proj_weight[g].T
            expected = (q.inputs["dt_proj"][:, :, g], q.B[:, :, g], q.C[:, :, g])
            for part, wanted in zip(made.split([R, N, N], dim=-1), expected, strict=True):
                torch.testing.assert_close(part, wanted)
            dt = q.inputs["dt_proj"][:, :, g] @ mixer.dt_proj_weight[g].T
            parts.append(F.softplus(dt + mixer.dt_proj_bias[g]))
        dt = torch.cat(parts, dim=-1)
    elif family in MAMBA1:
        assert adapter.has_state_transitions
        assert q.A.shape == (D, N)
        assert q.B.shape == q.C.shape == (2, 11, N)
        assert q.inputs["dt_proj"].shape == (2, 11, R)
        torch.testing.assert_close(projected[..., D:], q.z)
        torch.testing.assert_close(convolved, q.inputs["x_proj"])
        dt = F.softplus(q.inputs["dt_proj"] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    else:
        assert not adapter.has_state_transitions
        assert q.A.shape == (H,)
        assert q.B.shape == q.C.shape == (2, 11, G, N)
        assert q.inputs["conv1d"].shape == (2, 11, D + 2 * G * N)
        projected = projected * getattr(mixer, "mup_vector", 1)
        z, conv_input, dt = projected.split([D, D + 2 * G * N, H], dim=-1)
        torch.testing.assert_close(z, q.z)
        torch.testing.assert_close(conv_input, q.inputs["conv1d"])
        u, B, C = convolved.split([D, G * N, G * N], dim=-1)
        torch.testing.assert_close(u, q.u)
        torch.testing.assert_close(B, q.B.flatten(-2))
        torch.testing.assert_close(C, q.C.flatten(-2))
        dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    torch.testing.assert_close(dt, q.dt)
    y = scan(q)
    torch.testing.assert_close(adapter.out_gain(q, y) * y, adapter.out_input(q, y))
    torch.testing.assert_close(
        F.linear(adapter.out_input(q, y), mixer.out_proj.weight),
        module_output(adapter, hidden_states),
        rtol=1e-4 if DEVICE == "cpu" else 1e-3,
        atol=1e-5 if DEVICE == "cpu" else 1e-4,
    )
    torch.testing.assert_close(adapter.out_norm, mixer.out_proj.weight.norm(dim=0))


def test_padding_adds_nothing(family):
    """Neither to the recurrence nor to what comes out at the real positions."""
    adapter = find_mixers(tiny_model(family))[0]
    mask = torch.ones(2, 10)
    mask[0, 6:] = mask[1, :3] = 0
    real = mask.bool()
    hidden_states = torch.randn(2, 10, adapter.sizes.hidden_size)
    q = adapter.quantities(hidden_states, mask)
    assert (q.u[~real] == 0).all()
    assert torch.equal(q.mask, real)
    result = recomputed(adapter, hidden_states, mask)
    for row in range(2):
        alone = recomputed(adapter, hidden_states[row : row + 1, real[row]])
        assert relative(result[row, real[row]], alone[0]) < 1e-5


def test_bfloat16_model_gives_float32_quantities(family):
    model = tiny_model(family)
    adapter = find_mixers(model)[0]
    hidden_states = torch.randn(2, 12, adapter.sizes.hidden_size)
    exact = module_output(adapter, hidden_states)
    model.to(torch.bfloat16)
    q = adapter.quantities(hidden_states.bfloat16())
    assert all(t.dtype == torch.float32 for t in (q.u, q.dt, q.A, q.B, q.C, q.D, q.z))
    result = recomputed(adapter, hidden_states.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative(result.float(), exact) < 0.05


# -- axes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (TensorAxis("t", 0), [0, 3]),
        (TensorAxis("t", 0, start=10), [10, 13]),
        (TensorAxis("t", 0, start=10, block=2), [10, 11, 16, 17]),
        (TensorAxis("t", 0, repeat=3, stride=5), [0, 3, 5, 8, 10, 13]),
        (TensorAxis("t", 0, start=1, block=2, repeat=2, stride=8), [1, 2, 7, 8, 9, 10, 15, 16]),
    ],
)
def test_positions_of_an_axis(axis, expected):
    assert axis.positions([3, 0]) == axis.positions(iter([0, 3])) == expected
    assert axis.positions([]) == []


def narrow(adapter, axis, keep):
    """Keep the given indices of an axis in every tensor range that carries it."""
    dropped = {}
    for part in adapter.axes(axis):
        gone = part.positions(i for i in range(adapter.axis_length(axis)) if i not in keep)
        dropped.setdefault((part.tensor, part.dim), set()).update(gone)
    for (tensor, dim), gone in dropped.items():
        owner, _, name = tensor.rpartition(".")
        module = adapter.mixer.get_submodule(owner)
        value = getattr(module, name)
        if tensor in adapter.stacked:  # heads come first, and positions count on over them
            flat = value.detach().movedim(dim, 1).flatten(0, 1)
            flat = flat[[i for i in range(len(flat)) if i not in gone]]
            narrowed = flat.unflatten(0, (len(value), -1)).movedim(1, dim)
        else:
            index = torch.tensor([i for i in range(value.shape[dim]) if i not in gone])
            narrowed = value.detach().index_select(dim, index)
        setattr(module, name, nn.Parameter(narrowed) if name != "mup_vector" else narrowed)


def silence(adapter, axis, drop):
    """Let the given indices of an axis add nothing, while everything keeps its size."""
    mixer, sizes = adapter.mixer, adapter.sizes
    D, P = sizes.intermediate_size, sizes.head_dim
    if adapter.family in MAMBA1:
        (silence_states if axis == "state" else silence_channels)(adapter, drop)
        return
    if axis == "state":  # B of these states
        channels = [D + n for n in drop]
    elif axis == "heads":
        channels = [i * P + p for i in drop for p in range(P)]
    else:
        channels = [i * P + p for i in range(sizes.num_heads) for p in drop]
    mixer.conv1d.weight[channels] = 0
    mixer.conv1d.bias[channels] = 0
    norm = getattr(mixer, "norm", None)
    if axis != "state" and hasattr(norm, "weight"):
        # its mean runs over the silent channels, too, and counts them as zeros
        share = 1 - len(channels) / D
        norm.weight *= share**0.5
        norm.variance_epsilon *= share


def logits(model, ids):
    with torch.no_grad():
        return model.to(DEVICE)(ids.to(DEVICE), use_cache=False).logits.cpu()


EVERY_OTHER_CHANNEL = list(range(0, 64, 2))
# what stays: as many in each of the two groups of the Mamba-2 layout, others in each
STAY = {
    "state": {"mamba1": [0, 2, 3, 7], "mamba2": [0, 2, 3, 7, 9, 10, 14, 15]},
    "channels": {"mamba1": EVERY_OTHER_CHANNEL},
    "heads": {"mamba2": [0, 2, 5, 7]},
    "head_dim": {"mamba2": [1, 2, 5, 7]},
}
NARROWED = [
    *((family, axis, {}) for family in MAMBA1 for axis in ("state", "channels")),
    *((family, axis, {}) for family in MAMBA2 for axis in ("state", "heads", "head_dim")),
    *(("falcon_h1", axis, NORMED) for axis in ("heads", "head_dim")),
    ("falcon_h1", "heads", {"mamba_rms_norm": False}),
    ("bamba", "heads", {"mamba_proj_bias": True}),
]


@pytest.mark.parametrize(("family", "axis", "changes"), NARROWED, ids=str)
def test_axes_name_everything_that_shrinks(family, axis, changes, tmp_path):
    """Narrowing the named ranges is as good as silencing them, and the result loads again."""
    silent, small = (tiny_model(family, 3, **changes) for _ in range(2))
    in_groups = family not in MAMBA1 or (family, axis) == ("zamba", "state")
    keep = STAY[axis]["mamba2" if in_groups else "mamba1"]
    for big, little in zip(find_mixers(silent), find_mixers(small), strict=True):
        length = little.axis_length(axis)
        size = len(keep) // little.sizes.n_groups if axis == "state" else len(keep)
        with torch.no_grad():
            silence(big, axis, [i for i in range(length) if i not in keep])
            narrow(little, axis, keep)
            fields = little.set_size(axis, size)
            if family in ("falcon_mamba", "jamba") and axis == "state":
                little.scale_state(length / len(keep))  # as their norms run over the states
        assert little.axis_length(axis) == len(keep)
        for field, value in fields.items():
            setattr(small.config, field, value)
    ids = torch.randint(1, 96, (2, 13))
    expected, result = logits(silent, ids), logits(small, ids)
    assert relative(result, expected) < (1e-3 if family in ("falcon_mamba", "jamba") else 1e-5)
    small.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert relative(logits(loaded.eval(), ids), result) < 1e-6


@pytest.mark.parametrize(
    ("family", "axis", "size", "fields"),
    [
        ("mamba", "channels", 32, {"intermediate_size": 32}),
        ("falcon_mamba", "channels", 32, {"intermediate_size": 32}),
        ("jamba", "channels", 32, {"mamba_expand": 1}),
        ("jamba", "state", 4, {"mamba_d_state": 4}),
        ("zamba", "channels", 32, {"mamba_expand": 1}),
        ("zamba", "state", 4, {"mamba_d_state": 4}),
        ("mamba2", "heads", 4, {"num_heads": 4, "head_dim": 8, "expand": 1}),
        ("zamba2", "head_dim", 4, {"n_mamba_heads": 8, "mamba_headdim": 4, "mamba_expand": 1}),
        ("nemotron_h", "heads", 3, {"mamba_num_heads": 3, "mamba_head_dim": 8}),
        ("falcon_h1", "heads", 3, {"mamba_n_heads": 3, "mamba_d_head": 8, "mamba_d_ssm": 24}),
    ],
)
def test_fields_of_the_config(family, axis, size, fields):
    assert find_mixers(tiny_model(family))[0].set_size(axis, size) == fields


@pytest.mark.parametrize(
    ("family", "axis", "size"), [("jamba", "channels", 40), ("bamba", "heads", 3)]
)
def test_sizes_that_the_loader_cannot_make(family, axis, size):
    adapter = find_mixers(tiny_model(family))[0]
    before = {k: v for k, v in vars(adapter.mixer).items() if isinstance(v, int)}
    with pytest.raises(SparseSSMError, match=r"multiple of 32") as error:
        adapter.set_size(axis, size)
    assert adapter.name in str(error.value)
    assert "\n" not in str(error.value)
    assert {k: v for k, v in vars(adapter.mixer).items() if isinstance(v, int)} == before


def test_state_can_be_scaled(mamba1_family):
    adapter = find_mixers(tiny_model(mamba1_family))[0]
    hidden_states = torch.randn(2, 9, 32)
    with torch.no_grad():
        q = adapter.quantities(hidden_states)
        skip = q.D * q.u
        expected = adapter.output(q, 2 * (scan(q) - skip) + skip)
        adapter.scale_state(2)
    assert relative(module_output(adapter, hidden_states), expected) < 1e-5


def test_unknown_axis():
    for family, axis, allowed in (("mamba", "heads", "state, channels"),
                                  ("zamba2", "channels", "state, heads, head_dim")):  # fmt: skip
        adapter = find_mixers(tiny_model(family))[0]
        message = f"{family} has no axis '{axis}'; allowed: {allowed}"
        for call in (adapter.axes, adapter.axis_length, lambda a, x=adapter: x.set_size(a, 2)):
            with pytest.raises(SparseSSMError, match=message):
                call(axis)


# -- which modules are mixers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("jamba", ["layers.0.mamba", "layers.2.mamba"]),
        ("bamba", ["layers.0.mamba", "layers.2.mamba"]),
        ("granitemoehybrid", ["layers.0.mamba", "layers.2.mamba"]),
        ("zamba2", ["layers.0.mamba", "layers.1.mamba_decoder.mamba", "layers.2.mamba"]),
        ("zamba", ["layers.0.mamba", *(f"layers.{i}.mamba_decoder.mamba" for i in (1, 2))]),
        ("falcon_h1", ["layers.0.mamba", "layers.1.mamba"]),
        # its attention and MLP layers have a `mixer`, too
        ("nemotron_h", ["layers.0.mixer", "layers.2.mixer"]),
    ],
)
def test_only_the_state_space_layers_of_hybrids_are_mixers(family, names):
    assert [a.name for a in find_mixers(tiny_model(family))] == [f"model.{n}" for n in names]


class MadeUpMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))


def test_unknown_mixer_lists_the_known_ones():
    with pytest.raises(SparseSSMError) as error:
        find_mixers(nn.Sequential(MadeUpMixer()))
    message = str(error.value)
    assert "module '0' is a MadeUpMixer, which is not a known state-space mixer" in message
    assert len(known_mixers()) == 14
    assert all(name in message for name in known_mixers())
    assert "\n" not in message


def test_model_without_mixers():
    with pytest.raises(SparseSSMError, match="has no state-space mixer"):
        find_mixers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SparseSSMError, match="not a known state-space mixer"):
        get_adapter(nn.Linear(2, 2), "layer")


def test_mask_of_the_wrong_shape(family):
    adapter = find_mixers(tiny_model(family))[0]
    with pytest.raises(SparseSSMError, match=r"attention_mask has shape \(2, 9\)"):
        adapter.quantities(torch.randn(2, 8, 32), torch.ones(2, 9))
