"""Component loss: what is measured, and that the model is as it was afterwards."""

import json

import pytest
import torch
from conftest import DEMO, VOCAB, batches, hooked, record, run, state, tiny_model

from sparsessm_plugin import SparseSSMModifier, evaluate_perplexity, find_mixers
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation import component_loss
from sparsessm_plugin.evaluation.component_loss import (
    BY,
    count_measurements,
    hold_back,
    measure_component_loss,
    ratio_tables,
)
from sparsessm_plugin.solvers.magnitude import magnitude

SAMPLES = torch.randint(1, VOCAB, (3, 20), generator=torch.Generator().manual_seed(7))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def perplexity(model):
    return evaluate_perplexity(model, SAMPLES).perplexity


@pytest.mark.parametrize("family", ["mamba", "jamba", "zamba", "mamba2"])
def test_every_part_is_measured_as_if_it_alone_had_been_pruned(family):
    model = tiny_model(family)
    before = state(model)
    result = measure_component_loss(model, batches(), SAMPLES, (0.7, 0.4), "magnitude")
    assert same(state(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    adapters = find_mixers(model)
    assert result.layers == tuple(a.name for a in adapters)
    assert result.sparsities == (0.4, 0.7)
    assert result.dense == perplexity(model)
    with_A_log = ("A_log",) if family != "mamba2" else ()
    assert result.kinds == (*with_A_log, *adapters[0].projections)
    assert len(result.measurements) == count_measurements(model, (0.7, 0.4), BY)
    for found in result.measurements:
        if found.kind == "A_log" or (found.by == "layer" and with_A_log):
            continue
        pruned = tiny_model(family)
        entries = 0
        for adapter in find_mixers(pruned):
            for kind in adapter.projections:
                if found.kind in (kind, None) and found.layer in (adapter.name, None):
                    weight = adapter.projection(kind).weight.data
                    size = weight.shape[-1]
                    unit = torch.eye(size).expand(*weight.shape[:-2], size, size)
                    weight.copy_(magnitude(weight, unit, found.sparsity).weight)
                    entries += weight.numel()
        assert found.entries == entries
        assert found.perplexity == pytest.approx(perplexity(pruned), rel=1e-6)
        assert found.ratio == found.perplexity / result.dense
        assert 0 < found.relative_error < 1


def test_A_log_is_pruned_as_its_modifier_prunes_it():
    result = measure_component_loss(tiny_model("mamba"), batches(), SAMPLES, (0.5,), by=("kind",))
    pruned = tiny_model("mamba")
    run(pruned, SparseSSMModifier(sparsity=0.5), pipeline="basic")
    expected = perplexity(pruned) / perplexity(tiny_model("mamba"))
    assert result.ratio("kind", "A_log", None, 0.5) == pytest.approx(expected, rel=1e-6)


def test_projections_get_the_hessians_of_the_dense_model(monkeypatch):
    calls, model, ready = record(monkeypatch), tiny_model("mamba"), batches(padded=True)
    measure_component_loss(model, ready, SAMPLES, (0.5,), "sparsegpt", ("module",))
    inputs = hooked(tiny_model("mamba"), "backbone.layers.1.mixer.in_proj", ready)
    kept = [batch["attention_mask"].bool() for batch in ready]
    x = torch.cat([y[mask] for y, mask in zip(inputs, kept, strict=True)])
    weight = model.backbone.layers[1].mixer.in_proj.weight
    (hessian,) = (h for w, h, _ in calls if torch.equal(w, weight))
    torch.testing.assert_close(hessian, x.T @ x, rtol=1e-4, atol=1e-4)


def test_single_modules_are_measured_at_the_middle_sparsity_only():
    result = measure_component_loss(
        tiny_model("mamba"), batches(1), SAMPLES, (0.2, 0.5, 0.8), "wanda", ("module",)
    )
    assert {found.sparsity for found in result.measurements} == {0.5}
    (table,) = ratio_tables(result)
    assert table.columns == ("layer", ("0", "1"))
    assert table.ratios[0][1] == result.ratio("module", "A_log", result.layers[1], 0.5)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("mamba").train()
    before, calls = state(model), []

    def fail(model, samples, batch_size):
        calls.append(same(state(model), before))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate_perplexity(model, samples, batch_size)

    monkeypatch.setattr(component_loss, "evaluate_perplexity", fail)
    with pytest.raises(KeyboardInterrupt):
        measure_component_loss(model, batches(1), SAMPLES, (0.5,), "magnitude")
    assert calls == [True, False, False]
    assert same(state(model), before)
    assert model.training


def test_no_text_and_nan():
    with pytest.raises(SparseSSMError, match="no calibration text"):
        measure_component_loss(tiny_model("mamba"), [], SAMPLES)
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[3] = float("inf")
    with pytest.raises(SparseSSMError, match=r"layers\.1\.mixer: its input holds NaN"):
        measure_component_loss(model, batches(1), SAMPLES)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hold_back():
    samples = torch.arange(40).reshape(20, 2)
    calibration, held = hold_back(samples, 3)
    assert torch.equal(torch.cat([calibration, held]), samples)
    assert len(held) == 3
    assert len(hold_back(samples, 16)[1]) == 5  # a quarter at most
    assert len(hold_back(samples[:2], 16)[1]) == 1
    with pytest.raises(SparseSSMError, match="one window of 2 tokens"):
        hold_back(samples[:1], 1)


# -- the command -------------------------------------------------------------------------

SHORT = ("--num-samples", 4, "--eval-samples", 2, "--max-seq-length", 32)


def test_command_writes_numbers_and_a_picture(sparsessm, text_file, tmp_path):
    output, plot = tmp_path / "s.json", tmp_path / "s.png"
    code, stdout, stderr = sparsessm(
        *("component-loss", DEMO, "--calibration", text_file, *SHORT, "--sparsities", "0.5, 0.9"),
        *("--by", "kind, layer", "--solver", "wanda", "--output", output, "--plot", plot),
    )
    assert code == 0, stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.read_text())
    assert report["text"] == {"source": f"end of {text_file}", "samples": 2}
    assert report["calibration"]["samples"] == 4
    assert report["sparsities"] == [0.5, 0.9]
    assert len(report["measurements"]) == 2 * (6 + 4)
    assert "a kind, in all layers" in stdout
    for found in report["measurements"]:
        if found["by"] == "kind":
            assert f"{found['ratio']:.4f}" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsities", "0.5,1"), "--sparsities must be between 0 and 1, both excluded"),
        (("--sparsities", "half"), "--sparsities must be numbers between 0 and 1"),
        (("--solver", "obs"), "--solver must be one of alps, magnitude, sparsegpt, wanda"),
        (("--by", "kind,head"), "by must be any of kind, layer, module, got kind, head"),
        (("--plot", "s.pdf"), "--plot must end in .png or .svg"),
        (("--calibration", "none.txt"), "none.txt does not exist"),
    ],
)
def test_bad_arguments(refused, text_file, tmp_path, arguments, message):
    options = ("--calibration", text_file, "--output", tmp_path / "s.json", *SHORT)
    assert message in refused("component-loss", DEMO, *options, *arguments)


def test_one_window_is_too_few(refused, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words " * 6)
    options = ("--calibration", text, "--output", tmp_path / "s.json")
    message = refused("component-loss", DEMO, *options, "--max-seq-length", 30)
    assert "cannot be calibrated on and held back" in message
