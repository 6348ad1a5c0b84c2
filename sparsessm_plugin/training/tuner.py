"""Steps along the gradients of a model's weights, taken back where they do not help."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from sparsessm_plugin.backends.capture import CapturedStep, capture
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.distributed import average, is_distributed, rank, total, world_size
from sparsessm_plugin.progress import Stage, clock
from sparsessm_plugin.training.budget import Budget, Plan, batch_of_step
from sparsessm_plugin.training.flat import FlatWeights
from sparsessm_plugin.training.gradients import (
    LossFunction,
    differentiable,
    loss_of,
    positions,
    to_device,
)
from sparsessm_plugin.training.non_finite import (
    NonFiniteError,
    NonFiniteGradients,
    first_non_finite,
)
from sparsessm_plugin.training.resume import ResumeFile

_CLIP = 1.0  # norm of the gradient of all parameters that a tuning step goes along
_MEASURED = 8  # batches whose loss is looked at before and after the steps
_COMPARED = 24  # bytes a weight that are held while a captured step is compared
_WORTHWHILE = 16  # steps from which on a CUDA graph, which costs a few, is made of one
_MANY = 12  # times that text is read again, from which on it is learnt by heart


@dataclass(frozen=True)
class Tuning:
    """What some steps of a :class:`Tuner` did.

    :param before: loss before the steps
    :param after: loss after them, NaN where their gradients were no numbers
    :param loss: mean loss of the batches that the steps went along
    :param diverged: the loss did not fall, and the weights are what they were before
    """

    before: float
    after: float
    loss: float
    diverged: bool


class Tuner:
    """Adam or Muon on float32 weights of a model, some of which stay zero; see FlatWeights.

    The learning rate rises over the first tenth of the plan and falls along a cosine.

    Attributes: ``budget``, how much of the plan is used up.

    :param model: changed in place, weights and nothing else
    :param parameters: what is tuned, by name
    :param batches: taken in turn, each time all were read in another order
    :param plan: over all calls of :meth:`run`
    :param who: asks for it, for messages
    :param loss_fn: see :func:`loss_of`
    :param non_finite: counts the batches that are skipped
    :param measure: gives the loss that steps are to lower; default the mean over the first batches
    :param resume: where to keep what an interrupted run goes on from
    :param capturable: whether ``loss_fn`` of a batch never waits for a GPU; steps along such
        batches run as one CUDA graph
    :param matrices: names of the parameters that Muon steps
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Sequence[Any],
        plan: Plan,
        who: str = "tuning",
        *,
        loss_fn: LossFunction | None = None,
        non_finite: NonFiniteGradients | None = None,
        measure: Callable[[], float] | None = None,
        resume: ResumeFile | None = None,
        capturable: Callable[[Any], bool] | None = None,
        matrices: Collection[str] = (),
    ):
        self.model = model
        self.parameters = dict(parameters)
        self.batches = batches
        self.plan = plan
        self.who = who
        self.loss_fn = loss_fn
        self.non_finite = non_finite or NonFiniteGradients()
        self.measure = measure
        self.budget = Budget(plan)
        self._resume = resume
        self._capturable = capturable
        self._captured: CapturedStep | None = None
        self._may_capture = True
        self._usable: frozenset[int] | None = None
        self._weights = FlatWeights(self.parameters, matrices)
        known = getattr(batches, "tokens", None)  # reading a batch may fetch more than its tokens
        self._counts = known or [positions(batch) for batch in batches]
        self._autocast = autocast_dtype(model, self._weights.device, plan.precision)
        self._units_before = 0
        self._seconds = 0.0  # that all ranks agree on
        self._whole = True  # no step is half taken
        self._told = False

    def run(self, pruned: Mapping[str, Tensor], part: int = 1, parts: int = 1) -> Tuning:
        """Take steps, and take them back where they do not lower the loss.

        The loss is the mean over the first batches, where there are many.

        :param pruned: bool by name, True where a weight is zero and stays so
        :param part: go on to the end of so many
        :param parts: equal parts of the plan
        :raises NonFiniteError: the loss is not finite before the first step
        :raises SparseSSMError: see :func:`loss_of`
        """
        self._usable = None
        before = self._measured()
        if not math.isfinite(before):
            where = self._where_it_begins()
            raise NonFiniteError(
                f"the loss is {before:g} before the first gradient step"
                f"{f', which begins in {where}' if where else ''}; nothing can be tuned"
            )
        skipped = len(self.non_finite.skipped)
        loss = after = math.nan
        lower = False
        try:
            with self._weights.attached():
                with suppress(NonFiniteError):
                    loss = self.take(pruned, part, parts)
                    after = self._measured()
                lower = after < before
                if lower:
                    self._weights.write_back()
                    self._save(finished=part == parts)
        finally:
            if not lower:
                del self.non_finite.skipped[skipped:]
                self._weights.forget()
                self._weights.take()
        return Tuning(before, after, loss, diverged=not lower)

    def _measured(self) -> float:
        with torch.no_grad():
            return self._mean_loss() if self.measure is None else self.measure()

    def _mean_loss(self) -> float:
        device = self._weights.device
        losses: dict[int, float] = {}
        summed = weight = 0.0
        with self._differentiable():
            for i, batch in enumerate(self.batches[:_MEASURED]):
                if self._usable is not None and i not in self._usable:
                    continue
                loss, count = loss_of(self.model, to_device(batch, device), self.loss_fn)
                # a batch that is skipped says nothing before the steps, and so nothing after them
                if count and (self._usable is not None or math.isfinite(float(loss.detach()))):
                    losses[i] = float(loss.detach())
                    summed, weight = summed + count * losses[i], weight + count
        if self._usable is None:
            self._usable = frozenset(losses)
        summed, weight = total("loss of the batches", summed, weight)
        return summed / weight if weight else math.nan

    def _where_it_begins(self) -> str | None:
        """In the first of the batches whose loss is not finite; None if another rank has it."""
        with differentiable(self.model, self.parameters.values()):
            for batch in self.batches[:_MEASURED]:
                where = first_non_finite(self.model, self._loss_of(batch))
                if where is not None:
                    return where
        return None

    def _loss_of(self, batch: Any) -> Callable[[], Any]:
        ready = to_device(batch, self._weights.device)
        return partial(loss_of, self.model, ready, self.loss_fn)

    def _differentiable(self) -> AbstractContextManager[None]:
        most, plan = max(self._counts, default=0), self.plan
        return differentiable(self.model, self.parameters.values(), most, plan.checkpointing)

    def _precision(self) -> AbstractContextManager[Any]:
        """Around a forward pass: what was cast is let go of at its end."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._weights.device.type, self._autocast)

    # -- steps -------------------------------------------------------------------------

    def take(self, pruned: Mapping[str, Tensor], part: int = 1, parts: int = 1) -> float:
        """Take steps, wherever they lead, inside of ``FlatWeights.attached``.

        :return: the mean loss of the batches that were used
        :raises SparseSSMError: see :func:`loss_of`
        """
        weights, budget = self._weights, self.budget
        self._go_on()
        masks = weights.masks(pruned)
        weights.zero(masks)
        # on the device, so that no step waits for the one before it
        sums = torch.zeros(2, dtype=torch.float64, device=weights.device)
        behind: tuple[_Numbers, Any] | None = None
        # steps are far coarser than what TF32 rounds away
        with self._differentiable(), tf32(), self._stage(part, parts) as stage, self._timed():
            batch = self._batch(budget.done)
            weights.clear_gradients()  # what the context before has taken away
            while not budget.reached(self._seconds, part, parts):
                self._check_text()
                rate = budget.learning_rate(self._seconds)
                loss, norm, count, seconds = self._step(batch, rate, masks)
                budget.done += 1
                self._whole = True
                numbers = _Numbers(loss.detach(), norm)
                if count:
                    one = torch.ones_like(norm)
                    sums += torch.stack([loss.detach().double(), one]).where(
                        norm.isfinite(), torch.zeros_like(one)
                    )
                taken, batch = batch, self._batch(budget.done)
                # while the GPU works on this step, look at the one before
                now = (numbers, taken) if numbers.waits else None
                for one_step in (behind, None if now else (numbers, taken)):
                    if one_step is not None:
                        self._look(*one_step, stage, seconds, part, parts)
                behind = now
                self._seconds = seconds if is_distributed() else budget.elapsed()
                if self._resume is not None and self._resume.is_due():
                    self._save()
            if behind is not None:
                self._look(*behind, stage, self._seconds, part, parts)
        loss_sum, used = sums.tolist()
        return loss_sum / used if used else math.nan

    def _step(
        self, batch: Any, rate: float, masks: "list[Tensor | None]"
    ) -> tuple[Tensor, Tensor, int, float]:
        """Loss, norm of the gradients, how much the batch counts, and the seconds so far."""
        weights = self._weights
        if self._is_captured(batch):
            self._whole = False
            if self._captured is None:
                update = partial(weights.step, clip=_CLIP, masks=masks)
                if has_room(weights.device, _COMPARED * weights.numbers):
                    self._captured = capture(
                        self.who, self._new_gradients, update, weights, batch, rate
                    )
                self._may_capture = self._captured is not None
                if self._captured is not None:  # which has taken the step
                    return *self._captured.numbers(), 1, self.budget.elapsed()
            elif self._captured.takes(batch):
                return *self._captured(batch, rate), 1, self.budget.elapsed()
            self._whole = True
        if self._captured is not None:
            weights.clear_gradients()  # a captured step leaves its own
        with self._precision():
            loss, count = loss_of(self.model, batch, self.loss_fn)
        if count:
            loss.backward()
        self._whole = False
        seconds = self._average()
        norm = weights.step(rate, _CLIP, masks)
        weights.clear_gradients()
        return loss.detach(), norm, count, seconds

    def _is_captured(self, batch: Any) -> bool:
        """Whether a batch's step may run as a CUDA graph."""
        left = self.plan.steps - self.budget.done
        return (
            self._may_capture
            and (self._captured is not None or not self.plan.steps or left >= _WORTHWHILE)
            and self._capturable is not None
            and self._weights.device.type == "cuda"
            and not is_distributed()
            and self._capturable(batch)
        )

    def _new_gradients(self, batch: Any) -> Tensor:
        """The loss of a batch, and its gradients in the place of those that there are."""
        self._weights.clear_gradients()
        with self._precision():
            loss, _ = loss_of(self.model, batch, self.loss_fn)
        loss.backward()
        return loss.detach()

    def _batch(self, step: int) -> Any:
        return to_device(self.batches[batch_of_step(step, len(self.batches))], self._weights.device)

    def _average(self) -> float:
        """Mean gradients of all ranks; and the seconds that rank 0 has worked."""
        own = self.budget.elapsed()
        if not is_distributed():
            return own
        mine = own * world_size() if rank() == 0 else 0.0
        seconds = torch.tensor([mine], dtype=torch.float32)
        average("a tuning step", [*self._weights.gradients, seconds])
        return float(seconds)

    def _look(
        self, numbers: "_Numbers", batch: Any, stage: Stage, seconds: float, part: int, parts: int
    ) -> None:
        """Show how far it is, and count a batch whose gradients were no numbers."""
        loss, norm = numbers.read()
        if not math.isfinite(norm):
            self.budget.pause()
            again = partial(loss_of, self.model, batch, self.loss_fn)
            self.non_finite.skip(self.model, again, "the gradients of all weights")
            self._weights.clear_gradients()
            self.budget.go()
        stage.at(f"loss {loss:.4g}")
        stage.advance(self._units(seconds) - stage.done - self._units_before)

    # -- how far -----------------------------------------------------------------------

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.budget.go()
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.budget.pause()
            if self._whole:
                self._save()
            raise
        except BaseException as error:
            # a command is terminated by an exception of its own
            if not isinstance(error, Exception) and self._whole:
                self._save()
            raise
        finally:
            self.budget.pause()
            self._captured = None  # with the memory that it works in

    def _units(self, seconds: float) -> int:
        """Steps; or seconds, where nobody knows how many steps these allow."""
        return self.budget.done if self.plan.steps else int(seconds)

    def _stage(self, part: int, parts: int) -> Stage:
        whole = self.plan.steps or math.ceil(self.budget.limit)
        self._units_before = self._units(self._seconds)
        return Stage(f"{self.who}, gradient steps", whole * part // parts - self._units_before)

    def _check_text(self) -> None:
        """Say once that little text is read often."""
        plan, count = self.plan, len(self.batches)
        passes = max(plan.steps if not plan.minutes else 0, self.budget.done) / count
        if self._told or passes < _MANY:
            return
        self._told = True
        tokens = sum(self._counts)
        asked = f"{plan.steps} steps are {passes:.0f}"
        if plan.minutes:
            asked = (
                f"after {clock(self._seconds)} of {clock(self.budget.limit)} minutes the steps are "
                f"at the end of {passes:.0f}"
            )
        logger.warning(
            f"{self.who}: {asked} passes over {count} calibration batches ({tokens} tokens), "
            "which are then learnt by heart; give more text or ask for less"
        )

    # -- going on after an interrupt -----------------------------------------------------

    def _go_on(self) -> None:
        if self._resume is None or self.budget.done:
            return
        found = self._resume.load(self._weights, len(self.batches))
        if found is not None:
            self.budget.done, self.budget.seconds = found.done, found.seconds
            self._seconds = found.seconds
            self.non_finite.skipped[:] = found.skipped
            logger.info(
                f"{self.who}: goes on after {found.done} gradient steps, from {self._resume.path}"
            )

    def _save(self, finished: bool = False) -> None:
        if self._resume is None:
            return
        running = self.budget._since is not None
        self.budget.pause()
        self._resume.save(
            self._weights,
            len(self.batches),
            self.budget.done,
            self.budget.seconds,
            self.non_finite.skipped,
            finished,
        )
        if running:
            self.budget.go()


class _Numbers:
    """Loss and norm of a step, on their way from the device."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        both = torch.stack([loss.to(norm.device).double(), norm])
        self.waits = both.is_cuda  # otherwise they are here
        self._here = both
        if self.waits:
            self._here = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._here.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, float]:
        if self.waits:
            self._event.synchronize()
        loss, norm = self._here.tolist()
        return loss, norm


def autocast_dtype(model: nn.Module, device: torch.device, precision: str) -> torch.dtype | None:
    """What matrix products of training are made in; None where that is what the weights are in.

    Models in half precision compute as they are. Those in float32 keep their weights, and their
    matrix products run in bfloat16 where ``precision`` says so, or where it is ``auto`` and a GPU
    has them.
    """
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if floats != {torch.float32}:
        return None
    on_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and on_gpu) else None
