"""New sizes in a model's config, in memory and in the config.json of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from sparsessm_plugin.dependency_graph.layer_lists import in_words_of
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.config_levels import (
    Path,
    get_field,
    holds,
    language_level,
    language_levels,
)

# Names under which configs state one and the same size. Runtimes differ in what they read, so all
# that are there must say the same. `num_heads`, `head_dim` and `intermediate_size` speak of the
# mixers in configs of mixers alone, which have a `state_size`, and of attention and the MLP in
# those of hybrids; they change only where a family's loader reads them.
_STATES = ("state_size", "mamba_d_state", "ssm_state_size", "d_state")
_CHANNELS = ("d_inner", "mamba_d_inner", "mamba_d_ssm", "d_ssm", "mamba_intermediate_size")
_HEADS = ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "nheads")
_HEAD_DIM = ("mamba_d_head", "mamba_headdim", "mamba_head_dim", "headdim")
_EXPAND = ("expand", "mamba_expand")
_UNPREFIXED = ("num_heads", "head_dim", "intermediate_size")
_HIDDEN = ("hidden_size", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# a mapping inside of configs that were converted from mamba_ssm's
_NESTED_CFG = "ssm_cfg"


def apply_config_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Set the fields on a transformers config, all of them or none.

    The innermost level of a composite config that has all the fields gets them, and so does
    every other level that states one of them, under any of its names. A config checks its fields
    against each other, so they are checked once all are set.

    :param config: of the model, or one that holds the config of the language model
    :param fields: field name -> value, as :attr:`AxisGroup.config_fields` holds them
    :raises SparseSSMError: a field that the config lacks, or values that it refuses
    """
    if not fields:
        return
    path = _deciding_level(config, fields)
    changes = _changes(config, fields, path, _is_of_mixers_alone(config, path))
    before = [(level, name, get_field(level, name)) for level, name, _ in changes]
    try:
        for level, name, value in changes:
            _set(level, name, value)
        for level in language_levels(config).values():
            validate = getattr(level, "validate", None)
            if validate is not None:
                validate()
    except Exception as error:
        for level, name, value in before:
            _set(level, name, value)
        wanted = ", ".join(f"{field}={value!r}" for field, value in fields.items())
        reason = " ".join(str(error).split())
        raise SparseSSMError(f"{type(config).__name__} refuses {wanted}: {reason}") from error


def set_language_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """:func:`apply_config_fields`, with ``head_dim`` too, which some loaders read undeclared."""
    language = config.get_text_config()
    if "head_dim" in fields and not hasattr(language, "head_dim"):
        language.head_dim = None
    apply_config_fields(config, fields)


def write_config_fields(content: dict[str, Any], fields: Mapping[str, Any], config: Any) -> None:
    """Set the fields in what a config.json holds, at the levels that the config has them.

    :param content: of config.json, changed in place; it may leave out what has a default
    :param fields: as for :func:`apply_config_fields`
    :param config: of the model in memory, which decides on the level
    :raises SparseSSMError: the config in memory lacks a field
    """
    path = _deciding_level(config, fields)
    alone = _is_of_mixers_alone(config, path)
    levels = language_levels(content)
    stated = [p for p, level in levels.items() if any(holds(level, f) for f in fields)]
    if path not in levels:  # a file that is flat, or nests under another name
        path = (stated or list(levels))[-1]
    elif path not in stated:  # or nests what is flat in memory, as of a language model alone
        path = next((p for p in reversed(stated) if p[: len(path)] == path), path)
    fields = in_words_of(levels[path], fields)
    for level, name, value in _changes(content, fields, path, alone):
        _set(level, name, value)


def _deciding_level(config: Any, fields: Mapping[str, Any]) -> Path:
    try:
        return language_level(config, *fields)
    except KeyError as error:
        raise SparseSSMError(f"{type(config).__name__} has no field {error.args[0]!r}") from None


def _is_of_mixers_alone(config: Any, path: Path) -> bool:
    return holds(language_levels(config)[path], "state_size")


def _changes(
    config: Any, fields: Mapping[str, Any], path: Path, alone: bool
) -> list[tuple[Any, str, Any]]:
    """Level, name and new value of everything that states one of the sizes."""
    levels = language_levels(config)
    hidden = None
    for level in (*levels.values(), levels[path]):  # the deciding level has the last word
        hidden = next((get_field(level, name) for name in _HIDDEN if holds(level, name)), hidden)
    same = _other_names(fields, fields.get("hidden_size", hidden), alone)
    changes = [(levels[path], name, value) for name, value in fields.items()]
    for where, level in levels.items():
        stated = {**same, **fields}
        if where == path:  # where all fields are set, whether the level states them or not
            stated = {name: value for name, value in same.items() if name not in fields}
        changes += [
            (level, name, value)
            for name, value in stated.items()
            # what is None is derived from the others
            if holds(level, name) and get_field(level, name) is not None
        ]
        inner = get_field(level, _NESTED_CFG) if holds(level, _NESTED_CFG) else None
        if isinstance(inner, dict):
            changes += [(inner, name, value) for name, value in same.items() if name in inner]
    return changes


def _other_names(fields: Mapping[str, Any], hidden_size: int | None, alone: bool) -> dict[str, Any]:
    """Every other name of the sizes that the fields give -> value.

    :param alone: whether the config is one of mixers alone
    """
    if not alone:
        fields = {name: value for name, value in fields.items() if name not in _UNPREFIXED}

    def first(*names: str) -> Any:
        return next((fields[name] for name in names if name in fields), None)

    states, expand = first(*_STATES), first(*_EXPAND)
    heads, head_dim = first("num_heads", *_HEADS), first("head_dim", *_HEAD_DIM)
    channels = first("intermediate_size", *_CHANNELS)
    if channels is None and heads is not None and head_dim is not None:
        channels = heads * head_dim
    if channels is None and expand is not None and hidden_size:
        channels = expand * hidden_size
    if expand is None and channels is not None and hidden_size and channels % hidden_size == 0:
        expand = channels // hidden_size  # configs take whole numbers only
    # of mixers alone it states the channels, which transformers derives and others read in the file
    of_channels = (*_CHANNELS, "intermediate_size") if alone else _CHANNELS
    sizes = {
        _STATES: states, of_channels: channels, _HEADS: heads, _HEAD_DIM: head_dim, _EXPAND: expand,
        _HIDDEN: first(*_HIDDEN), _LAYERS: first(*_LAYERS),
    }  # fmt: skip
    return {n: size for names, size in sizes.items() if size is not None for n in names}


def _set(level: Any, name: str, value: Any) -> None:
    if isinstance(level, dict):
        level[name] = value
    else:
        setattr(level, name, value)
