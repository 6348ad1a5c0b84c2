"""Results of the commands as tables."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from sparsessm_plugin.cli.console import out

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparsessm_plugin.checkpoints.runtimes import RuntimeSupport
    from sparsessm_plugin.evaluation.capacity import Capacity
    from sparsessm_plugin.evaluation.component_loss import ComponentLoss
    from sparsessm_plugin.evaluation.components import Inventory
    from sparsessm_plugin.evaluation.latency import Latency, Timing
    from sparsessm_plugin.fitting import FitResult
    from sparsessm_plugin.recipes.demo import DemoResult


# plural of what removal modifiers count, over all mixers
_UNITS = {
    "state": "states",
    "channels": "channels",
    "heads": "heads",
    "head_dim": "channels a head",
    "key_dims": "key dims a head",
    "value_heads": "value heads",
    "value_dims": "value dims a head",
    "hidden": "entries of the stream",
    "mlp": "intermediate units",
    "experts": "intermediate units of experts",
    "shared_experts": "intermediate units of shared experts",
    "kv_groups": "key and value heads",
}
_OF_THE_MODEL = ("layers", "hidden")  # counted once
_OF_OTHERS = ("mlp", "experts", "shared_experts", "kv_groups")  # than mixers


def _print_whole(table: Table) -> None:
    """A table at its own width: a terminal breaks long lines, and rich would cut cells."""
    width = out.width
    needed = out.measure(table, options=out.options.update(max_width=10_000)).maximum
    try:
        out.width = max(width, needed)
        out.print(table, crop=False)
    finally:
        out.width = width


def print_pruned(report: dict[str, Any], output: Path) -> None:
    from sparsessm_plugin.checkpoints.saving import NOTE_NAME

    before, after = report["before"], report["after"]
    table = Table("", "before", "after", box=None)
    table.add_row("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}")
    table.add_row("zeros", f"{before['zeros']:,}", f"{after['zeros']:,}")
    if report["perplexity"]:
        measured = report["perplexity"]
        table.add_row(
            "perplexity",
            f"{measured['before']['perplexity']:.3f}",
            f"{measured['after']['perplexity']:.3f}  (x {measured['ratio']:.4f})",
        )
    _print_whole(table)
    for modifier in report["modifiers"]:
        total = modifier["total"]
        unit = total.get("unit")  # what whole parts were removed of; single entries are pruned
        done, things = (
            ("removed", _UNITS.get(unit, unit)) if unit is not None else ("pruned", "entries")
        )
        if "zeros" in total:  # quantized: what was pruned before stayed so
            done = "kept zero"
        layers = modifier.get("layers")
        stay = ""
        if unit is not None and layers and unit not in _OF_THE_MODEL:  # the same in every one
            where = "module" if unit in _OF_OTHERS else "mixer"
            stay = f"; {layers[0]['after']} of {layers[0]['before']} stay in each {where}"
        out.print(
            f"{modifier['modifier']}: {done} {total['pruned']:,} of {total['entries']:,} {things} "
            f"({total['sparsity']:.2%}) in {total['seconds']:.1f} s{stay}"
        )
    out.print(f"saved to {escape(str(output))}", soft_wrap=True)
    if NOTE_NAME in report["files"]:
        out.print(
            "plain transformers fails on out_proj of this checkpoint or rescales it; load it with "
            f"sparsessm_plugin.load, see {NOTE_NAME} there",
            soft_wrap=True,
        )


def print_fit(result: "FitResult", output: Path) -> None:
    plan = result.plan
    kinds = list(plan.costs)
    table = Table("alone", "keeps", *(_cost_name(kind) for kind in kinds), "loss", box=None)
    for row in plan.rows:
        costs = (f"{row.costs[kind]:.3f}" for kind in kinds)
        about = "" if row.measured else "  (from its neighbours)"
        table.add_row(row.axis, f"{row.size:,}", *costs, f"{row.loss:.4f}{about}")
    _print_whole(table)
    after = ["distilled"] if any(c.distilled is not None for c in plan.candidates) else []
    names = (_cost_name(kind) for kind in kinds)
    table = Table("mix", *names, "predicted", "loss", *after, box=None)
    for candidate in plan.candidates:
        costs = (f"{candidate.costs[kind]:.3f}" for kind in kinds)
        loss = f"{candidate.predicted:.4f}", f"{candidate.loss:.4f}"
        distilled = ["" if candidate.distilled is None else f"{candidate.distilled:.4f}"]
        sizes = _sizes(plan.dense, candidate.sizes)
        table.add_row(sizes, *costs, *loss, *distilled[: len(after)])
    if plan.candidates:
        _print_whole(table)
    out.print(f"chosen: {_sizes(plan.dense, plan.sizes)}", soft_wrap=True, highlight=False)
    table = Table("", "predicted", "came out", box=None)
    for kind in kinds:
        table.add_row(_cost_name(kind), f"{plan.costs[kind]:.3f}", f"{result.costs[kind]:.3f}")
        if kind == "speed":
            before = (plan.speed or {}).get("share_before_timing") or plan.costs[kind]
            told = f"x {1 / before:.3f}, once timed x {1 / plan.costs[kind]:.3f}"
            table.add_row("speed", told, f"x {1 / result.costs[kind]:.3f}")
    done = f", distilled for {plan.distill_minutes:g} min" if plan.distill_minutes else ""
    table.add_row("loss, nats a token", f"{plan.predicted:.4f}", f"{result.loss:.4f}{done}")
    _print_whole(table)
    best = min(plan.alone.items(), key=lambda item: item[1]["loss"], default=None)
    if best is not None and len(plan.sizes) > 1:
        axis, found = best
        about = "" if found["measured"] else " (from its neighbours)"
        out.print(
            f"best single axis: {axis} {found['size']:g}, loss {found['loss']:.4f}{about} before "
            "any distillation" + (f", the mix {plan.loss:.4f}" if plan.loss is not None else ""),
            soft_wrap=True,
            highlight=False,
        )
    out.print(f"saved to {escape(str(output))}", soft_wrap=True)


def _cost_name(kind: str) -> str:
    return "time / dense" if kind == "speed" else f"{kind} / dense"


def _sizes(dense: dict[str, int], sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {dense[axis]:,} -> {size:,}" for axis, size in sizes.items())


def print_tasks(report: dict[str, Any]) -> None:
    table = Table("task", "samples", "metric", "value", "standard error", box=None)
    inner = {name for result in report["tasks"].values() for name in result["subtasks"]}
    for name, result in report["tasks"].items():
        if name in inner and name not in report["tasks_asked_for"]:
            continue
        for metric, number in result["metrics"].items():
            error = f"± {number['stderr']:.4f}" if number["stderr"] is not None else ""
            samples = f"{result['samples']:,}"
            table.add_row(escape(name), samples, metric, f"{number['value']:.4f}", error)
    _print_whole(table)


def print_runtimes(runtimes: "Iterable[RuntimeSupport]") -> None:
    """Runtimes of one answer together, for those that give it for the same reasons."""
    out.print("\nLoads in")
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    read = False
    for runtime in runtimes:
        key = runtime.answer, _with_sources(runtime)
        together.setdefault(key, []).append(runtime.runtime + ("" if runtime.run else "*"))
        read |= not runtime.run
    answers = ("yes", "slow", "unknown", "no")
    for (answer, reasons), names in sorted(
        together.items(), key=lambda entry: (answers.index(entry[0][0]), bool(entry[0][1]))
    ):
        out.print(f"  {', '.join(names)}: {answer}", highlight=False, soft_wrap=True)
        for reason in reasons:
            out.print(f"    {reason}", highlight=False, markup=False, soft_wrap=True)
    if read:
        out.print("  * read in its code, not run")


def _with_sources(runtime: "RuntimeSupport") -> tuple[str, ...]:
    """Reasons with the file of the runtime that says so, where one is known."""
    sources = {limit.reason: limit.source for limit in runtime.limits if limit.source}
    return tuple(
        f"{reason} ({runtime.version}: {sources[reason]})" if reason in sources else reason
        for reason in runtime.reasons
    )


def print_memory(weights: int, at_once: int) -> None:
    """Bytes of all weights, and of what is read at once where they are on disk."""
    out.print(
        f"weights: {weights:,} bytes; prune --offload disk reads {at_once:,} of them at once",
        soft_wrap=True,
    )


def print_inventory(name: str, inventory: "Inventory") -> None:
    mixers = inventory.mixers
    families = sorted({adapter.family for adapter in mixers})
    out.print(
        f"{escape(name)}: {len(mixers)} state-space mixers ({', '.join(families)}), "
        f"{inventory.parameters:,} parameters",
        soft_wrap=True,
    )
    # with one A_log a head there is no entry that could make a state forget
    memoryless = ["memoryless"] if any(a.has_state_transitions for a in mixers) else []
    table = Table("component", "parameters", "share", "zeros", *memoryless, box=None)
    for kind, component in inventory.components.items():
        if component.parameters:
            table.add_row(
                kind,
                f"{component.parameters:,}",
                f"{component.parameters / inventory.parameters:.2%}",
                f"{component.zeros / component.parameters:.2%}",
                f"{component.memoryless / component.parameters:.2%}"
                if component.memoryless is not None
                else "",
            )
    _print_whole(table)
    kinds = [kind for kind in inventory.components if kind in mixers[0].projections]
    delta = all(a.recurrence == "delta_rule" for a in mixers)
    letters = {"D": "channels", "N": "key dims a head" if delta else "states"}
    if memoryless:
        letters["R"] = "rank of dt"
    if not all(a.has_state_transitions for a in mixers):
        heads = ("value heads", "value dims a head", "key heads")
        names = heads if delta else ("heads", "channels a head", "groups")
        letters |= dict(zip("HPG", names, strict=True))
    letters["K"] = "convolution"
    table = Table("mixer", *letters, "A_log", *memoryless, *kinds, box=None)
    legend = ", ".join(f"{letter} {meaning}" for letter, meaning in letters.items())
    table.title = f"zeros by mixer ({legend})"
    table.title_justify = "left"
    for adapter in mixers:
        layer, sizes = inventory.layers[adapter.name], adapter.sizes
        numbers = {
            "D": sizes.intermediate_size,
            "N": sizes.state_size,
            "R": sizes.time_step_rank,
            "H": sizes.num_heads,
            "P": sizes.head_dim,
            "G": sizes.n_groups,
            "K": sizes.conv_kernel_size,
        }
        A_log = layer["A_log"]
        table.add_row(
            adapter.name,
            *(str(numbers[letter]) for letter in letters),
            f"{A_log.zeros / A_log.parameters:.1%}",
            *([f"{(A_log.memoryless or 0) / A_log.parameters:.1%}"] if memoryless else []),
            *(f"{layer[kind].zeros / layer[kind].parameters:.1%}" for kind in kinds),
        )
    _print_whole(table)


def print_component_loss(result: "ComponentLoss") -> None:
    from sparsessm_plugin.evaluation.component_loss import ratio_tables

    out.print(f"dense perplexity {result.dense:.4f}; in the tables, perplexity over it")
    for ratios in ratio_tables(result):
        kind, names = ratios.rows
        table = Table(kind, *ratios.columns[1], title=ratios.title, title_justify="left", box=None)
        for name, row in zip(names, ratios.ratios, strict=True):
            table.add_row(name, *(f"{ratio:.4f}" for ratio in row))
        _print_whole(table)


def print_latency(latency: "Latency") -> None:
    from sparsessm_plugin.evaluation.latency import PREFILL, describe_kernels

    compared = len(latency.models) > 1
    speedup = ["speedup"] if compared else []
    several = any(len(latency.contexts(phase)) > 1 for phase in latency.phases)
    context = ["context"] if several else []
    header = ("", "batch", *context, "model", "ms a pass", "spread", "tokens/s", *speedup)
    table = Table(*header, box=None)
    for phase in latency.phases:
        for size, length in itertools.product(latency.batch_sizes, latency.contexts(phase)):
            for name in latency.models:
                timing = latency.timing(name, phase, size, length)
                table.add_row(
                    phase,
                    str(size),
                    *([f"{length:,}"] if several else []),
                    escape(name),
                    f"{timing.milliseconds:.3f}",
                    f"± {timing.spread:.1%}",
                    f"{timing.tokens_per_second:,.0f}",
                    *([f"{latency.speedup(name, phase, size, length):.3f}"] if compared else []),
                )
    _print_whole(table)
    if latency.caches:
        _print_caches(latency, compared)
    repeats = len(latency.timing(latency.models[0], PREFILL, latency.batch_sizes[0]).seconds)
    kernels = "; ".join(dict.fromkeys(describe_kernels(k) for k in latency.kernels.values()))
    out.print(
        f"medians of {repeats} repeats; prefill reads {latency.prompt_length} tokens a sequence, "
        f"decode produces {latency.decode_steps}, one a pass"
        + (f"; speedup is against {escape(latency.models[0])}" if compared else "")
        + (f"; kernels: {kernels}" if kernels else ""),
        soft_wrap=True,
        highlight=False,
    )


def _print_caches(latency: "Latency", compared: bool) -> None:
    first = latency.caches[latency.models[0]]
    relative = ["share"] if compared else []
    table = Table("", "recurrent", "convolution", "attention", "total", *relative, box=None)
    table.title = f"bytes of cache a sequence, after {latency.prompt_length} tokens"
    table.title_justify = "left"
    for name, cache in latency.caches.items():
        numbers = (cache.recurrent, cache.convolution, cache.attention, cache.total)
        share = [f"{cache.total / first.total:.3f}"] if compared else []
        table.add_row(escape(name), *(f"{number:,}" for number in numbers), *share)
    _print_whole(table)


def print_capacity(
    capacities: "Mapping[str, Sequence[Capacity]]", full: "Sequence[Timing]"
) -> None:
    """How many sequences fit, and what they decode together where that was measured."""
    if not capacities:
        return
    measured = {timing.model: timing for timing in full}
    columns = ("context", "weights", "a sequence", "sequences")
    more = ("at batch", "ms a pass", "tokens/s") if full else ()
    table = Table("", *columns, *more, box=None)
    for name, found in capacities.items():
        for place, capacity in enumerate(found):
            numbers = (capacity.context, capacity.weights, capacity.cache.total, capacity.sequences)
            cells = [f"{number:,}" for number in numbers]
            if name in measured and place == 0:
                timing = measured[name]
                speed = f"{timing.tokens_per_second:,.0f}"
                cells += [f"{timing.batch_size:,}", f"{timing.milliseconds:.3f}", speed]
            table.add_row(escape(name), *cells)
        table.title = f"sequences that fit into {found[0].memory:,} bytes beside the weights"
    table.title_justify = "left"
    _print_whole(table)


def print_demo(result: "DemoResult") -> None:
    from sparsessm_plugin.recipes.demo_picture import label

    table = Table(box=None)
    table.add_column("model")
    for column in ("parameters", "zeros", "weights", "state", "tokens/s", "perplexity", "seconds"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            label(row),
            f"{row.parameters:,}",
            f"{row.zeros:.1%}",
            f"{row.weight_bytes / 1e6:.2f} MB",
            f"{row.state_bytes / 1e3:.1f} kB",
            f"{row.tokens_per_second:,.0f}",
            f"{row.perplexity:.2f}",
            f"{row.seconds:.1f}",
        )
    _print_whole(table)
    sizes = result.sizes
    out.print(
        f"{result.model}; calibrated on {result.calibration_tokens:,} tokens, perplexity on "
        f"{result.evaluation_tokens:,} others, all docstrings of Python's standard library.\n"
        "weights: as float32, or 8 bits. state: of one sequence. "
        f"tokens/s: decode, {sizes.sequences} sequences at once, stock transformers on this CPU,\n"
        "which computes W8A8 in floating point and reads zeros as any other number: runtimes with "
        "kernels for them gain.\n"
        "A_log is a small part of the parameters; its zeros save nothing and are for insight.",
        highlight=False,
    )
    if sizes.short_fits:
        out.print("Removals were fitted only briefly, which costs them perplexity.")
