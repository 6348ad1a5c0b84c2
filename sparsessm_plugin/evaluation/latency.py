"""How long prefill and decode take in transformers, and what the state cache weighs.

The models' own forward is timed, with whatever kernels transformers has bound, and not this
package's faster one: a smaller model is to be faster in a stock runtime. Models that are
compared take turns (A B A B), so that a drift of the machine hits all of them.
"""

import inspect
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.state_cache import StateCache, cache_bytes, lengthen
from sparsessm_plugin.families.kernels import bound_kernels
from sparsessm_plugin.families.registry import iter_mixers
from sparsessm_plugin.files import write_bytes

PREFILL = "prefill"
DECODE = "decode"
GRAPH_DECODE = "decode, CUDA graph"

# transformers passes the cache of pure state-space models under the first name
_CACHE_NAMES = ("cache_params", "past_key_values")


@dataclass(frozen=True)
class Timing:
    """One model, phase and batch size.

    :param model: its name
    :param phase: :data:`PREFILL`, :data:`DECODE` or :data:`GRAPH_DECODE`
    :param batch_size: sequences
    :param steps: forward passes a repeat
    :param tokens: tokens that a repeat reads (prefill) or produces (decode), all sequences
    :param seconds: wall-clock time of every repeat, in the order they were run
    """

    model: str
    phase: str
    batch_size: int
    steps: int
    tokens: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a repeat."""
        return statistics.median(self.seconds)

    @property
    def milliseconds(self) -> float:
        """Median milliseconds a forward pass."""
        return 1000 * self.median / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences together, by the median."""
        return self.tokens / self.median

    @property
    def spread(self) -> float:
        """Half the range of the repeats, as a share of their median."""
        return (max(self.seconds) - min(self.seconds)) / (2 * self.median)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            **vars(self),
            "seconds": list(self.seconds),
            "milliseconds": self.milliseconds,
            "tokens_per_second": self.tokens_per_second,
            "spread": self.spread,
        }


@dataclass(frozen=True)
class Latency:
    """Result of :func:`measure_latency`.

    :param models: names, the one that the others are compared with first
    :param prompt_length: tokens a sequence before decoding
    :param decode_steps: tokens produced a sequence
    :param timings: every model, phase and batch size
    :param caches: state cache by model, after the prompt
    :param kernels: by model, which package each of transformers' kernel functions comes from
    """

    models: tuple[str, ...]
    prompt_length: int
    decode_steps: int
    timings: tuple[Timing, ...]
    caches: dict[str, StateCache]
    kernels: dict[str, dict[str, str]]

    @property
    def phases(self) -> tuple[str, ...]:
        """What was measured."""
        return tuple(dict.fromkeys(timing.phase for timing in self.timings))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """In the order they were measured."""
        return tuple(dict.fromkeys(timing.batch_size for timing in self.timings))

    def timing(self, model: str, phase: str, batch_size: int) -> Timing:
        """The one measurement with these three.

        :raises KeyError: it was not measured
        """
        for timing in self.timings:
            if (timing.model, timing.phase, timing.batch_size) == (model, phase, batch_size):
                return timing
        raise KeyError((model, phase, batch_size))

    def speedup(self, model: str, phase: str, batch_size: int) -> float:
        """How many times as fast as the first model: the median over pairs of repeats."""
        own = self.timing(model, phase, batch_size).seconds
        first = self.timing(self.models[0], phase, batch_size).seconds
        return statistics.median(a / b for a, b in zip(first, own, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            "models": list(self.models),
            "prompt_length": self.prompt_length,
            "decode_steps": self.decode_steps,
            "timings": [
                {
                    **timing.to_dict(),
                    "speedup": self.speedup(timing.model, timing.phase, timing.batch_size),
                }
                for timing in self.timings
            ],
            "cache_bytes_per_sequence": {k: v.to_dict() for k, v in self.caches.items()},
            "kernels": self.kernels,
        }


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, Any],
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 64,
    decode_steps: int = 8,
    repeats: int = 5,
    warmup: int | None = None,
    cuda_graphs: bool = False,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
    context: int = 0,
    plain_decode: bool = True,
) -> Latency:
    """Time prefill and greedy decode of one or more models, taking turns.

    A repeat of a model is one pass over the prompt, then ``decode_steps`` cached steps from the
    cache that this pass left. The prompts are random tokens; only the logits of the last
    position are computed, as in generation.

    :param models: transformers causal language models by name; the first is the reference of
        :meth:`Latency.speedup`
    :param batch_sizes: sequences at once, one after the other
    :param prompt_length: tokens a sequence
    :param decode_steps: tokens to produce a sequence
    :param repeats: measured repeats a model and batch size
    :param warmup: repeats before these that do not count; by default 1, on a GPU 3 (Triton
        tunes its kernels in the first calls)
    :param cuda_graphs: also replay the decode step from a CUDA graph, which takes away the
        time that launching single kernels costs
    :param seed: of the random prompts
    :param progress: called with 1 after each repeat of a model, those of the warm-up included
    :param context: tokens that attention looks back at when decoding begins, where the prompt is
        shorter: keys and values are then repeated, instead of a pass over so many
    :param plain_decode: with ``cuda_graphs``, whether to time decode steps without them, too
    :raises SparseSSMError: no memory for a batch size, kernels that cannot run on the model's
        device, or graphs asked for where they are not possible
    """
    for name, model in models.items():
        _check_device(name, model, cuda_graphs)
    vocab_size = min(m.get_input_embeddings().num_embeddings for m in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocab_size, (max(batch_sizes), prompt_length), generator=generator)
    if warmup is None:
        warmup = default_warmup(next(iter(models.values())).device)

    training = {name: model.training for name, model in models.items()}
    timings: list[Timing] = []
    caches: dict[str, StateCache] = {}
    try:
        for model in models.values():
            model.eval()
        for batch_size in batch_sizes:
            runs = {
                name: _Run(
                    model,
                    prompts[:batch_size].to(model.device),
                    decode_steps,
                    cuda_graphs,
                    context,
                    plain_decode or not cuda_graphs,
                )
                for name, model in models.items()
            }
            with _memory_errors(batch_size, prompt_length):
                for repeat in range(-warmup, repeats):
                    for run in runs.values():
                        run.repeat(counts=repeat >= 0)
                        if progress is not None:
                            progress(1)
            for name, run in runs.items():
                timings += run.timings(name)
                caches.setdefault(name, run.state_cache)
            del runs, run  # caches and graphs go before the next batch size comes
    finally:
        for name, model in models.items():
            model.train(training[name])
    return Latency(
        models=tuple(models),
        prompt_length=prompt_length,
        decode_steps=decode_steps,
        timings=tuple(timings),
        caches=caches,
        kernels={name: bound_kernels(model) for name, model in models.items()},
    )


def default_warmup(device: torch.device) -> int:
    """Repeats that do not count on this device."""
    return 3 if device.type == "cuda" else 1


def describe_kernels(kernels: Mapping[str, str]) -> str:
    """One line on the result of :func:`bound_kernels`."""
    if not kernels:
        return "unknown"
    packages = sorted({package for package in kernels.values() if package != "torch"})
    if not packages:
        return "none, transformers' torch reference"
    missing = sorted(name for name, package in kernels.items() if package == "torch")
    rest = f" ({', '.join(missing)} from torch)" if missing else ""
    return ", ".join(packages) + rest


class _Run:
    """One model at one batch size."""

    def __init__(
        self,
        model: Any,
        prompt: Tensor,
        decode_steps: int,
        cuda_graphs: bool,
        context: int = 0,
        plain_decode: bool = True,
    ):
        self.plain_decode = plain_decode
        self.model = model
        self.context = context
        self.prompt = prompt
        self.decode_steps = decode_steps
        self.cuda_graphs = cuda_graphs
        self.seconds: dict[str, list[float]] = {}
        self.cache: Any = None
        self.cache_name = ""
        self.state_cache = StateCache(0, 0)
        self.graph: _DecodeGraph | None = None

    def repeat(self, counts: bool) -> None:
        """Prefill and decode once."""
        self.cache = None  # the old one goes before the new one comes
        token = self._timed(PREFILL, counts, self._prefill)
        lengthen(self.cache, self.context)
        self.state_cache = cache_bytes(self.cache, len(self.prompt))
        if self.cuda_graphs and self.graph is None:
            # a cache of its own, whose addresses the graph keeps
            self.graph = _DecodeGraph(self.step, token, self.cache)
            token = self._prefill()
        if self.plain_decode:
            self._timed(DECODE, counts, lambda: self._decode(token))
        if self.graph is not None:
            replay = self.graph.replay
            self._timed(GRAPH_DECODE, counts, lambda: replay(self.decode_steps))

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """One cached greedy step: (b, 1) token in, (b, 1) token out."""
        output = self.model(
            input_ids=token, use_cache=True, logits_to_keep=1, **{self.cache_name: cache}
        )
        return output.logits[:, -1:].argmax(-1)

    def timings(self, name: str) -> list[Timing]:
        batch_size, length = self.prompt.shape
        return [
            Timing(
                name,
                phase,
                batch_size,
                steps=1 if phase == PREFILL else self.decode_steps,
                tokens=batch_size * (length if phase == PREFILL else self.decode_steps),
                seconds=tuple(seconds),
            )
            for phase, seconds in self.seconds.items()
        ]

    def _prefill(self) -> Tensor:
        output = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
        for name in _CACHE_NAMES:
            if getattr(output, name, None) is not None:
                self.cache, self.cache_name = getattr(output, name), name
                return output.logits[:, -1:].argmax(-1)
        raise SparseSSMError(f"{type(self.model).__name__} returns no cache to decode from")

    def _decode(self, token: Tensor) -> Tensor:
        for _ in range(self.decode_steps):
            token = self.step(token, self.cache)
        return token

    def _timed(self, phase: str, counts: bool, work: Callable[[], Any]) -> Any:
        started = self._now()
        result = work()
        if counts:
            self.seconds.setdefault(phase, []).append(self._now() - started)
        return result

    def _now(self) -> float:
        if self.prompt.is_cuda:
            torch.cuda.synchronize(self.prompt.device)
        return time.perf_counter()


class _DecodeGraph:
    """A decode step captured once; replaying it costs one launch.

    Possible where a step writes into tensors that stay where they are, as the states of a
    state-space model do.
    """

    def __init__(self, step: Callable[[Tensor, Any], Tensor], token: Tensor, cache: Any):
        self.token = token.clone()
        self.cache = cache
        stream = torch.cuda.Stream(token.device)
        stream.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(stream):  # kernels compile and tune before the capture
            for _ in range(3):
                step(self.token, cache)
        torch.cuda.current_stream(token.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.token.copy_(step(self.token, cache))

    def replay(self, steps: int) -> None:
        for _ in range(steps):
            self.graph.replay()


def _check_device(name: str, model: Any, cuda_graphs: bool) -> None:
    on_cuda = model.device.type == "cuda"
    packages = {package for package in bound_kernels(model).values() if package != "torch"}
    if packages and not on_cuda:
        raise SparseSSMError(
            f"transformers has bound the CUDA kernels of {', '.join(sorted(packages))}, which "
            f"cannot run {name} on {model.device}; measure on CUDA, or where they are not installed"
        )
    if not cuda_graphs:
        return
    if not on_cuda:
        raise SparseSSMError(f"CUDA graphs: {name} is not on a CUDA device")
    mixers = sum(1 for _ in iter_mixers(model))
    if mixers != model.config.num_hidden_layers or "cache_params" not in _parameters(model):
        raise SparseSSMError(
            f"CUDA graphs: the attention cache of {name} grows with every step, so that its "
            "decode step cannot be replayed"
        )


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


@contextmanager
def _memory_errors(batch_size: int, prompt_length: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no class
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise SparseSSMError(
                f"not enough memory for {batch_size} sequences of {prompt_length} tokens"
            ) from error
        raise


def check_matplotlib() -> None:
    """Find out before the work whether a plot can be drawn after it.

    :raises SparseSSMError: matplotlib is not installed
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SparseSSMError(
            "a plot needs matplotlib, which is not installed: pip install 'sparsessm-plugin[plot]'"
        ) from error


def plot_latency(latency: Latency, path: str | os.PathLike[str]) -> None:
    """Draw tokens a second against batch size, one panel a phase, as a PNG file.

    The bars reach from the slowest to the fastest repeat. The file appears complete or not
    at all.

    :raises SparseSSMError: matplotlib is missing, or the file cannot be written
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    phases, batch_sizes = latency.phases, latency.batch_sizes
    # without pyplot: no window system is asked for, no figure outlives this call
    figure = Figure(figsize=(4.5 * len(phases), 4), layout="constrained")
    for panel, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for model in latency.models:
            timings = [latency.timing(model, phase, size) for size in batch_sizes]
            middle = [t.tokens_per_second for t in timings]
            slow = [t.tokens / max(t.seconds) for t in timings]
            fast = [t.tokens / min(t.seconds) for t in timings]
            bars = [
                [m - s for m, s in zip(middle, slow, strict=True)],
                [f - m for m, f in zip(middle, fast, strict=True)],
            ]
            panel.errorbar(batch_sizes, middle, yerr=bars, marker="o", capsize=3, label=model)
        panel.set_xscale("log", base=2)
        panel.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("batch size")
        panel.set_ylabel("tokens/s")
        panel.set_title(phase)
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_bytes(path, picture.getvalue())
