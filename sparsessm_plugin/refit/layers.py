r"""What the layers that stay take over from layers that are removed, in closed form.

The last linear layer W of a kept layer adds ``r W z`` to the stream, with the family's residual
multiplier r. It is fitted again so that the stream behind the layer is the dense stream x at
the input of the next kept layer:

    min over W, b of  sum_t v_t |x_t - (y_t + r (W z_t + b))|^2 + ridge |W - W_dense|^2

over calibration tokens t, y the small model's stream without the layer's last addition. The
next layer reads the stream through an RMSNorm, which sees directions only, so every token is
weighted by ``v = 1 / mean(x^2)``: without this, tokens with a large stream outweigh all others.
All that is needed are sums of z z^T and of error z^T.
"""

from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.refit.compensation import Regression, best_ridge

# Of the mean diagonal entry. Weaker ones fit the stream better and the model's loss worse.
STAND_IN_RIDGES = (0.1, 1.0, 10.0)


class StandIn(Regression):
    """Sums for the change of a weight (out, in), and of its bias where there is one.

    :param weight: (out, in)
    :param bias: whether the bias changes, too; a further input that is always 1
    """

    def __init__(self, weight: Tensor, bias: bool = False) -> None:
        self.bias = bias
        super().__init__(
            weight.new_empty(len(weight), weight.shape[1] + bias, device=weight.device)
        )
        new: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
        self.energy = torch.zeros(1, **new)
        self.count = torch.zeros(1, **new)

    def add_tokens(self, z: Tensor, error: Tensor, weights: Tensor) -> None:
        """Add tokens.

        :param z: (tokens, in) what the weight multiplies
        :param error: (tokens, out) what its output lacks
        :param weights: (tokens,) v
        """
        if not len(z):
            return
        root = weights.float().sqrt()[:, None]
        z = z.float()
        if self.bias:
            z = torch.cat((z, torch.ones_like(z[:, :1])), dim=1)
        error = error.float() * root
        self.add(z * root, error)
        self.energy += error.square().sum(dtype=torch.float64)
        self.count += error.numel()

    def __add__(self, other: "StandIn") -> "StandIn":  # type: ignore[override]
        total = StandIn(self.cross[:, : -1 if self.bias else None], self.bias)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(total, name, value + getattr(other, name))
        return total

    def left(self, change: Tensor) -> float:
        """The mean squared error of an entry that a change of the weight leaves, weighted by v.

        :param change: (out, in)
        """
        return (float(self.energy) - self.gain(change)) / max(float(self.count), 1.0)


def token_weights(target: Tensor) -> Tensor:
    """(...) v of a dense stream (..., M)."""
    square = target.float().square().mean(-1)
    return 1 / square.clamp(min=torch.finfo(square.dtype).tiny)


def fitted_changes(fitted: StandIn, held: StandIn) -> tuple[Tensor, Tensor]:
    """Changes of the weight at the ridge that suits tokens best that no fit has seen.

    :param fitted: of most tokens
    :param held: of the others; where there are none, those that are fitted judge
    :return: (out, in) float64 each, zero where no fit helps: fitted to most tokens, and to all
    """
    ridge = best_ridge(fitted, judge(fitted, held), STAND_IN_RIDGES)
    if ridge is None:
        return torch.zeros_like(fitted.cross), torch.zeros_like(fitted.cross)
    return fitted.solve(ridge), (fitted + held).solve(ridge)


def judge(fitted: StandIn, held: StandIn) -> StandIn:
    """The sums by which fits are judged: of tokens that none has seen, if there are any."""
    return held if bool(held.count) else fitted
