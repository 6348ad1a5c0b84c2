"""What fewer states, and ``fast-1.5x``, are worth in llama.cpp on a CPU: 130M shapes, one thread.

Of ``fast-1.5x`` a cost model says beforehand what it is worth: that of ``sparsessm fit``, fitted to
shallow models that take their turns in the same rounds. ``make clients`` makes the converter and a
build of llama.cpp, once. Random weights in float16. Rounds go through all models, each in a process
of its own; times are of the processor, so that others at work on the machine count little.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from harness import ROOT, Configuration, Experiment, Job, markdown
from pydantic import Field
from timing import random_model
from transformers import Mamba2Config, MambaConfig

from experiments.structure_latency import SHALLOW, granite, space_of
from sparsessm_plugin.fitting.costs import Census
from sparsessm_plugin.fitting.shapes import shallow_shapes
from sparsessm_plugin.fitting.timing import Phase, SpeedModel, Timed, Workload, features_of
from sparsessm_plugin.recipes import load_recipe

SCRIPTS = ROOT / "tests" / "clients"
SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}
TINY = {"hidden_size": 32, "num_hidden_layers": 12, "vocab_size": 96}
STATES = {"Mamba": (16, 8, 4), "Mamba-2": (128, 64, 32), "Granite-4-H": (128, 64, 32)}


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def last_line(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def config_of(family: str, states: int, tiny: bool) -> Any:
    """A shape of 130M parameters, of the hybrid 160M."""
    shape = TINY if tiny else SHAPE
    hidden = shape["hidden_size"]
    if family == "Mamba":
        return MambaConfig(**shape, state_size=states)
    if family == "Mamba-2":
        heads = {"num_heads": 2 * hidden // 64, "n_groups": 1}
        return Mamba2Config(**shape, state_size=states, **heads)
    layers, heads = (10, 4) if tiny else (20, 24)
    attention = (2, 1) if tiny else (12, 4)
    config = granite(layers, hidden, shape["vocab_size"], 4 * hidden // 3, attention, heads)
    # as published configs have both; llama.cpp stops at others beside no experts
    config.num_experts_per_tok, config.intermediate_size = 0, config.shared_intermediate_size
    config.mamba_d_state = states
    return config


def models_of(family: str, tiny: bool) -> dict[str, Any]:
    """Dense, smaller and shallow models of a family: name -> config, sizes and features.

    Layers and states of the smaller one are those that the recipe keeps. To the shallow ones, with
    all states and with half of them, the cost model is fitted.
    """
    space = space_of(config_of(family, STATES[family][0], tiny), torch.float16)
    layers, states = load_recipe("fast-1.5x").modifiers
    dense = space.shapes.dense
    sizes = {
        **layers.kept_sizes(dense),
        "states": states.kept(space.ladders[1].sizes[0]),
    }
    found = {"dense": dense, "fast-1.5x": space.shapes.model(sizes, space.kept_of(sizes))}
    for number, shapes in enumerate(shallow_shapes(space.shapes, SHALLOW["cpu"])):
        for part in ({}, {"states": sizes["states"]}):
            found[f"shallow {number}{', half' if part else ''}"] = shapes.model(part)
    return {
        name: {
            "config": model.config,
            "layers": model.config.num_hidden_layers,
            "N": sizes["states"] if name.endswith(("half", "x")) else STATES[family][0],
            "quantities": Census.of(model).total().tolist(),
        }
        for name, model in found.items()
    }


def make(folder: Path, config: Any) -> None:
    """A random checkpoint, with the words of published ones, which the converter knows."""
    random_model(config, "cpu", torch.float16).save_pretrained(folder)
    path = folder / "config.json"
    text = path.read_text().replace('"linear_attention"', '"mamba"')
    path.write_text(text.replace('"full_attention"', '"attention"'))


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

    removed: Literal["states", "fast-1.5x"] = Field(
        "states", description="states alone, or what the recipe does to layers and states"
    )
    rounds: int = Field(5, description="through all models")
    prompt: int = Field(128, description="tokens read")
    generated: int = Field(32, description="tokens made")
    families: list[str] = Field(list(STATES)[:2], description="of models; Granite-4-H, too")
    tiny: bool = Field(False, description="the logic only")
    python: str = Field(".venv-clients/bin/python", description="with xllamacpp")
    llama_cpp: Path = Field(Path(".venv-clients/llama.cpp"), description="with the converter")


def models_to_time(chosen: Fields) -> Iterator[tuple[dict[str, Any], Any]]:
    """What a row says of each model, and its config."""
    for family in chosen.families:
        if chosen.removed == "states":
            for n in STATES[family]:
                yield {"family": family, "N": n}, config_of(family, n, chosen.tiny)
            continue
        for name, model in models_of(family, chosen.tiny).items():
            config = model.pop("config")
            yield {"family": family, "model": name, **model}, config


def run(job: Job) -> Iterator[Any]:
    """Rounds through all models."""
    chosen: Fields = job.configuration
    if not (ROOT / chosen.python).exists():
        raise SystemExit(f"{chosen.python} is not there; make clients")
    configs = list(models_to_time(chosen))
    rows = job.numbers.setdefault("rows", []) or [
        {**row, "prompt": [], "generation": []} for row, _ in configs
    ]
    job.numbers["rows"] = rows
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(len(rows))]
        for (_, config), place in zip(configs, places, strict=True):
            make(place, config)
        convert(places, ROOT / chosen.llama_cpp)
        while len(rows[-1]["prompt"]) < chosen.rounds and job.in_time("the other rounds"):
            for row, place in zip(rows, places, strict=True):
                numbers = [str(chosen.prompt), str(chosen.generated), "1"]
                script = [str(ROOT / chosen.python), str(SCRIPTS / "llama_logits.py")]
                [found] = last_line([*script, json.dumps([str(place)]), *numbers])
                if "error" in found:
                    raise SystemExit(f"{row}: {found['error']}")
                row["prompt"] += found["prompt"]
                row["generation"] += found["generation"]
            yield f"round {len(rows[-1]['prompt'])}"


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a family and N, or a row a family and model."""
    rows, lines, fast = numbers["rows"], [], chosen.removed != "states"
    speedups = ratios(numbers)
    for row in rows:
        if row.get("model", "dense") not in ("dense", "fast-1.5x"):
            continue
        own = f"{row['layers']} layers, N {row['N']}" if fast else str(row["N"])
        size = [f"{row['quantities'][0] / 1e6:.0f}M"] if fast else []
        cells = []
        for phase in ("prompt", "generation"):
            if row[phase]:
                cells.append(
                    f"{statistics.median(row[phase]):.1f} **{speedups[label(row, phase)]:.2f}**"
                )
                if fast:
                    predicted = predicted_speedup(numbers, chosen, row, phase)
                    cells.append("" if row["model"] == "dense" else f"{predicted:.2f}")
        lines.append([row["family"], own, *size, *cells])
    columns = ["family", "N", "prompt", "generation"]
    title, tail = "Fewer states", ""
    if fast:
        columns = [
            "family",
            "keeps",
            "parameters",
            "prompt",
            "predicted",
            "generation",
            "predicted",
        ]
        title = "Before and after `fast-1.5x`"
        tail = (
            " Predicted is what a cost model says that is fitted to shallow models of the family, "
            f"of {' and '.join(map(str, SHALLOW['cpu']))} layers with all states and with half, "
            "which took turns in the same rounds."
        )
    return (
        f"# {title} in llama.cpp on a CPU\n\n"
        f"{'R' if fast else '130M shapes, r'}andom weights, float16, one thread: tokens a second "
        "of processor time, "
        f"medians of {max(len(row['prompt']) for row in rows)} rounds through all models; "
        f"a prompt of {chosen.prompt} tokens, then {chosen.generated}. In bold, against the first "
        f"{'row' if fast else 'N'} of the family, the median over rounds.{tail}\n\n"
        + markdown(columns, lines)
    )


def predicted_speedup(
    numbers: dict[str, Any], chosen: Fields, row: dict[str, Any], phase: str
) -> float:
    """How many times as fast as the dense model, from the shallow models of its family."""
    family = {r["model"]: r for r in numbers["rows"] if r["family"] == row["family"]}
    kind: Phase = "prefill" if phase == "prompt" else "decode"
    model = SpeedModel(Workload(1, chosen.prompt, kind), "cpu")
    counts = {name: np.array(own["quantities"]) for name, own in family.items()}
    model.add(
        [
            Timed({}, own["layers"], 1000 / statistics.median(own[phase]), tuple(features))
            for name, own in family.items()
            if name not in ("dense", "fast-1.5x")
            for features in [features_of(counts[name], model.workload)]
        ]
    )
    return 1 / float(model.share(counts[row["model"]], counts["dense"]))


def label(row: dict[str, Any], phase: str) -> str:
    return f"{row['family']}, {row.get('model', 'N ' + str(row['N']))}, {phase}"


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as the first of the family, the median over rounds."""
    found = {}
    for row in numbers["rows"]:
        first = next(other for other in numbers["rows"] if other["family"] == row["family"])
        for phase in ("prompt", "generation"):
            pairs = list(zip(row[phase], first[phase], strict=False))
            if pairs and not row.get("model", "").startswith("shallow"):
                found[label(row, phase)] = statistics.median(own / dense for own, dense in pairs)
    return found


FAST = {"removed": "fast-1.5x", "families": list(STATES)}

EXPERIMENT = Experiment(
    measures="llama.cpp with fewer states, and after fast-1.5x",
    device="CPU",
    seconds=900,
    subjects="Mamba, Mamba-2 and Granite-4-H shapes of 130M to 160M",
    configuration=Fields,
    run=run,
    render=render,
    results={"serving_llama_cpp": {}, "serving_llama_cpp_fast": FAST},
    quick={"serving_llama_cpp": {"rounds": 1, "prompt": 64, "generated": 16}},
    ratios=ratios,
)
