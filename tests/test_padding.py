"""Padding on either side, in mixers whose projections have biases: it counts for nothing.

The module of transformers is the oracle. It sets to zero what enters in_proj and what leaves
the convolution at padding, so that a bias of in_proj still reaches the convolution's look-back
from padding on the left; from padding on the right nothing reaches a real position.
"""

from dataclasses import replace

import pytest
import torch
from conftest import (
    DEVICE,
    GPU_SUMS,
    MAMBA1,
    STATISTICS,
    batches,
    module_output,
    recomputed,
    relative,
    run,
    tiny_model,
)
from torch import nn

from sparsessm_plugin import (
    ChannelRemovalModifier,
    SensitivitySparseGPTModifier,
    StateRemovalModifier,
    find_mixers,
)
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.methods.projections.method import ProjectionPruning
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan
from sparsessm_plugin.solvers.objective import Solved
from sparsessm_plugin.solvers.projections import SOLVERS

SIDES = ("left", "right")
_BIAS = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2", "nemotron_h"), ("use_bias",)),
    **dict.fromkeys(("jamba", "zamba", "bamba", "granitemoehybrid"), ("mamba_proj_bias",)),
    "zamba2": ("add_bias_linear",),
    "falcon_h1": ("mamba_proj_bias", "projectors_bias"),
}
REAL = (9, 17, 12)  # tokens of the rows


def biased_model(family):
    model = tiny_model(family, **dict.fromkeys(_BIAS[family], True))
    for adapter in find_mixers(model):
        assert all(bool(getattr(adapter.mixer, p).bias.any()) for p in ("in_proj", "out_proj"))
    return model


def mask_of(side, length=17):
    mask = torch.zeros(len(REAL), length, dtype=torch.long)
    for row, tokens in zip(mask, REAL, strict=True):
        row[:tokens] = 1
    return mask.flip(1) if side == "left" else mask


@pytest.fixture(params=SIDES)
def side(request):
    return request.param


@pytest.mark.parametrize("kernels", [True, False])
def test_outputs_at_real_positions(monkeypatch, family, side, kernels):
    """Those of the module; with padding on the right also those of each row without it."""
    if not kernels:  # as on a device without any
        for module in ("base", "mamba1", "zamba"):
            name = f"sparsessm_plugin.families.{module}.kernels_for"
            monkeypatch.setattr(name, lambda tensor: None)
    mask = mask_of(side)
    real = mask.bool()
    for adapter in find_mixers(biased_model(family)):
        hidden_states = torch.randn(*mask.shape, adapter.sizes.hidden_size)
        found = recomputed(adapter, hidden_states, mask)
        expected = module_output(adapter, hidden_states, mask)
        assert relative(found[real], expected[real]) < 1e-4
        again = hidden_states + 5 * torch.randn_like(hidden_states) * ~real[..., None]
        changed = recomputed(adapter, again, mask)
        assert torch.equal(changed[real], found[real])
        for row, kept in enumerate(real):
            alone = module_output(adapter, hidden_states[row : row + 1, kept])[0]
            same = side == "right" or bool(kept.all())
            assert (relative(found[row, kept], alone) < 1e-4) == same


@pytest.mark.parametrize("family", MAMBA1)
def test_statistics_of_A_log(family, side):
    """Those of the rows one by one, without padding."""
    adapter, mask = find_mixers(biased_model(family))[0], mask_of(side).bool()
    sizes = adapter.sizes
    hidden_states = torch.randn(*mask.shape, sizes.hidden_size)
    request = StatisticsRequest(True, True, "zero")
    together, separate = (
        ScanStatistics(request, sizes.intermediate_size, sizes.state_size) for _ in range(2)
    )
    with torch.no_grad():
        q = adapter.quantities(hidden_states, mask)
        scan(q, together)
        for row, real in enumerate(mask):
            if side == "right":
                alone = adapter.quantities(hidden_states[row : row + 1, real])
            else:  # what the look-back of the convolution finds is not that of the row alone
                cut = {k: getattr(q, k)[row : row + 1, real] for k in ("u", "dt", "B", "C", "z")}
                alone = type(q)(**cut, A=q.A, D=q.D)
            scan(alone, separate)
    assert together.tokens == separate.tokens == sum(REAL)
    for name in STATISTICS:
        assert relative(getattr(together, name), getattr(separate, name)) < 1e-5, name


def looked_at(adapter, hidden_states, mask):
    """What each projection multiplies at real positions, as the module's own layers see it.

    :return: by kind (tokens, in), of conv1d (tokens, channels, K), of a matrix for each head
        (tokens, heads, in)
    """
    mixer, sizes = adapter.mixer, adapter.sizes
    seen = {}

    def hook(kind, module, args, result):
        seen[kind], seen[f"{kind} output"] = args[0].detach(), result.detach()

    handles = [
        getattr(mixer, kind).register_forward_hook(lambda *a, kind=kind: hook(kind, *a))
        for kind in ("in_proj", "out_proj")
    ]
    with torch.no_grad():
        mixer(hidden_states, attention_mask=mask)
    for handle in handles:
        handle.remove()
    real = mask.bool()
    D, N, K = sizes.intermediate_size, sizes.state_size, sizes.conv_kernel_size
    x = seen["in_proj output"] * getattr(mixer, "mup_vector", 1)
    if adapter.family == "zamba":
        x = x[..., 0::2]
    else:
        start = 0 if adapter.family in MAMBA1 else D
        x = x[..., start : start + mixer.conv1d.weight.shape[0]]
    windows = nn.functional.pad(x, (0, 0, K - 1, 0)).unfold(1, K, 1)  # (b, L, channels, K)
    found = {kind: seen[kind][real] for kind in ("in_proj", "out_proj")}
    found["conv1d"] = windows[real]
    if adapter.family not in MAMBA1:
        return found
    weight = mixer.conv1d.weight[:, 0]
    bias = mixer.conv1d.bias if mixer.conv1d.bias is not None else 0
    with torch.no_grad():
        u = mixer.act((found["conv1d"] * weight).sum(-1) + bias)  # (tokens, D)
        if adapter.family == "zamba":
            u = u.unflatten(-1, (sizes.n_groups, -1))
            made = torch.einsum("tgd,god->tgo", u, mixer.x_proj_weight)
        else:
            made = u @ mixer.x_proj.weight.T
        dt = made[..., : made.shape[-1] - 2 * N]
        found |= {"x_proj": u, "dt_proj": getattr(mixer, "dt_layernorm", nn.Identity())(dt)}
    return found


def second_moments(x):
    """(..., in, in) of what :func:`looked_at` returns, summed over tokens."""
    x = x.double()
    return x.T @ x if x.ndim == 2 else torch.einsum("tgi,tgj->gij", x, x)


def padded_batches(side, count=2):
    mask = mask_of(side)
    ready = batches(count, *mask.shape)
    for batch in ready:
        batch["attention_mask"] = mask
    return ready


def test_hessians(monkeypatch, family, side):
    """Those of the pass over the dense model, and those that the solvers get."""
    first, solved = {}, []

    def measure(self, group, sums, probe):
        first.update({name: hessian.clone() for name, hessian in sums.hessians.items()})
        return real_measure(self, group, sums, probe)

    def solver(weight, hessian, *args, **kwargs):  # leaves the model dense
        solved.append(hessian)
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool), weight, hessian)

    real_measure = ProjectionPruning._measure
    monkeypatch.setattr(ProjectionPruning, "_measure", measure)
    monkeypatch.setitem(SOLVERS, "sparsegpt", replace(SOLVERS["sparsegpt"], solve=solver))
    model, ready = biased_model(family), padded_batches(side)
    adapters = find_mixers(model)
    expected = {}

    def hook(adapter, module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if adapter.name not in busy:  # looked_at calls the module itself
            busy.add(adapter.name)
            for kind, x in looked_at(adapter, hidden_states, mask_of(side)).items():
                name = f"{adapter.name}.{adapter.projection(kind).path}"
                expected[name] = expected.get(name, 0) + second_moments(x)
            busy.remove(adapter.name)

    busy = set()
    handles = [
        a.mixer.register_forward_pre_hook(lambda *args, a=a: hook(a, *args), with_kwargs=True)
        for a in adapters
    ]
    with torch.no_grad():
        for batch in ready:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    chosen = SensitivitySparseGPTModifier(
        sparsity=0.5, solver="sparsegpt", allocation="optimal", target_output="own"
    )
    run(model, chosen, ready)
    report = chosen.report()["layers"]
    assert first.keys() == expected.keys() == {layer["name"] for layer in report}
    assert all(layer["tokens"] == 2 * sum(REAL) for layer in report)
    of_solver = dict(zip([layer["name"] for layer in report], solved[-len(report) :], strict=True))
    for name, wanted in expected.items():
        for found in (first[name], of_solver[name]):
            most = 1e-4 if DEVICE == "cpu" else GPU_SUMS
            assert relative(found.double().cpu(), wanted) < most, name


REMOVALS = {
    "states": lambda family: StateRemovalModifier(keep=4, reconstruct_steps=2),
    "channels": lambda family: ChannelRemovalModifier(
        keep=32 if family in MAMBA1 else 4, multiple_of=1
    ),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_error_of_a_removal(family, name, side):
    """The reported error is that of the module's outputs at real positions."""
    adapter, mask = find_mixers(biased_model(family))[0], mask_of(side)
    real = mask.bool()
    entered = [torch.randn(*mask.shape, adapter.sizes.hidden_size) for _ in range(2)]
    dense = torch.cat([module_output(adapter, x, mask)[real] for x in entered])
    reports = []
    for noise in (0, 5):  # what stands at padding changes nothing
        inputs = CalibrationInputs()
        for x in entered:
            inputs.add(x + noise * torch.randn_like(x) * ~real[..., None], mask)
        assert inputs.tokens == 2 * sum(REAL)
        with torch.no_grad():
            method = REMOVALS[name](family).new_method()
            reports.append(method.shrink(adapter.float_clone(), inputs))
    found, again = reports
    assert again.removed == found.removed
    assert again.error_left == pytest.approx(found.error_left, rel=1e-6)
    left = torch.cat([module_output(found.mixer, x, mask)[real] for x in entered])
    wrong = float((left - dense).square().sum() / dense.square().sum())
    assert found.error_left == pytest.approx(wrong, rel=1e-3 if DEVICE == "cpu" else 5e-3)
