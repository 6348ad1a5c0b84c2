"""mlx-lm on the CPU reads what is saved, dense and pruned, and gives transformers' logits."""

import json

from readers import check, python_with, run, tiny_checkpoints, trained_checkpoints

# sizes that all limits of the registry let through; dense Falcon-H1 comes out otherwise there
FAMILIES = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"n_groups": 1},
    "jamba": {},
    "granitemoehybrid": {"mamba_n_groups": 1, "num_local_experts": 0},
    "nemotron_h": {},
}
RUNTIME = "mlx-lm (CPU)"


def test_dense_and_pruned_models_of_every_family_that_it_knows(tmp_path):
    python = python_with("mlx_lm")
    expected = tiny_checkpoints(tmp_path, FAMILIES, RUNTIME)
    check(expected, run(python, "mlx_logits.py", json.dumps(list(map(str, expected)))))


def test_trained_models(tmp_path):
    python = python_with("mlx_lm")
    expected = trained_checkpoints(tmp_path, RUNTIME)
    check(expected, run(python, "mlx_logits.py", json.dumps(list(map(str, expected)))))
