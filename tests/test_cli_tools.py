"""The commands bench and export as a user runs them."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import DEMO, DEVICE, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsessm_plugin import cli
from sparsessm_plugin.cli import options
from sparsessm_plugin.evaluation import tasks

SHORT = ("--batch-sizes", "1,2", "--prompt-length", 5, "--decode-steps", 2, "--repeats", 2)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and lose much where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(tmp_path):
    """A checkpoint without a tokenizer, of another vocabulary than the demo's."""
    tiny_model("mamba", state_size=4).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


# -- bench ---------------------------------------------------------------------------------


def test_bench_one_model(sparsessm):
    code, stdout, _ = sparsessm("bench", DEMO, *SHORT)
    assert code == 0
    assert stdout.count("prefill ") >= 2
    assert stdout.count("decode ") >= 2
    assert "65,536" in stdout  # 4 layers of 256 channels and 16 states, float32
    assert "kernels: " in stdout
    assert "speedup" not in stdout


def test_bench_two_models(sparsessm, small, tmp_path):
    pytest.importorskip("matplotlib")
    files = ("--output", tmp_path / "x.json", "--plot", tmp_path / "x.PNG")
    code, stdout, _ = sparsessm("bench", small, "--against", DEMO, *SHORT, *files)
    assert code == 0
    assert "speedup is against" in stdout
    assert sorted(os.listdir(tmp_path)) == ["small", "x.PNG", "x.json"]
    assert (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["model"] == str(small)
    assert report["models"] == [str(DEMO), str(small)]
    assert report["device"].startswith(DEVICE)
    assert report["dtype"] == {str(DEMO): "float32", str(small): "float32"}
    assert [len(timing["seconds"]) for timing in report["timings"]] == [2] * 8
    assert report["cache_bytes_per_sequence"][str(small)]["recurrent"] == 2 * 64 * 4 * 4
    assert "torch" in report["versions"]


def test_bench_against_itself_and_dtype(sparsessm):
    options = ("--against", DEMO, "--dtype", "bfloat16")
    code, stdout, _ = sparsessm("bench", DEMO, *options, *SHORT)
    assert code == 0
    assert "(again)" in stdout


def test_bench_counts_what_fits(sparsessm, small, tmp_path):
    report = tmp_path / "x.json"
    more = ("--context", "0,64", "--memory", "4MB", "--at-capacity", "--output", report)
    code, stdout, _ = sparsessm("bench", small, *more, *SHORT)
    assert code == 0
    assert "sequences that fit into 4,000,000 bytes" in stdout
    found = json.loads(report.read_text())
    [counted] = found["capacity"][str(small)]  # one: nothing of this model grows with the context
    weights = sum(tensor.numel() * 4 for tensor in load_file(small / "model.safetensors").values())
    assert counted["weights"] == weights
    # 2 layers of 64 channels with 4 states and 4 inputs of the convolution
    assert counted["sequences"] == (4_000_000 - weights) // (2 * 64 * 8 * 4)
    [timing] = found["at_capacity"]
    assert timing["batch_size"] == counted["sequences"]
    assert [t["context"] for t in found["timings"] if t["phase"] == "decode"] == [5, 64] * 2


def test_bench_bad_options(refused, tmp_path):
    (tmp_path / "taken.json").write_text("{}")
    (tmp_path / "taken.png").write_text("")
    for sizes in ("", "0", "1,,2", "1,x", "1.5", "-1", "1;2"):
        assert "--batch-sizes must be" in refused("bench", DEMO, "--batch-sizes", sizes)
    for option, name, message in (
        ("--plot", "x.pdf", "must end in .png"),
        ("--plot", "taken.png", "exists"),
        ("--plot", "none/x.png", "no folder to write to"),
        ("--output", "x.txt", "must end in .json"),
        ("--output", "taken.json", "exists"),
    ):
        assert message in refused("bench", DEMO, option, tmp_path / name)
    assert (tmp_path / "taken.json").read_text() == "{}"
    assert "got 'tpu'" in refused("bench", DEMO, "--device", "tpu")


def test_bench_bad_models(refused, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    assert "no state-space mixer" in refused("bench", tmp_path / "llama", *SHORT)
    assert "no state-space mixer" in refused("bench", DEMO, "--against", tmp_path / "llama")
    assert "cannot load model" in refused("bench", tmp_path / "none")


def test_bench_plot_without_matplotlib(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused("bench", DEMO, "--plot", tmp_path / "x.png", *SHORT)
    assert "sparsessm-plugin[plot]" in message


LLAMA_BENCH = """#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["-m"].endswith("x.gguf"), options
tests = [
    {{"n_prompt": int(options["-p"]), "n_gen": 0, "samples_ns": [2_000_000, 1_000_000]}},
    {{"n_prompt": 0, "n_gen": int(options["-n"]), "samples_ns": [4_000_000, 4_000_000]}},
]
json.dump(tests, sys.stdout, indent=2)
"""
VLLM = """
import time
SamplingParams = dict
class LLM:
    def __init__(self, **options):
        assert options["max_model_len"] == 5 + 2 + 1, options
        assert options["enable_prefix_caching"] is False
    def generate(self, prompts, settings, use_tqdm):
        assert all(len(prompt["prompt_token_ids"]) == 5 for prompt in prompts)
        time.sleep(0.001 * settings["max_tokens"])
"""


def test_bench_in_llama_cpp(sparsessm, refused, tmp_path, monkeypatch):
    options = ("--runtime", "llama.cpp", "--prompt-length", 5, "--decode-steps", 2, "--repeats", 2)
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no llama-bench on the PATH" in refused("bench", model, *options, "--batch-sizes", 1)
    tool = tmp_path / "llama-bench"
    tool.write_text(LLAMA_BENCH.format(python=sys.executable))
    tool.chmod(0o755)
    assert "one sequence" in refused("bench", model, *options)
    options = (*options, "--batch-sizes", 1)
    assert "convert_hf_to_gguf.py makes it" in refused("bench", model, *options)
    assert "are of transformers" in refused("bench", model, *options, "--cuda-graphs")
    (model / "x.gguf").write_bytes(b"GGUF")
    code, stdout, _ = sparsessm("bench", model, *options, "--output", tmp_path / "x.json")
    assert code == 0
    assert "bytes of cache" not in stdout
    prefill, decode = json.loads((tmp_path / "x.json").read_text())["timings"]
    assert prefill["tokens_per_second"] == pytest.approx(5 / 0.0015)
    assert decode["milliseconds"] == pytest.approx(2)
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    message = refused("bench", model, *options)
    assert "llama-bench ended with code 1: no such model" in message


def test_bench_in_vllm(sparsessm, refused, small, tmp_path, monkeypatch):
    options = ("--runtime", "vllm", *SHORT)
    assert "vLLM is not installed in" in refused("bench", small, *options)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    code, _, _ = sparsessm("bench", small, *options, "--output", tmp_path / "x.json")
    assert code == 0
    timings = json.loads((tmp_path / "x.json").read_text())["timings"]
    assert [(t["phase"], t["batch_size"], len(t["seconds"])) for t in timings] == [
        (phase, size, 2) for size in (1, 2) for phase in ("prefill", "decode")
    ]
    message = refused("bench", small, *options, "--runtime-python", tmp_path / "none")
    assert "cannot run" in message
    assert "got 'tgi'" in refused("bench", small, "--runtime", "tgi")


def test_bench_bad_memory(refused):
    assert "error: --memory must be" in refused("bench", DEMO, "--memory", "80 apples")
    much = ("--memory", "2000000GB", "--at-capacity")
    assert "less than --memory" in refused("bench", DEMO, *much)
    assert "--context must be" in refused("bench", DEMO, "--context", "-1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_without_cuda(refused):
    assert "no CUDA device" in refused("bench", DEMO, "--device", "cuda")
    assert "CUDA graphs" in refused("bench", DEMO, "--cuda-graphs", *SHORT)
    assert "needs --memory" in refused("bench", DEMO, "--at-capacity")


# -- export --------------------------------------------------------------------------------


def test_export_demo(sparsessm, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # an earlier result is replaced
        code, stdout, _ = sparsessm("export", DEMO, "--format", "mamba_ssm", "--output", out)
        assert code == 0
        assert "load_mamba_ssm" in stdout
    assert os.listdir(tmp_path) == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["ssm_cfg"]["d_state"] == 16
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    assert torch.equal(tensors["backbone.embedding.weight"], model.backbone.embeddings.weight)
    report = json.loads((out / "sparsessm_report.json").read_text())
    assert report["format"] == "mamba_ssm"
    assert report["files"] == ["config.json", "model.safetensors"]


def test_export_pruned_model_in_another_dtype(sparsessm, small, tmp_path):
    options = ("--output", tmp_path / "out", "--dtype", "bfloat16")
    assert sparsessm("export", small, *options)[0] == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["backbone.layers.0.mixer.A_log"].shape == (64, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_export_refuses(refused, small, tmp_path):
    out = tmp_path / "out"
    message = refused("export", DEMO, "--format", "gguf", "--output", out)
    assert "must be one of mamba_ssm" in message
    # nothing is written over the model, nor over what is not ours
    assert "is or holds the model" in refused("export", DEMO, "--output", DEMO.parent / "x" / "..")
    assert "holds no sparsessm_report.json" in refused("export", DEMO, "--output", small)
    for family in ("jamba", "falcon_mamba"):
        tiny_model(family).save_pretrained(tmp_path / family)
        message = refused("export", tmp_path / family, "--output", out)
        assert f"mamba_ssm has no {family} model" in message
    tiny_model("mamba2").save_pretrained(tmp_path / "grouped")
    assert "2 groups of heads" in refused("export", tmp_path / "grouped", "--output", out)
    assert "cannot load model" in refused("export", tmp_path / "none", "--output", out)


def test_export_over_the_model_itself(refused, sparsessm, tmp_path):
    out = tmp_path / "out"
    assert sparsessm("export", DEMO, "--output", out)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    assert "is or holds the model" in refused("export", out, "--output", out)
    assert (out / "model.safetensors").read_bytes() == before


def test_the_help_names_what_is_registered():
    from llmcompressor.pipelines import CalibrationPipeline

    from sparsessm_plugin.checkpoints.export import FORMATS
    from sparsessm_plugin.evaluation.component_loss import BY
    from sparsessm_plugin.solvers.projections import SOLVERS

    def words(command, option):
        parameters = typer.main.get_command(cli.app).commands[command].params
        (text,) = (p.help for p in parameters if option in p.opts)
        return set(re.findall(r"\w+", text))

    assert set(SOLVERS) <= words("component-loss", "--solver")
    assert set(BY) <= words("component-loss", "--by")
    assert set(FORMATS) <= words("export", "--format")
    assert set(CalibrationPipeline.registered_names()) == set(options.PIPELINES)
    assert set(options.PIPELINES) <= words("prune", "--pipeline")
    local = Path(tasks.__file__).with_name("task_configs").glob("*_local.yaml")
    assert {file.stem for file in local} <= words("evaluate", "--tasks")
