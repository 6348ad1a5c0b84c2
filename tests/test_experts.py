"""Experts of hybrids: saved as stock transformers loads them, or refused before the work."""

import json
import re

import pytest
import torch
from conftest import (
    DEMO,
    EXPERTS,
    VOCAB,
    Loader,
    batches,
    may_be_off,
    stock_process,
    tiny_model,
)
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import get_linearized_moes, linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoTokenizer

from sparsessm_plugin import SparseGPTQModifier, SparseSSMModifier, StateRemovalModifier
from sparsessm_plugin.checkpoints.experts import check_experts
from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.modifiers.conflicts import check_modifiers

IGNORE = ["lm_head", "re:.*dt_proj$", "re:.*router"]
NO_EXPERTS = [*IGNORE, "re:.*[.]experts[.]"]
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
INT8 = {**INT4, "num_bits": 8}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W8A8 = {"targets": ["Linear"], "scheme": "W8A8"}
FP8 = {"targets": ["Linear"], "scheme": "FP8_DYNAMIC"}

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        ids, expected = torch.load(folder + ".pt")
        logits = model.eval().to(ids.device)(ids).logits
    found[folder] = float((logits - expected).abs().max())
assert not any(name.startswith("sparsessm_plugin.") for name in sys.modules)
print(json.dumps(found))
"""


def scheme(*weights, targets=(("Linear",),), **more):
    return {
        "config_groups": {
            f"group_{i}": {"targets": list(t), "weights": w, **more}
            for i, (w, t) in enumerate(zip(weights, targets, strict=True))
        }
    }


def run(model, recipe, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    loader = Loader(batches(count=1, length=16))
    return oneshot(model=model, recipe=recipe, dataset=loader, processor=tokenizer, **kwargs)


def moe(family):
    return tiny_model(family, **EXPERTS[family])


def loaded_apart(family):
    """A model whose experts LLM Compressor has loaded one by one, and knows no whole of."""
    model = linearize_moe(moe(family))
    for _, experts in get_linearized_moes(model):
        del experts._source_experts_cls, experts._source_config
    return model


# Weights that stand on the grid already: where they are merely rounded, the largest of a group lies
# halfway between two values, and whether a CPU or a GPU divides decides which one it becomes.
LOADABLE = {
    "granite-int4": ("granitemoehybrid", [SparseGPTQModifier(ignore=NO_EXPERTS, **scheme(INT4))]),
    "jamba-w8a8": ("jamba", [SparseGPTQModifier(ignore=NO_EXPERTS, **W8A8)]),
    "nemotron-w8a8": ("nemotron_h", [SparseGPTQModifier(ignore=NO_EXPERTS, **W8A8)]),
    # linear layers that stay dense, in a family whose checkpoints have other names of modules
    "nemotron-w8a8-no-shared-experts": (
        "nemotron_h",
        [SparseGPTQModifier(ignore=[*IGNORE, "re:.*experts[.].*"], **W8A8)],
    ),
    "nemotron-fp8": ("nemotron_h", [SparseGPTQModifier(ignore=NO_EXPERTS, **FP8)]),
    "jamba-int4-experts": ("jamba", [SparseGPTQModifier(ignore=IGNORE, **scheme(INT4))]),
    # the experts in a group of their own, which is not the first
    "nemotron-two-groups": (
        "nemotron_h",
        [
            SparseGPTQModifier(
                ignore=IGNORE,
                **scheme(INT8, INT4, targets=(["re:.*in_proj$"], ["re:.*experts.*_proj$"])),
            )
        ],
    ),
    "jamba-A_log": (
        "jamba",
        [SparseSSMModifier(sparsity=0.5), SparseGPTQModifier(ignore=NO_EXPERTS, **W8A8)],
    ),
    "nemotron-states": (
        "nemotron_h",
        [
            StateRemovalModifier(keep=4, saliency="last", compensate="none"),
            SparseGPTQModifier(ignore=NO_EXPERTS, **scheme(INT4)),
        ],
    ),
}


def test_what_is_saved_loads_in_stock_transformers(tmp_path):
    ids = torch.randint(1, VOCAB, (2, 15))
    folders, most = [], {}

    def save(name, model, recipe):
        run(model, recipe)
        folders.append(str(tmp_path / name))
        with torch.no_grad():
            logits = model(ids).logits
        # experts in one tensor are multiplied in another order than one by one, on several threads
        most[folders[-1]] = may_be_off(logits, 1e-6, model)
        torch.save((ids.to(logits.device), logits), folders[-1] + ".pt")
        model.save_pretrained(folders[-1])

    for name, (family, recipe) in LOADABLE.items():
        save(name, moe(family), recipe)
    recipe = [SparseGPTQModifier(ignore=NO_EXPERTS, **W8A8)]
    save("loaded-apart", loaded_apart("nemotron_h"), recipe)
    found = stock_process(RELOAD, *folders)
    assert not {folder: away for folder, away in found.items() if away > most[folder]}
    for folder in folders:
        answers = {s.runtime: s for s in runtime_support(folder)}
        assert answers["transformers"].answer == "yes", answers["transformers"].reasons
        whole = "w8a8" in folder or "A_log" in folder or "states" in folder or "apart" in folder
        # of two groups transformers alone makes one norm in granitemoehybrid
        loads = ("unknown",) if whole or "granite" in folder else ("yes", "slow")
        assert answers["vLLM"].answer in loads or "jamba" in folder


REFUSED = [
    ("granitemoehybrid", {"ignore": IGNORE, **scheme(INT4)}, "does not load quantized experts of"),
    ("granitemoehybrid", {"ignore": IGNORE, **W8A8}, "does not load quantized experts of"),
    ("jamba", {"ignore": IGNORE, **W8A8}, "without the quantization of their inputs"),
    ("nemotron_h", {"ignore": IGNORE, **W8A8}, "without the quantization of their inputs"),
    ("nemotron_h", {"ignore": IGNORE, **FP8}, "without the quantization of their inputs"),
    (
        "jamba",
        {"ignore": IGNORE, **scheme({**INT8, "type": "float", "strategy": "channel",
                                     "group_size": None})},
        "with other values",
    ),
    ("jamba", {"ignore": IGNORE, **scheme({**INT4, "symmetric": False})}, "zero points"),
    ("jamba", {"ignore": IGNORE, **scheme(INT4, format="int-quantized")}, "in the format int-qu"),
    (
        "nemotron_h",
        {"ignore": [*IGNORE, "re:.*[.]experts[.]0[.]"], **scheme(INT4)},
        "all quantized or none",
    ),
    (
        "nemotron_h",
        {
            "ignore": IGNORE,
            **scheme(INT4, INT8, targets=(["re:.*[.]up_proj$", "re:.*[.]down_proj$"], ["Linear"])),
        },
        "in another group",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "words"), REFUSED)
def test_what_would_not_load_is_refused_before_the_work(family, fields, words):
    model = moe(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    modifiers = [SparseGPTQModifier(**fields), QuantizationModifier(**fields)]
    for modifier in modifiers:
        with pytest.raises(SparseSSMError) as error:
            check_modifiers([modifier], skeleton)
        message = str(error.value)
        assert message.startswith(f"{type(modifier).__name__} would quantize model.layers.")
        assert ".experts." in message
        assert words in message
        assert "\n" not in message
        (pattern,) = re.findall(r'add "(re:.*?)" to ignore', message)
        # the advice is right, for the recipe and the pattern
        advised = type(modifier)(**{**fields, "ignore": [*IGNORE, pattern]})
        check_experts([advised], skeleton)


@pytest.mark.parametrize("upstream", [False, True])
def test_oneshot_refuses_before_anything_is_changed(upstream):
    model = moe("jamba")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "A_log" in name}
    recipe = [SparseSSMModifier(sparsity=0.5)]
    recipe += [(QuantizationModifier if upstream else SparseGPTQModifier)(ignore=IGNORE, **W8A8)]
    with pytest.raises(SparseSSMError, match="would quantize"):
        run(model, recipe)
    for name, parameter in model.named_parameters():
        assert "A_log" not in name or torch.equal(parameter, before[name])


def test_saving_refuses_what_came_without_a_modifier_of_ours(tmp_path):
    model = moe("nemotron_h")
    run(model, StateRemovalModifier(keep=4, saliency="last", compensate="none"))
    run(model, QuantizationModifier(ignore=IGNORE, **W8A8))
    with pytest.raises(SparseSSMError, match=r"a modifier has quantized .*experts"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_experts_are_saved_packed_only(tmp_path):
    model = moe("jamba")
    run(model, SparseGPTQModifier(ignore=IGNORE, **scheme(INT4)))
    for options in ({"save_compressed": False}, {"quantization_format": "int-quantized"}):
        with pytest.raises(SparseSSMError, match="packed integers only"):
            model.save_pretrained(tmp_path / "out", **options)
    with pytest.raises(SparseSSMError, match="packed integers only"):
        model.save_pretrained(tmp_path / "out", "int-quantized")
    assert not (tmp_path / "out").exists()


def checkpoint(folder, family, groups, rename):
    """A checkpoint with experts one by one, as upstream's modifiers write it, by names alone."""
    from safetensors.torch import save_file

    model = moe(family)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    path.write_text(json.dumps(config))
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    layers = {name.rpartition(".experts.")[0] for name in state if ".experts." in name}
    for layer in layers:
        for expert in range(2):
            for name in rename:
                state[f"{layer}.experts.{expert}.up_proj.{name}"] = torch.zeros(2)
    save_file({n: t for n, t in state.items() if not n.endswith("experts.up_proj")},
              folder / "model.safetensors")  # fmt: skip
    return {s.runtime: s for s in runtime_support(folder)}


GROUP = {"targets": ["Linear"], "weights": INT4}
FLOAT = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("family", "groups", "rename", "answer", "words"),
    [
        ("granitemoehybrid", [GROUP], ["weight_packed"], "no", "reads all experts as one tensor"),
        ("jamba", [{**GROUP, "weights": INT8}], ["weight", "weight_scale"], "no", "is not packed"),
        ("nemotron_h", [GROUP], ["weight"], "no", "which saves them as one tensor"),
        ("nemotron_h", [GROUP], ["weight_packed", "weight_scale"], "yes", "compressed-tensors"),
        ("nemotron_h", [GROUP], ["weight_packed", "weight_zero_point"], "no", "weight_zero_point"),
        (
            "jamba",
            [{**GROUP, "input_activations": INPUTS}],
            ["weight_packed", "weight_scale"],
            "no",
            "does not quantize what enters",
        ),
        ("jamba", [FLOAT], ["weight"], "yes", "compressed-tensors"),
        ("jamba", [FLOAT], ["weight", "weight_scale"], "no", "is FP8"),
        # the group that names experts, then the one that names a class
        ("jamba", [FLOAT, {**GROUP, "targets": ["re:.*experts.*"]}], ["weight"], "no", "packed"),
        ("jamba", [{**GROUP, "targets": ["re:.*in_proj"]}, FLOAT], ["weight"], "yes", "compressed"),
    ],
)
def test_inspect_sees_experts_that_do_not_load(tmp_path, family, groups, rename, answer, words):
    found = checkpoint(tmp_path, family, groups, rename)
    for runtime in ("transformers", "transformers + sparsessm_plugin"):
        assert found[runtime].answer == answer
        assert words in " ".join(found[runtime].reasons)
