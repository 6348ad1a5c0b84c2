"""From a transformers checkpoint to the layout of other runtimes.

``mamba_ssm`` is the authors' own runtime of Mamba and Mamba-2. Its ``from_pretrained`` reads
pickled weights; what is written here is safetensors, which these lines load::

    config = MambaConfig(**json.loads((folder / "config.json").read_text()))
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    safetensors.torch.load_model(model, folder / "model.safetensors")

(``MambaConfig`` from ``mamba_ssm.models.config_mamba``.) :func:`load_mamba_ssm` does the same,
and mends what a channel count that is no multiple of the width would break in decoding.
"""

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.base import MixerSizes
from sparsessm_plugin.families.catalog import family_of
from sparsessm_plugin.files import write_json

FORMATS = ("mamba_ssm",)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# what mamba_ssm has fixed in its code and cannot be told in a config
_NORM_EPSILON = 1e-5
_ACTIVATIONS = ("silu", "swish")
_MAX_STATE_SIZE = 256
_MAX_CONV_KERNEL = 4


def check_mamba_ssm(model: Any) -> None:
    """Refuse a model that mamba_ssm cannot compute as transformers does.

    :param model: transformers model; its weights are not looked at and may be on ``meta``
    :raises SparseSSMError: says what mamba_ssm lacks
    """
    mamba_ssm_config(model)


def mamba_ssm_config(model: Any) -> dict[str, Any]:
    """The fields of mamba_ssm's ``MambaConfig`` for a transformers model.

    :param model: transformers Mamba or Mamba-2 model; its weights are not looked at
    :raises SparseSSMError: mamba_ssm cannot compute this model as transformers does
    """
    config = model.config
    family = family_of(config.model_type)
    if family is None or not family.mamba_ssm:
        raise SparseSSMError(
            f"mamba_ssm has no {config.model_type} model; only plain Mamba and Mamba-2 can be "
            "exported to it"
        )
    if getattr(config, "quantization_config", None) is not None or any(
        hasattr(module, "quantization_scheme") for module in model.modules()
    ):
        raise SparseSSMError("the model is quantized, which mamba_ssm knows nothing of")
    if not math.isclose(config.layer_norm_epsilon, _NORM_EPSILON, rel_tol=1e-3):
        raise SparseSSMError(
            f"the model's norms use an epsilon of {config.layer_norm_epsilon:g}; mamba_ssm knows "
            f"only {_NORM_EPSILON:g}"
        )
    if config.hidden_act not in _ACTIVATIONS:
        raise SparseSSMError(
            f"the model's activation is {config.hidden_act}; mamba_ssm knows only silu"
        )
    layout_fields = {"mamba1": _mamba1_config, "mamba2": _mamba2_config}[family.layout]
    sizes = _common_sizes(model)
    if sizes.state_size > _MAX_STATE_SIZE:
        raise SparseSSMError(
            f"{sizes.state_size} states; mamba_ssm's kernels take at most {_MAX_STATE_SIZE}"
        )
    if not 2 <= sizes.conv_kernel_size <= _MAX_CONV_KERNEL:
        raise SparseSSMError(
            f"a convolution of width {sizes.conv_kernel_size}; causal_conv1d takes 2 to "
            f"{_MAX_CONV_KERNEL}"
        )
    return {
        "d_model": sizes.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "ssm_cfg": {
            **layout_fields(config, sizes),
            "d_state": sizes.state_size,
            "d_conv": sizes.conv_kernel_size,
            "conv_bias": config.use_conv_bias,
            "bias": config.use_bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        # rows that the checkpoint does not have would have to be invented
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def mamba_ssm_state_dict(model: Any) -> dict[str, Tensor]:
    """The model's tensors under the names of mamba_ssm's ``MambaLMHeadModel``.

    A tied output matrix is left out: safetensors stores no tensor twice.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = name.replace("backbone.embeddings.", "backbone.embedding.", 1)
        tensors[name] = tensor.detach().contiguous()
    return tensors


def export_mamba_ssm(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` for mamba_ssm into an existing folder.

    :param model: transformers Mamba or Mamba-2 model
    :raises SparseSSMError: mamba_ssm cannot compute this model, or the disk is full
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = mamba_ssm_config(model)
    try:
        save_file(mamba_ssm_state_dict(model), Path(folder) / WEIGHTS_NAME, {"format": "pt"})
    except SafetensorError as error:
        raise SparseSSMError(f"cannot save the model: {error}") from error
    write_json(Path(folder) / CONFIG_NAME, config)


def load_mamba_ssm(
    folder: str | os.PathLike[str],
    device: str | torch.device = "cuda",
    dtype: torch.dtype | None = None,
) -> Any:
    """Load what :func:`export_mamba_ssm` wrote as mamba_ssm's ``MambaLMHeadModel``.

    :param folder: with ``config.json`` and ``model.safetensors``
    :param device: mamba_ssm computes on CUDA only
    :param dtype: of the weights, by default as saved; mamba_ssm keeps some in float32 always
    :raises SparseSSMError: mamba_ssm is not installed, or the folder holds no such model
    """
    try:
        MambaConfig = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
        models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    except ImportError as error:
        raise SparseSSMError(f"mamba_ssm cannot be imported: {error}") from error
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    weights = Path(folder) / WEIGHTS_NAME
    try:
        config = MambaConfig(**json.loads((Path(folder) / CONFIG_NAME).read_text("utf-8")))
        if dtype is None:
            with safe_open(weights, "pt") as file:
                dtype = file.get_tensor("backbone.embedding.weight").dtype
        model = models.MambaLMHeadModel(config, device=device, dtype=dtype)
        load_model(model, weights)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        lines = str(error).splitlines()
        raise SparseSSMError(
            f"cannot load {folder} into mamba_ssm: {lines[0] if lines else type(error).__name__}"
        ) from error
    for layer in model.backbone.layers:
        mixer = layer.mixer
        if type(mixer).__name__ == "Mamba":
            # only the state cache reads these two; their product must be a whole number
            mixer.d_model, mixer.expand = mixer.d_inner, 1
    return model.eval()


def _common_sizes(model: Any) -> MixerSizes:
    mixers = find_mixers(model)
    for mixer in mixers:
        if mixer.sizes != mixers[0].sizes:
            raise SparseSSMError(
                f"{mixer.name} has other sizes than {mixers[0].name}; mamba_ssm has one size for "
                "all layers"
            )
    return mixers[0].sizes


def _mamba1_config(config: Any, sizes: MixerSizes) -> dict[str, Any]:
    return {
        "layer": "Mamba1",
        "expand": _expansion(sizes.intermediate_size, sizes.hidden_size),
        "dt_rank": sizes.time_step_rank,
    }


def _expansion(channels: int, width: int) -> int | float:
    """A number from which ``int(number * width)`` makes the channels."""
    if channels % width == 0:
        return channels // width
    quotient = channels / width
    # where rounding falls just short, aim between this number of channels and the next
    return quotient if int(quotient * width) == channels else (channels + 0.5) / width


def _mamba2_config(config: Any, sizes: MixerSizes) -> dict[str, Any]:
    low, high = config.time_step_limit
    if (low, high) != (0.0, math.inf):
        raise SparseSSMError(
            f"the model limits its step sizes to {low:g} to {high:g}; mamba_ssm does not do so in "
            "decoding"
        )
    if sizes.n_groups != 1:
        raise SparseSSMError(
            f"the model has {sizes.n_groups} groups of heads: mamba_ssm normalises each group by "
            "itself, transformers all channels together, so the two compute different things"
        )
    D, N, H = sizes.intermediate_size, sizes.state_size, sizes.num_heads
    if D % sizes.hidden_size:
        raise SparseSSMError(
            f"{D} channels are no multiple of the width {sizes.hidden_size}; mamba_ssm's Mamba-2 "
            "needs a whole number for `expand`"
        )
    for what, number in (
        ("convolution", D + 2 * N),
        ("input projection", 2 * D + 2 * N + H),
    ):
        if number % 8:
            raise SparseSSMError(
                f"{N} states and {H} heads make a {what} of {number} channels; causal_conv1d needs "
                "a multiple of 8"
            )
    return {
        "layer": "Mamba2",
        "expand": D // sizes.hidden_size,
        "headdim": sizes.head_dim,
        "ngroups": sizes.n_groups,
        "chunk_size": config.chunk_size,
    }
