"""Choose and remove key dims of gated delta nets, and fit what remains to what they did.

Shapes: b sequences, L steps, G key heads of dk entries, M = hidden_size.
"""

from collections.abc import Callable, Iterator
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
from sparsessm_plugin.methods.outputs import (
    dense_outputs,
    fit_out_proj,
    masked_error,
    relative_error,
)
from sparsessm_plugin.methods.removal import Shrunk, nearest, remove
from sparsessm_plugin.methods.state_fits import fit_state_rows
from sparsessm_plugin.methods.state_settings import StateSettings
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.recurrence.quantities import DeltaQuantities
from sparsessm_plugin.selection.elimination import eliminate_in_rounds

# Text by which sets are judged, and how much of it at once: every round is some passes over it.
_TOKENS_JUDGED, _TOKENS_TOGETHER = 2**14, 2**12
_ROUNDS = 16  # in which all key dims of a head would go
_PROBES = 2  # random projections of the output's change, for each sequence


class KeyDims:
    """How key dims are chosen, and what takes over what they did.

    :param settings: of the removal
    :param who: asks for it, for messages
    :param not_finite: the error about a mixer whose recurrence gives no numbers
    """

    def __init__(
        self,
        settings: StateSettings,
        who: str,
        not_finite: Callable[[MixerAdapter], SparseSSMError],
    ) -> None:
        self.settings = settings
        self.who = who
        self.not_finite = not_finite

    def check(self, adapter: MixerAdapter) -> None:
        """Refuse a mixer that the settings do not fit, by its sizes alone."""
        who, sizes = self.who, adapter.sizes
        keep = self.settings.kept(sizes.state_size)
        if not 1 <= keep < sizes.state_size:
            raise SparseSSMError(
                f"{who}: keeping {keep} of the {sizes.state_size} key dims of {adapter.name} "
                f"removes none or all; keep 1 to {sizes.state_size - 1}"
            )
        values, G = sizes.intermediate_size, sizes.n_groups

        def fits(dims: int) -> bool:
            return (values + 2 * G * dims) % 8 == 0

        if values % 8 == 0 and not fits(keep):
            raise SparseSSMError(
                f"{who}: keeping {keep} of {sizes.state_size} key dims in {G} key heads of "
                f"{adapter.name} gives its convolution a number of channels that 8 does not "
                f"divide, which causal-conv1d refuses; {nearest(fits, keep, sizes.state_size)}"
            )
        for step in self.settings.compensate or ():
            if step not in ("reconstruct", "out_proj"):
                raise SparseSSMError(
                    f"{who}: compensate: {step} is not possible in {adapter.name} "
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
        diverged = None
        if "reconstruct" in steps:
            count = self.settings.reconstruct_steps
            diverged = not fit_state_rows(small, inputs, targets, count)
            if diverged:
                logger.info(
                    f"{adapter.name}: {count} steps of reconstruct did not lower the error; "
                    "the weights are what they were before the steps"
                )
        if "out_proj" in steps:
            fit_out_proj(small, inputs, targets)
        error_left = relative_error(small, inputs, targets)
        return Shrunk("key_dims", removed, small, error_removed, error_left, diverged)

    def _choose(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> list[int]:
        """Indices of the axis that go, ascending."""
        sizes = adapter.sizes
        G, dk, keep = sizes.n_groups, sizes.state_size, self.settings.kept(sizes.state_size)
        criterion = KEY_DIM_CRITERIA[self.settings.saliency]
        statistics = None
        if criterion.statistics:
            statistics = gather(adapter, inputs)
        alive = None
        if criterion.score is None:
            alive = eliminate_in_rounds(
                lambda alive: self._costs(adapter, inputs, alive),
                *(G, dk, keep, max(1, dk // _ROUNDS), adapter.A_log.device),
            )

        def choose() -> list[Tensor]:
            if alive is not None:
                return [(~alive).flatten().nonzero().flatten()]
            if statistics is not None and not statistics.is_finite():
                raise self.not_finite(adapter)
            assert criterion.score is not None
            score = criterion.score(KeyDimInputs(statistics, *row_norms(adapter), dk - keep))
            return [torch.tensor(lowest(score, dk - keep), device=adapter.A_log.device)]

        device = adapter.A_log.device
        (removed,) = distributed.share(f"key dims of {adapter.name}", choose, device=device)
        return [int(i) for i in removed]

    def _costs(self, adapter: MixerAdapter, inputs: CalibrationInputs, alive: Tensor) -> Tensor:
        costs = removal_costs(adapter, inputs, alive)
        if not bool(torch.isfinite(costs).all()):
            raise self.not_finite(adapter)
        return costs


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


def removal_costs(adapter: MixerAdapter, inputs: CalibrationInputs, alive: Tensor) -> Tensor:
    """What removing each further key dim adds to the squared error of the mixer's output.

    With s the share of each key dim that is left, q_i and k_i times sqrt(s_i) before they are
    normalised, and E the squared error of the mixer's whole output against the dense one,

        E(s - e_i) - E(s) = -dE/ds_i + |J e_i|^2,    J the Jacobian of the output

    to second order (Gauss-Newton), at the present set and not at the dense model: so what others
    have to say, once all are normalised anew and the delta step is another, counts. The diagonal of
    J^T J comes from random signs r, E (J^T r)_i^2, with an r for each sequence.

    :param alive: (G, dk) bool, the key dims that are still there
    :return: (G, dk) float64, of all ranks together
    """
    total = torch.zeros(alive.shape, dtype=torch.float64, device=alive.device)
    generator = torch.Generator(alive.device).manual_seed(0)
    for quantities in judged(adapter, inputs):
        target = adapter.output(quantities, scan(quantities))
        share = alive.float().expand(len(target), -1, -1).clone().requires_grad_(True)
        with torch.enable_grad():
            root = torch.where(alive, share, 1.0).sqrt() * alive  # no slope where nothing is
            root = root[:, None]
            left = replace(quantities, q=quantities.q * root, k=quantities.k * root)
            output = adapter.output(left, scan(left))
            error = masked_error(target, output, quantities.mask)
            (slope,) = torch.autograd.grad(error.square().sum(), share, retain_graph=True)
            total -= slope.double().sum(0)
            for probe in range(_PROBES):
                signs = torch.randint(0, 2, error.shape, generator=generator, device=alive.device)
                changed = (error * (2 * signs - 1)).sum()
                more = probe < _PROBES - 1
                (slope,) = torch.autograd.grad(changed, share, retain_graph=more)
                total += slope.double().square().sum(0) / _PROBES
    return distributed.reduce_sum("costs of key dims", {"costs": total})["costs"]


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
