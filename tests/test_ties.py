"""Equal scores: the first position is pruned first, whoever chooses."""

import pytest
import torch

from sparsessm_plugin.criteria.importance import choose_pruned
from sparsessm_plugin.criteria.states import lowest
from sparsessm_plugin.selection.masks import (
    choose_mask,
    keep_largest,
    keep_largest_of_each,
)
from sparsessm_plugin.selection.patterns import SemiStructured, Unstructured
from sparsessm_plugin.selection.subsets import best_subsets, eliminate
from sparsessm_plugin.solvers.projections import SOLVERS

ALIKE = torch.ones(2, 8)
FIRST = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).bool()  # what stays of eight equal entries
ROWS = torch.stack([FIRST, FIRST])
ALL = torch.tensor([[False] * 8, [True] * 8])  # the first row goes, if rows compete
OF_FOUR = torch.tensor([0, 0, 1, 1] * 2).bool().expand(2, 8)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (lambda s: choose_mask(s, 0.5), ALL),
        (lambda s: choose_mask(s, 0.5, per_row=True), ROWS),
        (lambda s: choose_mask(s, 0.5, "2:4"), OF_FOUR),
        (lambda s: choose_mask(s.repeat(1, 4), 0.5, "16:32"), ROWS.repeat_interleave(4, dim=1)),
        (lambda s: keep_largest(s.flatten(), 8).view(2, 8), ALL),
        (lambda s: keep_largest(s.bfloat16().flatten(), 8).view(2, 8), ALL),
        (lambda s: keep_largest_of_each(s, torch.tensor([4, 4])), ROWS),
        (lambda s: ~Unstructured(0.5).lowest(s[None])[0], ALL),
        (lambda s: ~SemiStructured.parse("2:4").lowest(s[None])[0], OF_FOUR),
        (lambda s: ~choose_pruned({"w": s}, 0.5)["w"], ALL),
        (lambda s: ~torch.isin(torch.arange(16), torch.tensor(lowest(s, 4))).view(2, 8), ROWS),
        (lambda s: ~best_subsets(torch.eye(8), 4).expand(2, 8), ROWS),
        (lambda s: ~eliminate(torch.eye(8), 4).expand(2, 8), ROWS),
    ],
)  # fmt: skip
def test_of_equal_scores_the_first_goes(kept, expected):
    assert torch.equal(kept(ALIKE), expected)


@pytest.mark.parametrize("structure", ["0:0", "2:4"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_solvers_prune_the_first_of_equal_weights(solver, structure):
    mask = SOLVERS[solver](ALIKE, torch.eye(8), 0.5, structure).mask
    across = ROWS if solver == "wanda" else ALL  # Wanda compares within rows
    assert torch.equal(mask, OF_FOUR if structure == "2:4" else across)


@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_an_exhaustive_search_prunes_the_first_of_equal_weights(structure):
    mask = SOLVERS["alps"](torch.ones(2, 4), torch.eye(4), 0.5, structure).mask
    assert int(mask.sum()) == 4
    if structure == "2:4":
        assert mask.tolist() == [[False, False, True, True]] * 2
    else:
        assert mask.tolist() == [[False] * 4, [True] * 4]


def test_zeros_tie_with_one_another():
    weight = torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    assert choose_mask(weight.abs(), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.5, 0.77, 1.0])
def test_rows_are_cut_so_that_all_together_lose_their_share(sparsity):
    """Each by what the rows up to it lose together, whatever chooses within it."""
    scores = torch.randint(0, 9, (7, 13), generator=torch.Generator().manual_seed(0)).double()
    found = choose_mask(scores, sparsity, per_row=True)
    gone = torch.tensor([round(sparsity * 13 * row) for row in range(8)]).diff()
    assert torch.equal(13 - found.sum(1), gone)
    assert torch.equal(found, keep_largest_of_each(scores, 13 - gone))


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_steps_are_marked_alike_wherever_they_lie(sparsity):
    """What a GPU selects from, and what a CPU does, in each of some time steps with ties."""
    scores = torch.randint(0, 9, (5, 4, 6), generator=torch.Generator().manual_seed(0)).float()
    pattern = Unstructured(sparsity)
    stay = torch.full((5,), 24 - pattern.count(4, 6))
    kept = keep_largest_of_each(scores.flatten(1), stay).view_as(scores)
    by_sorting = scores.flatten(1).argsort(dim=1, stable=True)[:, : pattern.count(4, 6)]
    assert torch.equal(~kept, torch.zeros(5, 24).scatter(1, by_sorting, 1).bool().view_as(scores))
    assert torch.equal(pattern.lowest(scores), ~kept)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.equal(pattern.lowest(scores.to(device)).cpu(), ~kept)
