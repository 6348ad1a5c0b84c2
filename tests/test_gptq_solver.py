"""Masked GPTQ as pure tensor code: against upstream's GPTQ, rounding, and the mask."""

import warnings
from functools import partial

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from sparsessm_plugin.solvers.gptq import masked_gptq

ROWS, COLUMNS, GROUP = 24, 96, 16
GRIDS = [
    pytest.param({"num_bits": 4, "strategy": "group", "group_size": GROUP}, id="int4-group"),
    pytest.param({"num_bits": 4, "strategy": "channel"}, id="int4-channel"),
    pytest.param({"num_bits": 8, "strategy": "channel"}, id="int8-channel"),
    pytest.param({"num_bits": 8, "strategy": "tensor"}, id="int8-tensor"),
    pytest.param({"num_bits": 8, "strategy": "channel", "type": "float"}, id="fp8-channel"),
    pytest.param(
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
        id="int4-group-asymmetric",
    ),
]


def problem(seed=0, samples=300):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    inputs = torch.randn(samples, COLUMNS, generator=generator) @ mixing
    keep = torch.rand(ROWS, COLUMNS, generator=generator) > 0.5
    return weight, inputs.T @ inputs / samples, keep


def grid(weight, settings):
    """Quantization arguments and the scale and zero point of min and max."""
    args = QuantizationArgs(**{"symmetric": True, "type": "int", **settings})
    if args.strategy == QuantizationStrategy.GROUP:
        parts = weight.unflatten(-1, (-1, GROUP))
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == QuantizationStrategy.CHANNEL:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.amin().view(1, 1), weight.amax().view(1, 1)
    return args, *calculate_qparams(low, high, args)


def rounding(args):
    channel = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL})
    return lambda w, scale, zero: fake_quantize(w, scale, zero, channel)


def solve(weight, hessian, keep, args, scale, zero_point, **kwargs):
    return masked_gptq(
        weight,
        hessian,
        keep,
        rounding(args),
        scale,
        None if args.symmetric else zero_point.float(),
        **kwargs,
    )


def error(weight, result, hessian):
    difference = (weight - result).double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("settings", GRIDS)
def test_without_a_mask_it_is_upstreams_gptq(settings, actorder):
    weight, hessian, _ = problem()
    args, scale, zero_point = grid(weight, {**settings, "actorder": actorder})
    expected, losses, _ = quantize_weight(
        weight[None].clone(),
        hessian[None].clone(),
        scale[None],
        zero_point[None],
        None,
        args,
        blocksize=40,
    )
    result = solve(
        weight,
        hessian,
        torch.ones_like(weight, dtype=torch.bool),
        args,
        scale,
        zero_point,
        block_size=40,
        activation_order=actorder is not None,
    )
    assert torch.equal(result.weight, expected[0])
    # upstream's loss is half the objective, with the dampened Hessian
    assert result.error <= 2 * float(losses[0]) * (1 + 1e-4)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("settings", GRIDS)
def test_zeros_stay_and_values_lie_on_the_grid(settings, activation_order):
    weight, hessian, keep = problem()
    pruned = weight * keep
    args, scale, zero_point = grid(pruned, settings)
    result = solve(
        pruned, hessian, keep, args, scale, zero_point, activation_order=activation_order
    )
    assert not result.weight[~keep].any()
    again = fake_quantize(result.weight, scale, zero_point if not args.symmetric else None, args)
    assert torch.equal(again, result.weight)
    assert result.error == pytest.approx(error(pruned, result.weight, hessian), rel=1e-3)
    assert torch.equal(pruned, weight * keep)  # the input is left alone


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", GRIDS)
def test_it_is_better_than_rounding_and_than_masking_afterwards(settings, seed):
    weight, hessian, keep = problem(seed)
    pruned = weight * keep
    args, scale, zero_point = grid(pruned, settings)
    ours = solve(pruned, hessian, keep, args, scale, zero_point).error
    nearest = fake_quantize(pruned, scale, None if args.symmetric else zero_point, args)
    everywhere = torch.ones_like(keep)
    masked_after = solve(pruned, hessian, everywhere, args, scale, zero_point).weight * keep
    assert ours < 0.95 * error(pruned, nearest, hessian)
    assert ours < error(pruned, masked_after, hessian)


def test_the_first_column_makes_the_others_pay_for_its_mask():
    """Two equal inputs: what the mask takes from one column, the other takes over."""
    weight = torch.tensor([[3.0, 1.0]])
    hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    keep = torch.tensor([[False, True]])
    result = masked_gptq(weight, hessian, keep, lambda w, s, z: w, torch.ones(1, 1), dampening=1e-6)
    assert result.weight.tolist() == [[0.0, pytest.approx(4.0, abs=1e-4)]]


def test_block_size_does_not_change_the_result():
    weight, hessian, keep = problem()
    args, scale, zero_point = grid(weight * keep, GRIDS[2].values[0])
    results = [
        solve(weight * keep, hessian.double(), keep, args, scale, zero_point, block_size=size)
        for size in (1, 7, 96, 500)
    ]
    for result in results[1:]:
        assert (result.weight == results[0].weight).float().mean() > 0.999


def test_groups_may_get_their_scale_when_they_are_reached():
    weight, hessian, keep = problem()
    pruned = weight * keep
    args, scale, _ = grid(pruned, GRIDS[0].values[0])
    seen = []

    def rescale(columns):
        seen.append(columns.clone())
        return calculate_qparams(columns.amin(1, True), columns.amax(1, True), args)

    result = masked_gptq(
        pruned, hessian, keep, rounding(args), scale, block_size=40, rescale=rescale
    )
    assert len(seen) == COLUMNS // GROUP
    assert torch.equal(seen[0], pruned[:, :GROUP])  # nothing has been updated yet
    assert not torch.equal(seen[1], pruned[:, GROUP : 2 * GROUP])
    assert not torch.equal(result.scale, scale)
    assert not result.weight[~keep].any()
    assert torch.equal(fake_quantize(result.weight, result.scale, None, args), result.weight)
    one_block = masked_gptq(
        pruned, hessian, keep, rounding(args), scale, block_size=COLUMNS, rescale=rescale
    )
    # but for the odd value that rounds the other way
    close = torch.isclose(one_block.scale, result.scale, rtol=1e-3)
    assert close.float().mean() > 0.95


def test_dead_columns_become_zero_and_harm_nobody():
    weight, hessian, keep = problem()
    hessian[:, 5] = hessian[5] = 0
    args, scale, zero_point = grid(weight * keep, GRIDS[2].values[0])
    result = solve(weight * keep, hessian, keep, args, scale, zero_point)
    rounded = fake_quantize(weight * keep, scale, zero_point, args)
    assert error(weight * keep, result.weight, hessian) < error(weight * keep, rounded, hessian)
    assert not result.weight[:, 5].any()


def test_a_singular_hessian_is_dampened_more_with_one_warning():
    weight, _, keep = problem()
    hessian = torch.ones(COLUMNS, COLUMNS)  # rank 1
    args, scale, zero_point = grid(weight * keep, GRIDS[2].values[0])
    with pytest.warns(RuntimeWarning, match="dampening was raised from 0 to") as caught:
        result = solve(weight * keep, hessian, keep, args, scale, zero_point, dampening=0.0)
    assert len(caught) == 1
    assert 1e-8 <= result.dampening < 1  # of the mean diagonal
    rounded = fake_quantize(weight * keep, scale, zero_point, args)
    assert error(weight * keep, result.weight, hessian) < error(weight * keep, rounded, hessian)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(weight, hessian, keep, args, scale, zero_point).dampening == 0.01


def test_a_layer_that_saw_zeros_only_becomes_zero():
    weight, _, keep = problem()
    args, scale, zero_point = grid(weight * keep, GRIDS[2].values[0])
    nothing = torch.zeros(COLUMNS, COLUMNS)
    assert not solve(weight * keep, nothing, keep, args, scale, zero_point).weight.any()


def test_what_does_not_fit_is_refused():
    weight, hessian, keep = problem()
    args, scale, zero_point = grid(weight, GRIDS[0].values[0])
    call = partial(solve, args=args, zero_point=zero_point)
    with pytest.raises(ValueError, match="do not fit together"):
        call(weight, hessian[:4, :4], keep, scale=scale)
    with pytest.raises(ValueError, match="groups a divisor"):
        call(weight, hessian, keep, scale=scale[:, :5])
    with pytest.raises(ValueError, match="activation_order takes them apart"):
        call(
            weight,
            hessian,
            keep,
            scale=scale,
            activation_order=True,
            rescale=lambda w: (w[:, :1], None),
        )
    with pytest.raises(ValueError, match="cannot be inverted"):
        call(weight, hessian * float("nan"), keep, scale=scale)
