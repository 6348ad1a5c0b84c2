"""Perplexity after pruning all projections of the mixers, beside the methods of others.

python benchmarks/whole_model_quality.py --models mamba-25m mamba2-25m    # on a GPU
python benchmarks/whole_model_quality.py --models mamba-6m --development --seeds 1    # on a CPU

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this script calibrates on. ``--development``
evaluates on these and writes no result.
"""

import argparse
import math
import os
import statistics
import time
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import (
    Part,
    add_part_arguments,
    assets,
    begin,
    keep,
    merge,
    perplexities,
    row_of,
    save,
)

from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

CALIBRATION = "corpus/calibration.jsonl"
TESTS = {"corpus": "corpus/validation.jsonl", "wikitext2": "wikitext2/test.detok.txt"}
HELD_BACK = 100 * 512  # tokens at the end of the calibration text, for development
OURS, UPSTREAM = "SensitivitySparseGPTModifier", "SparseGPTModifier"
REFERENCE = "SparseGPT uniform"
PLAIN = "allocation: uniform, target_output: own"
METHODS = {
    "magnitude": (OURS, "solver: magnitude, allocation: uniform"),
    "wanda": (OURS, "solver: wanda, allocation: uniform"),
    # calls neither dt_proj nor conv1d, and fails on a convolution
    "SparseGPT of LLM Compressor": (
        UPSTREAM,
        'targets: ["re:.*in_proj$", "re:.*x_proj$", "re:.*mixer.out_proj$"]',
    ),
    REFERENCE: (OURS, f"solver: sparsegpt, {PLAIN}"),
    "paper, alpha 0.04": (
        OURS,
        "solver: sparsegpt, allocation: paper, alpha: 0.04, target_output: own",
    ),
    "ALPS uniform": (OURS, f"solver: alps, {PLAIN}"),
    "sparsegpt, optimal": (OURS, "solver: sparsegpt, allocation: optimal, target_output: own"),
    "alps, mixer": (OURS, "solver: alps, allocation: uniform, target_output: mixer"),
    "sparsegpt, optimal, mixer": (OURS, "solver: sparsegpt"),
    "defaults": (OURS, ""),
}
CASES = {"50 %": "sparsity: 0.5", "2:4": 'sparsity: 0.5, mask_structure: "2:4"'}
CASES["70 %"] = "sparsity: 0.7"
# fields that name the layers of MLP and attention, too, by modifier
EVERYWHERE = {
    OURS: "targets: [Linear, conv1d], ignore: [lm_head]",
    UPSTREAM: "targets: [Linear], ignore: [lm_head]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mamba-25m"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--everywhere", action="store_true", help="prune the layers of MLP and attention, too"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a calibration window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--evaluate", type=int, default=2048, help="tokens a window of evaluation")
    parser.add_argument("--evaluate-windows", type=int, help="at most so many")
    parser.add_argument("--development", action="store_true", help="write no result")
    parser.add_argument("--budget", type=float, default=1e9, help="start no run after seconds")
    parser.add_argument("--name", default="whole_model_quality")
    add_part_arguments(parser)
    options = parser.parse_args()
    if options.merge:
        rows, found = merge(options.merge)
        options.models = list(dict.fromkeys(row["model"] for row in rows))
        text = "\n\n".join(filter(None, [options.remark, table(rows, options)]))
        save(options.name, text, {"rows": rows}, found)
        return
    started = time.monotonic()
    rows = begin(options).get("rows", [])
    for name in options.models:
        run_model(name, options, rows, started)
        if not options.development:
            save(options.name, table(rows, options), {"rows": rows})
    if options.development:
        print(table(rows, options))


def run_model(name: str, options: Any, rows: list[dict[str, Any]], started: float) -> None:
    source = ModelSource(str(assets() / "models" / name))
    tokenizer = source.load_tokenizer()
    stream = tokenize(read_texts(assets() / "data" / CALIBRATION), tokenizer)
    samples = windows(stream[:-HELD_BACK], options.length, CALIBRATION)
    tests = {
        kind: windows(tokens, options.evaluate, kind)[: options.evaluate_windows]
        for kind, tokens in evaluation_streams(stream, tokenizer, options).items()
    }
    dense = row_of(rows, {"model": name, "case": "", "method": "dense"}, tests)
    if not dense["seeds"]:
        for kind, value in perplexities(source.load(), tests, options.batch_size).items():
            dense[kind].append(value)
        dense["seeds"].append(0)
    print(name, "dense", {kind: dense[kind][0] for kind in tests}, flush=True)
    part = Part(options.part)
    for seed in range(options.seeds):
        for case in options.cases:
            for method in options.methods:
                modifier, fields = METHODS[method]
                label = f"{case} everywhere" if options.everywhere else case
                if options.everywhere:
                    own = fields if modifier == OURS else ""
                    fields = ", ".join(filter(None, [own, EVERYWHERE[modifier]]))
                if (seed and method == "magnitude") or (case == "2:4" and "optimal" in method):
                    continue
                if case == "2:4" and method.startswith("paper"):
                    continue
                if not part.next():
                    continue
                row = row_of(rows, {"model": name, "case": label, "method": method}, tests)
                if seed in row["seeds"]:
                    continue
                if time.monotonic() - started > options.budget:
                    print(f"left out: {name} {label} {method} seed {seed}")
                    continue
                loader = calibration_loader(samples, options.windows, options.batch_size, seed)
                text = ", ".join(part for part in (CASES[case], fields) if part)
                text = f"prune_stage:\n  prune_modifiers:\n    {modifier}: {{{text}}}\n"
                model = source.load()
                # before the first pass the fast path must be there for upstream's modifier, too
                with fast_forward(model):
                    result = prune(model, parse_recipe(text, "benchmark"), loader, tokenizer)
                for kind, value in perplexities(result.model, tests, options.batch_size).items():
                    row[kind].append(value)
                row["seconds"].append(result.seconds)
                row["seeds"].append(seed)
                if not options.development:
                    keep(options.name, {"rows": rows})
                print(
                    name, label, method, f"seed {seed}",
                    {kind: round(row[kind][-1], 3) for kind in tests},
                    f"{result.seconds:.1f} s", flush=True,
                )  # fmt: skip


def evaluation_streams(stream: torch.Tensor, tokenizer: Any, options: Any) -> dict[str, Any]:
    if options.development:
        return {"development": stream[-HELD_BACK:]}
    return {
        kind: tokenize(read_texts(assets() / "data" / path), tokenizer)
        for kind, path in TESTS.items()
    }


def remaining(rows: list[dict[str, Any]], row: dict[str, Any], kind: str) -> str:
    """Share of the perplexity that uniform SparseGPT adds to the dense one that remains."""
    same = [r for r in rows if r["model"] == row["model"]]
    dense = next(r for r in same if r["method"] == "dense")[kind][0]
    reference = [r for r in same if r["method"] == REFERENCE and r["case"] == row["case"]]
    reference = [r for r in reference if r["seeds"]]
    if not reference:
        return ""
    lost = statistics.mean(reference[0][kind]) - dense
    return f" ({(statistics.mean(row[kind]) - dense) / lost:.0%})" if lost > 0 else ""


def table(rows: list[dict[str, Any]], options: Any) -> str:
    kinds = ["development"] if options.development else list(TESTS)
    lines = [
        f"Perplexity, mean of the seeds ± half of (highest - lowest); in brackets the share of "
        f"the loss of '{REFERENCE}' that remains. {options.windows} x {options.length} "
        f"calibration tokens of the corpus; seconds are those of the whole oneshot() call.",
        "",
        f"| model | zeros | method | {' | '.join(kinds)} | seeds | seconds |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|",
    ]
    order = {"": 0, **{case: i + 1 for i, case in enumerate(CASES)}}
    methods = ["dense", *METHODS]
    for row in sorted(
        (row for row in rows if row["seeds"]),
        key=lambda r: (
            options.models.index(r["model"]),
            "everywhere" in r["case"],
            order[r["case"].removesuffix(" everywhere")],
            methods.index(r["method"]),
        ),
    ):
        cells = []
        for kind in kinds:
            values = row[kind]
            value = statistics.mean(values)
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            share = "" if row["method"] == "dense" else remaining(rows, row, kind)
            cells.append(f"{value:.2f}{spread}{share}" if math.isfinite(value) else "-")
        seconds = f"{statistics.mean(row['seconds']):.1f}" if row["seconds"] else ""
        lines.append(
            f"| {row['model']} | {row['case']} | {row['method']} | {' | '.join(cells)} "
            f"| {len(row['seconds']) or ''} | {seconds} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
