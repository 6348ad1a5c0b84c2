"""From a model and a checked recipe to a pruned model and its report."""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.utils import patch_attr
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import give_back
from sparsessm_plugin.checkpoints.loading import (
    auto_class,
    check_loaded,
    check_stored,
    check_unwrapped,
    find_file,
    load,
    read_checkpoint,
)
from sparsessm_plugin.checkpoints.offloading import (
    SHARD_BYTES,
    Offload,
    keep_offloaded,
    load_options,
)
from sparsessm_plugin.checkpoints.types import HALVES, note_places
from sparsessm_plugin.cost import (
    halved,
    has_room,
    peak_memory_bytes,
    reset_peak_memory,
    shortage,
    with_index,
)
from sparsessm_plugin.errors import SparseSSMError, SparseSSMWarning, cut
from sparsessm_plugin.families.config_levels import check_layers, language_field
from sparsessm_plugin.families.in_turn import on_disk
from sparsessm_plugin.recipes import CheckedRecipe

DEMO_MODEL = "mamba-demo-4m"
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    :param name: a folder, a name on the hub, or the demo checkpoint that is packaged here
    :param trust_remote_code: let the model's own code run
    :param dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``
    :param device: ``auto``, ``cpu`` or ``cuda``
    :param allow_unused_tensors: load a checkpoint that holds tensors the model has no place for
    :param offload: where weights stay while they are not computed with: ``none`` (on the device),
        ``cpu`` or ``disk``; see :mod:`sparsessm_plugin.checkpoints.offloading`
    :param offload_folder: for ``disk``
    """

    name: str
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    allow_unused_tensors: bool = False
    offload: Offload = "none"
    offload_folder: Path | None = None

    @property
    def path(self) -> str:
        """What to give to ``from_pretrained``."""
        if self.name == DEMO_MODEL and not Path(self.name).exists():
            return str(_ASSETS / DEMO_MODEL)
        looks_local = os.path.isabs(self.name) or self.name.startswith((".", "~"))
        if looks_local and not Path(self.name).exists():
            raise SparseSSMError(f"cannot load model {cut(self.name)}: it does not exist")
        if os.path.isfile(self.name):
            raise SparseSSMError(
                f"cannot load model {cut(self.name)}: it is a file; give the folder that holds "
                "config.json and the weights"
            )
        return self.name

    def load_skeleton(self) -> nn.Module:
        """The model without weights, on the meta device, to check things against.

        :raises SparseSSMError: no such model, or not one that transformers knows
        """
        with _model_errors(self.name):
            if Path(self.path, "adapter_config.json").is_file():
                raise SparseSSMError(
                    f"{self.name} holds PEFT adapters; merge the adapters first, with "
                    "merge_and_unload(), and give the folder of the merged model"
                )
            # before a config is made of it, which may list all its layers
            check_layers(PretrainedConfig.get_config_dict(self.path)[0], self.name)
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
            named = getattr(config.get_text_config(), "num_hidden_layers", None)  # as n_layer, say
            check_layers({"num_hidden_layers": named}, self.name)
            with torch.device("meta"):
                model: nn.Module = auto_class(config).from_config(
                    config, trust_remote_code=self.trust_remote_code
                )
                return model

    def load_tokenizer(self, for_text: bool = True) -> Any:
        """The model's tokenizer.

        transformers makes one without a vocabulary from a config alone, whose tokens mean nothing.

        :param for_text: whether it is to read text
        :return: None where the checkpoint has none, and no text is to be read
        :raises SparseSSMError: there is none for a text, or it cannot be loaded
        """
        with _model_errors(self.name, "tokenizer of "):
            error: Exception | None = None
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.path, trust_remote_code=self.trust_remote_code
                )
            except Exception as reason:
                error, tokenizer = reason, None
            files = dict.fromkeys((*_vocabularies(tokenizer), "tokenizer_config.json"))
            # tokenizers of bytes have no vocabulary, and those of other code name their own files
            config_alone = self.trust_remote_code or not _vocabularies(tokenizer)
            wanted = files if config_alone else [f for f in files if not f.endswith("_config.json")]
            if any(find_file(self.path, file) is not None for file in wanted):
                if error is not None:
                    raise error
                return tokenizer
            if not for_text:
                return None
            raise SparseSSMError(
                f"model {self.name} has no tokenizer files ({', '.join(files)}), so that no text "
                "can be read for it; put those of the original model beside its weights"
            )

    def stored_types(self) -> dict[str, torch.dtype]:
        """Types of the tensors that a checkpoint stores in 16 bits, by their names there.

        Empty where it is quantized, or where one type is asked for. A checkpoint may store some
        tensors in fewer bits than the type that its config says.
        """
        if self.dtype != "auto" or getattr(self._config, "quantization_config", None) is not None:
            return {}
        return {
            name: HALVES[entry["dtype"]]
            for name, entry in self._stored.items()
            if entry["dtype"] in HALVES
        }

    def stored_bytes(self) -> int:
        """Bytes of all tensors that the checkpoint stores."""
        offsets = (entry["data_offsets"] for entry in self._stored.values())
        return sum(end - begin for begin, end in offsets)

    @cached_property
    def _config(self) -> Any:
        return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _stored(self) -> Mapping[str, Mapping[str, Any]]:
        """What :func:`read_checkpoint` says; a large checkpoint has hundreds of files."""
        return read_checkpoint(self.path, self._config)

    @property
    def compute_device(self) -> torch.device:
        """Where the model computes."""
        if self.device == "auto":
            return with_index(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return with_index(torch.device(self.device))

    def load(self) -> Any:
        """The model with its weights, from safetensors only.

        :raises SparseSSMError: it cannot be loaded, does not fit its config in names, sizes or
            types, or holds values that are not finite
        """
        skeleton = self.load_skeleton()
        with _model_errors(self.name):
            quantized = getattr(skeleton.config, "quantization_config", None) is not None
            stored = self._stored
            if not stored and os.path.isdir(self.path) and (pickles := _pickles(self.path)):
                raise SparseSSMError(
                    f"model {self.name} holds its weights in {pickles[0]}, a pickle, which may run "
                    "code when it is read; only .safetensors files are read, which "
                    "save_pretrained of transformers writes"
                )
            check_stored(stored, skeleton, quantized, self.name)
            options = load_options(self.offload, self.offload_folder)
            with _library_bars():
                model, info = load(
                    self.path,
                    dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # to say which below
                    **options,
                )
                if self.offload != "none":
                    keep_offloaded(model, self.compute_device)
        check_unwrapped(model)
        model = model.eval() if self.offload != "none" else model.to(self.compute_device).eval()
        check_loaded(model, info, self.name, self.allow_unused_tensors)
        note_places(model)
        return model


def _pickles(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth")))


def _vocabularies(tokenizer: Any) -> tuple[str, ...]:
    """Names of the files that hold a vocabulary, as transformers' class of the tokenizer has."""
    if tokenizer is None:
        return ("tokenizer.json", "tokenizer.model")
    return tuple(sorted(getattr(tokenizer, "vocab_files_names", {}).values()))


class _model_errors:
    """Turns what transformers raises for a bad path or file into one line."""

    def __init__(self, name: str, what: str = ""):
        self.name = name
        self.subject = f"{what}model {name}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, SparseSSMError):
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = ""
        name = self.name
        if not os.path.exists(name) and name != DEMO_MODEL:
            lines.insert(0, "there is no such folder, and of that name on the hub:")
        for line in lines:  # a heading alone says nothing
            said = f"{said} {line}".strip()
            if not said.endswith(":"):
                break
        raise SparseSSMError(
            f"cannot load {self.subject}: {said[:400] or type(error).__name__}"
        ) from error


@dataclass
class PruningResult:
    """What a recipe did.

    :param model: the pruned model, its ``save_pretrained`` wrapped by LLM Compressor
    :param reports: one report for each modifier of this package
    :param seconds: of the whole ``oneshot`` call
    :param tokens: of the calibration data of all ranks, padding included
    :param peak_memory_bytes: see :func:`sparsessm_plugin.cost.peak_memory_bytes`
    """

    model: Any
    reports: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0


def prune(
    model: Any,
    recipe: CheckedRecipe,
    loader: DataLoader[Any] | None,
    tokenizer: Any,
    pipeline: str = "independent",
    reload: Callable[[], Any] | None = None,
    trust_remote_code: bool = False,
) -> PruningResult:
    """Run LLM Compressor's ``oneshot`` with a checked recipe and collect the reports.

    Where a GPU's memory does not suffice, and the model can be made again, the recipe is
    run once more on batches half as large.

    :param model: transformers model, changed in place
    :param recipe: from :func:`sparsessm_plugin.recipes.load_recipe`
    :param loader: calibration batches, None for recipes that need none
    :param tokenizer: the model's tokenizer
    :param pipeline: LLM Compressor's calibration pipeline
    :param reload: makes the model again; ``model`` is then emptied before the second try
    :param trust_remote_code: the model's config may come from code of its own
    :raises SparseSSMError: the recipe needs data and got none, a modifier's own complaint, or
        memory does not suffice
    """
    from llmcompressor import active_session

    recipe.check_data(loader)
    reset_peak_memory()
    started = time.perf_counter()
    try:
        modifiers = _run(model, recipe, loader, tokenizer, pipeline, trust_remote_code)
    except Exception as error:
        short = shortage(error, loader)
        if short is None:
            raise
        smaller = halved(loader) if loader is not None else None
        # ranks that others wait for cannot begin again on their own
        if smaller is None or reload is None or distributed.is_distributed():
            raise SparseSSMError(f"{short}; {_SMALLER}") from error
    else:
        return _result(model, modifiers, loader, started)
    # out here, where the error no longer holds what was on the GPU
    text = f"{short}; trying once more with half of each batch"
    warnings.warn(text, SparseSSMWarning, stacklevel=2)
    active_session().reset()
    for module in model.modules():  # and not to("meta"): compressed-tensors would copy from there
        module._parameters, module._buffers = {}, {}
    gc.collect()
    torch.cuda.empty_cache()
    model = reload()
    try:
        modifiers = _run(model, recipe, smaller, tokenizer, pipeline, trust_remote_code)
    except Exception as error:
        short = shortage(error, smaller)
        if short is None:
            raise
        raise SparseSSMError(f"{short}; {_SMALLER}") from error
    return _result(model, modifiers, smaller, started)


_SMALLER = "give smaller batches or shorter sequences"


def _run(
    model: Any,
    recipe: CheckedRecipe,
    loader: DataLoader[Any] | None,
    tokenizer: Any,
    pipeline: str,
    trust_remote_code: bool,
) -> list[Any]:
    # upstream warns when it has to set this itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from llmcompressor import active_session, oneshot

    from sparsessm_plugin.calibration.contexts import forget_traces
    from sparsessm_plugin.checkpoints.experts import take_experts_apart
    from sparsessm_plugin.checkpoints.saving import change_config

    try:
        with _library_bars():
            take_experts_apart(model)
            oneshot(
                model=model,
                # the text and not the modifiers: what is saved is then what the user wrote
                recipe=recipe.text,
                dataset=loader,
                processor=tokenizer,
                pipeline=pipeline,
                trust_remote_code_model=trust_remote_code,
                sequential_offload_device=_place_between_layers(model, loader),
            )
    except BaseException as error:
        distributed.fail(error)
        for modifier in active_session().lifecycle.recipe.modifiers:
            if hasattr(modifier, "release"):
                modifier.release()
        give_back(loader)
        raise
    finally:
        forget_traces()
    change_config(model, {})  # also where none of the modifiers is ours
    return active_session().lifecycle.recipe.modifiers


@contextmanager
def _library_bars() -> Iterator[None]:
    """Let ``TQDM_DISABLE`` reach the bars of compressed-tensors, which say ``disable=False``."""
    if not os.environ.get("TQDM_DISABLE"):
        yield
        return
    with ExitStack() as stack:
        for name in ("offload.dispatch", "quantization.lifecycle.apply"):
            module: Any = import_module(f"compressed_tensors.{name}")
            bar = module.tqdm
            quiet = partial(_silent_bar, bar)
            stack.enter_context(patch_attr(module, "tqdm", quiet))
        yield


def _silent_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})


def _place_between_layers(model: Any, loader: DataLoader[Any] | None) -> str:
    """Where what leaves a layer waits for the next one: on the GPU if that has room."""
    if loader is None:
        return "cpu"
    tokens = sum(batch["input_ids"].numel() for batch in loader)
    # before and after a layer, and all of it in float32 as Mamba's residual stream is
    needed = 2 * 4 * tokens * language_field(model.config, "hidden_size")
    device = get_execution_device(model)
    return str(device) if has_room(device, needed) else "cpu"


def _result(
    model: Any, modifiers: list[Any], loader: DataLoader[Any] | None, started: float
) -> PruningResult:
    seconds = time.perf_counter() - started
    tokens = sum(batch["input_ids"].numel() for batch in loader) if loader is not None else 0
    return PruningResult(
        model=model,
        reports=[m.report() for m in modifiers if hasattr(m, "report")],
        seconds=seconds,
        tokens=int(distributed.total("tokens", tokens)[0]),
        peak_memory_bytes=peak_memory_bytes(),
    )


def check_saving(skeleton: Any, tokenizer: Any, folder: Path) -> None:
    """Write what can be written before the work, so that what cannot is known before it.

    :param skeleton: the model on the meta device
    :param tokenizer: the model's tokenizer, if it has one
    :param folder: of the result; what is written there is written again by :func:`save`
    :raises SparseSSMError: saying what cannot be written
    """
    with _one_line("config"):
        skeleton.config.save_pretrained(folder)
    with _one_line("tokenizer"):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def save(
    model: Any, tokenizer: Any, folder: Path, types: Mapping[str, torch.dtype] | None = None
) -> None:
    """Save a pruned model and its tokenizer.

    :param model: its ``save_pretrained`` wrapped by LLM Compressor
    :param tokenizer: the model's tokenizer, if it has one
    :param folder: that exists
    :param types: of tensors that are to be stored in 16 bits, by their names now, once
        :func:`round_weights` has rounded them
    :raises SparseSSMError: it cannot be written, as where the disk is full
    """
    from sparsessm_plugin.checkpoints.saving import copy_processor  # brings LLM Compressor along
    from sparsessm_plugin.checkpoints.types import store_as

    with _one_line("model"), _library_bars():
        small = {"max_shard_size": SHARD_BYTES} if on_disk(model) else {}
        model.save_pretrained(folder, **small)
        if types:
            store_as(folder, types)
    with _one_line("tokenizer"):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_processor(model, folder)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """The writers have errors of their own kinds, those of tokenizers a bare Exception."""
    try:
        yield
    except SparseSSMError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise SparseSSMError(f"cannot save the {what}: {said}") from error
