"""Layers that predict several tokens at once (mtp), which transformers does not load.

LLM Compressor copies them from the checkpoint that a model comes from, where its config counts
them. They read the residual stream and share head and embeddings with the model, so that they fit
none of another width or order, and a config says one size for them and the other layers.
"""

from pathlib import Path
from typing import Any

from compressed_tensors.utils import save_mtp_tensors_to_checkpoint
from loguru import logger

from sparsessm_plugin.checkpoints.loading import find_file, read_checkpoint

SIZES_OF_MTP = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_key_value_heads",
)
_COUNTS = ("mtp_num_hidden_layers", "num_mtp_layers")
_LEFT_OUT = "_mtp_left_out"  # attribute of a model


def without_mtp(model: Any, what: str) -> dict[str, int]:
    """Let a model be saved without these layers of its checkpoint, with a warning.

    :param model: transformers model
    :param what: of it has changed
    :return: what its config must then say; empty where there are none
    """
    if getattr(model, _LEFT_OUT, False) or not _has_mtp(model):
        return {}
    logger.warning(
        "the checkpoint's layers that predict several tokens (mtp) are left out: they are made "
        f"for another {what}"
    )
    setattr(model, _LEFT_OUT, True)
    language = model.config.get_text_config()
    return {name: 0 for name in _COUNTS if getattr(language, name, None)}


def copy_unsaid_mtp(model: Any, folder: Path) -> None:
    """Copy these layers where the config does not count them, as in Qwen3-Next.

    :param model: as it was saved
    :param folder: where
    """
    counted = any(hasattr(model.config.get_text_config(), name) for name in _COUNTS)
    if not counted and not getattr(model, _LEFT_OUT, False) and _has_mtp(model):
        save_mtp_tensors_to_checkpoint(model.config._name_or_path, str(folder))


def _has_mtp(model: Any) -> bool:
    """Whether the config counts such layers, or the checkpoint holds some all the same."""
    language = model.config.get_text_config()
    if any(hasattr(language, name) for name in _COUNTS):
        return any(getattr(language, name, None) for name in _COUNTS)
    unread = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()
    source = getattr(model.config, "_name_or_path", "")
    if not any(str(pattern).startswith("^mtp") for pattern in unread):
        return False
    if find_file(source, "config.json") is None:
        return False
    return any(name.startswith("mtp.") for name in read_checkpoint(source, model.config))
