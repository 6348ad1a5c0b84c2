"""The benchmark of serving measures every row on a CPU, and goes on where it was stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness
from experiments import serving
from run import Common, run_experiment


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
