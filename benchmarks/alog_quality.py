"""Perplexity after pruning half of A_log, by every criterion and both meanings of "pruned".

python benchmarks/alog_quality.py            # mamba-25m, 64 x 2048 tokens
python benchmarks/alog_quality.py --quick    # mamba-6m, 16 x 1024 tokens, for a CPU
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import assets, save

from sparsessm_plugin.criteria import Unstructured
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

RECIPE = """\
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      sparsity: {sparsity}
      saliency: {saliency}
      aggregation: {aggregation}
      pruned_value: {pruned_value}
"""
# name in the table, saliency, aggregation
CRITERIA = (
    ("magnitude", "magnitude", None),
    ("hessian + frequency (paper)", "hessian", "frequency"),
    ("transition + time_weighted (published code)", "transition", "time_weighted"),
    ("output_error", "output_error", "mean"),
)
RANDOM_SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="mamba-6m and less data")
    parser.add_argument(
        "--calibration",
        default="wikitext2/valid.raw.txt",
        help="calibration text, inside the assets' data folder",
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--name", help="name of the result files")
    options = parser.parse_args()

    data = assets() / "data"
    model_name = options.model or str(
        assets() / "models" / ("mamba-6m" if options.quick else "mamba-25m")
    )
    length, num_samples = (1024, 16) if options.quick else (2048, 64)
    source = ModelSource(model_name)
    tokenizer = source.load_tokenizer()

    def cut(path: str) -> torch.Tensor:
        samples = windows(tokenize(read_texts(data / path), tokenizer), length, path)
        return samples[:32] if options.quick else samples

    calibration = windows(
        tokenize(read_texts(data / options.calibration), tokenizer), length, options.calibration
    )
    texts = {
        "wikitext2 test": cut("wikitext2/test.raw.txt"),
        "corpus validation": cut("corpus/validation.jsonl"),
    }

    def measure(model: Any) -> dict[str, float]:
        return {
            text: evaluate_perplexity(model, samples, options.batch_size).perplexity
            for text, samples in texts.items()
        }

    dense = measure(source.load())
    print("dense", dense, flush=True)
    rows: list[dict[str, Any]] = []
    for pruned_value in PRUNED_VALUES:
        draws = []
        for seed in RANDOM_SEEDS:
            model = source.load()
            prune_at_random(model, options.sparsity, pruned_value, seed)
            draws.append(measure(model))
        mean = {text: sum(draw[text] for draw in draws) / len(draws) for text in texts}
        rows.append(
            {"criterion": "random (mean of 3)", "pruned_value": pruned_value, "perplexity": mean}
        )
        print(rows[-1], flush=True)
        for name, saliency, aggregation in CRITERIA:
            text = RECIPE.format(
                sparsity=options.sparsity,
                saliency=saliency,
                aggregation=aggregation or "null",
                pruned_value=pruned_value,
            )
            loader = calibration_loader(calibration, num_samples, options.batch_size)
            started = time.perf_counter()
            result = prune(source.load(), parse_recipe(text, name), loader, tokenizer)
            rows.append(
                {
                    "criterion": name,
                    "pruned_value": pruned_value,
                    "seconds": round(time.perf_counter() - started, 1),
                    "sparsity": result.reports[0]["total"]["sparsity"],
                    "perplexity": measure(result.model),
                }
            )
            print(rows[-1], flush=True)

    short = os.path.basename(model_name)
    sizes = ", ".join(f"{len(s)} x {length} tokens of {t}" for t, s in texts.items())
    title = (
        f"# {options.sparsity:.0%} of A_log of {short} pruned: perplexity\n\n"
        f"{min(num_samples, len(calibration))} x {length} calibration tokens of "
        f"{options.calibration}. Evaluated on {sizes}; in brackets "
        "the ratio to dense. Seconds are those of the whole oneshot() call.\n"
    )
    save(
        options.name or f"alog_quality_{short}",
        title + "\n" + table(dense, rows),
        {"model": short, "dense": dense, "rows": rows},
    )


@torch.no_grad()
def prune_at_random(model: Any, sparsity: float, pruned_value: str, seed: int) -> None:
    """The floor: the same number of entries, chosen by chance."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in find_mixers(model):
        scores = torch.rand(adapter.A_log.shape, generator=generator)
        chosen = Unstructured(sparsity).lowest(scores[None])[0].to(adapter.A_log.device)
        adapter.A_log[chosen] = PRUNED_VALUES[pruned_value]


def table(dense: dict[str, float], rows: list[dict[str, Any]]) -> str:
    texts = list(dense)
    header = ["criterion"]
    for pruned_value in PRUNED_VALUES:
        header += [f"{pruned_value}: {text}" for text in texts] + ["seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    cells = ["dense"]
    for _ in PRUNED_VALUES:
        cells += [f"{dense[text]:.1f}" for text in texts] + [""]
    lines.append("| " + " | ".join(cells) + " |")
    for name in dict.fromkeys(row["criterion"] for row in rows):
        cells = [name]
        for pruned_value in PRUNED_VALUES:
            row = next(
                r for r in rows if (r["criterion"], r["pruned_value"]) == (name, pruned_value)
            )
            for text in texts:
                value = row["perplexity"][text]
                cells.append(f"{value:.1f} ({value / dense[text]:.3f})")
            cells.append(str(row.get("seconds", "")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
