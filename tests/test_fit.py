"""One target for a whole model: what is counted, what is chosen, and what a run leaves."""

import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    DEMO,
    DEVICE,
    GPU_SUMS,
    Loader,
    batches,
    divergence_from,
    run,
    saved_tiny_model,
    state,
    tiny_model,
    with_images,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sparsessm_plugin import (
    ChannelRemovalModifier,
    SparseSSMError,
    StateRemovalModifier,
    fit,
    fitting,
)
from sparsessm_plugin.dependency_graph import (
    MixerDependencyGraph,
    ModelDependencyGraph,
    apply_config_fields,
)
from sparsessm_plugin.evaluation.latency import DECODE, Latency, Timing, cache_bytes
from sparsessm_plugin.families import find_mixers, get_model_adapter
from sparsessm_plugin.fitting import FitSettings, Prepared, make_plan, split
from sparsessm_plugin.fitting.axes import AXES, Axis, in_order, register_axis
from sparsessm_plugin.fitting.choice import (
    OVERLAP,
    best_mixes,
    corrected,
    fit_overlap,
    front,
    interpolated,
    mixed_losses,
    nearest_mix,
)
from sparsessm_plugin.fitting.costs import Census, Ladder, Space, counted
from sparsessm_plugin.fitting.losses import Copies, HeldBack, Shared, Trials
from sparsessm_plugin.fitting.shapes import Shapes, shallow_shapes
from sparsessm_plugin.fitting.targets import parse_target, parse_targets
from sparsessm_plugin.fitting.timing import (
    FEATURES,
    SpeedModel,
    Timed,
    Workload,
    features_of,
    nonnegative_least_squares,
    time_models,
)
from sparsessm_plugin.methods.channels_along import choose_along
from sparsessm_plugin.methods.run import run_in_turn
from sparsessm_plugin.recipes import load_recipe, parse_recipe

# -- the optimiser ----------------------------------------------------------------------------

ladders = st.lists(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60)
@given(losses=ladders, costs=ladders, limit=st.floats(0.3, 1), overlap=st.floats(0, 1))
@example(losses=[[1.0]], costs=[[1 - 2**-53]], limit=0.375, overlap=0.0)  # equal but for rounding
def test_the_choice_is_the_best_of_all_mixes(losses, costs, limit, overlap):
    """Losses rise and costs fall along every axis; an oracle that walks through all mixes."""
    sizes = [min(len(a), len(b)) for a, b in zip(losses, costs, strict=False)]
    tables = [np.cumsum([0, *own[:n]]) for own, n in zip(losses, sizes, strict=False)]
    shares = [np.cumprod([1, *own[:n]]) for own, n in zip(costs, sizes, strict=False)]
    grid = mixed_losses(tables, overlap)
    cost = np.ones(grid.shape)
    for mix in itertools.product(*(range(len(table)) for table in tables)):
        single = [table[i] for table, i in zip(tables, mix, strict=True)]
        pairs = sum(np.sqrt(a * b) for a, b in itertools.combinations(single, 2))
        assert grid[mix] == pytest.approx(sum(single) + 2 * overlap * pairs, abs=1e-9)
        cost[mix] = np.prod([share[i] for share, i in zip(shares, mix, strict=True)])
    most = limit * (1 + 1e-12)  # costs are rounded
    reach = [mix for mix in np.ndindex(grid.shape) if cost[mix] <= most]
    found = best_mixes(grid, [cost], [limit], 3)
    assert bool(found) == bool(reach)
    if reach:
        assert grid[found[0]] == min(grid[mix] for mix in reach)
        assert [grid[mix] for mix in found] == sorted(grid[mix] for mix in found)
    for mix in found:  # nothing is removed without need
        assert cost[mix] <= most
        for place in range(len(mix)):
            larger = tuple(i - (p == place) for p, i in enumerate(mix))
            assert mix[place] == 0 or cost[larger] > most
    assert cost[nearest_mix([cost], [limit])] == pytest.approx(cost.min(), rel=1e-12)
    for mix in front(grid, cost):
        assert not np.any((grid <= grid[mix]) & (cost < cost[mix]))


def test_several_limits_hold_together():
    losses = np.add.outer(np.arange(3.0), np.arange(3.0) * 1.5)
    first, second = (np.broadcast_to(x, (3, 3)) for x in (np.array([[4], [2], [1]]), [4, 2, 1]))
    assert best_mixes(losses, [first, second], [2, 2]) == [(1, 1)]
    assert best_mixes(losses, [first, second], [0.5, 2]) == []
    broken = losses.copy()
    broken[1, 1] = np.nan
    assert best_mixes(broken, [first, second], [2, 2]) == [(2, 1)]


def test_losses_between_measured_sizes_follow_a_power_and_never_fall():
    sizes = (100, 90, 80, 60, 20)
    exact = {size: 3 * (1 - size / 100) ** 1.7 for size in sizes[1:]}
    known = {size: exact[size] for size in (90, 60)}
    found = interpolated(sizes, known)
    assert found == pytest.approx([0, *exact.values()])
    assert interpolated(sizes, {80: 0.4}) == pytest.approx([0, 0.1, 0.4, 1.6, 6.4])
    noisy = interpolated(sizes, {90: 0.2, 60: 0.1})
    assert noisy[2] >= 0.2
    assert noisy[-1] >= 0.1
    assert np.isinf(interpolated(sizes, {})[1:]).all()


def test_the_overlap_is_found_in_what_mixes_lose():
    mixes = [((a, b), a + b + 2 * 0.4 * (a * b) ** 0.5) for a, b in ((1, 1), (0.5, 2), (3, 1))]
    assert fit_overlap(mixes, strength=0) == pytest.approx(0.4)
    assert OVERLAP < fit_overlap(mixes[:1]) < 0.4  # a single one convinces less
    assert 0 < fit_overlap([((1.0, 1.0), 2.0)]) < OVERLAP / 2
    assert fit_overlap([]) == pytest.approx(OVERLAP)


def test_a_mix_that_was_tried_tells_of_those_nearby():
    tables = [np.array([0, 0.1, 0.4]), np.array([0, 0.11, 0.12, 3.0])]
    predicted = mixed_losses(tables)
    found = corrected(predicted, tables, {(1, 1): 0.42})
    ratio = found / np.where(predicted == 0, 1, predicted)
    assert found[1, 1] == 0.42
    assert 1.4 < ratio[1, 2] < 2
    assert ratio[1, 2] > ratio[2, 1] > ratio[1, 3] == pytest.approx(1, abs=1e-6)
    assert corrected(predicted, tables, {}) == pytest.approx(predicted)


# -- what is counted --------------------------------------------------------------------------


def tiny_ladders(model):
    """Two or three sizes of every axis that the loader can make, the modifiers aside."""
    shapes, found = Shapes(model), []
    wanted = {"layers": (1, 2), "hidden": (16,), "mlp": (32, 16), "kv_groups": (1,)}
    for axis in in_order(AXES):
        length = axis.length(model)
        if length is None:
            continue
        candidates = wanted.get(axis.name, (length // 2,))
        sizes = []
        for size in sorted((s for s in candidates if s < length), reverse=True):
            try:
                shapes.model({axis.name: size})
            except SparseSSMError:
                continue
            sizes.append(size)
        if sizes:
            found.append(Ladder(axis.name, (length, *sizes)))
    return shapes, found


def removed_for_real(model, sizes, kept):
    """A real model after the removal of the last of everything over its dependency graphs."""
    for axis in in_order(sizes):
        size, adapter = sizes[axis.name], get_model_adapter(model)
        if axis.length(model) in (size, None):  # gone along with an earlier axis
            continue
        graph = ModelDependencyGraph(model)
        if axis.name == "layers":
            gone = [i for i in range(adapter.axis_length("layers")) if i not in kept]
            graph.get_axis_group("layers", gone).prune()
        elif axis.name == "hidden":
            way = axis.way(model, size, "transformers").get("channels")
            along, channels = choose_along(adapter, size, way), None
            if along.axis is not None:
                channels = {
                    m.name: _last_of_groups(m, along.axis, along.keep) for m in find_mixers(model)
                }
            gone = range(size, adapter.hidden_size)
            graph.get_axis_group("hidden", gone, channels, along.axis).prune()
        elif axis.name in ("mlp", "kv_groups"):
            graph.get_axis_group(axis.name, range(size, adapter.axis_length(axis.name))).prune()
        else:
            for mixer in find_mixers(model):
                own = "state" if axis.name == "states" else "head_dim"
                own = "channels" if "channels" in mixer.axis_names and own != "state" else own
                groups = mixer.groups_of(own)
                group = MixerDependencyGraph(mixer).get_axis_group(
                    own, _last_of_groups(mixer, own, size * (groups if own == "state" else 1))
                )
                group.prune()
            apply_config_fields(model.config, group.config_fields)
    return model


def _last_of_groups(mixer, axis, kept):
    """The last indices of each group that has to lose equally many."""
    length, groups = mixer.axis_length(axis), mixer.groups_of(axis)
    if "channels" in mixer.axis_names and axis == "channels":
        groups = mixer.sizes.n_groups
    own, left = length // groups, kept // groups
    return [g * own + i for g in range(groups) for i in range(left, own)]


def test_counts_are_those_of_models_that_are_made_and_run(family, tmp_path):
    """Every mix against its config's model, some against a real removal, its file and cache."""
    model = tiny_model(family, num_hidden_layers=3) if family == "mamba" else tiny_model(family)
    shapes, found = tiny_ladders(model)
    assert {"states"} < {ladder.axis for ladder in found}
    space = Space(shapes, found)
    grid = space.quantities()
    assert grid.shape[:-1] == space.shape
    assert grid[(0,) * len(found)] == pytest.approx(Census.of(model).total())
    mixes = list(np.ndindex(space.shape))
    checked = 0
    for mix in mixes[:: max(1, len(mixes) // 12)] + mixes[-1:]:
        try:
            exact = space.count(space.sizes(mix))
        except SparseSSMError:
            assert np.isnan(grid[mix]).all()
            continue
        checked += 1
        if family not in ("zamba", "zamba2"):  # whose layers share blocks; see the next test
            assert grid[mix] == pytest.approx(exact), space.sizes(mix)
    assert checked > 1
    real = [mix for mix in mixes[1:] if np.isfinite(grid[mix]).all()]
    for mix in real[-1:]:
        sizes = space.sizes(mix)
        small = removed_for_real(tiny_model(family, **_like(model)), sizes, space.kept_of(sizes))
        exact = space.count(sizes)
        assert counted("parameters", exact, 7) == sum(p.numel() for p in small.parameters())
        small.save_pretrained(tmp_path)
        assert counted("memory", exact, 7) == _bytes_stored(tmp_path / "model.safetensors")
        ids = torch.ones(2, 7, dtype=torch.long)
        with torch.no_grad():
            output = small(input_ids=ids, use_cache=True)
        cache = getattr(output, "past_key_values", None) or output.cache_params
        assert counted("state", exact, 7) == cache_bytes(cache, 2).total


def _like(model):
    return {} if model.config.model_type != "mamba" else {"num_hidden_layers": 3}


def _bytes_stored(file):
    with safe_open(file, "pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118


def test_bfloat16_weights_count_two_bytes_and_states_four():
    space = Space(Shapes(tiny_model("mamba"), torch.bfloat16), [])
    total, dense = space.dense.total(), tiny_model("mamba")
    parameters = sum(p.numel() for p in dense.parameters())
    assert counted("memory", total, 1) == 2 * parameters
    with torch.no_grad():
        output = dense.bfloat16()(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True)
    assert counted("state", total, 1) == cache_bytes(output.cache_params, 1).total


# -- time -------------------------------------------------------------------------------------


def test_times_are_fitted_by_what_never_is_negative():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.5, 2, (12, 4))
    weights = np.array([0.3, 0.0, 2.0, 0.7])
    assert nonnegative_least_squares(rows, rows @ weights) == pytest.approx(weights, abs=1e-9)
    below = nonnegative_least_squares(rows, rows @ np.array([1.0, -0.5, 1.0, 1.0]))
    assert (below >= 0).all()


def test_the_speed_model_predicts_what_follows_its_parts():
    space = Space(Shapes(tiny_model("mamba")), [Ladder("states", (8, 6, 4, 2))])
    workload, grid = Workload(4, 16), space.quantities()
    features = features_of(grid, workload)
    assert features.shape == (4, len(FEATURES))
    assert features[0, 1] == 2
    weights = np.array([2.0, 0.5, 30.0, 10.0, 4.0, 1.0, 3.0])
    model = SpeedModel(workload, "cpu")
    model.add([Timed({}, 2, float(row @ weights), tuple(row)) for row in features[[0, 1, 3]]])
    assert model.milliseconds(grid) == pytest.approx(features @ weights)
    assert model.error() < 1e-6


@pytest.mark.parametrize(("family", "phase"), [("mamba", "prefill"), ("bamba", "decode")])
def test_models_of_other_sizes_and_depths_are_timed(family, phase):
    model = tiny_model(family, num_hidden_layers=3)
    space = Space(Shapes(model), [Ladder("layers", (3, 2)), Ladder("states", (8, 4))])
    workload, device = Workload(2, 24, phase), torch.device("cpu")
    mixes = [{}, {"states": 4}, {"layers": 2, "states": 4}]
    timed = time_models(space, mixes, workload, device, repeats=1)
    assert [entry.layers for entry in timed] == [3, 3, 2]
    assert all(entry.milliseconds > 0 for entry in timed)
    constant, layers, weights, _, states, attending, attended = timed[0].features
    assert (constant, layers, attending) == (1, 3, float(family == "bamba"))
    assert (attended > 0) == (family == "bamba")
    assert timed[1].features[2] < weights
    assert timed[1].features[4] < states
    shallow = space.shapes.shallow(2)
    (found,) = time_models(space, mixes[-1:], workload, device, repeats=1, shapes=shallow)
    assert found.layers == 2
    assert found.features[5] == float(family == "bamba")  # every kind of layer is among them


def test_shallow_models_tell_layers_of_each_kind_apart():
    """A hybrid of another share of attention is predicted by times that follow its parts."""
    kinds = ["attention" if index % 5 == 4 else "mamba" for index in range(20)]
    model = tiny_model("granitemoehybrid", num_hidden_layers=20, layer_types=kinds)
    space = Space(Shapes(model), [Ladder("states", (8, 4))])
    workload = Workload(128, 2048)

    def milliseconds(counts):  # states are read and written, what attention keeps is read
        _, _, recurrent, attended, layers, *_, attending = counts
        return (layers - attending) + 7 * attending + recurrent / 1e4 + attended / 1e3

    timed = []
    for shapes in shallow_shapes(space.shapes, (3, 6)):
        for sizes in ({}, {"states": 4}):
            counts = Census.of(shapes.model(sizes)).total()
            row = tuple(features_of(counts, workload))
            timed.append(Timed(sizes, 0, milliseconds(counts), row))
    speed = SpeedModel(workload, "cpu")
    speed.add(timed)
    assert speed.error() < 1e-6
    whole = space.dense.total()
    assert float(speed.milliseconds(whole)) == pytest.approx(milliseconds(whole), rel=0.01)


# -- targets ----------------------------------------------------------------------------------


def test_targets_are_read():
    assert parse_target("parameters=0.7").limit(1000) == pytest.approx(700)
    assert parse_target("parameters = 20M").limit(3e7) == 2e7
    assert parse_target("memory=1.5GB").limit(2e9) == 1.5e9
    assert parse_target("memory=2MiB").limit(2e9) == 2 * 2**20
    assert parse_target("state=0.25").limit(8) == 2
    assert parse_target("state=25e-2").limit(8) == 2
    assert parse_target("parameters=2e7").limit(3e7) == 2e7
    assert parse_target("speed=1.5").limit(3) == 2
    assert [t.kind for t in parse_targets(["parameters=0.5,speed=2", "state=.5"])] == [
        *("parameters", "speed", "state")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters", "must be parameters, memory, state or speed"),
        ("size=0.5", "must be parameters, memory, state or speed"),
        ("parameters=1.2", "between 0 and 1"),
        ("parameters=0", "between 0 and 1"),
        ("parameters=nan", "between 0 and 1"),
        ("memory=5 apples", "memory=40MB"),
        ("speed=0.9", "a factor between 1 and 100"),
        ("speed=100", "a factor between 1 and 100"),
        ("speed=fast", "a factor between 1 and 100"),
        ("state=0.5,state=0.25", "given twice"),
    ],
)
def test_targets_that_mean_nothing_are_refused(text, said):
    with pytest.raises(SparseSSMError, match=said):
        parse_targets(text)


# -- whole runs -------------------------------------------------------------------------------


def small_mamba(**changes):
    return tiny_model("mamba", hidden_size=64, **changes)


def test_fit_reaches_the_target_and_says_what_came_out():
    model, ready = small_mamba(), batches(8)
    dense = sum(p.numel() for p in model.parameters())
    axes = ("channels", "layers", "states")
    result = fit(model, ready, "parameters=0.8", minutes=0.01, axes=axes)
    left = sum(p.numel() for p in model.parameters())
    assert left <= 0.8 * dense
    assert result.costs["parameters"] == left / dense == result.plan.costs["parameters"]
    plan = result.plan
    assert plan.sizes == {k: v for k, v in result.sizes.items() if v != plan.dense[k]}
    assert {row.axis for row in plan.rows} <= set(axes)
    assert any(row.measured for row in plan.rows)
    assert all(row.loss >= 0 for row in plan.rows)
    assert json.loads(json.dumps(result.to_dict())) == json.loads(json.dumps(result.to_dict()))
    # what the dense model predicted for the text held back, by a pass of its own
    held = HeldBack(small_mamba(), split(ready)[1])
    assert held.divergence(small_mamba()) == pytest.approx(0, abs=1e-5)
    assert held.divergence(model) == pytest.approx(result.loss, rel=1e-3)


def test_the_recipe_repeats_the_sizes_and_without_distillation_the_weights():
    from llmcompressor import oneshot

    model, ready = small_mamba().to(DEVICE), batches(8)  # where oneshot() computes
    result = fit(model, ready, ["state=0.5", "parameters=0.95"], minutes=0.01, axes=("states",))
    again = small_mamba()
    oneshot(model=again, recipe=result.recipe, dataset=Loader(split(ready)[0]))
    assert again.config.state_size == model.config.state_size
    found, wanted = state(model), state(again)
    assert found.keys() == wanted.keys()
    most = 0.0 if DEVICE == "cpu" else GPU_SUMS  # runs on a GPU differ in the last bits
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=most, atol=most, msg=name)
    assert parse_recipe(result.recipe).modifiers[-1].keep == result.sizes["states"]


def test_the_chosen_mix_is_the_least_of_what_was_tried():
    axes = ("channels", "hidden", "states")
    result = fit(small_mamba(), batches(8), "parameters=0.75", minutes=0.05, axes=axes)
    plan = result.plan
    limit = 0.75
    tried = [c.loss for c in plan.candidates if c.costs["parameters"] <= limit]
    single = [r.loss for r in plan.rows if r.measured and r.costs["parameters"] <= limit]
    assert plan.loss == min([*tried, *single])
    for found in plan.alone.values():
        assert found["loss"] >= plan.loss


class Clock:
    """Time that only trials take: so many seconds for a removal along an axis, one to measure."""

    def __init__(self, monkeypatch, **seconds):
        self.seconds = seconds
        self.now = 0.0
        self.trials = []  # the names of axes, and when each ended
        real = Trials.measure
        time = SimpleNamespace(monotonic=lambda: 1000 + self.now)
        for module in ("search", "plan"):
            monkeypatch.setattr(f"sparsessm_plugin.fitting.{module}.time", time)

        def measure(trials, sizes, minutes=0.0):
            steps = tuple((axis.name, sizes[axis.name]) for axis in in_order(sizes))
            left = steps[trials.shared.longest(steps) :]
            found = real(trials, sizes)  # distillation is left out: it ends by another clock
            self.now += 1 + 60 * minutes + sum(seconds[name] for name, _ in left)
            trials.seconds.update({name: seconds[name] for name in trials.seconds})
            trials.measuring = 1.0
            self.trials.append((list(sizes), self.now))
            return found

        monkeypatch.setattr("sparsessm_plugin.fitting.losses.Trials.measure", measure)

    def removals(self, plan):
        """Seconds of a recipe's removals: 7 batches where a trial has one, of states all fits."""
        found = 0.0
        for modifier in parse_recipe(plan.recipe).modifiers:
            axis = next(AXES[name] for name in plan.sizes if _makes(name, modifier))
            whole = axis.name == "states" and modifier.compensate is None
            batches = modifier.calibration_batches or 7
            found += batches * self.seconds[axis.name] * (axis.slower if whole else 1)
        return found


def _makes(name, modifier):
    return type(modifier) is AXES[name].modifier_class


@pytest.mark.parametrize("minutes", [0.1, 1.5, 4, 12, 60])
@pytest.mark.parametrize("target", ["parameters=0.7", "parameters=0.97,state=0.3"])
def test_a_search_ends_by_the_clock(monkeypatch, minutes, target):
    """No trial begins that does not end in time, but for the least, and then one line says so."""
    lines = []
    clock = Clock(monkeypatch, layers=40.0, hidden=20.0, channels=15.0, states=25.0)
    model, (fitted, held) = small_mamba(num_hidden_layers=3), split(batches(8))
    wanted = FitSettings(parse_targets(target), minutes=minutes, search_tokens=1)
    prepared = Prepared(Shapes(model), wanted, torch.device("cpu"))
    kept = "sparsessm_plugin.fitting"
    handle = logger.add(lines.append, level="WARNING", filter=kept, format="{message}")
    try:
        plan = make_plan(prepared, model, fitted, HeldBack(model, held))
    finally:
        logger.remove(handle)
    costs, limits, ladders = prepared.costs(), prepared.limits(), prepared.space.ladders

    def reach(axes):  # some mix of these axes
        mix = tuple(len(own.sizes) - 1 if own.axis in axes else 0 for own in ladders)
        return all(cost[mix] <= limit for cost, limit in zip(costs, limits, strict=True))

    tables, mixes = clock.trials[: -len(plan.candidates) or None], len(plan.candidates)
    measured = [name for (name,), _ in tables]
    late = [place for place, (_, ended) in enumerate(clock.trials) if ended > 60 * minutes]
    for place in late:
        if place < len(tables):
            assert not reach(measured[:place])
        else:
            assert mixes == 1
    spent = clock.now + clock.removals(plan) + 60 * plan.distill_minutes
    assert spent <= 60 * minutes or lines
    assert reach(measured)
    unmeasured = {own.axis for own in ladders} - set(measured)
    assert {entry["axis"] for entry in plan.excluded} >= unmeasured
    assert {row.axis for row in plan.rows} == set(measured)
    json.dumps(plan.to_dict(), allow_nan=False)
    if lines:
        (line,) = lines
        assert line.startswith(f"{minutes:g} minutes are too few: the least")
        assert float(line.rpartition(" ")[2]) > minutes
        assert {m.calibration_batches for m in parse_recipe(plan.recipe).modifiers} == {1}
    if minutes == 60:
        assert not unmeasured
        assert mixes > 1
        assert not any(m.calibration_batches for m in parse_recipe(plan.recipe).modifiers)


def test_what_is_left_of_the_time_is_for_distillation(monkeypatch):
    monkeypatch.setattr("sparsessm_plugin.fitting.search._LEAST_MINUTES", 0.001)
    monkeypatch.setattr("sparsessm_plugin.fitting.search.Search.minutes", 0.0)
    monkeypatch.setattr("sparsessm_plugin.fitting.losses.Trials.removal_seconds", lambda *_: 0.1)
    settings = {"minutes": 0.03, "axes": ("channels",), "generated": 40}
    result = fit(small_mamba(), batches(8), "parameters=0.8", **settings)
    assert 0 < result.plan.distill_minutes <= 0.03
    assert parse_recipe(result.recipe).modifiers[-1].distill_generated == 40
    assert {entry.distilled for entry in result.plan.candidates} <= {None}  # no other to compare
    assert parse_recipe(result.recipe).modifiers[-1].distill_minutes == result.plan.distill_minutes
    assert result.loss < 1.1 * result.plan.loss  # how many steps that were, the machine decides


def test_distillation_suits_what_was_removed():
    trials = Trials(Copies(tiny_model("mamba")), batches(4), 3, None)
    whole = trials.fields({"states": 4, "hidden": 16}, 2.0)
    assert whole["hidden"] == {"keep": 16, "calibration_batches": 3}
    assert whole["states"]["distill_weights"] == "all"
    layers = trials.fields({"states": 4, "layers": 1}, 2.0)["states"]
    assert layers["distill_weights"] == "all_but_vocabulary"
    assert whole["states"]["distill_learning_rate"] > 3e-4
    alone = trials.fields({"states": 4}, 2.0)["states"]
    assert alone == {"keep": 4, "calibration_batches": 3, "distill_minutes": 2.0}
    assert "distill_minutes" not in trials.fields({"states": 4})["states"]


def test_mixes_that_begin_alike_share_it_and_lose_what_they_would_alone():
    """Each mix also on trials of its own, which share nothing; layers, width, channels, states."""
    model, ready = small_mamba(num_hidden_layers=3), batches(8)
    fitted, held = split(ready)
    held_back = HeldBack(model, held)
    shared = Trials(Copies(model), fitted, 2, held_back)
    mixes = [{"hidden": 48}, {"hidden": 32}, {"hidden": 48, "states": 4}, {"layers": 2}]
    mixes += [{"layers": 2, "hidden": 48}, {"layers": 2, "hidden": 32}, mixes[2]]
    for mix in mixes:
        alone = Trials(Copies(model), fitted, 2, held_back, shared=Shared(limit=0))
        found = shared.measure(mix)
        assert found.loss == pytest.approx(alone.measure(mix).loss, rel=1e-5), mix
        assert found.kept == (shared.measure({"layers": 2}).kept if "layers" in mix else None)
    # what was measured of one width serves another
    assert len(shared.shared.carried) == 2
    # a distillation begins behind the last removal that is held, and goes to the dense model
    distilled = shared.measure({"hidden": 48, "channels": 64}, 0.002)
    assert distilled.loss < 1.05 * shared.measure({"hidden": 48, "channels": 64}).loss


def test_finalists_are_compared_after_a_short_distillation(monkeypatch):
    monkeypatch.setattr("sparsessm_plugin.fitting.search._LEAST_MINUTES", 0.001)
    monkeypatch.setattr("sparsessm_plugin.fitting.search.Search.minutes", 0.0)
    monkeypatch.setattr("sparsessm_plugin.fitting.search._FOR_FINALISTS", 1e9)

    def worst(self, root):
        allowed = best_mixes(self.losses(), self.prepared.costs(), self.prepared.limits(), 99)
        return allowed[-1]

    monkeypatch.setattr("sparsessm_plugin.fitting.search.Search._best_by", worst)
    axes = ("channels", "hidden")
    result = fit(small_mamba(), batches(8), "parameters=0.9", minutes=0.02, axes=axes)
    found = [c for c in result.plan.candidates if c.distilled is not None]
    assert len(found) > 1
    best = min(found, key=lambda candidate: candidate.distilled)
    assert result.plan.sizes == best.sizes


@pytest.mark.parametrize("framework", [False, True])
def test_who_distils_last_fits_to_the_model_before_all_removals(framework):
    """Half of the channels go first, which changes far more than one state does."""
    dense, model, ready = tiny_model("mamba"), tiny_model("mamba"), batches(4)
    first, last = {"keep": 32, "multiple_of": 8}, {"keep": 7, "distill_steps": 1}
    last["distill_learning_rate"] = 1e-9
    if framework:
        recipe = [ChannelRemovalModifier(**first), StateRemovalModifier(**last)]
        run(model, recipe, ready)
        distilled = recipe[1].report()["distillation"]["divergence_before"]
    else:
        methods = [
            kind(**fields).new_method()
            for kind, fields in ((ChannelRemovalModifier, first), (StateRemovalModifier, last))
        ]
        distilled = run_in_turn(methods, model, ready)[1].distillation.divergence_before
    assert distilled == pytest.approx(divergence_from(dense, model, ready), rel=0.02)


class Toy(Axis):
    """Channels under another name, in one step."""

    name = "toy"
    order = 55
    modifier = "ChannelRemovalModifier"

    def length(self, model):
        return find_mixers(model)[0].sizes.intermediate_size

    def sizes(self, length):
        return (length - 64,)

    def config_fields(self, model, size):
        return find_mixers(model)[0].size_fields("channels", size)


def test_an_axis_is_one_class():
    register_axis(Toy)
    try:
        result = fit(small_mamba(), batches(8), "parameters=0.9", minutes=0.01, axes=("toy",))
        assert result.sizes["toy"] == 64
        assert result.plan.rows[0].axis == "toy"
    finally:
        del AXES["toy"]
    with pytest.raises(SparseSSMError, match=r"^--axes must be any of channels, .*, got 'toy'"):
        fit(small_mamba(), batches(8), "parameters=0.9", axes=("toy",))


def test_what_cannot_be_reached_is_said_with_the_nearest():
    with pytest.raises(
        SparseSSMError,
        match=r"parameters=0.01: the nearest is parameters=0\.\d+, with .*->",
    ):
        fit(small_mamba(), batches(8), "parameters=0.01")
    with pytest.raises(SparseSSMError, match=r"reaches memory=1KB: the nearest is memory=\d+,\d+"):
        fit(small_mamba(), batches(8), "memory=1KB")
    with pytest.raises(SparseSSMError, match=r"has \d+,\d+ already; ask for less"):
        fit(small_mamba(), batches(8), "parameters=2B")


def test_a_runtime_that_cannot_load_the_sizes_is_said():
    with pytest.raises(SparseSSMError, match=r"vllm cannot load this model: .*Zamba"):
        fit(tiny_model("zamba"), batches(8), "state=0.5", runtime="vllm")
    with pytest.raises(SparseSSMError, match=r"mamba-ssm cannot load this model: .*jamba"):
        fit(tiny_model("jamba"), batches(8), "state=0.5", runtime="mamba-ssm")
    with pytest.raises(SparseSSMError, match=r"must be one of transformers, sparsessm-plugin"):
        fit(small_mamba(), batches(8), "state=0.5", runtime="onnx")
    wide = Shapes(tiny_model("mamba", state_size=640))
    prepared = Prepared(wide, _settings("state=0.2", "vllm", "states"), torch.device("cpu"))
    (ladder,), (cost,) = prepared.space.ladders, prepared.costs()
    assert next(s for s, share in zip(ladder.sizes, cost, strict=True) if share < 2) <= 256


def _settings(target, runtime="transformers", *axes):
    return FitSettings(parse_targets(target), runtime, Workload(), 1.0, axes or None)


def test_sizes_that_the_runtime_takes_one_by_one_are_judged_together(monkeypatch):
    dense = small_mamba()
    channels, states = dense.config.intermediate_size, dense.config.state_size

    def problems(runtime, model):
        mixer = find_mixers(model)[0].sizes
        both = mixer.intermediate_size < channels and mixer.state_size < states
        return ["not both of them"] if both else []

    monkeypatch.setattr("sparsessm_plugin.fitting.prepare.runtime_problems", problems)
    axes = ("channels", "states")
    result = fit(dense, batches(8), "parameters=0.9", minutes=0.01, runtime="vllm", axes=axes)
    assert len(result.plan.sizes) == 1
    # before a weight is read, where nothing else reaches the target
    wanted = _settings("state=0.3", "vllm", *axes)
    with pytest.raises(SparseSSMError, match=r"vllm takes each of these sizes, but not .*not both"):
        Prepared(Shapes(small_mamba()), wanted, torch.device("cpu"))


def test_layers_that_suit_the_data_and_miss_the_target_are_said_with_the_nearest():
    """Before that, other layers are counted: with them the target would have been reached."""
    kinds = ["mlp", "full_attention", "linear_attention", "mlp"]
    model = tiny_model("nemotron_h", layers_block_type=kinds)
    with pytest.raises(SparseSSMError, match=r"layers that suit .* no mix .*=0.55: the nearest is"):
        fit(model, batches(8), "parameters=0.55", minutes=0.01, axes=("layers", "mlp"))


def test_mixes_that_miss_the_target_once_they_are_timed_are_said(monkeypatch):
    monkeypatch.setattr("sparsessm_plugin.fitting.search.Search._best", lambda *_: [])
    with pytest.raises(SparseSSMError, match=r"^the mixes that were predicted .* ask for less"):
        fit(small_mamba(), batches(8), "state=0.5", minutes=0.01)


def test_too_little_text_is_said_before_the_work():
    with pytest.raises(SparseSSMError, match=r"gives 2 windows in 1 batches, .* at least 8 in 2"):
        fit(small_mamba(), batches(1), "state=0.5")


def test_a_model_that_fails_is_what_it_was(monkeypatch):
    model = small_mamba()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def interrupted(self, sizes, minutes=0.0):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsessm_plugin.fitting.losses.Trials.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, batches(8), "state=0.5")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_size_that_fails_leaves_the_others(monkeypatch):
    real = fitting.losses.Trials.measure

    def some(self, sizes, minutes=0.0):
        if sizes.get("states") == 4:
            raise SparseSSMError("no such luck")
        return real(self, sizes, minutes)

    monkeypatch.setattr("sparsessm_plugin.fitting.losses.Trials.measure", some)
    result = fit(small_mamba(), batches(8), "state=0.6", minutes=0.01, axes=("states",))
    assert result.sizes["states"] < 4


# -- the command ------------------------------------------------------------------------------

VOCABULARY = AutoConfig.from_pretrained(DEMO).vocab_size


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    saved_tiny_model(folder, hidden_size=64, vocab_size=VOCABULARY)
    return folder


TEXT = ("--num-samples", 24, "--max-seq-length", 32, "--batch-size", 4, "--minutes", 0.02)


def timed_by_size(models, batch_sizes, prompt_length, decode_steps, repeats, **_):
    """Measurements of a machine that takes a nanosecond a parameter and a millisecond more."""
    timings = [
        Timing(name, DECODE, batch_sizes[0], decode_steps, decode_steps, (seconds,) * repeats)
        for name, model in models.items()
        if (seconds := decode_steps * (1e-3 + 1e-8 * sum(p.numel() for p in model.parameters())))
    ]
    return Latency(tuple(models), prompt_length, decode_steps, tuple(timings), {}, {})


def test_the_command_writes_model_recipe_report_and_plot(
    sparsessm, saved, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("sparsessm_plugin.fitting.timing.measure_latency", timed_by_size)
    out, plot = tmp_path / "out", tmp_path / "plot.svg"
    code, stdout, stderr = sparsessm(
        *("fit", saved, "--target", "speed=1.1,state=0.6", "--calibration", text_file),
        *("--output", out, "--plot", plot, "--length", 4, "--axes", "channels,states", *TEXT),
    )
    assert code == 0, stderr
    assert "came out" in stdout
    report = json.loads((out / "sparsessm_report.json").read_text())
    assert set(report["plan"]["costs"]) == {"speed", "state"}
    assert report["outcome"]["costs"]["state"] <= 0.6
    assert report["outcome"]["costs"]["speed"] <= 1 / 1.1
    predicted = report["plan"]["costs"]["speed"]
    assert report["outcome"]["costs"]["speed"] == pytest.approx(predicted, rel=1e-3)
    assert report["plan"]["speed"]["timed"]
    assert plot.read_bytes().lstrip().startswith(b"<?xml")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert find_mixers(model)[0].sizes.state_size == report["outcome"]["sizes"]["states"]
    recipe = load_recipe(out / "recipe.yaml")
    keeps = {modifier.keep for modifier in recipe.modifiers}
    assert keeps == set(report["plan"]["sizes"].values())
    # an earlier result may be replaced, and by nothing half-done
    code, _, stderr = sparsessm(
        *("fit", saved, "--target", "state=0.001", "--calibration", text_file),
        *("--output", out, *TEXT),
    )
    assert code == 1
    assert "the nearest is state=" in stderr
    assert json.loads((out / "sparsessm_report.json").read_text()) == report


def test_a_language_model_beside_an_image_encoder(sparsessm, text_file, tmp_path):
    """The folder stays one of both, and the encoder what it was."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    saved_tiny_model(dense, model=with_images(vocab_size=8192))
    code, stdout, stderr = sparsessm(
        *("fit", dense, "--target", "state=0.6,parameters=0.99", "--calibration", text_file),
        *("--axes", "states,kv_groups,mlp"),
        *("--output", out, "--length", 16, *TEXT, "--json"),
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["outcome"]["costs"]["state"] <= 0.6
    whole = AutoModelForImageTextToText.from_pretrained(dense).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(out)
    cut = report["after"]["parameters"] / report["before"]["parameters"]
    assert cut == pytest.approx(report["outcome"]["costs"]["parameters"], abs=1e-6)
    encoder = [name for name in whole if "visual" in name]
    assert len(encoder) > 10
    assert all(torch.equal(whole[name], model.state_dict()[name]) for name in encoder)
    code, stdout, stderr = sparsessm(
        *("component-loss", out, "--calibration", text_file, "--sparsities", 0.5, "--by", "kind"),
        *("--output", tmp_path / "loss.json", "--num-samples", 4, "--max-seq-length", 32),
    )
    assert code == 0, stderr
    measured = json.loads((tmp_path / "loss.json").read_text())["measurements"]
    kinds = {found["kind"] for found in measured}
    assert {"in_proj_qkv", "conv1d", "out_proj"} <= kinds


def test_the_command_refuses_in_one_line(refused, saved, text_file, tmp_path):
    common = ("--calibration", text_file, "--output", tmp_path / "out", *TEXT)
    assert "must be parameters" in refused("fit", saved, "--target", "x=1", *common)
    few = refused(
        *("fit", saved, "--target", "state=0.5", "--calibration", text_file),
        *("--output", tmp_path / "out", "--num-samples", 4, "--max-seq-length", 32),
    )
    assert "gives 4 windows" in few
    plot = ("--plot", tmp_path / "x.pdf")
    assert ".png or .svg" in refused("fit", saved, "--target", "state=0.5", *common, *plot)
    axes = ("--axes", "depth")
    message = refused("fit", saved, "--target", "state=0.5", *common, *axes)
    assert message.startswith("error: --axes must be any of channels, ")
    onnx = ("--runtime", "onnx")
    assert "vllm" in refused("fit", saved, "--target", "state=0.5", *common, *onnx)
    assert "phase" in refused("fit", saved, "--target", "speed=2", *common, "--phase", "train")


def test_an_interrupted_command_leaves_nothing(sparsessm, saved, text_file, tmp_path, monkeypatch):
    def interrupted(self, sizes, minutes=0.0):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsessm_plugin.fitting.losses.Trials.measure", interrupted)
    code, _, stderr = sparsessm(
        *("fit", saved, "--target", "state=0.5", "--calibration", text_file),
        *("--output", tmp_path / "out", *TEXT),
    )
    assert code == 130
    assert "nothing was written" in stderr
    assert os.listdir(tmp_path) == []
