"""What a config.json says beside what transformers reads: fields and words of other runtimes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsessm_plugin.checkpoints.loading import find_file
from sparsessm_plugin.dependency_graph.layer_lists import in_published_words
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.files import read_json

_MIXERS_ALONE = ("mamba", "falcon_mamba", "mamba2")


def complete(content: dict[str, Any], model: Any) -> None:
    """State what transformers derives or takes for granted, and mlx-lm asks for.

    :param content: of the config.json of a saved model, changed in place
    :param model: that was saved
    """
    kind = content.get("model_type")
    if kind in _MIXERS_ALONE:
        content["intermediate_size"] = find_mixers(model)[0].sizes.intermediate_size
    if kind == "mamba2":
        limits = getattr(model.config, "time_step_limit", (0.0, math.inf))
        content.setdefault("time_step_limit", [_written(limit) for limit in limits])
        content.setdefault("tie_word_embeddings", bool(model.config.tie_word_embeddings))
    if kind == "granitemoehybrid":
        if content.get("position_embedding_type") is None:  # which means none at all
            content["position_embedding_type"] = "nope"
        if not content.get("num_local_experts") and "shared_intermediate_size" in content:
            # of a dense model transformers reads this one, and others the other
            content["intermediate_size"] = content["shared_intermediate_size"]


def _written(value: float) -> Any:
    """A number as transformers 5 writes it: JSON knows no infinity."""
    return {"__float__": "Infinity"} if value == math.inf else value


def keep_words(content: dict[str, Any], model: Any) -> None:
    """Let the kinds of layers have the words of the config.json that the model came with.

    LLM Compressor puts that file in the place of what transformers writes, but not where it lacks
    one of the fields that it looks for.

    :param content: of the config.json of a saved model, changed in place
    :param model: that was saved
    """
    source = find_file(getattr(model.config, "_name_or_path", ""), "config.json")
    if source is None:
        return
    published = _read(source)
    in_published_words(content, published)
    inner, before = content.get("text_config"), published.get("text_config")
    if isinstance(inner, dict) and isinstance(before, dict):
        in_published_words(inner, before)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
