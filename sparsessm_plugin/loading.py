"""Load compressed checkpoints whose weight initialisers transformers cannot run.

``from_pretrained`` calls ``_init_weights`` of Mamba, Mamba2 and FalconMamba on every mixer, also
on those whose tensors have all been loaded, and there transformers reads, and where the config
says so divides, ``out_proj.weight``. A packed out_proj has no such tensor, and one of 8 bits
cannot be divided.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

# module of transformers -> class whose _init_weights reads mixer.out_proj.weight
_INITIALISERS = {
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaPreTrainedModel",
    "transformers.models.mamba.modeling_mamba": "MambaPreTrainedModel",
    "transformers.models.mamba2.modeling_mamba2": "Mamba2PreTrainedModel",
}


def enable_compressed_loading() -> None:
    """Let ``from_pretrained`` of this process load packed Mamba, Mamba2 and FalconMamba.

    For code that calls transformers itself; :func:`load` and importing the modifiers do it.
    The initialisers are shown an out_proj that needs nothing where transformers would fail on
    it; everywhere else they do what they did. Calling it again changes nothing.
    """
    for module, name in _INITIALISERS.items():
        try:
            cls = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue  # a transformers without this family has nothing to mend
        initialise = cls._init_weights
        if not hasattr(initialise, "_tolerates_compressed"):
            cls._init_weights = _tolerating_compressed(initialise)


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

    enable_compressed_loading()
    hub = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in hub if k in kwargs})
    rescales = getattr(config, "rescale_prenorm_residual", False)
    if rescales:
        config.rescale_prenorm_residual = False  # what is loaded was scaled when it was made
    try:
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
