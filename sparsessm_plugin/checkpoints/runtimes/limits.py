"""What a limit of a runtime is, and what a runtime answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts

Answer = Literal["yes", "slow", "unknown", "no"]
# what would have to be another for the limit to go
Subject = Literal["family", "sizes", "config", "quantization", "layout"]


@dataclass(frozen=True)
class Limit:
    """Something that a runtime does not take, or takes in a slower way.

    :param answer: ``no`` if it does not load or computes something else than was saved, ``slow`` if
        it leaves its fast kernels, ``unknown`` if nobody has looked
    :param reason: one line
    :param source: file of the runtime, at the version of :class:`Runtime`, where this stands
    :param about: what would have to be another
    """

    answer: Literal["slow", "unknown", "no"]
    reason: str
    source: str = ""
    about: Subject = "config"


MAMBA_LAYOUTS = ("mamba1", "mamba2")


@dataclass(frozen=True)
class Runtime:
    """A program that loads checkpoints.

    :param name: for ``--runtime`` and recipes
    :param title: for tables
    :param version: that was read, and run if ``run``
    :param limits: all that a model meets there
    :param run: False where the limits come from reading the runtime's code only
    :param note: what to know of each checkpoint that it loads
    :param run_layouts: layouts of mixers that were run, if any were
    """

    name: str
    title: str
    version: str
    limits: Callable[[ModelFacts], Iterator[Limit]]
    run: bool = True
    note: Callable[[ModelFacts], tuple[str, ...]] = lambda facts: ()
    run_layouts: tuple[str, ...] = MAMBA_LAYOUTS

    def has_run(self, facts: ModelFacts) -> bool:
        """Whether models of this kind were run in it."""
        return self.run and (facts.family is None or facts.family.layout in self.run_layouts)


@dataclass(frozen=True)
class RuntimeSupport:
    """Whether a runtime loads a checkpoint and computes what was saved.

    :param runtime: its title
    :param answer: ``yes``, ``slow`` if it loads and leaves its fast kernels, ``unknown`` or ``no``
    :param reasons: why not ``yes``, or what to know; one line each
    :param run: False where the answer comes from reading the runtime's code only
    :param limits: that were met, with their sources
    :param version: of the runtime that was read or run
    """

    runtime: str
    answer: Answer
    reasons: tuple[str, ...] = ()
    run: bool = True
    limits: tuple[Limit, ...] = ()
    version: str = ""


def judge(runtime: Runtime, facts: ModelFacts) -> RuntimeSupport:
    """What a runtime does with a model."""
    limits = tuple(runtime.limits(facts))
    answers: tuple[Answer, ...] = ("no", "unknown", "slow", "yes")
    met = {limit.answer for limit in limits}
    answer = next(a for a in answers if a in met or a == "yes")
    if answer == "no":  # what else is wrong does not matter then
        limits = tuple(limit for limit in limits if limit.answer == "no")
    reasons = tuple(limit.reason for limit in limits) or runtime.note(facts)
    return RuntimeSupport(
        runtime.title, answer, reasons, runtime.has_run(facts), limits, runtime.version
    )
