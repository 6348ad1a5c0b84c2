"""What fewer layers and states are worth in time, and whether a cost model predicts it.

python benchmarks/structure_latency.py                 # one CUDA GPU, mamba-ssm, causal-conv1d
python benchmarks/structure_latency.py --device cpu    # shapes of small models

``fast-1.5x`` removes layers and half of the states. For each shape a cost model is fitted, as
``sparsessm fit`` does, to shallow models of random weights; it says how many layers have to go for
the decode at batch 1 to be 1.5 times as fast. This choice is timed beside the dense model, and made
once more by what that says. Then both take turns in all workloads. Every workload is saved as it is
measured: a second call goes on from the first with ``--resume``.
"""

import argparse
import json
import os
import time
import traceback
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import RESULTS, begin, first_line, keep, save
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Mamba2Config,
    MambaConfig,
)

from sparsessm_plugin.evaluation.latency import describe_kernels
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.axes.layers import Layers
from sparsessm_plugin.fitting.costs import Census, Ladder, Space
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.timing import (
    SpeedModel,
    Timed,
    Workload,
    features_of,
    measure,
    phase_of,
)

SHALLOW = {"cuda": (6, 12), "cpu": (4, 8)}  # layers of the models that the cost model is fitted to
TINY = {"num_hidden_layers": 12, "hidden_size": 64, "vocab_size": 128}


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
    if device == "tiny":
        return {
            "Mamba, tiny": MambaConfig(**TINY),
            # its groups do not divide its heads
            "Mamba-2, broken": Mamba2Config(**TINY, num_heads=8, head_dim=16, n_groups=3),
            "Granite-4-H, tiny": granite(
                *(12, 64),
                vocab_size=128,
                shared_intermediate_size=64,
                num_attention_heads=4,
                num_key_value_heads=2,
                mamba_n_heads=8,
                mamba_d_head=16,
            ),
        }
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
    if device != "cuda":
        return [Workload(1, 64), Workload(8, 64), Workload(1, 64, "prefill")]
    return [Workload(1), Workload(128), Workload(1, 2048, "prefill"), Workload(32)]


def space_of(config: Any, dtype: torch.dtype) -> Space:
    """All numbers of layers down to half, and half of the states."""
    with torch.device("meta"):
        shapes = Shapes(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype)
    layers = config.num_hidden_layers
    fewer = []
    for size in range(layers - 1, layers // 2 - 1, -1):
        try:
            Layers().kept(shapes.dense, size)
        except ValueError:
            continue
        fewer.append(size)
    states = find_mixers(shapes.dense)[0].sizes.state_size
    return Space(
        shapes, [Ladder("layers", (layers, *fewer)), Ladder("states", (states, states // 2))]
    )


def choose(space: Space, model: SpeedModel, speed: float) -> dict[str, int]:
    """Half of the states, and as many layers as let it be predicted to be so many times as fast."""
    cost = model.share(space.quantities(), space.dense.total())
    fast = [i for i in range(space.shape[0]) if cost[i, 1] <= 1 / speed]
    return space.sizes((fast[0] if fast else space.shape[0] - 1, 1))


class Pair:
    """The dense model of a shape, a smaller one and shallow ones, all of random weights."""

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space, self.device = space, device
        self.models = {"dense": space.shapes.random({}, device)}
        self.sizes: dict[str, int] = {}
        self.shallow: dict[str, Any] = {}
        self.counts: list[Any] = []  # of the shallow ones
        low, high = SHALLOW[device.type]
        for layers, rare in ((low, 1), (high, 2)):  # how time grows with layers, and rarer kinds
            shapes = space.shapes.shallow(layers, rare)
            for sizes in ({}, {"states": space.ladders[1].sizes[1]}):
                self.shallow[f"{layers} {sizes}"] = shapes.random(sizes, device)
                self.counts.append(Census.of(shapes.model(sizes)).total())

    def cost_model(self, workload: Workload) -> SpeedModel:
        """Fitted to the shallow models, with all states and with half of them."""
        model = SpeedModel(workload, str(self.device))
        model.add(self._timed(self.shallow, self.counts, workload, 7)[1])
        return model

    def make(self, sizes: dict[str, int]) -> None:
        """Let the smaller one have these sizes."""
        if sizes != self.sizes:
            self.models.pop("fast", None)
            kept = self.space.kept_of(sizes)
            self.models["fast"] = self.space.shapes.random(sizes, self.device, kept)
            self.sizes = sizes

    def measure(self, workload: Workload, repeats: int) -> tuple[Any, list[Timed]]:
        """Latency of dense and smaller model, and what a cost model learns from it."""
        counts = [self.space.dense.total(), self.space.count(self.sizes)]
        return self._timed(self.models, counts, workload, repeats)

    def _timed(
        self, models: dict[str, Any], counts: list[Any], workload: Workload, repeats: int
    ) -> tuple[Any, list[Timed]]:
        latency = measure(models, workload, self.device, repeats)
        phase = phase_of(latency)
        timed = []
        for name, own in zip(models, counts, strict=True):
            time_ = latency.timing(name, phase, workload.batch).milliseconds
            timed.append(Timed({}, 0, time_, tuple(map(float, features_of(own, workload)))))
        return latency, timed


def row_of(pair: Pair, workload: Workload, speed: float, sizes: dict[str, int] | None) -> Any:
    """One shape and workload; with the sizes that an earlier one chose, if they are given."""
    started = time.perf_counter()
    space, dense = pair.space, pair.space.dense.total()
    model = pair.cost_model(workload)
    fitted, first = time.perf_counter() - started, None
    if sizes is None:  # as a fit does: time what was chosen, and choose again by what that says
        pair.make(choose(space, model, speed))
        latency, timed = pair.measure(workload, 5)
        first = {
            "sizes": pair.sizes,
            "speedup": latency.speedup("fast", phase_of(latency), workload.batch),
            "predicted": 1 / float(model.share(space.count(pair.sizes), dense)),
        }
        model.learn(timed)
        sizes = choose(space, model, speed)
    pair.make(sizes)
    small = space.count(sizes)
    predicted = [float(model.milliseconds(dense))]
    predicted.append(predicted[0] * float(model.share(small, dense)))
    latency, _ = pair.measure(workload, 9)
    phase = phase_of(latency)
    timings = [latency.timing(name, phase, workload.batch) for name in pair.models]
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
        "speedup": latency.speedup("fast", phase, workload.batch),
        "predicted_speedup": predicted[0] / predicted[1],
        "first_choice": first,
        "largest_error_of_model": model.error(),
        "kernels": describe_kernels(latency.kernels["dense"]),
        "seconds": [fitted, time.perf_counter() - started],
    }


def table(rows: list[dict[str, Any]], speed: float, device: str) -> str:
    """Markdown."""
    kernels = sorted({row["kernels"] for row in rows if "kernels" in row})
    lines = [
        "# Fewer layers and half of the states: time before and after, predicted and measured",
        "",
        f"Random weights; kernels: {', '.join(kernels) or 'unknown'}. As many layers went as a "
        f"cost model, fitted to models of {' and '.join(map(str, SHALLOW[device]))} layers, takes "
        f"for {speed:g} times as fast in decode at batch 1, once it was corrected by timing its "
        "first choice; the other workloads time the same sizes, predicted without a correction. "
        "Dense and smaller model take turns; the speedup is the median over pairs of repeats.",
        "",
        "| shape | workload | sizes | parameters | dense ms | fast ms | predicted ms | speedup | "
        "predicted | error | first choice, predicted and measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "speedup" not in row:
            lines.append(f"| {row['shape']} | {row['workload']} | {row['failure']} |" + " |" * 8)
            continue
        sizes = ", ".join(f"{k} {a:,} → {b:,}" for k, (a, b) in row["sizes"].items())
        (before, after), wanted = row["parameters"], row["predicted_milliseconds"]
        error = row["predicted_speedup"] / row["speedup"] - 1
        first = row["first_choice"]
        told = f"{first['predicted']:.3f}, {first['speedup']:.3f}" if first else ""
        lines.append(
            f"| {row['shape']} | {row['workload']} ({row['phase']}) | {sizes} "
            f"| {after / before:.3f} | {row['milliseconds'][0]:.2f} "
            f"| {row['milliseconds'][1]:.2f} | {wanted[0]:.2f}, {wanted[1]:.2f} "
            f"| **{row['speedup']:.3f}** | {row['predicted_speedup']:.3f} | {error:+.1%} | {told} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the logic only, one shape broken")
    parser.add_argument("--speed", type=float, default=1.5)
    parser.add_argument("--budget", type=float, default=180, help="seconds; no row begins later")
    parser.add_argument("--shapes", nargs="+", help="beginnings of names; default all")
    parser.add_argument("--name", help="of the result files; default structure_latency_DEVICE")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    parser.add_argument("--render", action="store_true", help="only the table of this name's .json")
    options = parser.parse_args()
    options.name = options.name or f"structure_latency_{options.device}"
    if options.render:  # of a run that was stopped
        found = json.loads((RESULTS / f"{options.name}.json").read_text(encoding="utf-8"))
        made = found.pop("versions")
        save(options.name, table(found["rows"], found["speed"], options.device), found, made)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device, or --device cpu")
    content = begin(options)
    rows: list[dict[str, Any]] = [r for r in content.get("rows", []) if "speedup" in r]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    device, started = torch.device(options.device), time.monotonic()
    wanted = options.shapes or [""]
    configs = {
        name: config
        for name, config in shapes_of("tiny" if options.tiny else options.device).items()
        if any(name.startswith(prefix) for prefix in wanted)
    }
    for shape, config in configs.items():  # one after the other: its models are in memory
        pair = None
        for workload in workloads(options.device):
            key = {"shape": shape, "workload": str(workload)}
            if any(row | key == row for row in rows):
                continue
            if time.monotonic() - started > options.budget:
                print(f"no time for {shape}, {workload}", flush=True)
                continue
            own = [r for r in rows if r["shape"] == shape and "sizes" in r]
            sizes = {k: after for k, (_, after) in own[0]["sizes"].items()} if own else None
            try:
                if pair is None:
                    pair = Pair(space_of(config, dtype), device)
                    print(f"{shape} made after {time.monotonic() - started:.0f} s", flush=True)
                found = row_of(pair, workload, options.speed, sizes)
            except Exception as error:
                traceback.print_exc()
                found = {"failure": first_line(error)}
            rows.append({**key, **found})
            print(rows[-1], f"after {time.monotonic() - started:.0f} s", flush=True)
            keep(options.name, {"rows": rows, "speed": options.speed})
            if options.device == "cuda":
                torch.cuda.empty_cache()
        del pair
    save(
        options.name,
        table(rows, options.speed, options.device),
        {"rows": rows, "speed": options.speed},
    )


if __name__ == "__main__":
    main()
