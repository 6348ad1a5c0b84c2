"""Let what LLM Compressor writes load again in stock transformers.

Its ``save_pretrained`` puts the config file of the original checkpoint in the place of the
one that transformers has written, which brings the old sizes back. And it writes experts one
by one, as ``oneshot()`` takes them apart, where some architectures read them packed.
"""

import json
import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from llmcompressor.modeling.moe.linearize import get_linearized_moes, repack_moe
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)

from sparsessm_plugin import distributed
from sparsessm_plugin.dependency_graph import apply_config_fields, write_config_fields
from sparsessm_plugin.files import write_config


def change_config(model: Any, fields: Mapping[str, Any]) -> None:
    """Set config fields in memory and in every config.json that the model saves from now on.

    :param model: transformers model
    :param fields: field name -> value
    :raises SparseSSMError: the config refuses them
    """
    apply_config_fields(model.config, fields)
    known = getattr(model.save_pretrained, "sparsessm_fields", None)
    if known is not None:
        known.update(fields)
        return
    modify_save_pretrained(model)  # does nothing where oneshot() has done it
    inner, kept = model.save_pretrained, dict(fields)

    @wraps(inner)
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        _pack_experts(model)
        result = inner(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if distributed.rank() == 0 and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if kept:
                write_config_fields(content, kept, model.config)
            write_config(path, content)
        return result

    # what LLM Compressor asks before it wraps a second time
    save_pretrained._overridden = True  # type: ignore[attr-defined]
    save_pretrained.sparsessm_fields = kept  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


def _pack_experts(model: Any) -> None:
    """Give the model its own expert modules back, unless a quantization needs them apart."""
    parts = (part for _, experts in get_linearized_moes(model) for part in experts.modules())
    if not any(getattr(part, "quantization_scheme", None) is not None for part in parts):
        repack_moe(model)
