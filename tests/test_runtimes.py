"""Which runtime loads a checkpoint, told from config.json and safetensors headers alone."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, FAMILIES, MAMBA1, tiny_model
from safetensors.torch import save_file

import sparsessm_plugin
from sparsessm_plugin.checkpoints.export import export_mamba_ssm
from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.errors import SparseSSMError

NAMES = [
    *("transformers", "transformers + sparsessm_plugin", "vLLM", "vLLM (CPU)", "mamba-ssm"),
    *("llama.cpp (CPU)", "llama.cpp (CUDA)", "llama.cpp (Vulkan)", "llama.cpp (Metal)"),
    *("mlx-lm (Metal)", "mlx-lm (CPU)"),
]
READ = {"vLLM", "llama.cpp (CUDA)", "llama.cpp (Vulkan)", "llama.cpp (Metal)", "mlx-lm (Metal)"}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
        }
    },
}


def checkpoint(folder, family, changes=None, rename=None, **tensors):
    """A saved tiny model with other config fields, tensor names and tensors."""
    model = tiny_model(family)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **(changes or {})}))
    state = {
        (rename(name) if rename else name): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
    }
    save_file({**state, **tensors}, folder / "model.safetensors")
    return folder


def packed(*parts):
    """A renaming of weights as packed formats name them."""

    def rename(name):
        ends = tuple(f"{part}.weight" for part in parts)
        return f"{name}_packed" if name.endswith(ends) else name

    return rename


def scaled(*parts):
    """Scales of the first mixer's layers, as in int-quantized and float-quantized formats."""
    names = (f"backbone.layers.0.mixer.{part}.weight_scale" for part in parts)
    return {name: torch.ones(1) for name in names}


def answers(folder):
    found = runtime_support(folder)
    assert [support.runtime for support in found] == NAMES
    for support in found:
        assert support.reasons or support.answer == "yes"
        assert all("\n" not in reason for reason in support.reasons)
        assert support.run is (support.runtime not in READ)
        assert support.version
        reasons = set(support.reasons)
        assert {limit.reason for limit in support.limits} <= reasons or support.answer == "no"
    return {support.runtime: support.answer for support in found}, {
        support.runtime: " | ".join(support.reasons) for support in found
    }


# the tiny models have 2 groups, which these families normalize together in transformers alone
ONE_NORM = ("mamba2", "bamba", "granitemoehybrid")


def test_dense_checkpoints_of_every_family(family, tmp_path):
    assert family in FAMILIES
    answer, reasons = answers(checkpoint(tmp_path, family))
    assert answer["transformers"] == answer["transformers + sparsessm_plugin"] == "yes"
    # neither Zamba nor Bamba is in vLLM's registry
    elsewhere = "unknown" if family in ONE_NORM else "yes"
    assert answer["vLLM"] == ("no" if family in ("zamba", "bamba") else elsewhere)
    assert answer["vLLM (CPU)"] == ("no" if family in MAMBA1 else answer["vLLM"])
    assert answer["mamba-ssm"] == "no"
    groups = "2 groups" if family == "mamba2" else f"no {family} model"
    where = "sparsessm export" if family in ("mamba", "mamba2") else f"no {family} model"
    assert where in reasons["mamba-ssm"]
    assert groups in reasons["mamba-ssm"] or family == "mamba"
    if family in ("zamba", "zamba2"):
        for name in NAMES[5:]:
            assert answer[name] == "no"
            assert family in reasons[name]


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_packed_out_proj(family, tmp_path):
    folder = checkpoint(
        tmp_path,
        family,
        {"quantization_config": PACKED},
        packed("in_proj", "out_proj"),
        **scaled("in_proj", "out_proj"),
    )
    answer, reasons = answers(folder)
    assert answer["transformers"] == "no"
    assert "out_proj is packed" in reasons["transformers"]
    assert "int-quantized" in reasons["transformers"]
    assert answer["transformers + sparsessm_plugin"] == "yes"
    assert answer["vLLM (CPU)"] == "no"
    assert answer["vLLM"] == ("unknown" if family == "mamba2" else "no")
    if family == "mamba2":
        assert "168 outputs" in reasons["vLLM"]
        assert "multiples of 32" in reasons["vLLM (CPU)"]
    assert answer["mamba-ssm"] == "no"
    if family != "falcon_mamba":  # of which it has no model at all
        assert reasons["mamba-ssm"] == "it knows no quantization"


def test_packed_elsewhere_loads_in_stock_transformers(tmp_path):
    folder = checkpoint(
        tmp_path, "mamba", {"quantization_config": PACKED}, packed("in_proj"), **scaled("in_proj")
    )
    answer, reasons = answers(folder)
    assert answer["transformers"] == "yes"
    assert "compressed-tensors" in reasons["transformers"]
    assert "mixer.in_proj is quantized" in reasons["vLLM"]


def test_int4_in_bytes_may_not_suit_vllm(tmp_path):
    config = json.loads(json.dumps(PACKED))
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    answer, reasons = answers(
        checkpoint(tmp_path, "mamba2", {"quantization_config": config}, **scaled("in_proj"))
    )
    assert (answer["transformers"], answer["vLLM"]) == ("yes", "unknown")
    assert "int-quantized" in reasons["vLLM"]


def test_quantized_dt_proj(tmp_path):
    folder = checkpoint(tmp_path, "mamba", {"quantization_config": PACKED}, **scaled("dt_proj"))
    answer, reasons = answers(folder)
    assert answer["transformers"] == answer["transformers + sparsessm_plugin"] == "unknown"
    assert "dt_proj is quantized" in reasons["transformers"]


def test_state_sizes_that_differ_by_layer(tmp_path):
    folder = checkpoint(tmp_path, "mamba", **{"backbone.layers.1.mixer.A_log": torch.zeros(64, 4)})
    answer, reasons = answers(folder)
    assert set(answer.values()) == {"no"}
    assert "layers.1.mixer has 4 states" in reasons["transformers"]
    assert "8" in reasons["vLLM"]


@pytest.mark.parametrize(
    ("family", "field"),
    [("mamba", "state_size"), ("mamba2", "state_size"), ("bamba", "mamba_d_state"),
     ("zamba2", "mamba_d_state"), ("nemotron_h", "ssm_state_size")],
)  # fmt: skip
def test_a_config_with_another_state_size(family, field, tmp_path):
    answer, reasons = answers(checkpoint(tmp_path, family, {field: 16}))
    assert answer["transformers"] == answer["vLLM"] == "no"
    assert "the config states 16 states, the tensors have 8" in reasons["transformers"]


def test_too_many_states_for_the_kernels(tmp_path):
    tensors = {f"backbone.layers.{i}.mixer.A_log": torch.zeros(64, 512) for i in range(2)}
    answer, reasons = answers(checkpoint(tmp_path, "mamba", {"state_size": 512}, **tensors))
    assert (answer["transformers"], answer["vLLM"]) == ("yes", "no")
    assert "at most 256" in reasons["vLLM"]


def test_rescaling_at_every_load(tmp_path):
    folder = checkpoint(tmp_path, "mamba", {"rescale_prenorm_residual": True})
    answer, reasons = answers(folder)
    assert answer["transformers"] == "no"
    assert "divides out_proj" in reasons["transformers"]
    assert answer["transformers + sparsessm_plugin"] == "yes"
    assert answer["vLLM"] == "unknown"


def test_experts_one_by_one(tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0.up_proj.weight"
    folder = checkpoint(tmp_path, "granitemoehybrid", **{name: torch.zeros(2, 2)})
    answer, reasons = answers(folder)
    assert answer["transformers"] == answer["transformers + sparsessm_plugin"] == "no"
    assert "experts" in reasons["transformers"]


def test_formats_that_are_gone(tmp_path):
    sparsity = {"sparsity_config": {"format": "sparse-24-bitmask"}}
    config = {**PACKED, **sparsity, "format": "marlin-24"}
    _, reasons = answers(checkpoint(tmp_path, "mamba2", {"quantization_config": config}))
    for name in ("marlin-24", "sparse-24-bitmask"):
        assert f"reads the format {name} no longer" in reasons["transformers"]


def test_what_is_not_known(tmp_path):
    changes = {"model_type": "new_ssm", "quantization_config": {"quant_method": "awq"}}
    answer, reasons = answers(checkpoint(tmp_path, "mamba", changes))
    assert answer["transformers"] == "unknown"
    assert "'new_ssm'" in reasons["transformers"]
    assert "awq" in reasons["transformers"]
    assert answer["mamba-ssm"] == "no"


def test_an_export_for_mamba_ssm(tmp_path):
    from transformers import AutoModelForCausalLM

    export_mamba_ssm(AutoModelForCausalLM.from_pretrained(DEMO), tmp_path)
    answer, reasons = answers(tmp_path)
    assert [name for name in NAMES if answer[name] == "yes"] == ["mamba-ssm"]
    assert "load_mamba_ssm" in reasons["mamba-ssm"]


@pytest.mark.parametrize(
    ("A_log", "conv1d", "reason"),
    [
        ((4,), (44, 1, 4), "layers.0.mixer.conv1d has 44 channels, and causal-conv1d needs a mul"),
        ((40, 512), (40, 1, 4), "512 states; its scan takes at most 256"),
        ((44, 16), (44, 1, 4), ""),  # in the Mamba-1 layout any number of channels will do
    ],
)
def test_sizes_that_its_kernels_refuse(A_log, conv1d, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 16, "ssm_cfg": {}}))
    mixer = "backbone.layers.0.mixer"
    tensors = {f"{mixer}.A_log": torch.zeros(A_log), f"{mixer}.conv1d.weight": torch.zeros(conv1d)}
    save_file(tensors, tmp_path / "model.safetensors")
    answer, reasons = answers(tmp_path)
    assert answer["mamba-ssm"] == ("no" if reason else "yes")
    assert reason in reasons["mamba-ssm"]


def test_shards_are_read_together(tmp_path):
    model = tiny_model("mamba")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert answers(tmp_path)[0]["transformers"] == "yes"


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(SparseSSMError, match=r"config\.json"):
        runtime_support(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SparseSSMError, match="no mapping"):
        runtime_support(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SparseSSMError, match=r"no \.safetensors file"):
        runtime_support(tmp_path)
    for content in (b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", b"\x05" + b"\0" * 7 + b"{]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(SparseSSMError, match="no safetensors file"):
            runtime_support(tmp_path)


def test_it_reads_and_loads_nothing():
    code = (
        "import sys\n"
        "from sparsessm_plugin.checkpoints.runtimes import runtime_support\n"
        f"assert len(runtime_support({str(DEMO)!r})) == 11\n"
        "assert not {'torch', 'transformers', 'safetensors', 'llmcompressor'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sparsessm_plugin.runtime_support is runtime_support
