"""What fewer states are worth in llama.cpp on a CPU: 130M shapes, one thread, N by N.

make clients                              # once: the converter and a build of llama.cpp
python benchmarks/serving_llama_cpp.py

Random weights in float16. Rounds go through all models, each in a process of its own; times are of
the processor, so that others at work on the machine count little. Rounds are saved one by one: a
second call goes on with ``--resume``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from common import begin, keep, save
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

ROOT = Path(__file__).parents[1]
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
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)


def convert(folders: list[Path], llama: Path) -> None:
    """What the converter makes of checkpoints, which go."""
    script = [sys.executable, str(SCRIPTS / "llama_convert.py"), str(llama), "f16"]
    errors = last_line([*script, *map(str, folders)])
    for folder, error in zip(folders, errors, strict=True):
        if error is not None:
            raise SystemExit(f"{folder.name}: {error}")
        (folder / "model.safetensors").unlink()


def table(rows: list[dict[str, Any]], prompt: int, generated: int) -> str:
    """Markdown."""
    lines = [
        "# Fewer states in llama.cpp on a CPU",
        "",
        f"130M shapes, random weights, float16, one thread: tokens a second of processor time, "
        f"medians of {max(len(row['prompt']) for row in rows)} rounds through all models; "
        f"a prompt of {prompt} tokens, then {generated}. In bold, against the first N of the "
        "family, the median over rounds.",
        "",
        "| family | N | prompt | generation |",
        "|---|---|---|---|",
    ]
    for row in rows:
        first = next(other for other in rows if other["family"] == row["family"])
        cells = []
        for phase in ("prompt", "generation"):
            pairs = zip(row[phase], first[phase], strict=False)
            ratio = statistics.median(own / dense for own, dense in pairs)
            cells.append(f"{statistics.median(row[phase]):.1f} **{ratio:.2f}**")
        lines.append(f"| {row['family']} | {row['N']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generated", type=int, default=32)
    parser.add_argument("--families", nargs="+", default=list(STATES), choices=list(STATES))
    parser.add_argument("--tiny", action="store_true", help="the logic only")
    parser.add_argument(
        "--time-limit", type=float, default=900, help="seconds; no round begins later"
    )
    parser.add_argument("--name", default="serving_llama_cpp", help="of the result files")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    clients = ROOT / ".venv-clients"
    parser.add_argument("--python", default=str(clients / "bin" / "python"), help="with xllamacpp")
    parser.add_argument("--llama-cpp", type=Path, default=clients / "llama.cpp")
    options = parser.parse_args()
    started = time.monotonic()
    rows = begin(options).get("rows") or [
        {"family": family, "N": n, "prompt": [], "generation": []}
        for family in options.families
        for n in STATES[family]
    ]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{row['family']}-{row['N']}" for row in rows]
        for row, place in zip(rows, places, strict=True):
            make(place, row["family"], row["N"], options.tiny)
        convert(places, options.llama_cpp)
        print(f"converted, {time.monotonic() - started:.0f} s", flush=True)
        while len(rows[-1]["prompt"]) < options.rounds:
            if time.monotonic() - started > options.time_limit:
                break
            for row, place in zip(rows, places, strict=True):
                numbers = [str(options.prompt), str(options.generated), "1"]
                script = [options.python, str(SCRIPTS / "llama_logits.py")]
                [found] = last_line([*script, json.dumps([str(place)]), *numbers])
                row["prompt"] += found["prompt"]
                row["generation"] += found["generation"]
            keep(options.name, {"rows": rows})
            print(
                f"round {len(rows[-1]['prompt'])}, {time.monotonic() - started:.0f} s", flush=True
            )
    if rows[-1]["prompt"]:
        save(options.name, table(rows, options.prompt, options.generated), {"rows": rows})


if __name__ == "__main__":
    main()
