"""How fast pruning is, as ratios of what took turns in one run.

alog       the A_log stage against the loop that SparseSSM's authors published
pipeline   A_log and all projections of a 2.8B shape, 64 x 2048 tokens, beside the floor; CUDA
growth     seconds over samples, length, D, N and layers
"""

import gc
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Configuration, Experiment, Job, joined, not_measured, section
from llmcompressor import active_session
from pydantic import Field
from timing import random_model, seconds_of
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from sparsessm_plugin.backends.products import project
from sparsessm_plugin.criteria import SALIENCIES, SaliencyInputs, Unstructured, aggregate
from sparsessm_plugin.evaluation.data import calibration_loader
from sparsessm_plugin.families import MixerAdapter, get_adapter, read_out
from sparsessm_plugin.methods.projections.dense import tokens_for
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
TINY_SHAPES = {"tiny": Shape(32, 2)}


# -- A_log stage -------------------------------------------------------------------------------


SPARSITY = 0.5
HESSIAN = ("hessian", "frequency")
LENGTH, SAMPLES, BATCH = 2048, 32, 4


def make_mixer(hidden_size: int, states: int = STATES) -> MixerAdapter:
    """One random mixer, made on the device itself."""
    config = MambaConfig(hidden_size=hidden_size, state_size=states, num_hidden_layers=1)
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


CONTENDERS = {"same criterion": HESSIAN, "default": ("output_error", "mean")}


@torch.no_grad()
def alog(job: Job) -> Iterator[Any]:
    """The A_log stage: a mixer's statistics and the choice of what is pruned."""
    chosen: Fields = job.configuration
    length, batch = chosen.length, 1 if DEVICE == "cpu" else BATCH
    numbers = job.numbers.setdefault("alog", {})
    for name, shape in job.cases("alog", chosen.sizes.items()):
        if name not in numbers:
            with job.case(f"A_log stage, {name}"):
                numbers[name] = alog_of(shape, length, batch, chosen.steps, chosen.repeats)
            yield f"A_log stage, {name}"


def alog_of(shape: Shape, length: int, batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of the loop and of this package, which take turns, and how far they agree."""
    adapter = make_mixer(shape.hidden_size)
    samples = torch.randn(batch, length, shape.hidden_size, device=DEVICE, dtype=DTYPE)
    short = samples[:, : min(64, length)]
    agreed = float(
        (
            select(adapter, observe(adapter, [short], *HESSIAN), *HESSIAN)
            & loop_select(adapter, loop_observe(adapter, short, short.shape[1]))
        ).sum()
    ) / round(SPARSITY * adapter.A_log.numel())

    def loop_once(steps: int) -> StageTimes:
        kept: list[Tensor] = []
        observed = seconds_of(lambda: kept.append(loop_observe(adapter, samples[:1], steps)))
        selected = seconds_of(lambda: loop_select(adapter, kept[0]))
        return StageTimes(observed * length / steps, selected * length / steps)

    def ours_once(key: str) -> StageTimes:
        kept: list[Any] = []
        criterion = CONTENDERS[key]
        observed = seconds_of(lambda: kept.append(observe(adapter, [samples], *criterion)))
        selected = seconds_of(lambda: select(adapter, kept[0], *criterion))
        return StageTimes(observed / len(samples), selected)

    loop: list[StageTimes] = []
    ours: dict[str, list[StageTimes]] = {key: [] for key in CONTENDERS}
    loop_once(min(8, steps))  # compile and warm up
    for key in CONTENDERS:
        ours_once(key)
    for _ in range(repeats):
        loop.append(loop_once(steps))
        for key in CONTENDERS:
            ours[key].append(ours_once(key))
    found: dict[str, Any] = {"agreement": agreed, "loop": [vars(times) for times in loop]}
    for key, own in ours.items():
        pairs = zip(loop, own, strict=True)
        ratios = [a.stage(shape.layers) / b.stage(shape.layers) for a, b in pairs]
        found[key] = {"seconds": [vars(times) for times in own], "ratios": ratios}
    return found


def render_alog(numbers: dict[str, Any], chosen: "Fields", device: str) -> str:
    """A row a shape."""
    lines = []
    for name, own in numbers.items():
        layers = chosen.sizes_of_all[name].layers

        def median(times: list[Any], layers: int = layers) -> float:
            return statistics.median(StageTimes(**one).stage(layers) for one in times)

        cells = [name, f"{median(own['loop']):,.1f}"]
        for key in CONTENDERS:
            ratios = own[key]["ratios"]
            cells += [
                f"{median(own[key]['seconds']):,.2f}",
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})",
            ]
        lines.append([*cells, f"{own['agreement']:.1%}"])
    batch = 1 if device == "cpu" else BATCH
    return section(
        "A_log stage against the published loop",
        f"Seconds to choose {SPARSITY:.0%} of A_log in all layers from {SAMPLES} x {chosen.length} "
        f"tokens, without the rest of the model, on {device}, random weights, N = {STATES}. "
        "The loop is a reimplementation in our own words of what SparseSSM's authors "
        "published: samples and time steps one by one, the lowest half of all entries looked "
        "for at every step; its second pass, which hands the pruned layer's output on, is left "
        "out. The loop calls torch for each of transformers' steps, none of this package's "
        "kernels: on a CPU its products run in the library that torch chooses, those of this "
        "package in oneDNN where the processor is AMD's. "
        f"Timed were one layer, of the loop one sample and the first {chosen.steps} steps, of this "
        f"package a batch of {batch} samples; the seconds are these, multiplied: both grow "
        "linearly with layers, samples and steps. Same criterion: A_log^2 S_t with frequency, "
        "as the loop; default: output_error, a second recurrence beside the first. Medians "
        "of repeats that took turns, with the range of the ratio. Last, the share "
        "of the entries pruned by the loop that are also pruned here, from "
        f"{batch} x {min(64, chosen.length)} tokens.",
        ["shape", "loop", "same criterion", "ratio", "default", "ratio", "same entries"],
        lines,
    )


# -- whole pipeline ----------------------------------------------------------------------------


ALOG = "SparseSSMModifier: {sparsity: 0.5}"
RECIPES = {
    "sparsegpt": (ALOG, "SensitivitySparseGPTModifier: {sparsity: 0.5, solver: sparsegpt}"),
    "defaults": (ALOG, "SensitivitySparseGPTModifier: {sparsity: 0.5}"),
    "uniform": (
        ALOG,
        "SensitivitySparseGPTModifier: "
        "{sparsity: 0.5, solver: sparsegpt, allocation: uniform, target_output: own}",
    ),
}
PIPELINE_SAMPLES, MOST_BYTES = 64, 24 * 2**30
MOST_SECONDS = {"sparsegpt": 30, "defaults": 40}
MOST_TIMES = 2.5  # that the defaults take of uniform SparseGPT's seconds


def make_model(
    folder: str, hidden_size: int, layers: int, states: int = STATES, vocabulary: int = 50280
) -> Any:
    """A random model, made on the device itself."""
    config = MambaConfig(
        vocab_size=vocabulary, hidden_size=hidden_size, state_size=states, num_hidden_layers=layers
    )
    model = random_model(config, DEVICE)
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
            return min(seconds_of(work) for _ in range(5))

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
    :param studied: share of the tokens that sparsities follow from
    """

    forward: float
    scan: float
    hessians: float
    crosses: float
    studied: float = 1.0

    @classmethod
    def of(cls, shape: Shape, tokens: int, ceilings: Ceilings) -> "Floor":
        hidden, D, N = shape.hidden_size, 2 * shape.hidden_size, STATES
        # x_proj and out_proj, dt_proj; those of conv1d are tiny
        beside_in_proj = 2 * D**2 + rank(hidden) ** 2
        each = shape.layers * tokens
        return cls(
            forward=2 * each * sum(weights(shape)) / ceilings.matrix,
            scan=each * (DTYPE.itemsize * (3 * D + 2 * N) + 4 * D) / ceilings.bandwidth,
            hessians=2 * each * (beside_in_proj + hidden**2) / ceilings.gram,
            crosses=2 * each * beside_in_proj / ceilings.gram,
            studied=min(1.0, tokens_for(D) / tokens),
        )

    def stages(self, shape: Shape) -> dict[tuple[str, str], float]:
        """By modifier and stage; what is not here has no floor that was counted.

        A stage that observes a mixer runs all of it but out_proj, which the forward pass does; then
        the pruned layer runs once more. To gather sums, the pruned mixer runs.
        """
        before, last = (part / sum(weights(shape)) * self.forward for part in weights(shape))
        observe, run = before + self.scan, self.forward + self.scan
        return {
            ("SparseSSMModifier", "forward"): last + run,
            ("SparseSSMModifier", "observe"): observe,
            ("SensitivitySparseGPTModifier", "first_pass"): self.studied * (run + self.hessians),
            ("SensitivitySparseGPTModifier", "observe"): observe,
            ("SensitivitySparseGPTModifier", "gather"): self.hessians + self.crosses + observe,
            ("SensitivitySparseGPTModifier", "forward"): last + run,
        }


def rank(hidden_size: int) -> int:
    """R, as transformers' configuration has it."""
    return math.ceil(hidden_size / 16)


def weights(shape: Shape) -> tuple[int, int]:
    """Entries of in_proj, x_proj and dt_proj, and those of out_proj."""
    hidden, D, R = shape.hidden_size, 2 * shape.hidden_size, rank(shape.hidden_size)
    return hidden * 2 * D + D * (R + 2 * STATES) + R * D, D * hidden


def pipeline(job: Job) -> Iterator[Any]:
    """A_log and all projections, through oneshot(), with the time by stage."""
    chosen: Fields = job.configuration
    if DEVICE == "cpu" and not chosen.tiny:
        job.note("pipeline", "needs a CUDA device")
        return
    shape = list(chosen.sizes.values())[-1]
    samples, vocabulary = chosen.pipeline_samples, 96 if chosen.tiny else 50280
    size, tokens = (64, 256) if chosen.tiny else (8192, 16384)
    ceilings = Ceilings.measure(size, tokens)
    floor = Floor.of(shape, samples * chosen.length, ceilings)
    numbers = {"ceilings": vars(ceilings), "floor": vars(floor)}
    job.numbers["pipeline"] = numbers

    def measure(modifiers: tuple[str, ...]) -> dict[str, Any]:
        """Numbers alone are returned: a pruned model would count for the memory of the next."""
        with tempfile.TemporaryDirectory() as folder:
            warm = make_model(folder, shape.hidden_size, 1, vocabulary=vocabulary)
            run_recipe(warm, modifiers, BATCH, chosen.length)  # compiles and tunes kernels
            del warm
            active_session().reset()  # which holds it
            gc.collect()
            model = make_model(folder, shape.hidden_size, shape.layers, vocabulary=vocabulary)
            found = run_recipe(model, modifiers, samples, chosen.length)
        active_session().reset()
        return {
            "seconds": found.seconds,
            "peak_memory_bytes": found.peak_memory_bytes,
            "costs": {report["modifier"]: report["cost"] for report in found.reports},
        }

    for key in job.cases("pipeline", RECIPES):
        gc.collect()
        with job.case(f"pipeline, {key}"):
            numbers[key] = measure(RECIPES[key])
        yield f"pipeline, {key}"


def render_pipeline(numbers: dict[str, Any], chosen: "Fields", device: str) -> str:
    """A table a recipe, a row a modifier and stage."""
    shape = list(chosen.sizes.values())[-1]
    ceilings, floors = Ceilings(**numbers["ceilings"]), Floor(**numbers["floor"]).stages(shape)
    least, parts = sum(floors.values()), []
    for key in RECIPES:
        if key not in numbers:
            continue
        own = numbers[key]
        lines: list[list[str]] = []
        gaps: dict[str, float] = {}
        for modifier, cost in own["costs"].items():
            for stage, took in cost["seconds"].items():
                if stage == "total":
                    continue
                bound = floors.get((modifier, stage))
                times = ["", ""] if bound is None else [f"{bound:.3f}", f"{took / bound:.1f}"]
                lines.append([modifier, stage, f"{took:.2f}", *times])
                gaps[f"{stage} of {modifier}"] = took - (bound or 0.0)
        beside = own["seconds"] - sum(cost["seconds"]["total"] for cost in own["costs"].values())
        gaps["what oneshot() does beside the modifiers"] = beside
        lines.append(["oneshot()", "all else", f"{beside:.2f}", "", ""])
        whole = own["seconds"]
        lines.append(["all", "", f"{whole:.2f}", f"{least:.3f}", f"{whole / least:.1f}"])
        largest = sorted(gaps.items(), key=lambda item: -item[1])[:3]
        tokens = chosen.pipeline_samples * chosen.length
        dtype = "bfloat16" if device == "cuda" else "float32"
        text = (
            f"{' and '.join(RECIPES[key])}; {chosen.pipeline_samples} x {chosen.length} random "
            f"tokens in batches of {BATCH}, random weights in {dtype}, on {device}: "
            f"{whole:.1f} s{_target(numbers, key)}, {tokens / whole:,.0f} tokens/s, "
            f"peak memory {own['peak_memory_bytes'] / 2**30:.1f} GiB "
            f"(target {MOST_BYTES / 2**30:.0f}). The floor is what the projections' operations "
            f"take at {ceilings.matrix / 1e12:.1f} T/s, "
            f"the Hessians' at {ceilings.gram / 1e12:.1f} T/s and the scan's bytes at "
            f"{ceilings.bandwidth / 1e9:,.0f} GB/s, rates that this machine reached just before; "
            "stages without a number were not counted, and neither are norms, convolutions and "
            "the solvers. The gap is largest in "
            + ", ".join(f"{what} ({gap:.1f} s)" for what, gap in largest)
            + "."
        )
        title = f"Whole pipeline, {list(chosen.sizes)[-1]}, {key}"
        head = ["modifier", "stage", "seconds", "floor", "times the floor"]
        parts.append(section(title, text, head, lines))
    return joined(*parts)


def _target(numbers: dict[str, Any], key: str) -> str:
    """What the seconds of a recipe should be, and what they are of uniform SparseGPT's."""
    if key not in MOST_SECONDS:
        return ""
    found = f"target {MOST_SECONDS[key]}"
    if key == "defaults" and "uniform" in numbers:
        times = numbers[key]["seconds"] / numbers["uniform"]["seconds"]
        found += f"; {times:.1f} times uniform SparseGPT's, target {MOST_TIMES}"
    return f" ({found})"


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


def growth(job: Job) -> Iterator[Any]:
    """Seconds of a modifier while one thing grows."""
    chosen: Fields = job.configuration
    base = Work(8, 256, 128, STATES, 2) if DEVICE == "cpu" else Work(16, 512, 1024, STATES, 4)
    if chosen.tiny:
        base = Work(4, 32, 32, 4, 1)
    found: dict[str, dict[str, list[float]]] = {}
    job.numbers["growth"] = {"base": vars(base), "seconds": found}

    def measure(work: Work, modifiers: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(folder, work.hidden_size, work.layers, work.states, vocabulary=96)
            reports = run_recipe(model, modifiers, work.samples, work.length).reports
        return reports[0]["cost"]["seconds"]["total"]

    for what, axis in job.cases("growth", [(what, axis) for what in GROWTH for axis in AXES]):
        field = AXES[axis]
        works = [Work(**{**vars(base), field: factor * getattr(base, field)}) for factor in FACTORS]
        with job.case(f"growth of {what} with {axis}"):
            measure(works[-1], GROWTH[what])  # compiles kernels
            times = [[measure(work, GROWTH[what]) for work in works] for _ in range(chosen.repeats)]
            medians = [statistics.median(taken) for taken in zip(*times, strict=True)]
            found.setdefault(what, {})[axis] = medians
        yield f"growth of {what} with {axis}"


def power(taken: list[float]) -> float:
    """Slope between the first and the last on logarithmic axes: 1 is linear."""
    return math.log(taken[-1] / taken[0]) / math.log(FACTORS[-1] / FACTORS[0])


def render_growth(numbers: dict[str, Any], chosen: "Fields", device: str) -> str:
    """A row a modifier and what grows."""
    base = Work(**numbers["base"])
    lines = []
    for what, axes in numbers["seconds"].items():
        for axis, taken in axes.items():
            value = getattr(base, AXES[axis]) * (2 if axis == "D" else 1)
            times = (f"{t:.3f}" for t in taken)
            lines.append([what, axis, str(value), *times, f"{power(taken):.2f}"])
    return section(
        "Growth",
        f"Seconds of a modifier from the start of calibration to its end, on {device}, medians "
        f"of repeats that took turns; {base}, D = 2 hidden_size, and one of these "
        "times 1, 2 and 4. The power is the slope between the first and the last: 1 is "
        "linear, below 1 a part that does not grow. With D the weights of in_proj and "
        "out_proj, and so a forward pass, grow as D^2, Hessians too, and the solver as D^3. N "
        "reaches only the scan and x_proj.",
        ["what", "grows", "from", *(f"x {factor}" for factor in FACTORS), "power"],
        lines,
    )


SECTIONS = {"alog": alog, "pipeline": pipeline, "growth": growth}
RENDER = {"alog": render_alog, "pipeline": render_pipeline, "growth": render_growth}


class Fields(Configuration):
    """Sections and shapes."""

    sections: list[str] = Field(list(SECTIONS), description="in this order")
    shapes: list[str] = Field(list(SHAPES), description="of the A_log stage; the pipeline's last")
    repeats: int = Field(3, description="that take turns")
    tiny: bool = Field(False, description="the logic only")

    @property
    def sizes(self) -> dict[str, Shape]:
        return TINY_SHAPES if self.tiny else {name: SHAPES[name] for name in self.shapes}

    @property
    def sizes_of_all(self) -> dict[str, Shape]:
        return TINY_SHAPES | SHAPES

    @property
    def length(self) -> int:
        return 64 if self.tiny else LENGTH

    @property
    def steps(self) -> int:
        """Of the loop: one costs the same wherever it stands in the sequence."""
        return self.length if self.tiny else 256

    @property
    def pipeline_samples(self) -> int:
        return 8 if self.tiny else PIPELINE_SAMPLES


def run(job: Job) -> Iterator[Any]:
    """The sections."""
    job.numbers["load"] = os.getloadavg()[0]
    for name in job.configuration.sections:
        yield from SECTIONS[name](job)


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """The tables of the sections."""
    device = "cpu" if "CPU" in numbers["versions"]["device"] else "cuda"
    parts = [
        make(numbers[name], chosen, device) for name, make in RENDER.items() if name in numbers
    ]
    title = f"# Speed of pruning\n\nLoad of the machine before: {numbers['load']:.1f}."
    return joined(title, *parts, not_measured(numbers))


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """Of the A_log stage, how many times as fast as the loop; of growth, the powers."""
    found = {
        f"A_log of {name}, {key}, times as fast as the loop": statistics.median(own[key]["ratios"])
        for name, own in numbers.get("alog", {}).items()
        for key in CONTENDERS
    }
    for what, axes in numbers.get("growth", {}).get("seconds", {}).items():
        for axis, taken in axes.items():
            found[f"growth of {what} with {axis}, power"] = power(taken)
    return found


OF_CPU = {"sections": ["alog", "growth"], "shapes": ["25M", "130M", "370M"]}
EXPERIMENT = Experiment(
    measures="how fast pruning is: A_log against the published loop, a pipeline, growth",
    device="CPU or GPU",
    seconds=500,
    subjects="Mamba shapes of 25M to 2.8B",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "speed_gpu": {"sections": ["alog"]},
        "speed_gpu_growth": {"sections": ["growth"]},
        "speed_pipeline": {"sections": ["pipeline"]},
        "speed_cpu": OF_CPU,
    },
    quick={"speed_cpu": {**OF_CPU, "repeats": 1}},
    ratios=ratios,
    extends=("sections", "shapes"),
)
