"""StateRemovalModifier on gated delta nets, where a state is a key dim."""

import itertools
import json

import pytest
import torch
from conftest import DELTA, batches, check_reload, nothing_left_behind, run, state, tiny_model

from sparsessm_plugin import StateRemovalModifier
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.key_dims import (
    KEY_DIM_CRITERIA,
    KeyDimInputs,
    KeyDimStatistics,
    register_key_dim_criterion,
    strong_rrqr,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods import remove_states
from sparsessm_plugin.methods.key_dims import output_error
from sparsessm_plugin.methods.outputs import dense_outputs, masked_error, relative_error
from sparsessm_plugin.methods.removal import remove
from sparsessm_plugin.recipes import recipe_path

FIELDS = {
    "qwen3_5": "linear_key_head_dim",
    "qwen3_5_moe": "linear_key_head_dim",
    "qwen3_next": "linear_key_head_dim",
    "olmo_hybrid": "linear_key_head_dim",
}


def no_epsilon(model):
    """Queries are divided by sqrt(dk), which the norm behind cancels but for its epsilon."""
    for adapter in find_mixers(model):
        adapter.norm.variance_epsilon = 0.0


def adapter_of(family):
    return find_mixers(tiny_model(family))[0]


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
with torch.no_grad():
    out = model(ids[:, :10], use_cache=True)
    for n in range(10, 15):
        assert torch.allclose(out.logits[:, -1], logits[:, n - 1], rtol=1e-3, atol=1e-4)
        out = model(ids[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
"""
    if family == "qwen3_5":  # of the others the adapters' own tests load what is smaller
        check_reload(model, saved, more)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_norms_come_back_to_where_the_model_computes(family):
    """LLM Compressor exchanges them, while its pipeline says where all other modules compute."""
    model = tiny_model(family)
    with torch.no_grad():
        model.model.norm.weight.normal_(0, 0.1)
    run(model, StateRemovalModifier(keep=4, compensate="none"), pipeline="sequential")
    places = {
        name: getattr(m._parameters, "onload_device", None) for name, m in model.named_modules()
    }
    assert set(places.values()) == {places["lm_head"]} != {None}, places


@pytest.mark.parametrize("recipe", ["state-50", "state-75"])
def test_builtin_recipes_work_unchanged(recipe):
    model = tiny_model("qwen3_5")
    run(model, recipe_path(recipe))
    size = find_mixers(model)[0].sizes.state_size
    assert size == {"state-50": 4, "state-75": 2}[recipe]


# -- what is chosen ----------------------------------------------------------------------


@torch.no_grad()
def silence(adapter, dims):
    """Let queries and keys be zero there, (G, count) indices."""
    G, dk = len(dims), adapter.sizes.state_size
    for axis in adapter.state_rows:
        positions = axis.positions([g * dk + int(i) for g in range(G) for i in dims[g]])
        adapter.mixer.get_parameter(axis.tensor)[positions] = 0


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
@pytest.mark.parametrize("saliency", ["output_energy", "qk", "magnitude", "pairs", "rrqr"])
def test_key_dims_without_queries_and_keys_are_lost_for_nothing(family, saliency):
    model = tiny_model(family)
    silent = torch.tensor([[0, 3, 6, 7], [1, 2, 4, 5]])
    for adapter in find_mixers(model):
        silence(adapter, silent)
    no_epsilon(model)
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
def test_error_of_a_set_is_that_of_the_smaller_mixer(padded):
    adapter = adapter_of("qwen3_next")
    inputs = inputs_of(adapter, padded)
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[0, [1, 2, 5, 7]] = kept[1, [0, 1, 2, 3]] = False
    small = remove(adapter, "key_dims", (~kept).flatten().nonzero().flatten().tolist())
    with torch.no_grad():
        targets = dense_outputs(adapter, inputs)
        relative = relative_error(small, inputs, targets)
        energy = sum(
            float(masked_error(targets[i], torch.zeros_like(targets[i]), q.mask).square().sum())
            for i, q in inputs.iterate(adapter)
        )
        error = output_error(adapter, inputs, kept)
    assert error == pytest.approx(relative * energy, rel=1e-3)


def test_the_chosen_set_is_the_best_that_was_proposed_and_among_the_best_of_all():
    """Beside every set of both key heads."""
    better = []
    for seed in range(2):
        model = tiny_model("qwen3_5", seed, linear_key_head_dim=4, linear_num_value_heads=2)
        adapter = find_mixers(model)[0]
        ready = batches(seed=seed)
        seen = CalibrationInputs()

        def watch(module, args, kwargs, seen=seen):
            seen.add(kwargs["hidden_states"], None)

        hook = adapter.mixer.register_forward_pre_hook(watch, with_kwargs=True)
        with torch.no_grad():
            for batch in ready:
                model(input_ids=batch["input_ids"])
        hook.remove()
        pairs = list(itertools.combinations(range(4), 2))
        errors = {}
        with torch.no_grad():
            for sets in itertools.product(pairs, pairs):
                kept = torch.zeros(2, 4, dtype=torch.bool)
                for head, those in enumerate(sets):
                    kept[head, list(those)] = True
                errors[sets] = output_error(adapter, seen, kept)

        def error_with(saliency, seed=seed, ready=ready, errors=errors):
            model = tiny_model("qwen3_5", seed, linear_key_head_dim=4, linear_num_value_heads=2)
            fields = {"keep": 2, "compensate": "none", "saliency": saliency}
            removed = remove_states(model, ready, **fields).layers[0].removed
            stays = [[i for i in range(4) if head * 4 + i not in removed] for head in range(2)]
            return errors[tuple(map(tuple, stays))]

        chosen = error_with("output_energy")
        proposed = [error_with(name) for name in ("rrqr", "pairs", "qk", "magnitude")]
        assert chosen == min(proposed)
        better.append(sum(error < chosen for error in errors.values()) / len(errors))
    assert sum(better) / len(better) < 0.3


def test_pairs_judges_products_over_all_pairs_of_steps():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 30, 2, 6, generator=generator).double() * torch.arange(1.0, 7.0)
    statistics = KeyDimStatistics()
    statistics.add(q, k)
    norms = torch.ones(2, 6)
    kept = KEY_DIM_CRITERIA["pairs"].score(KeyDimInputs(statistics, norms, norms, 3))

    def change(head, gone):
        q_, k_ = (x[:, head][:, list(gone)] for x in (q, k))
        return float((q_ @ k_.T).square().sum() + (k_ @ k_.T).square().sum())

    for head in range(2):
        best = min(itertools.combinations(range(6), 3), key=lambda gone: change(head, gone))
        assert (kept[head] == 0).nonzero().flatten().tolist() == list(best)


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


def test_a_criterion_for_key_dims():
    """The first key dims go whatever the weights are, and no data is asked for."""

    @register_key_dim_criterion("in_order")
    def in_order(inputs):
        return torch.arange(inputs.q_norm.shape[1]).expand_as(inputs.q_norm)

    try:
        fields = {"keep": 6, "saliency": "in_order", "compensate": "none"}
        result = remove_states(tiny_model("olmo_hybrid"), **fields)
    finally:
        del KEY_DIM_CRITERIA["in_order"]
    assert all(layer.removed == [0, 1, 8, 9] for layer in result.layers)


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
