"""Weights on disk: the same result as in memory, no more than a layer at once, nothing left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload.cache import DiskCache
from conftest import EXPERTS, VOCAB, saved_tiny_model, stock_process, tiny_model
from safetensors import safe_open
from torch import nn

from sparsessm_plugin.allocation.probe import LayerProbe, Probe
from sparsessm_plugin.calibration.passes import LayerPass, forward_context
from sparsessm_plugin.checkpoints import offloading
from sparsessm_plugin.checkpoints.offloading import choose_offload, weights_as_loaded
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.families.in_turn import on_disk, parameters_in_turn, tensors_in_turn
from sparsessm_plugin.files import list_files, scratch_directory
from sparsessm_plugin.recipes.pruning import ModelSource

SHORT = ("--num-samples", 6, "--max-seq-length", 64, "--batch-size", 2)
LARGE = {"vocab_size": 4096}  # of the tokenizer
SPREAD = {  # all of a hybrid, its experts among it, each as much as it can bear
    "targets": ["Linear"],
    "ignore": ["lm_head", "re:.*router.*"],
}


@pytest.fixture(autouse=True)
def own_index(monkeypatch):
    """What other tests leave on disk is not these tests' matter."""
    monkeypatch.setattr(DiskCache, "index", {})


def recipe_of(**modifiers):
    return json.dumps({"a_stage": {"a_modifiers": modifiers}})


def as_argument(recipe, folder):
    """A recipe's name, or the path of one that is given as text."""
    if not recipe.startswith("{"):
        return recipe
    (folder / "own.yaml").write_text(recipe)
    return str(folder / "own.yaml")


def saved(folder, family, dtype=torch.float32, **changes):
    model = saved_tiny_model(folder, family, **{**EXPERTS.get(family, {}), **LARGE, **changes})
    if dtype != torch.float32:
        model.to(dtype).save_pretrained(folder)
    return model


def bytes_of(folder):
    return {file: (Path(folder) / file).read_bytes() for file in list_files(Path(folder))}


RECIPES = {
    "alog-50": ("mamba", "falcon_mamba"),
    "whole-50": ("falcon_mamba", "mamba2", "nemotron_h"),
    "whole-50-paper": ("mamba",),
    "whole-2of4": ("falcon_mamba",),
    "state-50": ("falcon_mamba", "granitemoehybrid"),
    "state-50-w8a8": ("mamba2",),
    recipe_of(SensitivitySparseGPTModifier={"sparsity": 0.5, **SPREAD}): ("granitemoehybrid",),
    recipe_of(SensitivitySparseGPTModifier={"sparsity": 0.5, "solver": "magnitude"}): ("jamba",),
}


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_are_read_in_the_type_that_is_asked_for(
    sparsessm, text_file, tmp_path, stored, dtype
):
    saved(tmp_path / "dense", "falcon_mamba", getattr(torch, stored))
    for place in ("none", "disk"):
        code, _, stderr = sparsessm(
            *("prune", tmp_path / "dense", "--recipe", "alog-50", "--calibration", text_file),
            *(*SHORT, "--dtype", dtype, "--offload", place, "--output", tmp_path / place),
        )
        assert code == 0, stderr
    found = [bytes_of(tmp_path / place) for place in ("none", "disk")]
    assert found[0]["model.safetensors"] == found[1]["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "recipe"), [(family, name) for name, own in RECIPES.items() for family in own]
)
def test_the_result_is_that_of_pruning_in_memory(sparsessm, text_file, tmp_path, family, recipe):
    """File by file, byte by byte; the checkpoint stays as it was, and nothing else is left."""
    dense = tmp_path / "dense"
    saved(dense, family)
    before = bytes_of(dense)
    recipe = as_argument(recipe, tmp_path)
    for place in ("none", "disk"):
        code, _, stderr = sparsessm(
            *("prune", dense, "--recipe", recipe, "--calibration", text_file, *SHORT),
            *("--offload", place, "--output", tmp_path / place),
        )
        assert code == 0, stderr
    found = {place: bytes_of(tmp_path / place) for place in ("none", "disk")}
    reports = {p: json.loads(files.pop("sparsessm_report.json")) for p, files in found.items()}
    assert found["disk"] == found["none"]
    assert [reports[place]["offload"] for place in found] == ["none", "disk"]
    assert any("safetensors" in name for name in found["disk"])
    changed = {k: v for k, v in found["disk"].items() if before.get(k) not in (None, v)}
    assert "model.safetensors" in changed
    assert bytes_of(dense) == before
    assert set(os.listdir(tmp_path)) - {"own.yaml"} == {"dense", "none", "disk"}
    assert not DiskCache.index


def test_half_precision_is_multiplied_alike(sparsessm, text_file, tmp_path):
    """torch multiplies bfloat16 by a view of a file's bytes in other steps than by a weight."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "time_step_rank": 16}
    saved(tmp_path / "dense", "falcon_mamba", torch.bfloat16, **sizes)
    for place in ("none", "disk"):
        code, _, stderr = sparsessm(
            *("prune", tmp_path / "dense", "--recipe", "whole-50", *SHORT),
            *("--calibration", text_file, "--offload", place, "--output", tmp_path / place),
        )
        assert code == 0, stderr
    found = [bytes_of(tmp_path / place) for place in ("none", "disk")]
    assert found[0]["model.safetensors"] == found[1]["model.safetensors"]


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(40).view(2, 20)
with torch.no_grad():
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder).eval()(ids, use_cache=False).logits
        for folder in sys.argv[1:]
    )
assert torch.equal(first, second)
print(json.dumps("sparsessm_plugin.modifiers" in sys.modules))
"""


def test_shards_are_written_one_by_one_and_load(sparsessm, text_file, tmp_path, monkeypatch):
    """A process without the package loads the shards as the one file of the run in memory."""
    monkeypatch.setattr("sparsessm_plugin.recipes.pruning.SHARD_BYTES", 300_000)
    saved(tmp_path / "dense", "granitemoehybrid")
    for place in ("none", "disk"):
        code, _, stderr = sparsessm(
            *("prune", tmp_path / "dense", "--recipe", "state-50", "--calibration", text_file),
            *(*SHORT, "--offload", place, "--output", tmp_path / place),
        )
        assert code == 0, stderr
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 2
    places = (tmp_path / "none", tmp_path / "disk")
    assert stock_process(RELOAD, *places) is False


@pytest.fixture
def held(monkeypatch):
    """Bytes of all that is read from disk and still held: now, at most, and read in all."""
    count = {"now": 0, "most": 0, "read": 0}
    onload = DiskCache.onload

    def let_go(size):
        count["now"] -= size

    def counted(self, offloaded):
        tensor = onload(self, offloaded)
        if tensor is not None:
            count["now"] += tensor.nbytes
            count["read"] += tensor.nbytes
            count["most"] = max(count["most"], count["now"])
            weakref.finalize(tensor, let_go, tensor.nbytes)
        return tensor

    monkeypatch.setattr(DiskCache, "onload", counted)
    return count


@pytest.mark.parametrize(
    ("family", "recipe", "sizes"),
    [
        ("falcon_mamba", "alog-50", {}),
        ("falcon_mamba", "whole-50", {}),
        (
            "mamba2",
            recipe_of(StateRemovalModifier={"sparsity": 0.5, "reconstruct_steps": 5}),
            {"num_heads": 32},
        ),
    ],
)
def test_no_more_than_a_layer_is_held(sparsessm, held, text_file, tmp_path, family, recipe, sizes):
    """And what embeds tokens: with it, all data goes through one layer."""
    sizes = {"num_hidden_layers": 12, "hidden_size": 128, **sizes}
    model = saved(tmp_path / "dense", family, **sizes)
    embeddings = model.get_input_embeddings().weight.nbytes
    layer = sum(p.nbytes for p in model.backbone.layers[0].parameters())
    assert 12 * layer > 2 * embeddings
    recipe = as_argument(recipe, tmp_path)
    code, _, stderr = sparsessm(
        *("prune", tmp_path / "dense", "--recipe", recipe, "--calibration", text_file, *SHORT),
        *("--offload", "disk", "--output", tmp_path / "out"),
    )
    assert code == 0, stderr
    assert held["most"] <= 2 * embeddings + layer
    assert held["now"] == 0


@pytest.mark.parametrize(
    ("recipe", "who"),
    [
        ("gradient-50", "GradientMagnitudeModifier"),
        ("width-25", "WidthRemovalModifier"),
        (recipe_of(LayerRemovalModifier={"keep": 1}), "LayerRemovalModifier"),
        (
            recipe_of(StateRemovalModifier={"sparsity": 0.5, "distill_steps": 5}),
            "StateRemovalModifier",
        ),
    ],
)
def test_what_holds_the_whole_model_says_so(refused, text_file, tmp_path, recipe, who):
    saved(tmp_path / "dense", "mamba")
    recipe = as_argument(recipe, tmp_path)
    said = refused(
        *("prune", tmp_path / "dense", "--recipe", recipe, "--calibration", text_file, *SHORT),
        *("--offload", "disk", "--output", tmp_path / "out"),
    )
    assert said == (f"error: --offload disk: {who} holds the whole model; leave --offload out")


def test_wrong_values_are_refused_in_one_line(refused, text_file, tmp_path, monkeypatch):
    saved(tmp_path / "dense", "mamba")
    run = ("prune", tmp_path / "dense", "--recipe", "alog-50", "--calibration", text_file, *SHORT)
    run = (*run, "--output", tmp_path / "out")
    assert "--offload must be one of auto, none, cpu, disk" in refused(*run, "--offload", "gpu")
    nowhere = ("--offload", "disk", "--offload-folder", tmp_path / "nowhere")
    assert "nowhere is no folder that can be written to" in refused(*run, *nowhere)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    assert "has 1,000 bytes free" in refused(*run, "--offload", "disk")


def test_without_room_weights_stay_on_disk(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(offloading, "memory_available", lambda: 1000)
    assert choose_offload("auto", 600, cpu) == "none"
    assert choose_offload("auto", 900, cpu) == "disk"
    assert choose_offload("none", 900, cpu) == "none"
    gpu = torch.device("cuda")
    monkeypatch.setattr(offloading, "has_room", lambda device, needed, spare: needed < 300)
    assert [choose_offload("auto", size, gpu) for size in (200, 600, 900)] == [
        "none",
        "cpu",
        "disk",
    ]


def test_auto_reads_from_disk_where_memory_is_short(sparsessm, text_file, tmp_path, monkeypatch):
    saved(tmp_path / "dense", "mamba")
    monkeypatch.setattr(offloading, "memory_available", lambda: 1000)
    run = ("prune", tmp_path / "dense", "--calibration", text_file, *SHORT)
    code, _, stderr = sparsessm(*run, "--recipe", "alog-50", "--output", tmp_path / "out")
    assert code == 0, stderr
    report = json.loads((tmp_path / "out" / "sparsessm_report.json").read_text())
    assert report["offload"] == "disk"
    code, _, stderr = sparsessm(*run, "--recipe", "gradient-50", "--output", tmp_path / "other")
    assert code == 0, stderr
    assert "GradientMagnitudeModifier holds the whole model of" in stderr


def test_weights_in_main_memory_give_the_same(sparsessm, text_file, tmp_path):
    saved(tmp_path / "dense", "mamba")
    for place in ("none", "cpu"):
        code, _, stderr = sparsessm(
            *("prune", tmp_path / "dense", "--recipe", "whole-50", "--calibration", text_file),
            *(*SHORT, "--offload", place, "--output", tmp_path / place),
        )
        assert code == 0, stderr
    found = [bytes_of(tmp_path / place)["model.safetensors"] for place in ("none", "cpu")]
    assert found[0] == found[1]


@pytest.mark.parametrize("moment", ["update_offload", "save_file"])
def test_an_interrupt_leaves_nothing(sparsessm, text_file, tmp_path, monkeypatch, moment):
    saved(tmp_path / "dense", "mamba")
    before = bytes_of(tmp_path / "dense")
    (tmp_path / "changed").mkdir()

    def interrupt(*args, **kwargs):
        assert os.listdir(tmp_path / "changed")
        raise KeyboardInterrupt

    if moment == "save_file":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    else:
        monkeypatch.setattr(DiskCache, moment, interrupt)
    code, _, _ = sparsessm(
        *("prune", tmp_path / "dense", "--recipe", "alog-50", "--calibration", text_file, *SHORT),
        *("--offload", "disk", "--offload-folder", tmp_path / "changed"),
        *("--output", tmp_path / "out"),
    )
    assert code == 130
    assert sorted(os.listdir(tmp_path)) == ["changed", "dense"]
    assert os.listdir(tmp_path / "changed") == []
    assert bytes_of(tmp_path / "dense") == before
    assert not DiskCache.index


KILLED = """
import os, signal, sys
from sparsessm_plugin.files import scratch_directory
with scratch_directory(sys.argv[1]) as folder:
    os.symlink("/nowhere", folder / "weight")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    with scratch_directory(tmp_path / "out") as folder:
        assert os.listdir(tmp_path) == [folder.name]
    assert os.listdir(tmp_path) == []


@pytest.fixture
def from_disk(tmp_path):
    """A tiny model and the same one with its weights on disk."""

    def load(family, **changes):
        folder = tmp_path / family
        saved_tiny_model(folder, family, **changes)
        (folder / "changed").mkdir()
        memory = ModelSource(str(folder), device="cpu").load()
        source = ModelSource(str(folder), False, "auto", "cpu", False, "disk", folder / "changed")
        return memory, source.load()

    with weights_as_loaded():
        yield load
    offloading.forget(tmp_path)


def little():
    ids = torch.randint(1, VOCAB, (5, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_tried_out_layer_by_layer_or_all_at_once(family, from_disk):
    """The divergences are the same to the last bit, and the weights stay what they were."""
    memory, disk = from_disk(family)
    assert on_disk(disk)
    assert not on_disk(memory)
    mixers = tuple(f"{adapter.name}." for adapter in find_mixers(memory))
    named = dict(memory.named_parameters())
    names = [n for n in named if n.startswith(mixers) and named[n].ndim > 1 and "A_log" not in n]
    weights = {name: named[name].clone() for name in names}
    by_layer = {}
    for name in names:
        by_layer.setdefault(LayerPass(memory).layer_of(name), []).append(name)
    found = []
    recorded = partial(LayerProbe, record=True)
    for model, kind in ((memory, Probe), (disk, LayerProbe), (memory, recorded)):
        with fast_forward(model):
            probe, done = kind(model, [little()]), []
            for together in by_layer.values():
                probe.try_out(together, lambda name: 0.5 * weights[name], done.append)
            found.append(probe.moved())
            assert probe.is_finite
        assert done == names
    assert found[0] == found[1] == found[2]
    assert any(found[0].values())
    assert all(torch.equal(p, named[name]) for name, p in parameters_in_turn(disk))


@torch.no_grad()
def test_a_pass_goes_on_from_layer_to_layer(family, from_disk):
    """What enters each layer is what a pass of the whole model gives, in one go or in several."""
    memory, disk = from_disk(family)
    data = [little(), little()]
    layers = LayerPass(disk).layers
    mixers = [adapter.name for adapter in find_mixers(memory)]

    def entering(model, run):
        seen = {name: [] for name in mixers}

        def keep(name):
            return lambda module, args, kwargs: seen[name].append(
                (args or tuple(kwargs.values()))[0].clone()
            )

        handles = [
            model.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True)
            for n in mixers
        ]
        with forward_context(model):
            run()
        for handle in handles:
            handle.remove()
        return seen

    def whole():
        for batch in data:
            memory(**batch)

    at, going = [], LayerPass(disk)
    expected = entering(memory, whole)

    def in_two():
        going.run(data, at.append, layers[0], layers[0])
        going.run(data, at.append, layers[1], layers[-1])

    found = entering(disk, in_two)
    assert at == [0, 1] * len(layers)
    for name in mixers:
        assert len(found[name]) == len(expected[name]) == 2
        assert all(map(torch.equal, found[name], expected[name]))
    last = going.layer_of(mixers[0])
    again = entering(disk, lambda: going.run(data, at.append, layers[0], last))
    assert [len(own) for own in again.values()] == [2] + [0] * (len(mixers) - 1)


def test_each_tensor_comes_once_and_is_let_go(held, from_disk):
    memory, disk = from_disk("mamba", tie_word_embeddings=True)
    held.update(most=0)
    seen = {name: tensor.clone() for name, tensor in parameters_in_turn(disk)}
    assert seen.keys() == dict(memory.named_parameters()).keys()
    assert held["most"] <= 2 * max(p.nbytes for p in memory.parameters())
    named = {name: tensor.clone() for name, tensor in tensors_in_turn(disk)}
    assert all(torch.equal(named[name], value) for name, value in memory.state_dict().items())


def test_changed_weights_never_reach_the_checkpoint(from_disk, tmp_path):
    """In place, a copy changes; by compressed-tensors, a file beside the checkpoint."""
    from compressed_tensors.offload import update_offload_parameter

    memory, disk = from_disk("mamba")
    before = bytes_of(tmp_path / "mamba")["model.safetensors"]
    mixer = find_mixers(disk)[0].mixer
    mixer.in_proj.weight.data.zero_()
    assert torch.equal(mixer.in_proj.weight, find_mixers(memory)[0].mixer.in_proj.weight)
    update_offload_parameter(mixer.in_proj, "weight", torch.zeros_like(mixer.in_proj.weight))
    assert not mixer.in_proj.weight.any()
    assert isinstance(mixer.in_proj.weight, nn.Parameter)
    assert (tmp_path / "mamba" / "model.safetensors").read_bytes() == before
    with safe_open(tmp_path / "mamba" / "model.safetensors", "pt") as file:
        assert any(file.get_tensor(name).any() for name in file.keys())  # noqa: SIM118


def test_two_ranks_hold_the_whole_model(tmp_path, monkeypatch):
    from sparsessm_plugin import distributed
    from sparsessm_plugin.recipes import load_recipe
    from sparsessm_plugin.recipes.offload import offloaded

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    source, recipe = ModelSource("any"), load_recipe("alog-50")
    model = tiny_model("mamba")
    refusing = offloaded(source, recipe, model, "disk", None, tmp_path / "out")
    with pytest.raises(SparseSSMError, match="each of several ranks holds the whole"), refusing:
        pass
    monkeypatch.setattr(offloading, "memory_available", lambda: 1)
    with offloaded(source, recipe, model, "auto", None, tmp_path / "out") as chosen:
        assert chosen.offload == "none"
