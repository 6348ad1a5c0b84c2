"""Tests of Triton kernels: on a GPU or, in a process of their own, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"

kernels_run = pytest.mark.skipif(
    not (CUDA or INTERPRETER), reason="no CUDA device; run in the interpreter by another test"
)


def run_in_interpreter(file: str, *options: str, loops: bool = True) -> None:
    """Run the tests of a file in Triton's interpreter, if they do not run here.

    :param file: its ``__file__``
    :param options: of pytest
    :param loops: whether the kernels have loops that the interpreter before 3.7 cannot run
    """
    if CUDA or INTERPRETER:
        pytest.skip("the tests run here")
    triton = pytest.importorskip("triton")
    if loops and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 has no loops with NumPy 2.4")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=os.path.dirname(file),
    )
