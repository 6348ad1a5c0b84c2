"""NaN and infinite values during calibration: errors that say where in a model they begin."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from compressed_tensors.offload import get_execution_device
from loguru import logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsessm_plugin.calibration.contexts import undisturbed
from sparsessm_plugin.calibration.finite import finite_extremes, is_finite
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, find_mixers, read_out
from sparsessm_plugin.families.fast_forward import fast_forward


class FiniteCheck:
    """Refuses numbers that are none, naming where they begin and what has become of the model.

    :param model: transformers model
    :param batches: of the calibration
    :param state: says what has become of the model by now
    """

    def __init__(
        self, model: Any, batches: Iterable[Mapping[str, Any]], state: Callable[[], str]
    ) -> None:
        self._model = model
        self._batches = batches
        self._state = state
        self._unread: list[tuple[str, Tensor]] = []  # what a GPU may not have found out yet

    def input(self, name: str, x: Tensor) -> None:
        """Look at what enters a layer; on a GPU :meth:`inputs` tells what was found.

        :raises SparseSSMError: what enters a layer of this name holds NaN or infinite values
        """
        if _later(x):
            self._unread.append((name, finite_extremes(x)))
        elif not is_finite(x):
            self._refuse_input(name)

    def inputs(self) -> None:
        """Wait for what a GPU has found, before anything is made of it.

        :raises SparseSSMError: see :meth:`input`, for the first that it has seen
        """
        unread, self._unread = self._unread, []
        for name, finite in unread:
            if not bool(finite):
                self._refuse_input(name)

    def _refuse_input(self, name: str) -> None:
        raise SparseSSMError(
            f"{name}: its input holds NaN or infinite values during calibration; {self.explained()}"
        )

    def hessian(self, name: str, hessian: Tensor) -> None:
        """:raises SparseSSMError: the sums (..., in, in) of a projection are not finite"""
        if not is_finite(hessian.diagonal(dim1=-2, dim2=-1)):
            raise SparseSSMError(
                f"{name} cannot be pruned: the sum of squares of its calibration input is "
                f"not finite; {self.explained()}"
            )

    def explained(self) -> str:
        """Where such values begin, and what has become of the model."""
        place = None
        try:
            place = first_overflow(self._model, self._batches)
        except Exception as error:  # the mistake to tell of is the one that led here
            logger.debug(f"looking for the first tensor that is not finite failed: {error}")
        if place is None:
            begin = "all outputs of modules are finite, so float32 cannot hold the squares"
        else:
            begin = f"NaN or infinite values first appear in {place}"
        return f"{begin}; {self._state()}"


def _later(x: Tensor) -> bool:
    """Whether to let a GPU look while the pass goes on: it would idle until Python has seen it."""
    return x.is_cuda and x.numel() > 0


class _Found(Exception):
    """Ends a forward pass at the first tensor that is not finite."""


def first_overflow(model: Any, batches: Iterable[Mapping[str, Any]]) -> str | None:
    """The first tensor that is not finite when data passes a model as it is now.

    Runs the model again, so it is for errors only.

    :param model: transformers model
    :param batches: what its forward takes
    :return: such as ``the output of backbone.layers.1.mixer.in_proj``; None if all is finite
    """
    adapters = {id(adapter.mixer): adapter for adapter in find_mixers(model)}
    device = get_execution_device(model)
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _all_finite(output):
            return
        adapter = adapters.get(id(module))
        place = None if adapter is None else _inside(adapter, args, kwargs)
        found.append(place or f"the output of {name or 'the model'}{_with_weights(module)}")
        raise _Found

    # a mixer's own modules are looked at in the order of its data, with all that lies between
    inside = {id(m) for a in adapters.values() for m in a.mixer.modules() if m is not a.mixer}
    handles = [
        module.register_forward_hook(partial(look, name), with_kwargs=True)
        for name, module in model.named_modules()
        if id(module) not in inside
    ]
    try:
        with undisturbed(model), fast_forward(model):
            for batch in batches:
                with suppress(_Found):
                    model(**{key: value.to(device) for key, value in batch.items()})
                if found:
                    return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def _inside(adapter: MixerAdapter, args: Any, kwargs: Any) -> str | None:
    """The first tensor in a mixer, whose projections need not be called as modules."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    quantities = adapter.quantities(hidden_states, kwargs.get("attention_mask"))
    for kind, tensors in adapter.made_by_projections(quantities):
        if not _all_finite(tensors):
            projection = adapter.projection(kind)
            name = ".".join(filter(None, (adapter.name, projection.path)))
            return f"the output of {name}{_with_weights(projection.module)}"
    if not _all_finite(read_out(adapter, quantities)):
        return f"the scan output of {adapter.name} behind its gate"
    return f"the output of {adapter.name}.{adapter.projection(adapter.exit_kind).path}"


def _all_finite(value: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return all(is_finite(tensor) for tensor in tensors if tensor.is_floating_point())


def _with_weights(module: nn.Module) -> str:
    """What to add if the module's own weights are no numbers; else its type of number."""
    own = list(module.parameters(recurse=False))
    if not _all_finite(own):
        return ", whose weights hold such values"
    kinds = {str(p.dtype).removeprefix("torch.") for p in own}
    return f" in {kinds.pop()}" if len(kinds) == 1 else ""
