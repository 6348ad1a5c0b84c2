"""SparseGPT's walk as one launch, and work beside other work of a GPU."""

import pytest
import torch
from conftest import assert_same_sums, batches, tiny_model

from sparsessm_plugin.allocation import losses as allocation
from sparsessm_plugin.allocation.losses import LossMeter
from sparsessm_plugin.allocation.probe import LayerProbe, Probe
from sparsessm_plugin.backends.lanes import Lane
from sparsessm_plugin.backends.memory import handed
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.prunable import PrunableWeight, prunable_weights
from sparsessm_plugin.methods.projections import inverses as ahead
from sparsessm_plugin.methods.projections import prune_projections, statistics
from sparsessm_plugin.methods.projections.inverses import Inverses
from sparsessm_plugin.methods.projections.statistics import hessian_shape
from sparsessm_plugin.solvers import walk as walks
from sparsessm_plugin.solvers.alps import alps
from sparsessm_plugin.solvers.objective import damped_inverse_cholesky, hasty_inverse_cholesky
from sparsessm_plugin.solvers.sparsegpt import error_curve, sparsegpt
from sparsessm_plugin.solvers.walk import Counts, Groups, walk, walks_captured

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BLOCK = 32


def problem(seed, rows=48, size=96, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, generator=generator)
    x = torch.randn(4 * size, size, generator=generator) @ torch.randn(
        size, size, generator=generator
    )
    return weight.to(device), (x.T @ x).to(device)


def rule_of(kind, weight):
    rows, size = weight.shape
    allowed = torch.ones_like(weight, dtype=torch.bool)
    if kind == "groups":
        return Groups(allowed, 4, [2])
    if kind == "allowed":
        allowed[:, ::7] = False
    blocks = -(-size // BLOCK)
    return Counts(allowed, [[rows * BLOCK // 3] * blocks])


def walked(kind, seed, device="cpu"):
    weight, hessian = problem(seed, device=device)
    factor = damped_inverse_cholesky(hessian).factor
    return walk(weight, factor, rule_of(kind, weight), BLOCK)


class CountedGraph:
    """Does what a graph does, on a CPU."""

    made, replayed, wrong = 0, 0, False

    def __init__(self, tensors, plan):
        type(self).made += 1
        self.plan = plan
        self.own = walks._Tensors(*(None if x is None else x.clone() for x in tensors))

    def __call__(self, tensors):
        type(self).replayed += 1
        for own, given in zip(self.own, tensors, strict=True):
            if own is not None:
                own.copy_(given)
        walks._walk_columns(self.own, self.plan)
        if self.wrong:
            self.own.weight.mul_(2)
        return self.own


@pytest.fixture
def counted(monkeypatch):
    graphs = walks._Graphs()
    monkeypatch.setattr(CountedGraph, "made", 0)
    monkeypatch.setattr(CountedGraph, "replayed", 0)
    monkeypatch.setattr(CountedGraph, "wrong", False)
    monkeypatch.setattr(walks, "_Graph", CountedGraph)
    monkeypatch.setattr(walks, "_stream_of", lambda device: 0)
    monkeypatch.setattr(walks, "has_room", lambda device, size: True)
    monkeypatch.setattr(walks, "_run", graphs.run)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return CountedGraph


@pytest.mark.parametrize("kind", ["counts", "allowed", "groups"])
def test_walks_that_come_again_are_replayed(counted, kind, monkeypatch):
    found = [walked(kind, seed) for seed in range(4)]
    assert (counted.made, counted.replayed) == (1, 3)  # the second time it is looked at, too
    monkeypatch.undo()
    for seed, (weight, mask) in enumerate(found):  # nothing is written to by a later walk
        expected, expected_mask = walked(kind, seed)
        assert torch.equal(weight, expected)
        assert torch.equal(mask, expected_mask)


def test_walks_of_other_shapes_have_graphs_of_their_own(counted):
    for rows in (8, 16):
        for seed in range(2):
            weight, hessian = problem(seed, rows)
            sparsegpt(weight, hessian, 0.5)
    assert counted.made == 2


def test_a_graph_that_does_something_else_is_not_used(counted, monkeypatch):
    counted.wrong = True
    found = [walked("counts", seed) for seed in range(4)]
    assert counted.replayed == 1
    monkeypatch.undo()
    for seed, (weight, _) in enumerate(found):
        assert torch.equal(weight, walked("counts", seed)[0])


def test_a_walk_that_cannot_be_captured_is_walked(counted, monkeypatch):
    def refuse(tensors, plan):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(walks, "_Graph", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = [walked("counts", seed) for seed in range(3)]
    monkeypatch.undo()
    for seed, (weight, _) in enumerate(found):
        assert torch.equal(weight, walked("counts", seed)[0])


def test_nothing_is_held_outside():
    with walks_captured():
        inside = walks._graphs.get()
        with walks_captured():
            assert walks._graphs.get() is inside
        assert walks._graphs.get() is inside
    assert walks._graphs.get() is None


def test_who_shares_graphs_may_end_in_any_order():
    first, second = walks_captured(), walks_captured()
    first.__enter__()
    graphs = walks._graphs.get()
    second.__enter__()
    first.__exit__(None, None, None)
    assert walks._graphs.get() is graphs
    second.__exit__(None, None, None)
    assert walks._graphs.get() is None


def test_curves_hold_no_more_than_they_need(monkeypatch):
    """Hessians of many layers are let go of, and a weight that may lie on a disk is read once."""
    model = tiny_model("mamba")
    projections = prunable_weights(model)[:4]
    hessians = {
        p.name: torch.eye(p.shape[-1]).expand(hessian_shape(p)).contiguous() for p in projections
    }
    kept = {"block_size": 32, "dampening_frac": 0.01, "who": "test"}
    data = [{"input_ids": torch.arange(32)[None]}]
    meter = LossMeter(Probe(model, data), 0.5, **kept)
    meter.add(projections, hessians)
    assert meter._begun == []
    meter = LossMeter(LayerProbe(model, data), 0.5, **kept)
    meter.add(projections, hessians)
    assert len(meter._begun) == len(projections)  # of one layer
    read = []
    own = PrunableWeight.weight.fget
    monkeypatch.setattr(
        PrunableWeight, "weight", property(lambda self: read.append(self.name) or own(self))
    )
    meter.losses()
    assert read == []


def test_a_lane_of_a_cpu_works_at_once():
    order = []
    lane = Lane(torch.device("cpu"))
    with lane.work():
        order.append("inside")
    order.append("behind")
    lane.join()
    assert order == ["inside", "behind"]


def test_a_hasty_inverse_says_whether_it_is_one():
    _, hessian = problem(0)
    found, exists = hasty_inverse_cholesky(hessian)
    assert bool(exists)
    expected = damped_inverse_cholesky(hessian).factor
    torch.testing.assert_close(found.factor.double(), expected, rtol=1e-3, atol=1e-5)
    ranks = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # no sum of squares
    assert not bool(hasty_inverse_cholesky(ranks)[1])


def test_a_curve_that_float32_cannot_compute_is_computed_again(monkeypatch):
    model = tiny_model("mamba")
    projections = prunable_weights(model)[:3]
    hessians = {p.name: torch.eye(p.shape[-1]) + 0.1 for p in projections}
    hessians = {p.name: hessians[p.name].expand(hessian_shape(p)) for p in projections}
    kept = {"block_size": 32, "dampening_frac": 0.01, "who": "test"}

    def losses():
        meter = LossMeter(Probe(model, [{"input_ids": torch.arange(32)[None]}]), 0.5, **kept)
        meter.add(projections, hessians)
        return meter.losses()

    expected = losses()
    monkeypatch.setattr(
        allocation, "hasty_error_curve", lambda *a, **k: (torch.full((10,), -1.0), torch.zeros(()))
    )
    assert losses() == expected


def test_inverses_are_computed_once_and_ahead(monkeypatch):
    _, hessian = problem(0)
    _, other = problem(1)
    computed = []
    own = ahead.damped_inverse_cholesky
    monkeypatch.setattr(
        ahead, "damped_inverse_cholesky", lambda H, *a: computed.append(H) or own(H, *a)
    )
    inverses = Inverses(0.01)
    wide = other.double()  # solvers take it in float32, which is another tensor
    inverses.compute_ahead([hessian, hessian, wide])
    assert len(computed) == 1
    first = inverses.of(hessian, hessian)
    assert inverses.of(wide, other) is inverses.of(wide, other)
    assert inverses.of(hessian, hessian) is first
    assert len(computed) == 2
    torch.testing.assert_close(first.factor, own(hessian, 0.01).factor)


def test_what_cannot_be_inverted_ahead_is_told_of_when_it_is_asked_for():
    none = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    inverses = Inverses(0.0)
    inverses.compute_ahead([none])
    with pytest.raises(SparseSSMError, match="cannot be inverted"):
        inverses.of(none, none)


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_cross_terms_that_are_summed_later_are_the_same(solver, monkeypatch):
    def pruned():
        model = tiny_model("mamba")
        prune_projections(model, batches(2), sparsity=0.5, solver=solver)
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    class Event:
        recorded = 0

        def record(self, stream):
            type(self).recorded += 1

    monkeypatch.setattr(statistics, "has_room", lambda device, size: False)
    expected = pruned()
    monkeypatch.setattr(statistics, "has_room", lambda device, size: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)  # of a GPU, as the model stays on the CPU
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    found = pruned()
    assert Event.recorded  # in every stage behind the first
    for name, weight in expected.items():
        assert_same_sums(found[name], weight, 0.0)


@on_gpu
@pytest.mark.parametrize("target", ["mixer", "dense"])
def test_inverses_beside_sums_change_nothing(target, monkeypatch):
    def pruned():
        model = tiny_model("mamba").to("cuda", torch.bfloat16)
        prune_projections(model, batches(2), sparsity=0.5, solver="sparsegpt", target_output=target)
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    found = pruned()
    monkeypatch.setattr(statistics, "has_room", lambda device, size: False)
    for name, weight in pruned().items():
        assert torch.equal(found[name], weight), name


@on_gpu
@pytest.mark.parametrize("kind", ["counts", "allowed", "groups"])
def test_captured_walks_are_what_walks_are(kind):
    expected = [walked(kind, seed, "cuda") for seed in range(5)]
    with walks_captured():
        found = [walked(kind, seed, "cuda") for seed in range(5)]
        graphs = walks._graphs.get()._found
        assert [graph is not None for graph in graphs.values()] == [True]
    for (weight, mask), (expected_weight, expected_mask) in zip(found, expected, strict=True):
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(weight, expected_weight, rtol=1e-4, atol=1e-5)


@on_gpu
def test_curves_of_several_lanes_are_those_of_one():
    problems = [problem(seed, rows=200, size=128, device="cuda") for seed in range(8)]
    expected = [error_curve(*each, (0.3, 0.5, 0.7)).tolist() for each in problems]
    lanes, found = [Lane(torch.device("cuda"), number) for number in range(3)], []
    with walks_captured():
        for number, (weight, hessian) in enumerate(problems):
            with lanes[number % 3].work():
                found.append(error_curve(weight, hessian, (0.3, 0.5, 0.7)))
        for lane in lanes:
            lane.join()
        for curve, one in zip(found, expected, strict=True):
            assert curve.tolist() == pytest.approx(one, rel=1e-3)


@on_gpu
def test_alps_beside_sparsegpt_is_never_worse():
    with walks_captured():
        for seed in range(4):
            weight, hessian = problem(seed, rows=64, size=128, device="cuda")
            found, surgical = alps(weight, hessian, 0.6), sparsegpt(weight, hessian, 0.6)
            again = alps(weight, hessian, 0.6)
            assert found.error <= surgical.error * (1 + 1e-6)
            assert torch.equal(found.mask, again.mask)


@on_gpu
def test_numbers_are_handed_to_a_gpu_that_is_busy():
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    done = torch.cuda.Event()
    done.record()
    found = handed([[1, 2], [3, 4]], torch.int32, busy.device)
    assert not done.query()  # nobody has waited
    assert found.tolist() == [[1, 2], [3, 4]]


def test_numbers_are_handed_over_as_they_are():
    cpu = torch.device("cpu")
    assert handed([1, 2], torch.int64, cpu).tolist() == [1, 2]
    with torch.device("meta"):  # any default
        assert handed([1, 2], torch.int64, cpu).tolist() == [1, 2]
    given = torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = handed(given, torch.float32, cpu)
    assert found.dtype == torch.float32
    assert found.tolist() == given.tolist()
