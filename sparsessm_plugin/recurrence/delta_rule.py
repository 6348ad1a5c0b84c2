"""The scan of the gated delta rule: one interface, several backends."""

from importlib import import_module

import torch
from torch import Tensor

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.recurrence.quantities import DeltaQuantities

CHUNKED = "chunked"
_MODULES = {
    "cpu": "sparsessm_plugin.recurrence.delta_cpu",
    "cuda": "sparsessm_plugin.recurrence.delta_gpu",
    CHUNKED: "sparsessm_plugin.recurrence.delta_chunked",
    REFERENCE: "sparsessm_plugin.recurrence.delta_reference",
}


def scan(quantities: DeltaQuantities, backend: str | None = None) -> Tensor:
    """Run the gated delta rule from a zero state.

    No tensor has a time axis and both axes of a state. Differentiable in plain torch, which runs
    where gradients are recorded.

    :param quantities: the recurrence's inputs
    :param backend: to use instead of the device's own: ``cpu``, ``cuda``,
        :data:`CHUNKED` or :data:`REFERENCE`
    :return: y (b, L, H dv) float32, before the output norm and the gate
    """
    y, _ = scan_with_state(quantities, None, backend)
    return y


def scan_with_state(
    quantities: DeltaQuantities, state: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The same from a state, and the state in which it ends.

    :param state: (b, H, dk, dv) before the first step; None for zeros
    :return: y (b, L, H dv) float32, and the last state (b, H, dk, dv) float32
    """
    if backend is None:
        # chunks are matrix products, fast without kernels too
        found = CHUNKED if torch.is_grad_enabled() else backend_for(quantities.v.device)
        backend = CHUNKED if found == REFERENCE else found
    y, last = import_module(_MODULES[backend]).scan(quantities, state)
    return y, last
