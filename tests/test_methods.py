"""Methods on a plain model, without LLM Compressor."""

import pytest
import torch
from conftest import (
    DEVICE,
    FAMILIES,
    MAMBA1,
    Loader,
    batches,
    relative,
    state,
    stock_process,
    tiny_model,
)
from llmcompressor import active_session, oneshot
from transformers import AutoModelForCausalLM

from sparsessm_plugin import SparseGPTQModifier
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.config_levels import language_field
from sparsessm_plugin.methods import (
    prune_by_gradient,
    prune_projections,
    prune_transitions,
    quantize_pruned,
    remove_channels,
    remove_states,
)
from sparsessm_plugin.methods.states import StateRemoval


def by_recipe(family, modifier, fields, data, pipeline="sequential"):
    """The model that LLM Compressor makes with one modifier."""
    model = tiny_model(family)
    active_session().reset()
    recipe = {"prune_stage": {"prune_modifiers": {modifier: fields}}}
    oneshot(
        model=model,
        recipe=str(recipe),  # a mapping in Python's words is YAML, too
        dataset=Loader(data),
        processor=object(),  # of no use, as the data are token ids
        pipeline=pipeline,
    )
    return model


def same_bits(one, other):
    """LLM Compressor takes packed experts apart, which have other names then."""
    one, other = (
        {name: value for name, value in state(model).items() if ".experts." not in name}
        for model in (one, other)
    )
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def alike(one, other):
    """The same bits on the CPU; the last of them may differ between two runs on a GPU."""
    if DEVICE == "cpu":
        return same_bits(one, other)
    one, other = state(one), state(other)
    shared = [name for name in one if ".experts." not in name]
    return all(torch.allclose(one[n], other[n], rtol=1e-3, atol=1e-4) for n in shared)


@pytest.mark.parametrize("family", MAMBA1)
@pytest.mark.parametrize("padded", [False, True])
def test_transitions_as_by_recipe(family, padded):
    fields = {"sparsity": 0.5}
    data = batches(count=3, length=30, padded=padded)
    model = tiny_model(family).to(DEVICE)  # where oneshot() computes
    result = prune_transitions(model, data, **fields)
    assert alike(model, by_recipe(family, "SparseSSMModifier", fields, data))
    assert [layer.sparsity for layer in result.layers] == [0.5] * len(result.layers)
    assert result.total.pruned == sum(layer.pruned for layer in result.layers)


_LINEARS = {"targets": ["Linear", "conv1d"], "ignore": "lm_head"}
PROJECTIONS = {
    **{f"{family} defaults": (family, {"sparsity": 0.5}) for family in FAMILIES},
    "mamba uniform": ("mamba", {"sparsity": 0.5, "allocation": "uniform", "solver": "sparsegpt"}),
    "mamba magnitude": ("mamba", {"sparsity": 0.5, "solver": "magnitude"}),
    "mamba 2:4": ("mamba", {"mask_structure": "2:4", "solver": "wanda"}),
    "mamba paper": ("mamba", {"sparsity": 0.7, "allocation": "paper", "target_output": "dense"}),
    "jamba linears": ("jamba", {"sparsity": 0.5, **_LINEARS}),
    "zamba2 linears": ("zamba2", {"sparsity": 0.6, "target_output": "half_way", **_LINEARS}),
}


@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections_as_by_recipe(case):
    family, fields = PROJECTIONS[case]
    data = batches(count=3, length=30, padded=True)
    model = tiny_model(family).to(DEVICE)  # where oneshot() computes
    result = prune_projections(model, data, **fields)
    assert alike(model, by_recipe(family, "SensitivitySparseGPTModifier", fields, data))
    own = {name: value for name, value in state(model).items() if "lm_head" not in name}
    for layer in result.layers:
        name = layer.name if layer.name in own else f"{layer.name}.weight"
        assert int((own[name] == 0).sum()) == layer.pruned
        assert all(torch.equal(own[name], own[f"{other}.weight"]) for other in layer.shared_with)
    assert result.total.pruned == round(fields.get("sparsity", 0.5) * result.total.entries)
    assert all(not module._forward_pre_hooks for module in model.modules())


REMOVALS = {
    **{f"{family} states": (family, "State", {"keep": 4}) for family in FAMILIES},
    "mamba states distilled": ("mamba", "State", {"keep": 4, "distill_steps": 2}),
    "mamba2 last states": ("mamba2", "State", {"keep": 4, "saliency": "last"}),
    "jamba channels": ("jamba", "Channel", {"sparsity": 0.5, "multiple_of": 8}),
    "mamba2 heads": ("mamba2", "Channel", {"keep": 4, "axis": "heads"}),
    "nemotron_h head_dim": ("nemotron_h", "Channel", {"keep": 4, "multiple_of": 4}),
}


@pytest.mark.parametrize("case", REMOVALS)
def test_removals_as_by_recipe(case, tmp_path):
    """The same bits, and stock transformers loads what it saves itself, as it was in memory."""
    family, kind, fields = REMOVALS[case]
    if kind == "State":
        fields = {**fields, "reconstruct_steps": 3}
    method = {"State": remove_states, "Channel": remove_channels}[kind]
    data = batches(count=3, length=30, padded=True)
    model = tiny_model(family).to(DEVICE)  # where oneshot() computes
    result = method(model, data, **fields)
    assert alike(model, by_recipe(family, f"{kind}RemovalModifier", fields, data))
    assert result.total.pruned == sum(len(layer.removed) for layer in result.layers)
    assert all(layer.before - layer.after == len(layer.removed) for layer in result.layers)
    assert (result.distillation is not None) == ("distill_steps" in fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(loaded, model)
    for name, size in result.config_fields.items():
        assert language_field(loaded.config, name) == size


def test_removals_without_data():
    fields = {"keep": 4, "saliency": "magnitude", "compensate": "none"}
    result = remove_states(tiny_model("mamba"), **fields)
    assert [layer.after for layer in result.layers] == [4, 4]
    assert all(layer.error_left is None for layer in result.layers)
    with pytest.raises(SparseSSMError, match="remove_channels needs calibration data"):
        remove_channels(tiny_model("mamba"), keep=32)


def test_a_removal_that_fails_says_once_what_is_left(monkeypatch):
    shrink = StateRemoval.shrink

    def fails_in_the_second(self, adapter, inputs):
        if ".1." in adapter.name:
            raise SparseSSMError("no more")
        return shrink(self, adapter, inputs)

    monkeypatch.setattr(StateRemoval, "shrink", fails_in_the_second)
    left = "the model in memory is now partly pruned and of no use; load it again"
    with pytest.raises(SparseSSMError) as error:
        remove_states(tiny_model("mamba"), batches(), keep=4)
    assert str(error.value) == f"no more - {left}. Nothing was saved"


@pytest.mark.parametrize("family", ["mamba", "zamba2"])
def test_gradients_as_by_recipe(family):
    fields = {"sparsity": 0.5, "rounds": 2, "distill_steps": 2, "distill_loss": "dense"}
    data = batches(count=3, length=20, padded=True)
    model = tiny_model(family).to(DEVICE)  # where oneshot() computes
    result = prune_by_gradient(model, data, **fields)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    assert [int((by_name[w.name] == 0).sum()) for w in result.layers] == [
        w.pruned for w in result.layers
    ]
    assert result.total.pruned == round(0.5 * result.total.entries)
    assert [entry.pruned for entry in result.rounds][-1] == result.total.pruned
    modifier = "GradientMagnitudeModifier"
    assert alike(model, by_recipe(family, modifier, fields, data, "independent"))
    (report,) = [m.report() for m in active_session().lifecycle.recipe.modifiers]
    found = {"modifier": modifier, "settings": report["settings"], **result.to_dict()}
    found["total"]["seconds"] = report["total"]["seconds"]
    assert found == report


def test_nothing_of_llm_compressor_is_needed():
    found = stock_process(
        """
import json, sys
import sparsessm_plugin.methods
found = [name for name in sys.modules if name.partition(".")[0] == "llmcompressor"]
found += [name for name in sys.modules if name.startswith("sparsessm_plugin.modifiers")]
print(json.dumps(found))
"""
    )
    assert found == []


@pytest.mark.parametrize("prune", [prune_transitions, prune_projections])
def test_half_precision_that_overflows(prune):
    """The message says where it begins, and what is changed already."""
    model = tiny_model("mamba", num_hidden_layers=3).half()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight.mul_(1e5)
    uniform = {"allocation": "uniform"} if prune is prune_projections else {}
    with pytest.raises(SparseSSMError) as error:
        prune(model, batches(), sparsity=0.5, **uniform)
    assert "in the output of backbone.layers.1.mixer.in_proj in float16" in str(error.value)
    assert ("changed already" in str(error.value)) or ("pruned already" in str(error.value))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_method_that_fails_leaves_the_model_alone():
    model = tiny_model("mamba")
    before = state(model)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    zeros = torch.zeros(2, 5, dtype=torch.long)
    empty = {"input_ids": zeros, "attention_mask": zeros}
    with pytest.raises(SparseSSMError, match="all 4 samples are empty"):
        prune_transitions(model, [empty, empty], sparsity=0.5)
    bad = {"input_ids": torch.full((2, 5), 10**6)}
    with pytest.raises(SparseSSMError, match="1000000"):
        prune_transitions(model, [bad], sparsity=0.5)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    assert "forward" not in vars(model.backbone.layers[0].mixer)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
SCHEMES = {
    "W8A8": ("W8A8", {"scheme": "W8A8", "targets": ["Linear"]}),
    "FP8": ("FP8_DYNAMIC", {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]}),
    "int4": (INT4, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}}),
}


def pruned(family):
    model = tiny_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("in_proj.weight", "out_proj.weight")):
                weight[weight.abs() < weight.abs().median()] = 0.0
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_quantization_as_by_recipe(family, scheme):
    """The same bits as by the modifier, which takes grids and sums from LLM Compressor."""
    ours, theirs = SCHEMES[scheme]
    ignore = ["lm_head", "re:.*dt_proj$"]
    data = batches(count=3, length=20, padded=True)
    model = pruned(family).to(DEVICE)
    masks = {n: w == 0 for n, w in state(model).items()}
    result = quantize_pruned(model, data, ours, ignore=ignore)
    expected = pruned(family)
    active_session().reset()
    oneshot(
        model=expected,
        recipe=SparseGPTQModifier(ignore=ignore, **theirs),
        dataset=Loader(data),
        processor=object(),
        pipeline="sequential",
    )
    found, wanted = state(model), state(expected)
    # what a GPU sums in another order may round to the next value, which moves the rest of its row
    most = 0.0 if DEVICE == "cpu" else 0.05
    unequal = {name: float((found[name] != wanted[name]).float().mean()) for name in found}
    assert not {name: share for name, share in unequal.items() if share > most}
    assert {n for n in wanted if n.endswith(".weight_scale")} == {
        f"{name}.weight_scale" for name in result.scales
    }
    for name, scale in result.scales.items():
        torch.testing.assert_close(scale.cpu(), wanted[f"{name}.weight_scale"], rtol=0, atol=0)
        mask = masks[f"{name}.weight"]
        assert not found[f"{name}.weight"][mask].any()
    layers = {layer.name: layer for layer in result.layers}
    for layer in active_session().lifecycle.recipe.modifiers[0].report()["layers"]:
        assert layer["pruned"] == layers[layer["name"]].pruned > 0  # of those without zeros none
        off = 1e-6 if DEVICE == "cpu" else 0.01
        assert layer["error"] == pytest.approx(layers[layer["name"]].error, rel=off)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {"ignore": ["lm_head"]}, 'dt_proj would be quantized.*add "re:.*dt_proj'),
        ("mamba", {"ignore": ["re:.*dt_proj$"]}, "lm_head (shares|stands).*'lm_head' to ignore"),
        ("jamba", {"targets": ["lm_head"]}, "lm_head stands outside the layers"),
        ("zamba", {"targets": ["re:.*q_proj$"], "double": True}, "q_proj shares its weight; add"),
        ("mamba", {"targets": ["nothing"]}, "targets: 'nothing' matches no module"),
        ("mamba", {"ignore": ["Linear"]}, "leaves nothing of targets"),
    ],
)
def test_quantization_that_is_refused(family, fields, message):
    fields = dict(fields)
    twice = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"]}
    model = tiny_model(family, **(twice if fields.pop("double", False) else {}))
    before = state(model)
    with pytest.raises(SparseSSMError, match=message) as error:
        quantize_pruned(model, batches(count=1), "W8A8", **fields)
    assert "quantize_pruned" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_schemes_that_are_refused():
    model = tiny_model("mamba")
    for scheme, message in (("W3A3", "must be one of"), ("NVFP4", "a scale a tensor, channel")):
        with pytest.raises(SparseSSMError, match=message):
            quantize_pruned(model, batches(count=1), scheme)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "^remove_states.keep: must be at least 1, got 0$"),
        ({"kepp": 4}, "^unknown field remove_states.kepp; did you mean keep"),
        ({"keep": 4, "sparsity": 0.5}, "give either keep or sparsity, got both"),
        ({"keep": 4, "compensate": ["none"]}, "^remove_states.compensate.0: .*got 'none'$"),
    ],
)
def test_wrong_fields_are_one_line(fields, message):
    model = tiny_model("mamba")
    with pytest.raises(SparseSSMError, match=message) as caught:
        remove_states(model, batches(count=1), **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(1, 4, dtype=torch.long)], "batch 1 is a Tensor; a batch is a mapping"),
        ({"input_ids": torch.ones(1, 4)}, "takes a list of batches.*got a single dict"),
        ([{"input_ids": [[1, 2, 3]]}], "batch 1 holds input_ids; a batch is .* a tensor of shape"),
        ([*batches(count=1), {"foo": torch.zeros(1, 4)}], "batch 2 holds foo; a batch is"),
    ],
)
def test_wrong_batches_are_one_line(data, message):
    model = tiny_model("mamba")
    before = state(model)
    for method, fields in ((remove_states, {"keep": 4}), (prune_projections, {"sparsity": 0.5})):
        with pytest.raises(SparseSSMError, match=message):
            method(model, data, **fields)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_a_name_is_no_model():
    with pytest.raises(SparseSSMError, match="takes a loaded model, got 'mamba-demo"):
        remove_states("mamba-demo-0.7m", batches(count=1), keep=4)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_the_type_of_new_tensors_is_no_matter(family, default):
    """A model is in float32 whatever torch.set_default_dtype says meanwhile."""
    data, found = batches(count=3, length=20), []
    for other in (torch.float32, default):
        for change in (
            lambda model: remove_states(model, data, keep=4, reconstruct_steps=2),
            lambda model: prune_projections(model, data, sparsity=0.5, solver="sparsegpt"),
        ):
            model = tiny_model(family).to(DEVICE)
            torch.set_default_dtype(other)
            try:
                change(model)
            finally:
                torch.set_default_dtype(torch.float32)
            found.append(state(model))
    for name, weight in {**found[0], **found[1]}.items():
        assert weight.dtype == torch.float32, name
    for expected, given in zip(found[:2], found[2:], strict=True):
        for name, weight in expected.items():
            assert relative(given[name], weight) < 1e-3, name
