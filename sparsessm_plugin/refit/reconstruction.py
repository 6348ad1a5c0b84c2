"""Fit weights of one layer to that layer's dense output by gradient steps.

For what has no closed form: in the Mamba-2 layout a SiLU stands between in_proj and C. The
loss is the layer's own output error on calibration inputs; there is no label, and nothing is
propagated through the model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def reconstruct(
    parameters: Sequence[tuple[nn.Parameter, Tensor | None]],
    loss: Callable[[int], Tensor],
    batches: int,
    steps: int,
    learning_rate: float = 1e-3,
    combine: Callable[[list[Tensor]], None] | None = None,
) -> None:
    """Minimise the mean of ``loss`` over the batches with Adam and a cosine schedule.

    :param parameters: float32 leaf parameters, each with a mask of the entries that may
        change (None for all), which broadcasts against it
    :param loss: of batch i, a scalar that depends on the parameters; of order 1 or less
    :param batches: how many batches there are; they take turns
    :param steps: gradient steps
    :param learning_rate: of Adam at the first step
    :param combine: changes each step's gradients in place, before it is taken; adds them up over
        processes, say
    """
    weights = [parameter for parameter, _ in parameters]
    if not weights or steps < 1:
        return
    flags = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(step % batches).backward()
            if combine is not None:
                combine([w.grad for w in weights if w.grad is not None])
            for weight, mask in parameters:
                if mask is not None and weight.grad is not None:
                    weight.grad.mul_(mask)
            optimizer.step()
            schedule.step()
    for weight, flag in zip(weights, flags, strict=True):
        weight.grad = None
        weight.requires_grad_(flag)
