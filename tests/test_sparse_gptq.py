"""SparseGPTQModifier through oneshot(): zeros survive, bad targets are refused early."""

from importlib import import_module

import pytest
import torch
from conftest import (
    DEMO,
    Loader,
    batches,
    check_reload,
    logits_beside,
    same_logits,
    state,
    tiny_model,
    with_images,
)
from llmcompressor import active_session, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

import sparsessm_plugin
from sparsessm_plugin import LayerRemovalModifier, SparseGPTQModifier
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.modifiers.conflicts import check_modifiers
from sparsessm_plugin.recipes import parse_recipe

IGNORE = ["lm_head", "re:.*dt_proj$"]
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
SCHEMES = {
    "W4A16": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}},
    "W8A8": {"targets": ["Linear"], "scheme": "W8A8"},
    "FP8": {"targets": ["Linear"], "scheme": "FP8"},
    "FP8_DYNAMIC": {"targets": ["Linear"], "scheme": "FP8_DYNAMIC"},
}
PRUNED = ("in_proj.weight", "out_proj.weight")

PRUNE = """\
prune_stage:
  prune_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: ["re:.*in_proj$", "re:.*out_proj$"]
"""
QUANTIZE = """\
    SparseGPTQModifier:
      ignore: [lm_head, "re:.*dt_proj$"]
"""
YAML = {
    "W4A16": """\
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}
""",
    "W8A8": "      targets: [Linear]\n      scheme: W8A8\n",
    "FP8_DYNAMIC": "      targets: [Linear]\n      scheme: FP8_DYNAMIC\n",
}


def run(model, recipe, data=None, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    loader = Loader(batches() if data is None else data)
    return oneshot(model=model, recipe=recipe, dataset=loader, processor=tokenizer, **kwargs)


def prune_by_hand(model):
    """2:4 by magnitude in in_proj and out_proj; returns the masks of what is zero."""
    masks = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(PRUNED):
                fours = weight.view(weight.shape[0], -1, 4)
                fours.scatter_(-1, fours.abs().topk(2, largest=False).indices, 0.0)
                masks[name] = weight == 0
    return masks


def weights(model):
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith("proj.weight")}


def is_2_of_4(weight):
    return bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())


def on_the_grid(module):
    """Whether quantizing the stored weight once more changes nothing."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    weight = module.weight.detach()
    again = forward_quantize(module, weight, "weight", module.quantization_scheme.weights)
    return torch.equal(again, weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_zeros_survive(family, scheme):
    model = tiny_model(family)
    masks = prune_by_hand(model)
    run(model, SparseGPTQModifier(ignore=IGNORE, **SCHEMES[scheme]))
    after = weights(model)
    for name, mask in masks.items():
        assert not after[name][mask].any(), name
        assert is_2_of_4(after[name]), name
        assert after[name].any()
        assert on_the_grid(model.get_submodule(name.removesuffix(".weight"))), name
        if scheme != "W4A16":  # on four bits small weights become zero besides
            assert (after[name] == 0).sum() < mask.sum() * 1.02
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_weights_without_zeros_are_quantized_by_upstream(scheme):
    model, expected = tiny_model("mamba"), tiny_model("mamba")
    run(model, SparseGPTQModifier(ignore=IGNORE, **SCHEMES[scheme]))
    run(expected, GPTQModifier(ignore=IGNORE, **SCHEMES[scheme]))
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_the_solver_gives_what_upstream_gives(scheme, monkeypatch):
    """The same with every weight sent through the masked solver."""
    monkeypatch.setattr("sparsessm_plugin.modifiers.sparse_gptq._has_zeros", lambda module: True)
    model, expected = tiny_model("mamba2"), tiny_model("mamba2")
    run(model, SparseGPTQModifier(ignore=IGNORE, **SCHEMES[scheme]))
    run(expected, GPTQModifier(ignore=IGNORE, **SCHEMES[scheme]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_upstream_would_lose_the_zeros():
    """When this fails, upstream keeps them and this modifier is not needed any more."""
    model = tiny_model("mamba")
    masks = prune_by_hand(model)
    run(model, GPTQModifier(ignore=IGNORE, **SCHEMES["W4A16"]))
    assert any(weights(model)[name][mask].any() for name, mask in masks.items())


def test_it_costs_less_than_rounding():
    """Output error of a pruned layer on the calibration inputs, against round-to-nearest."""
    ready = torch.cat([b["input_ids"] for b in batches()])
    results = {}
    for kind in (SparseGPTQModifier, QuantizationModifier):
        model = tiny_model("mamba")
        prune_by_hand(model)
        # the first layer sees the same inputs whatever is done to it
        layer = model.backbone.layers[0]
        dense = layer.mixer.in_proj.weight.detach().clone()
        with torch.no_grad():
            inputs = layer.norm(model.backbone.embeddings(ready))
            run(model, kind(ignore=IGNORE, **SCHEMES["W4A16"]))
            quantized = weights(model)["backbone.layers.0.mixer.in_proj.weight"]
            if kind is QuantizationModifier:  # keeps its weights and rounds them when called
                from compressed_tensors.quantization.lifecycle.forward import forward_quantize

                module = model.backbone.layers[0].mixer.in_proj
                args = module.quantization_scheme.weights
                quantized = forward_quantize(module, quantized, "weight", args)
            results[kind] = float((inputs @ (quantized.cpu() - dense).T).square().sum())
            assert is_2_of_4(quantized)
    assert results[SparseGPTQModifier] < 0.9 * results[QuantizationModifier]


@pytest.mark.parametrize("scheme", YAML)
@pytest.mark.parametrize(
    ("stages", "pipeline"),
    [("one", "independent"), ("one", "sequential"), ("two", "independent")],
)
def test_prune_and_quantize_in_one_recipe(stages, pipeline, scheme):
    between = "" if stages == "one" else "quantization_stage:\n  quantization_modifiers:\n"
    recipe = PRUNE + between + QUANTIZE + YAML[scheme]
    assert len(parse_recipe(recipe).modifiers) == 2
    model = tiny_model("mamba2" if scheme == "W8A8" else "mamba")
    run(model, recipe, pipeline=pipeline)
    for name, weight in weights(model).items():
        if name.endswith(PRUNED):
            assert is_2_of_4(weight), name
            module = model.get_submodule(name.removesuffix(".weight"))
            assert on_the_grid(module), name
    modifier = active_session().lifecycle.recipe.modifiers[-1]
    assert modifier.report()["total"]["sparsity"] >= 0.5


def test_bfloat16_and_other_options():
    model = tiny_model("mamba").bfloat16()
    masks = prune_by_hand(model)
    modifier = SparseGPTQModifier(
        ignore=IGNORE, actorder=None, block_size=24, dampening_frac=0.1, **SCHEMES["W4A16"]
    )
    run(model, modifier)
    for name, mask in masks.items():
        assert weights(model)[name].dtype == torch.bfloat16
        assert not weights(model)[name][mask].any()
        assert on_the_grid(model.get_submodule(name.removesuffix(".weight")))


def test_asymmetric_grids_hold_zero_too():
    model = tiny_model("mamba")
    masks = prune_by_hand(model)
    scheme = {"targets": ["Linear"], "weights": {**INT4, "symmetric": False}}
    run(model, SparseGPTQModifier(ignore=IGNORE, config_groups={"group_0": scheme}))
    for name, mask in masks.items():
        assert not weights(model)[name][mask].any()
        assert on_the_grid(model.get_submodule(name.removesuffix(".weight")))


def test_the_report_names_what_was_done():
    model = tiny_model("mamba")
    masks = prune_by_hand(model)
    modifier = SparseGPTQModifier(ignore=IGNORE, **SCHEMES["W8A8"])
    run(model, modifier)
    report = modifier.report()
    layers = {f"{layer['name']}.weight": layer for layer in report["layers"]}
    assert layers.keys() == masks.keys()  # x_proj has no zeros
    for name, layer in layers.items():
        assert layer["shape"] == list(masks[name].shape)
        assert layer["pruned"] == int(masks[name].sum()) <= layer["zeros"]
        assert layer["error"] > 0
    assert report["total"]["pruned"] == sum(int(mask.sum()) for mask in masks.values())
    assert report["total"]["entries"] == sum(mask.numel() for mask in masks.values())
    import json

    assert json.loads(json.dumps(report))["settings"]["scheme"] == "W8A8"


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        (
            "mamba",
            {"scheme": "W8A8", "ignore": ["lm_head"]},
            ["layers.0.mixer.dt_proj", '"re:.*dt_proj$"', "ignore"],
        ),
        (
            "jamba",
            {"scheme": "W8A8", "ignore": ["lm_head"]},
            ["mamba.dt_proj", '"re:.*dt_proj$"'],
        ),
        (
            "mamba2",
            {"scheme": "W8A8", "targets": ["Linear", "Conv1d"], "ignore": ["lm_head"]},
            ["layers.0.mixer.conv1d", '"re:.*conv1d$"'],
        ),
        (
            "mamba",
            {"scheme": "W8A8", "targets": ["re:.*mixer$"]},
            ["layers.0.mixer would", "MambaMixer has no weight matrix", '"re:.*mixer$"'],
        ),
        (
            "mamba",
            {"scheme": "W8A8", "targets": ["re:.*norm$"]},
            ["layers.0.norm would", "MambaRMSNorm has no weight matrix", '"re:.*norm$"'],
        ),
        (
            "mamba",
            {"scheme": "W4A16", "ignore": IGNORE},
            ["in_proj has 32 inputs", "groups of 128", '"re:.*mixer.in_proj$"', "group_size"],
        ),
    ],
)
def test_bad_targets_are_refused_before_calibration(family, fields, words):
    model = tiny_model(family)
    modifier = SparseGPTQModifier(**fields)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for check in (lambda: modifier.check_model(skeleton), lambda: run(model, modifier)):
        with pytest.raises(SparseSSMError) as error:
            check()
        for word in ("SparseGPTQModifier: ", *words):
            assert word in str(error.value)
        assert "\n" not in str(error.value)
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


def test_a_layer_with_infinite_inputs_is_named_and_nothing_stays_hooked():
    model = tiny_model("mamba")
    prune_by_hand(model)
    with torch.no_grad():
        model.backbone.layers[0].norm.weight[3] = float("inf")
    modifier = SparseGPTQModifier(ignore=IGNORE, **SCHEMES["W8A8"])
    message = r"layers\.0\.mixer\.in_proj: its input holds NaN.*; nothing was quantized$"
    with pytest.raises(SparseSSMError, match=message):
        run(model, modifier)
    for module in model.modules():
        assert not isinstance(module, nn.Linear) or not module._forward_hooks


# -- weights that several layers share -------------------------------------------------------

TWICE = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"]}


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_shared_weights_are_quantized_once_by_all_uses(family, pipeline, monkeypatch, tmp_path):
    """The Hessian that the solver gets is the mean over all uses, and what is saved loads."""
    name = "sparsessm_plugin.methods.quantization"
    seen, solve = [], import_module(name).masked_gptq

    def recorded(weight, hessian, *args, **kwargs):
        seen.append(hessian.clone())
        return solve(weight, hessian, *args, **kwargs)

    monkeypatch.setattr(f"{name}.masked_gptq", recorded)
    monkeypatch.setattr("sparsessm_plugin.modifiers.sparse_gptq._has_zeros", lambda module: True)
    model, ready = tiny_model(family, **TWICE), batches()
    names = [n for n, _ in model.named_modules() if n.endswith("q_proj")]
    inputs = []
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        for n in names
    ]
    with torch.no_grad():
        for batch in ready:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = sum(2 * x.flatten(0, 1).T @ x.flatten(0, 1) for x in inputs)
    modifier = SparseGPTQModifier(targets="re:.*q_proj$", scheme="W8A8")
    run(model, modifier, pipeline=pipeline)
    (hessian,) = seen
    torch.testing.assert_close(
        hessian / hessian.norm(), (expected / expected.norm()).to(hessian), rtol=1e-3, atol=1e-4
    )
    first, second = (model.get_submodule(n) for n in names)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight_scale, second.weight_scale)
    assert on_the_grid(first)
    if pipeline == "sequential":
        model.save_pretrained(tmp_path / "saved")
        check_reload(model, tmp_path / "saved")


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1"])
def test_what_stands_at_padding_changes_nothing(family):
    """Mixers leave it out by themselves, and attention and MLP do not."""
    found = []
    for filling in (0, 7):
        data = batches(count=3, length=20, padded=True)
        for batch in data:
            batch["input_ids"][~batch["attention_mask"].bool()] = filling
        model = tiny_model(family)
        run(
            model,
            SparseGPTQModifier(ignore=[*IGNORE, "re:.*[.]experts[.]"], **SCHEMES["W8A8"]),
            data,
        )
        found.append({n: w for n, w in state(model).items() if n.endswith("proj.weight")})
    first, other = found
    assert any("self_attn" in name for name in first)
    for name, weight in first.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


def test_a_use_that_a_removal_has_taken_is_not_waited_for(tmp_path):
    """The recipe is prepared for both uses of the shared weights, of which one stays."""
    kinds = ["linear_attention", "hybrid", "hybrid", "linear_attention"]
    model = tiny_model("zamba2", num_hidden_layers=4, layers_block_type=kinds)
    first = LayerRemovalModifier(keep=2, saliency="last", compensate="none")
    run(model, [first, SparseGPTQModifier(ignore=IGNORE, **SCHEMES["W8A8"])])
    assert on_the_grid(model.get_submodule("model.layers.1.shared_transformer.self_attn.q_proj"))
    model.save_pretrained(tmp_path / "saved")
    check_reload(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config_groups": {"g": {"targets": ["re:.*q_proj$"], "weights": INT4}}}, "int-quantized"),
        (
            {"targets": "re:.*q_proj$", "scheme": "W8A8", "ignore": [r"re:.*layers\.2\."]},
            "which would not be quantized",
        ),
    ],
)
def test_shared_weights_that_would_not_load(fields, message):
    model = tiny_model("zamba", **TWICE)
    with pytest.raises(SparseSSMError, match=f"q_proj shares its weight.*{message}") as error:
        run(model, SparseGPTQModifier(**fields))
    assert "\n" not in str(error.value)


def test_packed_zamba_is_loaded_by_load(tmp_path):
    model = tiny_model("zamba")
    fields = {"config_groups": {"g": {"targets": ["Linear"], "weights": INT4}}}
    ignore = ["lm_head", "re:.*shared_transf.*"]
    run(model, SparseGPTQModifier(ignore=ignore, **fields), output_dir=str(tmp_path / "saved"))
    ids = torch.randint(1, 96, (2, 9))
    loaded = sparsessm_plugin.load(tmp_path / "saved")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert same_logits(logits_beside(loaded, expected, ids), expected, model)


@pytest.mark.parametrize("kind", [SparseGPTQModifier, GPTQModifier])
def test_an_encoder_that_no_text_reaches_is_not_quantized(kind):
    """Its scales would be whatever the memory held."""
    model = with_images()
    before = state(model)
    modifier = kind(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    refused = r'beside the language model.*"re:\.\*visual\[\.\]"'
    ours = kind is SparseGPTQModifier
    with pytest.raises(SparseSSMError, match=refused):
        run(model, modifier) if ours else check_modifiers([modifier], model)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    # rounding to the nearest asks for no data
    to_nearest = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    check_modifiers([to_nearest], model)


def test_a_language_model_beside_an_encoder_is_quantized(tmp_path):
    model = with_images()
    encoder = {n: v for n, v in state(model).items() if "visual" in n}
    ignore = ["lm_head", "re:.*visual[.]"]
    run(model, SparseGPTQModifier(targets=["Linear"], ignore=ignore, scheme="W8A8"))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.randint(1, 80, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits
        assert same_logits(logits_beside(again, expected, ids), expected, model)
    found = state(again)
    assert all(torch.equal(found[name], value) for name, value in encoder.items())


def test_a_weight_that_no_data_has_reached_is_named():
    """An expert that nothing was routed to, for example."""
    model = tiny_model("qwen3_5")
    mlp = model.model.layers[0].mlp

    class NotTaken(type(mlp)):
        def forward(self, x):
            return x

    mlp.__class__ = NotTaken
    modifier = SparseGPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    with pytest.raises(SparseSSMError, match=r"no calibration data has reached model\.layers\.0"):
        run(model, modifier)
