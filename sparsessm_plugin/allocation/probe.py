"""What changes of single weights do to a model's predictions."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nlargest
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.offload import (
    disable_offloading,
    get_execution_device,
    update_offload_parameter,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.contexts import undisturbed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.passes import moved, output_of
from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.calibration.rows import unpadded_rows
from sparsessm_plugin.cost import has_room, kept
from sparsessm_plugin.families.in_turn import on_disk
from sparsessm_plugin.training.divergence import divergences_from

PROBE_ROWS, PROBE_LENGTH = 4, 128  # of the data that predictions are looked at with
TRIED_TOGETHER = 8  # changes of one layer whose effects are computed in one batch
# Tokens that a GPU computes together, and how many times the bytes of a layer's output it then
# needs: the tensors of a mixer are twice as wide or wider, and some are float32.
_TOKENS_ON_GPU, _TIMES = 2**15, 16


class Probe:
    """A little of the data, and what the model as it is predicts there.

    :param model: transformers model; all ranks make their probes together
    :param data: batches of ``input_ids`` (b, L), padded anywhere; all ranks take the same rows
    """

    def __init__(self, model: Any, data: Iterable[Mapping[str, Any]]):
        self._model = model
        self._batch = _little_of(data, get_execution_device(model))
        self._replay = Replay(model)
        self._moved: dict[str, float] = {}
        with undisturbed(model), self._replay.recorded():
            logits = model(**self._batch).logits
        self.is_finite = is_finite(logits)  # whether the model's own predictions are numbers
        self._reference = _Reference(logits, self._batch)

    def try_out(
        self,
        names: list[str],
        changed: Callable[[str], Tensor],
        done: Callable[[str], None] = lambda name: None,
        everywhere: Container[str] = (),
    ) -> None:
        """:meth:`divergences`, which :meth:`moved` tells."""
        self._moved |= self.divergences(names, changed, done, everywhere)

    def moved(self) -> dict[str, float]:
        """By name of all weights that were tried out, how far predictions moved."""
        return self._moved

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
                for together in _parts(list(members), TRIED_TOGETHER if layer else 1):
                    logits = self._logits(layer, together, changed)
                    for name, each in zip(together, logits, strict=True):
                        found[name] = float(self._reference.divergence(each))
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
                    repeated = _repeated(self._batch, len(names))
                    return list(self._model(**repeated).logits.chunk(len(names)))
        logits = []
        for name in names:
            with self._replaced(name, changed(name)), self._replay.since(name):
                logits.append(self._model(**self._batch).logits)
        return logits

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


@dataclass
class _Stream:
    """What the layers so far make of some changes.

    :param names: of the weights that were changed, none for the model as it is
    :param output: of the last layer, for as many copies of the data
    """

    names: list[str]
    output: Any = None


class LayerProbe:
    """:class:`Probe` that reads each layer once, and runs it as rarely as memory allows.

    What each change makes of the data goes through one layer after the other beside what the model
    as it is makes of it. A CPU computes in the batches of :class:`Probe`, and so the same bits; a
    GPU, which would wait for Python most of the time, computes the changes of all layers so far
    together, in batches that leave it room.

    :param model: transformers model whose layers stand in one ModuleList and are called once
    :param data: see :class:`Probe`
    :param record: keep what each layer makes of the data, and whether it is called once; not where
        weights are read from disk, which this would do once more
    """

    def __init__(self, model: Any, data: Iterable[Mapping[str, Any]], record: bool = False):
        self._model = model
        self._device = get_execution_device(model)
        self._batch = _little_of(data, self._device)
        self._replay = Replay(model)
        self._layers = list(self._replay.layers)
        self._reference = _Stream([])
        self._predicted: _Reference | None = None
        self._streams: list[_Stream] = []
        self._next = 0  # of the layers, the first that nothing has passed
        self._moved: dict[str, float] = {}
        self.is_finite = True  # whether the model's own predictions are numbers, once they are made
        self._recorded = record
        if record:
            with undisturbed(model), self._replay.recorded():
                self._predict(model(**self._batch).logits)
        # whether each layer was called once, in their order, as far as that is known
        self.fits = not record or self._replay.called_in_turn

    def try_out(
        self,
        names: list[str],
        changed: Callable[[str], Tensor],
        done: Callable[[str], None] = lambda name: None,
        everywhere: Container[str] = (),
    ) -> None:
        """Try out weights of one layer, behind that of the call before; see :class:`Probe`."""
        if not names:  # other ranks have them
            return
        (layer,) = {self._layer_of(name) for name in names}
        with undisturbed(self._model):
            while self._layers[self._next] != layer:
                self._pass({})
            self._pass(dict.fromkeys(names, changed))
        for name in names:
            done(name)

    def moved(self) -> dict[str, float]:
        """By name of all weights that were tried out, how far predictions moved."""
        if self._recorded and not self._streams:  # of several ranks, others have tried them out
            return self._moved
        names, found = [], []
        with undisturbed(self._model):
            while self._next < len(self._layers):
                self._pass({})
            with disable_offloading():
                if self._predicted is None:
                    self._predict(self._logits(self._reference.output, 1))
                assert self._predicted is not None
                while self._streams:
                    stream = self._streams.pop(0)
                    for part in _cut(stream, TRIED_TOGETHER):
                        logits = self._logits(part.output, len(part.names)).chunk(len(part.names))
                        names += part.names
                        found += [self._predicted.divergence(each) for each in logits]
        if found:  # one wait for the GPU
            self._moved |= dict(zip(names, torch.stack(found).tolist(), strict=True))
        return self._moved

    def _predict(self, logits: Tensor) -> None:
        """Note what the model as it is predicts, (b, L, vocabulary)."""
        self.is_finite = is_finite(logits)
        self._predicted = _Reference(logits, self._batch)

    def _layer_of(self, name: str) -> str:
        return next(layer for layer in self._layers if name.startswith(f"{layer}."))

    def _pass(self, changes: Mapping[str, Callable[[str], Tensor]]) -> None:
        """Let everything through the next layer, and begin what changes of it make."""
        name = self._layers[self._next]
        layer = self._replay.layers[name]
        with disable_offloading():
            if self._recorded:
                args, kwargs = self._replay.call(name)
                self._replay.forget(name)
            else:
                args, kwargs = self._pass_reference(layer)
            for stream in self._streams:
                stream.output = self._through(layer, stream)
            for together in _parts(list(changes), TRIED_TOGETHER):
                outputs = []
                for changed in together:
                    with self._replaced(changed, changes[changed](changed)):
                        outputs.append(self._replay.run(name, args, kwargs))
                joined = _joined(outputs)
                if joined is not None:
                    self._add(_Stream(together, joined))
                else:
                    parts = zip(together, outputs, strict=True)
                    self._streams += [_Stream([one], moved(out, kept)) for one, out in parts]
        self._next += 1

    def _pass_reference(self, layer: nn.Module) -> tuple[Any, Any]:
        """Let the data through a layer of the model as it is; what that is called with."""
        calls: list[tuple[Any, Any]] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            self._reference.output = self._through(layer, self._reference)
        finally:
            handle.remove()
        return calls[0]

    def _add(self, stream: _Stream) -> None:
        """Keep a stream, with the last one in one batch where a GPU computes both at once."""
        last = self._streams[-1] if self._streams else None
        if last is not None:
            count = len(last.names) + len(stream.names)
            tokens = count * self._batch["input_ids"].numel()
            size = _TIMES * count * _bytes_of(stream.output) // len(stream.names)
            if tokens <= _TOKENS_ON_GPU and has_room(self._device, size):  # never a CPU
                outputs = [moved(last.output, lambda x: x.to(self._device)), stream.output]
                both = _joined(outputs)
                if both is not None:
                    last.names, last.output = last.names + stream.names, moved(both, kept)
                    return
        self._streams.append(_Stream(stream.names, moved(stream.output, kept)))

    def _through(self, layer: nn.Module, stream: _Stream) -> Any:
        before = self._layers[self._next - 1] if self._next else None
        earlier = moved(stream.output, lambda x: x.to(self._device))
        batch = _repeated(self._batch, len(stream.names) or 1)
        output = output_of(self._model, layer, batch, self._device, self._replay, before, earlier)
        return moved(output, kept)

    def _logits(self, output: Any, copies: int) -> Tensor:
        output = moved(output, lambda x: x.to(self._device))
        with self._replay.after(self._layers[-1], output):
            logits: Tensor = self._model(**_repeated(self._batch, copies)).logits
        return logits

    @contextmanager
    def _replaced(self, name: str, weight: Tensor) -> Iterator[None]:
        """Change what was read of a weight, and not the weight itself."""
        held = self._model.get_parameter(name).data  # kept as long as the layer runs
        before = held.clone()
        try:
            held.copy_(weight)
            yield
        finally:
            held.copy_(before)


def new_probe(model: Any, data: Iterable[Mapping[str, Any]], in_layers: bool) -> Probe | LayerProbe:
    """The probe that runs a model least.

    :param model: transformers model
    :param data: see :class:`Probe`
    :param in_layers: whether the weights to try out come layer by layer, each in one layer alone
    """
    if in_layers and on_disk(model):
        return LayerProbe(model, data)
    if in_layers:
        probe = LayerProbe(model, data, record=True)
        if probe.fits:
            return probe
    return Probe(model, data)


def _repeated(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    rows = (len(batch["input_ids"]),)
    return {
        key: torch.cat([value] * count) if value.shape[:1] == rows else value
        for key, value in batch.items()
    }


def _little_of(data: Iterable[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """A batch of a little of the data; all ranks make it together."""
    rows = (row[:PROBE_LENGTH].tolist() for batch in data for row in unpadded_rows(batch))
    shares = distributed.gather("probe", _longest_rows(rows))
    return _padded(_longest_rows(row for part in shares for row in part), device)


def _longest_rows(rows: Iterable[list[int]]) -> list[list[int]]:
    """Those with the most tokens; of equally long ones the first."""
    return nlargest(PROBE_ROWS, rows, key=len)


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


def _bytes_of(output: Any) -> int:
    """Of all tensors in what a layer gives."""
    return sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _cut(stream: _Stream, most: int) -> Iterator[_Stream]:
    """A stream in parts of so many changes at most."""
    count = len(stream.names)
    if count <= most:
        yield stream
        return
    for start in range(0, count, most):
        names = stream.names[start : start + most]

        def part(x: Tensor, first: int = start, size: int = len(names)) -> Tensor:
            each = len(x) // count  # copies of the data stand one after the other
            return x[first * each : (first + size) * each]

        yield _Stream(names, moved(stream.output, part))


class _Reference:
    """What the model as it is predicts.

    :param logits: (b, L, vocabulary) its logits
    :param batch: of :func:`_padded`, with padding behind the tokens
    """

    def __init__(self, logits: Tensor, batch: Mapping[str, Tensor]):
        self._lengths = batch["attention_mask"].sum(1).tolist()
        rows = zip(logits, self._lengths, strict=True)
        self._expected = [row[:length].float().log_softmax(-1) for row, length in rows]

    def divergence(self, logits: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence of a prediction, in nats a token: float64, no dimension.

        :param logits: (b, L, vocabulary)
        """
        # float32 logits of a whole batch would be large
        rows = zip(self._expected, logits, self._lengths, strict=True)
        found = torch.cat([divergences_from(own, row[:n]) for own, row, n in rows]).double()
        return found.sum() / max(found.numel(), 1)
