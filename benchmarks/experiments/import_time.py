"""What the package adds to ``import torch``: the hook that torch calls at the end of its import.

Timed inside the import of torch in fresh processes, around loading and calling our entry point,
since the import itself varies from process to process by more than the hook takes.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from harness import Configuration, Experiment, Job, markdown
from pydantic import Field

HOOK = """
import sys, time
from importlib.metadata import EntryPoint
load, spent = EntryPoint.load, []

def timed_load(self):
    if not self.value.startswith("sparsessm_plugin"):
        return load(self)
    started = time.perf_counter()
    hook = load(self)
    spent.append(time.perf_counter() - started)

    def timed_hook():
        started = time.perf_counter()
        hook()
        spent.append(time.perf_counter() - started)

    return timed_hook

EntryPoint.load = timed_load
import torch
assert len(spent) == 2 and "sparsessm_plugin.registration" in sys.modules
print(sum(spent))
"""
TORCH = "import time; t = time.perf_counter(); import torch; print(time.perf_counter() - t)"
SCRIPTS = {"hook_ms": HOOK, "torch_ms": TORCH}


class Fields(Configuration):
    """How often."""

    repeats: int = Field(15, description="fresh processes")


def run(job: Job) -> Iterator[Any]:
    """Milliseconds of the hook, and of all of the import."""
    for name, script in SCRIPTS.items():
        command = [sys.executable, "-c", script]
        job.numbers[name] = [
            1000 * float(subprocess.check_output(command, text=True))
            for _ in range(job.configuration.repeats)
        ]
        yield


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """Median and worst."""
    labels = {"hook_ms": "the hook", "torch_ms": "import torch, hook included"}
    rows = [
        [label, f"{statistics.median(numbers[name]):.2f}", f"{max(numbers[name]):.2f}"]
        for name, label in labels.items()
    ]
    return (
        "# What the package adds to `import torch`\n\n"
        f"Median and worst of {len(numbers['hook_ms'])} fresh processes, milliseconds.\n\n"
        + markdown(["", "median", "worst"], rows)
    )


def ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """Share of the import that is the hook's."""
    hook, torch = (statistics.median(numbers[name]) for name in SCRIPTS)
    return {"hook by import torch": hook / torch}


EXPERIMENT = Experiment(
    measures="what the package adds to `import torch`",
    device="CPU",
    seconds=60,
    subjects="none",
    configuration=Fields,
    run=run,
    render=render,
    results={"import_time": {}},
    quick={"import_time": {"repeats": 3}},
    ratios=ratios,
)
