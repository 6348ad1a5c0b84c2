"""Channels or heads that go along where a loader ties their number to the hidden size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.calibration.passes import layer_by_layer
from sparsessm_plugin.checkpoints.runtimes import ModelFacts
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, ModelAdapter
from sparsessm_plugin.families.base import MixerSizes
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.families.kernels import refused_width
from sparsessm_plugin.methods.base import what_enters
from sparsessm_plugin.methods.channels import ChannelRemoval, ChannelSettings
from sparsessm_plugin.methods.removal import Shrunk
from sparsessm_plugin.methods.runtime_sizes import model_of_fields, new_limits

WAYS = ("kept", "along", "heads", "head_dim")


@dataclass(frozen=True)
class Along:
    """What every mixer keeps beside a narrower stream.

    :param axis: of the mixers; None where all stays
    :param keep: indices of it
    :param sizes: of the mixers afterwards
    """

    axis: str | None
    keep: int
    sizes: MixerSizes

    @property
    def kept(self) -> dict[str, int]:
        """By axis; empty where all stays."""
        return {} if self.axis is None else {self.axis: self.keep}


def choose_along(
    adapter: ModelAdapter,
    hidden_size: int,
    wanted: str | None = None,
    runtimes: Sequence[str] = (),
    kept_last: bool = False,
) -> Along:
    """What of the mixers goes along with the hidden size: the first way that nothing is against.

    All channels stay if they can. Otherwise every head loses channels, which costs less than
    whole heads, and last of all heads go. A way that causal-conv1d does not take comes after those
    that it takes, and after these what runtimes do not take, the fewest limits first.

    :param adapter: of the model; the meta device will do
    :param hidden_size: the new one
    :param wanted: one of :data:`WAYS`; None for any
    :param runtimes: that are to load the model
    :param kept_last: let all channels stay only where the others are worse, and not first of all
    :raises SparseSSMError: the loader makes no such model, or not in the way that is wanted
    """
    ways = _ways(adapter, hidden_size, wanted)
    if len(ways) == 1:
        return ways[0]
    dense = ModelFacts.from_model(adapter.model) if runtimes else None
    mixer = adapter.mixers[0]
    spared = refused_width(mixer) is None

    def against(way: Along) -> tuple[int, bool]:
        kernels = spared and refused_width(mixer, way.sizes) is not None
        if dense is None:
            return 0, kernels
        fields = adapter.hidden_fields(hidden_size, way.sizes)
        smaller = ModelFacts.from_model(model_of_fields(adapter.model, fields))
        return len(new_limits(runtimes, dense, smaller)), kernels

    if kept_last:
        ways.sort(key=lambda way: way.axis is None)
    return min(ways, key=against)


def _ways(adapter: ModelAdapter, hidden_size: int, wanted: str | None) -> list[Along]:
    """All ways that the loader takes, the best first."""
    mixer = adapter.mixers[0]
    if wanted in ("heads", "head_dim") and wanted not in mixer.axis_names:
        raise SparseSSMError(f"channels = {wanted!r}: the mixers of {adapter.family} have no heads")
    if wanted not in (None, "kept") and adapter.expand_field is None:
        raise SparseSSMError(
            f"channels = {wanted!r}: the loader of {adapter.family} does not tie the "
            "channels of the mixers to hidden_size; use ChannelRemovalModifier"
        )
    found: list[Along] = []
    refused: SparseSSMError | None = None
    if wanted in (None, "kept"):
        try:
            adapter.hidden_fields(hidden_size)
            found.append(Along(None, 0, mixer.sizes))
        except SparseSSMError as error:
            refused = error
    if wanted != "kept" and adapter.expand_field is not None:
        try:
            found += _tied(adapter, hidden_size, wanted)
        except SparseSSMError as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return found


def _tied(adapter: ModelAdapter, hidden_size: int, wanted: str | None) -> Iterator[Along]:
    """The ways in which channels shrink in the ratio of the hidden size, the best first."""
    mixer, ways = adapter.mixers[0], adapter.ways_along(hidden_size)
    if wanted in ("heads", "head_dim") and wanted not in ways:
        others = ", ".join(f"{axis} = {keep}" for axis, keep in ways.items())
        raise SparseSSMError(
            f"channels = {wanted!r}: hidden_size={hidden_size} of {adapter.name} goes with "
            f"{others} alone"
        )
    for axis in ("head_dim", "heads", "channels"):
        if axis in ways and wanted in (None, "along", axis):
            sizes = mixer.sizes.keeping(axis, ways[axis])
            adapter.hidden_fields(hidden_size, sizes)
            yield Along(axis, ways[axis], sizes)


def narrow_mixers(
    adapter: ModelAdapter,
    batches: Sequence[Mapping[str, Any]],
    basis: Tensor,
    along: Along,
    fit: bool,
) -> dict[str, Shrunk]:
    """Smaller float32 copies of all mixers, chosen and fitted as ChannelRemovalModifier does.

    out_proj of a copy writes the narrow stream; the model itself stays as it is. Inputs of one
    layer are kept at a time.

    :param basis: V (M, K): the narrow stream is V^T times the wide one
    :param along: what every mixer keeps
    :param fit: whether what reads the channels is fitted again
    :return: by the mixer's name; none where all stays
    """
    pending = {m.name: m for m in adapter.mixers if along.axis is not None}
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
            found[name] = _shrink(mixer, seen, basis, along, fit)

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
    along: Along,
    fit: bool,
) -> Shrunk:
    clone = mixer.float_clone()
    _write_narrow(clone.mixer.get_submodule(clone.exit_kind), basis)
    fields: dict[str, Any] = {"keep": along.keep, "axis": along.axis}
    fields["compensate"] = None if fit else "none"
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
