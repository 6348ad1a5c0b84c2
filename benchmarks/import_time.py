"""What the package adds to ``import torch``: the hook that torch calls at the end of its import.

    python benchmarks/import_time.py

Timed inside the import of torch in fresh processes, around loading and calling our entry point,
since the import itself varies from process to process by more than the hook takes.
"""

import statistics
import subprocess
import sys

from common import save

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
REPEATS = 15


def milliseconds(script: str) -> list[float]:
    return [
        1000 * float(subprocess.check_output([sys.executable, "-c", script], text=True))
        for _ in range(REPEATS)
    ]


def main() -> None:
    hook, torch = milliseconds(HOOK), milliseconds(TORCH)
    lines = [
        "# What the package adds to `import torch`",
        "",
        f"Median and worst of {REPEATS} fresh processes, milliseconds.",
        "",
        "| | median | worst |",
        "|---|---|---|",
    ]
    for name, times in (("the hook", hook), ("import torch, hook included", torch)):
        lines.append(f"| {name} | {statistics.median(times):.2f} | {max(times):.2f} |")
    save("import_time", "\n".join(lines), {"hook_ms": hook, "torch_ms": torch})


if __name__ == "__main__":
    main()
