"""Pruning with weights on disk: seconds by stage and peak memory of the GPU and of the process.

The checkpoint has a published shape and random weights, and is written layer by layer first. Each
row is one ``sparsessm prune`` in a process of its own.

    python benchmarks/run.py streaming --folder /disk    # FalconMamba-7B: 44 GB of disk
    python benchmarks/run.py streaming --changes num_hidden_layers=8    # smaller
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from harness import Configuration, Experiment, Job, joined, markdown, not_measured
from pydantic import Field
from random_checkpoint import config_of, skeleton_of, write_checkpoint
from safetensors import safe_open

from sparsessm_plugin.recipes import load_recipe
from sparsessm_plugin.recipes.memory import count_memory, read_at_once

# What stays in main memory is what has no file behind it: pages of the checkpoint that a layer
# reads may go at any time, and the largest resident set counts them.
CHILD = """
import json, resource, sys, threading, time

def own_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0

import sparsessm_plugin.cli
import llmcompressor, torch, transformers
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
begin = peak = own_bytes()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, own_bytes())
        time.sleep(0.02)

thread = threading.Thread(target=watch)
thread.start()
code = 0
target, *arguments = sys.argv[1:]
sys.argv = ["sparsessm", *arguments]
started = time.perf_counter()
try:
    sparsessm_plugin.cli.main()
except SystemExit as error:
    code = error.code or 0
done = True
thread.join()
on_gpu = torch.cuda.is_available()
found = {
    "seconds": time.perf_counter() - started,
    "gpu_peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
    "gpu_reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
    "begin": begin,
    "own_peak": peak,
    "resident_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}
json.dump(found, open(target, "w"))
sys.exit(code)
"""


class Fields(Configuration):
    """Which model, recipes and data."""

    model: str = Field("tiiuae/falcon-mamba-7b", description="published shape")
    changes: list[str] = Field([], description="fields of its config, as num_hidden_layers=8")
    recipes: list[str] = Field(
        ["alog-50", "state-50", "whole-50"], description="built-in, or files, one after the other"
    )
    offload: list[str] = Field(["disk"], description="each recipe with each of these")
    samples: int = Field(16, description="calibration windows")
    length: int = Field(512, description="tokens a window")
    batch: int = Field(4, description="windows a forward pass")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where")
    dtype: Literal["auto", "float32"] = Field("auto", description="that weights are loaded in")
    folder: str = Field("", description="for the checkpoint and results; default a temporary one")
    seed: int = Field(0, description="of the weights")


def run(job: Job) -> Iterator[Any]:
    """The checkpoint, then a row for each recipe and place of the weights."""
    chosen: Fields = job.configuration
    rows = job.numbers.setdefault("rows", [])
    if chosen.folder:
        Path(chosen.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.folder or None, prefix="streaming-") as folder:
        place = Path(folder)
        started = time.monotonic()
        on_gpu = chosen.device != "cpu" and torch.cuda.is_available()
        config = config_of(chosen.model, changes_of(chosen.changes))
        size = write_checkpoint(config, place / "dense", chosen.seed, "cuda" if on_gpu else "cpu")
        if on_gpu:
            torch.cuda.empty_cache()
        job.numbers["weights"] = size
        text = "\n\n".join(topics[key] for key in sorted(topics))
        (place / "text.txt").write_text(text, encoding="utf-8")
        yield f"{size / 1e9:.2f} GB written in {time.monotonic() - started:.0f} s"
        for recipe in chosen.recipes:
            first: Path | None = None
            for offload in chosen.offload:
                key = {"recipe": recipe, "offload": offload}
                if any(row | key == row for row in rows) or not job.in_time(str(key)):
                    continue
                with job.case(str(key)):
                    row = prune(recipe, offload, place, chosen)
                    result = place / f"{recipe}-{offload}"
                    if first is not None:
                        row["other_tensors"] = differing(first, result)
                    first = first or result
                    rows.append({**key, **row, "counted": counted(recipe, config, chosen)})
                yield rows[-1] if rows else None
            for offload in chosen.offload:
                shutil.rmtree(place / f"{recipe}-{offload}", ignore_errors=True)


def counted(recipe: str, config: Mapping[str, Any], chosen: Fields) -> dict[str, int]:
    """Bytes that pruning from disk holds, and of the weights at once, by the shapes alone."""
    with tempfile.TemporaryDirectory() as folder:
        skeleton = skeleton_of(config, Path(folder))
    if chosen.dtype == "float32":
        skeleton.float()
    modifiers = load_recipe(recipe).modifiers
    found = count_memory(skeleton, modifiers, chosen.samples, chosen.length, chosen.batch)
    read = read_at_once(skeleton)
    return {"computing": found.computing, "saving": found.saving, "at_once": read.at_once}


def changes_of(pairs: list[str]) -> dict[str, Any]:
    """Fields and their values; a value that is no JSON is a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise SystemExit(f"--changes wants FIELD=VALUE, got {pair}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def prune(recipe: str, offload: str, place: Path, chosen: Fields) -> dict[str, Any]:
    """One run in a process of its own."""
    measured, output = place / "measured.json", place / f"{recipe}-{offload}"
    command = [sys.executable, "-c", CHILD, str(measured), "prune", str(place / "dense")]
    command += ["--recipe", recipe, "--calibration", str(place / "text.txt")]
    command += ["--num-samples", str(chosen.samples), "--max-seq-length", str(chosen.length)]
    command += ["--batch-size", str(chosen.batch), "--device", chosen.device]
    command += ["--dtype", chosen.dtype]
    command += ["--offload", offload, "--output", str(output), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}")
    if left := sorted(set(os.listdir(place)) - {"dense", "text.txt", measured.name, output.name}):
        left = [name for name in left if not name.startswith(f"{recipe}-")]
        if left:
            raise RuntimeError(f"left behind: {', '.join(left)}")
    report = json.loads(done.stdout)
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return {
        **found,
        "tokens": chosen.samples * chosen.length,
        "stages": report["seconds"],
        "modifiers": [modifier["cost"]["seconds"] for modifier in report["modifiers"]],
    }


def differing(first: Path, second: Path) -> int:
    """How many tensors of two results are not the same, bit by bit."""
    a, b = _files_of(first), _files_of(second)
    count = len(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        with safe_open(a[name], "pt") as one, safe_open(b[name], "pt") as other:
            count += not torch.equal(one.get_tensor(name), other.get_tensor(name))
    return count


def _files_of(folder: Path) -> dict[str, Path]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a run, and what the modifiers took."""
    head = ["recipe", "weights", "GPU", "main memory", "of it libraries", "resident"]
    head += ["counted", "load", "prune", "save", "stages of the modifiers", "tensors that differ"]
    lines = []
    for row in numbers["rows"]:
        stages: Mapping[str, float] = row["stages"]
        taken = [
            f"{name} {seconds:.0f}"
            for cost in row["modifiers"]
            for name, seconds in cost.items()
            if name != "total"
        ]
        other = row.get("other_tensors")
        lines.append(
            [
                f"`{row['recipe']}`",
                row["offload"],
                gb(row["gpu_peak"]),
                gb(row["own_peak"]),
                gb(row["begin"]),
                gb(row["resident_peak"]),
                " / ".join(gb(row["counted"][name]) for name in ("computing", "saving"))
                if row["offload"] == "disk"
                else "",
                *(f"{stages[name]:.0f}" for name in ("load", "oneshot", "save")),
                ", ".join(taken),
                "" if other is None else str(other),
            ]
        )
    shape = ", ".join([chosen.model, *chosen.changes])
    return joined(
        "# Pruning with weights on disk",
        f"Random weights of the shape of {shape}: {gb(numbers['weights'])} GB in bfloat16"
        f"{', loaded in float32' * (chosen.dtype == 'float32')}. "
        f"{chosen.samples} windows of {chosen.length} tokens, {chosen.batch} at once. Peaks in GB: "
        "GPU, tensors that were allocated; main memory, what has no file behind it; resident, "
        "with the pages of the checkpoint that stood in memory meanwhile; counted, what the shapes "
        "say of pruning from disk, beside the libraries, while it computes / while it saves, a "
        "file of 1 GB in main memory. Seconds by stage. "
        "Weights `none` are all on the device; tensors that differ from those of the run above.",
        markdown(head, lines),
        not_measured(numbers),
    )


CPU = {
    "changes": [
        *("num_hidden_layers=16", "hidden_size=512", "intermediate_size=1024"),
        *("time_step_rank=32", "vocab_size=16384"),
    ],
    "recipes": ["alog-50", "whole-50"],
    "offload": ["none", "disk"],
    "samples": 8,
    "length": 256,
    "device": "cpu",
}

# in main memory weights of the stored type are pages of the checkpoint, those of another are not
CPU_FLOAT32 = {
    **CPU,
    "changes": [
        *("num_hidden_layers=24", "hidden_size=1024", "intermediate_size=2048"),
        *("time_step_rank=64", "vocab_size=16384"),
    ],
    "recipes": ["alog-50"],
    "dtype": "float32",
}

EXPERIMENT = Experiment(
    measures="pruning with weights on disk: seconds and peak memory",
    device="CPU or GPU",
    seconds=900,
    subjects="random weights of published shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "streaming_cpu": CPU,
        "streaming_cpu_float32": CPU_FLOAT32,
        "streaming_gpu": {"recipes": ["alog-50", "state-50"], "device": "cuda"},
        "streaming_cpu_7b": {"recipes": ["alog-50"], "samples": 4, "length": 128, "device": "cpu"},
    },
    quick={
        "": {
            **CPU,
            "changes": ["num_hidden_layers=2", "hidden_size=128", "intermediate_size=256"],
            "recipes": ["alog-50"],
            "samples": 4,
            "length": 64,
        }
    },
    extends=("recipes", "offload", "folder"),
)
