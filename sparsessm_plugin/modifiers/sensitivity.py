"""Prune the projections of state-space mixers, each as much as it can bear."""

import math
import time
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from compressed_tensors.offload.cache import CPUCache, DiskCache
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_name
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils import calibration_forward_context
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.allocation.probe import Probe
from sparsessm_plugin.allocation.sparsity import (
    optimal_allocation,
    paper_allocation,
    uniform_allocation,
)
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.calibration.contexts import hooks_disabled, quantization_disabled
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.calibration.overflow import first_overflow
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.cost import kept as where_there_is_room
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import (
    MixerAdapter,
    check_not_quantized,
    find_mixers,
    read_out,
    router_names,
)
from sparsessm_plugin.families.fast_forward import offer
from sparsessm_plugin.families.prunable import (
    LINEAR,
    PrunableWeight,
    prunable_weights,
    vocabulary_names,
)
from sparsessm_plugin.families.shared_weights import of_several_names, weight_holders
from sparsessm_plugin.modifiers.calibration import MixerModifier, what_enters
from sparsessm_plugin.progress import Stage
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.selection.masks import (
    UNSTRUCTURED,
    check_quoted,
    check_sparsity,
    check_structure,
    parse_structure,
)
from sparsessm_plugin.solvers.objective import (
    DAMPENING,
    damped_inverse_cholesky,
    dense_target,
    gram,
    relative_error,
    window_gram,
)
from sparsessm_plugin.solvers.projections import SOLVERS
from sparsessm_plugin.solvers.sparsegpt import error_curve

# What is pruned together; a later stage sees what the stages before have left of its inputs.
_STAGES = (("in_proj",), ("conv1d", "x_proj", "dt_proj"), ("out_proj",))
_VARYING = ("in_proj", "out_proj")  # kinds that the paper's allocation varies
# share of W* in the mean of W and W* that is pruned
_TARGET_SHARE = {"own": 0.0, "mixer": 1.0, "half_way": 0.5, "dense": 1.0}
_OF_DENSE_PREFIX = ("half_way", "dense")
_CURVE = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
# From the last of these on, and up to a sparsity of 1, whose error is the output's whole energy.
_SPARSE_CURVE = (0.97, 0.98, 0.99, 0.995, 1.0)
_CURVE_ROWS, _CURVE_BLOCKS = 64, 20  # of more inputs than 20 blocks have, blocks are larger
# The optimal allocation raises no projection's sparsity further than this above the mean.
_MOST_MORE = 0.3
_LEAST_KEPT = 0.25  # where the curve goes further, of the share that is kept on average
_PROBE_SPARSITY = 0.5  # that each projection's harm is measured at
_LEAST_DIVERGENCE = 1e-9  # nats a token
# On a GPU, so many bytes of the dense model's Hessians are held at once; others wait their turn.
_MOST_HESSIANS = 8 * 2**30


class SensitivitySparseGPTModifier(MixerModifier):
    """Prunes the projections of every mixer, dt_proj and the convolution included.

    transformers never calls dt_proj and conv1d as modules, so LLM Compressor's own modifiers
    leave them dense without a word; here each gets the Hessian of what its weight multiplies. How
    many zeros a projection gets follows from its sensitivity. One-shot, without training.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            SensitivitySparseGPTModifier:
              sparsity: 0.5

    Lifecycle:

    - on_initialize: find the projections, check them, the settings and the data
    - on_calibration_start: unless nothing needs it, run the dense model over the data: every
      projection's Hessian, from these the sparsity of each, and for a dense target what enters
      each mixer. On a GPU in several passes where Hessians of all layers at once would be large
    - hooks: keep what enters each mixer behind the pruned layers before it
    - on_sequential_epoch_end: prune the projections of the mixers that are done, in the order in
      which data passes them, each with what those before it leave of its inputs
    - on_calibration_end: prune what is left, remove the hooks
    - on_finalize: restore the mixers, write the report

    :param sparsity: share of zeros in (0, 1), over all projections together; zeros of an earlier
        pruning stay and count. May be left out if ``mask_structure`` says it
    :param mask_structure: ``"0:0"`` unstructured, or ``"n:m"``: n zeros in every m inputs
    :param solver: ``alps`` (default) | ``sparsegpt`` | ``wanda`` | ``magnitude``; the last two
        leave the kept weights as they are
    :param allocation: ``uniform``: the same sparsity everywhere | ``paper``: SparseSSM, Eq. 7:
        in_proj and out_proj by rank of their Hessians' traces, all others alike | ``optimal``:
        least summed loss. Default optimal; uniform for n:m and for magnitude
    :param alpha: of ``paper``: how far a projection's sparsity may be from the mean
    :param target_output: what a projection of a mixer is to reproduce from the inputs that
        everything pruned before it leaves: ``own``: what the dense weight makes of these |
        ``mixer``: what it gives in the dense mixer behind the pruned layers | ``dense``: what it
        gives in the dense model | ``half_way``: the mean of own and dense. Default mixer for alps
        and sparsegpt. dense and half_way keep every mixer's dense input in main memory: layers x
        tokens x hidden_size numbers. Linear layers elsewhere have ``own``
    :param targets: mixers, their projections, or Linear layers elsewhere, by name, class name,
        ``re:`` pattern, or the projection's bare name such as ``in_proj``; a mixer stands for all
        its projections. Default all projections of all mixers. A weight that several layers
        share, as the attention blocks of Zamba do, is pruned once, after its last use, by the
        sum of their Hessians
    :param ignore: what to leave alone, likewise; of layers that share a weight, all with one
    :param block_size: columns whose mask SparseGPT chooses together
    :param dampening_frac: added to each Hessian's diagonal, of its mean
    :param offload_hessians: keep all Hessians in main memory between batches: slower. By default
        those wait there that would leave less than half of the accelerator's free
    :param report_path: ``.json`` file to write the report to
    """

    gathers_sums: ClassVar[bool] = True

    requires_calibration_data: bool = True

    sparsity: float | None = None
    mask_structure: str = UNSTRUCTURED
    solver: str = "alps"
    allocation: Literal["uniform", "paper", "optimal"] | None = None
    alpha: float | None = None
    target_output: Literal["own", "mixer", "half_way", "dense"] | None = None
    block_size: int = Field(default=128, ge=1)
    dampening_frac: float = Field(default=DAMPENING, ge=0.0, allow_inf_nan=False)
    offload_hessians: bool = False

    _projections: dict[str, PrunableWeight] = PrivateAttr(default_factory=dict)
    _linears: dict[str, PrunableWeight] = PrivateAttr(default_factory=dict)
    _done: set[int] = PrivateAttr(default_factory=set)
    _called_again: set[int] = PrivateAttr(default_factory=set)
    _zeros: dict[str, int] = PrivateAttr(default_factory=dict)
    _zeros_before: dict[str, int] = PrivateAttr(default_factory=dict)
    _hessians: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _tokens: dict[str, int] = PrivateAttr(default_factory=dict)
    _inputs: dict[str, CalibrationInputs] = PrivateAttr(default_factory=dict)
    _dense_inputs: dict[str, CalibrationInputs] = PrivateAttr(default_factory=dict)
    _dense_outs: dict[str, dict[int, dict[str, Tensor]]] = PrivateAttr(default_factory=dict)
    _sensitivities: dict[str, float] = PrivateAttr(default_factory=dict)
    _losses: dict[str, list[float]] = PrivateAttr(default_factory=dict)
    _probe: Probe | None = PrivateAttr(default=None)
    _state: Any = PrivateAttr(default=None)
    _model: Any = PrivateAttr(default=None)
    _layers: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _first_pass_seconds: float = PrivateAttr(default=0.0)
    _gather_seconds: float = PrivateAttr(default=0.0)

    # -- settings --------------------------------------------------------------------

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @field_validator("solver")
    @classmethod
    def _check_solver(cls, value: str) -> str:
        return SOLVERS.check(value)

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _check_mask_structure(cls, value: Any) -> Any:
        check_quoted(value)
        if isinstance(value, str):
            parse_structure(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "SensitivitySparseGPTModifier":
        n, m = parse_structure(self.mask_structure)
        if m and self.sparsity is None:
            self.sparsity = n / m
        if self.sparsity is None:
            raise ValueError('give sparsity, or mask_structure "n:m"')
        if m and abs(self.sparsity - n / m) > 1e-6:
            raise ValueError(
                f"mask_structure {self.mask_structure} makes {n / m:g} of the entries zero, "
                f"sparsity says {self.sparsity:g}"
            )
        solver = SOLVERS[self.solver]
        if self.allocation is None:
            self.allocation = "optimal" if solver.needs_hessian and not m else "uniform"
        if m and self.allocation != "uniform":
            raise ValueError(
                f"allocation {self.allocation!r} varies the sparsity, which mask_structure "
                f"{self.mask_structure} fixes; only uniform is allowed with it"
            )
        self._check_alpha()
        if self.target_output is None:
            self.target_output = "mixer" if solver.updates else "own"
        if self.target_output != "own" and not solver.updates:
            raise ValueError(
                f"target_output {self.target_output!r} needs new weights, and solver "
                f"{self.solver!r} writes none; allowed: own"
            )
        self.requires_calibration_data = solver.needs_hessian or self._needs_first_pass
        return self

    def _check_alpha(self) -> None:
        assert self.sparsity is not None
        if self.allocation != "paper":
            if self.alpha is not None:
                raise ValueError(f"alpha has no meaning for allocation {self.allocation!r}")
            return
        self.alpha = 0.04 if self.alpha is None else self.alpha  # as the authors published it
        low, high = self.sparsity - self.alpha, self.sparsity + self.alpha
        if not (self.alpha >= 0 and low >= 0 and high < 1):
            raise ValueError(
                f"alpha {self.alpha:g} makes sparsities of {low:g} to {high:g} around "
                f"{self.sparsity:g}; all must lie in [0, 1)"
            )

    @property
    def _needs_first_pass(self) -> bool:
        return self.allocation != "uniform" or self.target_output in _OF_DENSE_PREFIX

    # -- before calibration ----------------------------------------------------------

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """The mixers with a projection that ``targets`` and ``ignore`` leave.

        Looks at names and shapes only, so a model on the meta device will do.

        :raises SparseSSMError: a target without a projection, the embeddings or lm_head among the
            targets, or settings that do not fit a projection's shape
        """
        adapters = {
            p.adapter.name: p.adapter for p in self.matching_projections(model) if p.adapter
        }
        return list(adapters.values())

    def matching_projections(self, model: nn.Module) -> list[PrunableWeight]:
        """What ``targets`` and ``ignore`` leave, checked against the settings.

        :raises SparseSSMError: see :meth:`matching_mixers`
        """
        check_not_quantized(model)
        who = type(self).__name__
        adapters = find_mixers(model)
        known = {p.name: p for p in prunable_weights(model)}
        shared = {other: name for name, p in known.items() for other, _ in p.others}
        by_mixer = {a.name: {n for n, p in known.items() if p.mixer == a.name} for a in adapters}

        def named(pattern: str) -> tuple[set[str], set[str]]:
            """Names of projections that a pattern stands for, and of all that it matches."""
            matched = {name for name, _ in match_named_modules(model, [pattern])}
            found = {shared.get(name, name) for name in matched if name in known or name in shared}
            found |= {n for n, p in known.items() if _stands_alone(p, pattern)}
            for name in matched & by_mixer.keys():
                found |= by_mixer[name]
            bare = {n for n, p in known.items() if p.adapter and p.kind == pattern}
            return found | bare, matched

        ignored: set[str] = set()
        for pattern in self.ignore:
            found, matched = named(pattern)
            if not found and not matched:
                raise SparseSSMError(f"{who}.ignore: {shown(pattern)} matches nothing in the model")
            ignored |= found | matched
        names = {n for n, p in known.items() if p.adapter} if not self.targets else set()
        never = vocabulary_names(model) if self.targets else set()
        for target in self.targets:
            found, matched = named(target)
            vocabulary = never & (matched - ignored)
            if vocabulary:
                name = min(vocabulary)
                raise SparseSSMError(
                    f"{who}.targets: {shown(target)} matches {name}, which embeds or predicts "
                    f"tokens and is never pruned; add {name!r} to ignore"
                )
            found -= never
            if not found:
                routers = matched & router_names(model)
                if routers:
                    raise SparseSSMError(
                        f"{who}.targets: {shown(target)} matches {min(routers)}, which chooses "
                        "experts and is never pruned"
                    )
                raise SparseSSMError(
                    f"{who}.targets: {shown(target)} matches no projection of a mixer and no "
                    f"Linear layer; projections are {', '.join(adapters[0].projections)} of "
                    f"{adapters[0].name} and so on"
                )
            names |= found
        projections = [p for name, p in known.items() if name in names - ignored]
        if not projections:
            raise SparseSSMError(f"{who}.ignore: {self.ignore} leaves no projection")
        self._check_projections(model, projections)
        return projections

    def _check_projections(self, model: nn.Module, projections: list[PrunableWeight]) -> None:
        who = type(self).__name__
        holders = weight_holders(model)
        for projection in projections:
            others = set(holders.get(projection.name, ())) - projection.uses.keys()
            if others:
                raise SparseSSMError(
                    f"{who}: {projection.name} shares its weight with {min(others)}, which is no "
                    f"Linear layer that is pruned; add {projection.name!r} to ignore"
                )
            assert self.sparsity is not None
            try:
                check_structure(self.mask_structure, projection.weight.shape[-1], self.sparsity)
            except SparseSSMError as error:
                raise SparseSSMError(
                    f"{who}: {error} in {projection.name}; add {projection.name!r} to ignore"
                ) from error

    def prepare(self, state: State) -> None:
        super().prepare(state)
        self._projections = {p.name: p for p in self.matching_projections(state.model)}
        self._linears = {n: p for n, p in self._projections.items() if p.adapter is None}
        self._called_again = of_several_names(state.model)
        for name, projection in self._linears.items():
            if not torch.isfinite(projection.weight).all():
                raise SparseSSMError(
                    f"{name}.weight holds NaN or infinite values; nothing was pruned"
                )
        self._model = state.model

    # -- calibration -----------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        started = time.perf_counter()
        super().on_calibration_start(state, event, **kwargs)
        with self._released_on_error():
            if self.requires_calibration_data:
                self._state = state
                for projection in self._linears.values():
                    hook = partial(self._linear_hook, projection)
                    for module in projection.uses.values():
                        self.register_hook(module, hook, "forward_pre")
            if self._needs_first_pass:
                self._study_dense_model(state)
            with self._cost.stage("allocate"):
                self._allocate()
        self._first_pass_seconds = time.perf_counter() - started

    def _study_dense_model(self, state: State) -> None:
        """Find what the sparsities follow from, and what enters the mixers of the dense model."""
        keep = self.target_output in _OF_DENSE_PREFIX
        if self.allocation == "optimal":
            there = {p.name: int((p.weight == 0).sum()) for p in self._projections.values()}
            self._zeros_before = there
        for group in self._groups():
            with self._cost.stage("first_pass"):
                self._first_pass(state, group, keep)
            with self._cost.stage("allocate"):
                self._measure(group)
            keep = False
        self._probe = None

    def _groups(self) -> list[list[PrunableWeight]]:
        """The projections in parts whose Hessians a GPU holds at once; one without allocation."""
        if self.allocation == "uniform":
            return [[]]
        groups: list[list[PrunableWeight]] = [[]]
        held = 0
        for projection in self._projections.values():
            on_gpu = get_execution_device(projection.module).type == "cuda"
            size = 4 * _hessian_shape(projection).numel() if on_gpu else 0
            if groups[-1] and not self.offload_hessians and held + size > _MOST_HESSIANS:
                groups.append([])
                held = 0
            groups[-1].append(projection)
            held += size
        return groups

    @torch.no_grad()
    def _first_pass(self, state: State, group: list[PrunableWeight], keep: bool) -> None:
        """Run the dense model over the data.

        :param group: the projections whose Hessians are summed up
        :param keep: also keep what enters all mixers
        """
        adapters = list({p.adapter.name: p.adapter for p in group if p.adapter}.values())
        linears = [p for p in group if p.adapter is None]
        last = adapters[-1].name if adapters and not keep and not linears else None
        handles = {
            self.register_hook(
                adapter.mixer,
                partial(
                    self._dense_hook,
                    adapter,
                    keep=keep,
                    members=[p for p in self._of(adapter) if p in group],
                    last=adapter.name == last,
                ),
                "forward_pre",
                with_kwargs=True,
            )
            for adapter in (self._pending.values() if keep else adapters)
        }
        handles |= {
            self.register_hook(module, partial(self._linear_hook, p), "forward_pre")
            for p in linears
            for module in p.uses.values()
        }
        model: Any = state.model
        device = get_execution_device(model)
        with (
            hooks_disabled(keep=handles),
            calibration_forward_context(model),
            quantization_disabled(model),
            Stage(f"{type(self).__name__}: dense model", len(self.batches)) as stage,
        ):
            for index, batch in enumerate(self.batches):
                state.current_batch_idx = index
                with suppress(_Seen):
                    model(**tensors_to_device(batch, device))
                stage.advance()
        self.remove_hooks(handles)
        self._check_sums(group, self._hessians)

    def _dense_hook(
        self,
        adapter: MixerAdapter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        keep: bool,
        members: list[PrunableWeight],
        last: bool,
    ) -> None:
        """Look at what enters a mixer of the dense model.

        :param keep: keep it
        :param members: projections of the mixer whose Hessians it is added to
        :param last: nothing after this is looked at
        """
        hidden_states, attention_mask = what_enters(args, kwargs)
        with self._released_on_error():
            self._check_input(adapter.name, hidden_states)
            if keep:
                inputs = self._dense_inputs.setdefault(adapter.name, CalibrationInputs())
                inputs.add(hidden_states, attention_mask)
            if not members:
                return
            quantities = adapter.quantities(hidden_states, attention_mask)
            out_input = read_out(adapter, quantities)
            for projection in members:
                x = input_of(projection.kind, quantities, out_input)
                gram = gram_of(projection, x, x, quantities.mask)
                self._add_hessian(projection, gram, _count(projection, x, quantities.mask))
        if last:
            raise _Seen
        offer(adapter.mixer, hidden_states, attention_mask, out_input)

    def _linear_hook(
        self, projection: PrunableWeight, module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        if projection.name not in self._linears:
            return
        with torch.no_grad(), self._released_on_error():
            x = args[0]
            self.batches.check_ids()
            self._check_input(projection.name, x)
            mask = _mask_for(x, self.batches.mask(self._state.current_batch_idx))
            products = gram_of(projection, x, x, mask)
            self._add_hessian(projection, products, _count(projection, x, mask))

    def _add_hessian(self, projection: PrunableWeight, gram: Tensor, tokens: int) -> None:
        name = projection.name
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        if name in self._hessians:
            self._hessians[name] += gram.to(self._hessians[name].device)
        else:
            self._hessians[name] = (
                gram.cpu() if self.offload_hessians else where_there_is_room(gram)
            )

    def _of(self, adapter: MixerAdapter) -> list[PrunableWeight]:
        return [
            p for p in self._projections.values() if p.adapter and p.adapter.name == adapter.name
        ]

    def _observe_hook(
        self,
        adapter: MixerAdapter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if adapter.name in self._pending:
            with torch.no_grad(), self._released_on_error():
                self._check_input(adapter.name, what_enters(args, kwargs)[0])
        super()._observe_hook(adapter, module, args, kwargs)

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        inputs = self._inputs.setdefault(adapter.name, CalibrationInputs())
        added = inputs.add(hidden_states, attention_mask)
        size = 4 * hidden_states[..., 0].numel() * adapter.sizes.intermediate_size
        # on a GPU the mixers of compress() compute as the model does: what the dense out_proj
        # multiplies need not be made twice
        if (
            self.target_output == "mixer"
            and any(p.kind == "out_proj" for p in self._of(adapter))
            and has_room(hidden_states.device, size)
        ):
            x = read_out(adapter, adapter.quantities(hidden_states, attention_mask))
            offer(adapter.mixer, hidden_states, attention_mask, x)
            outs = self._dense_outs.setdefault(adapter.name, {})
            outs.update({number: {"out_proj": x[rows]} for number, rows in added})

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module] | None = None, **kwargs: Any
    ) -> None:
        super().on_sequential_epoch_end(state, event, modules=modules, **kwargs)
        # a layer that several places share under one name may be called again later
        once = {id(m) for m in modules or () if id(m) not in self._called_again}
        self._done |= once
        ready = [
            p
            for p in self._linears.values()
            if all(id(module) in self._done for module in p.uses.values())
        ]
        self._compress_linears(ready)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._compress_linears(list(self._linears.values()))
        super().on_calibration_end(state, event, **kwargs)

    # -- sparsities ------------------------------------------------------------------

    def _allocate(self) -> None:
        """Decide the zeros of every projection."""
        assert self.sparsity is not None
        projections = list(self._projections.values())
        sizes = [p.entries for p in projections]
        if self.allocation == "optimal":
            zeros = self._optimal_zeros(projections, sizes)
        else:
            zeros = uniform_allocation(sizes, self.sparsity)
        self._zeros = {p.name: count for p, count in zip(projections, zeros, strict=True)}
        if self.allocation == "paper":
            for kind in _VARYING:
                names = [p.name for p in projections if p.kind == kind]
                if not names:
                    continue
                assert self.alpha is not None
                counts = paper_allocation(
                    [self._sensitivities[name] for name in names],
                    [self._projections[name].entries for name in names],
                    self.sparsity,
                    self.alpha,
                )
                self._zeros.update(zip(names, counts, strict=True))

    def _measure(self, group: list[PrunableWeight]) -> None:
        """Traces of Hessians and, for the optimal allocation, losses; forget the Hessians."""
        if not group:
            return
        self._sum_tokens(group)
        owners = _owners(group)
        if _share_memory(group):
            owners = dict.fromkeys(owners, 0)  # one rank alone may try out weights
        hessians = _sum_to_owners("Hessians", self._hessians, owners)
        traces = {
            name: float(hessian.double().diagonal(dim1=-2, dim2=-1).sum())
            for name, hessian in hessians.items()
        }
        self._sensitivities |= _of_all_ranks("traces of Hessians", traces)
        assert self.sparsity is not None
        decides = self.sparsity > 0 and not self._zeros_suffice
        if self.allocation == "optimal" and decides:
            own = [p for p in group if p.name in hessians]  # of several ranks
            losses = self._losses_of(own, hessians)
            self._losses |= _of_all_ranks("losses of projections", losses)
        self._hessians.clear()
        self._tokens.clear()

    def _sum_tokens(self, projections: list[PrunableWeight]) -> None:
        """Count the tokens that all ranks have seen."""
        counts = distributed.gather("tokens of projections", self._tokens)
        for projection in projections:
            name = projection.name
            self._tokens[name] = sum(count.get(name, 0) for count in counts)
            self._check_seen(name, self._tokens[name])

    @property
    def _zeros_suffice(self) -> bool:
        """Whether there are as many zeros as are asked for, before any is made."""
        assert self.sparsity is not None
        entries = sum(p.entries for p in self._projections.values())
        return sum(self._zeros_before.values()) >= self.sparsity * entries

    def _optimal_zeros(self, projections: list[PrunableWeight], sizes: list[int]) -> list[int]:
        """Least summed divergence of the predicted tokens, by the error that SparseGPT leaves."""
        assert self.sparsity is not None
        there = [self._zeros_before[p.name] for p in projections]
        if not self._losses:
            enough = self._zeros_suffice and self.sparsity
            return there if enough else uniform_allocation(sizes, self.sparsity)
        highest = min(_CURVE[-1], self.sparsity + _MOST_MORE)
        if len(self._curve) > len(_CURVE):
            highest = 1 - _LEAST_KEPT * (1 - self.sparsity)
        return optimal_allocation(
            self._curve,
            [self._losses[p.name] for p in projections],
            sizes,
            self.sparsity,
            lowest=[count / size for count, size in zip(there, sizes, strict=True)],
            highest=highest,
        )

    @property
    def _curve(self) -> tuple[float, ...]:
        """The sparsities at which losses are measured; more of them where few entries stay."""
        assert self.sparsity is not None
        return _CURVE if self.sparsity < _CURVE[-1] else (*_CURVE, *_SPARSE_CURVE)

    @torch.no_grad()
    def _losses_of(
        self, projections: list[PrunableWeight], hessians: dict[str, Tensor]
    ) -> dict[str, list[float]]:
        """How far zeros move the predictions at each sparsity of the curve, by name.

        The error that SparseGPT leaves, times what a unit of squared output error of the
        projection does. For that each is pruned alone for a moment, by Wanda as that costs
        nothing, and the divergence from the dense model's predictions on a little of the data is
        divided by the error made. It grows with the error evenly enough: SparseGPT at another
        sparsity gives about the same.
        """
        if self._probe is None:
            self._probe = Probe(self._state.model, self.batches)
            if not self._probe.is_finite:
                raise SparseSSMError(
                    "the dense model predicts NaN or infinite values on the calibration data; "
                    f"{self._where_they_begin()}; {self._state_in_memory}"
                )
        by_name = {p.name: p for p in projections}
        by_tensor = {p.parameter_name: p for p in projections}
        everywhere = {
            p.parameter_name for p in projections if p.others or id(p.module) in self._called_again
        }
        errors: dict[str, float] = {}

        def pruned(tensor: str) -> Tensor:
            projection = by_tensor[tensor]
            weight = projection.weight
            hessian = hessians[projection.name].to(weight.device)
            solved = SOLVERS["wanda"](weight, hessian, _PROBE_SPARSITY)
            errors[projection.name] = solved.error
            return solved.weight

        losses = {}
        with Stage(f"{type(self).__name__}: what a loss does", len(projections)) as stage:
            moved = self._probe.divergences(
                list(by_tensor), pruned, lambda name: stage.advance(), everywhere
            )
        with Stage(f"{type(self).__name__}: sparsities", len(projections)) as stage:
            for name, projection in by_name.items():
                stage.at(name)
                weight = projection.weight.float()
                curve = error_curve(
                    weight,
                    hessians[name].to(weight.device),
                    self._curve,
                    rows=_CURVE_ROWS,
                    block_size=max(self.block_size, weight.shape[-1] // _CURVE_BLOCKS),
                    dampening_frac=self.dampening_frac,
                )
                harm = max(moved[projection.parameter_name], _LEAST_DIVERGENCE) / max(
                    errors[name], 1e-30
                )
                losses[name] = [harm * loss for loss in curve.tolist()]
                stage.advance()
        return losses

    # -- pruning ---------------------------------------------------------------------

    def compress(self, adapter: MixerAdapter) -> None:
        inputs = self._inputs.pop(adapter.name, CalibrationInputs())
        dense_inputs = inputs if self.target_output == "mixer" else None
        dense_inputs = self._dense_inputs.pop(adapter.name, dense_inputs)
        inputs.join(adapter.name)
        if self.requires_calibration_data:
            self._check_seen(adapter.name, inputs.tokens)
        pruned = adapter.working_clone()  # takes the new weights stage by stage
        dense = adapter.working_clone() if dense_inputs is not None else None
        own = self._of(adapter)
        # the dense out_proj's input, from one stage to the next, rather than computed anew
        kept = self._dense_outs.pop(adapter.name, {})
        device = pruned.A_log.device
        size = 4 * inputs.tokens * adapter.sizes.intermediate_size
        fits = device.type == "cpu" or has_room(device, size)
        for stage in _STAGES:
            members = [p for p in own if p.kind in stage]
            if not members:
                continue
            # the dense mixer's in_proj reads the same inputs, so it has nothing to make up for
            alike = stage == _STAGES[0] and dense_inputs is inputs
            started = time.perf_counter()
            with self._cost.stage("gather"):
                hessians, crosses = _stage_statistics(
                    members,
                    pruned,
                    inputs,
                    None if alike else dense,
                    dense_inputs,
                    kept,
                    keep=stage == _STAGES[1] and fits and any(p.kind == "out_proj" for p in own),
                )
                self._check_sums(members, hessians)
                self._check_sums(members, crosses)
                owners = _owners(members)
                hessians = _sum_to_owners(f"Hessians of {adapter.name}", hessians, owners)
                crosses = _sum_to_owners(f"cross terms of {adapter.name}", crosses, owners)
            self._gather_seconds += time.perf_counter() - started
            for projection in members:
                self._tokens[projection.name] = inputs.tokens
            for projection, weight in self._solve_all(members, owners, hessians, crosses):
                pruned.projection(projection.kind).weight.copy_(weight)
        logger.info(f"{adapter.name}: pruned {', '.join(p.kind for p in own)}")

    def _compress_linears(self, projections: list[PrunableWeight]) -> None:
        if not projections:
            return
        with torch.no_grad(), self._released_on_error():
            if self.requires_calibration_data:
                self._sum_tokens(projections)
            self._check_sums(projections, self._hessians)
            owners = _owners(projections)
            hessians = _sum_to_owners("Hessians", self._hessians, owners)
            for projection in projections:
                if owners[projection.name] == distributed.rank():
                    hessians.setdefault(projection.name, torch.eye(projection.weight.shape[-1]))
            self._solve_all(projections, owners, hessians, {})
            for projection in projections:
                del self._linears[projection.name]

    def _solve_all(
        self,
        projections: list[PrunableWeight],
        owners: dict[str, int],
        hessians: dict[str, Tensor],
        crosses: dict[str, Tensor],
    ) -> list[tuple[PrunableWeight, Tensor]]:
        """Prune projections of the model, each on the rank that has its sums.

        :return: with the weights as they are stored, on every rank
        """
        rank = distributed.rank()
        solved = {
            p.name: self._solve(p, hessians[p.name], crosses.get(p.name))
            for p in projections
            if owners[p.name] == rank
        }
        entries = _of_all_ranks("report on projections", {n: e for n, (_, e) in solved.items()})
        weights = []
        for p in projections:
            own = [solved[p.name][0]] if p.name in solved else []
            (weight,) = distributed.share(
                f"weight of {p.name}", partial(list, own), owners[p.name], p.weight.device
            )
            for module in p.uses.values():
                update_offload_parameter(module, p.attribute, weight)
            self._layers.append({**entries[p.name], "tokens": self._tokens.pop(p.name, 0)})
            weights.append((p, weight))
        return weights

    def _solve(
        self, projection: PrunableWeight, hessian: Tensor, cross: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The pruned weight of a projection as it is to be stored, and its entry in the report."""
        started = time.perf_counter()
        weight, name = projection.weight, projection.name
        hessian = hessian.to(weight.device, torch.float32)
        zeros_before = weight == 0
        keep = ~zeros_before if bool(zeros_before.any()) else None
        try:
            target, known = weight.float(), {}
            if cross is not None:
                assert self.target_output is not None
                inverse = damped_inverse_cholesky(hessian, self.dampening_frac)
                moved = dense_target(target, hessian, cross.float(), inverse)
                target = target.lerp(moved, _TARGET_SHARE[self.target_output])
                known = {"inverse": inverse}
            solved = SOLVERS[self.solver](
                target,
                hessian,
                self._zeros[name] / projection.entries,
                self.mask_structure,
                keep=keep,
                block_size=self.block_size,
                dampening_frac=self.dampening_frac,
                **known,
            )
        except SparseSSMError as error:
            raise SparseSSMError(
                f"{name} cannot be pruned: {error}; {self._state_in_memory}"
            ) from error
        stored = solved.weight.to(weight.dtype)
        wrong = relative_error(weight, stored, hessian) if self.requires_calibration_data else None
        pruned = int((~solved.mask).sum())
        return stored, {
            "name": name,
            "kind": projection.kind,
            **({"shared_with": [n for n, _ in projection.others]} if projection.others else {}),
            "shape": list(weight.shape),
            "entries": projection.entries,
            "pruned": pruned,
            "zero_before": int(zeros_before.sum()),
            "sparsity": pruned / projection.entries,
            "sensitivity": self._sensitivities.get(name),
            "relative_error": wrong,
            "seconds": round(time.perf_counter() - started, 3),
        }

    # -- numbers that are none -------------------------------------------------------

    def _check_input(self, name: str, x: Tensor) -> None:
        """:raises SparseSSMError: what enters a layer holds NaN or infinite values"""
        if not is_finite(x):
            raise SparseSSMError(
                f"{name}: its input holds NaN or infinite values during calibration; "
                f"{self._where_they_begin()}; {self._state_in_memory}"
            )

    def _check_sums(self, projections: list[PrunableWeight], sums: dict[str, Tensor]) -> None:
        """:raises SparseSSMError: sums of products are not finite, for the first in their order"""
        order = [kind for stage in _STAGES for kind in stage] + [LINEAR]
        layers = list(dict.fromkeys(p.adapter.name if p.adapter else p.name for p in projections))
        for p in sorted(
            (p for p in projections if p.name in sums),
            key=lambda p: (
                layers.index(p.adapter.name if p.adapter else p.name),
                order.index(p.kind),
            ),
        ):
            diagonal = sums[p.name].diagonal(dim1=-2, dim2=-1)
            if not is_finite(diagonal):
                raise SparseSSMError(
                    f"{p.name} cannot be pruned: the sum of squares of its calibration input is "
                    f"not finite; {self._where_they_begin()}; {self._state_in_memory}"
                )

    def _where_they_begin(self) -> str:
        place = None
        try:
            place = first_overflow(self._model, self.batches)
        except Exception as error:  # the mistake to tell of is the one that led here
            logger.debug(f"looking for the first tensor that is not finite failed: {error}")
        if place is None:
            return "all that the modules give is finite, so the squares are more than float32 holds"
        return f"NaN or infinite values first appear in {place}"

    @property
    def _state_in_memory(self) -> str:
        """What has become of the model when a run fails."""
        if not self._layers:
            return "nothing was pruned"
        names = [layer["name"] for layer in self._layers]
        return (
            f"of the model in memory {len(names)} of {len(self._projections)} projections are "
            f"pruned already, the last of them {names[-1]}"
        )

    def _check_seen(self, name: str, tokens: int) -> None:
        if tokens == 0:
            raise SparseSSMError(f"{name} saw no calibration tokens; it is not pruned")

    # -- report ----------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a projection, totals.

        ``pruned`` counts entries that are zero, those of earlier stages among them.
        ``relative_error`` is ``|(W - W') X|^2 / |W X|^2`` for the inputs X that the pruned
        layers before leave; with a target other than ``own`` W' is not made to keep it small.
        ``sensitivity`` is the trace of the dense model's Hessian. Seconds of a projection are
        those of its solver; the total has also what gathering took.
        """
        entries = sum(layer["entries"] for layer in self._layers)
        pruned = sum(layer["pruned"] for layer in self._layers)
        solving = sum(layer["seconds"] for layer in self._layers)
        return {
            "modifier": type(self).__name__,
            "settings": self.model_dump(exclude=set(Modifier.model_fields), exclude_none=True),
            "layers": self._layers,
            "cost": self._cost.to_dict(),
            "total": {
                "entries": entries,
                "pruned": pruned,
                "sparsity": pruned / entries if entries else 0.0,
                "first_pass_seconds": round(self._first_pass_seconds, 3),
                "seconds": round(self._first_pass_seconds + self._gather_seconds + solving, 3),
            },
        }

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._forget()
        return super().on_finalize(state, **kwargs)

    def release(self) -> None:
        super().release()
        self._forget()

    def _forget(self) -> None:
        self._done.clear()
        self._called_again.clear()
        self._inputs.clear()
        self._dense_inputs.clear()
        self._dense_outs.clear()
        self._hessians.clear()
        self._probe = None
        self._state = self._model = None


class _Seen(Exception):
    """Ends a forward pass where nothing more is looked at."""


# -- several ranks -----------------------------------------------------------------------


def _owners(projections: list[PrunableWeight]) -> dict[str, int]:
    """The rank that solves each projection, so that all have about as much to do."""
    cost = {p.name: p.entries * p.weight.shape[-1] for p in projections}
    return greedy_bin_packing(list(cost), distributed.world_size(), cost.__getitem__)[2]


def _share_memory(projections: list[PrunableWeight]) -> bool:
    """Whether ranks of one host hold one copy of the weights."""
    return any(isinstance(p.module._parameters, CPUCache | DiskCache) for p in projections)


def _sum_to_owners(what: str, sums: dict[str, Tensor], owners: dict[str, int]) -> dict[str, Tensor]:
    """Sums over ranks, each on the rank that owns it, taken out of ``sums``."""
    own: dict[str, Tensor] = {}
    for owner in sorted(set(owners.values())):
        parts = {name: sums.pop(name, None) for name, o in owners.items() if o == owner}
        total = distributed.reduce_sum(what, parts, to=owner)
        if owner == distributed.rank():
            own = total
    return own


def _of_all_ranks(what: str, own: dict[str, Any]) -> dict[str, Any]:
    """By name what each rank has found for the projections that it owns."""
    return {name: value for part in distributed.gather(what, own) for name, value in part.items()}


# -- which weights -----------------------------------------------------------------------


def _stands_alone(projection: PrunableWeight, pattern: str) -> bool:
    """Whether a pattern names a projection that is a parameter and no module.

    Such as x_proj_weight of Zamba, which patterns for x_proj of other families name, too.
    """
    if projection.adapter is None or projection.attribute == "weight":
        return False
    names = (projection.name, f"{projection.adapter.name}.{projection.kind}")
    return any(match_name(name, pattern) for name in names)


# -- what weights multiply -----------------------------------------------------------------


def input_of(kind: str, quantities: MixerQuantities, out_input: Tensor) -> Tensor:
    """(b, L, in) what a mixer's projection multiplies; of conv1d (b, L, D)."""
    return out_input if kind == "out_proj" else quantities.inputs[kind]


def _inputs_of(
    kinds: set[str],
    adapter: MixerAdapter,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What projections of some kinds multiply, computing no more than they need, and the mask."""
    if kinds == {"in_proj"}:
        x, mask = adapter.enter(hidden_states, attention_mask)
        return {"in_proj": x}, mask
    q = adapter.quantities(hidden_states, attention_mask)
    out_input = read_out(adapter, q) if "out_proj" in kinds else q.u
    return {kind: input_of(kind, q, out_input) for kind in kinds}, q.mask


def _in_half(projection: PrunableWeight, device: torch.device) -> bool:
    """Whether what a projection multiplies is left in half precision."""
    return device.type == "cuda" and projection.weight.dtype.itemsize == 2


def gram_of(projection: PrunableWeight, left: Tensor, right: Tensor, mask: Tensor | None) -> Tensor:
    """``sum left right^T`` over all positions but padding, as the solvers take it.

    :param left: (b, L, in); (tokens, in) outside of mixers
    :param right: likewise
    :param mask: bool, of their leading dimensions, or None
    :return: (in, in) float32; of a conv1d (D, K, K), over the K inputs that each output reads;
        of a matrix for each head (heads, in, in), for left (b, L, heads, in)
    """
    alike = right is left
    # tensor cores multiply what the weight multiplies, and add in float32
    dtype = projection.weight.dtype if _in_half(projection, left.device) else torch.float32
    left = left.to(dtype)
    right = left if alike else right.to(dtype)
    if projection.kind == "conv1d":
        return window_gram(left, right, projection.weight.shape[-1], mask)
    if mask is not None:
        left = left * mask.view(*mask.shape, *[1] * (left.ndim - mask.ndim))
    if projection.weight.ndim == 3:
        heads = zip(left.unbind(-2), right.unbind(-2), strict=True)
        return torch.stack([gram(x.flatten(0, -2), y.flatten(0, -2)) for x, y in heads])
    return gram(left.flatten(0, -2), right.flatten(0, -2))


def _hessian_shape(projection: PrunableWeight) -> torch.Size:
    """(in, in); of a conv1d (D, K, K), of a matrix for each head (heads, in, in)."""
    *problems, _, size = projection.weight.shape
    return torch.Size((*problems, size, size))


def _stage_statistics(
    members: list[PrunableWeight],
    pruned: MixerAdapter,
    inputs: CalibrationInputs,
    dense: MixerAdapter | None,
    dense_inputs: CalibrationInputs | None,
    kept: dict[int, dict[str, Tensor]],
    keep: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hessians, and products of dense and present inputs, of some projections of a mixer.

    :param pruned: the mixer as it is now
    :param inputs: what the pruned layers before it make of the data
    :param dense: the mixer as it was, or None where nothing is to be compared with it
    :param dense_inputs: what the dense layers before it make of the data
    :param kept: by batch and kind, what the dense mixer's projections multiply; taken from here
        where an earlier call has left it
    :param keep: whether to leave the input of the dense out_proj there for a later call
    :return: by name
    """
    hessians: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}
    device = pruned.A_log.device
    dtype = None if device.type == "cuda" else torch.float32  # as the mixers are
    for p in members:
        # solvers choose: a sum in another order, as ranks make it, must not choose otherwise; what
        # tensor cores sum is never that exact
        sums = torch.float32 if _in_half(p, device) else torch.float64
        zeros = torch.zeros(_hessian_shape(p), dtype=sums, device=device)
        hessians[p.name] = zeros
        if dense is not None:
            crosses[p.name] = zeros.clone()
    kinds = {p.kind for p in members}
    for i in range(len(inputs)):
        with tf32():
            batch = inputs.get(i, device, dtype)
            xs, mask = _inputs_of(kinds, pruned, *batch)
            if dense is not None and dense_inputs is not None:
                if kinds <= kept.get(i, {}).keys():
                    dense_xs = kept.pop(i)
                else:
                    makes = {"out_proj"} if keep and i not in kept else set()
                    batch = dense_inputs.get(i, device, dtype)
                    dense_xs, _ = _inputs_of(kinds | makes, dense, *batch)
                    if makes:
                        kept[i] = {"out_proj": dense_xs["out_proj"]}
        for p in members:
            x = xs[p.kind]
            hessians[p.name] += gram_of(p, x, x, mask)
            if dense is not None:
                crosses[p.name] += gram_of(p, dense_xs[p.kind], x, mask)
    return hessians, crosses


def _count(projection: PrunableWeight, x: Tensor, mask: Tensor | None) -> int:
    """Tokens in what a projection multiplies."""
    if mask is not None:
        return int(mask.sum())
    return math.prod(x.shape[:2] if projection.adapter else x.shape[:-1])


def _mask_for(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a batch for the input of a Linear layer; None if that is not its tokens.

    Experts see tokens that a router chose.
    """
    if mask is None:
        return None
    if x.shape[:-1] == mask.shape:
        return mask.to(x.device)
    return mask.flatten().to(x.device) if x.shape[:-1] == mask.flatten().shape else None
