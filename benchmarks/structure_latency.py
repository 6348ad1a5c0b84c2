"""What a mix of axes is worth in time, and whether a fit predicts it.

python benchmarks/structure_latency.py                 # one CUDA GPU, mamba-ssm, causal-conv1d
python benchmarks/structure_latency.py --device cpu    # shapes of small models

For each shape a speed model is fitted as ``sparsessm fit --target speed=1.5`` does, to models of
random weights; it chooses sizes by what single axes lost in mamba-25m. Then the dense model and the
mix take turns at their full depth. Rows come in the order of their worth and are saved one by one:
a second call goes on from the first with ``--resume``.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from common import begin, first_line, keep, save
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Mamba2Config,
    MambaConfig,
)

from sparsessm_plugin.evaluation.latency import describe_kernels
from sparsessm_plugin.fitting.axes import AXES, in_order
from sparsessm_plugin.fitting.choice import best_mixes, mixed_losses
from sparsessm_plugin.fitting.costs import Ladder, Space
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.timing import (
    SpeedModel,
    Workload,
    measure,
    measured_speedups,
    phase_of,
    speed_model,
)

# Loss of single axes after their fits is about a multiple of the square of the share that goes.
LOST = {"states": 0.03, "channels": 1.8, "layers": 2.2, "hidden": 3.0, "mlp": 1.5, "kv_groups": 0.5}
_OTHER = 2.0


def granite(layers: int, hidden: int, **changes: Any) -> Any:
    """A Granite-4-H shape without experts: every tenth layer attends, from the sixth on."""
    types = ["attention" if i % 10 == 5 else "mamba" for i in range(layers)]
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": types,
        "num_local_experts": 0,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "mamba_expand": 2,
        "position_embedding_type": None,
        "tie_word_embeddings": True,
        **changes,
    }
    return GraniteMoeHybridConfig(**fields)


def shapes_of(device: str) -> dict[str, Any]:
    """Name -> config."""
    if device == "cpu":
        return {
            "Mamba, 25M": MambaConfig(hidden_size=512, num_hidden_layers=12, vocab_size=8192),
            "Mamba-2, 25M": Mamba2Config(
                hidden_size=512, num_hidden_layers=12, vocab_size=8192, num_heads=16, n_groups=1
            ),
            "Granite-4-H, 16M": granite(
                *(10, 384),
                vocab_size=8192,
                shared_intermediate_size=1024,
                num_attention_heads=8,
                num_key_value_heads=4,
                mamba_n_heads=24,
                mamba_d_head=32,
            ),
        }
    return {
        "Mamba, 2.8B": MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50280),
        "Mamba-2, 2.7B": Mamba2Config(
            hidden_size=2560, num_hidden_layers=64, vocab_size=50288, num_heads=80, n_groups=1
        ),
        "Granite-4-H, 3B": granite(
            *(40, 2048),
            vocab_size=100352,
            shared_intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=8,
            mamba_n_heads=64,
            mamba_d_head=64,
        ),
    }


def workloads(device: str) -> list[Workload]:
    """In the order of their worth."""
    if device == "cpu":
        return [Workload(1, 64), Workload(8, 64), Workload(1, 64, "prefill")]
    return [Workload(1), Workload(128), Workload(1, 2048, "prefill"), Workload(32)]


def space_of(config: Any, dtype: torch.dtype) -> Space:
    """All sizes of all axes that the loader can make, modifiers aside."""
    with torch.device("meta"):
        shapes = Shapes(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype)
    ladders = []
    for axis in in_order(AXES):
        sizes = []
        length = axis.length(shapes.dense)
        for size in axis.sizes(length) if length else ():
            try:
                shapes.model({axis.name: size})
            except ValueError:
                continue
            sizes.append(size)
        if sizes:
            ladders.append(Ladder(axis.name, (length, *sizes)))
    return Space(shapes, ladders)


def losses_of(space: Space) -> Any:
    """What every mix is taken to lose."""
    tables = []
    for ladder in space.ladders:
        gone = 1 - np.array(ladder.sizes) / ladder.sizes[0]
        tables.append(LOST.get(ladder.axis, _OTHER) * gone**2)
    return mixed_losses(tables)


def choose(space: Space, model: SpeedModel, speed: float) -> dict[str, int]:
    """The sizes that are predicted to be so many times as fast, at the least loss."""
    cost = model.share(space.quantities(), space.dense.total())
    mixes = best_mixes(losses_of(space), [cost], [1 / speed])
    if not mixes:
        raise SystemExit(f"no mix is {speed} times as fast")
    return space.sizes(mixes[0])


def row_of(
    space: Space, workload: Workload, device: torch.device, speed: float, mix: dict[str, int] | None
) -> dict[str, Any]:
    """One shape and workload; the mix of an earlier one, if that is given."""
    started = time.perf_counter()
    model = speed_model(space, workload, device)
    fitted, error = time.perf_counter() - started, model.error()
    sizes = choose(space, model, speed) if mix is None else mix
    dense, first = space.dense.total(), None
    if mix is None:  # as a fit does: time what was chosen, and choose again by what that says
        timed, (found,) = measured_speedups(space, [sizes], workload, device, repeats=5)
        first = {"speedup": found, "predicted": 1 / float(model.share(space.count(sizes), dense))}
        model.learn(timed)
        sizes = choose(space, model, speed)
    kept, small = space.kept_of(sizes), space.count(sizes)
    predicted = [float(model.milliseconds(dense))]
    predicted.append(predicted[0] * float(model.share(small, dense)))
    models = {
        "dense": space.shapes.random({}, device),
        "mix": space.shapes.random(sizes, device, kept),
    }
    latency = measure(models, workload, device, repeats=9)
    phase = phase_of(latency)
    timings = [latency.timing(name, phase, workload.batch) for name in models]
    return {
        "phase": phase,
        "sizes": {
            ladder.axis: [ladder.sizes[0], sizes[ladder.axis]]
            for ladder in space.ladders
            if ladder.axis in sizes
        },
        "parameters": [float(dense[0]), float(small[0])],
        "milliseconds": [timing.milliseconds for timing in timings],
        "spread": [timing.spread for timing in timings],
        "predicted_milliseconds": predicted,
        "speedup": latency.speedup("mix", phase, workload.batch),
        "predicted_speedup": predicted[0] / predicted[1],
        "first_choice": first,
        "largest_error_of_model": error,
        "kernels": describe_kernels(latency.kernels["dense"]),
        "seconds": [fitted, time.perf_counter() - started],
    }


def table(rows: list[dict[str, Any]], speed: float, device: str) -> str:
    """Markdown."""
    kernels = sorted({row["kernels"] for row in rows if "kernels" in row})
    lines = [
        "# A mix of axes: time before and after, predicted and measured",
        "",
        f"Random weights; kernels: {', '.join(kernels) or 'unknown'}. The mix of each shape is the "
        f"one that a speed model takes to be {speed:g} times as fast in decode at batch 1, once it "
        "was corrected by timing its first choice, at the least loss by what single axes lost in "
        "mamba-25m; the other workloads time the same mix, predicted without a correction. "
        "Dense model and mix take turns; the speedup is the median over pairs of repeats. The "
        "speed model is fitted to models of other sizes"
        + (" and of 4 and 8 layers only." if device == "cuda" else "."),
        "",
        "| shape | workload | sizes | parameters | dense ms | mix ms | predicted ms | speedup | "
        "predicted | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "speedup" not in row:
            lines.append(f"| {row['shape']} | {row['workload']} | {row['failure']} |" + " |" * 7)
            continue
        sizes = ", ".join(f"{k} {a:,} → {b:,}" for k, (a, b) in row["sizes"].items())
        (before, after), wanted = row["parameters"], row["predicted_milliseconds"]
        error = row["predicted_speedup"] / row["speedup"] - 1
        lines.append(
            f"| {row['shape']} | {row['workload']} ({row['phase']}) | {sizes} "
            f"| {after / before:.3f} | {row['milliseconds'][0]:.2f} "
            f"| {row['milliseconds'][1]:.2f} | {wanted[0]:.2f}, {wanted[1]:.2f} "
            f"| **{row['speedup']:.3f}** | {row['predicted_speedup']:.3f} | {error:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--speed", type=float, default=1.5)
    parser.add_argument("--budget", type=float, default=150, help="seconds; no row begins later")
    parser.add_argument("--shapes", nargs="+", help="beginnings of names; default all")
    parser.add_argument("--name", help="of the result files; default structure_latency_DEVICE")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    options = parser.parse_args()
    options.name = options.name or f"structure_latency_{options.device}"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device, or --device cpu")
    content = begin(options)
    rows: list[dict[str, Any]] = [r for r in content.get("rows", []) if "speedup" in r]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    device, started = torch.device(options.device), time.monotonic()
    wanted = options.shapes or [""]
    configs = {
        name: config
        for name, config in shapes_of(options.device).items()
        if any(name.startswith(prefix) for prefix in wanted)
    }
    spaces: dict[str, Space] = {}
    for workload in workloads(options.device):
        for shape, config in configs.items():
            key = {"shape": shape, "workload": str(workload)}
            if any(row | key == row for row in rows):
                continue
            if time.monotonic() - started > options.budget:
                print(f"no time for {shape}, {workload}", flush=True)
                continue
            own = [r for r in rows if r["shape"] == shape and "sizes" in r]
            mix = {k: after for k, (_, after) in own[0]["sizes"].items()} if own else None
            try:
                spaces.setdefault(shape, space_of(config, dtype))
                found = row_of(spaces[shape], workload, device, options.speed, mix)
            except Exception as error:
                found = {"failure": first_line(error)}
            rows.append({**key, **found})
            print(rows[-1], flush=True)
            keep(options.name, {"rows": rows, "speed": options.speed})
            if options.device == "cuda":
                torch.cuda.empty_cache()
    save(
        options.name,
        table(rows, options.speed, options.device),
        {"rows": rows, "speed": options.speed},
    )


if __name__ == "__main__":
    main()
