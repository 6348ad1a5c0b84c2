"""Whether ranks belong together: the same settings and model, and each its share of the data."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.batches import CalibrationBatches
from sparsessm_plugin.distributed import named
from sparsessm_plugin.errors import SparseSSMWarning

_HASHED = 2**26  # bytes of a weight that are brought to the CPU and hashed in one go


def check_ranks(
    who: str, model: nn.Module, data: CalibrationBatches | None = None, settings: Any = None
) -> None:
    """Refuse ranks that do not belong together, before anything is changed.

    :param who: the modifier
    :param model: parameters must agree by name, shape, dtype and bits
    :param data: calibration batches, or None. The number that the ranks' loaders gave may
        differ by one, where samples do not divide; and where every rank's sequences are all of
        one length, it must be the same length, as windows of a text are. Text in its natural
        lengths may differ: positions are counted from the start of a sequence. Ranks that read
        the same sequences are warned.
    :param settings: what JSON can hold, the same on every rank
    :raises RanksError: naming the ranks and what differs, the same on every rank
    """
    if not distributed.is_distributed():
        return
    settings = json.dumps(settings, sort_keys=True, default=str)
    _check_same(who, "settings", distributed.gather(f"{who}: settings", settings))
    _check_model(who, model)
    if data is not None:
        _check_data(who, distributed.gather(f"{who}: data", _describe(data)))


def _check_same(who: str, what: str, values: list[str]) -> None:
    differing = [r for r, value in enumerate(values) if value != values[0]]
    if differing:
        raise distributed.RanksError(f"{who}: {named(differing)} and rank 0 have different {what}")


def _check_model(who: str, model: nn.Module) -> None:
    tensors = [
        (f"{name} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}", _digest(p))
        for name, p in model.named_parameters()
    ]
    digests = distributed.gather(f"{who}: model", hashlib.sha256(str(tensors).encode()).hexdigest())
    differing = [r for r, digest in enumerate(digests) if digest != digests[0]]
    if not differing:
        return
    each = distributed.gather(f"{who}: parameters", [list(tensor) for tensor in tensors])
    have = f"{named(differing)} {'has' if len(differing) == 1 else 'have'}"
    there, here = (each[r] for r in (0, differing[0]))
    nothing = ["nothing", 0]
    for (expected, _), (found, _) in zip_longest(there, here, fillvalue=nothing):
        if found != expected:
            raise distributed.RanksError(
                f"{who}: {have} another model than rank 0: {found} in place of {expected}"
            )
    name = next(b[0] for a, b in zip(there, here, strict=True) if a != b)
    raise distributed.RanksError(
        f"{who}: {have} other weights than rank 0; the first that differ are those of {name}"
    )


def _check_data(who: str, each: list[dict[str, Any]]) -> None:
    counts = [e["batches"] for e in each]
    if max(counts) - min(counts) > 1:
        most, least = counts.index(max(counts)), counts.index(min(counts))
        raise distributed.RanksError(
            f"{who}: rank {most} has {max(counts)} calibration batches and rank {least} has "
            f"{min(counts)}; shares may differ by one"
        )
    lengths = [e["lengths"] for e in each]
    if all(found and found[0] == found[1] for found in lengths):
        differing = [r for r, found in enumerate(lengths) if found != lengths[0]]
        if differing:
            raise distributed.RanksError(
                f"{who}: the calibration sequences of {named(differing)} have "
                f"{lengths[differing[0]][0]} tokens, those of rank 0 have {lengths[0][0]}"
            )
    before: set[str] = set()
    for r, found in enumerate(e["sequences"] for e in each):
        again = sum(sequence in before for sequence in found)
        if 2 * again > len(found) and distributed.rank() == 0:
            warnings.warn(
                f"{who}: {again} of the {len(found)} sequences that rank {r} reads are read by "
                "another rank as well. Give each rank a dataset of its own, with "
                "llmcompressor.datasets.get_rank_partition for example: of one that all ranks "
                "load, LLM Compressor 0.14 lets every rank read the first samples",
                SparseSSMWarning,
                stacklevel=2,
            )
            break
        before.update(found)


def _describe(batches: CalibrationBatches) -> dict[str, Any]:
    """Number of batches, least and greatest length, and digests of the sequences.

    Batches of empty samples count, as shares are made before anybody knows what is in them.
    """
    lengths, sequences = set(), []
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor):
            lengths.add(ids.shape[-1])
            for row in ids.cpu().numpy():
                sequences.append(hashlib.blake2b(row.tobytes(), digest_size=6).hexdigest())
    return {
        "batches": batches.served,
        "lengths": [min(lengths), max(lengths)] if lengths else None,
        "sequences": sequences,
    }


def _digest(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor in their order; one piece at a time of what is on a GPU."""
    found = hashlib.blake2b(digest_size=16)
    if not tensor.is_meta:
        for piece in tensor.detach().reshape(-1).view(torch.uint8).split(_HASHED):
            found.update(piece.cpu().numpy().data)
    return found.hexdigest()
