"""A checkpoint that is not wholly the model of its config is refused, in one line."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig

from sparsessm_plugin.checkpoints import saving
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.recipes.pruning import ModelSource

A_LOG = "backbone.layers.0.mixer.A_log"


def saved(folder, family="mamba", **changes):
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def relabel(folder, name, dtype):
    """Call the bytes of a tensor another type of the same width."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def refusal(folder, **fields):
    with pytest.raises(SparseSSMError) as caught:
        ModelSource(str(folder), device="cpu", **fields).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def load(folder, **fields):
    return ModelSource(str(folder), device="cpu", **fields).load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_is_loaded(tmp_path, name, dtype):
    model = tiny_model(name).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("jamba", {"num_experts": 4}),
        (
            "nemotron_h",
            {
                "layers_block_type": ["linear_attention", "moe", "full_attention"],
                "n_routed_experts": 4,
                "moe_intermediate_size": 16,
                "moe_shared_expert_intermediate_size": 16,
                "num_experts_per_tok": 2,
            },
        ),
        ("mamba", {"tie_word_embeddings": False}),
    ],
)
def test_experts_and_untied_heads_are_loaded(tmp_path, name, changes):
    load(saved(tmp_path, name, **changes))


def test_a_tied_output_matrix_may_be_stored_too(tmp_path):
    def as_published(tensors):
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()

    change_tensors(saved(tmp_path), as_published)
    load(tmp_path)


def test_tensors_without_a_place_are_refused_unless_asked_for(tmp_path):
    fewer = saved(tmp_path / "fewer", num_hidden_layers=3)
    change_config(fewer, num_hidden_layers=2)
    no_bias = saved(tmp_path / "no_bias")
    change_config(no_bias, use_conv_bias=False)
    extra = saved(tmp_path / "extra")
    change_tensors(extra, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    for folder, named in (
        (fewer, "holds 10 tensors that the model of its config.json has no place for, "
         "backbone.layers.2.mixer.A_log among them"),
        (no_bias, "holds 2 tensors"),
        (no_bias, "backbone.layers.0.mixer.conv1d.bias among them"),
        (extra, "holds 1 tensor that the model of its config.json has no place for, stranger"),
    ):  # fmt: skip
        message = refusal(folder)
        assert named in message
        assert "--allow-unused-tensors" in message
        load(folder, allow_unused_tensors=True)


def test_sizes_that_differ_are_said(tmp_path):
    change_config(saved(tmp_path), state_size=16, vocab_size=10**12)
    message = refusal(tmp_path)  # before room for the vocabulary is made
    assert "with the shape [" in message
    assert "and the model of its config.json has [" in message


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int32, "I32"), (torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64")],
)
def test_weights_of_other_types_are_refused(tmp_path, dtype, said):
    def convert(tensors):
        tensors[A_LOG] = tensors[A_LOG].to(dtype)

    change_tensors(saved(tmp_path), convert)
    assert f"stores {A_LOG} as {said}; weights are stored as F64, F32, F16, BF16" in refusal(
        tmp_path
    )


def test_relabelled_tensors_are_refused(tmp_path):
    relabel(saved(tmp_path / "whole"), A_LOG, "I32")
    assert f"stores {A_LOG} as I32" in refusal(tmp_path / "whole")
    tiny_model("mamba").bfloat16().save_pretrained(tmp_path / "half")
    relabel(tmp_path / "half", A_LOG, "F16")
    message = refusal(tmp_path / "half")
    assert f"stores {A_LOG} as F16" in message
    assert "mislabelled" in message


def test_float32_among_half_precision_is_no_mistake(tmp_path):
    model = tiny_model("mamba2").bfloat16()
    model.backbone.layers[0].mixer.A_log.data = model.backbone.layers[0].mixer.A_log.float()
    model.save_pretrained(tmp_path)
    load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [A_LOG, "backbone.norm_f.weight", "backbone.embeddings.weight"])
def test_values_that_are_not_finite_are_named(tmp_path, name, value):
    def spoil(tensors):
        tensors[name].flatten()[-1] = value  # the last token's row, which no text uses

    change_tensors(saved(tmp_path), spoil)
    assert f"{name} holds NaN or infinite values" in refusal(tmp_path)


def test_large_finite_values_and_those_too_large_for_the_dtype(tmp_path):
    def enlarge(tensors):
        tensors["backbone.norm_f.weight"].fill_(3e38)  # the sum is infinite in float32

    change_tensors(saved(tmp_path), enlarge)
    load(tmp_path)
    assert "backbone.norm_f.weight holds NaN or infinite" in refusal(tmp_path, dtype="float16")


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('the payload ran')",)


@pytest.mark.parametrize("shard", ["x.bin", "../model.safetensors", "/etc/x.safetensors", 5, ""])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "own.safetensors.index.json"])
def test_an_index_may_name_safetensors_of_its_folder_only(tmp_path, monkeypatch, shard, index):
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    torch.save(Payload(), folder / "x.bin")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {A_LOG: shard}}))
    if index.startswith("own"):
        change_config(folder, transformers_weights=index)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load"))
    message = refusal(folder)
    assert f"{index}: {str(shard)!r} is no .safetensors file of this folder" in message


def test_a_config_cannot_name_a_pickle(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    torch.save(Payload(), folder / "adapter_model.bin")
    change_config(folder, transformers_weights="adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load"))
    assert "'adapter_model.bin' is no .safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000]
)
def test_a_damaged_index_is_one_line(tmp_path, content):
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "is no index of weights" in refusal(folder)


def test_shards_are_read(tmp_path):
    model = tiny_model("mamba")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    # in a shard that is not the first one, too
    name = "backbone.norm_f.weight"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    path = tmp_path / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, path, {"format": "pt"})
    assert f"stores {name} as I32" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
def test_others_quantized_weights_are_refused_with_what_quantized_them(method, tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    relabel(folder, A_LOG, "I32")
    message = refusal(folder)
    assert f"stores {A_LOG} as I32" in message
    assert f"says {method}, and of quantized ones those of compressed-tensors load" in message


def test_more_layers_than_any_model_has(tmp_path):
    # more than there is memory for, where a list of the layers is made
    change_config(saved(tmp_path), num_hidden_layers=10**12)
    script = "import sys; from sparsessm_plugin.recipes.pruning import ModelSource\n" + (
        "ModelSource(sys.argv[1]).load_skeleton()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "config.json states num_hidden_layers: 1000000000000" in done.stderr
    assert "at most 2048" in done.stderr


def test_the_sizes_of_a_config_that_transformers_refuses_are_said(tmp_path):
    change_config(saved(tmp_path), hidden_size="wide")
    message = refusal(tmp_path)
    assert "hidden_size" in message
    assert "wide" in message
    assert not message.endswith(":")


def test_a_model_that_comes_from_no_folder_is_saved(tmp_path):
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert model.config._name_or_path == ""
    saving.change_config(model, {})
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (written["state_size"], written["intermediate_size"]) == (4, 64)
