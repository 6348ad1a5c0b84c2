"""Perplexity after pruning all projections of the mixers, beside the methods of others.

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this experiment calibrates on; ``development``
evaluates on these.
"""

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

from harness import Experiment, Job, Row, joined, markdown
from measuring import (
    TEXTS,
    Checkpoint,
    OfTexts,
    add_run,
    mean_and_range,
    mean_and_spread,
    recipe,
    row_of,
)
from pydantic import Field

from sparsessm_plugin.families.fast_forward import fast_forward

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
CASES["8:16"] = 'sparsity: 0.5, mask_structure: "8:16"'
# all projections, the convolution among them, in the order that there is: what n:m changes
MIXERS, AS_THEY_ARE = '"re:.*(mixer|mamba|linear_attn)$"', "permute_channels: false"
# of the cases with groups alone
IN_GROUPS = {
    "defaults, SparseGPT": (OURS, "solver: sparsegpt"),
    "defaults, order as it is": (OURS, AS_THEY_ARE),
    "defaults, order as it is, conv1d": (OURS, f"{AS_THEY_ARE}, targets: [{MIXERS}]"),
}
METHODS |= IN_GROUPS
# fields that name the layers of MLP and attention, too, by modifier
EVERYWHERE = {
    OURS: "targets: [Linear, conv1d], ignore: [lm_head]",
    UPSTREAM: "targets: [Linear], ignore: [lm_head]",
}


class Fields(OfTexts):
    """And the methods."""

    windows: int = Field(32, description="calibration windows")
    length: int = Field(2048, description="tokens a calibration window")
    batch_size: int = Field(4, description="windows")
    cases: list[str] = Field(["50 %", "2:4", "70 %"], description="shares of zeros")
    methods: list[str] = Field(
        [m for m in METHODS if m not in IN_GROUPS], description="beside each other"
    )
    everywhere: bool = Field(False, description="prune the layers of MLP and attention, too")
    development: bool = Field(False, description="evaluate on the end of the calibration text")


def run(job: Job) -> Iterator[Any]:
    """A run a case, method and seed."""
    for name in job.configuration.models:
        yield from run_model(name, job)


def run_model(name: str, job: Job) -> Iterator[Any]:
    """The runs of a checkpoint."""
    chosen: Fields = job.configuration
    rows: list[Row] = job.numbers.setdefault("rows", [])
    one = Checkpoint(name, chosen, chosen.batch_size)
    dense = row_of(rows, {"model": name, "case": "", "method": "dense"}, one.tests)
    if not dense["seeds"]:
        dense.update({kind: [value] for kind, value in one.evaluate(one.source.load()).items()})
        dense["seeds"] = [0]
        yield dense
    for seed, case, method in itertools.product(range(chosen.seeds), chosen.cases, chosen.methods):
        modifier, fields = METHODS[method]
        label, groups = f"{case} everywhere" if chosen.everywhere else case, ":" in case
        if groups and "allocation: uniform" in fields:
            # windows of 4 inputs hold no other groups: the convolution stays dense then
            named = f", targets: [{MIXERS}]" if case == "2:4" and not chosen.everywhere else ""
            fields = f"{fields}, {AS_THEY_ARE}{named}"
        if chosen.everywhere:
            own = fields if modifier == OURS else ""
            fields = ", ".join(filter(None, [own, EVERYWHERE[modifier]]))
        if (seed and method == "magnitude") or (groups and "optimal" in method):
            continue
        if method in IN_GROUPS and (not groups or chosen.everywhere):
            continue
        if case != "2:4" and MIXERS in fields:
            continue
        if (groups and method.startswith("paper")) or not job.mine():
            continue
        row = row_of(rows, {"model": name, "case": label, "method": method}, one.tests)
        if seed in row["seeds"] or not job.in_time(f"{name} {label} {method} seed {seed}"):
            continue
        built = recipe(modifier, ", ".join(filter(None, [CASES[case], fields])))
        model = one.source.load()
        # before the first pass the fast path must be there for upstream's modifier, too
        with fast_forward(model):
            result = one.prune(built, chosen.windows, seed, model)
        values = one.evaluate(result.model)
        add_run(row, values, result.seconds, seed)
        told = {kind: round(value, 3) for kind, value in values.items()}
        yield f"{name} {label} {method} seed {seed} {told} {result.seconds:.1f} s"


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


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a model, case and method."""
    rows = [row for row in numbers["rows"] if row["seeds"]]
    kinds = ["development"] if chosen.development else list(TEXTS)
    models = list(dict.fromkeys(row["model"] for row in rows))
    order = {"": 0, **{case: i + 1 for i, case in enumerate(CASES)}}
    methods = ["dense", *METHODS]
    rows.sort(
        key=lambda r: (
            models.index(r["model"]),
            "everywhere" in r["case"],
            order[r["case"].removesuffix(" everywhere")],
            methods.index(r["method"]),
        )
    )
    lines = []
    for row in rows:
        cells = []
        for kind in kinds:
            share = "" if row["method"] == "dense" else remaining(rows, row, kind)
            finite = math.isfinite(statistics.mean(row[kind]))
            cells.append(mean_and_spread(row[kind]) + share if finite else "-")
        first = [row["model"], row["case"], row["method"]]
        last = [str(len(row["seconds"]) or ""), mean_and_range(row["seconds"], 1)]
        lines.append([*first, *cells, *last])
    return joined(
        f"Perplexity, mean of the seeds ± half of (highest - lowest); in brackets the share of "
        f"the loss of '{REFERENCE}' that remains. {chosen.windows} x {chosen.length} calibration "
        f"tokens of the corpus; seconds are those of the whole oneshot() call.",
        markdown(["model", "zeros", "method", *kinds, "seeds", "seconds"], lines),
    )


ALONE = (
    "'SparseGPT uniform', 'sparsegpt, optimal, mixer' and 'defaults' had the GPU to themselves, "
    "the other methods shared it with a training run: their seconds are too many."
)
SHOWN = [
    "magnitude",
    "wanda",
    "SparseGPT of LLM Compressor",
    REFERENCE,
    "paper, alpha 0.04",
    "sparsegpt, optimal, mixer",
    "defaults",
]
GROUPS = {
    "cases": ["2:4", "8:16"],
    "methods": ["SparseGPT of LLM Compressor", REFERENCE, *reversed(IN_GROUPS), "defaults"],
}
SMALL = {"windows": 64, "length": 512, "batch_size": 8, "evaluate": 1024, "evaluate_windows": 48}
EXPERIMENT = Experiment(
    measures="perplexity with zeros in all projections, by method",
    device="CPU or GPU",
    seconds=1200,
    subjects="mamba-25m, mamba2-25m, granite-hybrid-16m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        f"whole_model_quality_{model}": {"models": [model], "methods": SHOWN, "remark": ALONE}
        for model in ("mamba-25m", "mamba2-25m")
    }
    | {
        f"whole_model_quality_{model}_h200": {
            "models": [model],
            "cases": ["2:4", "50 %", "70 %"],
            "methods": ["SparseGPT of LLM Compressor", REFERENCE, "defaults"],
        }
        for model in ("mamba-25m", "mamba2-25m")
    }
    | {
        "whole_model_quality_granite-hybrid-16m": {
            "models": ["granite-hybrid-16m"],
            "everywhere": True,
        },
        "whole_model_quality_granite-hybrid-16m_cpu": {
            "models": ["granite-hybrid-16m"],
            "everywhere": True,
            "methods": ["SparseGPT of LLM Compressor", REFERENCE, "defaults"],
            **SMALL,
        },
        "whole_model_quality_groups_25m_cpu": {
            "models": ["mamba-25m", "mamba2-25m"],
            "seeds": 1,
            "cases": ["2:4"],
            "methods": [REFERENCE, "defaults", "SparseGPT of LLM Compressor"],
            **SMALL,
        },
        "whole_model_quality_groups_6m_cpu": {
            "models": ["mamba-6m", "mamba2-6m"],
            "seeds": 1,
            **GROUPS,
            **SMALL,
        },
    },
    quick={
        "": {
            "models": ["mamba-6m"],
            "cases": ["50 %"],
            "methods": ["magnitude", REFERENCE],
            "seeds": 1,
            "windows": 8,
            "length": 512,
            "evaluate": 512,
            "evaluate_windows": 8,
            "development": True,
        }
    },
    extends=("models", "cases", "methods", "seeds"),
    alone=False,
)
