"""Where a config holds the sizes of the language model: at its top, or nested, or both.

Works on transformers configs and on the mapping that a config.json holds, and imports neither.
"""

from collections.abc import Mapping
from typing import Any

from sparsessm_plugin.errors import SparseSSMError

# what composite models call the config of their language model
NESTED = ("text_config", "llm_config", "language_config", "decoder", "generator")

Path = tuple[str, ...]

# Of published models none has a tenth of it, and even an empty model of this many takes a second.
_MOST_LAYERS = 2048


def language_levels(config: Any) -> dict[Path, Any]:
    """Every level of a config that may speak of the language model, outermost first.

    :param config: a transformers config, or the mapping of a config.json
    :return: keys that lead to the level -> the level, a config or a mapping
    """
    levels: dict[Path, Any] = {(): config}
    for key in NESTED:
        nested = get_field(config, key) if holds(config, key) else None
        if isinstance(nested, Mapping) or hasattr(nested, "to_dict"):
            levels |= {(key, *path): level for path, level in language_levels(nested).items()}
    return levels


def language_level(config: Any, *fields: str) -> Path:
    """The keys that lead to the innermost level that holds all the fields.

    :param config: as for :func:`language_levels`
    :raises KeyError: no level holds them all; the first field that none of them holds
    """
    levels = language_levels(config)
    for path, level in reversed(levels.items()):
        if all(holds(level, field) for field in fields):
            return path
    everywhere = (f for f in fields if not any(holds(v, f) for v in levels.values()))
    raise KeyError(next(everywhere, fields[0]))


def language_field(config: Any, field: str) -> Any:
    """The value of a field at the innermost level that holds it, None where none does."""
    try:
        return get_field(language_levels(config)[language_level(config, field)], field)
    except KeyError:
        return None


def holds(level: Any, field: str) -> bool:
    """Whether a level has a field of its own."""
    return field in level if isinstance(level, Mapping) else hasattr(level, field)


def get_field(level: Any, field: str) -> Any:
    """The value of a field of a level."""
    return level[field] if isinstance(level, Mapping) else getattr(level, field)


def check_layers(fields: Mapping[str, Any], model: str) -> None:
    """Refuse a config that states, on any level, more layers than any model has.

    :param fields: of the config
    :param model: its name, for the message
    :raises SparseSSMError: stating how many
    """
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise SparseSSMError(
            f"{model}: config.json states num_hidden_layers: {layers}; models of at most "
            f"{_MOST_LAYERS} layers are loaded"
        )
    for inner in fields.values():
        if isinstance(inner, Mapping):
            check_layers(inner, model)
