"""Single layers of a model on streams of one's own, with everything else as the model has it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.cost import kept
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter
from sparsessm_plugin.training.gradients import to_device

# How far a layer's output may be from a sum of its last product and the rest, relative.
_ADDITIVE = {torch.float32: 1e-3}
_ADDITIVE_HALF = 0.05


_HELD = 4  # every so many rows are held back from a fit, to judge it by


class _Enough(Exception):
    """Ends a forward pass where nothing more is looked at."""


@dataclass(frozen=True)
class Writer:
    """The last linear layer of a layer, whose output is added to the stream.

    :param name: dotted name in the model
    :param linear: weight (M, in), and perhaps a bias
    :param scale: what the family multiplies its output by
    """

    name: str
    linear: nn.Linear
    scale: float


class LayerPasses:
    """Runs layers of a model, one at a time, on given streams.

    The model's own forward runs, its other layers standing aside, so that masks, positions,
    embeddings and shared blocks are what they are in the model.

    :param adapter: of the model
    :param batches: what the model's forward takes
    :param device: where the model's weights lie

    Attributes: ``holds_back``, whether there are rows enough, over all ranks, to hold some back
    from a fit and judge it by them.
    """

    def __init__(self, adapter: ModelAdapter, batches: Sequence[Any], device: torch.device) -> None:
        self.model, self.device, self.batches = adapter.model, device, batches
        self.names = [layer.name for layer in adapter.layers]
        self.layers: list[nn.Module] = list(adapter.base.layers)
        self._parts = [layer.parts for layer in adapter.layers]
        self._first_names = adapter.first_names()
        self._adapter = adapter
        rows = [len(batch["input_ids"]) for batch in batches]
        each = distributed.gather("rows of the calibration", sum(rows))
        self.holds_back = sum(each) >= _HELD
        before = sum(each[: distributed.rank()])
        self._first_rows = [before + sum(rows[:i]) for i in range(len(rows))]
        self._returns: dict[int, int] = {}  # how many values a layer returns, where it is a tuple

    def embedded(self, batch: int) -> Tensor:
        """(b, L, M) the stream before the first layer."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Enough

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run(batch)
        except _Enough:
            pass
        finally:
            handle.remove()
        return found[0]

    def behind(self, index: int, batch: int, stream: Tensor, rows: Tensor | None = None) -> Tensor:
        """(b, L, M) the stream behind a layer that reads this one.

        :param index: of the layer
        :param batch: number of the batch that the stream is of
        :param stream: (b, L, M), anywhere
        :param rows: (b,) numbers of the batch's rows that it is of; default all
        """
        found: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _Enough

        # before hooks of others change it, as they do again when it is given
        handle = self.layers[index].register_forward_hook(stop, prepend=True)
        try:
            with self._giving(range(index), stream.to(self.device)):
                self._run(batch, rows)
        except _Enough:
            pass
        finally:
            handle.remove()
        if isinstance(found[0], tuple):
            self._returns[index] = len(found[0])
            return found[0][0]
        return found[0]

    def logits(self, batch: int, stream: Tensor, rows: Tensor | None = None) -> Tensor:
        """(b, L, vocabulary) what the model predicts from a stream behind its last layer."""
        with self._giving(range(len(self.layers)), stream.to(self.device)):
            return self._run(batch, rows).logits

    def mask(self, batch: int) -> Tensor | None:
        """(b, L) bool on the device, False at padding; None where there is none."""
        mask = self.batches[batch].get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool().to(self.device)

    def aside(self, batch: int) -> Tensor:
        """(b, 1) bool on the device, True for the rows that are held back from a fit."""
        rows, first = len(self.batches[batch]["input_ids"]), self._first_rows[batch]
        numbers = torch.arange(first, first + rows, device=self.device)
        return (numbers % _HELD == _HELD - 1)[:, None] & self.holds_back

    def own_parameters(self, index: int) -> list[nn.Parameter]:
        """See :func:`own_parameters`."""
        return list(own_parameters(self._adapter, index).values())

    @contextmanager
    def reading(self, writer: Writer | None) -> Iterator[list[Tensor]]:
        """What a writer multiplies in the calls inside, (b, L, in) each."""
        found: list[Tensor] = []
        if writer is None:
            yield found
            return
        hook = writer.linear.register_forward_pre_hook(lambda m, args: found.append(args[0]))
        try:
            yield found
        finally:
            hook.remove()

    def writer(self, index: int, stream: Tensor) -> Writer | None:
        """The last linear layer of a layer that adds to the stream, None where there is none.

        Left out are weights that other layers share, and those whose output goes through more
        than a multiplication. All ranks get what rank 0 finds.

        :param stream: (b, L, M) that the layer reads, of the first batch
        """
        name, scale = distributed.first(self.names[index], self._last_product(index, stream))
        return Writer(name, self.model.get_submodule(name), scale) if name else None

    def _last_product(self, index: int, stream: Tensor) -> tuple[str, float]:
        whole = self.behind(index, 0, stream).float()
        for name, linear in self._candidates(index):
            outputs: list[Tensor] = []

            def silence(m: Any, a: Any, out: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
                outputs.append(out)
                return torch.zeros_like(out)

            hook = linear.register_forward_hook(silence)
            try:
                rest = self.behind(index, 0, stream).float()
            finally:
                hook.remove()
            if len(outputs) != 1 or outputs[0].shape != whole.shape:
                continue
            added, output = (whole - rest).double(), outputs[0].double()
            scale = float((added * output).sum() / output.square().sum().clamp(min=1e-30))
            far = _ADDITIVE.get(linear.weight.dtype, _ADDITIVE_HALF) * float(added.norm())
            if scale and float((added - scale * output).norm()) <= far:
                return name, scale
        return "", 0.0

    def _candidates(self, index: int) -> Iterator[tuple[str, nn.Linear]]:
        shared = [first for name, first in self._first_names.items() if name != first]
        for part in reversed(self._parts[index]):
            for axis in reversed(part.writes()):
                path, _, leaf = axis.tensor.rpartition(".")
                module = self.model.get_submodule(path) if leaf == "weight" else None
                alone = self._first_names.get(axis.tensor) == axis.tensor not in shared
                if isinstance(module, nn.Linear) and axis.dim == 0 and alone:
                    yield path, module

    def _run(self, batch: int, rows: Tensor | None = None) -> Any:
        inputs = {k: v for k, v in self.batches[batch].items() if k != "labels"}
        if rows is not None:
            count = len(inputs["input_ids"])
            inputs = {k: take_rows(v, count, rows) for k, v in inputs.items()}
        with fast_products(self.device):
            return self.model(**to_device(inputs, self.device))

    @contextmanager
    def _giving(self, indices: range, stream: Tensor) -> Iterator[None]:
        """Let layers give a stream without running."""

        def put(layer: nn.Module, forward: Any) -> None:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward

        with ExitStack() as stack:
            for i in indices:
                layer = self.layers[i]
                stack.callback(put, layer, vars(layer).get("forward"))
                layer.forward = _constant(stream, self._returns.get(i))
            yield


def _constant(stream: Tensor, values: int | None) -> Callable[..., Any]:
    output = stream if values is None else (stream, *(None,) * (values - 1))
    return lambda *args, **kwargs: output


def take_rows(value: Any, count: int, rows: Tensor) -> Any:
    """Some rows of a batch's entry; what has no rows is given back as it is.

    :param value: an entry of the batch
    :param count: rows of the batch
    :param rows: (b,) their numbers
    """
    of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[rows.to(value.device)] if of_rows else value


def own_parameters(adapter: ModelAdapter, index: int) -> dict[str, nn.Parameter]:
    """What gradient steps on a layer may change: no experts, and nothing that others share.

    :param adapter: of the model
    :param index: of the layer
    """
    layer, first = adapter.layers[index], adapter.first_names()
    shared = {name for alias, name in first.items() if alias != name}
    routed = tuple(f"{part.name}." for part in layer.parts if part.kind == "moe")
    module: nn.Module = adapter.base.layers[index]
    found = {f"{layer.name}.{name}": p for name, p in module.named_parameters()}
    return {
        name: p
        for name, p in found.items()
        if first.get(name) == name not in shared
        and p.is_floating_point()
        and not name.startswith(routed or ("\0",))
    }


def dense_streams(passes: LayerPasses) -> list[list[Tensor]]:
    """The stream before every layer and behind the last one, [layer][batch] (b, L, M).

    :raises SparseSSMError: NaN or infinite values
    """
    count = range(len(passes.batches))
    streams = [[kept(passes.embedded(i)) for i in count]]
    for index, name in enumerate(passes.names):
        behind = [kept(passes.behind(index, i, streams[-1][i])) for i in count]
        if not all(map(is_finite, behind)):
            raise SparseSSMError(
                f"{name}: its output holds NaN or infinite values during calibration; nothing was "
                "removed"
            )
        streams.append(behind)
    return streams
