"""What a model reads of its residual stream: at which norms, how it varies, what errors cost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.criteria.hidden import Reading, norm_scale
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter, Part
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.families.parts import Head, Linear, Norm
from sparsessm_plugin.progress import Stage
from sparsessm_plugin.training.gradients import differentiable, loss_of, single_rows, to_device

_TRACED = 8  # tokens


@dataclass
class ReadingPoint:
    """A norm of the stream, or a linear layer that reads a stream as it is, and its readers.

    :param part: the norm or linear layer; one that layers share stands for all of its calls
    :param width: entries that it reads, a multiple of hidden_size
    :param readers: the parts whose weights read what it gives
    """

    part: Part
    width: int
    readers: list[Part] = field(default_factory=list)

    @property
    def is_norm(self) -> bool:
        """Whether what is read is divided by its root mean square."""
        return isinstance(self.part, Norm)

    @property
    def scale(self) -> Tensor:
        """(width,) float64 between the normalised stream and what the readers get."""
        if self.is_norm:
            return norm_scale(self.part.module)
        weight = self.part.module.weight
        return torch.ones(self.width, dtype=torch.float64, device=weight.device)

    def seen(self, stream: Tensor) -> Tensor:
        """(..., width) float32 stream over its root mean square, as the readers see it."""
        stream = stream.float()
        if not self.is_norm:
            return stream
        norm = self.part.module
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0
        return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + epsilon)


def reading_points(adapter: ModelAdapter, device: torch.device) -> list[ReadingPoint]:
    """Where a model reads its stream, in the order of its forward pass.

    :param device: of the model, which is run on a few tokens
    :raises SparseSSMError: a part that reads something else than a multiple of what the norm
        before it gives, or a norm that nothing reads, such as one behind what writes the stream
    """
    points: dict[int, ReadingPoint] = {}
    latest: dict[int, tuple[ReadingPoint, Tensor]] = {}  # by width
    placed: set[int] = set()

    def enters(part: Part, module: Any, args: Any, kwargs: Any) -> None:
        width = part.width
        if width is None or isinstance(part, Norm):
            return
        if isinstance(part, Linear):
            point = points.setdefault(id(module), ReadingPoint(part, width))
        else:
            stream = args[0] if args else kwargs["hidden_states"]
            if width not in latest or not _is_multiple(stream, latest[width][1]):
                raise SparseSSMError(
                    f"{part.name} reads the stream otherwise than by a norm before it; the "
                    f"hidden size of {adapter.name} cannot become smaller"
                )
            point = latest[width][0]
        if id(module) not in placed:
            placed.add(id(module))
            point.readers.append(part)

    def leaves(part: Part, module: Any, args: Any, output: Any) -> None:
        width = part.width
        if isinstance(part, Norm) and width is not None:
            point = points.setdefault(id(module), ReadingPoint(part, width))
            latest[width] = (point, output.detach())

    handles, hooked = [], set()
    for part in adapter.parts:
        if id(part.module) not in hooked:
            hooked.add(id(part.module))
            before, after = partial(enters, part), partial(leaves, part)
            handles.append(part.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(part.module.register_forward_hook(after))
    try:
        with torch.no_grad(), fast_forward(adapter.model):
            ids = torch.arange(_TRACED, device=device)[None]
            adapter.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for point in points.values():
        if not point.readers:
            raise SparseSSMError(
                f"{point.part.name} is read by nothing that is known, as a norm behind what "
                f"writes the stream; the hidden size of {adapter.name} cannot become smaller"
            )
    return list(points.values())


def _is_multiple(x: Tensor, of: Tensor) -> bool:
    if x.shape != of.shape:
        return False
    x, of = x.double(), of.double()
    factor = (x * of).sum() / of.square().sum().clamp(min=1e-300)
    return bool((x - factor * of).norm() <= 0.02 * x.norm())


class StreamSums:
    """Sums over calibration tokens at every reading point, float64, on the model's device.

    :param adapter: the model, all of it on one device
    :param points: where it reads the stream
    """

    def __init__(self, adapter: ModelAdapter, points: Sequence[ReadingPoint]) -> None:
        self.adapter = adapter
        self.points = list(points)
        device = adapter.model.get_input_embeddings().weight.device
        new: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.covariances = [torch.zeros(p.width, p.width, **new) for p in self.points]
        self.metrics = [torch.zeros(p.width, p.width, **new) for p in self.points]
        self._mask: Tensor | None = None

    def add_covariances(self, batches: Sequence[Any]) -> None:
        """What is read, over all batches."""
        what = "covariances"
        tokens = self._over(batches, self._add_covariance, self._forward, what)
        self._reduce(what, self.covariances, tokens)

    def add_metrics(self, batches: Sequence[Any], tokens: int) -> None:
        """What an error costs, over the first batches with so many tokens in all (of each rank).

        :raises SparseSSMError: the loss has no gradient
        """
        used, count = [], 0
        for batch in batches:
            for row in single_rows(batch):
                if count < tokens:
                    used.append(row)
                    count += row["input_ids"].numel()
        with differentiable(self.adapter.model, []), self._from_embeddings():
            counted = self._over(used, self._add_gradient, self._backward, "gradients")
        self._reduce("gradients", self.metrics, counted)

    def readings(self, fitted: Callable[[ReadingPoint], bool]) -> list[Reading]:
        """One for each copy of the stream at each point."""
        size = self.adapter.hidden_size
        found = []
        for point, C, G in zip(self.points, self.covariances, self.metrics, strict=True):
            for start in range(0, point.width, size):
                own = slice(start, start + size)
                found.append(Reading(C[own, own], G[own, own], fitted(point)))
        return found

    # -- within ----------------------------------------------------------------------

    def _over(
        self,
        batches: Sequence[Any],
        hook: Callable[[ReadingPoint, int, Tensor, Tensor], None],
        run: Callable[[Any], float],
        what: str,
    ) -> float:
        """Run batches with a hook at every point; the weight of all of them.

        :param what: is added up, for the display of progress
        """
        device = self.covariances[0].device
        handles = [
            p.part.module.register_forward_hook(partial(self._at, hook, p, i))
            for i, p in enumerate(self.points)
        ]
        total = 0.0
        try:
            with (
                fast_forward(self.adapter.model, gradients=True),
                Stage(f"{what} of the stream", len(batches)) as stage,
            ):
                for batch in batches:
                    ready = to_device(batch, device)
                    mask = ready.get("attention_mask")
                    self._mask = None if mask is None or bool(mask.all()) else mask.bool()
                    total += run(ready)
                    stage.advance()
        finally:
            for handle in handles:
                handle.remove()
        return total

    def _at(
        self, hook: Any, point: ReadingPoint, index: int, module: Any, args: Any, output: Any
    ) -> None:
        hook(point, index, args[0], output)

    def _forward(self, batch: Mapping[str, Any]) -> float:
        with torch.no_grad():
            self.adapter.model(**_without_labels(batch))
        return float(batch["input_ids"].numel() if self._mask is None else self._mask.sum())

    def _backward(self, batch: Mapping[str, Any]) -> float:
        loss, count = loss_of(self.adapter.model, batch)
        if count:
            (loss * count).backward()
        return float(count)

    def _add_covariance(self, point: ReadingPoint, index: int, stream: Tensor, _: Tensor) -> None:
        seen = self._real(point.seen(stream.detach()))
        self.covariances[index] += (seen.T @ seen).double()

    def _add_gradient(self, point: ReadingPoint, index: int, stream: Tensor, out: Tensor) -> None:
        tensor = out if point.is_norm else stream
        if not tensor.requires_grad:
            return
        scale = point.scale.float()

        def add(gradient: Tensor) -> None:
            found = self._real(gradient.float() * scale)
            self.metrics[index] += (found.T @ found).double()

        tensor.register_hook(add)

    def _real(self, x: Tensor) -> Tensor:
        """(tokens, width) without padding."""
        return x.flatten(0, -2) if self._mask is None else x[self._mask]

    def _reduce(self, what: str, sums: list[Tensor], weight: float) -> None:
        named = {str(i): total for i, total in enumerate(sums)}
        sums[:] = list(distributed.reduce_sum(f"{what} of the stream", named).values())
        (weight,) = distributed.total(f"tokens of {what}", weight)
        for point, total in zip(self.points, sums, strict=True):
            total /= max(weight, 1.0)
            if not is_finite(total):
                raise SparseSSMError(
                    f"{point.part.name}: NaN or infinite values in the {what} of the stream "
                    "during calibration; nothing was removed"
                )

    @contextmanager
    def _from_embeddings(self) -> Iterator[None]:
        """Let gradients reach back to the embeddings."""

        def begin(module: Any, args: Any, output: Tensor) -> Tensor:
            return output.detach().requires_grad_(True)

        handle = self.adapter.model.get_input_embeddings().register_forward_hook(begin)
        try:
            yield
        finally:
            handle.remove()


def is_tied_head(adapter: ModelAdapter, part: Part) -> bool:
    """Whether a part is a head whose weight is the embedding's."""
    embedding = adapter.model.get_input_embeddings()
    return isinstance(part, Head) and part.module.weight is embedding.weight


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}
