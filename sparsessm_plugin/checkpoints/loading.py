"""Load checkpoints whole or not at all, also compressed ones that transformers cannot run.

transformers drops tensors that a model has no place for, reads shards that are pickles, and
turns whole numbers into weights; :func:`read_checkpoint` and the checks after it refuse such files.

``from_pretrained`` calls ``_init_weights`` of Mamba, Mamba2 and FalconMamba on every mixer, also
on those whose tensors have all been loaded, and there transformers reads, and where the config
says so divides, ``out_proj.weight``. A packed out_proj has no such tensor, and one of 8 bits
cannot be divided.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path, PurePosixPath
from threading import RLock
from typing import Any

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.catalog import FAMILIES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # what safetensors itself allows, bytes
# what safetensors calls the types that a weight may be stored in
_FLOATS = ("F64", "F32", "F16", "BF16")
# what compressed-tensors puts beside the tensor that holds a quantized weight
_SCALES = ("weight_scale", "weight_packed")

# model_type -> class of transformers whose _init_weights reads mixer.out_proj.weight
_INITIALISERS = {
    model_type: family.initialiser
    for model_type, family in FAMILIES.items()
    if family.initialiser is not None
}

_switching = RLock()


def enable_compressed_loading() -> None:
    """Let ``from_pretrained`` of this process load packed Mamba, Mamba2 and FalconMamba for good.

    For code that calls transformers itself and cannot call :func:`load`, which does the same for
    the time of its own call. The initialisers are shown an out_proj that needs nothing where
    transformers would fail on it; everywhere else they do what they did. Calling it again
    changes nothing.
    """
    with _switching:
        for cls in _initialised_classes():
            if not hasattr(cls._init_weights, "_tolerates_compressed"):
                cls._init_weights = _tolerating_compressed(cls._init_weights)
            cls._init_weights._for_a_time = None  # nobody takes it back


@contextmanager
def _compressed_loading() -> Iterator[None]:
    """:func:`enable_compressed_loading` for a time; all as before once nobody needs it any more."""
    with _switching:
        classes = _initialised_classes()
        for cls in classes:
            if not hasattr(cls._init_weights, "_tolerates_compressed"):
                cls._init_weights = _tolerating_compressed(cls._init_weights)
            if cls._init_weights._for_a_time is not None:
                cls._init_weights._for_a_time += 1
    try:
        yield
    finally:
        with _switching:
            for cls in classes:
                ours = cls._init_weights
                if getattr(ours, "_for_a_time", None) is not None:
                    ours._for_a_time -= 1
                    if not ours._for_a_time:
                        cls._init_weights = ours.__wrapped__


def _initialised_classes() -> list[Any]:
    """transformers' classes whose initialiser cannot run; one without a family lacks its class."""
    classes = []
    for family, name in _INITIALISERS.items():
        with suppress(ImportError, AttributeError):
            module = import_module(f"transformers.models.{family}.modeling_{family}")
            classes.append(getattr(module, name))
    return classes


def needs_load(model: Any) -> bool:
    """Whether stock transformers fails on what the model saves, or rescales it.

    :param model: as it was saved, with what is packed in it
    """
    families = set(_INITIALISERS.values())
    if not any(cls.__name__ in families for cls in type(model).__mro__):
        return False
    from sparsessm_plugin.families.in_turn import parameter_names

    packed = (name.endswith("out_proj.weight_packed") for name in parameter_names(model))
    return any(packed) or bool(getattr(model.config, "rescale_prenorm_residual", False))


def load(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a language model that this package, or anyone, has saved.

    Does what ``AutoModelForCausalLM.from_pretrained`` does, or ``AutoModelForImageTextToText``
    where the config names a class that reads images, too; and gives the saved weights also
    where that does not: of packed checkpoints of Mamba, Mamba2 and FalconMamba, which it
    refuses, and of those with ``rescale_prenorm_residual``, whose out_proj it divides by the
    square root of the number of layers each time it loads them.

    :param path: a folder or a name on the hub
    :param kwargs: for ``from_pretrained``
    :return: the model in evaluation mode, in the checkpoint's dtype unless ``dtype`` is given;
        with ``output_loading_info=True`` also that
    :raises OSError: there is no such checkpoint
    :raises SparseSSMError: its index of weights names what is no safetensors file of the folder
    """
    from transformers import AutoConfig

    hub = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in hub if k in kwargs})
    if kwargs.get("gguf_file") is None:
        ours = {k: v for k, v in kwargs.items() if k in (*hub, "variant")}
        ours.pop("trust_remote_code", None)
        _shards(path, config, ours)
    rescales = getattr(config, "rescale_prenorm_residual", False)
    if rescales:
        config.rescale_prenorm_residual = False  # what is loaded was scaled when it was made
    try:
        with _compressed_loading():
            loaded = auto_class(config).from_pretrained(path, config=config, **kwargs)
    finally:
        if rescales:
            config.rescale_prenorm_residual = True
    if rescales:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.rescale_prenorm_residual = True  # from_pretrained may copy the config
    return loaded


def auto_class(config: Any) -> Any:
    """transformers' Auto class that makes the model which a config names.

    The config of a language model beside an image encoder makes two models in transformers: the
    whole, and the language model alone, which leaves the encoder's tensors where they are.

    :param config: of a model
    :return: AutoModelForImageTextToText if the config's architecture reads images beside text,
        AutoModelForCausalLM for all others
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    named = next(iter(getattr(config, "architectures", None) or ()), None)
    kind = getattr(config, "model_type", None)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if named is None or named != whole or named == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _tolerating_compressed(initialise: Any) -> Any:
    @wraps(initialise)
    def _init_weights(self: Any, module: Any) -> None:
        with _with_initialised_out_proj(module):
            initialise(self, module)

    _init_weights._tolerates_compressed = True  # type: ignore[attr-defined]
    _init_weights._for_a_time = 0  # type: ignore[attr-defined]
    return _init_weights


@contextmanager
def _with_initialised_out_proj(mixer: Any) -> Iterator[None]:
    """Show a compressed out_proj as one whose weight has been initialised already."""
    out_proj = getattr(mixer, "out_proj", None)
    if out_proj is None or not _is_compressed(out_proj):
        yield
        return
    import torch

    stand_in = torch.ones(1, 1)
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    # found before the registered parameter of that name, and in the place of a missing one
    vars(out_proj)["weight"] = stand_in
    try:
        yield
    finally:
        del vars(out_proj)["weight"]


def _is_compressed(linear: Any) -> bool:
    """Whether the weight is packed into another tensor or of a type without arithmetic."""
    weight = getattr(linear, "weight", None)
    return weight is None or not weight.is_floating_point() or weight.element_size() == 1


# -- what a checkpoint must be ------------------------------------------------------------


def check_unwrapped(model: Any) -> None:
    """Refuse a model that something else is wrapped around, before anything of it changes.

    With PEFT's adapters on it ``save_pretrained`` writes the adapters alone, and what was pruned is
    lost; a compiled model goes on with the code that it was compiled to.

    :raises SparseSSMError: saying what is around the model and what to do, or that it has no
        weights as it stands on the meta device
    """
    from compressed_tensors.offload import disable_onloading

    from sparsessm_plugin.families.in_turn import on_disk

    with disable_onloading():
        parameters = list(model.parameters())
    if parameters and all(p.is_meta for p in parameters) and not on_disk(model):
        raise SparseSSMError(
            "the model stands on the meta device and has no weights; load it with from_pretrained()"
        )
    adapters = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
    for name, module in model.named_modules():
        where = type(module).__module__
        if adapters or where == "peft" or where.startswith("peft."):
            at = f", {name} is one of them" if name and not adapters else ""
            raise SparseSSMError(
                f"the model has PEFT adapters{at}, and saving it would keep the adapters alone; "
                "merge the adapters first, with merge_and_unload()"
            )
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or where.startswith("torch._dynamo."):
            raise SparseSSMError(
                f"{name or 'the model'} is compiled by torch.compile; prune the model as it was "
                "before that and compile it afterwards"
            )


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """Tensor name -> dtype and shape of a safetensors file; eight bytes of length, then JSON.

    :raises SparseSSMError: it is no such file
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        # float8 without scales, which loads by conversion alone, is stated and never guessed
        if isinstance(metadata, dict) and metadata.get("unscaled_float8") == "true":
            header = {name: {**entry, "unscaled": True} for name, entry in header.items()}
        return dict(header.items())
    except (OSError, ValueError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise SparseSSMError(f"{path} is no safetensors file: {error}") from error


def read_checkpoint(
    path: str | os.PathLike[str], config: Any, **hub: Any
) -> dict[str, Mapping[str, Any]]:
    """Tensor name -> dtype and shape of everything that a checkpoint stores.

    :param path: a folder or a name on the hub, from which files are fetched that are not here
    :param config: the checkpoint's config
    :param hub: ``revision``, ``token`` and the like, for the hub
    :return: empty where there is no safetensors file
    :raises SparseSSMError: an index that names what is no safetensors file of the folder, or a
        file that is damaged
    """
    tensors: dict[str, Mapping[str, Any]] = {}
    for shard in _shards(path, config, hub):
        file = find_file(path, shard, hub)
        if file is not None:
            tensors.update(read_header(file))
    return tensors


def check_stored(
    tensors: Mapping[str, Mapping[str, Any]], skeleton: Any, quantized: bool, name: str
) -> None:
    """Compare the types and sizes of stored tensors with the model's, before any is loaded.

    Tensors that transformers renames or joins are looked at when they are loaded.

    :param tensors: from :func:`read_checkpoint`
    :param skeleton: the model on the meta device
    :param quantized: whether the config says that weights are quantized
    :param name: of the checkpoint, for messages
    :raises SparseSSMError: naming the tensor, what is stored and what the model has
    """
    own = skeleton.state_dict()
    halves: dict[str, str] = {}
    for key, stored in tensors.items():
        try:
            dtype, shape = str(stored["dtype"]), tuple(stored["shape"])
        except (KeyError, TypeError) as error:
            raise SparseSSMError(f"the checkpoint {name}: the entry of {key} is damaged") from error
        there = own.get(key)
        if dtype in _FLOATS:
            if dtype in ("F16", "BF16"):
                halves.setdefault(dtype, key)
        elif not (dtype == "F8_E4M3" and stored.get("unscaled")) and not _may_be_whole(
            key, there, tensors, quantized
        ):
            raise SparseSSMError(
                f"the checkpoint {name} stores {key} as {dtype}; weights are stored as "
                f"{', '.join(_FLOATS)}{_quantized_by(skeleton.config) if quantized else ''}"
            )
        if there is not None and not quantized and shape != tuple(there.shape):
            raise SparseSSMError(
                f"the checkpoint {name} stores {key} with the shape {list(shape)}, and the model "
                f"of its config.json has {list(there.shape)}"
            )
    if len(halves) == 2:  # nobody trains in both; the bytes of one were called the other
        raise SparseSSMError(
            f"the checkpoint {name} stores {halves['F16']} as F16 and {halves['BF16']} as BF16; "
            "one of them is mislabelled, convert it to the type of the others"
        )


def _quantized_by(config: Any) -> str:
    """What to add of a checkpoint that others than compressed-tensors have quantized."""
    said = config.quantization_config
    method = (said if isinstance(said, Mapping) else vars(said)).get("quant_method")
    method = getattr(method, "value", method)
    if method in (None, "compressed-tensors"):
        return ""
    return f"; its config says {method}, and of quantized ones those of compressed-tensors load"


def check_loaded(model: Any, info: Mapping[str, Any], name: str, allow_unused: bool) -> None:
    """Refuse a model that has not got all of a checkpoint, or got what are no numbers.

    :param model: as ``from_pretrained`` made it; each tensor is read once
    :param info: its ``loading_info``
    :param name: of the checkpoint, for messages
    :param allow_unused: let the checkpoint hold tensors that the model has no place for
    :raises SparseSSMError: naming the first tensor of those concerned
    """
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, own = mismatched[0]
        raise SparseSSMError(
            f"the checkpoint {name} stores {key} with the shape {list(stored)}, and the model of "
            f"its config.json has {list(own)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise SparseSSMError(
            f"the checkpoint {name} lacks {_tensors(missing)} of the model, {missing[0]} among them"
        )
    unused = sorted(info["unexpected_keys"])
    if unused and not allow_unused:
        raise SparseSSMError(
            f"the checkpoint {name} holds {_tensors(unused)} that the model of its config.json has "
            f"no place for, {unused[0]} among them; correct config.json, or leave them out with "
            "--allow-unused-tensors"
        )
    from sparsessm_plugin.families.in_turn import tensors_in_turn

    for key, tensor in tensors_in_turn(model):
        if not _is_finite(tensor):
            raise SparseSSMError(f"the checkpoint {name}: {key} holds NaN or infinite values")


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _may_be_whole(
    key: str, there: Any, tensors: Mapping[str, Mapping[str, Any]], quantized: bool
) -> bool:
    """Whether a stored tensor may be of another type than a weight's."""
    if there is not None and not there.is_floating_point() and not there.is_complex():
        return True  # a buffer of the model that counts
    module = key.rpartition(".")[0]
    return quantized and any(f"{module}.{scale}" in tensors for scale in _SCALES)


def _is_finite(tensor: Any) -> bool:
    import torch

    if tensor.is_meta or not tensor.is_floating_point():
        return True
    tensor = tensor.detach()
    if tensor.element_size() == 1:  # FP8 has no sum
        tensor = tensor.float()
    # most are finite and their sum is, too; a sum in float32 may overflow without a fault
    quick = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(float(quick)) or bool(torch.isfinite(tensor).all())


def _shards(path: str | os.PathLike[str], config: Any, hub: Mapping[str, Any]) -> list[str]:
    """The safetensors files that transformers reads, none where it finds none.

    :raises SparseSSMError: one is no safetensors file of the folder
    """
    variant = hub.get("variant")
    hub = {key: value for key, value in hub.items() if key != "variant"}
    folder = os.path.isdir(path)
    index = getattr(config, "transformers_weights", None)
    if index is not None:
        _check_shard(str(index).removesuffix(".index.json"), f"{path}, transformers_weights")
        if not index.endswith(".index.json"):
            return [index]
    else:
        whole, index = _variant(WEIGHTS, variant), _variant(INDEX, variant)
        # of the hub, only the index is small enough to fetch in order to look at it
        if folder and find_file(path, whole, hub) is not None:
            return [whole]
    file = find_file(path, index, hub)
    if file is not None:
        return _listed_shards(file, f"{path}, {index}")
    return [] if folder else [_variant(WEIGHTS, variant)]


def _listed_shards(index: Path, where: str) -> list[str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = list(dict.fromkeys(found.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SparseSSMError(f"{where} is no index of weights: {error!r}"[:400]) from error
    if not shards:
        raise SparseSSMError(f"{where} is no index of weights: its weight_map is empty")
    for shard in shards:
        _check_shard(shard, where)
    return shards


def _check_shard(shard: Any, where: str) -> None:
    parts = PurePosixPath(shard).parts if isinstance(shard, str) else ()
    if not parts or shard.startswith("/") or ".." in parts or not shard.endswith(".safetensors"):
        raise SparseSSMError(
            f"{where}: {str(shard)[:200]!r} is no .safetensors file of this folder; nothing else "
            "is read"
        )


def find_file(
    path: str | os.PathLike[str], name: str, hub: Mapping[str, Any] | None = None
) -> Path | None:
    """A file of a folder or of the hub, None where there is none."""
    from transformers.utils import cached_file

    if not str(path):  # a model that was made from a config alone
        return None
    found = cached_file(
        str(path),
        name,
        **(hub or {}),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _variant(name: str, variant: str | None) -> str:
    stem, dot, ending = name.rpartition(".")  # as transformers has it
    return name if variant is None else f"{stem}.{variant}{dot}{ending}"
