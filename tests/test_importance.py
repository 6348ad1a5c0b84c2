"""Importance, the choice of what is pruned and the schedule, against their definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin.criteria.importance import choose_pruned, importance, sparsity_after
from sparsessm_plugin.errors import SparseSSMError


def test_importance():
    weight = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.bfloat16)
    gradient = torch.tensor([4.0, 1.0, -9.0])
    assert importance(weight, gradient).tolist() == [8.0, 0.0, 27.0]
    assert importance(weight, gradient, 0.5).tolist() == [4.0, 0.0, 9.0]
    assert importance(weight, None).tolist() == importance(weight, gradient, 0).tolist()
    assert importance(weight, None).tolist() == [2.0, 0.0, 3.0]


@given(
    rounds=st.integers(1, 12),
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
    schedule=st.sampled_from(["cubic", "linear"]),
)
def test_schedule(rounds, start, end, schedule):
    values = [sparsity_after(t, rounds, start, end, schedule) for t in range(rounds + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == end
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_schedule_by_hand():
    assert sparsity_after(1, 2, 0.0, 0.8) == pytest.approx(0.8 * 7 / 8)
    assert sparsity_after(1, 2, 0.0, 0.8, "linear") == pytest.approx(0.4)


def brute_force(scores, sparsity, groups, min_keep, pruned):
    """Sort every entry of a group by score and position; skip what a tensor must keep."""
    result = {name: mask.clone() for name, mask in pruned.items()}
    for group in set(groups.values()):
        entries = []
        for name in [n for n in scores if groups[n] == group]:
            order = sorted(
                range(scores[name].numel()),
                key=lambda i, name=name: (
                    not pruned[name].flatten()[i],
                    float(scores[name].flatten()[i]),
                    i,
                ),
            )
            alive = int((~pruned[name]).sum())
            floor = min(math.ceil(min_keep * len(order)), alive)
            kept = set(order[len(order) - floor :])
            entries += [(name, i) for i in range(len(order)) if i not in kept]
        total = sum(scores[n].numel() for n in scores if groups[n] == group)
        count = max(
            round(sparsity * total), sum(int(pruned[n].sum()) for n in scores if groups[n] == group)
        )
        if count > len(entries):
            return None
        ranked = sorted(
            range(len(entries)),
            key=lambda k: (
                not pruned[entries[k][0]].flatten()[entries[k][1]],
                float(scores[entries[k][0]].flatten()[entries[k][1]]),
                k,
            ),
        )
        for k in ranked[:count]:
            name, i = entries[k]
            result[name].view(-1)[i] = True
    return result


@given(data=st.data())
@settings(max_examples=150)
def test_choice_is_that_of_sorting(data):
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4)
    )
    seed = data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    names = [f"t{i}" for i in range(len(shapes))]
    # few values: ties, zeros and tiny numbers among them
    values = torch.tensor([0.0, 1e-42, 1e-30, 0.5, 1.0, 3e38])
    scores = {
        n: values[torch.randint(len(values), s, generator=g)]
        for n, s in zip(names, shapes, strict=True)
    }
    pruned = {n: torch.rand(s, generator=g) < 0.2 for n, s in zip(names, shapes, strict=True)}
    groups = {n: data.draw(st.sampled_from("ab")) for n in names}
    sparsity = data.draw(st.floats(0, 1))
    min_keep = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
    expected = brute_force(scores, sparsity, groups, min_keep, pruned)
    if expected is None:
        with pytest.raises(SparseSSMError, match="min_keep"):
            choose_pruned(scores, sparsity, groups=groups, min_keep=min_keep, pruned=pruned)
        return
    result = choose_pruned(scores, sparsity, groups=groups, min_keep=min_keep, pruned=pruned)
    for name in names:
        assert torch.equal(result[name], expected[name]), name


def test_one_threshold_over_all():
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([10.0, 20.0])}
    result = choose_pruned(scores, 0.5)
    assert result["a"].tolist() == [[True, True], [True, False]]
    assert not result["b"].any()
    kept = choose_pruned(scores, 0.5, min_keep=0.5)
    assert int(kept["a"].sum()) == 2
    assert kept["b"].tolist() == [True, False]
    alone = choose_pruned(scores, 0.5, groups={"a": "a", "b": "b"})
    assert {name: int(mask.sum()) for name, mask in alone.items()} == {"a": 2, "b": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(value):
    with pytest.raises(SparseSSMError, match=r"importance of x\.weight"):
        choose_pruned({"x.weight": torch.tensor([1.0, value])}, 0.5)
