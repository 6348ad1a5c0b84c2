"""Methods on a plain model, without LLM Compressor."""

import pytest
import torch
from conftest import MAMBA1, Loader, batches, fresh_process, state, tiny_model
from llmcompressor import active_session, oneshot

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods import prune_transitions


def by_recipe(family, modifier, fields, data, pipeline="sequential"):
    """The model that LLM Compressor makes with one modifier."""
    model = tiny_model(family)
    active_session().reset()
    recipe = {"prune_stage": {"prune_modifiers": {modifier: fields}}}
    oneshot(
        model=model,
        recipe=str(recipe),  # a mapping in Python's words is YAML, too
        dataset=Loader(data),
        processor=object(),  # of no use, as the data are token ids
        pipeline=pipeline,
    )
    return model


def same_bits(one, other):
    one, other = state(one), state(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("family", MAMBA1)
@pytest.mark.parametrize("padded", [False, True])
def test_transitions_as_by_recipe(family, padded):
    fields = {"sparsity": 0.5}
    data = batches(count=3, length=30, padded=padded)
    model = tiny_model(family)
    result = prune_transitions(model, data, **fields)
    assert same_bits(model, by_recipe(family, "SparseSSMModifier", fields, data))
    assert [layer.sparsity for layer in result.layers] == [0.5] * len(result.layers)
    assert result.total.pruned == sum(layer.pruned for layer in result.layers)


def test_nothing_of_llm_compressor_is_needed():
    found = fresh_process(
        """
import json, sys
import sparsessm_plugin.methods
found = [name for name in sys.modules if name.partition(".")[0] == "llmcompressor"]
found += [name for name in sys.modules if name.startswith("sparsessm_plugin.modifiers")]
print(json.dumps(found))
"""
    )
    assert found == []


def test_a_method_that_fails_leaves_the_model_alone():
    model = tiny_model("mamba")
    before = state(model)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    zeros = torch.zeros(2, 5, dtype=torch.long)
    empty = {"input_ids": zeros, "attention_mask": zeros}
    with pytest.raises(SparseSSMError, match="all 4 samples are empty"):
        prune_transitions(model, [empty, empty], sparsity=0.5)
    bad = {"input_ids": torch.full((2, 5), 10**6)}
    with pytest.raises(SparseSSMError, match="1000000"):
        prune_transitions(model, [bad], sparsity=0.5)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    assert "forward" not in vars(model.backbone.layers[0].mixer)
