"""New sizes in a model's config."""

from collections.abc import Mapping
from typing import Any

from sparsessm_plugin.errors import SparseSSMError


def apply_config_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Set the fields on a transformers config, all of them or none.

    A config checks its fields against each other, so they are checked once all are set.

    :param config: of the model, or one that holds the config of the language model
    :param fields: field name -> value, as :attr:`AxisGroup.config_fields` holds them
    :raises SparseSSMError: a field that the config lacks, or values that it refuses
    """
    if not all(hasattr(config, field) for field in fields):
        config = config.get_text_config()
    for field in fields:
        if not hasattr(config, field):
            raise SparseSSMError(f"{type(config).__name__} has no field {field!r}")
    before = {field: getattr(config, field) for field in fields}
    try:
        for field, value in fields.items():
            setattr(config, field, value)
        validate = getattr(config, "validate", None)
        if validate is not None:
            validate()
    except Exception as error:
        for field, value in before.items():
            setattr(config, field, value)
        wanted = ", ".join(f"{field}={value!r}" for field, value in fields.items())
        reason = " ".join(str(error).split())
        raise SparseSSMError(f"{type(config).__name__} refuses {wanted}: {reason}") from error
