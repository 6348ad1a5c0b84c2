"""Scores, aggregation and selection against direct definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin.criteria import (
    SALIENCIES,
    Decay,
    Ranking,
    SaliencyInputs,
    SemiStructured,
    Unstructured,
    aggregate,
    aggregation,
)
from sparsessm_plugin.errors import SparseSSMError

D, N, L = 6, 8, 130  # more steps than are scored at once


def inputs(seed=0, steps=L):
    g = torch.Generator().manual_seed(seed)

    def positive(*shape):
        return torch.rand(*shape, generator=g) + 0.01

    energy = positive(steps, D, N)
    energy[0] = 0  # no state before the first token
    return SaliencyInputs(
        A_log=torch.randn(D, N, generator=g),
        out_norm=positive(D),
        state_energy=energy,
        transition=positive(steps, D, N),
        output_error=positive(steps, D, N),
    )


def rank(saliency, aggregation, pattern=None, decay=None, data=None):
    return aggregate(
        SALIENCIES[saliency],
        aggregation,
        data if data is not None else inputs(),
        steps=L,
        pattern=pattern or Unstructured(0.5),
        decay=decay,
    )


def test_scores_are_their_formulas():
    data = inputs()
    expected = {
        "magnitude": data.A_log.abs(),
        "hessian": data.A_log**2 * data.state_energy,
        "transition": data.transition**2 * data.state_energy,
        "output_error": data.output_error * (data.out_norm**2)[None, :, None],
    }
    for name, saliency in SALIENCIES.items():
        torch.testing.assert_close(saliency.score(data), expected[name])


def test_what_each_saliency_asks_of_the_scan():
    assert not SALIENCIES["magnitude"].request(None, "zero").needs_scan
    request = SALIENCIES["output_error"].request("mean", "memoryless")
    assert request.output_error == "memoryless"
    assert not request.per_step  # the default needs no time axis at all
    assert SALIENCIES["output_error"].request("l2", "zero").per_step
    assert not SALIENCIES["hessian"].request("mean", "zero").per_step
    assert SALIENCIES["hessian"].request("frequency", "zero").per_step
    assert SALIENCIES["transition"].request("mean", "zero").per_step  # a product of two sums


def test_frequency_is_algorithm_1():
    """Against a literal loop: mark the K lowest at every step, prune the most often marked."""
    data, K = inputs(3), round(0.3 * D * N)
    ranking = rank("hessian", "frequency", Unstructured(0.3), data=data)
    votes, total = [0] * (D * N), [0.0] * (D * N)
    for t in range(L):
        scores = (data.A_log**2 * data.state_energy[t]).flatten().tolist()
        for i, score in enumerate(scores):
            total[i] += score
        if max(scores) == 0:
            continue
        for i in sorted(range(D * N), key=lambda i: (scores[i], i))[:K]:
            votes[i] += 1
    order = sorted(range(D * N), key=lambda i: (-votes[i], total[i], i))
    expected = torch.zeros(D * N, dtype=torch.bool)
    expected[order[:K]] = True
    assert torch.equal(ranking.select(Unstructured(0.3)), expected.reshape(D, N))
    assert torch.equal(-ranking.score.flatten(), torch.tensor(votes, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 7])
def test_few_steps_at_a_time_vote_the_same(steps, monkeypatch):
    """Memory is bounded by the number of scores, and not by that of steps."""
    data, seen = inputs(3), []
    expected = rank("hessian", "frequency", Unstructured(0.3), data=data)
    lowest = Unstructured.lowest
    monkeypatch.setattr(aggregation, "ENTRIES", steps * D * N + 1)
    monkeypatch.setattr(Unstructured, "lowest", lambda p, x: seen.append(len(x)) or lowest(p, x))
    result = rank("hessian", "frequency", Unstructured(0.3), data=data)
    assert max(seen) == steps
    assert sum(seen) == L
    assert torch.equal(result.score, expected.score)
    torch.testing.assert_close(result.tie_break, expected.tie_break)


def test_frequency_votes_within_groups_for_semi_structured_sparsity():
    pattern = SemiStructured(1, 4)
    ranking = rank("hessian", "frequency", pattern)
    # every informative step marks exactly one entry in every group of four
    per_group = -ranking.score.reshape(-1, 4).sum(dim=1)
    assert (per_group == L - 1).all()


@pytest.mark.parametrize(
    ("decay", "weight"),
    [
        (Decay("power", power=2.0), lambda t: (t + 1) ** -2.0),
        (Decay("discount", gamma=0.7), lambda t: 0.7**t),
        (Decay("linear"), lambda t: L - t),
        (Decay("window", fraction=0.1), lambda t: float(t < 13)),
    ],
)
def test_time_weighted(decay, weight):
    data = inputs()
    ranking = rank("transition", "time_weighted", decay=decay, data=data)
    scores = (data.transition**2 * data.state_energy).double()
    weights = torch.tensor([weight(t) for t in range(L)], dtype=torch.float64)
    expected = torch.einsum("t,tdn->dn", weights / weights.sum(), scores)
    torch.testing.assert_close(ranking.score, expected)
    assert decay.weights(L).sum() == pytest.approx(1.0)


def test_mean_and_l2():
    data = inputs()
    scores = (data.transition**2 * data.state_energy).double()
    torch.testing.assert_close(rank("transition", "mean", data=data).score, scores.mean(0))
    expected = scores.square().sum(0).sqrt()
    torch.testing.assert_close(rank("transition", "l2", data=data).score, expected)
    # additive scores arrive summed over time
    summed = SaliencyInputs(data.A_log, data.out_norm, output_error=data.output_error.sum(0))
    per_step = data.output_error.double().mean(0) * data.out_norm.double().square()[:, None]
    torch.testing.assert_close(
        rank("output_error", "mean", data=summed).score.double(), per_step, rtol=1e-5, atol=1e-8
    )


def test_statistic_that_was_not_collected():
    with pytest.raises(ValueError, match="was not collected"):
        SALIENCIES["hessian"].score(SaliencyInputs(torch.zeros(2, 2), torch.ones(2)))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0.001, 0.999),
    levels=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_unstructured_selection_is_exact_and_ties_go_by_position(
    rows, columns, sparsity, levels, seed
):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, rows, columns), generator=g).float()  # many ties
    chosen = Unstructured(sparsity).lowest(scores)
    count = round(sparsity * rows * columns)
    for t in range(3):
        flat = scores[t].flatten().tolist()
        expected = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]
        assert sorted(chosen[t].flatten().nonzero().flatten().tolist()) == sorted(expected)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8)]),
    seed=st.integers(0, 999),
)
def test_semi_structured_selection_takes_n_of_every_m(rows, groups, nm, seed):
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, rows, groups * m), generator=g).float()
    pattern = SemiStructured(n, m)
    chosen = pattern.lowest(scores)
    assert (chosen.reshape(-1, m).sum(1) == n).all()
    assert chosen[0].sum() == pattern.count(rows, groups * m)
    for group, mask in zip(scores.reshape(-1, m), chosen.reshape(-1, m), strict=True):
        expected = sorted(range(m), key=lambda i: (float(group[i]), i))[:n]
        assert mask.nonzero().flatten().tolist() == sorted(expected)


def test_tie_break_decides_between_equal_scores():
    ranking = Ranking(
        score=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        tie_break=torch.tensor([[0.0, 2.0, 1.0, 1.0]]),
    )
    assert ranking.select(Unstructured(0.25)).tolist() == [[False, False, True, False]]
    assert ranking.select(Unstructured(0.5)).tolist() == [[False, False, True, True]]
    assert ranking.select(Unstructured(0.75)).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "0:4", "4:4", "5:4", "-1:4", "a:b", "2:4:8", "2.5:4"]
)
def test_impossible_mask_structure(text):
    with pytest.raises(SparseSSMError, match="0 < n < m") as error:
        SemiStructured.parse(text)
    assert repr(text) in str(error.value)


def test_mask_structure_that_does_not_divide():
    with pytest.raises(SparseSSMError, match="divisible by 4, got 6"):
        SemiStructured(2, 4).check(3, 6)
