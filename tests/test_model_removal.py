"""Removals along an axis of a whole model: lifecycle, pipelines, ranks, and what errors leave."""

import re
from typing import Any, ClassVar

import pytest
import torch
from conftest import DEVICE, batches, check_reload, nothing_left_behind, run, state, tiny_model
from loguru import logger
from torch import nn

import sparsessm_plugin as plugin
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods.model_removal import ModelRemoval, ModelRemovalSettings
from sparsessm_plugin.methods.removal import Removed
from sparsessm_plugin.methods.run import run as directly
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier
from sparsessm_plugin.recipes import parse_recipe

READY = batches(2, 2, 16, padded=True)


class Settings(ModelRemovalSettings):
    fails: str = ""  # when


class LastLayers(ModelRemoval[Settings]):
    """Takes the last layers away, and marks a norm as fitted."""

    def check_sizes(self, adapter):
        self.check_keep(adapter.name, "layers", adapter.axis_length("layers"))

    def kept_sizes(self, adapter):
        return {"layers": self.settings.kept(adapter.axis_length("layers"))}

    def remove(self, model, batches):
        assert not torch.is_grad_enabled()
        self.fail("at once")
        self.changes_weights()
        model.base_model.layers[0].norm.weight.mul_(0.9)
        self.fail("fitted")
        keep = self.kept_sizes(self.graph.adapter)["layers"]
        group = self.prune("layers", range(keep, self.graph.adapter.axis_length("layers")))
        self.fail("pruned")
        gone = list(next(iter(group.indices.values())))
        tokens = self.tokens
        return [Removed("M", "layers", group.old_size, keep, gone, tokens, None, None, None, 0.0)]

    def distill(self, distillation):
        self.fail("distilled")
        return super().distill(distillation)

    def fail(self, when):
        if self.settings.fails == when:
            raise SparseSSMError("the fit failed")


class LastLayersModifier(Settings, ModelRemovalModifier):
    method_class: ClassVar[type[ModelRemoval[Any]]] = LastLayers


def deep(**changes):
    return tiny_model("mamba", num_hidden_layers=4, **changes)


def expected(keep=2):
    model = deep()
    with torch.no_grad():
        model.base_model.layers[0].norm.weight.mul_(0.9)
    del model.base_model.layers[keep:]
    return state(model)


def assert_same(model, weights):
    found = state(model)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_on_a_plain_model():
    model = deep()
    result = directly(LastLayers(Settings(keep=2)), model, READY)
    assert_same(model, expected())
    assert model.config.num_hidden_layers == 2
    assert result.config_fields == {"num_hidden_layers": 2}
    assert result.total.pruned == 2
    assert result.layers[0].tokens == sum(int(b["attention_mask"].sum()) for b in READY)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic", "datafree"])
def test_every_pipeline_goes_on_with_the_smaller_model(pipeline, tmp_path):
    model, modifier = deep(), LastLayersModifier(sparsity=0.5)
    run(model, modifier, READY, pipeline=pipeline)
    assert_same(model, expected())
    nothing_left_behind(model)
    assert modifier.report()["total"]["pruned"] == 2
    if pipeline == "sequential":
        model.save_pretrained(tmp_path / "saved")
        check_reload(model, tmp_path / "saved")


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_one_removal_after_the_other(pipeline):
    model = deep()
    run(model, [LastLayersModifier(keep=3), LastLayersModifier(keep=1)], READY, pipeline=pipeline)
    assert len(model.base_model.layers) == model.config.num_hidden_layers == 1
    with pytest.raises(SparseSSMError, match="would keep 3 layers, and an earlier one leaves 1"):
        run(deep(), [LastLayersModifier(keep=1), LastLayersModifier(keep=3)], READY)


def _nemotron(*kinds):
    names = {"m": "linear_attention", "a": "full_attention", "p": "mlp"}
    return tiny_model("nemotron_h", layers_block_type=[names[kind] for kind in kinds])


def _layers_first(keep, then):
    return f"""
    removal_stage:
      removal_modifiers:
        LayerRemovalModifier: {{keep: {keep}, saliency: last, compensate: []}}
        {then}
    """


@pytest.mark.parametrize(
    ("kinds", "keep", "then", "said"),
    [
        ("mamp", 3, "MLPRemovalModifier: {keep: 32}", r"all layers with mlp \(1 of 4\)"),
        ("mamp", 3, "AttentionRemovalModifier: {keep: 1}", None),  # one attends in any case
        ("mampp", 3, "MLPRemovalModifier: {keep: 32}", r"\(2 of 5\).*keep at least 4 layers, or"),
        ("mampp", 4, "MLPRemovalModifier: {keep: 32}", None),
        ("amap", 2, "StateRemovalModifier: {keep: 4}", r"all layers with mixers \(1 of 4\)"),
    ],
)
def test_layers_that_may_take_along_what_comes_next_are_said_before(kinds, keep, then, said):
    lines = []
    handle = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        parse_recipe(_layers_first(keep, then)).check_model(_nemotron(*kinds).to("meta"))
    finally:
        logger.remove(handle)
    assert len(lines) == (said is not None)
    assert not said or re.search(said, lines[0])


def test_layers_that_take_along_what_comes_next_are_refused_before_anything_changes():
    model = _nemotron(*"mamp")
    before = state(model)
    recipe = parse_recipe(_layers_first(1, "MLPRemovalModifier: {keep: 32}"))
    said = r"LayerRemovalModifier, which comes before it, leaves no layer with mlp; keep at least 4"
    with pytest.raises(SparseSSMError, match=said):
        recipe.check_model(model)
    with pytest.raises(SparseSSMError, match=said):
        run(model, list(recipe.modifiers), READY)
    assert_same(model, before)


OTHERS = {
    "states": lambda: plugin.StateRemovalModifier(keep=4),
    "channels": lambda: plugin.ChannelRemovalModifier(keep=32, multiple_of=8),
    "projections": lambda: plugin.SensitivitySparseGPTModifier(sparsity=0.4),
    "gradient": lambda: plugin.GradientMagnitudeModifier(sparsity=0.3, rounds=1),
    "A_log": lambda: plugin.SparseSSMModifier(sparsity=0.5),
    "quantized": lambda: plugin.SparseGPTQModifier(
        targets=["Linear"], ignore=["lm_head", "re:.*dt_proj$"], scheme="W8A8"
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_find_the_layers_that_remain(name, tmp_path):
    """They were initialised when there were more, and give what they give on the smaller model."""
    other, alone = OTHERS[name](), OTHERS[name]()
    model, smaller = deep(), deep()
    run(model, [LastLayersModifier(keep=2), other], READY)
    directly(LastLayers(Settings(keep=2)), smaller, READY)
    run(smaller, alone, READY)
    assert_same(model, state(smaller))
    names = [layer["name"] for layer in other.report()["layers"]]
    assert names == [layer["name"] for layer in alone.report()["layers"]]
    assert names or name == "quantized"
    with pytest.raises(SparseSSMError, match="pipeline independent"):
        run(deep(), [LastLayersModifier(keep=2), OTHERS[name]()], READY, pipeline="sequential")


def test_removed_in_front_of_others_that_name_later_layers():
    """Layers count anew, so the third layer is the second for whoever comes afterwards."""

    class FirstLayers(LastLayers):
        def remove(self, model, batches):
            self.prune("layers", [0])
            return [Removed("M", "layers", 4, 3, [0], 0, None, None, None, 0.0)]

    class FirstLayersModifier(Settings, ModelRemovalModifier):
        method_class: ClassVar[type[ModelRemoval[Any]]] = FirstLayers

    model, modifier = deep(), plugin.StateRemovalModifier(keep=4)
    run(model, [FirstLayersModifier(keep=3), modifier], READY)
    names = [layer["name"] for layer in modifier.report()["layers"]]
    assert names == [f"backbone.layers.{i}.mixer" for i in range(3)]


@pytest.mark.parametrize(
    ("fails", "said", "layers"),
    [
        ("at once", "^the fit failed$", 4),
        ("fitted", "now partly pruned and of no use; load it again. Nothing was saved", 4),
        ("pruned", "now partly pruned and of no use; load it again. Nothing was saved", 2),
        ("distilled", "now pruned and not distilled. Nothing was saved", 2),
    ],
)
def test_an_error_says_what_is_in_memory(fails, said, layers, tmp_path):
    for drive in (
        lambda m, f: directly(LastLayers(Settings(**f)), m, READY),
        lambda m, f: run(m, LastLayersModifier(**f), READY),
    ):
        model = deep().to(DEVICE)  # what is moved there for the work goes back as it was
        before = state(model)
        with pytest.raises(SparseSSMError, match=said):
            drive(model, {"keep": 2, "distill_steps": 1, "fails": fails})
        assert len(model.base_model.layers) == model.config.num_hidden_layers == layers
        if fails == "at once":
            assert_same(model, before)
        nothing_left_behind(model)


@pytest.mark.skipif(DEVICE == "cpu", reason="the model computes where it is")
def test_an_error_leaves_a_model_that_was_moved_for_the_work():
    model = deep()
    before = state(model)
    with pytest.raises(SparseSSMError, match=r"^the fit failed$"):
        run(model, LastLayersModifier(keep=2, fails="fitted"), READY)
    assert_same(model, before)
    nothing_left_behind(model)


def test_distilled():
    model, modifier = deep(), LastLayersModifier(keep=3, distill_steps=3)
    run(model, modifier, READY)
    found = modifier.report()["distillation"]
    assert found["steps"] == 3
    assert found["divergence_after"] < found["divergence_before"]


def test_bad_input_is_refused_before_the_work():
    for fields, said in (
        ({"keep": 4}, r"keep = 4 removes none of the 4 layers of MambaForCausalLM; keep 1 to 3"),
        ({"keep": 9}, r"keep = 9 removes none of the 4 layers"),
        ({"sparsity": 0.1}, r"sparsity = 0.1 removes none of the 4 layers"),
        ({"sparsity": 0.95}, r"sparsity = 0.95 removes all of the 4 layers"),
    ):
        model = deep()
        before = state(model)
        for drive in (
            lambda m, f: directly(LastLayers(Settings(**f)), m, READY),
            lambda m, f: run(m, LastLayersModifier(**f), READY),
        ):
            with pytest.raises(SparseSSMError, match=said):
                drive(model, fields)
            assert_same(model, before)
    for fields in ({"keep": 0}, {}, {"keep": 1, "sparsity": 0.5}, {"sparsity": 1.0}):
        with pytest.raises(ValueError, match=r"keep|sparsity"):
            LastLayersModifier(**fields)
    empty = [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}]
    with pytest.raises(SparseSSMError, match="empty"):
        directly(LastLayers(Settings(keep=2)), deep(), empty)
    with pytest.raises(SparseSSMError, match="no state-space mixer"):
        directly(LastLayers(Settings(keep=2)), nn.Linear(2, 2), READY)
    broken = deep()
    with torch.no_grad():
        broken.base_model.norm_f.weight[3] = torch.nan
    with pytest.raises(SparseSSMError, match=r"norm_f\.weight holds NaN"):
        directly(LastLayers(Settings(keep=2)), broken, READY)


SECOND = {
    "width": lambda: plugin.WidthRemovalModifier(keep=16),
    "mlp": lambda: plugin.MLPRemovalModifier(keep=24),
    "attention": lambda: plugin.AttentionRemovalModifier(keep=1),
    "layers": lambda: plugin.LayerRemovalModifier(keep=2, saliency="random", compensate="none"),
}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_removal_is_not_one_of_a_quantized_model(name, tmp_path):
    """Its turn comes when the quantization at the end of the recipe is prepared, and not done."""
    model = tiny_model("qwen3_5")
    run(model, [plugin.StateRemovalModifier(keep=4), SECOND[name](), OTHERS["quantized"]()], READY)
    assert any(hasattr(module, "quantization_scheme") for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    check_reload(model, tmp_path / "saved")


def test_quantize_last():
    recipe = [OTHERS["quantized"](), LastLayersModifier(keep=2)]
    with pytest.raises(SparseSSMError, match="put LastLayersModifier first"):
        run(deep(), recipe, READY)
