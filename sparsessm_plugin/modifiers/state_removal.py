"""Remove whole state dimensions, and let the remaining weights take over what they did."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.mixers import MixerAdapter, MixerQuantities, get_tensor
from sparsessm_plugin.modifiers.removal import (
    CalibrationInputs,
    RemovalModifier,
    dense_outputs,
    fit_out_proj,
    masked_error,
    relative_error,
    remove,
)
from sparsessm_plugin.saliency.states import (
    STATE_SCORES,
    StateInputs,
    StateStatistics,
    lowest,
)
from sparsessm_plugin.scan import REFERENCE, scan, scan_states
from sparsessm_plugin.solvers.compensation import (
    fit_features,
    mix_C,
    skip_update,
    without_skip,
)
from sparsessm_plugin.solvers.reconstruction import reconstruct
from sparsessm_plugin.solvers.subsets import EXHAUSTIVE, best_subsets, choose

Compensation = Literal["D", "C", "B", "reconstruct", "out_proj"]

# Every how many steps the states are looked at. Neighbouring steps say nearly the same, and in
# the Mamba-2 layout, and with K N states in place of N, the sums cost far more than the scan.
# Little text is looked at more closely, so that about _ENOUGH_STEPS are seen.
_EVERY_STATES, _EVERY_HEADS, _EVERY_EXPANDED, _ENOUGH_STEPS = 4, 16, 16, 1024
# Cheapest sets by their own cost that are ranked again by what C and D leave of it.
_RERANKED = 256
_OUT_PROJ_RIDGE = 1e-2
_LEARNING_RATE = 1e-3
# Times that B and C are fitted in turn, and the largest N for N^2 features.
_ROUNDS = 1
_MOST_MIXED = 32
# Memory for the states of one pass, and steps whose products are summed together.
_STATE_BYTES, _STATE_BYTES_CPU = 2**30, 2**28
_SAMPLES = 256


class StateRemovalModifier(RemovalModifier):
    """Removes the states that matter least for the mixer's output, from every mixer alike.

    A_log (Mamba-1), B and C lose the same states, so that a smaller dense model remains, which
    stock runtimes load. What the removed states did is then fitted, layer by layer on the
    calibration text and without labels, into weights that stay.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            StateRemovalModifier:
              sparsity: 0.5

    Lifecycle: see :class:`MixerModifier`. Inputs of a mixer are kept in memory until it is
    pruned: one mixer's at a time in the sequential pipeline, all in the basic one.

    :param keep: states that stay, in each group; one number for the whole model, because the
        loaders read one from the config
    :param sparsity: share of the states to remove, instead of ``keep``, in (0, 1)
    :param saliency: ``output_energy`` (default): the squared change of the output that a set
        of states makes together; for comparison ``magnitude`` (row norms of B and C), ``last``,
        ``paper`` (the vote of SparseSSM's code), ``ghost`` (after arXiv 2602.11408)
    :param compensate: any of ``D``; ``C`` and with it ``B`` (rows as mixtures of the old ones,
        in closed form; Mamba-1 layout without a norm on them); ``reconstruct`` (gradient steps
        on the rows of B and C and on out_proj, against the layer's own dense output);
        ``out_proj`` (linear regression); ``none``; default: D, C, B and out_proj where C can be
        mixed, D and out_proj where B and C are normalised, D, reconstruct and out_proj for the
        Mamba-2 layout
    :param reconstruct_steps: gradient steps of ``reconstruct`` for each layer
    :param targets: must match all mixers
    :param ignore: must match none
    :param report_path: ``.json`` file to write the report to
    """

    keep: int | None = None
    sparsity: float | None = None
    saliency: Literal["output_energy", "magnitude", "last", "paper", "ghost"] = "output_energy"
    compensate: list[Compensation] | None = None
    reconstruct_steps: int = Field(default=200, ge=1)

    # -- settings --------------------------------------------------------------------

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: Any) -> Any:
        if isinstance(value, list | dict):
            raise ValueError(
                f"must be one number, got {value!r}: transformers, mamba-ssm and vLLM read one "
                "state size for all layers from the config"
            )
        if isinstance(value, bool):
            raise ValueError(f"must be a whole number, got {value}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, got {value}")
        return value

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"must be between 0 and 1, both excluded, got {value}")
        return value

    @field_validator("compensate", mode="before")
    @classmethod
    def _read_compensate(cls, value: Any) -> Any:
        if value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> "StateRemovalModifier":
        if (self.keep is None) == (self.sparsity is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give either keep or sparsity, got {given}")
        data_free = self.saliency in ("magnitude", "last") and self.compensate == []
        self.requires_calibration_data = not data_free
        return self

    def kept(self, state_size: int) -> int:
        """How many of the states of a group stay."""
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        return round(state_size * (1 - self.sparsity))

    def compensations(self, adapter: MixerAdapter) -> tuple[str, ...]:
        """What is fitted again in a mixer."""
        if self.compensate is not None:
            return tuple(self.compensate)
        if adapter.mixes_C:
            if adapter.sizes.state_size > _MOST_MIXED:
                return ("D", "out_proj")
            return ("D", "C", "B", "out_proj")
        if adapter.norms_state:
            return ("D", "out_proj")
        return ("D", "reconstruct", "out_proj")

    def check_mixer(self, adapter: MixerAdapter) -> None:
        who, sizes = type(self).__name__, adapter.sizes
        keep = self.kept(sizes.state_size)
        if not 1 <= keep < sizes.state_size:
            raise SparseSSMError(
                f"{who}: keeping {keep} of the {sizes.state_size} states of {adapter.name} "
                f"removes none or all; keep 1 to {sizes.state_size - 1}"
            )
        if not adapter.has_state_transitions:
            fixed = sizes.intermediate_size
            if fixed % 8 == 0 and (fixed + 2 * sizes.n_groups * keep) % 8:
                raise SparseSSMError(
                    f"{who}: keeping {keep} states in {sizes.n_groups} groups of {adapter.name} "
                    "gives its convolution a number of channels that 8 does not divide, which "
                    "causal-conv1d and mamba-ssm refuse"
                )
        given = self.compensate or ()
        if "B" in given and "C" not in given:
            raise SparseSSMError(f"{who}: compensate: B is fitted in turn with C; give both")
        if "C" in given and not adapter.mixes_C:
            reason = "a norm" if adapter.norms_state else "a convolution and SiLU"
            raise SparseSSMError(
                f"{who}: compensate: C is not possible in {adapter.name} ({adapter.family}), "
                f"where {reason} stands between the rows of C and C"
            )

    # -- one mixer -------------------------------------------------------------------

    def shrink(
        self, adapter: MixerAdapter, inputs: CalibrationInputs
    ) -> tuple[str, list[int], MixerAdapter, dict[str, Any]]:
        steps = self.compensations(adapter)
        mixing = "C" in steps
        statistics = None
        if self.requires_calibration_data:
            statistics = gather(adapter, inputs, mixing, vote=self.saliency == "paper")
            if not statistics.is_finite():
                raise SparseSSMError(
                    f"{adapter.name}: NaN or infinite values in its recurrence during "
                    "calibration; nothing was removed from this layer"
                )
        removed = self._choose(adapter, statistics, steps)
        small = remove(adapter, "state", removed)
        if statistics is None:
            return "state", removed, small, {}
        targets = dense_outputs(adapter, inputs)
        if adapter.norms_state:
            fit_scale(adapter, small, inputs)
        entry: dict[str, Any] = {"error_removed": relative_error(small, inputs, targets)}
        if mixing:
            with_D = "D" in steps
            M_C = fit_C(adapter, small, mixing_gram(statistics, with_D), removed)
            if "B" in steps:
                kept = [n for n in range(adapter.sizes.state_size) if n not in set(removed)]
                M_B = torch.eye(adapter.sizes.state_size, dtype=M_C.dtype, device=M_C.device)[kept]
                for _ in range(_ROUNDS):
                    M_B = fit_mixture(adapter, small, inputs, M_B, "B", with_D)
                    M_C = fit_mixture(adapter, small, inputs, M_C, "C", with_D)
        if "D" in steps:
            fit_D(adapter, small, inputs)
        if "reconstruct" in steps:
            fit_state_rows(small, inputs, targets, self.reconstruct_steps)
        if "out_proj" in steps:
            fit_out_proj(small, inputs, targets, _OUT_PROJ_RIDGE)
        entry["error_left"] = relative_error(small, inputs, targets)
        return "state", removed, small, entry

    def _choose(
        self,
        adapter: MixerAdapter,
        statistics: StateStatistics | None,
        steps: tuple[str, ...],
    ) -> list[int]:
        sizes = adapter.sizes
        remove_count = sizes.state_size - self.kept(sizes.state_size)
        if self.saliency != "output_energy":
            score = STATE_SCORES[self.saliency](
                StateInputs(statistics, *row_norms(adapter), remove_count)
            )
            return lowest(score, remove_count)
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
            features = mixing_gram(statistics, "D" in steps)
            kept = torch.stack([(~c).nonzero().flatten() for c in candidates])
            _, left = mix_C(features, kept)
            return candidates[int(left.argmin())].nonzero().flatten().tolist()
        removed: list[int] = []
        for group, g in enumerate(gram):
            chosen = choose(g, remove_count).nonzero().flatten()
            removed += (chosen + group * sizes.state_size).tolist()
        return removed


# -- statistics --------------------------------------------------------------------------


def gather(
    adapter: MixerAdapter,
    inputs: CalibrationInputs,
    mixing: bool = False,
    vote: bool = False,
    expand: Callable[[MixerQuantities, Tensor, Tensor | None], MixerQuantities] | None = None,
) -> StateStatistics:
    """Run the recurrence over the calibration inputs and sum up what each state adds.

    :param mixing: also the sums that mixing C needs
    :param vote: also the scores that the paper's vote needs
    :param expand: makes other states out of the mixer's quantities, hidden states and mask;
        Mamba-1 layout only
    """
    statistics = StateStatistics(mixing)
    out_norm = adapter.out_norm
    states = adapter.sizes.state_size * (1 if expand is None else adapter.sizes.state_size)
    for i in range(len(inputs)):
        hidden_states, mask = inputs.get(i, adapter.A_log.device)
        length = hidden_states.shape[1]
        # of a short sequence in long padding a step must be seen, too
        real = length if mask is None else max(1, int(mask.bool().sum(1).max()))
        usual = _EVERY_STATES if adapter.has_state_transitions else _EVERY_HEADS
        usual = _EVERY_EXPANDED if expand is not None else usual
        every = min(usual, real, max(1, inputs.tokens // _ENOUGH_STEPS))
        if vote and adapter.has_state_transitions:
            every = 1  # the paper's vote is taken at every step
        # so many sequences at a time that their states take a few hundred megabytes
        per_row = 4 * (length // every) * adapter.sizes.intermediate_size * states
        rows = max(1, (_STATE_BYTES_CPU if hidden_states.is_cpu else _STATE_BYTES) // per_row)
        for start in range(0, len(hidden_states), rows):
            piece = hidden_states[start : start + rows]
            piece_mask = None if mask is None else mask[start : start + rows]
            q = adapter.quantities(piece, piece_mask)
            if expand is not None:
                q = expand(q, piece, piece_mask)
            y, h = scan_states(q, every)
            at = torch.arange(every - 1, every * h.shape[1], every, device=h.device)
            if vote:
                votes = _vote_score(adapter, h)
                if q.mask is not None:
                    votes = votes * q.mask[:, at, None, None]
                statistics.add_steps(votes.sum(0))
            C = q.C if q.C.ndim == 4 else q.C[:, :, None]
            weight = adapter.out_gain(q, y) * out_norm
            sampled = [h, C[:, at], q.u[:, at], weight[:, at]]
            if q.mask is None:
                flat = [s.flatten(0, 1) for s in sampled]
            else:
                flat = [s[q.mask[:, at]] for s in sampled]
            for samples in zip(*(s.split(_SAMPLES) for s in flat), strict=True):
                statistics.add(*samples)
    return statistics


def _vote_score(adapter: MixerAdapter, h: Tensor) -> Tensor:
    """(b, T, G, N) sum over a group's channels of A_log^2 h^2, h (b, T, D, N)."""
    sizes = adapter.sizes
    A_log = adapter.A_log.detach().float()
    if A_log.ndim == 1:
        A_log = A_log.repeat_interleave(sizes.head_dim)[:, None]
    return (A_log * h).square().unflatten(2, (sizes.n_groups, -1)).sum(3)


def row_norms(adapter: MixerAdapter) -> tuple[Tensor, Tensor]:
    """(G, N) norms of the projection rows that make B and C."""
    sizes = adapter.sizes
    length = adapter.axis_length("state")
    norms = []
    for axis in adapter.state_rows:
        weight = get_tensor(adapter.mixer, axis.tensor)
        assert weight is not None
        rows = weight.detach()[axis.start : axis.start + length]
        norms.append(rows.double().norm(dim=1).view(sizes.n_groups, sizes.state_size))
    return norms[0], norms[1]


def per_skip_entry(adapter: MixerAdapter, statistics: StateStatistics) -> tuple[Tensor, Tensor]:
    """What D could take over, summed over the channels that share an entry of D.

    :return: (G, entries of D in a group, N) and (G, entries)
    """
    assert statistics.skip is not None
    assert statistics.skip_energy is not None
    sizes = adapter.sizes
    shape = (sizes.n_groups, -1, sizes.head_dim)
    return statistics.skip.unflatten(0, shape).sum(2), statistics.skip_energy.view(shape).sum(2)


def mixing_gram(statistics: StateStatistics, with_D: bool) -> Tensor:
    """(N, N, N, N) Gram matrix of the features h_k C_j, less what D takes over."""
    assert statistics.mixing is not None
    assert statistics.mixing_skip is not None
    if not with_D:
        return statistics.mixing
    assert statistics.skip_energy is not None
    N = len(statistics.mixing)
    flat = without_skip(
        statistics.mixing.reshape(N * N, N * N),
        statistics.mixing_skip.flatten(1),
        statistics.skip_energy,
    )
    return flat.view(N, N, N, N)


# -- compensation ------------------------------------------------------------------------


def fit_C(
    adapter: MixerAdapter, small: MixerAdapter, features: Tensor, removed: list[int]
) -> Tensor:
    """New rows of C as mixtures of all old ones; D may be fitted to the rest afterwards.

    :param features: (N, N, N, N) Gram matrix from :func:`mixing_gram`
    :return: (K, N) the mixture
    """
    N = adapter.sizes.state_size
    kept = torch.tensor([n for n in range(N) if n not in set(removed)], device=small.A_log.device)
    M, _ = mix_C(features, kept[None])
    old, new = adapter.state_rows[1], small.state_rows[1]
    rows = adapter.mixer.get_parameter(old.tensor)[old.start : old.start + N]
    target = small.mixer.get_parameter(new.tensor)
    target[new.start : new.start + len(kept)] = (M[0] @ rows.double()).to(target.dtype)
    return M[0]


def fit_mixture(
    adapter: MixerAdapter,
    small: MixerAdapter,
    inputs: CalibrationInputs,
    M: Tensor,
    which: Literal["B", "C"],
    with_D: bool,
) -> Tensor:
    """Fit the rows of B, or those of C, as mixtures of all old ones, the others being fixed.

    y is linear in either: a row ``B'_k = sum_j M_kj B_j`` gives the states ``sum_j M_kj h_kj``,
    where h_kj runs with the kept transition A_k and is driven by B_j. So the sums of
    :class:`StateStatistics` over K N such states, beside the N dense ones, hold the least
    squares problem.

    :param M: (K, N) mixture that the rows are now
    :return: (K, N) the new one; the rows are written
    """
    K, N = M.shape

    def expand(q: MixerQuantities, hidden: Tensor, mask: Tensor | None) -> MixerQuantities:
        s = small.quantities(hidden, mask)
        old, new = {"B": (q.B, s.C), "C": (q.C, s.B)}[which]
        mixed = torch.cat([old.repeat(1, 1, K), q.B if which == "B" else q.C], dim=-1)
        fixed = torch.cat([new.repeat_interleave(N, dim=-1), q.C if which == "B" else q.B], dim=-1)
        A = torch.cat([s.A.repeat_interleave(N, dim=1), q.A], dim=1)
        B, C = (mixed, fixed) if which == "B" else (fixed, mixed)
        return replace(q, A=A, B=B, C=C)

    statistics = gather(adapter, inputs, expand=expand)
    assert statistics.gram is not None
    gram = statistics.gram[0]
    if with_D:
        assert statistics.skip is not None
        assert statistics.skip_energy is not None
        gram = without_skip(gram, statistics.skip, statistics.skip_energy)
    M = fit_features(gram, M)
    axis = {"B": 0, "C": 1}[which]
    where, target = adapter.state_rows[axis], small.state_rows[axis]
    rows = adapter.mixer.get_parameter(where.tensor)[where.start : where.start + N]
    weight = small.mixer.get_parameter(target.tensor)
    weight[target.start : target.start + K] = (M @ rows.double()).to(weight.dtype)
    return M


def fit_D(adapter: MixerAdapter, small: MixerAdapter, inputs: CalibrationInputs) -> None:
    """Add to D what of the lost scan output follows the scan input."""
    entries, weight = len(small.mixer.D), adapter.out_norm
    # scale_state() may have put a factor into out_proj, which D goes through as well
    factor = torch.where(weight > 0, small.out_norm / weight, torch.ones_like(weight))
    lost = torch.zeros(entries, dtype=torch.float64, device=weight.device)
    energy = torch.zeros_like(lost)
    after = inputs.iterate(small)
    for (_, q), (_, small_q) in zip(inputs.iterate(adapter), after, strict=True):
        y = scan(q)
        gained = (adapter.out_gain(q, y) * weight).square()
        if q.mask is not None:
            gained = gained * q.mask[..., None]
        missing = y / factor - scan(small_q)
        both = (gained * q.u * missing).sum((0, 1)).double()
        lost += both.view(entries, -1).sum(1)
        energy += (gained * q.u.square()).sum((0, 1)).double().view(entries, -1).sum(1)
    small.mixer.D.add_(skip_update(lost, energy).to(small.mixer.D.dtype))


def fit_scale(adapter: MixerAdapter, small: MixerAdapter, inputs: CalibrationInputs) -> None:
    """Undo the mean change of scale where a norm runs over fewer states than before."""
    weight = adapter.out_norm
    both = energy = 0.0
    after = inputs.iterate(small)
    for (_, q), (_, small_q) in zip(inputs.iterate(adapter), after, strict=True):
        y, small_y = scan(q), scan(small_q)
        gain = adapter.out_gain(q, y) * weight
        if q.mask is not None:
            gain = gain * q.mask[..., None]
        # D may differ by now; the states' part alone is compared
        dense = gain * (y - q.D * q.u)
        left = gain * (small_y - small_q.D * small_q.u)
        both += float((dense * left).sum(dtype=torch.float64))
        energy += float(left.square().sum(dtype=torch.float64))
    if energy > 0 and both > 0:
        small.scale_state(both / energy)


def fit_state_rows(
    small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor], steps: int
) -> None:
    """Fit what makes B and C, and out_proj, to the dense output by gradient steps."""
    device = small.A_log.device
    energy = sum(float(t.square().sum()) for t in targets) / len(targets)

    def loss(i: int) -> Tensor:
        q = small.quantities(*inputs.get(i, device))
        # numba's scan is not differentiable; the other ones are
        y = scan(q, backend=REFERENCE if q.u.is_cpu else None)
        error = masked_error(targets[i].to(device), small.output(q, y), q.mask)
        return error.square().sum() / (energy + 1e-30)

    parameters: list[tuple[torch.nn.Parameter, Tensor | None]] = [*small.state_parameters()]
    parameters.append((small.mixer.out_proj.weight, None))
    before = relative_error(small, inputs, targets)
    weights = [parameter.detach().clone() for parameter, _ in parameters]
    reconstruct(parameters, loss, len(targets), steps, _LEARNING_RATE)
    # Adam's first steps move away from a fit that is good already; too few of them stay there
    if not relative_error(small, inputs, targets) < before:
        for (parameter, _), weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
