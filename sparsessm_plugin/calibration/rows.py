"""The text of a batch, row by row."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def unpadded_rows(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tokens of each row, wherever its padding stands; rows of padding alone are left out.

    An ``attention_mask`` of another shape than ``input_ids``, as one of which positions see which,
    tells of no padding.

    :param batch: ``input_ids`` (b, L) and perhaps ``attention_mask`` (b, L), zero at padding
    :return: (tokens,) of each row, on the CPU
    """
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        yield from ids
        return
    for row, real in zip(ids, mask.cpu().bool(), strict=True):
        if real.any():
            yield row[real]
