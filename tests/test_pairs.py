"""Every two modifiers in one recipe: the second does not reach into what the first one does."""

from functools import cache, partial
from itertools import permutations

import pytest
import torch
from conftest import batches, state, tiny_model
from test_modifier import run

import sparsessm_plugin as plugin
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.export import check_mamba_ssm
from sparsessm_plugin.pruning import ModelSource
from sparsessm_plugin.recipes import load_recipe

STEPS = {"distill_steps": 2, "distill_learning_rate": 1e-5}
TUNED = {"rounds": 2, "tune_steps": 2, "tune_loss": "dense"}
MAKERS = {
    "states": partial(plugin.StateRemovalModifier, keep=4, **STEPS),
    "channels": partial(plugin.ChannelRemovalModifier, keep=32, multiple_of=8, **STEPS),
    "projections": partial(plugin.SensitivitySparseGPTModifier, sparsity=0.4),
    "gradient": partial(plugin.GradientMagnitudeModifier, sparsity=0.3, **TUNED),
    "A_log": partial(plugin.SparseSSMModifier, sparsity=0.5),
    "quantized": partial(
        plugin.SparseGPTQModifier,
        targets=["Linear"],
        ignore=["lm_head", "re:.*dt_proj$"],
        scheme="W8A8",
    ),
}
READY = batches(3, 2, 24, padded=True)


def report_of(modifier):
    """Without what differs by nature."""
    layers = [{**layer, "seconds": None} for layer in modifier.report()["layers"]]
    return layers, modifier.report().get("rounds"), modifier.report().get("distillation")


@cache
def alone(name):
    modifier = MAKERS[name]()
    run(tiny_model("mamba"), modifier, READY)
    return report_of(modifier)


def refusal(first, second, pipeline):
    """What is said where the second cannot follow the first, or watch the same pass."""
    if first == "quantized" and second in ("states", "channels"):
        return "remove first, then quantize"
    watching = {"states": ("projections", "A_log")}
    watching["channels"] = (*watching["states"], "quantized")
    if pipeline != "independent" and second in watching.get(first, ()):
        return "watches the same calibration pass .* with pipeline independent"
    return None


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize(("first", "second"), permutations(MAKERS, 2))
def test_every_two_modifiers(first, second, pipeline):
    model, modifiers = tiny_model("mamba"), [MAKERS[first](), MAKERS[second]()]
    before, message = state(model), refusal(first, second, pipeline)
    if message is not None:
        with pytest.raises(SparseSSMError, match=message):
            run(model, modifiers, READY, pipeline=pipeline)
        after = state(model)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        return
    run(model, modifiers, READY, pipeline=pipeline)
    if pipeline == "independent":
        assert report_of(modifiers[0]) == alone(first)
    after = state(model)
    for name, modifier in zip((first, second), modifiers, strict=True):
        scales = [key for key in after if key.endswith("weight_scale")]
        assert scales if name == "quantized" else modifier.report()["layers"]
    for name, value in after.items():
        assert bool(torch.isfinite(value.float()).all()), name
    with torch.no_grad():
        assert bool(torch.isfinite(model(READY[0]["input_ids"]).logits).all())


@pytest.fixture(scope="module", params=["W8A8", "W4A16"])
def quantized_checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / request.param
    config = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*dt_proj$"]}
    if request.param == "W4A16":
        config["ignore"] = [*config["ignore"], "re:.*x_proj$", "re:.*out_proj$"]
    model = tiny_model("mamba", hidden_size=128)
    run(model, plugin.SparseGPTQModifier(scheme=request.param, **config), output_dir=str(folder))
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_that_is_stored_quantized_is_refused(quantized_checkpoint, name):
    model = plugin.load(quantized_checkpoint)
    with pytest.raises(SparseSSMError, match="is stored quantized; prune a model first, then"):
        run(model, MAKERS[name](), READY)


def test_so_it_is_by_the_command_before_weights_are_loaded(quantized_checkpoint):
    source = ModelSource(str(quantized_checkpoint))
    for name in ("state-50", "whole-50-w8a8", "gradient-50", "alog-50"):
        with pytest.raises(SparseSSMError, match="is stored quantized"):
            load_recipe(name).check_model(source.load_skeleton())
    with pytest.raises(SparseSSMError, match="is quantized, which mamba_ssm knows nothing of"):
        check_mamba_ssm(source.load_skeleton())
