"""Tests of Triton kernels: on a GPU, in Triton's interpreter, or of what they compile to."""

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


def compiled_for_hopper(kernel, types, fixed, multiples=(), **options):
    """A kernel as Triton compiles it for compute capability 9.0, which takes no GPU.

    :param kernel: not in the interpreter
    :param types: of arguments that are neither fixed nor pointers to float32, by name
    :param fixed: values of its constants, by name
    :param multiples: whole numbers among the arguments that are multiples of 16, as pointers are
    :param options: such as ``num_warps``
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    types = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in names}
    aligned = [name for name in names if types[name].startswith("*") or name in multiples]
    source = triton.compiler.ASTSource(
        kernel,
        types,
        {(i,): fixed[name] for i, name in enumerate(names) if name in fixed},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
