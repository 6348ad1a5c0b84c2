"""The models, texts and tasks that options name, loaded or refused in one line."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsessm_plugin.cli.console import progress, show
from sparsessm_plugin.cli.options import DEVICES, DTYPES, choice, of_option
from sparsessm_plugin.errors import SparseSSMError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsessm_plugin.evaluation.perplexity import Perplexity


def source_of(
    name: str, trust_remote_code: bool, dtype: str, device: str, allow_unused_tensors: bool
) -> Any:
    choice("--dtype", dtype, DTYPES)
    choice("--device", device, DEVICES)
    _regular_files(name)
    from sparsessm_plugin.recipes.pruning import ModelSource

    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SparseSSMError("--device cuda: no CUDA device is available")
    return ModelSource(name, trust_remote_code, dtype, device, allow_unused_tensors)


def _regular_files(model: str) -> None:
    """Refuse a folder with a pipe or a device in it: whoever reads that may wait for ever."""
    if os.path.isdir(model):
        for file in Path(model).iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():
                raise SparseSSMError(f"model {model}: {file.name} is no regular file")


def vocab_size_of(skeleton: Any) -> int:
    return skeleton.get_input_embeddings().num_embeddings


def windows_of(
    source: str,
    tokenizer: Any,
    length: int,
    vocab_size: int,
    text_field: str,
    option: str = "--calibration",
) -> "Tensor":
    from sparsessm_plugin.calibration.vocabulary import check_token_ids
    from sparsessm_plugin.evaluation.data import read_texts, tokenize, windows

    with of_option(option):
        tokens = tokenize(read_texts(source, text_field), tokenizer)
        samples = windows(tokens, length, source)
        check_token_ids(samples, vocab_size, source)
    return samples


def warn_of_few(samples: "Tensor", wanted: int, source: str, length: int) -> None:
    """Say that a calibration text gives fewer windows than were asked for."""
    if len(samples) < wanted:
        show(
            "warning",
            f"{source} gives {len(samples)} windows of {length} tokens, fewer "
            f"than the {wanted} asked for; using them all",
        )


def load_tasks(
    names: list[str],
    data: Path | None,
    limit: int | None,
    text: str | None = None,
    text_field: str = "text",
) -> Any:
    """The tasks of these names, None for none.

    :param text: what recall reads
    """
    if not names:
        return None
    from sparsessm_plugin.evaluation.data import read_texts
    from sparsessm_plugin.evaluation.recall import NAME
    from sparsessm_plugin.evaluation.tasks import load_tasks

    read = text is not None and NAME in names
    return load_tasks(names, data, limit, read_texts(text, text_field) if read and text else None)


def has_mixers(model: Any) -> bool:
    from sparsessm_plugin.families import iter_mixers

    return next(iter(iter_mixers(model)), None) is not None


def measure_perplexity(model: Any, samples: "Tensor", batch_size: int, label: str) -> "Perplexity":
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity

    with progress(f"perplexity, {label}", len(samples)) as advance:
        return evaluate_perplexity(model, samples, batch_size, advance)
