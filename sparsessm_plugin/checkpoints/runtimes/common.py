"""Limits that several runtimes share."""

from collections.abc import Iterator

from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import Limit

# compressed-tensors wrote these up to 0.14 and reads them no longer
_GONE_FORMATS = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")


def wrong_sizes(facts: ModelFacts) -> Iterator[Limit]:
    """What no runtime reads, as all take one state size from the config."""
    sizes = facts.state_sizes
    if len(set(sizes.values())) > 1:
        low, high = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
        yield Limit(
            "no",
            f"{low} has {sizes[low]} states and {high} {sizes[high]}; a config has one size",
            about="sizes",
        )
    elif sizes and (stated := facts.config_state_size) is not None:
        size = next(iter(sizes.values()))
        if stated != size:
            yield Limit("no", f"the config states {stated} states, the tensors have {size}")
    quantization = facts.quantization or {}
    sparsity = quantization.get("sparsity_config") or facts.config.get("sparsity_config") or {}
    formats = {*facts.formats, sparsity.get("format")}
    for gone in _GONE_FORMATS:
        if gone in formats:
            yield Limit(
                "no", f"compressed-tensors reads the format {gone} no longer", about="quantization"
            )


def attention_at_intervals(facts: ModelFacts, source: str) -> Iterator[Limit]:
    """Layers of attention that stand elsewhere than where a runtime looks for them."""
    interval = facts.text_config.get("full_attention_interval", 4)
    kinds = facts.text_config.get("layer_types") or ()
    every = (kind != "full_attention" for kind in kinds)
    if not interval or any(linear == (i % interval == 0) for i, linear in enumerate(every, 1)):
        stated = f"every {interval} layers" if interval else "at an interval that the config lacks"
        reason = f"it takes one layer {stated} for attention, whatever layer_types says"
        yield Limit("no", reason, source)


def rounded_key_dims(facts: ModelFacts) -> str | None:
    """What a kernel that keeps a state in registers computes in the place of fewer key dims.

    flash-linear-attention, which vLLM has a copy of, takes the next power of two when it generates
    (ops/gated_delta_rule/fused_recurrent.py of 0.6.0), and blocks of 64 over whole sequences
    (ops/common/chunk_delta_h.py).
    """
    sizes = set(facts.state_sizes.values())
    if not facts.is_delta_net or len(sizes) != 1:
        return None
    size = sizes.pop()
    step, blocks = 1 << (size - 1).bit_length(), -(-size // 64) * 64
    if size == step == blocks:
        return None
    return f"of {size} key dims, its kernels compute {step} to generate, {blocks} in a prompt"


def doubts(facts: ModelFacts) -> Iterator[Limit]:
    """What may load and compute something else than was saved."""
    method = (facts.quantization or {}).get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        reason = f"quantized by {method}, which nobody has tried here"
        yield Limit("unknown", reason, about="quantization")
    if quantized := facts.quantized_parts("dt_proj", "conv1d"):
        yield Limit(
            "unknown",
            f"{quantized[0]} is quantized, but no calibration has seen its input; quantize again "
            "with it in ignore",
            about="quantization",
        )
    if not facts.mixers:
        reason = "no tensor is called A_log, so there is no state-space mixer"
        yield Limit("unknown", reason, about="family")
    elif facts.family is None:
        reason = f"model_type {facts.model_type!r} is none that this package knows"
        yield Limit("unknown", reason, about="family")


def norm_over_groups(facts: ModelFacts, source: str) -> Iterator[Limit]:
    """Families whose gated norm runs over all channels in transformers, over a group elsewhere."""
    mixer = facts.mixer
    if facts.model_type in ("mamba2", "bamba", "granitemoehybrid") and mixer and mixer.groups > 1:
        yield Limit(
            "unknown",
            f"it normalizes what leaves the scan in {mixer.groups} groups, transformers over all "
            "channels: one of the two computes another model",
            source,
            "family",
        )


def head_dim_of_stream(facts: ModelFacts, source: str) -> Iterator[Limit]:
    """Loaders that divide the stream among the heads of attention, whatever head_dim says."""
    if (sizes := facts.attention_head_dim) is None:
        return
    hidden, heads, head_dim = sizes
    if heads * head_dim != hidden:
        yield Limit(
            "no",
            f"attention has {heads} heads of {head_dim}, and it reads no head_dim from the config "
            f"but makes heads of {hidden} / {heads} channels",
            source,
            "sizes",
        )
