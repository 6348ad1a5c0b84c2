"""Where the weights of a model that a recipe changes stay meanwhile."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsessm_plugin import distributed
from sparsessm_plugin.checkpoints.offloading import (
    check_disk,
    choose_offload,
    forget,
    weights_as_loaded,
)
from sparsessm_plugin.errors import SparseSSMError, SparseSSMWarning
from sparsessm_plugin.files import scratch_directory
from sparsessm_plugin.recipes import CheckedRecipe
from sparsessm_plugin.recipes.pruning import ModelSource


@contextmanager
def offloaded(
    source: ModelSource,
    recipe: CheckedRecipe,
    skeleton: nn.Module,
    asked: str,
    folder: Path | None,
    output: Path,
) -> Iterator[ModelSource]:
    """A source whose weights stay where there is room for them; see :func:`choose_offload`.

    :param source: to load from
    :param recipe: that will change what is loaded
    :param skeleton: the model on the meta device
    :param asked: ``auto``, ``none``, ``cpu`` or ``disk``
    :param folder: that exists, for weights on disk; None for one beside ``output``
    :param output: of the result
    :raises SparseSSMError: a modifier needs the whole model, there are several ranks, or the disk
        has too little room
    """
    needed = _weight_bytes(source, skeleton)
    chosen = choose_offload(asked, needed, source.compute_device)
    whole = recipe.needs_whole_model
    reason = "each of several ranks" if distributed.world_size() > 1 else whole
    if chosen != "none" and reason is not None and asked != "cpu":  # main memory holds it, too
        if asked != "auto":
            raise SparseSSMError(
                f"--offload {asked}: {reason} holds the whole model; leave --offload out"
            )
        if whole is not None:
            warnings.warn(
                f"{whole} holds the whole model of {needed:,} bytes, more than is free here; it "
                "may run out of memory",
                SparseSSMWarning,
                stacklevel=2,
            )
        chosen = "none"
    if chosen != "disk":
        yield replace(source, offload=chosen)
        return
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise SparseSSMError(f"--offload-folder {folder} is no folder that can be written to")
    where = output if folder is None else folder / "sparsessm-weights"
    with scratch_directory(where) as place, weights_as_loaded():
        # what changes is written there, and all of it once more as the result
        same = os.stat(place).st_dev == os.stat(output.absolute().parent).st_dev
        check_disk(place, (2 if same else 1) * needed)
        try:
            yield replace(source, offload=chosen, offload_folder=place)
        finally:
            forget(place)


def _weight_bytes(source: ModelSource, skeleton: nn.Module) -> int:
    """Bytes of all weights in the type that they are loaded in."""
    config: Any = skeleton.config
    own = config.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    return sum(p.numel() for p in skeleton.parameters()) * (own or torch.float32).itemsize
