"""Perplexity and BLiMP of models with fewer layers, channels, states or a narrower stream.

python benchmarks/structure_quality.py --models mamba-25m mamba2-25m granite-hybrid-16m \\
    --time-limit 900 --seeds 1                                                # on a GPU
python benchmarks/structure_quality.py --models mamba-6m --minutes 0 --shares 0.75 --seeds 1 \\
    --rows mix hidden --windows 64 --evaluate-windows 8 --batch-size 8        # on a CPU

Every row reaches the same share of the parameters, as near as the sizes of its axis come; the
share that it has is a column. Rows come in the order of their worth: the mix that a fit finds and
then the single axes after the longest distillation, all without any, the shorter distillations,
and what they are compared with. They are saved one by one, and a later call of the same ``--name``
goes on after them; processes that share a machine take their own with ``--part i/n`` or ``--rows``
and a name each, and ``--merge`` puts these together. A mix is sought once for each model and share;
what was found is kept beside the results. Nothing here was tuned on the texts that are reported:
settings were chosen on the last windows of the calibration file, which no run of this script reads.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import yaml
from common import (
    RESULTS,
    Part,
    add_part_arguments,
    assets,
    begin,
    first_line,
    keep,
    merge,
    perplexities,
    row_of,
    save,
)

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.files import write_json
from sparsessm_plugin.fitting import FitSettings, Prepared, make_plan, split
from sparsessm_plugin.fitting.axes import AXES, in_order
from sparsessm_plugin.fitting.losses import HeldBack, distillation_fields
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import parse_targets
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune
from sparsessm_plugin.training.memory import needed

CALIBRATION = "corpus/calibration.jsonl"
TEXTS = {"corpus": "corpus/validation.jsonl", "wikitext2": "wikitext2/test.detok.txt"}
TASK = "blimp_local"
MEASURED = (*TEXTS, "blimp")
NOTED = ("parameters", "steps", "passes", "divergence")
HELD_BACK = 100  # windows of 512 at the end of the calibration text, for development
# Axis of the package, and fields of its modifier; what this package does comes first, the others
# are to compare with.
METHODS: dict[str, dict[str, str]] = {
    "mix": {"fit": ""},
    "layers": {
        "loss after the fit": "",
        "perplexity, greedy, nothing fitted": "saliency: perplexity, compensate: none",
        "block influence, nothing fitted": "saliency: block_influence, compensate: none",
        "random, nothing fitted": "saliency: random, seed: {seed}, compensate: none",
    },
    "hidden": {
        "output energy": "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["mamba-25m"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5])
    parser.add_argument("--minutes", nargs="+", type=float, default=[0, 1, 3])
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration text")
    parser.add_argument("--rows", nargs="+", help="axes, or 'axis: method'; default all")
    parser.add_argument("--windows", type=int, default=256, help="that layers are fitted over")
    parser.add_argument("--distill-windows", type=int, help="that are distilled; default all")
    parser.add_argument("--length", type=int, default=512, help="tokens a calibration window")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of distillation")
    parser.add_argument("--weights", default="auto", help="distill_weights")
    parser.add_argument(
        "--fit-minutes", type=float, help="whose half a mix is sought for; default 1 on a GPU, 5"
    )
    parser.add_argument("--search-tokens", type=int, help="that a trial of the search fits by")
    parser.add_argument("--evaluate", type=int, default=2048, help="tokens a window of evaluation")
    parser.add_argument("--evaluate-windows", type=int, help="at most so many")
    parser.add_argument("--tasks", action="store_true", help="BLiMP, too")
    parser.add_argument("--limit", type=int, help="sentences a paradigm of BLiMP")
    parser.add_argument("--time-limit", type=float, default=1e9, help="start no row after seconds")
    parser.add_argument("--name", default="structure_quality")
    add_part_arguments(parser)
    options = parser.parse_args()
    options.resume = True
    if options.merge:
        rows, found = merge(options.merge)
        save(options.name, table(rows, options), {"rows": rows}, found)
        return
    started = time.monotonic()
    numbers = begin(options)
    rows: list[dict[str, Any]] = numbers.setdefault("rows", [])
    numbers.setdefault("failed", {})
    runs = [Run(name, options, numbers, started) for name in options.models]
    part = Part(options.part)
    for wanted in wanted_rows(options):
        for run in runs:
            if part.next():
                run.try_row(*wanted)
    save(options.name, table(rows, options), numbers)


def wanted_rows(options: Any) -> Iterator[tuple[float, str, str, float, int]]:
    """Share, axis, method, minutes and seed of each row, what matters most first."""
    ours = [(axis, next(iter(methods))) for axis, methods in METHODS.items()]
    others = [(a, m) for a, methods in METHODS.items() for m in methods if (a, m) not in ours]
    longest = max(options.minutes)
    shorter = sorted({m for m in options.minutes if 0 < m < longest}, reverse=True)
    parts = [(ours[:1], [longest]), (ours[1:], [longest])] if longest else []
    if 0 in options.minutes:
        parts += [(ours, [0.0]), (others, [0.0])]
    parts += [(ours, shorter), (others, [longest] if longest else []), (others, shorter)]
    for seed in range(options.seeds):
        for methods, lengths in parts:
            for minutes in lengths:
                for axis, method in methods:
                    chosen = options.rows
                    if chosen and axis not in chosen and f"{axis}: {method}" not in chosen:
                        continue
                    for share in options.shares:
                        yield share, axis, method, minutes, seed


class Run:
    """All rows of a checkpoint."""

    def __init__(self, name: str, options: Any, numbers: dict[str, Any], started: float) -> None:
        self.name, self.options, self.numbers, self.started = name, options, numbers, started
        self.source = ModelSource(str(assets() / "models" / name))
        self.tokenizer: Any = self.source.load_tokenizer()
        self.skeleton = self.source.load_skeleton()
        self.shapes = Shapes(self.skeleton)
        self.whole = count(self.skeleton)
        data = assets() / "data"
        tokens = tokenize(read_texts(data / CALIBRATION), self.tokenizer)
        held = max(1, HELD_BACK * 512 // options.length)
        self.samples = windows(tokens, options.length, CALIBRATION)[:-held]
        self.tests = {
            kind: windows(tokenize(read_texts(data / path), self.tokenizer), options.evaluate, path)
            for kind, path in TEXTS.items()
        }
        self.tests = {kind: t[: options.evaluate_windows] for kind, t in self.tests.items()}
        self.tasks: Any = None
        if options.tasks:
            from sparsessm_plugin.evaluation.tasks import load_tasks

            self.tasks = load_tasks([TASK], data, options.limit)
        positions = options.batch_size * options.length
        print(f"{name}: steps take {needed(self.skeleton, positions)} (counted)", flush=True)
        self.overhead = 20.0  # seconds of a row beside its distillation
        self.model: Any = self.source.load()  # rows change copies of it
        self.dense = self.row({"method": "dense"})
        if not self.dense["seeds"]:
            self.add(self.dense, 0, self.model, 0.0, {"parameters": 1.0})

    def row(self, key: dict[str, Any]) -> dict[str, Any]:
        names = (*MEASURED, *NOTED)
        return row_of(self.numbers["rows"], {"model": self.name, **key}, names)

    def add(
        self, row: dict[str, Any], seed: int, model: Any, seconds: float, noted: dict[str, Any]
    ) -> None:
        """Measure a model, and save what there is."""
        measured: dict[str, Any] = dict(
            perplexities(model, self.tests, max(1, 32768 // self.options.evaluate))
        )
        if self.tasks is not None:
            from sparsessm_plugin.evaluation.tasks import evaluate_tasks

            scored = evaluate_tasks(model, self.tokenizer, self.tasks, 256)[TASK]
            measured["blimp"] = scored.metrics["acc"].value
        if row is not self.dense:
            for kind in TEXTS:
                measured[kind] /= self.dense[kind][0]
        for kind in MEASURED:
            row[kind].append(measured.get(kind))
        for field in NOTED:
            row[field].append(noted.get(field))
        row["seconds"].append(round(seconds, 1))
        row["seeds"].append(seed)
        keep(self.options.name, self.numbers)
        shown = {k: None if v is None else round(v, 4) for k, v in measured.items()}
        told = {k: v for k, v in row.items() if not isinstance(v, list)}
        print(*told.values(), f"seed {seed}", shown, noted, f"{seconds:.1f} s", flush=True)

    def try_row(self, share: float, axis: str, method: str, minutes: float, seed: int) -> None:
        """Measure a row, if it can be and there is time for it."""
        if seed and not minutes and method in DATA_FREE:
            return
        key = {"share": share, "axis": axis, "method": method, "minutes": minutes}
        if seed in self.row(key)["seeds"]:
            return
        label = f"{self.name} {' '.join(map(str, key.values()))} seed {seed}"
        if label in self.numbers["failed"]:  # it cannot be
            return
        begun = time.monotonic()
        if begun - self.started + 60 * minutes + self.overhead > self.options.time_limit:
            print(f"left out: {label}", flush=True)
            return
        try:
            self.measure(key, seed)
        except Exception as error:  # one that cannot be must not stop the others
            print(f"FAILED {label}: {first_line(error)}", flush=True)
            self.numbers["failed"][label] = first_line(error)
            keep(self.options.name, self.numbers)
        else:
            self.overhead = max(5.0, time.monotonic() - begun - 60 * minutes)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measure(self, key: dict[str, Any], seed: int) -> None:
        options, minutes = self.options, key["minutes"]
        modifiers = self.modifiers(key, seed)
        last = modifiers[list(modifiers)[-1]]
        batches = -(-options.windows // options.batch_size)
        for fields in modifiers.values():
            fields["calibration_batches"] = batches
        if minutes:
            last |= {"distill_minutes": minutes, "distill_learning_rate": options.rate}
            if options.weights != "auto":
                last["distill_weights"] = options.weights
        text = yaml.safe_dump({"prune_stage": {"prune_modifiers": modifiers}}, sort_keys=False)
        count_of = (options.distill_windows or 10**9) if minutes else options.windows
        loader = calibration_loader(self.samples, count_of, options.batch_size, seed)
        begun = time.perf_counter()
        model = copy.deepcopy(self.model)
        result = prune(model, parse_recipe(text, "benchmark"), loader, self.tokenizer)
        seconds = time.perf_counter() - begun
        distilled: dict[str, Any] = {}
        for report in result.reports:
            distilled = report.get("distillation") or distilled
        noted = {
            "parameters": round(count(result.model) / self.whole, 4),
            "steps": distilled.get("steps"),
            "passes": distilled.get("passes"),
            "divergence": distilled.get("divergence_after"),
        }
        self.add(self.row(key), seed, result.model, seconds, noted)

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
        fields = yaml.safe_load("{" + METHODS[axis][method].format(seed=seed) + "}")
        found[axes[-1].modifier] |= fields
        if minutes:
            found[axes[-1].modifier] |= distillation_fields(axes, minutes)
            if axis not in ("mix", *WHOLE):  # what is distilled is the same in all rows
                found[axes[-1].modifier]["distill_weights"] = "all_but_vocabulary"
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
        options = self.options
        path = RESULTS / f"{options.name}_mix_{self.name}_{share:g}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        started = time.monotonic()
        device = self.model.device
        minutes = options.fit_minutes or (1.0 if device.type == "cuda" else 5.0)
        loader = calibration_loader(self.samples, options.windows, options.batch_size, 0)
        batches, held = split(list(loader))
        targets = parse_targets(f"parameters={share:g}")
        settings = FitSettings(targets, minutes=minutes, search_tokens=options.search_tokens)
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
        path.parent.mkdir(exist_ok=True)
        write_json(path, found)
        print(f"{self.name} mix {share:g}: {found}", flush=True)
        return found


def count(model: Any) -> int:
    """Parameters, those under several names once."""
    return sum(p.numel() for p in model.parameters())


def table(rows: list[dict[str, Any]], options: Any) -> str:
    lines = [
        *filter(None, [options.remark]),
        f"Perplexity relative to dense, mean of the draws (highest - lowest). Layers are fitted "
        f"over {options.windows} x {options.length} tokens; distilled: so many minutes of steps of "
        f"{options.batch_size} x {options.length} tokens towards the dense predictions of "
        f"{options.distill_windows or 'all'} windows, at a learning rate of {options.rate:g}.",
        "",
        "| model | asked for | axis | method | minutes | parameters | corpus validation "
        "| wikitext2 test | BLiMP | steps | draws | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate(METHODS)}
    for row in sorted(
        (row for row in rows if row["seeds"]),
        key=lambda r: (
            r["model"],
            -r.get("share", 9),
            r.get("minutes", -1),
            order.get(r.get("axis", ""), -1),
        ),
    ):
        cells = [row["model"], *(str(row.get(k, "")) for k in ("share", "axis"))]
        cells += [row["method"], f"{row.get('minutes', '')}", shown(row["parameters"], 3)]
        digits = 2 if row["method"] == "dense" else 4
        cells += [shown(row[kind], digits) for kind in TEXTS]
        cells += [shown(row["blimp"], 4), shown(row["steps"], 0), str(len(row["seeds"]))]
        lines.append("| " + " | ".join([*cells, shown(row["seconds"], 1)]) + " |")
    return "\n".join(lines)


def shown(values: list[Any], digits: int) -> str:
    """Mean, and how far the values lie apart."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    apart = max(numbers) - min(numbers)
    spread = f" ({apart:.{digits}f})" if len(numbers) > 1 and digits > 2 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
