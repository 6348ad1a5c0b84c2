"""All methods beside each other: perplexity on three texts and four tasks, time and memory.

python benchmarks/results_table.py --models mamba-25m --resume    # on a GPU

Many runs in few minutes of a large machine: start several processes, each with a part of the
runs, and put their files together. What a file holds already is not run again.

for i in 0 1 2; do python benchmarks/results_table.py --part $i/3 --output part$i.json & done; wait
python benchmarks/results_table.py --merge part0.json part1.json part2.json

Every run is what ``sparsessm prune`` and ``sparsessm evaluate`` with the options in the table's
head do; here they share one process, the texts and the requests of the tasks. ``sparsessm compare``
makes the same table with a process for each run.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from common import RESULTS, assets, check_versions, first_line, machine, save

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.comparison import run_name
from sparsessm_plugin.evaluation.comparison_table import DENSE, markdown, measures, summarize
from sparsessm_plugin.evaluation.components import take_inventory
from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.evaluation.tasks import evaluate_tasks, load_tasks
from sparsessm_plugin.files import write_json
from sparsessm_plugin.recipes import CheckedRecipe, load_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

CALIBRATION = "corpus/calibration.jsonl"
TEXTS = {
    "corpus": "corpus/validation.jsonl",
    "wikitext2": "wikitext2/test.detok.txt",
    "ptb": "ptb/valid.txt",
}
TASKS = ("blimp_local", "piqa_local", "arc_easy_local", "lambada_local")
HERE = "benchmarks/recipes"
SECTIONS = {
    "Half of A_log": [
        f"{HERE}/alog-50-magnitude.yaml",
        "alog-paper",
        "alog-50",
        "alog-50-memoryless",
    ],
    "Half of the projections": [
        f"{HERE}/whole-50-magnitude.yaml",
        f"{HERE}/whole-50-wanda.yaml",
        f"{HERE}/whole-50-sparsegpt.yaml",
        "whole-50-paper",
        "whole-50",
    ],
    "70 % of the projections": [
        f"{HERE}/whole-70-magnitude.yaml",
        f"{HERE}/whole-70-wanda.yaml",
        f"{HERE}/whole-70-sparsegpt.yaml",
        f"{HERE}/whole-70-paper.yaml",
        f"{HERE}/whole-70.yaml",
    ],
    "Half of all weights": [
        f"{HERE}/magnitude-50-global.yaml",
        "gradient-50",
    ],
    "70 % of all weights": [
        f"{HERE}/magnitude-70-global.yaml",
        f"{HERE}/gradient-70-untuned.yaml",
        "gradient-70",
    ],
    "Removed": ["state-50", "state-75", "channels-25"],
}
ALL = [recipe for recipes in SECTIONS.values() for recipe in recipes]
QUANTIZED = ["state-50-w8a8", "whole-50-w8a8", "whole-50-fp8", "whole-2of4-w4a16"]
SECTIONS["Quantized"] = QUANTIZED  # only where asked for
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mamba-25m"])
    parser.add_argument("--recipes", nargs="+", default=ALL, choices=ALL + QUANTIZED)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--evaluate-windows", type=int, help="of a text, at most so many")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--tasks-batch-size", type=int, default=256)
    parser.add_argument("--limit", type=int, help="documents a task at most")
    parser.add_argument("--budget", type=float, default=1e9, help="start no run after seconds")
    parser.add_argument("--part", default="0/1", help="i/n: only every n-th run, from the i-th")
    parser.add_argument("--output", type=Path, help="file for this part's runs, and from where on")
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    parser.add_argument("--merge", nargs="+", type=Path, help="only put files together")
    parser.add_argument("--remark", default="", help="how it was made, for the table's head")
    parser.add_argument("--name", default="results_table", help="of the result files")
    options = parser.parse_args()
    if options.merge:
        save_table(options.name, merge(options.merge), options.remark)
        return
    part, parts = map(int, options.part.split("/"))
    path = RESULTS / f"{options.name}.json" if options.resume else options.output
    state = read(path, settings(options))
    Runner(options, state, path).run(part, parts)
    if options.resume or path is None:
        save_table(options.name, state, options.remark)


def settings(options: Any) -> dict[str, Any]:
    names = ("windows", "length", "batch_size", "evaluate_windows", "tasks", "limit")
    return {name: getattr(options, name) for name in names}


def read(path: Path | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has written, or nothing yet."""
    if path is None or not path.exists():
        return {"settings": chosen, "models": {}, "versions": machine()}
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["settings"] != chosen:
        raise SystemExit(f"{path} was made with other settings: {state['settings']}")
    check_versions(path, state["versions"])
    return state


def merge(paths: list[Path]) -> dict[str, Any]:
    first = json.loads(paths[0].read_text(encoding="utf-8"))
    for path in paths[1:]:
        part = json.loads(path.read_text(encoding="utf-8"))
        if part["settings"] != first["settings"]:
            raise SystemExit(f"{path} was made with other settings than {paths[0]}")
        if part["versions"] != first["versions"]:
            raise SystemExit(f"{path} and {paths[0]} were made on different machines or versions")
        for name, runs in part["models"].items():
            first["models"].setdefault(name, {}).update(runs)
    return first


class Runner:
    """Runs what is not in a state yet, and writes it to a path, if there is one, after each run."""

    def __init__(self, options: Any, state: dict[str, Any], path: Path | None):
        self.options, self.state, self.path = options, state, path
        self.started = time.monotonic()
        data = assets() / "data"
        self.suite = load_tasks(options.tasks, data, options.limit) if options.tasks else None
        # one tokenizer for all models of these: what it has encoded is not encoded again
        self.tokenizers: dict[str, Any] = {}

    def run(self, part: int, parts: int) -> None:
        for name in self.options.models:
            source = ModelSource(str(assets() / "models" / name))
            tokenizer = self.tokenizer(source)
            samples = self.windows(CALIBRATION, tokenizer)
            texts = {
                kind: self.windows(path, tokenizer)[: self.options.evaluate_windows]
                for kind, path in TEXTS.items()
            }
            for number, (label, recipe, seed) in enumerate(self.runs(source)):
                runs = self.state["models"].setdefault(name, {})
                key = DENSE if recipe is None else run_name(label, seed)
                if number % parts != part or "error" not in runs.get(key, {"error": ""}):
                    continue
                if time.monotonic() - self.started > self.options.budget:
                    print(f"left out: {name} {key}", flush=True)
                    continue
                started = time.monotonic()
                try:
                    runs[key] = self.measure(source, tokenizer, recipe, seed, samples, texts)
                    runs[key] |= {"recipe": label, "seed": seed}
                    text = {k: round(v["value"], 4) for k, v in runs[key]["measures"].items()}
                except Exception as error:  # the others still run
                    text = first_line(error)
                    runs[key] = {"recipe": label, "seed": seed, "error": text}
                print(name, key, text, f"{time.monotonic() - started:.0f} s", flush=True)
                if self.path is not None:
                    write_json(self.path, self.state)

    def tokenizer(self, source: ModelSource) -> Any:
        """Checkpoints with the same tokenizer share one, and with it the encoded tasks."""
        content = (Path(source.path) / "tokenizer.json").read_text(encoding="utf-8")
        return self.tokenizers.setdefault(content, source.load_tokenizer())

    def windows(self, path: str, tokenizer: Any) -> Any:
        stream = tokenize(read_texts(assets() / "data" / path), tokenizer)
        return windows(stream, self.options.length, path)

    def runs(self, source: ModelSource) -> list[tuple[str, CheckedRecipe | None, int]]:
        """The dense model, then every recipe that fits the model, seed by seed."""
        skeleton = source.load_skeleton()
        found: list[tuple[str, CheckedRecipe | None, int]] = [(DENSE, None, 0)]
        for seed in range(self.options.seeds):
            for label in self.options.recipes:
                recipe = load_recipe(ROOT / label if label.startswith(HERE) else label)
                try:
                    recipe.check_model(skeleton)
                except SparseSSMError as error:
                    if not seed:
                        print(f"{source.name}: {label} does not fit: {error}", flush=True)
                    continue
                if recipe.reads_data or not seed:
                    found.append((label, recipe, seed))
        return found

    def measure(
        self,
        source: ModelSource,
        tokenizer: Any,
        recipe: CheckedRecipe | None,
        seed: int,
        samples: Any,
        texts: dict[str, Any],
    ) -> dict[str, Any]:
        options = self.options
        model = source.load()
        cost: dict[str, Any] = {}
        if recipe is not None:
            loader = None
            if recipe.reads_data:
                loader = calibration_loader(samples, options.windows, options.batch_size, seed)
            pruned = prune(model, recipe, loader, tokenizer, reload=source.load)
            model = pruned.model
            cost = {"seconds": pruned.seconds, "peak_memory_bytes": pruned.peak_memory_bytes}
        perplexity = {
            kind: evaluate_perplexity(model, text, options.batch_size).to_dict()
            for kind, text in texts.items()
        }
        tasks = {}
        if self.suite is not None:
            scored = evaluate_tasks(model, tokenizer, self.suite, options.tasks_batch_size)
            tasks = {name: result.to_dict() for name, result in scored.items()}
        inventory = take_inventory(model)
        return {
            "parameters": inventory.parameters,
            "zeros": inventory.zeros,
            "measures": measures(perplexity, tasks, options.tasks),
            **cost,
        }


def save_table(name: str, state: dict[str, Any], remark: str = "") -> None:
    """A table for each model and section, the dense model at the head of each."""
    chosen = state["settings"]
    lines = [
        *([remark, ""] if remark else []),
        f"`RECIPE` in the first column, {chosen['windows']} x {chosen['length']} calibration "
        "tokens; a row is the mean over the seeds 0, 1, ... of",
        "",
        "```",
        f"sparsessm prune MODEL --recipe RECIPE --calibration {CALIBRATION} "
        f"--num-samples {chosen['windows']} --max-seq-length {chosen['length']} "
        f"--batch-size {chosen['batch_size']} --seed SEED --output DIR",
        "sparsessm evaluate DIR "
        + " ".join(f"--text {kind}={path}" for kind, path in TEXTS.items())
        + (f" --tasks {','.join(chosen['tasks'])} --tasks-data ." if chosen["tasks"] else "")
        + (f" --limit {chosen['limit']}" if chosen["limit"] else "")
        + f" --max-seq-length {chosen['length']} --batch-size {chosen['batch_size']}"
        + (f" --num-samples {chosen['evaluate_windows']}" if chosen["evaluate_windows"] else ""),
        "```",
    ]
    for model, runs in state["models"].items():
        if DENSE not in runs or "error" in runs[DENSE]:
            lines += ["", f"{model}: the dense model was not measured"]
            continue
        pruned = [run for key, run in runs.items() if key != DENSE]
        for section, recipes in SECTIONS.items():
            ordered = [run for label in recipes for run in pruned if run["recipe"] == label]
            if any("error" not in run for run in ordered):
                table = markdown(summarize(runs[DENSE], ordered))
                lines += ["", f"## {model}: {section}", "", table]
            lines += [
                f"\n{run_name(run['recipe'], run['seed'])} failed: {run['error']}"
                for run in ordered
                if "error" in run
            ]
    save(name, "\n".join(lines), state, state["versions"])


if __name__ == "__main__":
    main()
