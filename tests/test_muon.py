"""Steps of Muon for matrices: torch's own, in place, beside Adam's; and fits that take them."""

import copy

import pytest
import torch
from conftest import batches, relative, run, state, tiny_model

from sparsessm_plugin import StateRemovalModifier, WidthRemovalModifier
from sparsessm_plugin.training import muon, tuner
from sparsessm_plugin.training.distillation import fitted_parameters, matrices_of
from sparsessm_plugin.training.flat import FlatWeights


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_matrices_become_nearly_orthogonal(shape):
    """Singular vectors stay; five iterations leave singular values between 0.6 and 1.3."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (values.amax(-1) / values.amin(-1)).min() > 1.5  # which they are not
    found = muon.orthogonalized(matrices)
    within = left.mT @ found @ right.mT
    singular = within.diagonal(dim1=-2, dim2=-1)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    torch.testing.assert_close(within, torch.diag_embed(singular), atol=1e-5, rtol=0)
    torch.testing.assert_close(muon.orthogonalized(100 * matrices), found, atol=1e-5, rtol=0)
    assert torch.equal(muon.orthogonalized(torch.zeros(1, *shape)), torch.zeros(1, *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(dtype):
    """Of its Muon, which multiplies in bfloat16, and of its Adam for the rest."""
    torch.manual_seed(0)
    layers = {"a": (5, 3), "b": (4, 6), "c": (5, 3), "d": (5, 3), "e": (5, 3)}
    model = torch.nn.ModuleDict({n: torch.nn.Linear(*s) for n, s in layers.items()}).to(dtype)
    model.d.weight.data = model.a.weight.data  # one memory under two names
    named = dict(model.named_parameters())
    flat = FlatWeights(named, {"a.weight", "b.weight", "c.weight", "d.weight"})  # and not e.weight
    masters = {n: p.detach().float().clone() for n, p in named.items() if n != "d.weight"}
    matrices = [masters[n] for n in ("a.weight", "b.weight", "c.weight")]
    rest = [m for n, m in masters.items() if all(m is not one for one in matrices)]
    theirs = torch.optim.Muon(matrices, 0.0, 0.0, adjust_lr_fn="match_rms_adamw")
    optimizers = [theirs, torch.optim.Adam(rest, lr=0.0)]
    pruned = {"c.weight": torch.zeros(3, 5, dtype=torch.bool)}
    pruned["c.weight"][1, 2] = True
    masks = flat.masks(pruned)
    flat.zero(masks)
    masters["c.weight"][1, 2] = 0
    with flat.attached():
        for step, rate in enumerate((1e-2, 3e-2, 0.0, 2e-2)):
            before = {n: m.clone() for n, m in masters.items()}
            x, y = (torch.randn(4, n, dtype=dtype) for n in (5, 4))
            x = x * (torch.inf if step == 2 else 1)
            first = model.a(x) * model.d(x) + model.c(x) * model.e(x)
            (first.sum() + model.b(y).square().sum()).backward()
            gradients = {n: named[n].grad.float().clone() for n in masters}
            held = flat.snapshot()
            norm = flat.step(rate, 1.0, masks)
            flat.clear_gradients()
            if step == 2:  # skipped: neither weights nor moments move
                assert not torch.isfinite(norm)
                for own, other in zip(flat.snapshot(), held, strict=True):
                    assert torch.equal(own, other)
                continue
            gradients["c.weight"][1, 2] = 0
            for name, master in masters.items():
                master.grad = gradients[name]
            torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            for optimizer, times in zip(optimizers, (2, 1), strict=True):
                optimizer.param_groups[0]["lr"] = times * rate
                optimizer.step()
            masters["c.weight"][1, 2] = 0
            for name, master in masters.items():
                moved = named[name].detach().float() - before[name]
                rounded = 0.05 if dtype == torch.float32 else 0.4  # theirs in bfloat16; and weights
                assert relative(moved, master - before[name]) < rounded, (step, name)
    assert model.a.weight.data_ptr() == model.d.weight.data_ptr()


def test_large_matrices_are_stepped_one_by_one(monkeypatch):
    """As many at once as the memory of a chunk allows; the steps are the same."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(5)])
    weights = []
    for chunk in (2**24, 130, 10):
        monkeypatch.setattr("sparsessm_plugin.training.flat._CHUNK", chunk)
        own = copy.deepcopy(model)
        named = dict(own.named_parameters())
        flat = FlatWeights(named, {n for n in named if n.endswith("weight")})
        with flat.attached():
            for _ in range(3):
                sum(layer(torch.eye(8)).square().sum() for layer in own).backward()
                flat.step(1e-2, 1.0, flat.masks({}))
                flat.clear_gradients()
        flat.write_back()
        weights.append([p.clone() for p in own.parameters()])
        assert [count for _, _, count, _ in flat._groups[0].stacks] == {
            2**24: [5],
            130: [2, 2, 1],
            10: [1] * 5,
        }[chunk]
    for others in weights[1:]:
        for one, other in zip(weights[0], others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["mamba", "jamba", "granitemoehybrid", "qwen3_5"])
def test_which_matrices(family):
    model = tiny_model(family)
    names = matrices_of(model, fitted_parameters(model, "all"))
    assert any("mixer" in n or "mamba" in n or "linear_attn" in n for n in names)
    assert all(dict(model.named_parameters())[n].ndim == 2 for n in names)
    assert not [n for n in names if "embed" in n or "lm_head" in n or "A_log" in n]
    assert not matrices_of(model, {"model.none": torch.nn.Parameter(torch.zeros(3, 3))})


def test_a_fit_by_muon_comes_closer_and_goes_on_with_the_same_bits(monkeypatch, tmp_path):
    ready, path = batches(3, 2, 12), tmp_path / "steps.pt"
    fields = {"distill_steps": 8, "distill_learning_rate": 1e-3, "distill_optimizer": "muon"}

    def of(**more):
        return WidthRemovalModifier(keep=16, multiple_of=16, **fields, **more)

    whole, model, adam = tiny_model("mamba"), tiny_model("mamba"), tiny_model("mamba")
    modifier = of()
    run(whole, modifier, ready)
    report = modifier.report()["distillation"]
    assert report["divergence_after"] < report["divergence_before"]
    own, taken = tuner.loss_of, []

    def stop(*args):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(None)
        return own(*args)

    monkeypatch.setattr(tuner, "loss_of", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("mamba"), of(distill_resume=str(path)), ready)
    monkeypatch.setattr(tuner, "loss_of", own)
    assert path.exists()
    run(model, of(distill_resume=str(path)), ready)
    expected = state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state(model).items())
    fields["distill_optimizer"] = "adam"
    run(adam, of(), ready)
    assert any(not torch.equal(value, expected[name]) for name, value in state(adam).items())


@pytest.mark.parametrize(("tokens", "expected"), [(22, "adam"), (24, "muon")])
def test_by_default_whole_models_are_fitted_by_muon_where_a_step_reads_much(
    tokens, expected, monkeypatch
):
    monkeypatch.setattr("sparsessm_plugin.training.distillation._ENOUGH", 24)
    ready = batches(3, 2, tokens // 2)
    models = []
    for optimizer in ("auto", expected):
        model = tiny_model("mamba")
        run(
            model,
            WidthRemovalModifier(keep=16, distill_steps=3, distill_optimizer=optimizer),
            ready,
        )
        models.append(state(model))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_which_optimizers_are_the_defaults():
    width = WidthRemovalModifier(keep=64, distill_steps=1).new_method().settings
    assert width.plan().optimizer == width.distill_optimizer == "auto"
    states = StateRemovalModifier(sparsity=0.5, distill_steps=1).new_method().settings
    assert states.plan().optimizer == "adam"
