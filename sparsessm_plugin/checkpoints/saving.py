"""Let what LLM Compressor writes load again in stock transformers.

Its ``save_pretrained`` puts the config file of the original checkpoint in the place of the
one that transformers has written, which brings the old sizes back. What it does to experts is
told in :mod:`sparsessm_plugin.checkpoints.experts`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compressed_tensors.quantization.quant_config import _map_to_checkpoint_names
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from loguru import logger

from sparsessm_plugin import distributed
from sparsessm_plugin.checkpoints.config_files import complete, keep_words
from sparsessm_plugin.checkpoints.experts import loadable_experts
from sparsessm_plugin.checkpoints.loading import find_file, needs_load
from sparsessm_plugin.checkpoints.mtp import SIZES_OF_MTP, copy_unsaid_mtp, without_mtp
from sparsessm_plugin.dependency_graph import apply_config_fields, write_config_fields
from sparsessm_plugin.files import write_bytes, write_config

NOTE_NAME = "LOADING.md"
_NOTE = """\
# Loading this checkpoint

When transformers loads this family, it reads out_proj.weight and may rescale it. Where that is
packed or was scaled already, a plain `from_pretrained` fails or gives other values. The package
sparsessm-plugin loads what was saved:

```python
import sparsessm_plugin

model = sparsessm_plugin.load("path/to/this/folder")
```

or call `sparsessm_plugin.enable_compressed_loading()` once, and `from_pretrained` as ever.
"""

# of LLM Compressor's save_pretrained, which may be given by position
_OPTIONS = ("quantization_format", "save_compressed")


def change_config(model: Any, fields: Mapping[str, Any]) -> None:
    """Set config fields in memory and in every config.json that the model saves from now on.

    :param model: transformers model
    :param fields: field name -> value
    :raises SparseSSMError: the config refuses them
    """
    apply_config_fields(model.config, fields)
    for size in SIZES_OF_MTP:
        if size in fields and (left_out := without_mtp(model, size)):
            apply_config_fields(model.config, left_out)
            fields = {**fields, **left_out}
    known = getattr(model.save_pretrained, "sparsessm_fields", None)
    if known is not None:
        known.update(fields)
        return
    modify_save_pretrained(model)  # does nothing where oneshot() has done it
    inner, kept = model.save_pretrained, dict(fields)

    @wraps(inner)
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
        with (
            loadable_experts(model, **options),
            generation_config_kept(model, save_directory),
        ):
            result = inner(save_directory, *args, **kwargs)
            saved_names = _saved_names(model)
        path = Path(save_directory) / "config.json"
        if distributed.rank() == 0 and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            keep_words(content, model)
            if kept:
                write_config_fields(content, kept, model.config)
            complete(content, model)
            _name_ignored_modules(content, saved_names)
            write_config(path, content)
        if distributed.rank() == 0:
            copy_unsaid_mtp(model, path.parent)
            _write_note(Path(save_directory), needs_load(model))
        return result

    # what LLM Compressor asks before it wraps a second time
    save_pretrained._overridden = True  # type: ignore[attr-defined]
    save_pretrained.sparsessm_fields = kept  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


def _saved_names(model: Any) -> dict[str, str]:
    """Name of a module in a checkpoint -> its name in transformers."""
    names = [name for name, _ in model.named_modules()]
    return dict(zip(_map_to_checkpoint_names(model, names), names, strict=True))


def _name_ignored_modules(content: dict[str, Any], saved_names: Mapping[str, str]) -> None:
    """Let a quantized config name the modules that are not quantized as transformers does, too.

    compressed-tensors writes them with the names of the checkpoint, which other runtimes look for.
    Where transformers renames these (``backbone.`` to ``model.`` in NemotronH) it would find none
    of them, take each for quantized, and wait for scales that are not there.

    :param content: of config.json, changed in place
    """
    quantization = content.get("quantization_config")
    ignored = (quantization.get("ignore") or []) if isinstance(quantization, dict) else []
    for name in list(ignored):
        own = saved_names.get(name, name)
        if own not in ignored:
            ignored.append(own)


def _write_note(folder: Path, needed: bool) -> None:
    """Leave a note on how to load, or take away the one that an earlier model has left."""
    note = folder / NOTE_NAME
    if needed:
        logger.info(
            f"{folder} loads with sparsessm_plugin.load; plain transformers fails or rescales"
        )
        if not note.exists():  # a file of somebody else's stays
            write_bytes(note, _NOTE.encode())
    elif note.is_file() and note.read_bytes() == _NOTE.encode():
        note.unlink()


@contextmanager
def generation_config_kept(model: Any, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let a model be saved whose generation_config.json transformers reads and does not write.

    It refuses what it only warns of when it loads, as a temperature without sampling. Pruning has
    nothing to do with it, so that the file stays as it was.

    :param folder: where the model is saved
    """
    own = getattr(model, "generation_config", None)
    if own is None or _is_written(own):
        yield
        return
    source = find_file(model.config._name_or_path, _GENERATION)
    content = None if source is None else source.read_bytes()
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    path = Path(folder) / _GENERATION
    if content is not None and path.is_file():
        write_bytes(path, content)


_GENERATION = "generation_config.json"


def _is_written(config: Any) -> bool:
    """Whether transformers writes this generation config."""
    with TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (ValueError, TypeError):
            return False
    return True


# what prepares images; the tokenizer's own files are written anew
_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def copy_processor(model: Any, folder: Path) -> None:
    """Put what prepares images for a model beside it, as it came.

    :param model: as it was saved
    :param folder: where; files that are there stay
    """
    if not hasattr(model.config, "vision_config"):
        return
    for name in _PROCESSOR:
        source = find_file(getattr(model.config, "_name_or_path", ""), name)
        if source is not None and not (folder / name).exists():
            write_bytes(folder / name, source.read_bytes())
