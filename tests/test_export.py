"""Checkpoints in mamba_ssm's layout: names, shapes, and the function they compute."""

import json
import math

import pytest
import torch
from conftest import VOCAB, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F

from sparsessm_plugin import SparseSSMError
from sparsessm_plugin.checkpoints.export import (
    _expansion,
    export_mamba_ssm,
    load_mamba_ssm,
    mamba_ssm_config,
)

CUDA = torch.cuda.is_available()
ONE_GROUP = {"n_groups": 1}
CASES = [
    ("mamba", {}),
    ("mamba", {"state_size": 5}),
    ("mamba", {"intermediate_size": 40}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}),
    ("mamba", {"residual_in_fp32": False, "time_step_rank": 3}),
    ("mamba2", ONE_GROUP),
    ("mamba2", {**ONE_GROUP, "state_size": 12}),
    ("mamba2", {**ONE_GROUP, "num_heads": 8, "head_dim": 4, "expand": 1}),
    ("mamba2", {**ONE_GROUP, "use_bias": True, "use_conv_bias": False}),
    ("mamba2", {**ONE_GROUP, "tie_word_embeddings": True}),
]


def ids(count=2, length=21):
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(5))


def expected_shapes(config):
    """The parameters that mamba_ssm 2.3 makes from a MambaConfig, by its module definitions."""
    width, ssm = config["d_model"], dict(config["ssm_cfg"])
    multiple = config["pad_vocab_size_multiple"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    shapes = {"backbone.embedding.weight": (rows, width), "backbone.norm_f.weight": (width,)}
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    N, K = ssm["d_state"], ssm["d_conv"]
    if ssm["layer"] == "Mamba1":
        D, R = int(ssm["expand"] * width), ssm["dt_rank"]
        conv, rows_in = D, 2 * D
        mixer = {
            "x_proj.weight": (R + 2 * N, D),
            "dt_proj.weight": (D, R),
            "dt_proj.bias": (D,),
            "A_log": (D, N),
            "D": (D,),
        }
    else:
        assert isinstance(ssm["expand"], int)
        D, G = ssm["expand"] * width, ssm["ngroups"]
        assert D % ssm["headdim"] == 0
        H = D // ssm["headdim"]
        conv, rows_in = D + 2 * G * N, 2 * D + 2 * G * N + H
        mixer = {"dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (D,)}
    mixer |= {
        "in_proj.weight": (rows_in, width),
        "conv1d.weight": (conv, 1, K),
        "out_proj.weight": (width, D),
    }
    if ssm["bias"]:
        mixer |= {"in_proj.bias": (rows_in,), "out_proj.bias": (width,)}
    if ssm["conv_bias"]:
        mixer["conv1d.bias"] = (conv,)
    for layer in range(config["n_layer"]):
        shapes[f"backbone.layers.{layer}.norm.weight"] = (width,)
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": s for name, s in mixer.items()}
    return shapes


class Reference:
    """mamba_ssm's model in plain torch, one time step after the other, in float64."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, tokens):
        get, epsilon = self.tensors.__getitem__, 1e-5

        def normed(x, weight):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight

        x = get("backbone.embedding.weight")[tokens]
        for layer in range(self.config["n_layer"]):
            prefix = f"backbone.layers.{layer}."
            weights = {
                name.removeprefix(f"{prefix}mixer."): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(f"{prefix}mixer.")
            }
            kind = self.config["ssm_cfg"]["layer"]
            mixer = self.mamba1 if kind == "Mamba1" else self.mamba2
            x = x + mixer(normed(x, get(f"{prefix}norm.weight")), weights, normed)
        x = normed(x, get("backbone.norm_f.weight"))
        head = "backbone.embedding.weight" if self.config["tie_embeddings"] else "lm_head.weight"
        return x @ get(head).T

    def convolve(self, x, w):
        weight = w["conv1d.weight"]
        padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        return F.silu(F.conv1d(padded, weight, w.get("conv1d.bias"), groups=len(weight)).mT)

    def mamba1(self, x, w, normed):
        ssm = self.config["ssm_cfg"]
        R, N = ssm["dt_rank"], ssm["d_state"]
        u, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, -1)
        u = self.convolve(u, w)
        low, B, C = F.linear(u, w["x_proj.weight"]).split([R, N, N], -1)
        dt = F.softplus(F.linear(low, w["dt_proj.weight"], w["dt_proj.bias"]))
        A = -w["A_log"].exp()
        state, y = 0, []
        for t in range(x.shape[1]):
            kick = dt[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
            state = (dt[:, t, :, None] * A).exp() * state + kick
            y.append((state * C[:, t, None]).sum(-1) + w["D"] * u[:, t])
        y = torch.stack(y, 1) * F.silu(z)
        return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))

    def mamba2(self, x, w, normed):
        ssm = self.config["ssm_cfg"]
        N, P, H = ssm["d_state"], ssm["headdim"], len(w["A_log"])
        D = H * P
        projected = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
        z, uBC, dt = projected.split([D, D + 2 * N, H], -1)
        u, B, C = self.convolve(uBC, w).split([D, N, N], -1)
        u = u.unflatten(-1, (H, P))
        dt = F.softplus(dt + w["dt_bias"])
        A = -w["A_log"].exp()
        state, y = 0, []
        for t in range(x.shape[1]):
            kick = (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, None, None]
            state = (dt[:, t] * A).exp()[..., None, None] * state + kick
            y.append((state * C[:, t, None, None]).sum(-1) + w["D"][:, None] * u[:, t])
        y = normed(torch.stack(y, 1).flatten(-2) * F.silu(z), w["norm.weight"])
        return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_names_shapes_and_function(tmp_path, family, changes):
    model = tiny_model(family, **changes)
    export_mamba_ssm(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(config)
    for name in {"state_size", "intermediate_size"} & set(changes):
        size = {"state_size": -1, "intermediate_size": 0}[name]
        if family == "mamba":  # the changed size has reached the tensors
            assert tensors["backbone.layers.0.mixer.A_log"].shape[size] == changes[name]
    if not CUDA:  # where its kernels are installed, transformers cannot run on the CPU
        with torch.inference_mode():
            logits = model(input_ids=ids()).logits
        expected = Reference(config, tensors).logits(ids())
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_config_has_the_fields_of_mamba_ssm():
    assert set(mamba_ssm_config(tiny_model("mamba"))) == {
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx"),
        *("attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"),
        *("pad_vocab_size_multiple", "tie_embeddings"),
    }
    # every one a parameter of mamba_ssm's Mamba or Mamba2
    mamba = {"layer", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"}
    assert set(mamba_ssm_config(tiny_model("mamba"))["ssm_cfg"]) == mamba
    mamba2 = {*mamba - {"dt_rank"}, "headdim", "ngroups", "chunk_size"}
    assert set(mamba_ssm_config(tiny_model("mamba2", **ONE_GROUP))["ssm_cfg"]) == mamba2


def test_dtype_is_kept(tmp_path):
    export_mamba_ssm(tiny_model("mamba").bfloat16(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_expansion_makes_every_number_of_channels():
    for width in (32, 768, 1000, 2560):
        for channels in range(1, 3 * width, 7):
            assert int(_expansion(channels, width) * width) == channels
    assert _expansion(1536, 768) == 2
    assert isinstance(_expansion(1536, 768), int)
    assert _expansion(1152, 768) == 1.5


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("falcon_mamba", {}, "mamba_ssm has no falcon_mamba model"),
        ("jamba", {}, "mamba_ssm has no jamba model"),
        ("bamba", {}, "mamba_ssm has no bamba model"),
        ("mamba", {"layer_norm_epsilon": 1e-6}, "epsilon of 1e-06"),
        ("mamba", {"hidden_act": "gelu"}, "activation is gelu"),
        ("mamba", {"conv_kernel": 5}, "width 5"),
        ("mamba", {"state_size": 257}, "at most 256"),
        ("mamba2", {}, "2 groups of heads"),
        ("mamba2", {**ONE_GROUP, "time_step_limit": (0.0, 0.1)}, "limits its step sizes"),
        ("mamba2", {**ONE_GROUP, "state_size": 6}, "convolution of 76 channels"),
        ("mamba2", {**ONE_GROUP, "num_heads": 4, "head_dim": 16}, "input projection of 148"),
    ],
)
def test_what_mamba_ssm_cannot_compute(tmp_path, family, changes, message):
    with pytest.raises(SparseSSMError, match=message):
        export_mamba_ssm(tiny_model(family, **changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_different_sizes():
    model = tiny_model("mamba")
    mixer = model.backbone.layers[1].mixer
    mixer.A_log = torch.nn.Parameter(mixer.A_log[:, :4].detach().clone())
    with pytest.raises(SparseSSMError, match=r"backbone\.layers\.1\.mixer has other sizes"):
        mamba_ssm_config(model)


def test_load_without_mamba_ssm(tmp_path):
    try:
        import mamba_ssm  # noqa: F401
    except Exception:
        with pytest.raises(SparseSSMError, match="mamba_ssm cannot be imported"):
            load_mamba_ssm(tmp_path)
    else:
        with pytest.raises(SparseSSMError, match="cannot load"):
            load_mamba_ssm(tmp_path)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_mamba_ssm_computes_the_same(tmp_path, family, changes):
    """Prefill and cached decoding, against transformers on the same device."""
    pytest.importorskip("mamba_ssm")
    from mamba_ssm.utils.generation import InferenceParams

    model = tiny_model(family, **changes)
    export_mamba_ssm(model, tmp_path)
    exported, model = load_mamba_ssm(tmp_path), model.cuda()
    tokens = ids().cuda()
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        tolerance = 1e-3 * expected.abs().max()
        # Mamba-2's chunked scan multiplies in TF32, its decode step does not
        step_tolerance = tolerance * (3 if family == "mamba2" else 1)
        assert (exported(tokens).logits - expected).abs().max() < tolerance
        # the prompt, then one token after the other
        length = tokens.shape[1] - 4
        params = InferenceParams(max_seqlen=tokens.shape[1], max_batch_size=len(tokens))
        logits = [exported(tokens[:, :length], inference_params=params).logits]
        for position in range(length, tokens.shape[1]):
            params.seqlen_offset = position
            step = tokens[:, position : position + 1]
            logits.append(exported(step, inference_params=params).logits)
        assert (torch.cat(logits, 1) - expected).abs().max() < step_tolerance


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_documented_lines_load_the_weights(tmp_path):
    pytest.importorskip("mamba_ssm")
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from safetensors.torch import load_model

    model = tiny_model("mamba2", **ONE_GROUP, tie_word_embeddings=True)
    export_mamba_ssm(model, tmp_path)
    config = MambaConfig(**json.loads((tmp_path / "config.json").read_text()))
    exported = MambaLMHeadModel(config, device="cuda", dtype=torch.float32)
    load_model(exported, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    found = exported.state_dict()
    assert set(found) == {*tensors, "lm_head.weight"}
    assert all(torch.equal(found[name].cpu(), tensors[name]) for name in tensors)
