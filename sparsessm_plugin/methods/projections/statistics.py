"""What the weights of projections multiply, and sums of its products over the calibration."""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.precision import add_half_product, tf32
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.cost import kept as where_there_is_room
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.prunable import PrunableWeight
from sparsessm_plugin.methods.propagation import OutInputs
from sparsessm_plugin.recurrence.quantities import Quantities
from sparsessm_plugin.solvers.objective import gram, window_gram


def input_of(kind: str, quantities: Quantities, out_input: Tensor) -> Tensor:
    """(b, L, in) what a mixer's projection multiplies; of conv1d (b, L, D).

    :param kind: of projection, such as ``x_proj``
    :param quantities: of the mixer for one batch
    :param out_input: what the output projection multiplies
    """
    return quantities.inputs.get(kind, out_input)


def gram_of(projection: PrunableWeight, left: Tensor, right: Tensor, mask: Tensor | None) -> Tensor:
    """``sum left right^T`` over all positions but padding, as the solvers take it.

    :param projection: whose inputs these are
    :param left: (b, L, in); (tokens, in) outside of mixers
    :param right: likewise
    :param mask: bool, of their leading dimensions, or None
    :return: (in, in) float32; of a conv1d (D, K, K), over the K inputs that each output reads;
        of a matrix for each head (heads, in, in), for left (b, L, heads, in)
    """
    alike = right is left
    # tensor cores multiply what the weight multiplies, and add in float32
    dtype = projection.weight.dtype if _in_half(projection, left.device) else torch.float32
    left = left.to(dtype)
    right = left if alike else right.to(dtype)
    if projection.kind == "conv1d":
        return window_gram(left, right, projection.shape[-1], mask)
    if mask is not None:
        left = left * mask.view(*mask.shape, *[1] * (left.ndim - mask.ndim))
    if len(projection.shape) == 3:
        heads = zip(left.unbind(-2), right.unbind(-2), strict=True)
        return torch.stack([gram(x.flatten(0, -2), y.flatten(0, -2)) for x, y in heads])
    return gram(left.flatten(0, -2), right.flatten(0, -2))


def add_gram(
    total: Tensor, projection: PrunableWeight, left: Tensor, right: Tensor, mask: Tensor | None
) -> None:
    """Add :func:`gram_of` to a sum; a GPU adds up as it multiplies, without a product in memory.

    :param total: the sum, of :func:`hessian_shape`, on any device
    """
    half = _in_half(projection, left.device)
    one = total.device == left.device and total.is_cuda and total.dtype == torch.float32
    plain = projection.kind != "conv1d" and len(projection.shape) == 2
    if not (half and one and plain):
        total += gram_of(projection, left, right, mask).to(total.device)
        return
    left, right = (x.to(projection.weight.dtype).flatten(0, -2) for x in (left, right))
    if mask is not None:
        left = left * mask.flatten()[:, None]
    add_half_product(total, left.T, right)


def hessian_shape(projection: PrunableWeight) -> torch.Size:
    """(in, in); of a conv1d (D, K, K), of a matrix for each head (heads, in, in)."""
    *problems, _, size = projection.shape
    return torch.Size((*problems, size, size))


def mask_for(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a batch for the input of a Linear layer; None if that is not its tokens.

    Experts see tokens that a router chose.
    """
    if mask is None:
        return None
    if x.shape[:-1] == mask.shape:
        return mask.to(x.device)
    return mask.flatten().to(x.device) if x.shape[:-1] == mask.flatten().shape else None


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The input of a Linear layer with zeros for what is padded, which sums of products skip.

    :param mask: (b, L) of the batch, False at padding
    """
    own = mask_for(x, mask)
    return x if own is None else x.masked_fill(~own[..., None], 0)


def check_seen(name: str, tokens: int) -> None:
    """:raises SparseSSMError: there were none"""
    if tokens == 0:
        raise SparseSSMError(f"{name} saw no calibration tokens; it is not pruned")


class HessianSums:
    """Hessians of projections and the tokens that made them, summed batch by batch.

    Attributes: ``hessians`` and ``tokens``, by name.

    :param in_main_memory: keep them there; otherwise on an accelerator that has room
    """

    def __init__(self, in_main_memory: bool) -> None:
        self._in_main_memory = in_main_memory
        self.hessians: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, projection: PrunableWeight, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch of what a projection multiplies; see :func:`gram_of`."""
        name = projection.name
        self.tokens[name] = self.tokens.get(name, 0) + _count(projection, x, mask)
        if name in self.hessians:
            add_gram(self.hessians[name], projection, x, x, mask)
        else:
            products = gram_of(projection, x, x, mask)
            self.hessians[name] = (
                products.cpu() if self._in_main_memory else where_there_is_room(products)
            )

    def count_all(self, projections: Iterable[PrunableWeight]) -> None:
        """Count the tokens that all ranks have seen.

        :raises SparseSSMError: a projection has seen none
        """
        counts = distributed.gather("tokens of projections", self.tokens)
        for projection in projections:
            name = projection.name
            self.tokens[name] = sum(count.get(name, 0) for count in counts)
            check_seen(name, self.tokens[name])


class InputEnergies:
    """Sums of squares of what projections multiply: the diagonals of their Hessians.

    Attributes: ``energies``, by name: (in,) float64, of a matrix for each head (heads, in).
    """

    def __init__(self) -> None:
        self.energies: dict[str, Tensor] = {}

    def add(self, projection: PrunableWeight, x: Tensor, mask: Tensor | None) -> None:
        """Add a batch of what a projection multiplies; see :func:`gram_of`."""
        squares = x.float().square()
        if mask is not None:
            squares = squares * mask.view(*mask.shape, *[1] * (squares.ndim - mask.ndim))
        inputs = len(projection.shape) - 1  # dimensions of an input; a matrix a head has two
        energy = squares.flatten(0, -1 - inputs).sum(0, dtype=torch.float64)
        name = projection.name
        self.energies[name] = self.energies[name] + energy if name in self.energies else energy


@dataclass
class MixerData:
    """What entered one mixer, until it is pruned.

    :param inputs: behind the pruned layers before it
    :param dense_inputs: behind the dense layers before it, where targets ask for that
    :param dense: by number of the batch and kind of projection, what the dense projections behind
        the entry multiply, (b, L, in), where it is known already
    :param entered: by number of the batch and kind, what the pruned entry projections give
        (b, L, out), from the stage within to that at the exit
    :param leaves: takes what the output projection multiplies once all before it are pruned
    """

    inputs: CalibrationInputs = field(default_factory=CalibrationInputs)
    dense_inputs: CalibrationInputs | None = None
    dense: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    entered: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leaves: OutInputs = field(default_factory=OutInputs)

    def keep_dense(self, number: int, kinds: Iterable[str], made: "dict[str, Tensor]") -> None:
        """Keep what the dense projections of some kinds multiply in a batch.

        :param made: by kind, (b, L, in)
        """
        own = self.dense.setdefault(number, {})
        # of a part of what in_proj gives, a copy: the rest need not stay
        own.update({kind: made[kind].contiguous() for kind in kinds})

    def take_dense(self, number: int, kinds: Iterable[str]) -> dict[str, Tensor] | None:
        """What :meth:`keep_dense` kept, which goes; None unless it is there for all kinds."""
        own = self.dense.get(number, {})
        return {k: own.pop(k) for k in kinds} if all(k in own for k in kinds) else None


@dataclass(frozen=True)
class StageSums:
    """Of some projections of a mixer, by name; float64 unless tensor cores sum.

    :param hessians: products of their inputs; one tensor for all that read the same
    :param crosses: products of their dense inputs, as rows, and their inputs; empty where nothing
        is to be compared with a dense mixer
    :param hessians_done: when a GPU has summed the Hessians, where it is not at the end
    """

    hessians: dict[str, Tensor]
    crosses: dict[str, Tensor]
    hessians_done: torch.cuda.Event | None = None


def stage_sums(
    members: list[PrunableWeight],
    pruned: MixerAdapter,
    dense: MixerAdapter | None,
    data: MixerData,
    keep: Collection[str] = (),
    enter_once: bool = False,
) -> StageSums:
    """Sums over all that entered a mixer.

    :param members: projections of the mixer
    :param pruned: the mixer as it is now
    :param dense: the mixer as it was, or None where nothing is to be compared with it; it reads
        ``data.dense_inputs``, or the same as the pruned one
    :param data: what entered; what was kept there is taken, see ``keep``
    :param keep: kinds of projections that a later call asks for: what they multiply in the dense
        mixer is left in ``data``
    :param enter_once: also leave there what the entry projections of the pruned mixer give
    """
    sums = StageSums({}, {})
    device = pruned.A_log.device
    dtype = None if device.type == "cuda" else torch.float32  # as the mixers are
    firsts = [p for p in members if _first_alike(p, members, pruned) is p]
    for p in firsts:
        # solvers choose: a sum in another order, as ranks make it, must not choose otherwise; what
        # tensor cores sum is never that exact
        exact = torch.float32 if _in_half(p, device) else torch.float64
        zeros = torch.zeros(hessian_shape(p), dtype=exact, device=device)
        sums.hessians[p.name] = zeros
        if dense is not None:
            sums.crosses[p.name] = zeros.clone()
    kinds = {p.kind for p in members}
    later: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]] = []
    # the model's own float32 products are not rounded
    as_in_model = device.type != "cuda" or any(_in_half(p, device) for p in members)
    for i in range(len(data.inputs)):
        with tf32():
            with _entering_once(pruned, data.entered, i, enter_once):
                xs, mask = _inputs_of(kinds, pruned, *data.inputs.get(i, device, dtype))
            dense_xs = data.take_dense(i, kinds) if dense is not None else {}
            if dense is not None and dense_xs is None:
                makes = {kind for kind in keep if kind not in data.dense.get(i, {})}
                source = data.inputs if data.dense_inputs is None else data.dense_inputs
                dense_xs, _ = _inputs_of(kinds | makes, dense, *source.get(i, device, dtype))
                data.keep_dense(i, makes, dense_xs)
        if data.leaves.wanted and as_in_model and pruned.exit_kind in kinds:
            exit_dtype = pruned.projection(pruned.exit_kind).weight.dtype
            data.leaves.add(xs[pruned.exit_kind].to(exit_dtype))
        for p in firsts:
            add_gram(sums.hessians[p.name], p, xs[p.kind], xs[p.kind], mask)
        if dense_xs and has_room(device, sum(x.nbytes for x in (*xs.values(), *dense_xs.values()))):
            later.append((xs, dense_xs, mask))
        elif dense_xs:
            _add_crosses(sums, firsts, xs, dense_xs, mask)
    if later:
        sums = replace(sums, hessians_done=torch.cuda.Event())
        assert sums.hessians_done is not None
        sums.hessians_done.record(torch.cuda.current_stream(device))
    for each in later:
        _add_crosses(sums, firsts, *each)
    for p in members:  # ranks add up what each has, in place
        first = _first_alike(p, members, pruned)
        for found in (sums.hessians, sums.crosses):
            if p is not first and first.name in found:
                own = found[first.name]
                found[p.name] = own.clone() if distributed.world_size() > 1 else own
    return sums


def _add_crosses(
    sums: StageSums,
    firsts: list[PrunableWeight],
    xs: dict[str, Tensor],
    dense_xs: dict[str, Tensor],
    mask: Tensor | None,
) -> None:
    for p in firsts:
        add_gram(sums.crosses[p.name], p, dense_xs[p.kind], xs[p.kind], mask)


def _first_alike(
    projection: PrunableWeight, members: list[PrunableWeight], adapter: MixerAdapter
) -> PrunableWeight:
    """The first that multiplies what a projection does: all that read what enters a mixer do."""

    def key(p: PrunableWeight) -> tuple[bool, bool, torch.dtype]:
        return p.kind in adapter.entry_kinds, len(p.shape) == 2, p.weight.dtype

    if key(projection)[:2] != (True, True):
        return projection
    return next(p for p in members if key(p) == key(projection))


def entered_bytes(adapter: MixerAdapter, tokens: int) -> int:
    """Of what the entry projections of a mixer give for so many tokens."""
    weights = [adapter.projection(kind).weight for kind in adapter.entry_kinds]
    return tokens * sum(weight.shape[-2] * weight.dtype.itemsize for weight in weights)


@contextmanager
def _entering_once(
    adapter: MixerAdapter, entered: dict[int, dict[str, Tensor]], number: int, keep: bool
) -> Iterator[None]:
    """Let the entry projections of a mixer of one's own give what they gave before, or keep it.

    :param adapter: of a mixer whose entry projections change no more
    :param entered: by number of the batch and kind, what they give
    :param number: of the batch
    :param keep: whether to keep it, for the next time
    """
    before = entered.pop(number, {})
    handles, replaced = [], []
    try:
        for kind in adapter.entry_kinds:
            module = adapter.projection(kind).module

            def note(module: nn.Module, args: Any, output: Tensor, kind: str = kind) -> None:
                entered.setdefault(number, {})[kind] = output

            if kind in before:
                module.forward = lambda x, output=before[kind]: output
                replaced.append(module)
            elif keep:
                handles.append(module.register_forward_hook(note))
        yield
    finally:
        for module in replaced:
            del module.forward
        for handle in handles:
            handle.remove()


def _inputs_of(
    kinds: set[str],
    adapter: MixerAdapter,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What projections of some kinds multiply, computing no more than they need, and the mask."""
    if kinds <= set(adapter.entry_kinds):
        x, mask = adapter.enter(hidden_states, attention_mask)
        return dict.fromkeys(kinds, x), mask
    q = adapter.quantities(hidden_states, attention_mask)
    out_input = read_out(adapter, q) if adapter.exit_kind in kinds else q.z
    return {kind: input_of(kind, q, out_input) for kind in kinds}, q.mask


def _in_half(projection: PrunableWeight, device: torch.device) -> bool:
    """Whether what a projection multiplies is left in half precision."""
    return device.type == "cuda" and projection.weight.dtype.itemsize == 2


def _count(projection: PrunableWeight, x: Tensor, mask: Tensor | None) -> int:
    """Tokens in what a projection multiplies."""
    if mask is not None:
        return int(mask.sum())
    return math.prod(x.shape[:2] if projection.adapter else x.shape[:-1])
