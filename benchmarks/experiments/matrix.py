"""Every family with every modifier: pruned, saved, and loaded again by transformers alone.

Tiny random models of tests/conftest.py. One process prunes and saves them all. Another, which never
imports this package, loads each with ``AutoModelForCausalLM.from_pretrained`` (with
``AutoModelForImageTextToText`` where the config names such a class) and compares the logits with
those in memory, bit by bit. What it could not load goes to a third, which uses
``sparsessm_plugin.load``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import ROOT, Configuration, Experiment, Job, first_line, section
from pydantic import Field
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT / "tests"))

from conftest import (
    DELTA,
    DEMO,
    EXPERTS,
    FAMILIES,
    MAMBA1,
    Loader,
    batches,
    tiny_model,
    with_images,
)

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import prune

Changes = dict[str, Any]
IGNORE = ["lm_head", "re:.*dt_proj$", "re:.*router.*", "re:.*gate$", "re:.*visual.*"]
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
PACKED = {
    "targets": ["re:.*(in_proj(_[a-z]+)?|out_proj|linear_attn[.][a-z]_proj)$"],
    "weights": INT4,
}
NO_EXPERTS = ["re:.*experts.*"]

# A row that is not a family's tiny model as it is -> the family, and what is changed in its config.
IMAGES = "image encoder"
_VALUES = {"linear_value_head_dim": 16}  # so that groups of 16 divide what enters out_proj
VARIANTS: dict[str, tuple[str, Changes]] = {
    "granitemoehybrid, no experts": ("granitemoehybrid", {"num_local_experts": 0}),
    "jamba, experts": ("jamba", EXPERTS["jamba"]),
    "nemotron_h, experts": ("nemotron_h", EXPERTS["nemotron_h"]),
    f"qwen3_5, {IMAGES}": ("qwen3_5", {IMAGES: True}),
    f"qwen3_5_moe, {IMAGES}": ("qwen3_5_moe", {IMAGES: True}),
}


def by_layout(mamba1: Changes, mamba2: Changes, delta: Changes) -> Callable[[str], Changes]:
    """Changes that differ between the layouts of mixers."""
    return lambda family: mamba1 if family in MAMBA1 else delta if family in DELTA else mamba2


# Column -> modifier and its fields; a function of the family where they differ.
COLUMNS: dict[str, tuple[str, Any]] = {
    "A_log, zero": ("SparseSSMModifier", {"sparsity": 0.5}),
    "A_log, memoryless": ("SparseSSMModifier", {"sparsity": 0.5, "pruned_value": "memoryless"}),
    "A_log, 2:4": ("SparseSSMModifier", {"mask_structure": "2:4"}),
    "states": ("StateRemovalModifier", {"keep": 4}),
    "states, distilled": ("StateRemovalModifier", {"keep": 4, "distill_steps": 1}),
    "channels or heads, half": (
        "ChannelRemovalModifier",
        by_layout({"keep": 32}, {"axis": "heads", "keep": 4}, {"axis": "value_heads", "keep": 4}),
    ),
    "channels or head_dim, quarter": (
        "ChannelRemovalModifier",
        by_layout(
            {"keep": 48, "multiple_of": 2},
            {"axis": "head_dim", "keep": 6, "multiple_of": 2},
            {"axis": "value_dims", "keep": 12, "multiple_of": 2},
        ),
    ),
    "projections": ("SensitivitySparseGPTModifier", {"sparsity": 0.5}),
    "projections, 2:4": ("SensitivitySparseGPTModifier", {"mask_structure": "2:4"}),
    "projections, sparsegpt": (
        "SensitivitySparseGPTModifier",
        {"sparsity": 0.5, "solver": "sparsegpt"},
    ),
    "projections, wanda": ("SensitivitySparseGPTModifier", {"sparsity": 0.5, "solver": "wanda"}),
    "all by gradient": ("GradientMagnitudeModifier", {"sparsity": 0.5, "rounds": 2}),
    "all by gradient, tuned": (
        "GradientMagnitudeModifier",
        {"sparsity": 0.5, "rounds": 2, "distill_steps": 1},
    ),
    "w8a8": ("SparseGPTQModifier", {"scheme": "W8A8", "targets": ["Linear"], "ignore": IGNORE}),
    "fp8": (
        "SparseGPTQModifier",
        {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "ignore": IGNORE},
    ),
    "w8a8, experts ignored": (
        "SparseGPTQModifier",
        {"scheme": "W8A8", "targets": ["Linear"], "ignore": [*IGNORE, *NO_EXPERTS]},
    ),
    "int4, packed": (
        "SparseGPTQModifier",
        {"config_groups": {"group_0": PACKED}, "ignore": [*IGNORE, *NO_EXPERTS]},
    ),
    "int4, in bytes": (
        "SparseGPTQModifier",
        {
            "config_groups": {"group_0": {**PACKED, "format": "int-quantized"}},
            "ignore": [*IGNORE, *NO_EXPERTS],
        },
    ),
}

READER = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
if sys.argv[1] == "plugin":
    import sparsessm_plugin
answers = {}
for folder in sys.argv[2:]:
    ids, logits = torch.load(f"{folder}/expected.pt")
    try:
        if sys.argv[1] == "plugin":
            model = sparsessm_plugin.load(folder).eval()
        else:
            named = AutoConfig.from_pretrained(folder).architectures[0]
            whole = named.endswith("ForConditionalGeneration")
            auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
            model = auto.from_pretrained(folder).eval()
            assert type(model).__name__ == named
        with torch.no_grad():
            found = model(ids).logits
        same = torch.equal(found, logits)
        answers[folder] = "equal" if same else f"differs by {(found - logits).abs().max():.2g}"
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        answers[folder] = f"{type(error).__name__}: {text}"
assert sys.argv[1] == "plugin" or "sparsessm_plugin" not in sys.modules
print(json.dumps(answers))
"""


def rows_of(names: list[str]) -> dict[str, tuple[str, Changes]]:
    """Row -> family and changes of its config, a family's variants after it."""
    rows: dict[str, tuple[str, Changes]] = {}
    for name in names:
        rows[name] = (name, {})
        rows |= {row: change for row, change in VARIANTS.items() if change[0] == name}
    return rows


def our_error(error: BaseException | None) -> SparseSSMError | None:
    while error is not None and not isinstance(error, SparseSSMError):
        error = error.__cause__
    return error


def prune_and_save(family: str, changes: Changes, column: str, folder: Path) -> str:
    """Prune a tiny model, save it and what it answers; ``saved``, or why not."""
    kind, fields = COLUMNS[column]
    if callable(fields):
        fields = fields(family)
    text = yaml.safe_dump({"prune_stage": {"prune_modifiers": {kind: fields}}})
    try:
        made = {**(_VALUES if family in DELTA else {}), **changes}
        make = with_images if made.pop(IMAGES, False) else tiny_model
        model = make(family, **made)
        recipe = parse_recipe(text, column)
        recipe.check_model(model)
        loader = Loader(batches(2))
        result = prune(model, recipe, loader, AutoTokenizer.from_pretrained(DEMO))
        if kind != "SparseGPTQModifier" and not result.reports[0]["total"]["pruned"]:
            return "FAILED: nothing was pruned"
        ids = batches(1, seed=7)[0]["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits
        if not torch.isfinite(logits).all():
            return "FAILED: logits are not finite"
        model.save_pretrained(folder)
        torch.save((ids, logits), folder / "expected.pt")
    except Exception as error:
        refusal = our_error(error)
        if refusal is not None:
            return f"refused: {refusal}"
        return f"FAILED: {first_line(error)}"
    return "saved"


def read(how: str, folders: list[Path]) -> dict[str, str]:
    """What a fresh process says of each folder.

    :param how: ``transformers`` or ``plugin``
    """
    if not folders:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", READER, how, *map(str, folders)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        check=True,
    )
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def general(reason: str) -> str:
    """A reason without the names of single modules, so that those of several families meet."""
    reason = re.sub(r"(model|backbone)\.[\w.]*\d[\w.]*", "<module>", reason)
    reason = re.sub(r"mamba_expand", "expand", reason)
    for family in sorted(FAMILIES + DELTA, key=len, reverse=True):
        reason = re.sub(rf"\b{family}\b", "<family>", reason)
    reason = re.sub(r"^[\w ,:]+: (?=[A-Z<])", "", reason)
    return reason.replace("|", "\\|")


class Fields(Configuration):
    """Which cells."""

    families: list[str] = Field(list(FAMILIES + DELTA), description="rows, with their variants")
    columns: list[str] = Field(list(COLUMNS), description="modifiers and their settings")


def run(job: Job) -> Iterator[Any]:
    """Fill in what is missing; a row and column is tried once."""
    chosen: Fields = job.configuration
    # row -> column -> what came of it
    cells: dict[str, dict[str, str]] = job.numbers.setdefault("cells", {})
    with tempfile.TemporaryDirectory(prefix="matrix-") as place:
        folders: dict[tuple[str, str], Path] = {}
        for row, (family, changes) in rows_of(chosen.families).items():
            for column in chosen.columns:
                if column in cells.get(row, {}):
                    continue
                folder = Path(place) / f"{len(folders)}"
                folder.mkdir()
                folders[row, column] = folder
                answer = prune_and_save(family, changes, column, folder)
                cells.setdefault(row, {})[column] = answer
                print(f"{row}, {column}: {answer}", flush=True)
        saved = [key for key in folders if cells[key[0]][key[1]] == "saved"]
        found = read("transformers", [folders[key] for key in saved])
        failed = [key for key in saved if found[str(folders[key])] != "equal"]
        loaded = read("plugin", [folders[key] for key in failed])
        for row, column in saved:
            answer = found[str(folders[row, column])]
            if answer == "equal":
                cells[row][column] = "yes"
            elif loaded[str(folders[row, column])] == "equal":
                cells[row][column] = f"load: {answer}"
            else:
                cells[row][column] = f"FAILED: {answer}"
            cells[row][column] = cells[row][column].replace(place, "FOLDER")
    yield


def in_short(cells: dict[str, dict[str, str]], columns: list[str]) -> str:
    """A column a modifier: one word where all its settings had one end, else the exceptions."""
    kinds = dict.fromkeys(COLUMNS[column][0] for column in columns)
    table = []
    for row, own in cells.items():
        line = [row]
        for kind in kinds:
            words = {c: own[c].partition(":")[0] for c in columns if COLUMNS[c][0] == kind}
            if len(set(words.values())) == 1:
                line.append(next(iter(words.values())))
            else:
                others = [f"{column}: {word}" for column, word in words.items() if word != "yes"]
                line.append("yes; " * ("yes" in words.values()) + "; ".join(others))
        table.append(line)
    return section("In short", "", ["", *(f"`{kind}`" for kind in kinds)], table)


def in_full(cells: dict[str, dict[str, str]], columns: list[str]) -> str:
    """The table, with numbered reasons below it."""
    reasons: list[str] = []
    table = []
    for row, own in cells.items():
        line = [row]
        for column in columns:
            word, _, reason = own[column].partition(": ")
            if reason:
                reason = general(reason)
                if reason not in reasons:
                    reasons.append(reason)
                word = f"{word} [{reasons.index(reason) + 1}]"
            line.append(word)
        table.append(line)
    below = "\n".join(f"[{i}] {reason}  " for i, reason in enumerate(reasons, 1))
    return section("What loads again", "", ["", *columns], table) + "\n\n" + below


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """In short, in full, and the settings."""
    every = numbers["cells"]
    cells = {row: every[row] for row in rows_of(list(FAMILIES + DELTA)) if row in every}
    columns = [c for c in COLUMNS if all(c in own for own in cells.values())]
    settings = []
    for column in columns:
        kind, fields = COLUMNS[column]
        if callable(fields):
            fields = (
                f"{fields('mamba')} or, with one A_log a head, {fields('mamba2')}; "
                f"of gated delta nets {fields('qwen3_next')}"
            )
        settings.append(f"- {column}: {kind} `{fields}`")
    lines = [
        "# Families and modifiers",
        "Made by `python benchmarks/run.py matrix`: tiny random models, pruned, saved, and loaded "
        "by stock transformers in a process that never imports this package. yes: the logits are "
        "those in memory, bit by bit. load: the same by `sparsessm_plugin.load`, not by stock "
        "transformers. refused: before anything was changed, with the numbered reason.",
        in_short(cells, columns),
        in_full(cells, columns),
        "The settings:",
        "\n".join(settings),
    ]
    return "\n\n".join(lines)


EXPERIMENT = Experiment(
    measures="which families load again after which modifier",
    device="CPU",
    seconds=500,
    subjects="tiny models of every family",
    configuration=Fields,
    run=run,
    render=render,
    results={"matrix": {}},
    quick={"": {"families": ["mamba", "mamba2"], "columns": ["A_log, zero", "states"]}},
    extends=("families", "columns"),
)
