"""Removal of layers: the fit and the choice against oracles, every family saved and loaded."""

from itertools import combinations

import pytest
import torch
from conftest import (
    DELTA,
    DEVICE,
    FAMILIES,
    VOCAB,
    batches,
    may_be_off,
    run,
    state,
    stock_process,
    tiny_model,
)
from torch.nn import functional as F

from sparsessm_plugin import LayerRemovalModifier
from sparsessm_plugin.checkpoints.export import mamba_ssm_config, mamba_ssm_state_dict
from sparsessm_plugin.criteria.layers import BlockInfluence
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import get_model_adapter, iter_mixers
from sparsessm_plugin.methods import layer_fits, remove_layers
from sparsessm_plugin.methods.layer_passes import LayerPasses
from sparsessm_plugin.methods.layer_removal import LayerRemoval
from sparsessm_plugin.refit.layers import StandIn, fitted_changes, token_weights
from sparsessm_plugin.selection import sets
from sparsessm_plugin.selection.sets import allowed_sets, search_sets

LINEAR, FULL = "linear_attention", "full_attention"
# layers of every kind that a family knows, and how many stay
DEEP = {
    "mamba": ({"num_hidden_layers": 4, "use_bias": True}, 2),
    "falcon_mamba": ({"num_hidden_layers": 3}, 2),
    "mamba2": ({"num_hidden_layers": 4, "tie_word_embeddings": True}, 2),
    "falcon_h1": ({"num_hidden_layers": 3}, 2),
    "bamba": ({"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}, 2),
    "jamba": (
        {
            "num_hidden_layers": 6,
            "num_experts": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        4,
    ),
    "granitemoehybrid": (
        {
            "num_hidden_layers": 4,
            "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "residual_multiplier": 0.7,
        },
        2,
    ),
    "nemotron_h": ({"layers_block_type": [LINEAR, FULL, "mlp", LINEAR, FULL]}, 3),
    "zamba": ({"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2}, 3),
    "zamba2": (
        {
            "num_hidden_layers": 5,
            "layers_block_type": ["hybrid", LINEAR, "hybrid", "hybrid", LINEAR],
            "num_mem_blocks": 2,
        },
        3,
    ),
    **{f: ({"num_hidden_layers": 4, "layer_types": [LINEAR, FULL] * 2}, 2) for f in DELTA},
}
READY = batches(2, 4, 16)


def deep(family, **changes):
    return tiny_model(family, **{**DEEP[family][0], **changes}).to(DEVICE)


def logits(model, ids=None):
    with torch.no_grad():
        ids = READY[0]["input_ids"] if ids is None else ids
        return model(ids.to(DEVICE), use_cache=False).logits


# -- the fit --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_stand_in_is_weighted_least_squares(bias):
    torch.manual_seed(0)
    z, weight = torch.randn(200, 12), torch.randn(5, 12)
    target = torch.randn(200, 5) * torch.rand(200, 1).exp()
    root = token_weights(target).sqrt()[:, None]
    fitted, held = StandIn(weight, bias), StandIn(weight, bias)
    for part in torch.arange(200).split(70):
        fitted.add_tokens(z[part], target[part], token_weights(target[part]))
    features = torch.cat((z, torch.ones(200, 1)), 1) if bias else z
    expected = torch.linalg.lstsq((features * root).double(), (target * root).double()).solution.T
    torch.testing.assert_close(fitted.solve(0.0), expected, atol=1e-4, rtol=1e-4)
    # a ridge is as many more rows that want no change
    damping = float(fitted.gram.diagonal().mean()) * 0.1
    more = torch.cat((features * root, damping**0.5 * torch.eye(features.shape[1])))
    wanted = torch.cat((target * root, torch.zeros(features.shape[1], 5)))
    expected = torch.linalg.lstsq(more.double(), wanted.double()).solution.T
    torch.testing.assert_close(fitted.solve(0.1), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(fitted_changes(fitted, held)[1], fitted.solve(0.1))


def test_no_change_where_every_fit_makes_other_text_worse():
    torch.manual_seed(0)
    weight = torch.zeros(3, 4)
    fitted, held = StandIn(weight), StandIn(weight)
    z = torch.randn(50, 4)
    fitted.add_tokens(z, z[:, :3], torch.ones(50))
    held.add_tokens(z, -z[:, :3], torch.ones(50))
    assert not any(change.any() for change in fitted_changes(fitted, held))


def by_hand(model, removed, ready, ridge=0.1):
    """The smaller model, fitted by lstsq from what a plain Mamba's layers are called with."""
    layers = list(model.backbone.layers)
    ids = torch.cat([b["input_ids"] for b in ready])
    dense = [model.backbone.embeddings(ids)]
    for layer in layers:
        dense.append(layer(dense[-1]))
    small, kept = None, [i for i in range(len(layers)) if i not in removed]
    for place, index in enumerate(kept):
        behind = kept[place + 1] if place + 1 < len(kept) else len(layers)
        if index < min(removed) - 1:
            continue
        stream, target = dense[index] if small is None else small, dense[behind]
        linear, read = layers[index].mixer.out_proj, []
        hook = linear.register_forward_pre_hook(lambda m, a, read=read: read.append(a[0]))
        error = (target - layers[index](stream)).flatten(0, 1)
        hook.remove()
        root = target.square().mean(-1).flatten().rsqrt()[:, None]
        z = torch.cat((read[0].flatten(0, 1), torch.ones(len(error), 1)), 1) * root
        damping = (ridge * z.square().sum(0).mean()).sqrt()
        rows = torch.cat((z, damping * torch.eye(z.shape[1])))
        wanted = torch.cat((error * root, torch.zeros(z.shape[1], error.shape[1])))
        change = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
        linear.weight += change[:, :-1]
        linear.bias += change[:, -1]
        small = layers[index](stream)
    for index in sorted(removed, reverse=True):
        del model.backbone.layers[index]


def test_layers_are_fitted_from_the_one_before_the_gap_on(monkeypatch):
    from sparsessm_plugin.refit import layers as refit

    removed = (2, 4)
    monkeypatch.setattr(refit, "STAND_IN_RIDGES", (0.1,))
    monkeypatch.setattr(LayerRemoval, "_choose", lambda self, *args: removed)
    ready = batches(2, 3, 40)  # the rows held back judge the ridge alone
    model, expected = deep("mamba", num_hidden_layers=6).cpu(), deep("mamba", num_hidden_layers=6)
    expected = expected.cpu()
    result = remove_layers(model, ready, keep=4, compensate="out_proj")
    with torch.no_grad():
        by_hand(expected, removed, ready)
    for name, value in state(expected).items():
        torch.testing.assert_close(state(model)[name], value, atol=2e-4, rtol=2e-3, msg=name)
    assert list(result.fitted) == [f"backbone.layers.{i}.mixer.out_proj" for i in (1, 3, 5)]


def test_the_fit_takes_over_what_the_layers_did():
    ready = batches(6, 8, 32)
    left = {}
    for compensate in ("none", "out_proj"):
        model = deep("granitemoehybrid")
        dense = logits(model, ready[0]["input_ids"]).log_softmax(-1)
        remove_layers(model, ready, keep=3, saliency="random", compensate=compensate)
        small = logits(model, ready[0]["input_ids"]).log_softmax(-1)
        left[compensate] = float(F.kl_div(small, dense, log_target=True, reduction="batchmean"))
    assert left["out_proj"] < 0.9 * left["none"]


def without(removed, model, ready, **fields):
    """The result of taking these very layers out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerRemoval, "_choose", lambda self, *args: removed)
        keep = len(model.backbone.layers) - len(removed)
        return remove_layers(model, ready, keep=keep, **fields)


def behind_layer(model, index, ready):
    """(b, L, M) the stream behind a layer, of the first batch."""
    found = []
    hook = model.backbone.layers[index].register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        model(ready[0]["input_ids"])
    hook.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_steps_find_a_layer_that_another_can_be(family):
    """Layer 1 adds nothing and reads nearly as layer 2, which goes, does."""
    model = deep(family).cpu()
    with torch.no_grad():
        one, two = (dict(model.backbone.layers[i].named_parameters()) for i in (1, 2))
        for name, parameter in one.items():
            noise = 0.3 * two[name].std().nan_to_num() * torch.randn_like(parameter)
            parameter.copy_(two[name] + noise * ("in_proj" in name))
        for name in (n for n in one if "out_proj" in n):
            one[name].zero_()
            two[name].mul_(20)
    weights, ready = state(model), batches(4, 8, 32)
    wanted, left = behind_layer(model, 2, ready), {}
    for compensate in ("out_proj", ["out_proj", "reconstruct"]):
        small = deep(family).cpu()
        small.load_state_dict(weights)
        found = without((2,), small, ready, compensate=compensate, reconstruct_steps=150)
        assert ("backbone.layers.1" in found.reconstructed) == (compensate != "out_proj")
        error = (wanted - behind_layer(small, 1, ready)).square().mean(-1)
        left[str(compensate)] = float((error * token_weights(wanted)).mean())
    # weights of the Mamba-2 layout have further to go
    far = {"mamba": 0.2, "mamba2": 0.9}[family] * left["out_proj"]
    assert left["['out_proj', 'reconstruct']"] < far


@pytest.mark.parametrize("rate", [30.0, 1e6])
def test_steps_that_do_not_help_are_taken_back(rate, monkeypatch):
    ready = batches(2, 4, 24)
    plain, tried = deep("mamba").cpu(), deep("mamba").cpu()
    without((1,), plain, ready, compensate="out_proj")
    monkeypatch.setattr(layer_fits, "_LEARNING_RATE", rate)
    found = without((1,), tried, ready, reconstruct_steps=3)
    assert found.reconstructed == ()
    expected = state(plain)
    assert all(torch.equal(value, expected[name]) for name, value in state(tried).items())


def test_steps_are_the_same_every_time_and_never_raise_the_error():
    ready, dense, found = batches(3, 8, 24), deep("mamba").cpu(), []
    with torch.no_grad():
        dense.backbone.layers[2].mixer.out_proj.weight.mul_(20)
    weights, runs = state(dense), [deep("mamba").cpu() for _ in range(3)]
    both = {"compensate": ["out_proj", "reconstruct"], "reconstruct_steps": 60}
    for model, fields in zip(runs, ({"compensate": "out_proj"}, both, both), strict=True):
        model.load_state_dict(weights)
        found.append(without((3,), model, ready, **fields))
    expected = state(runs[1])
    assert all(torch.equal(value, expected[name]) for name, value in state(runs[2]).items())
    assert found[1].reconstructed == found[2].reconstructed == ("backbone.layers.2",)
    assert found[1].layers[0].error_left < found[0].layers[0].error_left


# -- the choice -----------------------------------------------------------------------------


def test_all_sets_are_tried_where_there_are_few():
    model = deep("mamba").cpu()
    ready = batches(2, 4, 24)
    found = remove_layers(deep("mamba").cpu(), ready, keep=2, compensate="out_proj")
    assert found.sets_tried == 6
    losses = {}
    for removed in combinations(range(4), 2):
        losses[removed] = _study(model, ready).loss(removed)
    assert tuple(found.layers[0].removed) == min(losses, key=losses.get)
    assert found.divergence["left"] == pytest.approx(min(losses.values()), rel=1e-4)


def _study(model, ready):
    from sparsessm_plugin.methods.layer_removal import _Study

    passes = LayerPasses(get_model_adapter(model), ready, torch.device("cpu"))
    with torch.no_grad():
        study = _Study(passes, fits=True, by_label=False)
    study.loss = torch.no_grad()(study.loss)
    return study


def test_what_is_shared_between_sets_changes_no_loss():
    model = deep("mamba", num_hidden_layers=5).cpu()
    ready = batches(2, 4, 16)
    one = _study(model, ready)
    before = state(model)
    for removed in [(2,), (2, 4), (2, 3), (1, 3), (1,), (0, 4), (3,), (3, 4)]:
        assert one.loss(removed) == _study(model, ready).loss(removed), removed
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def shedder(model, ready, count):
    """Mamba-Shedder's order: the block whose absence costs the least loss, again and again."""
    gone = []
    for _ in range(count):
        losses = {}
        for index in set(range(len(model.backbone.layers))) - set(gone):
            layers = model.backbone.layers
            model.backbone.layers = torch.nn.ModuleList(
                layer for i, layer in enumerate(layers) if i not in (*gone, index)
            )
            with torch.no_grad():
                each = [
                    F.cross_entropy(model(b["input_ids"]).logits[:, :-1].mT, b["input_ids"][:, 1:])
                    for b in ready
                ]
            losses[index] = float(torch.stack(each).mean())
            model.backbone.layers = layers
        gone.append(min(losses, key=losses.get))
    return sorted(gone)


def test_perplexity_is_mamba_shedders_order():
    def model():
        return deep("mamba", num_hidden_layers=5).cpu()

    found = remove_layers(model(), READY, keep=3, saliency="perplexity", compensate="none")
    assert found.layers[0].removed == shedder(model(), READY, 2)


def test_block_influence():
    torch.manual_seed(0)
    before, behind = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.rand(2, 5) > 0.3
    influence = BlockInfluence(torch.device("cpu"))
    influence.add(before, behind, mask)
    cosine = (before * behind).sum(-1) / (before.norm(dim=-1) * behind.norm(dim=-1))
    assert influence.mean == pytest.approx(float((1 - cosine)[mask].mean()), rel=1e-5)
    model = deep("mamba", num_hidden_layers=5)
    with torch.no_grad():  # two layers that do next to nothing
        for index in (1, 3):
            model.backbone.layers[index].mixer.out_proj.weight.mul_(1e-3)
            model.backbone.layers[index].mixer.out_proj.bias.mul_(1e-3)
    found = remove_layers(model, READY, keep=3, saliency="block_influence", compensate="none")
    assert found.layers[0].removed == [1, 3]


def test_last_and_random():
    def removed(**fields):
        model = deep("mamba", num_hidden_layers=6)
        return remove_layers(model, keep=3, compensate="none", **fields).layers[0].removed

    assert removed(saliency="last") == [3, 4, 5]
    drawn = [removed(saliency="random", seed=seed) for seed in range(4)]
    assert drawn[0] == removed(saliency="random", seed=0)
    assert len({tuple(each) for each in drawn}) > 1


def test_the_search_finds_the_best_set(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def table(length, size, interaction):
        alone = torch.rand(length, generator=generator)
        pairs = interaction * torch.randn(length, length, generator=generator).abs()
        loss = {
            s: float(alone[list(s)].sum() + sum(pairs[a, b] for a, b in combinations(s, 2)))
            for count in range(1, size + 1)
            for s in combinations(range(length), count)
        }
        return loss, {s: v for s, v in loss.items() if len(s) == size}

    def always(found):
        return True

    loss, final = table(8, 2, 1.0)
    assert search_sets(8, 2, loss.__getitem__, always, 2) == min(final, key=final.get)
    loss, final = table(10, 4, 0.0)  # no interaction: growing is exact
    assert search_sets(10, 4, loss.__getitem__, always, 1) == min(final, key=final.get)
    ranks = []
    for _ in range(10):
        loss, final = table(10, 4, 0.1)
        asked = []
        best = search_sets(10, 4, lambda s, t=loss, a=asked: a.append(s) or t[s], always, 6)
        ranks.append(sorted(final.values()).index(final[best]))
        assert len(asked) == len(set(asked)) < 70  # of 210
    assert sum(rank < 3 for rank in ranks) >= 8  # among the three best

    def odd(found):
        return sum(found) % 7 == 1

    assert odd(search_sets(10, 4, loss.__getitem__, odd, 1))
    with pytest.raises(ValueError, match="no set is allowed"):
        search_sets(10, 4, loss.__getitem__, lambda s: False, 1)
    monkeypatch.setattr(sets, "_LOOKED_AT", 400)
    # every fourth of 32, or eight neighbours, come before any other of ten million sets
    assert (0, 4, 8, 12, 16, 20, 24, 28) in list(allowed_sets(32, 8, always))
    assert (8, 9, 10, 11, 12, 13, 14, 15) in list(allowed_sets(32, 8, always))


# -- saved and loaded -----------------------------------------------------------------------

READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
results = {}
for family in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{family}"
    expected = torch.load(f"{folder}/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(expected["ids"].device)
    with torch.no_grad():
        far = model(expected["ids"], use_cache=False).logits - expected["logits"]
    same = float(far.abs().max()) <= expected["tolerance"]
    tokens = [
        model.generate(expected["ids"][:1], max_new_tokens=4, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    same &= torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], expected["tokens"])
    results[family] = [same, len(model.base_model.layers)]
assert "sparsessm_plugin.modifiers" not in sys.modules
print(json.dumps(results))
"""
EVERY = (*FAMILIES, *DELTA)


def removal(keep):
    return LayerRemovalModifier(keep=keep, search_width=2, reconstruct_steps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a fresh process says of each family's smaller model, and the reports."""
    root, reports = tmp_path_factory.mktemp("layers"), {}
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for family in EVERY:
        model, modifier = deep(family), removal(DEEP[family][1])
        run(model, modifier, batches(1, 4, 12))
        model = model.to(DEVICE)
        with torch.no_grad():
            tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
        model.save_pretrained(root / family)
        expected = {"ids": ids, "logits": logits(model, ids), "tokens": tokens}
        # experts that LLM Compressor has taken apart round otherwise than packed ones
        apart = any(".experts" in name for name, _ in model.named_parameters())
        expected["tolerance"] = may_be_off(expected["logits"], 1e-6 if apart else 0.0)
        torch.save(expected, root / family / "expected.pt")
        indices = {m.layer_idx: n for n, m in model.named_modules() if hasattr(m, "layer_idx")}
        reports[family] = modifier.report(), sorted(i for i in indices if i is not None and i >= 0)
    found = stock_process(READER, root, *EVERY)
    return found, reports


@pytest.mark.parametrize("family", EVERY)
def test_stock_transformers_loads_and_generates(family, saved):
    assert saved[0][family] == [True, DEEP[family][1]]


@pytest.mark.parametrize("family", EVERY)
def test_reports_and_indices(family, saved):
    report, indices = saved[1][family]
    layer = report["layers"][0]
    assert layer["axis"] == "layers"
    assert layer["before"] - len(layer["removed"]) == layer["after"] == DEEP[family][1]
    assert report["settings"]["saliency"] == "loss_after_fit"
    assert report["sets_tried"] > 0
    assert set(indices) <= set(range(DEEP[family][1]))
    # norms stand behind the layers, or a gate behind the expert that sees every token
    assert bool(report["fitted"]) == (family not in ("olmo_hybrid", "qwen3_5_moe", "qwen3_next"))
    assert report["total"]["pruned"] == len(layer["removed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_norms_come_back_in_the_layers_that_they_are_of(family, dtype):
    """LLM Compressor exchanges them, and a layer of attention now stands where a mixer stood."""
    removed = []
    for seed in range(4):
        model = tiny_model(family, num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, LINEAR])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(0, 0.1)
        model = model.to(dtype)
        classes = {type(m).__name__ for m in model.modules()}
        dense = state(model)
        modifier = LayerRemovalModifier(keep=3, saliency="random", seed=seed, compensate="none")
        run(model, modifier, batches(1, 2, 8))
        (gone,) = modifier.report()["layers"][0]["removed"]
        removed.append(gone)
        stay = [index for index in range(4) if index != gone]
        new = {type(m).__name__ for m in model.modules()} - classes  # experts come apart
        assert not [name for name in new if "Norm" in name]
        for name, value in state(model).items():
            before, dot, after = name.partition(".layers.")
            index, _, rest = after.partition(".")
            if "norm" in name:
                of_dense = f"{before}.layers.{stay[int(index)]}.{rest}" if dot else name
                assert torch.equal(value, dense[of_dense]), name
    assert 0 in removed


def test_every_writer_is_found():
    """By family, the kinds of layers whose last linear layer adds to the stream."""
    for family, ends in {
        "mamba": {"out_proj"},
        "mamba2": {"out_proj"},
        "nemotron_h": {"out_proj", "o_proj", "down_proj"},
        "bamba": {"down_proj"},
        "falcon_h1": {"down_proj"},
        "granitemoehybrid": {"output_linear"},
        "zamba2": {"out_proj"},
        "qwen3_5": {"down_proj"},
    }.items():
        model = deep(family).cpu()
        adapter = get_model_adapter(model)
        with torch.no_grad():
            passes = LayerPasses(adapter, READY[:1], torch.device("cpu"))
            stream, found = passes.embedded(0), set()
            for index in range(len(passes.layers)):
                writer = passes.writer(index, stream)
                found.add(writer.name.rpartition(".")[2])
                stream = passes.behind(index, 0, stream)
                if family == "granitemoehybrid":
                    assert writer.scale == pytest.approx(0.7, rel=1e-4)
            expected = model(READY[0]["input_ids"], use_cache=False).logits
            torch.testing.assert_close(passes.logits(0, stream), expected)
        assert found == ends, family


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_fewer_layers_export_to_mamba_ssm(family):
    model = deep(family, **({} if family == "mamba" else {"n_groups": 1}))
    remove_layers(model, batches(1, 4, 12), keep=3, saliency="random")
    assert mamba_ssm_config(model)["n_layer"] == 3
    weights = mamba_ssm_state_dict(model)
    layers = {name.split(".")[2] for name in weights if ".layers." in name}
    assert layers == {"0", "1", "2"}
    for index, layer in enumerate(model.backbone.layers):
        name = f"backbone.layers.{index}.mixer.out_proj.weight"
        assert torch.equal(weights[name], layer.mixer.out_proj.weight)


# -- what is refused ------------------------------------------------------------------------


def test_layers_that_no_config_can_say_are_left_out_or_refused():
    # Jamba's attention stands in 1 and 4 of 6: a period and an offset say what remains
    model = deep("jamba")
    remove_layers(model, keep=4, saliency="last", compensate="none")
    kinds = [layer.has("attention") for layer in get_model_adapter(model).layers]
    config = model.config
    assert kinds == [i % config.attn_layer_period == config.attn_layer_offset for i in range(4)]
    # in Zamba two layers must share the block
    zamba = deep("zamba")
    remove_layers(zamba, keep=2, saliency="last", compensate="none")
    assert all(layer.kind == "hybrid" for layer in get_model_adapter(zamba).layers)
    with pytest.raises(SparseSSMError, match=r"no config of zamba can say 1 of the 4 layers"):
        remove_layers(deep("zamba"), keep=1, saliency="last", compensate="none")
    # in Bamba one layer with attention must stay
    bamba = deep("bamba")
    remove_layers(bamba, keep=1, saliency="random", compensate="none")
    assert get_model_adapter(bamba).layers[0].has("attention")


def test_bad_fields():
    for fields, said in (
        ({"keep": 0}, "keep"),
        ({"sparsity": 0.5, "saliency": "first"}, "saliency"),
        ({"sparsity": 0.5, "compensate": ["D"]}, "compensate"),
        ({"sparsity": 0.5, "search_width": 0}, "search_width"),
        ({"sparsity": 0.5, "reconstruct_steps": 0}, "reconstruct_steps"),
        ({"sparsity": 0.5, "search_tokens": 0}, "search_tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            LayerRemovalModifier(**fields)
        with pytest.raises(SparseSSMError, match=said) as error:
            remove_layers(deep("mamba"), READY, **fields)
        assert "\n" not in str(error.value)
    with pytest.raises(SparseSSMError, match="removes none of the 4 layers"):
        remove_layers(deep("mamba"), READY, keep=4)
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        remove_layers(deep("mamba"), keep=2)


def test_values_that_are_no_numbers_are_refused_before_any_change():
    model = deep("mamba")
    with torch.no_grad():
        model.backbone.layers[2].mixer.in_proj.weight.mul_(1e30)
    before = state(model)
    with pytest.raises(SparseSSMError, match="NaN or infinite"):
        remove_layers(model, READY, keep=2)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_nothing_left_to_fit_is_said():
    """Of a hybrid the layers with mixers may be those that go."""
    model = tiny_model("nemotron_h")
    message = "distill_weights = mixers leaves nothing to fit: the smaller model has no such"
    modifier = LayerRemovalModifier(keep=1, distill_steps=1, distill_weights="mixers")
    with pytest.raises(SparseSSMError, match=message):
        run(model, modifier)
    assert not list(iter_mixers(model))


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_change_what_passes_do_so_once(before):
    model = deep("mamba").cpu()
    for layer in model.backbone.layers:
        if before:
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 0.5, *args[1:]))
        else:
            layer.register_forward_hook(lambda module, args, output: output + 0.5)
    passes = LayerPasses(get_model_adapter(model), READY, torch.device("cpu"))
    stream = passes.embedded(0)
    for index in range(len(passes.layers)):
        stream = passes.behind(index, 0, stream)
    expected = model(**READY[0]).logits
    torch.testing.assert_close(passes.logits(0, stream), expected)
