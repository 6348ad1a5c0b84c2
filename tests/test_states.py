"""States kept by the scan, what is summed up over them, and the scores made of the sums."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import batches, one_step_at_a_time, random_heads, random_quantities, tiny_model

from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.states import (
    STATE_CRITERIA,
    StateInputs,
    StateStatistics,
    lowest,
)
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.methods.state_sums import gather, mixing_gram, per_skip_entry, row_norms
from sparsessm_plugin.recurrence import scan, scan_states
from sparsessm_plugin.selection.subsets import removal_cost

# -- the scan that keeps states ----------------------------------------------------------


def states_one_by_one(q):
    """The recurrence of the Mamba-1 layout in float64, every state kept: (b, L, D, N)."""
    u, dt, A, B = (getattr(q, name).double() for name in ("u", "dt", "A", "B"))
    h, states = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64), []
    for t in range(u.shape[1]):
        drive = dt[:, t, :, None] * u[:, t, :, None] * B[:, t, None, :]
        h = torch.exp(dt[:, t, :, None] * A) * h + drive
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("every", [1, 3, 14, 20])
@pytest.mark.parametrize("layout", ["numba", "reference", "heads"])
def test_kept_states_are_those_of_the_recurrence(layout, every):
    length = 14
    if layout == "heads":
        q, backend = random_heads(2, length, masked=True), None
        states = one_step_at_a_time(q)[1]
    else:
        q = random_quantities(2, length, 70, 5, masked=True)  # more than one block of channels
        backend = REFERENCE if layout == "reference" else None
        states = states_one_by_one(q)
    y, h = scan_states(q, every, backend)
    torch.testing.assert_close(y, scan(q), rtol=1e-4, atol=1e-5)
    expected = states[:, every - 1 :: every]
    assert h.shape == expected.shape == (2, length // every, q.u.shape[2], 5)
    torch.testing.assert_close(h.double(), expected, rtol=1e-4, atol=1e-5)


# -- statistics --------------------------------------------------------------------------


def samples(T=5, D=6, N=3, G=1, seed=0):
    """h, C, u and weight of T steps, in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((T, D, N), (T, G, N), (T, D), (T, D))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_are_their_definitions(groups):
    T, D, N = 5, 6, 3
    h, C, u, weight = samples(T, D, N, groups)
    statistics = StateStatistics(mixing=groups == 1)
    statistics.add(h[:2], C[:2], u[:2], weight[:2])  # batch by batch
    statistics.add(h[2:], C[2:], u[2:], weight[2:])
    assert statistics.samples == T
    gram = torch.zeros(groups, N, N, dtype=torch.float64)
    skip, skip_energy = torch.zeros(D, N).double(), torch.zeros(D).double()
    state_energy = torch.zeros(groups, N, dtype=torch.float64)
    mixing, mixing_skip = torch.zeros(N, N, N, N).double(), torch.zeros(D, N, N).double()
    for t, d in product(range(T), range(D)):
        g, v = d // (D // groups), weight[t, d] ** 2
        skip_energy[d] += v * u[t, d] ** 2
        for n in range(N):
            skip[d, n] += v * u[t, d] * C[t, g, n] * h[t, d, n]
            state_energy[g, n] += h[t, d, n] ** 2
            for m in range(N):
                gram[g, n, m] += v * C[t, g, n] * h[t, d, n] * C[t, g, m] * h[t, d, m]
                mixing_skip[d, n, m] += v * u[t, d] * h[t, d, n] * C[t, g, m]
        if groups == 1:
            for k, j, q, i in product(range(N), repeat=4):
                mixing[k, j, q, i] += v * h[t, d, k] * C[t, 0, j] * h[t, d, q] * C[t, 0, i]
    expected = {
        "gram": gram,
        "skip": skip,
        "skip_energy": skip_energy,
        "state_energy": state_energy,
        "C_energy": C.square().sum(0),
    }
    if groups == 1:
        expected |= {"mixing": mixing, "mixing_skip": mixing_skip}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(statistics, name), value, msg=name)
    if groups == 1:
        n = torch.arange(N)
        # a state and its own row of C are the features k = j
        torch.testing.assert_close(statistics.mixing[n, n][:, n, n], statistics.gram[0])
        torch.testing.assert_close(statistics.mixing_skip[:, n, n], statistics.skip)
    else:
        assert statistics.mixing is None


def test_sums_are_in_float64_whatever_comes_in():
    statistics = StateStatistics(mixing=True)
    statistics.add(*(t.float() for t in samples()))
    statistics.add_steps(torch.ones(4, 1, 3))
    sums = [v for v in vars(statistics).values() if isinstance(v, torch.Tensor)]
    assert len(sums) == 8
    assert all(s.dtype == torch.float64 for s in sums)


@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_is_seen(where):
    tensors = samples()
    statistics = StateStatistics()
    statistics.add(*tensors)
    assert statistics.is_finite()
    tensors[where].view(-1)[3] = float("nan")
    statistics.add(*tensors)
    assert not statistics.is_finite()


def test_step_scores_of_sequences_of_different_length_add_up():
    statistics = StateStatistics()
    for length in (3, 5, 2):
        statistics.add_steps(torch.full((length, 1, 2), float(length)))
    assert statistics.step_score[:, 0, 0].tolist() == [10.0, 10.0, 8.0, 5.0, 5.0]


def inputs_of(adapter, model, padded=False, **sizes):
    """What enters the first mixer of a tiny Mamba, as a modifier keeps it."""
    inputs = CalibrationInputs()
    for batch in batches(padded=padded, **sizes):
        stream = model.get_input_embeddings()(batch["input_ids"])
        inputs.add(model.backbone.layers[0].norm(stream), batch["attention_mask"])
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cost_is_what_removal_does_to_the_scan_output(monkeypatch, padded):
    """Exactly, for Mamba-1 and every step: the oracle runs the scan without those rows of B."""
    monkeypatch.setattr("sparsessm_plugin.methods.state_sums._EVERY_STATES", 1)
    model = tiny_model("mamba")
    adapter = find_mixers(model)[0].float_clone()
    inputs = inputs_of(adapter, model, padded)
    statistics = gather(adapter, inputs, mixing=True, vote=False)
    assert statistics.samples == inputs.tokens
    for removed in ([3], [0, 5], [1, 2, 4, 7]):
        chosen = torch.zeros(1, 8, dtype=torch.bool)
        chosen[0, removed] = True
        true = 0.0
        for _, q in inputs.iterate(adapter):
            B = q.B.clone()
            B[..., removed] = 0
            lost = (scan(q) - scan(replace(q, B=B))) * adapter.out_gain(q, q.u) * adapter.out_norm
            if q.mask is not None:
                lost = lost[q.mask]
            true += float(lost.double().square().sum())
        cost = float(removal_cost(statistics.gram[0], chosen)[0])
        assert cost == pytest.approx(true, rel=1e-4)


@torch.no_grad()
def test_sums_over_what_shares_an_entry_of_D():
    model = tiny_model("mamba2")
    adapter = find_mixers(model)[0].float_clone()
    inputs = inputs_of(adapter, model)
    statistics = gather(adapter, inputs, mixing=False, vote=False)
    skip, energy = per_skip_entry(adapter, statistics)
    assert skip.shape == (2, 4, 8)  # groups, heads of a group, states
    assert energy.shape == (2, 4)
    torch.testing.assert_close(skip[1, 2], statistics.skip[6 * 8 : 7 * 8].sum(0))
    torch.testing.assert_close(energy[1, 2], statistics.skip_energy[6 * 8 : 7 * 8].sum())


@torch.no_grad()
def test_what_D_takes_over_is_not_counted():
    model = tiny_model("mamba")
    adapter = find_mixers(model)[0].float_clone()
    statistics = gather(adapter, inputs_of(adapter, model), mixing=True, vote=False)
    left = mixing_gram(statistics, with_D=True).reshape(64, 64)
    assert torch.equal(mixing_gram(statistics, with_D=False), statistics.mixing)
    difference = statistics.mixing.reshape(64, 64) - left
    assert torch.linalg.eigvalsh(difference).min() > -1e-6 * difference.diagonal().max()
    assert torch.linalg.eigvalsh(left).min() > -1e-6 * left.diagonal().max()


@torch.no_grad()
def test_short_texts_in_long_padding_are_seen():
    """Every sixteenth step alone would look at none of them."""
    model = tiny_model("mamba2")
    adapter = find_mixers(model)[0].float_clone()
    hidden_states = torch.randn(3, 40, 32)
    for first in (0, 7, 34):
        mask = torch.zeros(3, 40, dtype=torch.long)
        mask[0, first : first + 6] = 1
        inputs = CalibrationInputs()
        inputs.add(hidden_states, mask)
        statistics = gather(adapter, inputs, mixing=False, vote=False)
        assert statistics.samples > 0
        assert (statistics.gram.diagonal(dim1=1, dim2=2) > 0).all()


# -- scores ------------------------------------------------------------------------------


def score(name, remove=1, statistics=None, B_norm=None, C_norm=None):
    return STATE_CRITERIA[name].score(StateInputs(statistics, B_norm, C_norm, remove))


def test_magnitude_is_the_product_of_the_norms():
    B_norm, C_norm = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 1.0, 1.0]])
    result = score("magnitude", B_norm=B_norm, C_norm=C_norm)
    assert result.tolist() == [[5.0, 2.0, 3.0]]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_norms_of_the_rows(name):
    adapter = find_mixers(tiny_model(name))[0]
    B_norm, C_norm = row_norms(adapter)
    if name == "mamba":
        rows = adapter.mixer.x_proj.weight.detach()[4:].view(2, 1, 8, -1)
    else:
        rows = adapter.mixer.in_proj.weight.detach()[2 * 64 : 2 * 64 + 32].view(2, 2, 8, -1)
    torch.testing.assert_close(B_norm, rows[0].double().norm(dim=-1))
    torch.testing.assert_close(C_norm, rows[1].double().norm(dim=-1))


def test_last_states_go():
    assert lowest(score("last", B_norm=torch.rand(2, 5)), 2) == [3, 4, 8, 9]


def test_paper_votes_at_every_step():
    statistics = StateStatistics()
    # the two lowest of each step vote; equal scores vote for the first of them
    steps = [[1.0, 2.0, 3.0, 4.0], [9.0, 1.0, 1.0, 1.0], [5.0, 1.0, 6.0, 2.0]]
    statistics.add_steps(torch.tensor(steps)[:, None])
    result = score("paper", 2, statistics)
    # votes 1, 3, 1, 1 (steps: 0 1, 1 2, 1 3); sums 15, 4, 10, 7
    assert lowest(result, 1) == [1]
    assert lowest(result, 2) == [1, 3]  # of those with one vote the lowest sum
    assert lowest(result, 3) == [1, 2, 3]
    statistics.add_steps(torch.zeros(9, 1, 4))  # nothing but padding after the third step
    assert torch.equal(score("paper", 2, statistics), result)


def test_paper_score_is_that_of_its_formula():
    """structure_ts: sum over channels of A_log^2 h_t^2 at every step, padding left out."""
    model = tiny_model("mamba")
    with torch.no_grad():
        adapter = find_mixers(model)[0].float_clone()
        inputs = inputs_of(adapter, model, padded=True)
        statistics = gather(adapter, inputs, mixing=False, vote=True)
        expected = torch.zeros(24, 1, 8, dtype=torch.float64)
        for _, q in inputs.iterate(adapter):
            h = states_one_by_one(q)
            products = (adapter.A_log.double() * h).square().sum(2)  # (b, L, N)
            expected[:, 0] += (products * q.mask[..., None]).sum(0)
    torch.testing.assert_close(statistics.step_score, expected, rtol=1e-4, atol=1e-8)


def test_ghost_multiplies_the_two_energies():
    statistics = StateStatistics()
    h, C, u, weight = samples(D=4, G=2)
    statistics.add(h, C, u, weight)
    expected = h.view(5, 2, 2, 3).square().sum((0, 2)) * C.square().sum(0)
    torch.testing.assert_close(score("ghost", statistics=statistics), expected)


def test_lowest_takes_as_many_of_each_group():
    values = torch.tensor([[5.0, 1.0, 2.0, 9.0], [8.0, 8.0, 7.0, 8.0]])
    assert lowest(values, 2) == [1, 2, 4, 6]  # equal ones by position
    assert lowest(values, 0) == []
