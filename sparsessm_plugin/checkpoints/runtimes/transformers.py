"""Stock transformers, and transformers with this package."""

from collections.abc import Iterator

from sparsessm_plugin.checkpoints.runtimes.common import (
    doubts,
    rounded_key_dims,
    wrong_sizes,
)
from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import MAMBA_LAYOUTS, Limit, Runtime

_CONV_MULTIPLE = 8  # of the channels that causal-conv1d takes channel by channel


def stock(facts: ModelFacts) -> Iterator[Limit]:
    """What stock transformers meets."""
    if facts.is_mamba_ssm:
        yield Limit("no", "this is mamba_ssm's layout, with other tensor names", about="layout")
        return
    yield from _common(facts)
    if facts.is_initialised_again:
        source = f"models/{facts.model_type}/modeling_{facts.model_type}.py"
        if packed := facts.packed_out_proj:
            yield Limit(
                "no",
                f"{packed} is packed, and the weight initialiser of {facts.model_type} reads its "
                "weight; store it with format int-quantized, or load with sparsessm_plugin",
                source,
                "quantization",
            )
        if facts.text_config.get("rescale_prenorm_residual"):
            yield Limit(
                "no",
                "rescale_prenorm_residual is set, and each loading divides out_proj by the square "
                "root of the number of layers; load with sparsessm_plugin.load",
                source,
            )


def with_plugin(facts: ModelFacts) -> Iterator[Limit]:
    """What ``sparsessm_plugin.load`` meets."""
    if facts.is_mamba_ssm:
        reason = "this is mamba_ssm's layout; load_mamba_ssm loads it into mamba_ssm"
        yield Limit("no", reason, about="layout")
        return
    yield from _common(facts)


def _common(facts: ModelFacts) -> Iterator[Limit]:
    yield from wrong_sizes(facts)
    for reason in _lost_experts(facts):
        yield Limit("no", reason, "core_model_loading.py", "quantization")
    yield from doubts(facts)
    yield from _without_fast_kernels(facts)


def _without_fast_kernels(facts: ModelFacts) -> Iterator[Limit]:
    """Widths that causal-conv1d refuses where it is given channels in the last dimension."""
    mixer = facts.mixer
    if mixer is None or facts.model_type == "zamba":  # Zamba copies them into the order of time
        return
    widths = [("conv1d", mixer.conv)]
    if not facts.is_delta_net:  # these write what is convolved without anything beside it
        widths.append(("in_proj", mixer.projected))
    for what, width in widths:
        if width is not None and width % _CONV_MULTIPLE:
            yield Limit(
                "slow",
                f"{facts.mixers[0]}.{what} has {width} channels; causal-conv1d wants a multiple of "
                f"{_CONV_MULTIPLE} and fails on a GPU, so that it must not be installed",
                "csrc/causal_conv1d.cpp of causal-conv1d 1.7.0",
                "sizes",
            )
            return


def _lost_experts(facts: ModelFacts) -> list[str]:
    """Experts that transformers leaves at random values, or loads with others than were saved."""
    experts, family = facts.single_experts, facts.family
    if not experts or family is None or family.experts is None:
        return []
    again = 'quantize again with "re:.*[.]experts[.]" in ignore'
    if family.experts == "merged":
        return [
            f"{experts[0]} stands alone, but {facts.model_type} reads all experts as one "
            f"tensor; {again}"
        ]
    scheme = facts.experts_scheme
    weights = scheme.get("weights") or {}
    scaled = [name for name in experts if not name.endswith(".weight")]
    if not scheme:
        return []
    if weights.get("type") == "float" and weights.get("num_bits") == 8:
        reason = "is FP8, but transformers loads experts dense, and quantizes nothing before them"
        return [f"{scaled[0].rpartition('.')[0]} {reason}; {again}"] if scaled else []
    plain = next((name for name in experts if name.endswith(".weight")), None)
    if plain is not None:
        if not scaled:  # dense, so ignored already
            again = "make it again by `sparsessm prune`, which saves them as one tensor"
        return [
            f"{plain} is not packed, but in a facts with such a quantization transformers "
            f"looks for packed experts alone, and leaves these at random values; {again}"
        ]
    beside = (".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".input_scale")
    unread = next((name for name in experts if name.endswith(beside)), None)
    if unread is not None:
        return [f"transformers does not read {unread}; {again}"]
    if scheme.get("input_activations") or scheme.get("output_activations"):
        name = experts[0].rpartition(".")[0]
        return [f"transformers does not quantize what enters {name}; {again}"]
    return []


def _needs(facts: ModelFacts) -> tuple[str, ...]:
    notes = ["needs the package compressed-tensors"] if facts.quantization else []
    if (rounded := rounded_key_dims(facts)) is not None:
        notes.append(f"with flash-linear-attention: {rounded}")
    return tuple(notes)


_RUN = (*MAMBA_LAYOUTS, "delta")
RUNTIMES = (
    Runtime(
        "transformers", "transformers", "transformers 5.17.0", stock, note=_needs, run_layouts=_RUN
    ),
    Runtime(
        "sparsessm-plugin",
        "transformers + sparsessm_plugin",
        "transformers 5.17.0",
        with_plugin,
        note=_needs,
        run_layouts=_RUN,
    ),
)
