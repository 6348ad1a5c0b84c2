"""Perplexity after pruning all weights by gradient, training-free and tuned, and by component.

python benchmarks/gradient_quality.py --models mamba-25m    # on a GPU
python benchmarks/gradient_quality.py --models mamba-6m --development --windows 8 --length 256 \
    --evaluate 256 --evaluate-windows 8 --sections prune components    # on a CPU

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this script calibrates on. ``--development``
evaluates on these and writes no result.
"""

import argparse
import os
import statistics
from functools import partial
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import Result, assets, begin, keep, perplexities, row_of, save
from torch import Tensor

from sparsessm_plugin.criteria.importance import choose_pruned, importance
from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.families import MixerAdapter, find_mixers, get_tensor
from sparsessm_plugin.methods.gradient import tuned_parameters
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.gradients import mean_gradients
from sparsessm_plugin.training.tuner import Tuner

CALIBRATION = "corpus/calibration.jsonl"
TESTS = {"corpus": "corpus/validation.jsonl", "wikitext2": "wikitext2/test.detok.txt"}
HELD_BACK = 100 * 512  # tokens at the end of the calibration text, for development
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mamba-25m"])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tuned", nargs="+", default=list(TUNED), choices=list(TUNED))
    parser.add_argument("--fields", default="", help="further fields of the modifier, as YAML")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--component-sparsity", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128, help="windows for the gradients")
    parser.add_argument("--length", type=int, default=512, help="tokens a calibration window")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tune-seconds", type=float, default=240, help="of gradient steps a run")
    parser.add_argument("--tune-steps", type=int, help="steps a round, instead")
    parser.add_argument("--tune-windows", type=int, default=32, help="for the gradients of a round")
    parser.add_argument("--tune-seeds", type=int, default=1)
    parser.add_argument("--evaluate", type=int, default=2048, help="tokens a window of evaluation")
    parser.add_argument("--evaluate-windows", type=int, help="at most so many")
    parser.add_argument("--evaluate-batch-size", type=int, default=4)
    parser.add_argument("--development", action="store_true", help="write no result")
    parser.add_argument("--budget", type=float, default=1e9, help="start no run after seconds")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    parser.add_argument("--name", default="gradient_quality")
    options = parser.parse_args()
    result = Result(options.budget)
    result.numbers = begin(options)
    for name in options.models:
        run = Run(name, options)
        for section in options.sections:
            work = SECTIONS[section]
            result.section(f"{name}, {section}", lambda r, run=run, work=work: work(run, r))
        if not options.development:  # after every model: what was measured is kept
            failures = [f"{where}: {what}" for where, what in result.failures.items()]
            text = "\n\n".join(
                [*result.parts, *(["Failed: " + "; ".join(failures)] * bool(failures))]
            )
            save(options.name, text, {**result.numbers, "failures": result.failures})


class Run:
    """One model, its texts and its dense perplexity."""

    def __init__(self, name: str, options: Any):
        self.name, self.options = name, options
        self.source = ModelSource(str(assets() / "models" / name))
        self.tokenizer = self.source.load_tokenizer()
        stream = tokenize(read_texts(assets() / "data" / CALIBRATION), self.tokenizer)
        self.samples = windows(stream[:-HELD_BACK], options.length, CALIBRATION)
        texts = {"development": stream[-HELD_BACK:]}
        if not options.development:
            texts = {
                kind: tokenize(read_texts(assets() / "data" / path), self.tokenizer)
                for kind, path in TESTS.items()
            }
        self.tests = {
            kind: windows(tokens, options.evaluate, kind)[: options.evaluate_windows]
            for kind, tokens in texts.items()
        }
        self.dense = self.evaluate(self.source.load())
        print(name, "dense", self.dense, flush=True)

    def evaluate(self, model: Any) -> dict[str, float]:
        return perplexities(model, self.tests, self.options.evaluate_batch_size)

    def loader(self, count: int, seed: int) -> Any:
        return calibration_loader(self.samples, count, self.options.batch_size, seed)

    def keep(self, result: Result) -> None:
        """Write what was measured so far."""
        if not self.options.development:
            keep(self.options.name, result.numbers)

    def ratio(self, kind: str, values: list[float]) -> str:
        """Mean, half the spread, and in brackets the mean over the dense one."""
        value = statistics.mean(values)
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        return f"{value:.2f}{spread} ({value / self.dense[kind]:.3f})"

    def prune(self, fields: list[str], loader: Any) -> Any:
        text = ", ".join(part for part in (*fields, self.options.fields) if part)
        recipe = f"s_stage:\n  s_modifiers:\n    GradientMagnitudeModifier: {{{text}}}\n"
        return prune(self.source.load(), parse_recipe(recipe, "benchmark"), loader, self.tokenizer)

    def rows(
        self,
        result: Result,
        methods: dict[str, str],
        seeds: int,
        loader: Any,
        title: str,
        text: str,
    ) -> None:
        rows: list[dict[str, Any]] = result.numbers.setdefault("rows", [])
        try:
            for seed in range(seeds):
                for method, fields in methods.items():
                    if seed and "magnitude" in method and "distill_steps" not in fields:
                        continue  # which looks at no data
                    row = row_of(rows, {"model": self.name, "method": method}, self.tests)
                    if seed not in row["seeds"]:
                        work = partial(self.row, result, row, method, fields, seed, loader)
                        result.case(f"{self.name}, {method}, seed {seed}", work)
        finally:
            measured = [
                row
                for row in rows
                if row["model"] == self.name and row["method"] in methods and row["seeds"]
            ]
            self.show(result, measured, title, text)

    def show(self, result: Result, found: list[dict[str, Any]], title: str, text: str) -> None:
        """The table of some rows."""
        stepped = any("steps" in row for row in found)
        header = ["model", "method", *self.tests, "seeds", "seconds", *["steps"] * stepped]
        dense = [self.name, "dense", *(f"{self.dense[kind]:.2f}" for kind in self.tests)]
        cells = [dense + [""] * (len(header) - len(dense))]
        for row in found:
            cells.append(
                [self.name, row["method"], *(self.ratio(kind, row[kind]) for kind in self.tests)]
            )
            cells[-1] += [str(len(row["seconds"])), f"{statistics.mean(row['seconds']):.1f}"]
            if stepped:
                cells[-1] += [", ".join(f"{steps:,}" for steps in row["steps"])]
        result.table(title, text, header, cells)

    def row(
        self,
        result: Result,
        row: dict[str, Any],
        method: str,
        fields: str,
        seed: int,
        loader: Any,
    ) -> None:
        """One run, added to its row."""
        pruned = self.prune([f"sparsity: {self.options.sparsity}", fields], loader(seed))
        for kind, value in self.evaluate(pruned.model).items():
            row[kind].append(value)
        row["seconds"].append(pruned.seconds)
        row["seeds"].append(seed)
        report = pruned.reports[0]
        if report["settings"]["distill_steps"]:
            steps = report["settings"]["rounds"] * report["settings"]["distill_steps"]
            row.setdefault("steps", []).append(steps)
        row["layers"] = by_kind(report["layers"])
        self.keep(result)
        print(self.name, method, f"seed {seed}", row, flush=True)


def by_kind(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Share of zeros of each kind of weight."""
    kinds = dict.fromkeys(layer["kind"] for layer in layers)
    return {
        kind: sum(x["pruned"] for x in layers if x["kind"] == kind)
        / sum(x["entries"] for x in layers if x["kind"] == kind)
        for kind in kinds
    }


# -- sections ----------------------------------------------------------------------------


def training_free(run: Run, result: Result) -> None:
    options = run.options
    run.rows(
        result,
        {method: METHODS[method] for method in options.methods},
        options.seeds,
        lambda seed: run.loader(options.windows, seed),
        f"{run.name}: {options.sparsity:.0%} of all weights, training-free",
        f"Perplexity, mean of the seeds ± half of (highest - lowest), in brackets its ratio to the "
        f"dense one. Gradients of {options.windows} x {options.length} tokens of the corpus.",
    )


def tuned(run: Run, result: Result) -> None:
    """All calibration text is tuned on, gradients come from a little of it in each round."""
    options = run.options
    batches = -(-options.tune_windows // options.batch_size)
    seconds = 0.0 if options.tune_steps else seconds_a_step(run)
    methods = {}
    for method in options.tuned:
        rounds = 1 if "1 round" in method else 8
        steps = options.tune_steps or max(1, int(options.tune_seconds / seconds / rounds))
        methods[method] = f"{TUNED[method]}, distill_steps: {steps}, calibration_batches: {batches}"
    print(methods, flush=True)
    run.rows(
        result,
        methods,
        options.tune_seeds,
        lambda seed: run.loader(len(run.samples), seed),
        f"{run.name}: {options.sparsity:.0%} of all weights, tuned",
        f"Steps of {options.batch_size} x {options.length} tokens, as many as fit into "
        f"{options.tune_seconds:.0f} s by a trial before, over "
        f"{run.samples.numel()} tokens of the corpus; gradients of {options.tune_windows} windows "
        "a round. Seconds: the whole oneshot() call.",
    )


def seconds_a_step(run: Run) -> float:
    model: Any = run.source.load()
    batches = list(run.loader(PROBE_STEPS * run.options.batch_size, 0))
    tuner = Tuner(model, tuned_parameters(model), batches, Plan(2 * PROBE_STEPS, 0.0, 1e-6))
    tuner.run({}, 1, 2)  # compiles, allocates
    before = tuner.budget.seconds
    tuner.run({}, 2, 2)
    return (tuner.budget.seconds - before) / PROBE_STEPS


def components(run: Run, result: Result) -> None:
    """Prune one component of all mixers and nothing else."""
    options = run.options
    model: Any = run.source.load()
    parts = component_parts(find_mixers(model))
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(parameter is part for rows in parts.values() for part, _ in rows)
    }
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    share = options.component_sparsity
    numbers: list[dict[str, Any]] = result.numbers.setdefault("components", [])
    measured = {row["component"] for row in numbers if row["model"] == run.name}
    left = {component: rows for component, rows in parts.items() if component not in measured}
    if left:
        batches = list(run.loader(options.windows, 0))
        gradients, _ = mean_gradients(model, batches, parameters, of_samples=True)

    def work(component: str, rows: Any) -> None:
        entries = sum(part.detach()[where].numel() for part, where in rows)
        row: dict[str, Any] = {"model": run.name, "component": component, "entries": entries}
        for kind in ("gradient", "magnitude"):
            scores = {
                str(i): importance(
                    part.detach()[where],
                    gradients[by_identity[id(part)]][where] if kind == "gradient" else None,
                )
                for i, (part, where) in enumerate(rows)
            }
            masks = choose_pruned(scores, share, min_keep=0.01)
            before = [part.detach().clone() for part, _ in rows]
            with torch.no_grad():
                for (part, where), mask in zip(rows, masks.values(), strict=True):
                    part[where] = part[where].masked_fill(mask, 0.0)
                row[kind] = run.evaluate(model)
                for (part, _), value in zip(rows, before, strict=True):
                    part.copy_(value)
        numbers.append(row)
        run.keep(result)
        print(row, flush=True)

    try:
        for component, rows in left.items():
            result.case(f"{run.name}, {component}", partial(work, component, rows))
    finally:
        show_components(run, result, [row for row in numbers if row["model"] == run.name])


def show_components(run: Run, result: Result, rows: list[dict[str, Any]]) -> None:
    """The table of some components."""
    table = [
        [run.name, row["component"], f"{row['entries']:,}"]
        + [
            run.ratio(text, [value])
            for kind in ("gradient", "magnitude")
            for text, value in row[kind].items()
        ]
        for row in rows
    ]
    header = [f"{kind}: {text}" for kind in ("gradient", "magnitude") for text in run.tests]
    result.table(
        f"{run.name}: {run.options.component_sparsity:.0%} of one component alone",
        "Perplexity, in brackets its ratio to the dense one; one threshold over all layers, one "
        "round, nothing tuned.",
        ["model", "component", "entries", *header],
        table,
    )


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


if __name__ == "__main__":
    main()
