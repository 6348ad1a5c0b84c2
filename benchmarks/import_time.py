"""What the package adds to ``import torch``: the hook that torch calls at the end of its import.

    python benchmarks/import_time.py

Timed inside fresh processes, around torch's call of the entry points, since the import of torch
itself varies by more than the hook takes.
"""

import statistics
import subprocess
import sys

from common import save

HOOK = """
import sys, time
from importlib.metadata import entry_points
entry_points(group="torch.backends")  # torch reads them with and without this package
started = time.perf_counter()
for entry_point in entry_points(group="torch.backends"):
    if entry_point.value.startswith("sparsessm_plugin"):
        entry_point.load()()
print(time.perf_counter() - started)
assert "sparsessm_plugin.registration" in sys.modules
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
