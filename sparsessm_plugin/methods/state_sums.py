"""Sums over the calibration inputs of a mixer, from which states are chosen and fitted.

Shapes: b sequences, L steps, D channels, N states, G groups.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.states import StateStatistics
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.recurrence import scan, scan_products, scan_states
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.refit.compensation import without_skip
from sparsessm_plugin.refit.mixture import MixtureStatistics

# Every how many steps the states are looked at. Neighbouring steps say nearly the same, and in
# the Mamba-2 layout, and with K N states in place of N, the sums cost far more than the scan.
# Little text is looked at more closely, so that about _ENOUGH_STEPS are seen.
_EVERY_STATES, _EVERY_HEADS, _EVERY_EXPANDED, _ENOUGH_STEPS = 4, 16, 16, 1024
# Memory for the states of one pass, and steps whose products are summed together.
_STATE_BYTES, _STATE_BYTES_CPU = 2**30, 2**28
_SAMPLES, _SAMPLE_BYTES = 256, 2**28


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
