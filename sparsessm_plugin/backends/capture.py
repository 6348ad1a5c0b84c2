"""A whole gradient step as one CUDA graph, which the CPU launches at once.

A step of a small model is hundreds of kernels of some microseconds each, and launching them takes
longer than they do. A graph holds them with the memory that they work in: what goes in is copied
into buffers of its own, loss and norm stand in two more.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin.backends.lanes import warming_up

# How far loss and gradients may be from those that are computed kernel after kernel, relative, as
# sums of embeddings' gradients and of some kernels differ in their order; and how far a change of
# the weights from the one that the same gradients make.
_SAME, _SAME_CHANGE = 0.02, 1e-3
_WARM_UP = 2  # steps before the capture, in which libraries make their plans and workspaces

Gradients = Callable[[Any], Tensor]
Update = Callable[[Any], Tensor]


class Weights(Protocol):
    """What a step changes."""

    device: torch.device

    def snapshot(self) -> list[Tensor]:
        """Copies of all that a step changes, the weights first."""

    def restore(self, snapshot: list[Tensor]) -> None:
        """Be as at the snapshot."""

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients, in the same memory in every step."""


class CapturedStep:
    """Loss, gradients and the step along them, for batches of one shape.

    :param gradients: makes those of a batch anew and returns the loss
    :param update: a step along them by a learning rate; returns their norm
    :param weights: what it changes
    :param batch: tensors on the device, and None
    :param rate: of the first step, which is taken
    :raises Exception: whatever a step does that no graph holds, or a replayed step that is not
        what the step without a graph is; ``weights`` are then as they were before
    """

    def __init__(
        self,
        gradients: Gradients,
        update: Update,
        weights: Weights,
        batch: Mapping[str, Any],
        rate: float,
    ) -> None:
        self._signature = _signature(batch)
        self._batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self._rate = torch.full((), rate, dtype=torch.float32, device=weights.device)
        self._graph = torch.cuda.CUDAGraph()
        before = weights.snapshot()
        try:
            self._loss, self._norm = self._capture(gradients, update, weights, before)
            self._check_change(update, weights, before)
        except BaseException:
            weights.restore(before)
            raise

    def _capture(
        self, gradients: Gradients, update: Update, weights: Weights, before: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        def step() -> tuple[Tensor, Tensor]:
            return gradients(self._batch), update(self._rate)

        home = torch.cuda.current_stream(weights.device)
        with warming_up(weights.device):
            for _ in range(_WARM_UP):
                weights.restore(before)
                loss, norm = step()
            expected = _made(weights, loss, norm)
            del loss, norm
            weights.restore(before)
        try:
            with torch.cuda.graph(self._graph):
                loss, norm = step()
        except BaseException:
            torch.cuda.set_stream(home)  # torch leaves the stream of a capture that failed current
            torch.cuda.synchronize(weights.device)
            raise
        self._graph.replay()
        for name, one in _made(weights, loss, norm).items():
            _compare(name, one, expected[name], expected[name], _SAME)
        return loss, norm

    def _check_change(self, update: Update, weights: Weights, before: list[Tensor]) -> None:
        """Take the step again, outside of the graph, along the gradients that the graph made.

        Along its own it may differ more: Adam's first steps go by the sign of a gradient.
        """
        found = weights.snapshot()[0]
        weights.restore(before)
        update(self._rate)
        expected = weights.snapshot()[0]
        _compare("weights", found, expected, expected - before[0], _SAME_CHANGE)

    def takes(self, batch: Mapping[str, Any]) -> bool:
        """Whether the graph is of such a batch."""
        return _signature(batch) == self._signature

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Loss and norm of the last step; the next one changes them."""
        return self._loss, self._norm

    def __call__(self, batch: Mapping[str, Any], rate: float) -> tuple[Tensor, Tensor]:
        """Take a step; nothing waits for it."""
        for key, buffer in self._batch.items():
            if isinstance(buffer, Tensor):
                buffer.copy_(batch[key], non_blocking=True)
        self._rate.fill_(rate)
        self._graph.replay()
        return self.numbers()


def capture(who: str, *args: Any) -> CapturedStep | None:
    """:class:`CapturedStep`, or None, with one line, where a step cannot be captured.

    :param who: asks for it, for the message
    :param args: of :class:`CapturedStep`
    """
    try:
        return CapturedStep(*args)
    except Exception as error:  # whatever CUDA, cuBLAS or a model's own code does not allow
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.info(f"{who}: steps run without a CUDA graph: {reason}")
        return None


def _signature(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: (value.shape, value.dtype) if isinstance(value, Tensor) else None
        for key, value in batch.items()
    }


def _made(weights: Weights, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
    gradients = torch.cat([gradient.flatten().float() for gradient in weights.gradients])
    return {"loss": loss.clone(), "norm of the gradients": norm.clone(), "gradients": gradients}


def _compare(name: str, found: Tensor, expected: Tensor, scale: Tensor, most: float) -> None:
    apart = float(torch.linalg.vector_norm(found - expected, dtype=torch.float64))
    if not apart <= most * float(torch.linalg.vector_norm(scale, dtype=torch.float64)):
        raise RuntimeError(f"the {name} of a replayed step are not those of the step")
