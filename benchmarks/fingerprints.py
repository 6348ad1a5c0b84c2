"""Hashes of what every modifier makes of a tiny model of every family, to compare two versions.

    python benchmarks/fingerprints.py --output before.json
    python benchmarks/fingerprints.py --against before.json --name fingerprints

Weights and reports are hashed apart; seconds, memory and settings are left out of the reports. Two
versions of the package that compute the same give the same hashes on the same machine.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import save
from conftest import FAMILIES, MAMBA1, Loader, batches, state, tiny_model

from sparsessm_plugin.files import write_json

# Fields of a report that say how long something took, or how it was asked for.
_renamed: dict[str, str] = {}  # what fields are called now -> what they were called before
_LEFT_OUT = ("seconds", "cost", "settings", "first_pass_seconds", "peak_memory_bytes")


def cases() -> dict[str, tuple[str, dict[str, dict[str, Any]], str]]:
    """Name -> family, modifiers with their fields, pipeline."""
    found: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {}

    def add(family: str, name: str, modifier: str, pipeline: str = "independent", **fields: Any):
        found[f"{family} {name} {pipeline}"] = (family, {modifier: fields}, pipeline)

    for family in FAMILIES:
        add(family, "states", "StateRemovalModifier", keep=4, reconstruct_steps=4)
        add(family, "projections", "SensitivitySparseGPTModifier", sparsity=0.5)
        add(family, "gradient", "GradientMagnitudeModifier", sparsity=0.5, rounds=2)
    for family in MAMBA1:
        add(family, "A_log", "SparseSSMModifier", sparsity=0.5)
        add(family, "A_log frequency", "SparseSSMModifier", sparsity=0.5, saliency="hessian")
    mamba = "mamba"
    add(mamba, "A_log", "SparseSSMModifier", "sequential", sparsity=0.5)
    add(mamba, "A_log basic", "SparseSSMModifier", "basic", sparsity=0.5)
    add(mamba, "A_log 2:4", "SparseSSMModifier", mask_structure="2:4", saliency="transition")
    for solver in ("sparsegpt", "wanda", "magnitude"):
        add(mamba, solver, "SensitivitySparseGPTModifier", sparsity=0.5, solver=solver)
    add(mamba, "2:4", "SensitivitySparseGPTModifier", mask_structure="2:4")
    add(
        mamba,
        "paper allocation, dense target",
        "SensitivitySparseGPTModifier",
        sparsity=0.5,
        solver="sparsegpt",
        allocation="paper",
        target_output="dense",
    )
    add("bamba", "Linear", "SensitivitySparseGPTModifier", sparsity=0.5, targets=["Linear"])
    add(mamba, "channels", "ChannelRemovalModifier", keep=32, multiple_of=8)
    add("mamba2", "heads", "ChannelRemovalModifier", keep=4, axis="heads")
    add("nemotron_h", "head_dim", "ChannelRemovalModifier", keep=4, axis="head_dim", multiple_of=4)
    for saliency in ("magnitude", "last", "paper", "ghost"):
        add("mamba2", f"states {saliency}", "StateRemovalModifier", keep=4, saliency=saliency)
    distilled = {"distill_steps": 30, "distill_learning_rate": 1e-4}
    add(mamba, "states distilled", "StateRemovalModifier", keep=4, **distilled)
    add("mamba2", "states basic", "StateRemovalModifier", "basic", keep=4, reconstruct_steps=4)
    found["mamba W8A8 under masks independent"] = (
        mamba,
        {
            "SensitivitySparseGPTModifier": {"sparsity": 0.5},
            "SparseGPTQModifier": {
                "scheme": "W8A8",
                "targets": ["re:.*(in|out)_proj$"],
                "ignore": [],
            },
        },
        "independent",
    )
    return found


def run(family: str, modifiers: dict[str, dict[str, Any]], pipeline: str) -> tuple[str, str]:
    """Hashes of the weights and of the reports."""
    from llmcompressor import active_session, oneshot

    recipe = {"prune_stage": {"prune_modifiers": modifiers}}
    torch.manual_seed(0)
    model = tiny_model(family)
    active_session().reset()
    oneshot(
        model=model,
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        processor=object(),  # of no use, as the data are token ids
        dataset=Loader(batches(count=4, batch=2, length=40, padded=True)),
        pipeline=pipeline,
    )
    weights = hashlib.sha256()
    for name, value in sorted(state(model).items()):
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + data)
    reports = [m.report() for m in active_session().lifecycle.recipe.modifiers]
    text = json.dumps(_stripped(reports), sort_keys=True)
    return weights.hexdigest()[:16], hashlib.sha256(text.encode()).hexdigest()[:16]


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {_renamed.get(k, k): _stripped(v) for k, v in value.items() if k not in _LEFT_OUT}
    if isinstance(value, list):
        return [_stripped(v) for v in value]
    # two compilations of one kernel may add in another order, and differ in the last bits
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _save(name: str, found: dict[str, list[str]], known: dict[str, list[str]]) -> None:
    rows = [
        f"| {case} | {' | '.join(hashes)} | {'yes' if known.get(case) == hashes else 'no'} |"
        for case, hashes in found.items()
    ]
    text = "## Weights and reports of tiny models, as before the package was taken apart\n\n"
    text += "| case | weights | report | as before |\n|---|---|---|---|\n" + "\n".join(rows)
    save(name, text, {"found": found, "before": known})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write the hashes to this .json file")
    parser.add_argument("--against", type=Path, help="compare with the hashes in this file")
    parser.add_argument("--name", help="write hashes, and whether they are as before, to results/")
    parser.add_argument("--renamed", nargs="*", default=[], help="fields of reports, as NEW=OLD")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    _renamed.update(pair.split("=") for pair in options.renamed)
    known = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, list[str]] = {}
    differing = []
    for name, case in cases().items():
        if options.only not in name:
            continue
        started = time.perf_counter()
        try:
            found[name] = list(run(*case))
        except Exception as error:  # an error is an outcome, too
            found[name] = [f"{type(error).__name__}: {str(error)[:200]}"]
        same = "" if not known else "same" if known.get(name) == found[name] else "DIFFERS"
        if same == "DIFFERS":
            differing.append(name)
        seconds = time.perf_counter() - started
        print(f"{name:55} {' '.join(found[name])} {seconds:5.1f} s {same}", flush=True)
    if options.name:
        _save(options.name, found, known)
    if options.output:
        write_json(options.output, found)
    print(f"{len(found)} cases" + (f", {len(differing)} differ" if known else ""))
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
