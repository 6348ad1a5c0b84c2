"""Recipes are checked before any model is loaded; each mistake is one line."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MAMBA1, MAMBA2, Loader, batches, tiny_model, with_images
from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from sparsessm_plugin import patterns, recipe_path
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.quantizable import check_quantized
from sparsessm_plugin.recipes import describe_recipe, load_recipe, parse_recipe, recipe_names

GOOD = """
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      sparsity: 0.5
"""


def with_fields(fields):
    return GOOD.replace("sparsity: 0.5", fields)


def test_built_in_recipes_are_valid():
    names = recipe_names()
    assert {"alog-50", "alog-50-memoryless", "alog-2of4", "alog-paper"} <= set(names)
    assert {"state-50", "state-75", "state-50-w8a8"} <= set(names)
    for name in names:
        assert load_recipe(name).modifiers
        assert load_recipe(recipe_path(name)).text == load_recipe(name).text
        assert describe_recipe(name)


def test_what_the_built_in_recipes_say():
    assert load_recipe("alog-50").modifiers[0].saliency == "output_error"
    assert load_recipe("alog-50-memoryless").modifiers[0].pruned_value == "memoryless"
    assert load_recipe("alog-2of4").modifiers[0].mask_structure == "2:4"
    paper = load_recipe("alog-paper").modifiers[0]
    assert (paper.saliency, paper.aggregation, paper.pruned_value) == (
        "hessian",
        "frequency",
        "zero",
    )
    for name, sparsity in (("state-50", 0.5), ("state-75", 0.75), ("state-50-w8a8", 0.5)):
        removal = load_recipe(name).modifiers[0]
        assert type(removal).__name__ == "StateRemovalModifier"
        assert removal.sparsity == sparsity
    quantization = load_recipe("state-50-w8a8").modifiers[1]
    assert quantization.scheme == "W8A8"
    assert "lm_head" in quantization.ignore


def test_recipes_with_other_peoples_modifiers():
    recipe = parse_recipe(
        GOOD
        + """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: FP8_DYNAMIC
      ignore: [lm_head]
"""
    )
    kinds = [type(m).__name__ for m in recipe.modifiers]
    assert kinds == ["SparseSSMModifier", "QuantizationModifier"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["must be a mapping", "got nothing"]),
        ("- a\n- b\n", ["must be a mapping", "got a list"]),
        ("a: [1\n", ["not valid YAML", "line 2"]),
        ("prune:\n  prune_modifiers:\n    X: {}\n", ["'prune' would be ignored", "'_stage'"]),
        ("prune_stage:\n  mods:\n    X: {}\n", ["'mods' would be ignored", "'_modifiers'"]),
        ("prune_stage:\n  prune_modifiers:\n", ["prune_stage.prune_modifiers", "got nothing"]),
        ("args: {}\n", ["holds no modifier"]),
        (
            GOOD.replace("SparseSSMModifier", "SparseSMModifier"),
            ["unknown modifier 'SparseSMModifier'", "did you mean SparseSSMModifier?"],
        ),
        (GOOD.replace("SparseSSMModifier", "Zzz"), ["unknown modifier 'Zzz'", "known: "]),
        (
            with_fields("sparsty: 0.5"),
            ["unknown field SparseSSMModifier.sparsty", "did you mean sparsity?", "allowed: "],
        ),
        (
            with_fields("sparcity: 0.5").replace("SparseSSM", "GradientMagnitude"),
            ["unknown field GradientMagnitudeModifier.sparcity", "did you mean sparsity?"],
        ),
        (
            with_fields("sparsity: 0.5\n      loss_fn: true").replace(
                "SparseSSM", "GradientMagnitude"
            ),
            ["GradientMagnitudeModifier.loss_fn", "got True"],
        ),
        (
            with_fields("keep: 2\n      seed: 9223372036854775808").replace(
                "SparseSSM", "LayerRemoval"
            ),
            ["LayerRemovalModifier.seed", "less than"],
        ),
        ("a: \0", ["not valid YAML", "special characters"]),
        (with_fields("sparsity: 1.5"), ["SparseSSMModifier.sparsity", "between 0 and 1", "1.5"]),
        (with_fields("sparsity: 0"), ["SparseSSMModifier.sparsity", "got 0.0"]),
        (with_fields("sparsity: yes"), ["SparseSSMModifier.sparsity", "number, got the boolean"]),
        (with_fields("sparsity: half"), ["SparseSSMModifier.sparsity", "number", "'half'"]),
        (with_fields('mask_structure: "4:2"'), ["mask_structure", "0 < n < m", "'4:2'"]),
        (
            with_fields("mask_structure: 2:4"),
            ["SparseSSMModifier.mask_structure", "must be quoted", "124"],
        ),
        (
            with_fields("sparsity: 0.5\n      saliency: fisher"),
            ["SparseSSMModifier.saliency", "known: hessian, ", "output_error", "'fisher'"],
        ),
        (
            with_fields("sparsity: 0.5\n      sparsity: 0.6"),
            ["key 'sparsity' is given twice", "line 6"],
        ),
        (with_fields("sparsity: 2024-13-45"), ["not valid YAML", "month"]),
        (with_fields("sparsity: !!int foo"), ["not valid YAML", "foo"]),
        ("[" * 3000, ["not valid YAML"]),
        (
            with_fields("sparsity: 0.5\n      report_path: r.json")
            + with_fields("sparsity: 0.5\n      report_path: r.json").replace("prune", "again"),
            ["two modifiers have the report_path 'r.json'"],
        ),
        (with_fields("- 1"), ["SparseSSMModifier must be a mapping", "got a list"]),
        *(
            (with_fields(f"scheme: W8A8\n      {wrong}").replace("SSM", "GPTQ"), parts)
            for wrong, parts in (
                ("block_size: 0", ["SparseGPTQModifier.block_size", "1, got 0"]),
                ("dampening_frac: -1", ["SparseGPTQModifier.dampening_frac", "0, got -1"]),
                ("dampening_frac: .nan", ["SparseGPTQModifier.dampening_frac", "finite"]),
                ("dampening_frac: 1.5", ["SparseGPTQModifier.dampening_frac", "equal to 1"]),
                ("weight_observer: x", ["SparseGPTQModifier.weight_observer", "minmax", "'x'"]),
                ("dampening_frac: null", ["SparseGPTQModifier.dampening_frac", "number"]),
                ("actorder: upward", ["SparseGPTQModifier.actorder", "static", "got 'upward'"]),
                ("actorder: group", ["SparseGPTQModifier.actorder", "static", "got 'group'"]),
            )
        ),
        (with_fields("{}"), ["give either sparsity or mask_structure"]),
        (
            with_fields("sparsity: !!python/object/apply:os.system ['true']"),
            ["not valid YAML", "python/object"],
        ),
    ],
)
def test_mistakes_are_one_line(text, parts):
    with pytest.raises(SparseSSMError) as error:
        parse_recipe(text, "my.yaml")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("my.yaml")
    for part in parts:
        assert part in message


def test_merge_keys_are_plain_yaml():
    recipe = parse_recipe(
        """
args:
  common: &common {sparsity: 0.25, pruned_value: memoryless}
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      <<: *common
"""
    )
    assert recipe.modifiers[0].sparsity == 0.25


def test_recipe_that_is_not_there(tmp_path):
    with pytest.raises(SparseSSMError, match="built in: all-50-w8a8, alog-2of4"):
        load_recipe("alog-51")
    with pytest.raises(SparseSSMError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(SparseSSMError, match="cannot read recipe"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_recipe_is_checked_against_a_model_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=32, hidden_size=16, state_size=6, num_hidden_layers=1)
        )
    load_recipe("alog-50").check_model(model)
    with pytest.raises(SparseSSMError, match="needs a state size divisible by 4, got 6"):
        load_recipe("alog-2of4").check_model(model)
    recipe = parse_recipe(with_fields("sparsity: 0.5\n      targets: re:nothing"))
    with pytest.raises(SparseSSMError, match="matches no state-space mixer"):
        recipe.check_model(model)
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
        )
    theirs = "a_stage: {a_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"
    with pytest.raises(SparseSSMError, match="no state-space mixer"):
        parse_recipe(theirs).check_model(llama)


def recipe_of(*modifiers):
    """The modifiers, given as name and fields in flow style, in one stage each."""
    return "".join(
        f"s{i}_stage:\n  s{i}_modifiers:\n    {name}: {{{fields}}}\n"
        for i, (name, fields) in enumerate(modifiers)
    )


OURS = ("SensitivitySparseGPTModifier", "sparsity: 0.5")
UPSTREAM = ("SparseGPTModifier", 'sparsity: 0.5, targets: ["re:.*in_proj$"]')
W4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 48}"
GROUPS_OF_48 = f"ignore: [lm_head], config_groups: {{g: {{targets: [Linear], weights: {W4}}}}}"


@pytest.mark.parametrize(
    ("modifiers", "parts"),
    [
        (
            [OURS, UPSTREAM],
            ["SparseGPTModifier would write into the zeros that SensitivitySparseGPTModifier has"],
        ),
        ([UPSTREAM, UPSTREAM], ["made in in_proj", "preserve_sparsity_mask: true"]),
        (
            [OURS, ("GPTQModifier", "scheme: W8A8, targets: [Linear], ignore: [lm_head]")],
            ["GPTQModifier would", "SparseGPTQModifier quantizes without that"],
        ),
        (
            [OURS, ("StateRemovalModifier", "keep: 8")],
            ["out_proj", "put StateRemovalModifier first"],
        ),
        ([OURS, ("ChannelRemovalModifier", "sparsity: 0.5")], ["put ChannelRemovalModifier first"]),
        (
            [OURS, ("StateRemovalModifier", "keep: 8, compensate: none, distill_steps: 9")],
            ["StateRemovalModifier would write into the zeros", "put StateRemovalModifier first"],
        ),
        (
            [
                ("SparseSSMModifier", "sparsity: 0.5"),
                ("StateRemovalModifier", "keep: 8, compensate: none, distill_steps: 9"),
            ],
            ["that SparseSSMModifier has made in A_log", "put StateRemovalModifier first"],
        ),
        (
            [
                ("SparseSSMModifier", "sparsity: 0.5, pruned_value: zero"),
                ("SparseSSMModifier", "sparsity: 0.5, pruned_value: memoryless"),
            ],
            ["pruned_value memoryless would undo", "with zero has pruned"],
        ),
        (
            [("SparseGPTQModifier", 'scheme: W8A8, targets: ["re:.*dt_proj$"]')],
            ["would quantize dt_proj", "without calling it", '"re:.*dt_proj$" to ignore'],
        ),
        (
            [("QuantizationModifier", "scheme: W8A8, targets: [Linear, Conv1d]")],
            ["QuantizationModifier would quantize conv1d"],
        ),
    ],
)
def test_what_is_wrong_for_every_model_is_seen_in_the_recipe(modifiers, parts):
    with pytest.raises(SparseSSMError) as error:
        parse_recipe(recipe_of(*modifiers), "my.yaml")
    assert str(error.value).startswith("my.yaml: ")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "modifiers",
    [
        [UPSTREAM, OURS],  # keeps the zeros that it finds
        [OURS, ("SparseGPTModifier", "sparsity: 0.5, preserve_sparsity_mask: true")],
        [("StateRemovalModifier", "keep: 8"), OURS],
        [OURS, ("StateRemovalModifier", "keep: 8, compensate: D")],
        [("SparseSSMModifier", "sparsity: 0.5"), ("StateRemovalModifier", "keep: 8")],
        [("StateRemovalModifier", "keep: 8, distill_steps: 9"), OURS],
        [OURS, ("SparseGPTQModifier", 'scheme: W8A8, ignore: [lm_head, "re:.*dt_proj$"]')],
        [OURS, ("QuantizationModifier", "scheme: FP8_DYNAMIC, ignore: [lm_head]")],
        [UPSTREAM, ("SparseGPTModifier", 'sparsity: 0.5, targets: ["re:.*out_proj$"]')],
        [
            ("SensitivitySparseGPTModifier", "sparsity: 0.5, targets: [x_proj]"),
            ("GPTQModifier", 'scheme: W8A8, ignore: [lm_head, "re:.*[xt]_proj$"]'),
        ],
        [("SparseSSMModifier", "sparsity: 0.5"), ("SparseSSMModifier", "sparsity: 0.7")],
    ],
)
def test_modifiers_that_leave_each_other_alone(modifiers):
    assert len(parse_recipe(recipe_of(*modifiers)).modifiers) == len(modifiers)


@pytest.mark.parametrize(
    ("family", "modifiers", "parts"),
    [
        (  # in_proj of layer 1 only
            "mamba",
            [
                (
                    "SensitivitySparseGPTModifier",
                    'sparsity: 0.5, targets: ["re:.*1.mixer.in_proj"]',
                ),
                ("SparseGPTModifier", 'sparsity: 0.5, targets: ["re:.*[12].mixer.in_proj"]'),
            ],
            ["zeros", "backbone.layers.1.mixer.in_proj"],
        ),
        (  # a mixer stands for its projections, and a layer for what is in it
            "jamba",
            [OURS, ("SparseGPTModifier", "sparsity: 0.5, targets: [JambaMambaDecoderLayer]")],
            ["model.layers.0.mamba.in_proj"],
        ),
        (
            "mamba",
            [("QuantizationModifier", "scheme: W8A8, ignore: [lm_head]")],
            ["QuantizationModifier: backbone.layers.0.mixer.dt_proj", '"re:.*dt_proj$"'],
        ),
        (
            "mamba2",
            [("QuantizationModifier", GROUPS_OF_48)],
            ["in_proj has 32 inputs", "groups of 48"],
        ),
        (
            "mamba",
            [("SparseGPTModifier", 'sparsity: 0.4, mask_structure: "2:5", ignore: [lm_head]')],
            ["SparseGPTModifier: mask_structure 2:5", "groups of 5, got 32 in backbone.layers.0"],
        ),
    ],
)
def test_what_is_wrong_for_a_model_is_seen_in_its_skeleton(family, modifiers, parts):
    recipe = parse_recipe(recipe_of(*modifiers))
    model = tiny_model(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    with pytest.raises(SparseSSMError) as error:
        recipe.check_model(skeleton)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_2_of_4_on_a_width_that_4_does_not_divide():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, time_step_rank=6)
        )
    with pytest.raises(SparseSSMError, match=r"groups of 4, got 6 in .*dt_proj; add .* to ignore"):
        load_recipe("whole-2of4").check_model(model)


GROUPS_OF_16 = GROUPS_OF_48.replace("48", "16").replace(
    "[lm_head]", '[lm_head, "re:.*dt_proj$", "re:.*x_proj$"]'
)


@pytest.mark.parametrize("way", ["command", "oneshot"])
@pytest.mark.parametrize(
    ("removal", "later", "parts"),
    [
        (
            ("StateRemovalModifier", "keep: 6"),
            ("SparseSSMModifier", 'mask_structure: "2:4"'),
            ["SparseSSMModifier", "divisible by 4, got 6"],
        ),
        (
            ("WidthRemovalModifier", "keep: 26"),
            ("SensitivitySparseGPTModifier", 'mask_structure: "2:4", targets: [in_proj]'),
            ["SensitivitySparseGPTModifier", "groups of 4, got 26"],
        ),
        (
            ("ChannelRemovalModifier", "keep: 40"),
            ("SparseGPTQModifier", GROUPS_OF_16),
            ["SparseGPTQModifier", "has 40 inputs, which groups of 16 do not divide"],
        ),
        (
            ("ChannelRemovalModifier", "keep: 40"),
            ("QuantizationModifier", GROUPS_OF_16),
            ["QuantizationModifier", "has 40 inputs, which groups of 16 do not divide"],
        ),
        (
            ("ChannelRemovalModifier", "keep: 40"),
            (
                "SparseGPTModifier",
                'sparsity: 0.5, mask_structure: "8:16", targets: ["re:.*out_proj$"]',
            ),
            ["SparseGPTModifier", "groups of 16, got 40"],
        ),
    ],
)
def test_what_does_not_fit_the_smaller_model_is_refused_before_it_is_made(
    removal, later, parts, way
):
    model, text = tiny_model("mamba", state_size=8), recipe_of(removal, later)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    recipe = parse_recipe(text)
    for alone in (removal, later):
        parse_recipe(recipe_of(alone)).check_model(skeleton)
    if way == "command":
        with pytest.raises(SparseSSMError) as error:
            recipe.check_model(skeleton)
    else:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="that the removals before it leave") as error:
            oneshot(model=model, recipe=text, dataset=Loader(batches(2)), pipeline="independent")
        assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    for part in (*parts, "(sizes that the removals before it leave)"):
        assert part in str(error.value)


def test_without_a_pass_nothing_is_watched():
    for name in ("alog-50", "state-50", "layers-25", "whole-50", "state-50-w8a8"):
        load_recipe(name).check_pipeline("sequential")
    with pytest.raises(SparseSSMError, match=r"--pipeline datafree .* StateRemovalModifier of st"):
        load_recipe("state-50-w8a8").check_pipeline("datafree")
    load_recipe("gradient-50").check_pipeline("datafree")  # reads the data by itself


def test_what_fits_the_smaller_model_is_taken():
    model = tiny_model("mamba", state_size=8)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    parse_recipe(
        recipe_of(
            ("LayerRemovalModifier", "keep: 1"),
            ("WidthRemovalModifier", "keep: 24"),
            ("StateRemovalModifier", "keep: 4"),
            ("SparseSSMModifier", 'mask_structure: "2:4"'),
            ("SensitivitySparseGPTModifier", 'mask_structure: "2:4", targets: [in_proj]'),
        )
    ).check_model(skeleton)


def test_built_in_recipes_fit_every_family(family):
    model = tiny_model(family)
    for name in recipe_names():
        recipe = load_recipe(name)
        kinds = {type(modifier).__name__ for modifier in recipe.modifiers}
        if "ChannelRemovalModifier" in kinds:
            continue  # removes 64 channels at least, and the tiny models have no more
        if "LayerRemovalModifier" in kinds and model.config.num_hidden_layers < 3:
            continue  # a quarter of two layers is none
        if family in MAMBA2 and "SparseSSMModifier" in kinds:
            with pytest.raises(SparseSSMError, match="one entry a head"):
                recipe.check_model(model)
        elif name.endswith("w4a16"):  # the tiny models are narrower than a group
            with pytest.raises(SparseSSMError, match="groups of 128 do not divide"):
                recipe.check_model(model)
        elif name == "whole-8of16" and family in MAMBA1:
            with pytest.raises(SparseSSMError, match=r"groups of 16, got 4 in .*dt_proj"):
                recipe.check_model(model)
        else:
            recipe.check_model(model)


def test_built_in_quantizations_leave_the_same_alone():
    """Whatever one recipe leaves out of all Linear layers, all leave out."""
    ignored = {
        name: modifier.ignore
        for name in recipe_names()
        for modifier in load_recipe(name).modifiers
        if getattr(modifier, "scheme", None) and modifier.targets == ["Linear"]
    }
    assert {"fast-1.5x-w8a8", "state-50-w8a8", "whole-50-fp8"} <= set(ignored)
    assert len({tuple(sorted(names)) for names in ignored.values()}) == 1, ignored


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe", "image encoder"])
def test_built_in_quantizations_leave_experts_and_encoders_alone(kind):
    """The gate of a shared expert is a Linear layer, and so are those of an image encoder."""
    model = with_images("qwen3_5_moe") if kind == "image encoder" else tiny_model(kind)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name in recipe_names():
        for modifier in load_recipe(name).modifiers:
            if getattr(modifier, "scheme", None) and not name.endswith("w4a16"):
                check_quantized(modifier, skeleton)


# -- what would do nothing, flood the memory or never end ------------------------------------

FIELDS = "SparseSSMModifier: {sparsity: 0.5}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"a_stage:\n  a_modifiers:\n    - {FIELDS}\n", ["a_stage.a_modifiers", "got a list"]),
        (f"a_stage: [{{a_modifiers: {{{FIELDS}}}}}]", ["a_stage must be", "got a list"]),
        (f"a_modifiers: {{{FIELDS}}}", ["a_modifiers is no stage", "'_stage'"]),
        (FIELDS, ["SparseSSMModifier is no stage"]),
        (f"a_stage: {{a_modifier: {{{FIELDS}}}}}", ["a_stage.a_modifier is no group"]),
        (f"a_stage: {{{FIELDS}}}", ["a_stage.SparseSSMModifier is no group"]),
        ("a_stage: {modifiers: [SparseSSMModifier]}", ["a_stage.modifiers is no group"]),
        ("a_stage: {a_modifiers: [{type: SparseSSMModifier}]}", ["got a list"]),
        (GOOD + f"stage2: {{b_modifiers: {{{FIELDS}}}}}", ["stage2 is no stage"]),
        (GOOD.replace("prune_modifiers", "mods"), ["prune_stage.mods is no group"]),
        ("a_stage: {a_modifiers: {SparseSSMModifier: }}", ["mapping of fields, got nothing"]),
        (f"a_stage:\n  a_modifiers:\n    {FIELDS}\n    {FIELDS}\n", ["is given twice"]),
        (f"a_stage: {{a_modifiers: {{{FIELDS}}}}}\n" * 2, ["key 'a_stage' is given twice"]),
    ],
)
@pytest.mark.parametrize("how", ["text", "file", "json", "dict"])
def test_oneshot_ignores_no_modifier_of_ours_in_silence(text, parts, how, tmp_path):
    """LLM Compressor itself would go on without it, and prune nothing."""
    twice = "is given twice" in parts[0]
    if twice and how in ("json", "dict"):
        return  # the second one has won before we see it
    recipe = text
    if how == "file":
        recipe = str(tmp_path / "recipe.yaml")
        Path(recipe).write_text(text)
    elif how == "json":
        recipe = str(tmp_path / "recipe.json")
        Path(recipe).write_text(json.dumps(yaml.safe_load(text)))
    read = Recipe.create_instance
    if how == "dict":
        read, recipe = Recipe.from_dict, yaml.safe_load(text)
    with pytest.raises(SparseSSMError) as error:
        read(recipe)
    assert "\n" not in str(error.value)
    for part in (*parts, *([] if twice else ["SparseSSMModifier"])):
        assert part in str(error.value)


def test_oneshot_is_told_of_a_stage_that_is_not_there():
    assert len(Recipe.create_instance(GOOD, target_stage="prune").modifiers) == 1
    with pytest.raises(SparseSSMError, match="has no stage 'quant'; it has prune_stage"):
        Recipe.create_instance(GOOD, target_stage="quant")


@pytest.mark.parametrize(
    "text",
    [
        "a_stage: {a_modifiers: [{SparseGPTModifier: {sparsity: 0.5}}]}",
        "a_modifiers: {SparseGPTModifier: {sparsity: 0.5}}",
        "a_stage: {mods: {SparseGPTModifier: {sparsity: 0.5}}}",
        "a: &a [b]\nb: [*a, *a]\nb: 1\n",
    ],
)
def test_recipes_without_a_modifier_of_ours_go_on_as_ever(text):
    assert Recipe.create_instance(text).modifiers == []


LAUGHS = "l0: &l0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGES = "args:\n  m0: &m0 {k: 1}\n" + "".join(
    f"  m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + with_fields("sparsity: *l8"),
        LAUGHS + with_fields("sparsity: 0.5\n      targets: *l8"),
        MERGES + with_fields("<<: *m8\n      sparsity: 0.5"),
        with_fields("sparsity: &a [*a]"),
        with_fields("sparsity: 0.5\n      targets: &a {x: [*a]}"),
        with_fields("sparsity: 0.5 # " + "x" * (1 << 22)),
    ],
    ids=["list", "targets", "merge", "itself", "deep", "long"],
)
def test_aliases_do_not_flood_the_memory(text):
    for read in (parse_recipe, Recipe.create_instance):
        with pytest.raises(SparseSSMError, match=r"alias|longer than"):
            read(text)


def test_aliases_in_moderation_are_plain_yaml():
    text = "args: {t: &t [re:.*0.mixer, re:.*1.mixer]}\n" + with_fields(
        "sparsity: 0.5\n      targets: *t"
    )
    for read in (parse_recipe, Recipe.create_instance):
        assert read(text).modifiers[0].targets == ["re:.*0.mixer", "re:.*1.mixer"]


SLOW = r"re:(([a-z0-9._]+)+)+\Z(?!)"
HOPELESS = [SLOW, r"re:(.|[a-z]|\w)*\Z(?!)", "re:" + ".*" * 30 + "%"]


@pytest.mark.parametrize("pattern", HOPELESS)
@pytest.mark.parametrize(
    "modifier",
    [
        "SparseSSMModifier: {sparsity: 0.5, targets: [HERE]}",
        "SensitivitySparseGPTModifier: {sparsity: 0.5, ignore: [HERE]}",
        "SparseGPTModifier: {sparsity: 0.5, targets: [HERE]}",
        "SparseGPTQModifier: {scheme: {W8A8: [HERE]}}",
    ],
)
def test_patterns_that_never_end_are_refused(pattern, modifier, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 1)
    quoted = "'" + pattern + "'"
    with pytest.raises(SparseSSMError, match="takes more than 1 seconds to match"):
        parse_recipe("a_stage: {a_modifiers: {" + modifier.replace("HERE", quoted) + "}}")


def test_patterns_that_never_end_are_refused_in_oneshot(monkeypatch):
    from sparsessm_plugin import SparseGPTQModifier, SparseSSMModifier

    monkeypatch.setattr(patterns, "_SECONDS", 1)
    for modifier in (
        SparseSSMModifier(sparsity=0.5, targets=[SLOW]),
        SparseGPTQModifier(scheme="W8A8", ignore=[SLOW]),
    ):
        with pytest.raises(SparseSSMError, match="takes more than 1 seconds to match"):
            modifier.initialize(State(model=tiny_model("mamba")))


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999999999999}", "re:" + "(" * 5000])
@pytest.mark.parametrize("kind", ["SparseSSMModifier", "SparseGPTModifier"])
def test_patterns_that_are_none(pattern, kind):
    text = f"a_stage: {{a_modifiers: {{{kind}: {{sparsity: 0.5, targets: ['{pattern}']}}}}}}"
    with pytest.raises(SparseSSMError, match="is no regular expression") as error:
        parse_recipe(text)
    assert len(str(error.value)) < 400


def test_a_recipe_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", "/dev/zero"):
        with pytest.raises(SparseSSMError, match="is no regular file"):
            load_recipe(path)
    with pytest.raises(SparseSSMError, match="does not exist") as error:
        load_recipe("n" * 5000 + ".yaml")
    assert len(str(error.value)) < 300
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SparseSSMError, match="is longer than"):
        load_recipe(tmp_path / "huge.yaml")


VALID = {
    "SparseSSMModifier": "sparsity: 0.5",
    "StateRemovalModifier": "keep: 4",
    "ChannelRemovalModifier": "keep: 32",
    "LayerRemovalModifier": "keep: 4",
    "SensitivitySparseGPTModifier": "sparsity: 0.5",
    "GradientMagnitudeModifier": "sparsity: 0.5",
    "SparseGPTQModifier": 'scheme: W8A8, ignore: [lm_head, "re:.*dt_proj$"]',
}


@pytest.mark.parametrize("kind", VALID)
def test_fields_of_the_framework_that_mean_nothing_are_refused(kind):
    for field in (
        *("start: 0.5", "end: 2.0", "update: 1", "index: 3", "initialized_: true"),
        *("finalized_: true", "started_: true", "ended_: true"),
    ):
        name = field.partition(":")[0]
        for read in (parse_recipe, Recipe.create_instance):
            with pytest.raises(ValueError, match=rf"{kind}\.{name}"):
                read(recipe_of((kind, f"{VALID[kind]}, {field}")))
    plain = recipe_of((kind, f"{VALID[kind]}, start: null, initialized_: false, group: mine"))
    assert parse_recipe(plain).modifiers[0].group == "mine"
    # what a saved recipe says of itself is read again
    again = Recipe.create_instance(parse_recipe(plain).modifiers[0]).yaml()
    assert type(parse_recipe(again).modifiers[0]).__name__ == kind


def test_calibration_data_is_not_talked_away():
    free = ("SparseSSMModifier", "sparsity: 0.5, saliency: magnitude")
    assert not parse_recipe(recipe_of(free)).modifiers[0].requires_calibration_data
    again = Recipe.create_instance(list(parse_recipe(recipe_of(free)).modifiers)).yaml()
    assert "requires_calibration_data: false" in again
    assert not parse_recipe(again).modifiers[0].requires_calibration_data
    for modifier, value in ((free, "true"), (OURS, "false")):
        fields = f"{modifier[1]}, requires_calibration_data: {value}"
        with pytest.raises(SparseSSMError, match="follows from the other fields"):
            parse_recipe(recipe_of((modifier[0], fields)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("ignore: [lm_head]", "give a scheme"),
        ('scheme: W8A8, ignore: ["re:.*"]', "would quantize no weight"),
        ("scheme: W8A8, targets: [nothing]", "targets: 'nothing' matches no module"),
        ('scheme: W8A8, targets: ["re:.*out_proj$", "re:nothing"]', "'re:nothing' matches no"),
        ('scheme: {W8A8: ["re:nothing"]}', "'re:nothing' matches no"),
        ("scheme: W8A8, config_groups: {}", "either scheme or config_groups, got both"),
        ("config_groups: {g: {targets: [Linear]}}, ignore: [lm_head]", "would quantize no weight"),
    ],
)
def test_a_quantization_of_nothing_is_refused(fields, message):
    model = tiny_model("mamba")
    text = recipe_of(("SparseGPTQModifier", fields))
    with pytest.raises(SparseSSMError, match=message) as error:
        parse_recipe(text).check_model(model)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        Recipe.create_instance(text).modifiers[0].initialize(State(model=model))


@pytest.mark.parametrize(
    "structure", ["2:4\\n", " 2:4", "\uff12:\uff14", "2:4:", "9" * 5000 + ":4"]
)
def test_structures_that_only_look_like_one(structure):
    for kind in ("SparseSSMModifier", "SensitivitySparseGPTModifier"):
        fields = f'mask_structure: "{structure}"'
        if kind == "SensitivitySparseGPTModifier":
            fields += ", sparsity: 0.5"
        with pytest.raises(SparseSSMError, match="mask_structure") as error:
            parse_recipe(recipe_of((kind, fields)))
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "fields",
    [
        "sparsity: " + "x" * 10_000,
        "sparsity: [" + "1, " * 10_000 + "]",
        "x" * 10_000 + ": 1",
        "sparsity: 0.5, targets: ['re:" + "(" * 10_000 + "']",
        "sparsity: 0x" + "f" * 10_000,
        "mask_structure: " + "y" * 10_000,
        "sparsity: 0.5, saliency: " + "z" * 10_000,
    ],
)
def test_values_are_echoed_in_short(fields):
    with pytest.raises(SparseSSMError) as error:
        parse_recipe(recipe_of(("SparseSSMModifier", fields)))
    assert len(str(error.value)) < 1200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("QuantizationModifier", 'scheme: W8A8, ignore: ["re:.*"]', "would quantize no weight"),
        ("QuantizationModifier", "scheme: W8A8, targets: [nothing]", "would quantize no weight"),
        ("QuantizationModifier", "ignore: [lm_head]", "would quantize no weight"),
        ("GPTQModifier", 'scheme: W8A8, targets: ["re:nothing"]', "would quantize no weight"),
        ("SparseGPTModifier", "sparsity: 0.5, targets: [nothing]", "would prune no weight"),
        ("WandaPruningModifier", 'sparsity: 0.5, ignore: ["re:.*"]', "would prune no weight"),
    ],
)
def test_modifiers_of_others_that_would_do_nothing_are_refused(kind, fields, message):
    recipe = parse_recipe(recipe_of((kind, fields)))
    with pytest.raises(SparseSSMError, match=f"{kind} {message}"):
        recipe.check_model(tiny_model("mamba"))


def test_the_state_of_a_run_is_no_field_of_a_recipe():
    fields = "sparsity: 0.5, initialized_: true"
    with pytest.raises(SparseSSMError, match=r"SparseGPTModifier\.initialized_ says how far a run"):
        parse_recipe(recipe_of(("SparseGPTModifier", fields)))


@pytest.mark.parametrize("kind", ["SparseSSMModifier", "SensitivitySparseGPTModifier"])
@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_targets_are_echoed_in_short(kind, field):
    recipe = parse_recipe(recipe_of((kind, f"sparsity: 0.5, {field}: [{'n' * 10_000}]")))
    with pytest.raises(SparseSSMError, match=r"n\.\.\. matches n") as error:
        recipe.check_model(tiny_model("mamba"))
    assert len(str(error.value)) < 700
