"""mlx-lm, on Metal by its code, and on the CPU, where it was run."""

from collections.abc import Iterator
from functools import partial

from sparsessm_plugin.checkpoints.runtimes.common import (
    attention_at_intervals,
    doubts,
    head_dim_of_stream,
    wrong_sizes,
)
from sparsessm_plugin.checkpoints.runtimes.facts import MixerShape, ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import Limit, Runtime

# model_type -> fields of config.json without which it does not make a model
_NEEDED: dict[str, tuple[str, ...]] = {
    "mamba": ("intermediate_size", "time_step_rank", "use_conv_bias"),
    "falcon_mamba": ("intermediate_size", "time_step_rank", "use_conv_bias"),
    "mamba2": ("intermediate_size", "time_step_limit", "time_step_rank", "tie_word_embeddings"),
    "jamba": ("attn_layer_offset", "attn_layer_period", "expert_layer_period", "mamba_expand"),
    "granitemoehybrid": ("intermediate_size", "layer_types", "attention_multiplier"),
    "falcon_h1": (),
    "nemotron_h": ("intermediate_size", "mamba_proj_bias", "max_position_embeddings"),
    "qwen3_next": ("linear_key_head_dim", "rope_theta", "partial_rotary_factor"),
    "qwen3_5": ("linear_key_head_dim",),
    "qwen3_5_moe": ("linear_key_head_dim",),
    "olmo_hybrid": ("linear_key_head_dim", "linear_allow_neg_eigval", "layer_types"),
}
_WORDS = {"granitemoehybrid", "jamba"}  # that know layers of the kinds mamba and attention alone
_HEADS_OF_STREAM = ("granitemoehybrid", "jamba")
_THREADS = 32
_ROPE_THETA = 1e11  # of Falcon-H1


def _limits(facts: ModelFacts, metal: bool) -> Iterator[Limit]:
    if facts.is_mamba_ssm:
        yield Limit("no", "this is mamba_ssm's layout", about="layout")
        return
    model_type = facts.model_type
    if facts.family is not None and model_type not in _NEEDED:
        yield Limit("no", f"it has no model {model_type}", "utils.py", "family")
        return
    yield from wrong_sizes(facts)
    yield from _config(facts, model_type)
    if facts.quantization is not None:
        yield from _quantization(facts)
    yield from doubts(facts)
    if (mixer := facts.mixer) is None:
        return
    if model_type in _HEADS_OF_STREAM:
        yield from head_dim_of_stream(facts, f"models/{model_type}.py")
    one_norm = model_type == "falcon_h1" and facts.text_config.get("mamba_rms_norm")
    if one_norm and mixer.groups > 1:
        reason = f"it normalizes over all channels at once, transformers over {mixer.groups} groups"
        yield Limit("no", reason, "models/falcon_h1.py", "family")
    if metal:
        yield from _metal(facts, mixer)


def _config(facts: ModelFacts, model_type: str) -> Iterator[Limit]:
    source = f"models/{'mamba' if model_type == 'falcon_mamba' else model_type}.py"
    config = facts.text_config
    missing = [name for name in _NEEDED.get(model_type, ()) if config.get(name) is None]
    if missing:
        reason = f"config.json lacks {', '.join(missing)}, which it asks for"
        yield Limit("no", reason, source)
    if model_type.startswith("qwen3"):
        file = "qwen3_next" if model_type == "qwen3_next" else "qwen3_5"
        yield from attention_at_intervals(facts, f"models/{file}.py")
    if model_type == "falcon_h1":
        theta = (config.get("rope_parameters") or {}).get("rope_theta", _ROPE_THETA)
        if "rope_theta" not in config and theta != _ROPE_THETA:
            reason = f"it takes rope_theta for {_ROPE_THETA:g} unless config.json states it alone"
            yield Limit("no", f"{reason}, here {theta:g}", source)
        reason = "logits of a dense tiny model were up to 4e-3 away from those of transformers"
        yield Limit("unknown", reason, source)
    if model_type == "granitemoehybrid":
        if config.get("position_embedding_type") is None:
            reason = "it takes no position_embedding_type for rope, transformers for none; say nope"
            yield Limit("no", reason, source)
        width, other = config.get("shared_intermediate_size"), config.get("intermediate_size")
        if not config.get("num_local_experts") and other is not None and width != other:
            reason = f"it reads intermediate_size, {other}, of a dense MLP of {width} units"
            yield Limit("no", reason, source)
    strange = facts.kinds_of_layers - {"mamba", "attention"}
    if model_type in _WORDS and strange:
        words = ", ".join(sorted(strange))
        yield Limit("no", f"it knows layers of the kinds mamba and attention, not {words}", source)
    if model_type in ("mamba", "falcon_mamba"):
        epsilon = config.get("layer_norm_epsilon", 1e-5)
        if epsilon != 1e-5:
            reason = f"its norms add 1e-5 whatever layer_norm_epsilon says, here {epsilon:g}"
            yield Limit("no", reason, source)


def _quantization(facts: ModelFacts) -> Iterator[Limit]:
    formats = ", ".join(sorted(facts.formats)) or str(facts.config.get("quantization_config"))
    yield Limit(
        "no",
        f"it reads no {formats} of compressed-tensors; convert the unquantized one with "
        "`mlx_lm.convert -q`",
        "utils.py",
        "quantization",
    )


def _metal(facts: ModelFacts, mixer: MixerShape) -> Iterator[Limit]:
    N = mixer.states
    if N is None or mixer.heads is None or N % _THREADS == 0:
        return  # Mamba-1 has no kernel of its own
    if facts.is_delta_net:
        reason = f"keys of {N} entries; its kernel takes multiples of {_THREADS}, others a loop"
        yield Limit("slow", reason, "models/gated_delta.py", "sizes")
    else:
        reason = (
            f"{N} states; its kernel drops what is left over of {_THREADS} in silence, and "
            "generates something else"
        )
        yield Limit("no", reason, "models/ssm.py", "sizes")


_VERSION = "mlx-lm 0.32.2"
RUNTIMES = (
    Runtime("mlx-lm", "mlx-lm (Metal)", _VERSION, partial(_limits, metal=True), False),
    Runtime("mlx-lm-cpu", "mlx-lm (CPU)", _VERSION, partial(_limits, metal=False)),
)
