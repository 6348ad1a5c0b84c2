"""Fit a model in memory to a target."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.fitting.costs import Census, counted
from sparsessm_plugin.fitting.losses import HeldBack
from sparsessm_plugin.fitting.plan import Plan, make_plan, split
from sparsessm_plugin.fitting.prepare import FitSettings, Prepared, sizes_of
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.fitting.targets import parse_targets
from sparsessm_plugin.fitting.timing import Phase, Workload, measure, phase_of
from sparsessm_plugin.methods.run import run_in_turn
from sparsessm_plugin.recipes import parse_recipe


@dataclass(frozen=True)
class FitResult:
    """What came out.

    :param plan: what was found and predicted
    :param loss: of the model as it is now, on the text held back, nats a token
    :param costs: share of the dense cost, counted or measured, by kind of target
    :param sizes: by axis, of the model as it is now
    :param seconds: of everything
    """

    plan: Plan
    loss: float
    costs: dict[str, float]
    sizes: dict[str, int]
    seconds: float

    @property
    def recipe(self) -> str:
        """YAML by which ``oneshot()`` makes the same sizes."""
        return self.plan.recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a report."""
        outcome = {k: v for k, v in vars(self).items() if k != "plan"}
        return {"plan": self.plan.to_dict(), "outcome": outcome}


def fit(
    model: Any,
    batches: Iterable[Any],
    target: str | Sequence[str],
    *,
    runtime: str = "transformers",
    batch: int = 1,
    length: int = 2048,
    phase: Phase = "decode",
    minutes: float = 10.0,
    axes: Sequence[str] | None = None,
    search_tokens: int | None = None,
    generated: int = 0,
    trust_remote_code: bool = False,
) -> FitResult:
    """Make a model smaller, in place, until it reaches a target, at the least loss that is found.

    :param model: transformers model; its config follows
    :param batches: of calibration text, what the model's forward takes; the last eighth is only
        measured on
    :param target: ``parameters=0.7``, ``memory=1.5GB``, ``state=0.25`` or ``speed=1.5``; several
        are to be reached together
    :param runtime: that must take the sizes, one of :data:`checkpoints.runtimes.RUNTIMES`
    :param batch: sequences at once, for a speed
    :param length: tokens of each, for a speed, and for an attention cache in ``state``
    :param phase: what is to be fast, ``decode`` or ``prefill``
    :param minutes: that the whole may take; what the search leaves is for distillation. The least
        (one size of an axis, and of one more until a mix reaches the targets, one trial of a mix
        and the removals) is done in any case, with a warning where it takes longer
    :param axes: to choose from; default all that there are
    :param search_tokens: of the text that a trial chooses and fits by; default 65,536 on a GPU
        and 12,288 on a CPU; the removals themselves then read 131,072 and 32,768
    :param generated: tokens that the dense model writes itself for the distillation, beside the
        text; the time that it takes for them comes on top of the minutes
    :param trust_remote_code: let the model's own code make the smaller models
    :return: what was found, predicted and reached
    :raises SparseSSMError: a target that cannot be reached, with the nearest; too little text;
        a runtime that cannot load the model
    """
    started = time.monotonic()
    settings = FitSettings(
        parse_targets(target if isinstance(target, str) else list(target)),
        runtime,
        Workload(batch, length, phase),
        minutes,
        None if axes is None else tuple(axes),
        search_tokens,
        generated,
    )
    if not isinstance(model, torch.nn.Module):
        raise SparseSSMError("fit takes a loaded model")
    fitted, held = split(list(batches))
    shapes = Shapes(model, trust_remote_code=trust_remote_code)
    prepared = Prepared(shapes, settings, next(model.parameters()).device)
    held_back = HeldBack(model, held)
    plan = make_plan(prepared, model, fitted, held_back, started)
    recipe = parse_recipe(plan.recipe, "the recipe found")
    run_in_turn([modifier.new_method() for modifier in recipe.modifiers], model, fitted)
    return outcome(prepared, plan, model, held_back, started)


def outcome(
    prepared: Prepared, plan: Plan, model: Any, held_back: HeldBack, started: float
) -> FitResult:
    """Measure what came out.

    :param prepared: before the work
    :param plan: that was carried out
    :param model: as it is now
    :param held_back: what the dense model predicted
    :param started: by :func:`time.monotonic`
    """
    settings = prepared.settings
    costs: dict[str, float] = {}
    now, dense = Census.of(model).total(), prepared.space.dense.total()
    for target in settings.targets:
        if target.kind == "speed":
            costs[target.kind] = 1 / _speedup(prepared, model)
        else:
            length = settings.workload.length
            share = counted(target.kind, now, length) / counted(target.kind, dense, length)
            costs[target.kind] = float(share)
    loss = held_back.divergence(model)
    return FitResult(plan, loss, costs, sizes_of(model), time.monotonic() - started)


def _speedup(prepared: Prepared, model: Any) -> float:
    """How many times as fast as the dense model; both of random weights, apart from hooks."""
    workload, device, shapes = prepared.settings.workload, prepared.device, prepared.space.shapes
    models = {"dense": shapes.random({}, device), "now": shapes.like(model).random({}, device)}
    latency = measure(models, workload, device, repeats=9)
    return float(latency.speedup("now", phase_of(latency), workload.batch))
