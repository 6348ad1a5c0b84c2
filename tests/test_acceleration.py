"""accelerate(): which layers become sparse, when, and that they compute what they did."""

import copy
import json

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch import nn

import sparsessm_plugin
from sparsessm_plugin.checkpoints import acceleration
from sparsessm_plugin.checkpoints.acceleration import (
    SemiStructuredLinear,
    accelerate,
    is_two_of_four,
)
from sparsessm_plugin.errors import SparseSSMError

IDS = torch.arange(1, 31).reshape(2, 15)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def two_of_four(weight):
    fours = weight.view(weight.shape[0], -1, 4)
    fours.scatter_(-1, fours.abs().topk(2, largest=False).indices, 0.0)


def pruned(family="mamba", parts=("in_proj", "x_proj", "dt_proj", "out_proj"), **changes):
    """A random bfloat16 model with 2:4 weights."""
    model = tiny_model(family, **changes).bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(tuple(f"mixer.{part}.weight" for part in parts)):
                two_of_four(weight)
    return model


def sparse_layers(model):
    return {n for n, m in model.named_modules() if isinstance(m, SemiStructuredLinear)}


@pytest.fixture
def anywhere(monkeypatch):
    """Two libraries that multiply densely, on any device; a third that cannot."""

    def broken(linear, x):
        raise RuntimeError("not supported\non this machine")

    libraries = {name: lambda linear, x: torch.clone for name in ("one", "two")}
    monkeypatch.setattr(acceleration, "LIBRARIES", {**libraries, "three": broken})
    monkeypatch.setattr(acceleration, "check_support", lambda model: None)


def timer(times):
    """Reads times[variant, outputs, tokens] where the real one measures."""
    variants = {}

    def measured(calls):
        module, (x,) = calls[0].func, calls[0].args
        assert len(calls) >= 16
        key = (module.out_features, len(x))
        order = variants.setdefault(key, [])
        if id(module) not in order:
            order.append(id(module))
        return times(order.index(id(module)), *key)

    return measured


@pytest.mark.usefixtures("anywhere")
def test_each_shape_gets_what_is_fastest_for_it():
    model = pruned(time_step_rank=32)
    with torch.no_grad():
        two_of_four(model.lm_head.weight)
        expected = model(IDS).logits
    # in_proj (128, 32): library two is fastest; out_proj (32, 64) and x_proj (48, 64): dense is
    fast = {0: 10.0, 1: 9.0, 2: 5.0}
    report = accelerate(model, timer=timer(lambda i, out, _: fast[i] if out == 128 else 5.0 + i))
    by_shape = {(s.out_features, s.in_features): s for s in report.shapes}
    assert by_shape.keys() == {(128, 32), (48, 64), (32, 64)}
    assert by_shape[128, 32].choice == "two"
    assert by_shape[128, 32].ratio("two") == 2.0
    assert by_shape[128, 32].failed == {"three": "not supported"}
    assert by_shape[48, 64].choice == by_shape[32, 64].choice == "dense"
    names = {f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1)}
    assert sparse_layers(model) == names == set(report.accelerated)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert report.left_dense["backbone.layers.0.mixer.dt_proj"].startswith("its weight is read")
    assert "shares its weight" in report.left_dense["lm_head"]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["shapes"][0]["choice"] == "two"
    assert "x 2.00" in str(report)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("slow", "choice"), [(30.0, "one"), (50.0, "dense")])
def test_several_token_counts_are_weighed_alike(slow, choice):
    """Four times as fast at 512 tokens and slower at 4: the geometric mean decides."""
    model = pruned(parts=("in_proj",))
    times = {4: (10.0, slow, 99.0), 512: (100.0, 25.0, 200.0)}
    report = accelerate(model, (4, 512), timer=timer(lambda i, _, tokens: times[tokens][i]))
    (shape,) = report.shapes
    assert shape.fastest == "one"
    assert shape.ratios("one") == (10.0 / slow, 4.0)
    assert shape.choice == choice


@pytest.mark.usefixtures("anywhere")
def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setitem(acceleration.LIBRARIES, "one", lambda linear, x: lambda w: 1.1 * w)
    report = accelerate(pruned(parts=("in_proj",)), timer=timer(lambda i, *_: 10.0 - i))
    (shape,) = report.shapes
    assert shape.sparse_us.keys() == {"two"}
    assert "differ from the dense ones by 10" in shape.failed["one"]


@pytest.mark.usefixtures("anywhere")
def test_no_library_at_all_leaves_everything_dense(monkeypatch):
    monkeypatch.setattr(acceleration, "LIBRARIES", {"three": acceleration.LIBRARIES["three"]})
    model = pruned()
    report = accelerate(model, timer=timer(lambda *_: 1.0))
    assert sparse_layers(model) == set()
    assert "three: not supported" in str(report)


@pytest.mark.usefixtures("anywhere")
def test_modules_under_several_names_stay_one_module():
    model = pruned(parts=("in_proj",))
    first, second = (layer.mixer for layer in model.backbone.layers)
    second.in_proj = first.in_proj
    report = accelerate(model, timer=timer(lambda i, *_: 10.0 - i))
    assert first.in_proj is second.in_proj
    assert len(report.accelerated) == 2


def test_filled_up_outputs_bias_and_transposed_inputs():
    linear = nn.Linear(16, 20)
    sparse = SemiStructuredLinear(linear, torch.clone)
    assert sparse.weight.shape == (32, 16)
    for x in (torch.randn(3, 5, 16), torch.randn(3, 16, 5).transpose(1, 2), torch.randn(16)):
        torch.testing.assert_close(sparse(x), linear(x))
    for name, tensor in linear.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], tensor)


@pytest.mark.parametrize("library", ["cusparselt", "cusparselt, searched"])
def test_cusparselt_gets_its_algorithm_from_any_torch(monkeypatch, library):
    """With dense products in place of cuSPARSELt's, which needs a GPU."""
    calls = []

    def multiply(packed, x, bias=None, transpose_result=False, alg_id=0, **kwargs):
        calls.append((transpose_result, alg_id))
        y = packed @ x if bias is None else packed @ x + bias[:, None]
        return y.t().contiguous() if transpose_result else y

    def search(packed, x, transpose_result):
        assert transpose_result
        assert packed.shape[1] == x.shape[0]
        return 3

    cls = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    monkeypatch.setattr(cls, "_validate_device_dim_dtype_shape", lambda tensor: None)
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    for bias in (False, True):
        linear = nn.Linear(64, 48, bias=bias).bfloat16()
        x = torch.randn(2, 5, 64).bfloat16()
        sparse = SemiStructuredLinear(linear, acceleration.LIBRARIES[library](linear, x[0]))
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), linear(x), rtol=0.02, atol=0.02)
        assert calls == [(True, 3 if "searched" in library else 0)]
        assert torch.equal(sparse.state_dict()["weight"], linear.weight)


def test_is_two_of_four():
    weight = torch.tensor([[0.0, 1, 0, 2, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0, 3, 4]])
    assert is_two_of_four(weight)
    weight[1, 2] = 1
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(4, 6))


# -- what is refused ---------------------------------------------------------------------


def test_a_model_on_the_cpu():
    with pytest.raises(SparseSSMError, match=r"on cpu; 2:4 layers are faster on CUDA GPUs of"):
        sparsessm_plugin.accelerate(pruned())


def test_a_gpu_that_is_too_old(monkeypatch):
    model = nn.Linear(4, 4, device="meta")
    monkeypatch.setattr(type(model.weight), "device", torch.device("cuda", 0), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(SparseSSMError, match=r"Old GPU has compute capability 7\.5; 2:4 layers"):
        accelerate(model)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("mamba"), "every one: not 2 zeros in"),
        (lambda: pruned().float(), r"in_proj: float32 weights; bfloat16 or float16"),
        (lambda: pruned(hidden_size=40, parts=("in_proj",)), "40 inputs, which 16 does not"),
    ],
)
def test_models_without_a_layer_to_accelerate(make, message):
    with pytest.raises(SparseSSMError, match=message) as error:
        accelerate(make(), timer=timer(lambda *_: 1.0))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("anywhere")
def test_quantized_and_other_linear_layers_stay(monkeypatch):
    class Other(nn.Linear):
        pass

    model = pruned(parts=("in_proj",))
    first, second = (layer.mixer.in_proj for layer in model.backbone.layers)
    first.quantization_scheme = object()
    second.__class__ = Other
    with pytest.raises(SparseSSMError, match=r"layers\.0\.mixer\.in_proj: it is quantized"):
        accelerate(model)
    del first.quantization_scheme
    report = accelerate(model, timer=timer(lambda i, *_: 10.0 - i))
    assert report.accelerated == ("backbone.layers.0.mixer.in_proj",)
    assert report.left_dense["backbone.layers.1.mixer.in_proj"].startswith("a Other may")


@pytest.mark.parametrize("tokens", [(), (0,), (1.5,)])
def test_token_counts_that_are_none(tokens):
    with pytest.raises(SparseSSMError, match="tokens must be whole numbers above 0"):
        accelerate(pruned(), tokens)


# -- on a GPU ----------------------------------------------------------------------------


def wide(family):
    """Wide enough for every library; in_proj of Mamba-2 has outputs to fill up."""
    changes = {"hidden_size": 256}
    if family == "mamba":
        changes["time_step_rank"] = 16
    else:
        changes |= {"num_heads": 8, "head_dim": 64, "state_size": 16, "chunk_size": 32}
    return pruned(family, **changes).cuda()


@on_gpu
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_sparse_layers_compute_what_dense_ones_do(family):
    model = wide(family)
    dense = copy.deepcopy(model)
    ids = torch.randint(1, VOCAB, (3, 40), device="cuda")
    # whatever the clock says, sparse wins
    report = accelerate(model, (8, 512), timer=timer(lambda i, *_: 10.0 - i))
    parts = ("in_proj", "x_proj", "out_proj") if family == "mamba" else ("in_proj", "out_proj")
    expected = {f"backbone.layers.{i}.mixer.{part}" for i in (0, 1) for part in parts}
    assert sparse_layers(model) == expected, report
    with torch.no_grad():
        for name in expected:
            x = torch.randn(3, 40, model.get_submodule(name).in_features, device="cuda").bfloat16()
            wanted, found = (m.get_submodule(name)(x).float() for m in (dense, model))
            assert float((found - wanted).norm() / wanted.norm()) < 0.01
        wanted, found = (m(ids, use_cache=False).logits.float() for m in (dense, model))
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
        # one token at a time
        new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert new.shape == (3, 44)
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(state[name], tensor), name


@on_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_measuring_on_a_gpu(cuda_graphs):
    model = wide("mamba")
    report = accelerate(model, (1, 100), cuda_graphs=cuda_graphs)
    assert len(report.shapes) == 3
    for shape in report.shapes:
        assert shape.sparse_us, shape.failed
        assert all(t > 0 for times in (shape.dense_us, *shape.sparse_us.values()) for t in times)
    assert sparse_layers(model) == set(report.accelerated)


@on_gpu
def test_every_library_of_a_large_layer_agrees():
    linear = nn.Linear(512, 1000, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        two_of_four(linear.weight)
        timing, packs = acceleration.measure(linear, (8, 300))
        assert packs, timing.failed
        x = torch.randn(2, 512, 7, device="cuda").bfloat16().transpose(1, 2)
        for pack in packs.values():
            found = SemiStructuredLinear(linear, pack)(x)
            torch.testing.assert_close(found, linear(x), rtol=0.02, atol=0.02)
