"""Run a method on a plain model; no framework is needed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.passes import layer_by_layer
from sparsessm_plugin.errors import SparseSSMError, cut, shown
from sparsessm_plugin.methods.base import MethodResult, MixerMethod


class Position:
    """The number of the batch that passes the model."""

    def __init__(self) -> None:
        self._index = 0

    def move(self, index: int) -> None:
        self._index = index

    def __call__(self) -> int:
        return self._index


def _checked(method: MixerMethod[Any], batches: Iterable[Any] | None) -> Iterator[Any]:
    """The batches, once it is sure that they are some.

    :raises SparseSSMError: showing one that is none
    """
    takes_any = getattr(method.settings, "loss_fn", None) is not None  # it knows what they are
    if isinstance(batches, (Mapping, str, Tensor)):
        raise SparseSSMError(
            f"{method.who} takes a list of batches, or anything that gives one after the other; "
            f"got a single {type(batches).__name__}"
        )
    for number, batch in enumerate(batches or (), 1):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not takes_any and not (isinstance(ids, Tensor) and ids.ndim == 2):
            what = f"is a {type(batch).__name__}"
            if isinstance(batch, Mapping):
                what = f"holds {cut(', '.join(map(str, batch)))}"
            raise SparseSSMError(
                f"{method.who}: batch {number} {what}; a batch is a mapping of what the model's "
                "forward takes, with input_ids, a tensor of shape (b, L)"
            )
        yield batch


def run_in_turn(
    methods: Sequence[MixerMethod[Any]], model: Any, batches: Iterable[Any]
) -> list[MethodResult]:
    """:func:`run` several methods; who distils fits to the model as it was before the first.

    :param methods: in order, each used once
    :param model: transformers model
    :param batches: as for :func:`run`
    :return: what each did
    :raises SparseSSMError: see :func:`run`
    """
    who = methods[0].who if methods else "run_in_turn"
    data = CalibrationBatches.draw(who, batches)
    try:
        for method in methods[1:]:
            method.prepare(model)
            method.foresee(data)
        return [run(method, model, data) for method in methods]
    finally:
        for method in methods:
            method.release()


def run(method: MixerMethod[Any], model: Any, batches: Iterable[Any] | None) -> MethodResult:
    """Change a model in place, layer by layer, each with what the changed layers before it give.

    :param method: with its settings; used once
    :param model: transformers model
    :param batches: what the model's forward takes: ``input_ids`` (b, L) and, where rows are
        padded, ``attention_mask`` (b, L); None for settings that need no data
    :return: what was done
    :raises SparseSSMError: what does not fit, before anything is changed where that can be known
    """
    with method.released_on_error():
        if not isinstance(model, nn.Module):
            raise SparseSSMError(f"{method.who} takes a loaded model, got {shown(model)}")
        method.prepare(model)
        data = None
        if method.settings.reads_data:
            data = CalibrationBatches.draw(method.who, _checked(method, batches))
            data = data.read_by(method.who)
            embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
            if hasattr(embeddings, "num_embeddings"):  # other models read other data
                data.check_vocabulary(embeddings.num_embeddings)
        handles: list[Any] = []
        at = Position()
        method.current_batch = at
        try:
            for module, hook in method.begin(data):
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if data is not None and handles:
                layer_by_layer(model, data, at.move, method.layers_done)
            method.end()
        finally:
            for handle in handles:
                handle.remove()
            method.release()
    return method.result()
