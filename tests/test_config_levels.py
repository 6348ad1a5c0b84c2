"""Which levels of a config hold the sizes, in memory and in config.json: one rule for both."""

import json

import pytest
import torch
from conftest import VOCAB, batches, logits_beside, same_logits, tiny_model
from llmcompressor import oneshot
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    PreTrainedConfig,
)

from sparsessm_plugin import ChannelRemovalModifier, StateRemovalModifier
from sparsessm_plugin.dependency_graph import apply_config_fields, write_config_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.config_levels import language_field, language_level, language_levels


class Composite(PreTrainedConfig):
    """As remote code wraps a language model: ``llm_config``, and copies of some fields on top."""

    model_type = "composite"

    def __init__(self, llm_config=None, **kwargs):
        self.llm_config = llm_config
        super().__init__(**kwargs)


def bamba():
    return tiny_model("bamba").config


def test_levels_of_objects_and_mappings_are_the_same():
    config = Composite(llm_config=bamba(), mamba_d_state=8)
    assert list(language_levels(config)) == [(), ("llm_config",)]
    assert list(language_levels(json.loads(config.to_json_string()))) == [(), ("llm_config",)]
    assert language_level(config, "mamba_d_state") == ("llm_config",)
    assert language_field(config, "mamba_n_heads") == 8
    assert language_field(config, "not_there") is None
    deep = Composite(llm_config=Composite(llm_config=bamba()))
    assert language_level(deep, "mamba_d_state") == ("llm_config", "llm_config")


def test_every_level_that_states_a_size_follows():
    config = Composite(llm_config=bamba(), mamba_d_state=8, d_inner=64, vision={"d_inner": 64})
    fields = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 1}
    content = json.loads(config.to_json_string())
    apply_config_fields(config, {"mamba_d_state": 4})
    assert config.mamba_d_state == config.llm_config.mamba_d_state == 4
    apply_config_fields(config, fields)
    assert {name: getattr(config.llm_config, name) for name in fields} == fields
    assert config.d_inner == 32
    assert config.vision == {"d_inner": 64}  # no language model's
    assert not hasattr(config, "mamba_n_heads")
    write_config_fields(content, {"mamba_d_state": 4, **fields}, config)
    assert content == json.loads(config.to_json_string())


def test_a_refusal_restores_every_level():
    config = Composite(llm_config=bamba(), mamba_d_state=8, d_inner=64)
    before = config.to_dict()
    with pytest.raises(SparseSSMError, match="refuses mamba_n_heads=6"):
        apply_config_fields(config, {"mamba_n_heads": 6, "mamba_d_head": 8})
    with pytest.raises(SparseSSMError, match="no field 'states'"):
        apply_config_fields(config, {"states": 6})
    with pytest.raises(SparseSSMError, match="no field 'states'"):
        write_config_fields({}, {"states": 6}, config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {"mamba_d_state": 4}),  # a default that the file leaves out
        ({"text_config": {}}, {"text_config": {"mamba_d_state": 4}}),
        (
            {"mamba_d_state": 8, "text_config": {}},
            {"mamba_d_state": 4, "text_config": {"mamba_d_state": 4}},
        ),
        ({"llm_config": {}}, {"llm_config": {"mamba_d_state": 4}}),  # another name than in memory
        (
            {"mamba_d_state": 8, "llm_config": {"mamba_d_state": 8}},
            {"mamba_d_state": 4, "llm_config": {"mamba_d_state": 4}},
        ),
        (
            {"vision_config": {"mamba_d_state": 8}},
            {"vision_config": {"mamba_d_state": 8}, "mamba_d_state": 4},
        ),
    ],
)
def test_files_need_not_look_like_the_config_in_memory(content, expected):
    config = LlavaConfig(text_config=bamba(), vision_config=CLIPVisionConfig())
    write_config_fields(content, {"mamba_d_state": 4}, config)
    assert content == expected


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        # as state-spaces publishes Mamba
        (
            {"d_model": 32, "d_inner": 64, "intermediate_size": 64, "expand": 2, "ssm_cfg": {}},
            {"intermediate_size": 32},
            {"d_model": 32, "d_inner": 32, "intermediate_size": 32, "expand": 1, "ssm_cfg": {}},
        ),
        # a whole number cannot say this; the loader reads intermediate_size
        (
            {"hidden_size": 32, "d_inner": 64, "expand": 2},
            {"intermediate_size": 48},
            {"hidden_size": 32, "d_inner": 48, "expand": 2, "intermediate_size": 48},
        ),
        (
            {"state_size": 16, "d_state": 16, "ssm_cfg": {"d_state": 16, "d_conv": 4}},
            {"state_size": 4},
            {"state_size": 4, "d_state": 4, "ssm_cfg": {"d_state": 4, "d_conv": 4}},
        ),
    ],
)
def test_other_names_of_a_size_follow(content, fields, expected):
    write_config_fields(content, fields, MambaConfig(hidden_size=32))
    assert content == expected


@pytest.mark.parametrize(
    ("family", "fields", "stale", "expected"),
    [
        ("nemotron_h", {"mamba_num_heads": 4, "mamba_head_dim": 8}, {"expand": 2}, {"expand": 1}),
        (
            "falcon_h1",
            {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
            {"mamba_expand": 2, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4},
            {"mamba_expand": 1, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4},
        ),
        ("jamba", {"mamba_expand": 1}, {"intermediate_size": 48}, {"intermediate_size": 48}),
        ("zamba2", {"n_mamba_heads": 4, "mamba_headdim": 8, "mamba_expand": 1},
         {"intermediate_size": 48}, {"intermediate_size": 48}),
    ],
)  # fmt: skip
def test_hybrids_keep_what_is_of_attention_and_mlp(family, fields, stale, expected):
    config = tiny_model(family).config
    assert {name: getattr(config, name) for name in stale} == stale
    content = config.to_dict()
    apply_config_fields(config, fields)
    write_config_fields(content, fields, config)
    for name, value in {**fields, **expected}.items():
        assert getattr(config, name) == content[name] == value


def test_a_wrapped_model_loads_again(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(text_config=bamba(), vision_config=vision, image_token_index=VOCAB - 1)
    torch.manual_seed(0)
    dense = tmp_path / "dense"
    LlavaForConditionalGeneration(config).save_pretrained(dense)
    # copies on the top level, as files of composite models have them at times
    content = json.loads((dense / "config.json").read_text())
    content |= {"mamba_d_state": 8, "d_inner": 64}
    (dense / "config.json").write_text(json.dumps(content))
    model = LlavaForConditionalGeneration.from_pretrained(dense).eval()
    recipe = [
        StateRemovalModifier(keep=4, saliency="last", compensate="none"),
        ChannelRemovalModifier(keep=4, axis="heads", saliency="magnitude", compensate="none"),
    ]
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(tmp_path / "pruned")
    content = json.loads((tmp_path / "pruned" / "config.json").read_text())
    text = content["text_config"]
    assert content["mamba_d_state"] == text["mamba_d_state"] == 4
    assert content["d_inner"] == text["mamba_n_heads"] * text["mamba_d_head"] == 32
    assert text["mamba_expand"] == 1
    assert content["vision_config"]["intermediate_size"] == 64
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "pruned").eval()
    assert [a.sizes for a in find_mixers(loaded)] == [a.sizes for a in find_mixers(model)]
    ids = batches(count=1)[0]["input_ids"] % (VOCAB - 1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert same_logits(logits_beside(loaded, expected, ids), expected)


def test_a_config_that_the_weights_contradict_is_refused():
    model = tiny_model("bamba")
    model.config = Composite(llm_config=model.config)
    model.config.llm_config.mamba_d_state = 16
    with pytest.raises(SparseSSMError, match="the config says mamba_d_state = 16"):
        StateRemovalModifier(keep=4).matching_mixers(model)


def test_a_language_model_alone_is_written_to_its_level_of_the_file():
    """In memory the config is flat, and the file is of the model that holds the language model."""
    config = tiny_model("qwen3_5").config
    content = {"model_type": "qwen3_5", "text_config": {"linear_key_head_dim": 8}}
    write_config_fields(content, {"linear_key_head_dim": 4}, config)
    assert content == {"model_type": "qwen3_5", "text_config": {"linear_key_head_dim": 4}}
    content = {"text_config": {"hidden_size": 32}, "linear_key_head_dim": 8}
    write_config_fields(content, {"linear_key_head_dim": 4}, config)  # where it was stated
    assert content == {"text_config": {"hidden_size": 32}, "linear_key_head_dim": 4}


@pytest.mark.parametrize(
    ("letters", "interval"), [("llfllf", 3), ("lfl", 2), ("ff", 1), ("lll", None), ("fll", None)]
)
def test_the_interval_of_attention_follows_the_layers(letters, interval):
    """mlx-lm and llama.cpp read it in the place of the list."""
    kinds = [{"l": "linear_attention", "f": "full_attention"}[letter] for letter in letters]
    config = tiny_model("qwen3_next").config
    fields = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    content = {"num_hidden_layers": 8, "full_attention_interval": 4}
    write_config_fields(content, fields, config)
    assert content == {**fields, "full_attention_interval": interval}
    assert "full_attention_interval" not in _written({"num_hidden_layers": 8}, fields, config)


def _written(content, fields, config):
    write_config_fields(content, fields, config)
    return content
