"""What the modifiers ask of LLM Compressor's session, and check before a run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from compressed_tensors.offload import disable_onloading
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from torch import nn

from sparsessm_plugin.calibration import CalibrationBatches, fix_batches
from sparsessm_plugin.calibration.contexts import of_quantization
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.files import check_path, read_json

Moment = Literal["initialize", "calibration_start"]
Check = Callable[[Any, nn.Module], None]
_checks: dict[Moment, list[Check]] = {"initialize": [], "calibration_start": []}


def read_batches(who: str, state: State, source: Any) -> CalibrationBatches:
    """The batches of the run, whose ids the model knows; see :func:`fix_batches`.

    :raises SparseSSMError: there is no data, or an id outside of the vocabulary
    """
    return fix_batches(
        who, state, source, getattr(_embeddings(state.model), "num_embeddings", None)
    )


def note_ids(modifier: Modifier, state: State, batches: CalibrationBatches) -> None:
    """Let the batches know what the model embeds while a modifier watches a calibration pass."""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            batches.note_ids(state.current_batch_idx, args[0])

    embeddings = _embeddings(state.model)
    if embeddings is not None:
        modifier.register_hook(embeddings, note, "forward_pre")


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name; no scales, which a quantization stage adds meanwhile."""
    with disable_onloading():
        named = list(model.named_parameters())
    return {name: tuple(p.shape) for name, p in named if not of_quantization(name)}


def check_new(modifier: Modifier) -> None:
    """Refuse a modifier that holds what an earlier run has left in it.

    :raises SparseSSMError: naming its class
    """
    if modifier.initialized_ or modifier.finalized_:
        raise SparseSSMError(
            f"this {type(modifier).__name__} has been used before; make a new one for every run"
        )


def register_check(moment: Moment) -> Callable[[Check], Check]:
    """Decorator: let every modifier of this package ask this check at a moment of its life.

    The checks know all modifiers, which therefore do not know them.
    """

    def register(check: Check) -> Check:
        _checks[moment].append(check)
        return check

    return register


def check_recipe(moment: Moment, modifier: Modifier, model: nn.Module) -> None:
    """Refuse what the recipe that runs now may not hold, as far as a modifier is concerned.

    :raises SparseSSMError: see :mod:`sparsessm_plugin.modifiers.conflicts`
    """
    for check in _checks[moment]:
        check(modifier, model)


def check_report_path(path: str) -> None:
    """Refuse a path to which no report can be written, or where something else is.

    :raises ValueError: saying what is wrong with it
    """
    check_path(path)
    if not path.endswith(".json"):
        raise ValueError(f"must end with .json, got {shown(path)}")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"the folder of {shown(path)} does not exist")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder of {shown(path)} cannot be written to")
    if Path(path).exists() and not _is_report(Path(path)):
        raise ValueError(f"{shown(path)} exists and is no report of a modifier")


# transformers' files that were given the name, and a token of everybody who asks for that
_without_outputs: dict[str, set[object]] = {}


def outputs_not_collected(model: nn.Module) -> Callable[[], None]:
    """Let LLM Compressor see that a forward pass collects no layer's output.

    It takes a model apart by its source and evaluates conditions with the names that the
    source's file knows. transformers' ``if output_hidden_states`` asks for an argument, which is
    none, so the outputs of half of all layers were kept until the end. A name of the file that
    every function hides by its argument changes nothing else.

    :return: takes the name away again, where nobody else still asks for it; once, however often
        it is called
    """
    token, files = object(), {type(module).__module__ for module in model.modules()}
    for file in files:
        if not file.startswith("transformers.models."):
            continue
        if file in _without_outputs or "output_hidden_states" not in vars(sys.modules[file]):
            vars(sys.modules[file])["output_hidden_states"] = False
            _without_outputs.setdefault(file, set()).add(token)

    def undo() -> None:
        for file in files:
            _take_name_away(file, {token})

    return undo


def outputs_collected_again() -> None:
    """Undo every :func:`outputs_not_collected`: a run has failed, and nobody tells."""
    for file, asking in list(_without_outputs.items()):
        _take_name_away(file, set(asking))


def _take_name_away(file: str, tokens: set[object]) -> None:
    asking = _without_outputs.get(file)
    if asking is None:
        return
    asking -= tokens
    if not asking:
        del _without_outputs[file]
        vars(sys.modules[file]).pop("output_hidden_states", None)


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _is_report(path: Path) -> bool:
    try:
        return path.is_file() and "modifier" in read_json(path)
    except (OSError, ValueError, TypeError):
        return False
