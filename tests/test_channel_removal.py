"""Removal of channels, heads and head_dim, end to end and against oracles."""

import pytest
import torch
from conftest import (
    DEVICE,
    FAMILIES,
    MAMBA1,
    MAMBA2,
    Loader,
    batches,
    logits_beside,
    same_logits,
    tiny_model,
    tokenizer,
)
from llmcompressor import oneshot
from loguru import logger
from transformers import AutoModelForCausalLM

from sparsessm_plugin import ChannelRemovalModifier, SparseSSMError
from sparsessm_plugin.criteria.channels import magnitude, out_proj_norm
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods.channels import channel_blocks
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.refit.channels import LinearTerm, eliminate_blocks, refit

# families whose loader makes any number of channels
FREE = ("mamba", "falcon_mamba", "falcon_h1", "nemotron_h")


def prune(model, **fields):
    modifier = ChannelRemovalModifier(**fields)
    oneshot(model=model, recipe=modifier, dataset=Loader(batches()), processor=tokenizer())
    return modifier


def halved(family):
    """Half of everything: what every loader can make of the tiny models."""
    return {"keep": 32} if family in MAMBA1 else {"axis": "heads", "keep": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_smaller_and_loads(family, tmp_path):
    model = tiny_model(family)
    before = sum(p.numel() for p in model.parameters())
    modifier = ChannelRemovalModifier(**halved(family))
    data = {"dataset": Loader(batches()), "processor": tokenizer()}
    oneshot(model=model, recipe=modifier, output_dir=str(tmp_path / "out"), **data)
    assert all(a.sizes.intermediate_size == 32 for a in find_mixers(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sum(p.numel() for p in loaded.parameters()) < before
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert same_logits(logits_beside(loaded, expected, ids), expected)
    layers = modifier.report()["layers"]
    assert all(layer["error_left"] < layer["error_removed"] for layer in layers)


@pytest.mark.parametrize("family", FREE)
def test_sizes_between_multiples_of_hidden_size(family, tmp_path):
    model = tiny_model(family)
    axis = {"keep": 48} if family in MAMBA1 else {"axis": "head_dim", "sparsity": 0.25}
    prune(model, multiple_of=2, **axis)
    assert find_mixers(model)[0].sizes.intermediate_size == 48
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert same_logits(logits_beside(loaded, expected, ids), expected)


@pytest.mark.parametrize(
    "family", ["jamba", "zamba", "mamba2", "bamba", "zamba2", "granitemoehybrid"]
)
def test_sizes_that_no_loader_makes_are_refused(family):
    model = tiny_model(family)
    mixers = [adapter.mixer for adapter in find_mixers(model)]
    before = [{k: v.clone() for k, v in mixer.state_dict().items()} for mixer in mixers]
    fields = {"keep": 48} if family in MAMBA1 else {"axis": "heads", "keep": 6}
    with pytest.raises(SparseSSMError, match="multiple of"):
        prune(model, **fields)
    for mixer, tensors in zip(mixers, before, strict=True):
        assert all(torch.equal(v, tensors[k]) for k, v in mixer.state_dict().items())


def test_uncompensated_removal_equals_silenced_channels():
    """Without a norm over the channels, removing them is zeroing what reads them."""
    dense, small = tiny_model("mamba").to(DEVICE), tiny_model("mamba")
    modifier = prune(small, keep=32, saliency="magnitude", compensate="none")
    for adapter, layer in zip(find_mixers(dense), modifier.report()["layers"], strict=True):
        with torch.no_grad():
            adapter.mixer.out_proj.weight[:, layer["removed"]] = 0
            adapter.mixer.x_proj.weight[:, layer["removed"]] = 0
    ids = batches(1)[0]["input_ids"].to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(
            small(input_ids=ids.to(small.device), use_cache=False).logits.to(DEVICE),
            dense(input_ids=ids, use_cache=False).logits,
        )


def test_groups_of_heads_stay_equal():
    model = tiny_model("nemotron_h")
    modifier = prune(model, axis="heads", sparsity=0.5)
    for layer in modifier.report()["layers"]:
        assert len([i for i in layer["removed"] if i < 4]) == 2


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h"])
def test_each_head_loses_channels_of_its_own(family):
    model, generator, closed = tiny_model(family), torch.Generator().manual_seed(0), []
    for adapter in find_mixers(model):
        own = [8 * head + torch.randperm(8, generator=generator)[:2] for head in range(8)]
        closed.append(sorted(torch.cat(own).tolist()))
        with torch.no_grad():
            adapter.mixer.in_proj.weight[closed[-1]] = 0  # the gate
            adapter.mixer.out_proj.weight[:, closed[-1]] = 0
    modifier = prune(model, axis="head_dim", keep=6)
    for layer, gone in zip(modifier.report()["layers"], closed, strict=True):
        assert layer["channels"] == gone
        assert layer["removed"] == [6, 7]
        assert layer["error_left"] < 1e-4
    assert find_mixers(model)[0].sizes.head_dim == 6


@pytest.mark.parametrize("family", MAMBA2)
def test_blocks_are_disjoint_and_cover_all_channels(family):
    adapter = find_mixers(tiny_model(family))[0]
    for axis in ("heads", "head_dim"):
        blocks = channel_blocks(adapter, axis)
        assert sorted(blocks.flatten().tolist()) == list(range(64))


def test_magnitude_sums_what_a_channel_owns():
    adapter = find_mixers(tiny_model("mamba"))[0]
    mixer, d = adapter.mixer, 5
    owned = [
        mixer.in_proj.weight[d], mixer.in_proj.weight[64 + d], mixer.conv1d.weight[d],
        mixer.x_proj.weight[:, d], mixer.dt_proj.weight[d], mixer.out_proj.weight[:, d],
    ]  # fmt: skip
    expected = sum(float(t.detach().double().square().sum()) for t in owned) ** 0.5
    assert float(magnitude(adapter, "channels")[d]) == pytest.approx(expected)
    column = float(mixer.out_proj.weight[:, d].detach().double().norm())
    assert float(out_proj_norm(adapter, "channels")[d]) == pytest.approx(column)


# -- the solver --------------------------------------------------------------------------


def problem(D=10, out=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, D, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(D, D, generator=generator, dtype=torch.float64)
    return x, torch.randn(out, D, generator=generator, dtype=torch.float64)


def left_after(x, W, kept):
    """Squared error of the best weight over the kept inputs, by explicit least squares."""
    y = x @ W.T
    fit = torch.linalg.lstsq(x[:, kept], y).solution
    return float((y - x[:, kept] @ fit).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_one_removal_is_the_best_one(seed):
    x, W = problem(seed=seed)
    blocks = torch.arange(10)[:, None]
    removed = eliminate_blocks([LinearTerm(x.T @ x, W)], blocks, 1, damping=1e-12)
    costs = [left_after(x, W, [i for i in range(10) if i != d]) for d in range(10)]
    assert costs[removed[0]] == pytest.approx(min(costs), rel=1e-6)


def test_greedy_removal_beats_magnitude_and_follows_blocks():
    x, W = problem(12, 5, seed=3)
    blocks = torch.tensor([[i, i + 6] for i in range(6)])
    removed = eliminate_blocks([LinearTerm(x.T @ x, W)], blocks, 3, damping=1e-9)
    assert len(removed) == 3
    gone = set(blocks[removed].flatten().tolist())
    cost = left_after(x, W, [i for i in range(12) if i not in gone])
    order = W.square().sum(0)[blocks].sum(1).argsort()[:3]
    by_norm = set(blocks[order].flatten().tolist())
    assert cost <= left_after(x, W, [i for i in range(12) if i not in by_norm])


def test_groups_lose_equally_many():
    x, W = problem(12, 5, seed=4)
    blocks = torch.arange(12)[:, None]
    removed = eliminate_blocks([LinearTerm(x.T @ x, W)], blocks, 6, groups=3)
    assert [sum(4 * g <= i < 4 * g + 4 for i in removed) for g in range(3)] == [2, 2, 2]


def test_a_second_weight_counts():
    """A channel that only the second weight needs is kept because of it."""
    x = torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    gram, blocks = x.T @ x, torch.arange(4)[:, None]
    assert eliminate_blocks([LinearTerm(gram, first)], blocks, 1) == [3]
    both = [LinearTerm(gram, first), LinearTerm(gram, second)]
    assert eliminate_blocks(both, blocks, 1) != [3]


def test_refit_is_least_squares():
    x, W = problem(8, 3, seed=5)
    kept = torch.tensor([0, 2, 3, 7])
    fit = refit(x.T @ x, W, kept, ridge=0.0)
    expected = torch.linalg.lstsq(x[:, kept], x @ W.T).solution.T
    torch.testing.assert_close(fit, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(refit(x.T @ x, W, torch.arange(8), ridge=0.0), W)


# -- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", "give either keep or sparsity, got neither"),
        ("sparsity: 0.5, keep: 3", "give either keep or sparsity, got both"),
        ("sparsity: 1.0", "between 0 and 1"),
        ("keep: 0", "greater than or equal to 1"),
        ("sparsity: 0.5, axis: states", "axis"),
        ("sparsity: 0.5, compensate: C", "compensate"),
        ("keep: 3, ignore: lm_head", "unknown field ChannelRemovalModifier.ignore"),
    ],
)
def test_bad_settings(fields, message):
    text = f"a_stage:\n  b_modifiers:\n    ChannelRemovalModifier: {{{fields}}}\n"
    with pytest.raises(SparseSSMError, match=message) as error:
        parse_recipe(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {"axis": "heads", "keep": 2}, "no axis 'heads'"),
        ("mamba", {"keep": 64}, "removes none or all"),
        ("mamba", {"sparsity": 0.9}, "removes none or all"),
        ("mamba", {"keep": 30, "multiple_of": 4}, "no multiple of 4"),
        ("nemotron_h", {"axis": "heads", "keep": 3}, "3 heads do not divide; keep 2 or 4"),
        (
            "mamba2",
            {"axis": "heads", "keep": 6},
            "must be a multiple of 32; keep 4, or take the hidden",
        ),
        ("jamba", {"keep": 20}, "20 is no multiple of 32; keep 32, or take the hidden"),
        ("nemotron_h", {"axis": "heads", "keep": 4, "compensate": "x_proj"}, "has no x_proj"),
    ],
)
def test_settings_that_do_not_fit_the_model(family, fields, message):
    with pytest.raises(SparseSSMError, match=message) as error:
        ChannelRemovalModifier(**fields).matching_mixers(tiny_model(family))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sparsity", "said"), [(0.4, True), (0.5, False)])
def test_it_says_the_number_that_stays_where_a_sparsity_is_rounded(sparsity, said):
    lines = []
    handle = logger.add(lines.append, level="WARNING", format="{message}")
    modifier = ChannelRemovalModifier(
        axis="heads", sparsity=sparsity, saliency="magnitude", compensate="none"
    )
    try:
        modifier.new_method().prepare(tiny_model("nemotron_h"))
    finally:
        logger.remove(handle)
    found = any("4 of 8 heads stay in every mixer, which is 50.0% removed" in s for s in lines)
    assert found == said
