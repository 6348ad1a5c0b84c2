"""Prune the projections of state-space mixers, each as much as it can bear."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.allocation.losses import LossMeter
from sparsessm_plugin.allocation.policy import Candidate, allocate, zeros_suffice
from sparsessm_plugin.allocation.probe import LayerProbe, Probe, new_probe
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.fast_forward import may_promise, offer
from sparsessm_plugin.families.in_turn import on_disk
from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.methods.base import MixerMethod, Watch
from sparsessm_plugin.methods.projections.dense import DensePass, by_layer, enough_tokens, in_groups
from sparsessm_plugin.methods.projections.inverses import Inverses, begin_inverses
from sparsessm_plugin.methods.projections.linears import PendingLinears
from sparsessm_plugin.methods.projections.permutation import (
    PermutedAxis,
    permute_channels,
    stream_kept,
)
from sparsessm_plugin.methods.projections.ranks import (
    of_all_ranks,
    owners_of,
    share_memory,
    sum_to_owners,
)
from sparsessm_plugin.methods.projections.results import (
    ProjectionResult,
    ProjectionTotal,
    PrunedProjection,
)
from sparsessm_plugin.methods.projections.settings import ProjectionSettings
from sparsessm_plugin.methods.projections.statistics import (
    HessianSums,
    MixerData,
    check_seen,
    entered_bytes,
    input_of,
    mask_for,
    stage_sums,
)
from sparsessm_plugin.methods.projections.targets import matching_projections
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.selection.masks import count_true
from sparsessm_plugin.solvers.objective import dense_target, relative_error
from sparsessm_plugin.solvers.projections import SOLVERS
from sparsessm_plugin.solvers.walk import walks_captured


class ProjectionPruning(MixerMethod[ProjectionSettings]):
    """Prunes the projections of every mixer, and Linear layers elsewhere where targets say so.

    In :meth:`begin`, unless nothing needs it, the data passes the dense model: every projection's
    Hessian, from these the sparsity of each, and for a dense target what enters each mixer. One
    layer after the other; a model that calls its layers otherwise, on a GPU in several passes where
    Hessians of all layers at once would be large. Then the projections
    of the mixers that are done are pruned in the order in which data passes them, each with what
    those before it leave of its inputs.
    """

    gathers_sums: ClassVar[bool] = True

    def __init__(self, settings: ProjectionSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._candidates: dict[str, Candidate] = {}
        self._zeros: dict[str, int] = {}
        self._mixer_data: dict[str, MixerData] = {}
        self._linear_sums = HessianSums(settings.offload_hessians)
        self._pruned: list[PrunedProjection] = []
        self.permuted: list[PermutedAxis] = []
        self._first_pass_seconds = 0.0
        self._gather_seconds = 0.0

    # -- before calibration ----------------------------------------------------------

    def matching_projections(self, model: nn.Module) -> list[PrunableWeight]:
        """See :func:`matching_projections`."""
        return matching_projections(model, self.settings, self.who)

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """The mixers with a projection that ``targets`` and ``ignore`` leave.

        :raises SparseSSMError: see :func:`matching_projections`
        """
        projections = self.matching_projections(model)
        return list({p.adapter.name: p.adapter for p in projections if p.adapter}.values())

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        projections = self.matching_projections(model)
        self._projections = {p.name: p for p in projections}
        self._linears = PendingLinears(model, projections)
        for name, projection in self._linears.pending.items():
            if not is_finite(projection.weight):
                raise SparseSSMError(
                    f"{name}.weight holds NaN or infinite values; nothing was pruned"
                )

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        started = time.perf_counter()
        watched = super().begin(batches)
        self._restore.enter_context(walks_captured())
        if self.settings.watches_data:
            watched += [
                Watch(module, partial(self._see_linear, projection))
                for projection in self._linears.pending.values()
                for module in projection.uses.values()
            ]
        if self.settings.permute_channels:
            with torch.no_grad(), self.cost.stage("permute"):
                self._permute()
        counts_zeros = self.settings.allocation == "optimal"
        self._candidates = {
            p.name: Candidate(
                p.name, p.kind, p.entries, count_true(p.weight == 0) if counts_zeros else 0
            )
            for p in self._projections.values()
        }
        if self.settings.needs_dense_model:
            self._study_dense_model()
        with self.cost.stage("allocate"):
            self._zeros = allocate(
                list(self._candidates.values()),
                self.settings.allocation or "uniform",
                self.settings.share,
                self.settings.alpha,
            )
        self._first_pass_seconds = time.perf_counter() - started
        return watched

    # -- the dense model -------------------------------------------------------------

    def _permute(self) -> None:
        """Put channels into an order in which groups of n:m lose little; nothing else changes."""
        dense = None
        if self.settings.watches_data:
            dense = DensePass(self._model, self.batches, self.finite, self.who)
        projections, structure = list(self._projections.values()), self.settings.mask_structure
        self.permuted = permute_channels(self._model, projections, structure, dense)

    def _study_dense_model(self) -> None:
        """Find what the sparsities follow from, and what enters the mixers of the dense model."""
        keep = self.settings.keeps_dense_inputs
        if keep:
            self._restore.enter_context(stream_kept(self._model))
        projections = list(self._projections.values())
        varies = self.settings.allocation != "uniform"
        layers = by_layer(self._model, projections) if varies else None
        meter = self._new_meter(layers is not None)
        if not on_disk(self._model) and not (meter and isinstance(meter.probe, LayerProbe)):
            layers = None
        in_layers = layers is not None  # each is read once, and no more than its Hessians are held
        dense = DensePass(self._model, self.batches, self.finite, self.who, in_layers)
        groups = layers or [[]]  # one empty group without allocation
        if varies and not in_layers:
            groups = in_groups(projections, self.settings.offload_hessians)
        # the same for all groups, so that sparsities do not depend on the memory there is
        most = enough_tokens(projections) if self.settings.allocation == "optimal" else None
        for group in groups:
            sums = HessianSums(self.settings.offload_hessians)
            with self.cost.stage("first_pass"):
                own = {p.mixer for p in group} if in_layers else self._pending.keys()
                adapters = [a for a in self._pending.values() if keep and a.name in own]
                dense.run(group, sums, adapters, self._dense_inputs, most_tokens=most)
                self._check_sums(group, sums.hessians)
            with self.cost.stage("allocate"):
                self._measure(group, sums, meter)
            keep = keep and in_layers
        if meter is not None:
            self._set_losses(meter)

    def _dense_inputs(self, mixer: str) -> CalibrationInputs:
        data = self._mixer_data.setdefault(mixer, MixerData())
        if data.dense_inputs is None:
            data.dense_inputs = CalibrationInputs()
        return data.dense_inputs

    def _measure(
        self, group: list[PrunableWeight], sums: HessianSums, meter: LossMeter | None
    ) -> None:
        """Traces of Hessians and, for the optimal allocation, losses."""
        if not group:
            return
        sums.count_all(group)
        owners = owners_of(group)
        if share_memory(group):
            owners = dict.fromkeys(owners, 0)  # one rank alone may try out weights
        hessians = sum_to_owners("Hessians", sums.hessians, owners)
        own_traces = {
            name: float(hessian.diagonal(dim1=-2, dim2=-1).double().sum())
            for name, hessian in hessians.items()
        }
        for name, trace in of_all_ranks("traces of Hessians", own_traces).items():
            self._candidates[name] = replace(self._candidates[name], hessian_trace=trace)
        if meter is not None:
            if isinstance(meter.probe, Probe):  # else a later layer may still say where they begin
                self._check_probe(meter)
            meter.add(
                [p for p in group if p.name in hessians],  # of several ranks
                hessians,
                {p.name for p in group if self._linears.several(p)},
            )

    def _set_losses(self, meter: LossMeter) -> None:
        with self.cost.stage("allocate"):
            losses = of_all_ranks("losses of projections", meter.losses())
        self._check_probe(meter)
        for name, curve in losses.items():
            self._candidates[name] = replace(self._candidates[name], losses=tuple(curve))

    def _new_meter(self, in_layers: bool) -> LossMeter | None:
        """What measures losses, where the sparsities follow from them; see :func:`new_probe`."""
        decides = not zeros_suffice(list(self._candidates.values()), self.settings.share)
        if self.settings.allocation != "optimal" or not decides:
            return None
        with self.cost.stage("allocate"):
            return LossMeter(
                new_probe(self._model, self.batches, in_layers),
                self.settings.share,
                block_size=self.settings.block_size,
                dampening_frac=self.settings.dampening_frac,
                who=self.who,
            )

    def _check_probe(self, meter: LossMeter) -> None:
        if not meter.probe.is_finite:
            raise SparseSSMError(
                "the dense model predicts NaN or infinite values on the calibration data; "
                f"{self.finite.explained()}"
            )

    # -- calibration -----------------------------------------------------------------

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        data = self._mixer_data.setdefault(adapter.name, MixerData())
        added = data.inputs.add(hidden_states, attention_mask)
        size = 4 * hidden_states[..., 0].numel() * adapter.sizes.intermediate_size
        # on a GPU the mixers of compress() compute as the model does: what the dense projections
        # multiply need not be made twice
        kinds = {p.kind for p in self._of(adapter)} - set(adapter.entry_kinds)
        compares = bool(kinds) and self.settings.target_output == "mixer"
        if compares and has_room(hidden_states.device, size):
            quantities = adapter.quantities(hidden_states, attention_mask)
            x = read_out(adapter, quantities)
            offer(adapter.mixer, hidden_states, attention_mask, x)
            made = {kind: input_of(kind, quantities, x) for kind in kinds}
            if not has_room(x.device, sum(own.nbytes for own in made.values())):
                kinds &= {adapter.exit_kind}  # for which most is computed
            for number, rows in added:
                data.keep_dense(number, kinds, {kind: made[kind][rows] for kind in kinds})

    def _see_linear(
        self, projection: PrunableWeight, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        if projection.name not in self._linears.pending:
            return
        with torch.no_grad(), self.released_on_error():
            x = args[0]
            self.batches.check_ids()
            self.finite.input(projection.name, x)
            mask = mask_for(x, self.batches.mask(self.current_batch()))
            self._linear_sums.add(projection, x, mask)

    def layers_done(self, modules: Sequence[nn.Module]) -> None:
        super().layers_done(modules)
        self._compress_linears(self._linears.after(modules))

    def end(self) -> None:
        self._compress_linears(list(self._linears.pending.values()))
        super().end()

    # -- pruning ---------------------------------------------------------------------

    def compress(self, adapter: MixerAdapter) -> None:
        data = self._mixer_data.pop(adapter.name, MixerData())
        data.inputs.join(adapter.name)
        if self.settings.watches_data:
            check_seen(adapter.name, data.inputs.tokens)
        # the dense mixer reads what the dense layers give it, or what the pruned ones do
        compares = data.dense_inputs is not None or self.settings.target_output == "mixer"
        pruned = adapter.working_clone()  # takes the new weights stage by stage
        dense = adapter.working_clone() if compares else None
        own = self._of(adapter)
        device = pruned.A_log.device
        exits = {p.kind for p in own} & {adapter.exit_kind}
        size = 4 * data.inputs.tokens * adapter.sizes.intermediate_size
        fits = device.type == "cpu" or has_room(device, size)
        enters = bool(exits) and has_room(device, size + entered_bytes(pruned, data.inputs.tokens))
        data.leaves.wanted = self.passes_again and may_promise(adapter.mixer)
        # what is pruned together; a later stage sees what the stages before leave of its inputs
        for place, stage in enumerate(adapter.stages):
            members = [p for p in own if p.kind in stage]
            if not members:
                continue
            # the dense mixer's in_proj reads the same inputs, so it has nothing to make up for
            compared = None if place == 0 and data.dense_inputs is None else dense
            # from one stage to the next, rather than computed anew
            keep, enter_once = exits if place == 1 and fits else set(), place == 1 and enters
            started = time.perf_counter()
            with self.cost.stage("gather"):
                sums = stage_sums(members, pruned, compared, data, keep, enter_once)
                check = partial(self._check_sums, members)
                inverses = begin_inverses(sums, check, self.settings)
                owners = owners_of(members)
                hessians = sum_to_owners(f"Hessians of {adapter.name}", sums.hessians, owners)
                crosses = sum_to_owners(f"cross terms of {adapter.name}", sums.crosses, owners)
            self._gather_seconds += time.perf_counter() - started
            tokens = dict.fromkeys((p.name for p in members), data.inputs.tokens)
            found = self._solve_all(members, owners, hessians, crosses, tokens, inverses)
            for projection, weight in found:
                pruned.projection(projection.kind).weight.copy_(weight)
        data.leaves.hand_over(adapter, pruned, data.inputs)
        logger.info(f"{adapter.name}: pruned {', '.join(p.kind for p in own)}")

    def _of(self, adapter: MixerAdapter) -> list[PrunableWeight]:
        return [p for p in self._projections.values() if p.mixer == adapter.name]

    def _compress_linears(self, projections: list[PrunableWeight]) -> None:
        if not projections:
            return
        sums = self._linear_sums
        with torch.no_grad(), self.released_on_error():
            if self.settings.watches_data:
                self.finite.inputs()
                sums.count_all(projections)
            self._check_sums(projections, sums.hessians)
            owners = owners_of(projections)
            hessians = sum_to_owners("Hessians", sums.hessians, owners)
            for projection in projections:
                if owners[projection.name] == distributed.rank():
                    hessians.setdefault(projection.name, torch.eye(projection.shape[-1]))
            self._solve_all(projections, owners, hessians, {}, sums.tokens)
            for projection in projections:
                del self._linears.pending[projection.name]

    def _solve_all(
        self,
        projections: list[PrunableWeight],
        owners: Mapping[str, int],
        hessians: Mapping[str, Tensor],
        crosses: Mapping[str, Tensor],
        tokens: Mapping[str, int],
        inverses: Inverses | None = None,
    ) -> list[tuple[PrunableWeight, Tensor]]:
        """Prune projections of the model, each on the rank that has its sums.

        :return: with the weights as they are stored, on every rank
        """
        rank, inverses = distributed.rank(), inverses or Inverses(self.settings.dampening_frac)
        solved = {
            p.name: self._solve(
                p, hessians[p.name], crosses.get(p.name), tokens.get(p.name, 0), inverses
            )
            for p in projections
            if owners[p.name] == rank
        }
        own = {name: asdict(found) for name, (_, found) in solved.items()}
        found = of_all_ranks("report on projections", own)
        weights = []
        for p in projections:
            computed = [solved[p.name][0]] if p.name in solved else []
            (weight,) = distributed.share(
                f"weight of {p.name}", partial(list, computed), owners[p.name], p.weight.device
            )
            for module in p.uses.values():
                update_offload_parameter(module, p.attribute, weight)
            self._pruned.append(PrunedProjection(**found[p.name]))
            weights.append((p, weight))
        return weights

    def _solve(
        self,
        projection: PrunableWeight,
        own: Tensor,
        cross: Tensor | None,
        tokens: int,
        inverses: Inverses,
    ) -> tuple[Tensor, PrunedProjection]:
        """The pruned weight of a projection as it is to be stored, and what became of it."""
        started = time.perf_counter()
        settings = self.settings
        weight, name = projection.weight, projection.name
        hessian = own.to(weight.device, torch.float32)
        zeros_before = weight == 0
        keep = ~zeros_before if bool(zeros_before.any()) else None
        try:
            target, known = weight.float(), {}
            if SOLVERS[settings.solver].updates:
                known = {"inverse": inverses.of(own, hessian)}
                if cross is not None:
                    moved = dense_target(target, hessian, cross.float(), known["inverse"])
                    target = target.lerp(moved, settings.target_share)
            solved = SOLVERS[settings.solver](
                target,
                hessian,
                self._zeros[name] / projection.entries,
                settings.mask_structure,
                keep=keep,
                block_size=settings.block_size,
                dampening_frac=settings.dampening_frac,
                **known,
            )
        except SparseSSMError as error:
            raise SparseSSMError(
                f"{name} cannot be pruned: {error}; {self.state_in_memory()}"
            ) from error
        stored = solved.weight.to(weight.dtype)
        wrong = relative_error(weight, stored, hessian) if settings.watches_data else None
        pruned = count_true(~solved.mask)
        return stored, PrunedProjection(
            name=name,
            kind=projection.kind,
            shape=list(weight.shape),
            entries=projection.entries,
            pruned=pruned,
            zero_before=count_true(zeros_before),
            sparsity=pruned / projection.entries,
            hessian_trace=self._candidates[name].hessian_trace,
            relative_error=wrong,
            seconds=round(time.perf_counter() - started, 3),
            tokens=tokens,
            shared_with=[other for other, _ in projection.others],
        )

    # -- what was done ---------------------------------------------------------------

    def _check_sums(self, projections: list[PrunableWeight], sums: Mapping[str, Tensor]) -> None:
        """:raises SparseSSMError: sums are not finite, for the first in the order of the data"""
        if not self.settings.watches_data:
            return
        layers = list(dict.fromkeys(p.mixer or p.name for p in projections))

        def place(p: PrunableWeight) -> tuple[int, int]:
            order = () if p.adapter is None else p.adapter.projections  # as data passes them
            return layers.index(p.mixer or p.name), order.index(p.kind) if order else 0

        for p in sorted((p for p in projections if p.name in sums), key=place):
            self.finite.hessian(p.name, sums[p.name])

    def state_in_memory(self) -> str:
        if not self._pruned:
            return "nothing was pruned"
        return (
            f"of the model in memory {len(self._pruned)} of {len(self._projections)} projections "
            f"are pruned already, the last of them {self._pruned[-1].name}"
        )

    def result(self) -> ProjectionResult:
        total = ProjectionTotal.of_pruned(
            self._pruned, self._first_pass_seconds, self._gather_seconds
        )
        return ProjectionResult(
            tuple(self._pruned), total, self.cost.to_dict(), tuple(self.permuted)
        )

    def release(self) -> None:
        super().release()
        self._mixer_data.clear()
        self._linear_sums = HessianSums(self.settings.offload_hessians)


def prune_projections(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> ProjectionResult:
    """Prune the projections of all mixers of a model, in place.

    :param model: transformers model
    :param batches: what the model's forward takes; None for ``solver="magnitude"``
    :param settings: fields of :class:`sparsessm_plugin.SensitivitySparseGPTModifier`, such as
        ``sparsity``
    :return: one :class:`PrunedProjection` a weight
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    who = "prune_projections"
    method = ProjectionPruning(ProjectionSettings.of(who, settings), who)
    result = run(method, model, batches)
    assert isinstance(result, ProjectionResult)
    return result
