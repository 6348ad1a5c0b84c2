"""Perplexity after pruning all weights by gradient, training-free and tuned, and by component.

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this experiment calibrates on; ``development``
evaluates on these.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from harness import Experiment, Job, Row, joined, load, not_measured, section
from measuring import (
    TEXTS,
    Checkpoint,
    OfTexts,
    add_run,
    mean_and_spread,
    recipe,
    row_of,
)
from pydantic import Field
from torch import Tensor

from sparsessm_plugin.criteria.importance import choose_pruned, importance
from sparsessm_plugin.families import MixerAdapter, find_mixers, get_tensor
from sparsessm_plugin.methods.gradient import tuned_parameters
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.gradients import mean_gradients
from sparsessm_plugin.training.tuner import Tuner

METHODS = {
    "magnitude, per layer": "saliency: magnitude, scope: per_layer",
    "magnitude, global": "saliency: magnitude",
    "gradient, per layer": "scope: per_layer",
    "gradient, per kind": "scope: per_kind",
    "gradient, global, 1 round": "rounds: 1",
    "mean gradient, global": "saliency: weight_x_gradient",
    "gradient, global": "",
}
TUNED = {
    "tuned, magnitude, global": "saliency: magnitude",
    "tuned, 1 round": "rounds: 1",
    "tuned, 8 rounds": "rounds: 8",
    "tuned to the dense model, 1 round": "rounds: 1, distill_loss: dense",
    "tuned to the dense model, 8 rounds": "rounds: 8, distill_loss: dense",
}
PROBE_STEPS = 6


class Fields(OfTexts):
    """And the sections, the gradients and the steps."""

    sections: list[str] = Field(["prune", "tune", "components"], description="in this order")
    methods: list[str] = Field(list(METHODS), description="training-free")
    tuned: list[str] = Field(list(TUNED), description="with steps")
    fields: str = Field("", description="further fields of the modifier, as YAML")
    sparsity: float = Field(0.7, description="share of all weights")
    component_sparsity: float = Field(0.8, description="share of one component")
    windows: int = Field(128, description="windows for the gradients")
    batch_size: int = Field(8, description="windows")
    tune_seconds: float = Field(240, description="of gradient steps a run")
    tune_steps: int | None = Field(None, description="steps a round, instead")
    tune_windows: int = Field(32, description="for the gradients of a round")
    tune_seeds: int = Field(1, description="draws where tuned")
    evaluate_batch_size: int = Field(4, description="windows of evaluation")
    development: bool = Field(False, description="evaluate on the end of the calibration text")


def run(job: Job) -> Iterator[Any]:
    """All sections of all models."""
    for name in job.configuration.models:
        one = Run(name, job)
        yield f"{name} dense {one.dense}"
        for kind in job.configuration.sections:
            yield from SECTIONS[kind](one)


class Run(Checkpoint):
    """One model and its dense perplexity."""

    def __init__(self, name: str, job: Job):
        super().__init__(name, job.configuration, job.configuration.evaluate_batch_size)
        self.job = job
        every = job.numbers.setdefault("dense", {})
        self.dense = every.get(name) or self.evaluate(self.source.load())
        every[name] = self.dense
        job.numbers.setdefault("tokens", {})[name] = self.samples.numel()

    def rows(self, methods: dict[str, str], seeds: int, count: int) -> Iterator[Any]:
        """A run a method and seed.

        :param methods: fields of the modifier by name
        :param count: calibration windows
        """
        rows: list[Row] = self.job.numbers.setdefault("rows", [])
        for seed in range(seeds):
            for method, fields in methods.items():
                if seed and "magnitude" in method and "distill_steps" not in fields:
                    continue  # which looks at no data
                row = row_of(rows, {"model": self.name, "method": method}, self.tests)
                label = f"{self.name}, {method}, seed {seed}"
                if seed in row["seeds"] or not self.job.in_time(label):
                    continue
                with self.job.case(label):
                    self.add(row, fields, count, seed)
                    yield f"{label} {row}"

    def add(self, row: Row, fields: str, count: int, seed: int) -> None:
        """One run, added to its row."""
        given = [f"sparsity: {self.chosen.sparsity}", fields, self.chosen.fields]
        built = recipe("GradientMagnitudeModifier", ", ".join(filter(None, given)))
        pruned = self.prune(built, count, seed)
        add_run(row, self.evaluate(pruned.model), pruned.seconds, seed)
        settings = pruned.reports[0]["settings"]
        if settings["distill_steps"]:
            steps = settings["rounds"] * settings["distill_steps"]
            row.setdefault("steps", []).append(steps)
        row["layers"] = by_kind(pruned.reports[0]["layers"])


def by_kind(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Share of zeros of each kind of weight."""
    kinds = dict.fromkeys(layer["kind"] for layer in layers)
    return {
        kind: sum(x["pruned"] for x in layers if x["kind"] == kind)
        / sum(x["entries"] for x in layers if x["kind"] == kind)
        for kind in kinds
    }


# -- sections ----------------------------------------------------------------------------


def training_free(one: Run) -> Iterator[Any]:
    """Methods that look at gradients, or at none."""
    methods = {method: METHODS[method] for method in one.chosen.methods}
    yield from one.rows(methods, one.chosen.seeds, one.chosen.windows)


def tuned(one: Run) -> Iterator[Any]:
    """All calibration text is tuned on, gradients come from a little of it in each round."""
    chosen = one.chosen
    batches = -(-chosen.tune_windows // chosen.batch_size)
    seconds = 0.0 if chosen.tune_steps else seconds_a_step(one)
    methods = {}
    for method in chosen.tuned:
        rounds = 1 if "1 round" in method else 8
        steps = chosen.tune_steps or max(1, int(chosen.tune_seconds / seconds / rounds))
        methods[method] = f"{TUNED[method]}, distill_steps: {steps}, calibration_batches: {batches}"
    yield from one.rows(methods, chosen.tune_seeds, len(one.samples))


def seconds_a_step(one: Run) -> float:
    """By a trial."""
    model: Any = one.source.load()
    batches = list(one.loader(PROBE_STEPS * one.chosen.batch_size, 0))
    tuner = Tuner(model, tuned_parameters(model), batches, Plan(2 * PROBE_STEPS, 0.0, 1e-6))
    tuner.run({}, 1, 2)  # compiles, allocates
    before = tuner.budget.seconds
    tuner.run({}, 2, 2)
    return (tuner.budget.seconds - before) / PROBE_STEPS


def components(one: Run) -> Iterator[Any]:
    """Prune one component of all mixers and nothing else."""
    model: Any = one.source.load()
    parts = component_parts(find_mixers(model))
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(parameter is part for rows in parts.values() for part, _ in rows)
    }
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    numbers: list[Row] = one.job.numbers.setdefault("components", [])
    measured = {row["component"] for row in numbers if row["model"] == one.name}
    left = {component: rows for component, rows in parts.items() if component not in measured}
    if left:
        batches = list(one.loader(one.chosen.windows, 0))
        gradients, _ = mean_gradients(model, batches, parameters, of_samples=True)
    for component, rows in left.items():
        if not one.job.in_time(component):
            continue
        entries = sum(part.detach()[where].numel() for part, where in rows)
        row: Row = {"model": one.name, "component": component, "entries": entries}
        for kind in ("gradient", "magnitude"):
            scores = {
                str(i): importance(
                    part.detach()[where],
                    gradients[by_identity[id(part)]][where] if kind == "gradient" else None,
                )
                for i, (part, where) in enumerate(rows)
            }
            masks = choose_pruned(scores, one.chosen.component_sparsity, min_keep=0.01)
            before = [part.detach().clone() for part, _ in rows]
            with torch.no_grad():
                for (part, where), mask in zip(rows, masks.values(), strict=True):
                    part[where] = part[where].masked_fill(mask, 0.0)
                row[kind] = one.evaluate(model)
                for (part, _), value in zip(rows, before, strict=True):
                    part.copy_(value)
        numbers.append(row)
        yield row


def component_parts(adapters: list[MixerAdapter]) -> dict[str, list[tuple[Any, slice]]]:
    """By component, every tensor that it has a part of, and which rows."""
    parts: dict[str, list[tuple[Any, slice]]] = {}

    def add(component: str, tensor: Tensor | None, rows: slice = slice(None)) -> None:
        if tensor is not None:
            parts.setdefault(component, []).append((tensor, rows))

    for adapter in adapters:
        mixer = adapter.mixer
        add("A_log", adapter.A_log)
        add("D", mixer.D)
        B, C = adapter.state_rows
        count = adapter.axis_length("state")
        for kind in adapter.projections:
            add(kind, get_tensor(mixer, f"{kind}.weight"))
        holder = B.tensor.partition(".")[0]
        for letter, axis in (("B", B), ("C", C)):
            rows = slice(axis.start, axis.start + count)
            add(f"{letter} rows of {holder}", get_tensor(mixer, axis.tensor), rows)
        if adapter.has_state_transitions:  # dt's rows come first; in Mamba-2 they come last
            rows = slice(0, B.start)
        else:
            rows = slice(C.start + count, None)
        add(f"dt rows of {holder}", get_tensor(mixer, B.tensor), rows)
    return parts


SECTIONS = {"prune": training_free, "tune": tuned, "components": components}


# -- tables --------------------------------------------------------------------------------


def dense_of(numbers: dict[str, Any], model: str) -> dict[str, float]:
    """Perplexities of the dense model, of an older file those of another experiment."""
    if "dense" in numbers:
        return numbers["dense"][model]
    row = load(f"whole_model_quality_{model}")["rows"][0]
    return {kind: row[kind][0] for kind in TEXTS}


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """Training-free, tuned and by component, a table each and model."""
    parts = []
    rows = [row for row in numbers.get("rows", []) if row["seeds"]]
    for model in dict.fromkeys(row["model"] for row in [*rows, *numbers.get("components", [])]):
        dense = dense_of(numbers, model)

        def ratio(kind: str, values: list[float], dense: dict[str, float] = dense) -> str:
            return f"{mean_and_spread(values)} ({statistics.mean(values) / dense[kind]:.3f})"

        for names, how in ((METHODS, "training-free"), (TUNED, "tuned")):
            own = [row for row in rows if row["model"] == model and row["method"] in names]
            if not own:
                continue
            stepped = any("steps" in row for row in own)
            head = ["model", "method", *dense, "seeds", "seconds", *["steps"] * stepped]
            whole = [model, "dense", *(f"{value:.2f}" for value in dense.values())]
            lines = [whole + [""] * (len(head) - len(whole))]
            for row in own:
                cells = [model, row["method"], *(ratio(kind, row[kind]) for kind in dense)]
                cells += [str(len(row["seconds"])), f"{statistics.mean(row['seconds']):.1f}"]
                steps = ", ".join(f"{steps:,}" for steps in row.get("steps", []))
                lines.append([*cells, *[steps] * stepped])
            title = f"{model}: {chosen.sparsity:.0%} of all weights, {how}"
            parts.append(section(title, about(how, numbers, chosen, model), head, lines))
        lines = [
            [model, row["component"], f"{row['entries']:,}"]
            + [
                ratio(text, [row[kind][text]])
                for kind in ("gradient", "magnitude")
                for text in dense
            ]
            for row in numbers.get("components", [])
            if row["model"] == model
        ]
        if lines:
            head = [f"{kind}: {text}" for kind in ("gradient", "magnitude") for text in dense]
            parts.append(
                section(
                    f"{model}: {chosen.component_sparsity:.0%} of one component alone",
                    "Perplexity, in brackets its ratio to the dense one; one threshold over all "
                    "layers, one round, nothing tuned.",
                    ["model", "component", "entries", *head],
                    lines,
                )
            )
    return joined(*parts, not_measured(numbers))


def about(how: str, numbers: dict[str, Any], chosen: Fields, model: str) -> str:
    """What a table shows."""
    if how == "training-free":
        return (
            f"Perplexity, mean of the seeds ± half of (highest - lowest), in brackets its ratio to "
            f"the dense one. Gradients of {chosen.windows} x {chosen.length} tokens of the corpus."
        )
    tokens = numbers.get("tokens", {}).get(model, "all")
    return (
        f"Steps of {chosen.batch_size} x {chosen.length} tokens, as many as fit into "
        f"{chosen.tune_seconds:.0f} s by a trial before, over {tokens} tokens of the corpus; "
        f"gradients of {chosen.tune_windows} windows a round. Seconds: the whole oneshot() call."
    )


LONG = "tuned to the dense model, 8 rounds"
OF_STEPS = {"sections": ["tune"], "fields": "distill_learning_rate: 5e-4"}
ON_CPU = {  # of a few windows, one draw
    "models": ["granite-hybrid-16m"],
    "sections": ["prune"],
    "seeds": 1,
    "windows": 16,
    "length": 256,
    "evaluate_windows": 16,
    "methods": [
        name for name in METHODS if name not in ("gradient, per kind", "mean gradient, global")
    ],
}
EXPERIMENT = Experiment(
    measures="perplexity with zeros in all weights by gradient, and in one component",
    device="CPU or GPU",
    seconds=1500,
    subjects="mamba-25m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "gradient_quality": {"sections": ["prune", "components"]},
        "gradient_quality_tuned": {
            **OF_STEPS,
            "tuned": [LONG],
            "tune_seconds": 220,
            "tune_seeds": 2,
        },
        "gradient_quality_tuned_short": {
            **OF_STEPS,
            "tuned": [LONG, "tuned, 8 rounds", "tuned to the dense model, 1 round"],
            "tune_seconds": 60,
        },
        "gradient_quality_granite-hybrid-16m_cpu": ON_CPU,
        "gradient_quality_granite-hybrid-16m_cpu_50": {**ON_CPU, "sparsity": 0.5},
    },
    quick={
        "": {
            "models": ["mamba-6m"],
            "sections": ["prune"],
            "methods": ["magnitude, global", "gradient, global, 1 round"],
            "seeds": 1,
            "windows": 8,
            "length": 256,
            "evaluate": 256,
            "evaluate_windows": 8,
            "development": True,
        }
    },
    extends=("models", "sections", "methods", "tuned", "seeds", "tune_seeds"),
)
