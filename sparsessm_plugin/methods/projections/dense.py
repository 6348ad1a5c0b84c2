"""What the dense model says of its projections before any is pruned."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.allocation.losses import CURVE_INPUTS
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.contexts import hooks_disabled, quantization_disabled
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.calibration.overflow import FiniteCheck
from sparsessm_plugin.calibration.passes import LayerPass, forward_context
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.fast_forward import offer
from sparsessm_plugin.families.in_turn import on_disk
from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.families.shared_weights import of_several_names
from sparsessm_plugin.methods.base import Watch, what_enters
from sparsessm_plugin.methods.projections.statistics import (
    InputEnergies,
    hessian_shape,
    input_of,
    mask_for,
)
from sparsessm_plugin.progress import Stage

# On a GPU, so many bytes of the dense model's Hessians are held at once; others wait their turn,
# which is another pass. The larger number where it leaves half of the GPU free.
_MOST_HESSIANS, _MOST_WITH_ROOM = 8 * 2**30, 16 * 2**30
# Of the widest projection's inputs, as far as curves look at them, in the Hessians that sparsities
# follow from. With twice as many those of 25 M lost as much at 50 % and more at 70 %; one of 6 M
# loses 0.12 % more than with twice as many at 70 %, and with half as many 0.18 %.
TOKENS_AN_INPUT = 16


class Sums(Protocol):
    """Takes in what projections multiply, such as :class:`HessianSums`."""

    def add(self, projection: PrunableWeight, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch; see :func:`gram_of`."""


class _Seen(Exception):
    """Ends a forward pass where nothing more is looked at."""


def in_groups(
    projections: Sequence[PrunableWeight], in_main_memory: bool
) -> list[list[PrunableWeight]]:
    """The projections in parts whose Hessians a GPU, or main memory, holds at once."""
    groups: list[list[PrunableWeight]] = [[]]
    held = 0
    devices = {get_execution_device(projection.module) for projection in projections}
    roomy = all(has_room(device, _MOST_WITH_ROOM) for device in devices)
    # ranks make the same groups
    most = _MOST_WITH_ROOM if all(distributed.gather("room", roomy)) else _MOST_HESSIANS
    for projection in projections:
        on_gpu = get_execution_device(projection.module).type == "cuda"
        # where main memory cannot hold the model, it cannot hold all Hessians
        counts = on_gpu or on_disk(projection.module)
        size = 4 * hessian_shape(projection).numel() if counts else 0
        if groups[-1] and not in_main_memory and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(projection)
        held += size
    return groups


def tokens_for(inputs: int) -> int:
    """How many tokens of all ranks say what zeros in a projection with so many inputs cost."""
    return TOKENS_AN_INPUT * min(inputs, CURVE_INPUTS)


def enough_tokens(projections: Sequence[PrunableWeight]) -> int | None:
    """How many tokens of this rank say what zeros in all these projections cost; None for all.

    All where there are Linear layers outside of mixers: a router may send few to an expert.
    """
    if any(p.adapter is None for p in projections):
        return None
    widest = max((p.shape[-1] for p in projections), default=0)
    return -(-tokens_for(widest) // distributed.world_size())


def by_layer(
    model: Any, projections: Sequence[PrunableWeight]
) -> list[list[PrunableWeight]] | None:
    """The projections of one layer after the other; None where one stands in several, or in none.

    :param model: transformers model
    """
    layers = LayerPass(model)
    found: dict[str, list[PrunableWeight]] = {name: [] for name in layers.layers}
    again = of_several_names(model)
    for p in projections:
        layer = layers.layer_of(p.name)
        if layer is None or p.others or id(p.module) in again:
            return None
        found[layer].append(p)
    return [members for members in found.values() if members]


class DensePass:
    """One pass of the data through the dense model.

    Layer by layer, as always of a model on disk, each layer is read once: a pass goes on where
    the last one ended, and runs as far as what is asked for.

    :param model: transformers model, in ``fast_forward``
    :param batches: of the calibration
    :param finite: refuses inputs that are no numbers
    :param who: for the progress that is shown
    :param in_layers: run layer by layer; each must be called once
    """

    def __init__(
        self,
        model: Any,
        batches: CalibrationBatches,
        finite: FiniteCheck,
        who: str,
        in_layers: bool = False,
    ) -> None:
        self._model = model
        self._batches = batches
        self._finite = finite
        self._who = who
        self._batch = 0  # number of the one that passes
        self._summed = 0  # how many of them are summed up
        self._layers = LayerPass(model) if in_layers or on_disk(model) else None

    @torch.no_grad()
    def run(
        self,
        group: Sequence[PrunableWeight],
        sums: Sums,
        keep: Sequence[MixerAdapter] = (),
        inputs_of: Callable[[str], CalibrationInputs] | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """Run the model.

        :param group: the projections whose inputs are summed up
        :param sums: where they are
        :param keep: mixers whose inputs are kept
        :param inputs_of: gives where, by name of the mixer
        :param most_tokens: no further batch is summed up once so many tokens were, and none is
            read unless inputs are kept
        """
        mixers = {p.adapter.name: p.adapter for p in group if p.adapter}
        linears = [p for p in group if p.adapter is None]
        last = list(mixers)[-1] if mixers and not keep and not linears else None
        span = None
        if self._layers is not None:  # what the last layer gives, the next pass may begin with
            span, last = self._span(list(keep or mixers.values()), linears), None
        watched = []
        for adapter in keep or mixers.values():
            members = [p for p in group if p.mixer == adapter.name]
            own = inputs_of(adapter.name) if keep and inputs_of is not None else None
            hook = partial(self._see_mixer, adapter, members, sums, own, adapter.name == last)
            watched.append(Watch(adapter.mixer, hook))
        for p in linears:
            hook = partial(self._see_linear, p, sums)
            watched += [Watch(module, hook) for module in p.uses.values()]
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        if head is not None:
            watched.append(Watch(head, _enough))
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in watched]
        device = get_execution_device(self._model)
        try:
            with (
                hooks_disabled(),
                forward_context(self._model),
                quantization_disabled(self._model),
            ):
                batches = _first(self._batches, None if keep else most_tokens)
                self._summed = len(_first(batches, most_tokens))
                if self._layers is not None and span is not None:
                    self._layers.run(batches, self._at, *span)
                else:
                    with Stage(f"{self._who}: dense model", len(batches)) as stage:
                        for index, batch in enumerate(batches):
                            self._at(index)
                            inputs = {key: value.to(device) for key, value in batch.items()}
                            with suppress(_Seen):
                                self._model(**inputs)
                            stage.advance()
            self._finite.inputs()
        finally:
            for handle in handles:
                handle.remove()

    def _span(
        self, mixers: Sequence[MixerAdapter], linears: Sequence[PrunableWeight]
    ) -> tuple[str, str] | None:
        """The first and the last layer of these; None where all of the model has to run."""
        assert self._layers is not None
        again = of_several_names(self._model)
        modules = [*(adapter.mixer for adapter in mixers), *(p.module for p in linears)]
        if any(id(module) in again for module in modules):
            return self._layers.layers[0], self._layers.layers[-1]
        names = [adapter.name for adapter in mixers]
        return self._layers.span([*names, *(name for p in linears for name in p.uses)])

    def _at(self, index: int) -> None:
        self._batch = index

    def energies(self, group: Sequence[PrunableWeight], most_tokens: int) -> dict[str, Tensor]:
        """Sums of squares of what projections multiply, over all ranks, by name.

        :param group: the projections
        :param most_tokens: see :meth:`run`
        """
        sums = InputEnergies()
        self.run(group, sums, most_tokens=-(-most_tokens // distributed.world_size()))
        return distributed.reduce_sum("energies of inputs", sums.energies)

    def _see_mixer(
        self,
        adapter: MixerAdapter,
        members: list[PrunableWeight],
        sums: Sums,
        keep: CalibrationInputs | None,
        last: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Look at what enters a mixer.

        :param members: its projections whose Hessians it is added to
        :param keep: where it is kept, or None
        :param last: nothing after this is looked at
        """
        hidden_states, attention_mask = what_enters(args, kwargs)
        self._finite.input(adapter.name, hidden_states)
        if keep is not None:
            keep.add(hidden_states, attention_mask)
        if not members or self._batch >= self._summed:
            return
        quantities = adapter.quantities(hidden_states, attention_mask)
        out_input = read_out(adapter, quantities)
        for projection in members:
            x = input_of(projection.kind, quantities, out_input)
            sums.add(projection, x, quantities.mask)
        if last:
            raise _Seen
        offer(adapter.mixer, hidden_states, attention_mask, out_input)

    def _see_linear(
        self,
        projection: PrunableWeight,
        sums: Sums,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        x: Tensor = args[0]
        self._finite.input(projection.name, x)
        if self._batch < self._summed:
            sums.add(projection, x, mask_for(x, self._batches.mask(self._batch)))


def _first(batches: Sequence[Any], most_tokens: int | None) -> list[Any]:
    """Batches until they hold so many tokens."""
    found, tokens = [], 0
    for batch in batches:
        if most_tokens is not None and tokens >= most_tokens:
            break
        tokens += batch["input_ids"].numel()
        found.append(batch)
    return found


def _enough(module: nn.Module, args: Any, kwargs: Any) -> None:
    """What predicts tokens need not run."""
    raise _Seen
