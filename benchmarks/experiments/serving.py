"""What fewer states are worth where models are served: decode at batches, prefill, what fits.

Random weights of published shapes, stock transformers, decode from a CUDA graph. Models of one row
take turns, and ratios are medians over pairs of repeats with the first, the dense one. Rows come in
the order of their worth.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # processes share what was tuned

import torch
from harness import Configuration, Experiment, Job, markdown, needs_gpu, package_versions
from pydantic import Field
from timing import paired, random_model, seconds_of, spread_of
from transformers import Mamba2Config

from experiments.structure_latency import granite
from experiments.structure_latency import shapes_of as large_shapes
from sparsessm_plugin.evaluation.capacity import decode_at_capacity, measure_capacity, memory_of
from sparsessm_plugin.evaluation.latency import (
    PREFILL,
    default_warmup,
    describe_kernels,
    measure_latency,
)
from sparsessm_plugin.families import iter_mixers
from sparsessm_plugin.families.decoding import StaticDecode
from sparsessm_plugin.families.kernels import bound_kernels

DECODE, AT_CAPACITY = "decode", "as many as fit"
STATES = {"cuda": (128, 64, 32), "cpu": (16, 8, 4)}
BATCHES = {"cuda": (128, 32, 256, 1, 8), "cpu": (2, 1)}  # in the order of their worth
PREFILL_BATCHES = {"cuda": (1, 8), "cpu": (1,)}
CONTEXT = {"cuda": 2048, "cpu": 32}  # tokens before a decode step, and of a prompt in prefill
STEPS = {"cuda": 8, "cpu": 2}
REPEATS = {"cuda": 7, "cpu": 2}
CPU_MEMORY = 4_000_000
PROMPT = 8


def shapes_of(device: str) -> dict[str, Any]:
    """Name -> dense config."""
    if device == "cuda":
        names = ("Mamba-2, 2.7B", "Granite-4-H, 3B")
        return {name: large_shapes(device)[name] for name in names}
    small = {"vocab_size": 96}
    return {
        "Mamba-2, tiny": Mamba2Config(
            **small, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1
        ),
        "Granite-4-H, tiny": granite(6, 32, 96, mlp=48, attention=(4, 2), heads=4),
    }


def build(config: Any, states: int, device: str) -> Any:
    """A random model with so many states, made on the device itself."""
    name = "mamba_d_state" if hasattr(config, "mamba_d_state") else "state_size"
    return random_model(type(config)(**{**config.to_dict(), name: states}), device)


class Models:
    """Those of one shape at a time, made when a row asks for them."""

    def __init__(self, device: str):
        self.device, self.shape = device, ""
        self.models: dict[str, Any] = {}

    def get(self, shape: str, states: tuple[int, ...]) -> dict[str, Any]:
        """By ``N 128``; others of this shape go."""
        names = [f"N {n}" for n in states]
        held = self.models if shape == self.shape else {}
        self.models, self.shape = {k: v for k, v in held.items() if k in names}, shape
        del held
        if self.device == "cuda":
            torch.cuda.empty_cache()
        config = shapes_of(self.device)[shape]
        for name, n in zip(names, states, strict=True):
            if name not in self.models:
                self.models[name] = build(config, n, self.device)
        return {name: self.models[name] for name in names}


@contextmanager
def scan_by_reference(model: Any) -> Iterator[None]:
    """Let a prompt that is not timed not tune the kernels of the scan, which takes a minute."""
    changed = []
    for module in {type(mixer).__module__ for _, mixer in iter_mixers(model)}:
        for function in vars(sys.modules[module]).values():
            code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", 0)
            cells = dict(zip(code.co_freevars, closure, strict=True)) if code and closure else {}
            if {"func_name", "implementation", "torch_function"} <= set(cells):
                chosen = cells["implementation"]
                if "scan" in cells["func_name"].cell_contents:
                    changed.append((chosen, chosen.cell_contents))
                    chosen.cell_contents = cells["torch_function"].cell_contents
    try:
        yield
    finally:
        for cell, before in changed:
            cell.cell_contents = before


def summary(name: str, seconds: tuple[float, ...], first: tuple[float, ...], tokens: int) -> Any:
    """Numbers of one model in a row; tokens are those of a repeat."""
    median = statistics.median(seconds)
    return {
        "model": name,
        "seconds": list(seconds),
        "tokens_per_second": tokens / median,
        "spread": spread_of(seconds),
        "speedup": paired(first, seconds),
    }


@torch.inference_mode()
def decode_row(models: dict[str, Any], batch: int, device: str) -> dict[str, Any]:
    """All models decode at this batch, in turns."""
    steps, seconds = STEPS[device], {name: [] for name in models}
    prompt = torch.ones(1, PROMPT, dtype=torch.long, device=device)
    runs = {}
    for name, model in models.items():
        with scan_by_reference(model):
            runs[name] = StaticDecode(
                model, prompt, steps, CONTEXT[device], batch, graph=device == "cuda"
            )
    for repeat in range(-default_warmup(torch.device(device)), REPEATS[device]):
        for name, run in runs.items():
            run.rewind()
            taken = seconds_of(run.decode)
            if repeat >= 0:
                seconds[name].append(taken)
    first = tuple(next(iter(seconds.values())))
    tokens = batch * steps
    rows = [summary(name, tuple(found), first, tokens) for name, found in seconds.items()]
    for row in rows:
        row["milliseconds"] = 1000 * statistics.median(row["seconds"]) / steps
    return {"models": rows}


def prefill_row(models: dict[str, Any], batch: int, device: str) -> dict[str, Any]:
    """All models read prompts, in turns."""
    length = CONTEXT[device]
    latency = measure_latency(models, (batch,), length, 1, REPEATS[device], warmup=1)
    rows = []
    for name in models:
        own, dense = (latency.timing(n, PREFILL, batch) for n in (name, latency.models[0]))
        rows.append(summary(name, own.seconds, dense.seconds, own.tokens))
        rows[-1]["milliseconds"] = own.milliseconds
    return {"models": rows, "kernels": describe_kernels(latency.kernels[latency.models[0]])}


def capacity_row(model: dict[str, Any], device: str) -> dict[str, Any]:
    """How many sequences fit beside one model, and how fast they decode together."""
    [(name, own)] = model.items()
    memory = memory_of(torch.device(device)) if device == "cuda" else CPU_MEMORY
    with scan_by_reference(own):
        counted = measure_capacity(own, memory, CONTEXT[device])
        [timing] = decode_at_capacity(
            model, {name: counted}, STEPS[device], 3, cuda_graphs=device == "cuda"
        )
    return {
        "counted": counted.to_dict(),
        "models": [
            {
                **summary(name, timing.seconds, timing.seconds, timing.tokens),
                "milliseconds": timing.milliseconds,
                "batch": timing.batch_size,
            }
        ],
    }


def keys(device: str) -> list[dict[str, Any]]:
    """The rows, in the order of their worth."""
    states, found = STATES[device], []
    for shape in shapes_of(device):
        decode = [{"shape": shape, "what": DECODE, "batch": b} for b in BATCHES[device]]
        found += decode + [{"shape": shape, "what": AT_CAPACITY, "N": n} for n in states]
    for shape in shapes_of(device):
        found += [{"shape": shape, "what": PREFILL, "batch": b} for b in PREFILL_BATCHES[device]]
    return found


def row_of(key: dict[str, Any], models: Models) -> dict[str, Any]:
    """Measure one row."""
    device, states = models.device, STATES[models.device]
    if key["what"] == AT_CAPACITY:
        return capacity_row(models.get(key["shape"], (key["N"],)), device)
    work = decode_row if key["what"] == DECODE else prefill_row
    return work(models.get(key["shape"], states), key["batch"], device)


_TUNE = """
import sys, torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
N, heads, batch = map(int, sys.argv[1:])
like = dict(device="cuda", dtype=torch.bfloat16)
x, dt = torch.randn(batch, 2048, heads, 64, **like), torch.randn(batch, 2048, heads, **like)
B, C = (torch.randn(batch, 2048, 1, N, **like) for _ in range(2))
A, D, bias = (-torch.rand(heads, device="cuda") - 0.1 for _ in range(3))
scan(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True)
"""


def tune(device: str, limit: float) -> None:
    """Compile the kernels of the scan for every N at once, in processes of their own.

    They fill Triton's cache on disk; where they fail, prefill compiles by itself.
    """
    if device != "cuda":
        return
    ends = time.monotonic() + limit
    command = [sys.executable, "-c", _TUNE]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([*command, str(n), "80", "1"], **quiet) for n in STATES[device]]
    try:
        for process in processes:
            process.wait(timeout=max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("the kernels of the scan were not tuned in time", flush=True)
    finally:
        for process in processes:
            process.kill()


class Fields(Configuration):
    """Where."""

    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="cpu: the same rows of tiny shapes, whose times say nothing"
    )


def run(job: Job) -> Iterator[Any]:
    """A row a shape, phase and batch."""
    device = job.configuration.device
    if device == "cuda":
        needs_gpu()
    rows = [row for row in job.numbers.get("rows", []) if "failure" not in row]
    packages = package_versions("mamba-ssm", "causal-conv1d", "triton")
    job.numbers |= {"rows": rows, "packages": packages, "bound": bound_of(device)}
    models, tuned = Models(device), False
    for key in keys(device):
        if any(row | key == row for row in rows) or not job.in_time(str(key)):
            continue
        if key["what"] == PREFILL and not tuned:
            tune(device, min(job.budget - job.spent, 600.0))
            tuned = True
        begun = time.monotonic()
        rows.append(dict(key))
        with job.case(str(key)):
            rows[-1] |= row_of(key, models)
        if str(key) in job.failures:
            rows[-1]["failure"] = job.failures[str(key)]
        rows[-1]["taken"] = time.monotonic() - begun
        yield rows[-1]


def cell(row: dict[str, Any], name: str) -> str:
    found = next((m for m in row.get("models", []) if m["model"] == name), None)
    if found is None:
        return ""
    ratio = "" if name == row["models"][0]["model"] else f" **{found['speedup']:.2f}**"
    return f"{found['milliseconds']:.2f} ({found['tokens_per_second']:,.0f}){ratio}"


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """Decode, prefill and capacity."""
    device = chosen.device
    names, order = [f"N {n}" for n in STATES[device]], list(shapes_of(device))
    rows = sorted(
        numbers["rows"],
        key=lambda row: (order.index(row["shape"]), row.get("batch", -row.get("N", 0))),
    )
    kernels = sorted({row["kernels"] for row in rows if "kernels" in row})
    if not kernels and "bound" in numbers:
        kernels = [describe_kernels(numbers["bound"])]
    packages = "".join(f", {k} {v}" for k, v in numbers.get("packages", {}).items())
    parts = [
        "# Fewer states where models are served",
        f"Random weights, {'bfloat16' if device == 'cuda' else 'float32'}, stock transformers"
        f"{'; kernels: ' if kernels else ''}{', '.join(kernels)}{packages}. "
        f"Decode is {'from a CUDA graph' if device == 'cuda' else 'eager'}, attention looks back "
        f"at {CONTEXT[device]:,} tokens. Milliseconds a forward pass, in brackets tokens/s of all "
        "sequences together, in bold how many times as fast as the dense model, with which the "
        "others took turns (the median over pairs of repeats).",
        "W8A8 is not among them: transformers multiplies what compressed-tensors has dequantized, "
        "so that int8 saves memory there and no time.",
    ]
    for what, title in ((DECODE, "Decode"), (PREFILL, f"Prefill, {CONTEXT[device]:,} tokens")):
        lines = []
        for row in (row for row in rows if row["what"] == what):
            cells = [cell(row, n) for n in names]
            if "failure" in row:
                cells = [row["failure"], *[""] * (len(names) - 1)]
            lines.append([row["shape"], str(row["batch"]), *cells])
        parts += [f"## {title}", markdown(["shape", "batch", *names], lines)]
    speeds: dict[str, float] = {}
    lines = []
    for row in rows:
        if row["what"] != AT_CAPACITY:
            continue
        if "failure" in row:
            lines.append([row["shape"], str(row["N"]), row["failure"], *[""] * 7])
            continue
        [found], counted = row["models"], row["counted"]
        dense = speeds.setdefault(row["shape"], found["tokens_per_second"])
        cache = counted["cache"]
        lines.append(
            [
                row["shape"],
                str(row["N"]),
                f"{counted['weights'] / 1e9:.2f}",
                f"{cache['total'] / 1e6:.2f}",
                f"{cache['recurrent'] / 1e6:.2f}",
                f"{counted['sequences']:,}",
                f"{found['batch']:,}",
                f"{found['milliseconds']:.1f}",
                f"{found['tokens_per_second']:,.0f}",
                f"**{found['tokens_per_second'] / dense:.2f}**",
            ]
        )
    head = "shape|N|weights, GB|a sequence, MB|of it states|fit|at batch|ms|tokens/s|of dense"
    parts += [
        "## As many sequences as fit",
        "Counted from the bytes of weights, states and attention, and decoded together; a "
        "twentieth less is tried until working memory has its place. All are copies of one.",
        markdown(head.split("|"), lines),
    ]
    return "\n\n".join(parts)


def bound_of(device: str) -> dict[str, str]:
    """The kernels that transformers has bound for a model of the first shape."""
    return bound_kernels(random_model(next(iter(shapes_of(device).values())), "meta"))


EXPERIMENT = Experiment(
    measures="decode, prefill and sequences that fit, with fewer states",
    device="GPU",
    seconds=150,
    subjects="Mamba-2 2.7B, Granite-4-H 3B shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={"serving_cuda": {}},
    quick={"": {"device": "cpu"}},
)
