"""How many sequences fit into a device's memory, and how fast they decode together."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sparsessm_plugin.cost import memory_available
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.evaluation.latency import Timing, default_warmup, out_of_memory
from sparsessm_plugin.families.decoding import StaticDecode, prefill
from sparsessm_plugin.families.state_cache import StateCache, cache_bytes, lengthen

AT_CAPACITY = "decode, as many as fit"
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LESS = 0.95  # of the sequences, where working memory leaves no place for all of them
_PROMPT = 8
_FEW = 16  # sequences whose working memory is measured
# Of the main memory that is available. Linux grants more than there is, and ends the process that
# uses it, so that trying and taking less, as on a GPU, is no way.
_OF_MAIN_MEMORY = 0.5


@dataclass(frozen=True)
class Capacity:
    """What a model's weights and the caches of its sequences take of a memory.

    What a forward pass needs beside these is not counted: a few percent of the sequences.

    :param memory: bytes of the device
    :param weights: bytes of parameters and buffers
    :param cache: bytes of one sequence
    :param context: tokens that its attention looks back at
    """

    memory: int
    weights: int
    cache: StateCache
    context: int

    @property
    def sequences(self) -> int:
        """How many fit, none where the weights do not."""
        return max(0, self.memory - self.weights) // self.cache.total

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {**vars(self), "cache": self.cache.to_dict(), "sequences": self.sequences}


def bytes_of(text: str) -> int:
    """Bytes as people write them: 80GiB, 80e9, 512 MB.

    :raises SparseSSMError: no number of bytes, or none at all
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?(?:e[0-9]{1,2})?) ?([A-Za-z]{0,3})", text)
    if found is None or found[2].upper() not in _UNITS:
        raise SparseSSMError(f"memory must be like 80GiB, 80GB or 80e9, got {shown(text)}")
    size = float(found[1]) * _UNITS[found[2].upper()]
    if not 1 <= size < 2**60:
        raise SparseSSMError(f"memory must be from 1 to 2^60 bytes, got {shown(text)}")
    return int(size)


def memory_of(device: torch.device) -> int:
    """All bytes of a GPU's memory; of main memory, those that this process can still take."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_available()


@torch.inference_mode()
def measure_capacity(model: Any, memory: int, context: int) -> Capacity:
    """Count the cache after a short prompt, with keys and values for so many tokens.

    :param model: a transformers causal language model
    :param memory: bytes
    :param context: tokens a sequence that attention looks back at, those of the short prompt at
        least
    """
    context = max(context, _PROMPT)
    _, cache = prefill(model, _prompt(model))
    lengthen(cache, context)
    tensors = [*model.parameters(), *model.buffers()]
    unique = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    return Capacity(memory, sum(unique.values()), cache_bytes(cache, 1), context)


@torch.inference_mode()
def decode_at_capacity(
    models: Mapping[str, Any],
    capacities: Mapping[str, Capacity],
    decode_steps: int = 8,
    repeats: int = 5,
    cuda_graphs: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> list[Timing]:
    """Decode as many sequences as fit, of one model after the other.

    All sequences are copies of one, so that no prompt of so many has to be read. Where working
    memory leaves no place for all, a twentieth less is tried, and so on; of main memory, at most
    half of what is available is taken, working memory included. Meanwhile the other models wait in
    the host's memory.

    :param models: by name
    :param capacities: by name; their memory must be the device's, or less
    :param decode_steps: greedy tokens a sequence and repeat
    :param repeats: measured repeats
    :param cuda_graphs: replay steps from a CUDA graph
    :param progress: called with 1 after each model
    :raises SparseSSMError: not even one sequence fits
    """
    timings = []
    for name, model in models.items():
        batch_size, context = capacities[name].sequences, capacities[name].context
        with _alone(model, models):
            batch_size = min(batch_size, _with_working_memory(model, capacities[name]))
            seconds: tuple[float, ...] = ()
            while not seconds:
                if batch_size < 1:
                    raise SparseSSMError(f"{name} leaves no memory for a sequence")
                try:
                    seconds = _decode(
                        model, batch_size, context, decode_steps, repeats, cuda_graphs
                    )
                    break
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                # after the exception is gone, and with it what its frames held
                batch_size = min(batch_size - 1, int(_LESS * batch_size))
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
        tokens = batch_size * decode_steps
        timings.append(
            Timing(name, AT_CAPACITY, batch_size, decode_steps, tokens, seconds, context)
        )
        if progress is not None:
            progress(1)
    return timings


def _with_working_memory(model: Any, capacity: Capacity) -> int:
    """How many sequences a device has place for, by what a step of a few takes at its peak."""
    if model.device.type != "cuda":
        return _in_main_memory(model, capacity)
    if capacity.sequences < 2 * _FEW:
        return capacity.sequences
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0]
    held = torch.cuda.memory_allocated(model.device)
    peaks = []
    for few in (_FEW // 2, _FEW):  # what does not grow with the sequences is in both
        torch.cuda.reset_peak_memory_stats(model.device)
        _decode(model, few, capacity.context, 1, 1, False)
        peaks.append(torch.cuda.max_memory_allocated(model.device) - held)
    each = max(capacity.cache.total, 2 * (peaks[1] - peaks[0]) // _FEW)
    torch.cuda.empty_cache()
    return int((free - max(0, peaks[1] - _FEW * each)) // each)


def _in_main_memory(model: Any, capacity: Capacity) -> int:
    """As :func:`_with_working_memory`; what does not grow with the sequences is not told apart."""
    free = int(_OF_MAIN_MEMORY * memory_available())
    each = max(1, capacity.cache.total)
    few = min(_FEW, capacity.sequences, max(free >= each, free // (4 * each)))
    return few * free // _peak_of(model, few, capacity.context) if few else 0


def _peak_of(model: Any, batch_size: int, context: int) -> int:
    """Most bytes of main memory that torch holds at once for a decode step and its cache."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _decode(model, batch_size, context, 1, 1, False)
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")  # the one form of single allocations that is public
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    changes = [event for event in events if event.get("name") == "[memory]"]
    for change in sorted(changes, key=lambda event: event["ts"]):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def _alone(model: Any, models: Mapping[str, Any]) -> Iterator[None]:
    device = model.device
    others = [other for other in models.values() if other is not model and device.type == "cuda"]
    try:
        for other in others:
            other.to("cpu")
        if others:
            torch.cuda.empty_cache()
        yield
    finally:
        for other in others:
            other.to(device)


def _decode(
    model: Any, batch_size: int, context: int, steps: int, repeats: int, graph: bool
) -> tuple[float, ...]:
    static = StaticDecode(model, _prompt(model), steps, context, batch_size, graph)
    seconds = []
    for repeat in range(-default_warmup(model.device), repeats):
        static.rewind()
        started = _now(model.device)
        static.decode()
        if repeat >= 0:
            seconds.append(_now(model.device) - started)
    return tuple(seconds)


def _prompt(model: Any) -> torch.Tensor:
    return torch.ones(1, _PROMPT, dtype=torch.long, device=model.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
