"""Lists of the kinds of layers, in the words of the config.json that they are written to.

transformers 5 gives the kinds of layers new words when it reads a config. Other runtimes know
those that the checkpoint was published with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_LISTS = ("layer_types", "layers_block_type")
_PATTERN = "hybrid_override_pattern"  # Nemotron-H, one letter a layer
_INTERVAL = "full_attention_interval"  # Qwen: every so many layers there is one of attention
_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
_PUBLISHED = {"linear_attention": "mamba", "full_attention": "attention"}


def in_words_of(content: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, with lists of layers under the names and in the words of a config file.

    :param content: what the config.json, or a level of it, holds
    :param fields: field name -> value, as the config in memory has them
    """
    result = dict(fields)
    for name in _LISTS:
        if name not in fields:
            continue
        kinds = result.pop(name)
        if _PATTERN in content:
            result[_PATTERN] = "".join(_LETTERS[kind] for kind in kinds)
        stated = [other for other in _LISTS if content.get(other) is not None]
        for other in stated or ([] if _PATTERN in content else [name]):
            published = set(_PUBLISHED.values()) & set(content.get(other) or ())
            result[other] = [_PUBLISHED.get(k, k) if published else k for k in kinds]
        if content.get(_INTERVAL) is not None:  # which runtimes read in the place of the list
            result[_INTERVAL] = _interval(kinds)
    return result


def _interval(kinds: Sequence[str]) -> int | None:
    """Every how many layers attention stands; None if no number says it."""
    fits = (
        interval
        for interval in range(1, len(kinds) + 1)
        if all((k == "full_attention") == (i % interval == 0) for i, k in enumerate(kinds, 1))
    )
    return next(fits, None)


def in_published_words(content: dict[str, Any], published: Mapping[str, Any]) -> None:
    """Give lists of layers that transformers has written the words of the file before it.

    :param content: of a config.json, or a level of it, changed in place
    :param published: the same level of the file that the model was loaded from
    """
    words = {kind for name in _LISTS for kind in published.get(name) or ()}
    for name in _LISTS:
        kinds = content.get(name)
        if not isinstance(kinds, list):
            continue
        if words & set(_PUBLISHED.values()):
            content[name] = [_PUBLISHED.get(kind, kind) for kind in kinds]
        if isinstance(published.get(_PATTERN), str) and set(kinds) <= set(_LETTERS):
            content[_PATTERN] = "".join(_LETTERS[kind] for kind in kinds)
            if name not in published:
                del content[name]
