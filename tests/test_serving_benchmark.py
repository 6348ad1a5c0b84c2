"""The benchmark of serving measures every row on a CPU, and goes on where it was stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness
from experiments import serving, serving_llama_cpp, structure_latency
from run import Common, run_experiment

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.timing import Workload, features_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of a GPU refuse the CPU")
def test_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    failing = iter([RuntimeError("of a first attempt")])
    work = serving.decode_row

    def sometimes(*arguments):
        for error in failing:
            raise error
        return work(*arguments)

    def go_on(budget=float("inf")):
        common = Common(name="x", resume=True, budget=budget)
        with pytest.raises(SystemExit) as ended:
            run_experiment("serving", serving.EXPERIMENT, {"device": "cpu"}, common)
        return ended.value.code

    monkeypatch.setattr(serving, "decode_row", sometimes)
    assert go_on(budget=0) == 0  # no time
    assert go_on() == 1
    assert go_on() == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    found = [{k: row[k] for k in ("shape", "what", "batch", "N") if k in row} for row in rows]
    assert sorted(map(str, found)) == sorted(map(str, serving.keys("cpu")))
    text = (tmp_path / "x.md").read_text()
    assert "of a first attempt" not in text
    for row in rows:
        assert all(model["tokens_per_second"] > 0 for model in row["models"])
        if row["what"] == serving.AT_CAPACITY:
            counted = row["counted"]
            left = counted["memory"] - counted["weights"]
            assert counted["sequences"] == left // counted["cache"]["total"]
        else:
            assert [model["model"] for model in row["models"]] == ["N 16", "N 8", "N 4"]
            assert row["models"][0]["speedup"] == 1


@pytest.mark.parametrize("family", serving_llama_cpp.STATES)
def test_times_of_llama_cpp_that_follow_their_parts_are_predicted(family):
    """Rows as a machine would give them whose times are a sum of what grows with the sizes."""
    chosen = serving_llama_cpp.Fields(removed="fast-1.5x", families=[family], tiny=True)
    rows, configs = zip(*serving_llama_cpp.models_to_time(chosen), strict=True)
    assert [row["model"] for row in rows[:2]] == ["dense", "fast-1.5x"]
    assert [config.num_hidden_layers for config in configs] == [row["layers"] for row in rows]
    dense, fast = rows[0], rows[1]
    assert fast["layers"] == round(0.67 * dense["layers"])
    assert fast["N"] == dense["N"] // 2
    weights = np.array([2.0, 0.5, 3.0, 10.0, 4.0, 1.0, 3.0])
    for row in rows:
        features = features_of(np.array(row["quantities"]), Workload(1, chosen.prompt))
        row["prompt"] = row["generation"] = [1000 / float(features @ weights)] * 3
    numbers = {"rows": rows}
    speedup = fast["prompt"][0] / dense["prompt"][0]
    assert speedup > 1
    for phase in ("prompt", "generation"):
        found = serving_llama_cpp.predicted_speedup(numbers, chosen, fast, phase)
        assert found == pytest.approx(speedup, rel=1e-6)
    assert serving_llama_cpp.ratios(numbers)[f"{family}, fast-1.5x, prompt"] == speedup
    table = serving_llama_cpp.render(numbers, chosen)
    assert len([line for line in table.splitlines() if line.startswith(f"| {family}")]) == 2


def test_passes_by_the_scan_in_numba_take_turns(monkeypatch):
    models = {
        name: serving_llama_cpp.random_model(config, "cpu")
        for name, config in structure_latency.shapes_of("tiny").items()
        if "broken" not in name
    }
    turns, scanned = [], []
    scan = structure_latency.fast_forward

    def followed(model):
        turns.append(model)
        return scan(model)

    monkeypatch.setattr(structure_latency, "fast_forward", followed)
    for model in models.values():
        mixer = find_mixers(model)[0].mixer
        mixer.register_forward_hook(lambda m, *_: scanned.append("forward" in vars(m)))
    workload = structure_latency.workloads("cpu", scan=True)[0]
    found = structure_latency.scans(models, workload, torch.device("cpu"), 2)
    assert turns == 3 * list(models.values())  # once to compile
    assert all(scanned)
    assert [len(timing.seconds) for timing in found.timings] == [2, 2]
    assert structure_latency.phase_of(found) == "prefill"
