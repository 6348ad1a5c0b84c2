"""Selection on a GPU: Triton's kernels against a stable sort."""

from importlib import import_module

import pytest
import torch
from conftest import Guarded
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import CUDA, DEVICE, INTERPRETER, kernels_run, run_in_interpreter


def test_in_tritons_interpreter():
    run_in_interpreter(__file__, "-k", "triton")


def kernels():
    return import_module("sparsessm_plugin.backends.largest_gpu")


def by_sorting(scores, count):
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[len(scores) - count :]] = True
    return kept


examples = settings(
    max_examples=60 if CUDA else 15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate] if INTERPRETER else list(Phase),
)


@pytest.fixture
def guarded(monkeypatch):
    for name in ("_tally", "_compare", "_keep_few"):
        monkeypatch.setattr(kernels(), name, Guarded(getattr(kernels(), name)))


@kernels_run
@pytest.mark.parametrize("few", [False, True])
@examples
@given(
    size=st.integers(1, 9000),
    share=st.floats(0, 1),
    places=st.sampled_from([0, 1, 9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_triton_keeps_what_a_stable_sort_keeps(few, size, share, places, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, size, generator=generator).mul(100).round(decimals=places).to(dtype)
    scores[:, ::7] = -scores[:, ::7].abs()
    scores[0, ::3] = -1.0
    scores[1, ::2] = -0.0
    counts = [round(share * size), size // 2, size]
    module = kernels()
    before, module._FEW = module._FEW, module._FEW if few else 0
    try:
        found = module.keep_largest(
            scores.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        )
    finally:
        module._FEW = before
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
