"""What fewer layers and states are worth in time, and whether a cost model predicts it.

``fast-1.5x`` removes layers and half of the states. For each shape a cost model is fitted, as
``sparsessm fit`` does, to shallow models of random weights; it says how many layers have to go for
the decode at batch 1 to be 1.5 times as fast. This choice is timed beside the dense model, and made
once more by what that says. Then both take turns in all workloads. With ``scan`` the workload is a
pass by this package's scan in numba, which reads a text and keeps no cache, in processor time.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from harness import Configuration, Experiment, Job, markdown, needs_gpu
from pydantic import Field
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, Mamba2Config, MambaConfig

from sparsessm_plugin.evaluation.latency import PREFILL, Latency, Timing, describe_kernels
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.fitting.axes.layers import Layers
from sparsessm_plugin.fitting.costs import Census, Ladder, Space
from sparsessm_plugin.fitting.shapes import Shapes, shallow_shapes
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


class Scanned(Workload):
    """A text that is read once by the scan in numba."""

    def __str__(self) -> str:
        return f"scan in numba, batch {self.batch}, length {self.length}"


def granite(
    layers: int, hidden: int, vocabulary: int, mlp: int, attention: tuple[int, int], heads: int
) -> Any:
    """A Granite-4-H shape without experts: every tenth layer attends, from the sixth on.

    :param mlp: intermediate units
    :param attention: heads of queries, and of keys and values
    :param heads: of the mixers
    """
    types = ["attention" if i % 10 == 5 else "mamba" for i in range(layers)]
    return GraniteMoeHybridConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        layer_types=types,
        shared_intermediate_size=mlp,
        num_attention_heads=attention[0],
        num_key_value_heads=attention[1],
        mamba_n_heads=heads,
        mamba_d_head=2 * hidden // heads,
        num_local_experts=0,
        mamba_n_groups=1,
        mamba_d_state=128,
        mamba_expand=2,
        position_embedding_type=None,
        tie_word_embeddings=True,
    )


def shapes_of(device: str) -> dict[str, Any]:
    """Name -> config."""
    if device == "tiny":
        return {
            "Mamba, tiny": MambaConfig(**TINY),
            # its groups do not divide its heads
            "Mamba-2, broken": Mamba2Config(**TINY, num_heads=8, head_dim=16, n_groups=3),
            "Granite-4-H, tiny": granite(12, 64, 128, mlp=64, attention=(4, 2), heads=8),
        }
    if device == "cpu":
        like = {"hidden_size": 512, "num_hidden_layers": 12, "vocab_size": 8192}
        return {
            "Mamba, 25M": MambaConfig(**like),
            "Mamba-2, 25M": Mamba2Config(**like, num_heads=16, n_groups=1),
            "Granite-4-H, 16M": granite(10, 384, 8192, mlp=1024, attention=(8, 4), heads=24),
        }
    like = {"hidden_size": 2560, "num_hidden_layers": 64}
    return {
        "Mamba, 2.8B": MambaConfig(**like, vocab_size=50280),
        "Mamba-2, 2.7B": Mamba2Config(**like, vocab_size=50288, num_heads=80, n_groups=1),
        "Granite-4-H, 3B": granite(40, 2048, 100352, mlp=8192, attention=(32, 8), heads=64),
    }


def workloads(device: str, scan: bool = False) -> list[Workload]:
    """In the order of their worth."""
    if scan:
        return [Scanned(1, 512, "prefill"), Scanned(4, 512, "prefill")]
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
        for number, shapes in enumerate(shallow_shapes(space.shapes, SHALLOW[device.type])):
            for sizes in ({}, {"states": space.ladders[1].sizes[1]}):
                self.shallow[f"{number} {sizes}"] = shapes.random(sizes, device)
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
        scanned = isinstance(workload, Scanned)
        timing = scans if scanned else measure
        latency = timing(models, workload, self.device, repeats)
        phase = phase_of(latency)
        timed = []
        for name, own in zip(models, counts, strict=True):
            time_ = latency.timing(name, phase, workload.batch).milliseconds
            timed.append(Timed({}, 0, time_, tuple(map(float, features_of(own, workload)))))
        return latency, timed


@torch.inference_mode()
def scans(
    models: Mapping[str, Any], workload: Workload, device: torch.device, repeats: int
) -> Latency:
    """Time passes without a cache, which the scan in numba makes; models take turns."""
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    size = (workload.batch, workload.length)
    ids = torch.randint(vocabulary, size, generator=generator).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-1, repeats):
        for name, model in models.items():
            with fast_forward(model):
                started = time.process_time()  # on one thread; others may be at work
                model(ids, use_cache=False)
                taken = time.process_time() - started
            if repeat >= 0:  # the first compiles
                seconds[name].append(taken)
    timings = tuple(
        Timing(name, PREFILL, workload.batch, 1, ids.numel(), tuple(own))
        for name, own in seconds.items()
    )
    kernels = {name: {"scan": "numba"} for name in models}
    return Latency(tuple(models), workload.length, 1, timings, {}, kernels)


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


class Fields(Configuration):
    """Where, and how fast."""

    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu: shapes of small models")
    tiny: bool = Field(False, description="the logic only, one shape broken")
    speed: float = Field(1.5, description="times as fast as dense")
    scan: bool = Field(False, description="on a CPU: passes by the scan in numba, on one thread")
    shapes: list[str] = Field([], description="beginnings of names; default all")


def run(job: Job) -> Iterator[Any]:
    """A row a shape and workload."""
    chosen: Fields = job.configuration
    if chosen.device == "cuda":
        needs_gpu()
    rows: list[dict[str, Any]] = [r for r in job.numbers.get("rows", []) if "speedup" in r]
    job.numbers |= {"rows": rows, "speed": chosen.speed}
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    device = torch.device(chosen.device)
    for shape, config in shapes_of("tiny" if chosen.tiny else chosen.device).items():
        if chosen.shapes and not shape.startswith(tuple(chosen.shapes)):
            continue
        pair = None  # one after the other: its models are in memory
        for workload in workloads(chosen.device, chosen.scan):
            key = {"shape": shape, "workload": str(workload)}
            if any(row | key == row for row in rows) or not job.in_time(str(key)):
                continue
            own = [r for r in rows if r["shape"] == shape and "sizes" in r]
            sizes = {k: after for k, (_, after) in own[0]["sizes"].items()} if own else None
            rows.append(key)
            with job.case(f"{shape}, {workload}"):
                pair = pair or Pair(space_of(config, dtype), device)
                rows[-1] |= row_of(pair, workload, chosen.speed, sizes)
            if "speedup" not in rows[-1]:
                rows[-1]["failure"] = job.failures[f"{shape}, {workload}"]
            yield rows[-1]


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a shape and workload."""
    rows = numbers["rows"]
    kernels = sorted({row["kernels"] for row in rows if "kernels" in row})
    asked = "passes of one sequence, in processor time" if chosen.scan else "decode at batch 1"
    lines = []
    for row in rows:
        if "speedup" not in row:
            lines.append([row["shape"], row["workload"], row["failure"], *[""] * 8])
            continue
        (before, after), wanted = row["parameters"], row["predicted_milliseconds"]
        first = row["first_choice"]
        lines.append(
            [
                row["shape"],
                f"{row['workload']} ({row['phase']})",
                ", ".join(f"{k} {a:,} → {b:,}" for k, (a, b) in row["sizes"].items()),
                f"{after / before:.3f}",
                *(f"{value:.2f}" for value in row["milliseconds"]),
                f"{wanted[0]:.2f}, {wanted[1]:.2f}",
                f"**{row['speedup']:.3f}**",
                f"{row['predicted_speedup']:.3f}",
                f"{row['predicted_speedup'] / row['speedup'] - 1:+.1%}",
                f"{first['predicted']:.3f}, {first['speedup']:.3f}" if first else "",
            ]
        )
    head = "shape|workload|sizes|parameters|dense ms|fast ms|predicted ms|speedup|predicted|error"
    return (
        "# Fewer layers and half of the states: time before and after, predicted and measured\n\n"
        f"Random weights; kernels: {', '.join(kernels) or 'unknown'}. As many layers went as a "
        f"cost model, fitted to models of {' and '.join(map(str, SHALLOW[chosen.device]))} layers, "
        f"takes for {numbers['speed']:g} times as fast in {asked}, once it was corrected "
        "by timing its first choice; the other workloads time the same sizes, predicted without a "
        "correction. Dense and smaller model take turns; the speedup is the median over pairs of "
        "repeats.\n\n" + markdown([*head.split("|"), "first choice, predicted and measured"], lines)
    )


EXPERIMENT = Experiment(
    measures="time with fewer layers and states, predicted and measured",
    device="GPU",
    seconds=180,
    subjects="Mamba 2.8B, Mamba-2 2.7B, Granite-4-H 3B shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "structure_latency_cuda": {},
        "structure_latency_cpu": {"device": "cpu"},
        "structure_latency_cpu_scan": {"device": "cpu", "scan": True},
    },
    quick={"": {"device": "cpu", "tiny": True, "shapes": ["Mamba, tiny", "Granite"]}},
    extends=("shapes",),
)
