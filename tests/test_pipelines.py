"""Pipelines for published checkpoints: counted on their configs, and run on small random models.

The configs are what the checkpoints' config.json hold: facts, odd fields among them.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import DEMO, DEVICE

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods.runtime_sizes import PlannedMixers
from sparsessm_plugin.recipes import load_recipe, recipe_path
from sparsessm_plugin.recipes.pruning import ModelSource

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import count  # noqa: E402

CONFIGS = json.loads((Path(__file__).parent / "data" / "published_configs.json").read_text())
PIPELINES = count.pipelines()
# billions, as their authors state them
STATED = {
    "state-spaces/mamba-130m-hf": 0.13,
    "state-spaces/mamba-2.8b-hf": 2.8,
    "tiiuae/falcon-mamba-7b": 7.27,
    "state-spaces/mamba2-2.7b": 2.7,
    "mistralai/Mamba-Codestral-7B-v0.1": 7.29,
    "ibm-granite/granite-4.0-h-350m": 0.34,
    "ibm-granite/granite-4.0-h-micro": 3.19,
    "ibm-granite/granite-4.0-h-tiny": 6.94,
    "nvidia/Nemotron-H-8B-Base-8K": 8.1,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31.6,
    "ai21labs/Jamba-v0.1": 51.6,
    "ibm-ai-platform/Bamba-9B-v2": 9.78,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79.7,
}
# of the five sizes of Mamba one is run
RUN = [name for name in CONFIGS if not re.search(r"mamba-(370m|790m|1.4b|2.8b)-hf|H1-7B", name)]


@pytest.fixture(scope="module")
def skeletons():
    """The models at full size, on the meta device."""
    return {name: count.skeleton_of(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def counted(skeletons):
    return {p: count.count(p, skeletons[p.model]) for p in PIPELINES}


def test_every_checkpoint_has_a_pipeline():
    assert {p.model for p in PIPELINES} == set(CONFIGS)
    assert len({(p.model, p.recipe) for p in PIPELINES}) == len(PIPELINES)


def test_the_table_is_what_is_counted(counted):
    text = (ROOT / "recipes" / "README.md").read_text()
    for pipeline, found in counted.items():
        assert count.row(pipeline, found) in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(counted)
    usual = count.Pipeline("CHECKPOINT", "RECIPE", **count.defaults())
    command = text.replace(" \\\n    ", " ").partition("```\n")[2].partition("\n```")[0]
    assert command.split()[:-1] == ["sparsessm", "prune", *usual.arguments[:-1]]


def test_configs_make_the_models_that_were_published(counted):
    found = {p.model: result.parameters[0] / 1e9 for p, result in counted.items()}
    for name, billions in STATED.items():
        assert found[name] == pytest.approx(billions, rel=0.02), name


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_graph_leaves_is_what_the_loader_makes(name, skeletons):
    """Every tensor of the full size: cut along the dependency graph, and made from the config."""
    model = skeletons[name]
    mixers = find_mixers(model)
    kept = mixers[0].sizes.state_size // 2
    planned = PlannedMixers(model, mixers, mixers[0].state_axis).facts(kept)
    loaded = count.Shapes(model).model({"states": kept})
    shapes = {tensor: list(value.shape) for tensor, value in loaded.state_dict().items()}
    assert {tensor: info["shape"] for tensor, info in planned.tensors.items()} == shapes
    assert shapes != {tensor: list(value.shape) for tensor, value in model.state_dict().items()}


# -- small random models ---------------------------------------------------------------------

HIDDEN, HEADS, ATTENTION_HEADS = 64, 8, 4
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("d_inner", "mamba_d_ssm", "attention_hidden_size"), 2 * HIDDEN),
    **dict.fromkeys(("num_heads", "mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), HEADS),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_head_dim"), 2 * HIDDEN // HEADS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("intermediate_size", "shared_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "adapter_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **{"moe_shared_expert_intermediate_size": 48, "num_experts_per_tok": 2},
    **{"num_attention_heads": ATTENTION_HEADS, "attention_head_dim": 32, "vocab_size": 2048},
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"mrope_section": [2, 1, 1], "num_hidden_layers": 4, "n_layer": 4, "num_query_groups": 4},
    **{"attn_layer_period": 4, "attn_layer_offset": 2, "attn_layer_indices": [2]},
    **{"hybrid_layer_ids": [1, 3], "kv_channels": 16},
}
VISION = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
    **{"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "patch_size": 4},
}
STATES = ("state_size", "mamba_d_state", "ssm_state_size")
KINDS = ("layer_types", "layers_block_type")


def small(config):
    """The same config, odd fields included, of a model of four layers; every kind stays."""
    made = {}
    for key, value in config.items():
        if key == "vision_config":
            made[key] = value | VISION
        elif isinstance(value, dict):
            made[key] = small(value)
        elif value is None or (value == 0 and key.startswith("num_")):
            made[key] = value
        elif key in KINDS:
            first, other = dict.fromkeys(value)
            made[key] = [first, other, first, other]
        elif key == "hybrid_override_pattern":
            made[key] = value[:3] + "*"
        elif key in STATES:
            made[key] = max(8, value // 8)
        elif key == "head_dim":  # of the mixer in Mamba-2, else of the attention
            made[key] = 32 if "linear_key_head_dim" in config else 16
        elif key == "num_key_value_heads":
            made[key] = max(1, ATTENTION_HEADS * value // config["num_attention_heads"])
        elif key == "linear_num_value_heads":
            made[key] = 2 * value // config["linear_num_key_heads"]
        elif key == "intermediate_size" and config["model_type"] in ("falcon_mamba", "mamba2"):
            made[key] = 2 * HIDDEN
        elif key in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
            made[key] = min(2, value)
        elif key.endswith("_token_id") and value >= SMALL["vocab_size"]:
            made[key] = 0
        else:
            made[key] = SMALL.get(key, value)
    return made


def write(folder, config):
    """A random model with this config, written as it is, and the demo's tokenizer."""
    folder.mkdir()
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    skeleton = ModelSource(str(folder)).load_skeleton()
    torch.manual_seed(0)
    type(skeleton)(skeleton.config).save_pretrained(folder)
    (folder / "config.json").write_text(text)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)


def quick(recipe, folder):
    """The built-in recipe with fewer steps of reconstruct, which alone take time."""
    content = yaml.safe_load(Path(recipe_path(recipe)).read_text())
    for groups in content.values():
        for modifiers in groups.values():
            if "StateRemovalModifier" in modifiers:
                modifiers["StateRemovalModifier"]["reconstruct_steps"] = 2
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert load_recipe(path).modifiers
    return path


@pytest.mark.parametrize("name", RUN)
def test_pipelines_run_on_small_models(name, tmp_path, sparsessm, text_file):
    config = small(CONFIGS[name])
    write(tmp_path / "dense", config)
    recipe = [p.recipe for p in PIPELINES if p.model == name][-1]
    code, _, stderr = sparsessm(
        "prune", tmp_path / "dense", "--recipe", quick(recipe, tmp_path),
        "--output", tmp_path / "pruned", "--calibration", text_file, "--num-samples", 8,
        "--max-seq-length", 32, "--device", DEVICE,
    )  # fmt: skip
    assert code == 0, stderr
    saved = json.loads((tmp_path / "pruned" / "config.json").read_text())
    check_config(saved, config)
    if "quantization_config" not in saved:
        loaded = getattr(transformers, saved["architectures"][0])
        logits = loaded.from_pretrained(tmp_path / "pruned")(torch.tensor([[1, 2, 3, 4]])).logits
        assert torch.isfinite(logits).all()


# what other runtimes ask for, and what transformers writes itself
ADDED = {"intermediate_size", "quantization_config", "transformers_version", "dtype"}


def check_config(saved, config):
    """Half of the states where they were stated, and all else as it was published.

    LLM Compressor keeps the file only where it states whether embeddings are tied.
    """
    if "tie_word_embeddings" in config:
        assert set(config) <= set(saved) <= set(config) | ADDED
    for key, value in config.items():
        if key in (*STATES, "linear_key_head_dim"):
            assert saved[key] == value // 2
        elif isinstance(value, dict) and key == "text_config":
            check_config(saved[key], value)
        elif key in KINDS or ("tie_word_embeddings" in config and key != "dtype"):
            assert saved[key] == value, key


def test_both_spellings_of_infinity(tmp_path, sparsessm, text_file):
    """A bare Infinity, as transformers 4 wrote it, and a mapping, as transformers 5 does."""
    config = small(CONFIGS["mistralai/Mamba-Codestral-7B-v0.1"])
    assert config["time_step_limit"][1] == float("inf")
    config["time_step_limit"][1] = {"__float__": "Infinity"}
    write(tmp_path / "dense", config)
    code, _, stderr = sparsessm(
        "prune", tmp_path / "dense", "--recipe", quick("state-50", tmp_path),
        "--output", tmp_path / "pruned", "--calibration", text_file, "--num-samples", 4,
        "--max-seq-length", 32, "--device", DEVICE,
    )  # fmt: skip
    assert code == 0, stderr
    loaded = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loaded.config.time_step_limit[1] == float("inf")
