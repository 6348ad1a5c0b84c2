"""Gated delta nets: their adapters, graphs and scans against transformers' modules."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import (
    DELTA,
    MOE,
    MOE_ROUNDING,
    VOCAB,
    check_reload,
    module_output,
    random_delta,
    recomputed,
    relative,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM

from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.dependency_graph import MixerDependencyGraph, apply_config_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recurrence import delta_chunked, delta_reference, delta_rule
from sparsessm_plugin.recurrence.quantities import DeltaQuantities

# an index set of every axis: a key dimension, or a value head, of each of the two key heads
INDICES = {"key_dims": [1, 5, 8, 15], "value_heads": [2, 3], "value_dims": [0, 4, 11]}


def masks(batch, length):
    ragged = torch.ones(batch, length)
    ragged[0, :7] = 0  # padded on the left
    ragged[1, length // 2 :] = 0  # padded on the right
    return {"none": None, "ragged": ragged}


@pytest.mark.parametrize("mask", ["none", "ragged"])
@pytest.mark.parametrize("family", DELTA)
def test_adapter_recomputes_the_mixer(family, mask):
    for adapter in find_mixers(tiny_model(family)):
        hidden_states = torch.randn(2, 71, 32)  # more than one chunk
        attention_mask = masks(2, 71)[mask]
        expected = module_output(adapter, hidden_states, attention_mask)
        for backend in (None, "chunked", REFERENCE):
            result = recomputed(adapter, hidden_states, attention_mask, backend)
            assert relative(result, expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_5", {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 2}),
        ("qwen3_next", {"linear_num_key_heads": 3, "linear_value_head_dim": 5}),
        ("olmo_hybrid", {"linear_allow_neg_eigval": False, "linear_num_key_heads": 1}),
    ],
    ids=str,
)
def test_adapter_follows_the_config(family, changes):
    adapter = find_mixers(tiny_model(family, **changes))[0]
    hidden_states = torch.randn(2, 19, 32)
    expected = module_output(adapter, hidden_states)
    assert relative(recomputed(adapter, hidden_states), expected) < 1e-4


@pytest.mark.parametrize("family", DELTA)
def test_quantities_are_what_they_are_called(family):
    adapter = find_mixers(tiny_model(family))[0]
    sizes = adapter.sizes
    assert (adapter.family, adapter.recurrence) == (family, "delta_rule")
    assert (sizes.num_k_heads, sizes.head_k_dim) == (2, 8)
    assert (sizes.num_v_heads, sizes.head_v_dim) == (6, 12)
    assert adapter.config_sizes() == {
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 12,
    }
    with torch.no_grad():
        quantities = adapter.quantities(torch.randn(2, 11, 32))
    assert quantities.q.shape == quantities.k.shape == (2, 11, 2, 8)
    assert quantities.v.shape == (2, 11, 6, 12)
    assert quantities.beta.shape == quantities.g.shape == (2, 11, 6)
    assert quantities.z.shape == (2, 11, 72)
    assert (quantities.g < 0).all()
    highest = 2 if family == "olmo_hybrid" else 1
    assert ((quantities.beta > 0) & (quantities.beta < highest)).all()
    norms = quantities.k.norm(dim=-1, keepdim=True)
    expected = quantities.k / (norms.square() + 1e-6).sqrt()
    torch.testing.assert_close(quantities.normalized_k, expected)
    # every projection has its input
    assert set(quantities.inputs) == set(adapter.projections) - {adapter.exit_kind}
    for kind in adapter.entry_kinds:
        assert quantities.inputs[kind].shape == (2, 11, 32)
    convolved = adapter.mixer.conv1d(quantities.inputs["conv1d"].transpose(1, 2))[..., :11]
    parts = (quantities.q, quantities.k, quantities.v)
    expected = torch.cat([x.flatten(2) for x in parts], dim=-1)
    torch.testing.assert_close(nn.functional.silu(convolved).transpose(1, 2), expected)


@pytest.mark.parametrize("family", DELTA)
def test_traced_ranges_are_those_that_the_adapter_declares(family):
    adapter = find_mixers(tiny_model(family))[0]
    graph = MixerDependencyGraph(adapter)
    hidden_states = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = adapter.mixer(hidden_states)
        for axis, indices in INDICES.items():
            assert relative(graph.model[axis](hidden_states), expected) < 1e-5
            group = graph.get_axis_group(axis, indices)
            declared = {}
            for where in adapter.axes(axis):
                found = declared.setdefault((where.tensor, where.dim), set())
                found.update(where.positions(indices))
            assert {(c.tensor, c.dim): set(c.positions) for c in group.changes} == declared


@pytest.mark.parametrize("axis", ["key_dims", "value_heads"])
@pytest.mark.parametrize("family", DELTA)
def test_what_added_nothing_is_not_missed(family, axis):
    model = tiny_model(family)
    for adapter in find_mixers(model):
        silence(adapter, axis, INDICES[axis])
    dense, ids = copy.deepcopy(model), torch.randint(1, VOCAB, (2, 15))
    remove(model, axis)
    # queries are divided by sqrt(dk), which the norm cancels but for its epsilon
    with torch.no_grad(), no_epsilon(model), no_epsilon(dense):
        assert relative(model(ids).logits, dense(ids).logits) < 1e-4


@pytest.mark.parametrize("family", DELTA)
def test_a_smaller_model_loads_again_and_generates(family, tmp_path):
    model = tiny_model(family)
    remove(model, *INDICES)
    config = model.config
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (6, 9)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 4)
    ids = torch.randint(1, VOCAB, (1, 15))
    model.save_pretrained(tmp_path / "saved")
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    more = f"""
for cached in (True, False):
    tokens = model.generate(torch.tensor({ids.tolist()}), max_new_tokens=4, do_sample=False,
                            use_cache=cached)
    assert tokens.tolist() == {tokens}
"""
    check_reload(model, tmp_path / "saved", more, MOE_ROUNDING if family in MOE else 0.0)


def remove(model, *axes):
    for axis in axes:
        for adapter in find_mixers(model):
            group = MixerDependencyGraph(adapter).get_axis_group(axis, INDICES[axis])
            group.prune()
        apply_config_fields(model.config, group.config_fields)


@contextmanager
def no_epsilon(model):
    norms = [adapter.norm for adapter in find_mixers(model)]
    before = [norm.variance_epsilon for norm in norms]
    for norm in norms:
        norm.variance_epsilon = 1e-20
    yield
    for norm, epsilon in zip(norms, before, strict=True):
        norm.variance_epsilon = epsilon


def silence(adapter, axis, indices):
    """Let key dimensions be zero in every key and query, or value heads add nothing."""
    with torch.no_grad():
        for where in adapter.axes(axis):
            tensor = adapter.mixer.get_parameter(where.tensor)
            reads = where.tensor.startswith(adapter.exit_kind) or where.tensor == "conv1d.weight"
            if reads:
                tensor.index_fill_(where.dim, torch.tensor(where.positions(indices)), 0)


@pytest.mark.parametrize("length", [1, 8, 21])
def test_chunks_compute_what_the_recurrence_does(length):
    quantities = random_delta(length=length)
    for start in (None, torch.randn(2, 4, 5, 3)):
        y, last = delta_reference.scan(quantities, start)
        for chunk in (1, 4, 8, 64):
            got = delta_chunked.scan(quantities, start, chunk)
            assert relative(got[0], y) < 1e-5
            assert relative(got[1], last) < 1e-5


@pytest.mark.parametrize(
    "shape", [(2, 21, 2, 2, 5, 3), (1, 1, 1, 3, 8, 33), (1, 40, 1, 2, 128, 64)], ids=str
)
def test_numba_computes_what_the_recurrence_does(shape):
    quantities = random_delta(*shape)
    H, dk, dv = quantities.v.shape[2], *shape[-2:]
    for start in (None, torch.randn(shape[0], H, dk, dv)):
        y, last = delta_rule.scan_with_state(quantities, start, REFERENCE)
        got = delta_rule.scan_with_state(quantities, start, "cpu")
        assert relative(got[0], y) < 1e-5
        assert relative(got[1], last) < 1e-5


def test_a_text_in_two_parts_gives_what_it_gives_as_a_whole():
    quantities = random_delta(length=30)
    y, last = delta_rule.scan_with_state(quantities)
    names = ("q", "k", "v", "beta", "g", "z")
    parts = [
        DeltaQuantities(**{name: getattr(quantities, name)[:, part] for name in names})
        for part in (slice(0, 11), slice(11, 30))
    ]
    first, state = delta_rule.scan_with_state(parts[0])
    second, end = delta_rule.scan_with_state(parts[1], state)
    assert relative(torch.cat([first, second], dim=1), y) < 1e-5
    assert relative(end, last) < 1e-5


def test_gradients_of_the_chunks_are_those_of_the_recurrence():
    names = ("q", "k", "v", "beta", "g")
    found = []
    for scan in (delta_reference.scan, delta_chunked.scan):
        quantities = random_delta(length=11)
        for name in names:
            getattr(quantities, name).requires_grad_()
        y, last = scan(quantities)
        (y.square().sum() + last.sum()).backward()
        found.append([getattr(quantities, name).grad for name in names])
    for expected, gradient in zip(*found, strict=True):
        assert relative(gradient, expected) < 1e-4


def test_kimi_linear_is_refused_by_name():
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        linear_head_dim=8,
        linear_num_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SparseSSMError, match="gates each key dimension of Kimi Linear"):
        find_mixers(model)
