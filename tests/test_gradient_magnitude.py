"""GradientMagnitudeModifier through llmcompressor's own oneshot()."""

import json

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from conftest import (
    VOCAB,
    Loader,
    batches,
    check_reload,
    divergence_from,
    logits_beside,
    nothing_left_behind,
    run,
    same_logits,
    state,
    tiny_model,
)
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from sparsessm_plugin import (
    GradientMagnitudeModifier,
    SparseSSMModifier,
    fast_forward,
    find_mixers,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods import prune_by_gradient
from sparsessm_plugin.recipes import load_recipe, parse_recipe
from sparsessm_plugin.recipes.pruning import prune
from sparsessm_plugin.training import gradients as training

ONE_ROUND = {
    "sparsity": 0.5,
    "rounds": 1,
    "min_keep": 0.0,
    "saliency": "weight_x_gradient",
}


def modifier(**changes):
    return GradientMagnitudeModifier(**{**ONE_ROUND, **changes})


def directly(model, ready, **changes):
    """Without LLM Compressor."""
    return prune_by_gradient(model, ready, **{**ONE_ROUND, **changes})


def prunable(model):
    """Name -> tensor of what the modifier prunes by default, from the definition."""
    head = model.get_output_embeddings()
    mixers = [a.mixer for a in find_mixers(model)]
    found = {}
    for name, module in model.named_modules():
        if any(module is m for m in mixers):
            found |= {f"{name}.A_log": module.A_log, f"{name}.D": module.D}
            stacked = ("x_proj_weight", "dt_proj_weight")  # of Zamba
            found |= {f"{name}.{p}": getattr(module, p) for p in stacked if hasattr(module, p)}
        elif isinstance(module, (nn.Linear, nn.Conv1d)) and module is not head:
            found[f"{name}.weight"] = module.weight
    unique = {}
    for name, tensor in found.items():
        # with a GPU, oneshot() leaves weights that layers share as several equal parameters
        if not any(
            tensor is other or (bool(tensor.any()) and torch.equal(tensor, other))
            for other in unique.values()
        ):
            unique[name] = tensor
    return unique


def values(model):
    return {name: p.detach().cpu().clone() for name, p in prunable(model).items()}


def zeros(tensors):
    return sum(int((t == 0).sum()) for t in tensors.values())


def reference_gradients(model, ready, of_samples=False):
    """By autograd alone, over transformers' own labels; every position counts once."""
    sums, weight = dict.fromkeys(prunable(model), 0), 0
    for batch in ready:
        parts = [batch]
        if of_samples:
            parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
        for part in parts:
            labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
            count = int((labels[:, 1:] != -100).sum())
            model.zero_grad()
            with fast_forward(model, gradients=True):
                model(**part, labels=labels, use_cache=False).loss.backward()
            for name, p in prunable(model).items():
                grad = p.grad.double()
                sums[name] = sums[name] + count * (grad.square() if of_samples else grad)
            weight += count
    model.zero_grad()
    return {n: (s / weight).sqrt() if of_samples else (s / weight).abs() for n, s in sums.items()}


@pytest.mark.parametrize("kind", ["weight_x_gradient", "weight_x_gradient_norm", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "per_layer", "per_kind"])
def test_what_is_pruned_is_what_sorting_says(kind, scope):
    model, ready = tiny_model("mamba"), batches(2, padded=True)
    before = values(model)
    if kind == "magnitude":
        scores = {n: w.abs().double() for n, w in before.items()}
    else:
        of_samples = kind == "weight_x_gradient_norm"
        gradients = reference_gradients(model, ready, of_samples)
        scores = {n: w.abs().double() * gradients[n] for n, w in before.items()}
    run(model, modifier(saliency=kind, scope=scope), ready)
    groups = {"global": lambda n: "", "per_layer": lambda n: n}
    groups["per_kind"] = lambda n: n.removesuffix(".weight").rpartition(".")[2]
    after = values(model)
    for group in {groups[scope](n) for n in before}:
        names = [n for n in before if groups[scope](n) == group]
        pruned = torch.cat([(after[n] == 0).flatten() for n in names])
        ranked = torch.cat([scores[n].flatten() for n in names])
        assert int(pruned.sum()) == round(0.5 * pruned.numel())
        # all but what lies at the threshold within rounding
        assert ranked[pruned].max() <= ranked[~pruned].min() * (1 + 1e-3)
    for name, weight in after.items():
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    assert nothing_left_behind(model)


def test_every_family_is_pruned_tuned_and_saved(family, tmp_path):
    model = tiny_model(family)
    before = state(model)
    chosen = modifier(rounds=2, distill_steps=2, min_keep=0.05)
    run(model, chosen, batches(2, length=12, padded=True))
    after = values(model)  # single experts among them, which oneshot() takes apart
    entries = sum(w.numel() for w in after.values())
    assert zeros(after) == round(0.5 * entries)
    for weight in after.values():
        assert int((weight != 0).sum()) >= 0.05 * weight.numel()
    # tuning has moved what is kept, norms too, and never the embeddings
    changed = {k for k, v in state(model).items() if k in before and not v.equal(before[k])}
    assert any("norm" in name for name in changed)
    assert not any("embed" in name for name in changed)
    assert all(p.grad is None for p in model.parameters())
    assert nothing_left_behind(model)
    report = chosen.report()
    assert {layer["name"]: layer["pruned"] for layer in report["layers"]} == {
        name: int((w == 0).sum()) for name, w in after.items()
    }
    assert report["total"]["pruned"] == zeros(after)
    assert [r["pruned"] for r in report["rounds"]] == [
        round(0.5 * 7 / 8 * entries),
        round(0.5 * entries),
    ]
    model.save_pretrained(tmp_path)
    reloaded, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        batches(1)[0]["input_ids"],
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert same_logits(logits_beside(reloaded, expected, ids), expected)


def test_saved_checkpoint_reloads_in_a_process_without_the_package(tmp_path):
    model = tiny_model("mamba")
    run(model, modifier(distill_steps=1), batches(1, length=8))
    model.save_pretrained(tmp_path / "saved")
    check_reload(model, tmp_path / "saved")


def test_later_rounds_look_at_what_earlier_ones_have_left():
    ready = batches(2)
    masks = {}
    for rounds in (1, 4):
        model = tiny_model("mamba")
        run(model, modifier(rounds=rounds), ready)
        masks[rounds] = {n: w == 0 for n, w in values(model).items()}
        model = tiny_model("mamba")
        run(model, modifier(rounds=rounds, saliency="magnitude"), ready)
        masks[rounds, "magnitude"] = {n: w == 0 for n, w in values(model).items()}
    differing = sum(int((masks[1][n] != masks[4][n]).sum()) for n in masks[1])
    assert differing > 0
    assert zeros({n: ~m for n, m in masks[1].items()}) == zeros(
        {n: ~m for n, m in masks[4].items()}
    )
    for name, mask in masks[1, "magnitude"].items():  # there rounds change nothing
        assert torch.equal(mask, masks[4, "magnitude"][name])


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        model = tiny_model("mamba")
        run(model, modifier(rounds=2, distill_steps=2), batches(2))
        results.append(state(model))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_tuning_lowers_the_loss():
    ready, losses = batches(1, batch=4, length=16), []
    for steps in (0, 12):
        model = tiny_model("mamba")
        run(
            model,
            modifier(sparsity=0.6, rounds=2, distill_steps=steps, distill_learning_rate=1e-2),
            ready,
        )
        with torch.no_grad():
            loss = model(**ready[0], labels=ready[0]["input_ids"], use_cache=False).loss
        losses.append(float(loss))
    assert losses[1] < losses[0] - 0.3


@pytest.mark.parametrize("family", ["mamba", "jamba"])  # tied, and with a head of its own
def test_tuning_towards_the_dense_model_comes_closer_to_it(family):
    ready, found = batches(2, 2, 12, padded=True), []
    for fields in (
        {},
        {"distill_steps": 10, "distill_loss": "dense", "distill_learning_rate": 3e-3},
    ):
        dense, model = tiny_model(family), tiny_model(family)
        run(model, modifier(sparsity=0.6, rounds=2, **fields), ready)
        found.append(divergence_from(dense, model, ready))
        heads = [m.get_output_embeddings().weight.cpu() for m in (dense, model)]
        assert torch.equal(*heads)
        assert zeros(prunable(model)) == round(0.6 * sum(p.numel() for p in values(model).values()))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("distill_loss", ["labels", "dense"])
@pytest.mark.parametrize("steps", [1, 10])
def test_tuning_that_diverges_is_taken_back(distill_loss, steps):
    plain, model = tiny_model("mamba"), tiny_model("mamba")
    ready, fields = batches(2, 2, 12), {"sparsity": 0.5, "rounds": 2}
    run(plain, GradientMagnitudeModifier(**fields), ready)
    modifier = GradientMagnitudeModifier(
        **fields, distill_steps=steps, distill_loss=distill_loss, distill_learning_rate=1000.0
    )
    run(model, modifier, ready)
    assert [entry["diverged"] for entry in modifier.report()["rounds"]] == [True, True]
    assert modifier.report()["skipped_batches"] == []
    assert unchanged(model, state(plain))


def test_half_precision():
    """Sums and tuned copies are float32: steps far below bfloat16's resolution add up."""
    model = tiny_model("mamba").bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(
        model,
        modifier(rounds=1, distill_steps=25, distill_learning_rate=1e-4),
        batches(1, length=6),
    )
    after = prunable(model)
    assert zeros(after) == round(0.5 * sum(p.numel() for p in after.values()))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with disable_onloading():  # the parameters, and not what a GPU has for a moment
        tuned = {n: p.detach().cpu() for n, p in model.named_parameters()}
    # 25 steps of less than 1e-4: no single one moves a weight near 0.3, whose neighbours lie
    # 1e-3 apart
    moved = [
        (p != before[n]) & (p != 0) & (before[n].abs() > 0.26)
        for n, p in tuned.items()
        if "embed" not in n
    ]
    assert sum(int(m.sum()) for m in moved) > 0


def test_zeros_and_states_without_memory_of_an_earlier_stage_stay():
    text = """
s_stage:
  s_modifiers:
    SparseSSMModifier: {sparsity: 0.5, pruned_value: memoryless}
    GradientMagnitudeModifier: {sparsity: 0.5, rounds: 2, distill_steps: 2, calibration_batches: 1}
"""
    model = tiny_model("mamba")
    weight = find_mixers(model)[0].mixer.in_proj.weight
    with torch.no_grad():
        weight[:3] = 0
    from conftest import DEMO
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    result = prune(model, parse_recipe(text), Loader(batches(2)), tokenizer)
    assert not weight[:3].any()
    for adapter in find_mixers(model):
        A_log = adapter.A_log.detach()
        assert int((A_log > 37).sum()) == A_log.numel() // 2
    layer = next(
        r for r in result.reports[1]["layers"] if r["name"].endswith("0.mixer.in_proj.weight")
    )
    assert layer["zero_before"] == weight[:3].numel()


def test_tuning_leaves_zeros_outside_of_the_targets():
    model = tiny_model("mamba")
    run(model, SparseSSMModifier(sparsity=0.5))
    was_zero = [a.A_log.detach() == 0 for a in find_mixers(model)]
    run(model, modifier(targets="in_proj", distill_steps=2))
    for adapter, mask in zip(find_mixers(model), was_zero, strict=True):
        assert torch.equal(adapter.A_log.detach() == 0, mask)
        assert int((adapter.mixer.x_proj.weight == 0).sum()) == 0


def test_targets_and_ignore():
    names = lambda **fields: {w.parameter_name for w in modifier(**fields).matching_weights(model)}  # noqa: E731
    model = tiny_model("jamba")
    everything = names()
    assert everything == set(prunable(model))
    assert names(targets="A_log") == {n for n in everything if n.endswith("A_log")}
    assert names(targets="Linear") | names(targets=["conv1d", "A_log", "D"]) == everything
    mixer = find_mixers(model)[0].name
    assert names(targets=mixer) == {n for n in everything if n.startswith(mixer)}
    assert names(ignore=r"re:.*\.D$") == {n for n in everything if not n.endswith(".D")}
    assert names(targets="linear") == {n for n in everything if ".mamba." not in n}
    assert not any(word in n for n in everything for word in ("norm", "embed", "lm_head", "dt_b"))


TWICE = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"]}


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_gradients_of_shared_weights_are_those_of_all_uses(family):
    shared, apart = (tiny_model(family, **TWICE) for _ in range(2))
    names = [n for n, _ in shared.named_modules() if n.endswith("q_proj")]
    assert len(names) == 2
    second = apart.get_submodule(names[1])
    second.weight = nn.Parameter(second.weight.detach().clone())

    tensors = {"shared": shared.get_submodule(names[0]).weight}
    (found,) = training.mean_gradients(shared, batches(2), tensors)[0].values()
    for batch in batches(2):
        (apart(**batch, labels=batch["input_ids"]).loss / 2).backward()
    one, two = (apart.get_submodule(n).weight.grad for n in names)
    torch.testing.assert_close(found, (one + two).abs(), rtol=1e-3, atol=1e-7)
    assert not torch.allclose(found, one.abs(), rtol=1e-2)


def test_shared_weights_are_pruned_once():
    model = tiny_model("zamba2", **TWICE)
    run(model, modifier(), batches(1))
    after = prunable(model)
    assert zeros(after) == round(0.5 * sum(p.numel() for p in after.values()))


# -- other data than text --------------------------------------------------------------------


class Forecaster(nn.Module):
    """Says the next value of a series; no vocabulary, no config, no loss of its own."""

    def __init__(self):
        super().__init__()
        from transformers import MambaConfig, MambaModel

        torch.manual_seed(0)
        self.enter = nn.Linear(3, 16)
        config = MambaConfig(
            vocab_size=1, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
        )
        self.backbone = MambaModel(config)
        self.leave = nn.Linear(16, 3)

    def forward(self, series):
        return self.leave(self.backbone(inputs_embeds=self.enter(series)).last_hidden_state)


def squared_error(model, batch):
    return (model(batch["series"][:, :-1]) - batch["series"][:, 1:]).square().mean()


@pytest.mark.parametrize("kind", ["weight_x_gradient", "weight_x_gradient_norm"])
def test_a_loss_of_the_users(kind):
    model, generator = Forecaster(), torch.Generator().manual_seed(3)
    ready = [{"series": torch.randn(4, 9, 3, generator=generator)} for _ in range(2)]
    fields = {"saliency": kind, "loss_fn": squared_error, "rounds": 2, "distill_steps": 2}
    result = directly(model, ready, **fields, sparsity=0.7)
    weights = {layer.name: model.get_parameter(layer.name) for layer in result.layers}
    assert {"enter.weight", "leave.weight"} < set(weights)
    assert zeros(weights) == round(0.7 * sum(w.numel() for w in weights.values()))
    assert [layer.pruned for layer in result.layers] == [
        int((w == 0).sum()) for w in weights.values()
    ]
    json.dumps(result.to_dict())
    assert nothing_left_behind(model)
    assert "forward" not in vars(model)
    assert type(model._parameters) is dict


# -- mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{}", "sparsity: Field required"),
        ("{sparsity: 1.0}", "sparsity: must be between 0 and 1, both excluded, got 1.0"),
        ("{sparsity: 0.5, rounds: 0}", "rounds: Input should be greater than or equal to 1, got 0"),
        ("{sparsity: 0.5, schedule: cosine}", "'cubic' or 'linear', got 'cosine'"),
        ("{sparsity: 0.9, min_keep: 0.2}", "min_keep 0.2 of every tensor and sparsity 0.9"),
        ("{sparsity: 0.5, distill_steps: -1}", "distill_steps: Input should be greater"),
        (
            "{sparsity: 0.5, distill_learning_rate: 0}",
            "distill_learning_rate: Input should be greater than 0",
        ),
        (
            "{sparsity: 0.5, saliency: magnitude, gradient_power: 2}",
            "gradient_power has no meaning",
        ),
        ("{sparsity: 0.5, loss_fn: mean_squared}", "loss_fn: Input should be callable"),
        ("{sparsity: 0.5, targets: 're:('}", "no regular expression"),
        ("{sparsity: 0.5, distill_loss: dense}", "no meaning without distill_steps"),
    ],
)
def test_settings_that_are_refused(fields, message):
    text = f"a_stage:\n  a_modifiers:\n    GradientMagnitudeModifier: {fields}\n"
    with pytest.raises(SparseSSMError) as caught:
        parse_recipe(text)
    assert message in str(caught.value)


def test_rounds_below_one():
    with pytest.raises(ValidationError, match=r"rounds[\s\S]*input_value=0"):
        modifier(rounds=0)


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*norm.*", "dt_bias", "re:.*embeddings.*", "x"])
@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_patterns_that_match_nothing_prunable(field, pattern):
    model = tiny_model("mamba2")
    with pytest.raises(SparseSSMError, match=rf"Modifier\.{field}: .* matches no weight"):
        run(model, modifier(**{field: pattern}))
    with pytest.raises(SparseSSMError, match="leaves no weight"):
        modifier(ignore="re:.*").matching_weights(model)


def test_recipes_need_data():
    for name in ("gradient-50", "gradient-70"):
        with pytest.raises(SparseSSMError, match="needs calibration data"):
            load_recipe(name).check_data(None)
        assert load_recipe(name).reads_data
    magnitude = "{sparsity: 0.5, saliency: magnitude}"
    recipe = f"a_stage:\n  a_modifiers:\n    GradientMagnitudeModifier: {magnitude}\n"
    parse_recipe(recipe).check_data(None)
    assert not parse_recipe(recipe).reads_data


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in state(model).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": VOCAB}, rf"labels hold {VOCAB}; allowed: 0 to {VOCAB - 1}, and -100"),
        ({"labels": -1}, r"labels hold -1"),
        ({"input_ids": VOCAB}, rf"token id {VOCAB}"),
    ],
)
def test_labels_and_ids_out_of_range(change, message):
    model, ready = tiny_model("mamba"), batches(2)
    before = state(model)
    ((key, value),) = change.items()
    ready[1].setdefault("labels", ready[1]["input_ids"].clone())
    ready[1][key][0, 3] = value
    with pytest.raises(SparseSSMError, match=message):
        run(model, modifier(), ready)
    assert unchanged(model, before)
    assert nothing_left_behind(model)


def test_data_that_is_not_there():
    from llmcompressor import oneshot

    model = tiny_model("mamba")
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        oneshot(model=model, recipe=modifier())
    ready = batches(1)
    ready[0]["attention_mask"][:, 1:] = 0  # nothing comes after the first token
    with pytest.raises(SparseSSMError, match="no label"):
        run(model, modifier(), ready)


def test_a_model_without_a_loss():
    model = Forecaster()
    ready = [{"input_ids": torch.ones(2, 5, dtype=torch.int64)}]
    with pytest.raises(SparseSSMError, match=r"Forecaster returns no loss; give loss_fn"):
        directly(model, ready)
    with pytest.raises(SparseSSMError, match=r"MambaModel returns no loss; give loss_fn"):
        directly(model.backbone, [{"input_ids": torch.zeros(2, 5).long()}])
    series = [{"series": torch.ones(2, 5, 3)}]
    with pytest.raises(
        SparseSSMError, match=r"batch 1 holds series; a batch is a mapping .* with input_ids"
    ):
        directly(model, series)
    for bad, message in (
        (lambda m, b: 1.0, "loss_fn returned a float"),
        (lambda m, b: m(b["series"]), r"a tensor of shape \(2, 5, 3\)"),
        (lambda m, b: torch.zeros(()), "without a gradient"),
    ):
        with pytest.raises(SparseSSMError, match=message):
            directly(model, series, loss_fn=bad)


def breaking_loss(bad):
    """A loss that has no gradient in the batches whose first value is among some."""

    def loss_fn(model, batch):
        loss = squared_error(model, batch)
        return loss * float("nan") if float(batch["series"][0, 0, 0]) in bad else loss

    return loss_fn


def numbered(count):
    generator = torch.Generator().manual_seed(3)
    ready = [{"series": torch.randn(2, 6, 3, generator=generator)} for _ in range(count)]
    for i, batch in enumerate(ready):
        batch["series"][0, 0, 0] = i
    return ready


def test_gradients_that_are_no_numbers():
    ready = numbered(5)
    model, other = Forecaster(), Forecaster()
    result = directly(model, ready, loss_fn=breaking_loss({1, 3}))
    directly(other, [ready[i] for i in (0, 2, 4)], loss_fn=squared_error)
    assert unchanged(model, other.state_dict())  # what was skipped has left no trace
    assert result.skipped_batches == ("the loss", "the loss")
    model = Forecaster()
    before = state(model)
    with pytest.raises(
        SparseSSMError, match=r"3 batches .* begin in the loss in the last; .*nothing was changed$"
    ):
        directly(model, ready, loss_fn=breaking_loss({1, 3, 4}))
    assert unchanged(model, before)
    assert nothing_left_behind(model)


def test_weights_on_several_devices():
    model = Forecaster()
    model.leave.to("meta")
    with pytest.raises(SparseSSMError, match="lie on cpu, meta"):
        directly(model, numbered(1), loss_fn=squared_error)


# -- what the passes do --------------------------------------------------------------------


def test_labels_leave_out_padding():
    ids = torch.arange(1, 7).view(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    labels = training.labels_of({"input_ids": ids, "attention_mask": mask})
    assert labels.tolist() == [[-100, -100, -100, 4, 5, -100]]
    given = torch.full((1, 6), 2)
    assert training.labels_of({"input_ids": ids, "labels": given}) is given


def test_layers_are_not_kept():
    """What the backward pass holds back grows by a layer's input and not by what is in it."""
    kept = []
    for layers in (2, 4):
        model = tiny_model("mamba", num_hidden_layers=layers)
        size = 0

        def pack(tensor):
            nonlocal size
            if tensor.ndim == 3:  # activations
                size += tensor.numel()
            return tensor

        with (
            training.differentiable(model, model.parameters()),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            training.loss_of(model, batches(1)[0])
        kept.append(size)
    assert kept[1] - kept[0] <= 2 * 2 * 24 * 32  # two inputs (b, L, hidden_size) more


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_gradients_are_the_same_where_layers_are_kept(family, monkeypatch):
    model, ready = tiny_model(family), batches(2)
    parameters = dict(model.named_parameters())
    asked = []

    def has_room(device, needed, spare=0.5):
        asked.append(needed)
        return len(asked) == 2

    monkeypatch.setattr(training, "has_room", has_room)
    found = [training.mean_gradients(model, ready, parameters)[0] for _ in range(2)]
    assert asked[0] == asked[1] > 0
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_everything_is_restored():
    model = tiny_model("mamba")
    model.train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    model.config.use_cache = True
    with pytest.raises(KeyError), training.differentiable(model, [find_mixers(model)[0].A_log]):
        raise KeyError
    assert model.training
    assert model.config.use_cache
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all("forward" not in vars(m) for m in model.modules())
