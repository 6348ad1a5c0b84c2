"""Every test of Triton kernels once more in Triton's interpreter, where there is no GPU.

The interpreter must be chosen before Triton is imported, and it runs kernels on tensors of the
CPU: so the tests of all files run in one process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import CUDA, INTERPRETER

HERE = Path(__file__).parent
WITH_KERNELS = [
    path.name
    for path in sorted(HERE.glob("test_*.py"))
    if "\n@kernels_run\n" in path.read_text(encoding="utf-8")
]
# their kernels have no loops, which the interpreter before 3.7 cannot run with NumPy 2.4
WITHOUT_LOOPS = ["test_solver_kernels.py"]


@pytest.mark.skipif(CUDA or INTERPRETER, reason="they have run")
def test_kernels_in_tritons_interpreter():
    triton = pytest.importorskip("triton")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    files = WITHOUT_LOOPS if old else WITH_KERNELS
    assert set(WITHOUT_LOOPS) < set(WITH_KERNELS)
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", "kernels", "--durations=10", *files),
        ],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
    )
