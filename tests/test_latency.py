"""What is timed and weighed; never how long it took."""

import json
import sys

import pytest
import torch
from conftest import DEVICE, FAMILIES, MAMBA1, tiny_model

from sparsessm_plugin import SparseSSMError
from sparsessm_plugin.evaluation import latency as module
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


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
def test_decode_continues_the_prompt(name):
    """The timed steps are greedy generation: what generate() would produce."""
    model = tiny_model(name).to(DEVICE)
    prompt = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )[:, 9:]
    run = module._Run(model, prompt, 4, cuda_graphs=False)
    with torch.inference_mode():
        tokens = [run._prefill()]
        for _ in range(4):
            tokens.append(run.step(tokens[-1], run.cache))
    assert torch.equal(torch.cat(tokens, 1), expected)


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
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_graph_replays_the_step(name):
    model = tiny_model(name).cuda()
    prompt = torch.randint(1, 90, (2, 9)).cuda()
    run = module._Run(model, prompt, 4, cuda_graphs=True)
    with torch.inference_mode():
        graph = module._DecodeGraph(run.step, run._prefill(), run.cache)
        token = run._prefill()
        # capturing ran warm-up steps on the graph's cache: put the one after the prompt back
        for kept, fresh in zip(graph.cache.layers, run.cache.layers, strict=True):
            kept.conv_states[0].copy_(fresh.conv_states[0])
            kept.recurrent_states[0].copy_(fresh.recurrent_states[0])
        graph.token.copy_(token)
        graph.replay(4)
        assert torch.equal(graph.token, run._decode(token))
    result = measure_latency({"m": model}, (1, 4), 8, 2, repeats=2, cuda_graphs=True)
    assert result.phases == (PREFILL, DECODE, GRAPH_DECODE)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_no_graphs_for_hybrids():
    with pytest.raises(SparseSSMError, match="grows with every step"):
        measure_latency({"m": tiny_model("jamba").cuda()}, (1,), 4, 1, cuda_graphs=True)


def test_memory_that_does_not_suffice(monkeypatch):
    def no_memory(run, counts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module._Run, "repeat", no_memory)
    with pytest.raises(SparseSSMError, match="not enough memory for 64 sequences of 8 tokens"):
        measure_latency({"m": tiny_model("mamba").to(DEVICE)}, (64,), 8, 1)


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
