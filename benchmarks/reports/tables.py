"""Tables of README and documentation, made from the JSON in ``benchmarks/results``.

``table(name)`` gives Markdown; the names are the keys of ``TABLES``.
"""

import re
from collections.abc import Callable, Iterable
from statistics import fmean

import harness
from harness import Row, load, markdown

# what the methods that states are chosen by are called on the pages
CRITERIA = {
    "output_energy": "default",
    "output_energy, no compensation": "nothing fitted",
    "ghost": "GHOST",
    "paper": "SparseSSM's vote",
    "last": "last states",
    "magnitude": "magnitude",
}
FAMILIES = {
    "mamba": "Mamba",
    "falcon_mamba": "FalconMamba",
    "jamba": "Jamba",
    "zamba": "Zamba",
    "mamba2": "Mamba2",
    "bamba": "Bamba",
    "zamba2": "Zamba2",
    "granitemoehybrid": "GraniteMoeHybrid",
    "falcon_h1": "FalconH1",
    "nemotron_h": "NemotronH",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 with experts",
    "qwen3_next": "Qwen3-Next",
    "olmo_hybrid": "OLMo-Hybrid",
}
_MATRIX = {
    "`StateRemovalModifier`": ("states", "states, distilled"),
    "`ChannelRemovalModifier`": ("channels or heads, half", "channels or head_dim, quarter"),
    "`SensitivitySparseGPTModifier`": ("projections", "projections, 2:4", "projections, wanda"),
    "`GradientMagnitudeModifier`": ("all by gradient", "all by gradient, tuned"),
    "`SparseGPTQModifier`, int8 and FP8": ("w8a8", "fp8"),
    "int4, packed": ("int4, packed",),
    "int4, in bytes": ("int4, in bytes",),
    "`SparseSSMModifier`": ("A_log, zero", "A_log, memoryless", "A_log, 2:4"),
}


def number(value: float | None, digits: int = 3) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def relative(rows: list[Row], row: Row, kind: str = "corpus") -> float | None:
    """Mean perplexity of a row by that of its dense model, on one text; None without a run."""
    dense = next(
        r for r in rows if "dense" in (r.get("criterion"), r.get("method")) and same_model(r, row)
    )
    return fmean(row[kind]) / fmean(dense[kind]) if row.get(kind) else None


def same_model(one: Row, other: Row) -> bool:
    """Whether two rows are of one model."""
    return one.get("model") == other.get("model")


def by_criterion(names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Perplexity relative to dense by case and criterion, calibrated on the corpus or not at all.

    ``distilled`` stands for whatever distillation did best at.
    """
    found: dict[str, dict[str, float]] = {}
    for name in names:
        rows = load(name)["rows"]
        for row in rows:
            # relative to dense already
            if not row.get("case") or not row["corpus"] or row.get("calibration") == "wikitext2":
                continue
            value = fmean(row["corpus"])
            criterion = row["criterion"]
            if ", distilled" in criterion:
                criterion = "distilled"
            cells = found.setdefault(f"{row['model']}, {row['case'].replace('->', 'to')}", {})
            cells[criterion] = min(value, cells.get(criterion, value))
    return dict(sorted(found.items(), key=lambda item: (item[0].partition(",")[0], -kept(item[0]))))


def kept(case: str) -> int:
    """The last number of a case, as in ``N 16 to 8``."""
    return int(re.findall(r"\d+", case)[-1])


def criteria_table(names: Iterable[str]) -> str:
    """A row a model and case, a column a criterion."""
    cases = by_criterion(names)
    order = ["output_energy", "distilled", *list(CRITERIA)[1:]]
    used = [c for c in order if any(c in cells for cells in cases.values())]
    used += sorted({c for cells in cases.values() for c in cells} - set(used))
    head = ["", *(CRITERIA.get(c, c) for c in used)]
    return markdown(
        head, ([case, *(number(cells.get(c)) for c in used)] for case, cells in cases.items())
    )


def structure_rows() -> list[Row]:
    """What was measured of models with fewer layers, a narrower stream and so on."""
    found = []
    for path in sorted(harness.RESULTS.glob("structure_quality_*.json")):
        found += [r for r in load(path.stem)["rows"] if r.get("axis") and r.get("corpus")]
    return found


def structure_table(axis: str) -> str:
    """Perplexities relative to dense of the models that an axis made smaller."""
    rows = [
        [
            row["model"],
            number(fmean(row["parameters"])),
            row["method"],
            f"{row['minutes']:g}" if row.get("minutes") else "none",
            number(fmean(row["corpus"])),
            number(fmean(row["wikitext2"])),
            str(len(row["corpus"])),
        ]
        for row in structure_rows()
        if row["axis"] == axis
    ]
    minutes = "minutes of distillation"
    head = ["model", "parameters", "method", minutes, "corpus", "WikiText-2", "draws"]
    return markdown(head, rows) if rows else "*No trained checkpoint has been measured yet.*"


def narrower() -> str:
    """Narrower streams after minutes of distillation, half of its text generated."""
    rows = [
        [
            row["model"],
            number(fmean(row["parameters"]), 2),
            number(fmean(row["corpus"])),
            str(len(row["corpus"])),
        ]
        for row in structure_rows()
        if row["axis"] == "hidden" and row["method"] == "output energy, generated text"
    ]
    return markdown(["model", "parameters", "perplexity", "draws"], rows)


def projection_rows(model: str) -> list[Row]:
    """Zeros in the projections of a model, each row with its ratio to dense.

    What was measured again with what the defaults are now stands for what was measured before,
    where it has as many draws.
    """
    found: dict[tuple[str, str], Row] = {}
    for name in (f"whole_model_quality_{model}", f"whole_model_quality_{model}_h200"):
        rows = load(name)["rows"]
        for row in rows:
            key = row["case"], row["method"]
            if key not in found or len(row["seeds"]) >= len(found[key]["seeds"]):
                found[key] = {**row, "relative": relative(rows, row)}
    return list(found.values())


def projections() -> str:
    """Zeros in the projections: a row a model and share, a column a method."""
    columns = {
        "defaults": "defaults",
        "sparsegpt, optimal, mixer": "`solver: sparsegpt`",
        "SparseGPT uniform": "SparseGPT, uniform",
        "SparseGPT of LLM Compressor": "LLM Compressor's SparseGPT ¹",
        "paper, alpha 0.04": "SparseSSM's allocation",
        "wanda": "Wanda",
        "magnitude": "magnitude",
    }
    lines: dict[str, dict[str, float | None]] = {}
    for model in ("mamba-25m", "mamba2-25m"):
        for row in projection_rows(model):
            if row["method"] in columns:
                line = lines.setdefault(f"{row['model']}, {row['case']}", {})
                line[row["method"]] = row["relative"]
    return markdown(
        ["", *columns.values()],
        ([case, *(number(line.get(c)) for c in columns)] for case, line in lines.items()),
    )


def gradient() -> str:
    """70 % of all weights: training-free, and with steps after each round."""
    lines, dense = [], load("whole_model_quality_mamba-25m")["rows"][0]
    for name in ("gradient_quality", "gradient_quality_tuned", "gradient_quality_tuned_short"):
        for row in load(name)["rows"]:
            cells = [number(fmean(row[k]) / fmean(dense[k])) for k in ("corpus", "wikitext2")]
            steps = ", ".join(f"{s:,}" for s in row.get("steps", []))
            lines.append([row["method"], steps, *cells, str(len(row["seeds"]))])
    return markdown(["method", "steps", "corpus", "WikiText-2", "draws"], lines)


def components() -> str:
    """What 80 % zeros in one component alone cost."""
    dense = load("whole_model_quality_mamba-25m")["rows"][0]
    return markdown(
        ["component", "entries", "by gradient", "by magnitude"],
        (
            [
                row["component"],
                f"{row['entries']:,}",
                *(
                    number(row[k]["corpus"] / fmean(dense["corpus"]))
                    for k in ("gradient", "magnitude")
                ),
            ]
            for row in load("gradient_quality")["components"]
        ),
    )


def transitions() -> str:
    """Half of A_log by each criterion and meaning."""
    content = load("alog_quality_mamba-25m")
    lines: dict[str, dict[tuple[str, str], float]] = {}
    for row in content["rows"]:
        for text, value in row["perplexity"].items():
            cells = lines.setdefault(row["criterion"], {})
            cells[row["pruned_value"], text] = value / content["dense"][text]
    texts = {"wikitext2 test": "WikiText-2", "corpus validation": "other text"}
    keys = [(value, text) for value in ("zero", "memoryless") for text in texts]
    head = ["criterion", *(f"`{value}`: {texts[text]}" for value, text in keys)]
    return markdown(
        head, ([c, *(number(cells.get(k)) for k in keys)] for c, cells in lines.items())
    )


def whole_models() -> dict[str, dict[str, dict[int, float]]]:
    """Speed-up of decoding from a CUDA graph: by shape, variant and batch."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, content in load("state_removal_latency")["whole models"].items():
        shape, _, phases = name.partition(", ")
        if "CUDA graph" not in phases:
            continue
        timings = [t for t in content["timings"] if t["phase"] == "decode, CUDA graph"]
        dense = {t["batch_size"]: t["milliseconds"] for t in timings if t["model"] == "dense"}
        for t in timings:
            line = found.setdefault(shape, {}).setdefault(t["model"], {})
            line[t["batch_size"]] = dense[t["batch_size"]] / t["milliseconds"]
    return found


def speed() -> str:
    """Decoding of whole models, relative to dense."""
    lines = [
        [shape, variant, *(number(value, 2) for value in batches.values())]
        for shape, variants in whole_models().items()
        for variant, batches in variants.items()
        if variant != "dense"
    ]
    batches = next(iter(next(iter(whole_models().values())).values()))
    return markdown(["shape", "recipe", *(f"batch {b}" for b in batches)], lines)


def step_kernel() -> str:
    """The decode step of Mamba-2 alone, for N 128, 64 and 32."""
    lines: dict[tuple[str, ...], list[float]] = {}
    for row in load("state_removal_latency")["Mamba-2 decode step (selective_state_update)"]:
        lines.setdefault(tuple(row["labels"]), []).append(row["speedup"])
    head = ["D", "states in", "batch", "N 128", "N 64", "N 32"]
    return markdown(
        head, ([*labels, *(number(v, 2) for v in values)] for labels, values in lines.items())
    )


def recipes() -> str:
    """Every built-in recipe that was measured: parameters, zeros, perplexity, BLiMP, seconds."""
    lines = []
    for name in ("mamba-25m", "mamba2-25m"):
        runs = load(f"results_table_{name}")["models"][name]
        dense = runs["dense"]
        for recipe in dict.fromkeys(run["recipe"] for run in runs.values()):
            if recipe.startswith("benchmarks/"):
                continue
            own = [run for run in runs.values() if run["recipe"] == recipe]
            first = own[0]
            blimp = [
                r["measures"]["blimp_local, acc"]["value"]
                for r in own
                if "blimp_local, acc" in r["measures"]
            ]
            lines.append(
                [
                    name,
                    recipe if recipe == "dense" else f"`{recipe}`",
                    number(first["parameters"] / dense["parameters"]),
                    number(first["zeros"] / dense["parameters"]),
                    number(
                        mean_of(own, "corpus, perplexity") / mean_of([dense], "corpus, perplexity")
                    ),
                    number(fmean(blimp)) if blimp else "",
                    number(fmean(r["seconds"] for r in own), 0) if recipe != "dense" else "",
                ]
            )
    return markdown(
        ["model", "recipe", "parameters", "zeros", "perplexity", "BLiMP", "seconds"], lines
    )


def mean_of(runs: list[Row], measure: str) -> float:
    """Mean of a measure over runs."""
    return fmean(run["measures"][measure]["value"] for run in runs)


def matrix() -> str:
    """What was run, family by modifier: yes, no, or in part."""

    def cell(family: str, settings: tuple[str, ...]) -> str:
        found = [cells[family].get(setting) for setting in settings]
        if None in found:
            return "not run"
        good = [answer == "yes" for answer in found]
        return "yes" if all(good) else "in part" if any(good) else "no"

    cells = load("matrix")["cells"]
    lines = []
    for family, answers in cells.items():
        name, _, variant = family.partition(", ")
        label = FAMILIES.get(name, name) + (f", {variant}" if variant else "")
        if answers:
            lines.append([label, *(cell(family, settings) for settings in _MATRIX.values())])
    return markdown(["family", *_MATRIX], lines)


def runs_of(model: str, recipe: str) -> list[Row]:
    """Runs of a recipe in the table of all methods."""
    runs = load(f"results_table_{model}")["models"][model].values()
    return [run for run in runs if run["recipe"] == recipe]


def served() -> dict[tuple[str, str, int], dict[str, float]]:
    """Speed-ups of whole models on a GPU: (shape, phase, batch or states) -> N -> speed-up."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for path in sorted(harness.RESULTS.glob("serving*.json")):
        content = load(path.stem)
        if "NVIDIA" not in content["versions"]["device"]:
            continue
        for row in content["rows"]:
            key = (row["shape"], row["what"], row.get("batch", 0))
            for model in row.get("models", []):
                value = model["speedup"] if "batch" in row else model["tokens_per_second"]
                found.setdefault(key, {})[model["model"]] = value
    return found


def serving() -> str:
    """Whole models of published shapes with fewer states, relative to dense."""
    rows, names = served(), []
    if not rows:
        return "*Not measured yet.*"
    for values in rows.values():
        names += [name for name in values if name not in names]
    lines = []
    for (shape, phase, batch), values in rows.items():
        if names[0] not in values:  # nothing to compare with
            continue
        dense = values[names[0]]
        cells = [number(values[n] / dense, 2) if n in values else "" for n in names]
        lines.append([shape, phase, str(batch) if batch else "", *cells])
    return markdown(["shape", "phase", "batch", *names], lines)


def front_rows(name: str, model: str, changes: list[tuple[str, str, str, str]]) -> list[list[str]]:
    """Before and after of one model: parameters, state, decoding, perplexity.

    :param changes: recipe, what it is called, share of the state, speed-up of decoding
    """
    (dense,) = runs_of(model, "dense")
    base = mean_of([dense], "corpus, perplexity")
    millions = dense["parameters"] / 1e6
    lines = [[f"{name}, dense", f"{millions:.1f} M", "1", "1", f"{base:.1f}"]]
    cases = by_criterion([f"state_removal_quality_{model}"])
    for recipe, label, state, decode in changes:
        own = runs_of(model, recipe)
        value = mean_of(own, "corpus, perplexity")
        parameters = f"{own[0]['parameters'] / 1e6:.1f} M"
        lines.append([label, parameters, state, decode, f"{value:.1f} ({value / base:.3f})"])
        half = next(iter(cases.values()))
        if recipe == "state-50" and "distilled" in half:
            ratio = half["distilled"]
            after = f"{ratio * base:.1f} ({ratio:.3f})"
            lines.append([f"{label}, distilled", parameters, state, decode, after])
    return lines


def front() -> str:
    """README's table, with its notes."""
    whole = whole_models()["2.8B-shaped"]
    model = [f"{whole[recipe][512]:.2f} ²" for recipe in ("state-50", "channels-25")]
    half, quarter = (served()["Mamba-2, 2.7B", "decode", 128][f"N {n}"] for n in (64, 32))
    rows = [
        *front_rows(
            "Mamba-2",
            "mamba2-25m",
            [
                ("state-50", "`state-50`", "1/2", f"{half:.2f} ¹"),
                ("state-75", "`state-75`", "1/4", f"{quarter:.2f} ¹"),
            ],
        ),
        *front_rows(
            "Mamba",
            "mamba-25m",
            [
                ("state-50", "`state-50`", "1/2", model[0]),
                ("channels-25", "`channels-25`", "3/4", model[1]),
            ],
        ),
    ]
    return "\n".join(
        [
            markdown(["", "parameters", "state", "decode", "perplexity"], rows),
            "",
            "Perplexity on held-out text, in brackets relative to dense. Decode: how many times as "
            "fast as",
            "dense on one GPU; ¹ a whole model of the 2.7B shape, batch 128;",
            "² a whole model of the 2.8B shape, batch 512, from a CUDA graph.",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {
    "states": lambda: criteria_table(
        ["state_removal_quality_mamba-25m", "state_removal_quality_mamba2-25m"]
    ),
    "key_dims": lambda: criteria_table(["state_removal_quality_qwen3_5-15m"]),
    "channels": lambda: criteria_table(["channel_removal_quality_mamba-25m"]),
    "layers": lambda: structure_table("layers"),
    "hidden": lambda: structure_table("hidden"),
    "narrower": narrower,
    "mlp": lambda: structure_table("mlp"),
    "kv_groups": lambda: structure_table("kv_groups"),
    "projections": projections,
    "gradient": gradient,
    "components": components,
    "transitions": transitions,
    "speed": speed,
    "serving": serving,
    "step_kernel": step_kernel,
    "recipes": recipes,
    "matrix": matrix,
    "front": front,
}


def table(name: str) -> str:
    """Markdown of a table.

    :raises KeyError: if there is none of this name
    """
    return TABLES[name]()
