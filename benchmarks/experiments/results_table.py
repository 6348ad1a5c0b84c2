"""All methods beside each other: perplexity on three texts and four tasks, time and memory.

Many runs in few minutes of a large machine: start several processes, each with a part of the runs
(``--part i/n``), and put their files together (``--merge``).

Every run is what ``sparsessm prune`` and ``sparsessm evaluate`` with the options in the table's
head do; here they share one process, the texts and the requests of the tasks. ``sparsessm compare``
makes the same table with a process for each run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import ROOT, Configuration, Experiment, Job, assets, first_line, gpu_answers
from measuring import CALIBRATION, windows_of
from pydantic import Field

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.comparison import run_name
from sparsessm_plugin.evaluation.comparison_table import DENSE, markdown, measures, summarize
from sparsessm_plugin.evaluation.components import take_inventory
from sparsessm_plugin.evaluation.data import calibration_loader
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.evaluation.tasks import evaluate_tasks, load_tasks
from sparsessm_plugin.recipes import CheckedRecipe, load_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

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
    "Half of all weights": [f"{HERE}/magnitude-50-global.yaml", "gradient-50"],
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


class Fields(Configuration):
    """Of the recipes, the calibration and the evaluation."""

    models: list[str] = Field(["mamba-25m"], description="checkpoints of the assets")
    recipes: list[str] = Field(ALL, description="built-in ones or files of benchmarks/recipes")
    seeds: int = Field(3, description="draws of calibration text")
    windows: int = Field(32, description="calibration windows")
    length: int = Field(2048, description="tokens a window")
    batch_size: int = Field(4, description="windows")
    evaluate_windows: int | None = Field(None, description="of a text, at most so many")
    tasks: list[str] = Field(list(TASKS), description="of the assets")
    tasks_batch_size: int = Field(256, description="sentences")
    limit: int | None = Field(None, description="documents a task at most")


def run(job: Job) -> Iterator[Any]:
    """A run a recipe and seed."""
    runner = Runner(job)
    for name in job.configuration.models:
        yield from runner.run(name)


class Runner:
    """What the runs of all models share.

    One tokenizer for all models of these: what it has encoded is not encoded again.
    """

    def __init__(self, job: Job):
        self.job = job
        chosen: Fields = job.configuration
        tasks = list(chosen.tasks)
        self.suite = load_tasks(tasks, assets() / "data", chosen.limit) if tasks else None
        self.tokenizers: dict[str, Any] = {}

    def run(self, name: str) -> Iterator[Any]:
        """The runs of a checkpoint; what a file holds already, and did not fail, stays."""
        chosen: Fields = self.job.configuration
        source = ModelSource(str(assets() / "models" / name))
        tokenizer = self.tokenizer(source)
        samples = windows_of(CALIBRATION, tokenizer, chosen.length)
        texts = {
            kind: windows_of(path, tokenizer, chosen.length, chosen.evaluate_windows)
            for kind, path in TEXTS.items()
        }
        runs = self.job.numbers.setdefault("models", {}).setdefault(name, {})
        for label, recipe, seed in self.runs(source):
            key = DENSE if recipe is None else run_name(label, seed)
            if not self.job.mine() or "error" not in runs.get(key, {"error": ""}):
                continue
            if not self.job.in_time(f"{name} {key}"):
                continue
            try:
                runs[key] = self.measure(source, tokenizer, recipe, seed, samples, texts)
                runs[key] |= {"recipe": label, "seed": seed}
                text = str({k: round(v["value"], 4) for k, v in runs[key]["measures"].items()})
            except Exception as error:  # the others still run
                if not gpu_answers():
                    raise
                text = first_line(error)
                runs[key] = {"recipe": label, "seed": seed, "error": text}
            yield f"{name} {key} {text}"

    def tokenizer(self, source: ModelSource) -> Any:
        """Checkpoints with the same tokenizer share one, and with it the encoded tasks."""
        content = (Path(source.path) / "tokenizer.json").read_text(encoding="utf-8")
        return self.tokenizers.setdefault(content, source.load_tokenizer())

    def runs(self, source: ModelSource) -> list[tuple[str, CheckedRecipe | None, int]]:
        """The dense model, then every recipe that fits the model, seed by seed."""
        skeleton = source.load_skeleton()
        found: list[tuple[str, CheckedRecipe | None, int]] = [(DENSE, None, 0)]
        for seed in range(self.job.configuration.seeds):
            for label in self.job.configuration.recipes:
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
        chosen: Fields = self.job.configuration
        model = source.load()
        cost: dict[str, Any] = {}
        if recipe is not None:
            loader = None
            if recipe.reads_data:
                loader = calibration_loader(samples, chosen.windows, chosen.batch_size, seed)
            pruned = prune(model, recipe, loader, tokenizer, reload=source.load)
            model = pruned.model
            cost = {"seconds": pruned.seconds, "peak_memory_bytes": pruned.peak_memory_bytes}
        perplexity = {
            kind: evaluate_perplexity(model, text, chosen.batch_size).to_dict()
            for kind, text in texts.items()
        }
        tasks = {}
        if self.suite is not None:
            scored = evaluate_tasks(model, tokenizer, self.suite, chosen.tasks_batch_size)
            tasks = {name: result.to_dict() for name, result in scored.items()}
        inventory = take_inventory(model)
        return {
            "parameters": inventory.parameters,
            "zeros": inventory.zeros,
            "measures": measures(perplexity, tasks, list(chosen.tasks)),
            **cost,
        }


def render(numbers: dict[str, Any], configuration: Fields) -> str:
    """A table for each model and section, the dense model at the head of each."""
    chosen = configuration.model_copy(update=numbers.get("settings", {}))
    lines = [
        f"`RECIPE` in the first column, {chosen.windows} x {chosen.length} calibration "
        "tokens; a row is the mean over the seeds 0, 1, ... of",
        "",
        "```",
        f"sparsessm prune MODEL --recipe RECIPE --calibration {CALIBRATION} "
        f"--num-samples {chosen.windows} --max-seq-length {chosen.length} "
        f"--batch-size {chosen.batch_size} --seed SEED --output DIR",
        "sparsessm evaluate DIR "
        + " ".join(f"--text {kind}={path}" for kind, path in TEXTS.items())
        + (f" --tasks {','.join(chosen.tasks)} --tasks-data ." if chosen.tasks else "")
        + (f" --limit {chosen.limit}" if chosen.limit else "")
        + f" --max-seq-length {chosen.length} --batch-size {chosen.batch_size}"
        + (f" --num-samples {chosen.evaluate_windows}" if chosen.evaluate_windows else ""),
        "```",
    ]
    for model, runs in numbers["models"].items():
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
    return "\n".join(lines)


EXPERIMENT = Experiment(
    measures="all recipes beside each other: perplexity, tasks, time and memory",
    device="CPU or GPU",
    seconds=3000,
    subjects="mamba-25m, mamba2-25m, granite-hybrid-16m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        f"results_table_{model}": {
            "models": [model],
            "limit": 200,
            "remark": "Five processes shared a GPU: seconds are two to ten times what a run alone "
            "takes.",
        }
        for model in ("mamba-25m", "mamba2-25m")
    }
    | {
        "results_table_granite-hybrid-16m": {
            "models": ["granite-hybrid-16m"],
            "tasks": ["blimp_local"],
            "limit": 50,
        }
    },
    quick={
        "": {
            "models": ["mamba-6m"],
            "recipes": ["alog-50", "state-50"],
            "seeds": 1,
            "windows": 8,
            "length": 256,
            "evaluate_windows": 8,
            "tasks": [],
        }
    },
    extends=("models", "recipes", "seeds"),
    alone=False,
)
