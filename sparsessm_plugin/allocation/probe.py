"""What changes of single weights do to a model's predictions."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from heapq import nlargest
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.contexts import undisturbed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.training.divergence import divergences

_ROWS, _LENGTH = 4, 256  # of the data that predictions are looked at with
_TOGETHER = 8  # changes of one layer whose effects are computed in one batch


class Probe:
    """A little of the data, and what the model as it is predicts there.

    :param model: transformers model; all ranks make their probes together
    :param data: batches of ``input_ids`` (b, L), padded anywhere; all ranks take the same rows
    """

    def __init__(self, model: Any, data: Iterable[Mapping[str, Any]]):
        self._model = model
        rows = _longest_rows(
            row for part in distributed.gather("probe", _longest_rows(_rows(data))) for row in part
        )
        self._batch = _padded(rows, get_execution_device(model))
        self._replay = Replay(model)
        with undisturbed(model), self._replay.recorded():
            self._reference = model(**self._batch).logits

    @property
    def is_finite(self) -> bool:
        """Whether the model's own predictions are numbers."""
        return is_finite(self._reference)

    def divergences(
        self,
        names: list[str],
        changed: Callable[[str], Tensor],
        done: Callable[[str], None] = lambda name: None,
        everywhere: Container[str] = (),
    ) -> dict[str, float]:
        """How far predictions move when one weight is replaced, in nats a token, by its name.

        Each weight is put back. Those of one layer are tried out side by side: what the layers
        after it make of each is a matter of more rows.

        :param names: of weights, in the order of the model
        :param changed: gives the weight to try out
        :param done: called with the name of each weight that has been tried
        :param everywhere: names of weights that several layers share
        """
        found: dict[str, float] = {}

        def layer_of(name: str) -> str | None:
            return None if name in everywhere else self._replay.layer(name)

        with undisturbed(self._model):
            for layer, members in groupby(names, layer_of):
                for together in _parts(list(members), _TOGETHER if layer else 1):
                    logits = self._logits(layer, together, changed)
                    for name, each in zip(together, logits, strict=True):
                        found[name] = _divergence(
                            self._reference, each, self._batch.get("attention_mask")
                        )
                        done(name)
        return found

    def _logits(
        self, layer: str | None, names: list[str], changed: Callable[[str], Tensor]
    ) -> list[Tensor]:
        """(b, L, vocabulary) logits with one weight replaced, for each."""
        if layer is not None:
            outputs = []
            for name in names:
                with self._replaced(name, changed(name)):
                    outputs.append(self._replay.output(layer))
            joined = _joined(outputs)
            if joined is not None:
                with self._replay.after(layer, joined):
                    return list(self._model(**self._repeated(len(names))).logits.chunk(len(names)))
        logits = []
        for name in names:
            with self._replaced(name, changed(name)), self._replay.since(name):
                logits.append(self._model(**self._batch).logits)
        return logits

    def _repeated(self, count: int) -> dict[str, Any]:
        rows = (len(self._reference),)
        return {
            key: torch.cat([value] * count) if value.shape[:1] == rows else value
            for key, value in self._batch.items()
        }

    @contextmanager
    def _replaced(self, name: str, weight: Tensor) -> Iterator[None]:
        owner, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(owner)
        before = getattr(module, attribute).detach().clone()
        try:
            update_offload_parameter(module, attribute, weight)
            yield
        finally:
            update_offload_parameter(module, attribute, before)


def _rows(data: Iterable[Mapping[str, Any]]) -> Iterator[list[int]]:
    """The first tokens of every row, wherever its padding stands."""
    for batch in data:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        for row in range(len(ids)):
            tokens = ids[row] if mask is None else ids[row][mask[row].bool()]
            yield tokens[:_LENGTH].tolist()


def _longest_rows(rows: Iterable[list[int]]) -> list[list[int]]:
    """Those with the most tokens; of equally long ones the first."""
    return nlargest(_ROWS, rows, key=len)


def _padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """A batch with padding, where there is some, after the tokens: no model looks ahead."""
    length = len(rows[0])
    ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], device=device)
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": ids, "attention_mask": torch.tensor(mask, device=device)}


def _parts(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _joined(outputs: list[Any]) -> Any | None:
    """Outputs of a layer, one batch; None if they are no tensors that could be one."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple):
        parts = [_joined(list(each)) for each in zip(*outputs, strict=True)]
        return None if any(part is None for part in parts) else tuple(parts)
    return None


def _divergence(reference: Tensor, logits: Tensor, mask: Tensor | None) -> float:
    """Mean Kullback-Leibler divergence of two predictions, in nats a token.

    :param reference: (b, L, vocabulary) logits
    :param logits: likewise
    :param mask: (b, L), zero at padding, or None
    """
    rows = []
    for row in range(len(logits)):  # float32 logits of a whole batch would be large
        each = divergences(reference[row], logits[row])
        rows.append(each if mask is None else each[mask[row].bool()])
    found = torch.cat(rows).double()
    return float(found.sum()) / max(found.numel(), 1)
