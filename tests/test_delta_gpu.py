"""The delta rule in Triton: on a GPU, and without one in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so these tests run once more in a process
of their own.
"""

import pytest
import torch
from conftest import random_delta, relative
from interpreter import DEVICE, kernels_run

from sparsessm_plugin.recurrence import delta_reference
from sparsessm_plugin.recurrence.quantities import DeltaQuantities


@kernels_run
@pytest.mark.parametrize(
    "shape",
    [
        # batch, length, key heads, value heads of each, dk, dv
        (2, 9, 2, 2, 5, 3),
        (1, 3, 1, 1, 1, 1),
        (1, 6, 2, 3, 128, 40),
        (1, 4, 1, 2, 96, 130),
    ],
    ids=str,
)
@pytest.mark.parametrize("started", [False, True])
def test_agrees_with_the_reference(shape, started):
    from sparsessm_plugin.recurrence import delta_gpu

    q = random_delta(*shape)
    state = torch.randn(len(q.v), q.v.shape[2], q.k.shape[3], q.v.shape[3]) if started else None
    names = ("q", "k", "v", "beta", "g", "z")
    there = DeltaQuantities(**{name: getattr(q, name).to(DEVICE) for name in names})
    y, last = delta_gpu.scan(there, None if state is None else state.to(DEVICE))
    y_expected, last_expected = delta_reference.scan(q, state)
    assert relative(y.cpu(), y_expected) < 1e-5
    assert relative(last.cpu(), last_expected) < 1e-5
