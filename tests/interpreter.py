"""Tests of Triton kernels: on a GPU, in Triton's interpreter, or of what they compile to."""

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"


def kernels_run(test):
    """A test of kernels: on a GPU here, and without one in ``test_interpreter``'s process."""
    here = pytest.mark.skipif(
        not (CUDA or INTERPRETER), reason="no CUDA device; run in the interpreter by another test"
    )
    return pytest.mark.kernels(here(test))


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
