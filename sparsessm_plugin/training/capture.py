"""A whole gradient step as one CUDA graph, which the CPU launches at once.

A step of a small model is hundreds of kernels of some microseconds each, and launching them takes
longer than they do. A graph holds them with the memory that they work in: what goes in is copied
into buffers of its own, loss and norm stand in two more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin.training.flat import FlatWeights

# How far a replayed step may be from the same one taken kernel after kernel, relative: sums of
# embeddings' gradients differ in their order.
_SAME = 0.02
_WARM_UP = 2  # steps before the capture, in which libraries make their plans and workspaces

Step = Callable[[Any, Any], tuple[Tensor, Tensor]]


class CapturedStep:
    """Loss, gradients and the step along them, for batches of one shape.

    :param step: of a batch and a learning rate; clears the gradients before it adds to them, and
        returns the loss and the norm of the gradients
    :param weights: what it changes
    :param batch: tensors on the device, and None
    :param rate: of the first step, which is taken
    :raises Exception: whatever a step does that no graph holds, or a replayed step that is not
        what the step without a graph is; ``weights`` are then as they were before
    """

    def __init__(
        self, step: Step, weights: FlatWeights, batch: Mapping[str, Any], rate: float
    ) -> None:
        self._signature = _signature(batch)
        self._batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        self._rate = torch.full((), rate, dtype=torch.float32, device=weights.device)
        self._graph = torch.cuda.CUDAGraph()
        before = weights.snapshot()
        try:
            self._loss, self._norm = self._capture(step, weights, before)
        except BaseException:
            weights.restore(before)
            raise

    def _capture(
        self, step: Step, weights: FlatWeights, before: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.Stream(weights.device)
        stream.wait_stream(torch.cuda.current_stream(weights.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                weights.restore(before)
                loss, norm = step(self._batch, self._rate)
            expected = _after(weights, loss, norm)
            del loss, norm
            weights.restore(before)
        torch.cuda.current_stream(weights.device).wait_stream(stream)
        with torch.cuda.graph(self._graph):
            loss, norm = step(self._batch, self._rate)
        loss = loss.detach()
        self._graph.replay()
        start = torch.cat([tensor.flatten() for tensor in before[:1]])
        _compare(_after(weights, loss, norm), expected, start)
        return loss, norm

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


def capture(
    who: str, step: Step, weights: FlatWeights, batch: Mapping[str, Any], rate: float
) -> CapturedStep | None:
    """:class:`CapturedStep`, or None, with one line, where a step cannot be captured.

    :param who: asks for it, for the message
    """
    try:
        return CapturedStep(step, weights, batch, rate)
    except Exception as error:  # whatever CUDA, cuBLAS or a model's own code does not allow
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.info(f"{who}: steps run without a CUDA graph: {reason}")
        torch.cuda.synchronize(weights.device)
        return None


def _signature(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: (value.shape, value.dtype) if isinstance(value, Tensor) else None
        for key, value in batch.items()
    }


def _after(weights: FlatWeights, loss: Tensor, norm: Tensor) -> list[Tensor]:
    """Loss, norm, all gradients and the first weights after a step."""
    gradients = [gradient.flatten().float() for gradient in weights.gradients]
    return [loss.detach().clone(), norm.clone(), torch.cat(gradients), weights.snapshot()[0]]


def _compare(found: list[Tensor], expected: list[Tensor], start: Tensor) -> None:
    names = ("loss", "norm of the gradients", "gradients", "weights")
    for name, one, other in zip(names, found, expected, strict=True):
        scale = other - start if name == "weights" else other
        apart = float((one.double() - other.double()).norm())
        if not apart <= _SAME * float(scale.double().norm()):
            raise RuntimeError(f"the {name} of a replayed step are not those of the step")
