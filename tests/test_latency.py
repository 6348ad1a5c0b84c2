"""What is timed and weighed; never how long it took."""

import json
import sys

import pytest
import torch
from conftest import DELTA, DEVICE, FAMILIES, MAMBA1, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from sparsessm_plugin import SparseSSMError
from sparsessm_plugin.evaluation import capacity
from sparsessm_plugin.evaluation import latency as module
from sparsessm_plugin.evaluation.capacity import (
    Capacity,
    bytes_of,
    decode_at_capacity,
    measure_capacity,
)
from sparsessm_plugin.evaluation.latency import (
    DECODE,
    GRAPH_DECODE,
    PREFILL,
    Latency,
    StateCache,
    Timing,
    bound_kernels,
    cache_bytes,
    describe_kernels,
    measure_latency,
    plot_latency,
)
from sparsessm_plugin.families.decoding import StaticDecode, prefill, step_logits
from sparsessm_plugin.families.state_cache import make_static

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models gain nothing from more, and lose much where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured():
    dense = tiny_model("mamba").to(DEVICE)
    small = tiny_model("mamba", state_size=4).to(DEVICE)
    return measure_latency({"dense": dense, "small": small}, (1, 3), 6, 4, repeats=3, warmup=1)


def test_everything_is_measured_once(measured):
    assert measured.models == ("dense", "small")
    assert measured.phases == (PREFILL, DECODE)
    assert measured.batch_sizes == (1, 3)
    assert len(measured.timings) == 8
    for timing in measured.timings:
        assert len(timing.seconds) == 3
        assert min(timing.seconds) > 0
        per_sequence, steps = {PREFILL: (6, 1), DECODE: (4, 4)}[timing.phase]
        assert (timing.tokens, timing.steps) == (timing.batch_size * per_sequence, steps)
    assert measured.speedup("dense", PREFILL, 1) == 1
    with pytest.raises(KeyError):
        measured.timing("dense", GRAPH_DECODE, 1)


def test_report_is_plain(measured):
    report = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert report["models"] == ["dense", "small"]
    assert report["timings"][0]["speedup"] == 1
    small = report["cache_bytes_per_sequence"]["small"]
    assert small["total"] == small["recurrent"] + small["convolution"]


def test_cache_bytes_follow_the_sizes(measured):
    # 2 layers of 64 channels: 8 states or 4, 4 inputs of the convolution, 4 bytes each
    assert measured.caches["dense"] == StateCache(2 * 64 * 8 * 4, 2 * 64 * 4 * 4)
    assert measured.caches["small"] == StateCache(2 * 64 * 4 * 4, 2 * 64 * 4 * 4)


def test_numbers_of_a_timing():
    timing = Timing("m", DECODE, 2, steps=4, tokens=8, seconds=(0.2, 0.1, 0.4))
    assert timing.median == 0.2
    assert timing.milliseconds == pytest.approx(50)
    assert timing.tokens_per_second == pytest.approx(40)
    assert timing.spread == pytest.approx(0.75)


def test_speedup_pairs_the_repeats():
    # both models are slowed down together: the ratio does not notice
    timings = (
        Timing("a", DECODE, 1, 1, 1, (2.0, 20.0, 4.0)),
        Timing("b", DECODE, 1, 1, 1, (1.0, 10.0, 2.0)),
    )
    result = Latency(("a", "b"), 1, 1, timings, {}, {})
    assert result.speedup("b", DECODE, 1) == 2


def test_models_take_turns_after_the_warm_up(monkeypatch):
    order = []

    def repeat(run, counts):
        order.append((names[id(run.model)], len(run.prompt), counts))
        run.seconds = {PREFILL: [1.0], DECODE: [1.0]}

    monkeypatch.setattr(module._Run, "repeat", repeat)
    models = {name: tiny_model("mamba").to(DEVICE) for name in "ab"}
    names = {id(model): name for name, model in models.items()}
    done = []
    measure_latency(models, (1, 2), 4, 2, repeats=2, warmup=1, progress=done.append)
    one_size = [(False, "a"), (False, "b"), (True, "a"), (True, "b"), (True, "a"), (True, "b")]
    assert order == [(name, size, counts) for size in (1, 2) for counts, name in one_size]
    assert done == [1] * len(order)


def test_every_family_decodes_from_its_cache(family):
    model = tiny_model(family).to(DEVICE)
    model.train()
    result = measure_latency({"m": model}, (2,), 5, 2, repeats=1, warmup=0)
    assert model.training
    cache = result.caches["m"]
    assert cache.recurrent > 0
    assert cache.convolution > 0
    pure = family in (*MAMBA1[:2], "mamba2")
    assert (cache.attention == 0) == pure
    if not pure:  # grows with the text, while the states do not
        longer = measure_latency({"m": model}, (1,), 10, 1, repeats=1, warmup=0).caches["m"]
        assert longer.attention == 2 * cache.attention
        assert longer.recurrent == cache.recurrent


@pytest.mark.parametrize("name", [*FAMILIES, *DELTA])
def test_decode_continues_the_prompt(name):
    """Cached steps give what a pass over the whole text gives, with buffers that grow or not."""
    # with the gated norm, transformers' own step of Falcon-H1 differs from its pass by 0.6
    changes = {"mamba_rms_norm": False} if name == "falcon_h1" else {}
    model = tiny_model(name, **changes).to(DEVICE).eval()
    prompt = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    following = torch.randint(1, 90, (2, 4), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    with torch.inference_mode():
        whole = model(torch.cat([prompt, following], 1), use_cache=False).logits
        for static in (False, True):
            token, cache = prefill(model, prompt)
            assert torch.equal(token, whole[:, 8:9].argmax(-1))
            if static:
                make_static(cache, 32)
                places = addresses(cache)
            # on a GPU the kernels of a whole pass multiply in TF32, those of a step do not
            most = 2e-5 if DEVICE == "cpu" else 2 * 2.0**-11
            for t in range(4):
                logits = step_logits(model, following[:, t : t + 1], cache)
                torch.testing.assert_close(logits, whole[:, 9 + t : 10 + t], atol=most, rtol=most)
        assert addresses(cache) == places  # a graph writes to where they were


def addresses(cache):
    return [
        tensor.data_ptr()
        for layer in cache.layers
        for held in vars(layer).values()
        for tensor in (held.values() if isinstance(held, dict) else [held])
        if isinstance(tensor, torch.Tensor)
    ]


class NoValueOfADevice(TorchDispatchMode):
    """What a CUDA graph cannot do: ask a tensor for its value while the step goes on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asks = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        assert function.overloadpacket.__name__ not in asks, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "name",
    [
        "mamba2",
        "granitemoehybrid",
        "jamba",
        "bamba",
        "zamba2",
        "falcon_h1",
        "nemotron_h",
        "qwen3_5",
    ],
)
def test_static_steps_ask_for_no_value(name):
    changes = {"num_local_experts": 0} if name == "granitemoehybrid" else {}
    model = tiny_model(name, **changes).to(DEVICE).eval()
    with torch.inference_mode():
        static = StaticDecode(
            model, torch.ones(1, 5, dtype=torch.long, device=DEVICE), 2, 0, 3, False
        )
        with NoValueOfADevice():
            static.decode()


def test_static_decode_begins_anew_after_a_rewind():
    model = tiny_model("bamba").to(DEVICE).eval()
    prompt = torch.randint(1, 90, (1, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with torch.inference_mode():
        static = StaticDecode(model, prompt, 3, context=200, batch_size=5, graph=False)
        [keys] = [layer.keys for layer in static.cache.layers if hasattr(layer, "keys")]
        assert keys.shape[0] == 5
        assert keys.shape[2] == 256
        first = static.token.clone()
        static.decode()
        assert static.cache.get_seq_length() == 203
        assert keys[:, :, 200:203].abs().amin() > 0
        assert not keys[:, :, 203:].any()
        static.rewind()
    assert static.cache.get_seq_length() == 200
    assert torch.equal(static.token, first)
    assert (static.token == static.token[0]).all()


def test_a_cache_that_slides_is_not_made_static():
    cache = Cache(layers=[DynamicSlidingWindowLayer(4)])
    with pytest.raises(SparseSSMError, match="layer 0 of the cache is a DynamicSlidingWindowLayer"):
        make_static(cache, 8)


def test_cache_bytes_of_a_prefix_do_not_depend_on_the_batch():
    model = tiny_model("bamba").to(DEVICE)
    found = []
    for batch in (1, 4):
        ids = torch.ones(batch, 7, dtype=torch.long, device=DEVICE)
        with torch.inference_mode():
            found.append(cache_bytes(model(input_ids=ids, use_cache=True).past_key_values, batch))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_are_found_in_every_family(name):
    kernels = bound_kernels(tiny_model(name))
    assert {"causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"} <= set(kernels)
    assert set(kernels.values()) <= {"torch", "mamba_ssm", "causal_conv1d"}


def test_kernels_in_words():
    assert describe_kernels({}) == "unknown"
    assert describe_kernels({"f": "torch"}) == "none, transformers' torch reference"
    both = {"f": "mamba_ssm", "g": "causal_conv1d"}
    assert describe_kernels(both) == "causal_conv1d, mamba_ssm"
    assert describe_kernels({**both, "h": "torch"}).endswith("(h from torch)")


def test_kernels_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(module, "bound_kernels", lambda model: {"f": "mamba_ssm"})
    with pytest.raises(SparseSSMError, match="cannot run m on cpu"):
        measure_latency({"m": tiny_model("mamba")}, (1,), 4, 1)


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_graphs_need_cuda():
    with pytest.raises(SparseSSMError, match="not on a CUDA device"):
        measure_latency({"m": tiny_model("mamba")}, (1,), 4, 1, cuda_graphs=True)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "granitemoehybrid", "qwen3_5"])
def test_graph_replays_the_step(name):
    changes = {"num_local_experts": 0} if name == "granitemoehybrid" else {}
    model = tiny_model(name, **changes).cuda().eval()
    prompt = torch.randint(1, 90, (2, 9)).cuda()
    with torch.inference_mode():
        static = StaticDecode(model, prompt, 4)
        token, cache = prefill(model, prompt)
        make_static(cache, 64)
        # capturing ran warm-up steps on the graph's cache: put the one after the prompt back
        for kept, fresh in zip(static.cache.layers, cache.layers, strict=True):
            for field in ("conv_states", "recurrent_states"):
                for index, state in getattr(kept, field, {}).items():
                    if state is not None:
                        state.copy_(getattr(fresh, field)[index])
        for _ in range(4):
            token = step_logits(model, token, cache).argmax(-1)
        assert torch.equal(static.decode(), token)
    result = measure_latency({"m": model}, (1, 4), 8, 2, repeats=2, cuda_graphs=True)
    assert result.phases == (PREFILL, DECODE, GRAPH_DECODE)


def test_memory_that_does_not_suffice(monkeypatch):
    def no_memory(run, counts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module._Run, "repeat", no_memory)
    with pytest.raises(SparseSSMError, match="not enough memory for 64 sequences of 8 tokens"):
        measure_latency({"m": tiny_model("mamba").to(DEVICE)}, (64,), 8, 1)


def test_plot_as_svg(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plot_latency(measured, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plot_latency(measured, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(SparseSSMError, match="cannot write"):
        plot_latency(measured, tmp_path / "none" / "x.png")


def test_plot_without_matplotlib(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SparseSSMError, match=r"sparsessm-plugin\[plot\]"):
        plot_latency(measured, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_attention_looks_back_at_a_context_without_a_pass_over_it():
    model = tiny_model("bamba").to(DEVICE)
    short, long = (
        measure_latency({"m": model}, (1,), 4, 2, 1, 0, context=context).caches["m"]
        for context in (0, 64)
    )
    assert (long.recurrent, long.convolution) == (short.recurrent, short.convolution)
    assert long.attention == 16 * short.attention


def test_contexts_are_an_axis_of_decode():
    models = {"a": tiny_model("bamba").to(DEVICE), "b": tiny_model("bamba").to(DEVICE)}
    result = measure_latency(models, (1, 2), 4, 2, 1, 0, context=(0, 64))
    assert result.contexts(PREFILL) == (4,)
    assert result.contexts(DECODE) == (4, 64)
    assert len(result.timings) == 2 * 2 * 3
    assert result.timing("a", DECODE, 2).context == 4
    assert result.timing("a", DECODE, 2, 64).seconds != result.timing("a", DECODE, 2).seconds
    assert result.speedup("a", DECODE, 2, 64) == 1


# -- how many fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("8e9", 8 * 10**9), ("1.5kib", 1536), ("7", 7)],
)
def test_memory_in_words(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "1e99", "80 apples", "٣GB", "nan"])
def test_memory_that_is_none(text):
    with pytest.raises(SparseSSMError, match="memory must be"):
        bytes_of(text)


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid"])
def test_sequences_that_fit(name):
    """By hand: weights, and the tensors of a cache whose attention holds so many tokens."""
    model = tiny_model(name).to(DEVICE).eval()
    weights = sum(p.numel() * 4 for p in model.parameters())
    weights += sum(b.numel() * b.element_size() for b in model.buffers())
    found = measure_capacity(model, weights + 10**6, 100)
    assert found.weights == weights
    assert (found.cache.recurrent, found.cache.convolution) == (2 * 64 * 8 * 4, 2 * 96 * 4 * 4)
    # one layer, keys and values of 2 heads of 8
    assert found.cache.attention == (0 if name == "mamba2" else 100 * 2 * 2 * 8 * 4)
    assert found.sequences == 10**6 // found.cache.total
    assert measure_capacity(model, weights - 1, 100).sequences == 0
    [timing] = decode_at_capacity({"m": model}, {"m": found}, 2, 3)
    assert (timing.batch_size, timing.context) == (found.sequences, 100)
    assert (timing.tokens, len(timing.seconds)) == (2 * found.sequences, 3)


def test_fewer_sequences_where_working_memory_needs_the_place(monkeypatch):
    tried = []

    def decode(model, batch_size, *_):
        tried.append(batch_size)
        if batch_size > 90:
            raise RuntimeError("capture ended") from torch.OutOfMemoryError("CUDA out of memory")
        return (1.0,)

    monkeypatch.setattr(capacity, "_decode", decode)
    # a guess that was too high
    monkeypatch.setattr(capacity, "_with_working_memory", lambda model, found: found.sequences)
    model = tiny_model("mamba").to(DEVICE)
    places = {"m": Capacity(100, 0, StateCache(1, 0), 8)}
    [timing] = decode_at_capacity({"m": model}, places)
    assert tried == [100, 95, 90]
    assert timing.batch_size == 90
    with pytest.raises(SparseSSMError, match="m leaves no memory for a sequence"):
        decode_at_capacity({"m": model}, {"m": Capacity(100, 101, StateCache(1, 0), 8)})


@pytest.mark.parametrize("name", ["mamba", "mamba2", "granitemoehybrid"])
@torch.inference_mode()
def test_peak_in_main_memory_grows_with_the_sequences(name):
    model = tiny_model(name).cpu().eval()
    cache = measure_capacity(model, 10**9, 64).cache.total
    few, more = (capacity._peak_of(model, count, 64) for count in (16, 32))
    assert more > 32 * (cache + 4 * model.config.vocab_size)  # its cache and its logits
    assert more <= 2 * few


@torch.inference_mode()
def test_sequences_in_main_memory_leave_half_of_it_free(monkeypatch):
    """However much is said to be given, a batch and its working memory stay within half."""
    model = tiny_model("mamba2").cpu().eval()
    cache = measure_capacity(model, 10**9, 8).cache.total
    tried = []
    decode = capacity._decode

    def spy(model, batch_size, *args):
        tried.append(batch_size)
        return decode(model, batch_size, *args)

    monkeypatch.setattr(capacity, "_decode", spy)
    much = Capacity(10**15, 0, StateCache(cache, 0), 8)
    for available in (1000, 100):
        tried.clear()
        monkeypatch.setattr(capacity, "memory_available", lambda n=available: n * cache)
        [timing] = decode_at_capacity({"m": model}, {"m": much}, 1, 1)
        assert timing.batch_size == tried[-1]
        for batch_size in tuple(tried):
            assert capacity._peak_of(model, batch_size, 8) <= available / 2 * cache
    monkeypatch.setattr(capacity, "memory_available", lambda: cache)
    with pytest.raises(SparseSSMError, match="m leaves no memory for a sequence"):
        decode_at_capacity({"m": model}, {"m": much}, 1, 1)
