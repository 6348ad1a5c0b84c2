"""The command as a user runs it: what it writes, and what it says about bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DEMO, DEVICE, EXPERTS, VOCAB, saved_tiny_model, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm_plugin import cli, recipes
from sparsessm_plugin.cli import tables
from sparsessm_plugin.evaluation.data import read_texts, tokenize, windows
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.training.resume import ResumeFile

SHORT = ("--num-samples", 6, "--max-seq-length", 64)


def test_prune_writes_everything_a_user_needs(sparsessm, text_file, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = sparsessm(
        *("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file),
        *("--output", out, "--text", text_file, *SHORT),
    )
    assert code == 0
    assert "8,192 of 16,384 entries (50.00%)" in stdout
    assert os.listdir(tmp_path) == ["out"]
    names = set(os.listdir(out))
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= names

    report = json.loads((out / "sparsessm_report.json").read_text())
    assert report["model"] == str(DEMO)
    assert report["recipe"]["name"] == "alog-50"
    assert report["calibration"]["samples"] == 6
    assert [layer["pruned"] for layer in report["modifiers"][0]["layers"]] == [2048] * 4
    before, after = report["before"], report["after"]
    assert after["parameters"] == before["parameters"] == 728704
    assert after["zeros"] - before["zeros"] == 8192 == after["components"]["A_log"]["zeros"]

    # the perplexities are those of the dense and of the saved model
    tokenizer = AutoTokenizer.from_pretrained(out)
    samples = windows(tokenize(read_texts(text_file), tokenizer), 64, "text")
    for folder, when in ((DEMO, "before"), (out, "after")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = evaluate_perplexity(model, samples).perplexity
        assert report["perplexity"][when]["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("fitted", "lost"), [("[out_proj]", True), ("none", False)])
def test_zeros_of_an_earlier_run_that_are_lost_are_told(
    fitted, lost, sparsessm, text_file, tmp_path
):
    """In one recipe they would be refused; columns that go take their zeros along."""
    dense = tmp_path / "dense"
    shutil.copytree(DEMO, dense)
    tensors = load_file(dense / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("out_proj.weight", "A_log"))]:
        tensors[name][:, 1::2] = 0
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    (tmp_path / "r.yaml").write_text(
        "a_stage:\n  b_modifiers:\n"
        f"    StateRemovalModifier: {{keep: 8, saliency: last, compensate: {fitted}}}\n"
    )
    run = ("prune", dense, "--recipe", tmp_path / "r.yaml", "--calibration", text_file)
    code, _, stderr = sparsessm(*run, "--output", tmp_path / "out", *SHORT)
    assert code == 0
    assert ("out_proj: of 65,536 zeros that the model had 0 are left" in stderr) is lost
    assert "A_log: of" not in stderr


def test_scales_of_a_quantization_are_no_zeros_that_are_lost(sparsessm, text_file, tmp_path):
    """They are parameters that the model did not have, some of them zero."""
    (tmp_path / "r.yaml").write_text(
        "a_stage:\n  b_modifiers:\n    SparseGPTQModifier:\n"
        '      {targets: [Linear], scheme: W8A8, ignore: [lm_head, "re:.*dt_proj$"]}\n'
    )
    run = ("prune", DEMO, "--recipe", tmp_path / "r.yaml", "--calibration", text_file)
    code, _, stderr = sparsessm(*run, "--output", tmp_path / "out", *SHORT)
    assert code == 0
    assert "zeros that the model had" not in stderr


def test_a_hybrid_may_lose_all_its_mixers(sparsessm, tmp_path):
    saved_tiny_model(tmp_path / "dense", "nemotron_h")
    (tmp_path / "r.yaml").write_text(
        "a_stage:\n  b_modifiers:\n"
        "    LayerRemovalModifier: {keep: 1, saliency: random, seed: 1, compensate: none}\n"
    )
    run = ("prune", tmp_path / "dense", "--recipe", tmp_path / "r.yaml", "--pipeline", "datafree")
    code, _, stderr = sparsessm(*run, "--output", tmp_path / "out")
    assert code == 0, stderr
    report = json.loads((tmp_path / "out" / "sparsessm_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert not any(name.endswith("A_log") for name, _ in model.named_parameters())


def test_tensors_keep_the_type_in_which_they_are_stored(sparsessm, text_file, tmp_path):
    """Of a checkpoint that stores some in bfloat16 and says float32: no byte more, no other bit."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(DEMO, dense)
    tensors = load_file(dense / "model.safetensors")
    for name in list(tensors)[::2]:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    run = ("prune", dense, "--recipe", "alog-50", "--calibration", text_file, "--text", text_file)
    code, _, _ = sparsessm(*run, "--output", out, *SHORT)
    assert code == 0
    saved = load_file(out / "model.safetensors")
    assert {n: t.dtype for n, t in saved.items()} == {n: t.dtype for n, t in tensors.items()}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    # what was measured is what is saved
    tokenizer = AutoTokenizer.from_pretrained(out)
    samples = windows(tokenize(read_texts(text_file), tokenizer), 64, "text")
    found = evaluate_perplexity(AutoModelForCausalLM.from_pretrained(out), samples, 4).to_dict()
    report = json.loads((out / "sparsessm_report.json").read_text())
    after = report["perplexity"]["after"]
    exact = DEVICE == "cpu"  # a GPU's sums may differ in their last bits
    assert after == found if exact else after == pytest.approx(found, rel=1e-5)
    # and who asks for a type gets it
    code, _, _ = sparsessm(*run, "--output", out, *SHORT, "--dtype", "float32")
    assert code == 0
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_a_checkpoint_is_looked_at_once(sparsessm, text_file, tmp_path, monkeypatch):
    from sparsessm_plugin.checkpoints import loading

    read, inner = [], loading.read_header
    monkeypatch.setattr(loading, "read_header", lambda path: read.append(path) or inner(path))
    run = ("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file)
    assert sparsessm(*run, "--output", tmp_path / "out", *SHORT)[0] == 0
    assert [path.parent for path in read] == [DEMO]


@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h"])
def test_tensors_of_layers_that_move_keep_their_types(family, sparsessm, text_file, tmp_path):
    """A layer of attention comes where a mixer stood, and other names with it."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    # the names of this family's files begin otherwise than those of its model
    field = "layers_block_type" if family == "nemotron_h" else "layer_types"
    changes = {field: kinds} if family == "nemotron_h" else {field: kinds, "num_hidden_layers": 3}
    dense, out, recipe = tmp_path / "dense", tmp_path / "out", tmp_path / "recipe.yaml"
    saved_tiny_model(dense, family, vocab_size=8192, **changes)
    tensors = load_file(dense / "model.safetensors")
    tensors = {n: t.bfloat16() if ".layers.1." in n else t for n, t in tensors.items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    for seed in range(9):
        recipe.write_text(
            "a_stage:\n  a_modifiers:\n    LayerRemovalModifier: "
            f"{{keep: 2, saliency: random, seed: {seed}, compensate: none}}\n"
        )
        run = ("prune", dense, "--recipe", recipe, "--output", out, "--calibration", text_file)
        code, stdout, _ = sparsessm(*run, *SHORT, "--json")
        assert code == 0
        removed = json.loads(stdout)["modifiers"][0]["layers"][0]["removed"]
        if removed == [0]:
            break
    assert removed == [0]
    saved = load_file(out / "model.safetensors")
    assert len({t.dtype for t in saved.values()}) == 2
    for name, tensor in saved.items():
        moved = name.replace(".layers.1.", ".layers.2.").replace(".layers.0.", ".layers.1.")
        assert torch.equal(tensor, tensors[moved]), name
        assert tensor.dtype == tensors[moved].dtype, name


def test_a_model_without_a_tokenizer_reads_no_text(sparsessm, refused, text_file, tmp_path):
    model, recipe = tmp_path / "model", tmp_path / "plain.yaml"
    shutil.copytree(DEMO, model)
    (model / "tokenizer.json").unlink()
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    SparseSSMModifier: {sparsity: 0.5, saliency: magnitude}\n"
    )
    assert "has no tokenizer files" in refused("evaluate", model, "--text", text_file)
    run = ("prune", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert "has no tokenizer files" in refused(*run, "--calibration", text_file)
    code, _, _ = sparsessm(*run)  # reads none, and makes none up
    assert code == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_prune_with_a_recipe_file_and_evaluate(sparsessm, text_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    SparseSSMModifier:\n      mask_structure: '2:4'\n"
        "      saliency: magnitude\n      pruned_value: memoryless\n"
    )
    # magnitude needs no calibration data
    code, _, _ = sparsessm("prune", DEMO, "--recipe", recipe, "--output", tmp_path / "out")
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in model.backbone.layers:
        assert ((layer.mixer.A_log == 38).reshape(-1, 4).sum(1) == 2).all()
    code, stdout, _ = sparsessm(
        *("evaluate", tmp_path / "out", "--text", text_file),
        *("--num-samples", 3, "--max-seq-length", 64),
    )
    assert code == 0
    assert "3 windows of 64" in stdout
    code, stdout, _ = sparsessm("inspect", tmp_path / "out")
    assert code == 0
    assert "backbone.layers.3.mixer" in stdout
    assert "50.0%" in stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(sparsessm, tmp_path, dtype):
    recipe = tmp_path / "m.yaml"
    recipe.write_text(
        "a_stage: {a_modifiers: {SparseSSMModifier: {sparsity: 0.5, saliency: magnitude}}}"
    )
    options = ("--recipe", recipe, "--output", tmp_path / "out", "--dtype", dtype)
    assert sparsessm("prune", DEMO, *options)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_two_runs_write_the_same_weights(sparsessm, text_file, tmp_path):
    for name in ("a", "b"):
        code, _, _ = sparsessm(
            *("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file),
            *("--output", tmp_path / name, *SHORT),
        )
        assert code == 0
    a, b = (((tmp_path / name) / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_earlier_result_is_replaced(sparsessm, tmp_path):
    recipe = tmp_path / "m.yaml"
    zeros = []
    for sparsity in (0.25, 0.5):
        recipe.write_text(
            "a_stage: {a_modifiers: {SparseSSMModifier: "
            f"{{sparsity: {sparsity}, saliency: magnitude}}}}}}"
        )
        options = ("--recipe", recipe, "--output", tmp_path / "out")
        assert sparsessm("prune", DEMO, *options)[0] == 0
        report = json.loads((tmp_path / "out" / "sparsessm_report.json").read_text())
        zeros.append(report["after"]["zeros"])
    assert zeros == [4096, 8192]


def test_prune_removes_states(sparsessm, text_file, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = sparsessm(
        *("prune", DEMO, "--recipe", "state-50", "--calibration", text_file),
        *("--output", out, "--num-samples", 32, "--max-seq-length", 64),
    )
    assert code == 0
    assert "StateRemovalModifier: removed 32 of 64 states (50.00%) in" in stdout
    assert "entries" not in stdout
    assert json.loads((out / "config.json").read_text())["state_size"] == 8
    report = json.loads((out / "sparsessm_report.json").read_text())
    assert report["after"]["parameters"] < report["before"]["parameters"]
    for layer in report["modifiers"][0]["layers"]:
        assert layer["error_left"] < layer["error_removed"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.backbone.layers[3].mixer.A_log.shape == (256, 8)
    samples = windows(tokenize(read_texts(text_file), AutoTokenizer.from_pretrained(out)), 64, "x")
    # without the fit it is half as much again
    dense = evaluate_perplexity(AutoModelForCausalLM.from_pretrained(DEMO), samples).perplexity
    assert evaluate_perplexity(model, samples).perplexity < 1.3 * dense


def test_prune_removes_states_of_groups_and_quantizes(sparsessm, text_file, tmp_path):
    vocab_size = AutoModelForCausalLM.from_pretrained(DEMO).config.vocab_size
    saved_tiny_model(tmp_path / "model", "mamba2", vocab_size=vocab_size)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    StateRemovalModifier: {keep: 4, reconstruct_steps: 2}\n"
        "    QuantizationModifier: {targets: [Linear], scheme: W8A8, ignore: [lm_head]}\n"
    )
    code, stdout, _ = sparsessm(
        *("prune", tmp_path / "model", "--recipe", recipe, "--calibration", text_file),
        *("--output", tmp_path / "out", *SHORT),
    )
    assert code == 0
    assert "removed 16 of 32 states" in stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["state_size"] == 4
    assert config["quantization_config"]["format"] == "int-quantized"


def test_recipes_are_listed_and_printed(sparsessm):
    code, stdout, _ = sparsessm("recipes")
    assert code == 0
    assert "alog-2of4" in stdout
    assert "state-50-w8a8" in stdout
    code, stdout, _ = sparsessm("recipes", "alog-2of4")
    assert 'mask_structure: "2:4"' in stdout


def cells(stdout, first):
    """The words of the row that begins with a word."""
    rows = [line.split() for line in stdout.splitlines()]
    return next(row for row in rows if row[:1] == [first])


@pytest.mark.parametrize(
    ("family", "mixer", "columns"),
    [
        ("jamba", "model.layers.2.mamba", {"D": 64, "N": 8, "R": 4, "K": 4}),
        ("mamba2", "backbone.layers.1.mixer", {"D": 64, "N": 8, "H": 8, "P": 8, "G": 2, "K": 4}),
        (
            "nemotron_h",
            "model.layers.2.mixer",
            {"D": 42, "N": 8, "H": 6, "P": 7, "G": 2, "K": 4},
        ),
    ],
)
def test_inspect_shows_what_the_layout_has(sparsessm, tmp_path, family, mixer, columns):
    changes = {"mamba_num_heads": 6, "mamba_head_dim": 7} if family == "nemotron_h" else {}
    model = saved_tiny_model(tmp_path, family, **changes)
    with torch.no_grad():
        model.get_submodule(mixer).A_log.flatten()[:2] = 0
        model.save_pretrained(tmp_path)
    code, stdout, _ = sparsessm("inspect", tmp_path)
    assert code == 0
    assert f"2 state-space mixers ({family})" in stdout
    states = ["memoryless"] if family == "jamba" else []  # else there is no entry a state
    header = cells(stdout, "mixer")
    assert header[: len(columns) + 2 + len(states)] == ["mixer", *columns, "A_log", *states]
    zeros = 2 / model.get_submodule(mixer).A_log.numel()
    expected = [mixer, *map(str, columns.values()), f"{zeros:.1%}", *("0.0%" for _ in states)]
    assert cells(stdout, mixer)[: len(expected)] == expected
    assert cells(stdout, "component")[4:] == states
    assert cells(stdout, "A_log")[3:] == [f"{zeros / 2:.2%}", *("0.00%" for _ in states)]


# -- bad input: one line, non-zero exit, nothing written -----------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "alog-51"), "built in: all-50-w8a8, alog-2of4"),
        (("--recipe", "none.yaml"), "does not exist"),
        (("--recipe", "alog-50", "--calibration", "none.txt"), "none.txt does not exist"),
        (("--recipe", "alog-50"), "give --calibration"),
        (("--recipe", "alog-50", "--pipeline", "fast"), "independent, sequential"),
        (("--recipe", "alog-50", "--dtype", "int8"), "got 'int8'"),
        (("--recipe", "alog-50", "--device", "tpu"), "got 'tpu'"),
    ],
)
def test_bad_arguments(refused, tmp_path, arguments, message):
    assert message in refused("prune", DEMO, "--output", tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("option", "value"), [("--runtime", "tgi"), ("--output", DEMO), ("--pipeline", "datafree")]
)
def test_an_error_of_an_option_begins_with_its_name(refused, option, value, text_file, tmp_path):
    options = {"--recipe": "state-50", "--calibration": text_file, "--output": tmp_path / "out"}
    line = (part for pair in {**options, option: value}.items() for part in pair)
    assert refused("prune", DEMO, *line).startswith(f"error: {option}")


def test_a_recipe_that_undoes_itself_is_refused_before_the_model_is_looked_for(refused, tmp_path):
    recipe = tmp_path / "m.yaml"
    recipe.write_text(
        "a_stage: {a_modifiers: {SensitivitySparseGPTModifier: {sparsity: 0.5}, "
        "StateRemovalModifier: {keep: 8}}}"
    )
    message = refused("prune", "no/model", "--recipe", recipe, "--output", tmp_path / "out")
    assert "StateRemovalModifier would write into the zeros that Sensitivity" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(refused):
    assert "no CUDA device" in refused("evaluate", DEMO, "--text", "x.txt", "--device", "cuda")


def test_too_little_and_empty_calibration_text(refused, tmp_path):
    text = tmp_path / "short.txt"
    options = ("--recipe", "alog-50", "--output", tmp_path / "out", "--calibration", text)
    text.write_text("too short")
    message = refused("prune", DEMO, *options)
    assert "too few for one window of 2048" in message
    for blank in ("", "\n \n\t\n"):
        text.write_text(blank)
        assert "holds no text" in refused("prune", DEMO, *options)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": ""}\n\n{"text": "  "}\n')
    assert f"{rows} holds no text" in refused("prune", DEMO, *options[:-1], rows)


def test_blank_rows_of_calibration_text_are_left_out(sparsessm, tmp_path, topics):
    written = []
    for name, blanks in (("without", []), ("with", ["", " \n"])):
        rows = [text for row in list(topics.values())[:4] for text in (*blanks, row, *blanks)]
        file, out = tmp_path / f"{name}.jsonl", tmp_path / name
        file.write_text("\n\n".join(json.dumps({"text": row}) for row in rows))
        options = ("--calibration", file, "--num-samples", 4, "--max-seq-length", 64)
        code, _, stderr = sparsessm("prune", DEMO, "--recipe", "alog-50", *options, "--output", out)
        assert code in (0, None), stderr
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_models_that_cannot_be_used(refused, tmp_path, text_file):
    from transformers import KimiLinearConfig, LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    # its linear attention has an A_log, too; the config alone is enough to see that
    unknown = KimiLinearConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["linear_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unknown.save_pretrained(tmp_path / "unknown")
    saved_tiny_model(tmp_path / "mamba2", "mamba2")
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    shutil.copytree(DEMO, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    lacking = tmp_path / "lacking"
    saved_tiny_model(lacking)
    config = json.loads((lacking / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (lacking / "config.json").write_text(json.dumps(config))

    options = ("--recipe", "alog-50", "--calibration", text_file, "--output", tmp_path / "out")
    for name, message in (
        ("llama", "LlamaForCausalLM has no state-space mixer"),
        ("unknown", "gates each key dimension of Kimi Linear"),
        ("empty", "cannot load model"),
        ("none", "cannot load model"),
        ("pickled", "pytorch_model.bin, a pickle"),
        ("pickled/config.json", "it is a file; give the folder"),
    ):
        assert message in refused("prune", tmp_path / name, *options)
        if name != "none":
            assert message in refused("inspect", tmp_path / name)
    message = refused("prune", tmp_path / "mamba2", *options)
    assert "backbone.layers.0.mixer (mamba2) has one entry a head" in message
    assert "StateRemovalModifier" in message
    assert "safetensors" in refused("prune", pickled, *options, *SHORT)
    assert "lacks" in refused("inspect", lacking)


def test_tokenizer_of_another_model(refused, tmp_path, text_file):
    saved_tiny_model(tmp_path / "model")
    message = refused(
        *("prune", tmp_path / "model", "--recipe", "alog-50", "--calibration", text_file),
        *("--output", tmp_path / "out", *SHORT),
    )
    assert "the model's vocabulary has ids 0 to 95" in message


def test_nan_is_named_with_its_layer(refused, tmp_path, text_file):
    shutil.copytree(DEMO, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    options = ("--recipe", "alog-50", "--calibration", text_file, "--output", tmp_path / "out")
    with torch.no_grad():
        model.backbone.layers[2].mixer.A_log[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "model")
    message = refused("prune", tmp_path / "model", *options, *SHORT)
    assert "backbone.layers.2.mixer.A_log holds NaN" in message
    with torch.no_grad():
        model.backbone.layers[2].mixer.A_log[0, 0] = 0
        # finite, and beyond what float32 holds once it is multiplied
        model.backbone.layers[1].norm.weight.fill_(3e38)
        model.save_pretrained(tmp_path / "model")
    message = refused("prune", tmp_path / "model", *options, *SHORT)
    assert "backbone.layers.1.mixer: its input holds NaN" in message
    options = ("--recipe", "state-50", *options[2:])
    message = refused("prune", tmp_path / "model", *options, *SHORT)
    assert "backbone.layers.1.mixer: its input holds NaN" in message
    assert "partly pruned and of no use; load it again. Nothing was saved" in message


def test_output_that_is_not_ours(refused, tmp_path, text_file):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    options = ("--recipe", "alog-50", "--calibration", text_file)
    message = refused("prune", DEMO, *options, "--output", out)
    assert "holds no sparsessm_report.json" in message
    assert (out / "thesis.tex").read_text() == "x"


def test_output_over_the_model_itself(refused, sparsessm, tmp_path):
    recipe = tmp_path / "m.yaml"
    recipe.write_text(
        "a_stage: {a_modifiers: {SparseSSMModifier: {sparsity: 0.5, saliency: magnitude}}}"
    )
    out = tmp_path / "out"
    assert sparsessm("prune", DEMO, "--recipe", recipe, "--output", out)[0] == 0
    message = refused("prune", out, "--recipe", recipe, "--output", out)
    assert "is or holds the model" in message


def test_remote_code_is_not_run_unless_asked_for(refused, tmp_path):
    model = tmp_path / "remote"
    shutil.copytree(DEMO, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "custom_mamba"
    config["auto_map"] = {"AutoConfig": "custom.CustomConfig"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    refused("inspect", model)
    assert not (tmp_path / "ran").exists()


COMMAND = [sys.executable, "-m", "sparsessm_plugin.cli"]


def long_run(text_file, out):
    """Arguments of a run that takes a while after it has begun to write."""
    return [
        *(*COMMAND, "prune", str(DEMO), "--recipe", "alog-50", "--calibration", str(text_file)),
        *("--text", str(text_file), "--output", str(out), "--max-seq-length", "64"),
    ]


def partial_directories(folder):
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_the_old_result(tmp_path, text_file, number, code):
    out = tmp_path / "out"
    out.mkdir()
    (out / "sparsessm_report.json").write_text('{"files": ["old"]}')
    (out / "old").write_text("old")
    process = subprocess.Popen(
        long_run(text_file, out),
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509
            signal.SIGINT, signal.default_int_handler
        ),
    )
    deadline = time.monotonic() + 120
    while not partial_directories(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert "nothing was written" in stderr
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(out)) == ["old", "sparsessm_report.json"]


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_an_import_loses_still_stops(
    sparsessm, monkeypatch, text_file, tmp_path, number, code, swallowed
):
    """numba turns it into an ImportError, and some who import numba do without it then."""
    own = recipes.load_recipe

    def load(name):
        try:
            signal.raise_signal(number)
        except BaseException as stop:
            if not swallowed:
                raise ImportError("numba._devicearray failed to import") from stop
        return own(name)

    monkeypatch.setattr(recipes, "load_recipe", load)
    before = sorted(os.listdir(tmp_path))
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, stderr = sparsessm(
            *("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file, *SHORT),
            *("--output", tmp_path / "out"),
        )
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert found == code
    assert "nothing was written" in stderr
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_after_its_result_stands_there_says_so(
    sparsessm, monkeypatch, text_file, tmp_path, number, code
):
    monkeypatch.setattr(
        cli.prune.tables, "print_pruned", lambda *arguments: signal.raise_signal(number)
    )
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, stderr = sparsessm(
            *("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file, *SHORT),
            *("--output", tmp_path / "out"),
        )
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert found == code
    assert "out was written before" in stderr
    assert (tmp_path / "out" / "sparsessm_report.json").exists()


def test_a_stop_names_the_file_to_go_on_from(sparsessm, monkeypatch, text_file, tmp_path):
    state, recipe = tmp_path / "state.pt", tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n  prune_modifiers:\n    StateRemovalModifier: {keep: 8, "
        f"compensate: none, distill_steps: 2, distill_resume: {state}}}\n"
    )
    own = ResumeFile.save

    def save(self, *args, **kwargs):
        own(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", save)
    monkeypatch.setattr(ResumeFile, "is_due", lambda self: True)
    code, _, stderr = sparsessm(
        *("prune", DEMO, "--recipe", recipe, "--calibration", text_file, *SHORT),
        *("--output", tmp_path / "out"),
    )
    assert code == 130, stderr
    assert f"nothing was written but {state}, from which the same command goes on" in stderr
    assert state.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_within_a_destructor_is_one_line(
    sparsessm, monkeypatch, text_file, tmp_path, number, code
):
    class Gone:
        def __del__(self):
            signal.raise_signal(number)

    own = recipes.load_recipe
    monkeypatch.setattr(recipes, "load_recipe", lambda name: (Gone(), own(name))[1])
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, stderr = sparsessm(
            *("prune", DEMO, "--recipe", "alog-50", "--calibration", text_file, *SHORT),
            *("--output", tmp_path / "out"),
        )
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert found == code
    assert [line for line in stderr.splitlines() if not line.startswith("warning")] == [
        f"error: {'interrupted' if code == 130 else 'terminated'}; nothing was written"
    ]


def test_full_disk(tmp_path, text_file):
    """A limit on the size of files stops the writer in the middle, as a full disk does."""
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    arguments = [*long_run(text_file, out), "--num-samples", "2"]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ignored", [False, True])
def test_experts_that_only_upstream_quantizes(sparsessm, tmp_path, ignored):
    """Refused before the work, or saved as stock transformers loads them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = tiny_model("jamba", vocab_size=len(tokenizer), **EXPERTS["jamba"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on. " * 60)
    ignore = [
        "lm_head",
        "re:.*dt_proj$",
        "re:.*router$",
        *(["re:.*[.]experts[.]"] if ignored else []),
    ]
    fields = {"targets": ["Linear"], "scheme": "W8A8", "ignore": ignore}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"q_stage": {"q_modifiers": {"QuantizationModifier": fields}}}))
    code, _, stderr = sparsessm(
        *("prune", tmp_path / "model", "--recipe", recipe, "--calibration", text),
        *("--output", tmp_path / "out", "--num-samples", 2, "--max-seq-length", 16),
    )
    if not ignored:
        assert code != 0
        assert "would quantize model.layers.0.feed_forward.experts.0" in " ".join(stderr.split())
        assert not (tmp_path / "out").exists()
        return
    assert code == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.feed_forward.experts.gate_up_proj" in names
    assert not any(".experts.0." in name for name in names)


MAGNITUDE = "a_stage: {a_modifiers: {SparseSSMModifier: {sparsity: 0.5, saliency: magnitude%s}}}"


@pytest.mark.parametrize(
    "content",
    [
        '{"temperature": 0.5, "do_sample": false}',
        '{"temperature": NaN}',
        '{"do_sample": true, "top_p": NaN}',
    ],
)
def test_a_generation_config_that_transformers_does_not_write_stays(sparsessm, tmp_path, content):
    model, recipe = tmp_path / "model", tmp_path / "m.yaml"
    shutil.copytree(DEMO, model)
    (model / "generation_config.json").write_text(content)
    recipe.write_text(MAGNITUDE % "")
    code, _, stderr = sparsessm("prune", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert code == 0, stderr
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    # as text, where NaN equals itself
    assert {key: str(written.get(key)) for key in json.loads(content)} == {
        key: str(value) for key, value in json.loads(content).items()
    }
    files = json.loads((tmp_path / "out" / "sparsessm_report.json").read_text())["files"]
    assert "generation_config.json" in files


@pytest.mark.parametrize(("fails", "loaded"), [(1, False), (2, True)])
def test_failing_to_save_is_one_line_and_leaves_no_report(
    sparsessm, monkeypatch, tmp_path, fails, loaded
):
    """Before the work where a first try tells, and after it as tokenizers says it."""
    from transformers import PreTrainedTokenizerBase

    from sparsessm_plugin.recipes.pruning import ModelSource

    calls, loads = [], []
    own, load = PreTrainedTokenizerBase.save_pretrained, ModelSource.load

    def save(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == fails:
            raise Exception("No space left on device (os error 28)")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
    monkeypatch.setattr(ModelSource, "load", lambda self: loads.append(self) or load(self))
    recipe, report = tmp_path / "m.yaml", tmp_path / "layers.json"
    recipe.write_text(MAGNITUDE % f", report_path: {report}")
    code, stdout, stderr = sparsessm(
        *("prune", DEMO, "--recipe", recipe, "--output", tmp_path / "out")
    )
    said = "error: cannot save the tokenizer: No space left on device (os error 28)"
    assert (code, stdout, stderr.splitlines()[-1]) == (1, "", said)
    assert "Traceback" not in stderr
    assert bool(loads) == loaded
    assert sorted(os.listdir(tmp_path)) == ["m.yaml"]


def test_a_report_is_written_once_all_is_saved(sparsessm, tmp_path):
    recipe, report = tmp_path / "m.yaml", tmp_path / "layers.json"
    recipe.write_text(MAGNITUDE % f", report_path: {report}")
    code, _, stderr = sparsessm("prune", DEMO, "--recipe", recipe, "--output", tmp_path / "out")
    assert code == 0, stderr
    assert json.loads(report.read_text())["modifier"] == "SparseSSMModifier"


def test_paths_that_cannot_be_written_are_refused_before_the_work(refused, tmp_path):
    recipe = tmp_path / "m.yaml"
    recipe.write_text(MAGNITUDE % "")
    place = os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    assert "no UTF-8" in refused("prune", DEMO, "--recipe", recipe, "--output", place)
    for path, said in (("a\\0b.json", "null byte"), ("a\\udcffb.json", "no UTF-8")):
        recipe.write_text(MAGNITUDE % f', report_path: "{path}"')
        out = tmp_path / "out"
        assert said in refused("prune", DEMO, "--recipe", recipe, "--output", out)
    assert sorted(os.listdir(tmp_path)) == ["m.yaml"]


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("state", "removed 8 of 32 states (25.00%) in 1.0 s; 12 of 16 stay in each mixer"),
        (
            "mlp",
            "removed 8 of 32 intermediate units (25.00%) in 1.0 s; 12 of 16 stay in each module",
        ),
        ("layers", "removed 8 of 32 layers (25.00%) in 1.0 s"),
        ("hidden", "removed 8 of 32 entries of the stream (25.00%) in 1.0 s"),
    ],
)
def test_what_was_removed_of_what(unit, line, tmp_path, capsys):
    total = {"unit": unit, "entries": 32, "pruned": 8, "sparsity": 0.25, "seconds": 1.0}
    modifier = {"modifier": "M", "total": total, "layers": [{"before": 16, "after": 12}] * 2}
    same = {"parameters": 1, "zeros": 0}
    report = {"before": same, "after": same, "perplexity": None, "modifiers": [modifier]}
    tables.print_pruned({**report, "files": []}, tmp_path)
    assert f"M: {line}\n" in capsys.readouterr().out
