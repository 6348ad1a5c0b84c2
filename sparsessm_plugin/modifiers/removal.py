"""What the modifiers that remove parts of mixers share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import (
    QuantizationMetadata,
    initialize_module_for_quantization,
)
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.cost import kept
from sparsessm_plugin.dependency_graph import MixerDependencyGraph
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, iter_mixers
from sparsessm_plugin.families.config_levels import language_field
from sparsessm_plugin.modifiers.calibration import MixerModifier
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.refit.compensation import RIDGES, USUAL_RIDGE, Regression, best_ridge
from sparsessm_plugin.solvers.objective import relative
from sparsessm_plugin.training.distillation import Distillation

# Tokens that a pass over the calibration inputs looks at together.
_TOKENS = 8192
# Fewer than this and the fit follows the text instead of the language.
_TOKENS_PER_CHANNEL = 16


class CalibrationInputs:
    """What entered one mixer, kept until all of it has been seen; on a GPU only if that has room.

    Of several ranks each keeps its share; ``tokens`` counts this one's until :meth:`join`.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor | None]] = []
        self.tokens = 0

    def join(self, name: str) -> None:
        """Count the tokens of all ranks, once this mixer has seen all the data."""
        self.tokens = sum(distributed.gather(f"tokens of {name}", self.tokens))

    @property
    def rows(self) -> int:
        """Sequences of this rank."""
        return sum(len(hidden_states) for hidden_states, _ in self._batches)

    def add(
        self, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> Iterator[tuple[int, slice]]:
        """Keep a batch: (b, L, hidden_size) and, if it is padded, (b, L).

        :return: the numbers under which it is kept, and the rows of each
        """
        if attention_mask is not None and bool(attention_mask.bool().all()):
            attention_mask = None
        rows, length = hidden_states.shape[:2]
        self.tokens += rows * length if attention_mask is None else int(attention_mask.sum())
        step = max(1, _TOKENS // length)
        parts = [slice(start, start + step) for start in range(0, rows, step)]
        first = len(self)
        for part in parts:
            mask = None if attention_mask is None else attention_mask[part].cpu()
            self._batches.append((kept(hidden_states[part].detach()), mask))
        return enumerate(parts, first)

    def __len__(self) -> int:
        return len(self._batches)

    def get(
        self, i: int, device: torch.device, dtype: torch.dtype | None = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """Batch i on a device, in a dtype or as it came."""
        hidden_states, mask = self._batches[i]
        hidden_states = hidden_states.to(device).to(dtype or hidden_states.dtype)
        return hidden_states, None if mask is None else mask.to(device)

    def iterate(self, adapter: MixerAdapter) -> Iterator[tuple[int, MixerQuantities]]:
        """The recurrence's quantities, batch by batch, as the mixer makes them now."""
        for i in range(len(self)):
            yield i, adapter.quantities(*self.get(i, adapter.A_log.device))


class RemovalModifier(MixerModifier):
    """A modifier that makes every mixer smaller along one axis, all to the same size.

    Subclasses implement :meth:`shrink`, which turns a float32 copy of a mixer into a smaller
    one. Only then is the mixer of the model changed, over its dependency graph. Once all
    mixers are, the model's config follows, also in what is saved.

    With ``distill_steps`` the mixers of the smaller model are then fitted, all together, to what
    the dense model predicted for the calibration data. No labels; the one thing here that
    looks beyond a layer, and slow on a CPU. It gains from much more text than a layer's fit,
    which ``layer_batches`` leaves with less.
    """

    changes_inputs: ClassVar[bool] = False  # of Linear layers: what is removed enters one

    layer_batches: int | None = Field(default=None, ge=1)
    distill_steps: int = Field(default=0, ge=0)
    distill_learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)

    _distillation: Distillation | None = PrivateAttr(default=None)
    _distilled: dict[str, Any] | None = PrivateAttr(default=None)
    _inputs: dict[str, CalibrationInputs] = PrivateAttr(default_factory=dict)
    _layers: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _fields: dict[str, Any] = PrivateAttr(default_factory=dict)

    # -- for subclasses --------------------------------------------------------------

    def shrink(
        self, adapter: MixerAdapter, inputs: CalibrationInputs
    ) -> tuple[str, list[int], MixerAdapter, dict[str, Any]]:
        """Decide what to remove and fit the rest.

        :param adapter: a float32 copy of the mixer, which may be changed
        :param inputs: what entered the mixer; empty where no data is asked for
        :return: axis, removed indices, adapter of the smaller float32 mixer, report entry
        """
        raise NotImplementedError

    # -- before calibration ----------------------------------------------------------

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        adapters = super().matching_mixers(model)
        who = type(self).__name__
        if len(adapters) != len(list(iter_mixers(model))):
            raise SparseSSMError(
                f"{who}: targets and ignore leave {len(adapters)} of "
                f"{len(list(iter_mixers(model)))} mixers; all must shrink to one size, because "
                "transformers, mamba-ssm and vLLM read one size for all layers from the config"
            )
        first = adapters[0]
        for adapter in adapters:
            if adapter.sizes != first.sizes:
                raise SparseSSMError(
                    f"{who}: {adapter.name} has other sizes than {first.name} "
                    f"({adapter.sizes} and {first.sizes}): it was pruned already, or the "
                    "checkpoint is damaged; no stock loader takes sizes by layer"
                )
        self._check_config(model, first)
        return adapters

    def _check_config(self, model: nn.Module, adapter: MixerAdapter) -> None:
        config = getattr(model, "config", None)
        if config is None:
            return
        for field, size in adapter.config_sizes().items():
            said = language_field(config, field)
            if said is not None and said != size:
                raise SparseSSMError(
                    f"{type(self).__name__}: the config says {field} = {said}, the weights of "
                    f"{adapter.name} have {size}; load a checkpoint whose config fits it"
                )

    def prepare(self, state: State) -> None:
        for adapter in self.matching_mixers(state.model):
            if _quantized_modules(adapter.mixer):
                raise SparseSSMError(
                    f"{type(self).__name__}: {adapter.name} is quantized, or a modifier that "
                    "comes earlier in the recipe quantizes it; remove first, then quantize"
                )
        super().prepare(state)

    # -- calibration -----------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        if self.distill_steps:
            with self._released_on_error(), self._cost.stage("dense predictions"):
                self._distillation = Distillation(state.model, self.batches, "distill_steps")

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        seen = self._cost.batches(adapter.name)  # this one too
        if self.layer_batches is None or seen <= self.layer_batches:
            inputs = self._inputs.setdefault(adapter.name, CalibrationInputs())
            inputs.add(hidden_states, attention_mask)

    def compress(self, adapter: MixerAdapter) -> None:
        with _new_quantization_parameters(adapter.mixer):
            self._compress_mixer(adapter)

    def _compress_mixer(self, adapter: MixerAdapter) -> None:
        started = time.perf_counter()
        inputs = self._inputs.pop(adapter.name, CalibrationInputs())
        inputs.join(adapter.name)
        self.check_mixer(adapter)  # again: an earlier modifier may have made it smaller
        if self.requires_calibration_data and inputs.tokens == 0:
            raise SparseSSMError(f"{adapter.name} saw no calibration tokens; nothing was removed")
        few = _TOKENS_PER_CHANNEL * adapter.sizes.intermediate_size
        if self.requires_calibration_data and inputs.tokens < few:
            logger.warning(
                f"{adapter.name}: {inputs.tokens} calibration tokens are few for "
                f"{adapter.sizes.intermediate_size} channels; what is fitted to them may not "
                f"hold elsewhere, give {few} or more"
            )
        axis, removed, small, entry = self.shrink(adapter.float_clone(), inputs)
        fitted_values = distributed.share(
            f"weights of {adapter.name}",
            lambda: list(small.mixer.parameters()),
            device=adapter.A_log.device,
        )
        for parameter, value in zip(small.mixer.parameters(), fitted_values, strict=True):
            parameter.copy_(value)
        for name, parameter in small.mixer.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise SparseSSMError(
                    f"{adapter.name}.{name} became NaN or infinite while it was fitted"
                )
        group = MixerDependencyGraph(adapter).get_axis_group(axis, removed)
        logger.debug(str(group))
        group.prune()
        for path, module in adapter.mixer.named_modules():
            fitted = small.mixer.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = fitted.get_parameter(name).to(parameter)
                update_offload_parameter(module, name, value)
        self._fields = group.config_fields
        entry = {
            "name": adapter.name,
            "axis": axis,
            "before": group.old_size,
            "after": group.new_size,
            "removed": removed,
            "tokens": inputs.tokens,
            **entry,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self._layers.append(entry)
        logger.info(f"{adapter.name}: removed {len(removed)} of {group.old_size} {axis}")

    def finish(self, state: State) -> None:
        if self._fields:
            change_config(state.model, self._fields)
            self._fields = {}
        if self._distillation is not None:
            with self._released_on_error(), self._cost.stage("distill"):
                self._distilled = self._distillation.fit(
                    state.model, self.distill_steps, self.distill_learning_rate
                )
            self._distillation = None

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._inputs.clear()
        self._distillation = None
        return super().on_finalize(state, **kwargs)

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            with super()._released_on_error():
                yield
        except Exception as error:
            if not self._layers or (not self._pending and self._distillation is None):
                raise
            state = "partly pruned and of no use; load it again"
            if not self._pending:
                state = "pruned and not distilled"
            raise SparseSSMError(
                f"{error} - the model in memory is now {state}. Nothing was saved"
            ) from error

    # -- report ----------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a layer, totals."""
        before = sum(layer["before"] for layer in self._layers)
        removed = sum(len(layer["removed"]) for layer in self._layers)
        return {
            "modifier": type(self).__name__,
            "settings": self.model_dump(exclude=set(Modifier.model_fields), exclude_none=True),
            "layers": self._layers,
            **({"distillation": self._distilled} if self._distilled else {}),
            "cost": self._cost.to_dict(),
            "total": {
                "unit": self._layers[0]["axis"] if self._layers else "entries",
                "entries": before,
                "pruned": removed,
                "sparsity": removed / before if before else 0.0,
                "seconds": round(sum(layer["seconds"] for layer in self._layers), 3),
            },
        }


def _quantized_modules(mixer: nn.Module) -> list[nn.Module]:
    return [m for m in mixer.modules() if getattr(m, "quantization_scheme", None) is not None]


@contextmanager
def _new_quantization_parameters(mixer: nn.Module) -> Iterator[None]:
    """Let a quantization modifier that comes later find scales of the new sizes.

    LLM Compressor initialises all modifiers of a recipe before it runs the first one, so a
    mixer may carry scales that have no values yet, one a row of its weights as they were.
    """
    modules = _quantized_modules(mixer)
    for module in modules:
        QuantizationMetadata.clear_all_qparams(module)
    try:
        yield
    finally:
        for module in modules:
            status = module.quantization_status
            initialize_module_for_quantization(module)
            module.quantization_status = status


def nearest(fits: Callable[[int], bool], keep: int, size: int) -> str:
    """Advice to keep the next smaller or the next larger number that fits, out of a size."""
    below = next((n for n in range(keep - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(keep + 1, size) if fits(n)), None)
    numbers = [str(number) for number in (below, above) if number is not None]
    return f"keep {' or '.join(numbers)}" if numbers else f"no number below {size} fits"


# -- steps that both modifiers take ------------------------------------------------------


def remove(adapter: MixerAdapter, axis: str, removed: list[int]) -> MixerAdapter:
    """A smaller float32 copy of a mixer."""
    small = adapter.float_clone()
    MixerDependencyGraph(small).get_axis_group(axis, removed).prune()
    return small


def dense_outputs(adapter: MixerAdapter, inputs: CalibrationInputs) -> list[Tensor]:
    """(b, L, hidden_size) output of the mixer for every batch; on a GPU only if that has room."""
    return [kept(adapter.output(q, scan(q))) for _, q in inputs.iterate(adapter)]


def masked_error(target: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
    """target - output (b, L, hidden_size), zero at padding."""
    error = target - output
    return error if mask is None else error * mask[..., None]


def fit_out_proj(small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor]) -> None:
    """Regress the dense outputs on the smaller mixer's out_proj input, in place.

    How strongly the weight is held where it was is chosen on one sequence in four, which the
    others do not see; then all of them are fitted. Fewer than four get the usual strength.
    """
    weight = small.mixer.out_proj.weight
    fitted, held = Regression(weight), Regression(weight)
    rows = distributed.gather("sequences for out_proj", inputs.rows)
    row = sum(rows[: distributed.rank()])
    for i, q in inputs.iterate(small):
        x = small.out_input(q, scan(q))
        error = masked_error(targets[i].to(x.device), small.mixer.out_proj(x), q.mask)
        if q.mask is not None:
            x = x * q.mask[..., None]
        aside = torch.arange(row, row + len(x), device=x.device) % 4 == 3
        fitted.add(x[~aside], error[~aside])
        held.add(x[aside], error[aside])
        row += len(x)
    for part in (fitted, held):
        distributed.reduce_fields("sums for out_proj", part, to=0)

    def solve() -> list[Tensor]:
        ridge = best_ridge(fitted, held, RIDGES) if sum(rows) > 3 else USUAL_RIDGE
        return [] if ridge is None else [(fitted + held).solve(ridge)]

    for change in distributed.share("change of out_proj", solve, device=weight.device):
        weight.add_(change.to(weight.dtype))


def relative_error(small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor]) -> float:
    """Squared error of the mixer's output over the dense output's square."""
    wrong = total = 0.0
    for i, q in inputs.iterate(small):
        target = targets[i].to(q.u.device)
        output = small.output(q, scan(q))
        wrong += float(masked_error(target, output, q.mask).double().square().sum())
        total += float(masked_error(target, torch.zeros_like(target), q.mask).square().sum())
    wrong, total = distributed.total("error of the output", wrong, total)
    return relative(wrong, total)
