"""Gradient steps as one CUDA graph: on a GPU, and with a graph that computes anew without one."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import batches, relative, tiny_model
from torch import nn

from sparsessm_plugin.backends import capture as capture_module
from sparsessm_plugin.backends.capture import CapturedStep, capture
from sparsessm_plugin.backends.lanes import _stream
from sparsessm_plugin.families import decoding
from sparsessm_plugin.refit import reconstruction
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import Distillation
from sparsessm_plugin.training.flat import FlatWeights


class Problem:
    """A linear layer, its weights side by side, and the two halves of a step."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.weights = FlatWeights(dict(self.layer.named_parameters()))
        self.last = SimpleNamespace()
        self.off = 0.0  # what a replay adds to the gradients

    def gradients(self, batch):
        self.weights.clear_gradients()
        loss = (self.layer(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        self.last.batch, self.last.loss = batch, loss.detach()
        return self.last.loss

    def update(self, rate):
        self.last.rate, self.last.norm = rate, self.weights.step(rate, 1.0, [None])
        return self.last.norm

    def batch(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(4, 3, generator=generator), "y": torch.ones(4, 2), "other": None}


@pytest.fixture
def problem(monkeypatch):
    """Where a graph holds what was done last and does it again; capturing changes nothing."""
    own = Problem()

    class Graph:
        def replay(self):
            loss, norm, batch, rate = self.held
            loss.copy_(own.gradients(batch))
            for gradient in own.weights.gradients:
                gradient += own.off
            norm.copy_(own.update(rate))

    @contextmanager
    def graph(into):
        before = own.weights.snapshot()
        yield
        own.weights.restore(before)
        into.held = own.last.loss, own.last.norm, own.last.batch, own.last.rate

    stream = SimpleNamespace(wait_stream=lambda other: None)
    own.streams = []
    _stream.cache_clear()
    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda device: own.streams.append(device) or stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(capture_module.torch.cuda, name, value)
    with own.weights.attached():
        yield own
    _stream.cache_clear()


def test_captured_steps_are_the_steps(problem):
    start = problem.weights.snapshot()
    expected = []
    for seed in range(4):
        loss = problem.gradients(problem.batch(seed))
        expected.append((loss, problem.update(0.01 * (seed + 1))))
    weights = problem.weights.snapshot()
    problem.weights.restore(start)
    captured = CapturedStep(
        problem.gradients, problem.update, problem.weights, problem.batch(0), 0.01
    )
    found = [tuple(x.clone() for x in captured.numbers())]  # the first step is taken
    for seed in range(1, 4):
        assert captured.takes(problem.batch(seed))
        numbers = captured(problem.batch(seed), 0.01 * (seed + 1))
        found.append(tuple(x.clone() for x in numbers))
    for one, other in zip(found, expected, strict=True):
        assert all(relative(a, b) < 1e-6 for a, b in zip(one, other, strict=True))
    for one, other in zip(problem.weights.snapshot(), weights, strict=True):
        assert relative(one, other) < 1e-6


def test_batches_of_another_shape_are_not_taken(problem):
    captured = CapturedStep(
        problem.gradients, problem.update, problem.weights, problem.batch(0), 0.01
    )
    other = problem.batch(0)
    assert not captured.takes({**other, "x": other["x"][:2]})
    assert not captured.takes({**other, "x": other["x"].double()})
    assert not captured.takes({**other, "other": torch.ones(1)})


def test_all_captures_warm_up_on_one_stream(problem):
    """Of each stream cuBLAS keeps a workspace, and torch has 32."""
    for _ in range(3):
        CapturedStep(problem.gradients, problem.update, problem.weights, problem.batch(0), 0.01)
        decoding.capture_step(
            lambda: problem.update(problem.gradients(problem.batch(0))),
            lambda: None,
            problem.weights.device,
        )
    assert len(problem.streams) == 1


@pytest.mark.parametrize("wrong", ["gradients", "an error"])
def test_a_step_that_no_graph_holds_leaves_the_weights_alone(problem, wrong, monkeypatch):
    start = problem.weights.snapshot()
    if wrong == "gradients":
        problem.off = 0.1
    else:
        monkeypatch.setattr(capture_module.torch.cuda, "graph", None)
    args = (problem.gradients, problem.update, problem.weights, problem.batch(0), 0.01)
    assert capture("somebody", *args) is None
    for one, other in zip(problem.weights.snapshot(), start, strict=True):
        assert torch.equal(one, other)


def test_reconstruction_by_steps_that_may_be_captured_is_the_same(monkeypatch):
    """The steps that a GPU takes, here without a graph, against torch's own optimizer."""
    target = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    masked = torch.ones(5, 4)
    masked[0] = 0
    asked = []

    def batch_of(i):
        return {"x": torch.full((1,), 1.0 + i), "mask": None}

    def run(steps_of):
        weights = [nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.ones(4))]

        def loss(batch):
            return (batch["x"] * weights[0] * weights[1] - target).square().mean()

        with torch.enable_grad():
            steps_of([(weights[0], masked), (weights[1], None)], loss)
        return [weight.detach() for weight in weights]

    def on_gpu(parameters, loss):
        reconstruction._on_gpu(reconstruction._Adam(parameters), loss, batch_of, 3, 40, 1e-2)

    def plain(parameters, loss):
        reconstruction.reconstruct(parameters, loss, 3, 40, 1e-2, batch_of=batch_of)

    monkeypatch.setattr(reconstruction, "capture", lambda *args: asked.append(args[0]))
    for one, other in zip(run(on_gpu), run(plain), strict=True):
        assert relative(one, other) < 1e-5
    assert len(asked) == 1  # what no graph holds is not tried again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("family", "optimizer"),  # experts wait for the GPU
    [("mamba", "adam"), ("mamba2", "adam"), ("bamba", "adam"), ("mamba", "muon")],
)
def test_a_fit_on_a_gpu_ends_where_it_ends_without_a_graph(family, optimizer, monkeypatch):
    made = []
    own = capture_module.capture

    def fit(captures):
        torch.manual_seed(0)
        model = tiny_model(family).cuda()
        data = batches(3, length=20)
        plan = Plan(steps=20, learning_rate=1e-3, precision="float32", optimizer=optimizer)
        distillation = Distillation(model, data, "test", plan)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        monkeypatch.setattr("sparsessm_plugin.training.tuner.capture", captures)
        # whatever else is on the GPU
        monkeypatch.setattr("sparsessm_plugin.training.tuner.has_room", lambda *asked: True)
        return distillation.fit(model, "mixers").divergence_after

    with_graph = fit(lambda *args: made.append(own(*args)) or made[-1])
    assert made[0] is not None
    assert len(made) == 1
    assert with_graph == pytest.approx(fit(lambda *args: None), rel=0.02)


def test_only_where_the_loss_never_waits():
    from sparsessm_plugin.training.distillation import _is_capturable

    model = tiny_model("mamba")
    whole, padded = batches(1, length=10), batches(1, length=10, padded=True)
    plan = Plan(steps=1)
    assert _is_capturable(Distillation(model, whole, "test", plan).batches[0])
    assert not _is_capturable(Distillation(model, padded, "test", plan).batches[0])
