"""What fewer states and fewer channels are worth on a GPU: kernels, then whole models.

Every ratio compares two things that took turns in one run, and pairs their repeats.
"""

import itertools
import statistics
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import (
    Configuration,
    Experiment,
    Job,
    first_line,
    joined,
    needs_gpu,
    not_measured,
    package_versions,
    section,
)
from pydantic import Field
from timing import captured, paired, random_model, spread_of, take_turns
from transformers import MambaConfig

from sparsessm_plugin.evaluation.latency import (
    DECODE,
    GRAPH_DECODE,
    PREFILL,
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


MAMBA1_SCAN = "Mamba-1 scan (selective_scan_fn)"
MAMBA1_STEP = "Mamba-1 decode step (selective_state_update)"
MAMBA2_STEP = "Mamba-2 decode step (selective_state_update)"
MAMBA2_SCAN = "Mamba-2 scan (mamba_chunk_scan_combined)"
WHOLE = "whole models"
OF_SCANS = f"Batch {PREFILL_BATCH}, {LENGTH} tokens, bfloat16"
KERNELS = {  # title -> text and columns
    MAMBA1_SCAN: (f"{OF_SCANS}.", ["D"]),
    MAMBA1_STEP: (
        f"Time a layer, from a CUDA graph over up to {LAYERS} layers with a state and an A each. "
        "transformers keeps the states in float32, mamba_ssm in the dtype of the model.",
        ["D", "states in", "batch"],
    ),
    MAMBA2_STEP: (
        f"Heads of {HEAD_DIM} channels, one group. Time a layer, from a CUDA graph over up to "
        f"{LAYERS} layers with a state each.",
        ["D", "states in", "batch"],
    ),
    MAMBA2_SCAN: (
        f"{OF_SCANS}, heads of {HEAD_DIM} channels, one group, chunks of {CHUNK}.",
        ["D"],
    ),
}


# -- kernels -------------------------------------------------------------------------------


def by_events(work: Callable[[], Any], calls: int) -> float:
    """Microseconds a call by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / calls


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def layers_for(state_bytes: int) -> int:
    return int(min(LAYERS, max(2, LAYERS_BYTES // state_bytes)))


def kernel_rows(
    job: Job, title: str, cases: list[tuple[list[str], Callable[[], Any]]]
) -> Iterator[Any]:
    """Timings of a kernel.

    :param cases: labels, and what makes the works by N, the calls of each a repeat, and the
        layers that one call goes through
    """
    rows = job.numbers.setdefault(title, [])
    for labels, make in job.cases(title, cases):
        name = f"{title}, {', '.join(labels)}"
        if any(row["labels"] == labels for row in rows):
            continue
        with job.case(name):
            works, calls, layers = make()
            times = take_turns(works, 15, calls, warmup=3, time_of=by_events)
            each = {n: [t / layers for t in micro] for n, micro in times.items()}
            first = next(iter(each.values()))
            rows += [
                {"labels": labels, "states": n, "us": micro, "speedup": paired(first, micro)}
                for n, micro in each.items()
            ]
        yield name


def widths(make: Callable[[int], Any]) -> list[tuple[list[str], Callable[[], Any]]]:
    """Cases of a scan."""
    return [([str(D)], partial(make, D)) for D in WIDTHS]


def steps(make: Callable[..., Any]) -> list[tuple[list[str], Callable[[], Any]]]:
    """Cases of a decode step."""
    return [
        ([str(D), str(dtype).removeprefix("torch."), str(batch)], partial(make, D, batch, dtype))
        for D, dtype, batch in itertools.product(WIDTHS, STATE_DTYPES, DECODE_BATCHES)
    ]


def mamba1_scan(job: Job) -> Iterator[Any]:
    """selective_scan_fn over whole sequences."""
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

    yield from kernel_rows(job, MAMBA1_SCAN, widths(make))


def mamba1_update(job: Job) -> Iterator[Any]:
    """selective_state_update, one decode step."""
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

    yield from kernel_rows(job, MAMBA1_STEP, steps(make))


def mamba2_update(job: Job) -> Iterator[Any]:
    """selective_state_update with heads, as Mamba-2 calls it."""
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

    yield from kernel_rows(job, MAMBA2_STEP, steps(make))


def mamba2_scan(job: Job) -> Iterator[Any]:
    """mamba_chunk_scan_combined over whole sequences; last, because it tunes for minutes."""
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

    yield from kernel_rows(job, MAMBA2_SCAN, widths(make))


# -- whole models --------------------------------------------------------------------------


def build(shape: dict[str, int], device: str, **changes: int) -> Any:
    """A random Mamba in bfloat16 (float32 on the CPU), made on the device itself."""
    config = MambaConfig(**{"vocab_size": 50280, **shape})
    for field, value in changes.items():
        setattr(config, field, value)  # after construction: the constructor derives the channels
    return random_model(config, device)


def variants(shape: dict[str, int], device: str) -> dict[str, Any]:
    """Dense first; the names are those of the recipes that make such models."""
    channels = 2 * shape["hidden_size"] * 3 // 4
    return {
        "dense": build(shape, device),
        "state-50": build(shape, device, state_size=8),
        "channels-25": build(shape, device, intermediate_size=channels),
    }


# settings of measure_latency
LARGE_PREFILL: dict[str, Any] = {
    "batch_sizes": (1, 8),
    "prompt_length": LENGTH,
    "decode_steps": 1,
    "repeats": 7,
}
LARGE_DECODE: dict[str, Any] = {
    "batch_sizes": DECODE_BATCHES,
    "prompt_length": 64,
    "decode_steps": 16,
    "repeats": 7,
    "cuda_graphs": True,
}
TINY_PREFILL = {**LARGE_PREFILL, "prompt_length": 8, "repeats": 2}
TINY_DECODE = {"batch_sizes": (1, 4), "prompt_length": 4, "decode_steps": 2, "repeats": 2}


def whole_models(job: Job) -> Iterator[Any]:
    """Prefill and decode of transformers, whose timings come from different prompts."""
    tiny = job.configuration.tiny
    device = "cpu" if tiny else "cuda"
    prefill, decode = (TINY_PREFILL, TINY_DECODE) if tiny else (LARGE_PREFILL, LARGE_DECODE)
    timings = job.numbers.setdefault(WHOLE, {})
    for name, shape in job.cases(WHOLE, (TINY if tiny else MODELS).items()):
        if sum(key.startswith(f"{name}, ") for key in timings) == 2:
            continue
        with job.case(name):
            models = variants(shape, device)
            latency = measure_latency(models, **prefill)
            timings[f"{name}, {PREFILL}"] = latency.to_dict()
            try:
                latency = measure_latency(models, **decode)
            except Exception as error:
                if tiny:
                    raise
                traceback.print_exc()
                job.note(f"{name}, CUDA graphs", first_line(error))
                latency = measure_latency(models, **{**decode, "cuda_graphs": False})
            phases = [phase for phase in latency.phases if phase != PREFILL]
            timings[f"{name}, {' and '.join(phases)}"] = latency.to_dict()
            del models
        yield name


SECTIONS: dict[str, Callable[[Job], Iterator[Any]]] = {
    "mamba1_scan": mamba1_scan,
    "mamba1_update": mamba1_update,
    "whole_models": whole_models,
    "mamba2_update": mamba2_update,
    "mamba2_scan": mamba2_scan,  # last, because it tunes for minutes
}


class Fields(Configuration):
    """What is timed."""

    sections: list[str] = Field(list(SECTIONS), description="in this order")
    tiny: bool = Field(False, description="tiny models on the CPU, whose times say nothing")


@torch.inference_mode()
def run(job: Job) -> Iterator[Any]:
    """The sections; those that a file holds are not run again."""
    if not job.configuration.tiny:
        needs_gpu()
    job.numbers["packages"] = package_versions("mamba-ssm", "causal-conv1d", "triton")
    for name in job.configuration.sections:
        yield from SECTIONS[name](job)


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A table a kernel, and whole models."""
    parts = []
    for title, found in numbers.items():
        if title == WHOLE and found:
            parts += render_whole(found)
        elif title in KERNELS:
            text, columns = KERNELS[title]
            lines = [
                [
                    *row["labels"],
                    str(row["states"]),
                    f"{statistics.median(row['us']):.1f}",
                    f"{spread_of(row['us']):.1%}",
                    f"{row['speedup']:.2f}",
                ]
                for row in found
            ]
            parts.append(section(title, text, [*columns, "N", "us", "± spread", "speedup"], lines))
            if title == MAMBA2_STEP:
                parts.append(render_cache())
    title = (
        "# Fewer states, fewer channels: time on a GPU\n\n"
        "Medians; the spread is half the range of the repeats. What is compared took turns in "
        "one run; the speedup is the median over pairs of repeats against the first row of its "
        "block. " + ", ".join(f"{k} {v}" for k, v in numbers["packages"].items()) + "."
    )
    return joined(title, *parts, not_measured(numbers))


def render_cache() -> str:
    """Bytes of a mixer's states, counted from its shape."""
    lines = []
    for D, N in itertools.product(WIDTHS, MAMBA2_STATES):
        states = [f"{D * N * dtype.itemsize:,}" for dtype in STATE_DTYPES]
        convolution = f"{(D + 2 * N) * 4 * 2:,}"
        lines.append([str(D), str(N), *states, convolution, f"{N / max(MAMBA2_STATES):.2f}"])
    return section(
        "Mamba-2 state cache",
        "Bytes a sequence and layer; the convolution's part in bfloat16, of width 4.",
        ["D", "N", "states, float32", "states, bfloat16", "convolution", "states' share of dense"],
        lines,
    )


def render_whole(found: dict[str, Any]) -> list[str]:
    """Timings and caches of whole models."""
    lines, caches = [], []
    kernels: set[str] = set()
    for name, content in found.items():
        shape, _, phases = name.partition(", ")
        for t in content["timings"]:
            if (t["phase"] == PREFILL) == (phases == PREFILL):
                lines.append((name, t["phase"], t["batch_size"], t["model"], t))
        kernels |= {describe_kernels(own) for own in content["kernels"].values()}
        if phases == PREFILL:
            bytes_ = content["cache_bytes_per_sequence"]
            for model, built in variants({**MODELS, **TINY}[shape], "meta").items():
                own = bytes_[model]
                counts = (sum(p.numel() for p in built.parameters()), own["recurrent"])
                counts += (own["convolution"], own["total"])
                share = f"{own['total'] / bytes_['dense']['total']:.3f}"
                caches.append([shape, model, *(f"{n:,}" for n in counts), share])
    place = {key: i for i, key in enumerate(dict.fromkeys(name for name, *_ in lines))}
    phases_ = [PREFILL, DECODE, GRAPH_DECODE]
    lines.sort(key=lambda line: (place[line[0]], phases_.index(line[1]), line[2]))
    rows = [
        [
            *(name.partition(", ")[0], phase, str(size), model),
            f"{t['milliseconds']:.2f}",
            f"{t['spread']:.1%}",
            f"{t['tokens_per_second']:,.0f}",
            f"{t['speedup']:.3f}",
        ]
        for name, phase, size, model, t in lines
    ]
    read = next(c["prompt_length"] for n, c in found.items() if n.endswith(PREFILL))
    decode = [c for n, c in found.items() if not n.endswith(PREFILL)]
    steps = f"{decode[0]['decode_steps']} cached steps" if decode else "no steps"
    after = decode[0]["prompt_length"] if decode else 0
    return [
        section(
            "Whole Mamba-1 models in transformers",
            f"Random weights, kernels: {', '.join(sorted(kernels)) or 'unknown'}. Prefill reads "
            f"{read} tokens a sequence; decode does {steps} after a prompt of {after}. Plain "
            "decode launches every kernel from Python, which at small batches takes longer than "
            "the kernels do and hides what they save; the CUDA graph replays the same step "
            "without it.",
            ["model", "phase", "batch", "variant", "ms a pass", "± spread", "tokens/s", "speedup"],
            rows,
        ),
        section(
            "State cache of these models",
            "Bytes a sequence, counted from the cache object.",
            ["model", "variant", "parameters", "recurrent", "convolution", "total", "of dense"],
            caches,
        ),
    ]


EXPERIMENT = Experiment(
    measures="kernels and whole Mambas with fewer states and channels",
    device="GPU",
    seconds=330,
    subjects="130M, 2.8B shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={"state_removal_latency": {}},
    quick={"": {"sections": ["whole_models"], "tiny": True}},
    extends=("sections",),
)
