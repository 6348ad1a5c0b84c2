"""The families by ``model_type``, and what programs that load their checkpoints do with each.

For what is decided from a checkpoint's files alone; reading this imports no torch. A family that
does not stand here is pruned like any other, and runtimes are ``unknown`` for it. What each of
them takes is told in :mod:`sparsessm_plugin.checkpoints.runtimes`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    :param layout: of its mixers, which decides the scan kernels that take them: Mamba-1, with A_log
        for every state, Mamba-2, with one a head, or the gated delta net
    :param state_size_field: config field of N, of a gated delta net that of dk
    :param initialiser: class of transformers whose weight initialiser reads, and may divide,
        out_proj.weight after loading
    :param experts: as transformers reads them from a checkpoint: tensors of single experts, which
        it merges, or all in one tensor
    :param mamba_ssm: whether mamba_ssm has such a model
    """

    layout: Literal["mamba1", "mamba2", "delta"]
    state_size_field: str
    initialiser: str | None = None
    experts: Literal["single", "merged"] | None = None
    mamba_ssm: bool = False


FAMILIES: dict[str, Family] = {
    "mamba": Family("mamba1", "state_size", initialiser="MambaPreTrainedModel", mamba_ssm=True),
    "falcon_mamba": Family("mamba1", "state_size", initialiser="FalconMambaPreTrainedModel"),
    "jamba": Family("mamba1", "mamba_d_state", experts="single"),
    "zamba": Family("mamba1", "mamba_d_state"),
    "mamba2": Family("mamba2", "state_size", initialiser="Mamba2PreTrainedModel", mamba_ssm=True),
    "bamba": Family("mamba2", "mamba_d_state"),
    "zamba2": Family("mamba2", "mamba_d_state"),
    "granitemoehybrid": Family("mamba2", "mamba_d_state", experts="merged"),
    "falcon_h1": Family("mamba2", "mamba_d_state"),
    "nemotron_h": Family("mamba2", "ssm_state_size", experts="single"),
    "qwen3_5": Family("delta", "linear_key_head_dim"),
    "qwen3_5_moe": Family("delta", "linear_key_head_dim", experts="single"),
    "qwen3_next": Family("delta", "linear_key_head_dim", experts="single"),
    "olmo_hybrid": Family("delta", "linear_key_head_dim"),
}


def family_of(model_type: str) -> Family | None:
    """The family of a ``model_type``, also of the language model alone, ``qwen3_5_text``."""
    return FAMILIES.get(model_type, FAMILIES.get(model_type.removesuffix("_text")))
