"""What the tests of other runtimes share: checkpoints, what transformers makes of them, the client.

A client stands in a Python environment of its own, which `make clients` fills: `.venv-clients`, or
the interpreter that ``SPARSESSM_CLIENTS`` names (``SPARSESSM_VLLM`` for vLLM).
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
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.evaluation.data import read_texts, tokenize, windows
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods import remove_states

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
GREEDY = 8
TRAINED = ("mamba-6m", "mamba2-6m", "granite-hybrid-16m", "qwen3_5-15m")


@cache
def python_with(module, variable="SPARSESSM_CLIENTS", folder=".venv-clients"):
    """A Python that has a module; skips the test where there is none."""
    python = os.environ.get(variable, ROOT / folder / "bin" / "python")
    if not Path(python).exists():
        pytest.skip(f"no {python}; `make clients` makes it")
    done = subprocess.run(
        [python, "-c", f"import {module}"], capture_output=True, check=False, env=_environment()
    )
    if done.returncode != 0:
        pytest.skip(f"{python} has no {module}")
    return str(python)


def _environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(python, script, *arguments):
    """The JSON that a script prints last."""
    done = subprocess.run(
        [python, SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def published_words(model):
    """Let the model come from a config.json with the words of published checkpoints."""
    path = Path(model.config._name_or_path) / "config.json"
    text = path.read_text().replace('"linear_attention"', '"mamba"')
    config = json.loads(text.replace('"full_attention"', '"attention"'))
    if config["model_type"] == "nemotron_h":
        letters = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
        kinds = config["layers_block_type"]
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    path.write_text(json.dumps(config))


def without_defaults(folder):
    """Take out what transformers writes of experts that are not there, as published configs do."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "moe" not in config.get("layers_block_type", ["moe"]):
        of_experts = ("expert", "moe_", "topk", "routed_")
        names = [name for name in config if any(part in name for part in of_experts)] + ["n_group"]
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in names}))


def expected_of(model, folder, ids):
    """Save a model and the ids that its client is to read; what transformers makes of them."""
    change_config(model, {})
    model.save_pretrained(folder)
    without_defaults(folder)
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    model.eval()
    with torch.no_grad():
        logits, text = model(ids, use_cache=False).logits, ids[:1]
        for _ in range(GREEDY):  # whole passes: nothing depends on transformers' caches
            row = model(text, use_cache=False).logits[:, -1:]
            text = torch.cat([text, row.argmax(-1)], 1)
    return {"logits": logits, "greedy": text[0, ids.shape[1] :].tolist(), "ids": ids}


def tiny_checkpoints(folder, families, runtime):
    """Dense and pruned tiny models that the registry lets this runtime have."""
    ids = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for family, changes in families.items():
        for kind in ("dense", "pruned"):
            model = tiny_model(family, **changes)
            published_words(model)
            if kind == "pruned":
                fields = remove_states(
                    model, keep=4, saliency="magnitude", compensate="none"
                ).config_fields
                change_config(model, fields)
            place = folder / f"{family}-{kind}"
            found[place] = expected_of(model, place, ids)
            answers = {support.runtime: support for support in runtime_support(place)}
            assert answers[runtime].answer == "yes", (place.name, answers[runtime].reasons)
    return found


def trained_checkpoints(folder, runtime):
    """Dense trained models and these with half of the states, as far as the registry lets."""
    root = Path(os.environ.get("SPARSESSM_ASSETS", ROOT.parent / "shared"))
    found = {}
    for name in TRAINED:
        if not (root / "models" / name).is_dir():
            continue
        texts = read_texts(str(root / "data" / "corpus" / "validation.jsonl"))
        ids = windows(
            tokenize(texts, AutoTokenizer.from_pretrained(root / "models" / name)), 96, name
        )[:2]
        for kind in ("dense", "pruned"):
            model = AutoModelForCausalLM.from_pretrained(
                root / "models" / name, dtype=torch.float32
            )
            if kind == "pruned":
                keep = find_mixers(model)[0].sizes.state_size // 2
                fields = remove_states(
                    model, keep=keep, saliency="magnitude", compensate="none"
                ).config_fields
                change_config(model, fields)
            place = folder / f"{name}-{kind}"
            expected = expected_of(model, place, ids)
            answers = {support.runtime: support for support in runtime_support(place)}
            if answers[runtime].answer != "no":
                found[place] = expected
    if not found:
        pytest.skip("no trained checkpoints")
    return found


def perplexity(logits, ids):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss.exp().item()


def check(expected, results, tolerance=1e-3):
    """Logits, perplexity and greedy tokens are transformers'; prints a row for each checkpoint."""
    for (folder, wanted), result in zip(expected.items(), results, strict=True):
        assert "error" not in result, (folder.name, result)
        for way in [way for way in ("whole", "steps") if way in result]:
            got = torch.tensor(result[way])
            difference = (got - wanted["logits"]).abs().max().item()
            ratio = perplexity(got, wanted["ids"]) / perplexity(wanted["logits"], wanted["ids"])
            largest = wanted["logits"].abs().max().item()
            print(
                f"| {folder.name} | {way} | {difference:.1e} of {largest:.1f} | {ratio - 1:.0e} |"
            )
            assert difference < tolerance, (folder.name, way, difference)
            assert abs(ratio - 1) < 1e-3, (folder.name, way, ratio)
        if "greedy" in result:
            assert result["greedy"] == wanted["greedy"], folder.name
