"""Let the mixers of a model run their scan here instead of in transformers' reference loop.

On the CPU, transformers walks through time in Python (Mamba-1) or multiplies by broadcast sums
(Mamba-2); the scans of this package do the same tens of times faster. So they do on a GPU, in
Triton. Where transformers has mamba-ssm's kernels bound, but for Mamba-1 in half precision and
sizes that these kernels refuse, or on a device without a fast backend, nothing is replaced.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.families.base import MixerAdapter, read_out
from sparsessm_plugin.families.kernels import (
    convolution_in_torch,
    kernels_refuse,
    scans_in_kernels,
)
from sparsessm_plugin.families.promises import KnownCall, Promise, is_plain
from sparsessm_plugin.families.registry import get_adapter, iter_mixers, known_mixers
from sparsessm_plugin.recurrence import scan


@contextmanager
def fast_forward(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Run whole-sequence inference of all known mixers through this package's scan.

    Outputs agree with the model's own to 1e-4 relative in float32. Calls with a cache
    (pass ``use_cache=False``), with gradients or on a device without a fast backend go to the
    model's own forward, and so do mixers without an adapter. Where a convolution that transformers
    has bound refuses a mixer's width, transformers' reference takes its place there. The mixers are
    restored on exit, whatever happened inside.

    :param model: any model
    :param gradients: also run calls with gradients through this package's scan, on any device; and
        on a GPU the Mamba-2 layout without them, too, as mamba-ssm's kernels are tuned first for
        every shape, which takes longer than some passes
    """
    replaced: list[_Forward] = []
    try:
        for name, mixer in iter_mixers(model):
            if type(mixer).__name__ in known_mixers():
                replaced.append(_Forward(get_adapter(mixer, name), gradients))
                replaced[-1].attach()
        yield
    finally:
        for forward in reversed(replaced):
            forward.detach()


def offer(
    mixer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    x: Tensor,
) -> None:
    """Hand over what out_proj multiplies for this very input, so that it is not made again.

    For forward pre-hooks; without :func:`fast_forward` nothing happens.
    """
    forward = _standing_in(mixer)
    if forward is not None:
        forward.offered = (hidden_states, attention_mask, x)


def may_promise(mixer: nn.Module, alone: bool = False) -> bool:
    """Whether :func:`promise` may come true, as far as can be known before.

    :param mixer: not if others hook or quantize what is in it
    :param alone: nor if :func:`fast_forward` was entered several times: other methods may change it
    """
    forward = _standing_in(mixer)
    if forward is None or not forward.active:
        return False
    return is_plain(mixer) and not (alone and forward.is_inside_another)


def promise(mixer: nn.Module, computed_by: nn.Module, calls: Iterable[KnownCall]) -> None:
    """Hand over what out_proj multiplies in calls that are to come, in their order.

    It is used as long as each of them has the very input, without a cache or gradients, and the
    mixer's weights are those it was computed with. It takes the place of an earlier one. Without
    :func:`fast_forward` nothing happens.

    :param mixer: of the model
    :param computed_by: a mixer with the weights that ``calls`` were computed with
    :param calls: freed one by one, and all by :func:`withdraw` and where ``fast_forward`` ends
    """
    forward = _standing_in(mixer)
    if forward is not None and forward.active:
        forward.promised = Promise(mixer, computed_by, calls) or None


def withdraw(mixer: nn.Module) -> None:
    """Let go of what is left of a :func:`promise`."""
    forward = _standing_in(mixer)
    if forward is not None:
        forward.promised = None


def _standing_in(mixer: nn.Module) -> "_Forward | None":
    forward = getattr(vars(mixer).get("forward"), "__func__", None)
    return forward if isinstance(forward, _Forward) else None


class _Forward:
    """Stands in for the ``forward`` of a mixer, as a method bound to it.

    A ``forward`` that somebody else has put on the instance (compressed-tensors does, to
    move inputs to the device of offloaded weights) is called as before and comes back on exit.
    """

    def __init__(self, adapter: MixerAdapter, gradients: bool = False):
        self.adapter = adapter
        self.gradients = gradients
        self.active = False
        self.earlier = vars(adapter.mixer).get("forward")
        self.own_forward = adapter.mixer.forward
        self.offered: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.promised: Promise | None = None

    @property
    def is_inside_another(self) -> bool:
        """Whether it stands in for one that stands in already."""
        earlier = getattr(self.earlier, "__func__", None)
        return isinstance(earlier, _Forward) and (earlier.active or earlier.is_inside_another)

    def _is_fast_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        if device.type == "cpu":  # kernels that transformers may have bound refuse it
            return True
        runs = not self.adapter.has_state_transitions or backend_for(device) != REFERENCE
        if scans_in_kernels(self.adapter.mixer) and not kernels_refuse(self.adapter):
            # those want other layouts: in half precision, copies make them slower than ours
            return runs and self.adapter.has_state_transitions and dtype.itemsize == 2
        # the chunked scan of Mamba-2 is matrix products, fast everywhere
        return runs

    def _takes_over(self, device: torch.device, dtype: torch.dtype) -> bool:
        if torch.is_grad_enabled():
            return self.gradients
        return self._scans_heads(device) or self._is_fast_on(device, dtype)

    def _scans_heads(self, device: torch.device) -> bool:
        """Whether the scan with gradients of the Mamba-2 layout runs without them, too."""
        of_heads = self.adapter.recurrence == "selective" and self.adapter.A_log.ndim == 1
        return self.gradients and of_heads and device.type == "cuda"

    def _read_out(self, quantities: Any) -> Tensor:
        if not torch.is_grad_enabled() and not self._scans_heads(self.adapter.A_log.device):
            return read_out(self.adapter, quantities)
        # a recurrence adds up what its products are rounded by; projections need not be as exact
        with torch.autocast(self.adapter.A_log.device.type, enabled=False):
            if self.adapter.recurrence == "delta_rule":
                return self.adapter.out_input(quantities, scan(quantities))
            from sparsessm_plugin.recurrence import differentiable  # brings numba along

            if self.adapter.has_state_transitions:
                x = differentiable.gated_scan(quantities)
                if x is not None:
                    return x
            return self.adapter.out_input(quantities, differentiable.scan(quantities))

    def attach(self) -> None:
        self.active = True
        self.adapter.mixer.forward = MethodType(self, self.adapter.mixer)

    def detach(self) -> None:
        self.active = False  # whoever has wrapped us meanwhile calls through from now on
        self.offered = self.promised = None
        attributes = vars(self.adapter.mixer)
        if getattr(attributes.get("forward"), "__func__", None) is self:
            del attributes["forward"]
            earlier = self.earlier
            # contexts may end in any order: one that has ended already must not come back
            while isinstance(own := getattr(earlier, "__func__", None), _Forward):
                if own.active:
                    break
                earlier = own.earlier
            if earlier is not None:
                self.adapter.mixer.forward = earlier

    def _promised_output(
        self, hidden_states: Tensor, attention_mask: Tensor | None, replaces: bool
    ) -> Tensor | None:
        """What was promised for this call, or None. A call that was not foreseen ends it all."""
        promised, self.promised = self.promised, None  # what fails here leaves nothing behind
        rounds = torch.is_autocast_enabled(hidden_states.device.type)
        if promised is None or not replaces or rounds or torch.is_grad_enabled():
            return None
        x = promised.take(hidden_states, attention_mask)
        if x is None:
            return None
        output = self.adapter.project_out(x.to(hidden_states.dtype))
        self.promised = promised or None
        return output

    def __call__(
        self,
        mixer: nn.Module,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        offered, self.offered = self.offered, None
        replaces = self.active and cache_params is None
        of_this = offered and offered[0] is hidden_states and offered[1] is attention_mask
        if replaces and offered and of_this and not torch.is_grad_enabled():
            # no scan is faster than none
            return self.adapter.project_out(offered[2].to(hidden_states.dtype))
        output = self._promised_output(hidden_states, attention_mask, replaces)
        if output is not None:
            return output
        if not replaces or not self._takes_over(hidden_states.device, hidden_states.dtype):
            with convolution_in_torch(mixer) if kernels_refuse(self.adapter) else nullcontext():
                return self.own_forward(
                    hidden_states,
                    cache_params=cache_params,
                    attention_mask=attention_mask,
                    **kwargs,
                )
        quantities = self.adapter.quantities(hidden_states, attention_mask)
        x = self._read_out(quantities)
        if not (x.dtype.itemsize == 2 and torch.is_autocast_enabled(x.device.type)):
            x = x.to(hidden_states.dtype)
        return self.adapter.project_out(x)
