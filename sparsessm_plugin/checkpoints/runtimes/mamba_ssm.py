"""mamba_ssm, which reads a layout of its own."""

from collections.abc import Iterator

from sparsessm_plugin.checkpoints.runtimes.facts import ModelFacts
from sparsessm_plugin.checkpoints.runtimes.limits import Limit, Runtime

_MAX_STATE_SIZE = 256
_CONV_MULTIPLE = 8  # of the channels that causal-conv1d takes in the Mamba-2 layout


def _limits(facts: ModelFacts) -> Iterator[Limit]:
    if not facts.is_mamba_ssm:
        if facts.family is None or not facts.family.mamba_ssm:
            reason = f"it has no {facts.model_type} model"
            yield Limit("no", reason, "models/mixer_seq_simple.py", "family")
        elif facts.quantization is not None:
            reason = "it knows no quantization"
            yield Limit("no", reason, "models/mixer_seq_simple.py", "quantization")
        else:
            yield from _kernels(facts)
            reason = "this is transformers' layout; `sparsessm export` writes its own"
            yield Limit("no", reason, about="layout")
        return
    yield from _kernels(facts)


def _kernels(facts: ModelFacts) -> Iterator[Limit]:
    if (most := max(facts.state_sizes.values(), default=0)) > _MAX_STATE_SIZE:
        reason = f"{most} states; its scan takes at most {_MAX_STATE_SIZE}"
        yield Limit("no", reason, "csrc/selective_scan/selective_scan.cpp", "sizes")
    mixer = facts.mixer
    if mixer is None or mixer.heads is None:
        return
    if mixer.conv and mixer.conv % _CONV_MULTIPLE:
        yield Limit(
            "no",
            f"{facts.mixers[0]}.conv1d has {mixer.conv} channels, and causal-conv1d needs a "
            f"multiple of {_CONV_MULTIPLE}",
            "ops/triton/ssd_combined.py",
            "sizes",
        )
    if mixer.groups > 1:
        yield Limit(
            "no",
            f"B and C stand in {mixer.groups} groups, over each of which mamba_ssm normalizes",
            "modules/mamba2.py",
            "family",
        )


def _note(facts: ModelFacts) -> tuple[str, ...]:
    return ("by sparsessm_plugin.load_mamba_ssm",)


RUNTIMES = (Runtime("mamba-ssm", "mamba-ssm", "mamba-ssm 2.3.2", _limits, note=_note),)
