"""Layers that predict several tokens at once: transformers leaves them out, others load them."""

import json

import pytest
import torch
from conftest import MOE_ROUNDING, VOCAB, batches, may_be_off, run, tiny_model, with_images
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import sparsessm_plugin as plugin

READY = batches(1, 2, 16)
# a model that has other sizes than these layers, or the same
OTHER = {
    "width": lambda: plugin.WidthRemovalModifier(keep=16),
    "attention": lambda: plugin.AttentionRemovalModifier(keep=1),
    "mlp": lambda: plugin.MLPRemovalModifier(keep=24),
    "order": lambda: plugin.SensitivitySparseGPTModifier(mask_structure="2:4", solver="magnitude"),
}
SAME = {
    "states": lambda: plugin.StateRemovalModifier(keep=4, reconstruct_steps=1),
    "channels": lambda: plugin.ChannelRemovalModifier(axis="value_dims", keep=8),
    "layers": lambda: plugin.LayerRemovalModifier(keep=2, saliency="random", compensate="none"),
    "zeros": lambda: plugin.SensitivitySparseGPTModifier(sparsity=0.5, solver="magnitude"),
}


def checkpoint(folder, model):
    """A model saved with one such layer, as it is published, and its tensors."""
    language = model.config.get_text_config()
    if language.model_type != "qwen3_next":  # which does not say so
        language.mtp_num_hidden_layers = 1
    model.save_pretrained(folder)
    width, heads = language.hidden_size, language.num_attention_heads * language.head_dim
    shapes = {
        "fc": (width, 2 * width),
        "norm": (width,),
        "layers.0.self_attn.q_proj": (2 * heads, width),
        "layers.0.mlp.down_proj": (width, language.intermediate_size),
    }
    mtp = {f"mtp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    file = folder / "model.safetensors"
    save_file({**load_file(file), **mtp}, file, {"format": "pt"})
    return mtp


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: t for name, t in tensors.items() if name.startswith("mtp.")}


def said(folder):
    content = json.loads((folder / "config.json").read_text())
    return content.get("text_config", content)["mtp_num_hidden_layers"]


def loads_again(model, folder, auto=AutoModelForCausalLM, away=0.0):
    ids = torch.randint(1, VOCAB - 6, (1, 9)).to(model.device)
    again = auto.from_pretrained(folder).eval().to(model.device)
    with torch.no_grad():
        expected = model(ids).logits
        far = (again(ids).logits - expected).abs().max()
    assert far <= may_be_off(expected, away)


@pytest.mark.parametrize("name", OTHER)
def test_layers_of_another_size_are_left_out(name, tmp_path):
    """A converter would make room for them, and fail on their shapes or miss them."""
    checkpoint(tmp_path / "dense", tiny_model("qwen3_5"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    run(model, OTHER[name](), READY)
    model.save_pretrained(tmp_path / "saved")
    assert said(tmp_path / "saved") == 0
    assert not stored(tmp_path / "saved")
    loads_again(model, tmp_path / "saved")


@pytest.mark.parametrize("name", SAME)
def test_layers_of_the_same_size_stay_bit_by_bit(name, tmp_path):
    mtp = checkpoint(tmp_path / "dense", tiny_model("qwen3_5"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    run(model, SAME[name](), READY)
    model.save_pretrained(tmp_path / "saved")
    assert said(tmp_path / "saved") == 1
    found = stored(tmp_path / "saved")
    assert found.keys() == mtp.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in mtp.items())
    loads_again(model, tmp_path / "saved")


def test_beside_an_image_encoder(tmp_path):
    checkpoint(tmp_path / "dense", with_images())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    run(model, OTHER["attention"](), READY)
    model.save_pretrained(tmp_path / "saved")
    assert said(tmp_path / "saved") == 0
    assert not stored(tmp_path / "saved")
    loads_again(model, tmp_path / "saved", AutoModelForImageTextToText)


@pytest.mark.parametrize("name", ["states", "attention"])
def test_of_a_config_that_does_not_count_them(name, tmp_path):
    mtp = checkpoint(tmp_path / "dense", tiny_model("qwen3_next"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    run(model, {**SAME, **OTHER}[name](), READY)
    model.save_pretrained(tmp_path / "saved")
    found = stored(tmp_path / "saved")
    assert found.keys() == (mtp.keys() if name in SAME else set())
    assert all(torch.equal(found[key], mtp[key]) for key in found)
    loads_again(model, tmp_path / "saved", AutoModelForCausalLM, MOE_ROUNDING)
