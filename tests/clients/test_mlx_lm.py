"""mlx-lm on the CPU reads what is saved, dense and pruned, and gives transformers' logits.

It stands in a Python environment of its own, `.venv-clients` of `make clients`, or the interpreter
that ``SPARSESSM_CLIENTS`` names.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.methods import remove_states

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("mlx_logits.py")
ONE_GROUP = {"mamba_n_groups": 1}
# sizes that all limits of the registry let through; dense Falcon-H1 comes out otherwise there
FAMILIES = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"n_groups": 1},
    "jamba": {},
    "granitemoehybrid": {**ONE_GROUP, "num_local_experts": 0},
    "nemotron_h": {},
}


@cache
def client():
    """A Python with mlx-lm, or why there is none."""
    python = os.environ.get("SPARSESSM_CLIENTS", ROOT / ".venv-clients" / "bin" / "python")
    if not Path(python).exists():
        return None, f"no {python}; `make clients` makes it"
    done = subprocess.run([python, "-c", "import mlx_lm"], capture_output=True, check=False)
    return (str(python), "") if done.returncode == 0 else (None, f"{python} has no mlx-lm")


def published_words(model):
    """Let the model come from a config.json with the words of published checkpoints."""
    path = Path(model.config._name_or_path) / "config.json"
    text = path.read_text().replace('"linear_attention"', '"mamba"')
    path.write_text(text.replace('"full_attention"', '"attention"'))


def save(model, folder, ids):
    change_config(model, {})
    model.save_pretrained(folder)
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_dense_and_pruned_models_of_every_family_that_it_knows(tmp_path):
    python, why = client()
    if python is None:
        pytest.skip(why)
    ids = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = {}
    for family, changes in FAMILIES.items():
        for kind in ("dense", "pruned"):
            model = tiny_model(family, **changes)
            published_words(model)
            if kind == "pruned":
                fields = remove_states(
                    model, keep=4, saliency="magnitude", compensate="none"
                ).config_fields
                change_config(model, fields)
            folder = tmp_path / f"{family}-{kind}"
            expected[folder] = save(model, folder, ids)
            answers = {support.runtime: support for support in runtime_support(folder)}
            found = answers["mlx-lm (CPU)"]
            assert found.answer == "yes", (folder.name, found.reasons)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, SCRIPT, json.dumps(list(map(str, expected)))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr, file=sys.stderr)
    for (folder, logits), result in zip(
        expected.items(), json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert "error" not in result, (folder.name, result)
        for way in ("whole", "steps"):
            got = torch.tensor(result[way])
            torch.testing.assert_close(
                got, logits, rtol=1e-3, atol=1e-3, msg=lambda m, f=folder: f"{f.name}: {m}"
            )
