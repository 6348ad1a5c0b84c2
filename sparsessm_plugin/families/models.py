"""The models of transformers that have an adapter: their names, and what their configs can say."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import MixerAdapter, MixerSizes
from sparsessm_plugin.families.model import ModelAdapter, register_model


@register_model
class MambaModelAdapter(ModelAdapter):
    """One mixer a layer; channels and rank of dt are fields of their own."""

    family = "mamba"
    model_class = "MambaForCausalLM"
    needs_attention = False

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        # both would follow hidden_size if the file did not say them
        return {
            "intermediate_size": sizes.intermediate_size,
            "time_step_rank": mixer.sizes.time_step_rank,
        }


@register_model
class FalconMambaModelAdapter(MambaModelAdapter):
    """As Mamba."""

    family = "falcon_mamba"
    model_class = "FalconMambaForCausalLM"


@register_model
class Mamba2ModelAdapter(ModelAdapter):
    """One mixer a layer, whose heads make expand * hidden_size channels."""

    family = "mamba2"
    model_class = "Mamba2ForCausalLM"
    expand_field = "expand"
    needs_attention = False


@register_model
class BambaModelAdapter(ModelAdapter):
    """Mixer or attention, then an MLP; attention stands at listed indices."""

    family = "bamba"
    model_class = "BambaForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {"mlp": "intermediate_size"}
    expand_field = "mamba_expand"

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        attention = [new for new, old in enumerate(kept) if self.layers[old].has("attention")]
        return super().layer_fields(kept) | {"attn_layer_indices": attention}


@register_model
class FalconH1ModelAdapter(ModelAdapter):
    """Mixer and attention side by side, then an MLP, in every layer."""

    family = "falcon_h1"
    model_class = "FalconH1ForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {"mlp": "intermediate_size"}

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        # without it the channels would follow hidden_size
        fields = super().mixer_fields(mixer, hidden_size, sizes)
        return fields | {"mamba_d_ssm": sizes.intermediate_size}


@register_model
class JambaModelAdapter(ModelAdapter):
    """Mixer or attention, then an MLP or experts, each by a period and an offset."""

    family = "jamba"
    model_class = "JambaForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {"mlp": "intermediate_size"}
    same_units: ClassVar[dict[str, str]] = {"experts": "mlp"}
    expand_field = "mamba_expand"

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        fields = super().mixer_fields(mixer, hidden_size, sizes)
        return fields | {"mamba_dt_rank": mixer.sizes.time_step_rank}

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        fields, layers = super().layer_fields(kept), self.layers
        for kind, name in (("attention", "attn_layer"), ("moe", "expert_layer")):
            if kind == "moe" and self.config.num_experts < 2:
                continue  # the pattern then means nothing
            places = [layers[i].has(kind) for i in kept]
            period, offset = f"{name}_period", f"{name}_offset"
            now = (getattr(self.config, period), getattr(self.config, offset))
            fields[period], fields[offset] = self._pattern(kind, places, now)
        return fields

    def _pattern(self, kind: str, places: list[bool], now: tuple[int, int]) -> tuple[int, int]:
        """A period and an offset that give these places, those of now if they do."""
        count = len(places)
        others = [(p, o) for p in range(1, count + 2) for o in range(min(p, count + 1))]
        for period, offset in [now, *others]:
            if places == [i % period == offset for i in range(count)]:
                return period, offset
        where = ", ".join(str(i) for i, place in enumerate(places) if place)
        raise SparseSSMError(
            f"{self.name}: a config of jamba places {kind} by a period and an offset, and none "
            f"gives {kind} in layers {where} of {count}"
        )


@register_model
class GraniteMoeHybridModelAdapter(ModelAdapter):
    """Mixer or attention, then a shared MLP beside experts, if there are any."""

    family = "granitemoehybrid"
    model_class = "GraniteMoeHybridForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {
        "mlp": "shared_intermediate_size",
        "experts": "intermediate_size",
    }
    expand_field = "mamba_expand"

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        types = self.config.layer_types
        return super().layer_fields(kept) | {"layer_types": [types[i] for i in kept]}


@register_model
class NemotronHModelAdapter(ModelAdapter):
    """Each layer is one mixer, one attention, one MLP or one mixture of experts."""

    family = "nemotron_h"
    model_class = "NemotronHForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {
        "mlp": "intermediate_size",
        "experts": "moe_intermediate_size",
        "shared_experts": "moe_shared_expert_intermediate_size",
    }

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        types = self.config.layers_block_type
        # in memory the number of layers is the length of the list, files state it too
        return super().layer_fields(kept) | {"layers_block_type": [types[i] for i in kept]}


class SharedBlockModelAdapter(ModelAdapter):
    """Mixers, some of them fed by attention and an MLP that several layers share.

    The shared block reads the stream beside the embedding's output, 2 M entries, and a linear
    layer of the layer's own follows it. Its own two streams of M entries are as wide as the
    model's, because one field says both.
    """

    unit_fields: ClassVar[dict[str, str]] = {"mlp": "intermediate_size"}
    head_dim_field = "attention_head_dim"
    expand_field = "mamba_expand"
    joint_kind = "hybrid"
    # name of the shared block in a layer
    shared: ClassVar[str]

    def hidden_fields(self, size: int, along: MixerSizes | None = None) -> dict[str, Any]:
        if self._attentions():
            self._refuse_adapters("hidden_size")
        fields = super().hidden_fields(size, along)
        return fields | {"attention_hidden_size": 2 * size}

    def unit_field_values(self, axis: str, size: int) -> dict[str, Any]:
        fields = super().unit_field_values(axis, size)
        if axis == "kv_groups":
            self._refuse_adapters("the number of heads")
        return fields

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        types = self.config.layers_block_type
        return super().layer_fields(kept) | {"layers_block_type": [types[i] for i in kept]}

    def set_layers(self, kept: Sequence[int]) -> None:
        super().set_layers(kept)
        self.base.layers_block_type = [self.base.layers_block_type[i] for i in kept]

    def run_layer(self, layer: Any, index: int, stream: Tensor, embedded: Tensor) -> Tensor:
        output: Tensor = layer(stream, original_hidden_states=embedded, layer_idx=index)
        return output

    def retie(self, sources: dict[str, str]) -> None:
        """Tell transformers which shared blocks are the same, under their new names.

        :param sources: name or pattern in the base model -> name of the block it shares
        """
        self.base._tied_weights_keys = sources
        for module in (self.base, self.model):
            expanded = module.get_expanded_tied_weights_keys(all_submodels=True)
            module.all_tied_weights_keys = expanded

    def _refuse_adapters(self, what: str) -> None:
        if any(attention.has_adapters for attention in self._attentions()):
            raise SparseSSMError(
                f"{self.name}: the loader of {self.family} makes the adapters of q, k and v "
                f"attention_hidden_size wide; {what} cannot change where a model has them"
            )


@register_model
class Zamba2ModelAdapter(SharedBlockModelAdapter):
    """Shared blocks by turns, with low-rank adapters for every layer that uses them."""

    family = "zamba2"
    model_class = "Zamba2ForCausalLM"
    shared = "shared_transformer"

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        fields = super().layer_fields(kept)
        turns = self._turns(kept)
        distinct = list(dict.fromkeys(turns))
        if turns != [distinct[i % len(distinct)] for i in range(len(turns))]:
            raise SparseSSMError(
                f"{self.name}: zamba2 uses its {len(distinct)} shared blocks by turns; layers "
                f"{', '.join(map(str, self._hybrids(kept)))} would use block "
                f"{', '.join(map(str, turns))}"
            )
        fields["hybrid_layer_ids"] = [kept.index(i) for i in self._hybrids(kept)]
        fields["num_mem_blocks"] = max(1, len(distinct))
        return fields

    def set_layers(self, kept: Sequence[int]) -> None:
        hybrids, turns = self._hybrids(range(len(self.base.layers))), self._turns(kept)
        distinct = list(dict.fromkeys(turns))
        slots = [hybrids.index(i) for i in self._hybrids(kept)]  # of the adapters, old to new
        places = [kept.index(i) for i in self._hybrids(kept)]
        super().set_layers(kept)
        first: dict[int, str] = {}
        sources: dict[str, str] = {}
        for place, turn in zip(places, turns, strict=True):
            name = f"layers.{place}.{self.shared}"
            if turn in first:
                sources[name] = first[turn]
            first.setdefault(turn, name)
            block = getattr(self.base.layers[place], self.shared)
            for module in (block, block.self_attn, block.feed_forward):
                module.block_id = distinct.index(turn)
            for module in (block.self_attn, block.feed_forward):
                module.num_fwd_mem_blocks = len(places)
                module.layer_dic = {value: index for index, value in enumerate(places)}
                if hasattr(module, "layer_block_map"):
                    module.layer_block_map = places
                for name, adapters in module.named_children():
                    if isinstance(adapters, nn.ModuleList):
                        setattr(module, name, nn.ModuleList(adapters[i] for i in slots))
        self.retie(sources)

    def _hybrids(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers that use a shared block."""
        return [i for i in layers if hasattr(self.base.layers[i], self.shared)]

    def _turns(self, layers: Sequence[int]) -> list[int]:
        """Which shared block each of the layers uses that use one."""
        return [
            getattr(self.base.layers[i], self.shared).block_id % self.config.num_mem_blocks
            for i in self._hybrids(layers)
        ]


@register_model
class ZambaModelAdapter(SharedBlockModelAdapter):
    """One shared block."""

    family = "zamba"
    model_class = "ZambaForCausalLM"
    shared = "shared_transf"

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        fields = super().mixer_fields(mixer, hidden_size, sizes)
        return fields | {"mamba_dt_rank": mixer.sizes.time_step_rank}

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        fields = super().layer_fields(kept)
        users = [i for i, layer in enumerate(self.base.layers) if hasattr(layer, self.shared)]
        if len(set(users) & set(kept)) < 2:
            raise SparseSSMError(
                f"{self.name}: the loader of zamba needs two layers that share a block; keep two "
                f"of {', '.join(map(str, users))}"
            )
        return fields

    def set_layers(self, kept: Sequence[int]) -> None:
        super().set_layers(kept)
        users = [i for i, layer in enumerate(self.base.layers) if hasattr(layer, self.shared)]
        pattern = rf"layers.(?!{users[0]}\.)\d+.{self.shared}"
        self.retie({pattern: f"layers.{users[0]}.{self.shared}"})


class DeltaNetModelAdapter(ModelAdapter):
    """Gated delta net or attention, then an MLP or experts; kinds of layers are listed.

    No size of the mixers follows another, and the head_dim of attention is a field of its own.
    """

    unit_fields: ClassVar[dict[str, str]] = {"mlp": "intermediate_size"}

    def mixer_fields(
        self, mixer: MixerAdapter, hidden_size: int, sizes: MixerSizes
    ) -> dict[str, Any]:
        return mixer.config_sizes() | {
            "linear_num_value_heads": sizes.num_heads,
        }

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        fields, types = super().layer_fields(kept), self.config.layer_types
        return fields | {"layer_types": [types[i] for i in kept]}

    def run_layer(self, layer: Any, index: int, stream: Tensor, embedded: Tensor) -> Tensor:
        output: Tensor = layer(stream, position_embeddings=None)
        return output


class BesideImages(DeltaNetModelAdapter):
    """A language model beside an image encoder, which writes into its stream."""

    def hidden_fields(self, size: int, along: MixerSizes | None = None) -> dict[str, Any]:
        raise SparseSSMError(
            f"{self.name}: an image encoder writes {self.hidden_size} entries into the stream; "
            "hidden_size can change in the language model alone"
        )


@register_model
class Qwen3_5ModelAdapter(DeltaNetModelAdapter):
    """An MLP in every layer."""

    family = "qwen3_5"
    model_class = "Qwen3_5ForCausalLM"


@register_model
class Qwen3_5VisionModelAdapter(BesideImages, Qwen3_5ModelAdapter):
    """The same beside an image encoder."""

    model_class = "Qwen3_5ForConditionalGeneration"


@register_model
class Qwen3_5MoeModelAdapter(DeltaNetModelAdapter):
    """Experts and a shared one in every layer."""

    family = "qwen3_5_moe"
    model_class = "Qwen3_5MoeForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {
        "experts": "moe_intermediate_size",
        "shared_experts": "shared_expert_intermediate_size",
    }


@register_model
class Qwen3_5MoeVisionModelAdapter(BesideImages, Qwen3_5MoeModelAdapter):
    """The same beside an image encoder."""

    model_class = "Qwen3_5MoeForConditionalGeneration"


@register_model
class Qwen3NextModelAdapter(DeltaNetModelAdapter):
    """Experts and a shared one, or an MLP where the config lists the layer or its step says so."""

    family = "qwen3_next"
    model_class = "Qwen3NextForCausalLM"
    unit_fields: ClassVar[dict[str, str]] = {
        "mlp": "intermediate_size",
        "experts": "moe_intermediate_size",
        "shared_experts": "shared_expert_intermediate_size",
    }

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        # with a step of 1, every layer has experts but those that are listed
        dense = [new for new, old in enumerate(kept) if not self.layers[old].has("moe")]
        return super().layer_fields(kept) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}


@register_model
class OlmoHybridModelAdapter(DeltaNetModelAdapter):
    """An MLP in every layer; queries and keys of attention are normalised over all heads."""

    family = "olmo_hybrid"
    model_class = "OlmoHybridForCausalLM"
    pre_norm = False  # layers of attention have their norms behind attention and MLP

    def layer_fields(self, kept: Sequence[int]) -> dict[str, Any]:
        fields = super().layer_fields(kept)
        if not any(self.layers[i].has("mixer") for i in kept):
            mixers = [i for i, layer in enumerate(self.layers) if layer.has("mixer")]
            raise SparseSSMError(
                f"{self.name}: the config of {self.family} wants a gated delta net in at least one "
                f"layer: keep at least one of {', '.join(map(str, mixers))}"
            )
        return fields
