"""How long a model of given sizes takes, from timing a few of random weights on this machine."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from compressed_tensors.utils import patch_attr
from loguru import logger
from numpy.typing import NDArray

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.latency import (
    DECODE,
    GRAPH_DECODE,
    PREFILL,
    measure_latency,
)
from sparsessm_plugin.fitting.costs import Array, Census, Space, state_bytes
from sparsessm_plugin.fitting.shapes import Shapes, shallow_shapes

Phase = Literal["decode", "prefill"]
# What time is made of, times what is at least 0: a constant, layers, bytes of their weights,
# bytes of the head, bytes of all states, layers with attention, and bytes of what these have kept
# of the text, which are read and not, as states are, written, too.
FEATURES = ("constant", "layers", "weights", "head", "states", "attending", "attended")
_WHOLE = {"cuda": 6e9, "cpu": 1e9}  # bytes of all timed models up to which none is made shallow
_SHALLOW = (6, 12)  # layers of models that are too large to be timed as they are
_DECODE_STEPS = {"cuda": 16, "cpu": 8}
_SHORT = 8  # tokens of a prompt before decoding; its length does not matter for the states


@dataclass(frozen=True)
class Workload:
    """What is timed.

    :param batch: sequences at once
    :param length: tokens of each, before a decode step or in a prefill
    :param phase: ``decode`` is one token more for each sequence, from a CUDA graph where one is
        possible; ``prefill`` all tokens of the prompt
    """

    batch: int = 1
    length: int = 2048
    phase: Phase = "decode"

    def __str__(self) -> str:
        return f"{self.phase}, batch {self.batch}, length {self.length}"


@dataclass(frozen=True)
class Timed:
    """One model that was timed.

    :param sizes: by axis
    :param layers: that the model had
    :param milliseconds: of a forward pass, the median over repeats beside the first of the models
    :param features: see :data:`FEATURES`
    """

    sizes: dict[str, int]
    layers: int
    milliseconds: float
    features: tuple[float, ...]


@dataclass
class SpeedModel:
    """Milliseconds of a forward pass as a sum of parts that grow with the sizes.

    :param workload: what was timed
    :param device: where
    :param timed: what the model is fitted to
    """

    features: ClassVar[tuple[str, ...]] = FEATURES

    workload: Workload
    device: str
    timed: list[Timed] = field(default_factory=list)
    weights: Array = field(default_factory=lambda: np.zeros(len(FEATURES)))
    correction: float = 1.0  # of shares, by mixes that took turns with the dense model

    def add(self, timed: Sequence[Timed]) -> None:
        """Take in measurements and fit all anew."""
        self.timed += timed
        rows = np.array([entry.features for entry in self.timed])
        times = np.array([entry.milliseconds for entry in self.timed])
        self.weights = nonnegative_least_squares(rows / times[:, None], np.ones(len(times)))

    def milliseconds(self, quantities: Array) -> Array:
        """Predicted: (..., quantities) -> (...)."""
        found: Array = features_of(quantities, self.workload) @ self.weights
        return found

    def share(self, quantities: Array, dense: Array) -> Array:
        """Time as a share of the dense model's: (..., quantities), (quantities,) -> (...)."""
        found: Array = self.correction * self.milliseconds(quantities) / self.milliseconds(dense)
        return found

    def learn(self, timed: Sequence[Timed]) -> None:
        """Take in the dense model and mixes that took turns with it.

        :param timed: the dense model first
        """
        self.add(timed)
        predicted = [float(np.dot(entry.features, self.weights)) for entry in timed]
        off = [
            np.log(entry.milliseconds / timed[0].milliseconds * predicted[0] / found)
            for entry, found in zip(timed[1:], predicted[1:], strict=True)
        ]
        self.correction = float(np.exp(np.mean(off))) if off else 1.0

    def error(self) -> float:
        """Largest relative error on what the model was fitted to."""
        return max(
            abs(float(np.dot(entry.features, self.weights)) / entry.milliseconds - 1)
            for entry in self.timed
        )


def features_of(quantities: Array, workload: Workload) -> Array:
    """(..., features) in units that are of the order of 1 in small models."""
    states = state_bytes(quantities, 0) * workload.batch
    attended = state_bytes(quantities, workload.length) * workload.batch - states
    parts = (
        np.ones(quantities.shape[:-1]),
        quantities[..., 4],
        quantities[..., 5] / 1e6,
        quantities[..., 6] / 1e6,
        states / 1e6,
        quantities[..., 7],
        attended / 1e6,
    )
    found: Array = np.stack(parts, axis=-1)
    return found


def nonnegative_least_squares(rows: Array, values: NDArray[Any]) -> Array:
    """Weights of at least 0 with the least squared error: every set of columns is tried.

    :param rows: (measurements, columns), of a handful of columns
    :param values: (measurements,)
    """
    count = rows.shape[1]
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for columns in itertools.combinations(range(count), size):
            found, *_ = np.linalg.lstsq(rows[:, columns], values, rcond=None)
            error = float(np.square(rows[:, columns] @ found - values).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                least = error
                best = np.zeros(count)
                best[list(columns)] = found
    return best


def time_models(
    space: Space,
    mixes: Sequence[Mapping[str, int]],
    workload: Workload,
    device: torch.device,
    repeats: int = 7,
    shapes: Shapes | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Timed]:
    """Time models of random weights, which take turns.

    :param space: of the model
    :param mixes: sizes by axis
    :param workload: what is timed
    :param device: where
    :param repeats: of each
    :param shapes: of another depth; the size of the axis ``layers`` is then left out
    :raises SparseSSMError: no memory, or kernels that do not run on the device
    """
    made = shapes or space.shapes
    models, censuses = {}, {}
    for number, sizes in enumerate(mixes):
        own = {k: v for k, v in sizes.items() if shapes is None or k != "layers"}
        kept = space.kept_of(own) if shapes is None else None
        skeleton = made.model(own, kept)
        models[str(number)] = made.random(own, device, kept)
        censuses[str(number)] = Census.of(skeleton)
    latency = measure(models, workload, device, repeats, progress)
    phase = phase_of(latency)
    first = latency.timing("0", phase, workload.batch).milliseconds
    return [
        Timed(
            dict(sizes),
            len(censuses[name].layers),
            first / latency.speedup(name, phase, workload.batch),  # by pairs: a drift hits both
            tuple(map(float, features_of(censuses[name].total(), workload))),
        )
        for name, sizes in zip(models, mixes, strict=True)
    ]


def measure(
    models: Mapping[str, Any],
    workload: Workload,
    device: torch.device,
    repeats: int = 7,
    progress: Callable[[int], Any] | None = None,
) -> Any:
    """:func:`measure_latency` of what a workload says."""
    prefill = workload.phase == "prefill"
    short = nullcontext() if prefill or device.type != "cpu" else _short_chunks(models.values())

    def timed(graphs: bool) -> Any:
        return measure_latency(
            models,
            (workload.batch,),
            workload.length if prefill else min(workload.length, _SHORT),
            1 if prefill else _DECODE_STEPS.get(device.type, 8),
            repeats,
            cuda_graphs=graphs,
            progress=progress,
            context=0 if prefill else workload.length,
            plain_decode=not graphs,
        )

    with short:
        if prefill or device.type != "cuda":
            return timed(graphs=False)
        try:
            return timed(graphs=True)
        except SparseSSMError as error:
            if not str(error).startswith("CUDA graphs"):
                raise
            logger.warning(f"{error}; timed without one")
            return timed(graphs=False)


@contextmanager
def _short_chunks(models: Iterable[Any]) -> Iterator[None]:
    """A prompt of a few tokens is not padded to a whole chunk, which on a CPU takes seconds."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                if isinstance(getattr(module, "chunk_size", None), int):
                    stack.enter_context(patch_attr(module, "chunk_size", _SHORT))
        yield


def phase_of(latency: Any) -> str:
    """The phase whose time counts: with one decode step the prefill, else the fastest decode."""
    if latency.decode_steps == 1:
        return PREFILL
    return GRAPH_DECODE if GRAPH_DECODE in latency.phases else DECODE


def measured_speedups(
    space: Space,
    mixes: Sequence[Mapping[str, int]],
    workload: Workload,
    device: torch.device,
    repeats: int = 9,
) -> tuple[list[Timed], list[float]]:
    """Times of the dense model and of mixes at their full depth, and how many times as fast.

    :return: of the dense model first
    """
    timed = time_models(space, [{}, *mixes], workload, device, repeats)
    dense = timed[0].milliseconds
    return timed, [dense / entry.milliseconds for entry in timed[1:]]


def speed_model(space: Space, workload: Workload, device: torch.device) -> SpeedModel:
    """Time the dense model, every axis at its middle and its end and a few mixes, and fit.

    Models that are too large together are timed with a few layers only.

    :raises SparseSSMError: see :func:`time_models`
    """
    mixes = probes(space)
    dense_bytes = float(space.dense.total()[1])
    fits = dense_bytes * len(mixes) <= _WHOLE.get(device.type, 1e9)
    model = SpeedModel(workload, str(device))
    if fits:
        timed = time_models(space, mixes, workload, device)
    else:
        others = [{k: v for k, v in mix.items() if k != "layers"} for mix in mixes]
        distinct = [dict(items) for items in dict.fromkeys(tuple(o.items()) for o in others)]
        first, *rest = shallow_shapes(space.shapes, _SHALLOW)
        timed = time_models(space, distinct, workload, device, shapes=first)
        for shapes in rest:
            timed += time_models(space, distinct[:1], workload, device, shapes=shapes)
    model.add(timed)
    return model


def probes(space: Space) -> list[dict[str, int]]:
    """Mixes to time: dense, each axis at its end and its middle, all axes at both."""
    last = [len(ladder.sizes) - 1 for ladder in space.ladders]
    places = [[0] * len(last)]
    for place, end in enumerate(last):
        for size in dict.fromkeys((end, (end + 1) // 2)):
            places.append([size if i == place else 0 for i in range(len(last))])
    if len(last) > 1:
        places += [last, [(end + 1) // 2 for end in last]]
    found = []
    for mix in dict.fromkeys(map(tuple, places)):
        sizes = space.sizes(mix)
        try:
            space.shapes.model(sizes, space.kept_of(sizes))
        except SparseSSMError:
            continue
        found.append(sizes)
    return found
