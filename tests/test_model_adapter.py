"""What a model consists of and what goes together, against dense models and stock loaders."""

import copy
from math import sqrt
from typing import ClassVar

import pytest
import torch
from compressed_tensors.offload import offload_module
from conftest import (
    DELTA,
    DEVICE,
    MAMBA1,
    MAMBA2,
    MOE,
    MOE_ROUNDING,
    VOCAB,
    state,
    tiny_model,
)
from conftest import FAMILIES as SELECTIVE
from torch import nn
from transformers import AutoModelForCausalLM, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock

from sparsessm_plugin.dependency_graph import ModelDependencyGraph, write_config_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import (
    ModelAdapter,
    Part,
    UnitBlock,
    get_model_adapter,
    get_tensor,
    known_models,
    register_model,
    register_part,
)
from sparsessm_plugin.families.parts import Mixer, Norm
from sparsessm_plugin.registry import Registry

FAMILIES = SELECTIVE + DELTA
LINEAR, FULL = "linear_attention", "full_attention"
# more layers than the tiny models have, with every kind that the family knows
DEEP = {
    "mamba": {"num_hidden_layers": 4, "use_bias": True},
    "falcon_mamba": {"num_hidden_layers": 4},
    "mamba2": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "falcon_h1": {"num_hidden_layers": 3, "mlp_bias": True, "attention_bias": True},
    "bamba": {"num_hidden_layers": 5, "attn_layer_indices": [1, 3], "attention_bias": True},
    # attention in layers 1 and 4, experts in 1, 3 and 5
    "jamba": {
        "num_hidden_layers": 6,
        "num_experts": 3,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "shared_intermediate_size": 56,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "layers_block_type": [LINEAR, FULL, "moe", "mlp", LINEAR, FULL],
        "n_routed_experts": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 28,
        "mlp_bias": True,
    },
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid", "hybrid"],
        "mamba_proj_bias": True,
    },
    # the shared blocks 0, 1, 0, 1 in layers 0, 2, 3 and 5
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["hybrid", LINEAR, "hybrid", "hybrid", LINEAR, "hybrid"],
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "add_bias_linear": True,
    },
    "qwen3_5": {"num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "qwen3_5_moe": {"num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]},
    # an MLP in layers 0 and 2, experts in 1 and 3
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "olmo_hybrid": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "attention_bias": True,
    },
}
KINDS = {
    "mamba": ["mixer"] * 4,
    "falcon_mamba": ["mixer"] * 4,
    "mamba2": ["mixer"] * 4,
    "falcon_h1": ["parallel"] * 3,
    "bamba": ["pair"] * 5,
    "jamba": ["pair"] * 6,
    "granitemoehybrid": ["pair"] * 4,
    "nemotron_h": ["mixer", "attention", "moe", "mlp", "mixer", "attention"],
    "zamba": ["mixer", "hybrid", "mixer", "hybrid", "hybrid"],
    "zamba2": ["hybrid", "mixer", "hybrid", "hybrid", "mixer", "hybrid"],
    **dict.fromkeys(DELTA, ["pair"] * 4),
}
UNITS = {
    "falcon_h1": ("mlp", "kv_groups"),
    "bamba": ("mlp", "kv_groups"),
    "jamba": ("mlp", "kv_groups"),
    "granitemoehybrid": ("mlp", "experts", "kv_groups"),
    "nemotron_h": ("mlp", "experts", "shared_experts", "kv_groups"),
    "zamba": ("mlp", "kv_groups"),
    "zamba2": ("mlp", "kv_groups"),
    "qwen3_5": ("mlp", "kv_groups"),
    "qwen3_5_moe": ("experts", "shared_experts", "kv_groups"),
    "qwen3_next": ("mlp", "experts", "shared_experts", "kv_groups"),
    "olmo_hybrid": ("mlp", "kv_groups"),
}
# layers that go, and what the config says of the others
LAYERS = {
    "mamba": ([0, 2], {"num_hidden_layers": 2}),
    "falcon_mamba": ([3], {"num_hidden_layers": 3}),
    "mamba2": ([1, 2], {"num_hidden_layers": 2}),
    "falcon_h1": ([1], {"num_hidden_layers": 2}),
    "bamba": ([0, 3], {"num_hidden_layers": 3, "attn_layer_indices": [0]}),
    # attention is left in 0 and 2 of 4, experts in 0 and 3
    "jamba": (
        [0, 3],
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "expert_layer_period": 3,
            "expert_layer_offset": 0,
        },
    ),
    "granitemoehybrid": (
        [0, 3],
        {"num_hidden_layers": 2, "layer_types": [FULL, LINEAR]},
    ),
    "nemotron_h": (
        [1, 2],
        {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "mlp", LINEAR, FULL]},
    ),
    "zamba": (
        [0, 1],
        {"num_hidden_layers": 3, "layers_block_type": [LINEAR, "hybrid", "hybrid"]},
    ),
    "zamba2": (
        [0, 1],
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["hybrid", "hybrid", LINEAR, "hybrid"],
            "hybrid_layer_ids": [0, 1, 3],
            "num_mem_blocks": 2,
        },
    ),
    **dict.fromkeys(DELTA, ([0, 3], {"num_hidden_layers": 2, "layer_types": [FULL, LINEAR]})),
    # experts are left in the first of two
    "qwen3_next": (
        [0, 3],
        {
            "num_hidden_layers": 2,
            "layer_types": [FULL, LINEAR],
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
        },
    ),
}
UNTIED = ("mamba", "falcon_mamba", "falcon_h1", "nemotron_h", *DELTA)


def deep_model(family, **changes):
    model = tiny_model(family, **{**DEEP[family], **changes}).to(DEVICE)
    for module in model.modules():
        # so small that the number of entries that a norm runs over is all that matters
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 1e-20)
    return model


def token_ids():
    return torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def logits(model):
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


def assert_close(result, expected):
    assert torch.linalg.norm(result - expected) <= 2e-5 * torch.linalg.norm(expected)


def zero(model, axes, indices):
    """Set what stands at some indices of tensor ranges to zero."""
    with torch.no_grad():
        for axis in axes:
            tensor = get_tensor(model, axis.tensor)
            positions = torch.tensor(axis.positions(indices), device=tensor.device)
            tensor.index_fill_(axis.dim, positions, 0)


def sizes(module):
    """Every whole number among a module's attributes, but one that FalconH1 never reads."""
    return {k: v for k, v in vars(module).items() if type(v) is int and k != "channels_attn"}


def check_loads(model, folder):
    """Stock transformers gets the same bits from what it saves, and generates with its cache."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval().to(DEVICE)
    kept = dict(loaded.named_modules())
    for name, module in model.named_modules():
        assert sizes(module) == sizes(kept[name]), name
        for attribute in ("variance_epsilon", "eps"):
            if hasattr(module, attribute):
                setattr(kept[name], attribute, getattr(module, attribute))
    away = MOE_ROUNDING if get_model_adapter(model).family in MOE else 0.0
    assert (logits(loaded) - logits(model)).abs().max() <= away
    # with a norm before out_proj, FalconH1's own cached steps fail for more than one sequence
    prompt = token_ids()[:1]
    tokens = [
        each.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cached)
        for each, cached in ((loaded, True), (loaded, False), (model, True))
    ]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def declared(ranges, indices):
    result = {}
    for part in ranges:
        result.setdefault((part.tensor, part.dim), set()).update(part.positions(indices))
    return result


def found(group):
    return {(change.tensor, change.dim): set(change.positions) for change in group.changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_axes(family):
    adapter = get_model_adapter(deep_model(family))
    assert [layer.kind for layer in adapter.layers] == KINDS[family]
    assert set(adapter.axis_names) == {"hidden", "layers", *UNITS.get(family, ())}
    assert adapter.axis_length("layers") == len(KINDS[family])
    assert adapter.hidden_size == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_cover_every_dimension_of_the_stream(family):
    """No other size is 40, and in Zamba none is 80: what has it belongs to the stream."""
    changes = {"hidden_size": 40, "head_dim": 12}
    if family in ("bamba", "granitemoehybrid", "mamba2", "zamba2"):
        expand = "expand" if family == "mamba2" else "mamba_expand"
        heads = {"mamba2": "num_heads", "zamba2": "n_mamba_heads"}.get(family, "mamba_n_heads")
        changes |= {expand: 3, heads: 20}
        if family in ("bamba", "granitemoehybrid"):
            changes["mamba_d_head"] = 6
        if family == "mamba2":
            changes["head_dim"] = 6
    if family in ("zamba", "zamba2"):
        del changes["head_dim"]
        changes |= {"attention_head_dim": 12, "mamba_expand": 3}
    model = deep_model(family, **changes)
    adapter = get_model_adapter(model)
    covered = declared(adapter.axes("hidden"), range(40))
    sizes = (40, 80) if family in ("zamba", "zamba2") else (40,)
    of_the_stream = {
        (name, dim): set(range(size))
        for name, parameter in model.named_parameters()
        for dim, size in enumerate(parameter.shape)
        if size in sizes
    }
    assert covered == of_the_stream


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_coupling_is_what_the_adapter_declares(family):
    model = deep_model(family)
    graph = ModelDependencyGraph(model)
    adapter = graph.adapter
    group = graph.get_axis_group("hidden", [4, 30, 31])
    assert found(group) == declared(adapter.axes("hidden"), [4, 30, 31])
    for axis in UNITS.get(family, ()):
        group = graph.get_axis_group(axis, [1])
        assert found(group) == declared(adapter.axes(axis), [1])


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_and_groups_change_nothing(family):
    model = deep_model(family)
    before, config = state(model), model.config.to_dict()
    expected = logits(model)
    graph = ModelDependencyGraph(model)
    for axis in graph.adapter.axis_names:
        str(graph.get_axis_group(axis, [0]))
        with pytest.raises(SparseSSMError, match="give at least one"):
            graph.get_axis_group(axis, [])
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_compute_what_the_others_do(family, tmp_path):
    removed, fields = LAYERS[family]
    dense, model = deep_model(family), deep_model(family)
    for index in removed:
        skip = (
            (lambda x, *a, **k: (x, None))
            if family in ("bamba", "falcon_h1")
            else (lambda x, *a, **k: x)
        )
        get_model_adapter(dense).base.layers[index].forward = skip
    group = ModelDependencyGraph(model).get_axis_group("layers", removed)
    assert [layer.index for layer in group.layers] == removed
    group.prune()
    assert group.config_fields == fields
    assert torch.equal(logits(model), logits(dense))
    check_loads(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "axis"), [(family, axis) for family, axes in UNITS.items() for axis in axes]
)
def test_fewer_units_compute_what_the_others_do(family, axis, tmp_path):
    changes = {"num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 3}
    if family in ("zamba", "zamba2"):
        changes = {"num_key_value_heads": 2}
    dense, model = deep_model(family, **changes), deep_model(family, **changes)
    graph = ModelDependencyGraph(model)
    # other units in every module, where there are more than two
    removed = {
        block.name: [0] if axis == "kv_groups" else [n, n + 2, n + 5, block.length - 1]
        for n, block in enumerate(graph.adapter.blocks(axis))
    }
    for block in get_model_adapter(dense).blocks(axis):
        zero(dense, block.columns, removed[block.name])
        if family == "olmo_hybrid":  # queries and keys are normalised over all heads
            zero(dense, block.rows, removed[block.name])
    size = graph.adapter.axis_length(axis)
    group = graph.get_axis_group(axis, removed)
    group.prune()
    for name, weight in model.named_parameters():
        if (
            family == "olmo_hybrid"
            and axis == "kv_groups"
            and name.endswith(("q_norm.weight", "k_norm.weight"))
        ):
            weight.data.mul_(sqrt(size / group.new_size))
    assert graph.adapter.axis_length(axis) == group.new_size < size
    assert_close(logits(model), logits(dense))
    check_loads(model, tmp_path)


def _layout(family):
    return "delta" if family in DELTA else "mamba2" if family in MAMBA2 else "mamba1"


def hidden_case(family, along):
    """What goes from the stream, and from the mixers with it."""
    if not along:
        # 32 -> 24, or where the loader ties the channels 32 -> 16 with twice the expansion
        return range(3, 11) if family in UNTIED else range(0, 32, 2), None
    # a head of each group; 16 of 64 channels where there are no heads, in Zamba 8 of each half
    gone = {"mamba2": (1, 6), "delta": (1, 5)}.get(_layout(family), range(5, 21))
    if family == "zamba":
        gone = [*range(5, 13), *range(37, 45)]
    adapter = get_model_adapter(deep_model(family))
    return range(3, 11), {mixer.name: gone for mixer in adapter.mixers}


@pytest.mark.parametrize(
    ("family", "along"),
    [
        *((family, along) for family in FAMILIES for along in (False, True)),
        *((family, "head_dim") for family in MAMBA2),
    ],
)
def test_narrower_stream_computes_what_remains(family, along, tmp_path):
    dense, model = deep_model(family), deep_model(family)
    removed, channels = hidden_case(family, along)
    axis = along if isinstance(along, str) else None
    reference, graph = get_model_adapter(dense), ModelDependencyGraph(model)
    for part in reference.parts:
        zero(dense, part.writes(), removed)
    with torch.no_grad():
        for mixer in reference.mixers if channels else ():
            gone, P = list(channels[mixer.name]), mixer.sizes.head_dim
            module = mixer.mixer
            if family in DELTA:
                weight = mixer.projection(mixer.exit_kind).weight
                weight[:, [head * P + p for head in gone for p in range(P)]] = 0
                continue
            if family in MAMBA1:
                for channel in gone:
                    x_proj = (
                        module.x_proj_weight[channel // 32]
                        if family == "zamba"
                        else module.x_proj.weight
                    )
                    x_proj[:, channel % x_proj.shape[1]] = 0
                module.out_proj.weight[:, gone] = 0
                continue
            rows = [head * P + p for head in gone for p in range(P)]
            if axis == "head_dim":
                rows = [head * P + p for head in range(mixer.sizes.num_heads) for p in gone]
            # a closed gate leaves nothing of a head before the norm
            for tensor in (module.in_proj.weight, module.in_proj.bias):
                if tensor is not None:
                    tensor[rows] = 0
    group = graph.get_axis_group("hidden", removed, channels, axis)
    group.prune()
    kept = 32 - len(removed)
    assert graph.adapter.hidden_size == model.config.hidden_size == kept
    with torch.no_grad():
        for name in graph.adapter.stream_norms:
            weight, offset = get_tensor(model, name), graph.adapter.norm_offset
            weight.copy_((offset + weight) * sqrt(32 / kept) - offset)
        for mixer in graph.adapter.mixers if along and family not in DELTA else ():
            if hasattr(mixer.mixer, "norm"):
                mixer.mixer.norm.weight.mul_(sqrt(64 / mixer.sizes.intermediate_size))
    assert_close(logits(model), logits(dense))
    check_loads(model, tmp_path)


def test_one_after_the_other(tmp_path):
    """The graph counts in the smaller model; a group from before prunes no more."""
    model = deep_model("nemotron_h")
    graph = ModelDependencyGraph(model)
    old = graph.get_axis_group("mlp", [0])
    graph.get_axis_group("hidden", range(8)).prune()
    with pytest.raises(SparseSSMError, match="from before the model became smaller"):
        old.prune()
    graph.get_axis_group("mlp", [0]).prune([46, 47])
    graph.get_axis_group("layers", [0, 1]).prune()
    graph.get_axis_group("kv_groups", [0]).prune()
    config = model.config
    assert (config.hidden_size, config.intermediate_size) == (24, 46)
    assert config.layers_block_type == ["moe", "mlp", LINEAR, FULL]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    check_loads(model, tmp_path)


REFUSED = {
    "hidden-tied": ("mamba2", "hidden", range(8), "no multiple of hidden_size=24, 48 would be"),
    "channels-tied": ("jamba", "hidden", range(4), "whole mamba_expand; 64 channels are no multi"),
    "nothing-left": ("mamba", "hidden", range(32), "removing 32 of 32 hidden leaves nothing"),
    "no-layer": ("mamba", "layers", range(4), "removing 4 of 4 layers leaves nothing"),
    "no-attention": ("bamba", "layers", [1, 3], "keep at least one of 1, 3"),
    "no-period": ("jamba", "layers", [2, 3, 5], "none gives attention in layers 1, 2 of 3"),
    "shared": (
        "zamba",
        "layers",
        [1, 4],
        "two layers that share a block; keep two of 1, 3, 4",
    ),
    "turns": ("zamba2", "layers", [2], "layers 0, 3, 5 would use block 0, 0, 1"),
    "experts": ("jamba", "mlp", [0], "47 mlp are no multiple of 4: transformers multiplies"),
    "experts-hidden": ("nemotron_h", "hidden", [0], "31 hidden are no multiple of 4"),
    "no-units": ("falcon_h1", "mlp", range(48), "removing 48 of 48 mlp leaves nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_config_can_say_is_refused(case):
    family, axis, removed, message = REFUSED[case]
    model = deep_model(family)
    before, config = state(model), model.config.to_dict()
    with pytest.raises(SparseSSMError, match=message) as error:
        ModelDependencyGraph(model).get_axis_group(axis, removed).prune()
    assert "\n" not in str(error.value)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("axis", ["hidden", "kv_groups"])
def test_attention_adapters_are_refused(axis):
    model = deep_model("zamba2", use_shared_attention_adapter=True)
    graph = ModelDependencyGraph(model)
    group = graph.get_axis_group(axis, range(16) if axis == "hidden" else [0])
    assert found(group) == declared(graph.adapter.axes(axis), next(iter(group.indices.values())))
    with pytest.raises(SparseSSMError, match="adapters of q, k and v attention_hidden_size wide"):
        group.prune()


def test_bad_indices():
    model = deep_model("bamba")
    graph = ModelDependencyGraph(model)
    blocks = [block.name for block in graph.adapter.blocks("mlp")]
    cases = [
        (("width", [0]), {}, "no axis 'width'; allowed: hidden, layers, mlp, kv_groups"),
        (("hidden", [32]), {}, "hidden has no index 32; allowed: 0 to 31"),
        (("layers", [-1]), {}, "layers has no index -1; allowed: 0 to 4"),
        (("mlp", [3, 3]), {}, "index 3 of mlp is given more than once"),
        (("mlp", [0.5]), {}, "indices of mlp must be whole numbers"),
        (("hidden", {"x": [0]}), {}, "hidden takes indices, not modules' names"),
        (("mlp", {"x": [0]}), {}, "'x' has no mlp; allowed: model.layers.0.feed_forward"),
        (("mlp", {blocks[0]: [0]}), {}, "no mlp of model.layers.1.feed_forward are given"),
        (
            ("mlp", {name: range(1 + (name == blocks[2])) for name in blocks}),
            {},
            "every module must lose equally many mlp, not model.layers.0.feed_forward 1",
        ),
        (("layers", [0]), {"channels": {}}, "channels go along with hidden, not with layers"),
        (
            ("hidden", [0]),
            {"channels": {"model.layers.0.mamba": [0]}},
            "the 2 groups must lose equally many of heads|no channels of",
        ),
    ]
    for arguments, named, message in cases:
        with pytest.raises(SparseSSMError, match=message):
            graph.get_axis_group(*arguments, **named)


def test_groups_are_readable():
    graph = ModelDependencyGraph(deep_model("bamba"))
    assert str(graph.get_axis_group("layers", [0, 3])).splitlines() == [
        "BambaForCausalLM: layers [0, 3] 5 -> 3",
        "  model.layers.0 (pair)",
        "  model.layers.3 (pair)",
    ]
    lines = str(graph.get_axis_group("kv_groups", [1])).splitlines()
    assert lines[0] == "BambaForCausalLM: kv_groups [1] 2 -> 1"
    assert "  model.layers.1.self_attn.q_proj.weight dim 0 [16:32] 32 -> 16" in lines
    assert len(lines) == 1 + 2 * 7


@pytest.mark.parametrize("family", ["jamba", "granitemoehybrid", "nemotron_h"])
def test_experts_that_are_taken_apart(family, tmp_path):
    """LLM Compressor's experts of single layers lose the same as the packed ones."""
    from llmcompressor.modeling.moe.linearize import linearize_moe, repack_moe

    packed, apart = deep_model(family), deep_model(family)
    linearize_moe(apart)
    removed, channels = hidden_case(family, True)
    units = "mlp" if family == "jamba" else "experts"
    for model in (packed, apart):
        graph = ModelDependencyGraph(model)
        graph.get_axis_group("hidden", removed, channels).prune()
        graph.get_axis_group(units, [2, 3, 5, 7]).prune()
    repack_moe(apart)
    before, after = state(packed), state(apart)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(packed), logits(apart))


def test_a_family_is_one_class_and_an_axis_of_units_one_part():
    """Parts that are known need no word; a new one says its ranges and its units."""

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Parameter(torch.randn(6, 32))
            self.up = nn.Parameter(torch.randn(32, 6))

        def forward(self, x):
            return x @ self.down.T @ self.up.T

    class ToyBlock(MambaBlock):
        def forward(self, hidden_states, **kwargs):
            return self.gain(super().forward(hidden_states, **kwargs))

    class ToyForCausalLM(MambaForCausalLM):
        pass

    class GainPart(Part):
        kind = "gain"

        @staticmethod
        def matches(module):
            return isinstance(module, Gain)

        def reads(self):
            return self.ranges(1, "down")

        def writes(self):
            return self.ranges(0, "up")

        def blocks(self):
            rows, columns = self.ranges(0, "down"), self.ranges(1, "up")
            length = self.size(rows[0])
            resize = lambda length: None  # noqa: E731
            return [UnitBlock("ranks", self.name, length, tuple(rows), tuple(columns), resize)]

    class ToyModelAdapter(ModelAdapter):
        family = "toy"
        model_class = "ToyForCausalLM"
        unit_fields: ClassVar = {"ranks": "toy_ranks"}
        needs_attention = False

    config = tiny_model("mamba").config
    config.toy_ranks = 6
    assert "MambaForCausalLM" in known_models()
    with pytest.MonkeyPatch.context() as patch:
        # empty: the files of the folder have been read, and are not read again
        none = Registry("model", "sparsessm_plugin.families")
        patch.setattr("sparsessm_plugin.families.model._MODELS", none)
        patch.setattr("sparsessm_plugin.families.parts._PARTS", [Mixer, Norm])
        register_model(ToyModelAdapter)
        register_part(GainPart)
        assert known_models() == ("ToyForCausalLM",)
        model = ToyForCausalLM(config)
        for layer in model.backbone.layers:
            layer.gain = Gain()
            layer.__class__ = ToyBlock
        model.to(DEVICE)
        graph = ModelDependencyGraph(model)
        assert graph.adapter.axis_names == ("hidden", "layers", "ranks")
        graph.get_axis_group("layers", [0]).prune()
        group = graph.get_axis_group("ranks", [1, 2])
        assert [str(change) for change in group.changes] == [
            "backbone.layers.0.gain.down dim 0 [1:3] 6 -> 4",
            "backbone.layers.0.gain.up dim 1 [1:3] 6 -> 4",
        ]
        group.prune()
        graph.get_axis_group("hidden", range(10)).prune()
        assert model.backbone.layers[0].gain.up.shape == (22, 4)
        assert (config.toy_ranks, config.num_hidden_layers, config.hidden_size) == (4, 1, 22)
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("family", ["jamba", "granitemoehybrid", "nemotron_h", "zamba2"])
def test_what_llm_compressor_saves_loads_again(family, tmp_path):
    """It writes the config file of the original back, which must then say the new sizes."""
    from sparsessm_plugin.checkpoints.saving import change_config

    model = deep_model(family)
    graph = ModelDependencyGraph(model)
    removed, channels = hidden_case(family, True)
    for axis, indices in (("layers", LAYERS[family][0]), ("mlp", range(4)), ("kv_groups", [1])):
        group = graph.get_axis_group(axis, indices)
        group.prune()
        change_config(model, group.config_fields)
    if channels is not None:
        gone = next(iter(channels.values()))
        channels = {mixer.name: gone for mixer in graph.adapter.mixers}
    group = graph.get_axis_group("hidden", removed, channels)
    group.prune()
    change_config(model, group.config_fields)
    check_loads(model, tmp_path)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(where, tmp_path):
    """Shared and tied tensors that are kept elsewhere become smaller, and stay shared."""
    here, offloaded = deep_model("zamba2"), deep_model("zamba2")
    settings = {"offload_dir": str(tmp_path)} if where == "disk" else {}
    for module in offloaded.modules():
        offload_module(module, DEVICE, where, **settings)
    removed, channels = hidden_case("zamba2", True)
    for model in (here, offloaded):
        graph = ModelDependencyGraph(model)
        graph.get_axis_group("hidden", removed, channels).prune()
        graph.get_axis_group("mlp", [4]).prune()
        graph.get_axis_group("layers", [0, 1]).prune()
    before, after = state(here), state(offloaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(offloaded), logits(here))
    assert here.get_parameter("lm_head.weight") is here.model.embed_tokens.weight


def test_what_runtimes_read_in_the_config_file():
    """Every name of a size, and the kinds of layers in the words that the file had."""
    model = deep_model("nemotron_h")
    graph = ModelDependencyGraph(model)
    file = {
        "hybrid_override_pattern": "M*E-M*",
        "num_hidden_layers": 6,
        "hidden_size": 32,
        "intermediate_size": 48,
        "mamba_num_heads": 8,
        "n_layer": 6,
        "d_model": 32,
    }
    for axis, removed in (("layers", [1, 2]), ("hidden", range(8)), ("mlp", [0])):
        group = graph.get_axis_group(axis, removed)
        group.prune()
        write_config_fields(file, group.config_fields, model.config)
    assert (
        file.items()
        >= {
            "hybrid_override_pattern": "M-M*",
            "num_hidden_layers": 4,
            "hidden_size": 24,
            "intermediate_size": 47,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "head_dim": 8,
            "n_layer": 4,
            "d_model": 24,
        }.items()
    )
    assert "layers_block_type" not in file

    model = deep_model("granitemoehybrid")
    group = ModelDependencyGraph(model).get_axis_group("layers", [0])
    group.prune()
    for key in ("layer_types", "layers_block_type"):
        file = {key: ["mamba", "attention", "mamba", "attention"]}
        write_config_fields(file, group.config_fields, model.config)
        assert file == {key: ["attention", "mamba", "attention"], "num_hidden_layers": 3}


def test_the_mlp_is_not_taken_for_the_mixers():
    """In hybrids intermediate_size and head_dim are those of the MLP and of attention."""
    model = deep_model("falcon_h1", num_attention_heads=6, head_dim=4, num_key_value_heads=3)
    graph = ModelDependencyGraph(model)
    graph.get_axis_group("mlp", range(16)).prune()
    graph.get_axis_group("kv_groups", [0]).prune()
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads, config.head_dim) == (32, 4, 4)
    assert (config.mamba_d_ssm, config.mamba_n_heads, config.mamba_d_head) == (64, 8, 8)


def test_channels_that_follow_hidden_size():
    adapters = {f: get_model_adapter(deep_model(f)) for f in ("mamba", "mamba2", "jamba")}
    assert adapters["mamba"].ways_along(24) == {}
    assert adapters["jamba"].ways_along(23) == {"channels": 46}
    assert adapters["mamba2"].ways_along(24) == {"head_dim": 6, "heads": 6}
    assert adapters["mamba2"].ways_along(20) == {"head_dim": 5}  # 5 heads are not as many a group
    with pytest.raises(SparseSSMError, match=r"36 channels.* 8 equal heads .* multiple of 4 or 8"):
        adapters["mamba2"].ways_along(18)
    heads = get_model_adapter(deep_model("zamba")).ways_along
    assert heads(23) == {"channels": 46}
    wide = get_model_adapter(deep_model("mamba2", num_heads=16, head_dim=4, n_groups=1))
    assert wide.ways_along(22) == {"heads": 11}


def test_unknown_models_and_modules():
    with pytest.raises(SparseSSMError, match="no layers are known of a Linear; known: BambaFor"):
        get_model_adapter(nn.Linear(2, 2))
    model = copy.deepcopy(deep_model("mamba"))
    model.backbone.layers[1].scale = nn.PReLU(32)
    with pytest.raises(SparseSSMError, match=r"layers.1.scale.weight.*a PReLU is none of them"):
        ModelDependencyGraph(model).get_axis_group("hidden", [0])
