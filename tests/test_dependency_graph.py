"""What is removed together, against the data flow, the adapters and dense mixers."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch_pruning
from compressed_tensors.offload import offload_module
from conftest import (
    DEVICE,
    FAMILIES,
    MAMBA1,
    batches,
    silence_channels,
    silence_states,
    tiny_model,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsessm_plugin.backends.choice import REFERENCE
from sparsessm_plugin.dependency_graph import MixerDependencyGraph, apply_config_fields
from sparsessm_plugin.dependency_graph.surrogate import Mamba1Surrogate
from sparsessm_plugin.dependency_graph.tensors import format_ranges
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import find_mixers, get_adapter, get_tensor
from sparsessm_plugin.recurrence import scan

_BAMBA = (
    {},
    {"mamba_n_groups": 1, "mamba_d_state": 6},
    {"mamba_n_groups": 4, "mamba_proj_bias": True, "mamba_conv_bias": False},
)
VARIANTS = {
    "zamba": (
        {},
        {"n_mamba_heads": 1, "mamba_d_state": 5},
        {"n_mamba_heads": 4, "mamba_proj_bias": True, "mamba_conv_bias": False},
    ),
    "mamba": (
        {},
        {"use_bias": True},
        {"use_conv_bias": False, "state_size": 5, "time_step_rank": 3},
    ),
    "falcon_mamba": ({}, {"use_bias": True, "state_size": 5, "use_conv_bias": False}),
    "jamba": ({}, {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_state": 5}),
    "mamba2": (
        {},
        {"n_groups": 1, "state_size": 6},
        {"n_groups": 4, "use_bias": True, "use_conv_bias": False},
    ),
    "bamba": _BAMBA,
    "zamba2": (
        {},
        {"mamba_ngroups": 1, "mamba_d_state": 6},
        {"mamba_ngroups": 4, "add_bias_linear": True, "use_conv_bias": False},
    ),
    "granitemoehybrid": _BAMBA,
    "falcon_h1": (
        *_BAMBA,
        {"mamba_rms_norm": False},
        {"mamba_norm_before_gate": True},
    ),
    "nemotron_h": (
        {},
        {"n_groups": 1, "ssm_state_size": 6},
        {"n_groups": 4, "use_bias": True, "use_conv_bias": False},
    ),
}
CASES = [(family, axis) for family in FAMILIES for axis in ("state", "channels")] + [
    (family, axis) for family in FAMILIES for axis in ("heads", "head_dim")
]
CASES = [(f, axis) for f, axis in CASES if axis == "state" or (axis == "channels") == (f in MAMBA1)]


@functools.cache
def dense_adapter(family, variant=0):
    adapter = find_mixers(tiny_model(family, **VARIANTS[family][variant]))[0]
    with torch.no_grad():
        for name, parameter in adapter.mixer.named_parameters():
            # biases and norms are made as zeros and ones, which hides what happens to them
            if name.endswith(("bias", "layernorm.weight")):
                parameter += 0.3 * torch.randn_like(parameter)
    return adapter


@functools.cache
def dense_graph(family):
    """For tests that remove nothing."""
    return MixerDependencyGraph(dense_adapter(family))


def fresh(adapter):
    """An adapter of a copy of the mixer."""
    return get_adapter(copy.deepcopy(adapter.mixer), adapter.name)


def run(adapter, hidden_states):
    """What the mixer makes of its input; transformers' own forward where that runs."""
    with torch.no_grad():
        if DEVICE == "cpu":
            return adapter.mixer(hidden_states)
        quantities = adapter.quantities(hidden_states)
        return adapter.output(quantities, scan(quantities, backend=REFERENCE))


def hidden_states(adapter, length=9):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, length, adapter.sizes.hidden_size, generator=generator)


def some_indices(adapter, axis):
    """The smallest removal that the family's loader can follow."""
    length, remove = adapter.axis_length(axis), removable(adapter, axis)[0]
    groups = adapter.groups_of(axis)
    per_group = length // groups
    return [g * per_group + i for g in range(groups) for i in range(remove // groups)]


def removable(adapter, axis):
    """How many indices of an axis can go so that the loader makes what remains."""
    counts = []
    groups = adapter.groups_of(axis)
    for count in range(groups, adapter.axis_length(axis), groups):
        size = adapter.axis_length(axis) - count
        try:
            adapter.size_fields(axis, size // groups if axis == "state" else size)
        except SparseSSMError:
            continue
        counts.append(count)
    return counts


def ranges(changes):
    return {(c.tensor, c.dim): set(c.positions) for c in changes}


def declared(adapter, axis, indices):
    result = {}
    for part in adapter.axes(axis):
        result.setdefault((part.tensor, part.dim), set()).update(part.positions(indices))
    return result


def rms(x, epsilon):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def channels_of(adapter, axis, indices):
    """The channels, of D, that stand for indices of an axis."""
    P = adapter.sizes.head_dim
    if axis == "head_dim":
        return [h * P + p for h in range(adapter.sizes.num_heads) for p in indices]
    return [h * P + p for h in indices for p in range(P)] if axis == "heads" else list(indices)


def expected_output(adapter, axis, removed, x):
    """The dense mixer's output without what the removed indices add to it.

    Zeroing does it where no norm runs over the axis. Otherwise the norm is recomputed over
    the kept entries.
    """
    mixer, sizes = adapter.mixer, adapter.sizes
    D, N, R = sizes.intermediate_size, sizes.state_size, sizes.time_step_rank
    kept = [i for i in range(adapter.axis_length(axis)) if i not in removed]
    if axis == "channels" or (axis == "state" and adapter.family in ("mamba", "zamba")):
        dense = fresh(adapter)
        with torch.no_grad():
            (silence_states if axis == "state" else silence_channels)(dense, removed)
        return run(dense, x)
    if axis == "state" and sizes.time_step_rank:
        with torch.no_grad():
            q = adapter.quantities(x)
            _, B, C = mixer.x_proj(q.inputs["x_proj"]).split([R, N, N], dim=-1)
            parts = []
            for part, norm in ((B, mixer.b_layernorm), (C, mixer.c_layernorm)):
                epsilon = norm.eps if adapter.family == "falcon_mamba" else norm.variance_epsilon
                parts.append(rms(part[..., kept], epsilon) * norm.weight[kept])
            q = dataclasses.replace(q, A=q.A[:, kept], B=parts[0], C=parts[1])
            return adapter.output(q, scan(q, backend=REFERENCE))
    if axis == "state":
        dense = fresh(adapter)
        with torch.no_grad():
            for n in removed:
                for tensor, start in (("in_proj", 2 * D), ("conv1d", D)):
                    module = getattr(dense.mixer, tensor)
                    module.weight[start + n] = 0
                    if module.bias is not None:
                        module.bias[start + n] = 0
        return run(dense, x)
    with torch.no_grad():
        q = adapter.quantities(x)
        channels = channels_of(adapter, axis, kept)
        y, gate = scan(q, backend=REFERENCE)[..., channels], F.silu(q.z[..., channels])
        norm = mixer.norm
        before_gate = getattr(norm, "norm_before_gate", False)
        if isinstance(norm, nn.Identity):
            y = y * gate
        else:
            y = y if before_gate else y * gate
            y = rms(y.unflatten(-1, (adapter.norm_groups(), -1)), norm.variance_epsilon)
            y = y.flatten(-2) * norm.weight[channels]
            y = y * gate if before_gate else y
        return F.linear(y, mixer.out_proj.weight[:, channels], mixer.out_proj.bias)


def assert_close(result, expected):
    assert torch.linalg.norm(result - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_surrogate_computes_the_mixer(family):
    """What is traced is the mixer's own computation, to the last bits."""
    for variant in range(len(VARIANTS[family])):
        adapter = dense_adapter(family, variant)
        graph = MixerDependencyGraph(adapter)
        x = hidden_states(adapter)
        for axis in adapter.axis_names:
            with torch.no_grad():
                result = graph.model[axis](x)
            assert_close(result, run(adapter, x))


@pytest.mark.parametrize(("family", "axis"), CASES)
@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_smaller_mixer_computes_what_remains(family, axis, data):
    dense = dense_adapter(family, data.draw(st.integers(0, len(VARIANTS[family]) - 1)))
    pruned = fresh(dense)
    graph = MixerDependencyGraph(pruned)
    groups = dense.groups_of(axis)
    per_group = dense.axis_length(axis) // groups
    count = data.draw(st.sampled_from(removable(dense, axis))) // groups
    removed = [
        g * per_group + i
        for g in range(groups)
        for i in data.draw(st.permutations(range(per_group)))[:count]
    ]

    group = graph.get_axis_group(axis, removed)
    assert ranges(group.changes) == declared(dense, axis, removed)
    assert graph.check_pruning_group(group)
    shapes = {name: t.shape for name, t in dense.mixer.named_parameters()}
    shapes.update({name: t.shape for name, t in dense.mixer.named_buffers()})
    group.prune()

    assert pruned.axis_length(axis) == dense.axis_length(axis) - len(removed)
    for name, shape in shapes.items():
        expected = list(shape)
        for change in group.changes:
            if change.tensor == name:
                slices = shape[0] if name in dense.stacked else 1
                assert change.old_size == slices * expected[change.dim]
                expected[change.dim] = change.new_size // slices
        assert list(get_tensor(pruned.mixer, name).shape) == expected
    # transformers' norm of FalconH1 drops the time dimension of a single step
    x = hidden_states(dense, length=data.draw(st.integers(2, 12)))
    assert_close(run(pruned, x), expected_output(dense, axis, removed, x))


def test_unconnected_rows_stay(family):
    adapter = dense_adapter(family)
    sizes, graph = adapter.sizes, dense_graph(family)
    D, N, R, G = sizes.intermediate_size, sizes.state_size, sizes.time_step_rank, sizes.n_groups
    every = range(adapter.axis_length("state"))
    changed = ranges(graph.get_axis_group("state", every).changes)
    if family == "zamba":
        rows = {h * (R + 2 * N) + i for h in range(G) for i in range(R, R + 2 * N)}
        assert changed == {("A_log", 2): set(range(G * N)), ("x_proj_weight", 1): rows}
        channels = ranges(graph.get_axis_group("channels", [0, D // G]).changes)
        assert channels[("in_proj.weight", 0)] == {0, 1, 2 * (D // G), 2 * (D // G) + 1}
        assert ("x_proj_weight", 1) not in channels
        assert ("A_log", 2) not in channels
    elif family in MAMBA1:
        assert changed[("x_proj.weight", 0)] == set(range(R, R + 2 * N))  # not dt
        assert ("in_proj.weight", 0) not in changed
        assert ("dt_proj.weight", 0) not in changed
        assert ("D", 0) not in changed
        channels = ranges(graph.get_axis_group("channels", [0]).changes)
        assert ("x_proj.weight", 0) not in channels
        assert ("A_log", 1) not in channels
    else:
        # neither z and x nor dt
        assert changed[("in_proj.weight", 0)] == set(range(2 * D, 2 * D + 2 * G * N))
        assert not any(tensor in ("A_log", "D", "out_proj.weight") for tensor, _ in changed)
        for axis in ("heads", "head_dim"):
            rows = ranges(graph.get_axis_group(axis, range(adapter.axis_length(axis))).changes)
            assert not rows[("in_proj.weight", 0)] & changed[("in_proj.weight", 0)]
        assert not any(tensor in ("A_log", "D", "dt_bias") for tensor, _ in rows)


def test_groups_follow_the_data_flow(monkeypatch):
    """With C cut out of the data flow its rows are in no group of states any more."""
    adapter = dense_adapter("mamba")
    R, N = adapter.sizes.time_step_rank, adapter.sizes.state_size
    scan_with_C = Mamba1Surrogate.scan
    monkeypatch.setattr(
        Mamba1Surrogate, "scan", lambda self, dt, A, B, C, u: scan_with_C(self, dt, A, B, B, u)
    )
    group = MixerDependencyGraph(adapter).get_axis_group("state", [1])
    assert ranges(group.changes) == {("A_log", 1): {1}, ("x_proj.weight", 0): {R + 1}}
    # and a flow that ties what is apart in the mixer ties it in the group
    monkeypatch.setattr(
        Mamba1Surrogate,
        "scan",
        lambda self, dt, A, B, C, u: scan_with_C(
            self, dt, self.multiply(A, self.sum_over(C, ("n",))), B, self.multiply(C, u), u
        ),
    )
    group = MixerDependencyGraph(adapter).get_axis_group("state", [1])
    assert group.changes[1].positions == (R + 1, R + N + 1)


def test_group_lists_every_range():
    group = dense_graph("mamba").get_axis_group("state", [1, 2, 5])
    assert str(group).splitlines() == [
        "backbone.layers.0.mixer: state [1:3, 5] 8 -> 5",
        "  A_log dim 1 [1:3, 5] 8 -> 5",
        "  x_proj.weight dim 0 [5:7, 9, 13:15, 17] 20 -> 14",
    ]
    group = dense_graph("falcon_h1").get_axis_group("heads", [0, 5])
    assert str(group).splitlines() == [
        "model.layers.0.mamba: heads [0, 5] 8 -> 6",
        "  A_log dim 0 [0, 5] 8 -> 6",
        "  D dim 0 [0, 5] 8 -> 6",
        "  conv1d.bias dim 0 [0:8, 40:48] 96 -> 80",
        "  conv1d.weight dim 0 [0:8, 40:48] 96 -> 80",
        "  dt_bias dim 0 [0, 5] 8 -> 6",
        "  in_proj.weight dim 0 [0:8, 40:48, 64:72, 104:112, 160, 165] 168 -> 134",
        "  mup_vector dim 2 [0:8, 40:48, 64:72, 104:112, 160, 165] 168 -> 134",
        "  norm.weight dim 0 [0:8, 40:48] 64 -> 48",
        "  out_proj.weight dim 1 [0:8, 40:48] 64 -> 48",
    ]
    assert isinstance(group, torch_pruning.dependency.Group)
    assert len(group) > len(group.changes)  # torch_pruning's own items are there as well


@given(positions=st.sets(st.integers(0, 40)))
def test_ranges_read_back(positions):
    text = format_ranges(sorted(positions))
    back = set()
    for part in filter(None, text.strip("[]").split(", ")):
        first, _, end = part.partition(":")
        back |= set(range(int(first), int(end or int(first) + 1)))
    assert back == positions


def snapshot(adapter):
    """Everything about a mixer that a refusal must leave alone."""
    state = {}
    for path, module in adapter.mixer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, tuple)):
                state[path, name] = value
    for name, tensor in [*adapter.mixer.named_parameters(), *adapter.mixer.named_buffers()]:
        state[name] = (id(tensor), tensor._version, tensor.requires_grad, tensor.grad)
    return state


@pytest.mark.parametrize(
    ("family", "axis", "indices", "message"),
    [
        ("mamba", "heads", [0], "mamba has no axis 'heads'"),
        ("mamba2", "channels", [0], "mamba2 has no axis 'channels'"),
        ("mamba", "state", [8], "no index 8; allowed: 0 to 7"),
        ("mamba", "state", [-1], "no index -1"),
        ("mamba", "state", [1, 2, 1], "index 1 of state is given more than once"),
        ("mamba", "state", [], "no indices of state"),
        ("mamba", "state", [0.5], "whole numbers"),
        ("bamba", "state", [0, 1], "2 groups must lose equally many of state, not 2, 0"),
        ("bamba", "heads", [0, 4, 5], "2 groups must lose equally many of heads, not 1, 2"),
        ("zamba", "channels", [0, 1], "2 groups must lose equally many of channels, not 2, 0"),
    ],
)
def test_indices_are_checked(family, axis, indices, message):
    adapter, graph = dense_adapter(family), dense_graph(family)
    before = snapshot(adapter)
    with pytest.raises(SparseSSMError, match=message) as error:
        graph.get_axis_group(axis, indices)
    assert "\n" not in str(error.value)
    assert snapshot(adapter) == before


def test_removing_everything_is_refused(family):
    adapter, graph = dense_adapter(family), dense_graph(family)
    before = snapshot(adapter)
    for axis in adapter.axis_names:
        group = graph.get_axis_group(axis, range(adapter.axis_length(axis)))
        assert not graph.check_pruning_group(group)
        with pytest.raises(SparseSSMError, match="leaves nothing"):
            group.prune()
        assert snapshot(adapter) == before
        assert not group.config_fields
        assert not graph.pruning_history()


@pytest.mark.parametrize(
    ("family", "axis", "indices"),
    [
        ("jamba", "channels", [0]),
        ("zamba", "channels", [0, 32]),
        ("mamba2", "heads", [0, 4]),
        ("zamba2", "head_dim", [3]),
    ],
)
def test_what_no_loader_makes_is_refused(family, axis, indices):
    adapter, graph = dense_adapter(family), dense_graph(family)
    before = snapshot(adapter)
    group = graph.get_axis_group(axis, indices)
    with pytest.raises(SparseSSMError, match="multiple of 32"):
        group.prune()
    assert snapshot(adapter) == before


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, torch.enable_grad),
        (torch.bfloat16, torch.no_grad),
        (torch.float16, torch.inference_mode),
    ],
)
@pytest.mark.parametrize("family", ["falcon_mamba", "falcon_h1"])
def test_tensors_keep_what_they_are(family, dtype, mode):
    adapter = fresh(dense_adapter(family))
    mixer = adapter.mixer.to(dtype)
    mixer.A_log._no_weight_decay = True
    mixer.in_proj.weight.requires_grad_(False)
    mixer.out_proj.weight.grad = torch.randn_like(mixer.out_proj.weight)
    values = {n: t.detach().clone() for n, t in mixer.named_parameters()}
    grads = {n: t.requires_grad for n, t in mixer.named_parameters()}
    names, saved = list(grads), list(mixer.state_dict())
    training = mixer.train().training
    before = snapshot(adapter)
    for axis in adapter.axis_names:
        with mode():
            graph = MixerDependencyGraph(adapter)
            group = graph.get_axis_group(axis, some_indices(adapter, axis))
            assert snapshot(adapter) == before
            group.prune()
        before = snapshot(adapter)
        for name, dim, kept in [
            (c.tensor, c.dim, [i for i in range(c.old_size) if i not in c.positions])
            for c in group.changes
        ]:
            if name in values:
                values[name] = values[name].index_select(dim, torch.tensor(kept))
    assert mixer.training == training
    assert list(dict(mixer.named_parameters())) == names
    assert list(mixer.state_dict()) == saved
    for name, parameter in mixer.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.dtype == dtype
        assert parameter.requires_grad == grads[name]
        assert parameter.is_contiguous()
        assert not parameter.is_inference()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize
        assert torch.equal(parameter, values[name])
    assert mixer.A_log._no_weight_decay
    assert mixer.out_proj.weight.grad.shape == mixer.out_proj.weight.shape
    assert mixer.in_proj.weight.grad is None
    with torch.no_grad():
        q = adapter.quantities(hidden_states(adapter).to(dtype))
        assert adapter.output(q, scan(q, backend=REFERENCE)).dtype == dtype


def test_frozen_mixer_is_traced_as_well(family):
    adapter = fresh(dense_adapter(family))
    adapter.mixer.requires_grad_(False)
    graph, other = MixerDependencyGraph(adapter), dense_graph(family)
    for axis in adapter.axis_names:
        indices = some_indices(dense_adapter(family), axis)
        group = graph.get_axis_group(axis, indices)
        assert group.changes == other.get_axis_group(axis, indices).changes
    group.prune()
    assert not any(parameter.requires_grad for parameter in adapter.mixer.parameters())


def test_graph_serves_again_after_a_removal(family):
    adapter = fresh(dense_adapter(family))
    graph = MixerDependencyGraph(adapter)
    stale = graph.get_axis_group("state", some_indices(adapter, "state"))
    for axis in ("state", *adapter.axis_names):
        dense = fresh(adapter)
        if axis in ("heads", "head_dim", "channels") and not removable(adapter, axis):
            continue
        indices = some_indices(adapter, axis)
        group = graph.get_axis_group(axis, indices)
        rebuilt = MixerDependencyGraph(adapter).get_axis_group(axis, indices)
        assert group.changes == rebuilt.changes
        group.prune()
        x = hidden_states(dense)
        assert_close(run(adapter, x), expected_output(dense, axis, indices, x))
        for old in (stale, group, rebuilt):
            before = snapshot(adapter)
            with pytest.raises(SparseSSMError, match="ask for a new one"):
                old.prune()
            assert snapshot(adapter) == before
    assert len(graph.pruning_history()) >= 2


def test_history_of_torch_pruning_can_be_replayed():
    dense = dense_adapter("nemotron_h")
    first, second = fresh(dense), fresh(dense)
    graph = MixerDependencyGraph(first)
    graph.get_axis_group("heads", [1, 6]).prune()
    graph.get_axis_group("state", [0, 9]).prune(idxs=[2, 10])
    MixerDependencyGraph(second).load_pruning_history(graph.pruning_history())
    for name, parameter in first.mixer.named_parameters():
        assert torch.equal(parameter, get_tensor(second.mixer, name))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_mixers(family, where, tmp_path):
    kept_here, offloaded = fresh(dense_adapter(family)), fresh(dense_adapter(family))
    settings = {"offload_dir": str(tmp_path)} if where == "disk" else {}
    for module in offloaded.mixer.modules():
        if not isinstance(module._parameters, dict) or module._parameters or module._buffers:
            offload_module(module, "cpu", where, **settings)
    files = len(list(tmp_path.iterdir()))
    requires_grad = {n: p.requires_grad for n, p in offloaded.mixer.named_parameters()}
    names = list(offloaded.mixer.state_dict())
    for axis in offloaded.axis_names[:2]:
        indices = some_indices(kept_here, axis)
        for adapter in (kept_here, offloaded):
            MixerDependencyGraph(adapter).get_axis_group(axis, indices).prune()
    assert len(list(tmp_path.iterdir())) == files  # no old tensor is left behind
    assert list(offloaded.mixer.state_dict()) == names
    for name, parameter in kept_here.mixer.named_parameters():
        assert torch.equal(parameter, get_tensor(offloaded.mixer, name))
        assert get_tensor(offloaded.mixer, name).requires_grad == requires_grad[name]
    x = hidden_states(kept_here)
    with torch.no_grad():
        results = []
        for adapter in (kept_here, offloaded):
            q = adapter.quantities(x)
            results.append(adapter.output(q, scan(q, backend=REFERENCE)))
    assert torch.equal(*results)


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_smaller_model_loads_again(family, axis, tmp_path):
    model = tiny_model(family)
    fields = {}
    for adapter in find_mixers(model):
        group = MixerDependencyGraph(adapter).get_axis_group(axis, some_indices(adapter, axis))
        group.prune()
        fields = group.config_fields
    apply_config_fields(model.config, fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for mine, theirs in zip(find_mixers(model), find_mixers(loaded), strict=True):
        assert mine.sizes == theirs.sizes
        shared = set(vars(mine.mixer)) & set(vars(theirs.mixer))
        for name in shared:
            if isinstance(vars(mine.mixer)[name], (int, float, str)):
                assert vars(mine.mixer)[name] == vars(theirs.mixer)[name]
        buffers = dict(theirs.mixer.named_buffers())
        for name, buffer in mine.mixer.named_buffers():
            # FalconMamba's norm of dt holds D ones that nothing reads
            if name != "dt_layernorm.weight":
                assert torch.equal(buffer, buffers[name])
    if DEVICE == "cpu":
        for batch in batches(count=1, length=12):
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_config_refusals_change_nothing():
    config = tiny_model("bamba").config
    before = config.to_dict()
    with pytest.raises(SparseSSMError, match="refuses mamba_n_heads=6") as error:
        apply_config_fields(config, {"mamba_n_heads": 6})
    assert "\n" not in str(error.value)
    with pytest.raises(SparseSSMError, match=r"refuses .*mamba_d_state='many'"):
        apply_config_fields(config, {"mamba_n_heads": 8, "mamba_d_state": "many"})
    with pytest.raises(SparseSSMError, match="no field 'state_sizes'"):
        apply_config_fields(config, {"mamba_n_heads": 8, "state_sizes": 8})
    assert config.to_dict() == before
