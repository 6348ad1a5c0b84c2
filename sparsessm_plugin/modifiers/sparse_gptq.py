"""Quantize pruned weights by GPTQ without losing their zeros."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.offload import disable_offloading, update_offload_parameter
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
)
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.helpers import (
    column_scale_window,
    prepare_batch,
    update_batch_qparams,
)
from llmcompressor.observers import Observer
from llmcompressor.utils.metric_logging import CompressionLogger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches, give_back
from sparsessm_plugin.calibration.contexts import forget_traces
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.ranks import check_ranks
from sparsessm_plugin.checkpoints.experts import check_experts_of_session
from sparsessm_plugin.checkpoints.loading import check_unwrapped
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families.quantizable import check_quantized, quantized_weights
from sparsessm_plugin.families.shared_weights import weight_holders
from sparsessm_plugin.methods.projections.statistics import without_padding
from sparsessm_plugin.methods.quantization import (
    QuantizationResult,
    QuantizedWeight,
    quantize_weight,
)
from sparsessm_plugin.modifiers.fields import MEANINGLESS, check_computed, check_given
from sparsessm_plugin.modifiers.lifecycle import (
    check_new,
    check_recipe,
    note_ids,
    read_batches,
)
from sparsessm_plugin.modifiers.offset_norms import keep_weights
from sparsessm_plugin.patterns import check_patterns

# transformers multiplies by the weights of these without calling the modules
_NEVER_CALLED = ("conv1d", "dt_proj")
_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


class SparseGPTQModifier(GPTQModifier):
    """Quantizes weights by GPTQ (arXiv 2210.17323) and keeps every zero that it finds.

    LLM Compressor's GPTQModifier writes into the zeros of a pruned weight; this one rounds and
    masks each column, and lets the columns to come make up for both. A weight without a zero
    is quantized by LLM Compressor's own code. Zeros are added where a small weight rounds to zero,
    as with every quantization.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            SparseGPTModifier:
              sparsity: 0.5
              mask_structure: "2:4"
              targets: ["re:.*in_proj$", "re:.*out_proj$"]
        quantization_stage:
          quantization_modifiers:
            SparseGPTQModifier:
              targets: [Linear]
              scheme: W4A16
              ignore: [lm_head, "re:.*dt_proj$"]

    ``ignore`` should hold lm_head: it is often tied to the embeddings, and costs most. It must
    hold dt_proj in the Mamba-1 layout: transformers reads its weight without calling it, so that
    its input is never seen and its scale would stay empty. Routers of experts are never quantized:
    where targets match one, as Linear does in Jamba, it must stand in ``ignore``, too.

    A weight that several layers share, as attention blocks of Zamba do, is quantized once, after
    its last use, by the sum of their Hessians. Packed it would not load again, which is refused.

    Lifecycle: that of GPTQModifier, after the targets have been checked on initialization.

    :param scheme: preset such as ``W4A16``, ``W8A8`` or ``FP8_DYNAMIC``, or a mapping of presets
        to targets
    :param config_groups: schemes with targets, in place of ``scheme``
    :param targets: modules to quantize, by name, class name or ``re:`` pattern; default Linear
    :param ignore: modules to leave alone, likewise
    :param block_size: columns quantized before the updates reach the rest of the weight
    :param dampening_frac: added to the diagonal of the Hessian, as a share of its mean; raised
        for a pruned weight whose Hessian is singular even so
    :param actorder: order of the columns, ``static`` (default; ``weight`` is the same) or null
    :param batched_quantization: how many weights of one shape LLM Compressor's code takes at
        once; pruned ones are taken one by one

    and all others of GPTQModifier.
    """

    block_size: int = Field(default=128, ge=1)
    dampening_frac: float = Field(default=0.01, ge=0.0, le=1.0, allow_inf_nan=False)

    meaningless_fields: ClassVar[frozenset[str]] = MEANINGLESS

    _layers: list[QuantizedWeight] = PrivateAttr(default_factory=list)
    _shared: list[list[Any]] = PrivateAttr(default_factory=list)
    _pooled: dict[int, tuple[Tensor, Tensor]] = PrivateAttr(default_factory=dict)
    _done: set[int] = PrivateAttr(default_factory=set)
    _seen: set[int] = PrivateAttr(default_factory=set)
    _batches: CalibrationBatches | None = PrivateAttr(default=None)
    _current_batch: Callable[[], int] | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any):
        check_given(type(self).__name__, fields)
        super().__init__(**fields)
        check_computed(self, fields)

    @field_validator("actorder")
    @classmethod
    def _check_order(cls, order: Any) -> Any:
        # LLM Compressor takes any text, and fails once the first layer has been calibrated
        known = [None, ActivationOrdering.STATIC, ActivationOrdering.WEIGHT]
        if order not in known:
            raise ValueError(f"must be static, weight or null, got {shown(order)}")
        return order

    @field_validator("observer", "weight_observer", "input_observer", "output_observer")
    @classmethod
    def _check_observer(cls, observer: Any) -> Any:
        # which LLM Compressor looks up once the first layer has been calibrated
        given = list(observer.values()) if isinstance(observer, Mapping) else [observer]
        known = sorted(Observer.registered_names())
        for name in given:
            if isinstance(name, str) and name not in known:
                raise ValueError(f"must be one of {', '.join(known)}, got {shown(name)}")
        return observer

    @model_validator(mode="after")
    def _check_scheme(self) -> "SparseGPTQModifier":
        if self.scheme is None and not self.config_groups:
            raise ValueError("give a scheme, such as W4A16, or config_groups")
        if self.scheme is not None and self.config_groups is not None:
            raise ValueError("give either scheme or config_groups, got both")
        return self

    def initialize(self, state: State, **kwargs: Any) -> None:
        """:raises SparseSSMError: it has quantized a model before"""
        check_new(self)
        super().initialize(state, **kwargs)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        who = type(self).__name__
        check_unwrapped(state.model)
        keep_weights(state.model)
        with distributed.together(f"{who} before calibration"):
            self.check_model(state.model)
            check_experts_of_session(state.model)
            check_recipe("initialize", self, state.model)
            self._batches = read_batches(who, state, kwargs.get("calib_data"))
        check_ranks(who, state.model, self._batches, self._settings())
        return super().on_initialize(state, **kwargs)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        self._done |= {id(module) for module in modules}
        super().on_sequential_epoch_end(state, event, modules, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._pooled:  # of layers that were never called
            self._done |= {id(module) for group in self._shared for module in group}
            self.compress_modules()
        self._check_seen(state.model)
        super().on_calibration_end(state, event, **kwargs)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        # of the layers that stay: a removal may have come before
        modules = {name: m for name, (m, _) in quantized_weights(self, state.model).items()}
        holders = weight_holders(state.model)
        self._shared = [
            [modules[name] for name in names]
            for first, names in holders.items()
            if first == names[0] and first in modules
        ]
        super().on_calibration_start(state, event, **kwargs)
        assert self._batches is not None
        self._current_batch = lambda: state.current_batch_idx
        note_ids(self, state, self._batches)

    def calibrate_module(
        self, module: nn.Module, args: tuple[Tensor, ...], _output: Tensor
    ) -> None:
        """Add the input of a module to its Hessian.

        :raises SparseSSMError: the input is not finite, or the pass reads other tokens than
            those drawn
        """
        assert self._batches is not None
        try:
            self._batches.check_ids()
            if not is_finite(args[0]):
                raise SparseSSMError(
                    f"{self._module_names[module]}: its input holds NaN or infinite values "
                    f"during calibration; {self._in_memory()}"
                )
        except SparseSSMError as error:
            distributed.fail(error)
            self.release()
            raise
        self._seen.add(id(module))
        assert self._current_batch is not None
        x = without_padding(args[0], self._batches.mask(self._current_batch()))
        super().calibrate_module(module, (x, *args[1:]), _output)

    def check_model(self, model: nn.Module) -> None:
        """:func:`check_quantized` for this modifier.

        :raises SparseSSMError: naming the first such module and what to add to ``ignore``, or a
            target that matches nothing
        """
        who, config = type(self).__name__, self.resolved_config
        targets = {t for scheme in config.config_groups.values() for t in scheme.targets}
        check_patterns([*sorted(targets), *self.ignore], model, who)
        # experts have names of their own once oneshot() has taken them apart
        if not get_non_linearized_moes(model):
            for target in sorted(targets):
                if next(match_named_modules(model, [target]), None) is None:
                    raise SparseSSMError(
                        f"{who}.targets: {shown(target)} matches no module of the model"
                    )
        check_quantized(self, model)
        check_quantizes(self, model)

    def compress_modules(self) -> None:
        """Quantize the modules that have been calibrated, of several ranks each its share.

        LLM Compressor's own way to share them out leaves what runs on the CPU different on every
        rank, unless ranks share its memory.
        """
        ready = self._pool_shared()
        self._check_hessians()
        if not distributed.is_distributed():
            super().compress_modules()
            self._share_grids(ready)
            return
        try:
            self._compress_on_ranks()
            self._share_grids(ready)
        except BaseException as error:
            distributed.fail(error)
            self.release()
            raise

    def _check_hessians(self) -> None:
        """Refuse sums that have overflowed; LLM Compressor would round by them in silence."""
        for module, hessian in self._hessians.items():
            if not is_finite(hessian):
                error = SparseSSMError(
                    f"{self._module_names[module]}: the Hessian of its inputs holds NaN or "
                    f"infinite values, which have overflowed; {self._in_memory()}"
                )
                distributed.fail(error)
                self.release()
                raise error

    def _check_seen(self, model: nn.Module) -> None:
        """Refuse a weight that no calibration data has reached: its scales were never set."""
        for group in self._shared:
            ids = {id(module) for module in group}
            if ids & self._seen:
                self._seen |= ids
        for name, (module, _) in quantized_weights(self, model).items():
            if id(module) not in self._seen:
                error = SparseSSMError(
                    f"{type(self).__name__}: no calibration data has reached {name}, so it cannot "
                    f"be quantized; give more text, or add {name!r} to ignore. {self._in_memory()}"
                )
                distributed.fail(error)
                self.release()
                raise error

    def _in_memory(self) -> str:
        """What has become of the model so far, for a message."""
        done = self._num_compressed_modules
        return f"modules quantized before it: {done}" if done else "nothing was quantized"

    def _pool_shared(self) -> list[list[Any]]:
        """Add up what layers that share a weight have seen; the first gets it once all are done.

        :return: the layers of each weight that is now to be quantized
        """
        ready = []
        for i, group in enumerate(self._shared):
            for module in group:
                if module in self._hessians:
                    hessian, count = self._hessians.pop(module), self._num_samples.pop(module)
                    if i in self._pooled:
                        before, counted = self._pooled[i]
                        hessian, count = before.to(hessian) + hessian, counted.to(count) + count
                    self._pooled[i] = hessian, count
            if i in self._pooled and all(id(module) in self._done for module in group):
                self._hessians[group[0]], self._num_samples[group[0]] = self._pooled.pop(i)
                ready.append(group)
        return ready

    def _share_grids(self, groups: list[list[Any]]) -> None:
        """Give every layer of a weight the scales that it has been quantized with."""
        for first, *others in groups:
            for module in others:
                for key in [k for k in first._parameters if k.startswith("weight_")]:
                    update_offload_parameter(module, key, getattr(first, key))
                if module.weight_observer.has_statistics:
                    module.weight_observer.delete_statistics(check_fused=True)

    @torch.no_grad()
    def _compress_on_ranks(self) -> None:
        modules = {self._module_names[module]: module for module in self._hessians}
        # of an expert that no token was sent to on this rank, others may have a Hessian
        seen = distributed.gather(
            "modules to quantize", {n: m.weight.numel() for n, m in modules.items()}
        )
        sizes = {name: size for part in seen for name, size in part.items()}
        by_name = {name: module for module, name in self._module_names.items()}
        modules = {name: by_name[name] for name in sorted(sizes)}
        owners = greedy_bin_packing(list(modules), len(seen), sizes.__getitem__)[2]
        counts = distributed.reduce_sum(
            "sequences seen", {n: self._num_samples.pop(m, None) for n, m in modules.items()}
        )
        own = []
        for owner in range(len(seen)):
            parts = {
                n: self._hessians.pop(modules[n], None) for n, o in owners.items() if o == owner
            }
            sums = distributed.reduce_sum("Hessians", parts, to=owner)
            if owner == distributed.rank():
                own = [modules[name] for name in sums]
                self._hessians.update((modules[name], hessian) for name, hessian in sums.items())
                self._num_samples.update((modules[name], counts[name]) for name in sums)
        before = len(self._layers)
        self.compress_module_list(own)
        for name, module in modules.items():
            parameters = [key for key in module._parameters if key.startswith("weight")]
            values = distributed.share(
                f"quantized {name}",
                partial(_values, module, parameters),
                owners[name],
                module.weight.device,
            )
            for key, value in zip(parameters, values, strict=True):
                update_offload_parameter(module, key, value)
            if module.weight_observer.has_statistics:
                module.weight_observer.delete_statistics(check_fused=True)
        own = [asdict(layer) for layer in self._layers[before:]]
        entries = distributed.gather("report on quantized modules", own)
        self._layers[before:] = [QuantizedWeight(**entry) for part in entries for entry in part]

    def compress_module_list(self, module_list: Iterable[nn.Module]) -> None:
        """Quantize modules from their Hessians: those with zeros here, the others upstream."""
        modules = list(module_list)
        pruned = [module for module in modules if _has_zeros(module)]
        super().compress_module_list([module for module in modules if module not in set(pruned)])
        for module in pruned:
            with torch.no_grad(), disable_offloading():
                self._compress_pruned(module)

    def _compress_pruned(self, module: Any) -> None:
        name = self._module_names[module]
        args = module.quantization_scheme.weights
        qparams = [module.weight_observer.get_qparams()]
        # (1, rows, columns), (1, columns, columns), and the observer's layouts with the 1 before
        weights, hessians, scales, zero_points, global_scales = prepare_batch(
            [module], qparams, self._hessians, self._num_samples
        )
        scale, zero_point = _of_each_entry(args, weights, scales, zero_points, global_scales)
        with CompressionLogger(module) as compression:
            try:
                found, weight = quantize_weight(
                    name,
                    weights[0],
                    hessians[0],
                    args,
                    scale,
                    zero_point,
                    block_size=self.block_size,
                    dampening=self.dampening_frac,
                )
            except SparseSSMError as error:
                self.release()
                raise SparseSSMError(f"{error}; {self._in_memory()}") from error
            compression.set_results(name="GPTQ", loss=found.error / 2)
        update_batch_qparams([module], weight[None], scales, zero_points, global_scales, args)
        self._layers.append(found)
        self._num_compressed_modules += 1

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        change_config(state.model, {})  # experts are then saved as they load
        forget_traces()
        give_back(self._batches)
        self._batches = None
        return super().on_finalize(state, **kwargs)

    def report(self) -> dict[str, Any]:
        """What was done to pruned weights: settings, one entry a weight, totals.

        ``pruned`` counts the zeros that were found and kept, ``zeros`` all zeros afterwards;
        ``error`` is tr((W - Q) H (W - Q)^T), with H the mean over sequences of 2 X X^T.
        """
        result = QuantizationResult.of(self._layers)
        return {"modifier": type(self).__name__, "settings": self._settings(), **result.to_dict()}

    def _settings(self) -> dict[str, Any]:
        return self.model_dump(
            mode="json", exclude=set(Modifier.model_fields), exclude_none=True, fallback=str
        )

    def release(self) -> None:
        """Take the hooks off the model again; safe to call at any time."""
        self.remove_hooks()
        forget_traces()
        give_back(self._batches)


def check_quantizes(modifier: Any, model: nn.Module) -> None:
    """Refuse a quantization that leaves every weight as it is.

    :param modifier: see :func:`quantized_weights`
    :param model: the meta device will do
    :raises SparseSSMError: naming what is ignored
    """
    config = modifier.resolved_config
    # experts are no Linear layers before oneshot() has taken them apart
    if quantized_weights(modifier, model) or get_non_linearized_moes(model):
        return
    targets = sorted({t for scheme in config.config_groups.values() for t in scheme.targets})
    raise SparseSSMError(
        f"{type(modifier).__name__} would quantize no weight: ignore {shown(modifier.ignore)} "
        f"leaves nothing of targets {shown(targets)}, or the scheme leaves weights as they are"
    )


def _values(module: Any, names: list[str]) -> list[Tensor]:
    return [getattr(module, name) for name in names]


def _has_zeros(module: Any) -> bool:
    return module.weight.ndim == 2 and bool((module.weight == 0).any())


def _of_each_entry(
    args: QuantizationArgs,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    global_scales: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (rows, columns) of a weight, whatever the strategy."""
    _, rows, columns = weights.shape
    group_of = None
    if args.strategy in (*_GROUPED, QuantizationStrategy.BLOCK):
        blocks = args.strategy == QuantizationStrategy.BLOCK
        width = args.block_structure[1] if blocks else args.group_size
        group_of = torch.arange(columns, device=scales.device, dtype=torch.int) // width
    scale, zero_point = column_scale_window(
        scales, zero_points, global_scales, group_of, args, rows, 0, columns
    )
    return scale[0], zero_point[0] if zero_point is not None else None
