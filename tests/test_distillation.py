"""Fitting a smaller model to the dense one's predictions."""

import json

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

from sparsessm_plugin import ChannelRemovalModifier, StateRemovalModifier
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import Distillation, mixer_parameters
from sparsessm_plugin.training.divergence import divergences


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
