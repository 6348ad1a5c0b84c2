"""What a mixer computed when it was changed is not computed again when the data passes it."""

import gc
from functools import partial

import pytest
import torch
from conftest import DELTA, DEVICE, FAMILIES, MAMBA1, batches, run, state, tiny_model

import sparsessm_plugin as plugin
from sparsessm_plugin import fast_forward, find_mixers
from sparsessm_plugin.calibration import inputs as calibration_inputs
from sparsessm_plugin.families.base import read_out
from sparsessm_plugin.families.fast_forward import promise, withdraw
from sparsessm_plugin.families.promises import KnownCall, Promise
from sparsessm_plugin.methods import propagation
from sparsessm_plugin.methods.projections.method import prune_projections
from sparsessm_plugin.methods.transitions import prune_transitions

A_LOG = partial(plugin.SparseSSMModifier, sparsity=0.5)
PROJECTIONS = partial(plugin.SensitivitySparseGPTModifier, sparsity=0.5, solver="sparsegpt")
W8 = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*dt_proj$"], "scheme": "W8A8"}
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="bits are compared")


@pytest.fixture(autouse=True, scope="module")
def only_what_these_tests_make():
    """Leave the objects of whole libraries out when it is looked what is still held."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Spy:
    """Counts what was promised and used, and keeps what the mixers gave."""

    def __init__(self, patch, model, fits=True):
        self.used = self.promised = 0
        self.outputs = []
        take, made = Promise.take, Promise.__init__

        def counted(promised, *args):
            x = take(promised, *args)
            self.used += x is not None
            return x

        def begun(promised, mixer, computed_by, calls):
            calls = list(calls)
            self.promised += len(calls)
            made(promised, mixer, computed_by, calls)

        patch.setattr(Promise, "take", counted)
        patch.setattr(Promise, "__init__", begun)
        if fits:
            patch.setattr(propagation, "fits", lambda device, needed: True)
        for adapter in find_mixers(model):
            adapter.mixer.register_forward_hook(lambda m, a, y: self.outputs.append(y.clone()))


def with_and_without(make, drive):
    """All that mixers give and the weights are the same, bit by bit; what was promised and used."""
    found = []
    for fits in (False, True):
        model = make()
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(patch, model, fits)
            drive(model)
        found.append((spy, state(model)))
        assert nothing_is_held()
    (plain, weights), (spy, others) = found
    assert not plain.promised
    assert len(plain.outputs) == len(spy.outputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.outputs, spy.outputs, strict=True))
    assert all(torch.equal(others[name], weight) for name, weight in weights.items())
    return spy


def nothing_is_held():
    gc.collect()
    return not any(isinstance(found, (Promise, KnownCall)) for found in gc.get_objects())


def calls(model, count=3):
    return count * len(find_mixers(model))


def all_are_used(family, padded, modifier):
    ready = batches(padded=padded)
    spy = with_and_without(
        partial(tiny_model, family),
        lambda model: run(model, modifier(), ready, pipeline="sequential"),
    )
    assert spy.used == spy.promised == calls(tiny_model(family))


@on_cpu
@pytest.mark.parametrize(
    ("family", "padded"),
    [*((family, True) for family in (*FAMILIES, *DELTA)), ("mamba", False), ("mamba2", False)],
)
def test_projections(family, padded):
    all_are_used(family, padded, PROJECTIONS)


@on_cpu
@pytest.mark.parametrize(
    ("family", "padded"), [*((family, True) for family in MAMBA1), ("mamba", False)]
)
def test_transitions(family, padded):
    all_are_used(family, padded, A_LOG)


@on_cpu
@pytest.mark.parametrize("method", [prune_transitions, prune_projections])
def test_without_a_framework(method):
    spy = with_and_without(
        partial(tiny_model, "mamba"), lambda model: method(model, batches(), sparsity=0.5)
    )
    assert spy.used == spy.promised == 6


@on_cpu
@pytest.mark.parametrize("target_output", ["own", "mixer", "dense", "half_way"])
def test_every_target(target_output):
    spy = with_and_without(
        partial(tiny_model, "mamba"),
        lambda model: run(model, PROJECTIONS(target_output=target_output), pipeline="sequential"),
    )
    assert spy.used == 6


@on_cpu
@pytest.mark.parametrize(("pipeline", "used"), [("sequential", 6), ("independent", 12)])
def test_both_in_one_recipe(pipeline, used):
    """In one pass the last of them knows what becomes of the mixer."""
    spy = with_and_without(
        partial(tiny_model, "mamba"),
        lambda model: run(model, [A_LOG(), PROJECTIONS()], pipeline=pipeline),
    )
    assert spy.used == spy.promised == used


@on_cpu
def test_weights_that_another_changes_after_that():
    spy = with_and_without(
        partial(tiny_model, "mamba"),
        lambda model: run(model, [PROJECTIONS(), A_LOG()], pipeline="sequential"),
    )
    assert spy.promised
    assert not spy.used


@on_cpu
@pytest.mark.parametrize("maker", [A_LOG, PROJECTIONS])
def test_mixers_that_another_quantizes(maker):
    def drive(model):
        run(model, [maker(), plugin.SparseGPTQModifier(**W8)], pipeline="sequential")

    assert not with_and_without(partial(tiny_model, "mamba"), drive).promised


@on_cpu
def test_some_projections_only():
    """Without out_proj nobody has computed what it multiplies."""
    for targets, used in (["in_proj", "conv1d"], 0), (["out_proj"], 6):
        spy = with_and_without(
            partial(tiny_model, "mamba"),
            lambda model, targets=targets: run(
                model, PROJECTIONS(targets=targets), pipeline="sequential"
            ),
        )
        assert spy.used == spy.promised == used


@on_cpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_batches_that_were_cut(family, padded, monkeypatch):
    monkeypatch.setattr(calibration_inputs, "_TOKENS", 48)
    ready = batches(batch=5, padded=padded)
    spy = with_and_without(
        partial(tiny_model, family),
        lambda model: run(model, PROJECTIONS(), ready, pipeline="sequential"),
    )
    assert spy.used == spy.promised == calls(tiny_model(family))


@on_cpu
@pytest.mark.parametrize("maker", [A_LOG, PROJECTIONS])
@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_layers_that_are_changed_together(maker, pipeline):
    """What enters the second changes with what the first gives, or nothing enters them again."""
    extra = {} if pipeline == "basic" else {"sequential_targets": ["MambaModel"]}
    spy = with_and_without(
        partial(tiny_model, "mamba"),
        lambda model: run(model, maker(), pipeline=pipeline, **extra),
    )
    assert not spy.promised


@on_cpu
@pytest.mark.parametrize("maker", [A_LOG, PROJECTIONS])
def test_room_for_some(maker, monkeypatch):
    """What does not fit is computed."""
    model, asked = tiny_model("mamba"), []
    plain = tiny_model("mamba")
    run(plain, maker(), pipeline="sequential")
    spy = Spy(monkeypatch, model)
    monkeypatch.setattr(
        propagation, "fits", lambda *args: asked.append(args) or len(asked) % 3 != 0
    )
    run(model, maker(), pipeline="sequential")
    assert spy.used == spy.promised == 4
    assert all(torch.equal(state(model)[name], weight) for name, weight in state(plain).items())
    assert nothing_is_held()


def test_a_cpu_keeps_nothing(monkeypatch):
    model = tiny_model("mamba").cpu()
    spy = Spy(monkeypatch, model, fits=False)
    adapter = find_mixers(model)[0]
    kept = propagation.KeptQuantities()
    with torch.no_grad(), fast_forward(model):
        x = torch.randn(2, 5, 32)
        kept.add(adapter, x, adapter.quantities(x))
        kept.hand_over(adapter, passes_again=True)
    assert not spy.promised


@on_cpu
@pytest.mark.parametrize("maker", [A_LOG, PROJECTIONS])
def test_nothing_stays_after_a_run_that_failed(maker, monkeypatch):
    """Behind the first mixer, as the first batch passes it again."""
    model, modifier = tiny_model("mamba"), maker()
    spy = Spy(monkeypatch, model)

    def fail(module, args, output):
        if spy.used:
            raise RuntimeError("on purpose")

    model.backbone.layers[0].mixer.register_forward_hook(fail)
    with pytest.raises(Exception, match="on purpose"):
        run(model, modifier, pipeline="sequential")
    modifier.release()  # as whoever runs it does: LLM Compressor tells its modifiers nothing
    assert spy.promised == 3
    assert nothing_is_held()


@pytest.mark.parametrize("maker", [A_LOG, PROJECTIONS])
def test_nothing_stays_after_an_error_of_the_method(maker, monkeypatch):
    model = tiny_model("mamba")
    Spy(monkeypatch, model)
    method = type(maker()).method_class
    compress = method.compress

    def fail(self, adapter):
        compress(self, adapter)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(method, "compress", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model, maker(), pipeline="sequential")
    assert nothing_is_held()


# -- what a promise holds for ------------------------------------------------------------------


@pytest.fixture
def promised():
    """A mixer that was promised zeros for two calls, and what enters them."""
    model = tiny_model("mamba").cpu()
    adapter = find_mixers(model)[0]
    inputs = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad(), fast_forward(model):
        zeros = torch.zeros_like(read_out(adapter, adapter.quantities(inputs[0])))
        parts = [[(x[:1], None), (x[1:], None)] for x in inputs]
        promise(
            adapter.mixer,
            adapter.working_clone().mixer,
            [KnownCall(part, lambda: zeros) for part in parts],
        )
        yield adapter, inputs


def is_used(adapter, x, **kwargs):
    return bool((adapter.mixer(x.clone(), **kwargs) == 0).all())


def test_each_call_once_and_in_order(promised):
    adapter, (first, second) = promised
    assert is_used(adapter, first)
    assert is_used(adapter, second, attention_mask=torch.ones(2, 5, dtype=torch.int64))
    assert adapter.mixer.forward.__func__.promised is None
    assert not is_used(adapter, first)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: {"x": x + 1e-6},
        lambda x: {"x": x[:1]},
        lambda x: {"x": x[:, :4]},
        lambda x: {"x": torch.cat([x, x])},
        lambda x: {"x": x, "attention_mask": torch.tensor([[1] * 5, [0] + [1] * 4])},
    ],
)
def test_the_first_other_call_ends_it(promised, other):
    adapter, (first, second) = promised
    assert is_used(adapter, first)
    assert not is_used(adapter, **other(second))
    assert not is_used(adapter, second)


def test_another_order_ends_it(promised):
    adapter, (first, second) = promised
    assert not is_used(adapter, second)
    assert not is_used(adapter, first)


@on_cpu
def test_gradients_end_it(promised):
    adapter, (first, _) = promised
    with torch.enable_grad():
        assert adapter.mixer(first).requires_grad
    assert not is_used(adapter, first)


def test_autocast_ends_it(promised):
    adapter, (first, _) = promised
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_used(adapter, first)
    assert not is_used(adapter, first)


@pytest.mark.parametrize("name", ["A_log", "D", "in_proj.weight", "conv1d.bias", "out_proj.weight"])
@pytest.mark.parametrize("before", [0, 1])
def test_weights_that_are_written_end_it(promised, name, before):
    adapter, inputs = promised
    for x in inputs[:before]:
        assert is_used(adapter, x)
    adapter.mixer.get_parameter(name).add_(1)
    assert not is_used(adapter, inputs[before])


def test_weights_that_are_written_as_they_were_do_not(promised):
    adapter, inputs = promised
    for x in inputs:
        adapter.mixer.in_proj.weight.mul_(1)
        assert is_used(adapter, x)


def test_a_failure_ends_it(promised, monkeypatch):
    adapter, (first, second) = promised
    with monkeypatch.context() as patch:
        patch.setattr(adapter.mixer.out_proj, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapter.mixer(first)
    assert not is_used(adapter, second)


def test_it_can_be_withdrawn(promised):
    adapter, (first, _) = promised
    withdraw(adapter.mixer)
    assert not is_used(adapter, first)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_a_gpu_with_room_computes_each_batch_once(family, monkeypatch):
    """In half precision, as a model there computes."""
    found = []
    for room in (False, True):
        model = tiny_model(family).to("cuda", torch.bfloat16)
        with monkeypatch.context() as patch:
            spy = Spy(patch, model, fits=False)
            patch.setattr(propagation, "fits", lambda *args, room=room: room)
            run(model, PROJECTIONS(target_output="own"), batches(padded=True))
        assert spy.used == spy.promised == room * calls(model)
        assert nothing_is_held()
        found.append(spy.outputs)
    first = len(found[0]) // len(find_mixers(model))  # later layers read what is rounded otherwise
    for plain, kept in zip(*(outputs[:first] for outputs in found), strict=True):
        torch.testing.assert_close(kept, plain, rtol=0.02, atol=0.02)
