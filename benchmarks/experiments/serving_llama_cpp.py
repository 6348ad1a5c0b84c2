"""What fewer states are worth in llama.cpp on a CPU: 130M shapes, one thread, N by N.

``make clients`` makes the converter and a build of llama.cpp, once. Random weights in float16.
Rounds go through all models, each in a process of its own; times are of the processor, so that
others at work on the machine count little.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Configuration, Experiment, Job, markdown
from pydantic import Field
from timing import random_model
from transformers import Mamba2Config, MambaConfig

SCRIPTS = ROOT / "tests" / "clients"
SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
STATES = {"Mamba": (16, 8, 4), "Mamba-2": (128, 64, 32)}


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def last_line(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: Path, family: str, states: int, tiny: bool) -> None:
    """A random checkpoint."""
    shape = TINY if tiny else SHAPE
    if family == "Mamba":
        config: Any = MambaConfig(**shape, state_size=states)
    else:
        heads = {"num_heads": 2 * shape["hidden_size"] // 64, "n_groups": 1}
        config = Mamba2Config(**shape, state_size=states, **heads)
    random_model(config, "cpu", torch.float16).save_pretrained(folder)


def convert(folders: list[Path], llama: Path) -> None:
    """What the converter makes of checkpoints, which go."""
    script = [sys.executable, str(SCRIPTS / "llama_convert.py"), str(llama), "f16"]
    errors = last_line([*script, *map(str, folders)])
    for folder, error in zip(folders, errors, strict=True):
        if error is not None:
            raise SystemExit(f"{folder.name}: {error}")
        (folder / "model.safetensors").unlink()


class Fields(Configuration):
    """Of the rounds, and where llama.cpp is."""

    rounds: int = Field(5, description="through all models")
    prompt: int = Field(128, description="tokens read")
    generated: int = Field(32, description="tokens made")
    families: list[str] = Field(list(STATES), description="of models")
    tiny: bool = Field(False, description="the logic only")
    python: str = Field(".venv-clients/bin/python", description="with xllamacpp")
    llama_cpp: Path = Field(Path(".venv-clients/llama.cpp"), description="with the converter")


def run(job: Job) -> Iterator[Any]:
    """Rounds through all models."""
    chosen: Fields = job.configuration
    if not (ROOT / chosen.python).exists():
        raise SystemExit(f"{chosen.python} is not there; make clients")
    rows = job.numbers.setdefault("rows", []) or [
        {"family": family, "N": n, "prompt": [], "generation": []}
        for family in chosen.families
        for n in STATES[family]
    ]
    job.numbers["rows"] = rows
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{row['family']}-{row['N']}" for row in rows]
        for row, place in zip(rows, places, strict=True):
            make(place, row["family"], row["N"], chosen.tiny)
        convert(places, ROOT / chosen.llama_cpp)
        while len(rows[-1]["prompt"]) < chosen.rounds and job.in_time("the other rounds"):
            for row, place in zip(rows, places, strict=True):
                numbers = [str(chosen.prompt), str(chosen.generated), "1"]
                script = [str(ROOT / chosen.python), str(SCRIPTS / "llama_logits.py")]
                [found] = last_line([*script, json.dumps([str(place)]), *numbers])
                row["prompt"] += found["prompt"]
                row["generation"] += found["generation"]
            yield f"round {len(rows[-1]['prompt'])}"


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a family and N."""
    rows, lines = numbers["rows"], []
    speedups = ratios(numbers)
    for row in rows:
        cells = [
            f"{statistics.median(row[phase]):.1f} **{speedups[label(row, phase)]:.2f}**"
            for phase in ("prompt", "generation")
            if row[phase]
        ]
        lines.append([row["family"], str(row["N"]), *cells])
    return (
        "# Fewer states in llama.cpp on a CPU\n\n"
        f"130M shapes, random weights, float16, one thread: tokens a second of processor time, "
        f"medians of {max(len(row['prompt']) for row in rows)} rounds through all models; "
        f"a prompt of {chosen.prompt} tokens, then {chosen.generated}. In bold, against the first "
        "N of the family, the median over rounds.\n\n"
        + markdown(["family", "N", "prompt", "generation"], lines)
    )


def label(row: dict[str, Any], phase: str) -> str:
    return f"{row['family']}, N {row['N']}, {phase}"


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as the first N of the family, the median over rounds."""
    found = {}
    for row in numbers["rows"]:
        first = next(other for other in numbers["rows"] if other["family"] == row["family"])
        for phase in ("prompt", "generation"):
            pairs = list(zip(row[phase], first[phase], strict=False))
            if pairs:
                found[label(row, phase)] = statistics.median(own / dense for own, dense in pairs)
    return found


EXPERIMENT = Experiment(
    measures="llama.cpp with fewer states",
    device="CPU",
    seconds=900,
    subjects="Mamba 130M, Mamba-2 130M shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={"serving_llama_cpp": {}},
    quick={"serving_llama_cpp": {"rounds": 1, "prompt": 64, "generated": 16}},
    ratios=ratios,
)
