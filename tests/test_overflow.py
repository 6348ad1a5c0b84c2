"""Half precision that overflows: messages say where it began, and what became of the model."""

import pytest
import torch
from conftest import DEMO, DEVICE, Loader, batches, state, tiny_model
from llmcompressor import oneshot
from transformers import AutoTokenizer

from sparsessm_plugin import GradientMagnitudeModifier, SparseGPTQModifier, StateRemovalModifier
from sparsessm_plugin.calibration.finite import finite_extremes, is_finite
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.training.gradients import differentiable, loss_of
from sparsessm_plugin.training.non_finite import first_non_finite

LARGE = {torch.float16: 3e4, torch.bfloat16: 1e38}  # twice it overflows


def overflowing(dtype=torch.float16, layer=1):
    """Three layers; what out_proj of one gives is beyond the dtype's range."""
    model = tiny_model("mamba", num_hidden_layers=3).to(dtype)
    with torch.no_grad():
        mixer = model.backbone.layers[layer].mixer
        for weight in (mixer.in_proj.weight, mixer.out_proj.weight):
            weight.copy_(weight.float().sign() * LARGE[dtype] ** 0.75)
    return model


def run(model, modifier, ready=None):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    oneshot(model=model, recipe=modifier, dataset=Loader(ready or batches(4)), processor=tokenizer)


@pytest.mark.parametrize("check", [is_finite, finite_extremes])
@pytest.mark.parametrize("dtype", LARGE)
def test_one_value_that_is_no_number_is_seen(dtype, check):
    x = torch.full((3, 40), torch.finfo(dtype).max, dtype=dtype)
    assert check(x)  # though float32 cannot hold its sum
    assert check(-x)
    for value in (torch.nan, torch.inf, -torch.inf):
        for at in ((0, 0), (1, 17), (2, 39)):
            y = x.clone()
            y[at] = value
            assert not check(y)


@pytest.mark.parametrize("kind", ["weight_x_gradient", "weight_x_gradient_norm"])
@pytest.mark.parametrize("dtype", LARGE)
def test_the_first_layer_that_overflows_is_named(dtype, kind):
    model = overflowing(dtype)
    before = state(model)
    message = (
        r"3 batches .* begin in the output of backbone\.layers\.1\.mixer.* nothing was changed$"
    )
    with pytest.raises(SparseSSMError, match=message):
        run(model, GradientMagnitudeModifier(sparsity=0.5, saliency=kind))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_fewer_batches_than_are_skipped():
    with pytest.raises(SparseSSMError, match=r"every batch .* begin in .*layers\.1\.mixer"):
        run(overflowing(), GradientMagnitudeModifier(sparsity=0.5), batches(1, 1))


def test_rounds_before_stay_and_are_counted():
    # where it computes: what is moved there for the work would go back as it was
    model, steps = tiny_model("mamba").to(DEVICE), []

    def loss_fn(model, batch):
        steps.append(None)
        loss = model(batch["input_ids"]).logits.float().square().mean()
        return loss * float("inf") if len(steps) > 4 else loss

    chosen = GradientMagnitudeModifier(
        sparsity=0.5, rounds=3, saliency="weight_x_gradient", loss_fn=loss_fn
    )
    with pytest.raises(SparseSSMError, match=r"the loss.*; round 1 of 3 is applied to the model"):
        run(model, chosen, batches(4))
    entries = sum(int((w.weight == 0).sum()) for w in chosen.matching_weights(model))
    report = chosen.report()
    assert entries == report["rounds"][0]["pruned"] > 0
    assert report["settings"]["loss_fn"].endswith("loss_fn")


def test_gradients_that_overflow_are_followed_backwards():
    """The forward pass is finite, and the gradient of the middle layer's output is the first."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    model = tiny_model("mamba", num_hidden_layers=3)
    norm = model.backbone.layers[1].norm
    plain = norm.forward
    norm.forward = lambda x: Steep.apply(plain(x))
    batch = batches(1)[0]
    parameters = list(model.parameters())
    with differentiable(model, parameters):
        where = first_non_finite(model, lambda: loss_of(model, batch)[0])
        assert all(p.grad is None for p in parameters)
    assert where == "the gradient of backbone.layers.1.norm.weight"
    norm.forward = lambda x: plain(Steep.apply(x))
    with differentiable(model, parameters):
        where = first_non_finite(model, lambda: loss_of(model, batch)[0])
    assert where == "the gradient of the output of backbone.layers.0"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["gradient", "removal"])
def test_what_the_dense_model_predicts(kind):
    fields = {"distill_steps": 1}
    if kind == "removal":
        chosen = StateRemovalModifier(keep=4, **fields)
    else:
        chosen = GradientMagnitudeModifier(sparsity=0.5, distill_steps=1, distill_loss="dense")
    model = overflowing()
    before = state(model)
    message = r"predicts for batch 1, which begin in the output of backbone\.layers\.1\.mixer"
    with pytest.raises(SparseSSMError, match=message):
        run(model, chosen)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_the_input_of_a_quantized_layer():
    ignore = ["lm_head", "re:.*dt_proj$"]
    model = overflowing()
    message = r"layers\.1\.mixer\.out_proj: its input holds NaN.*; modules quantized before it: 3$"
    with pytest.raises(SparseSSMError, match=message):
        run(model, SparseGPTQModifier(targets=["Linear"], scheme="W8A8", ignore=ignore))


def test_the_sum_of_a_quantized_layer():
    """Inputs are finite in bfloat16, and their squares are beyond float32."""
    model = tiny_model("mamba").bfloat16()
    with torch.no_grad():
        model.backbone.layers[1].norm.weight.fill_(1e25)
    message = (
        r"layers\.1\.mixer\.in_proj: the Hessian of its inputs .*; modules quantized before it: 1$"
    )
    with pytest.raises(SparseSSMError, match=message):
        run(model, SparseGPTQModifier(targets=["re:.*in_proj$"], scheme="W8A8"))
