"""llama.cpp on the CPU, by its own converter, reads what is saved and gives transformers' logits.

The converter comes with the source package of llama-cpp-python, which `make clients` unpacks:
`.venv-clients/llama.cpp`, or the folder that ``SPARSESSM_LLAMA_CPP`` names.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from readers import GREEDY, ROOT, check, python_with, run, tiny_checkpoints, trained_checkpoints

# without experts their number a token is none or one, as in published configs
FAMILIES = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"n_groups": 1},
    "jamba": {"num_experts_per_tok": 1},
    "granitemoehybrid": {"mamba_n_groups": 1, "num_local_experts": 0, "num_experts_per_tok": 0},
    "nemotron_h": {},
    "falcon_h1": {},
}
RUNTIME = "llama.cpp (CPU)"


def read(expected):
    """Convert and decode."""
    python = python_with("xllamacpp")
    root = Path(os.environ.get("SPARSESSM_LLAMA_CPP", ROOT / ".venv-clients" / "llama.cpp"))
    if not (root / "convert_hf_to_gguf.py").exists():
        pytest.skip(f"no converter in {root}; `make clients` puts it there")
    errors = run(sys.executable, "llama_convert.py", root, "f32", *expected)
    assert errors == [None] * len(expected), dict(zip(expected, errors, strict=True))
    return run(python, "llama_logits.py", json.dumps(list(map(str, expected))), GREEDY)


def test_dense_and_pruned_models_of_every_family_that_it_knows(tmp_path):
    python_with("xllamacpp")
    expected = tiny_checkpoints(tmp_path, FAMILIES, RUNTIME)
    check(expected, read(expected))


def test_trained_models(tmp_path):
    python_with("xllamacpp")
    expected = trained_checkpoints(tmp_path, RUNTIME)
    check(expected, read(expected))
