"""Removal of hidden size: oracles, every family, and what is refused."""

import json

import pytest
import torch
from conftest import (
    DELTA,
    EXPERTS,
    FAMILIES,
    MAMBA2,
    batches,
    check_reload_all,
    logits_of,
    relative,
    run,
    save_with_logits,
    state,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsessm_plugin as plugin
from sparsessm_plugin.checkpoints.export import export_mamba_ssm
from sparsessm_plugin.criteria.hidden import Reading, loss_of_basis, magnitude, norm_scale
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers, get_model_adapter, get_tensor
from sparsessm_plugin.fitting import FitSettings, Prepared
from sparsessm_plugin.fitting.axes import AXES
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import parse_targets
from sparsessm_plugin.methods import remove_width
from sparsessm_plugin.methods.channels import reorder
from sparsessm_plugin.methods.channels_along import choose_along
from sparsessm_plugin.methods.run import run as directly
from sparsessm_plugin.methods.stream import StreamSums, reading_points
from sparsessm_plugin.methods.width_removal import WidthRemoval, WidthSettings
from sparsessm_plugin.refit.width import expand, lift, narrow_scale
from sparsessm_plugin.selection.subspaces import best_entries, best_subspace, leading_subspace

READY = batches(2, 2, 16, padded=True)
HYBRIDS = ("jamba", "zamba", "bamba", "zamba2", "granitemoehybrid", "falcon_h1", "nemotron_h")
TIED = ("mamba2", "bamba", "zamba", "zamba2", "granitemoehybrid", "jamba")  # channels and size
TIED_HEADS = tuple(family for family in TIED if family in MAMBA2)


def spanned(model, basis):
    """Let a model's stream stay in a subspace: P W for all that writes it."""
    adapter = get_model_adapter(model)
    projection = basis @ torch.linalg.inv(basis.T @ basis) @ basis.T
    done = set()
    with torch.no_grad():
        for part in adapter.parts:
            for where in part.writes():
                tensor = get_tensor(model, where.tensor)
                if id(tensor) in done and part.kind != "linear":
                    continue
                done.add(id(tensor))
                moved = tensor.movedim(where.dim, -1)
                moved.copy_((moved.double() @ projection).float())
    return adapter


def directions(size=32, keep=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, keep, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    ("family", "fit"),
    [*((family, None) for family in (*FAMILIES, "qwen3_5", "qwen3_next")), ("zamba", "none")],
)
def test_a_stream_of_few_directions_loses_nothing(family, fit):
    model = tiny_model(family, tie_word_embeddings=False)
    spanned(model, directions(keep=16))
    dense = logits_of(model, READY)
    result = remove_width(model, READY, keep=16, compensate=fit, saliency="output_energy")
    assert model.config.hidden_size == model.get_input_embeddings().weight.shape[1] == 16
    assert relative(logits_of(model, READY), dense) < 5e-3
    assert result.layers[0].error_left < 1e-5


@pytest.mark.parametrize("family", ["mamba", "granitemoehybrid", "falcon_h1"])
def test_a_tied_head_stays_tied(family):
    model = tiny_model(family, tie_word_embeddings=True)
    adapter = spanned(model, directions(keep=16))
    norm = [part for part in adapter.parts if part.kind == "norm"][-1].module
    with torch.no_grad():
        norm.weight.fill_(1.3)
    dense = logits_of(model, READY)
    remove_width(model, READY, keep=16)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert head.in_features == 16
    assert relative(logits_of(model, READY), dense) < 5e-3


@pytest.mark.parametrize("tied", [False, True])
def test_entries_that_are_zero_cost_nothing(tied):
    model, gone = tiny_model("mamba", tie_word_embeddings=tied), [3, 9, 20, 31]
    kept = [i for i in range(32) if i not in gone]
    spanned(model, torch.eye(32, dtype=torch.float64)[:, kept])
    dense = logits_of(model, READY)
    result = remove_width(model, READY, keep=28, rotate=False)
    assert result.layers[0].removed == gone
    assert relative(logits_of(model, READY), dense) < 5e-3


@pytest.mark.parametrize(
    ("family", "way"), [*((f, "along") for f in TIED), *((f, "heads") for f in TIED_HEADS)]
)
def test_channels_go_along_where_the_loader_ties_them(family, way):
    model = tiny_model(family)
    dense = logits_of(model, READY)
    remove_width(model, READY, keep=16, channels=way)
    assert all(mixer.sizes.intermediate_size == 32 for mixer in find_mixers(model))
    if family in TIED_HEADS:
        assert find_mixers(model)[0].sizes.num_heads == (4 if way == "heads" else 8)
    assert relative(logits_of(model, READY), dense) < 1.5
    with pytest.raises(SparseSSMError, match="does not tie the channels of the mixers"):
        remove_width(tiny_model("mamba"), READY, keep=16, channels="along")


@pytest.mark.parametrize("family", TIED_HEADS)
def test_a_head_keeps_what_is_its_own(family):
    """Only channels go: A_log, D and dt_bias stay, and so do rows of B, C and dt."""
    model = tiny_model(family)
    before = [state(mixer.mixer) for mixer in find_mixers(model)]
    remove_width(model, READY, keep=24)
    for mixer, old in zip(find_mixers(model), before, strict=True):
        assert (mixer.sizes.num_heads, mixer.sizes.head_dim) == (8, 6)
        new = state(mixer.mixer)
        assert all(torch.equal(new[name], old[name]) for name in ("A_log", "D", "dt_bias"))
        assert torch.equal(new["conv1d.weight"][48:], old["conv1d.weight"][64:])  # of B and C
        assert new["in_proj.weight"].shape == (2 * 48 + 2 * 2 * 8 + 8, 24)
    config = model.config
    fields = {mixer.num_heads_field: 8, mixer.head_dim_field: 6, mixer.expand_field: 2}
    assert {name: getattr(config, name) for name in fields} == fields


def test_channels_stay_where_their_number_is_a_multiple():
    for keep, channels in ((16, 64), (24, 48)):
        model = tiny_model("mamba2")
        remove_width(model, READY, keep=keep)
        assert find_mixers(model)[0].sizes.intermediate_size == channels
        assert model.config.expand * model.config.hidden_size == channels


def closed_channels(model, each, seed=0):
    """Let some channels of every head be nothing, of each head others."""
    generator = torch.Generator().manual_seed(seed)
    for mixer in find_mixers(model):
        H, P = mixer.sizes.num_heads, mixer.sizes.head_dim
        own = [P * h + torch.randperm(P, generator=generator)[:each] for h in range(H)]
        with torch.no_grad():
            mixer.mixer.out_proj.weight[:, torch.cat(own)] = 0
            for tensor in (mixer.mixer.in_proj.weight, mixer.mixer.in_proj.bias):
                if tensor is not None:  # the gate, so that the norm does not see them either
                    tensor[torch.cat(own)] = 0


@pytest.mark.parametrize("family", TIED_HEADS)
def test_each_head_loses_the_channels_that_it_does_not_need(family):
    model = tiny_model(family, tie_word_embeddings=False)
    spanned(model, directions(keep=24))
    closed_channels(model, 2)
    dense = logits_of(model, READY)
    remove_width(model, READY, keep=24, channels="head_dim")
    assert relative(logits_of(model, READY), dense) < 5e-3


@pytest.mark.parametrize("family", MAMBA2)
def test_channels_may_change_places_within_their_heads(family):
    model = tiny_model(family)
    dense, generator = logits_of(model, READY), torch.Generator().manual_seed(0)
    for mixer in find_mixers(model):
        H, P = mixer.sizes.num_heads, mixer.sizes.head_dim
        order = [P * h + torch.randperm(P, generator=generator) for h in range(H)]
        before = mixer.mixer.conv1d.weight.detach().clone()
        reorder(mixer, torch.cat(order).tolist())
        assert not torch.equal(mixer.mixer.conv1d.weight, before)
    assert relative(logits_of(model, READY), dense) < 1e-5


SHAPE = {"hidden_size": 512, "num_heads": 16, "head_dim": 64, "n_groups": 1, "state_size": 128}


def chosen(keep, wanted=None, runtimes=(), **changes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("mamba2", **{**SHAPE, **changes}))
    return choose_along(get_model_adapter(model), keep, wanted, runtimes).kept


@pytest.mark.parametrize(
    ("keep", "wanted", "runtimes", "found"),
    [
        (256, None, (), {}),
        (256, "along", (), {"head_dim": 32}),
        (448, None, (), {"head_dim": 56}),
        (448, "heads", (), {"heads": 14}),
        (448, None, ("vllm", "mamba-ssm", "mlx-lm"), {"head_dim": 56}),
        # its scan takes heads of multiples of 16 channels
        (448, None, ("llama.cpp-cuda",), {"heads": 14}),
        (384, None, ("llama.cpp-cuda",), {"head_dim": 48}),
        # conv1d suits neither way, and shorter heads not its scan
        (480, None, ("llama.cpp-cuda",), {"heads": 15}),
    ],
)
def test_the_way_is_one_that_runtimes_take(keep, wanted, runtimes, found):
    assert chosen(keep, wanted, runtimes) == found


def test_the_way_is_one_that_kernels_take():
    # 44 heads would make in_proj a width that 8 does not divide
    assert chosen(704, hidden_size=1024, num_heads=64, head_dim=32) == {"head_dim": 22}
    # no 12 equal heads make 2 * 260 channels
    only = {"hidden_size": 384, "num_heads": 12, "state_size": 64}
    assert chosen(352, **only) == {"heads": 11}
    assert chosen(354, **only) == {"head_dim": 59}


def test_a_runtime_that_wants_twice_the_channels_gets_them():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("bamba"))
    adapter = get_model_adapter(model)
    assert choose_along(adapter, 16).kept == {}
    assert choose_along(adapter, 16, runtimes=("llama.cpp",)).axis == "head_dim"


def test_heads_in_groups_are_planned_for_a_runtime():
    model = tiny_model("zamba2")
    remove_width(model, READY, keep=16, channels="heads", runtime="vllm")
    assert find_mixers(model)[0].sizes.num_heads == 4


def test_fit_makes_the_sizes_between():
    """A removal by the fields of each size has the parameters that were counted for it."""
    model = tiny_model("granitemoehybrid", hidden_size=64, mamba_d_head=16)
    settings = FitSettings(parse_targets("parameters=0.6"), axes=("hidden",))
    shapes = Prepared(Shapes(model), settings, torch.device("cpu")).space.shapes
    for size, way in ((56, "head_dim"), (48, "head_dim"), (32, "head_dim")):
        fields = shapes.way(AXES["hidden"], size)
        assert fields == {"channels": way}
        small = tiny_model("granitemoehybrid", hidden_size=64, mamba_d_head=16)
        remove_width(small, READY, keep=size, **fields)
        planned = shapes.model({"hidden": size})
        assert {n: p.shape for n, p in small.named_parameters()} == {
            n: p.shape for n, p in planned.named_parameters()
        }


@pytest.mark.parametrize("family", TIED)
def test_a_narrower_stream_never_costs_more(family):
    """Also where all channels could stay beside half of it."""
    changes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16} if family == "mamba2" else {}
    settings = FitSettings(parse_targets("parameters=0.6"), axes=("hidden",))
    prepared = Prepared(Shapes(tiny_model(family, **changes)), settings, torch.device("cpu"))
    (cost,) = prepared.costs()
    assert len(cost) > 3
    assert list(cost) == sorted(cost, reverse=True)


def test_stock_transformers_loads_shorter_heads(tmp_path):
    """With grouped B and C, attention, MLP units and experts, through either way of saving."""
    for family in TIED_HEADS:
        model = tiny_model(family, tie_word_embeddings=family == "granitemoehybrid")
        modifiers = [plugin.WidthRemovalModifier(keep=24, channels="head_dim")]
        if family in HYBRIDS:
            modifiers.append(plugin.MLPRemovalModifier(sparsity=0.5))
            modifiers.append(plugin.AttentionRemovalModifier(sparsity=0.5))
        if family in ("mamba2", "granitemoehybrid"):  # through LLM Compressor's saving, too
            run(model, modifiers, READY)
        else:
            for modifier in modifiers:
                directly(modifier.new_method(), model, READY)
        assert find_mixers(model)[0].sizes.head_dim == 6
        save_with_logits(model, tmp_path / family)
    check_reload_all(tmp_path)


def test_stock_transformers_loads_every_family(tmp_path):
    """Narrow streams, fewer MLP units and kv groups, all in one model."""
    for family in FAMILIES:
        model = tiny_model(family, tie_word_embeddings=family in ("mamba2", "granitemoehybrid"))
        channels = "along" if family in TIED else None
        modifiers = [plugin.WidthRemovalModifier(keep=16, channels=channels)]
        if family in HYBRIDS:
            modifiers.append(plugin.MLPRemovalModifier(sparsity=0.5))
            modifiers.append(plugin.AttentionRemovalModifier(sparsity=0.5))
        if family in ("mamba", "granitemoehybrid"):  # through LLM Compressor's saving, too
            run(model, modifiers, READY)
        else:
            for modifier in modifiers:
                directly(modifier.new_method(), model, READY)
        save_with_logits(model, tmp_path / family)
    check_reload_all(tmp_path)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_read_and_write_the_narrow_stream(family):
    model = tiny_model(family, tie_word_embeddings=False, **EXPERTS[family])
    spanned(model, directions(keep=16))
    dense = logits_of(model, READY)
    remove_width(model, READY, keep=16)
    assert relative(logits_of(model, READY), dense) < 5e-3


def test_mamba_ssm_gets_shorter_heads(tmp_path):
    model = tiny_model("mamba2", n_groups=1)
    run(model, plugin.WidthRemovalModifier(keep=24), READY)
    export_mamba_ssm(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    made = {name: config["ssm_cfg"][name] for name in ("expand", "headdim")}
    assert (config["d_model"], made) == (24, {"expand": 2, "headdim": 6})


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_mamba_ssm_gets_the_narrow_model(family, tmp_path):
    model = tiny_model(family, **({"n_groups": 1} if family == "mamba2" else {}))
    run(model, plugin.WidthRemovalModifier(keep=16), READY)
    export_mamba_ssm(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["d_model"], config["ssm_cfg"]["expand"]) == (16, 4)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["backbone.layers.0.mixer.in_proj.weight"].shape[1] == 16
    assert tensors["backbone.norm_f.weight"].shape == (16,)


def test_distilled_with_all_weights_towards_the_wide_model():
    model = tiny_model("granitemoehybrid", tie_word_embeddings=True)
    fields = {"keep": 16, "channels": "along", "distill_steps": 6, "distill_learning_rate": 3e-3}
    result = remove_width(model, READY, **fields)
    assert not result.distillation.diverged
    assert result.distillation.divergence_after < result.distillation.divergence_before
    undistilled = tiny_model("granitemoehybrid", tie_word_embeddings=True)
    remove_width(undistilled, READY, keep=16, channels="along")
    changed = [n for n, p in state(model).items() if not torch.equal(p, state(undistilled)[n])]
    assert "model.embed_tokens.weight" in changed
    assert any("shared_mlp" in name for name in changed)


# -- the mathematics ----------------------------------------------------------------------------


def sample(tokens=400, size=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    n = torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixing
    g = torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixing.T
    return n, Reading(n.T @ n / tokens, g.T @ g / tokens)


def test_the_lift_is_least_squares():
    n, reading = sample()
    basis = directions(10, 6) @ torch.diag(torch.arange(1.0, 7.0).double())
    found = lift(reading.covariance, basis, 0.0)
    expected = torch.linalg.lstsq(n @ basis, n).solution.T
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(basis.T @ expand(basis), torch.eye(6, dtype=torch.float64))
    stiff = lift(reading.covariance, basis, 1e9)
    assert torch.allclose(stiff, expand(basis), atol=1e-6)
    narrow = (n @ basis).square().mean().sqrt()
    assert narrow_scale(reading.covariance, basis) == pytest.approx(float(narrow))


@pytest.mark.parametrize("fitted", [True, False])
def test_the_loss_is_the_metrics_mean_error(fitted):
    n, reading = sample()
    basis = directions(10, 6)
    reading = Reading(reading.covariance, reading.metric, fitted)
    B = torch.linalg.lstsq(n @ basis, n).solution.T if fitted else basis
    error = n - n @ basis @ B.T
    expected = ((error @ reading.metric) * error).sum(1).mean()
    assert float(loss_of_basis(basis, [reading])) == pytest.approx(float(expected), rel=1e-4)
    bent = basis @ torch.triu(torch.ones(6, 6, dtype=torch.float64))
    assert float(loss_of_basis(bent, [reading])) == pytest.approx(float(expected), rel=1e-4)


def test_the_subspace_is_better_than_any_entries():
    readings = [sample(seed=i)[1] for i in range(3)]
    start = leading_subspace([r.covariance @ r.metric @ r.covariance for r in readings], 6)
    found = best_subspace(lambda basis: loss_of_basis(basis, readings), start, 30)
    assert torch.allclose(found.T @ found, torch.eye(6, dtype=torch.float64), atol=1e-8)
    loss = float(loss_of_basis(found, readings))
    assert loss < float(loss_of_basis(start, readings))
    terms = [(r.covariance, r.metric) for r in readings]
    kept = best_entries(terms, torch.zeros(10, 10, dtype=torch.float64), 6)
    assert loss < float(loss_of_basis(torch.eye(10, dtype=torch.float64)[:, kept], readings))


@pytest.mark.parametrize("fitted", [True, False])
def test_entries_go_one_by_one_at_the_least_cost(fitted):
    _, reading = sample(size=7)
    reading = Reading(reading.covariance, reading.metric, fitted)
    unit, left = torch.eye(7, dtype=torch.float64), list(range(7))
    for keep in range(6, 2, -1):
        costs = {}
        for i in left:
            others = unit[:, [j for j in left if j != i]]
            costs[i] = float(loss_of_basis(others, [reading]))
        left.remove(min(costs, key=costs.get))
        terms = [(reading.covariance, reading.metric)] if fitted else []
        pairs = torch.zeros(7, 7).double() if fitted else reading.covariance * reading.metric
        assert best_entries(terms, pairs, keep).tolist() == left


def test_sums_are_those_of_the_tokens_without_padding():
    model = tiny_model("falcon_h1")
    adapter = get_model_adapter(model)
    points = reading_points(adapter, model.device)
    assert [len(point.readers) for point in points] == [2, 1, 2, 1, 1]
    sums = StreamSums(adapter, points)
    sums.add_covariances(READY)
    seen = []
    point = points[2]
    norm = point.part.module
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        for batch in READY:
            model(**batch)
    handle.remove()
    real = [o[b["attention_mask"].bool()] for o, b in zip(seen, READY, strict=True)]
    n = torch.cat(real).double() / norm.weight.detach().double()
    assert torch.allclose(sums.covariances[2], n.T @ n / len(n), rtol=1e-4, atol=1e-5)
    assert torch.allclose(norm_scale(norm), norm.weight.detach().double())


def test_metrics_are_gradients_of_the_loss():
    """A scaled down error in the stream costs what the metric of its norm says."""
    model = tiny_model("mamba", tie_word_embeddings=False)
    adapter = get_model_adapter(model)
    sums = StreamSums(adapter, reading_points(adapter, model.device))
    sums.add_metrics(READY, 10**6)
    norm = sums.points[-1].part.module
    found = {}

    def grab(module, args, output):
        found["out"] = output.detach().requires_grad_(True)
        return found["out"]

    handle, total, count = norm.register_forward_hook(grab), 0.0, 0
    for batch in READY:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        number = int((labels[:, 1:] != -100).sum())
        (model(**batch, labels=labels).loss * number).backward()
        g = found["out"].grad[batch["attention_mask"].bool()].double() * norm_scale(norm)
        total, count = total + g.T @ g, count + number
    handle.remove()
    assert torch.allclose(sums.metrics[-1], total / count, rtol=1e-3, atol=1e-8)


def test_fitted_and_rotated_is_better_than_not():
    model = tiny_model("mamba", hidden_size=48)
    dense, left = logits_of(model, READY), {}
    cases = {
        "default": {},
        "not fitted": {"compensate": "none"},
        "magnitude": {"saliency": "magnitude", "compensate": "none"},
    }
    for name, fields in cases.items():
        small = tiny_model("mamba", hidden_size=48)
        remove_width(small, READY, keep=32, **fields)
        left[name] = relative(logits_of(small, READY), dense)
    assert left["default"] < left["magnitude"]
    assert left["not fitted"] < left["magnitude"]


def test_magnitude_of_an_entry_is_that_of_all_its_weights():
    model = tiny_model("mamba", tie_word_embeddings=True)
    weights = [model.get_input_embeddings().weight]
    for mixer in find_mixers(model):
        weights += [mixer.mixer.in_proj.weight, mixer.mixer.out_proj.weight.T]
    expected = torch.cat([w.detach().double() for w in weights]).norm(dim=0)
    assert torch.allclose(magnitude(get_model_adapter(model)), expected)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {"keep": 32}, "keep = 32 removes none of the 32 entries of the hidden size"),
        ("mamba", {"keep": 0}, "keep"),
        ("mamba", {"sparsity": 0.9}, "sparsity = 0.9 removes all of the 32"),
        ("mamba", {"sparsity": 0.1}, "sparsity = 0.1 removes none of the 32"),
        ("mamba", {"keep": 20, "multiple_of": 8}, "keep = 20 is no multiple of 8"),
        ("mamba", {"keep": 16, "saliency": "best"}, "'best' is not known; known: last, magnitude"),
        ("mamba", {"keep": 16, "saliency": "last", "rotate": True}, "rotate has no meaning for"),
        ("mamba2", {"keep": 18}, "neither 8 equal heads nor whole heads of 8 in 2 groups; take a"),
        ("mamba2", {"keep": 20, "channels": "heads"}, "hidden_size=20 of Mamba2ForCausalLM goes"),
        ("jamba", {"keep": 16, "channels": "heads"}, "the mixers of jamba have no heads"),
        ("falcon_h1", {"keep": 16, "channels": "heads"}, "does not tie the channels"),
        ("mamba2", {"keep": 24, "channels": "kept"}, "no multiple of hidden_size=24"),
        ("mamba", {"keep": 16, "sparsity": 0.5}, "give either keep or sparsity, got both"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(family, fields, message):
    model = tiny_model(family)
    before = state(model)
    with pytest.raises(SparseSSMError) as caught:
        remove_width(model, READY, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_heads_alone_are_refused_with_a_pointer_to_width():
    with pytest.raises(SparseSSMError, match="hidden size along with WidthRemovalModifier"):
        run(tiny_model("mamba2"), plugin.ChannelRemovalModifier(axis="heads", keep=6), READY)


def test_norms_behind_what_writes_the_stream_are_refused():
    model = tiny_model("olmo_hybrid")
    before = state(model)
    with pytest.raises(SparseSSMError, match="OlmoHybridForCausalLM read the stream as it is"):
        remove_width(model, READY, keep=16)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize("family", FAMILIES + DELTA)
def test_which_families_read_norms_of_the_stream_alone_is_known_without_weights(family):
    model = tiny_model(family)
    adapter = get_model_adapter(model)
    if adapter.pre_norm:
        assert reading_points(adapter, model.device)
    else:
        with pytest.raises(SparseSSMError, match="hidden size of"):
            reading_points(adapter, model.device)


def test_what_a_later_removal_cannot_do_is_said_before_an_earlier_one_is_done():
    model = tiny_model("olmo_hybrid")
    before = state(model)
    recipe = [plugin.StateRemovalModifier(keep=4), plugin.WidthRemovalModifier(keep=16)]
    with pytest.raises(SparseSSMError, match="WidthRemovalModifier: some layers of OlmoHybrid"):
        run(model, recipe, READY)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_an_encoder_beside_the_language_model_is_refused():
    model = tiny_model("qwen3_5")
    adapter = get_model_adapter(model)
    adapter.base = torch.nn.Identity()
    method = WidthRemoval(WidthSettings(keep=16), "width")
    with pytest.raises(SparseSSMError, match="has an encoder beside its language model"):
        method.check_sizes(adapter)
