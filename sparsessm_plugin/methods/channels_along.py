"""Channels or heads that go along where a loader ties their number to the hidden size."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.calibration.passes import layer_by_layer
from sparsessm_plugin.dependency_graph.model_graph import axis_along
from sparsessm_plugin.families import MixerAdapter, ModelAdapter
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.methods.base import what_enters
from sparsessm_plugin.methods.channels import ChannelRemoval, ChannelSettings
from sparsessm_plugin.methods.removal import Shrunk


def narrow_mixers(
    adapter: ModelAdapter,
    batches: Sequence[Mapping[str, Any]],
    basis: Tensor,
    channels: int,
    fit: bool,
) -> dict[str, Shrunk]:
    """Smaller float32 copies of all mixers, chosen and fitted as ChannelRemovalModifier does.

    out_proj of a copy writes the narrow stream; the model itself stays as it is. Inputs of one
    layer are kept at a time.

    :param basis: V (M, K): the narrow stream is V^T times the wide one
    :param channels: that every mixer keeps
    :param fit: whether what reads the channels is fitted again
    :return: by the mixer's name; those that have no more channels are left out
    """
    pending = {m.name: m for m in adapter.mixers if m.sizes.intermediate_size > channels}
    inputs = {name: CalibrationInputs() for name in pending}
    found: dict[str, Shrunk] = {}

    def see(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in inputs:  # a layer runs once more when it is through
            inputs[name].add(*what_enters(args, kwargs))

    def done(modules: Sequence[nn.Module]) -> None:
        gone = {id(module) for module in modules}
        for name in [name for name, mixer in pending.items() if id(mixer.mixer) in gone]:
            mixer, seen = pending.pop(name), inputs.pop(name)
            seen.join(name)
            found[name] = _shrink(mixer, seen, basis, channels, fit)

    handles = [
        mixer.mixer.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for name, mixer in pending.items()
    ]
    try:
        if handles:
            with fast_forward(adapter.model):
                layer_by_layer(adapter.model, batches, lambda index: None, done)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shrink(
    mixer: MixerAdapter,
    inputs: CalibrationInputs,
    basis: Tensor,
    channels: int,
    fit: bool,
) -> Shrunk:
    axis, keep = axis_along(mixer), channels // mixer.sizes.head_dim
    clone = mixer.float_clone()
    _write_narrow(clone.mixer.get_submodule(clone.exit_kind), basis)
    fields: dict[str, Any] = {"keep": keep, "axis": axis, "compensate": None if fit else "none"}
    method = ChannelRemoval(ChannelSettings.of("channels", fields), "channels")
    return method.shrink(clone, inputs)


def _write_narrow(linear: Any, basis: Tensor) -> None:
    """Let a linear layer that writes the stream write V^T times it."""
    weight = basis.T @ linear.weight.double()
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if linear.bias is not None:
        bias = basis.T @ linear.bias.double()
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    linear.out_features = basis.shape[1]
