"""Every two modifiers in one recipe: zeros and grids last, or one line says why not."""

import copy
import re
from functools import cache, partial
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from conftest import batches, run, state, tiny_model
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.transform.awq import AWQMapping
from pydantic import PrivateAttr

import sparsessm_plugin as plugin
from sparsessm_plugin.checkpoints.export import check_mamba_ssm
from sparsessm_plugin.criteria.values import MEMORYLESS
from sparsessm_plugin.dependency_graph import MixerDependencyGraph
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.modifiers.conflicts import broken_rule, check_works
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier
from sparsessm_plugin.modifiers.removal import RemovalModifier
from sparsessm_plugin.modifiers.rules import RULES
from sparsessm_plugin.recipes import load_recipe
from sparsessm_plugin.recipes.pruning import ModelSource

DOCS = Path(__file__).parents[1] / "docs" / "composing.md"
STEPS = {"distill_steps": 2, "distill_learning_rate": 1e-5}
TUNED = {"rounds": 2, "distill_steps": 2, "distill_loss": "dense", "distill_learning_rate": 1e-5}
INT8 = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*dt_proj$"], "scheme": "W8A8"}
MAKERS = {
    "states": partial(plugin.StateRemovalModifier, sparsity=0.5, **STEPS),
    "channels": partial(plugin.ChannelRemovalModifier, sparsity=0.5, multiple_of=8, **STEPS),
    "projections": partial(plugin.SensitivitySparseGPTModifier, sparsity=0.4),
    "gradient": partial(plugin.GradientMagnitudeModifier, sparsity=0.3, **TUNED),
    "A_log": partial(plugin.SparseSSMModifier, sparsity=0.5),
    "quantized": partial(plugin.SparseGPTQModifier, **INT8),
}
VARIANTS = {
    "states, nothing fitted": partial(plugin.StateRemovalModifier, sparsity=0.5, compensate="none"),
    "channels, nothing fitted": partial(
        plugin.ChannelRemovalModifier, sparsity=0.5, multiple_of=8, compensate="none"
    ),
    "A_log, memoryless": partial(plugin.SparseSSMModifier, sparsity=0.5, pruned_value="memoryless"),
    "gradient of A_log and D": partial(
        plugin.GradientMagnitudeModifier, sparsity=0.3, rounds=1, targets=["A_log", "D"]
    ),
}
# what removes along an axis of the whole model; run with MAKERS only
WHOLE = {
    "width": partial(plugin.WidthRemovalModifier, sparsity=0.5, multiple_of=8),
    "layers": partial(plugin.LayerRemovalModifier, keep=1, saliency="last"),
}
OURS = {**MAKERS, **VARIANTS, **WHOLE}


def upstream(kind, **fields):
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    return lambda: ModifierFactory.create(
        kind, allow_registered=True, allow_experimental=True, **copy.deepcopy(fields)
    )


NORMS, IN_PROJ = r"re:.*layers\.\d+\.norm$", r"re:.*in_proj$"
SCALED = {"mappings": [[[IN_PROJ], NORMS]]}  # LLM Compressor knows no mapping for a Mamba
HALF = {"sparsity": 0.5, "ignore": ["lm_head"]}
WEIGHTS = {"targets": r"re:.*in_proj\.weight$"}
UPSTREAM = {
    "GPTQModifier": upstream("GPTQModifier", **INT8),
    "QuantizationModifier": upstream("QuantizationModifier", **INT8),
    "AutoRoundModifier": upstream("AutoRoundModifier", **INT8),
    "SparseGPTModifier": upstream("SparseGPTModifier", **HALF),
    "WandaPruningModifier": upstream("WandaPruningModifier", **HALF),
    "SmoothQuantModifier": upstream("SmoothQuantModifier", **SCALED),
    "LogarithmicEqualizationModifier": upstream("LogarithmicEqualizationModifier", **SCALED),
    "AWQModifier": upstream("AWQModifier", mappings=[AWQMapping(NORMS, [IN_PROJ])]),
    "QuIPModifier": upstream("QuIPModifier", targets=[IN_PROJ]),
    "REAPPruningModifier": upstream("REAPPruningModifier", sparsity=0.5),
    "SpinQuantModifier": upstream("SpinQuantModifier"),
    "MagnitudePruningModifier": upstream(
        "MagnitudePruningModifier", init_sparsity=0.1, final_sparsity=0.5, **WEIGHTS
    ),
    "ConstantPruningModifier": upstream("ConstantPruningModifier", **WEIGHTS),
}
# what LLM Compressor itself cannot run here: experts in a Mamba, and on a CPU the other two
NOT_RUN = ("AWQModifier", "AutoRoundModifier", "REAPPruningModifier")
EVERY = {**OURS, **UPSTREAM}
PRUNING = (
    "SensitivitySparseGPTModifier",
    "GradientMagnitudeModifier",
    "SparseSSMModifier",
    "SparseGPTModifier",
    "WandaPruningModifier",
)
READY = batches(2, 2, 16, padded=True)


def _weights(model):
    return state(model)


class Snapshot(Modifier):
    """Keeps the model's weights as they are between two modifiers."""

    _taken: dict = PrivateAttr(default_factory=dict)

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        self._taken = _weights(state.model)


def report_of(modifier):
    """Without what differs by nature."""
    layers = [{**layer, "seconds": None} for layer in modifier.report()["layers"]]
    return layers, modifier.report().get("rounds"), modifier.report().get("distillation")


@cache
def alone(name):
    modifier = MAKERS[name]()
    run(tiny_model("mamba"), modifier, READY)
    return report_of(modifier)


def without(removal, weights):
    """Weights of before a removal, of those that it has left, by the dependency graph."""
    model = tiny_model("mamba")
    model.load_state_dict(weights, strict=False)
    for adapter, layer in zip(find_mixers(model), removal.report()["layers"], strict=True):
        MixerDependencyGraph(adapter).get_axis_group(layer["axis"], layer["removed"]).prune()
    return state(model)


def pruned_entries(weights):
    """By name where a weight is pruned; nothing else is zero in the tiny models."""
    dense = tiny_model("mamba").state_dict()
    assert all(bool((dense[n] != 0).all()) for n in dense if ".mixer." in n)
    found = {}
    for name, value in weights.items():
        if ".mixer." in name and name in dense:
            pruned = (value == 0) | (value >= MEMORYLESS)  # what is that large is in A_log
            if bool(pruned.any()):
                found[name] = pruned
    return found


def check_zeros(first, before, second, after):
    """What the first has pruned is pruned behind the second, with the same values."""
    if type(first).__name__ not in PRUNING:
        return
    if isinstance(second, RemovalModifier):
        before = without(second, before)
    if isinstance(second, ModelRemovalModifier):  # of the last layers
        before = {name: value for name, value in before.items() if name in after}
    pruned = pruned_entries(before)
    for name, where in pruned.items():
        assert torch.equal(after[name][where], before[name][where]), name
    assert pruned


def check_grid(modifier, after):
    """int8 weights lie on their grids; scales fit weights that are rounded when saved."""
    scales = {name: value for name, value in after.items() if name.endswith("weight_scale")}
    assert scales
    for name, scale in scales.items():
        steps = after[name.removesuffix("_scale")] / scale
        if type(modifier).__name__ != "QuantizationModifier":
            assert float((steps - steps.round()).abs().max()) < 1e-3, name
        assert 120 < float(steps.abs().max()) < 128.5, name


def check_pair(first, second):
    """Run two modifiers, each in a pass of its own.

    :return: the refusal, or None where both have run and nothing was undone
    """
    model, between = tiny_model("mamba"), Snapshot()
    before = state(model)
    modifiers = [EVERY[first](), between, EVERY[second]()]
    message = None
    try:
        run(model, modifiers, READY)
    except SparseSSMError as error:
        message = str(error)
    after = state(model)
    if message is not None:
        assert "\n" not in message
        assert all(torch.equal(after[name], value) for name, value in before.items())
        return message
    one, _, two = modifiers
    check_zeros(one, between._taken, two, after)
    for modifier in (one, two):
        if hasattr(modifier, "scheme"):
            check_grid(modifier, after)
    return None


def mark_of(first, second):
    """What the documentation's table says of a pair."""
    model, one, two = _model_for(first, second), EVERY[first](), EVERY[second]()
    for modifier in (one, two):
        try:
            check_works(modifier)
        except SparseSSMError:
            return "X"
    rule = broken_rule(one, two, model)
    return rule.mark if rule is not None else "yes"


@cache
def _layout(family):
    return tiny_model("mamba") if family == "mamba" else tiny_model("jamba", **EXPERTS)


EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
}


def _model_for(*names):
    return _layout("mamba" if "REAPPruningModifier" not in names else "jamba")


def pairs():
    """All ordered pairs with one of this package, two of a kind among them."""
    run_with = {**MAKERS, **WHOLE}
    return [
        (one, two)
        for one, two in product(EVERY, EVERY)
        if one in OURS or two in OURS
        if one not in WHOLE or two in run_with
        if two not in WHOLE or one in run_with
        if (one, two) != ("layers", "layers")  # of two layers only one can go
    ]


def test_every_modifier_of_llm_compressor_is_here():
    ModifierFactory.refresh()
    shipped = {**ModifierFactory._main_registry, **ModifierFactory._experimental_registry}
    assert set(UPSTREAM) == set(shipped) - {"Modifier"}
    assert len({type(make()) for make in OURS.values()}) == 8


@pytest.mark.parametrize(("first", "second"), pairs())
def test_zeros_and_grids_last_or_one_line_refuses(first, second):
    mark = mark_of(first, second)
    if first == "SpinQuantModifier":  # stops before anybody else is asked
        with pytest.raises(ValueError, match="Cannot determine head_dim"):
            check_pair(first, second)
        return
    if (first, second) == ("quantized", "AWQModifier"):
        with pytest.raises(ValueError, match="no subsequent quantization modifier"):
            check_pair(first, second)
        return
    if "REAPPruningModifier" in (first, second):
        assert mark == ("E" if (first, second) == ("REAPPruningModifier", "gradient") else "yes")
        return  # run below, on a model with experts
    if mark == "yes" and {first, second} & set(NOT_RUN):
        pytest.skip("LLM Compressor does not run it here")
    message = check_pair(first, second)
    assert (message is None) == (mark == "yes"), message


def test_the_documentation_holds_this_table():
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    found = {}
    for name, cells in rows:
        for column, cell in zip(OURS, cells.split("|"), strict=True):
            found[name, column] = cell.strip()
    expected = {
        (other, own): f"{mark_of(other, own)} / {mark_of(own, other)}"
        for other in EVERY
        for own in OURS
    }
    assert found == expected
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"{rule.mark}: {rule.meaning}" in text for rule in RULES)


def watching(first, second):
    """What is said where the second cannot watch the same pass as the first."""
    refused = {"states": ("projections", "A_log", "gradient")}
    refused["channels"] = (*refused["states"], "quantized")
    return second in refused.get(first, ())


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize(("first", "second"), permutations(MAKERS, 2))
def test_the_second_does_not_reach_into_the_first(first, second, pipeline):
    model, modifiers = tiny_model("mamba"), [MAKERS[first](), MAKERS[second]()]
    if pipeline != "independent" and first in ("states", "channels"):
        modifiers[0].distill_steps = 0
    before = state(model)
    rule = broken_rule(*modifiers, model)
    if rule is not None or (pipeline != "independent" and watching(first, second)):
        message = "would" if rule is not None else "watches the same calibration pass.* independent"
        with pytest.raises(SparseSSMError, match=message):
            run(model, modifiers, READY, pipeline=pipeline)
        after = state(model)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        return
    run(model, modifiers, READY, pipeline=pipeline)
    if pipeline == "independent":
        assert report_of(modifiers[0]) == alone(first)
    after = state(model)
    pruned = pruned_entries(after)
    for name, modifier in zip((first, second), modifiers, strict=True):
        if name == "quantized":
            check_grid(modifier, after)
        elif name in ("states", "channels"):
            assert modifier.report()["layers"]
        else:  # of A_log, and of what a removal has left, in all
            entries = modifier.report()["total"]["pruned"]
            if second not in ("states", "channels"):
                assert sum(int(where.sum()) for where in pruned.values()) >= entries


@pytest.mark.parametrize("second", ["quantized", "A_log", "channels"])
def test_what_a_distillation_at_the_end_of_the_pass_would_undo(second):
    model, modifiers = tiny_model("mamba"), [MAKERS["states"](), MAKERS[second]()]
    before = state(model)
    with pytest.raises(SparseSSMError, match="changes all weights when it ends"):
        run(model, modifiers, READY, pipeline="sequential")
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_pruned_before_the_pass_and_would_be_undone_in_it():
    modifiers = [UPSTREAM["SparseGPTModifier"](), MAKERS["gradient"]()]
    model = tiny_model("mamba")
    before = state(model)
    with pytest.raises(SparseSSMError, match="prunes when the calibration pass begins"):
        run(model, modifiers, READY, pipeline="sequential")
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("scaling", ["SmoothQuantModifier", "LogarithmicEqualizationModifier"])
def test_what_is_scaled_in_the_same_pass_is_refused(scaling):
    model = tiny_model("mamba")
    before = state(model)
    modifiers = [UPSTREAM[scaling](), MAKERS["projections"]()]
    with pytest.raises(SparseSSMError, match="watches the same calibration pass and scales"):
        run(model, modifiers, READY, pipeline="sequential")
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_an_earlier_call_has_quantized_is_refused():
    model = tiny_model("mamba")
    run(model, MAKERS["quantized"](), READY)
    before = state(model)
    for name in ("projections", "gradient", "states"):
        with pytest.raises(SparseSSMError, match="quantize"):
            run(model, MAKERS[name](), READY)
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    run(model, MAKERS["A_log"](), READY)
    check_grid(MAKERS["quantized"](), state(model))


@pytest.mark.parametrize("second", ["projections", "gradient"])
def test_experts_that_are_removed_before_others_are_pruned(second):
    model, modifiers = tiny_model("jamba", **EXPERTS), [UPSTREAM["REAPPruningModifier"]()]
    modifiers.append(MAKERS[second]())
    if broken_rule(*modifiers, model) is not None:
        with pytest.raises(SparseSSMError, match=r"an expert .* put \w+ first"):
            run(model, modifiers, READY)
        # LLM Compressor's reset lets REAP write its new count into the config
        model = tiny_model("jamba", **EXPERTS)
        modifiers = [MAKERS[second](), UPSTREAM["REAPPruningModifier"]()]
    run(model, modifiers, READY)
    after = state(model)
    entries = [n for n in after if ".mamba." in n and n.endswith("in_proj.weight")]
    assert all(0 < float((after[n] == 0).float().mean()) < 1 for n in entries)
    experts = {n.split(".experts.")[1].split(".")[0] for n in after if ".experts." in n}
    assert experts == {"0", "1"}


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
