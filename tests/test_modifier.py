"""SparseSSMModifier through llmcompressor's own oneshot()."""

import gc
import json
import sys

import pytest
import torch
from conftest import batches, check_reload, nothing_left_behind, run, state, tiny_model
from llmcompressor import oneshot
from llmcompressor.core import State
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from sparsessm_plugin import SparseSSMModifier
from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.criteria import SALIENCIES, SaliencyInputs, Unstructured, aggregate
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.modifiers.lifecycle import outputs_collected_again, outputs_not_collected
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan

COMBINATIONS = [
    (saliency, aggregation, pruned_value)
    for saliency, entry in SALIENCIES.items()
    for aggregation in (entry.aggregations or (None,))
    for pruned_value in PRUNED_VALUES
]


def all_A_log(model):
    return [adapter.A_log.detach().cpu().clone() for adapter in find_mixers(model)]


def test_transformers_has_a_name_more_only_as_long_as_somebody_needs_it(monkeypatch):
    model = tiny_model("mamba")
    names = vars(sys.modules[type(model).__module__])
    first, second = outputs_not_collected(model), outputs_not_collected(model)
    for undo in (first, first):  # the second time it does nothing
        undo()
        assert names["output_hidden_states"] is False
    second()
    assert nothing_left_behind(model)
    failed = outputs_not_collected(model)
    outputs_collected_again()
    assert nothing_left_behind(model)
    later = outputs_not_collected(model)
    failed()  # of a run before
    assert names["output_hidden_states"] is False
    later()
    assert nothing_left_behind(model)
    monkeypatch.setitem(names, "output_hidden_states", True)  # transformers' own
    outputs_not_collected(model)()
    assert names["output_hidden_states"] is True


def test_a_modifier_that_is_dropped_takes_the_name_back():
    """LLM Compressor tells its modifiers nothing when a run fails before calibration."""
    model = tiny_model("mamba")
    names = vars(sys.modules[type(model).__module__])
    modifier = SparseSSMModifier(sparsity=0.5, saliency="magnitude")
    modifier.initialize(State(model=model))
    assert names["output_hidden_states"] is False
    del modifier
    gc.collect()
    assert nothing_left_behind(model)


@pytest.mark.parametrize(("saliency", "aggregation", "pruned_value"), COMBINATIONS)
def test_every_combination_prunes_exactly(saliency, aggregation, pruned_value):
    model = tiny_model("mamba")
    before = all_A_log(model)
    modifier = SparseSSMModifier(
        sparsity=0.3, saliency=saliency, aggregation=aggregation, pruned_value=pruned_value
    )
    run(model, modifier)
    for old, new in zip(before, all_A_log(model), strict=True):
        changed = old != new
        assert (new[changed] == PRUNED_VALUES[pruned_value]).all()
        assert changed.sum() == round(0.3 * old.numel())


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_every_family_and_pipeline(mamba1_family, pipeline):
    model = tiny_model(mamba1_family)
    before = all_A_log(model)
    others = {k: v for k, v in state(model).items() if not k.endswith("A_log")}
    run(model, SparseSSMModifier(sparsity=0.5), batches(padded=True), pipeline=pipeline)
    for old, new in zip(before, all_A_log(model), strict=True):
        assert ((new == 0) & (old != 0)).sum() == round(0.5 * old.numel())
    after = state(model)
    for name, value in others.items():
        assert torch.equal(after[name], value), name
    assert nothing_left_behind(model)


@pytest.mark.parametrize("saliency", ["hessian", "transition", "output_error"])
def test_sequential_selection_is_that_of_the_reference(saliency):
    """An oracle without the framework: prune layer by layer with the reference scan."""
    model, oracle = tiny_model("mamba"), tiny_model("mamba")
    ready = batches(padded=True)
    run(model, SparseSSMModifier(sparsity=0.5, saliency=saliency), ready)
    entry = SALIENCIES[saliency]
    aggregation = entry.aggregations[0]
    with torch.no_grad():
        streams = [oracle.get_input_embeddings()(b["input_ids"]) for b in ready]
        for layer, adapter in zip(oracle.backbone.layers, find_mixers(oracle), strict=True):
            statistics = ScanStatistics(entry.request(aggregation, "zero"), *adapter.A_log.shape)
            for stream, batch in zip(streams, ready, strict=True):
                quantities = adapter.quantities(layer.norm(stream), batch["attention_mask"])
                scan(quantities, statistics, REFERENCE)
            inputs = SaliencyInputs(
                adapter.A_log,
                adapter.out_norm,
                statistics.state_energy,
                statistics.transition,
                statistics.output_error,
            )
            pattern = Unstructured(0.5)
            ranking = aggregate(entry, aggregation, inputs, statistics.steps, pattern)
            adapter.A_log[ranking.select(pattern)] = 0
            streams = [
                layer(s, attention_mask=b["attention_mask"])
                for s, b in zip(streams, ready, strict=True)
            ]
    for ours, expected in zip(all_A_log(model), all_A_log(oracle), strict=True):
        assert torch.equal(ours, expected)


def test_basic_pipeline_looks_at_the_dense_model():
    """Every layer is judged on dense activations, so the layers before it do not matter."""
    both, last = tiny_model("mamba"), tiny_model("mamba")
    run(both, SparseSSMModifier(sparsity=0.5), pipeline="basic")
    run(last, SparseSSMModifier(sparsity=0.5, targets="backbone.layers.1.mixer"), pipeline="basic")
    assert torch.equal(all_A_log(both)[1], all_A_log(last)[1])
    assert torch.equal(all_A_log(tiny_model("mamba"))[0], all_A_log(last)[0])


def test_two_runs_are_bit_identical(mamba1_family):
    results = []
    for _ in range(2):
        model = tiny_model(mamba1_family)
        run(model, SparseSSMModifier(sparsity=0.4))
        results.append(all_A_log(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batch_size_and_padding_do_not_change_the_choice():
    """The same tokens one by one, in batches, and with padding around them."""
    rows = [b["input_ids"][i : i + 1] for b in batches() for i in range(2)]
    single = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]
    padded = [
        {
            "input_ids": torch.nn.functional.pad(r, (0, 9)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(r), (0, 9)),
        }
        for r in rows
    ]
    together = [{"input_ids": torch.cat(rows), "attention_mask": torch.ones(6, 24).long()}]
    unmasked = [{"input_ids": r} for r in rows]
    results = []
    for ready in (single, padded, together, unmasked):
        model = tiny_model("mamba")
        run(model, SparseSSMModifier(sparsity=0.5), ready, pipeline="basic")
        results.append(all_A_log(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_model():
    model = tiny_model("mamba").bfloat16()
    run(model, SparseSSMModifier(sparsity=0.5, pruned_value="memoryless"))
    for A_log in all_A_log(model):
        assert A_log.dtype == torch.bfloat16
        assert (A_log == 38).sum() == A_log.numel() // 2


def test_semi_structured():
    model = tiny_model("mamba")
    run(model, SparseSSMModifier(mask_structure="2:4"))
    for A_log in all_A_log(model):
        assert ((A_log == 0).reshape(-1, 4).sum(1) == 2).all()


def test_entries_that_are_zero_already_count_only_if_chosen():
    model = tiny_model("mamba")
    with torch.no_grad():
        for adapter in find_mixers(model):
            adapter.A_log[:, 0] = 0  # as mamba's initialisation has it
    modifier = SparseSSMModifier(sparsity=0.25)
    run(model, modifier)
    for A_log, layer in zip(all_A_log(model), modifier.report()["layers"], strict=True):
        # pruning a zero to zero costs nothing, so all of the first column is chosen
        assert layer["pruned"] == round(0.25 * A_log.numel())
        assert layer["zero_before"] == layer["zero_before_and_pruned"] == A_log.shape[0]
        assert (A_log == 0).sum() == layer["pruned"]
    model = tiny_model("mamba")
    with torch.no_grad():
        for adapter in find_mixers(model):
            adapter.A_log[:, 0] = 0
    modifier = SparseSSMModifier(sparsity=0.25, pruned_value="memoryless")
    run(model, modifier)
    for A_log, layer in zip(all_A_log(model), modifier.report()["layers"], strict=True):
        assert (A_log == 38).sum() == layer["pruned"] == round(0.25 * A_log.numel())
        assert (A_log == 0).sum() == layer["zero_before"] - layer["zero_before_and_pruned"]


def test_memoryless_entries_forget():
    """exp(dt A) of a pruned entry is exactly zero, however small dt is in practice."""
    model = tiny_model("mamba")
    run(model, SparseSSMModifier(sparsity=0.5, pruned_value="memoryless"))
    adapter = find_mixers(model)[0]
    pruned = adapter.A_log == 38
    with torch.no_grad():
        adapter.mixer.dt_proj.bias -= 25  # dt about 1e-11
        q = adapter.quantities(torch.randn(1, 5, 32))
    assert q.dt.min() < 1e-10
    assert (torch.exp(q.dt[0, 0, :, None] * q.A)[pruned] == 0).all()


def test_targets_and_ignore():
    for settings, treated in (
        ({"targets": ["re:.*layers\\.0.*"]}, [0]),
        ({"targets": "MambaMixer", "ignore": ["backbone.layers.0.mixer"]}, [1]),
        ({"ignore": "re:.*\\.1\\.mixer"}, [0]),
    ):
        model = tiny_model("mamba")
        before = all_A_log(model)
        run(model, SparseSSMModifier(sparsity=0.5, **settings))
        changed = [
            i
            for i, (a, b) in enumerate(zip(before, all_A_log(model), strict=True))
            if not torch.equal(a, b)
        ]
        assert changed == treated


def test_magnitude_needs_no_data():
    model = tiny_model("mamba")
    oneshot(model=model, recipe=SparseSSMModifier(sparsity=0.5, saliency="magnitude"))
    for old, new in zip(all_A_log(tiny_model("mamba")), all_A_log(model), strict=True):
        cut = old.abs().flatten().sort().values[old.numel() // 2 - 1]
        assert torch.equal(new, torch.where(old.abs() <= cut, 0.0, old))


def test_report_file(tmp_path):
    path = tmp_path / "report.json"
    run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5, report_path=str(path)))
    report = json.loads(path.read_text())
    assert report["settings"]["saliency"] == "output_error"
    assert "requires_calibration_data" not in report["settings"]
    assert report["total"]["sparsity"] == 0.5
    assert [layer["name"] for layer in report["layers"]] == [
        "backbone.layers.0.mixer",
        "backbone.layers.1.mixer",
    ]
    layer = report["layers"][0]
    assert layer["tokens"] == 3 * 2 * 24
    assert layer["highest_pruned"] <= layer["lowest_kept"]
    quantiles = list(layer["saliency_quantiles"].values())
    assert quantiles == sorted(quantiles)


def test_saved_checkpoint_reloads_in_a_process_without_the_package(tmp_path, mamba1_family):
    model = tiny_model(mamba1_family)
    run(model, SparseSSMModifier(sparsity=0.5), output_dir=str(tmp_path / "out"))
    more = """
new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
full = [model(new[:, :n], use_cache=False).logits[:, -1].argmax(-1) for n in range(15, 19)]
assert torch.equal(torch.stack(full, 1), new[:, 15:])
"""
    check_reload(model, tmp_path / "out", more)
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))


# -- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.0}, "between 0 and 1, both excluded, got 0.0"),
        ({"sparsity": 1.0}, "got 1.0"),
        ({"sparsity": 1.5}, "got 1.5"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": True}, "got 1.0"),
        ({}, "give either sparsity or mask_structure, got neither"),
        ({"sparsity": 0.5, "mask_structure": "2:4"}, "got both"),
        ({"mask_structure": "4:2"}, "0 < n < m (n zeros in every m), got '4:2'"),
        ({"sparsity": 0.5, "saliency": "fisher"}, "saliency of A_log 'fisher' is not known"),
        ({"sparsity": 0.5, "saliency": "magnitude", "aggregation": "mean"}, "no time axis"),
        ({"sparsity": 0.5, "decay_gamma": 0.0}, "greater than 0"),
        ({"sparsity": 0.5, "decay_window": 2}, "less than or equal to 1"),
        ({"sparsity": 0.5, "decay_power": float("inf")}, "finite"),
        ({"sparsity": 0.5, "pruned_value": "one"}, "'zero' or 'memoryless'"),
        ({"sparsity": 0.5, "report_path": "report.txt"}, "must end with .json, got 'report.txt'"),
        ({"sparsity": 0.5, "report_path": "/no/such/r.json"}, "does not exist"),
        ({"sparsity": 0.5, "targets": "re:["}, "'re:[' is no regular expression"),
        ({"sparsity": 0.5, "sparsty": 0.5}, "Extra inputs"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValidationError) as error:
        SparseSSMModifier(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "re:nothing"}, "targets: 're:nothing' matches no state-space mixer"),
        ({"targets": "Linear"}, "targets: 'Linear' matches no state-space mixer"),
        ({"ignore": "MambaMixer"}, "leaves no state-space mixer"),
        ({"ignore": "backbone.layers.0"}, "ignore: 'backbone.layers.0' matches no state-space"),
        ({"sparsity": 1e-6}, "rounds to 0 of the 64 x 8 entries in backbone.layers.0.mixer"),
        ({"sparsity": 0.99999}, "rounds to 512 of the 64 x 8 entries"),
        ({"sparsity": None, "mask_structure": "1:3"}, "divisible by 3, got 8 in backbone.layers.0"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    model = tiny_model("mamba")
    before = all_A_log(model)
    with pytest.raises(SparseSSMError) as error:
        run(model, SparseSSMModifier(**{"sparsity": 0.5, **settings}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, all_A_log(model), strict=True))


def test_no_data_and_empty_data():
    with pytest.raises(SparseSSMError, match="needs calibration data"):
        oneshot(model=tiny_model("mamba"), recipe=SparseSSMModifier(sparsity=0.5))
    with pytest.raises(SparseSSMError, match="empty"):
        run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5), [])


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_sequences_of_one_token(pipeline):
    ready = [{"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}]
    with pytest.raises(SparseSSMError, match="at least 2"):
        run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5), ready, pipeline=pipeline)


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_nothing_but_padding(pipeline):
    ready = batches(1)
    ready[0]["attention_mask"] = torch.zeros_like(ready[0]["attention_mask"])
    with pytest.raises(SparseSSMError, match="all 2 samples are empty"):
        run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5), ready, pipeline=pipeline)


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_token_outside_the_vocabulary(pipeline):
    ready = batches(2)
    ready[1]["input_ids"][0, 3] = 96
    with pytest.raises(SparseSSMError, match="token id 96; the model's vocabulary has ids 0 to 95"):
        run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5), ready, pipeline=pipeline)


def test_nan_in_a_weight():
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.dt_proj.weight[0, 0] = float("nan")
    with pytest.raises(SparseSSMError, match=r"backbone\.layers\.1\.mixer\.dt_proj\.weight holds"):
        run(model, SparseSSMModifier(sparsity=0.5))


def test_nan_in_an_activation():
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.layers[0].norm.weight[3] = float("inf")
    with pytest.raises(SparseSSMError, match=r"backbone\.layers\.0\.mixer: its input holds NaN"):
        run(model, SparseSSMModifier(sparsity=0.5))


def test_overflow_inside_the_recurrence():
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight.mul_(1e36)
    with pytest.raises(SparseSSMError, match=r"backbone\.layers\.1\.mixer: NaN or infinite"):
        run(model, SparseSSMModifier(sparsity=0.5))


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_a_failure_in_the_middle_takes_everything_off_the_model(pipeline):
    model = tiny_model("mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight.mul_(1e36)
    with pytest.raises(SparseSSMError):
        run(model, SparseSSMModifier(sparsity=0.5), pipeline=pipeline)
    assert nothing_left_behind(model)


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_two_stages_on_different_layers(pipeline):
    model = tiny_model("mamba")
    modifiers = [
        SparseSSMModifier(sparsity=0.25, targets="backbone.layers.0.mixer"),
        SparseSSMModifier(sparsity=0.5, targets="backbone.layers.1.mixer"),
    ]
    run(model, modifiers, pipeline=pipeline)
    assert [int((A == 0).sum()) for A in all_A_log(model)] == [128, 256]
    assert nothing_left_behind(model)


def test_long_padding_on_the_left_with_frequency():
    """Whole chunks of steps without any state: they have no vote, and no crash."""
    ready = batches(2, 2, 160)
    for batch in ready:
        batch["attention_mask"][:, :80] = 0
    model = tiny_model("mamba")
    run(model, SparseSSMModifier(sparsity=0.5, saliency="hessian"), ready)
    assert all((A == 0).sum() == A.numel() // 2 for A in all_A_log(model))


def test_report_path_of_somebody_else(tmp_path):
    path = tmp_path / "package.json"
    path.write_text('{"name": "mine"}')
    with pytest.raises(ValidationError, match="exists and is no report"):
        SparseSSMModifier(sparsity=0.5, report_path=str(path))


def test_a_failed_run_leaves_the_mixers_usable():
    model = tiny_model("mamba")
    ready = batches(2)
    ready[1]["input_ids"][0, 3] = 96
    ids = torch.randint(1, 96, (1, 8))
    with torch.no_grad():
        dense = model(ids).logits
    with pytest.raises(SparseSSMError):
        run(model, SparseSSMModifier(sparsity=0.5), ready)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
    run(model, SparseSSMModifier(sparsity=0.5))  # and a second try works
    assert all((A == 0).sum() == A.numel() // 2 for A in all_A_log(model))


def test_model_without_mixers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    config._name_or_path = str(tmp_path)
    with pytest.raises(SparseSSMError, match="LlamaForCausalLM has no state-space mixer"):
        run(model, SparseSSMModifier(sparsity=0.5))


def test_unknown_mixer_beside_a_known_one():
    model = tiny_model("mamba")

    class OtherMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(2, 2))

    model.other = OtherMixer()
    with pytest.raises(SparseSSMError, match="OtherMixer, which is not a known"):
        run(model, SparseSSMModifier(sparsity=0.5))
    run(model, SparseSSMModifier(sparsity=0.5, targets="MambaMixer"))  # named, it works


def test_one_transition_a_head_is_refused(mamba2_family):
    """By the sizes alone, so before any weight is loaded."""
    config = tiny_model(mamba2_family).config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    for settings in ({"sparsity": 0.5}, {"mask_structure": "2:4", "saliency": "magnitude"}):
        with pytest.raises(SparseSSMError) as error:
            SparseSSMModifier(**settings).matching_mixers(skeleton)
        message = str(error.value)
        assert find_mixers(skeleton)[0].name in message
        assert "one entry a head" in message
        assert "StateRemovalModifier" in message
        assert "\n" not in message


def test_one_transition_a_head_is_refused_by_oneshot():
    model = tiny_model("mamba2")
    before = all_A_log(model)
    with pytest.raises(SparseSSMError, match="one entry a head"):
        run(model, SparseSSMModifier(sparsity=0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, all_A_log(model), strict=True))
    assert nothing_left_behind(model)


def test_request_is_documented_for_every_saliency():
    assert all(entry.source for entry in SALIENCIES.values())
    assert StatisticsRequest().needs_scan is False
