"""Removal of MLP units and kv groups: oracles, every family that has them, and what is refused."""

import pytest
import torch
from conftest import (
    EXPERTS,
    batches,
    logits_beside,
    logits_of,
    relative,
    run,
    same_logits,
    state,
    tiny_model,
)
from transformers import AutoModelForCausalLM

import sparsessm_plugin as plugin
from sparsessm_plugin.criteria.units import magnitude
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import get_model_adapter, get_tensor
from sparsessm_plugin.methods import remove_kv_groups, remove_units

READY = batches(2, 2, 16, padded=True)
HYBRIDS = ("jamba", "zamba", "bamba", "zamba2", "granitemoehybrid", "falcon_h1", "nemotron_h")


def silence(model, axis, units):
    """Let the weights that read units read zero."""
    with torch.no_grad():
        for block in get_model_adapter(model).blocks(axis):
            for where in block.columns:
                moved = get_tensor(model, where.tensor).movedim(where.dim, 0)
                moved[where.positions(units)] = 0


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("axis", ["mlp", "kv_groups"])
def test_units_that_nobody_reads_go_and_cost_nothing(family, axis):
    model = tiny_model(family)
    length = get_model_adapter(model).axis_length(axis)
    units = [0] if axis == "kv_groups" else [1, 5, 40, 46]
    silence(model, axis, units)
    dense = logits_of(model, READY)
    remove = remove_units if axis == "mlp" else remove_kv_groups
    result = remove(model, READY, keep=length - len(units))
    assert all(layer.removed == units for layer in result.layers)
    assert all(layer.error_left < 1e-8 for layer in result.layers)
    assert relative(logits_of(model, READY), dense) < 1e-4
    assert get_model_adapter(model).axis_length(axis) == length - len(units)


def test_what_reads_units_is_fitted_by_least_squares():
    model = tiny_model("bamba")
    dense, seen = tiny_model("bamba"), []
    down = dense.model.layers[0].feed_forward.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in READY:
            dense(**batch)
    handle.remove()
    real = [x[b["attention_mask"].bool()] for x, b in zip(seen, READY, strict=True)]
    x = torch.cat(real).double()
    result = remove_units(model, READY, keep=24)
    kept = [i for i in range(48) if i not in result.layers[0].removed]
    y = x @ down.weight.detach().double().T
    gram = x[:, kept].T @ x[:, kept]
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(24)
    start = down.weight.detach().double()[:, kept]
    expected = start + torch.linalg.solve(gram, x[:, kept].T @ (y - x[:, kept] @ start.T)).T
    found = model.model.layers[0].feed_forward.down_proj.weight
    assert torch.allclose(found.double(), expected, atol=1e-4)
    error = ((y - x[:, kept] @ expected.T).square().sum() / y.square().sum()).item()
    assert result.layers[0].error_left == pytest.approx(error, rel=1e-3)
    assert result.layers[0].error_left < result.layers[0].error_removed


def test_chosen_by_output_is_better_than_by_weights():
    left = {}
    for saliency in ("output_energy", "magnitude", "last", "random"):
        model = tiny_model("nemotron_h")
        result = remove_units(model, READY, keep=24, saliency=saliency)
        left[saliency] = result.layers[0].error_left
    assert left["output_energy"] < min(left["magnitude"], left["last"], left["random"])


def test_saved_by_llm_compressor_with_the_new_sizes(tmp_path):
    model = tiny_model("jamba")
    modifiers = [plugin.MLPRemovalModifier(sparsity=0.5), plugin.AttentionRemovalModifier(keep=1)]
    run(model, modifiers, READY, output_dir=str(tmp_path / "out"))
    assert [m.report()["total"]["sparsity"] for m in modifiers] == [0.5, 0.5]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits_of(model, READY)
    assert same_logits(logits_beside(loaded, expected, READY[0]["input_ids"]), expected)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_in_one_tensor_go_by_magnitude_only(family):
    model = tiny_model(family, **EXPERTS[family])
    axis = "mlp" if family == "jamba" else "experts"
    with pytest.raises(SparseSSMError, match="holds its experts in one tensor"):
        remove_units(model, READY, keep=16, axis=axis)
    block = get_model_adapter(model).blocks(axis)[-1]
    order = magnitude(model, block).argsort(stable=True)
    fields = {"saliency": "magnitude", "compensate": "none", "axis": axis}
    result = remove_units(model, keep=16, **fields)
    assert result.layers[-1].removed == sorted(order[: block.length - 16].tolist())
    assert get_model_adapter(model).axis_length(axis) == 16
    logits_of(model, READY)


def test_magnitude_of_a_kv_group_is_that_of_all_its_weights():
    model = tiny_model("bamba")
    attention = model.model.layers[1].self_attn
    block = get_model_adapter(model).blocks("kv_groups")[0]
    heads = {"q_proj": 2, "k_proj": 1, "v_proj": 1}
    expected = sum(
        getattr(attention, name).weight.detach().double().view(2, -1).square().sum(1)
        for name in heads
    )
    columns = attention.o_proj.weight.detach().double().view(32, 2, -1)
    expected = expected + columns.square().sum((0, 2))
    assert torch.allclose(magnitude(model, block), expected.sqrt())


@pytest.mark.parametrize(
    ("family", "remove", "fields", "message"),
    [
        ("mamba", remove_units, {"keep": 8}, "MambaForCausalLM has no axis 'mlp'; allowed:"),
        ("mamba2", remove_kv_groups, {"keep": 1}, "has no axis 'kv_groups'"),
        ("bamba", remove_units, {"keep": 48}, "keep = 48 removes none of the 48 mlp"),
        ("bamba", remove_units, {"keep": 0}, "keep"),
        ("bamba", remove_units, {"sparsity": 0.99}, "sparsity = 0.99 removes all of the 48 mlp"),
        ("bamba", remove_units, {"keep": 20, "multiple_of": 8}, "no multiple of 8"),
        ("bamba", remove_kv_groups, {"keep": 2}, "keep = 2 removes none of the 2 kv_groups"),
        ("bamba", remove_units, {"keep": 8, "axis": "experts"}, "has no axis 'experts'"),
        ("bamba", remove_units, {"keep": 8, "saliency": "x"}, "'x' is not known; known: last,"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(family, remove, fields, message):
    model = tiny_model(family)
    before = state(model)
    with pytest.raises(SparseSSMError) as caught:
        remove(model, READY, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
