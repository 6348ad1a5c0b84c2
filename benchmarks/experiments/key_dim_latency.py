"""What fewer key dims are worth on a GPU: decode and prefill of a stack shaped as Qwen3.5's.

Three of four layers are gated delta nets. Stacks that are compared take turns, and the speedup
pairs their repeats. flash-linear-attention, which is used if it is there, tunes its kernels for
whole sequences for minutes, so they come last.
"""

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import harness
import torch
from harness import (
    Configuration,
    Experiment,
    Job,
    joined,
    needs_gpu,
    not_measured,
    package_versions,
    section,
)
from pydantic import Field
from timing import captured, paired, random_model, spread_of, take_turns
from torch import Tensor
from transformers import Qwen3_5TextConfig, StaticCache
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from sparsessm_plugin.families.state_cache import cache_bytes

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


class Decode:
    """Greedy steps of one stack at one batch size, all of them at the position after the prompt."""

    def __init__(self, model: Any, batch: int, graph: bool):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=2 * PROMPT)
        ids = torch.randint(model.config.vocab_size, (batch, PROMPT), device=model.device)
        with rules_in_torch():  # a kernel for whole sequences is tuned for a minute
            self.token = self.forward(ids)
        self.bytes = cache_bytes(self.cache, batch)
        # it writes into tensors that stay where they are
        self.run: Callable[[], Any] = captured([self.step]) if graph else self.step

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


def kinds() -> dict[str, Any]:
    """How the delta rule can be computed here: name -> context; what is tuned longest is last."""
    packages = sorted({c["package"] for c in CHOICES.values() if c["is_new_implementation"]})
    fused = {", ".join(packages): nullcontext} if packages else {}
    return {"torch": rules_in_torch, **fused}


def measured(labels: dict[str, Any], times: dict[int, list[float]]) -> list[dict[str, Any]]:
    """A row for each number of key dims; the speedup is against the largest."""
    first = times[max(times)]
    return [
        {**labels, "dk": key_dim, "seconds": seconds, "speedup": paired(first, seconds)}
        for key_dim, seconds in times.items()
    ]


class Fields(Configuration):
    """What is timed."""

    tiny: bool = Field(False, description="a tiny stack on the CPU, whose times say nothing")

    @property
    def shape(self) -> dict[str, Any]:
        return TINY if self.tiny else SHAPE

    @property
    def length(self) -> int:
        return 8 if self.tiny else LENGTH


@torch.inference_mode()
def run(job: Job) -> Iterator[Any]:
    """Steps of every stack, then whole prompts; what a file holds is not run again."""
    tiny, shape = job.configuration.tiny, job.configuration.shape
    if not tiny:
        needs_gpu()
    device, sizes = ("cpu", (16, 8, 4)) if tiny else ("cuda", KEY_DIMS)
    steps, batches = ((1, 2), (1, 2)) if tiny else (DECODE_BATCHES, PREFILL_BATCHES)
    job.numbers["packages"] = package_versions("flash-linear-attention", "causal-conv1d", "triton")
    configs = {n: Qwen3_5TextConfig(**shape, linear_key_head_dim=n) for n in sizes}
    models = {n: random_model(config, device) for n, config in configs.items()}
    job.numbers["graphs"] = not tiny
    job.numbers.setdefault("eager", [])
    wanted = [("decode", decode, kind, batch) for kind in reversed(kinds()) for batch in steps]
    wanted += [(f"prefill, {k}", prefill, k, batch) for k in kinds() for batch in batches]
    for name, measure, kind, batch in job.cases("the rest", wanted):
        key = {"delta rule": kind, "batch": batch}
        if any(row | key == row for row in job.numbers.get(name, [])):
            continue
        with job.case(f"{name}, {key}"):
            job.numbers.setdefault(name, []).extend(
                measured(key, measure(job, models, kind, batch))
            )
        yield f"{name}, {key}"


def decode(job: Job, models: dict[int, Any], kind: str, batch: int) -> dict[int, list[float]]:
    """Seconds of a step of each stack."""
    graphs = job.numbers["graphs"]
    with kinds()[kind]():
        try:
            runs = {n: Decode(model, batch, graphs) for n, model in models.items()}
        except RuntimeError as error:
            if not graphs:
                raise
            job.numbers["eager"].append(f"{kind}, batch {batch} ({harness.first_line(error)})")
            runs = {n: Decode(model, batch, False) for n, model in models.items()}
        calls = STEPS if graphs else 2
        times = take_turns({n: run.run for n, run in runs.items()}, REPEATS, calls)
    job.numbers["caches"] = {str(n): run.bytes.to_dict() for n, run in runs.items()}
    return times


def prefill(job: Job, models: dict[int, Any], kind: str, batch: int) -> dict[int, list[float]]:
    """Seconds of a pass over whole prompts."""
    one = next(iter(models.values()))
    shape = (batch, job.configuration.length)
    ids = torch.randint(one.config.vocab_size, shape, device=one.device)

    def work(model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    with kinds()[kind]():
        return take_turns({n: work(m) for n, m in models.items()}, PREFILL_REPEATS)


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
                f"{spread_of(seconds):.1%}",
                f"{row['batch'] * tokens / median:,.0f}",
                f"{row['speedup']:.2f}",
            ]
        )
    return lines


HEADER = ["delta rule", "batch", "dk", "ms", "± spread", "tokens/s", "speedup"]


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """The tables of all that was measured."""
    parts, shape = [], chosen.shape
    if rows := numbers.get("decode"):
        graphs = numbers.get("graphs", True)
        how = "a step replayed from a CUDA graph" if graphs else "steps launched from Python"
        if eager := numbers.get("eager"):
            how += "; launched from Python, because no graph could be captured: " + "; ".join(eager)
        text = f"Time of {how}, after {PROMPT} tokens."
        parts.append(section("Decode", text, HEADER, lines_of(rows, 1)))
    if caches := numbers.get("caches"):
        dense = caches[max(caches, key=int)]["recurrent"]
        lines = [
            [n, f"{c['recurrent']:,}", f"{c['recurrent'] / dense:.2f}", f"{c['convolution']:,}"]
            for n, c in caches.items()
        ]
        text = "Bytes a sequence, counted from the cache object; attention's grows with the text."
        head = ["dk", "recurrent", "of dense", "convolution"]
        parts.append(section("State cache", text, head, lines))
    prefills = [numbers[name] for name in numbers if name.startswith("prefill")]
    if prefills:
        lines = [line for rows in prefills for line in lines_of(rows, chosen.length)]
        text = f"A pass over {chosen.length} tokens a sequence."
        parts.append(section("Prefill", text, HEADER, lines))
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
    return joined(title.strip(), *parts, not_measured(numbers))


EXPERIMENT = Experiment(
    measures="decode and prefill with fewer key dims",
    device="GPU",
    seconds=110,
    subjects="Qwen3.5-4B shape",
    configuration=Fields,
    run=run,
    render=render,
    results={"key_dim_latency": {}},
    quick={"": {"tiny": True}},
)
