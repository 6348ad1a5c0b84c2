"""SensitivitySparseGPTModifier through llmcompressor's own oneshot()."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import (
    DEVICE,
    assert_same_sums,
    batches,
    check_reload,
    hooked,
    nothing_left_behind,
    projections,
    record,
    run,
    state,
    tiny_model,
)
from llmcompressor import oneshot
from pydantic import ValidationError
from torch import nn

from sparsessm_plugin import SensitivitySparseGPTModifier, find_mixers
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods.projections import (
    ProjectionSettings,
    matching_projections,
)
from sparsessm_plugin.methods.projections.dense import DensePass, enough_tokens
from sparsessm_plugin.methods.projections.statistics import stage_sums
from sparsessm_plugin.solvers.objective import damped_inverse_cholesky, relative_error
from sparsessm_plugin.solvers.projections import SOLVERS


def same_choices(found, expected):
    """Whether zeros are where they are expected, but for a few on a GPU.

    What rounds otherwise there chooses otherwise between entries that matter alike, and each such
    choice moves what later stages see; of unlike masks half of the entries agree.
    """
    return float(((found == 0) == (expected == 0)).double().mean()) > 0.85


UNIFORM = {"sparsity": 0.5, "solver": "sparsegpt", "allocation": "uniform", "target_output": "own"}


def modifier(**changes):
    return SensitivitySparseGPTModifier(**{**UNIFORM, **changes})


def weights(model):
    return {
        name: module.weight.detach().cpu().clone() for name, module in projections(model).items()
    }


def zeros(model):
    return {name: int((w == 0).sum()) for name, w in weights(model).items()}


def test_every_family(family):
    """Two passes, unequal sparsities, padding: the sum is exact, and all else is as it was."""
    model = tiny_model(family)
    names = {name if "_weight" in name else f"{name}.weight" for name in projections(model)}
    others = {
        k: v
        for k, v in state(model).items()
        if k not in names and ".experts." not in k  # which oneshot() takes apart
    }
    chosen = modifier(allocation="optimal", target_output="half_way")
    run(model, chosen, batches(padded=True))
    sizes = {name: w.numel() for name, w in weights(model).items()}
    assert sum(zeros(model).values()) == round(0.5 * sum(sizes.values()))
    assert len(set(zeros(model).values())) > 3
    after = state(model)
    for name, value in others.items():
        assert torch.equal(after[name], value), name
    assert nothing_left_behind(model)
    report = chosen.report()
    assert {layer["name"]: layer["pruned"] for layer in report["layers"]} == zeros(model)
    assert report["total"]["pruned"] == sum(zeros(model).values())
    assert all(0 < layer["relative_error"] < 1 for layer in report["layers"])


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize("target_output", ["mixer", "dense"])
def test_pipelines(pipeline, target_output):
    model = tiny_model("mamba")
    run(model, modifier(target_output=target_output), pipeline=pipeline)
    for name, weight in weights(model).items():
        assert zeros(model)[name] == weight.numel() // 2
    assert nothing_left_behind(model)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "nemotron_h"])
def test_semi_structured(family):
    model = tiny_model(family)
    fields = {"mask_structure": "2:4", "solver": "sparsegpt"}
    run(model, SensitivitySparseGPTModifier(**fields))
    for name, weight in weights(model).items():
        gone = 0 if name.endswith("conv1d") else 2
        assert ((weight == 0).unflatten(-1, (-1, 4)).sum(-1) == gone).all()
    run(model, SensitivitySparseGPTModifier(**fields, targets=["re:.*(mixer|mamba)$"]))
    for weight in weights(model).values():
        assert ((weight == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver(solver):
    model = tiny_model("mamba")
    dense = weights(model)
    run(model, modifier(solver=solver))
    for name, weight in weights(model).items():
        kept = weight != 0
        assert kept.sum() == weight.numel() // 2
        unchanged = torch.equal(weight[kept], dense[name][kept])
        assert unchanged == (solver in ("magnitude", "wanda")), name


@pytest.mark.parametrize("padded", [False, True])
def test_hessian_of_dt_proj(monkeypatch, padded):
    calls, model, ready = record(monkeypatch), tiny_model("mamba"), batches(padded=padded)
    low_rank = hooked(model, "backbone.layers.1.mixer.x_proj", ready, output=True)
    kept = [batch["attention_mask"].bool() for batch in ready]
    x = torch.cat([y[..., :4][m] for y, m in zip(low_rank, kept, strict=True)])
    run(model, modifier(targets="re:.*1.mixer.dt_proj"), ready)
    ((_, hessian, _),) = calls
    assert_same_sums(hessian, x.T @ x, 1e-4)


@pytest.mark.parametrize(("family", "start"), [("mamba", 0), ("mamba2", 64)])
@pytest.mark.parametrize("padded", [False, True])
def test_hessians_of_conv1d(monkeypatch, family, start, padded):
    calls, model, ready = record(monkeypatch), tiny_model(family), batches(padded=padded)
    name = "backbone.layers.1.mixer"
    channels = model.get_submodule(name).conv1d.weight.shape[0]
    expected = torch.zeros(channels, 4, 4)
    outputs = hooked(model, f"{name}.in_proj", ready, output=True)
    for output, batch in zip(outputs, ready, strict=True):
        x = nn.functional.pad(output[..., start : start + channels], (0, 0, 3, 0))
        for row in range(len(x)):
            for t in range(int(batch["attention_mask"][row].sum())):
                window = x[row, t : t + 4].T  # (channels, 4)
                expected += window[:, :, None] * window[:, None, :]
    run(model, modifier(targets="conv1d", ignore="re:.*0.mixer.conv1d"), ready)
    ((weight, hessian, _),) = calls
    assert weight.shape == (channels, 1, 4)
    assert_same_sums(hessian, expected, 1e-4)


@pytest.mark.parametrize(
    ("family", "target"),
    [("mamba", "out_proj"), ("mamba", "x_proj"), ("mamba2", "out_proj"), ("falcon_h1", "in_proj")],
)
def test_hessians_of_what_is_called(monkeypatch, family, target):
    calls, model, ready = record(monkeypatch), tiny_model(family), batches()
    name = find_mixers(model)[0].name
    x = torch.cat([x.flatten(0, 1) for x in hooked(model, f"{name}.{target}", ready)])
    run(model, modifier(targets=f"{name}.{target}"), ready)
    ((_, hessian, _),) = calls
    assert_same_sums(hessian, x.T @ x, 1e-3)


@pytest.mark.parametrize("family", ["jamba", "bamba"])
@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_attention_of_hybrids(monkeypatch, family, pipeline):
    calls, model, ready = record(monkeypatch), tiny_model(family), batches(padded=True)
    name = next(n for n, _ in model.named_modules() if n.endswith("self_attn.q_proj"))
    rows = zip(hooked(model, name, ready), ready, strict=True)
    x = torch.cat([x[batch["attention_mask"].bool()] for x, batch in rows])
    before = weights(model)
    run(model, modifier(targets="re:.*q_proj"), ready, pipeline=pipeline)
    ((dense, hessian, _),) = calls
    assert_same_sums(hessian, x.T @ x, 1e-3)
    assert (model.get_submodule(name).weight == 0).sum() == dense.numel() // 2
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    assert nothing_left_behind(model)


def test_linear_layers_and_mixers_together():
    model = tiny_model("jamba")
    chosen = modifier(
        targets=["Linear", "conv1d"], ignore="lm_head", allocation="optimal", target_output="dense"
    )
    run(model, chosen, batches(padded=True))
    pruned = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d)) and name != "lm_head"
    }
    total = sum(w.numel() for w in pruned.values())
    assert sum(int((w == 0).sum()) for w in pruned.values()) == round(0.5 * total)
    assert (model.lm_head.weight != 0).all()
    assert {layer["name"] for layer in chosen.report()["layers"]} == set(pruned)


def test_relative_error_of_the_report(monkeypatch):
    calls, model = record(monkeypatch), tiny_model("mamba2")
    dense = weights(model)
    chosen = modifier(target_output="half_way")
    run(model, chosen)
    for (_, hessian, _), layer in zip(calls, chosen.report()["layers"], strict=True):
        pruned = weights(model)[layer["name"]]
        expected = relative_error(dense[layer["name"]], pruned, hessian)
        assert layer["relative_error"] == pytest.approx(expected, rel=1e-6)


def test_later_projections_see_what_earlier_ones_leave(monkeypatch):
    """out_proj of the first mixer gets the Hessian behind the pruned rest of it."""
    calls, model, ready = record(monkeypatch), tiny_model("mamba"), batches()
    run(model, modifier(ignore="re:.*layers.1.*"), ready)
    name = "backbone.layers.0.mixer.out_proj"
    x = torch.cat([x.flatten(0, 1) for x in hooked(model, name, ready)])
    assert_same_sums(calls[-1][1], x.T @ x, 1e-3)


def test_targets_of_the_dense_model(monkeypatch):
    calls, model, ready = record(monkeypatch), tiny_model("mamba"), batches()
    dense = weights(model)
    name = "backbone.layers.1.mixer.in_proj"
    before = torch.cat([x.flatten(0, 1) for x in hooked(model, name, ready)]).double()
    run(model, modifier(target_output="dense", dampening_frac=0.0), ready)
    after = torch.cat([x.flatten(0, 1) for x in hooked(model, name, ready)]).double()
    # nothing is pruned before the first in_proj
    assert_same_sums(calls[0][0], dense["backbone.layers.0.mixer.in_proj"], 1e-4)
    expected = torch.linalg.lstsq(after, before @ dense[name].double().T).solution.T
    given = next(w for w, h, _ in calls[1:] if w.shape == dense[name].shape)
    assert_same_sums(given.double(), expected, 1e-3)


def test_padding_does_not_count():
    rows = [b["input_ids"][i : i + 1] for b in batches() for i in range(2)]
    plain = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]
    padded = [{k: nn.functional.pad(v, (0, 9)) for k, v in batch.items()} for batch in plain]
    results = []
    for ready in (plain, padded):
        model = tiny_model("mamba")
        run(model, modifier(allocation="paper", target_output="half_way"), ready)
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-3, atol=1e-4)


def test_zeros_of_an_earlier_stage_count_in_the_sum():
    model = tiny_model("mamba")
    conv1d = projections(model)["backbone.layers.0.mixer.conv1d"]
    with torch.no_grad():
        conv1d.weight[:60] = 0  # more than the allocation would take
    run(model, modifier(sparsity=0.3, allocation="optimal"))
    total = sum(w.numel() for w in weights(model).values())
    assert sum(zeros(model).values()) == round(0.3 * total)
    assert (conv1d.weight[:60] == 0).all()


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_zeros_of_an_earlier_stage_stay_and_count(solver):
    model = tiny_model("mamba")
    generator = torch.Generator().manual_seed(0)
    gone = {}
    with torch.no_grad():
        for name, module in projections(model).items():
            gone[name] = torch.rand(module.weight.shape, generator=generator) < 0.3
            module.weight[gone[name]] = 0
    chosen = modifier(solver=solver, target_output="dense")
    run(model, chosen)
    for name, weight in weights(model).items():
        assert (weight[gone[name]] == 0).all()
        assert (weight == 0).sum() == weight.numel() // 2
    for layer in chosen.report()["layers"]:
        assert layer["zero_before"] == int(gone[layer["name"]].sum())


def test_paper_allocation():
    model = tiny_model("mamba")
    chosen = modifier(allocation="paper", alpha=0.1)
    run(model, chosen)
    by_kind = {}
    for layer in chosen.report()["layers"]:
        by_kind.setdefault(layer["kind"], []).append((layer["hessian_trace"], layer["sparsity"]))
    for kind, values in by_kind.items():
        (_, less_sensitive), (_, more_sensitive) = sorted(values)
        spread = 0.1 if kind in ("in_proj", "out_proj") else 0.0
        assert less_sensitive == pytest.approx(0.5 + spread, abs=1e-3), kind
        assert more_sensitive == pytest.approx(0.5 - spread, abs=1e-3), kind


@pytest.mark.parametrize("allocation", ["uniform", "optimal"])
def test_enough_zeros_change_nothing(allocation):
    model = tiny_model("mamba")
    with torch.no_grad():
        for module in projections(model).values():
            module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    before = weights(model)
    run(model, modifier(sparsity=0.3, allocation=allocation))
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name


def test_magnitude_needs_no_data():
    model = tiny_model("mamba")
    dense = weights(model)
    oneshot(model=model, recipe=SensitivitySparseGPTModifier(sparsity=0.5, solver="magnitude"))
    for name, weight in weights(model).items():
        cut = dense[name].abs().flatten().sort().values[weight.numel() // 2 - 1]
        assert torch.equal(weight, torch.where(dense[name].abs() <= cut, 0.0, dense[name]))


def test_two_runs_are_bit_identical():
    results = []
    for _ in range(2):
        model = tiny_model("mamba")
        run(model, SensitivitySparseGPTModifier(sparsity=0.5))
        results.append(weights(model))
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())


def test_bfloat16_with_offloaded_hessians():
    model = tiny_model("mamba").bfloat16()
    run(model, modifier(allocation="optimal", offload_hessians=True))
    assert sum(zeros(model).values()) == sum(w.numel() for w in weights(model).values()) // 2
    assert all(w.dtype == torch.bfloat16 for w in weights(model).values())


def test_report_file(tmp_path):
    path = tmp_path / "report.json"
    run(tiny_model("mamba2"), modifier(report_path=str(path)))
    report = json.loads(path.read_text())
    assert report["modifier"] == "SensitivitySparseGPTModifier"
    assert report["settings"]["solver"] == "sparsegpt"
    assert report["total"]["sparsity"] == 0.5
    layer = report["layers"][0]
    assert layer["tokens"] == 3 * 2 * 24
    assert {"name", "kind", "sparsity", "relative_error", "seconds"} <= layer.keys()


@pytest.mark.parametrize("family", ["mamba", "zamba", "granitemoehybrid"])
def test_saved_checkpoint_reloads_in_a_process_without_the_package(tmp_path, family):
    model = tiny_model(family)
    run(model, modifier(allocation="optimal"), output_dir=str(tmp_path / "out"))
    check_reload(model, tmp_path / "out")


# -- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "between 0 and 1, both excluded, got 1.0"),
        ({"sparsity": 0.0}, "between 0 and 1, both excluded, got 0.0"),
        ({"sparsity": -0.1}, "between 0 and 1, both excluded, got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({}, "give sparsity, or mask_structure"),
        ({"mask_structure": "4:2"}, "got '4:2'"),
        ({"mask_structure": 124}, "must be quoted"),
        ({"mask_structure": "2:4", "sparsity": 0.6}, "makes 0.5 of the entries zero"),
        ({"mask_structure": "2:4", "allocation": "optimal"}, "only uniform is allowed"),
        ({"sparsity": 0.5, "allocation": "owl"}, "'uniform', 'paper' or 'optimal'"),
        ({"sparsity": 0.5, "alpha": 0.1}, "alpha has no meaning for allocation 'optimal'"),
        (
            {"sparsity": 0.7, "allocation": "paper", "alpha": 0.3},
            "alpha 0.3 makes sparsities of 0.4 to 1",
        ),
        ({"sparsity": 0.1, "allocation": "paper", "alpha": 0.2}, "sparsities of -0.1 to 0.3"),
        ({"sparsity": 0.5, "allocation": "paper", "alpha": -0.1}, "alpha -0.1"),
        ({"sparsity": 0.5, "solver": "wanda", "target_output": "dense"}, "needs new weights"),
        (
            {"sparsity": 0.5, "solver": "obs"},
            "'obs' is not known; known: alps, magn",
        ),
        ({"sparsity": 0.5, "block_size": 0}, "greater than or equal to 1"),
        ({"sparsity": 0.5, "dampening_frac": -1}, "greater than or equal to 0"),
        ({"sparsity": 0.5, "report_path": "report.txt"}, "must end with .json"),
        ({"sparsity": 0.5, "sparsty": 0.5}, "Extra inputs"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValidationError) as error:
        SensitivitySparseGPTModifier(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mamba", {"targets": "re:nothing"}, "targets: 're:nothing' matches no projection"),
        ("mamba", {"targets": "MambaRMSNorm"}, "projections are in_proj, conv1d, x_proj"),
        ("mamba2", {"targets": "dt_proj"}, "targets: 'dt_proj' matches no projection"),
        ("mamba", {"targets": "lm_head"}, "add 'lm_head' to ignore"),
        ("mamba", {"targets": "Linear"}, "matches lm_head, which embeds or predicts tokens"),
        ("mamba", {"targets": "Embedding"}, "matches backbone.embeddings, which embeds"),
        ("mamba", {"ignore": "MambaMixer"}, "leaves no projection"),
        ("mamba", {"ignore": "re:nothing"}, "ignore: 're:nothing' matches nothing"),
        ("mamba", {"ignore": "backbone.layers.0"}, "layers.0, which is no projection"),
        (
            "mamba",
            {"mask_structure": "2:5", "sparsity": 0.4},
            "groups of 5, got 32 in backbone.layers.0.mixer.in_proj; add",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(family, settings, message):
    model = tiny_model(family)
    dense = weights(model)
    with pytest.raises(SparseSSMError) as error:
        run(model, modifier(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(dense[name], w) for name, w in weights(model).items())


TWICE = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"]}


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_weights_of_shared_blocks(monkeypatch, family, pipeline):
    """Pruned once, after their last use, by the sum of the Hessians of all uses."""
    calls, model = record(monkeypatch), tiny_model(family, **TWICE)
    ready = batches(padded=True)
    # of Zamba2 each use reads the block's weight through a layer object of its own, too
    names = [n for n, _ in model.named_modules(remove_duplicate=False) if n.endswith("q_proj")]
    assert len(names) == 2
    expected = 0
    for name in names:
        for x, batch in zip(hooked(model, name, ready), ready, strict=True):
            real = x[batch["attention_mask"].bool()]
            expected = expected + real.T @ real
    chosen = modifier(targets="re:.*q_proj$")
    run(model, chosen, ready, pipeline=pipeline)
    ((_, hessian, _),) = calls
    assert_same_sums(hessian, expected, 1e-3)
    weights = [model.get_submodule(name).weight for name in names]
    assert torch.equal(*weights)
    assert int((weights[0] == 0).sum()) == weights[0].numel() // 2
    (layer,) = chosen.report()["layers"]
    assert [layer["name"], *layer["shared_with"]] == names
    assert layer["tokens"] == 2 * sum(int(b["attention_mask"].sum()) for b in ready)
    assert nothing_left_behind(model)


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_shared_blocks_in_the_allocation(family):
    """Each shared weight counts once; the model saved has all zeros that were asked for."""
    model = tiny_model(family, **TWICE)
    chosen = modifier(targets=["Linear", "conv1d"], ignore="lm_head", allocation="optimal")
    run(model, chosen, batches(padded=True))
    pruned = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(layer["name"] + ".weight" == name for layer in chosen.report()["layers"])
    }
    total = sum(parameter.numel() for parameter in pruned.values())
    assert len(pruned) == len(chosen.report()["layers"])
    assert sum(int((p == 0).sum()) for p in pruned.values()) == round(0.5 * total)
    assert any("shared_with" in layer for layer in chosen.report()["layers"])


def test_ignoring_one_use_ignores_the_weight():
    model = tiny_model("zamba", **TWICE)
    names = [n for n, _ in model.named_modules() if n.endswith("q_proj")]
    for targets in (names[0], names[1], names):
        (found,) = modifier(targets=targets).new_method().matching_projections(model)
        assert list(found.uses) == names
    for ignored in names:
        (found,) = (
            modifier(targets="re:.*[qv]_proj", ignore=ignored)
            .new_method()
            .matching_projections(model)
        )
        assert found.name.endswith("v_proj")


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_one_layer_under_two_names(monkeypatch, pipeline):
    """As where a module itself, not its weights, is shared by several depths."""
    calls, model, ready = record(monkeypatch), tiny_model("zamba", **TWICE), batches()
    first, second = (model.model.layers[i] for i in (0, 2))
    second.shared_transf = first.shared_transf
    name = "model.layers.0.shared_transf.self_attn.q_proj"
    x = torch.cat([x.flatten(0, 1) for x in hooked(model, name, ready)])
    assert len(x) == 2 * sum(batch["input_ids"].numel() for batch in ready)
    run(model, modifier(targets=name), ready, pipeline=pipeline)
    ((_, hessian, _),) = calls
    assert_same_sums(hessian, x.T @ x, 1e-3)


def test_weights_shared_with_something_else():
    model = tiny_model("jamba")
    first = model.model.layers[1].self_attn
    first.k_proj.weight = model.model.layers[0].mamba.out_proj.weight
    with pytest.raises(SparseSSMError, match=r"k_proj shares its weight with .*out_proj"):
        modifier(targets="re:.*self_attn.k_proj").new_method().matching_projections(model)


def test_no_data_and_nothing_but_padding():
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        oneshot(model=tiny_model("mamba"), recipe=modifier(solver="wanda"))
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        oneshot(
            model=tiny_model("mamba"),
            recipe=SensitivitySparseGPTModifier(
                sparsity=0.5, solver="magnitude", allocation="paper"
            ),
        )
    ready = batches(1)
    ready[0]["attention_mask"] = torch.zeros_like(ready[0]["attention_mask"])
    for allocation in ("uniform", "optimal"):
        with pytest.raises(SparseSSMError, match="all 2 samples are empty"):
            run(tiny_model("mamba"), modifier(allocation=allocation), ready)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("family", "norm", "where", "fields"),
    [
        ("mamba", "backbone.layers.1.norm", "layers.1.mixer", {}),
        ("mamba", "backbone.layers.1.norm", "layers.1.mixer", {"target_output": "dense"}),
        (
            "jamba",
            "model.layers.1.pre_ff_layernorm",
            "layers.1.feed_forward.gate_proj",
            {"targets": [r"re:.*feed_forward\.gate_proj"]},
        ),
    ],
)
def test_inputs_that_are_not_finite(monkeypatch, family, norm, where, fields, later):
    """At once, or as on a GPU, before anything is made of them."""
    if later:
        monkeypatch.setattr("sparsessm_plugin.calibration.overflow._later", lambda x: True)
    model = tiny_model(family)
    with torch.no_grad():
        model.get_submodule(norm).weight[3] = float("inf")
    with pytest.raises(SparseSSMError, match=f"{re.escape(where)}: its input holds NaN"):
        run(model, modifier(**fields))
    assert nothing_left_behind(model)


# a GPU multiplies halves as they are, the CPU what is widened before
_READS = "conv1d" if DEVICE == "cuda" else "out_proj"
_IN_PROJ = "first appear in the output of backbone.layers.1.mixer.in_proj in float16"
_SCAN = "first appear in the scan output of backbone.layers.1.mixer behind its gate"
_SQUARES = "all outputs of modules are finite, so float32 cannot hold the squares"


@pytest.mark.parametrize(
    ("dtype", "scale", "allocation", "layers", "where", "begins"),
    [
        (torch.float16, 1e5, "optimal", 2, "layers.1.mixer.conv1d cannot", _IN_PROJ),
        (torch.float16, 1e5, "optimal", 3, "layers.1.mixer.conv1d cannot", _IN_PROJ),
        (torch.float16, 1e5, "uniform", 2, f"layers.1.mixer.{_READS} cannot", _IN_PROJ),
        (torch.bfloat16, 1e25, "optimal", 2, "layers.1.mixer.conv1d cannot", _SCAN),
        (torch.bfloat16, 1e7, "optimal", 3, "layers.1.mixer.out_proj cannot", _SQUARES),
        (torch.bfloat16, 1e7, "uniform", 2, "layers.1.mixer.out_proj cannot", _SQUARES),
    ],
)
def test_half_precision_that_overflows(dtype, scale, allocation, layers, where, begins):
    """The message names projection, first tensor and what has become of the model."""
    model = tiny_model("mamba", num_hidden_layers=layers).to(dtype)
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight.mul_(scale)
        assert model.backbone.layers[1].mixer.in_proj.weight.isfinite().all()
    dense = weights(model)
    with pytest.raises(SparseSSMError) as error:
        run(model, modifier(allocation=allocation))
    message = str(error.value)
    assert message.startswith(f"backbone.{where}")
    assert begins in message
    pruned = [name for name, w in weights(model).items() if not torch.equal(w, dense[name])]
    if pruned:  # in the order in which data passes them, up to where the numbers end
        said = f"{len(pruned)} of 10 projections are pruned already, the last of them "
        assert allocation == "uniform"
        assert said in message
        assert message.rpartition(" ")[2] in pruned
    else:
        assert allocation == "optimal"
        assert message.endswith("; nothing was pruned")
    assert nothing_left_behind(model)


def test_predictions_that_overflow():
    """Behind the last mixer, where no Hessian shows it."""
    model = tiny_model("mamba").half()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(6e4)
    with pytest.raises(SparseSSMError) as error:
        run(model, modifier(allocation="optimal"))
    assert "first appear in the output of lm_head in float16" in str(error.value)
    assert str(error.value).endswith("nothing was pruned")


@pytest.mark.parametrize("sparsity", [0.95, 0.98])
def test_few_weights_are_kept_where_they_matter(sparsity):
    """The optimal allocation is one at any sparsity: less where nothing reads the output."""
    model = tiny_model("mamba")
    useless = "backbone.layers.1.mixer.out_proj"
    with torch.no_grad():
        model.get_submodule(useless).weight.mul_(1e-4)
    chosen = modifier(sparsity=sparsity, allocation="optimal")
    run(model, chosen)
    shares = {layer["name"]: layer["sparsity"] for layer in chosen.report()["layers"]}
    sizes = {name: w.numel() for name, w in weights(model).items()}
    assert sum(zeros(model).values()) == round(sparsity * sum(sizes.values()))
    kept = {name: 1 - share for name, share in shares.items()}
    assert kept[useless] == pytest.approx((1 - sparsity) / 4, abs=2 / sizes[useless])
    assert max(kept.values()) > 1.2 * (1 - sparsity)


def test_projections_that_read_the_same_share_a_hessian_and_its_inverse(monkeypatch):
    """Of a gated delta net: all that read what enters the mixer."""
    inverted, found = [], []
    once = damped_inverse_cholesky

    def counted(hessian, dampening_frac):
        inverted.append(hessian)
        return once(hessian, dampening_frac)

    monkeypatch.setattr(
        "sparsessm_plugin.methods.projections.inverses.damped_inverse_cholesky", counted
    )
    fields = {"solver": "alps", "target_output": "half_way"}
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(
                "sparsessm_plugin.methods.projections.statistics._first_alike",
                lambda projection, members, adapter: projection,
            )
        model = tiny_model("qwen3_next")
        run(model, modifier(**fields))
        found.append((weights(model), len(inverted)))
        inverted.clear()
    (shared, few), (each, many) = found
    mixers = len(list(find_mixers(model)))
    assert few < many == len(each)
    assert (many - few) % mixers == 0
    for name, weight in each.items():
        assert torch.equal(shared[name], weight), name


@pytest.mark.parametrize(
    ("fields", "read", "passes"),
    [
        ({}, 2, 2),  # one a layer
        ({"allocation": "paper"}, 3, 1),  # traces of different layers are compared
        ({"target_output": "half_way"}, 2, 2),  # what enters the dense mixers is kept of all
    ],
)
def test_sparsities_follow_from_enough_tokens(monkeypatch, fields, read, passes):
    """Of three batches with 48 tokens each; no projection has more than 64 inputs."""
    monkeypatch.setattr("sparsessm_plugin.methods.projections.dense.TOKENS_AN_INPUT", 1)
    seen = []
    once = DensePass.run

    def counted(self, group, sums, *args, **kwargs):
        once(self, group, sums, *args, **kwargs)
        seen.append(set(sums.tokens.values()))

    monkeypatch.setattr(DensePass, "run", counted)
    model = tiny_model("mamba")
    assert max(w.shape[-1] for w in weights(model).values()) == 64
    run(model, modifier(**{"allocation": "optimal", **fields}))
    assert seen == [{48 * read}] * passes


def test_experts_see_all_tokens_before_sparsities_are_chosen(monkeypatch):
    model = tiny_model("mamba")
    own = matching_projections(model, ProjectionSettings(sparsity=0.5), "test")
    assert enough_tokens(own) == 16 * 64
    assert enough_tokens([*own, replace(own[0], adapter=None)]) is None
    # curves look at no more inputs of wider ones
    monkeypatch.setattr("sparsessm_plugin.methods.projections.dense.CURVE_INPUTS", 48)
    assert enough_tokens(own) == 16 * 48


def test_hessians_a_few_layers_at_a_time_change_nothing(monkeypatch):
    """Layer by layer as of the whole model at once, and as on a GPU that cannot take them all."""
    once, passes, found = DensePass.run, [], []

    def counted(self, group, sums, keep, inputs_of, **kwargs):
        passes.append(bool(keep))
        once(self, group, sums, keep, inputs_of, **kwargs)

    def one_by_one(projections, in_main_memory):
        return [[projection] for projection in projections]

    monkeypatch.setattr(DensePass, "run", counted)
    where = "sparsessm_plugin.methods.projections.method"
    ways = ({}, {"by_layer": lambda *_: None}, {"in_groups": one_by_one})
    for way, expected in zip(ways, ([True] * 2, [True], [True] + [False] * 9), strict=True):
        for name, function in way.items():
            monkeypatch.setattr(f"{where}.{name}", function)
        model = tiny_model("mamba")
        chosen = modifier(allocation="optimal", target_output="half_way")
        run(model, chosen, batches(padded=True))
        assert passes == expected
        found.append(weights(model))
        passes.clear()
    in_layers, at_once, apart = found
    for name, weight in at_once.items():
        assert torch.equal(in_layers[name], weight), name
        torch.testing.assert_close(apart[name], weight, rtol=1e-4, atol=1e-5)


def test_a_mixer_with_room_enters_each_batch_once(monkeypatch, family):
    """As on a GPU: what is kept of a batch is what would be computed again."""
    once, found, counts = nn.Linear.forward, [], []
    calls = []

    def counted(self, x):
        calls.append(self)
        return once(self, x)

    def watched(members, pruned, *args):
        entries = {pruned.projection(kind).module.weight.shape for kind in pruned.entry_kinds}
        monkeypatch.setattr(nn.Linear, "forward", counted)
        sums = stage_sums(members, pruned, *args)
        monkeypatch.setattr(nn.Linear, "forward", once)
        counts.append(sum(linear.weight.shape in entries for linear in calls))
        calls.clear()
        return sums

    where = "sparsessm_plugin.methods.projections.method"
    monkeypatch.setattr(f"{where}.stage_sums", watched)
    for roomy in (False, True):
        monkeypatch.setattr(f"{where}.has_room", lambda device, needed, roomy=roomy: roomy)
        model = tiny_model(family)
        run(model, modifier(target_output="mixer"), batches(padded=True))
        found.append((weights(model), sum(counts)))
        counts.clear()
    (plain, several), (kept, few) = found
    mixers = find_mixers(model)
    assert few == sum(3 * len(adapter.entry_kinds) for adapter in mixers)  # of three batches
    # a GPU's fast path multiplies by what is dense there in calls of its own, which round otherwise
    assert several == 3 * few if DEVICE == "cpu" else several > few
    for name, weight in plain.items():
        if DEVICE == "cpu":
            assert torch.equal(kept[name], weight), name
        else:
            assert same_choices(kept[name], weight), name
