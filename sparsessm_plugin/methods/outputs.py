"""The dense output of a mixer, how far a smaller mixer is from it, and out_proj fitted to it."""

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.cost import kept
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.refit.compensation import RIDGES, USUAL_RIDGE, Regression, best_ridge
from sparsessm_plugin.solvers.objective import relative


def dense_outputs(adapter: MixerAdapter, inputs: CalibrationInputs) -> list[Tensor]:
    """(b, L, hidden_size) output of the mixer for every batch; on a GPU only if that has room."""
    return [kept(adapter.output(q, scan(q))) for _, q in inputs.iterate(adapter)]


def masked_error(target: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
    """target - output (b, L, hidden_size), zero at padding."""
    error = target - output
    return error if mask is None else error * mask[..., None]


def fit_out_proj(small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor]) -> None:
    """Regress the dense outputs on the smaller mixer's out_proj input, in place.

    How strongly the weight is held where it was is chosen on one sequence in four, which the
    others do not see; then all of them are fitted. Fewer than four get the usual strength.
    """
    weight = small.projection(small.exit_kind).weight
    fitted, held = Regression(weight), Regression(weight)
    rows = distributed.gather("sequences for out_proj", inputs.rows)
    row = sum(rows[: distributed.rank()])
    for i, q in inputs.iterate(small):
        x = small.out_input(q, scan(q))
        error = masked_error(targets[i].to(x.device), small.project_out(x), q.mask)
        if q.mask is not None:
            x = x * q.mask[..., None]
        aside = torch.arange(row, row + len(x), device=x.device) % 4 == 3
        fitted.add(x[~aside], error[~aside])
        held.add(x[aside], error[aside])
        row += len(x)
    for part in (fitted, held):
        distributed.reduce_fields("sums for out_proj", part, to=0)

    def solve() -> list[Tensor]:
        ridge = best_ridge(fitted, held, RIDGES) if sum(rows) > 3 else USUAL_RIDGE
        return [] if ridge is None else [(fitted + held).solve(ridge)]

    for change in distributed.share("change of out_proj", solve, device=weight.device):
        weight.add_(change.to(weight.dtype))


def relative_error(small: MixerAdapter, inputs: CalibrationInputs, targets: list[Tensor]) -> float:
    """Squared error of the mixer's output over the dense output's square."""
    wrong = total = 0.0
    for i, q in inputs.iterate(small):
        target = targets[i].to(q.z.device)
        output = small.output(q, scan(q))
        wrong += float(masked_error(target, output, q.mask).double().square().sum())
        total += float(masked_error(target, torch.zeros_like(target), q.mask).square().sum())
    wrong, total = distributed.total("error of the output", wrong, total)
    return relative(wrong, total)
