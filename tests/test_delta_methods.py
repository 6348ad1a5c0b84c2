"""What prunes, quantizes and measures models of gated delta nets."""

import copy
import json
import shutil
from importlib import import_module

import pytest
import torch
from conftest import (
    DELTA,
    DEMO,
    MOE,
    MOE_ROUNDING,
    Loader,
    batches,
    check_reload,
    hooked,
    logits_beside,
    may_be_off,
    nothing_left_behind,
    projections,
    record,
    relative,
    run,
    save_with_logits,
    saved_tiny_model,
    state,
    stock_process,
    tiny_model,
    with_images,
)
from transformers import AutoModelForImageTextToText

import sparsessm_plugin
from sparsessm_plugin import (
    GradientMagnitudeModifier,
    SensitivitySparseGPTModifier,
    SparseGPTQModifier,
)
from sparsessm_plugin.calibration.overflow import first_overflow
from sparsessm_plugin.dependency_graph import (
    MixerDependencyGraph,
    ModelDependencyGraph,
    apply_config_fields,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.component_loss import measure_component_loss
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.families.prunable import prunable_weights
from sparsessm_plugin.methods import (
    prune_by_gradient,
    prune_projections,
    prune_transitions,
    remove_channels,
    remove_width,
)
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune, save

READY = batches(padded=True)


@pytest.mark.parametrize("family", DELTA)
def test_solvers_see_what_each_projection_reads(family, monkeypatch):
    model = tiny_model(family)
    adapter = find_mixers(model)[0]
    seen = {
        kind: hooked(model, f"{adapter.name}.{kind}", READY)
        for kind in (*adapter.entry_kinds, adapter.exit_kind)
    }
    calls = record(monkeypatch)
    settings = {"solver": "sparsegpt", "allocation": "uniform", "target_output": "own"}
    result = prune_projections(model, READY, sparsity=0.5, **settings)
    assert [layer.kind for layer in result.layers] == 2 * list(adapter.projections)
    for _, projection in projections(model).items():
        assert float((projection.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    mask = torch.cat([batch["attention_mask"].flatten() for batch in READY]).bool()
    for (_, hessian, _), layer in zip(calls, result.layers, strict=False):
        # what comes after has seen pruned weights; padding counts nowhere
        if layer.kind in adapter.entry_kinds and layer.name.startswith(adapter.name):
            x = torch.cat([x.flatten(0, 1) for x in seen[layer.kind]])[mask].double()
            gram = x.T @ x
            ratio = gram.trace() / hessian.double().trace()
            assert relative(hessian.double() * ratio, gram) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_next"])
def test_a_pruned_model_loads_again(family, tmp_path):
    model = tiny_model(family)
    modifiers = [
        SensitivitySparseGPTModifier(
            sparsity=0.5,
            solver="sparsegpt",
            allocation="uniform",
            targets=["re:.*linear_attn", "re:.*self_attn", "re:.*mlp.down_proj"]
            if family not in MOE
            else ["re:.*linear_attn", "re:.*self_attn"],
        ),
        GradientMagnitudeModifier(sparsity=0.6, rounds=1),
    ]
    run(model, modifiers)
    assert nothing_left_behind(model)
    weights = prunable_weights(model, recurrent=True)
    assert not any(w.name.rpartition(".")[2] == "gate" for w in weights if family in MOE)
    zeros = sum(int((w.weight == 0).sum()) for w in weights)
    assert zeros / sum(w.entries for w in weights) == pytest.approx(0.6, abs=0.01)
    model.save_pretrained(tmp_path / "saved")
    check_reload(model, tmp_path / "saved", "", MOE_ROUNDING if family in MOE else 0.0)


def test_zeros_survive_quantization(tmp_path):
    model = tiny_model("qwen3_5")
    run(
        model,
        [
            SensitivitySparseGPTModifier(
                sparsity=0.5, solver="sparsegpt", allocation="uniform", ignore=["re:.*conv1d"]
            ),
            SparseGPTQModifier(
                targets=["re:.*linear_attn.*proj"], scheme="W8A8", ignore=["re:.*conv1d"]
            ),
        ],
        output_dir=str(tmp_path / "saved"),
    )
    for name, projection in projections(model).items():
        if not name.endswith("conv1d"):
            assert projection.module.quantization_scheme is not None
            assert float((projection.weight == 0).float().mean()) >= 0.45


AWAY = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for family in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{family}"
    ids, expected, _ = torch.load(folder + ".pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(ids.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    found[family] = float((logits - expected).abs().max())
assert "sparsessm_plugin.checkpoints.loading" not in sys.modules
print(json.dumps(found))
"""


def test_quantized_models_load_again(tmp_path):
    """Experts as symmetric integer weights alone; in another scheme they are to be ignored.

    They add up in another order once they are one tensor, and what is quantized behind them may
    then take the next step.
    """
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    names = ["re:.*(in_proj(_[a-z]+)?|out_proj|linear_attn[.][a-z]_proj)$"]
    packed = {"config_groups": {"group_0": {"targets": names, "weights": int4}}}
    whole = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": int4}}}
    ignore = ["lm_head", "re:.*gate$"]
    no_experts = [*ignore, "re:.*experts.*"]
    cases = [
        ("qwen3_5", {"targets": ["Linear"], "scheme": "FP8_DYNAMIC", "ignore": ignore}),
        ("qwen3_next", {"targets": ["Linear"], "scheme": "W8A8", "ignore": no_experts}),
        ("qwen3_5_moe", {**whole, "ignore": ignore}),
        ("olmo_hybrid", packed),
    ]
    for family, fields in cases:
        sizes = {"shared_expert_intermediate_size": 32} if family in MOE else {}
        model = tiny_model(family, linear_value_head_dim=16, **sizes)
        run(model, SparseGPTQModifier(**fields))
        adapter = find_mixers(model)[0]
        for kind in (*adapter.entry_kinds, adapter.exit_kind):
            assert adapter.projection(kind).module.quantization_scheme is not None
        save_with_logits(model, tmp_path / family)
    found = stock_process(AWAY, tmp_path, *(family for family, _ in cases))
    for family, away in found.items():
        _, expected, most = torch.load(tmp_path / f"{family}.pt")
        if family in MOE:
            most = max(most, 0.02 * float(expected.abs().max()))
        assert away <= most, family


def test_what_reads_the_selective_recurrence_says_so():
    model = tiny_model("qwen3_5")
    with pytest.raises(SparseSSMError, match=r"linear_attn .*has one entry"):
        prune_transitions(model, READY, sparsity=0.5)


@pytest.mark.parametrize("family", DELTA)
@pytest.mark.parametrize("padded", [False, True])
def test_fast_forward_computes_what_transformers_does(family, padded):
    model = tiny_model(family)
    (batch,) = batches(1, 2, 70, padded=padded)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        with fast_forward(model):
            result = model(**batch, use_cache=False).logits
            cached = model(**batch, use_cache=True)
    assert relative(result, expected) < 1e-4
    assert torch.equal(cached.logits, expected)
    assert nothing_left_behind(model)


def test_gradients_pass_the_scan():
    model = tiny_model("qwen3_next")
    (batch,) = batches(1, 2, 70)
    found = []
    for fast in (False, True):
        model.zero_grad()
        with fast_forward(model, gradients=fast):
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert relative(found[1][name], gradient) < 1e-3 or gradient.norm() < 1e-6, name


@pytest.mark.parametrize("kind", ["in_proj_z", "in_proj_a", "conv1d", "out_proj"])
def test_the_first_overflow_is_named(kind):
    model = tiny_model("qwen3_5")
    weight = find_mixers(model)[1].projection(kind).weight
    with torch.no_grad():
        weight.fill_(torch.nan)
    place = first_overflow(model, batches(1))
    assert place == (
        f"the output of model.layers.2.linear_attn.{kind}, whose weights hold such values"
        if kind != "out_proj"
        else "the output of model.layers.2.linear_attn.out_proj"
    )


def test_component_loss_and_gradients():
    model = tiny_model("olmo_hybrid")
    before = copy.deepcopy(model.state_dict())
    loss = measure_component_loss(
        model, batches(1), torch.randint(1, 96, (2, 16)), sparsities=(0.5,), by=("kind",)
    )
    kinds = find_mixers(model)[0].projections
    assert {measured.kind for measured in loss.measurements} == set(kinds)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune_by_gradient(model, batches(1), sparsity=0.5, rounds=1)


def test_commands(sparsessm, tmp_path, text_file):
    saved_tiny_model(tmp_path / "dense", "qwen3_5", vocab_size=8192)
    code, shown, errors = sparsessm("inspect", tmp_path / "dense")
    assert code == 0, errors
    assert "2 state-space mixers (qwen3_5)" in shown
    assert "N key dims a head, H value heads, P value dims a head, G key heads" in shown
    arguments = ("--calibration", text_file, "--num-samples", 4, "--max-seq-length", 32)
    code, shown, errors = sparsessm(
        "prune",
        tmp_path / "dense",
        "--recipe",
        "whole-50",
        *arguments,
        "--output",
        tmp_path / "out",
    )
    assert code == 0, errors
    code, shown, errors = sparsessm("evaluate", tmp_path / "out", "--text", text_file)
    assert code == 0, errors


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_language_model_beside_an_image_encoder(family, tmp_path):
    model = with_images(family)
    encoder = copy.deepcopy(model.model.visual.state_dict())
    assert not any("visual" in weight.name for weight in prunable_weights(model))
    prune_by_gradient(model, batches(1, length=8), sparsity=0.5, rounds=1)
    for name, value in model.model.visual.state_dict().items():
        assert torch.equal(encoder[name], value)
    for adapter in find_mixers(model):
        group = MixerDependencyGraph(adapter).get_axis_group("key_dims", [0, 3, 9, 12])
        group.prune()
    apply_config_fields(model.config, group.config_fields)
    assert model.config.text_config.linear_key_head_dim == 6
    graph = ModelDependencyGraph(model)
    graph.get_axis_group("layers", [0]).prune()
    assert model.config.text_config.layer_types == ["full_attention", "linear_attention"]
    with pytest.raises(SparseSSMError, match="image encoder"):
        graph.get_axis_group("hidden", range(8)).prune()
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(1, 90, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
        away = (logits_beside(loaded, expected, ids) - expected).abs().max()
        assert away <= may_be_off(expected, MOE_ROUNDING)


BY_ITS_CLASS = """
import json, sys, torch, transformers
answers = []
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    ids, logits, tensors = torch.load(folder + "/expected.pt")
    model = model.eval().to(ids.device)
    with torch.no_grad():
        away = (model(ids).logits - logits).abs().max()
        grid = torch.tensor([[1, 2, 2]], device=ids.device)
        pixels = torch.ones(4, 3 * 2 * 4 * 4, device=ids.device)
        image = torch.tensor([[92, 90, 93, 5]], device=ids.device)
        types = (image == 90).int()
        seen = model(image, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types)
    own = model.state_dict()
    answers.append(
        [
            cls.__name__,
            sorted(name for name, found in info.items() if found),
            bool(own.keys() == tensors.keys()),
            [name for name, value in tensors.items() if not torch.equal(own[name].cpu(), value)],
            float(away),
            bool(seen.logits.isfinite().all()),
            config["text_config"]["linear_key_head_dim"],
        ]
    )
assert "sparsessm_plugin.checkpoints.loading" not in sys.modules
print(json.dumps(answers))
"""


def test_a_folder_with_an_image_encoder_stays_one(tmp_path):
    """What is saved loads by the class that its config names, with every tensor that it had."""
    dense = with_images()
    dense.save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path / "dense")
    processor = '{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}'
    (tmp_path / "dense" / "preprocessor_config.json").write_text(processor)
    source = ModelSource(str(tmp_path / "dense"), device="cpu")
    assert type(source.load_skeleton()) is type(dense)
    text = "prune_stage: {prune_modifiers: {StateRemovalModifier: {keep: 4, compensate: none}}}"
    recipe = parse_recipe(text, "a recipe")
    result = prune(source.load(), recipe, Loader(batches(1)), source.load_tokenizer())
    save(result.model, source.load_tokenizer(), tmp_path)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        logits = result.model(ids).logits
    tensors = state(result.model)
    for name, value in dense.model.visual.state_dict().items():
        assert torch.equal(tensors[f"model.visual.{name}"], value)
    torch.save((ids.to(logits.device), logits, tensors), tmp_path / "expected.pt")
    assert (tmp_path / "preprocessor_config.json").read_text() == processor
    ((*found, away, sees, dk),) = stock_process(BY_ITS_CLASS, tmp_path)
    assert found == [type(dense).__name__, [], True, []]
    assert away <= may_be_off(logits)
    assert sees
    assert dk == 4
    assert type(sparsessm_plugin.load(tmp_path)) is type(dense)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]  # as transformers takes it then
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(ModelSource(str(tmp_path)).load_skeleton()).__name__.endswith("ForCausalLM")


def test_gradients_never_ask_kernels_that_transformers_has_bound(monkeypatch):
    """flash-linear-attention refuses its backward pass on some GPUs."""
    theirs = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    bound = theirs.torch_chunk_gated_delta_rule

    def without_backward(*args, **kwargs):
        assert not torch.is_grad_enabled()
        return bound(*args, **kwargs)

    monkeypatch.setattr(theirs, "torch_chunk_gated_delta_rule", without_backward)
    remove_width(tiny_model("qwen3_5"), READY, keep=24)
    prune_by_gradient(tiny_model("qwen3_5"), READY, sparsity=0.5, rounds=1, distill_steps=1)
    remove_channels(tiny_model("qwen3_5"), READY, axis="value_heads", keep=4, distill_steps=1)


@pytest.mark.parametrize("axis", ["value_heads", "value_dims"])
@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_values_that_do_least_go(family, axis):
    """Those that add nothing are found and not missed, and the config follows."""
    model = tiny_model(family)
    gone = [1, 4] if axis == "value_heads" else [0, 3, 5, 11]
    with torch.no_grad():
        for adapter in find_mixers(model):
            (reads,) = (a for a in adapter.axes(axis) if a.tensor == f"{adapter.exit_kind}.weight")
            adapter.projection(adapter.exit_kind).weight[:, reads.positions(gone)] = 0
    keep = {"value_heads": 4, "value_dims": 8}[axis]
    result = remove_channels(model, READY, keep=keep, axis=axis)
    assert [layer.removed for layer in result.layers] == [gone, gone]
    assert (
        result.config_fields
        == {
            "value_heads": {"linear_num_value_heads": 4},
            "value_dims": {"linear_value_head_dim": 8},
        }[axis]
    )
    # a norm over fewer values of a head scales them anew
    most = 1e-6 if axis == "value_heads" else 0.2
    assert all(layer.error_left < most for layer in result.layers)
    with pytest.raises(SparseSSMError, match="shares keys in 2 groups of heads"):
        remove_channels(model, READY, keep=3, axis="value_heads")
