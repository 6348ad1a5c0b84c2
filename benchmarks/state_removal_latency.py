"""What fewer states and fewer channels are worth on a GPU: kernels, then whole models.

python benchmarks/state_removal_latency.py            # one CUDA GPU, mamba-ssm, causal-conv1d
python benchmarks/state_removal_latency.py --quick    # the logic only: tiny models on the CPU

Every ratio compares two things that took turns in one run, and pairs their repeats.
"""

import argparse
import itertools
import os
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import Result, first_line, save
from transformers import AutoModelForCausalLM, MambaConfig

from sparsessm_plugin.evaluation.latency import (
    DECODE,
    GRAPH_DECODE,
    PREFILL,
    Latency,
    describe_kernels,
    measure_latency,
)

WIDTHS = (1536, 5120)  # channels of the 130M and the 2.8B models
LENGTH, PREFILL_BATCH = 2048, 4
DECODE_BATCHES = (1, 32, 128, 512)
MAMBA1_STATES = (16, 8, 4)
MAMBA2_STATES = (128, 64, 32)
HEAD_DIM, CHUNK = 64, 256
# layers that a step goes through: their states together do not stay in the GPU's L2 cache
LAYERS, LAYERS_BYTES = 64, 8e9
STATE_DTYPES = (torch.float32, torch.bfloat16)

MODELS = {
    "130M-shaped": {"hidden_size": 768, "num_hidden_layers": 24},
    "2.8B-shaped": {"hidden_size": 2560, "num_hidden_layers": 64},
}
TINY = {"tiny": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}}


def package_versions() -> dict[str, str]:
    found = {}
    for name in ("mamba-ssm", "causal-conv1d", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- kernels -------------------------------------------------------------------------------


def take_turns(
    works: dict[int, Callable[[], Any]], repeats: int, calls: int
) -> dict[int, list[float]]:
    """Microseconds a call by CUDA events: every repeat goes once through all of them."""
    for work in works.values():  # compile, tune, warm up
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    times: dict[int, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            times[key].append(1000 * start.elapsed_time(end) / calls)
    return times


def captured(steps: list[Callable[[], Any]]) -> Callable[[], None]:
    """One CUDA graph of all steps: the kernels are timed and not Python's launching of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()

    def replay(alive: list[Callable[[], Any]] = steps) -> None:  # the graph knows addresses only
        graph.replay()

    return replay


def rows_of(times: dict[int, list[float]], labels: list[str]) -> tuple[list[list[str]], list[Any]]:
    """Table rows and numbers; the ratio is the median over pairs of repeats with the first."""
    first = next(iter(times.values()))
    rows, numbers = [], []
    for states, micro in times.items():
        median = statistics.median(micro)
        ratio = statistics.median(a / b for a, b in zip(first, micro, strict=True))
        spread = (max(micro) - min(micro)) / (2 * median)
        rows.append([*labels, str(states), f"{median:.1f}", f"{spread:.1%}", f"{ratio:.2f}"])
        numbers.append({"labels": labels, "states": states, "us": micro, "speedup": ratio})
    return rows, numbers


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def layers_for(state_bytes: int) -> int:
    return int(min(LAYERS, max(2, LAYERS_BYTES // state_bytes)))


def kernel_table(
    result: Result, title: str, text: str, columns: list[str], cases: list[tuple[list[str], Any]]
) -> None:
    """One table of kernel timings.

    :param cases: labels, and what makes the works by N, the calls of each a repeat, and the
        layers that one call goes through
    """
    rows: list[list[str]] = []
    numbers: list[Any] = []

    def run(labels: list[str], make: Callable[[], Any]) -> None:
        works, calls, layers = make()
        times = take_turns(works, 15, calls)
        times = {n: [t / layers for t in micro] for n, micro in times.items()}
        more_rows, more_numbers = rows_of(times, labels)
        rows.extend(more_rows)
        numbers.extend(more_numbers)

    try:
        for labels, make in cases:
            result.case(f"{title}, {', '.join(labels)}", lambda a=labels, b=make: run(a, b))
            torch.cuda.empty_cache()
    finally:
        header = [*columns, "N", "us", "± spread", "speedup"]
        result.table(title, text, header, rows)
        result.numbers[title] = numbers


@torch.inference_mode()
def mamba1_scan(result: Result) -> None:
    """(a) selective_scan_fn over whole sequences."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def make(D: int) -> Any:
        B, L = PREFILL_BATCH, LENGTH
        u, dt, z = normal(B, D, L), normal(B, D, L), normal(B, D, L)
        skip, bias = normal(D, dtype=torch.float32), normal(D, dtype=torch.float32) - 4
        works = {}
        for N in MAMBA1_STATES:
            A = -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).repeat(D, 1)
            inputs = (u, dt, A, normal(B, N, L), normal(B, N, L), skip, z, bias, True)
            works[N] = partial(selective_scan_fn, *inputs)
        return works, 10, 1

    kernel_table(
        result,
        "Mamba-1 scan (selective_scan_fn)",
        f"Batch {PREFILL_BATCH}, {LENGTH} tokens, bfloat16.",
        ["D"],
        [([str(D)], lambda D=D: make(D)) for D in WIDTHS],
    )


@torch.inference_mode()
def mamba1_update(result: Result) -> None:
    """(b) selective_state_update, one decode step."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def make(D: int, batch: int, dtype: torch.dtype) -> Any:
        layers = layers_for(batch * D * max(MAMBA1_STATES) * dtype.itemsize)
        works = {}
        for N in MAMBA1_STATES:
            A = -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).repeat(D, 1)
            x, dt, z = normal(batch, D), normal(batch, D), normal(batch, D)
            B, C = normal(batch, N), normal(batch, N)
            skip, bias = normal(D), normal(D, dtype=torch.float32) - 4
            steps = []
            for _ in range(layers):
                state = torch.zeros(batch, D, N, device="cuda", dtype=dtype)
                inputs = (state, x, dt, A.clone(), B, C, skip, z, bias, True)
                steps.append(partial(selective_state_update, *inputs))
            works[N] = captured(steps)
        return works, 4, layers

    kernel_table(
        result,
        "Mamba-1 decode step (selective_state_update)",
        f"Time a layer, from a CUDA graph over up to {LAYERS} layers with a state and an A each. "
        "transformers keeps the states in float32, mamba_ssm in the dtype of the model.",
        ["D", "states in", "batch"],
        [
            (
                [str(D), str(dtype).removeprefix("torch."), str(batch)],
                lambda a=(D, batch, dtype): make(*a),
            )
            for D, dtype, batch in itertools.product(WIDTHS, STATE_DTYPES, DECODE_BATCHES)
        ],
    )


@torch.inference_mode()
def mamba2_update(result: Result) -> None:
    """(c) selective_state_update with heads, as Mamba-2 calls it."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    P = HEAD_DIM

    def make(D: int, batch: int, dtype: torch.dtype) -> Any:
        H = D // P
        layers = layers_for(batch * D * max(MAMBA2_STATES) * dtype.itemsize)
        works = {}
        for N in MAMBA2_STATES:
            # expanded and not repeated, so that the kernel takes its path for one dt a head
            A = -torch.rand(H, device="cuda")[:, None, None].expand(H, P, N)
            dt = normal(batch, H)[..., None].expand(batch, H, P)
            bias, skip = normal(H)[:, None].expand(H, P), normal(H)[:, None].expand(H, P)
            x, B, C = normal(batch, H, P), normal(batch, 1, N), normal(batch, 1, N)
            steps = []
            for _ in range(layers):
                state = torch.zeros(batch, H, P, N, device="cuda", dtype=dtype)
                inputs = (state, x, dt, A, B, C, skip, None, bias, True)
                steps.append(partial(selective_state_update, *inputs))
            works[N] = captured(steps)
        return works, 4, layers

    kernel_table(
        result,
        "Mamba-2 decode step (selective_state_update)",
        f"Heads of {P} channels, one group. Time a layer, from a CUDA graph over up to {LAYERS} "
        "layers with a state each.",
        ["D", "states in", "batch"],
        [
            (
                [str(D), str(dtype).removeprefix("torch."), str(batch)],
                lambda a=(D, batch, dtype): make(*a),
            )
            for D, dtype, batch in itertools.product(WIDTHS, STATE_DTYPES, DECODE_BATCHES)
        ],
    )
    rows = []
    for D, N in itertools.product(WIDTHS, MAMBA2_STATES):
        states = [f"{D * N * dtype.itemsize:,}" for dtype in STATE_DTYPES]
        convolution = f"{(D + 2 * N) * 4 * 2:,}"
        rows.append([str(D), str(N), *states, convolution, f"{N / max(MAMBA2_STATES):.2f}"])
    result.table(
        "Mamba-2 state cache",
        "Bytes a sequence and layer; the convolution's part in bfloat16, of width 4.",
        ["D", "N", "states, float32", "states, bfloat16", "convolution", "states' share of dense"],
        rows,
    )


@torch.inference_mode()
def mamba2_scan(result: Result) -> None:
    """(c) mamba_chunk_scan_combined over whole sequences; last, because it tunes for minutes."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def make(D: int) -> Any:
        B, L, H = PREFILL_BATCH, LENGTH, D // HEAD_DIM
        x, dt = normal(B, L, H, HEAD_DIM), normal(B, L, H)
        A, skip, bias = -torch.rand(H, device="cuda") - 0.5, normal(H), normal(H) - 4
        works = {}
        for N in MAMBA2_STATES:
            inputs = (x, dt, A, normal(B, L, 1, N), normal(B, L, 1, N), CHUNK)
            works[N] = partial(
                mamba_chunk_scan_combined, *inputs, D=skip, dt_bias=bias, dt_softplus=True
            )
        return works, 10, 1

    kernel_table(
        result,
        "Mamba-2 scan (mamba_chunk_scan_combined)",
        f"Batch {PREFILL_BATCH}, {LENGTH} tokens, bfloat16, heads of {HEAD_DIM} channels, one "
        f"group, chunks of {CHUNK}.",
        ["D"],
        [([str(D)], lambda D=D: make(D)) for D in WIDTHS],
    )


# -- whole models --------------------------------------------------------------------------


def build(shape: dict[str, int], device: str, **changes: int) -> Any:
    """A random Mamba in bfloat16 (float32 on the CPU), made on the device itself."""
    config = MambaConfig(**{"vocab_size": 50280, **shape})
    for field, value in changes.items():
        setattr(config, field, value)  # after construction: the constructor derives the channels
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def variants(shape: dict[str, int], device: str) -> dict[str, Any]:
    """Dense first; the names are those of the recipes that make such models."""
    channels = 2 * shape["hidden_size"] * 3 // 4
    return {
        "dense": build(shape, device),
        "state-50": build(shape, device, state_size=8),
        "channels-25": build(shape, device, intermediate_size=channels),
    }


def whole_models(result: Result, quick: bool) -> None:
    """(d) transformers' prefill and decode."""
    device = "cpu" if quick else "cuda"
    prefill_settings: dict[str, Any] = {
        "batch_sizes": (1, 8),
        "prompt_length": LENGTH,
        "decode_steps": 1,
        "repeats": 7,
    }
    decode_settings: dict[str, Any] = {
        "batch_sizes": DECODE_BATCHES,
        "prompt_length": 64,
        "decode_steps": 16,
        "repeats": 7,
        "cuda_graphs": not quick,
    }
    if quick:
        prefill_settings.update(prompt_length=8, repeats=2)
        decode_settings.update(prompt_length=4, decode_steps=2, repeats=2, batch_sizes=(1, 4))
    kernels: set[str] = set()
    timings: dict[str, Any] = {}
    rows: list[list[str]] = []
    caches: list[list[str]] = []

    def add(shape_name: str, latency: Latency, phases: tuple[str, ...]) -> None:
        for phase, size in itertools.product(phases, latency.batch_sizes):
            for name in latency.models:
                timing = latency.timing(name, phase, size)
                rows.append(
                    [
                        *(shape_name, phase, str(size), name),
                        f"{timing.milliseconds:.2f}",
                        f"{timing.spread:.1%}",
                        f"{timing.tokens_per_second:,.0f}",
                        f"{latency.speedup(name, phase, size):.3f}",
                    ]
                )
        kernels.update(describe_kernels(found) for found in latency.kernels.values())
        timings[f"{shape_name}, {' and '.join(phases)}"] = latency.to_dict()

    def run(shape_name: str, shape: dict[str, int]) -> None:
        models = variants(shape, device)
        parameters = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
        # the timings of prefill and of decode come from different prompts
        latency = measure_latency(models, **prefill_settings)
        add(shape_name, latency, (PREFILL,))
        for name, cache in latency.caches.items():
            numbers = (parameters[name], cache.recurrent, cache.convolution, cache.total)
            share = cache.total / latency.caches["dense"].total
            caches.append([shape_name, name, *(f"{n:,}" for n in numbers), f"{share:.3f}"])
        try:
            latency = measure_latency(models, **decode_settings)
        except Exception as error:
            if quick:
                raise
            traceback.print_exc()
            result.note(f"{shape_name}, CUDA graphs", first_line(error))
            latency = measure_latency(models, **{**decode_settings, "cuda_graphs": False})
        phases = (DECODE, GRAPH_DECODE) if GRAPH_DECODE in latency.phases else (DECODE,)
        add(shape_name, latency, phases)

    try:
        for shape_name, shape in (TINY if quick else MODELS).items():
            result.case(shape_name, lambda a=shape_name, b=shape: run(a, b))
            torch.cuda.empty_cache()
    finally:
        result.table(
            "Whole Mamba-1 models in transformers",
            f"Random weights, kernels: {', '.join(sorted(kernels)) or 'unknown'}. Prefill reads "
            f"{prefill_settings['prompt_length']} tokens a sequence; decode does "
            f"{decode_settings['decode_steps']} cached steps after a prompt of "
            f"{decode_settings['prompt_length']}. Plain decode launches every kernel from Python, "
            "which at small batches takes longer than the kernels do and hides what they save; the "
            "CUDA graph replays the same step without it.",
            ["model", "phase", "batch", "variant", "ms a pass", "± spread", "tokens/s", "speedup"],
            rows,
        )
        result.table(
            "State cache of these models",
            "Bytes a sequence, counted from the cache object.",
            ["model", "variant", "parameters", "recurrent", "convolution", "total", "of dense"],
            caches,
        )
        result.numbers["whole models"] = timings


SECTIONS: dict[str, Callable[[Result], None]] = {
    "a": mamba1_scan,
    "b": mamba1_update,
    "d": lambda result: whole_models(result, quick=False),
    "c-decode": mamba2_update,
    "c-prefill": mamba2_scan,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU, not saved")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=330, help="seconds after which no new case begins"
    )
    parser.add_argument("--name", default="state_removal_latency", help="of the result files")
    options = parser.parse_args()
    result = Result(options.budget)
    if options.quick:
        result.section("d", lambda result: whole_models(result, quick=True))
        raise SystemExit(1 if result.failures else 0)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --quick runs the logic without one")
    names = options.sections.split(",")
    unknown = set(names) - set(SECTIONS)
    if unknown:
        raise SystemExit(
            f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}"
        )
    try:
        for name in names:
            result.section(name, SECTIONS[name])
    finally:  # an interrupt does not lose what is done
        packages = package_versions()
        title = (
            "# Fewer states, fewer channels: time on a GPU\n\n"
            "Medians; the spread is half the range of the repeats. What is compared took turns in "
            "one run; the speedup is the median over pairs of repeats against the first row of its "
            "block. " + ", ".join(f"{k} {v}" for k, v in packages.items()) + "."
        )
        failures = [f"- {name}: {text}" for name, text in result.failures.items()]
        missing = ["## Not measured\n\n" + "\n".join(failures)] if failures else []
        save(
            options.name,
            "\n\n".join([title, *result.parts, *missing]),
            {**result.numbers, "failures": result.failures, "packages": packages},
        )
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
