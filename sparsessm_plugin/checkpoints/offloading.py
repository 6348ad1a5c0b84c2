"""Weights that stay in main memory or on disk, and are where a layer computes in its turn alone.

compressed-tensors keeps them: a module's parameters are read when they are asked for, from the
checkpoint itself as long as they are as they were, and what is written over them goes to a file of
its own in a folder beside. LLM Compressor's sequential pipeline reads each layer once.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.offload import from_accelerate, set_onload_device
from compressed_tensors.offload.cache import DiskCache
from compressed_tensors.utils import patch_attr
from torch import Tensor, nn

from sparsessm_plugin.cost import has_room, memory_available
from sparsessm_plugin.errors import SparseSSMError

Offload = Literal["none", "cpu", "disk"]
OFFLOADS = ("auto", "none", "cpu", "disk")
SHARD_BYTES = 10**9  # of a file of a result whose weights came from disk; it stands in main memory
# of memory that is free, for weights; the rest is for what a layer computes, its sums, libraries
_SHARE_OF_GPU, _SHARE_OF_MEMORY = 0.5, 0.7


def choose_offload(asked: str, weights: int, device: torch.device) -> Offload:
    """Where weights stay while they are not computed with: the fastest place that has room.

    :param asked: ``auto``, or the place
    :param weights: bytes of all of them in the type that they are loaded in
    :param device: that computes
    :return: ``none``: on the device; ``cpu``: in main memory; ``disk``
    """
    if asked != "auto":
        return asked  # type: ignore[return-value]
    if weights > _SHARE_OF_MEMORY * memory_available():  # they pass it on their way to a GPU, too
        return "disk"
    if device.type == "cuda" and not has_room(device, weights, spare=1 - _SHARE_OF_GPU):
        return "cpu"
    return "none"


def load_options(offload: Offload, folder: Path | None) -> dict[str, Any]:
    """What ``from_pretrained`` is given so that it leaves all weights on disk, if they are to be.

    :param offload: where weights stay
    :param folder: for what the checkpoint does not hold as the model has it, such as experts
        that are merged, and for all that changes; what an earlier model has left there goes
    """
    if offload != "disk":
        return {}
    assert folder is not None, "weights on disk need a folder"
    for earlier in folder.glob("weights-*"):
        forget(earlier)
        shutil.rmtree(earlier, ignore_errors=True)
    place = tempfile.mkdtemp(prefix="weights-", dir=folder)
    return {"device_map": {"": "disk"}, "offload_folder": place, "offload_buffers": True}


def keep_offloaded(model: Any, device: torch.device) -> None:
    """Let a model's weights be read onto a device in their turn.

    :param model: as ``from_pretrained`` has made it, on the CPU or with weights on disk
    :param device: that computes
    """
    from_accelerate(model)
    set_onload_device(model, device)


@contextmanager
def weights_as_loaded() -> Iterator[None]:
    """Let weights that are read from disk be multiplied as those in memory are, to the last bit.

    compressed-tensors gives a view of the file's bytes for a parameter. Of such a view torch does
    not see that it wants gradients once it is transposed, and multiplies in other steps. Where the
    file's type is another one it gives a tensor that is no parameter.
    """
    onload = DiskCache.onload

    @wraps(onload)
    def whole(self: DiskCache, offloaded: Tensor | None) -> Tensor | None:
        read = onload(self, offloaded)
        if read is None or not isinstance(offloaded, nn.Parameter):
            return read
        weight = nn.Parameter(read.data, offloaded.requires_grad)
        weight.__dict__.update(offloaded.__dict__)
        return weight

    with patch_attr(DiskCache, "onload", whole):
        yield


def drop_unused(model: nn.Module) -> None:
    """Remove the files of weights that a model had on disk and has no more.

    compressed-tensors keeps them as long as it runs, those of modules that were replaced too.
    """
    caches = [c for m in model.modules() for c in (m._parameters, m._buffers)]
    on_disk = [cache for cache in caches if isinstance(cache, DiskCache)]
    used = {id(t) for cache in on_disk for t in cache.offloaded_values.values()}
    folders = {Path(cache.offload_dir) for cache in on_disk}
    files = {t: Path(entry["safetensors_file"]) for t, entry in DiskCache.index.items()}
    needed = {file.resolve() for tensor, file in files.items() if id(tensor) in used}
    for tensor, file in files.items():
        if id(tensor) in used or file.parent not in folders:
            continue
        behind = file.resolve()  # a link, to the checkpoint or to what was merged from it
        file.unlink(missing_ok=True)
        if behind.parent in folders and behind not in needed:
            behind.unlink(missing_ok=True)
        del DiskCache.index[tensor]


def forget(folder: Path) -> None:
    """Let compressed-tensors forget what it knows of weights in a folder."""
    inside = os.path.join(folder.resolve(), "")
    for tensor, entry in list(DiskCache.index.items()):
        if str(entry["safetensors_file"]).startswith(inside):
            del DiskCache.index[tensor]


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    :param folder: on the disk
    :param needed: bytes
    :raises SparseSSMError: there are fewer
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SparseSSMError(
            f"{folder} has {free:,} bytes free, and changed weights and the result take up to "
            f"{needed:,}; choose another disk with --offload-folder, or another output"
        )
