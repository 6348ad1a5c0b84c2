"""llama.cpp: its converter, its loader, and the scans of its four backends."""

from collections.abc import Callable, Iterator
from functools import partial

from sparsessm_plugin.checkpoints.runtimes.common import (
    attention_at_intervals,
    doubts,
    head_dim_of_stream,
    norm_over_groups,
    wrong_sizes,
)
from sparsessm_plugin.checkpoints.runtimes.facts import MixerShape, ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import Limit, Runtime

# model_type -> file of its converter
_CONVERTERS = {
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba",
    "jamba": "jamba",
    "granitemoehybrid": "granite",
    "bamba": "granite",
    "falcon_h1": "falcon_h1",
    "nemotron_h": "nemotron",
    "qwen3_next": "qwen",
    "qwen3_5": "qwen",
    "qwen3_5_moe": "qwen",
}
# model_type -> file of the loader that wants 2 channels for each entry of the stream
_EXPANDED_TWICE = {
    "mamba": "src/models/mamba.cpp",
    "falcon_mamba": "src/models/mamba.cpp",
    "jamba": "src/models/jamba.cpp",
    "granitemoehybrid": "src/models/granite-hybrid.cpp",
    "bamba": "src/models/granite-hybrid.cpp",
}
_HEADS_OF_STREAM = ("granitemoehybrid", "bamba", "jamba")
_SCALED = ("int-quantized", "float-quantized", "naive-quantized")
_CUDA = "ggml/src/ggml-cuda/ggml-cuda.cu"
_VULKAN = "ggml/src/ggml-vulkan/ggml-vulkan.cpp"
_METAL = "ggml/src/ggml-metal"
_DELTA_DIMS = (16, 32, 64, 128)


def _limits(
    facts: ModelFacts, backend: Callable[[ModelFacts, MixerShape], Iterator[Limit]] | None = None
) -> Iterator[Limit]:
    if facts.is_mamba_ssm:
        yield Limit("no", "this is mamba_ssm's layout", "conversion/mamba.py", "layout")
        return
    model_type = facts.model_type.removesuffix("_text")
    if facts.family is not None and model_type not in _CONVERTERS:
        reason = f"its converter knows no {facts.model_type}"
        yield Limit("no", reason, "conversion/__init__.py", "family")
        return
    yield from wrong_sizes(facts)
    if model_type == "bamba":
        reason = "logits of a dense tiny model were up to 2e-3 away from those of transformers"
        yield Limit("unknown", reason, "src/models/granite-hybrid.cpp")
    yield from _layers(facts)
    yield from _quantization(facts)
    yield from doubts(facts)
    if (mixer := facts.mixer) is None:
        return
    yield from _loader(facts, mixer)
    if backend is not None:
        yield from backend(facts, mixer)


def _layers(facts: ModelFacts) -> Iterator[Limit]:
    """Kinds of layers in words that its converter does not know."""
    kinds, pattern = facts.kinds_of_layers, "hybrid_override_pattern" in facts.text_config
    if facts.model_type in ("granitemoehybrid", "bamba") and "full_attention" in kinds:
        yield Limit(
            "no",
            "its converter knows layers of the kind attention, not full_attention: it takes all "
            "for mamba",
            "conversion/granite.py",
        )
    if facts.model_type == "nemotron_h" and "mlp" in kinds and not pattern:
        yield Limit(
            "no",
            "its converter finds MLP layers by hybrid_override_pattern alone, which the config "
            "lacks",
            "conversion/nemotron.py",
        )
    if facts.is_delta_net:
        file = "qwen3next" if facts.model_type.startswith("qwen3_next") else "qwen35"
        yield from attention_at_intervals(facts, f"src/models/{file}.cpp")
    dense = (
        facts.model_type == "nemotron_h"
        and "moe" not in kinds
        and "E" not in str(facts.text_config.get("hybrid_override_pattern", ""))
    )
    if dense and "num_experts_per_tok" in facts.text_config:
        yield Limit(
            "no",
            "its converter takes every config with num_experts_per_tok for one with experts",
            "conversion/nemotron.py",
        )


def _quantization(facts: ModelFacts) -> Iterator[Limit]:
    quantization, source = facts.quantization, "conversion/base.py"
    if quantization is None or quantization.get("quant_method") != "compressed-tensors":
        return
    if len(facts.groups_of_quantization) > 1:
        reason = "its converter reads one config group of compressed-tensors, not several"
        yield Limit("no", reason, source, "quantization")
    for group in facts.groups_of_quantization:
        found = group.get("format") or quantization.get("format")
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        wanted = ("channel", "block") if found in _SCALED else ("group",)
        if found not in (*_SCALED, "pack-quantized"):
            reason = f"its converter does not read the format {found}"
            yield Limit("no", reason, source, "quantization")
        elif strategy not in wanted:
            reason = (
                f"its converter reads {found} weights with one scale for each "
                f"{' or '.join(wanted)}, not {strategy}"
            )
            yield Limit("no", reason, source, "quantization")
    fixed = next((name for name in facts.tensors if name.endswith(".input_scale")), None)
    if fixed is not None:
        yield Limit("no", f"its converter does not know {fixed}", source, "quantization")


def _loader(facts: ModelFacts, mixer: MixerShape) -> Iterator[Limit]:
    if facts.is_delta_net:
        dv = (mixer.channels or 0) // (mixer.heads or 1)
        if mixer.states is not None and mixer.states != dv:
            yield Limit(
                "no",
                f"keys of {mixer.states} and values of {dv} entries a head; its recurrence wants "
                "as many of both",
                "src/models/delta-net-base.cpp",
                "sizes",
            )
        return
    source = _EXPANDED_TWICE.get(facts.model_type)
    if source is not None and mixer.hidden and mixer.channels not in (None, 2 * mixer.hidden):
        yield Limit(
            "no",
            f"{mixer.channels} channels beside a stream of {mixer.hidden}; its loader wants twice "
            f"as many, {2 * mixer.hidden}",
            source,
            "sizes",
        )
    if facts.model_type in _HEADS_OF_STREAM:
        yield from head_dim_of_stream(facts, f"conversion/{_CONVERTERS[facts.model_type]}.py")
    yield from norm_over_groups(facts, "src/models/mamba-base.cpp")


def _falls_back(what: str, source: str) -> Limit:
    return Limit("slow", f"{what}: this falls back to the CPU", source, "sizes")


def _cuda(facts: ModelFacts, mixer: MixerShape) -> Iterator[Limit]:
    N = mixer.states
    if facts.is_delta_net:
        dv = mixer.head_dim
        if dv is not None and dv not in _DELTA_DIMS:
            reason = f"values of {dv} entries a head; its kernel aborts unless 16, 32, 64 or 128"
            yield Limit("no", reason, "ggml/src/ggml-cuda/gated_delta_net.cu", "sizes")
    elif mixer.heads is None:
        if N not in (None, 16):
            yield _falls_back(f"{N} states; its Mamba-1 scan takes 16", _CUDA)
        if mixer.channels is not None and mixer.channels % 128:
            yield _falls_back(f"{mixer.channels} channels; its scan takes multiples of 128", _CUDA)
    else:
        if N not in (None, 96, 128, 256):
            yield _falls_back(f"{N} states; its Mamba-2 scan takes 96, 128 or 256", _CUDA)
        if mixer.head_dim is not None and mixer.head_dim % 16:
            reason = f"heads of {mixer.head_dim} channels; its scan takes multiples of 16"
            yield _falls_back(reason, _CUDA)
    if mixer.conv is not None and mixer.conv % 128:
        reason = f"conv1d has {mixer.conv} channels; its convolution takes multiples of 128"
        yield _falls_back(reason, _CUDA)


def _vulkan(facts: ModelFacts, mixer: MixerShape) -> Iterator[Limit]:
    if facts.is_delta_net:
        dv = mixer.head_dim
        if dv is not None and dv not in _DELTA_DIMS:
            reason = f"values of {dv} entries a head; its kernel takes 16, 32, 64 or 128"
            yield _falls_back(reason, _VULKAN)
        return
    if mixer.heads is None:
        reason = "it has no scan of the Mamba-1 layout: this falls back to the CPU"
        yield Limit("slow", reason, _VULKAN, "family")
        return
    if mixer.states not in (None, 128, 256):
        yield _falls_back(f"{mixer.states} states; its Mamba-2 scan takes 128 or 256", _VULKAN)
    if mixer.head_dim is not None and mixer.head_dim % 16:
        reason = f"heads of {mixer.head_dim} channels; its scan takes multiples of 16"
        yield _falls_back(reason, _VULKAN)


def _metal(facts: ModelFacts, mixer: MixerShape) -> Iterator[Limit]:
    N = mixer.states
    if facts.is_delta_net:
        if mixer.head_dim is not None and mixer.head_dim % 32:
            reason = f"values of {mixer.head_dim} entries a head; its kernel takes multiples of 32"
            yield _falls_back(reason, f"{_METAL}/ggml-metal-device.m")
        return
    if N is None:
        return
    if N > 1024:
        reason = f"{N} states; its scan has a thread for each, and at most 1024"
        yield Limit("no", reason, f"{_METAL}/ggml-metal-ops.cpp", "sizes")
    # the last SIMD group of 32 threads adds up what all groups have found, one thread each
    elif 0 < N % 32 < -(-N // 32):
        reason = f"{N} states; of the last {N % 32} threads its scan sums too few, and is wrong"
        yield Limit("no", reason, f"{_METAL}/kernels/ssm.metal", "sizes")


def _note(facts: ModelFacts) -> tuple[str, ...]:
    notes = []
    if facts.quantization is not None:
        notes.append("its converter stores the weights dequantized; llama-quantize packs them")
    return tuple(notes)


def _note_cpu(facts: ModelFacts) -> tuple[str, ...]:
    notes, mixer = list(_note(facts)), facts.mixer
    if mixer is not None and mixer.states is not None and not facts.is_delta_net:
        if mixer.heads is None and mixer.states % 8:
            notes.append("on ARM with SVE its Mamba-1 scan reads past the states: unsafe there")
        if mixer.heads is not None and mixer.states < 64:
            notes.append("below 64 states its Mamba-2 scan leaves the vector units of AVX-512")
    return tuple(notes)


_VERSION = "llama.cpp 0c1e57098"
RUNTIMES = (
    Runtime("llama.cpp", "llama.cpp (CPU)", _VERSION, _limits, True, _note_cpu),
    *(
        Runtime(
            f"llama.cpp-{title.lower()}",
            f"llama.cpp ({title})",
            _VERSION,
            partial(_limits, backend=backend),
            False,
            _note,
        )
        for title, backend in (("CUDA", _cuda), ("Vulkan", _vulkan), ("Metal", _metal))
    ),
)
