"""Hashes of what every modifier makes of a tiny model of every family, to compare two versions.

Weights and reports are hashed apart; seconds, memory and settings are left out of the reports. Two
versions of the package that compute the same give the same hashes on the same machine.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import ROOT, Configuration, Experiment, Job, markdown
from pydantic import Field

sys.path.insert(0, str(ROOT / "tests"))

from conftest import FAMILIES, MAMBA1, Loader, batches, state, tiny_model

# Fields of a report that say how long something took, or how it was asked for.
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


def hashes(
    family: str, modifiers: dict[str, dict[str, Any]], pipeline: str, renamed: dict[str, str]
) -> list[str]:
    """Hashes of the weights and of the reports.

    :param renamed: what fields of reports are called now -> what they were called before
    """
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
    text = json.dumps(_stripped(reports, renamed), sort_keys=True)
    return [weights.hexdigest()[:16], hashlib.sha256(text.encode()).hexdigest()[:16]]


def _stripped(value: Any, renamed: dict[str, str]) -> Any:
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if k not in _LEFT_OUT}
        return {renamed.get(k, k): _stripped(v, renamed) for k, v in left.items()}
    if isinstance(value, list):
        return [_stripped(v, renamed) for v in value]
    # two compilations of one kernel may add in another order, and differ in the last bits
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Fields(Configuration):
    """What is compared."""

    against: Path | None = Field(None, description="result file of an earlier version")
    renamed: list[str] = Field([], description="fields of reports, as NEW=OLD")
    only: str = Field("", description="cases whose name holds this text")


def run(job: Job) -> Iterator[Any]:
    """Hash all cases."""
    chosen: Fields = job.configuration
    renamed = dict(pair.split("=") for pair in chosen.renamed)
    before = json.loads(chosen.against.read_text())["found"] if chosen.against else {}
    job.numbers |= {"found": {}, "before": before}
    for name, case in cases().items():
        if chosen.only not in name:
            continue
        try:
            found = hashes(*case, renamed)
        except Exception as error:  # an error is an outcome, too
            found = [f"{type(error).__name__}: {str(error)[:200]}"]
        job.numbers["found"][name] = found
        if before and before.get(name) != found:
            job.note(name, "differs")
        yield f"{name:55} {' '.join(found)}"


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a case."""
    known = numbers["before"]
    rows = (
        [case, *found, "yes" if known.get(case) == found else "no"]
        for case, found in numbers["found"].items()
    )
    return "## Weights and reports of tiny models, as in an earlier version\n\n" + markdown(
        ["case", "weights", "report", "as before"], rows
    )


EXPERIMENT = Experiment(
    measures="whether two versions of the package compute the same",
    device="CPU",
    seconds=120,
    subjects="tiny models of every family",
    configuration=Fields,
    run=run,
    render=render,
    results={"fingerprints": {}},
    quick={"": {"only": "mamba A_log"}},
)
