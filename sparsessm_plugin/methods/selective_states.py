"""Choose and remove states of the selective recurrence, and fit what remains to what they did."""

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.states import (
    STATE_CRITERIA,
    StateInputs,
    StateStatistics,
    lowest,
)
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.outputs import dense_outputs, relative_error
from sparsessm_plugin.methods.removal import Shrunk, remove
from sparsessm_plugin.methods.state_fits import (
    fit_D,
    fit_scale,
    mix_rows,
    write_rows,
)
from sparsessm_plugin.methods.state_kind import StateKind
from sparsessm_plugin.methods.state_sums import gather, mixing_gram, per_skip_entry, row_norms
from sparsessm_plugin.refit.compensation import mix_C, without_skip
from sparsessm_plugin.selection.subsets import EXHAUSTIVE, best_subsets, choose

# Cheapest sets by their own cost that are ranked again by what C and D leave of it.
_RERANKED = 256


class SelectiveStates(StateKind):
    """How states of the selective recurrence are chosen, and what takes over what they did."""

    unit = "states"
    groups = "groups"
    refused_by = "causal-conv1d and mamba-ssm refuse"

    def check(self, adapter: MixerAdapter) -> None:
        super().check(adapter)
        who, sizes = self.who, adapter.sizes
        given = self.settings.compensate or ()
        if "B" in given and "C" not in given:
            raise SparseSSMError(f"{who}: compensate: B is fitted in turn with C; give both")
        if "B" in given and sizes.state_size > EXHAUSTIVE:
            raise SparseSSMError(
                f"{who}: compensate: B is possible for up to {EXHAUSTIVE} states; "
                f"{adapter.name} has {sizes.state_size}"
            )
        if "C" in given and not adapter.mixes_C:
            raise SparseSSMError(
                f"{who}: compensate: C is not possible in {adapter.name} ({adapter.family}), "
                f"where {adapter.between_C}"
            )

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        """Decide what to remove and fit the rest; see :meth:`MixerRemoval.shrink`."""
        steps = self.settings.compensations(adapter)
        mixing = "C" in steps
        statistics = None
        if self.settings.watches_data:
            vote = STATE_CRITERIA[self.settings.saliency].needs_steps
            statistics = gather(adapter, inputs, mixing, vote)

        def choose_states() -> list[Tensor]:
            if statistics is None:
                return [self._candidates(adapter, None, steps)]
            if not statistics.is_finite():
                raise self.not_finite(adapter)
            sets = self._candidates(adapter, statistics, steps)
            if not mixing or "B" in steps:
                return [sets]
            M_C, _ = mix_C(mixing_gram(statistics, "D" in steps), sets)
            return [sets, M_C[0]]

        candidates, *rows_C = distributed.share(
            f"states of {adapter.name}", choose_states, device=adapter.A_log.device
        )
        mixture = None
        if "B" in steps:
            mixture = mix_rows(adapter, inputs, candidates, "D" in steps)
            candidates = mixture.kept[None]
        kept = set(candidates[0].tolist())
        removed = [n for n in range(adapter.axis_length("state")) if n not in kept]
        small = remove(adapter, "state", removed)
        if statistics is None:
            return Shrunk("state", removed, small)
        targets = dense_outputs(adapter, inputs)
        if adapter.norms_state:
            fit_scale(adapter, small, inputs)
        error_removed = relative_error(small, inputs, targets)
        if mixture is not None:
            write_rows(adapter, small, mixture.B, mixture.C)
        elif mixing:
            write_rows(adapter, small, None, *rows_C)
        if "D" in steps:
            fit_D(adapter, small, inputs)
        diverged = self.fit_output(small, inputs, targets, steps)
        error_left = relative_error(small, inputs, targets)
        return Shrunk("state", removed, small, error_removed, error_left, diverged)

    def _candidates(
        self,
        adapter: MixerAdapter,
        statistics: StateStatistics | None,
        steps: tuple[str, ...],
    ) -> Tensor:
        """(sets, kept states of all groups) sets of states to keep, the best one first."""
        sizes = adapter.sizes
        device = adapter.A_log.device
        remove_count = sizes.state_size - self.settings.kept(sizes.state_size)
        removed: list[int] = []
        criterion = STATE_CRITERIA[self.settings.saliency]
        if criterion.score is not None:
            score = criterion.score(StateInputs(statistics, *row_norms(adapter), remove_count))
            removed = lowest(score, remove_count)
            return _complement(removed, adapter.axis_length("state"), device)
        assert statistics is not None
        assert statistics.gram is not None
        gram = statistics.gram
        if "D" in steps:
            skip, energy = per_skip_entry(adapter, statistics)
            gram = torch.stack(
                [without_skip(g, s, e) for g, s, e in zip(gram, skip, energy, strict=True)]
            )
        if "C" in steps and sizes.state_size <= EXHAUSTIVE:
            candidates = best_subsets(gram[0], remove_count, _RERANKED)
            kept = torch.stack([(~c).nonzero().flatten() for c in candidates])
            _, left = mix_C(mixing_gram(statistics, "D" in steps), kept)
            return kept[left.argsort(stable=True)]
        for group, g in enumerate(gram):
            chosen = choose(g, remove_count).nonzero().flatten()
            removed += (chosen + group * sizes.state_size).tolist()
        return _complement(removed, adapter.axis_length("state"), device)


def _complement(removed: list[int], length: int, device: torch.device) -> Tensor:
    """(1, kept) indices that stay."""
    gone = set(removed)
    return torch.tensor([[n for n in range(length) if n not in gone]], device=device)
