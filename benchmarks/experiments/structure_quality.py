"""Perplexity and BLiMP of models with fewer layers, channels, states or a narrower stream.

Every row reaches the same share of the parameters, as near as the sizes of its axis come; the
share that it has is a column. Rows come in the order of their worth: the mix that a fit finds and
then the single axes after the longest distillation, all without any, the shorter distillations,
and what they are compared with. Processes that share a machine take their own with ``--part i/n``
or ``--rows`` and a name each, and ``--merge`` puts these together. A mix is sought once for each
model and share; what was found is kept beside the results. Nothing here was tuned on the texts that
are reported: settings were chosen on the last windows of the calibration file, which no run of this
experiment reads.
"""

import copy
import json
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import harness
import yaml
from harness import Experiment, Job, Row, assets, first_line, joined, markdown
from measuring import TEXTS, Checkpoint, OfTexts, add_run, mean_and_range, relative, row_of
from pydantic import Field

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.files import write_json
from sparsessm_plugin.fitting import FitSettings, Prepared, make_plan, split
from sparsessm_plugin.fitting.axes import AXES, in_order
from sparsessm_plugin.fitting.losses import HeldBack, distillation_fields
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import parse_targets
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.training.memory import needed

TASK = "blimp_local"
MEASURED = (*TEXTS, "blimp")
NOTED = ("parameters", "steps", "passes", "divergence")
# Axis of the package, and fields of its modifier; what this package does comes first, the others
# are to compare with.
WRITTEN = "distill_generated: {generated}"
ADAM = "distill_optimizer: adam, distill_learning_rate: 0.001"  # what was the default once
DISTILLED = {"generated text": WRITTEN, "Adam": ADAM, "generated text, Adam": f"{WRITTEN}, {ADAM}"}


def with_distilled(method: str) -> dict[str, str]:
    """A method, and what its distillation may be beside the default."""
    return {method: ""} | {f"{method}, {name}": fields for name, fields in DISTILLED.items()}


METHODS: dict[str, dict[str, str]] = {
    "mix": with_distilled("fit"),
    "layers": {
        **with_distilled("loss after the fit"),
        "loss after the fit, 600 steps a layer": "reconstruct_steps: 600",
        "perplexity, greedy, nothing fitted": "saliency: perplexity, compensate: none",
        "block influence, nothing fitted": "saliency: block_influence, compensate: none",
        "random, nothing fitted": "saliency: random, seed: {seed}, compensate: none",
    },
    "hidden": {
        **with_distilled("output energy"),
        "magnitude": "saliency: magnitude",
        "magnitude, nothing fitted": "saliency: magnitude, compensate: none",
    },
    "channels": {
        "output energy": "",
        "magnitude, nothing fitted": "saliency: magnitude, compensate: none",
    },
    "mlp": {"output energy": ""},
    "states": {"output energy": ""},
}
DATA_FREE = ("magnitude, nothing fitted",)
WHOLE = ("layers", "hidden", "mlp")  # whose modifiers distil all of the model unless told otherwise
NEAR = 0.06  # how far a share may be from the one asked for


class Fields(OfTexts):
    """And the rows and the fit."""

    batch_size: int = Field(32, description="windows")
    shares: list[float] = Field([0.75, 0.5], description="of the parameters")
    minutes: list[float] = Field([0, 1, 3], description="of distillation")
    rows: list[str] = Field([], description="axes, or 'axis: method'; default all")
    distill_windows: int | None = Field(None, description="that are distilled; default all")
    generated: int = Field(
        1_150_000, description="tokens that the dense model writes, where it does; as many as given"
    )
    rate: float | None = Field(None, description="learning rate of distillation; else the default")
    weights: str = Field("auto", description="distill_weights")
    fit_minutes: float | None = Field(
        None, description="whose half a mix is sought for; default 1 on a GPU, 5"
    )
    search_tokens: int | None = Field(None, description="that a trial of the search fits by")
    tasks: bool = Field(False, description="BLiMP, too")
    limit: int | None = Field(None, description="sentences a paradigm of BLiMP")


def run(job: Job) -> Iterator[Any]:
    """The rows of all models, by their worth."""
    job.numbers.setdefault("rows", [])
    job.numbers.setdefault("failed", {})
    runs = []
    for name in job.configuration.models:
        runs.append(Run(name, job))
        yield f"{name} dense"
    for wanted in wanted_rows(job.configuration):
        for one in runs:
            if job.mine():
                yield one.try_row(*wanted)


def wanted_rows(chosen: "Fields") -> Iterator[tuple[float, str, str, float, int]]:
    """Share, axis, method, minutes and seed of each row, what matters most first."""
    ours = [(axis, next(iter(methods))) for axis, methods in METHODS.items()]
    others = [(a, m) for a, methods in METHODS.items() for m in methods if (a, m) not in ours]
    longest = max(chosen.minutes)
    shorter = sorted({m for m in chosen.minutes if 0 < m < longest}, reverse=True)
    parts = [(ours[:1], [longest]), (ours[1:], [longest])] if longest else []
    if 0 in chosen.minutes:
        parts += [(ours, [0.0]), (others, [0.0])]
    parts += [(ours, shorter), (others, [longest] if longest else []), (others, shorter)]
    for seed in range(chosen.seeds):
        for methods, lengths in parts:
            for minutes, (axis, method), share in product(lengths, methods, chosen.shares):
                if method.endswith(tuple(DISTILLED)) and not minutes:
                    continue  # what is said is of distillation
                if not chosen.rows or {axis, f"{axis}: {method}"} & set(chosen.rows):
                    yield share, axis, method, minutes, seed


class Run(Checkpoint):
    """All rows of a checkpoint."""

    def __init__(self, name: str, job: Job) -> None:
        chosen: Fields = job.configuration
        super().__init__(name, chosen, max(1, 32768 // chosen.evaluate))
        self.job = job
        self.skeleton = self.source.load_skeleton()
        self.shapes = Shapes(self.skeleton)
        self.whole = count(self.skeleton)
        self.tasks: Any = None
        if chosen.tasks:
            from sparsessm_plugin.evaluation.tasks import load_tasks

            self.tasks = load_tasks([TASK], assets() / "data", chosen.limit)
        positions = chosen.batch_size * chosen.length
        print(f"{name}: steps take {needed(self.skeleton, positions)} (counted)", flush=True)
        self.overhead = 20.0  # seconds of a row beside its distillation
        self.model: Any = self.source.load()  # rows change copies of it
        self.dense = self.row({"method": "dense"})
        if not self.dense["seeds"]:
            self.add(self.dense, 0, self.model, 0.0, {"parameters": 1.0})

    def row(self, key: Row) -> Row:
        names = (*MEASURED, *NOTED)
        return row_of(self.job.numbers["rows"], {"model": self.name, **key}, names)

    def add(self, row: Row, seed: int, model: Any, seconds: float, noted: Row) -> str:
        """Measure a model."""
        measured: dict[str, Any] = dict(self.evaluate(model))
        if self.tasks is not None:
            from sparsessm_plugin.evaluation.tasks import evaluate_tasks

            scored = evaluate_tasks(model, self.tokenizer, self.tasks, 256)[TASK]
            measured["blimp"] = scored.metrics["acc"].value
        if row is not self.dense:
            for kind in TEXTS:
                measured[kind] /= self.dense[kind][0]
        values = {kind: measured.get(kind) for kind in MEASURED}
        add_run(row, values | {f: noted.get(f) for f in NOTED}, round(seconds, 1), seed)
        told = {k: v for k, v in row.items() if not isinstance(v, list)}
        return f"{told} seed {seed} {measured} {noted} {seconds:.1f} s"

    def try_row(self, share: float, axis: str, method: str, minutes: float, seed: int) -> Any:
        """Measure a row, if it can be and there is time for it."""
        failed = self.job.numbers["failed"]
        if seed and not minutes and method in DATA_FREE:
            return None
        key = {"share": share, "axis": axis, "method": method, "minutes": minutes}
        label = f"{self.name} {' '.join(map(str, key.values()))} seed {seed}"
        if seed in self.row(key)["seeds"] or label in failed:  # it cannot be
            return None
        if not self.job.in_time(label, 60 * minutes + self.overhead):
            return None
        begun = time.monotonic()
        try:
            told = self.measure(key, seed)
        except Exception as error:  # one that cannot be must not stop the others
            if not harness.gpu_answers():
                raise
            failed[label] = first_line(error)
            told = f"FAILED {label}: {failed[label]}"
        else:
            self.overhead = max(5.0, time.monotonic() - begun - 60 * minutes)
        harness.release_memory()
        return told

    def measure(self, key: Row, seed: int) -> str:
        chosen: Fields = self.job.configuration
        minutes = key["minutes"]
        modifiers = self.modifiers(key, seed)
        last = modifiers[list(modifiers)[-1]]
        batches = -(-chosen.windows // chosen.batch_size)
        for fields in modifiers.values():
            fields["calibration_batches"] = batches
        if minutes:
            last["distill_minutes"] = minutes
            if chosen.rate:
                last["distill_learning_rate"] = chosen.rate
            if chosen.weights != "auto":
                last["distill_weights"] = chosen.weights
        text = yaml.safe_dump({"prune_stage": {"prune_modifiers": modifiers}}, sort_keys=False)
        count_of = (chosen.distill_windows or 10**9) if minutes else chosen.windows
        model = copy.deepcopy(self.model)
        result = self.prune(parse_recipe(text, "benchmark"), count_of, seed, model)
        distilled: dict[str, Any] = {}
        for report in result.reports:
            distilled = report.get("distillation") or distilled
        noted = {
            "parameters": round(count(result.model) / self.whole, 4),
            "steps": distilled.get("steps"),
            "passes": distilled.get("passes"),
            "divergence": distilled.get("divergence_after"),
        }
        return self.add(self.row(key), seed, result.model, result.seconds, noted)

    def modifiers(self, key: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
        """Modifiers of a recipe and their fields."""
        axis, method, share = key["axis"], key["method"], key["share"]
        minutes = key["minutes"]
        if axis == "mix":
            sizes = self.mix(share)["distilled" if minutes else "sizes"]
        else:
            sizes = {axis: self.size(AXES[axis], share)}
        axes = in_order(sizes)
        found = {one.modifier: one.fields(sizes[one.name]) for one in axes}
        fields = yaml.safe_load(
            "{"
            + METHODS[axis][method].format(seed=seed, generated=self.job.configuration.generated)
            + "}"
        )
        last = found[axes[-1].modifier]
        if minutes:
            last |= distillation_fields(axes, minutes)
            if axis not in ("mix", *WHOLE):  # what is distilled is the same in all rows
                last["distill_weights"] = "all_but_vocabulary"
        last |= fields
        return found

    def size(self, axis: Any, share: float) -> int:
        """The size of an axis with which the model has nearest to this share of its parameters.

        :raises SparseSSMError: no size comes near
        """
        length = axis.length(self.skeleton)
        if length is None:
            raise SparseSSMError("the model has no such axis")
        step = {"hidden": 8, "channels": 4, "mlp": 8}.get(axis.name, 1)
        found: dict[float, int] = {}
        for size in range(length - step, 0, -step):
            try:
                made = count(self.shapes.model({axis.name: size})) / self.whole
            except SparseSSMError:
                continue
            found.setdefault(abs(made - share), size)
            if made < share - NEAR:
                break
        if not found or min(found) > NEAR:
            raise SparseSSMError(f"no size has {share:g} of the parameters")
        return found[min(found)]

    def mix(self, share: float) -> dict[str, Any]:
        """What ``fit`` finds, sought once and kept beside the results.

        ``sizes`` by axis of the mix that loses least before any distillation, ``distilled`` of the
        one that lost least after a short one, ``tried`` with what was predicted and measured.
        """
        chosen = self.job.configuration
        path = harness.RESULTS / f"{self.job.name}_mix_{self.name}_{share:g}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        started = time.monotonic()
        device = self.model.device
        minutes = chosen.fit_minutes or (1.0 if device.type == "cuda" else 5.0)
        batches, held = split(list(self.loader(chosen.windows, 0)))
        targets = parse_targets(f"parameters={share:g}")
        settings = FitSettings(targets, minutes=minutes, search_tokens=chosen.search_tokens)
        prepared = Prepared(self.shapes, settings, device)
        plan = make_plan(prepared, self.model, batches, HeldBack(self.model, held), started)
        reached = [one for one in plan.candidates if one.costs["parameters"] < share + 1e-6]
        least = min(reached, key=lambda one: one.loss)
        found = {
            "sizes": least.sizes,
            "distilled": plan.sizes,
            "seconds": round(time.monotonic() - started, 1),
            "overlap": plan.overlap,
            "alone": plan.alone,
            "tried": [vars(one) for one in plan.candidates],
            "tables": [vars(row) for row in plan.rows if row.measured],
            "excluded": plan.excluded,
        }
        if self.job.kept:
            write_json(path, found)
        print(f"{self.name} mix {share:g}: {found}", flush=True)
        return found


def count(model: Any) -> int:
    """Parameters, those under several names once."""
    return sum(p.numel() for p in model.parameters())


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a model, share, axis, method and length of distillation."""
    order = {name: i for i, name in enumerate(METHODS)}
    rows = sorted(
        (row for row in numbers["rows"] if row["seeds"]),
        key=lambda r: (
            r["model"],
            -r.get("share", 9),
            r.get("minutes", -1),
            order.get(r.get("axis", ""), -1),
        ),
    )
    lines = []
    for row in rows:
        cells = [str(row.get(k, "")) for k in ("model", "share", "axis", "method", "minutes")]
        digits = 2 if row["method"] == "dense" else 4
        cells.append(mean_and_range(row["parameters"], 3))
        cells += [mean_and_range(row[kind], digits) for kind in TEXTS]
        cells += [mean_and_range(row["blimp"]), mean_and_range(row["steps"], 0)]
        lines.append([*cells, str(len(row["seeds"])), mean_and_range(row["seconds"], 1)])
    distilled = (
        f"; distilled: so many minutes of steps of {chosen.batch_size} x {chosen.length} tokens "
        f"towards the dense predictions of {chosen.distill_windows or 'all'} windows, "
        + (f"at a learning rate of {chosen.rate:g}" if chosen.rate else STEPPED)
    )
    written = (
        f" Generated text: {chosen.generated:,} more tokens, which the dense model has written; "
        "the minutes begin behind that, the seconds before."
    )
    head = "model|asked for|axis|method|minutes|parameters|corpus validation|wikitext2 test|BLiMP"
    return joined(
        f"Perplexity relative to dense, mean of the draws (highest - lowest). Layers are fitted "
        f"over {chosen.windows} x {chosen.length} tokens"
        + (distilled if any(row.get("minutes") for row in rows) else "")
        + "."
        + (written if any("generated" in row["method"] for row in rows) else ""),
        markdown([*head.split("|"), "steps", "draws", "seconds"], lines),
    )


STEPPED = "at a learning rate of 0.001, by Muon where a row does not say Adam"


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """Perplexity relative to dense."""
    found = {}
    for row in numbers["rows"]:
        if row.get("axis"):
            name = f"{row['model']}, {row['axis']} at {row['share']:g}, {row['method']}"
            found |= relative(row, TEXTS, lambda _, name=name: name)
    return found


OF_GPU = {"minutes": [3, 0], "seeds": 1, "tasks": True, "limit": 50}
OF_CPU = {"models": ["mamba-6m"], "minutes": [0], "shares": [0.75], "seeds": 1}
QUICK = {**OF_CPU, "windows": 8, "batch_size": 8, "evaluate_windows": 2}
EXPERIMENT = Experiment(
    measures="perplexity and BLiMP at a share of the parameters, by axis and method",
    device="CPU or GPU",
    seconds=3000,
    subjects="mamba-25m, mamba2-25m, granite-hybrid-16m, mamba-6m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "structure_quality_25m": {
            **OF_GPU,
            "models": ["mamba-25m", "mamba2-25m"],
            "shares": [0.793, 0.75, 0.5],
        },
        "structure_quality_granite-hybrid-16m": {**OF_GPU, "models": ["granite-hybrid-16m"]},
        "structure_quality_mamba-6m_cpu": {**OF_CPU, "rows": ["layers", "hidden"]},
        "structure_quality_layers_mamba-6m_cpu": {
            **OF_CPU,
            "shares": [0.843],
            "rows": ["layers: loss after the fit"],
        },
    },
    quick={
        "structure_quality_mamba-6m_cpu": {
            **QUICK,
            "rows": ["hidden: output energy", "hidden: magnitude, nothing fitted"],
        },
        "structure_quality_layers_mamba-6m_cpu": {
            **QUICK,
            "shares": [0.843],
            "rows": ["layers: loss after the fit"],
        },
    },
    ratios=ratios,
    extends=("models", "shares", "minutes", "seeds", "rows"),
)
