"""vLLM's build for the CPU reads what is saved and gives transformers' probabilities.

It stands in a Python environment of its own, `.venv-vllm` of `make clients-vllm`, or the
interpreter that ``SPARSESSM_VLLM`` names.
"""

import json

import torch
from readers import GREEDY, python_with, run, tiny_checkpoints, trained_checkpoints

# its attention on a CPU has no heads of 8
FAMILIES = {
    "mamba2": {"n_groups": 1},
    "granitemoehybrid": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_n_heads": 16,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    },
    "falcon_h1": {"head_dim": 32},
    "nemotron_h": {"head_dim": 32},
}
RUNTIME = "vLLM (CPU)"


def compare(expected, python):
    for folder, wanted in expected.items():  # a process each: an engine keeps its memory
        [result] = run(python, "vllm_logits.py", json.dumps([str(folder)]), GREEDY)
        assert "error" not in result, (folder.name, result)
        own = wanted["logits"][:, :-1].log_softmax(-1)
        got = torch.tensor(result["log_probabilities"])
        difference = (got - own).abs().max().item()
        following = wanted["ids"][:, 1:, None]
        ratio = (own.gather(2, following) - got.gather(2, following)).mean().exp().item()
        print(f"| {folder.name} | {difference:.1e} | {ratio - 1:.0e} |")
        assert difference < 1e-3, (folder.name, difference)
        assert abs(ratio - 1) < 1e-3, (folder.name, ratio)
        assert result["greedy"] == wanted["greedy"], folder.name


def python():
    return python_with("vllm", "SPARSESSM_VLLM", ".venv-vllm")


def test_dense_and_pruned_models_of_every_family_that_it_knows(tmp_path):
    client = python()
    compare(tiny_checkpoints(tmp_path, FAMILIES, RUNTIME), client)


def test_trained_models(tmp_path):
    client = python()
    compare(trained_checkpoints(tmp_path, RUNTIME), client)
