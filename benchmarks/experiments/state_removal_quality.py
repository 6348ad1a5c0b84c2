"""Perplexity after removing states, key dims or channels, beside the criteria of others.

Nothing here was tuned on the texts that are reported: settings were chosen on the last
windows of the calibration file, which no run of this experiment calibrates on.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from harness import Experiment, Job, Row, assets, joined, markdown
from measuring import (
    HELD_BACK,
    RECALL,
    OfTexts,
    add_run,
    mean_and_range,
    perplexities,
    recall_probes,
    recalled,
    recipe,
    relative,
    row_of,
    stream_of,
)
from pydantic import Field

from sparsessm_plugin.evaluation.data import calibration_loader, windows
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recipes.pruning import ModelSource, prune

# calibration and evaluation
TEXTS = {
    "corpus": ("corpus/calibration.jsonl", "corpus/validation.jsonl"),
    "wikitext2": ("wikitext2/valid.detok.txt", "wikitext2/test.detok.txt"),
}
KINDS = (*TEXTS, *RECALL)
MORE = "reconstruct_steps: 800"
STATE = {
    "output_energy": "saliency: output_energy{more}",
    "output_energy, distilled": "saliency: output_energy{more}, {distill}",
    "output_energy, more text and steps": f"saliency: output_energy, {MORE}",
    "output_energy, distilled, more text and steps": (
        f"saliency: output_energy, {MORE}, {{distill}}, distill_generated: 1150000"
    ),
    "output_energy, distilled by Muon, more text": (
        f"saliency: output_energy, {MORE}, {{distill}}, distill_generated: 1150000, "
        "distill_weights: all_but_vocabulary, distill_optimizer: muon"
    ),
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


class Fields(OfTexts):
    """And the removal."""

    calibration: list[str] = Field(list(TEXTS), description="texts")
    keep: list[int] = Field(
        [],
        description="states; default a half and a quarter of them, of Mamba-2 also an eighth, of "
        "a gated delta net also three quarters",
    )
    channels: float | None = Field(None, description="remove this share of the channels instead")
    criteria: list[str] = Field([], description="default all")
    steps: int = Field(200, description="of reconstruct")
    distill: int = Field(600, description="steps where distilled")
    distill_rate: float | None = Field(None, description="learning rate for these")
    distill_windows: int | None = Field(None, description="for these; default all there are")
    recall: int = Field(0, description="sequences a probe of recall and distance; 32 are enough")


def run(job: Job) -> Iterator[Any]:
    """A run a criterion, text, size and seed."""
    for name in job.configuration.models:
        yield from run_model(name, job)


def run_model(name: str, job: Job) -> Iterator[Any]:
    """The runs of a checkpoint, the criterion of this package first, in case time does not last."""
    chosen: Fields = job.configuration
    rows: list[Row] = job.numbers.setdefault("rows", [])
    source = ModelSource(str(assets() / "models" / name))
    tokenizer = source.load_tokenizer()
    tokens = {path: stream_of(path, tokenizer) for pair in TEXTS.values() for path in pair}
    tests = {
        kind: windows(tokens[path], chosen.evaluate, path)[: chosen.evaluate_windows]
        for kind, (_, path) in TEXTS.items()
    }
    adapter = find_mixers(source.load_skeleton())[0]
    sizes = adapter.sizes
    probes = recall_probes(source, tokenizer, tokens[TEXTS["corpus"][1]], chosen.recall)

    def measure(model: Any) -> dict[str, float | None]:
        return {**perplexities(model, tests, chosen.batch_size), **recalled(model, probes)}

    whole = row_of(rows, {"model": name, "criterion": "dense"}, KINDS)
    if not whole["seeds"] or (probes and whole[RECALL[0]][0] is None):
        whole.update({kind: [value] for kind, value in measure(source.load()).items()})
        whole["seeds"] = [0]
        yield whole
    shares, criteria, rates, letter = [2, 4], STATE, RATES, "N"
    if adapter.recurrence == "delta_rule":
        shares, criteria, rates, letter = [4 / 3, 2, 4], KEY_DIM, RATES_OF_KEY_DIMS, "dk"
    elif not sizes.n_groups == sizes.head_dim == 1:
        shares = [2, 4, 8]
    cases = chosen.keep or [round(sizes.state_size / share) for share in shares]
    if chosen.channels:
        cases, criteria = [chosen.channels], CHANNEL
    wanted = [criterion for criterion in criteria if criterion in (chosen.criteria or criteria)]
    fitted_batches = -(-chosen.windows // chosen.batch_size)
    more = "" if sizes.head_dim == 1 else f", reconstruct_steps: {chosen.steps}"
    for seed, criterion, calibration, case in itertools.product(
        range(chosen.seeds), wanted, chosen.calibration, cases
    ):
        data_free = criterion in DATA_FREE
        if MORE in criteria[criterion] and sizes.head_dim == 1:  # these are mixed in closed form
            continue
        if data_free and (seed or calibration != chosen.calibration[0]):
            continue
        if not job.mine():
            continue
        rate = chosen.distill_rate or rates.get(sizes.state_size / case, RATE_OF_CHANNELS)
        times = 4 if "more text" in criterion else 1
        steps = (4 if "and steps" in criterion else 1) * chosen.distill
        distill = (
            f"distill_steps: {steps}, calibration_batches: {times * fitted_batches}, "
            f"distill_learning_rate: {rate:f}"
        )
        text = criteria[criterion].format(more=more, distill=distill)
        if chosen.channels:
            label = f"{case:.0%} of the channels"
            built = recipe("ChannelRemovalModifier", f"sparsity: {case}, {text}")
        else:
            label = f"{letter} {sizes.state_size} -> {case}"
            built = recipe("StateRemovalModifier", f"keep: {case}, {text}")
        key = {"model": name, "case": label, "criterion": criterion}
        if "distilled" in criterion:
            key["criterion"] += f" ({steps} x {rate:g})"
        key["calibration"] = None if data_free else calibration
        row = row_of(rows, key, KINDS)
        if seed in row["seeds"] or not job.in_time(f"{key} seed {seed}"):
            continue
        count = times * chosen.windows
        if "distilled" in criterion:
            count = chosen.distill_windows or 10**9
        loader = loader_of(tokens, calibration, count, seed, chosen)
        result = prune(source.load(), built, loader, tokenizer)
        measured = {
            kind: value and value / whole[kind][0] for kind, value in measure(result.model).items()
        }
        add_run(row, measured, result.seconds, seed)
        del result.model
        told = {k: round(v, 4) for k, v in measured.items() if v}
        yield f"{key} seed {seed} {told} {result.seconds:.1f} s"


def loader_of(tokens: Any, calibration: str, count: int, seed: int, chosen: Fields) -> Any:
    """Batches of so many calibration windows, or of all there are."""
    path = TEXTS[calibration][0]
    samples = windows(tokens[path], chosen.length, path)
    if calibration == "corpus":
        samples = samples[: -max(1, HELD_BACK // chosen.length)]
    return calibration_loader(samples, count, chosen.batch_size, seed)


def kept_states(row: Row) -> int:
    """Sorts from many states to few."""
    case = row.get("case", "")
    return -int(case.rpartition(" ")[2]) if "->" in case else 0


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a model, size, criterion and calibration text."""
    rows = [row for row in numbers["rows"] if row["seeds"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    of_channels = any("channels" in row.get("case", "") for row in rows)
    order = list(CHANNEL if of_channels else {**STATE, **KEY_DIM})
    rows.sort(
        key=lambda r: (
            models.index(r["model"]),
            r["criterion"] != "dense",
            kept_states(r),
            order.index(r["criterion"].partition(" (")[0]) if r["criterion"] != "dense" else 0,
            r.get("calibration") or "",
        )
    )
    shown = [name for name in RECALL if any(any(row.get(name, [])) for row in rows)]
    lines = []
    for row in rows:
        dense = row["criterion"] == "dense"
        digits = 2 if dense else 4
        cells = [mean_and_range(row.get(kind, []), digits) or "-" for kind in (*TEXTS, *shown)]
        if dense:
            lines.append([row["model"], "dense", "", "", *cells, "", ""])
            continue
        first = [row["model"], row["case"], row["criterion"], row["calibration"] or "-"]
        lines.append([*first, *cells, str(len(row["seconds"])), mean_and_range(row["seconds"], 1)])
    head = ["model", "case", "criterion", "calibrated on", "corpus validation", "wikitext2 test"]
    more = (
        " More text: layers fitted to four times as many windows in 800 steps, half of the text "
        "of distillation written by the dense model; and steps: four times as many. By Muon: of "
        "all weights but the vocabulary's."
    )
    more = more if any("more text" in row["criterion"] for row in rows) else ""
    recall = (
        " Recall: perplexity of tokens that the context tells, mean over distances of 32, 128 and "
        "512 tokens: values of keys (lookup), a span of the corpus validation text read twice "
        "(repeat), pairs of neighbours that stood there before (bigram)."
    )
    return joined(
        f"Perplexity relative to dense, mean of the seeds (highest - lowest of them). "
        f"{chosen.windows} x {chosen.length} calibration tokens, {chosen.steps} steps where a "
        f"mixer is reconstructed. Distilled: so many steps of at most this learning rate over "
        f"{chosen.distill_windows or 'all'} windows (2252 of the corpus, 599 of wikitext2), "
        "layers fitted to as many as elsewhere." + more + (recall if shown else ""),
        markdown([*head, *shown, "seeds", "seconds"], lines),
    )


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """Perplexity relative to dense, calibrated on the corpus or on nothing."""
    found = {}
    for row in numbers["rows"]:
        if row.get("case") and row["calibration"] != "wikitext2":
            found |= relative(row, TEXTS, lambda r: f"{r['model']}, {r['case']}, {r['criterion']}")
    return found


SHARED = "Up to 15 processes shared a GPU: seconds are several times what a run alone takes."
CHOSEN = "Settings of distillation were chosen on text held back from the calibration file."
OF_CPU = {
    "windows": 64,
    "batch_size": 4,
    "evaluate_windows": 32,
    "criteria": [name for name in STATE if not {"distilled", "more"} & set(name.split())],
    "remark": "Two processes shared two cores; 32 windows of each text.",
}
QUICK = {
    **OF_CPU,
    "remark": "",
    "calibration": ["corpus"],
    "seeds": 1,
    "windows": 8,
    "evaluate_windows": 2,
    "steps": 50,
}
EXPERIMENT = Experiment(
    measures="perplexity with fewer states, key dims or channels, by criterion",
    device="CPU or GPU",
    seconds=3000,
    subjects="mamba-25m, mamba2-25m, granite-hybrid-16m, qwen3_5-15m, mamba-6m, mamba2-6m",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "state_removal_quality_mamba-25m": {"remark": f"{SHARED} {CHOSEN}"},
        "state_removal_quality_mamba2-25m": {
            "models": ["mamba2-25m"],
            "remark": f"{SHARED} 'last' at N 16 ran on two CPU cores. {CHOSEN}",
        },
        "state_removal_quality_qwen3_5-15m": {
            "models": ["qwen3_5-15m"],
            "recall": 32,
            "remark": "One H200 that other jobs shared, so seconds are high. Recall: of the runs "
            "made after the task existed.",
        },
        "state_removal_quality_granite-hybrid-16m": {
            "models": ["granite-hybrid-16m"],
            "calibration": ["corpus"],
            "recall": 32,
        },
        "channel_removal_quality_mamba-25m": {
            "channels": 0.25,
            "calibration": ["corpus"],
            "criteria": [name for name in CHANNEL if "distilled" not in name],
            "remark": "Up to six processes shared a GPU: seconds are several times what a run "
            "alone takes.",
        },
        "state_removal_quality_mamba-6m_cpu": {**OF_CPU, "models": ["mamba-6m"]},
        "state_removal_quality_mamba2-6m_cpu": {**OF_CPU, "models": ["mamba2-6m"]},
    },
    quick={
        "state_removal_quality_mamba-6m_cpu": {**QUICK, "models": ["mamba-6m"]},
        "state_removal_quality_mamba2-6m_cpu": {**QUICK, "models": ["mamba2-6m"]},
    },
    ratios=ratios,
    extends=("models", "calibration", "keep", "criteria", "seeds", "recall"),
)
