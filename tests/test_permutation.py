"""Channels in another order: the model computes the same, and groups of n:m lose less."""

from itertools import combinations

import pytest
import torch
from conftest import (
    DELTA,
    FAMILIES,
    VOCAB,
    batches,
    check_reload_all,
    save_with_logits,
    state,
    tiny_model,
)

from sparsessm_plugin import SensitivitySparseGPTModifier, SparseSSMError
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.dependency_graph import MixerDependencyGraph, ModelDependencyGraph
from sparsessm_plugin.dependency_graph.permutation import channel_orders, is_movable, permute
from sparsessm_plugin.families import find_mixers, get_tensor
from sparsessm_plugin.methods.projections import (
    ProjectionPruning,
    ProjectionSettings,
    prune_projections,
)
from sparsessm_plugin.selection.columns import lost_in_groups, order_columns
from sparsessm_plugin.selection.masks import keep_in_groups

EVERY = (*FAMILIES, *DELTA)
IDS = torch.randint(1, VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))


def model_of(family, **changes):
    """A tiny model none of whose vectors is the same everywhere, as norms' are at first."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter))
    return model.cpu()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def shuffled(order, generator):
    size = order.length // order.blocks
    parts = [torch.randperm(size, generator=generator) + b * size for b in range(order.blocks)]
    return torch.cat(parts)


# -- the order itself ------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "blocks"), [(2, 4, 1), (2, 4, 4), (8, 16, 2), (1, 4, 2)])
def test_an_order_keeps_to_its_blocks_and_loses_no_more(n, m, blocks):
    generator = torch.Generator().manual_seed(n + m + blocks)
    scores = torch.rand(24, 64, generator=generator) * torch.rand(64, generator=generator)
    order = order_columns(scores, n, m, blocks)
    of_block = order.view(blocks, -1)
    wanted = torch.arange(64).view(blocks, -1)
    assert torch.equal(of_block.sort(-1).values, wanted)
    now, before = (float(lost_in_groups(s, n, m)) for s in (scores[:, order], scores))
    assert now < before


def test_what_groups_lose_is_what_a_mask_by_the_same_scores_takes():
    scores = torch.rand(7, 48, generator=torch.Generator().manual_seed(0))
    for n, m in ((2, 4), (8, 16), (1, 4)):
        taken = scores[~keep_in_groups(scores, n, m)].sum()
        torch.testing.assert_close(lost_in_groups(scores, n, m), taken)


def test_an_order_is_nearly_the_best_of_all():
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        scores = torch.rand(6, 8, generator=generator) ** 3
        every = []
        for first in combinations(range(8), 4):
            rest = [i for i in range(8) if i not in first]
            every.append(float(lost_in_groups(scores[:, [*first, *rest]], 2, 4)))
        found = float(lost_in_groups(scores[:, order_columns(scores, 2, 4)], 2, 4))
        assert min(every) <= found + 1e-6
        assert found <= min(every) + 0.2 * (max(every) - min(every))


def test_columns_that_serve_the_same_rows_are_parted():
    # rows read either half of the columns, which stand side by side: half of all are needed
    scores = torch.block_diag(*[torch.ones(4, 4) for _ in range(8)])
    assert lost_in_groups(scores, 2, 4) == 64
    assert lost_in_groups(scores[:, order_columns(scores, 2, 4)], 2, 4) == 0


@pytest.mark.parametrize("scores", [torch.zeros(3, 8), torch.ones(3, 8)])
def test_an_order_that_cannot_help_stays(scores):
    assert order_columns(scores, 2, 4).tolist() == list(range(8))


# -- all that has to follow ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("orders")


@pytest.mark.parametrize("family", EVERY)
def test_the_model_computes_the_same_in_any_order(family, saved):
    model = model_of(family)
    expected, held = logits(model), {n: id(p) for n, p in model.named_parameters()}
    before = state(model)
    orders = channel_orders(model)
    assert all(is_movable(model, order) for order in orders)
    assert len(orders) > len(find_mixers(model))
    generator = torch.Generator().manual_seed(0)
    permute(model, [(order, shuffled(order, generator)) for order in orders])
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert {n: id(p) for n, p in model.named_parameters()} == held
    mixer = find_mixers(model)[0]
    changed = f"{mixer.name}.{mixer.projection(mixer.exit_kind).path}.weight"
    assert not torch.equal(state(model)[changed], before[changed])
    save_with_logits(model, saved / family)


def test_models_in_another_order_load_without_the_package(saved):
    if not list(saved.iterdir()):  # run alone
        save_with_logits(model_of("mamba"), saved / "mamba")
    check_reload_all(saved)


@pytest.mark.parametrize("family", EVERY)
def test_places_are_what_the_dependency_graph_removes_together(family):
    model = model_of(family)
    orders = {order.name: order for order in channel_orders(model)}
    for adapter in find_mixers(model):
        order = orders[f"{adapter.name}.{adapter.channel_axis}"]
        axis = adapter.channel_axis
        heads = order.blocks if axis == "head_dim" else 1  # a channel of every head goes at once
        removed = [1] if adapter.groups_of(axis) == 1 else [1, 1 + order.length // 2]
        units = [h * (order.length // heads) + i for h in range(heads) for i in removed]
        group = MixerDependencyGraph(adapter).get_axis_group(axis, removed)
        found = {}
        for (name, dim), places in order.places.items():
            inside = name.removeprefix(f"{adapter.name}.")
            found[inside, dim] = sorted(places[:, units].flatten().tolist())
        assert found == {(c.tensor, c.dim): list(c.positions) for c in group.changes}
    try:
        hidden = ModelDependencyGraph(model).get_axis_group("hidden", [5])
    except SparseSSMError:
        return
    found = {where: places[:, 5].tolist() for where, places in orders["hidden"].places.items()}
    assert found == {(c.tensor, c.dim): list(c.positions) for c in hidden.changes}


@pytest.mark.parametrize("family", EVERY)
def test_grids_are_the_positions_of_every_index(family):
    for adapter in find_mixers(tiny_model(family)):
        for axis in adapter.axis_names:
            length = adapter.axis_length(axis)
            for where in adapter.axes(axis):
                grid = where.grid(length)
                assert grid.shape == (where.repeat, where.block, length)
                for i in (0, length - 1):
                    assert grid[..., i].flatten().tolist() == where.positions([i])


# -- as a part of pruning --------------------------------------------------------------------


def errors(model, **fields):
    result = prune_projections(model, batches(), mask_structure="2:4", **fields)
    return result, {p.name: p.relative_error for p in result.layers}


@pytest.mark.parametrize("family", ["mamba", "zamba", "nemotron_h", "qwen3_5"])
@pytest.mark.parametrize("solver", ["alps", "wanda", "magnitude"])
def test_less_is_lost(family, solver):
    fields = {"solver": solver, "target_output": "own"}
    plain, moved = model_of(family), model_of(family)
    result, _ = errors(plain, **fields, permute_channels=False)
    assert result.permuted == ()
    assert "permuted" not in result.to_dict()
    result, _ = errors(moved, **fields)
    assert any(axis.lost < 0.95 for axis in result.permuted)
    assert all(axis.lost <= 1 for axis in result.permuted)
    assert result.to_dict()["permuted"][0]["name"] == result.permuted[0].name
    for p in result.layers:
        weight = get_tensor(moved, p.name)
        weight = weight if isinstance(weight, torch.Tensor) else weight.weight
        assert ((weight == 0).unflatten(-1, (-1, 4)).sum(-1) >= 2).all()


def test_only_what_reads_along_groups_decides():
    model = model_of("mamba")
    result, _ = errors(model, targets=["re:.*out_proj$"])
    names = [f"{adapter.name}.channels" for adapter in find_mixers(model)]
    assert [axis.name for axis in result.permuted] == names
    result, _ = errors(model_of("mamba"), targets=["re:.*in_proj$"])
    assert [axis.name for axis in result.permuted] == ["hidden"]


def test_zeros_of_an_earlier_pruning_keep_their_order():
    model = model_of("mamba")
    errors(model, targets=["re:.*out_proj$"])
    before = state(model)
    result, _ = errors(model, targets=["re:.*x_proj$"])
    assert result.permuted == ()
    for name, value in state(model).items():
        assert torch.equal(value, before[name]) or name.endswith("x_proj.weight"), name


def test_channels_of_a_head_that_are_no_whole_groups_stay():
    model = model_of("mamba2", head_dim=2, num_heads=32)
    result, _ = errors(model)
    assert [axis.name for axis in result.permuted] == ["hidden"]


def test_unstructured_zeros_leave_the_order():
    with pytest.raises(ValueError, match="permute_channels has no meaning without groups"):
        SensitivitySparseGPTModifier(sparsity=0.5, permute_channels=True)
    assert SensitivitySparseGPTModifier(sparsity=0.5).permute_channels is False
    assert SensitivitySparseGPTModifier(mask_structure="8:16").permute_channels is True


def test_twice_is_the_same():
    first, second = model_of("mamba"), model_of("mamba")
    for model in (first, second):
        errors(model)
    for name, value in state(first).items():
        assert torch.equal(value, state(second)[name]), name


def test_the_stream_keeps_its_order_while_a_method_holds_dense_inputs():
    model = model_of("mamba")
    fields = {"target_output": "dense", "solver": "sparsegpt"}
    first = ProjectionPruning(ProjectionSettings(sparsity=0.5, targets="x_proj", **fields))
    second = ProjectionPruning(ProjectionSettings(mask_structure="2:4", targets="in_proj"))
    data = CalibrationBatches.draw("a test", batches())
    for method in (first, second):
        method.prepare(model)
    with torch.no_grad():
        first.begin(data)
        second.begin(data)
    assert second.result().permuted == ()
    first.release()
    second.release()
    assert [axis.name for axis in errors(model)[0].permuted if axis.name == "hidden"]
