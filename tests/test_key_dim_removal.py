"""StateRemovalModifier on gated delta nets, where a state is a key dim."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from conftest import DELTA, batches, check_reload, nothing_left_behind, run, state, tiny_model

from sparsessm_plugin import StateRemovalModifier
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.key_dims import KEY_DIM_CRITERIA, strong_rrqr
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods import remove_states
from sparsessm_plugin.methods.key_dims import removal_costs
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.selection.elimination import eliminate_in_rounds

FIELDS = {
    "qwen3_5": "linear_key_head_dim",
    "qwen3_5_moe": "linear_key_head_dim",
    "qwen3_next": "linear_key_head_dim",
    "olmo_hybrid": "linear_key_head_dim",
}


def adapter_of(family="qwen3_5", **sizes):
    return find_mixers(tiny_model(family, **sizes))[0]


def inputs_of(adapter, padded=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = CalibrationInputs()
    for _ in range(2):
        x = torch.randn(3, 20, adapter.sizes.hidden_size, generator=generator)
        mask = torch.ones(3, 20, dtype=torch.long)
        if padded:
            mask[1, 12:] = mask[2, :5] = 0
        inputs.add(x, mask)
    return inputs


def error_of(adapter, inputs, alive):
    """The squared error of the mixer's output without some key dims, and the output's square."""
    wrong = total = 0.0
    for _, q in inputs.iterate(adapter):
        left = replace(q, q=q.q * alive, k=q.k * alive)
        dense, output = (adapter.output(x, scan(x)) for x in (q, left))
        mask = 1.0 if q.mask is None else q.mask[..., None]
        wrong += float(((dense - output) * mask).square().sum())
        total += float((dense * mask).square().sum())
    return wrong, total


# -- what remains is a smaller model -----------------------------------------------------


@pytest.mark.parametrize("family", DELTA)
def test_every_family_loses_half_of_its_key_dims(family, tmp_path):
    model = tiny_model(family)
    shapes = {name: tuple(value.shape) for name, value in state(model).items()}
    modifier = StateRemovalModifier(sparsity=0.5, reconstruct_steps=2)
    pipeline = "sequential" if family in ("qwen3_5", "olmo_hybrid") else "independent"
    saved = tmp_path / "model"
    run(model, modifier, batches(padded=True), pipeline=pipeline, output_dir=str(saved))
    adapters = find_mixers(model)
    assert [a.sizes.state_size for a in adapters] == [4] * len(adapters)
    assert nothing_left_behind(model)
    assert getattr(model.config, FIELDS[family]) == 4
    assert json.loads((saved / "config.json").read_text())[FIELDS[family]] == 4
    changed = {n for n, value in state(model).items() if tuple(value.shape) != shapes[n]}
    allowed = {f"{a.name}.{r.tensor}" for a in adapters for r in a.axes("key_dims")}
    assert changed == allowed
    report = modifier.report()
    assert report["total"]["unit"] == "key_dims"
    for layer in report["layers"]:
        assert 0 < layer["error_left"] <= layer["error_removed"]
        # as many of each key head, which choose for themselves
        assert [sum(i // 8 == head for i in layer["removed"]) for head in range(2)] == [4, 4]
    more = """
new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
full = [model(new[:, :n], use_cache=False).logits[:, -1] for n in range(15, 19)]
assert torch.equal(torch.stack([step.argmax(-1) for step in full], 1), new[:, 15:])
"""
    check_reload(model, saved, more)


@pytest.mark.parametrize("recipe", ["state-50", "state-75"])
def test_builtin_recipes_work_unchanged(recipe):
    model = tiny_model("qwen3_5")
    run(model, recipe_text(recipe))
    size = find_mixers(model)[0].sizes.state_size
    assert size == {"state-50": 4, "state-75": 2}[recipe]


def recipe_text(name):
    from sparsessm_plugin.recipes import load_recipe

    return load_recipe(name)


# -- what is chosen ----------------------------------------------------------------------


@torch.no_grad()
def silence(adapter, dims):
    """Let queries and keys be zero there, (G, count) indices."""
    G, dk = len(dims), adapter.sizes.state_size
    for axis in adapter.state_rows:
        positions = axis.positions([g * dk + int(i) for g in range(G) for i in dims[g]])
        adapter.mixer.get_parameter(axis.tensor)[positions] = 0


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
@pytest.mark.parametrize("saliency", ["output_energy", "qk", "magnitude", "rrqr"])
def test_key_dims_without_queries_and_keys_are_lost_for_nothing(family, saliency):
    model = tiny_model(family)
    silent = torch.tensor([[0, 3, 6, 7], [1, 2, 4, 5]])
    for adapter in find_mixers(model):
        silence(adapter, silent)
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    result = remove_states(model, batches(), keep=4, saliency=saliency, compensate="none")
    expected = [*silent[0].tolist(), *(silent[1] + 8).tolist()]
    for layer in result.layers:
        assert layer.removed == expected
        assert layer.error_removed is None or layer.error_removed < 1e-8
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_costs_are_those_of_removing_one_more(padded):
    """Near the dense model, where the expansion is exact: key dims that are almost silent."""
    adapter = adapter_of("qwen3_5")
    weak = torch.tensor([[1, 4, 6], [0, 2, 7]])
    with torch.no_grad():
        for axis in adapter.state_rows:
            positions = axis.positions([g * 8 + int(i) for g in range(2) for i in weak[g]])
            adapter.mixer.get_parameter(axis.tensor)[positions] *= 0.05
    inputs = inputs_of(adapter, padded)
    alive = torch.ones(2, 8, dtype=torch.bool)
    alive[0, 6] = alive[1, 2] = False
    found = removal_costs(adapter, inputs, alive)
    here, _ = error_of(adapter, inputs, alive)
    for head, i in ((0, 1), (0, 4), (1, 0), (1, 7)):
        less = alive.clone()
        less[head, i] = False
        there, _ = error_of(adapter, inputs, less)
        assert float(found[head, i]) == pytest.approx(there - here, rel=0.75)


def test_the_chosen_set_is_nearly_the_best_of_all():
    """Brute force over every set of both key heads."""
    better = []
    for seed in range(3):
        adapter = find_mixers(
            tiny_model("qwen3_5", seed, linear_key_head_dim=4, linear_num_value_heads=2)
        )[0]
        inputs = inputs_of(adapter, seed=seed)
        pairs = list(itertools.combinations(range(4), 2))
        errors = {}
        for sets in itertools.product(pairs, pairs):
            alive = torch.zeros(2, 4, dtype=torch.bool)
            for head, kept in enumerate(sets):
                alive[head, list(kept)] = True
            errors[sets] = error_of(adapter, inputs, alive)[0]
        chosen = eliminate_in_rounds(
            lambda alive, a=adapter, x=inputs: removal_costs(a, x, alive), 2, 4, 2, 1
        )
        key = tuple(tuple(row.nonzero().flatten().tolist()) for row in chosen)
        better.append(sum(error < errors[key] for error in errors.values()) / len(errors))
    assert sum(better) / len(better) < 0.15


def test_rounds_take_the_cheapest_and_look_again():
    seen = []

    def cost(alive):
        seen.append(int(alive.sum()))
        return torch.arange(5.0).expand(2, 5) * torch.tensor([[1.0], [-1.0]])

    alive = eliminate_in_rounds(cost, 2, 5, 2, 2)
    assert seen == [10, 6]
    assert alive.tolist() == [[False] * 3 + [True] * 2, [True] * 2 + [False] * 3]


def test_strong_rrqr_leaves_no_swap_that_gains():
    A = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)).double()
    A = A @ torch.diag(torch.tensor([1, 0.9, 0.8, 1e-3, 2, 1e-2, 0.5]).double())
    gram = A.T @ A

    def volume(columns):
        columns = list(columns)
        return float(torch.linalg.det(gram[columns][:, columns]).sqrt())

    found = strong_rrqr(gram, 4)
    best = max(volume(c) for c in itertools.combinations(range(7), 4))
    assert volume(found) >= best / 1.2
    swaps = ((i, j) for i in found for j in range(7) if j not in found)
    for i, j in swaps:
        assert volume([j if c == i else c for c in found]) <= 1.2 * volume(found) + 1e-12


# -- what is fitted ----------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["reconstruct", "out_proj"])
def test_each_compensation_lowers_the_error(compensate):
    data = batches(count=8, batch=4, length=48)
    model = tiny_model("qwen3_5")
    result = remove_states(model, data, keep=4, compensate=compensate, reconstruct_steps=40)
    for layer in result.layers:
        assert layer.error_left <= layer.error_removed
    assert any(layer.error_left < 0.97 * layer.error_removed for layer in result.layers)


# -- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3_5", {"keep": 8}, "keeping 8 of the 8 key dims of model.layers.0.linear_attn"),
        ("qwen3_5", {"keep": 3}, "which causal-conv1d refuses; keep 2 or 4"),
        (
            "qwen3_5",
            {"keep": 4, "saliency": "ghost"},
            "saliency 'ghost' is not for model.layers.0.linear_attn (qwen3_5), a gated delta net; "
            f"allowed: {', '.join(KEY_DIM_CRITERIA)}",
        ),
        ("mamba2", {"keep": 4, "saliency": "rrqr"}, "allowed: ghost, last, magnitude"),
        ("olmo_hybrid", {"keep": 4, "compensate": "D"}, "allowed: reconstruct, out_proj, none"),
    ],
)
def test_settings_that_do_not_fit_the_model(family, fields, message):
    model = tiny_model(family)
    before = state(model)
    with pytest.raises(SparseSSMError) as error:
        remove_states(model, batches(), **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_sizes_that_kernels_round_up_are_said():
    from loguru import logger

    said = []
    handle = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        remove_states(tiny_model("qwen3_5"), keep=6, saliency="last", compensate="none")
        remove_states(tiny_model("qwen3_5"), keep=4, saliency="last", compensate="none")
    finally:
        logger.remove(handle)
    assert len(said) == 1
    assert "6 key dims are no power of two" in said[0]
    assert "as many as for 8" in said[0]
