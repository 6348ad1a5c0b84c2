"""The benchmark of fewer key dims: the logic, on a tiny stack."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from experiments import key_dim_latency
from run import Common, run_experiment


def test_decode_prefill_and_cache_of_a_tiny_stack(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_experiment("key_dim_latency", key_dim_latency.EXPERIMENT, {}, Common(quick=True))
    shown = capsys.readouterr().out
    assert stopped.value.code == 0, shown
    for batch in (1, 2):
        for key_dim in (16, 8, 4):
            assert f"| torch | {batch} | {key_dim} | " in shown
    # 3 gated delta nets, 2 value heads of 16, float32
    for key_dim, share in ((16, "1.00"), (8, "0.50"), (4, "0.25")):
        assert f"| {key_dim} | {3 * 2 * 16 * 4 * key_dim:,} | {share} | " in shown


def test_the_rules_that_transformers_has_bound_come_back():
    with key_dim_latency.rules_in_torch(), key_dim_latency.rules_in_torch():
        assert all(
            getattr(key_dim_latency.modeling, name) is not bound
            for name, bound in key_dim_latency.BOUND.items()
        )
    for name, bound in key_dim_latency.BOUND.items():
        assert getattr(key_dim_latency.modeling, name) is bound
