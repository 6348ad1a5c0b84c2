"""Widths that causal-conv1d refuses on a GPU, with stand-ins for what transformers binds there."""

import functools
import re
from importlib import import_module

import pytest
import torch
from conftest import batches, relative, tiny_model
from loguru import logger

from sparsessm_plugin import fast_forward
from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.latency import measure_latency
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.families import find_mixers, kernels
from sparsessm_plugin.fitting.axes import AXES
from sparsessm_plugin.fitting.prepare import FitSettings, Prepared
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import parse_targets
from sparsessm_plugin.methods import remove_channels, remove_layers, remove_states, remove_width

# 16 heads of 8: 2 D + 2 G N + H is 288 in all, 220 with the 12 heads that go with 48 entries
WIDE = {"hidden_size": 64, "num_heads": 16, "head_dim": 8, "n_groups": 1, "state_size": 8}
NARROW = {**WIDE, "hidden_size": 48, "num_heads": 12}
REFUSED = {
    "mamba2": NARROW,
    "mamba": {"hidden_size": 22},
    "qwen3_5": {"linear_value_head_dim": 7, "linear_key_head_dim": 7},
}


def refusing(reference):
    """What csrc/causal_conv1d.cpp checks of channels in the last dimension."""

    @functools.wraps(reference)
    def convolve(hidden_states, *args, **kwargs):
        if hidden_states.stride(1) == 1 and hidden_states.stride(2) > 1:
            if hidden_states.shape[1] % 8:
                raise RuntimeError("causal_conv1d only supports channel dimension divisible by 8")
            if hidden_states.stride(0) % 8 or hidden_states.stride(2) % 8:
                raise RuntimeError("causal_conv1d with channel last layout requires strides")
        return reference(hidden_states, *args, **kwargs)

    convolve.__module__ = "causal_conv1d.causal_conv1d_interface"
    return convolve


def scanning(reference):
    @functools.wraps(reference)
    def scan(*args, **kwargs):
        return reference(*args, **kwargs)

    scan.__module__ = "mamba_ssm.ops"
    return scan


@pytest.fixture
def bound(monkeypatch):
    """Bind stand-ins for the kernels of a family as transformers binds what is installed."""
    restored = []

    def bind(family):
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        for function in list(vars(module).values()):
            code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", 0)
            if not code or not closure:
                continue
            cells = dict(zip(code.co_freevars, closure, strict=True))
            if not {"func_name", "implementation", "torch_function"} <= set(cells):
                continue
            name = cells["func_name"].cell_contents
            reference = cells["torch_function"].cell_contents
            kernel = refusing if name == "causal_conv1d_fn" else scanning
            for cell, value in (
                ("implementation", kernel(reference)),
                ("is_new_implementation", True),
            ):
                restored.append((cells[cell], cells[cell].cell_contents))
                cells[cell].cell_contents = value
        forget()

    def forget():
        kernels._bound_in.cache_clear()
        kernels._wrappers.cache_clear()

    yield bind
    for cell, value in reversed(restored):
        cell.cell_contents = value
    forget()


@pytest.fixture(params=["cuda", REFERENCE])
def on_a_gpu(request, monkeypatch):
    """Let fast_forward decide as on a GPU, with Triton and without."""
    module = import_module("sparsessm_plugin.families.fast_forward")
    decide = module._Forward._takes_over
    monkeypatch.setattr(module, "backend_for", lambda device: request.param)
    monkeypatch.setattr(
        module._Forward,
        "_takes_over",
        lambda self, device, dtype: decide(self, torch.device("cuda"), dtype),
    )


@pytest.mark.parametrize("family", REFUSED)
def test_no_pass_asks_kernels_for_what_they_refuse(family, bound, on_a_gpu):
    model, (batch,) = tiny_model(family, **REFUSED[family]), batches(1)
    ids = batch["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    bound(family)
    with pytest.raises(RuntimeError, match="causal_conv1d"):
        model(ids, use_cache=False)
    with fast_forward(model):
        with torch.no_grad():
            assert relative(model(ids, use_cache=False).logits, expected) < 1e-4
            # a cache or gradients leave it to transformers' own forward
            assert relative(model(ids, use_cache=True).logits, expected) < 1e-4
        model.generate(ids, max_new_tokens=2, do_sample=False)
        model(ids, use_cache=False).logits.sum().backward()
    with pytest.raises(RuntimeError, match="causal_conv1d"):  # what was bound is back
        model(ids, use_cache=False)


def test_a_model_is_narrowed_evaluated_and_distilled_there(bound, on_a_gpu):
    bound("mamba2")
    model, ready = tiny_model("mamba2", **WIDE), batches(2)
    remove_width(model, ready, keep=48, channels="heads", distill_steps=1)
    assert find_mixers(model)[0].sizes.num_heads == 12
    assert evaluate_perplexity(model, ready[0]["input_ids"]).perplexity > 1
    remove_layers(model, ready, keep=len(model.backbone.layers) - 1)
    remove_states(model, ready, keep=4, distill_steps=1)
    assert evaluate_perplexity(model, ready[0]["input_ids"]).perplexity > 1


def test_kernels_stay_where_they_take_the_widths(bound, on_a_gpu, monkeypatch):
    bound("mamba2")
    monkeypatch.setattr(kernels, "convolution_in_torch", lambda mixer: pytest.fail("left out"))
    (mixer, *_) = find_mixers(tiny_model("mamba2", **WIDE))
    module = import_module("sparsessm_plugin.families.fast_forward")
    with torch.no_grad():
        assert not module._Forward(mixer)._takes_over(torch.device("cuda"), torch.float32)
    assert not kernels.kernels_refuse(mixer)


def test_the_stock_path_is_not_timed_on_them(bound, monkeypatch):
    bound("mamba2")
    model = tiny_model("mamba2", **NARROW)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(SparseSSMError, match=r"small: .*layers.0.mixer .* 220, .*of 8"):
        measure_latency({"small": model}, (1,), 4, 1)


def told(work):
    lines = []
    handler = logger.add(lambda line: lines.append(str(line)), level="WARNING", format="{message}")
    try:
        work()
    finally:
        logger.remove(handler)
    return [line for line in lines if "causal-conv1d" in line]


@pytest.mark.parametrize(
    ("family", "changes", "remove", "settings", "said"),
    [
        (
            "mamba2",
            WIDE,
            remove_width,
            {"keep": 48, "channels": "heads"},
            "48 of 64 .* 220, .*keep 32 instead",
        ),
        ("mamba2", WIDE, remove_width, {"keep": 52}, "52 of 64 .* 237, .*keep 48 or 56 instead"),
        ("mamba2", WIDE, remove_width, {"keep": 48}, None),
        ("mamba2", WIDE, remove_width, {"keep": 32}, None),
        ("mamba2", NARROW, remove_width, {"keep": 24}, None),  # it fails on the dense model, too
        ("mamba", {}, remove_channels, {"keep": 32}, None),
        ("mamba2", {**WIDE, "expand": 4, "head_dim": 16}, remove_channels, {"keep": 8}, None),
        (
            "mamba2",
            {**WIDE, "head_dim": 16, "expand": 4},
            remove_channels,
            {"axis": "heads", "keep": 12},
            "12 of 16 heads .* 412, .*keep 8 instead",
        ),
    ],
)
def test_sizes_that_stock_transformers_fails_on_are_told(family, changes, remove, settings, said):
    lines = told(lambda: remove(tiny_model(family, **changes), batches(1), **settings))
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.search(said, line), line


def prepared(family, target, axes=("hidden",), **changes):
    settings = FitSettings(parse_targets(target), axes=axes)
    return Prepared(Shapes(tiny_model(family, **changes)), settings, torch.device("cpu"))


def test_fit_chooses_among_sizes_that_kernels_take(monkeypatch):
    # 16 heads of 7 and 6 channels, where 14 and 12 heads would be refused
    (ladder,) = prepared("mamba2", "parameters=0.7", **WIDE).space.ladders
    assert ladder.sizes[:3] == (64, 56, 48)
    monkeypatch.setattr(AXES["hidden"], "sizes", lambda length: [52, 48])
    found = prepared("mamba2", "parameters=0.9", **WIDE)
    (ladder,) = found.space.ladders
    assert ladder.sizes == (64, 48)
    left_out = {entry.size: entry.reason for entry in found.excluded}
    assert "in_proj has 237 channels" in left_out[52]
    monkeypatch.undo()
    # of a model that they refuse already, all sizes are as good
    (ladder,) = prepared("mamba2", "parameters=0.9", **NARROW).space.ladders
    assert len(ladder.sizes) > 2


def test_fit_takes_other_sizes_where_nothing_else_reaches_the_target(monkeypatch):
    monkeypatch.setattr(AXES["hidden"], "sizes", lambda length: [52])
    lines = told(lambda: prepared("mamba2", "parameters=0.9", **WIDE))
    assert len(lines) == 1
    assert "no sizes that causal-conv1d takes reach the targets" in lines[-1]
    with pytest.raises(SparseSSMError, match=r"the nearest is parameters=0\.697"):
        prepared("mamba2", "parameters=0.01", **WIDE)
