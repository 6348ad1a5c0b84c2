"""Which runtime can load a checkpoint, read from its files without loading a weight."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sparsessm_plugin.checkpoints.loading import read_header
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.catalog import FAMILIES, Family, family_of
from sparsessm_plugin.files import read_json

Answer = Literal["yes", "no", "unknown"]

# compressed-tensors wrote these up to 0.14 and reads them no longer
_GONE_FORMATS = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")
_MAX_STATE_SIZE = 256  # of the scan kernels of mamba_ssm and vLLM
_CONV_MULTIPLE = 8  # of the channels that causal-conv1d takes in the Mamba-2 layout
_COMPRESSED = (".weight_packed", ".weight_scale")
_FLOATS = ("F64", "F32", "F16", "BF16")
# those whose limits can be asked for before a checkpoint is made
RUNTIMES = ("transformers", "vllm", "mamba-ssm")


@dataclass(frozen=True)
class RuntimeSupport:
    """Whether a runtime loads a checkpoint and computes what was saved.

    :param runtime: its name
    :param answer: ``yes``, ``no`` or ``unknown``
    :param reasons: for ``no`` and ``unknown`` why, for ``yes`` what to know; one line each
    :param run: False where the answer comes from reading the runtime's code only
    """

    runtime: str
    answer: Answer
    reasons: tuple[str, ...] = ()
    run: bool = True


def runtime_support(folder: str | os.PathLike[str]) -> list[RuntimeSupport]:
    """What each runtime can do with a checkpoint.

    Reads config.json and the headers of the safetensors files. Looks at what is known to go
    wrong, which are state sizes, quantization and layouts; it does not compare every shape.

    :param folder: of the checkpoint
    :return: transformers, transformers + sparsessm_plugin, vLLM, mamba-ssm
    :raises SparseSSMError: no config.json, no safetensors file, or one that cannot be read
    """
    checkpoint = _Checkpoint.read(Path(folder))
    return [
        _transformers(checkpoint),
        _with_plugin(checkpoint),
        _vllm(checkpoint),
        _mamba_ssm(checkpoint),
    ]


def runtime_problems(runtime: str, model: Any) -> list[str]:
    """Why a runtime could not load a model of these sizes, were it saved; by its code, if not run.

    :param runtime: one of :data:`RUNTIMES`; for mamba-ssm, once the model is exported
    :param model: unquantized, of transformers; the meta device will do
    :return: as ``inspect`` says it; nothing where nothing is known to go wrong
    """
    tensors: dict[str, Mapping[str, Any]] = {
        name: {"shape": list(tensor.shape)} for name, tensor in model.state_dict().items()
    }
    checkpoint = _Checkpoint(model.config.to_dict(), tensors)
    if runtime == "mamba-ssm":
        if checkpoint.family is None or not checkpoint.family.mamba_ssm:
            return [f"it has no {checkpoint.model_type} model"]
        return _kernel_problems(checkpoint)
    support = _vllm(checkpoint) if runtime == "vllm" else _transformers(checkpoint)
    return list(support.reasons) if support.answer == "no" else []


class _Checkpoint:
    """Config and tensor shapes of a checkpoint."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Mapping[str, Any]]):
        self.config = config
        self.tensors = tensors

    @classmethod
    def read(cls, folder: Path) -> "_Checkpoint":
        """Of a folder."""
        config = _read_json(folder / "config.json")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise SparseSSMError(f"{folder} holds no .safetensors file")
        tensors: dict[str, Mapping[str, Any]] = {}
        for file in files:
            tensors.update(read_header(file))
        return cls(config, tensors)

    @property
    def is_mamba_ssm(self) -> bool:
        """Whether it has the layout of ``MambaLMHeadModel``."""
        return "d_model" in self.config and "model_type" not in self.config

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def family(self) -> Family | None:
        return family_of(self.model_type)

    @property
    def is_initialised_again(self) -> bool:
        """Whether transformers' weight initialiser reads out_proj after loading."""
        return self.family is not None and self.family.initialiser is not None

    @property
    def text_config(self) -> Mapping[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) and found else None

    @cached_property
    def mixers(self) -> list[str]:
        """Dotted names of all mixers."""
        return [name.removesuffix(".A_log") for name in self.tensors if name.endswith(".A_log")]

    @cached_property
    def state_sizes(self) -> dict[str, int]:
        """Number of states of each mixer whose shapes tell it."""
        sizes = {}
        for mixer in self.mixers:
            A_log = self.tensors[f"{mixer}.A_log"]["shape"]
            if len(A_log) > 1:
                sizes[mixer] = int(A_log[-1])
            elif (size := self._grouped_state_size(mixer)) is not None:
                sizes[mixer] = size
        return sizes

    def _grouped_state_size(self, mixer: str) -> int | None:
        """N = (conv channels - D) / 2 G of the Mamba-2 layout, and dk of a gated delta net."""
        conv = self.tensors.get(f"{mixer}.conv1d.weight")
        if self.family is not None and self.family.layout == "delta":
            return self._key_head_dim(mixer, conv)
        norm = self.tensors.get(f"{mixer}.norm.weight")
        groups = self.text_config.get("n_groups", self.text_config.get("mamba_n_groups"))
        groups = groups or self.text_config.get("mamba_ngroups")
        if conv is None or norm is None or not groups:
            return None
        return (int(conv["shape"][0]) - int(norm["shape"][0])) // (2 * int(groups))

    def _key_head_dim(self, mixer: str, conv: Mapping[str, Any] | None) -> int | None:
        """dk = (conv channels - H dv) / 2 G."""
        norms = (self.tensors.get(f"{mixer}.{name}.weight") for name in ("norm", "o_norm"))
        norm = next((found for found in norms if found is not None), None)
        groups = self.text_config.get("linear_num_key_heads")
        if conv is None or norm is None or not groups:
            return None
        values = int(self.tensors[f"{mixer}.A_log"]["shape"][0]) * int(norm["shape"][0])
        return (int(conv["shape"][0]) - values) // (2 * int(groups))

    @cached_property
    def single_experts(self) -> list[str]:
        """Tensors of single experts."""
        return [name for name in self.tensors if re.search(r"\.experts\.\d+\.", name)]

    @property
    def experts_scheme(self) -> Mapping[str, Any]:
        """The config group that transformers takes for experts; empty in a dense checkpoint."""
        groups = _groups(self.quantization or {})
        named = [g for g in groups if any("experts" in t for t in _targets(g, pattern=True))]
        return next(iter([*named, *(g for g in groups if _targets(g, pattern=False)), *groups]), {})

    @property
    def config_state_size(self) -> Any:
        fields = dict.fromkeys(family.state_size_field for family in FAMILIES.values())
        return next((self.text_config[f] for f in fields if f in self.text_config), None)

    def is_quantized(self, module: str) -> bool:
        """Whether a layer is stored in fewer bits."""
        return any(f"{module}{suffix}" in self.tensors for suffix in _COMPRESSED)

    def quantized_parts(self, *parts: str) -> list[str]:
        """The layers of the mixers, those of the given names only, that are quantized."""
        stored = (name.rpartition(".")[0] for name in self.tensors if name.endswith(_COMPRESSED))
        return sorted(
            {
                name
                for name in stored
                if name.rpartition(".")[0] in self.mixers
                and (not parts or name.rpartition(".")[2] in parts)
            }
        )

    @property
    def packed_out_proj(self) -> str | None:
        """An out_proj of a mixer without a tensor ``weight``, if there is one."""
        packed = (f"{mixer}.out_proj" for mixer in self.mixers)
        return next((name for name in packed if f"{name}.weight_packed" in self.tensors), None)


def _common_problems(checkpoint: _Checkpoint) -> list[str]:
    """What neither transformers nor any addition of ours can load."""
    problems = []
    sizes = checkpoint.state_sizes
    if len(set(sizes.values())) > 1:
        low, high = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
        problems.append(
            f"{low} has {sizes[low]} states and {high} {sizes[high]}; a config has one size"
        )
    elif sizes and (stated := checkpoint.config_state_size) is not None:
        size = next(iter(sizes.values()))
        if stated != size:
            problems.append(f"the config states {stated} states, the tensors have {size}")
    quantization = checkpoint.quantization or {}
    sparsity = quantization.get("sparsity_config") or checkpoint.config.get("sparsity_config") or {}
    formats = {part.get("format") for part in (quantization, sparsity, *_groups(quantization))}
    for gone in _GONE_FORMATS:
        if gone in formats:
            problems.append(f"compressed-tensors reads the format {gone} no longer")
    return problems


def _doubts(checkpoint: _Checkpoint) -> list[str]:
    """What may load and compute something else than was saved."""
    doubts = []
    method = (checkpoint.quantization or {}).get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        doubts.append(f"quantized by {method}, which nobody has tried here")
    if quantized := checkpoint.quantized_parts("dt_proj", "conv1d"):
        doubts.append(
            f"{quantized[0]} is quantized, but no calibration has seen its input; quantize again "
            "with it in ignore"
        )
    if not checkpoint.mixers:
        doubts.append("no tensor is called A_log, so there is no state-space mixer")
    elif checkpoint.family is None:
        doubts.append(f"model_type {checkpoint.model_type!r} is none that this package knows")
    return doubts


def _transformers(checkpoint: _Checkpoint) -> RuntimeSupport:
    name = "transformers"
    if checkpoint.is_mamba_ssm:
        return RuntimeSupport(name, "no", ("this is mamba_ssm's layout, with other tensor names",))
    problems = _common_problems(checkpoint)
    problems += _lost_experts(checkpoint)
    if checkpoint.is_initialised_again:
        if packed := checkpoint.packed_out_proj:
            problems.append(
                f"{packed} is packed, and the weight initialiser of {checkpoint.model_type} reads "
                "its weight; store it with format int-quantized, or load with sparsessm_plugin"
            )
        if checkpoint.text_config.get("rescale_prenorm_residual"):
            problems.append(
                "rescale_prenorm_residual is set, and each loading divides out_proj by the square "
                "root of the number of layers; load with sparsessm_plugin.load"
            )
    return _answer(name, problems, _doubts(checkpoint), _needs(checkpoint))


def _with_plugin(checkpoint: _Checkpoint) -> RuntimeSupport:
    name = "transformers + sparsessm_plugin"
    if checkpoint.is_mamba_ssm:
        return RuntimeSupport(
            name, "no", ("this is mamba_ssm's layout; load_mamba_ssm loads it into mamba_ssm",)
        )
    problems = _common_problems(checkpoint) + _lost_experts(checkpoint)
    return _answer(name, problems, _doubts(checkpoint), _needs(checkpoint))


def _lost_experts(checkpoint: _Checkpoint) -> list[str]:
    """Experts that transformers leaves at random values, or loads with others than were saved."""
    experts, family = checkpoint.single_experts, checkpoint.family
    if not experts or family is None or family.experts is None:
        return []
    again = 'quantize again with "re:.*[.]experts[.]" in ignore'
    if family.experts == "merged":
        return [
            f"{experts[0]} stands alone, but {checkpoint.model_type} reads all experts as one "
            f"tensor; {again}"
        ]
    scheme = checkpoint.experts_scheme
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
            f"{plain} is not packed, but in a checkpoint with such a quantization transformers "
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


def _needs(checkpoint: _Checkpoint) -> tuple[str, ...]:
    return ("needs the package compressed-tensors",) if checkpoint.quantization else ()


def _vllm(checkpoint: _Checkpoint) -> RuntimeSupport:
    name = "vLLM"
    if checkpoint.is_mamba_ssm:
        return RuntimeSupport(name, "no", ("this is mamba_ssm's layout",), run=False)
    problems = _common_problems(checkpoint)
    family = checkpoint.family
    if family is not None and family.not_in_vllm is not None:
        problems.append(family.not_in_vllm)
    in_mamba1 = family is not None and family.layout == "mamba1"
    if in_mamba1 and (quantized := checkpoint.quantized_parts()):
        problems.append(
            f"{quantized[0]} is quantized, and no quantization reaches vLLM's mixers of the "
            "Mamba-1 layout"
        )
    if (most := max(checkpoint.state_sizes.values(), default=0)) > _MAX_STATE_SIZE:
        problems.append(f"{most} states; its scan takes at most {_MAX_STATE_SIZE}")
    doubts = _doubts(checkpoint)
    merged = (name for name in checkpoint.tensors if re.search(r"\.experts\.\w+$", name))
    by_one = family is not None and family.experts == "single"
    if by_one and (whole := next(merged, None)) is not None:
        doubts.append(f"{whole} holds all experts, which vLLM may want one by one")
    four_bits = [g for g in _groups(checkpoint.quantization or {}) if _bits(g) == 4]
    if any(group.get("format") == "int-quantized" for group in four_bits):
        doubts.append("4-bit weights stored as int-quantized, which vLLM may want pack-quantized")
    if checkpoint.is_initialised_again and checkpoint.text_config.get("rescale_prenorm_residual"):
        doubts.append("rescale_prenorm_residual is set; whether vLLM heeds it was not looked at")
    return _answer(name, problems, doubts, ("not run: by vLLM's code",), run=False)


def _mamba_ssm(checkpoint: _Checkpoint) -> RuntimeSupport:
    name = "mamba-ssm"
    if checkpoint.is_mamba_ssm:
        return _answer(
            name,
            _kernel_problems(checkpoint),
            [],
            ("by sparsessm_plugin.load_mamba_ssm",),
        )
    if checkpoint.family is None or not checkpoint.family.mamba_ssm:
        return RuntimeSupport(name, "no", (f"it has no {checkpoint.model_type} model",))
    if checkpoint.quantization is not None:
        return RuntimeSupport(name, "no", ("it knows no quantization",))
    return RuntimeSupport(
        name, "no", ("this is transformers' layout; `sparsessm export` writes its own",)
    )


def _kernel_problems(checkpoint: _Checkpoint) -> list[str]:
    """Sizes that the kernels of mamba_ssm and causal-conv1d refuse."""
    problems = []
    if (most := max(checkpoint.state_sizes.values(), default=0)) > _MAX_STATE_SIZE:
        problems.append(f"{most} states; its scan takes at most {_MAX_STATE_SIZE}")
    for mixer in checkpoint.mixers:
        conv = checkpoint.tensors.get(f"{mixer}.conv1d.weight")
        channels = int(conv["shape"][0]) if conv is not None else 0
        in_heads = len(checkpoint.tensors[f"{mixer}.A_log"]["shape"]) == 1
        if in_heads and channels % _CONV_MULTIPLE:
            problems.append(
                f"{mixer}.conv1d has {channels} channels, and causal-conv1d needs a multiple of "
                f"{_CONV_MULTIPLE}"
            )
            break
    return problems


def _answer(
    name: str,
    problems: list[str],
    doubts: list[str],
    remarks: tuple[str, ...],
    run: bool = True,
) -> RuntimeSupport:
    note = () if run else remarks
    if problems:
        return RuntimeSupport(name, "no", (*problems, *note), run)
    if doubts:
        return RuntimeSupport(name, "unknown", (*doubts, *note), run)
    return RuntimeSupport(name, "yes", remarks, run)


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [group for group in found if isinstance(group, dict)]


def _targets(group: Mapping[str, Any], pattern: bool) -> list[str]:
    targets = group.get("targets")
    found = targets if isinstance(targets, list) else ()
    return [t for t in found if isinstance(t, str) and t.startswith("re:") is pattern]


def _bits(group: Mapping[str, Any]) -> Any:
    weights = group.get("weights")
    return weights.get("num_bits") if isinstance(weights, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise SparseSSMError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SparseSSMError(f"{path} holds no mapping")
    return content
