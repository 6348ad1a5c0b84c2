"""How fast pruning is, as ratios of what took turns in one run.

python benchmarks/speed.py --name speed_gpu            # on a CUDA device
python benchmarks/speed.py --name speed_cpu --sections alog --shapes 25M 130M
python benchmarks/speed.py --quick                     # the logic only: tiny shapes, not saved

alog       the A_log stage against the loop that SparseSSM's authors published
pipeline   A_log and all projections of a 2.8B shape, 64 x 2048 tokens, beside the floor; CUDA
growth     seconds over samples, length, D, N and layers
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import RESULTS, Result, save
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from sparsessm_plugin.backends.products import project
from sparsessm_plugin.criteria import SALIENCIES, SaliencyInputs, Unstructured, aggregate
from sparsessm_plugin.evaluation.data import calibration_loader
from sparsessm_plugin.families import MixerAdapter, get_adapter, read_out
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource, PruningResult, prune
from sparsessm_plugin.recurrence import ScanStatistics
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.solvers.objective import gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
STATES = 16


@dataclass(frozen=True)
class Shape:
    """Of a Mamba: the published sizes, and the checkpoint that this project trained."""

    hidden_size: int
    layers: int


SHAPES = {
    "25M": Shape(512, 12),
    "130M": Shape(768, 24),
    "370M": Shape(1024, 48),
    "1.4B": Shape(2048, 48),
    "2.8B": Shape(2560, 64),
}
QUICK_SHAPES = {"tiny": Shape(32, 2)}


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call, of a GPU's work until it is done."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# -- A_log stage -------------------------------------------------------------------------------


SPARSITY = 0.5
HESSIAN = ("hessian", "frequency")
LENGTH, SAMPLES, BATCH = 2048, 32, 4


def make_mixer(hidden_size: int, states: int = STATES) -> MixerAdapter:
    """One random mixer, made on the device itself."""
    config = MambaConfig(
        hidden_size=hidden_size,
        state_size=states,
        num_hidden_layers=1,
        time_step_rank=math.ceil(hidden_size / 16),
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        mixer = MambaMixer(config, layer_idx=0).to(DTYPE).eval()
    return get_adapter(mixer.requires_grad_(False))


def observe(adapter: MixerAdapter, batches: list[Tensor], criterion: str, over_time: str) -> Any:
    """What SparseSSMModifier and the forward do with what enters a mixer."""
    request = SALIENCIES[criterion].request(over_time, "zero")
    channels, states = adapter.A_log.shape
    statistics = ScanStatistics(request, channels, states, device=adapter.A_log.device)
    for hidden_states in batches:
        q = adapter.quantities(hidden_states)
        project(adapter.mixer.out_proj, read_out(adapter, q, statistics))
    return statistics


def select(adapter: MixerAdapter, found: ScanStatistics, criterion: str, over_time: str) -> Tensor:
    """What SparseSSMModifier does once it has seen all the data: (D, N) bool, what is pruned."""
    inputs = SaliencyInputs(
        A_log=adapter.A_log.float(),
        out_norm=adapter.out_norm,
        state_energy=found.state_energy,
        transition=found.transition,
        output_error=found.output_error,
    )
    pattern = Unstructured(SPARSITY)
    ranking = aggregate(SALIENCIES[criterion], over_time, inputs, found.steps, pattern)
    return ranking.select(pattern)


def loop_quantities(adapter: MixerAdapter, hidden_states: Tensor) -> MixerQuantities:
    """The inputs of the recurrence in transformers' own steps, each one a function of torch."""
    mixer: Any = adapter.mixer
    R, N = mixer.time_step_rank, mixer.ssm_state_size
    conv_input, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    u = mixer.act(mixer.conv1d(conv_input.transpose(1, 2))[..., : hidden_states.shape[1]])
    u = u.transpose(1, 2)
    dt, B, C = mixer.x_proj(u).split([R, N, N], dim=-1)
    return MixerQuantities(
        u=u.float(),
        dt=F.softplus(mixer.dt_proj(dt).float()),
        A=-torch.exp(mixer.A_log.float()),
        B=B.float(),
        C=C.float(),
        D=mixer.D.float(),
        z=z,
    )


def loop_observe(adapter: MixerAdapter, samples: Tensor, steps: int) -> Tensor:
    """The published way to the statistics, in our own words: samples and time steps one by one.

    The transitions and inputs of a whole sequence are discretised first; a Python loop over
    time updates the state, keeps it and reads the output from it; the states are then
    stacked, and their squares added to a running mean.

    :return: S_t (steps, D, N), up to a factor
    """
    energy = torch.zeros(steps, *adapter.A_log.shape, device=adapter.A_log.device)
    for seen, sample in enumerate(samples):
        q = loop_quantities(adapter, sample[None, :steps])
        transition = torch.exp(torch.einsum("bld,dn->bldn", q.dt, q.A))
        drive = torch.einsum("bld,bln,bld->bldn", q.dt, q.B, q.u)
        h = torch.zeros_like(transition[:, 0])
        states, outputs = [], []
        for t in range(steps):
            h = transition[:, t] * h + drive[:, t]
            states.append(h)
            outputs.append(torch.einsum("bdn,bn->bd", h, q.C[:, t]))
        y = (torch.stack(outputs, 1) + q.D * q.u) * q.gate
        adapter.mixer.out_proj(y.to(DTYPE))
        energy *= seen / (seen + 1)
        energy += torch.stack(states, 1).square().sum(0)
    return energy


def loop_select(adapter: MixerAdapter, energy: Tensor) -> Tensor:
    """The published vote, in our own words: the lowest of every step, then the most marked."""
    A_log = adapter.A_log.float()
    count = round(SPARSITY * A_log.numel())
    votes = torch.zeros(A_log.numel(), device=A_log.device)
    for step in energy:
        votes[(A_log.square() * step).flatten().topk(count, largest=False).indices] += 1
    pruned = torch.zeros_like(votes, dtype=torch.bool)
    pruned[votes.topk(count).indices] = True
    return pruned.view_as(A_log)


@dataclass
class StageTimes:
    """Seconds of one repeat: for a sample, and once a layer."""

    sample: float
    layer: float

    def stage(self, layers: int) -> float:
        return layers * (SAMPLES * self.sample + self.layer)


@torch.no_grad()
def alog(result: Result, shapes: dict[str, Shape], quick: bool) -> None:
    """The A_log stage: a mixer's statistics and the choice of what is pruned."""
    length = 64 if quick else LENGTH
    repeats = 2 if quick else 3
    # a step of the loop costs the same wherever it stands in the sequence
    steps = length if quick else 256
    batch = 1 if DEVICE == "cpu" else BATCH
    rows: list[list[str]] = []
    numbers: dict[str, Any] = {}
    contenders = {"same criterion": HESSIAN, "default": ("output_error", "mean")}

    def run(name: str, shape: Shape) -> None:
        adapter = make_mixer(shape.hidden_size)
        samples = torch.randn(batch, length, shape.hidden_size, device=DEVICE, dtype=DTYPE)
        short = samples[:, : min(64, length)]
        agreed = float(
            (
                select(adapter, observe(adapter, [short], *HESSIAN), *HESSIAN)
                & loop_select(adapter, loop_observe(adapter, short, short.shape[1]))
            ).sum()
        ) / round(SPARSITY * adapter.A_log.numel())
        loop: list[StageTimes] = []
        ours: dict[str, list[StageTimes]] = {key: [] for key in contenders}

        def loop_once(steps: int) -> StageTimes:
            kept: list[Tensor] = []
            observed = seconds(lambda: kept.append(loop_observe(adapter, samples[:1], steps)))
            selected = seconds(lambda: loop_select(adapter, kept[0]))
            return StageTimes(observed * length / steps, selected * length / steps)

        def ours_once(key: str) -> StageTimes:
            kept: list[Any] = []
            batches = [samples]
            observed = seconds(lambda: kept.append(observe(adapter, batches, *contenders[key])))
            selected = seconds(lambda: select(adapter, kept[0], *contenders[key]))
            return StageTimes(observed / len(samples), selected)

        loop_once(min(8, steps))  # compile and warm up
        for key in contenders:
            ours_once(key)
        for _ in range(repeats):
            loop.append(loop_once(steps))
            for key in contenders:
                ours[key].append(ours_once(key))
        theirs = [times.stage(shape.layers) for times in loop]
        row = [name, f"{statistics.median(theirs):,.1f}"]
        numbers[name] = {"agreement": agreed, "loop": [vars(times) for times in loop]}
        for key in contenders:
            mine = [times.stage(shape.layers) for times in ours[key]]
            ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
            row += [
                f"{statistics.median(mine):,.2f}",
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})",
            ]
            numbers[name][key] = {"seconds": [vars(times) for times in ours[key]], "ratios": ratios}
        rows.append([*row, f"{agreed:.1%}"])

    try:
        for name, shape in shapes.items():
            result.case(f"A_log stage, {name}", lambda a=name, b=shape: run(a, b))
    finally:
        result.numbers["alog"] = numbers
        result.table(
            "A_log stage against the published loop",
            f"Seconds to choose {SPARSITY:.0%} of A_log in all layers from {SAMPLES} x {length} "
            f"tokens, without the rest of the model, on {DEVICE}, random weights, N = {STATES}. "
            "The loop is a reimplementation in our own words of what SparseSSM's authors "
            "published: samples and time steps one by one, the lowest half of all entries looked "
            "for at every step; its second pass, which hands the pruned layer's output on, is left "
            "out. The loop calls torch for each of transformers' steps, none of this package's "
            "kernels: on a CPU its products run in the library that torch chooses, those of this "
            "package in oneDNN where the processor is AMD's. "
            f"Timed were one layer, of the loop one sample and the first {steps} steps, of this "
            f"package a batch of {batch} samples; the seconds are these, multiplied: both grow "
            "linearly with layers, samples and steps. Same criterion: A_log^2 S_t with frequency, "
            "as the loop; default: output_error, a second recurrence beside the first. Medians "
            f"of {repeats} repeats that took turns, with the range of the ratio. Last, the share "
            "of the entries pruned by the loop that are also pruned here, from "
            f"{batch} x {min(64, length)} tokens.",
            ["shape", "loop", "same criterion", "ratio", "default", "ratio", "same entries"],
            rows,
        )


# -- whole pipeline ----------------------------------------------------------------------------


ALOG = "SparseSSMModifier: {sparsity: 0.5}"
RECIPES = {
    "sparsegpt": (ALOG, "SensitivitySparseGPTModifier: {sparsity: 0.5, solver: sparsegpt}"),
    "defaults": (ALOG, "SensitivitySparseGPTModifier: {sparsity: 0.5}"),
}
PIPELINE_SAMPLES, MOST_SECONDS, MOST_BYTES = 64, 60, 24 * 2**30


def make_model(
    folder: str, hidden_size: int, layers: int, states: int = STATES, vocabulary: int = 50280
) -> Any:
    """A random model, made on the device itself."""
    config = MambaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        state_size=states,
        num_hidden_layers=layers,
        time_step_rank=math.ceil(hidden_size / 16),
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    config.save_pretrained(folder)  # oneshot() reads it once more
    model.config._name_or_path = model.name_or_path = folder
    return model


def run_recipe(model: Any, modifiers: tuple[str, ...], samples: int, length: int) -> PruningResult:
    """Prune a model on random tokens."""
    text = "prune_stage:\n  prune_modifiers:\n" + "".join(f"    {m}\n" for m in modifiers)
    tokens = torch.randint(
        model.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0)
    )
    loader = calibration_loader(tokens, samples, BATCH)
    tokenizer = ModelSource(DEMO_MODEL).load_tokenizer()  # of no use, but asked for
    return prune(model, parse_recipe(text, "benchmark"), loader, tokenizer)


@dataclass
class Ceilings:
    """What this machine does at most, each measured once: operations and bytes a second."""

    matrix: float  # in the model's dtype
    gram: float  # X X^T of the model's dtype, summed in float32
    bandwidth: float

    @classmethod
    def measure(cls, size: int, tokens: int) -> "Ceilings":
        def best(work: Callable[[], Any]) -> float:
            work()
            return min(seconds(work) for _ in range(5))

        a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
        x = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
        target = torch.empty_like(x)
        return cls(
            matrix=2 * size**3 / best(lambda: a @ a),
            gram=2 * tokens * size**2 / best(lambda: gram(x, x)),
            bandwidth=2 * x.nbytes / best(lambda: target.copy_(x)),
        )


@dataclass
class Floor:
    """The seconds that a model's parts cannot take less than, from counts and ceilings.

    :param forward: one pass of all tokens through the mixers' projections
    :param scan: reading u, z, B and C once in the model's dtype, dt in float32, and writing y
    :param hessians: X X^T of every projection
    :param crosses: products of dense and present inputs; those of in_proj are alike
    """

    forward: float
    scan: float
    hessians: float
    crosses: float

    @classmethod
    def of(cls, shape: Shape, tokens: int, ceilings: Ceilings) -> "Floor":
        hidden, D, N = shape.hidden_size, 2 * shape.hidden_size, STATES
        R = math.ceil(hidden / 16)
        weights = hidden * 2 * D + D * (R + 2 * N) + R * D + D * hidden
        beside_in_proj = 2 * D**2 + R**2  # x_proj and out_proj, dt_proj; conv1d's are tiny
        each = shape.layers * tokens
        return cls(
            forward=2 * each * weights / ceilings.matrix,
            scan=each * (DTYPE.itemsize * (3 * D + 2 * N) + 4 * D) / ceilings.bandwidth,
            hessians=2 * each * (beside_in_proj + hidden**2) / ceilings.gram,
            crosses=2 * each * beside_in_proj / ceilings.gram,
        )

    def stages(self) -> dict[tuple[str, str], float]:
        """By modifier and stage; what is not here has no floor that was counted."""
        run = self.forward + self.scan
        return {
            ("SparseSSMModifier", "forward"): 2 * self.forward + self.scan,
            ("SparseSSMModifier", "observe"): self.scan,
            ("SensitivitySparseGPTModifier", "first_pass"): run + self.hessians,
            ("SensitivitySparseGPTModifier", "gather"): self.hessians + self.crosses,
            ("SensitivitySparseGPTModifier", "forward"): 2 * run,
        }


def pipeline(result: Result, shapes: dict[str, Shape], quick: bool) -> None:
    """A_log and all projections, through oneshot(), with the time by stage."""
    if DEVICE == "cpu" and not quick:
        raise RuntimeError("needs a CUDA device")
    name, shape = list(shapes.items())[-1]
    samples, length = (8, 64) if quick else (PIPELINE_SAMPLES, LENGTH)
    vocabulary = 96 if quick else 50280
    ceilings = Ceilings.measure(64 if quick else 8192, 256 if quick else 16384)
    floor = Floor.of(shape, samples * length, ceilings)
    result.numbers["pipeline"] = {"ceilings": vars(ceilings), "floor": vars(floor)}

    def run(key: str, folder: str) -> None:
        warm = make_model(folder, shape.hidden_size, 1, vocabulary=vocabulary)
        run_recipe(warm, RECIPES[key], BATCH, length)  # compiles and tunes kernels
        del warm
        model = make_model(folder, shape.hidden_size, shape.layers, vocabulary=vocabulary)
        found = run_recipe(model, RECIPES[key], samples, length)
        floors = floor.stages()
        rows: list[list[str]] = []
        gaps: dict[str, float] = {}
        for report in found.reports:
            modifier, stages = report["modifier"], dict(report["cost"]["seconds"])
            stages.pop("total")
            for stage, took in stages.items():
                least = floors.get((modifier, stage))
                times = "" if least is None else f"{took / least:.1f}"
                least_text = "" if least is None else f"{least:.3f}"
                rows.append([modifier, stage, f"{took:.2f}", least_text, times])
                gaps[f"{stage} of {modifier}"] = took - (least or 0.0)
        inside = sum(report["cost"]["seconds"]["total"] for report in found.reports)
        rows.append(["oneshot()", "all else", f"{found.seconds - inside:.2f}", "", ""])
        gaps["what oneshot() does beside the modifiers"] = found.seconds - inside
        least = sum(floors.values())
        rows.append(
            ["all", "", f"{found.seconds:.2f}", f"{least:.3f}", f"{found.seconds / least:.1f}"]
        )
        largest = sorted(gaps.items(), key=lambda item: -item[1])[:3]
        peak = found.peak_memory_bytes
        result.table(
            f"Whole pipeline, {name}, {key}",
            f"{' and '.join(RECIPES[key])}; {samples} x {length} random tokens in batches of "
            f"{BATCH}, random weights in {str(DTYPE).removeprefix('torch.')}, on {DEVICE}: "
            f"{found.seconds:.1f} s (target {MOST_SECONDS}), "
            f"{found.tokens / found.seconds:,.0f} tokens/s, peak memory {peak / 2**30:.1f} GiB "
            f"(target {MOST_BYTES / 2**30:.0f}). The floor is what the projections' operations "
            f"take at {ceilings.matrix / 1e12:.1f} T/s, the Hessians' at "
            f"{ceilings.gram / 1e12:.1f} T/s "
            f"and the scan's bytes at {ceilings.bandwidth / 1e9:,.0f} GB/s, rates that this "
            "machine reached just before; stages without a number were not counted, and neither "
            "are "
            "norms, convolutions and the solvers. The gap is largest in "
            + ", ".join(f"{what} ({gap:.1f} s)" for what, gap in largest)
            + ".",
            ["modifier", "stage", "seconds", "floor", "times the floor"],
            rows,
        )
        result.numbers["pipeline"][key] = {
            "seconds": found.seconds,
            "peak_memory_bytes": peak,
            "costs": {report["modifier"]: report["cost"] for report in found.reports},
        }

    for key in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            result.case(f"pipeline, {key}", lambda a=key, b=folder: run(a, b))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


# -- growth ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """How much there is to do."""

    samples: int
    length: int
    hidden_size: int
    states: int
    layers: int


FACTORS = (1, 2, 4)
AXES = {
    "samples": "samples",
    "length": "length",
    "D": "hidden_size",
    "N": "states",
    "layers": "layers",
}
GROWTH = {
    "A_log": (ALOG,),
    "projections": (
        "SensitivitySparseGPTModifier: {sparsity: 0.5, solver: sparsegpt, allocation: uniform}",
    ),
}


def growth(result: Result, shapes: dict[str, Shape], quick: bool) -> None:
    """Seconds of a modifier while one thing grows."""
    base = Work(8, 256, 128, STATES, 2) if DEVICE == "cpu" else Work(16, 512, 1024, STATES, 4)
    if quick:
        base = Work(4, 32, 32, 4, 1)
    repeats = 1 if quick else 3
    found: dict[str, dict[str, list[float]]] = {}

    def measure(work: Work, modifiers: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(folder, work.hidden_size, work.layers, work.states, vocabulary=96)
            reports = run_recipe(model, modifiers, work.samples, work.length).reports
        return reports[0]["cost"]["seconds"]["total"]

    def run(what: str, axis: str, field: str) -> None:
        works = [Work(**{**vars(base), field: factor * getattr(base, field)}) for factor in FACTORS]
        times: list[list[float]] = [[] for _ in works]
        measure(works[-1], GROWTH[what])  # compiles kernels
        for _ in range(repeats):
            for work, taken in zip(works, times, strict=True):
                taken.append(measure(work, GROWTH[what]))
        found.setdefault(what, {})[axis] = [statistics.median(taken) for taken in times]

    try:
        for what in GROWTH:
            for axis, field in AXES.items():
                result.case(
                    f"growth of {what} with {axis}",
                    lambda a=what, b=axis, c=field: run(a, b, c),
                )
    finally:
        rows = []
        for what, axes in found.items():
            for axis, taken in axes.items():
                power = math.log(taken[-1] / taken[0]) / math.log(FACTORS[-1] / FACTORS[0])
                base_value = getattr(base, AXES[axis]) * (2 if axis == "D" else 1)
                rows.append(
                    [what, axis, str(base_value), *(f"{t:.3f}" for t in taken), f"{power:.2f}"]
                )
        result.numbers["growth"] = {"base": vars(base), "seconds": found}
        picture = None if quick or not found else plot_growth(found, f"{result.name}_growth.png")
        result.table(
            "Growth",
            f"Seconds of a modifier from the start of calibration to its end, on {DEVICE}, medians "
            f"of {repeats} repeats that took turns; {base}, D = 2 hidden_size, and one of these "
            "times 1, 2 and 4. The power is the slope between the first and the last: 1 is "
            "linear, below 1 a part that does not grow. With D the weights of in_proj and "
            "out_proj, and so a forward pass, grow as D^2, Hessians too, and the solver as D^3. N "
            "reaches "
            "only the scan and x_proj."
            + (f"\n\n![seconds over growth]({picture})" if picture else ""),
            ["what", "grows", "from", *(f"x {factor}" for factor in FACTORS), "power"],
            rows,
        )


def plot_growth(found: dict[str, dict[str, list[float]]], name: str) -> str | None:
    """Draw the table on logarithmic axes; the name of the picture, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(4.5 * max(1, len(found)), 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for panel, (what, axes) in zip(panels, found.items(), strict=False):
        for axis, taken in axes.items():
            panel.plot(FACTORS, [t / taken[0] for t in taken], marker="o", label=axis)
        panel.plot(FACTORS, FACTORS, color="gray", linestyle=":", label="linear")
        panel.set(xscale="log", yscale="log", title=what, xlabel="times as much")
        panel.set_ylabel("times as long")
        panel.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
        panel.minorticks_off()
        panel.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / name, dpi=110)
    return name


SECTIONS: dict[str, Callable[[Result, dict[str, Shape], bool], None]] = {
    "alog": alog,
    "pipeline": pipeline,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, not saved")
    parser.add_argument(
        "--budget", type=float, default=500, help="seconds after which no new case begins"
    )
    parser.add_argument("--memory", type=float, help="GiB of the GPU's that may be used")
    parser.add_argument("--name", default=f"speed_{DEVICE}", help="of the result files")
    options = parser.parse_args()
    if options.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / total)
    shapes = QUICK_SHAPES if options.quick else {name: SHAPES[name] for name in options.shapes}
    result = Result(options.budget, options.name)
    load = os.getloadavg()[0]
    try:
        for name in options.sections:
            result.section(name, lambda r, name=name: SECTIONS[name](r, shapes, options.quick))
    finally:  # an interrupt does not lose what is done
        if not options.quick:
            title = f"# Speed of pruning\n\nLoad of the machine before: {load:.1f}."
            failures = [f"- {name}: {text}" for name, text in result.failures.items()]
            missing = ["## Not measured\n\n" + "\n".join(failures)] if failures else []
            save(
                options.name,
                "\n\n".join([title, *result.parts, *missing]),
                {**result.numbers, "load": load, "failures": result.failures},
            )
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
