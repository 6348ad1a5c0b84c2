"""Remove whole state dimensions, and let the remaining weights take over what they did."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from loguru import logger
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.criteria.states import (
    STATE_SCORES,
    StateInputs,
    StateStatistics,
    lowest,
)
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.modifiers.removal import (
    CalibrationInputs,
    RemovalModifier,
    dense_outputs,
    fit_out_proj,
    masked_error,
    nearest,
    relative_error,
    remove,
)
from sparsessm_plugin.recurrence import differentiable, scan, scan_products, scan_states
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.refit.compensation import mix_C, skip_update, without_skip
from sparsessm_plugin.refit.mixture import MixtureStatistics, best_mixture, fit_mixtures
from sparsessm_plugin.refit.reconstruction import reconstruct
from sparsessm_plugin.selection.masks import check_sparsity
from sparsessm_plugin.selection.subsets import EXHAUSTIVE, best_subsets, choose

Compensation = Literal["D", "C", "B", "reconstruct", "out_proj"]

# Every how many steps the states are looked at. Neighbouring steps say nearly the same, and in
# the Mamba-2 layout, and with K N states in place of N, the sums cost far more than the scan.
# Little text is looked at more closely, so that about _ENOUGH_STEPS are seen.
_EVERY_STATES, _EVERY_HEADS, _EVERY_EXPANDED, _ENOUGH_STEPS = 4, 16, 16, 1024
# Cheapest sets by their own cost that are ranked again by what C and D leave of it.
_RERANKED = 256
_LEARNING_RATE = 1e-3
# Largest N for N^2 features, to mix C alone. B and C together take N^3, for N as in EXHAUSTIVE.
_MOST_MIXED = 32
# Sets that are compared with B and C fitted to each, and rounds of that fit: so many to compare,
# so many at the end, and the gain from one to the next below which it ends.
_COMPARED, _ROUNDS_COMPARED, _ROUNDS, _TOLERANCE = 8, 4, 40, 1e-3
# Memory for the states of one pass, and steps whose products are summed together.
_STATE_BYTES, _STATE_BYTES_CPU = 2**30, 2**28
_SAMPLES, _SAMPLE_BYTES = 256, 2**28


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
        by least squares; Mamba-1 layout without a norm on them, B for up to 16 states);
        ``reconstruct`` (gradient steps on the rows of B and C and on out_proj, against the
        layer's own dense output); ``out_proj`` (linear regression); ``none``; default: D, C, B
        and out_proj where C can be mixed, D and out_proj where B and C are normalised, D,
        reconstruct and out_proj for the Mamba-2 layout
    :param reconstruct_steps: gradient steps of ``reconstruct`` for each layer
    :param layer_batches: layers are looked at and fitted over so many batches, the first (of each
        rank's); default all
    :param distill_steps: gradient steps on all weights of all mixers towards the dense model's
        predictions of the calibration data, after the last layer; 0 is none
    :param distill_learning_rate: of Adam, the highest
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
                f"must be one number, got {shown(value)}: transformers, mamba-ssm and vLLM read "
                "one state size for all layers from the config"
            )
        if isinstance(value, bool):
            raise ValueError(f"must be a whole number, got {value}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, got {value}")
        return value

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

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
        data_free = data_free and not self.distill_steps
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
            if adapter.sizes.state_size > EXHAUSTIVE:
                return ("D", "C", "out_proj")
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
            fixed, G = sizes.intermediate_size, sizes.n_groups

            def fits(states: int) -> bool:
                return (fixed + 2 * G * states) % 8 == 0

            if fixed % 8 == 0 and not fits(keep):
                raise SparseSSMError(
                    f"{who}: keeping {keep} of {sizes.state_size} states in {G} groups of "
                    f"{adapter.name} gives its convolution a number of channels that 8 does not "
                    "divide, which causal-conv1d and mamba-ssm refuse; "
                    f"{nearest(fits, keep, sizes.state_size)}"
                )
        given = self.compensate or ()
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

    # -- one mixer -------------------------------------------------------------------

    def shrink(
        self, adapter: MixerAdapter, inputs: CalibrationInputs
    ) -> tuple[str, list[int], MixerAdapter, dict[str, Any]]:
        steps = self.compensations(adapter)
        mixing = "C" in steps
        statistics = None
        if self.requires_calibration_data:
            statistics = gather(adapter, inputs, mixing, vote=self.saliency == "paper")

        def choose_states() -> list[Tensor]:
            if statistics is None:
                return [self._candidates(adapter, None, steps)]
            if not statistics.is_finite():
                raise SparseSSMError(
                    f"{adapter.name}: NaN or infinite values in its recurrence during "
                    "calibration; nothing was removed from this layer"
                )
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
            return "state", removed, small, {}
        targets = dense_outputs(adapter, inputs)
        if adapter.norms_state:
            fit_scale(adapter, small, inputs)
        entry: dict[str, Any] = {"error_removed": relative_error(small, inputs, targets)}
        if mixture is not None:
            write_rows(adapter, small, mixture.B, mixture.C)
        elif mixing:
            write_rows(adapter, small, None, *rows_C)
        if "D" in steps:
            fit_D(adapter, small, inputs)
        if "reconstruct" in steps:
            lower = fit_state_rows(small, inputs, targets, self.reconstruct_steps)
            entry["diverged"] = not lower
            if not lower:
                logger.info(
                    f"{adapter.name}: {self.reconstruct_steps} steps of reconstruct did not lower "
                    "the error; the weights are what they were before the steps"
                )
        if "out_proj" in steps:
            fit_out_proj(small, inputs, targets)
        entry["error_left"] = relative_error(small, inputs, targets)
        return "state", removed, small, entry

    def _candidates(
        self,
        adapter: MixerAdapter,
        statistics: StateStatistics | None,
        steps: tuple[str, ...],
    ) -> Tensor:
        """(sets, kept states of all groups) sets of states to keep, the best one first."""
        sizes = adapter.sizes
        device = adapter.A_log.device
        remove_count = sizes.state_size - self.kept(sizes.state_size)
        removed: list[int] = []
        if self.saliency != "output_energy":
            score = STATE_SCORES[self.saliency](
                StateInputs(statistics, *row_norms(adapter), remove_count)
            )
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


# -- statistics --------------------------------------------------------------------------


def pieces(
    adapter: MixerAdapter, inputs: CalibrationInputs, states: int, usual: int
) -> Iterator[tuple[MixerQuantities, int]]:
    """The recurrence's quantities, few enough sequences at a time to keep their states.

    :param states: states of a channel that will be kept
    :param usual: look at one step of so many, at more where there is little text
    :return: quantities, and the number of steps from one look to the next
    """
    for i in range(len(inputs)):
        hidden_states, mask = inputs.get(i, adapter.A_log.device)
        length = hidden_states.shape[1]
        # of a short sequence in long padding a step must be seen, too
        real = length if mask is None else max(1, int(mask.bool().sum(1).max()))
        every = min(usual, real, max(1, inputs.tokens // _ENOUGH_STEPS))
        # so many sequences at a time that their states take a few hundred megabytes
        per_row = 4 * (length // every) * adapter.sizes.intermediate_size * states
        rows = max(1, (_STATE_BYTES_CPU if hidden_states.is_cpu else _STATE_BYTES) // per_row)
        for start in range(0, len(hidden_states), rows):
            piece = hidden_states[start : start + rows]
            piece_mask = None if mask is None else mask[start : start + rows]
            yield adapter.quantities(piece, piece_mask), every


def sampled(q: MixerQuantities, every: int, *tensors: Tensor) -> list[Tensor]:
    """The steps that are looked at, (steps, ...), without padding.

    :param tensors: (b, L, ...) each, or (b, L // every, ...) where they hold such steps only
    """
    length = q.u.shape[1]
    at = torch.arange(every - 1, every * (length // every), every, device=q.u.device)
    taken = [t if t.shape[1] == len(at) != length else t[:, at] for t in tensors]
    if q.mask is None:
        return [t.flatten(0, 1) for t in taken]
    return [t[q.mask[:, at]] for t in taken]


def gather(
    adapter: MixerAdapter, inputs: CalibrationInputs, mixing: bool = False, vote: bool = False
) -> StateStatistics:
    """Run the recurrence over the calibration inputs and sum up what each state adds.

    Of several ranks only rank 0 gets the sums.

    :param mixing: also the sums that mixing C needs
    :param vote: also the scores that the paper's vote needs
    """
    statistics = StateStatistics(mixing)
    out_norm = adapter.out_norm
    usual = _EVERY_STATES if adapter.has_state_transitions else _EVERY_HEADS
    if vote and adapter.has_state_transitions:
        usual = 1  # the paper's vote is taken at every step
    for q, every in pieces(adapter, inputs, adapter.sizes.state_size, usual):
        if adapter.has_state_transitions and not (mixing or vote):
            weight = adapter.out_gain(q, q.u) * out_norm  # no norm: the gate, whatever y is
            products = scan_products(q, weight, every)
            if products is not None:
                statistics.add_products(products, *sampled(q, every, _by_group(q), q.u, weight))
                continue
        y, h = scan_states(q, every)
        if vote:
            votes = _vote_score(adapter, h)
            if q.mask is not None:
                length = every * h.shape[1]
                votes = votes * q.mask[:, every - 1 : length : every, None, None]
            statistics.add_steps(votes.sum(0))
        weight = adapter.out_gain(q, y) * out_norm
        flat = sampled(q, every, h, _by_group(q), q.u, weight)
        for samples in zip(*(s.split(_SAMPLES) for s in flat), strict=True):
            statistics.add(*samples)
    distributed.reduce_fields(f"states' sums of {adapter.name}", statistics, to=0)
    return statistics


def _by_group(q: MixerQuantities) -> Tensor:
    """(b, L, G, N) C."""
    return q.C if q.C.ndim == 4 else q.C[:, :, None]


def gather_mixtures(adapter: MixerAdapter, inputs: CalibrationInputs) -> MixtureStatistics:
    """Run every transition with every row of B, and sum up what B and C can be mixed from.

    Of several ranks only rank 0 gets the sums.
    """
    statistics = MixtureStatistics()
    N, out_norm = adapter.sizes.state_size, adapter.out_norm
    chunk = max(1, _SAMPLE_BYTES // (4 * len(out_norm) * N * N))
    for q, every in pieces(adapter, inputs, N * N, _EVERY_EXPANDED):
        y = scan(q)
        B = q.B.repeat(1, 1, N)
        _, h = scan_states(replace(q, A=q.A.repeat_interleave(N, dim=1), B=B, C=B), every)
        from_states = y - q.D * q.u
        flat = sampled(q, every, h, q.C, q.u, adapter.out_gain(q, y) * out_norm, from_states)
        for samples in zip(*(s.split(chunk) for s in flat), strict=True):
            statistics.add(*samples)
    distributed.reduce_fields(f"mixtures' sums of {adapter.name}", statistics, to=0)
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
    states = range(adapter.axis_length("state"))
    norms = []
    for axis in adapter.state_rows:
        rows = adapter.entries_along(axis)[axis.positions(states)]
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


@dataclass(frozen=True)
class MixedRows:
    """States that stay, (K,), and their rows of B and C as mixtures (K, N) of the old rows."""

    kept: Tensor
    B: Tensor
    C: Tensor


def mix_rows(
    adapter: MixerAdapter, inputs: CalibrationInputs, candidates: Tensor, with_D: bool
) -> MixedRows:
    """Choose among sets of states with B and C fitted to each, and fit the best further.

    :param candidates: (sets, K) sets of states, the most promising ones first
    :param with_D: D will be fitted to what is left
    """
    statistics = gather_mixtures(adapter, inputs)

    def fit() -> list[Tensor]:
        problem = statistics.problem(with_D)
        kept, P, Q, _ = best_mixture(problem, candidates[:_COMPARED], _ROUNDS_COMPARED, _TOLERANCE)
        P, Q, _ = fit_mixtures(problem.of(kept), P, Q, _ROUNDS, _TOLERANCE)
        return [kept, P, Q]

    device = adapter.A_log.device
    return MixedRows(*distributed.share(f"mixtures of {adapter.name}", fit, device=device))


def write_rows(adapter: MixerAdapter, small: MixerAdapter, *mixtures: Tensor | None) -> None:
    """Write mixtures (K, N) of the old rows of B, then of C, where they are given."""
    for M, old, new in zip(mixtures, adapter.state_rows, small.state_rows, strict=True):
        if M is not None:
            rows = adapter.mixer.get_parameter(old.tensor)[old.start : old.start + M.shape[1]]
            target = small.mixer.get_parameter(new.tensor)
            target[new.start : new.start + len(M)] = (M @ rows.double()).to(target.dtype)


def fit_D(adapter: MixerAdapter, small: MixerAdapter, inputs: CalibrationInputs) -> None:
    """Add to D what of the lost scan output follows the scan input."""
    entries, weight = len(small.D), adapter.out_norm
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
    sums = distributed.reduce_sum("sums for D", {"lost": lost, "energy": energy})
    lost, energy = sums["lost"], sums["energy"]
    small.D.add_(skip_update(lost, energy).to(small.D.dtype))


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
    both, energy = distributed.total("scale of the states", both, energy)
    if energy > 0 and both > 0:
        small.scale_state(both / energy)


def fit_state_rows(
    small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor], steps: int
) -> bool:
    """Fit what makes B and C, and out_proj, to the dense output by gradient steps.

    Several ranks take the same steps as one would: all work on one batch, each on some of its rows.

    :return: whether that lowers the error; if not, the weights are what they were
    """
    device = small.A_log.device
    counts = distributed.gather("batches to fit to", len(targets))
    batches = [(owner, i) for owner, count in enumerate(counts) for i in range(count)]
    energy = sum(float(t.square().sum()) for t in targets)
    energy = distributed.total("energy to fit to", energy)[0] / len(batches)

    def rows(owner: int, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        def batch() -> list[Tensor]:
            hidden_states, mask = inputs.get(i, device)
            return [hidden_states, targets[i].to(device), *([] if mask is None else [mask])]

        whole = distributed.share("batch to fit to", batch, owner, device)
        x, target, *mask = (t[distributed.rank() :: distributed.world_size()] for t in whole)
        return x, target, mask[0] if mask else None

    def loss(step: int) -> Tensor:
        x, target, mask = rows(*batches[step])
        if len(x) == 0:  # fewer rows than ranks
            return 0.0 * torch.stack([p.sum() for p, _ in parameters]).sum()
        q = small.quantities(x, mask)
        y = differentiable.scan(q)
        error = masked_error(target, small.output(q, y), q.mask)
        return error.square().sum() / (energy + 1e-30)

    def add_gradients(gradients: list[Tensor]) -> None:
        distributed.reduce_sum("gradients", {str(i): g for i, g in enumerate(gradients)})

    parameters: list[tuple[torch.nn.Parameter, Tensor | None]] = [*small.state_parameters()]
    parameters.append((small.mixer.out_proj.weight, None))
    before = relative_error(small, inputs, targets)
    weights = [parameter.detach().clone() for parameter, _ in parameters]
    with tf32():  # steps are far coarser than what it rounds away
        reconstruct(parameters, loss, len(batches), steps, _LEARNING_RATE, add_gradients)
    # Adam's first steps move away from a fit that is good already; too few of them stay there
    lower = relative_error(small, inputs, targets) < before
    if not lower:
        for (parameter, _), weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return lower
