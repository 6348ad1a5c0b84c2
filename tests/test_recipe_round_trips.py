"""Every built-in recipe: what is saved loads in a fresh process, with its logits and its zeros."""

import pytest
import torch
from conftest import DEMO, Loader, batches, may_be_off, stock_process, tiny_model
from llmcompressor import active_session, oneshot
from transformers import AutoTokenizer

from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.recipes import load_recipe, parse_recipe, recipe_names, recipe_path

# One layer wide enough for groups of 128 weights, and for a quarter of the channels to go in 64s.
WIDE = {
    "mamba": {"hidden_size": 128, "num_hidden_layers": 1, "time_step_rank": 16},
    "mamba2": {
        "hidden_size": 128, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 32, "n_groups": 1,
    },
}  # fmt: skip
QUANTIZED = {"whole-50-w8a8": "W8A8", "whole-50-fp8": "FP8_DYNAMIC", "whole-2of4-w4a16": "W4A16"}
ONE_STAGE = """
prune_stage:
  prune_modifiers:
    SensitivitySparseGPTModifier: {{mask_structure: "2:4", solver: sparsegpt}}
    SparseGPTQModifier:
      targets: ["re:.*(in|out)_proj$"]
      scheme: {}
"""
BUILT_IN = [("mamba", name) for name in recipe_names()]
BUILT_IN += [("mamba2", name) for name in ("state-50", *QUANTIZED)]
SINGLE = [(family, f"one-stage-{s}") for family in WIDE for s in QUANTIZED.values()]
CASES = [f"{family}-{name}" for family, name in BUILT_IN + SINGLE]

READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
results = {}
for case in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{case}"
    expected = torch.load(f"{folder}/expected.pt")
    if expected["packed"]:
        import sparsessm_plugin
        model = sparsessm_plugin.load(folder)
    else:
        assert "sparsessm_plugin.checkpoints.loading" not in sys.modules
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = expected["input_ids"]
        logits = model.to(ids.device)(ids).logits  # unpacks the weights, too
    zeros = [(model.get_parameter(k) == 0, z) for k, z in expected["zeros"].items()]
    results[case] = {
        "off": float((logits - expected["logits"]).abs().max()),
        "zeros": all(
            f[z].all() if expected["more_zeros"] else torch.equal(f, z) for f, z in zeros
        ),
    }
print(json.dumps(results))
"""


def text_of(name):
    if name.startswith("one-stage-"):
        return ONE_STAGE.format(name.removeprefix("one-stage-"))
    with open(recipe_path(name), encoding="utf-8") as file:
        return file.read()


def projections(model):
    """The weights of the mixers that may hold zeros."""
    return {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if name.endswith(("proj.weight", "conv1d.weight"))
    }


def run(family, text, **kwargs):
    changes = {"num_hidden_layers": 4} if "LayerRemovalModifier" in text else {}
    model = tiny_model(family, **{**WIDE[family], **changes})
    oneshot(
        model=model,
        recipe=text,
        dataset=Loader(batches(2)),
        processor=AutoTokenizer.from_pretrained(DEMO),
        **kwargs,
    )
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of all cases; by case zeros, the quantizer's report, and how far logits may be off."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    ids = batches(1)[0]["input_ids"]
    for case, (family, name) in zip(CASES, BUILT_IN + SINGLE, strict=True):
        text = text_of(name)
        model = run(family, text)
        modifier = active_session().lifecycle.recipe.modifiers[-1]
        report = modifier.report() if hasattr(modifier, "report") else None
        with torch.no_grad():
            logits = model(ids).logits
        zeros = {k: (w == 0).to(logits.device) for k, w in projections(model).items()}
        model.save_pretrained(root / case)
        packed = case.endswith(("w4a16", "W4A16"))
        expected = {"logits": logits, "zeros": zeros, "packed": packed}
        expected["input_ids"] = ids.to(logits.device)
        # LLM Compressor's own modifier rounds in the forward, and the weight only when it is saved
        expected["more_zeros"] = name in ("state-50-w8a8", "fast-1.5x-w8a8")
        torch.save(expected, root / case / "expected.pt")
        found[case] = (zeros, report, may_be_off(logits, model=model))
    return root, found


@pytest.fixture(scope="module")
def loaded(saved):
    """What a fresh process says of each; those that need this package come last."""
    order = sorted(CASES, key=lambda case: case.endswith(("w4a16", "W4A16")))
    return stock_process(READER, saved[0], *order)


@pytest.mark.parametrize("case", CASES)
def test_saved_checkpoints_load_with_the_logits_and_zeros_in_memory(saved, loaded, case):
    *_, most = saved[1][case]
    assert loaded[case]["off"] <= most
    assert loaded[case]["zeros"]


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_who_loads_it(saved, case):
    packed = case.endswith(("w4a16", "W4A16"))
    answers = {support.runtime: support.answer for support in runtime_support(saved[0] / case)}
    assert answers["transformers"] == ("no" if packed else "yes")
    assert answers["transformers + sparsessm_plugin"] == "yes"
    quantized = (saved[0] / case / "config.json").read_text().count("quantization_config")
    if quantized and case.startswith("mamba-"):
        assert answers["vLLM"] == "no"
    else:  # 32 does not divide in_proj's outputs: padded on a GPU, refused on a CPU
        assert answers["vLLM"] == ("slow" if packed else "yes")
        assert case.startswith("mamba-") or answers["vLLM (CPU)"] == ("no" if packed else "yes")


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("name", [*QUANTIZED, *(f"one-stage-{s}" for s in QUANTIZED.values())])
def test_quantization_keeps_the_zeros_of_the_stage_before(saved, family, name):
    """int4 rounds small weights to zero besides; nothing that was zero comes back."""
    zeros, report, _ = saved[1][f"{family}-{name}"]
    for layer in report["layers"]:
        after = zeros[f"{layer['name']}.weight"]
        assert after.sum() == layer["zeros"] >= layer["pruned"] > 0
        if "4" not in name.rpartition("-")[2]:
            assert layer["zeros"] <= 1.01 * layer["pruned"]
    halves = ("in_proj.weight", "out_proj.weight")
    if "2of4" in name or "one-stage" in name:
        for key, zero in zeros.items():
            if key.endswith(halves):
                assert (zero.unflatten(-1, (-1, 4)).sum(-1) >= 2).all(), key
    else:
        total = sum(zero.numel() for zero in zeros.values())
        assert sum(int(zero.sum()) for zero in zeros.values()) >= round(0.5 * total)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_before_are_zeros_after(saved, family, name):
    """The pruning stage alone, on the same model and data, and the whole recipe."""
    pruning, _, _ = text_of(name).partition("quantization_stage:")
    assert len(parse_recipe(pruning).modifiers) == len(load_recipe(name).modifiers) - 1
    before = {k: w == 0 for k, w in projections(run(family, pruning)).items()}
    after, *_ = saved[1][f"{family}-{name}"]
    # what is pruned first sees the same in both runs
    first = "backbone.layers.0.mixer.in_proj.weight"
    for key in (first, "backbone.layers.0.mixer.out_proj.weight"):
        assert after[key][before[key]].all(), key
    if name != "whole-2of4-w4a16":
        assert (after[first] != before[first]).sum() <= 0.01 * before[first].sum()
