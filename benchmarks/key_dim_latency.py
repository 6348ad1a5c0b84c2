"""What fewer key dims are worth on a GPU: decode and prefill of a stack shaped as Qwen3.5's.

python benchmarks/key_dim_latency.py            # one CUDA GPU, flash-linear-attention if there
python benchmarks/key_dim_latency.py --resume   # only what is not in its .json yet
python benchmarks/key_dim_latency.py --quick    # the logic only: a tiny stack on the CPU

Three of four layers are gated delta nets. Stacks that are compared take turns, and the speedup
pairs their repeats. Every table is saved as soon as it is there. flash-linear-attention tunes its
kernels for whole sequences for minutes, so they come last.
"""

import argparse
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import Result, begin, first_line, save
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from sparsessm_plugin.evaluation.state_cache import cache_bytes

KEY_DIMS = (128, 64, 32)
DECODE_BATCHES = (1, 32, 128)
PREFILL_BATCHES, LENGTH = (1, 8), 2048
PROMPT = 16  # tokens before decoding; what delta nets do a step does not depend on it
# As Qwen3.5-4B: 24 gated delta nets and 8 attention layers.
SHAPE = {
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
}
TINY = {
    **SHAPE,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 16,
}
# what transformers has bound, its choice in the closure of the wrapper
BOUND = {
    name: getattr(modeling, name)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
}
CHOICES = {name: inspect.getclosurevars(bound).nonlocals for name, bound in BOUND.items()}
STEPS, REPEATS = 16, 9  # of decode: steps a repeat
PREFILL_REPEATS = 7


def package_versions() -> dict[str, str]:
    found = {}
    for name in ("flash-linear-attention", "causal-conv1d", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def rules_in_torch() -> Iterator[None]:
    """Let transformers compute the delta rule in plain torch, whatever package it has bound."""
    before = {name: getattr(modeling, name) for name in BOUND}
    try:
        for name in BOUND:
            setattr(modeling, name, CHOICES[name]["torch_function"])
        yield
    finally:
        for name, function in before.items():
            setattr(modeling, name, function)


@contextmanager
def as_bound() -> Iterator[None]:
    """Leave transformers what it has bound."""
    yield


def build(shape: dict[str, Any], key_dim: int, device: str) -> Any:
    """A stack of random weights in bfloat16 (float32 on the CPU), made on the device itself."""
    config = Qwen3_5TextConfig(**shape, linear_key_head_dim=key_dim)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return Qwen3_5ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class Decode:
    """Greedy steps of one stack at one batch size, all of them at the position after the prompt."""

    def __init__(self, model: Any, batch: int, graph: bool):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=2 * PROMPT)
        ids = torch.randint(model.config.vocab_size, (batch, PROMPT), device=model.device)
        with rules_in_torch():  # a kernel for whole sequences is tuned for a minute
            self.token = self.forward(ids)
        self.bytes = cache_bytes(self.cache, batch)
        self.run: Callable[[], None] = self.step
        if graph:
            self.run = self.captured()

    def forward(self, ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        token: Tensor = output.logits[:, -1:].argmax(-1)
        return token

    def step(self) -> None:
        self.token.copy_(self.forward(self.token))
        for layer in self.cache.layers:  # so that attention's cache never gets full
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.sub_(1)

    def captured(self) -> Callable[[], None]:
        """The step in a CUDA graph: it writes into tensors that stay where they are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and tune before the capture
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        replay: Callable[[], None] = graph.replay
        return replay


def seconds_of(work: Callable[[], Any], calls: int) -> float:
    """Seconds a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def take_turns(works: dict[int, Callable[[], Any]], repeats: int, calls: int) -> dict[int, Any]:
    """Seconds a call: every repeat goes once through all of them."""
    for work in works.values():
        for _ in range(2):
            work()
    times: dict[int, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            times[key].append(seconds_of(work, calls))
    return times


def measured(labels: dict[str, Any], times: dict[int, list[float]]) -> list[dict[str, Any]]:
    """A row for each number of key dims; the speedup is against the largest."""
    first = times[max(times)]
    return [
        {
            **labels,
            "dk": key_dim,
            "seconds": seconds,
            "speedup": statistics.median(a / b for a, b in zip(first, seconds, strict=True)),
        }
        for key_dim, seconds in times.items()
    ]


def lines_of(rows: list[dict[str, Any]], tokens: int) -> list[list[str]]:
    """Rows of a table.

    :param tokens: a sequence and pass
    """
    lines = []
    for row in rows:
        seconds, median = row["seconds"], statistics.median(row["seconds"])
        lines.append(
            [
                *(str(row[name]) for name in ("delta rule", "batch", "dk")),
                f"{1e3 * median:.2f}",
                f"{(max(seconds) - min(seconds)) / (2 * median):.1%}",
                f"{row['batch'] * tokens / median:,.0f}",
                f"{row['speedup']:.2f}",
            ]
        )
    return lines


HEADER = ["delta rule", "batch", "dk", "ms", "± spread", "tokens/s", "speedup"]


def kinds() -> dict[str, Any]:
    """How the delta rule can be computed here: name -> context."""
    packages = sorted({c["package"] for c in CHOICES.values() if c["is_new_implementation"]})
    fused = {", ".join(packages): as_bound} if packages else {}
    return {**fused, "torch": rules_in_torch}


@torch.inference_mode()
def decode(result: Result, models: dict[int, Any], batches: tuple[int, ...], graphs: bool) -> None:
    """A step of each stack."""
    rows: list[dict[str, Any]] = []
    eager: list[str] = []

    def run(kind: str, batch: int) -> None:
        with kinds()[kind]():
            try:
                runs = {n: Decode(model, batch, graphs) for n, model in models.items()}
            except RuntimeError as error:
                if not graphs:
                    raise
                eager.append(f"{kind}, batch {batch} ({first_line(error)})")
                runs = {n: Decode(model, batch, False) for n, model in models.items()}
            calls = STEPS if graphs else 2
            times = take_turns({n: run.run for n, run in runs.items()}, REPEATS, calls)
        rows.extend(measured({"delta rule": kind, "batch": batch}, times))
        result.numbers["caches"] = {str(n): run.bytes.to_dict() for n, run in runs.items()}

    result.numbers |= {"decode": rows, "eager": eager, "graphs": graphs}
    for kind in kinds():
        for batch in batches:
            result.case(f"decode, {kind}, batch {batch}", lambda k=kind, b=batch: run(k, b))
            if graphs:
                torch.cuda.empty_cache()


@torch.inference_mode()
def prefill(
    result: Result, models: dict[int, Any], batches: tuple[int, ...], length: int, kind: str
) -> None:
    """A pass over whole prompts."""
    rows: list[dict[str, Any]] = []

    def run(batch: int) -> None:
        vocabulary = next(iter(models.values())).config.vocab_size
        device = next(iter(models.values())).device
        ids = torch.randint(vocabulary, (batch, length), device=device)

        def work(model: Any) -> Callable[[], Any]:
            return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

        with kinds()[kind]():
            times = take_turns({n: work(m) for n, m in models.items()}, PREFILL_REPEATS, 1)
        rows.extend(measured({"delta rule": kind, "batch": batch}, times))
        result.numbers[f"prefill, {kind}"] = rows

    for batch in batches:
        result.case(f"prefill, {kind}, batch {batch}", lambda b=batch: run(b))


def report(numbers: dict[str, Any], shape: dict[str, Any], length: int) -> str:
    """The tables of all that was measured."""
    result = Result(0)
    if rows := numbers.get("decode"):
        graphs = numbers.get("graphs", True)
        how = "a step replayed from a CUDA graph" if graphs else "steps launched from Python"
        if eager := numbers.get("eager"):
            how += "; launched from Python, because no graph could be captured: " + "; ".join(eager)
        text = f"Time of {how}, after {PROMPT} tokens."
        result.table("Decode", text, HEADER, lines_of(rows, 1))
    if caches := numbers.get("caches"):
        dense = caches[max(caches, key=int)]["recurrent"]
        result.table(
            "State cache",
            "Bytes a sequence, counted from the cache object; attention's grows with the text.",
            ["dk", "recurrent", "of dense", "convolution"],
            [
                [n, f"{c['recurrent']:,}", f"{c['recurrent'] / dense:.2f}", f"{c['convolution']:,}"]
                for n, c in caches.items()
            ],
        )
    prefills = [numbers[name] for name in numbers if name.startswith("prefill")]
    if prefills:
        lines = [line for rows in prefills for line in lines_of(rows, length)]
        result.table("Prefill", f"A pass over {length} tokens a sequence.", HEADER, lines)
    packages = ", ".join(f"{k} {v}" for k, v in numbers.get("packages", {}).items())
    title = (
        "# Fewer key dims: time on a GPU\n\n"
        f"Random weights in bfloat16, {shape['num_hidden_layers']} layers of width "
        f"{shape['hidden_size']} of which three of four are gated delta nets, "
        f"{shape['linear_num_key_heads']} key heads and {shape['linear_num_value_heads']} "
        f"value heads of {shape['linear_value_head_dim']}. Stock transformers; the delta rule by "
        "fla, flash-linear-attention, or by transformers' own torch. Medians; the spread is half "
        "the range of the repeats, the speedup the median over pairs of repeats against the most "
        f"key dims. {packages}"
    )
    failures = [f"- {name}: {text}" for name, text in numbers.get("failures", {}).items()]
    missing = ["## Not measured\n\n" + "\n".join(failures)] if failures else []
    return "\n\n".join([title.strip(), *result.parts, *missing])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny stack on the CPU, not saved")
    parser.add_argument(
        "--budget", type=float, default=110, help="seconds after which no new case begins"
    )
    parser.add_argument("--resume", action="store_true", help="go on from this name's .json")
    parser.add_argument("--render", type=Path, help="only write the tables of this .json")
    parser.add_argument("--name", default="key_dim_latency", help="of the result files")
    options = parser.parse_args()
    if options.render:
        numbers = json.loads(options.render.read_text(encoding="utf-8"))
        found = numbers.pop("versions")
        save(options.name, report(numbers, SHAPE, LENGTH), numbers, found)
        return
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --quick runs the logic without one")
    device, shape = ("cpu", TINY) if options.quick else ("cuda", SHAPE)
    sizes = (16, 8, 4) if options.quick else KEY_DIMS
    batches, length = ((1, 2), 8) if options.quick else (PREFILL_BATCHES, LENGTH)
    steps = (1, 2) if options.quick else DECODE_BATCHES
    result = Result(options.budget)
    result.numbers = {} if options.quick else begin(options)
    result.numbers.pop("failures", None)
    result.numbers["packages"] = package_versions()
    models: dict[int, Any] = {}

    def section(name: str, work: Callable[[Result], None]) -> None:
        if name in result.numbers:
            return
        result.section(name, work)
        numbers = {**result.numbers, "failures": result.failures}
        text = report(numbers, shape, length)
        if not options.quick:
            save(options.name, text, numbers)

    section("stacks", lambda r: models.update({n: build(shape, n, device) for n in sizes}))
    if not models:
        raise SystemExit(1)
    section("decode", lambda r: decode(r, models, steps, not options.quick))
    for kind in reversed(list(kinds())):  # kernels that are tuned last
        section(f"prefill, {kind}", lambda r, k=kind: prefill(r, models, batches, length, k))
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
