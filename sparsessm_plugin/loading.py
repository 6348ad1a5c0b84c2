"""Load compressed checkpoints whose weight initialisers transformers cannot run.

``from_pretrained`` calls ``_init_weights`` of Mamba, Mamba2 and FalconMamba on every mixer, also
on those whose tensors have all been loaded, and there transformers reads, and where the config
says so divides, ``out_proj.weight``. A packed out_proj has no such tensor, and one of 8 bits
cannot be divided.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from threading import RLock
from typing import Any

# module of transformers -> class whose _init_weights reads mixer.out_proj.weight
_INITIALISERS = {
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaPreTrainedModel",
    "transformers.models.mamba.modeling_mamba": "MambaPreTrainedModel",
    "transformers.models.mamba2.modeling_mamba2": "Mamba2PreTrainedModel",
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
    for module, name in _INITIALISERS.items():
        with suppress(ImportError, AttributeError):
            classes.append(getattr(import_module(module), name))
    return classes


def needs_load(model: Any) -> bool:
    """Whether stock transformers fails on what the model saves, or rescales it.

    :param model: as it was saved, with what is packed in it
    """
    families = set(_INITIALISERS.values())
    if not any(cls.__name__ in families for cls in type(model).__mro__):
        return False
    packed = (name.endswith("out_proj.weight_packed") for name, _ in model.named_parameters())
    return any(packed) or bool(getattr(model.config, "rescale_prenorm_residual", False))


def load(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a causal language model that this package, or anyone, has saved.

    Does what ``AutoModelForCausalLM.from_pretrained`` does, and gives the saved weights also
    where that does not: of packed checkpoints of Mamba, Mamba2 and FalconMamba, which it
    refuses, and of those with ``rescale_prenorm_residual``, whose out_proj it divides by the
    square root of the number of layers each time it loads them.

    :param path: a folder or a name on the hub
    :param kwargs: for ``from_pretrained``
    :return: the model in evaluation mode, in the checkpoint's dtype unless ``dtype`` is given;
        with ``output_loading_info=True`` also that
    :raises OSError: there is no such checkpoint
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hub = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in hub if k in kwargs})
    rescales = getattr(config, "rescale_prenorm_residual", False)
    if rescales:
        config.rescale_prenorm_residual = False  # what is loaded was scaled when it was made
    try:
        with _compressed_loading():
            loaded = AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    finally:
        if rescales:
            config.rescale_prenorm_residual = True
    if rescales:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.rescale_prenorm_residual = True  # from_pretrained may copy the config
    return loaded


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
