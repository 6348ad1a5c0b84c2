"""Gradients of a loss for a model's weights, in bounded memory.

Mixers run this package's differentiable scan, and of each layer only the input is kept until the
backward pass.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from loguru import logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsessm_plugin.cost import has_room
from sparsessm_plugin.distributed import reduce_sum
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import iter_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.training.memory import layer_numbers
from sparsessm_plugin.training.non_finite import NonFiniteError, NonFiniteGradients

IGNORED_LABEL = -100  # what transformers' losses leave out

LossFunction = Callable[[Any, Any], Tensor]

# Bytes a weight beside it: a copy and its gradient, a float32 weight and two moments.
_TRAINING = 16
_SPARE = 0.05  # of a device, for what kernels take for a moment


@contextmanager
def differentiable(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    positions: int | None = None,
    checkpointing: bool | None = None,
) -> Iterator[None]:
    """Let a loss of the model be differentiated for these parameters and no others.

    Evaluation mode, no caches, this package's scans; layers are computed twice instead of kept,
    unless a GPU has plenty of room. Everything is as it was on exit, and no gradient is left.

    :param model: any model with state-space mixers
    :param parameters: of the model, floating point
    :param positions: of a batch, at most; None if that is not known
    :param checkpointing: whether layers are computed twice; None where the memory decides
    """
    if checkpointing is None:
        checkpointing = positions is None or not _keeps_layers(model, positions)
    wanted = {id(p) for p in parameters}
    everything = list(model.parameters())
    flags = [p.requires_grad for p in everything]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for p in everything:
            p.requires_grad_(id(p) in wanted)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_without_cache(model))
            stack.enter_context(fast_forward(model, gradients=True))
            if checkpointing:
                stack.enter_context(_checkpointed(model))
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in zip(everything, flags, strict=True):
            p.grad = None
            p.requires_grad_(flag)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A cache would keep states between the layers' two computations, and more than these."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def _keeps_layers(model: nn.Module, positions: int) -> bool:
    """Whether a GPU has room for what a backward pass through all layers at once needs."""
    device = next(model.parameters()).device
    return has_room(device, int(4 * positions * sum(layer_numbers(model))))


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Keep of every layer its input only; a model without transformers' layers, of every mixer."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    replaced: list[tuple[Any, Any]] = []
    try:
        for layer in layers or [mixer for _, mixer in iter_mixers(model)]:
            replaced.append((layer, vars(layer).get("forward")))
            # nothing random in evaluation mode, and asking for the generator's state takes time
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for layer, earlier in reversed(replaced):
            del layer.forward
            if earlier is not None:
                layer.forward = earlier


# -- the loss ------------------------------------------------------------------------------


def loss_of(model: Any, batch: Any, loss_fn: LossFunction | None = None) -> tuple[Tensor, int]:
    """A batch's loss, and how much it counts in a mean over batches.

    :param model: called as ``model(**batch, labels=labels)`` if there is no ``loss_fn``
    :param batch: with ``input_ids`` (b, L), if there is none; labels may be in it, otherwise
        they are the token ids, those at padding and right after it left out
    :param loss_fn: ``loss_fn(model, batch)``, a mean over the batch
    :return: scalar loss, and its labels; with a ``loss_fn`` its rows
    :raises SparseSSMError: the model has no loss, labels are out of range, or what ``loss_fn``
        returns is no scalar with a gradient
    """
    loss: Any
    if loss_fn is not None:
        loss, count = loss_fn(model, batch), rows(batch)
        what = f"loss_fn returned {_described(loss)}"
    else:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = labels_of(batch)
        vocabulary = _vocabulary_size(model)
        if vocabulary is not None:
            _check_labels(labels, vocabulary)
        count = int((labels[:, 1:] != IGNORED_LABEL).sum())
        if count == 0:
            return torch.zeros(()), 0
        if not _takes_labels(model):
            raise SparseSSMError(_no_loss(model))
        loss = getattr(model(**inputs, labels=labels), "loss", None)
        if loss is None:
            raise SparseSSMError(_no_loss(model))
        what = f"{type(model).__name__} returned {_described(loss)} as its loss"
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise SparseSSMError(f"{what}; it must be one number that has a gradient")
    return loss.float().reshape(()), count


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """(b, L) labels of a batch of text, as transformers' losses take them.

    :raises SparseSSMError: the batch has no ``input_ids``, or labels of another shape
    """
    ids = batch.get("input_ids")
    if ids is None:
        raise SparseSSMError(
            f"a batch holds {', '.join(map(str, batch)) or 'nothing'} and no input_ids; for "
            "other data than text give loss_fn"
        )
    labels = batch.get("labels")
    if labels is not None:
        if labels.shape != ids.shape:
            raise SparseSSMError(
                f"labels have shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}"
            )
        return labels
    mask = batch.get("attention_mask")
    if mask is None:
        return ids
    real = mask.bool()
    predicted = real.clone()
    predicted[:, 1:] &= real[:, :-1]  # the first token after padding on the left is not
    return ids.masked_fill(~predicted, IGNORED_LABEL)


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel():
        raise SparseSSMError(
            f"labels hold {int(wrong[0])}; allowed: 0 to {vocabulary - 1}, and "
            f"{IGNORED_LABEL} for what is left out"
        )


def _vocabulary_size(model: Any) -> int | None:
    """How many tokens the model tells apart, or None if it does not say."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "out_features", None)


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return "labels" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def _no_loss(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} returns no loss; give loss_fn, a function of the model and a "
        "batch (only from Python)"
    )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    missing = "" if value.requires_grad else " without a gradient"
    return f"a tensor of shape {tuple(value.shape)}{missing}"


# -- batches -------------------------------------------------------------------------------


def rows(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor.

    :raises SparseSSMError: it holds no tensor with a dimension
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise SparseSSMError(f"a batch is a {type(batch).__name__} without a tensor of samples in it")


def positions(batch: Any) -> int:
    """Positions of a batch: samples times steps, by its first tensor with a dimension."""
    shapes = [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return math.prod(shapes[0][:2]) if shapes else 0


def single_rows(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each a batch of one; what has another length is left whole."""
    count = rows(batch)
    for i in range(count):
        yield tree_map(
            lambda x, i=i: (
                x[i : i + 1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else x
            ),
            batch,
        )


def single_device(who: str, model: nn.Module) -> torch.device:
    """Where all weights of a model lie.

    :param who: asks for it, for the message
    :raises SparseSSMError: on several devices, or nowhere
    """
    devices = {str(p.device): p.device for p in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise SparseSSMError(
            f"{who}: the model's weights lie on {', '.join(sorted(devices))}; "
            "for its gradients all must lie on one device: load it without offloading and "
            "without a device map"
        )
    return next(iter(devices.values()))


@contextmanager
def on_compute_device(
    who: str, model: nn.Module, needed: int | None = None
) -> Iterator[torch.device]:
    """Hold all weights of a model where it computes, so that gradient steps change them there.

    ``oneshot()`` loads a model into main memory and moves copies of one layer at a time to the
    GPU. Copies cannot be tuned, and all layers on the CPU take hundreds of times as long; so a
    model that fits is moved as a whole, and what has become of it moved back. To be called where
    onloading is disabled.

    :param who: asks for it, for messages
    :param needed: bytes that the work takes there; default those of steps on all weights
    :return: the device
    :raises SparseSSMError: weights on several devices, or nowhere
    """
    home = single_device(who, model)
    device = _execution_device(model, home)
    if device.type != home.type:
        if needed is None:
            needed = sum(w.nbytes + _TRAINING * w.numel() for w in model.parameters())
        if has_room(device, needed, _SPARE):
            with held_on(model, device):
                yield device
            return
    if home.type == "cpu" and torch.accelerator.is_available():
        reason = (
            "load the model on the accelerator to be faster"
            if device.type == home.type
            else f"with what its gradients need it would take more than {device} has free"
        )
        logger.warning(f"{who}: computes on the CPU, where the model is; {reason}")
    yield home


def _execution_device(model: nn.Module, home: torch.device) -> torch.device:
    """Where LLM Compressor's pipeline moves inputs to; where the weights lie if not to one."""
    devices = {
        torch.device(get_execution_device(module, home))
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    return devices.pop() if len(devices) == 1 else home


@contextmanager
def held_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies on a device in the place of all weights and buffers, and back into these at the end.

    Tensors that share memory share it there, too. After an exception all is as it was before.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    homes = [tensor.data for tensor in tensors]
    copies: dict[Any, Tensor] = {}
    try:
        for tensor, at_home in zip(tensors, homes, strict=True):
            key = (at_home.data_ptr(), at_home.dtype, at_home.shape, at_home.stride())
            if key not in copies:
                copies[key] = at_home.to(device, copy=True)
            tensor.grad, tensor.data = None, copies[key]
        yield
        for tensor, at_home in zip(tensors, homes, strict=True):
            at_home.copy_(tensor.data)
    finally:
        for tensor, at_home in zip(tensors, homes, strict=True):
            tensor.grad, tensor.data = None, at_home


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Mapping):  # BatchEncoding among them
        batch = dict(batch)

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if device.type == "cuda" and x.device.type == "cpu":  # what computes there goes on
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device)

    return tree_map(move, batch)


# -- gradients -----------------------------------------------------------------------------


def mean_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    *,
    loss_fn: LossFunction | None = None,
    of_samples: bool = False,
    non_finite: NonFiniteGradients | None = None,
) -> tuple[dict[str, Tensor], float]:
    """The gradient of the mean loss, or the norm of those of single samples.

    Memory beside the model: for each weight in ``parameters`` one float32 sum, and the gradient
    of one batch in the model's dtype.

    :param batches: batches of calibration data, on any device
    :param parameters: by name
    :param loss_fn: see :func:`loss_of`
    :param of_samples: ``sqrt(sum_i n_i g_i^2 / sum_i n_i)`` over samples i of n_i labels, instead
        of ``|sum_i n_i g_i / sum_i n_i|``; a backward pass for each sample
    :param non_finite: counts the batches that are skipped
    :return: float32 by name, not negative, and the mean loss
    :raises SparseSSMError: see :func:`loss_of`; no labels at all; too many non-finite gradients
    """
    non_finite = non_finite or NonFiniteGradients()
    skipped = len(non_finite.skipped)
    device = next(iter(parameters.values())).device
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    # weight of all batches, and their weighted loss
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    most = max((positions(b) // (rows(b) if of_samples else 1) for b in batches), default=0)
    with differentiable(model, parameters.values(), most):
        for batch in batches:
            for part in single_rows(batch) if of_samples else [batch]:
                part = to_device(part, device)
                loss, count = loss_of(model, part, loss_fn)
                if count == 0:
                    continue
                loss.backward()
                again = partial(loss_of, model, part, loss_fn)
                if not non_finite.found(model, parameters, again):
                    totals += torch.tensor([count, count * float(loss.detach())]).to(totals)
                    for name, p in parameters.items():
                        if p.grad is None:
                            continue
                        if of_samples:
                            g = p.grad.float()
                            sums[name].addcmul_(g, g, value=count)
                        else:
                            sums[name].add_(p.grad, alpha=count)
                for p in parameters.values():
                    p.grad = None
    reduce_sum("gradients", {"loss": totals, **sums})  # in place
    weight, loss_sum = totals.tolist()
    if weight == 0:
        if len(non_finite.skipped) > skipped:
            raise NonFiniteError(
                "every batch gave NaN or infinite gradients; in the last they begin in "
                f"{non_finite.skipped[-1]}"
            )
        raise SparseSSMError("the calibration data holds no label: nothing was predicted")
    for total in sums.values():
        total /= weight
        total.sqrt_() if of_samples else total.abs_()
    return sums, loss_sum / weight
