"""Solvers for projections against least squares, a slow optimal brain surgeon, and each other."""

import math
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.selection.masks import choose_mask, parse_structure
from sparsessm_plugin.solvers.alps import alps, refine_on_support
from sparsessm_plugin.solvers.exhaustive import best_support
from sparsessm_plugin.solvers.objective import (
    damped_inverse_cholesky,
    dampen,
    dense_target,
    inverse_root,
    objective,
    relative_error,
    row_errors,
    square_of_root,
)
from sparsessm_plugin.solvers.projections import SOLVERS
from sparsessm_plugin.solvers.sparsegpt import error_curve, sparsegpt

NAMES = tuple(SOLVERS)
UPDATING = ("sparsegpt", "alps")
STRUCTURES = ("0:0", "2:4", "1:4", "4:8")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, seed=0, samples=None, decay=1.0):
    """(samples, n) correlated inputs of different size, their spectrum a power law."""
    mixing = normal(n, n, seed=seed) * torch.arange(1, n + 1).double().pow(-decay / 2)
    size = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return normal(samples or 3 * n, n, seed=seed + 1) @ mixing.T * size


def problem(out=12, n=16, seed=0, samples=None, dtype=torch.float32):
    x = inputs(n, seed, samples)
    return normal(out, n, seed=seed + 2).to(dtype), (x.T @ x).float()


def conv_problem(D=10, K=4, seed=0, dtype=torch.float32):
    """A depthwise conv1d: windows over a smooth signal of each channel's own loudness."""
    signal = normal(D, 60, seed=seed).cumsum(1) * 0.3 + normal(D, 60, seed=seed + 1)
    signal *= 0.2 + torch.rand(D, 1, generator=torch.Generator().manual_seed(seed))
    x = signal.unfold(1, K, 1)
    return normal(D, 1, K, seed=seed + 2).to(dtype), (x.mT @ x).float()


def check_result(result, weight, hessian, zeros=None):
    assert result.weight.dtype == weight.dtype
    assert result.weight.shape == result.mask.shape == weight.shape
    assert torch.isfinite(result.weight).all()
    assert not result.weight[~result.mask].any()
    if zeros is not None:
        assert int((~result.mask).sum()) == zeros
    change = (weight.double() - result.weight.double()).reshape(-1, *weight.shape[-2:])
    grams = hessian.double().reshape(-1, *hessian.shape[-2:])
    # by rounding of H a row's error may be below 0
    error = sum(max(0.0, float(r @ h @ r)) for c, h in zip(change, grams, strict=True) for r in c)
    scale = float(objective(weight, torch.zeros_like(weight), hessian).sum())
    assert result.error == pytest.approx(error, rel=1e-9, abs=1e-12 * scale)
    assert result.relative_error == pytest.approx(error / scale if scale else 0, rel=1e-9, abs=1e-9)


# -- objective and dampening -------------------------------------------------------------


def test_objective_is_the_output_error():
    x, w, pruned = inputs(6), normal(3, 6), normal(3, 6, seed=1)
    H = x.T @ x
    outputs = (x @ (w - pruned).T).square().sum(0)
    torch.testing.assert_close(row_errors(w, pruned, H), outputs)
    torch.testing.assert_close(objective(w, pruned, H), outputs.sum())
    expected = float(outputs.sum() / (x @ w.T).square().sum())
    assert relative_error(w, pruned, H) == pytest.approx(expected)
    assert relative_error(w, pruned, torch.zeros_like(H)) == 0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_inverse_factor_is_of_the_dampened_inverse(scale):
    x = inputs(7, samples=4)
    x[:, 2] = 0
    H = torch.stack([x.T @ x, (x.T @ x) * 5]) * scale
    factor, dampened, dead, fracs = damped_inverse_cholesky(H, 0.02)
    assert dead.tolist() == [[i == 2 for i in range(7)]] * 2
    assert fracs.tolist() == [0.02, 0.02]
    assert not factor.tril(-1).any()
    live = [i for i in range(7) if i != 2]
    mean = H.diagonal(dim1=1, dim2=2)[:, live].mean(1)
    expected = H[:, live][:, :, live] + 0.02 * mean[:, None, None] * torch.eye(6)
    torch.testing.assert_close(dampened[:, live][:, :, live], expected, rtol=1e-12, atol=0)
    inverse = (factor.mT @ factor)[:, live][:, :, live]
    torch.testing.assert_close(inverse @ expected, torch.eye(6).double().expand(2, 6, 6))


def test_inverse_factor_in_float32():
    x = inputs(24)
    exact = damped_inverse_cholesky(x.T @ x)
    found = damped_inverse_cholesky((x.T @ x).float(), dtype=torch.float32)
    assert found.factor.dtype == found.hessian.dtype == torch.float32
    torch.testing.assert_close(found.factor.double(), exact.factor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.hessian.double(), exact.hessian, rtol=1e-5, atol=1e-5)
    assert found.dampening_frac.tolist() == exact.dampening_frac.tolist()
    # what float32 cannot factorise is left to float64, and dampened more if that cannot either
    singular = torch.ones(5, 5)
    with pytest.warns(RuntimeWarning, match="dampening was raised"):
        raised = damped_inverse_cholesky(singular, 0.0, torch.float32)
    assert raised.factor.dtype == torch.float64


@pytest.mark.parametrize("solver", UPDATING)
def test_singular_hessian_without_dampening_warns_once(solver):
    x = inputs(8, samples=2)
    w, H = normal(4, 8).float(), (x.T @ x).float()
    with pytest.warns(RuntimeWarning, match="dampening was raised from 0 to") as caught:
        result = SOLVERS[solver](w, H, 0.5, dampening_frac=0.0)
    assert len(caught) == 1
    check_result(result, w, H, 16)


def test_only_the_problem_that_fails_is_dampened_more():
    x = inputs(5)
    singular = torch.ones(5, 5).double()
    with pytest.warns(RuntimeWarning):
        fracs = damped_inverse_cholesky(torch.stack([x.T @ x, singular]), 0.0).dampening_frac
    assert float(fracs[0]) == 0 < float(fracs[1]) < 1e-3


def test_dampening_enough_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in SOLVERS.values():
            solver(normal(4, 8).float(), torch.ones(8, 8), 0.5)


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hessian": torch.full((8, 8), torch.nan)}, "64 entries that are not finite"),
        ({"hessian": torch.eye(8) * torch.inf}, "not finite"),
        ({"hessian": -torch.eye(8)}, "negative, got -1"),
        ({"hessian": torch.eye(7)}, r"must be \(8, 8\), got \(7, 7\)"),
        ({"weight": torch.full((4, 8), torch.nan)}, "32 entries that are not finite"),
        ({"weight": torch.ones(8)}, r"\(\.\.\., out, in\), got \(8,\)"),
        ({"sparsity": 1.5}, "between 0 and 1, got 1.5"),
        ({"structure": "2:3"}, "groups of 3, got 8"),
        ({"structure": "4:2"}, "got '4:2'"),
        ({"keep": torch.ones(4, 8)}, "must be bool"),
    ],
)
def test_bad_arguments(solver, changed, message):
    arguments = {"weight": torch.ones(4, 8), "hessian": torch.eye(8), "sparsity": 0.5, **changed}
    with pytest.raises(SparseSSMError, match=message):
        SOLVERS[solver](**arguments)


def test_what_is_no_gram_matrix():
    H = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(SparseSSMError, match="no sum of x x"):
        damped_inverse_cholesky(H)
    with pytest.raises(SparseSSMError, match="dampening_frac"):
        damped_inverse_cholesky(torch.eye(2), -1.0)


# -- masks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "4:4", "0:4", "5:4", "-2:4", "2:4:8", "a:b", "4:0"]
)
def test_structures_that_are_none(text):
    with pytest.raises(SparseSSMError, match="n zeros in every m"):
        parse_structure(text)


def test_structures():
    assert parse_structure("0:0") == (0, 0)
    assert parse_structure("2:4") == (2, 4)


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (3, 5), (7, 8), (4, 1, 4), (2, 3, 8)]),
    sparsity=st.floats(0, 1),
    ties=st.booleans(),
    per_row=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unstructured_masks(shape, sparsity, ties, per_row, masked, seed):
    scores = normal(*shape, seed=seed).abs()
    scores = scores.round() if ties else scores
    keep = normal(*shape, seed=seed + 1) > -0.5 if masked else None
    mask = choose_mask(scores, sparsity, keep=keep, per_row=per_row)
    zeros = round(sparsity * scores.numel())
    forced = 0 if keep is None else int((~keep).sum())
    if not (per_row and masked):
        assert int((~mask).sum()) == max(zeros, forced)
    if keep is not None:
        assert not (mask & ~keep).any()
    rows = [slice(None)] if not per_row else range(scores.flatten(0, -2).shape[0])
    for row in rows:
        s, kept = scores.flatten(0, -2)[row], mask.flatten(0, -2)[row]
        candidates = kept | (keep.flatten(0, -2)[row] if masked else True)
        if kept.any() and (candidates & ~kept).any():
            assert float(s[kept].min()) >= float(s[candidates & ~kept].max())
    if per_row and not masked:
        counts = (~mask).flatten(0, -2).sum(1)
        assert int(counts.max() - counts.min()) <= 1


@settings(max_examples=30)
@given(structure=st.sampled_from(STRUCTURES[1:]), masked=st.booleans(), seed=st.integers(0, 99))
def test_masks_in_groups(structure, masked, seed):
    n, m = parse_structure(structure)
    scores = normal(2, 3, 16, seed=seed).abs()
    keep = normal(2, 3, 16, seed=seed + 1) > 0 if masked else torch.ones(2, 3, 16).bool()
    mask = choose_mask(scores, 0.123, structure, keep=keep)
    assert not (mask & ~keep).any()
    groups = scores.reshape(-1, m), mask.reshape(-1, m), keep.reshape(-1, m)
    for s, kept, allowed in zip(*groups, strict=True):
        assert int((~kept).sum()) == max(n, int((~allowed).sum()))
        if kept.any() and (allowed & ~kept).any():
            assert float(s[kept].min()) >= float(s[allowed & ~kept].max())


# -- every solver ------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    structure=st.sampled_from(STRUCTURES),
    sparsity=st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9, 1.0]),
    out=st.integers(1, 9),
    n=st.sampled_from([8, 16, 24]),
    samples=st.integers(1, 40),
    block=st.sampled_from([1, 5, 8, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
def test_results_hold_what_they_promise(
    name, structure, sparsity, out, n, samples, block, dtype, scale, seed
):
    """Rank-1 Hessians, tiny and huge ones, all dtypes: finite weights, exact counts and errors."""
    w, H = problem(out, n, seed, samples, dtype)
    H = H * scale
    result = SOLVERS[name](w, H, sparsity, structure, block_size=block)
    zeros, m = parse_structure(structure)
    if m:
        assert ((~result.mask).unflatten(-1, (-1, m)).sum(-1) == zeros).all()
    share = zeros / m if m else sparsity
    check_result(result, w, H, round(share * w.numel()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-35, 1e-12, 1e12, 1e35])
def test_the_unit_of_the_calibration_does_not_matter(name, scale):
    w, H = problem(dtype=torch.float64)
    H = H.double()
    one, other = SOLVERS[name](w, H, 0.5), SOLVERS[name](w, H * scale, 0.5)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-8)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-6)
    low = SOLVERS[name](w.float(), (H * scale).float(), 0.5)
    assert low.relative_error == pytest.approx(one.relative_error, rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_dead_inputs(name, structure):
    x = inputs(16)
    x[:, [3, 8, 9]] = 0
    w, H = normal(6, 16).float(), (x.T @ x).float()
    result = SOLVERS[name](w, H, 0.5, structure)
    check_result(result, w, H, 48)
    if name != "magnitude":  # which does not look at inputs
        assert not result.weight[:, [3, 8, 9]].any()
    for sparsity in (0.0, 0.1):
        result = SOLVERS[name](w, H, sparsity)
        check_result(result, w, H)
        if name in UPDATING:
            assert int((~result.mask).sum()) == 18  # more than asked for
            assert result.error == pytest.approx(0, abs=1e-6 * float(H.diagonal().sum()))
    nothing = SOLVERS[name](w, torch.zeros(16, 16), 0.5)
    assert nothing.error == nothing.relative_error == 0
    assert torch.isfinite(nothing.weight).all()


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    structure=st.sampled_from(["0:0", "2:4"]),
    sparsity=st.sampled_from([0.0, 0.3, 0.7]),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_pruned_stays_pruned_and_counts(name, structure, sparsity, batched, seed):
    w, H = conv_problem(seed=seed) if batched else problem(seed=seed)
    keep = normal(*w.shape, seed=seed + 5) > -0.3
    w = w * keep
    result = SOLVERS[name](w, H, sparsity, structure, keep=keep)
    assert not (result.mask & ~keep).any()
    forced = int((~keep).sum())
    if structure == "0:0" and (name != "wanda" or batched):
        check_result(result, w, H, max(forced, round(sparsity * w.numel())))
    else:
        check_result(result, w, H)
    if structure == "2:4":
        expected = (~keep).unflatten(-1, (-1, 4)).sum(-1).clamp(min=2)
        assert torch.equal((~result.mask).unflatten(-1, (-1, 4)).sum(-1), expected)


@pytest.mark.parametrize("structure", ["0:0", "2:4"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_order_of_the_solvers(structure, sparsity):
    total = dict.fromkeys(NAMES, 0.0)
    for seed in range(8):
        w, H = problem(24, 32, seed)
        errors = {
            name: solve(w, H, sparsity, structure).relative_error for name, solve in SOLVERS.items()
        }
        assert errors["alps"] <= errors["sparsegpt"]
        for name, error in errors.items():
            total[name] += error
    assert total["alps"] < 0.8 * total["sparsegpt"]
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


@settings(max_examples=40)
@given(
    structure=st.sampled_from(STRUCTURES),
    sparsity=st.floats(0, 1),
    samples=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    batched=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_alps_is_never_worse_than_sparsegpt(
    structure, sparsity, samples, dtype, batched, masked, seed
):
    w, H = problem(5, 16, seed, samples, dtype)
    if batched:
        w, H = conv_problem(K=8, seed=seed, dtype=dtype)
    keep = normal(*w.shape, seed=seed + 5) > -0.8 if masked else None
    ours = alps(w, H, sparsity, structure, keep=keep)
    assert ours.error <= sparsegpt(w, H, sparsity, structure, keep=keep).error


# -- few inputs --------------------------------------------------------------------------------


def least_errors(w, H, allowed):
    """By least squares of every support: the error of each total of kept entries, (kept, error)."""
    rows, size = w.shape[-3], w.shape[-1]
    each = []  # for each row, by its support
    for r in range(rows):
        errors = {}
        for support in product((False, True), repeat=size):
            if any(s and not a for s, a in zip(support, allowed[r, 0].tolist(), strict=True)):
                continue
            S = [i for i in range(size) if support[i]]
            dense, h = w[r, 0].double(), H[r].double()
            new = torch.zeros(size, dtype=torch.float64)
            if S:
                new[S] = torch.linalg.solve(h[S][:, S], h[S] @ dense)
            errors[support] = float((dense - new) @ h @ (dense - new))
        each.append(errors)
    return each


@settings(max_examples=25)
@given(masked=st.booleans(), size=st.integers(1, 4), seed=st.integers(0, 999))
def test_all_supports_are_compared(masked, size, seed):
    """The best of all is found for every total at which handing out one by one can find it."""
    rows = 3
    w, H = conv_problem(D=rows, K=size, seed=seed)
    allowed = torch.ones_like(w, dtype=torch.bool)
    if masked:
        allowed = normal(*w.shape, seed=seed + 5) > -0.5
    inverse = damped_inverse_cholesky(H, 0.0)
    each = least_errors(w, H, allowed)
    totals = {}
    for combination in product(*(errors.items() for errors in each)):
        kept = sum(sum(support) for support, _ in combination)
        error = sum(e for _, e in combination)
        totals[kept] = min(error, totals.get(kept, math.inf))
    found = {}
    for kept in totals:
        sparsity = 1 - kept / w.numel()
        new, mask = best_support(w, inverse, sparsity, "0:0", allowed)
        assert int(mask.sum()) == kept
        assert not bool((mask & ~allowed).any())
        assert not new[~mask].any()
        found[kept] = float(objective(w, new, H).sum())
        assert found[kept] >= totals[kept] - 1e-6 * totals[0]
    for kept, error in totals.items():
        on_hull = all(
            error <= a + (kept - low) / (high - low) * (b - a) + 1e-12
            for low, a in totals.items()
            for high, b in totals.items()
            if low < kept < high
        )
        if on_hull:
            assert found[kept] == pytest.approx(error, abs=1e-6 * totals[0])


@pytest.mark.parametrize(("structure", "zeros"), [("2:4", 2), ("1:2", 1), ("1:4", 1)])
def test_groups_of_few_inputs_are_the_best(structure, zeros):
    w, H = conv_problem(D=5, K=4, seed=3)
    n, m = map(int, structure.split(":"))
    new, mask = best_support(
        w, damped_inverse_cholesky(H, 0.0), 0.5, structure, torch.ones_like(w, dtype=torch.bool)
    )
    for r, errors in enumerate(least_errors(w, H, torch.ones_like(w, dtype=torch.bool))):
        groups = [mask[r, 0, i : i + m] for i in range(0, 4, m)]
        assert all(int((~group).sum()) == zeros for group in groups)
        best = min(
            error
            for support, error in errors.items()
            if all(sum(support[i : i + m]) == m - n for i in range(0, 4, m))
        )
        assert float(objective(w[r], new[r], H[r])) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_reduced_precision_is_that_of_storing(name):
    w, H = problem(dtype=torch.bfloat16)
    low, high = SOLVERS[name](w, H, 0.5), SOLVERS[name](w.float(), H, 0.5)
    assert torch.equal(low.mask, high.mask)
    torch.testing.assert_close(low.weight, high.weight.bfloat16(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_left_alone(name):
    w, H = problem()
    before = w.clone(), H.clone()
    SOLVERS[name](w, H, 0.5)
    assert torch.equal(w, before[0])
    assert torch.equal(H, before[1])


def test_wanda_compares_within_rows():
    w, H = problem(5, 8)
    scores = w.abs() * H.diagonal().sqrt()
    result = SOLVERS["wanda"](w, H, 0.375)
    expected = scores >= scores.sort(dim=1).values[:, 3:4]
    assert torch.equal(result.mask, expected)
    assert torch.equal(result.weight, w * expected)
    several, grams = conv_problem()
    scores = several.abs() * grams.diagonal(dim1=1, dim2=2).sqrt()[:, None]
    lowest = scores.flatten().sort().values[20]
    assert torch.equal(SOLVERS["wanda"](several, grams, 0.5).mask, scores >= lowest)


@pytest.mark.parametrize("name", UPDATING)
def test_weights_stay_within_what_their_dtype_holds(name):
    w = torch.full((2, 2), 5e4, dtype=torch.float16)
    keep = torch.tensor([[False, True]] * 2)
    result = SOLVERS[name](w, torch.ones(2, 2), 0.5, keep=keep)  # 1e5 would be best
    assert result.weight.tolist() == [[0.0, 65504.0]] * 2


# -- SparseGPT ---------------------------------------------------------------------------


def slow_surgeon(w, H, choose, dampening_frac=0.01):
    """Column by column, each with the inverse of what is left of H; O(in^4).

    :param choose: (column, scores of its entries) -> True where one stays
    """
    w = w.double().clone()
    H = dampen(H, dampening_frac)[0]
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        kept = choose(j, w[:, j].square() / inverse[0, 0])
        error = torch.where(kept, 0, w[:, j] / inverse[0, 0])
        w[:, j:] -= error[:, None] * inverse[0]
        w[~kept, j] = 0
    return w


@settings(max_examples=25)
@given(
    out=st.integers(1, 8),
    n=st.integers(2, 20),
    block=st.integers(1, 24),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_update_on_a_fixed_support_is_the_slow_surgeon(out, n, block, share, seed):
    w, H = problem(out, n, seed, dtype=torch.float64)
    mask = torch.rand(out, n, generator=torch.Generator().manual_seed(seed)) > share
    result = sparsegpt(w, H, 0.0, keep=mask, block_size=block)
    assert torch.equal(result.mask, mask)
    expected = slow_surgeon(w, H, lambda j, scores: mask[:, j])
    torch.testing.assert_close(result.weight, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(n=st.integers(2, 20), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_blocks_of_one_column_are_the_slow_surgeon(n, sparsity, seed):
    w, H = problem(9, n, seed, dtype=torch.float64)
    total = round(sparsity * w.numel())

    def choose(j, scores):
        gone = round(total * (j + 1) / n) - round(total * j / n)
        return scores.argsort().argsort() >= gone

    result = sparsegpt(w, H, sparsity, block_size=1)
    assert int((~result.mask).sum()) == total
    expected = slow_surgeon(w, H, choose)
    torch.testing.assert_close(result.weight, expected, rtol=1e-5, atol=1e-6)


def test_pruning_one_input_of_all_rows_is_exact():
    """Only later columns make up for it, so the first one's removal is plain least squares."""
    w, H = problem(5, 9, dtype=torch.float64)
    keep = torch.ones(5, 9, dtype=torch.bool)
    keep[:, 0] = False
    result = sparsegpt(w, H, 0.0, keep=keep, dampening_frac=0.0)
    expected = refine_on_support(w, H.double(), keep, 100)
    torch.testing.assert_close(result.weight, expected, rtol=1e-5, atol=1e-7)


# -- refinement --------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    out=st.integers(1, 8),
    n=st.integers(1, 16),
    share=st.floats(0, 1),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_refinement_is_least_squares_per_row(out, n, share, batched, seed):
    problems = 3 if batched else 1
    x = torch.stack([inputs(n, seed + i, decay=0.5) for i in range(problems)])
    w = normal(problems, out, n, seed=seed + 7)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) > share
    H = x.mT @ x
    refined = (
        refine_on_support(w, H, mask, 300)
        if batched
        else refine_on_support(w[0], H[0], mask[0], 300)[None]
    )
    assert not refined[~mask].any()
    for b, row in product(range(problems), range(out)):
        columns = x[b][:, mask[b, row]]
        if columns.shape[1]:
            solution = torch.linalg.lstsq(columns, (x[b] @ w[b, row])[:, None]).solution[:, 0]
            torch.testing.assert_close(
                refined[b, row][mask[b, row]], solution, rtol=1e-5, atol=1e-6
            )


@settings(max_examples=30)
@given(
    samples=st.integers(1, 30),
    steps=st.integers(0, 60),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
def test_no_row_becomes_worse_by_refinement(samples, steps, scale, seed):
    w, H = problem(8, 16, seed, samples)
    H = H * scale
    mask = normal(8, 16, seed=seed + 4) > 0
    start = normal(8, 16, seed=seed + 5).float() * mask
    refined = refine_on_support(w, H, mask, steps, start=start)
    assert torch.isfinite(refined).all()
    assert (row_errors(w, refined, H) <= row_errors(w, start, H)).all()
    assert not refined[~mask].any()


def test_alternating_steps_alone_beat_sparsegpt():
    for out, n in ((24, 32), (8, 32)):  # more and fewer rows: two ways to solve a step
        w, H = problem(out, n)
        assert alps(w, H, 0.6, cg_steps=0).error < 0.9 * sparsegpt(w, H, 0.6).error


def test_support_of_alps_is_refined_to_the_end():
    w, H = problem(24, 32, dtype=torch.float64)
    result = alps(w, H, 0.6)
    dampened, _ = dampen(H)
    best = refine_on_support(w, dampened, result.mask, 500)
    ours = float(objective(w, result.weight, dampened))
    assert ours == pytest.approx(float(objective(w, best, dampened)), rel=1e-3)


# -- depthwise convolutions --------------------------------------------------------------


@settings(max_examples=20)
@given(name=st.sampled_from(UPDATING), seed=st.integers(0, 99), out=st.sampled_from([1, 3]))
def test_a_batch_is_its_problems_one_by_one(name, seed, out):
    w, H = conv_problem(seed=seed, dtype=torch.float64)
    w = w.expand(-1, out, -1) * (1 + torch.arange(out, dtype=w.dtype))[:, None]
    keep = normal(*w.shape, seed=seed + 5) > -0.2
    together = SOLVERS[name](w, H, 0.0, keep=keep)
    alone = [SOLVERS[name](w[i], H[i], 0.0, keep=keep[i]) for i in range(len(w))]
    weights = torch.stack([one.weight for one in alone])
    torch.testing.assert_close(together.weight, weights, rtol=1e-5, atol=1e-7)
    assert together.error == pytest.approx(sum(one.error for one in alone), rel=1e-4, abs=1e-9)


def smallest_errors(w, H, zeros):
    """The least error of one channel for each number of zeros, by trying all supports."""
    K = w.shape[-1]
    best = [float("inf")] * (K + 1)
    for bits in product([True, False], repeat=K):
        mask = torch.tensor([bits])
        error = float(objective(w, refine_on_support(w, H, mask, 50), H))
        best[K - sum(bits)] = min(best[K - sum(bits)], error)
    return best


def test_channels_share_the_zeros_nearly_as_well_as_possible():
    D, K = 10, 4
    w, H = conv_problem(D, K, dtype=torch.float64)
    zeros = D * K // 2
    best = [0.0] + [float("inf")] * zeros
    for d in range(D):
        errors = smallest_errors(w[d], H[d], zeros)
        best = [
            min(best[z - k] + errors[k] for k in range(min(K, z) + 1)) for z in range(zeros + 1)
        ]
    optimum = best[zeros]
    found = alps(w, H, 0.5, dampening_frac=1e-6)
    assert optimum <= found.error * (1 + 1e-9)
    assert found.error <= 1.05 * optimum
    counts = (~found.mask).sum((1, 2))
    assert int(counts.max()) > int(counts.min())  # loud channels keep more


# -- dense target ------------------------------------------------------------------------


def moved(weight, gram, cross, dampening_frac=0.01):
    return dense_target(weight, gram, cross, damped_inverse_cholesky(gram, dampening_frac))


def test_dense_target_is_least_squares_of_the_dense_output():
    x, dense = inputs(6), inputs(6, seed=3)
    w = normal(4, 6)
    target = moved(w, x.T @ x, dense.T @ x, 0.0)
    expected = torch.linalg.lstsq(x, dense @ w.T).solution.T
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-8)


def test_dense_target_stays_where_nothing_changed():
    x = inputs(6, samples=3)
    x[:, 1] = 0
    w = normal(4, 6).bfloat16()
    target = moved(w, x.T @ x, x.T @ x)
    torch.testing.assert_close(target, w.double())
    heavy = moved(w, x.T @ x, inputs(6, samples=3, seed=3).T @ x, 1e9)
    torch.testing.assert_close(heavy, w.double(), rtol=1e-6, atol=1e-6)
    assert moved(w, (x.T @ x).float(), (x.T @ x).float()).dtype == torch.float32
    with pytest.raises(SparseSSMError, match="cross product"):
        moved(w, x.T @ x, torch.eye(5).double())


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_an_inverse_that_is_there_changes_nothing(solver):
    x, w = inputs(8), normal(6, 8)
    inverse = damped_inverse_cholesky(x.T @ x, 0.1)
    expected = SOLVERS[solver](w, x.T @ x, 0.5, dampening_frac=0.1)
    found = SOLVERS[solver](w, x.T @ x, 0.5, dampening_frac=7.0, inverse=inverse)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "leaf"), [(9, 2), (16, 16), (23, 5)])
def test_inverse_root_by_halves(n, leaf, dtype):
    x = inputs(n, samples=4 * n)
    H = (x.T @ x + 0.1 * torch.eye(n)).to(dtype)
    root, failed = inverse_root(H, leaf=leaf)
    assert not failed
    assert torch.equal(root, root.tril())
    expected = torch.linalg.cholesky(H.double()).inverse()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(root.double(), expected, rtol=tolerance, atol=tolerance)
    for parts in (1, 2, 3):
        square = square_of_root(root, parts)
        torch.testing.assert_close(square.double(), H.double().inverse(), rtol=1e-2, atol=tolerance)
    H[n // 2, n // 2] = -1
    assert inverse_root(H, leaf=leaf)[1]
    assert inverse_root(H.abs(), 1e9, leaf)[1]


# -- error curve -------------------------------------------------------------------------

SPARSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("structure", ["0:0", "1:4"])
@pytest.mark.parametrize("batched", [False, True])
def test_curve_over_all_rows_is_that_of_sparsegpt(structure, batched):
    w, H = conv_problem(dtype=torch.float64) if batched else problem(dtype=torch.float64)
    curve = error_curve(w, H, SPARSITIES, structure, rows=None)
    grouped = structure != "0:0"
    expected = [
        sparsegpt(w, H, s, f"{round(4 * s)}:4" if grouped and 0 < s < 1 else "0:0").error
        for s in SPARSITIES
    ]
    assert curve.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_curve_from_a_sample(decay):
    sparsities = (0.3, 0.5, 0.7, 0.9)
    ratios = []
    for seed in range(4):
        x = inputs(64, seed, decay=decay)
        # rows of different size, as those of trained weights are
        w = normal(400, 64, seed=seed + 9) * normal(400, 1, seed=seed + 8).exp().clamp(max=3)
        w, H = w.float(), (x.T @ x).float()
        expected = torch.tensor([sparsegpt(w, H, s).error for s in sparsities])
        ratios.append(error_curve(w, H, sparsities).float() / expected - 1)
    ratio = torch.stack(ratios)
    assert float(ratio.square().mean().sqrt()) < 0.05, ratio
    assert float(ratio.abs().max()) < 0.15, ratio


def test_curve_from_a_sample_of_inputs():
    w = normal(96, 192, seed=1).float()
    x = normal(4096, 192, seed=2)
    alone, alike = ((y.T @ y).float() for y in (x, x + 2 * normal(4096, 1, seed=3)))
    for H, most in ((alone, 1.1), (alike, 1.6)):
        whole = error_curve(w, H, SPARSITIES[1:], rows=None)
        assert torch.equal(whole, error_curve(w, H, SPARSITIES[1:], rows=None, inputs=192))
        ratio = error_curve(w, H, SPARSITIES[1:], rows=None, inputs=64) / whole
        # fewer make up for what goes, for all sparsities much alike
        assert float(ratio.min()) > 0.9, ratio
        assert float(ratio.max()) < most, ratio
        assert float(ratio.max() / ratio.min()) < 1.5, ratio
    # groups stay whole, and so do several problems
    some, all_ = (error_curve(w, alike, (0.5,), "2:4", inputs=i) for i in (64, None))
    assert torch.equal(some, all_)
    many, H = conv_problem(dtype=torch.float64)
    assert torch.equal(*(error_curve(many, H, (0.5,), inputs=i) for i in (1, None)))


def test_curve_of_what_cannot_be():
    w, H = problem()
    with pytest.raises(SparseSSMError, match="at least one input, got 0"):
        error_curve(w, H, [0.5], inputs=0)
    with pytest.raises(SparseSSMError, match="at least one"):
        error_curve(w, H, [])
    with pytest.raises(SparseSSMError, match="whole number"):
        error_curve(w, H, [0.3], "1:4")
    with pytest.raises(SparseSSMError, match="between 0 and 1"):
        error_curve(w, H, [-0.1])
    with pytest.raises(SparseSSMError, match="at least one row, got 0"):
        error_curve(w, H, [0.5], rows=0)
    with pytest.raises(SparseSSMError, match="block_size must be at least 1, got 0"):
        sparsegpt(w, H, 0.5, block_size=0)
    assert error_curve(w, torch.zeros(16, 16), [0.5], rows=4).tolist() == [0.0]
