"""Gradient steps where weights are not where a model computes, and beside other modifiers.

A GPU is not needed: what matters is that what a module gives for a weight is a copy of it.
"""

from contextlib import contextmanager

import pytest
import torch
from compressed_tensors.offload import disable_onloading, set_onload_device
from compressed_tensors.offload.cache.cpu import CPUCache
from conftest import DEVICE, batches, run, state, tiny_model
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from sparsessm_plugin import (
    GradientMagnitudeModifier,
    SparseGPTQModifier,
    StateRemovalModifier,
)
from sparsessm_plugin.calibration.contexts import (
    hooks_disabled,
    quantization_disabled,
    undisturbed,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.training import gradients as training
from sparsessm_plugin.training.gradients import held_on, on_compute_device


class Tied(nn.Module):
    """Two names of one parameter, a buffer, and a parameter that looks into another's memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.third = nn.Linear(3, 4, bias=False)
        self.third.weight = nn.Parameter(self.first.weight.detach())
        self.register_buffer("counts", torch.arange(5))


@pytest.fixture
def onloading_copies(monkeypatch):
    """As where a GPU computes with weights in main memory; on one, that is what happens."""

    def onload(self, offloaded):
        if offloaded is None:
            return None
        copy = offloaded.detach().to(self.onload_device, copy=True)
        if isinstance(offloaded, nn.Parameter):
            copy = nn.Parameter(copy, offloaded.requires_grad)
        return copy

    monkeypatch.setattr(CPUCache, "onload", onload)


def test_copies_take_the_place_of_weights_and_go_back_into_them():
    model = Tied()
    parameters = list(model.parameters())
    homes = {name: t.data_ptr() for name, t in model.state_dict().items()}
    with torch.no_grad(), held_on(model, torch.device("cpu")):
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        inside = {name: t.data_ptr() for name, t in model.state_dict().items()}
        assert not set(inside.values()) & set(homes.values())
        assert inside["first.weight"] == inside["second.weight"] == inside["third.weight"]
        model.first.weight.fill_(7.0)
        model.counts.add_(1)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == homes
    assert bool((model.third.weight == 7).all())
    assert model.counts.tolist() == [1, 2, 3, 4, 5]


def test_after_an_exception_all_is_as_it_was():
    model = Tied()
    before = state(model)
    homes = {name: t.data_ptr() for name, t in model.state_dict().items()}

    def stopped():
        with torch.no_grad(), held_on(model, torch.device("cpu")):
            model.first.weight.fill_(7.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    for name, t in model.state_dict().items():
        assert t.data_ptr() == homes[name]
        assert torch.equal(t, before[name])


@pytest.mark.parametrize("room", [True, False])
def test_a_model_that_fits_is_moved_as_a_whole(monkeypatch, room):
    model, moved, asked = tiny_model("mamba"), [], []

    @contextmanager
    def moving(model, device):
        moved.append(device)
        yield

    def has_room(device, needed, spare):
        asked.append((device, needed))
        return room

    monkeypatch.setattr(training, "held_on", moving)
    monkeypatch.setattr(training, "has_room", has_room)
    set_onload_device(model, "cuda:3")
    with disable_onloading(), on_compute_device("this", model) as device:
        numbers = sum(p.numel() for p in model.parameters())
    goal = torch.device("cuda:3")
    assert asked == [(goal, (4 + 16) * numbers)]  # float32
    assert (device, moved) == ((goal, [goal]) if room else (torch.device("cpu"), []))


def test_a_model_that_is_not_offloaded_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(training, "held_on", None)
    with on_compute_device("this", tiny_model("mamba").to(DEVICE)) as device:
        assert device.type == DEVICE


def test_weights_on_several_devices_are_refused():
    model = tiny_model("mamba")
    model.lm_head.to("meta")
    with pytest.raises(SparseSSMError, match="this: the model's weights lie on cpu, meta"):
        on_compute_device("this", model).__enter__()


with_steps = pytest.mark.parametrize(
    "make",
    [
        lambda: StateRemovalModifier(
            saliency="last", compensate="none", keep=4, distill_steps=5, distill_learning_rate=1e-5
        ),
        lambda: GradientMagnitudeModifier(sparsity=0.5, rounds=2, distill_steps=3),
        lambda: GradientMagnitudeModifier(
            sparsity=0.5,
            rounds=2,
            distill_steps=3,
            distill_loss="dense",
            distill_learning_rate=1e-3,
        ),
    ],
    ids=["distilled", "tuned", "tuned to the dense model"],
)


@with_steps
def test_offloaded_models_become_what_others_do(make, request):
    ready = batches(2, 2, 12)
    plain, offloaded = tiny_model("mamba"), tiny_model("mamba")
    run(plain, make(), ready)
    request.getfixturevalue("onloading_copies")
    run(offloaded, make(), ready)
    with disable_onloading():
        found = offloaded.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(found[name].cpu(), value.cpu()), name
    dense = tiny_model("mamba").state_dict()
    name = "backbone.layers.0.mixer.out_proj.weight"
    assert not torch.equal(found[name].cpu(), dense[name])


@with_steps
def test_a_later_quantization_does_not_touch_the_steps(make):
    """Its scales are there from the start of the recipe, and hold nothing yet."""
    ready, reports = batches(2, 2, 12), []
    ignored = ["lm_head", "re:.*dt_proj$"]
    quantization = SparseGPTQModifier(targets=["Linear"], ignore=ignored, scheme="W8A8")
    for later in ([], [quantization]):
        modifier = make()
        run(tiny_model("mamba"), [modifier, *later], ready)
        report = modifier.report()
        reports.append(report.get("rounds") or report["distillation"])
    assert reports[0] == reports[1]


def test_contexts_come_back_to_what_was_around_them():
    model = tiny_model("mamba")
    model.lm_head.quantization_enabled = False

    def enabled():
        return [getattr(m, "quantization_enabled", True) for m in model.modules()]

    before = enabled()
    with hooks_disabled(), quantization_disabled(model):
        with undisturbed(model):
            assert not any(enabled())
        assert not any(enabled())
        assert HooksMixin._HOOKS_DISABLED
    assert enabled() == before
    assert before.count(False) == 1
    assert not HooksMixin._HOOKS_DISABLED
