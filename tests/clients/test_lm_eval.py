"""lm-eval's own command scores a pruned folder as this package does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.evaluation.tasks import TASK_CONFIGS, evaluate_tasks, load_tasks
from sparsessm_plugin.methods import remove_states

ENDINGS = [("The function returns", " None"), ("A list is a mutable", " sequence")]


def test_its_command_on_a_pruned_folder(tmp_path):
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    removed = remove_states(model, keep=8, saliency="magnitude", compensate="none")
    change_config(model, removed.config_fields)
    model.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    lines = [json.dumps({"context": context, "target": target}) for context, target in ENDINGS]
    texts = tmp_path / "data" / "zeroshot" / "lambada"
    texts.mkdir(parents=True)
    (texts / "test.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'pruned'}", "--tasks", "lambada_local"]
    command += ["--include_path", str(TASK_CONFIGS), "--output_path", str(tmp_path / "out")]
    command += ["--metadata", json.dumps({"tasks_data": str(tmp_path / "data")})]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    [report] = Path(tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(report.read_text())["results"]["lambada_local"]
    [ours] = evaluate_tasks(
        model, tokenizer, load_tasks(["lambada_local"], tmp_path / "data")
    ).values()
    for metric, found in ours.metrics.items():
        assert theirs[f"{metric},none"] == pytest.approx(found.value, rel=1e-4)
