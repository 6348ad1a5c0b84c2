"""Perplexity after pruning half of A_log, by every criterion and both meanings of "pruned"."""

from collections.abc import Iterator
from typing import Any

import torch
from harness import Configuration, Experiment, Job, assets, markdown
from measuring import perplexities, recipe, windows_of
from pydantic import Field

from sparsessm_plugin.criteria import Unstructured
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.evaluation.data import calibration_loader
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recipes.pruning import ModelSource, prune

TEXTS = {"wikitext2 test": "wikitext2/test.raw.txt", "corpus validation": "corpus/validation.jsonl"}
# name in the table, saliency, aggregation
CRITERIA = (
    ("magnitude", "magnitude", None),
    ("hessian + frequency (paper)", "hessian", "frequency"),
    ("transition + time_weighted (published code)", "transition", "time_weighted"),
    ("output_error", "output_error", "mean"),
)
RANDOM_SEEDS = (0, 1, 2)
RANDOM = "random (mean of 3)"


class Fields(Configuration):
    """Of the model, the calibration and the evaluation."""

    model: str = Field("mamba-25m", description="checkpoint of the assets")
    calibration: str = Field("wikitext2/valid.raw.txt", description="text of the assets' data")
    sparsity: float = Field(0.5, description="share of the entries")
    samples: int = Field(64, description="calibration windows")
    length: int = Field(2048, description="tokens a window")
    windows: int | None = Field(None, description="of an evaluated text, at most so many")
    batch_size: int = Field(8, description="windows")


SMALL = {"model": "mamba-6m", "samples": 16, "length": 1024, "windows": 32}


def run(job: Job) -> Iterator[Any]:
    """Every criterion with every meaning of pruned; what a file holds is not run again."""
    chosen: Fields = job.configuration
    source = ModelSource(str(assets() / "models" / chosen.model))
    tokenizer = source.load_tokenizer()
    calibration = windows_of(chosen.calibration, tokenizer, chosen.length)
    texts = {
        kind: windows_of(path, tokenizer, chosen.length, chosen.windows)
        for kind, path in TEXTS.items()
    }

    def measure(model: Any) -> dict[str, float]:
        return perplexities(model, texts, chosen.batch_size)

    job.numbers |= {
        "model": chosen.model,
        "windows": {"calibration": min(chosen.samples, len(calibration))}
        | {kind: len(samples) for kind, samples in texts.items()},
    }
    if "dense" not in job.numbers:
        job.numbers["dense"] = measure(source.load())
        yield "dense", job.numbers["dense"]
    rows: list[dict[str, Any]] = job.numbers.setdefault("rows", [])
    for pruned_value in PRUNED_VALUES:
        for name, saliency, aggregation in ((RANDOM, None, None), *CRITERIA):
            key = {"criterion": name, "pruned_value": pruned_value}
            if any(row | key == row for row in rows) or not job.in_time(str(key)):
                continue
            if saliency is None:
                draws = []
                for seed in RANDOM_SEEDS:
                    model = source.load()
                    prune_at_random(model, chosen.sparsity, pruned_value, seed)
                    draws.append(measure(model))
                mean = {text: sum(draw[text] for draw in draws) / len(draws) for text in texts}
                rows.append({**key, "perplexity": mean})
            else:
                fields = (
                    f"sparsity: {chosen.sparsity}, saliency: {saliency}, "
                    f"aggregation: {aggregation or 'null'}, pruned_value: {pruned_value}"
                )
                loader = calibration_loader(calibration, chosen.samples, chosen.batch_size)
                built = recipe("SparseSSMModifier", fields)
                result = prune(source.load(), built, loader, tokenizer)
                rows.append(
                    {
                        **key,
                        "seconds": round(result.seconds, 1),
                        "sparsity": result.reports[0]["total"]["sparsity"],
                        "perplexity": measure(result.model),
                    }
                )
            yield rows[-1]


@torch.no_grad()
def prune_at_random(model: Any, sparsity: float, pruned_value: str, seed: int) -> None:
    """The floor: the same number of entries, chosen by chance."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in find_mixers(model):
        scores = torch.rand(adapter.A_log.shape, generator=generator)
        chosen = Unstructured(sparsity).lowest(scores[None])[0].to(adapter.A_log.device)
        adapter.A_log[chosen] = PRUNED_VALUES[pruned_value]


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a criterion, columns for every meaning of pruned."""
    dense, rows = numbers["dense"], numbers["rows"]
    head = ["criterion"]
    cells = ["dense"]
    for pruned_value in PRUNED_VALUES:
        head += [f"{pruned_value}: {text}" for text in dense] + ["seconds"]
        cells += [f"{value:.1f}" for value in dense.values()] + [""]
    lines = [cells]
    for name in dict.fromkeys(row["criterion"] for row in rows):
        cells = [name]
        for pruned_value in PRUNED_VALUES:
            key = {"criterion": name, "pruned_value": pruned_value}
            row = next((r for r in rows if r | key == r), {})
            for text, whole in dense.items():
                value = row.get("perplexity", {}).get(text)
                cells.append(f"{value:.1f} ({value / whole:.3f})" if value else "")
            cells.append(str(row.get("seconds", "")))
        lines.append(cells)
    counts = dict(numbers.get("windows", {}))
    samples = counts.pop("calibration", chosen.samples)
    sizes = ", ".join(f"{n} x {chosen.length} tokens of {text}" for text, n in counts.items())
    evaluated = f" Evaluated on {sizes};" if sizes else ""
    return (
        f"# {chosen.sparsity:.0%} of A_log of {chosen.model} pruned: perplexity\n\n"
        f"{samples} x {chosen.length} calibration tokens of {chosen.calibration}.{evaluated} In "
        "brackets the ratio to dense. Seconds are those of the whole oneshot() call.\n\n"
        + markdown(head, lines)
    )


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """Perplexity relative to dense."""
    return {
        f"{row['criterion']}, {row['pruned_value']}: {text}": value / numbers["dense"][text]
        for row in numbers["rows"]
        for text, value in row["perplexity"].items()
    }


EXPERIMENT = Experiment(
    measures="perplexity after half of A_log, by criterion",
    device="CPU or GPU",
    seconds=200,
    subjects="mamba-25m, mamba-6m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "alog_quality_mamba-25m": {"batch_size": 16},
        "alog_quality_mamba-25m_in-domain": {
            "batch_size": 16,
            "calibration": "corpus/calibration.jsonl",
        },
        "alog_quality_mamba-6m": SMALL,
    },
    quick={"alog_quality_mamba-6m": {**SMALL, "samples": 8, "windows": 4}},
    ratios=ratios,
)
