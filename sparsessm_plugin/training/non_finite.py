"""Gradients that are NaN or infinite: which batches are skipped, and where they begin."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.errors import SparseSSMError

_MOST_SKIPPED = 3


class NonFiniteError(SparseSSMError):
    """A loss or gradients are NaN or infinite."""


class NonFiniteGradients:
    """Counts the batches whose gradient is no number; the third is an error."""

    def __init__(self) -> None:
        self.skipped: list[str] = []  # where it began in each

    def found(
        self,
        model: nn.Module,
        parameters: Mapping[str, Any],
        loss: Callable[[], Any],
    ) -> bool:
        """Whether this batch must be skipped.

        :param model: asked where it began
        :param parameters: with the gradients of one batch in ``grad``
        :param loss: computes the loss of the batch once more, see :func:`first_non_finite`
        :raises NonFiniteError: it is the third
        """
        grads = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        if not grads:
            return False
        norm = nn.utils.get_total_norm(grads.values())  # NaN or infinite as soon as one entry is
        if math.isfinite(float(norm)):
            return False
        finite = [is_finite(g) for g in grads.values()]
        if all(finite):  # only the sum of squares is too large
            return False
        self.skip(model, loss, f"the gradient of {list(grads)[finite.index(False)]}")
        return True

    def skip(self, model: nn.Module, loss: Callable[[], Any], otherwise: str) -> None:
        """Count a batch that is skipped.

        :param model: asked where it began
        :param loss: computes the loss of the batch once more, see :func:`first_non_finite`
        :param otherwise: where it began if that cannot be seen here, as on another rank
        :raises NonFiniteError: it is the third
        """
        self.skipped.append(first_non_finite(model, loss) or otherwise)
        if len(self.skipped) >= _MOST_SKIPPED:
            raise NonFiniteError(
                f"{len(self.skipped)} batches gave NaN or infinite gradients, which begin in "
                f"{self.skipped[-1]} in the last; no more are skipped"
            )


def first_non_finite(model: nn.Module, loss: Callable[[], Any]) -> str | None:
    """Where NaN or infinity first appears on the way to a loss, or back from it.

    In the order of computation: the module whose output is the first that is not finite; if all
    are, the module's output or the parameter whose gradient is. No gradient is left.

    :param model: run by ``loss``
    :param loss: computes it, a tensor or a tuple that begins with one, with a graph if gradients
        are wanted
    :return: words such as "the output of backbone.layers.1.mixer", None if all is finite
    """
    found: list[str] = []

    def gradient(name: str, grad: Tensor) -> None:
        if not found and not is_finite(grad):
            found.append(f"the gradient of {name}")

    def output(name: str, module: nn.Module, args: Any, result: Any) -> None:
        for leaf in tree_leaves(result):
            if found or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            if not is_finite(leaf):
                found.append(f"the output of {name}")
            elif leaf.requires_grad:
                leaf.register_hook(partial(gradient, f"the output of {name}"))

    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(partial(output, name)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(gradient, name)))
        value = next(leaf for leaf in tree_leaves(loss()) if isinstance(leaf, Tensor))
        if not found and not is_finite(value):
            found.append("the loss")
        if not found and value.requires_grad:
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return found[0] if found else None
