"""ALPS against its paper's steps, each solved exactly in float64."""

import ast
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from sparsessm_plugin.backends import precision
from sparsessm_plugin.backends.precision import Factor, split_tf32
from sparsessm_plugin.selection.masks import choose_mask
from sparsessm_plugin.solvers.alps import _Resolvent, alps, refine_on_support
from sparsessm_plugin.solvers.objective import damped_inverse_cholesky, objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(out, n, seed, decay=1.0):
    """A weight and the Hessian of inputs whose spectrum is a power law, each of its own size."""
    mixing = normal(n, n, seed=seed) * torch.arange(1, n + 1).double().pow(-decay / 2)
    size = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(seed))
    x = normal(4 * n, n, seed=seed + 1) @ mixing.T * size
    return normal(out, n, seed=seed + 2).float(), (x.T @ x).float()


def step_by_step(weight, hessian, sparsity, structure):
    """Algorithm 1 of arXiv 2406.07831 with a growing penalty; then least squares on the support.

    :return: mask, and the squared output error with the weights refined on it
    """
    dampened = damped_inverse_cholesky(hessian).hessian
    size = dampened.diagonal().sqrt()
    H, W = dampened / size / size[:, None], weight.double() * size
    mask = before = choose_mask(W.abs(), sparsity, structure)
    D, V, rho = W * mask, torch.zeros_like(W), 0.03
    for step in range(1, 151):
        free = torch.linalg.solve(H + rho * torch.eye(len(H)), (W @ H - V + rho * D).T).T
        mask = choose_mask((free + V / rho).abs(), sparsity, structure)
        D = (free + V / rho) * mask
        V = V + rho * (free - D)
        if step % 4 == 0:
            share = float((mask != before).sum() / mask.sum())
            if not share:
                break
            rho *= 1.4 if share >= 0.1 else 1.3 if share >= 0.005 else 1.15
            before = mask
    refined = refine_on_support(weight.double(), dampened, mask, 400, start=D / size)
    return mask, float(objective(weight, refined, hessian))


def check(problems, sparsity, structure, differs):
    """The same errors in sum, and nearly the same supports."""
    ours = theirs = different = entries = 0.0
    for weight, hessian in problems:
        mask, error = step_by_step(weight, hessian, sparsity, structure)
        found = alps(weight.to(DEVICE), hessian.to(DEVICE), sparsity, structure)
        assert found.mask.sum() == mask.sum()
        ours, theirs = ours + found.error, theirs + error
        different += float((found.mask.cpu() != mask).sum())
        entries += mask.numel()
    # rounding leads elsewhere, as often to less as to more
    assert ours == pytest.approx(theirs, rel=5e-3 if DEVICE == "cuda" else 2e-3)
    # the last that stay and the first that go are worth the same: TF32 decides otherwise
    assert different / entries < (0.06 if DEVICE == "cuda" else differs)


@pytest.mark.parametrize(
    ("shape", "sparsity", "structure"),
    [
        ((192, 64), 0.5, "0:0"),
        ((48, 128), 0.5, "2:4"),
        ((96, 64), 0.5, "4:8"),
        ((128, 64), 0.3, "0:0"),
        ((128, 64), 0.7, "0:0"),
    ],
)
def test_errors_and_supports_are_those_of_exact_steps(shape, sparsity, structure):
    problems = [correlated(*shape, seed=7 * i) for i in range(12)]
    check(problems, sparsity, structure, 0.005)


def test_a_trained_layer():
    """in_proj, x_proj and out_proj of a checkpoint, by inputs that are its own embeddings."""
    folder = Path(os.environ.get("SPARSESSM_ASSETS", "")) / "models" / "mamba-6m"
    if not folder.is_dir():
        pytest.skip("SPARSESSM_ASSETS has no models/mamba-6m")
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {
            kind: file.get_tensor(f"backbone.layers.3.mixer.{kind}.weight").float()
            for kind in ("in_proj", "x_proj", "out_proj")
        }
        x = file.get_tensor("backbone.embeddings.weight")[:4096].double()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    inner = F.silu(x @ weights["in_proj"].double().T[:, :512])
    inputs = {"in_proj": x, "x_proj": inner, "out_proj": inner * inner.roll(1, 0)}
    problems = [(weights[kind], (inputs[kind].T @ inputs[kind]).float()) for kind in weights]
    check(problems, 0.5, "0:0", 0.02)


@pytest.mark.parametrize("reach", [2.0, 8.0])
def test_one_factorisation_serves_many_penalties(monkeypatch, reach):
    x = normal(60, 24, seed=3) * torch.linspace(0.2, 3, 24)
    H = x.T @ x
    H = H / H.diagonal().sqrt() / H.diagonal().sqrt()[:, None]
    monkeypatch.setattr("sparsessm_plugin.solvers.alps._REACH", reach)
    factorised = []
    once = _Resolvent._around

    def counted(self, penalty):
        factorised.append(penalty)
        return once(self, penalty)

    monkeypatch.setattr(_Resolvent, "_around", counted)
    penalties = [0.03 * 1.3**i for i in range(16)]  # up to 1.5
    resolvent = _Resolvent(H.expand(2, 24, 24).contiguous())
    for penalty in penalties:
        expected = penalty * torch.linalg.inv(H + penalty * torch.eye(24))
        found = resolvent.at(penalty)
        tolerance = 2e-5 if reach == 2.0 else 0.015
        assert float(torch.linalg.matrix_norm(found - expected, 2).max()) < tolerance
    assert len(factorised) == (3 if reach == 2.0 else 1)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 3.0])
def test_steps_of_rounded_products_come_as_low(decay, monkeypatch):
    """As on tensor cores, where one product of TF32 is a step, and residuals are exact."""
    weight, hessian = correlated(24, 96, seed=3, decay=decay)
    dampened = damped_inverse_cholesky(hessian).hessian
    mask = choose_mask(weight.abs(), 0.5)
    errors = []

    class Rounded(Factor):
        def roughly_after(self, x):
            return split_tf32(x)[0] @ self._parts[0]

    for splits in (False, True):
        dtype = torch.float32 if splits else None
        monkeypatch.setattr(precision, "_splits", lambda x, dtype=dtype: x.dtype == dtype)
        monkeypatch.setattr("sparsessm_plugin.solvers.alps.Factor", Rounded if splits else Factor)
        found = refine_on_support(weight, dampened, mask, 40, tolerance=3e-5)
        errors.append(float(objective(weight, found, hessian)))
    start = float(objective(weight, weight * mask, hessian))
    assert errors[0] < 0.9 * start
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_kernels_that_write_what_they_read_are_one_warp():
    """Triton gives small tensors to all warps of a program, which do not wait for each other."""
    found = []
    package = Path(precision.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("[1,]"):
                found += [(path.name, ast.unparse(node))] if node.keywords else []
    assert found
    assert [call for _, call in found if "num_warps=1" not in call] == []
