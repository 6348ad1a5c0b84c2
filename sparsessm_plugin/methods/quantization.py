"""Quantize weights by GPTQ under the mask of their zeros.

What stands here needs no LLM Compressor: the grid of a weight's extremes, the Hessian of a layer's
inputs, and the sweep that rounds and masks column by column. What
:class:`sparsessm_plugin.SparseGPTQModifier` adds is what LLM Compressor's GPTQModifier brings: its
observers (other grids than that of the extremes, scales of a scale), scales of activations, several
ranks, weights that several layers share, experts that are taken apart, and saving in a compressed
format.
"""

import time
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    fake_quantize,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_named_modules
from loguru import logger
from pydantic import Field, field_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import (
    MixerAdapter,
    find_mixers,
)
from sparsessm_plugin.families.quantizable import check_quantized, quantized_weights
from sparsessm_plugin.families.shared_weights import weight_holders
from sparsessm_plugin.methods.base import MethodResult, MixerMethod, TargetSettings, Total, Watch
from sparsessm_plugin.methods.projections.statistics import without_padding
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.selection.masks import count_true
from sparsessm_plugin.solvers.gptq import masked_gptq

# grids that follow from the extremes of a weight alone
_SIMPLE = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)


class QuantizationSettings(TargetSettings):
    """What is quantized, and how.

    :param scheme: preset such as ``W4A16`` or ``W8A8``, or the fields of compressed-tensors'
        QuantizationArgs for weights; of a preset only what it says of weights is done
    :param targets: modules to quantize, by name, class name or ``re:`` pattern
    :param ignore: modules to leave alone, likewise; what stands outside the layers, as lm_head
        does, must be among them
    :param block_size: columns quantized before the updates reach the rest of the weight
    :param dampening_frac: added to the diagonal of the Hessian, as a share of its mean
    :param actorder: order of the columns: ``static``: by descending diagonal of the Hessian | None:
        as they stand
    """

    scheme: str | QuantizationArgs
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    block_size: int = Field(default=128, ge=1)
    dampening_frac: float = Field(default=0.01, ge=0.0, le=1.0, allow_inf_nan=False)
    actorder: Literal["static"] | None = "static"
    bypass_divisibility_checks: Literal[False] = Field(default=False, exclude=True)

    @field_validator("scheme")
    @classmethod
    def _check_scheme(cls, value: str | QuantizationArgs) -> str | QuantizationArgs:
        if isinstance(value, str) and value.upper() not in PRESET_SCHEMES:
            raise ValueError(f"must be one of {', '.join(PRESET_SCHEMES)}, got {shown(value)}")
        weights = _weights_of(value)
        if weights is None or weights.strategy not in _SIMPLE:
            raise ValueError(
                "must give weights a scale a tensor, channel or group; for others there is "
                "SparseGPTQModifier"
            )
        return value

    @property
    def weights(self) -> QuantizationArgs:
        """The grid of the weights."""
        weights = copy(cast(QuantizationArgs, _weights_of(self.scheme)))
        weights.actorder = None if self.actorder is None else ActivationOrdering.STATIC
        return weights

    @property
    def resolved_config(self) -> QuantizationConfig:
        """The scheme and its targets as compressed-tensors has them."""
        scheme = QuantizationScheme(targets=self.targets, weights=self.weights)
        return QuantizationConfig(config_groups={"group_0": scheme})


@dataclass(frozen=True)
class QuantizedWeight:
    """What became of a weight.

    :param name: of its module
    :param shape: [rows, columns]
    :param entries: how many it has
    :param pruned: zeros that were found and kept
    :param zeros: all zeros afterwards
    :param error: tr((W - Q) H (W - Q)^T), with H the mean over sequences of 2 X X^T
    :param dampening: share of the mean diagonal with which H could be factorised
    :param seconds: that it took
    """

    name: str
    shape: list[int]
    entries: int
    pruned: int
    zeros: int
    error: float
    dampening: float
    seconds: float


@dataclass(frozen=True)
class QuantizationTotal(Total):
    """Over all weights; ``pruned`` and ``sparsity`` count the zeros that were kept.

    :param zeros: all zeros afterwards
    """

    zeros: int


@dataclass(frozen=True)
class QuantizationResult(MethodResult):
    """What was done: a :class:`QuantizedWeight` a weight.

    :param scales: by name of a module, (rows or 1, groups)
    :param zero_points: likewise, of grids that are not symmetric
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    zero_points: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layers: Sequence[QuantizedWeight],
        scales: dict[str, Tensor] | None = None,
        zero_points: dict[str, Tensor] | None = None,
    ) -> "QuantizationResult":
        """Of its weights."""
        zeros = sum(layer.zeros for layer in layers)
        total = QuantizationTotal(**asdict(Total.of(layers)), zeros=zeros)
        return cls(tuple(layers), total, {}, scales or {}, zero_points or {})

    def to_dict(self) -> dict[str, Any]:
        """For a report; without tensors."""
        return {"layers": [asdict(layer) for layer in self.layers], "total": asdict(self.total)}


class MaskedQuantization(MixerMethod[QuantizationSettings]):
    """Quantizes the weights of one layer after the other, and keeps their zeros."""

    def __init__(self, settings: QuantizationSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._modules: dict[str, Any] = {}  # not yet quantized
        self._hessians: dict[str, Tensor] = {}  # (columns, columns) float32, sum of 2 X X^T
        self._sequences: dict[str, int] = {}
        self._layers: list[QuantizedWeight] = []
        self._scales: dict[str, Tensor] = {}
        self._zero_points: dict[str, Tensor] = {}

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """All mixers, after a check of what is to be quantized; the meta device will do.

        :raises SparseSSMError: see :func:`check_quantized`; a target that matches nothing, a
            weight that several modules share, or one that stands outside the layers
        """
        self._matching_modules(model)
        return find_mixers(model)

    def _matching_modules(self, model: nn.Module) -> dict[str, Any]:
        settings, holders = self.settings, weight_holders(model)
        for target in settings.targets:
            if next(match_named_modules(model, [target]), None) is None:
                raise SparseSSMError(
                    f"{self.who}.targets: {shown(target)} matches no module of the model"
                )
        found = {name: module for name, (module, _) in quantized_weights(settings, model).items()}
        if not found:
            raise SparseSSMError(
                f"{self.who}.ignore: {shown(settings.ignore)} leaves nothing of targets "
                f"{shown(settings.targets)}"
            )
        layers = tuple(f"{name}." for name in Replay(model).layers)
        for name in found:
            if name in holders or not name.startswith(layers):
                why = "shares its weight" if name in holders else "stands outside the layers"
                raise SparseSSMError(
                    f"{self.who}: {name} {why}; add {name!r} to ignore or use SparseGPTQModifier"
                )
        check_quantized(settings, model, self.who)
        return found

    def prepare(self, model: nn.Module) -> None:
        if distributed.is_distributed():
            raise SparseSSMError(f"{self.who} runs in one process; use SparseGPTQModifier")
        self._model = model
        self._modules = self._matching_modules(model)
        for name, module in self._modules.items():
            if not is_finite(module.weight):
                raise SparseSSMError(
                    f"{name}.weight holds NaN or infinite values; nothing was quantized"
                )

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        self._batches = batches
        return [Watch(m, partial(self._add, name)) for name, m in self._modules.items()]

    @torch.no_grad()
    def _add(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in self._modules:
            return  # the pass that only asks for what the quantized layer gives
        x = args[0]
        if not is_finite(x):
            raise SparseSSMError(
                f"{name}: its input holds NaN or infinite values during calibration; "
                f"{self._in_memory()}"
            )
        self._sequences[name] = self._sequences.get(name, 0) + (len(x) if x.ndim > 2 else 1)
        x = without_padding(x, self.batches.mask(self.current_batch()))
        rows = 2**0.5 * x.flatten(0, -2).float().t()
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(2 * rows.shape[:1], device=rows.device)
        self._hessians[name] += rows @ rows.t()

    def layers_done(self, modules: Sequence[nn.Module]) -> None:
        done = {id(module) for module in modules}
        for name in [name for name, module in self._modules.items() if id(module) in done]:
            self._quantize(name)

    def end(self) -> None:
        for name in list(self._modules):
            self._quantize(name)
        self.release()

    @torch.no_grad()
    def _quantize(self, name: str) -> None:
        module, hessian = self._modules.pop(name), self._hessians.pop(name, None)
        if hessian is None:
            raise SparseSSMError(f"{name} saw no calibration tokens; {self._in_memory()}")
        if not is_finite(hessian):
            raise SparseSSMError(
                f"{name}: the Hessian of its inputs holds NaN or infinite values, which have "
                f"overflowed; {self._in_memory()}"
            )
        weight, args = module.weight.detach(), self.settings.weights
        scale, zero_point = extremes_grid(weight, args)
        try:
            found, quantized = quantize_weight(
                name,
                weight.float(),
                hessian / self._sequences.pop(name),
                args,
                scale,
                zero_point,
                block_size=self.settings.block_size,
                dampening=self.settings.dampening_frac,
            )
        except SparseSSMError as error:
            raise SparseSSMError(f"{error}; {self._in_memory()}") from error
        update_offload_parameter(module, "weight", quantized.to(weight.dtype))
        self._layers.append(found)
        self._scales[name] = scale
        if zero_point is not None:
            self._zero_points[name] = zero_point

    def _in_memory(self) -> str:
        """What has become of the model so far, for a message."""
        done = len(self._layers)
        return f"modules quantized before it: {done}" if done else "nothing was quantized"

    def release(self) -> None:
        super().release()
        self._hessians.clear()

    def result(self) -> QuantizationResult:
        return QuantizationResult.of(self._layers, self._scales, self._zero_points)


def quantize_pruned(
    model: Any, batches: Iterable[Any], scheme: str | dict[str, Any], **settings: Any
) -> QuantizationResult:
    """Round the weights of a model to a grid by GPTQ, in place, and keep every zero.

    The model keeps its dtype and its modules: weights become values of their grid, and the result
    has the scales. To save in a compressed format, or to quantize activations, use
    :class:`sparsessm_plugin.SparseGPTQModifier`. Experts that stand in one tensor are no Linear
    layers and stay.

    :param model: transformers model
    :param batches: what the model's forward takes
    :param scheme: see :class:`QuantizationSettings`
    :param settings: its other fields, such as ``ignore``
    :return: one :class:`QuantizedWeight` a weight, and the scales
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    chosen = QuantizationSettings.of("quantize_pruned", {"scheme": scheme, **settings})
    method = MaskedQuantization(chosen, "quantize_pruned")
    run(method, model, batches)
    return method.result()


# -- one weight ----------------------------------------------------------------------------


def quantize_weight(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    args: QuantizationArgs,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    block_size: int,
    dampening: float,
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize a weight under the mask of its zeros.

    :param name: of its module
    :param weight: (rows, columns) float32
    :param hessian: (columns, columns) mean over sequences of 2 X X^T
    :param args: its grid
    :param scale: (rows or 1, groups), or (rows, columns) with a scale for each entry
    :param zero_point: likewise; None for symmetric grids
    :param block_size: see :func:`sparsessm_plugin.solvers.gptq.masked_gptq`
    :param dampening: likewise
    :return: what was done, and (rows, columns) values of the grid
    :raises SparseSSMError: the Hessian cannot be factorised
    """
    started, keep, device = time.perf_counter(), weight != 0, weight.device
    logger.info(f"Quantizing {name}, of which {1 - float(keep.float().mean()):.1%} is zero")
    try:
        result = masked_gptq(
            weight,
            hessian.to(device),
            keep,
            partial(_fake_quantize, _by_channel(args)),
            scale.to(device),
            zero_point.to(device) if zero_point is not None else None,
            block_size=block_size,
            dampening=dampening,
            activation_order=bool(args.actorder),
        )
    except ValueError as error:
        raise SparseSSMError(f"{name} cannot be quantized: {error}") from error
    found = QuantizedWeight(
        name=name,
        shape=list(keep.shape),
        entries=keep.numel(),
        pruned=count_true(~keep),
        zeros=count_true(result.weight == 0),
        error=result.error,
        dampening=result.dampening,
        seconds=round(time.perf_counter() - started, 3),
    )
    return found, result.weight


def extremes_grid(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a weight from the smallest and the largest entry of each group.

    :param weight: (rows, columns)
    :param args: with a scale a tensor, channel or group
    :return: (rows or 1, groups) each; no zero point for symmetric grids
    """
    if args.strategy == QuantizationStrategy.TENSOR:
        groups = weight.reshape(1, 1, -1)
    elif args.strategy == QuantizationStrategy.CHANNEL:
        groups = weight.unsqueeze(1)
    else:
        groups = weight.unflatten(-1, (-1, int(args.group_size or weight.shape[-1])))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return scale, None if args.symmetric else zero_point


def _weights_of(scheme: str | QuantizationArgs) -> QuantizationArgs | None:
    if isinstance(scheme, str):
        return preset_name_to_scheme(scheme, []).weights
    return scheme


def _by_channel(args: QuantizationArgs) -> QuantizationArgs:
    """The same grid for a single column, which has a scale a row."""
    channel = copy(args)
    channel.strategy = QuantizationStrategy.CHANNEL
    return channel


def _fake_quantize(
    args: QuantizationArgs, values: Tensor, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    return fake_quantize(values, scale, zero_point, args)
