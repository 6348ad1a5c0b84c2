"""The batches of a run and their order, which every pass of every modifier shares.

LLM Compressor's loader shuffles with torch's global generator, so two iterations over it see two
orders. :func:`fix_batches` iterates once, keeps the batches in main memory, and lets the loader
that LLM Compressor's pipelines iterate serve these too.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from sparsessm_plugin.calibration.vocabulary import check_token_ids
from sparsessm_plugin.errors import SparseSSMError


class CalibrationBatches(Sequence[Any]):
    """Batches in the order in which they were drawn; each is checked whenever it is read.

    A batch is what a model's forward takes by name, ``input_ids`` (b, L) and, where rows are
    padded, ``attention_mask`` (b, L); for losses of the user's own anything else.

    Attributes: ``served``, how many batches the loader gave, those without a token among them;
    ``source``, the loader that serves these batches meanwhile, or None.

    :param batches: in order
    :param served: see there; default all
    """

    def __init__(self, batches: Iterable[Any], served: int | None = None) -> None:
        # a BatchEncoding, which padding makes, is a mapping that torch's tree functions do not know
        self._batches = [dict(b) if isinstance(b, Mapping) else b for b in batches]
        self._digests = [_digest(batch) for batch in self._batches]
        self._ids = [_digest(ids) for ids in map(_ids_of, self._batches)]
        self._who = "calibration"
        self._other: int | None = None
        self.source: Any = None
        self.served = len(self._batches) if served is None else served

    @classmethod
    def draw(cls, who: str, data: Any) -> "CalibrationBatches":
        """Read data once. Samples without a token are left out, with one warning.

        :param who: asks for the data, for messages
        :param data: a DataLoader or any iterable of batches
        :raises SparseSSMError: there is no sample, or all are empty
        """
        drawn = [_without_empty_rows(*entry) for entry in _iterate(data)]
        batches = cls([batch for batch, _, _ in drawn if batch is not None], len(drawn))
        skipped = sum(empty for _, empty, _ in drawn)
        if not batches:
            raise SparseSSMError(
                f"{who} needs calibration data, and "
                + (f"all {skipped} samples are empty" if skipped else "the dataset is empty")
            )
        if skipped:
            total = skipped + sum(len(ids) for ids in map(_ids_of, batches) if ids is not None)
            logger.warning(f"{skipped} of {total} calibration samples are empty and were left out")
        cut = sum(tokens for _, _, tokens in drawn)
        if cut:
            logger.warning(
                f"{cut} calibration tokens were cut off, as each batch was cut to its shortest "
                "sample; give oneshot() data_collator='padding' or batch_size=1"
            )
        return batches

    def read_by(self, who: str) -> "CalibrationBatches":
        """The same batches, whose messages name a modifier."""
        other = copy.copy(self)
        other._who = who
        return other

    def digest(self) -> str:
        """What tells these batches, in this order, from others."""
        return hashlib.blake2b(repr(self._digests).encode(), digest_size=16).hexdigest()

    # -- as a sequence ---------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        batch = self._batches[index]
        if _digest(batch) != self._digests[index]:
            raise SparseSSMError(
                f"{self._who}: calibration batch {index + 1} is not what it was when it was "
                "first read; something has changed its tensors in place"
            )
        return batch

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    # -- what passes look at ---------------------------------------------------------

    def mask(self, index: int) -> Tensor | None:
        """(b, L) bool, False at padding; None if there is none in this batch."""
        batch = self._batches[index]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return None if mask is None or bool(mask.all()) else mask.bool()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at every id before the first forward pass.

        :raises SparseSSMError: naming an id without an embedding
        """
        for ids in map(_ids_of, self._batches):
            if ids is not None and ids.numel():
                check_token_ids(ids, vocab_size, "calibration data")

    def note_ids(self, index: int, ids: Tensor) -> None:
        """Compare what the model embeds in a calibration pass with what was drawn.

        For :meth:`check_ids`, which raises: an error in a hook of the embeddings would leave
        LLM Compressor's sequential pipeline as a page of its source.

        :param index: of the batch
        :param ids: (b, L)
        """
        if index >= len(self) or (self._ids[index] and _digest(ids) != self._ids[index]):
            self._other = index if self._other is None else self._other

    def check_ids(self) -> None:
        """Refuse a pass that reads other tokens than those drawn.

        :raises SparseSSMError: naming the modifier and the first such batch
        """
        if self._other is not None:
            raise SparseSSMError(
                f"{self._who}: batch {self._other + 1} of a calibration pass holds other tokens "
                f"than when the data was first read, in {len(self)} batches; every pass must read "
                "the same data in the same order"
            )

    def check_mask(self, index: int, name: str, mask: Tensor | None) -> None:
        """Refuse a pass whose padding is elsewhere.

        :param index: of the batch
        :param name: of the mixer
        :param mask: (b, L) what the mixer was given, None where nothing is padded
        :raises SparseSSMError: naming the modifier, the mixer and the batch
        """
        expected = self.mask(index) if index < len(self) else None
        if (
            mask is None
            or mask.ndim != 2
            or (expected is not None and mask.shape != expected.shape)
        ):
            return
        found = mask.bool()
        if not bool((found if expected is None else found == expected.to(found.device)).all()):
            raise SparseSSMError(
                f"{self._who}: {name} sees another padding mask in batch {index + 1} of a "
                "calibration pass than when the data was first read"
            )


def fix_batches(
    who: str, state: Any, source: Any = None, vocab_size: int | None = None
) -> CalibrationBatches:
    """The batches of a run, drawn by the first modifier that asks.

    :param who: this modifier
    :param state: LLM Compressor's; its calibration data is replaced by the batches
    :param source: the loader that LLM Compressor's pipelines iterate, of which the state has a
        copy; from now on it serves the batches. None where there is no pipeline
    :param vocab_size: ids must be less
    :raises SparseSSMError: there is no data, or an id outside of the vocabulary
    """
    data = state.data.calib if state.data is not None else None
    if isinstance(data, CalibrationBatches):
        return data.read_by(who)
    source = data if source is None else source
    if source is None:
        raise SparseSSMError(f"{who} needs calibration data: give oneshot() a dataset")
    give_back(source)  # an earlier run may have failed
    batches = CalibrationBatches.draw(who, source)
    if vocab_size is not None:
        batches.check_vocabulary(vocab_size)
    state.data.calib = batches
    if isinstance(source, DataLoader):
        _serve(source, batches)
        batches.source = source
    return batches.read_by(who)


def before_reading(loader: Any, act: Callable[[], None]) -> None:
    """Call a function whenever a loader is about to be iterated; :func:`give_back` undoes it.

    :param loader: a DataLoader; with anything else nothing happens
    """
    if not isinstance(loader, DataLoader):
        return
    kind = type(loader)

    def iterate(self: Any) -> Iterator[Any]:
        act()
        return iter(kind.__iter__(self))

    before = getattr(kind, "_kind_before", kind)
    members = {"__iter__": iterate, "_kind_before": before}
    object.__setattr__(loader, "__class__", type(kind.__name__, (kind,), members))


def give_back(data: Any) -> None:
    """Let a loader that serves drawn batches draw for itself again.

    :param data: the loader, or the batches; anything else stays as it is
    """
    if isinstance(data, CalibrationBatches):
        data = data.source
    kind = getattr(type(data), "_kind_before", None)
    if kind is not None:
        object.__setattr__(data, "__class__", kind)


def _serve(loader: DataLoader[Any], batches: CalibrationBatches) -> None:
    """Let a loader serve batches in the place of its own; :func:`give_back` undoes it."""
    kind = type(loader)
    members = {
        "__iter__": lambda self: iter(batches),
        "__len__": lambda self: len(batches),
        "_kind_before": kind,
    }
    # LLM Compressor holds the object, and a DataLoader takes no other sampler once it is made
    object.__setattr__(loader, "__class__", type(kind.__name__, (kind,), members))


# -- one reading of the data ---------------------------------------------------------------


class _Collate:
    """A loader's collate function for the samples that hold a token; picklable for workers."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, int, int]:
        """The batch, or None; how many samples were empty; how many tokens the batch lost."""
        tokens = [_tokens_of(sample) for sample in samples]
        kept = [sample for sample, count in zip(samples, tokens, strict=True) if count != 0]
        empty = len(samples) - len(kept)
        if not kept:
            return None, empty, 0
        batch = self._collate(kept)
        after = None if None in tokens else _tokens_of(batch)
        lost = 0 if after is None else sum(count or 0 for count in tokens) - after
        return batch, empty, max(0, lost)


def _iterate(data: Any) -> Iterator[tuple[Any, int, int]]:
    """Batches, each with how many empty samples and how many tokens it was made without."""
    if not isinstance(data, DataLoader) or data.batch_sampler is None:  # of ready-made batches
        for batch in data:
            yield batch, 0, 0
        return
    collate = data.collate_fn
    data.collate_fn = _Collate(collate)
    _end_workers(data)  # they have the other function
    try:
        yield from data
    finally:
        data.collate_fn = collate
        _end_workers(data)


def _end_workers(loader: DataLoader[Any]) -> None:
    if loader.persistent_workers:
        loader._iterator = None


def _without_empty_rows(batch: Any, empty: int, cut: int) -> tuple[Any, int, int]:
    """Leave out rows that are padding only; None in the place of a batch of no others."""
    ids = _ids_of(batch)
    if ids is None or ids.ndim != 2:
        return batch, empty, cut
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    has_token = real.bool().any(1)
    empty += int((~has_token).sum())
    if not has_token.any():
        return None, empty, cut
    if not has_token.all():
        batch = {
            key: value[has_token]
            if isinstance(value, Tensor) and value.shape[:1] == has_token.shape
            else value
            for key, value in batch.items()
        }
    return batch, empty, cut


def _ids_of(batch: Any) -> Tensor | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids if isinstance(ids, Tensor) else None


def _tokens_of(sample: Any) -> int | None:
    """Tokens of a sample or batch, padding left out; None if it holds none by name."""
    if not isinstance(sample, Mapping) or sample.get("input_ids") is None:
        return None
    ids, mask = sample["input_ids"], sample.get("attention_mask")
    return int(torch.as_tensor(ids).numel() if mask is None else torch.as_tensor(mask).sum())


def _digest(data: Any) -> bytes | None:
    """A hash of the shapes and bytes of all tensors of a batch, in their order."""
    if data is None:
        return None
    found = hashlib.blake2b(digest_size=16)
    for tensor in tree_leaves(data):
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()
