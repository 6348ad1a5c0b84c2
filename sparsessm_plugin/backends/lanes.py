"""Streams of a GPU beside the current one.

A walk along the columns of a weight is a chain of small kernels, which leaves most of a GPU idle:
others can run beside it. Each stream takes memory from a part of its own, which is what makes it
safe to free what a lane has made, once :meth:`Lane.join` was called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from sparsessm_plugin.cost import with_index

_WARM_UP = -1  # beside the numbers of lanes


class Lane:
    """Another stream of a GPU; on other devices work is done at once, in its turn.

    :param device: whose work it is
    :param number: of the lane; work of one lane is done in its order
    """

    def __init__(self, device: torch.device, number: int = 0) -> None:
        self._device = device
        self._stream = _stream(with_index(device), number) if device.type == "cuda" else None

    @contextmanager
    def work(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """What is asked for inside begins once all that was asked for before is done.

        Tensors that it reads must be held, and must not be changed, until :meth:`join`.

        :param after: begin once this is; nothing that the lane made earlier may be read since
        """
        if self._stream is None:
            yield
            return
        if after is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is asked for from now on begin once the lane's work is done; nobody waits."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """Run steps beside the current stream before they are captured as CUDA graphs.

    On one stream, not a new one each time: of every stream that cuBLAS has multiplied on it keeps a
    workspace, and torch's 32 streams come round again, so that lanes and graphs would come to share
    one.
    """
    stream, home = _stream(with_index(device), _WARM_UP), torch.cuda.current_stream(device)
    stream.wait_stream(home)
    with torch.cuda.stream(stream):
        yield
    home.wait_stream(stream)


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
