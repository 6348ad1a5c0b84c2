"""Selection on a GPU: Triton's kernels against a stable sort."""

from importlib import import_module

import pytest
import torch
from conftest import Guarded
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import CUDA, DEVICE, INTERPRETER, compiled_for_hopper, kernels_run


def kernels():
    return import_module("sparsessm_plugin.backends.largest_gpu")


def by_sorting(scores, count):
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[len(scores) - count :]] = True
    return kept


examples = settings(
    max_examples=60 if CUDA else 15,
    derandomize=True,
    phases=[Phase.generate] if INTERPRETER else list(Phase),
)


@kernels_run
@pytest.mark.parametrize("few", [False, True])
@examples
@given(
    size=st.integers(1, 9000),
    share=st.floats(0, 1),
    places=st.sampled_from([0, 1, 9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    programs=st.sampled_from([1, 1024]),
    seed=st.integers(0, 99),
)
def test_triton_keeps_what_a_stable_sort_keeps(few, size, share, places, dtype, programs, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, size, generator=generator).mul(100).round(decimals=places).to(dtype)
    scores[:, ::7] = -scores[:, ::7].abs()
    scores[0, ::3] = -1.0
    scores[1, ::2] = -0.0
    counts = [round(share * size), size // 2, size]
    module = kernels()
    before = module._FEW, module._PROGRAMS
    module._FEW, module._PROGRAMS = module._FEW if few else 0, programs
    try:
        found = module.keep_largest(
            scores.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        )
    finally:
        module._FEW, module._PROGRAMS = before
    for row, count, kept in zip(scores, counts, found.cpu(), strict=True):
        assert torch.equal(kept, by_sorting(row, count))


@kernels_run
@pytest.mark.parametrize("few", [False, True])
@examples
@given(
    groups=st.integers(1, 2),
    problems=st.integers(1, 3),
    shared=st.booleans(),
    out=st.integers(1, 70),
    before=st.integers(0, 3),
    columns=st.integers(1, 150),
    after=st.integers(0, 3),
    masked=st.booleans(),
    share=st.floats(0, 1),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_triton_keeps_of_a_block(
    few, groups, problems, shared, out, before, columns, after, masked, share, ties, seed
):
    generator = torch.Generator().manual_seed(seed)
    size, total = before + columns + after, groups * problems
    weight = torch.randn(total, size, out, generator=generator)
    weight = weight.round() if ties else weight
    pivots = torch.rand(1 if shared else total, size, generator=generator) + 0.5
    pivots = pivots.round() + 1 if ties else pivots
    allowed = torch.rand(weight.shape, generator=generator) > 0.3 if masked else None
    block = slice(before, before + columns)
    scores = (weight[:, block] / pivots[:, block, None]).square()
    if masked:
        scores = scores.masked_fill(~allowed[:, block], -1)
    scores = scores.mT.reshape(groups, -1)
    counts = (share * (scores >= 0).sum(1)).int()
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    expected = kept.clone()
    chosen = torch.stack([by_sorting(*x) for x in zip(scores, counts.tolist(), strict=True)])
    expected[:, block] = chosen.view(total, out, columns).mT
    module = kernels()
    fast, module._FEW = module._FEW, module._FEW if few else 0
    kept = kept.to(DEVICE)
    try:
        module.keep_of_block(
            weight.to(DEVICE),
            kept,
            pivots.to(DEVICE),
            block.start,
            block.stop,
            counts.to(DEVICE),
            None if allowed is None else allowed.to(DEVICE),
        )
    finally:
        module._FEW = fast
    assert torch.equal(kept.cpu(), expected)


@kernels_run
@pytest.mark.parametrize("few", [False, True])
def test_triton_touches_nothing_around_a_block(few, monkeypatch):
    for name in ("_tally", "_compare", "_keep_few"):
        monkeypatch.setattr(kernels(), name, Guarded(getattr(kernels(), name)))
    monkeypatch.setattr(kernels(), "_FEW", kernels()._FEW if few else 0)
    weight = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(2, 9, 33, dtype=torch.bool, device=DEVICE)
    pivots = torch.full((2, 9), 0.5, device=DEVICE)
    counts = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    kernels().keep_of_block(weight.to(DEVICE), kept, pivots, 3, 8, counts, None)
    block = weight[:, 3:8].mT.reshape(-1).square()
    expected = by_sorting(block, 40).view(2, 33, 5).mT
    assert torch.equal(kept[:, 3:8].cpu(), expected)
    assert not kept[:, :3].any()
    assert not kept[:, 8:].any()


@pytest.mark.skipif(INTERPRETER, reason="nothing is compiled")
@pytest.mark.parametrize("divided", [False, True])
def test_kernels_compile_for_hopper(divided, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = kernels()
    whole = ("counts", "tallies", "states", "ties")
    types = dict.fromkeys([*module._SIZES, "nothing"], "i32") | dict.fromkeys(whole, "*i32")
    types |= dict.fromkeys(["kept", "allowed"], "*u8")
    fixed = {"DIVIDED": divided, "MASKED": True}
    few = {"COUNT": module._FEW, "BITS": 15, **fixed}
    warps = module._FEW // module._EACH
    compiled_for_hopper(module._keep_few, types, few, num_warps=warps)
    passes = {"PASSES": 4, **fixed}
    compiled_for_hopper(module._tally, types, {"PASS": 1, "BLOCK": 1024, **passes})
    tile = {"WRITES": True, "ROWS": 16, "COLUMNS": 128, **passes}
    compiled_for_hopper(module._compare, types, tile)
