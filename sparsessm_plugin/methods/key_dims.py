"""Choose and remove key dims of gated delta nets, and fit what remains to what they did.

Shapes: b sequences, L steps, G key heads of dk entries, M = hidden_size.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.key_dims import (
    KEY_DIM_CRITERIA,
    KeyDimInputs,
    KeyDimStatistics,
)
from sparsessm_plugin.criteria.states import lowest
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.outputs import dense_outputs, masked_error, relative_error
from sparsessm_plugin.methods.removal import Shrunk, remove
from sparsessm_plugin.methods.state_kind import StateKind
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.recurrence.quantities import DeltaQuantities

# Text by which sets are judged, and how much of it at once.
_TOKENS_JUDGED, _TOKENS_TOGETHER = 2**14, 2**12
# Of the sets that these criteria propose, ``output_energy`` takes the one with the least error.
_PROPOSING = ("rrqr", "pairs", "qk", "magnitude")


class KeyDims(StateKind):
    """How key dims are chosen, and what takes over what they did."""

    unit = "key dims"
    groups = "key heads"
    refused_by = "causal-conv1d refuses"

    def check(self, adapter: MixerAdapter) -> None:
        super().check(adapter)
        for step in self.settings.compensate or ():
            if step not in ("reconstruct", "out_proj"):
                raise SparseSSMError(
                    f"{self.who}: compensate: {step} is not possible in {adapter.name} "
                    f"({adapter.family}), a gated delta net; allowed: reconstruct, out_proj, none"
                )

    def advise(self, adapter: MixerAdapter) -> None:
        """Warn of a size that is smaller, but not faster."""
        keep = self.settings.kept(adapter.sizes.state_size)
        whole = 1 << (keep - 1).bit_length()
        if whole != keep:
            logger.warning(
                f"{self.who}: {keep} key dims are no power of two: the state takes less memory, "
                f"but GPU kernels of the delta rule compute as many as for {whole}"
            )

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        """Decide what to remove and fit the rest; see :meth:`MixerRemoval.shrink`."""
        steps = self.settings.compensations(adapter)
        removed = self._choose(adapter, inputs)
        small = remove(adapter, "key_dims", removed)
        if not self.settings.watches_data:
            return Shrunk("key_dims", removed, small)
        targets = dense_outputs(adapter, inputs)
        error_removed = relative_error(small, inputs, targets)
        diverged = self.fit_output(small, inputs, targets, steps)
        error_left = relative_error(small, inputs, targets)
        return Shrunk("key_dims", removed, small, error_removed, error_left, diverged)

    def _choose(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> list[int]:
        """Indices of the axis that go, ascending."""
        sizes = adapter.sizes
        G, dk, keep = sizes.n_groups, sizes.state_size, self.settings.kept(sizes.state_size)
        criterion, device = KEY_DIM_CRITERIA[self.settings.saliency], adapter.A_log.device
        names = (self.settings.saliency,) if criterion.score is not None else _PROPOSING
        statistics = None
        if any(KEY_DIM_CRITERIA[name].statistics for name in names):
            statistics = gather(adapter, inputs)

        def choose() -> list[Tensor]:
            if statistics is not None and not statistics.is_finite():
                raise self.not_finite(adapter)
            given = KeyDimInputs(statistics, *row_norms(adapter), dk - keep)
            sets = []
            for name in names:
                score = KEY_DIM_CRITERIA[name].score
                assert score is not None
                sets.append(lowest(score(given), dk - keep))
            return [torch.tensor(sets, device=device)]

        (sets,) = distributed.share(f"key dims of {adapter.name}", choose, device=device)
        removed = sets[0]
        if len(sets) > 1:
            errors = []
            for proposed in sets:
                kept = torch.ones(G * dk, dtype=torch.bool, device=device)
                kept[proposed] = False
                errors.append(output_error(adapter, inputs, kept.view(G, dk)))
            if not all(math.isfinite(error) for error in errors):
                raise self.not_finite(adapter)
            best = errors.index(min(errors))
            logger.debug(f"{adapter.name}: {names[best]} proposes the set with the least error")
            removed = sets[best]
        return [int(i) for i in removed]


def row_norms(adapter: MixerAdapter) -> tuple[Tensor, Tensor]:
    """(G, dk) norms of the projection rows that make queries and keys."""
    sizes, norms = adapter.sizes, []
    for axis in adapter.state_rows:
        rows = adapter.entries_along(axis)[axis.positions(range(adapter.axis_length("key_dims")))]
        norms.append(rows.double().norm(dim=1).view(sizes.n_groups, sizes.state_size))
    return norms[0], norms[1]


def gather(adapter: MixerAdapter, inputs: CalibrationInputs) -> KeyDimStatistics:
    """Sum up what scores of key dims read. Of several ranks only rank 0 gets the sums."""
    statistics = KeyDimStatistics()
    for _, quantities in inputs.iterate(adapter):
        q, k = quantities.normalized_q, quantities.normalized_k
        real = ... if quantities.mask is None else quantities.mask
        G, dk = k.shape[2:]
        statistics.add(q[real].reshape(-1, G, dk), k[real].reshape(-1, G, dk))
    distributed.reduce_fields(f"key dims' sums of {adapter.name}", statistics, to=0)
    return statistics


def output_error(adapter: MixerAdapter, inputs: CalibrationInputs, kept: Tensor) -> float:
    """The squared error of the mixer's output with some key dims only, nothing fitted.

    Queries and keys are normalised over what is kept, as in a smaller mixer.

    :param kept: (G, dk) bool
    :return: summed over the sequences that sets are judged by, of all ranks
    """
    wrong = 0.0
    for quantities in judged(adapter, inputs):
        left = replace(quantities, q=only(quantities.q, kept), k=only(quantities.k, kept))
        target, output = (adapter.output(x, scan(x)) for x in (quantities, left))
        wrong += float(masked_error(target, output, quantities.mask).double().square().sum())
    return distributed.total("error of a set", wrong)[0]


def only(x: Tensor, kept: Tensor) -> Tensor:
    """The entries that are kept, as many of each head: x (b, L, G, dk) and kept (G, dk) bool."""
    index = kept.nonzero()[:, 1].view(len(kept), -1)
    return x.gather(-1, index.expand(*x.shape[:2], -1, -1))


def judged(adapter: MixerAdapter, inputs: CalibrationInputs) -> Iterator[DeltaQuantities]:
    """The recurrence's quantities of some sequences from all batches, a few at a time."""
    part = min(1.0, _TOKENS_JUDGED / max(1, inputs.tokens))  # tokens of all ranks
    for i in range(len(inputs)):
        hidden_states, mask = inputs.get(i, adapter.A_log.device)
        count = max(1, round(part * len(hidden_states)))
        together = max(1, _TOKENS_TOGETHER // hidden_states.shape[1])
        for start in range(0, count, together):
            rows = slice(start, min(count, start + together))
            own = None if mask is None else mask[rows]
            yield adapter.quantities(hidden_states[rows], own)
