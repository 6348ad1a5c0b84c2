"""What can only be seen on a GPU; skipped without one."""

import pytest
import torch
from conftest import (
    DEMO,
    MAMBA1,
    STATISTICS,
    Loader,
    batches,
    random_heads,
    random_quantities,
    relative,
    tiny_model,
)

from sparsessm_plugin import fast_forward
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.families.prunable import prunable_weights
from sparsessm_plugin.methods.projections.statistics import add_gram, gram_of
from sparsessm_plugin.recurrence import ScanStatistics, StatisticsRequest, scan
from sparsessm_plugin.recurrence.quantities import HeadQuantities, MixerQuantities

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("pruned_value", ["zero", "memoryless"])
def test_scan_agrees_with_the_cpu(per_step, pruned_value):
    q = random_quantities(3, 50, 130, 16, masked=True)
    on_gpu = {k: v.cuda() for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    request = StatisticsRequest(True, True, pruned_value, per_step)
    expected, result = ScanStatistics(request, 130, 16), ScanStatistics(request, 130, 16, "cuda")
    y = scan(q, expected)
    assert relative(scan(MixerQuantities(**on_gpu), result).cpu(), y) < 1e-5
    for name in STATISTICS:
        assert relative(getattr(result, name).cpu(), getattr(expected, name)) < 1e-5


def test_chunked_scan_agrees_with_the_cpu():
    q = random_heads(3, 200, groups=2, masked=True)
    on_gpu = {k: v.cuda() for k, v in vars(q).items() if isinstance(v, torch.Tensor)}
    assert relative(scan(HeadQuantities(**on_gpu)).cpu(), scan(q)) < 1e-5


@pytest.mark.parametrize(
    ("saliency", "pipeline"),
    [
        ("magnitude", "independent"),
        *(
            (s, p)
            for s in ("hessian", "transition", "output_error")
            for p in ("sequential", "basic")
        ),
    ],
)
def test_oneshot_chooses_what_it_chooses_on_the_cpu(saliency, pipeline):
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsessm_plugin import SparseSSMModifier

    chosen = {}
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(DEMO).to(device)
        ready = [{k: v % 2048 for k, v in b.items()} for b in batches(4, 2, 100, padded=True)]
        if pipeline == "basic" or device == "cuda":
            ready = [{k: v.to(device) for k, v in b.items()} for b in ready]
        oneshot(
            model=model,
            recipe=SparseSSMModifier(sparsity=0.5, saliency=saliency),
            dataset=Loader(ready),
            processor=AutoTokenizer.from_pretrained(DEMO),
            pipeline=pipeline,
        )
        chosen[device] = [(a.A_log == 0).cpu() for a in find_mixers(model)]
    for a, b in zip(chosen["cpu"], chosen["cuda"], strict=True):
        assert a.sum() == b.sum() == a.numel() // 2
        # rounding may swap a few entries whose scores are almost equal
        assert (a == b).double().mean() > 0.99


@pytest.mark.parametrize("pruned_value", ["zero", "memoryless"])
@pytest.mark.parametrize("family", MAMBA1)
def test_pruned_checkpoint_computes_the_same_with_cuda_kernels(family, pruned_value, tmp_path):
    """Saved on the CPU, loaded by stock transformers on the GPU, prefill and decoding."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsessm_plugin import SparseSSMModifier

    model = tiny_model(family)
    oneshot(
        model=model,
        recipe=SparseSSMModifier(sparsity=0.5, pruned_value=pruned_value),
        dataset=Loader(batches()),
        processor=AutoTokenizer.from_pretrained(DEMO),
        output_dir=str(tmp_path),
    )
    ids = torch.randint(1, 96, (2, 40))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        with fast_forward(pruned):  # transformers' own forward refuses the CPU here
            expected = pruned(ids, use_cache=False).logits
        pruned.cuda()
        result = pruned(ids.cuda(), use_cache=False).logits.cpu()
        assert relative(result, expected) < 1e-3
        # decoding from the cache continues what the whole sequence would give
        new = pruned.generate(ids.cuda(), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for n in range(40, 46):
            logits = pruned(new[:, :n], use_cache=False).logits[:, -1]
            best = logits.gather(1, new[:, n : n + 1])[:, 0]
            ended = (new[:, 40:n] == pruned.config.eos_token_id).any(-1)  # padding follows
            assert (ended | (logits.amax(-1) - best < 1e-3 * logits.abs().amax())).all()


def test_evaluation_agrees_with_the_cpu():
    from transformers import AutoModelForCausalLM

    from sparsessm_plugin import evaluate_perplexity

    samples = torch.randint(0, 2048, (4, 64))
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    expected = evaluate_perplexity(model, samples).nll
    assert evaluate_perplexity(model.cuda(), samples).nll == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_added_as_they_are_multiplied(dtype):
    """Sums over batches, in place: of a matrix, of conv1d, at padding, onto another device."""
    model = tiny_model("mamba").to("cuda", dtype)
    kinds = {p.kind: p for p in prunable_weights(model)}
    mask = torch.rand(3, 40, device="cuda") < 0.8
    for kind in ("x_proj", "conv1d"):
        left, right = torch.randn(2, 3, 40, 64, device="cuda").to(dtype)
        for other, where, at in ((left, "cuda", None), (right, "cuda", mask), (right, "cpu", mask)):
            product = gram_of(kinds[kind], left, other, at)
            total = torch.ones_like(product, device=where)
            add_gram(total, kinds[kind], left, other, at)
            assert relative(total.cpu(), 1 + product.cpu()) < 1e-5
