"""What remains of a mixer is fitted to what its removed states did.

Each step works on a smaller float32 copy of a mixer, in place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.outputs import masked_error, relative_error
from sparsessm_plugin.methods.state_sums import gather_mixtures
from sparsessm_plugin.recurrence import differentiable, scan
from sparsessm_plugin.refit.compensation import skip_update
from sparsessm_plugin.refit.mixture import best_mixture, fit_mixtures
from sparsessm_plugin.refit.reconstruction import reconstruct

_LEARNING_RATE = 1e-3
# Sets that are compared with B and C fitted to each, and rounds of that fit: so many to compare,
# so many at the end, and the gain from one to the next below which it ends.
_COMPARED, _ROUNDS_COMPARED, _ROUNDS, _TOLERANCE = 8, 4, 40, 1e-3


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
    """Fit what the state comes from, and out_proj, to the dense output by gradient steps.

    Several ranks take the same steps as one would: all work on one batch, each on some of its rows.

    :return: whether that lowers the error; if not, the weights are what they were
    """
    device = small.A_log.device
    counts = distributed.gather("batches to fit to", len(targets))
    batches = [(owner, i) for owner, count in enumerate(counts) for i in range(count)]
    energy = sum(float(t.square().sum()) for t in targets)
    energy = distributed.total("energy to fit to", energy)[0] / len(batches)

    def rows(number: int) -> dict[str, Tensor | None]:
        owner, i = batches[number]

        def batch() -> list[Tensor]:
            hidden_states, mask = inputs.get(i, device)
            return [hidden_states, targets[i].to(device), *([] if mask is None else [mask])]

        whole = distributed.share("batch to fit to", batch, owner, device)
        x, target, *mask = (t[distributed.rank() :: distributed.world_size()] for t in whole)
        return {"x": x, "target": target, "mask": mask[0] if mask else None}

    def loss(batch: dict[str, Any]) -> Tensor:
        x, target, mask = batch["x"], batch["target"], batch["mask"]
        if len(x) == 0:  # fewer rows than ranks
            return 0.0 * torch.stack([p.sum() for p, _ in parameters]).sum()
        q = small.quantities(x, mask)
        y = differentiable.scan(q)
        error = masked_error(target, small.output(q, y), q.mask)
        return error.square().sum() / (energy + 1e-30)

    def add_gradients(gradients: list[Tensor]) -> None:
        distributed.reduce_sum("gradients", {str(i): g for i, g in enumerate(gradients)})

    parameters: list[tuple[torch.nn.Parameter, Tensor | None]] = [*small.state_parameters()]
    parameters.append((small.projection(small.exit_kind).weight, None))
    before = relative_error(small, inputs, targets)
    weights = [parameter.detach().clone() for parameter, _ in parameters]
    with tf32():  # steps are far coarser than what it rounds away
        combine = add_gradients if distributed.is_distributed() else None
        reconstruct(parameters, loss, len(batches), steps, _LEARNING_RATE, combine, rows)
    # Adam's first steps move away from a fit that is good already; too few of them stay there
    lower = relative_error(small, inputs, targets) < before
    if not lower:
        for (parameter, _), weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return lower
