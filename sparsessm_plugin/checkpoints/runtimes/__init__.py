"""Which runtime can load a checkpoint, read from its files without loading a weight.

One file a runtime, with every limit, the reason and the file of the runtime where it stands.
``facts`` is what they are asked about: a checkpoint, or a model that is only planned.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsessm_plugin.checkpoints.runtimes import llama_cpp, mamba_ssm, mlx_lm, transformers, vllm
from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import (
    Answer,
    Limit,
    Runtime,
    RuntimeSupport,
    judge,
)
from sparsessm_plugin.errors import SparseSSMError, shown

__all__ = [
    "RUNTIMES",
    "Answer",
    "Limit",
    "ModelFacts",
    "Runtime",
    "RuntimeSupport",
    "check_runtimes",
    "kernel_problems",
    "planned_limits",
    "runtime_problems",
    "runtime_support",
]

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for file in (transformers, vllm, mamba_ssm, llama_cpp, mlx_lm)
    for runtime in file.RUNTIMES
}


def runtime_support(folder: str | os.PathLike[str]) -> list[RuntimeSupport]:
    """What each runtime can do with a checkpoint.

    Reads config.json and the headers of the safetensors files. Looks at what is known to go
    wrong: sizes, config fields, quantization and layouts; it does not compare every shape.

    :param folder: of the checkpoint
    :return: one entry for each of :data:`RUNTIMES`
    :raises SparseSSMError: no config.json, no safetensors file, or one that cannot be read
    """
    facts = ModelFacts.from_folder(Path(folder))
    return [judge(runtime, facts) for runtime in RUNTIMES.values()]


def check_runtimes(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, if all are runtimes.

    :raises SparseSSMError: listing the known ones
    """
    checked = tuple(dict.fromkeys(names))
    for name in checked:
        if name not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            raise SparseSSMError(f"runtime {shown(name)} is not known; known: {known}")
    return checked


def planned_limits(runtime: str, facts: ModelFacts) -> list[Limit]:
    """What a runtime would meet in a model of this family and these sizes, once it is saved.

    :param runtime: one of :data:`RUNTIMES`; for mamba-ssm, once the model is exported
    :param facts: of a model that is not quantized
    :return: what it would not load, or only beside its fast kernels
    """
    found = RUNTIMES[runtime].limits(facts)
    return [
        limit
        for limit in found
        if limit.about in ("sizes", "family") and limit.answer in ("no", "slow")
    ]


def runtime_problems(runtime: str, model: Any) -> list[str]:
    """Why a runtime would not take a model of these sizes, were it saved.

    :param runtime: one of :data:`RUNTIMES`; for mamba-ssm, once the model is exported
    :param model: of transformers, unquantized; the meta device will do
    :return: as ``inspect`` says it; nothing where nothing is known to go wrong. Of transformers
        only what it does not load, which it does with slower kernels in any case
    """
    found = planned_limits(runtime, ModelFacts.from_model(model))
    if runtime == "transformers":
        found = [limit for limit in found if limit.answer == "no"]
    return [limit.reason for limit in found]


def kernel_problems(model: Any) -> list[str]:
    """Sizes on which transformers fails on a GPU where causal-conv1d is installed.

    :param model: of transformers, unquantized; the meta device will do
    """
    found = planned_limits("transformers", ModelFacts.from_model(model))
    return [limit.reason for limit in found if limit.answer == "slow" and limit.about == "sizes"]
