"""Documents of the tasks beside this file where lm-eval's own command reads them.

``lm_eval --include_path FOLDER --metadata '{"tasks_data": "DIR"}'``, or the environment variable
``SPARSESSM_TASKS_DATA``.
"""

import os
from pathlib import Path
from typing import Any

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.tasks import read_local


def read(files: str, fields: list[str], tasks_data: str | None = None, **_: Any) -> dict[str, Any]:
    """The documents of all files of a pattern, one after the other, in the split ``test``."""
    from datasets import concatenate_datasets

    folder = tasks_data or os.environ.get("SPARSESSM_TASKS_DATA")
    if not folder:
        raise SparseSSMError(
            'these tasks read a folder: --metadata \'{"tasks_data": "DIR"}\', or the '
            "environment variable SPARSESSM_TASKS_DATA"
        )
    found = sorted(Path(folder).glob(files))
    if not found:
        raise SparseSSMError(f"there is no {Path(folder) / files}")
    parts: list[Any] = [read_local(file, fields)["test"] for file in found]
    return {"test": concatenate_datasets(parts)}
