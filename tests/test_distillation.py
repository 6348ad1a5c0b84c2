"""Fitting a smaller model to the dense one's predictions."""

import copy
import json
import os
import re
import tempfile

import pytest
import torch
from conftest import (
    DEVICE,
    FAMILIES,
    batches,
    check_reload,
    divergence_from,
    nothing_left_behind,
    run,
    state,
    tiny_model,
)
from loguru import logger
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from sparsessm_plugin import ChannelRemovalModifier, StateRemovalModifier
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recurrence import ssd
from sparsessm_plugin.training import budget, dense, divergence, resume, tuner
from sparsessm_plugin.training.budget import Budget, Plan, batch_of_step
from sparsessm_plugin.training.dense import DenseStates, Head
from sparsessm_plugin.training.distillation import Distillation, mixer_parameters
from sparsessm_plugin.training.divergence import MeanDivergence, divergences
from sparsessm_plugin.training.flat import FlatWeights
from sparsessm_plugin.training.gradients import differentiable
from sparsessm_plugin.training.memory import layer_numbers, needed


def last(**fields):
    """Removes states without data or compensation, so that a fit has much to do."""
    return StateRemovalModifier(saliency="last", compensate="none", keep=4, **fields)


def test_divergences_agree_with_torch():
    reference, logits = torch.randn(2, 3, 5, 7)
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergences(reference, logits), expected, atol=1e-6)
    assert torch.equal(divergences(logits, logits), torch.zeros(3, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_comes_closer_to_the_dense_model(family):
    dense, model = (tiny_model(family).to(DEVICE) for _ in range(2))
    ready = batches(2, 2, 12, padded=True)
    distillation = Distillation(model, ready, "this", Plan(20, 0.0, 1e-3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            parameter += 0.5 * parameter.norm() / parameter.numel() ** 0.5 * noise
        before = divergence_from(dense, model, ready)
        found = distillation.fit(model)
    assert found.divergence_before == pytest.approx(before, rel=1e-3)
    assert found.divergence_after < 0.9 * before
    after = divergence_from(dense, model, ready)
    assert found.divergence_after == pytest.approx(after, rel=1e-3)
    assert nothing_left_behind(model)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_but_the_mixers_changes():
    dense, model = tiny_model("mamba"), tiny_model("mamba")
    run(model, last(distill_steps=3, distill_learning_rate=1e-6))
    own = set(mixer_parameters(model))
    before = state(dense)
    changed = {n for n, p in state(model).items() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= own


@pytest.mark.parametrize("make", [last, lambda **f: ChannelRemovalModifier(keep=32, **f)])
@pytest.mark.parametrize(("steps", "rate"), [(2, 30.0), (1, 1000.0), (10, 1000.0), (10, 1e30)])
def test_a_fit_that_does_not_help_is_taken_back(make, steps, rate, tmp_path):
    plain, model = tiny_model("mamba"), tiny_model("mamba")
    ready = batches(2, 2, 12)
    without = make()
    run(plain, without, ready)
    path = tmp_path / "report.json"
    modifier = make(distill_steps=steps, distill_learning_rate=rate, report_path=str(path))
    said = []
    handler = logger.add(said.append, level="WARNING", filter="sparsessm_plugin")
    run(model, modifier, ready)
    logger.remove(handler)
    assert ["did not lower the divergence" in line for line in said].count(True) == 1
    assert "distillation" not in without.report()
    found = json.loads(path.read_text())["distillation"]
    assert found["diverged"] is True
    after = found["divergence_after"]
    assert after is None or not after < found["divergence_before"]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), value.cpu()), name


def test_saved_checkpoint_reloads_in_a_process_without_the_package(tmp_path):
    model = tiny_model("mamba2")
    run(model, last(distill_steps=2), output_dir=str(tmp_path / "out"))
    check_reload(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "factor"),
    [
        ("mamba", lambda c: 1.0),
        ("granitemoehybrid", lambda c: 1 / c.logits_scaling),
        ("falcon_h1", lambda c: c.lm_head_multiplier),
    ],
)
def test_factor_between_head_and_logits_is_found(family, factor):
    # no shipped default is 1 in both families
    changes = {
        "granitemoehybrid": {"logits_scaling": 8.0},
        "falcon_h1": {"lm_head_multiplier": 3.0},
    }
    model = tiny_model(family, **changes.get(family, {})).to(DEVICE)
    distillation = Distillation(model, batches(1, 1, 8), "this")
    assert distillation._head.scale == pytest.approx(factor(model.config), rel=1e-3)
    assert distillation.divergence(model) == pytest.approx(0, abs=1e-6)


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValidationError, match="distill_steps"):
        last(distill_steps=-1)
    model = tiny_model("mamba")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(SparseSSMError, match="distill_loss: dense: it needs a language head"):
        Distillation(model, batches(), "distill_loss: dense")
    monkeypatch.undo()

    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: _with_logits(own(**inputs), lambda x: x.tanh() ** 3)
    )
    with pytest.raises(SparseSSMError, match="no multiple of what its head gives"):
        Distillation(model.to(DEVICE), batches(), "distill_steps")


def _with_logits(output, change):
    output.logits = change(100 * output.logits)
    return output


def test_data_is_asked_for():
    model = tiny_model("mamba")
    sizes = [a.sizes for a in find_mixers(model)]
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        run(model, last(distill_steps=1), [])
    assert [a.sizes for a in find_mixers(model)] == sizes


def test_layers_may_be_fitted_over_fewer_batches():
    ready = batches(3, 2, 12)
    results = []
    for data, fields in ((ready[:1], {}), (ready, {"calibration_batches": 1})):
        model = tiny_model("mamba")
        modifier = StateRemovalModifier(keep=4, **fields)
        run(model, modifier, data)
        assert {layer["tokens"] for layer in modifier.report()["layers"]} == {24}
        results.append(model.state_dict())
    assert all(torch.equal(v.cpu(), results[1][k].cpu()) for k, v in results[0].items())
    modifier = last(distill_steps=2, calibration_batches=1)
    run(tiny_model("mamba"), modifier, ready)
    dense, model = tiny_model("mamba").to(DEVICE), tiny_model("mamba")
    run(model, last())
    before = modifier.report()["distillation"]["divergence_before"]  # over all batches
    # in float32 little is left of so small a divergence, and the models' forwards differ
    assert before == pytest.approx(divergence_from(dense, model, ready), rel=3e-2)


# -- the dense model's predictions -----------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_the_divergence_are_exact(monkeypatch, with_bias):
    """Against autograd through whole logits, a few tokens at a time, of heads of other widths."""
    monkeypatch.setattr(divergence, "_LOGITS", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    hidden, expected = (torch.randn(8, m, generator=generator) for m in (5, 7))
    weight, teacher = (torch.randn(11, m, generator=generator) for m in (5, 7))
    bias = torch.randn(11, generator=generator) if with_bias else None
    dense_head, scale = Head(teacher, bias, 0.7), 0.7
    given = [hidden, weight, *([bias] if with_bias else [])]
    found, true = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    ours = MeanDivergence.apply(
        found[0], found[1], found[2] if with_bias else None, scale, expected, dense_head
    )
    logits = scale * F.linear(true[0], true[1], true[2] if with_bias else None)
    exact = divergences(0.7 * F.linear(expected, teacher, bias), logits).mean()
    torch.testing.assert_close(ours, exact)
    for loss in (ours, exact):
        (3 * loss).backward()
    for x, y in zip(found, true, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_predictions_that_main_memory_has_no_room_for_are_exact_too(monkeypatch, tmp_path):
    model, other = (tiny_model("mamba", seed=seed).to(DEVICE) for seed in (0, 1))
    ready = batches(3, 2, 12, padded=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_memory = Distillation(model, ready, "this")
    monkeypatch.setattr(dense, "memory_available", lambda: 100)
    monkeypatch.setattr(dense, "has_room", lambda *asked: False)
    in_file = Distillation(model, ready, "this")
    assert in_memory.batches.states.file_bytes == 0
    assert in_file.batches.states.file_bytes == 2 * 32 * sum(
        int(batch["attention_mask"].sum()) for batch in ready
    )
    assert os.listdir(tmp_path) == []  # without a name there is nothing to delete
    exact = divergence_from(model, other, ready)
    for distillation in (in_memory, in_file):
        assert distillation.divergence(other) == pytest.approx(exact, rel=1e-4)
        assert distillation.divergence(model) < 1e-6

    def full(handle, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        SparseSSMError, match=r"this: the dense predictions take .* GiB, which .*No"
    ):
        Distillation(model, ready, "this")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_of_a_token_is_near(dtype):
    rows = (torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    rows[2] = 0
    states = DenseStates([2, 4], 40, dtype, torch.device("cpu"), "this")
    states.put(1, rows[2:])
    states.put(0, rows[:2])
    found = torch.cat(
        [
            states.of(i)[0].float()
            * (states.of(i)[1] if i < 2 and states.of(i)[1] is not None else 1)
            for i in range(2)
        ]
    )
    if dtype == torch.float32:
        torch.testing.assert_close(found, rows, rtol=1e-3, atol=0)
    else:
        assert torch.equal(found, rows.float())


@pytest.mark.parametrize("family", ["mamba", "jamba"])  # tied, and with a head of its own
def test_the_head_may_change_and_be_fitted(family):
    """The dense head stays what it was, wherever the model's own goes."""
    true, model = (tiny_model(family).to(DEVICE) for _ in range(2))
    ready = batches(2, 2, 12)
    distillation = Distillation(model, ready, "this", Plan(20, 0.0, 3e-3))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
        before = divergence_from(true, model, ready)
        assert distillation.divergence(model) == pytest.approx(before, rel=1e-3)
        found = distillation.fit(model, "all")
    assert found.divergence_after < 0.7 * before
    tied = family == "mamba"
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied
    own = state(model)
    with torch.no_grad():
        distillation = Distillation(model, ready, "this", Plan(2, 0.0, 1e-3))
        find_mixers(model)[0].mixer.D.mul_(0.5)
        distillation.fit(model, "all_but_vocabulary")
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = next(n for n, p in model.named_parameters() if p is end.weight)
        assert torch.equal(own[name], end.weight.cpu())


# -- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_adam(dtype):
    """torch's own, with its clipping, on float32 copies; tied tensors once, pruned ones zero."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 3), "b": torch.nn.Linear(5, 3)}).to(dtype)
    model.b.weight.data = model.a.weight.data  # one memory under two names
    named = dict(model.named_parameters())
    pruned = {"a.bias": torch.tensor([True, False, False])}
    flat = FlatWeights(named)
    masters = {n: named[n].detach().float().clone() for n in ("a.weight", "a.bias", "b.bias")}
    masters["a.bias"][0] = 0
    adam = torch.optim.Adam(masters.values(), lr=0.0)
    before = copy.deepcopy(model.state_dict())
    masks = flat.masks(pruned)
    flat.zero(masks)
    with flat.attached():
        for step, rate in enumerate((1e-2, 3e-2, 0.0, 2e-2)):
            x = torch.randn(4, 5, dtype=dtype) * (torch.inf if step == 2 else 1)
            (model.a(x) * model.b(x)).sum().backward()
            gradients = {n: named[n].grad.float().clone() for n in masters}
            norm = flat.step(rate, 1.0, masks)
            flat.clear_gradients()
            if step == 2:  # skipped: neither weights nor moments move
                assert not torch.isfinite(norm)
                continue
            gradients["a.bias"][0] = 0
            for name, master in masters.items():
                master.grad = gradients[name].clone()
            adam.param_groups[0]["lr"] = rate
            expected = torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            torch.testing.assert_close(norm.float(), expected)
            adam.step()
            masters["a.bias"][0] = 0
            for name, master in masters.items():
                torch.testing.assert_close(
                    named[name].detach(),
                    master.to(dtype),
                    rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                    atol=1e-6,
                )
        flat_weight = named["a.weight"].detach().clone()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    flat.write_back()
    assert torch.equal(model.a.weight, flat_weight)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert all(p.grad is None for p in model.parameters())


def test_text_is_read_in_its_order_and_then_in_others():
    state_before = torch.get_rng_state()
    epochs = [[batch_of_step(5 * epoch + i, 5) for i in range(5)] for epoch in range(4)]
    assert epochs[0] == list(range(5))
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    assert epochs == [[batch_of_step(5 * epoch + i, 5) for i in range(5)] for epoch in range(4)]
    assert torch.equal(state_before, torch.get_rng_state())


def test_the_first_of_steps_and_minutes_ends_it():
    steps, minutes, both = (Budget(plan) for plan in (Plan(10), Plan(0, 2.0), Plan(10, 2.0)))
    for found in (steps, minutes, both):
        found.done = 4
    assert [b.reached(100.0) for b in (steps, minutes, both)] == [False, False, False]
    assert [b.reached(100.0, 1, 2) for b in (steps, minutes, both)] == [False, True, True]
    assert [b.reached(120.0) for b in (steps, minutes, both)] == [False, True, True]
    both.done = steps.done = 5
    assert [b.reached(0.0, 1, 2) for b in (steps, both)] == [True, True]
    both.done = 10
    assert both.reached(0.0)
    rates = [minutes.learning_rate(t) / 3e-4 for t in (0.0, 6.0, 12.0, 66.0, 119.9)]
    assert 0 < rates[0] < rates[1] == pytest.approx(0.5)
    assert rates[2] == pytest.approx(1.0)
    assert rates[3] == pytest.approx(0.5)
    assert 0 <= rates[4] < 1e-3


def test_minutes(monkeypatch):
    """The clock is looked at between steps: a step of 10 s each, and 0.5 minutes of them."""
    # padded: of steps along whole batches a GPU may make a graph, which calls no loss
    model, ready = tiny_model("mamba").to(DEVICE), batches(2, 2, 12, padded=True)
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    distillation = Distillation(model, ready, "distill_minutes", Plan(0, 0.5, 1e-4))
    own = distillation.loss

    def slow(model, batch):
        now[0] += 10.0
        return own(model, batch)

    distillation.loss = slow
    monkeypatch.setattr(distillation, "divergence", lambda model: -now[0])
    found = distillation.fit(model)
    assert found.steps == 3
    assert now == [30.0]
    assert found.passes == 1.5
    assert not found.diverged


def test_layers_may_be_kept_or_computed_twice():
    ready, results = batches(2, 2, 12), []
    for fields in ({"distill_checkpointing": True}, {"distill_checkpointing": False}):
        model = tiny_model("mamba")
        run(model, last(distill_steps=3, **fields), ready)
        results.append(state(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba", "granitemoehybrid", "falcon_h1", "zamba"])
def test_products_may_be_in_bfloat16(family):
    """Weights stay float32: after small steps they are no bfloat16 numbers."""
    model, ready = tiny_model(family).to(DEVICE), batches(2, 2, 12)
    plan = Plan(10, 0.0, 1e-3, precision="bfloat16")
    distillation = Distillation(model, ready, "this", plan)
    with torch.no_grad():
        for parameter in mixer_parameters(model).values():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        found = distillation.fit(model)
    assert found.divergence_after < 0.9 * found.divergence_before
    weights = mixer_parameters(model)
    assert all(p.dtype == torch.float32 for p in weights.values())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in weights.values())


def test_scans_stay_in_float32_where_products_are_in_bfloat16(monkeypatch):
    model, seen, own = tiny_model("mamba2"), [], ssd.scan

    def scan(quantities):
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(quantities)

    monkeypatch.setattr(ssd, "scan", scan)
    ids = batches(1)[0]["input_ids"]
    with (
        differentiable(model, model.parameters(), checkpointing=False),
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert model(ids.to("cpu")).logits.isfinite().all()
    assert seen == [False] * len(find_mixers(model))


def test_little_text_for_many_steps_is_said_once():
    said = []
    handler = logger.add(said.append, level="WARNING", filter="sparsessm_plugin")
    for steps in (30, 2):
        run(tiny_model("mamba"), last(distill_steps=steps), batches(2, 2, 12))
    logger.remove(handler)
    few = [line for line in said if "learnt by heart" in line]
    assert len(few) == 1
    assert "30 steps are 15 passes over 2 calibration batches (48 tokens)" in few[0]


# -- going on after an interrupt --------------------------------------------------------------


def interrupted(monkeypatch, modifier, ready, at):
    """A run that is interrupted in its step of this number, counted from 0."""
    own, calls = tuner.loss_of, []

    def stop(*args):
        calls.append(None)
        if len(calls) > at:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(tuner, "loss_of", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("mamba"), modifier, ready)
    monkeypatch.setattr(tuner, "loss_of", own)


@pytest.mark.parametrize("every", [1e9, 0.0], ids=["when interrupted", "after every step"])
def test_an_interrupted_fit_goes_on_with_the_same_bits(monkeypatch, tmp_path, every):
    ready, path = batches(3, 2, 12), tmp_path / "steps.pt"
    monkeypatch.setattr(resume, "_EVERY", every)
    fields = {"distill_steps": 8, "distill_learning_rate": 1e-3}
    whole, model = tiny_model("mamba"), tiny_model("mamba")
    modifier = last(**fields)
    run(whole, modifier, ready)
    interrupted(monkeypatch, last(**fields, distill_resume=str(path)), ready, 5)
    assert os.listdir(tmp_path) == ["steps.pt"]
    resumed = last(**fields, distill_resume=str(path))
    run(model, resumed, ready)
    expected = state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state(model).items())
    reports = [m.report()["distillation"] for m in (modifier, resumed)]
    assert reports[0] == reports[1]
    again = tiny_model("mamba")  # it is done, and no step is left
    run(again, last(**fields, distill_resume=str(path)), ready)
    assert all(torch.equal(value, expected[name]) for name, value in state(again).items())

    for other, message in (
        ({**fields, "distill_steps": 9}, "a run with other settings or data"),
        ({**fields, "calibration_batches": 2}, "a run with other settings or data"),
    ):
        with pytest.raises(SparseSSMError, match=f"distill_resume = .*steps.pt is of {message}"):
            run(tiny_model("mamba"), last(**other, distill_resume=str(path)), ready)
    with pytest.raises(SparseSSMError, match="a run with other settings or data"):
        run(tiny_model("mamba"), last(**fields, distill_resume=str(path)), ready[::-1])
    model = tiny_model("mamba", seed=1)
    with pytest.raises(SparseSSMError, match="a run with other weights at its start"):
        run(model, last(**fields, distill_resume=str(path)), ready)
    path.write_bytes(path.read_bytes()[:1000])
    before = state(tiny_model("mamba"))
    with pytest.raises(SparseSSMError, match="holds no gradient steps of an interrupted run"):
        run(model := tiny_model("mamba"), last(**fields, distill_resume=str(path)), ready)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_fields_that_are_refused(tmp_path):
    for fields, message in (
        ({"distill_minutes": -1}, "distill_minutes"),
        ({"distill_minutes": float("inf")}, "distill_minutes"),
        (
            {"distill_resume": str(tmp_path / "x")},
            "distill_resume has no meaning without distill_s",
        ),
        ({"distill_weights": "all"}, "distill_weights has no meaning without distill_steps"),
        ({"distill_optimizer": "muon"}, "distill_optimizer has no meaning without distill_steps"),
        ({"distill_steps": 1, "distill_optimizer": "sgd"}, "distill_optimizer"),
        ({"distill_steps": 1, "distill_resume": str(tmp_path)}, "is a folder; give the path of"),
        ({"distill_steps": 1, "distill_resume": "/no/such/x"}, "the folder of /no/such/x does not"),
        ({"distill_steps": 1, "distill_weights": "some"}, "distill_weights"),
        ({"distill_steps": 1, "distill_checkpointing": "maybe"}, "distill_checkpointing"),
        ({"distill_steps": 1, "distill_precision": "int8"}, "distill_precision"),
    ):
        with pytest.raises(ValidationError, match=message):
            last(**fields)


# -- memory ----------------------------------------------------------------------------------


def test_memory_is_counted(family):
    """Against the tensors that a backward pass keeps, and those that a tuner holds."""
    model, batch = tiny_model(family), batches(1, 2, 128)[0]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        differentiable(model, model.parameters(), checkpointing=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.get_decoder()(**batch)
        size = sum(nbytes for nbytes, _ in kept.values())
    counted = needed(model, 256, checkpointing=False)
    assert size <= counted.layers <= 2.5 * size
    again = needed(model, 256)
    layers = len(layer_numbers(model))
    assert counted.layers / layers <= again.layers < counted.layers
    # zamba's shared block is read by several layers
    assert again.inputs >= layers * 256 * 32 * 4

    flat = FlatWeights(dict(model.named_parameters()))
    held = [t for g in flat._groups for t in (g.weights, g.gradients, *g.moments)]
    numbers = sum(p.numel() for p in model.parameters())
    assert counted.copies + counted.moments == 16 * numbers
    assert 16 * numbers <= sum(t.nbytes for t in held) < 16 * (numbers + 64 * len(own))
    half = needed(copy.deepcopy(model).bfloat16(), 256)
    assert [half.model, half.copies, half.masters, half.moments] == [
        factor * numbers for factor in (2, 4, 4, 8)
    ]


def test_a_large_model_fits_on_one_gpu():
    """8 x 2,048 tokens of Mamba 2.8B in 75 GiB, all weights fitted."""
    sizes = {"vocab_size": 50280, "hidden_size": 2560, "num_hidden_layers": 64}
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(**sizes, state_size=16)).bfloat16()
    assert 60 < needed(model, 8 * 2048).total / 2**30 < 75
    assert needed(model, 8 * 2048, checkpointing=False).total / 2**30 > 300
    assert re.match(r"6\d\.\d GiB: model 5\.\d, copies 10", str(needed(model, 8 * 2048)))


def test_dense_predictions_come_from_the_fast_scan(monkeypatch):
    """Whoever asks for them, and not from transformers' loops over time."""
    model = tiny_model("mamba2")
    mixer = type(model.backbone.layers[0].mixer)

    def slow(*arguments, **kwargs):
        pytest.fail("the reference loop ran")

    monkeypatch.setattr(mixer, "forward", slow)
    Distillation(model, [{"input_ids": torch.arange(12).reshape(2, 6)}], "who")
