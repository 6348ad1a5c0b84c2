"""What a run takes: seconds by stage, tokens, memory; and what to do where memory is short."""

import math
import os
import re
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

_MARKS = 1024  # stages that are kept before their seconds are added up


class Cost:
    """Seconds by stage, tokens and peak memory of one modifier.

    Where stages stand inside each other, each second counts for the innermost. A GPU's work
    counts for the stage that asked for it, and no stage waits for a GPU.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []  # stages
        self._closed: list[tuple[str, str | None, _Mark, _Mark]] = []  # with the one around them
        self.peak_memory_bytes = 0
        self._total = 0.0
        self._started: float | None = None
        self._tokens: dict[str, int] = {}
        self._batches: dict[str, int] = {}

    def begin(self) -> None:
        """The calibration begins."""
        self._started = _now()

    def end(self) -> None:
        """The calibration is over; safe to call again."""
        if self._started is not None:
            self._total += _now() - self._started
            self.peak_memory_bytes = peak_memory_bytes()
            self._started = None

    @property
    def tokens(self) -> int:
        """Calibration tokens, padding left out; every mixer sees all of them."""
        return max(self._tokens.values(), default=0)

    def count(self, name: str, hidden_states: Tensor, attention_mask: Tensor | None) -> int:
        """Count the tokens of what entered a mixer: (b, L, hidden_size), and (b, L) or None.

        :return: how many batches this mixer has seen
        """
        seen = hidden_states[..., 0].numel()
        if attention_mask is not None:
            seen = int(attention_mask.bool().sum())
        self._tokens[name] = self._tokens.get(name, 0) + seen
        self._batches[name] = self._batches.get(name, 0) + 1
        return self._batches[name]

    def batches(self, name: str) -> int:
        """How many batches a mixer has seen."""
        return self._batches.get(name, 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside for a stage."""
        started, around = _Mark(), self._open[-1] if self._open else None
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._closed.append((name, around, started, _Mark()))
            if len(self._closed) > _MARKS:  # a GPU is long past the first of them
                self._add_up(_MARKS // 2)

    def _add_up(self, count: int | None = None) -> None:
        done, self._closed = self._closed[:count], self._closed[len(self._closed[:count]) :]
        for name, around, started, ended in done:
            took = ended.seconds_since(started)
            self._seconds[name] = self._seconds.get(name, 0.0) + took
            if around is not None:
                self._seconds[around] = self._seconds.get(around, 0.0) - took

    def to_dict(self) -> dict[str, Any]:
        """For a report; ``forward`` is what no stage took: the model's own forward passes.

        ``peak_memory_bytes`` is the most up to here, what came before this modifier included.
        """
        self._add_up()
        staged = sum(self._seconds.values())
        seconds = {**self._seconds, "forward": max(0.0, self._total - staged), "total": self._total}
        return {
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self._total, 1) if self._total else None,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class _Mark:
    """A moment: where there is a GPU, that at which it has done what it was asked for before."""

    def __init__(self) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "_Mark") -> float:
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak_memory() -> None:
    """Let :func:`peak_memory_bytes` begin anew, which only CUDA devices can."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes() -> int:
    """Most bytes of tensors on one CUDA device; without one, the process's largest resident set."""
    if torch.cuda.is_initialized():
        return max(
            torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


# -- memory that is there ------------------------------------------------------------------


def with_index(device: torch.device) -> torch.device:
    """The same device with its number: not all of ``torch.cuda`` takes a plain ``cuda``."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


# Seconds that what others hold of a GPU is taken to stay: to ask the driver takes its time.
_OTHERS_FOR = 0.1
_others: dict[
    torch.device, tuple[float, int, int]
] = {}  # when asked, their bytes, and all there are


def has_room(device: torch.device, needed: int, spare: float = 0.5) -> bool:
    """Whether more than so much of a GPU stays free once so many bytes more are held.

    Where ``torch.cuda.set_per_process_memory_fraction`` has set a limit, of that.
    """
    if device.type != "cuda":
        return False
    device = with_index(device)
    held = torch.cuda.memory_stats_as_nested_dict(device)  # once: it takes longer than a kernel

    def current(what: str) -> int:
        return held.get(what, {}).get("all", {}).get("current", 0)

    now, (then, others, total) = time.perf_counter(), _others.get(device, (-math.inf, 0, 0))
    if now - then > _OTHERS_FOR:
        free, total = torch.cuda.mem_get_info(device)
        # torch keeps memory that no tensor holds
        others = total - free - current("reserved_bytes")
        _others[device] = (now, others, total)
    allocated = current("allocated_bytes")
    limit = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(total - others, limit) - allocated - needed > spare * limit


def memory_available() -> int:
    """Bytes of main memory that this process can still take, as far as Linux tells.

    The limit of a container counts where it is lower than what the machine has.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = [1024 * int(text.partition("MemAvailable:")[2].split()[0])]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" is no number, and then there is no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(found))


def kept(tensor: Tensor) -> Tensor:
    """A tensor where it can wait for its use: on its GPU if that has room, else in main memory."""
    return tensor if has_room(tensor.device, tensor.nbytes) else tensor.cpu()


# -- memory that is short ------------------------------------------------------------------


def shortage(error: BaseException, loader: DataLoader[Any] | None) -> str | None:
    """What to say if an error comes from a device without enough memory; None if it does not.

    With the numbers that torch gives, and the largest batch.
    """
    lacking = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            lacking = cause  # the innermost: LLM Compressor raises one of its own from torch's
        cause = cause.__cause__
    if lacking is None:
        return None
    text = " ".join(str(lacking).split())
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    if asked is not None and free is not None:
        text = f"{asked[1]} more were needed, {free[2]} of {free[1]} were free"
    if loader is None:
        return f"out of memory: {text}"
    shapes = [tuple(batch["input_ids"].shape) for batch in loader]
    rows, length = max(shapes, key=lambda shape: shape[0] * shape[1])
    return f"out of memory with batches of {rows} x {length} tokens: {text}"


def halved(loader: DataLoader[Any]) -> DataLoader[Any] | None:
    """The same rows in the same order, half as many at once; None if it is one at a time."""
    batches = list(loader)
    if all(len(batch["input_ids"]) < 2 for batch in batches):
        return None
    parts = [part for batch in batches for part in _halves(batch)]
    return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]


def _halves(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = len(batch["input_ids"])
    step = (rows + 1) // 2

    def cut(value: Any, start: int) -> Any:
        whole = not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows
        return value if whole else value[start : start + step]

    return [{k: cut(v, start) for k, v in batch.items()} for start in range(0, rows, step)]
