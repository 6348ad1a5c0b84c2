"""What timing has in common: random models, works that take turns, CUDA graphs, paired ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

Key = TypeVar("Key")


def random_model(config: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A causal language model of random weights, made on the device itself.

    :param dtype: by default bfloat16, on a CPU float32
    """
    torch.manual_seed(0)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def synchronize() -> None:
    """Wait for what a GPU has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], calls: int = 1) -> float:
    """Wall time a call, of a GPU's work until it is done."""
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - started) / calls


def take_turns(
    works: Mapping[Key, Callable[[], Any]],
    repeats: int,
    calls: int = 1,
    warmup: int = 2,
    time_of: Callable[[Callable[[], Any], int], float] = seconds_of,
) -> dict[Key, list[float]]:
    """Seconds a call: every repeat goes once through all of them.

    :param time_of: of a work and a number of calls
    """
    for work in works.values():  # compile, tune, warm up
        for _ in range(warmup):
            work()
    times: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            times[key].append(time_of(work, calls))
    return times


def paired(first: Sequence[float], own: Sequence[float]) -> float:
    """How many times as fast as the first: the median over pairs of repeats."""
    return statistics.median(a / b for a, b in zip(first, own, strict=True))


def spread_of(times: Sequence[float]) -> float:
    """Half the range, as a share of the median."""
    return (max(times) - min(times)) / (2 * statistics.median(times))


def captured(steps: list[Callable[[], Any]], warmup: int = 3) -> Callable[[], None]:
    """One CUDA graph of all steps: the kernels are timed and not Python's launching of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile and tune before the capture
        for _ in range(warmup):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()

    def replay(alive: list[Callable[[], Any]] = steps) -> None:  # the graph knows addresses only
        graph.replay()

    return replay
