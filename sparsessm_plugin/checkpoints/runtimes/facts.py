"""What a runtime meets in a checkpoint, or in a model that is only planned: config and shapes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from sparsessm_plugin.checkpoints.loading import read_header
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.catalog import FAMILIES, Family, family_of
from sparsessm_plugin.files import read_json

_COMPRESSED = (".weight_packed", ".weight_scale")
_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
_KINDS = ("layer_types", "layers_block_type")


@dataclass(frozen=True)
class MixerShape:
    """Sizes of a mixer, None where the shapes do not tell.

    :param hidden: entries of the residual stream
    :param channels: D, of a gated delta net the values of all heads
    :param states: N, of a gated delta net its key_head_dim
    :param heads: H; None in the Mamba-1 layout
    :param groups: that share B and C, of a gated delta net the key heads
    :param conv: channels of the convolution
    :param projected: rows of in_proj
    """

    hidden: int | None
    channels: int | None
    states: int | None
    heads: int | None
    groups: int
    conv: int | None
    projected: int | None

    @property
    def head_dim(self) -> int | None:
        """Channels of a head."""
        return self.channels // self.heads if self.channels and self.heads else None


class ModelFacts:
    """A config and the shapes of the tensors beside it.

    :param config: as config.json has it
    :param tensors: name -> ``shape`` and, of a checkpoint, ``dtype``
    """

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, Mapping[str, Any]]):
        self.config = config
        self.tensors = dict(tensors)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelFacts":
        """Of a checkpoint, without loading a weight.

        :raises SparseSSMError: no config.json, no safetensors file, or one that cannot be read
        """
        config = _read_json(folder / "config.json")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise SparseSSMError(f"{folder} holds no .safetensors file")
        tensors: dict[str, Mapping[str, Any]] = {}
        for file in files:
            tensors.update(read_header(file))
        return cls(config, tensors)

    @classmethod
    def from_model(cls, model: Any) -> "ModelFacts":
        """Of a model in memory; the meta device will do.

        The config is then in the words of transformers, which those of its config.json need not be.
        """
        shapes = {name: {"shape": list(t.shape)} for name, t in model.state_dict().items()}
        return cls(model.config.to_dict(), shapes)

    def changed(self, shapes: Mapping[str, list[int]], fields: Mapping[str, Any]) -> "ModelFacts":
        """The same model with other shapes and config fields, the latter on every level with them.

        :param shapes: tensor name -> new shape
        :param fields: field name -> new value
        """
        config = dict(self.config)
        levels = [config]
        if isinstance(nested := config.get("text_config"), dict):
            config["text_config"] = dict(nested)
            levels.append(config["text_config"])
        for name, value in fields.items():
            holders = [level for level in levels if name in level] or levels[-1:]
            for level in holders:
                level[name] = value
        tensors = dict(self.tensors)
        for name, shape in shapes.items():
            if name in tensors:
                tensors[name] = {**tensors[name], "shape": shape}
        return ModelFacts(config, tensors)

    @property
    def is_mamba_ssm(self) -> bool:
        """Whether it has the layout of ``MambaLMHeadModel``."""
        return "d_model" in self.config and "model_type" not in self.config

    @property
    def model_type(self) -> str:
        """The family as config.json names it; empty where it does not."""
        return str(self.config.get("model_type", ""))

    @property
    def family(self) -> Family | None:
        """Its row of the catalog, None where that does not know it."""
        return family_of(self.model_type)

    @property
    def is_initialised_again(self) -> bool:
        """Whether transformers' weight initialiser reads out_proj after loading."""
        return self.family is not None and self.family.initialiser is not None

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The level of the config that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config``, None where nothing is quantized."""
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
        conv, channels = self._conv_channels(mixer), self._channels(mixer)
        if conv is None or channels is None or not self._stated_groups:
            return None
        return (conv - channels) // (2 * self._stated_groups)

    @property
    def is_delta_net(self) -> bool:
        """Whether its mixers are gated delta nets."""
        return self.family is not None and self.family.layout == "delta"

    @property
    def _stated_groups(self) -> int | None:
        names = ("linear_num_key_heads",) if self.is_delta_net else _GROUPS
        stated = (self.text_config.get(name) for name in names)
        return next((int(groups) for groups in stated if groups), None)

    def _channels(self, mixer: str) -> int | None:
        """D, of a gated delta net H dv."""
        A_log = self._shape(f"{mixer}.A_log") or []
        if len(A_log) > 1:  # Zamba has a matrix for each head
            return prod(A_log[:-1])
        norm = self._shape(f"{mixer}.norm.weight") or self._shape(f"{mixer}.o_norm.weight")
        if norm is not None:  # of a gated delta net over the channels of a head
            return A_log[0] * norm[0] if self.is_delta_net else norm[0]
        stored = self._shape(f"{mixer}.out_proj.weight")
        if stored is not None and len(stored) == 2:
            return stored[1]
        stated = self.text_config.get("mamba_d_ssm")  # Falcon-H1 without a norm
        return int(stated) if stated else None

    def _conv_channels(self, mixer: str) -> int | None:
        shapes = (self._shape(f"{mixer}.{part}conv1d.weight") for part in ("", "q_", "k_", "v_"))
        found = [shape[0] for shape in shapes if shape is not None]
        return sum(found) if found else None

    def _shape(self, name: str) -> list[int] | None:
        found = self.tensors.get(name)
        return None if found is None else [int(size) for size in found["shape"]]

    def rows(self, layer: str) -> int | None:
        """Outputs of a linear layer, quantized or not; None if there is none."""
        stored = self._shape(f"{layer}.weight") or self._shape(f"{layer}.weight_packed")
        return stored[0] if stored else None

    @cached_property
    def mixer(self) -> MixerShape | None:
        """Sizes of the first mixer; all have the same in what loads anywhere."""
        if not self.mixers:
            return None
        name = self.mixers[0]
        A_log = self._shape(f"{name}.A_log") or []
        return MixerShape(
            hidden=self.text_config.get("hidden_size", self.text_config.get("d_model")),
            channels=self._channels(name),
            states=self.state_sizes.get(name),
            heads=A_log[0] if len(A_log) == 1 else None,
            groups=self._stated_groups or 1,
            conv=self._conv_channels(name),
            projected=self.rows(f"{name}.in_proj"),
        )

    @property
    def attention_head_dim(self) -> tuple[int, int, int] | None:
        """Entries of the stream, heads of its attention, and channels of a head by the shapes."""
        config = self.text_config
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        layers = (name for name in self.tensors if re.search(r"self_attn\.q_proj\.weight", name))
        layer = next(layers, None)
        if layer is None or not hidden or not heads:
            return None
        rows = self.rows(layer[: layer.rindex(".")])
        return (int(hidden), int(heads), rows // int(heads)) if rows else None

    @property
    def kinds_of_layers(self) -> set[str]:
        """Words that the config has for them in its lists."""
        lists = (self.text_config.get(name) for name in _KINDS)
        return {kind for found in lists if isinstance(found, list | tuple) for kind in found}

    @property
    def groups_of_quantization(self) -> list[Mapping[str, Any]]:
        """The config groups of compressed-tensors."""
        return _groups(self.quantization or {})

    @property
    def formats(self) -> set[str]:
        """The formats of compressed-tensors that its config names."""
        parts = (self.quantization or {}, *self.groups_of_quantization)
        return {str(part["format"]) for part in parts if part.get("format")}

    def packed_layers(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of each layer whose weight is packed in whole numbers."""
        bits = {bits for group in self.groups_of_quantization if (bits := bits_of(group))}
        each = 32 // bits.pop() if len(bits) == 1 else 8
        for name in self.tensors:
            if name.endswith(".weight_packed") and (shape := self._shape(name)) is not None:
                yield name.removesuffix(".weight_packed"), shape[0], shape[-1] * each

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
        """The number of states that the config says, by whichever name; None without one."""
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


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [group for group in found if isinstance(group, dict)]


def _targets(group: Mapping[str, Any], pattern: bool) -> list[str]:
    targets = group.get("targets")
    found = targets if isinstance(targets, list) else ()
    return [t for t in found if isinstance(t, str) and t.startswith("re:") is pattern]


def bits_of(group: Mapping[str, Any]) -> Any:
    """Bits of a weight in a config group."""
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
