"""What is quantized and saved loads again, in a fresh process, with the logits it had."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    DEMO,
    Loader,
    batches,
    logits_beside,
    may_be_off,
    same_logits,
    stock_process,
    tiny_model,
)
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaPreTrainedModel

import sparsessm_plugin
from sparsessm_plugin import SparseGPTQModifier
from sparsessm_plugin.checkpoints import loading
from sparsessm_plugin.checkpoints.loading import enable_compressed_loading
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recipes.pruning import ModelSource

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
IGNORE = ["lm_head", "re:.*dt_proj$", "re:.*router.*", "re:.*experts.*"]


def scheme(kind, **weight_format):
    if kind != "W4A16":
        return {"targets": ["Linear"], "scheme": kind}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4, **weight_format}}}


# name -> family, fields of the modifier, changes of the config, whether stock transformers loads it
CASES = {
    "mamba-int4": ("mamba", scheme("W4A16"), {}, False),
    "mamba2-int4": ("mamba2", scheme("W4A16"), {}, False),
    "falcon_mamba-int4": ("falcon_mamba", scheme("W4A16"), {}, False),
    "jamba-int4": ("jamba", scheme("W4A16"), {}, True),
    "granitemoehybrid-int4": ("granitemoehybrid", scheme("W4A16"), {}, True),
    "mamba-int4-in-bytes": ("mamba", scheme("W4A16", format="int-quantized"), {}, True),
    "mamba-int4-but-out_proj": (
        "mamba",
        {
            "config_groups": {
                "packed": {"targets": ["re:.*in_proj$", "re:.*x_proj$"], "weights": INT4},
                "bytes": {
                    "targets": ["re:.*out_proj$"],
                    "weights": INT4,
                    "format": "int-quantized",
                },
            }
        },
        {},
        True,
    ),
    "mamba-int8": ("mamba", scheme("W8A8"), {}, True),
    "mamba2-int8": ("mamba2", scheme("W8A8"), {}, True),
    "mamba-fp8": ("mamba", scheme("FP8_DYNAMIC"), {}, True),
    "mamba2-fp8": ("mamba2", scheme("FP8_DYNAMIC"), {}, True),
    "mamba-int8-rescaling": ("mamba", scheme("W8A8"), {"rescale_prenorm_residual": True}, False),
    "mamba-int4-rescaling": ("mamba", scheme("W4A16"), {"rescale_prenorm_residual": True}, False),
}

# loads every checkpoint, by stock transformers before anything of ours is used and by ours after
READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
results = {}
for name in sys.argv[2:]:
    results[name] = found = {}
    expected = torch.load(f"{sys.argv[1]}/{name}/expected.pt")
    def same(model):
        with torch.no_grad():
            ids = expected["input_ids"]
            logits = model.to(ids.device)(ids).logits
        # weights are decompressed by the first forward
        zeros = all(
            not model.get_parameter(key)[mask].any() for key, mask in expected["zeros"].items()
        )
        away = float((logits - expected["logits"]).abs().max())
        return [away <= expected["away"], zeros]
    for how in ("stock", "ours"):
        try:
            if how == "ours":
                import sparsessm_plugin
                model = sparsessm_plugin.load(f"{sys.argv[1]}/{name}")
            else:
                assert "sparsessm_plugin.checkpoints.loading" not in sys.modules
                model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")
            found[how] = same(model)
        except Exception as error:
            found[how] = type(error).__name__
        if how == "ours":
            del sys.modules["sparsessm_plugin.checkpoints.loading"]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of quantized 2:4 checkpoints, with the logits of the models in memory."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = batches()[0]["input_ids"]
    for name, (family, fields, changes, _) in CASES.items():
        model = tiny_model(family, **changes)
        zeros = {}
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith(("in_proj.weight", "out_proj.weight")):
                    fours = weight.view(weight.shape[0], -1, 4)
                    fours.scatter_(-1, fours.abs().topk(2, largest=False).indices, 0.0)
                    zeros[key] = weight == 0
            ignore = IGNORE if "scheme" in fields or len(fields["config_groups"]) == 1 else []
            oneshot(
                model=model,
                recipe=SparseGPTQModifier(ignore=ignore, **fields),
                dataset=Loader(batches()),
                processor=tokenizer,
            )
            logits = model(ids).logits
        model.save_pretrained(root / name)
        zeros = {key: mask.to(logits.device) for key, mask in zeros.items()}
        expected = {"input_ids": ids.to(logits.device), "logits": logits, "zeros": zeros}
        expected["away"] = may_be_off(logits, model=model)
        torch.save(expected, root / name / "expected.pt")
    return root


@pytest.fixture(scope="module")
def loaded(saved):
    """What a fresh process says of each."""
    return stock_process(READER, saved, *CASES)


@pytest.mark.parametrize("name", CASES)
def test_load_gives_the_logits_in_memory_and_the_zeros(loaded, name):
    assert loaded[name]["ours"] == [True, True]


@pytest.mark.parametrize("name", CASES)
def test_what_stock_transformers_loads(loaded, name):
    """When a False becomes True, transformers has mended what loading.py works around."""
    assert (loaded[name]["stock"] == [True, True]) == CASES[name][3]


def test_bytes_need_more_room_than_packed_int4(saved):
    def size(name):
        return (saved / name / "model.safetensors").stat().st_size

    assert size("mamba-int4") < size("mamba-int4-but-out_proj") < size("mamba-int4-in-bytes")


@pytest.mark.parametrize("name", CASES)
def test_a_note_says_how_to_load_what_stock_transformers_does_not(saved, name):
    note = saved / name / "LOADING.md"
    assert note.exists() != CASES[name][3]
    if note.exists():
        assert "sparsessm_plugin.load(" in note.read_text()


def test_the_note_follows_the_model_and_spares_files_of_others(tmp_path):
    model = tiny_model("mamba", rescale_prenorm_residual=True)
    change_config(model, {})
    note = tmp_path / "LOADING.md"
    model.save_pretrained(tmp_path)
    assert "sparsessm_plugin.load(" in note.read_text()
    model.config.rescale_prenorm_residual = False
    model.save_pretrained(tmp_path)
    assert not note.exists()
    note.write_text("somebody's own")
    for rescales in (True, False):
        model.config.rescale_prenorm_residual = rescales
        model.save_pretrained(tmp_path)
        assert note.read_text() == "somebody's own"


def test_loading_leaves_transformers_as_it_was(saved):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2PreTrainedModel

    classes = (MambaPreTrainedModel, Mamba2PreTrainedModel)
    before = [cls._init_weights for cls in classes]
    assert not any(hasattr(initialise, "_tolerates_compressed") for initialise in before)
    model = sparsessm_plugin.load(saved / "mamba-int4")
    # nothing of the stand-in is left
    assert all("weight" not in vars(mixer.out_proj) for mixer in _mixers(model))
    with pytest.raises(OSError, match="nowhere"):
        sparsessm_plugin.load(DEMO / "nowhere")
    assert [cls._init_weights for cls in classes] == before


def test_a_process_may_ask_for_packed_checkpoints_for_good(saved):
    script = """
import json, sys, torch, sparsessm_plugin
from transformers import AutoModelForCausalLM
sparsessm_plugin.enable_compressed_loading()
sparsessm_plugin.load(sys.argv[1])  # takes nothing back
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    ids = expected["input_ids"]
    logits = model.to(ids.device)(ids).logits
    print(json.dumps(float((logits - expected["logits"]).abs().max())))
"""
    expected = torch.load(saved / "mamba-int4" / "expected.pt")
    assert stock_process(script, saved / "mamba-int4") <= expected["away"]


def _mixers(model):
    return [adapter.mixer for adapter in sparsessm_plugin.find_mixers(model)]


def test_a_loaded_model_can_be_saved_and_loaded_again(saved, tmp_path):
    model = sparsessm_plugin.load(saved / "mamba-int4")
    model.save_pretrained(tmp_path)
    expected = torch.load(saved / "mamba-int4" / "expected.pt")
    again = sparsessm_plugin.load(tmp_path)
    logits = logits_beside(again, expected["logits"], expected["input_ids"])
    assert same_logits(logits, expected["logits"])


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_dense_checkpoints_that_rescale_are_loaded_as_saved(family, tmp_path):
    model = tiny_model(family, rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path)
    loaded = sparsessm_plugin.load(tmp_path)
    assert loaded.config.rescale_prenorm_residual is True
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # stock transformers divides once more; load() is for that, from_pretrained stays as it is
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs, ours = (m.backbone.layers[0].mixer.out_proj.weight for m in (stock, model))
    assert torch.allclose(theirs, ours / 2**0.5)


def test_load_passes_arguments_on():
    model = sparsessm_plugin.load(DEMO, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    with pytest.raises(OSError, match="nowhere"):
        sparsessm_plugin.load(DEMO / "nowhere")


def test_new_models_are_initialised_as_before(monkeypatch):
    stock = MambaPreTrainedModel._init_weights
    for cls in loading._initialised_classes():  # put back afterwards
        monkeypatch.setattr(cls, "_init_weights", cls._init_weights)
    enable_compressed_loading()
    enable_compressed_loading()
    assert MambaPreTrainedModel._init_weights.__wrapped__ is stock
    assert not hasattr(stock, "_tolerates_compressed")  # wrapped only once
    config = MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, rescale_prenorm_residual=True
    )
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config).state_dict()
    monkeypatch.setattr(MambaPreTrainedModel, "_init_weights", stock)
    torch.manual_seed(0)
    for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_nothing_is_mended_at_the_import_of_the_package():
    code = (
        "import sys, sparsessm_plugin, torch\n"
        "assert not any('modeling_mamba' in name for name in sys.modules)\n"
        "assert 'sparsessm_plugin.checkpoints.loading' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_counts_packed_weights_and_names_the_runtimes(saved, capsys):
    from sparsessm_plugin.cli import app

    for case in ("mamba-int4", "mamba2-int4"):
        with pytest.raises(SystemExit) as done:
            app(["inspect", str(saved / case)])
        assert done.value.code == 0
        printed = capsys.readouterr().out
        assert "transformers: no" in printed
        assert "transformers + sparsessm_plugin: yes" in printed
        dense = tiny_model(case.partition("-")[0])
        expected = sum(m.mixer.out_proj.weight.numel() for m in find_mixers(dense))
        row = next(line for line in printed.splitlines() if line.strip().startswith("out_proj"))
        assert int(row.split()[1].replace(",", "")) == expected
        # 2:4 is half; on four bits some weights round to zero besides
        assert 50 <= float(row.split()[3].rstrip("%")) < 60


@pytest.mark.parametrize("name", CASES)
def test_quantized_checkpoints_are_whole(saved, name):
    """Scales, packed weights and their whole numbers are no strangers to the model."""
    ModelSource(str(saved / name), device="cpu").load()


def test_only_quantized_weights_may_be_whole_numbers(saved, tmp_path):
    shutil.copytree(saved / "mamba-int8", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "backbone.layers.0.mixer.A_log"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SparseSSMError, match=f"stores {name} as I8"):
        ModelSource(str(tmp_path / "model"), device="cpu").load()


def test_float8_without_scales_is_loaded_only_where_it_is_stated(tmp_path):
    """Without the statement it is a quantized checkpoint that has lost its config."""
    tiny_model("mamba").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.0.mixer.in_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    stated = {"format": "pt", "unscaled_float8": "true"}
    save_file(weights, tmp_path / "model.safetensors", stated)
    loaded = ModelSource(str(tmp_path), device="cpu").load()
    assert loaded.get_parameter(name).equal(weights[name].float())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SparseSSMError, match=f"stores {name} as F8_E4M3"):
        ModelSource(str(tmp_path), device="cpu").load()
