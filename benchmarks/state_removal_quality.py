"""Perplexity after removing states, key dims or channels, beside the criteria of others.

python benchmarks/state_removal_quality.py --models mamba-25m mamba2-25m    # on a GPU
python benchmarks/state_removal_quality.py --models qwen3_5-15m --name key_dim_quality --resume
python benchmarks/state_removal_quality.py --models mamba-6m --windows 24   # on a CPU

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this script calibrates on.
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from common import (
    RECALL,
    Part,
    add_part_arguments,
    assets,
    begin,
    keep,
    merge,
    perplexities,
    recall_probes,
    recalled,
    row_of,
    save,
)

from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

TEXTS = {
    "corpus": ("corpus/calibration.jsonl", "corpus/validation.jsonl"),
    "wikitext2": ("wikitext2/valid.detok.txt", "wikitext2/test.detok.txt"),
}
HELD_BACK = 100  # windows at the end of the corpus calibration text, for development
STATE = {
    "output_energy": "saliency: output_energy{more}",
    "output_energy, distilled": "saliency: output_energy{more}, {distill}",
    "output_energy, no compensation": "saliency: output_energy, compensate: none",
    "paper": "saliency: paper, compensate: none",
    "ghost": "saliency: ghost, compensate: none",
    "magnitude": "saliency: magnitude, compensate: none",
    "last": "saliency: last, compensate: none",
}
OTHERS_OF_KEY_DIMS = ("rrqr", "pairs", "qk", "magnitude", "last", "random")
KEY_DIM = {
    "output_energy": "saliency: output_energy{more}",
    "output_energy, distilled": "saliency: output_energy{more}, {distill}",
    "output_energy, no compensation": "saliency: output_energy, compensate: none",
    **{f"{name}, compensated": f"saliency: {name}{{more}}" for name in ("rrqr", "magnitude")},
    **{name: f"saliency: {name}, compensate: none" for name in OTHERS_OF_KEY_DIMS},
}
CHANNEL = {
    "output_energy": "saliency: output_energy",
    "output_energy, distilled": "saliency: output_energy, {distill}",
    "magnitude, out_proj and x_proj fitted": "saliency: magnitude",
    "out_proj_norm, out_proj and x_proj fitted": "saliency: out_proj_norm",
    "magnitude": "saliency: magnitude, compensate: none",
    "out_proj_norm": "saliency: out_proj_norm, compensate: none",
}
# Learning rate where a model is distilled; the more is removed, the further the weights must go.
RATES = {2: 1e-4, 4: 3e-4, 8: 3e-4}
RATES_OF_KEY_DIMS = {4 / 3: 1e-4, 2: 3e-4, 4: 1e-3}
RATE_OF_CHANNELS = 3e-4
DATA_FREE = ("magnitude", "last", "random", "out_proj_norm")


def recipe(modifier: str, fields: str) -> Any:
    text = f"prune_stage:\n  prune_modifiers:\n    {modifier}: {{{fields}}}\n"
    return parse_recipe(text, "benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mamba-25m"])
    parser.add_argument("--calibration", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument(
        "--keep",
        nargs="+",
        type=int,
        help="states; default a half and a quarter of them, of "
        "Mamba-2 also an eighth, of a gated delta net also three quarters",
    )
    parser.add_argument("--channels", type=float, help="remove this share of the channels instead")
    parser.add_argument("--criteria", nargs="+", help="default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=256, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a calibration window")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="of reconstruct")
    parser.add_argument("--distill", type=int, default=600, help="steps where distilled")
    parser.add_argument("--distill-rate", type=float, help="learning rate for these")
    parser.add_argument("--distill-windows", type=int, help="for these; default all there are")
    parser.add_argument("--evaluate", type=int, default=2048, help="tokens a window of evaluation")
    parser.add_argument("--evaluate-windows", type=int, help="at most so many")
    parser.add_argument(
        "--recall",
        nargs="?",
        type=int,
        const=32,
        default=0,
        help="also the loss of what can be recalled, with so many sequences a probe and distance",
    )
    parser.add_argument("--budget", type=float, default=1e9, help="start no run after seconds")
    parser.add_argument("--name", default="state_removal_quality")
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
        save(options.name, table(rows, options), {"rows": rows})


def run_model(name: str, options: Any, rows: list[dict[str, Any]], started: float) -> None:
    source = ModelSource(str(assets() / "models" / name))
    tokenizer = source.load_tokenizer()
    tokens = {
        path: tokenize(read_texts(assets() / "data" / path), tokenizer)
        for pair in TEXTS.values()
        for path in pair
    }
    tests = {
        kind: windows(tokens[pair[1]], options.evaluate, pair[1])[: options.evaluate_windows]
        for kind, pair in TEXTS.items()
    }
    adapter = find_mixers(source.load_skeleton())[0]
    sizes = adapter.sizes
    probes = recall_probes(source, tokenizer, tokens[TEXTS["corpus"][1]], options.recall)
    kinds = (*TEXTS, *RECALL)

    def measure(model: Any) -> dict[str, float | None]:
        return {**perplexities(model, tests, options.batch_size), **recalled(model, probes)}

    whole = row_of(rows, {"model": name, "criterion": "dense"}, kinds)
    if not whole["seeds"] or (probes and whole[RECALL[0]][0] is None):
        whole.update({kind: [value] for kind, value in measure(source.load()).items()})
        whole["seeds"] = [0]
    dense = {kind: whole[kind][0] for kind in kinds}
    shares, criteria, rates, letter = [2, 4], STATE, RATES, "N"
    if adapter.recurrence == "delta_rule":
        shares, criteria, rates, letter = [4 / 3, 2, 4], KEY_DIM, RATES_OF_KEY_DIMS, "dk"
    elif not sizes.n_groups == sizes.head_dim == 1:
        shares = [2, 4, 8]
    cases = options.keep or [round(sizes.state_size / share) for share in shares]
    if options.channels:
        cases, criteria = [options.channels], CHANNEL
    fitted_batches = -(-options.windows // options.batch_size)
    part = Part(options.part)
    # the criterion of this package first, in case the budget does not last
    for seed in range(options.seeds):
        for criterion, fields in criteria.items():
            if options.criteria and criterion not in options.criteria:
                continue
            for calibration in options.calibration:
                for case in cases:
                    data_free = criterion in DATA_FREE
                    if data_free and (seed or calibration != options.calibration[0]):
                        continue
                    if not part.next():
                        continue
                    more = "" if sizes.head_dim == 1 else f", reconstruct_steps: {options.steps}"
                    rate = options.distill_rate or rates.get(
                        sizes.state_size / case, RATE_OF_CHANNELS
                    )
                    distill = (
                        f"distill_steps: {options.distill}, calibration_batches: {fitted_batches}, "
                        f"distill_learning_rate: {rate:f}"
                    )
                    text = fields.format(more=more, distill=distill)
                    if options.channels:
                        label = f"{case:.0%} of the channels"
                        built = recipe("ChannelRemovalModifier", f"sparsity: {case}, {text}")
                    else:
                        label = f"{letter} {sizes.state_size} -> {case}"
                        built = recipe("StateRemovalModifier", f"keep: {case}, {text}")
                    key = {"model": name, "case": label, "criterion": criterion}
                    if "distilled" in criterion:
                        key["criterion"] += f" ({options.distill} x {rate:g})"
                    key["calibration"] = None if data_free else calibration
                    row = row_of(rows, key, kinds)
                    if seed in row["seeds"]:
                        continue
                    if time.monotonic() - started > options.budget:
                        print(f"left out: {name} {criterion} {calibration} {case} seed {seed}")
                        continue
                    begun = time.perf_counter()
                    count = options.windows
                    if "distilled" in criterion:
                        count = options.distill_windows or 10**9
                    loader = loader_of(tokens, calibration, count, seed, options)
                    result = prune(source.load(), built, loader, tokenizer)
                    seconds = time.perf_counter() - begun
                    measured = {
                        kind: value and value / dense[kind]
                        for kind, value in measure(result.model).items()
                    }
                    for kind, value in measured.items():
                        row[kind].append(value)
                    row["seconds"].append(seconds)
                    row["seeds"].append(seed)
                    print(
                        name, label, criterion, calibration, f"seed {seed}",
                        {k: round(v, 4) for k, v in measured.items() if v},
                        f"{seconds:.1f} s", flush=True,
                    )  # fmt: skip
                    keep(options.name, {"rows": rows})
                    del result


def loader_of(tokens: Any, calibration: str, count: int, seed: int, options: Any) -> Any:
    """Batches of so many calibration windows, or of all there are."""
    path = TEXTS[calibration][0]
    samples = windows(tokens[path], options.length, path)
    if calibration == "corpus":
        samples = samples[: -max(1, HELD_BACK * 512 // options.length)]
    return calibration_loader(samples, count, options.batch_size, seed)


def kept_states(row: dict[str, Any]) -> int:
    """Sorts from many states to few."""
    case = row.get("case", "")
    return -int(case.rpartition(" ")[2]) if "->" in case else 0


def table(rows: list[dict[str, Any]], options: Any) -> str:
    shown = [name for name in RECALL if any(any(row.get(name, [])) for row in rows)]
    recall = (
        " Recall: perplexity of tokens that the context tells, mean over distances of 32, 128 and "
        "512 tokens: values of keys (lookup), a span of the corpus validation text read twice "
        "(repeat), pairs of neighbours that stood there before (bigram)."
    )
    lines = [
        f"Perplexity relative to dense, mean of the seeds (highest - lowest of them). "
        f"{options.windows} x {options.length} calibration tokens, "
        f"{options.steps} steps where a mixer is reconstructed. Distilled: so many steps of at "
        f"most this learning rate over {options.distill_windows or 'all'} windows (2252 of the "
        "corpus, 599 of wikitext2), layers fitted to as many as elsewhere."
        + (recall if shown else ""),
        "",
        "| model | case | criterion | calibrated on | corpus validation | wikitext2 test "
        + "".join(f"| {name} " for name in shown)
        + "| seeds | seconds |",
        "|---" * (8 + len(shown)) + "|",
    ]
    order = {name: i for i, name in enumerate({**STATE, **KEY_DIM, **CHANNEL})}
    for row in sorted(
        (row for row in rows if row["seeds"]),
        key=lambda r: (
            options.models.index(r["model"]),
            r["criterion"] != "dense",
            kept_states(r),
            order.get(r["criterion"].partition(" (")[0], 99),
            r.get("calibration") or "",
        ),
    ):
        cells = []
        for kind in (*TEXTS, *shown):
            values = [value for value in row.get(kind, []) if value is not None]
            if row["criterion"] == "dense":
                cells += [f"{value:.2f}" for value in values] or ["-"]
                continue
            spread = f" ({max(values) - min(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "-")
        if row["criterion"] == "dense":
            lines.append(f"| {row['model']} | dense | | | " + " | ".join(cells) + " | | |")
            continue
        first = [row["model"], row["case"], row["criterion"], row["calibration"] or "-"]
        last = [str(len(row["seconds"])), f"{statistics.mean(row['seconds']):.1f}"]
        lines.append("| " + " | ".join([*first, *cells, *last]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
