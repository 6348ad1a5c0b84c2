"""How long prefill and decode take in transformers, and what the state cache weighs.

The models' own forward is timed, with whatever kernels transformers has bound, and not this
package's faster one: a smaller model is to be faster in a stock runtime. Models that are
compared take turns (A B A B), so that a drift of the machine hits all of them.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.decoding import StaticDecode, prefill, step
from sparsessm_plugin.families.kernels import bound_kernels, refused_mixer
from sparsessm_plugin.families.state_cache import StateCache, cache_bytes, lengthen
from sparsessm_plugin.files import write_figure

PREFILL = "prefill"
DECODE = "decode"
GRAPH_DECODE = "decode, CUDA graph"


@dataclass(frozen=True)
class Timing:
    """One model, phase, batch size and context.

    :param model: its name
    :param phase: :data:`PREFILL`, :data:`DECODE` or :data:`GRAPH_DECODE`
    :param batch_size: sequences
    :param steps: forward passes a repeat
    :param tokens: tokens that a repeat reads (prefill) or produces (decode), all sequences
    :param seconds: wall-clock time of every repeat, in the order they were run
    :param context: tokens a sequence that attention looks back at when decoding begins
    """

    model: str
    phase: str
    batch_size: int
    steps: int
    tokens: int
    seconds: tuple[float, ...]
    context: int = 0

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
    :param timings: every model, phase, batch size and context
    :param caches: state cache by model, after the prompt or the first context
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

    def contexts(self, phase: str) -> tuple[int, ...]:
        """Those that this phase was measured at, in that order."""
        return tuple(dict.fromkeys(t.context for t in self.timings if t.phase == phase))

    def timing(self, model: str, phase: str, batch_size: int, context: int | None = None) -> Timing:
        """The one measurement with these, at the first context by default.

        :raises KeyError: it was not measured
        """
        for timing in self.timings:
            found = timing.model, timing.phase, timing.batch_size
            if found == (model, phase, batch_size) and context in (None, timing.context):
                return timing
        raise KeyError((model, phase, batch_size, context))

    def speedup(self, model: str, phase: str, batch_size: int, context: int | None = None) -> float:
        """How many times as fast as the first model: the median over pairs of repeats."""
        own = self.timing(model, phase, batch_size, context).seconds
        first = self.timing(self.models[0], phase, batch_size, context).seconds
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
                    "speedup": self.speedup(
                        timing.model, timing.phase, timing.batch_size, timing.context
                    ),
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
    context: int | Sequence[int] = 0,
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
        shorter: keys and values are then repeated, instead of a pass over so many. Of several, one
        after the other, prefill is timed with the first
    :param plain_decode: with ``cuda_graphs``, whether to time decode steps without them, too
    :raises SparseSSMError: no memory for a batch size, kernels that cannot run on the model's
        device, or graphs asked for where they are not possible
    """
    contexts = (context,) if isinstance(context, int) else context
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
        for batch_size, length in itertools.product(batch_sizes, contexts):
            runs = {
                name: _Run(
                    model,
                    prompts[:batch_size].to(model.device),
                    decode_steps,
                    cuda_graphs,
                    length,
                    plain_decode or not cuda_graphs,
                )
                for name, model in models.items()
            }
            with memory_errors(batch_size, max(prompt_length, length)):
                for repeat in range(-warmup, repeats):
                    for run in runs.values():
                        run.repeat(counts=repeat >= 0)
                        if progress is not None:
                            progress(1)
            for name, run in runs.items():
                found = run.timings(name)
                timings += [t for t in found if t.phase != PREFILL or length == contexts[0]]
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
        self.state_cache = StateCache(0, 0)
        self.static: StaticDecode | None = None

    def repeat(self, counts: bool) -> None:
        """Prefill and decode once."""
        token, cache = self._timed(PREFILL, counts, lambda: prefill(self.model, self.prompt))
        lengthen(cache, self.context)
        self.state_cache = cache_bytes(cache, len(self.prompt))
        if self.plain_decode:
            self._timed(DECODE, counts, partial(self._decode, token, cache))
        del cache  # before the static one comes
        if self.cuda_graphs:
            if self.static is None:
                steps, context = self.decode_steps, self.context
                self.static = StaticDecode(self.model, self.prompt, steps, context)
            self.static.rewind()
            self._timed(GRAPH_DECODE, counts, self.static.decode)

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
                context=length if phase == PREFILL else max(length, self.context),
            )
            for phase, seconds in self.seconds.items()
        ]

    def _decode(self, token: Tensor, cache: Any) -> Tensor:
        for _ in range(self.decode_steps):
            token = step(self.model, token, cache)
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


def _check_device(name: str, model: Any, cuda_graphs: bool) -> None:
    on_cuda = model.device.type == "cuda"
    packages = {package for package in bound_kernels(model).values() if package != "torch"}
    if packages and not on_cuda:
        raise SparseSSMError(
            f"transformers has bound the CUDA kernels of {', '.join(sorted(packages))}, which "
            f"cannot run {name} on {model.device}; measure on CUDA, or where they are not installed"
        )
    if (refused := refused_mixer(model)) is not None:
        mixer, width = refused
        raise SparseSSMError(
            f"{name}: {mixer} has a width of {width}, and causal-conv1d, which transformers has "
            "bound, takes multiples of 8; measure other sizes, or where it is not installed"
        )
    if cuda_graphs and not on_cuda:
        raise SparseSSMError(f"CUDA graphs: {name} is not on a CUDA device")


@contextmanager
def memory_errors(batch_size: int, length: int) -> Iterator[None]:
    """Say of how many sequences of how many tokens the memory did not suffice."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise SparseSSMError(
                f"not enough memory for {batch_size} sequences of {length} tokens"
            ) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether this error, or one that it came from, is that memory did not suffice."""
    seen: BaseException | None = error
    while seen is not None:
        # the CPU's has no class
        if isinstance(seen, torch.OutOfMemoryError) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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

    batch_sizes = latency.batch_sizes
    panels = [(phase, context) for phase in latency.phases for context in latency.contexts(phase)]
    # without pyplot: no window system is asked for, no figure outlives this call
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (phase, context) in zip(plots, panels, strict=True):
        for model in latency.models:
            timings = [latency.timing(model, phase, size, context) for size in batch_sizes]
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
        several = len(latency.contexts(phase)) > 1
        panel.set_title(f"{phase}, {context:,} tokens" if several else phase)
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    write_figure(path, figure, dpi=150)
