"""How a layer that stays takes over what removed layers did, on streams that are at hand.

First its last linear layer in closed form; then, by gradient steps, all that is its own. The
target is the dense stream where the next layer that stays began: there is no label, and nothing is
propagated through any other layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.precision import tf32
from sparsessm_plugin.cost import kept
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods.layer_passes import LayerPasses, Writer
from sparsessm_plugin.refit.layers import StandIn, fitted_changes, judge, token_weights
from sparsessm_plugin.refit.reconstruction import reconstruct
from sparsessm_plugin.training.gradients import differentiable

# Of a gradient step, in whole rows. For the same time, many small steps do more than a few large.
_STEP_TOKENS = 512
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class LayerFit:
    """What the last linear layer of a layer is to become; the model itself is not changed.

    :param writer: the linear layer; None if none can be fitted
    :param outputs: [batch] (b, L, M) the stream behind the layer as it is
    :param inputs: [batch] (b, L, in) what the linear layer multiplies
    :param change: of its weight and bias, (M, in + 1 with a bias), fitted to all tokens
    :param tried: the same, without the tokens that judge
    :param judged: the error that ``tried`` leaves on the tokens that judge: of an entry of the
        stream, squared, relative to the mean square of the token's
    :param left: the error that ``change`` leaves, over all tokens
    """

    writer: Writer | None
    outputs: list[Tensor]
    inputs: list[Tensor]
    change: Tensor
    tried: Tensor
    judged: float
    left: float

    def streams(self, change: Tensor) -> list[Tensor]:
        """[batch] (b, L, M) behind the layer, with a change of the linear layer."""
        if self.writer is None:
            return self.outputs
        has_bias = self.writer.linear.bias is not None
        weight, bias = change[:, : -1 if has_bias else None], change[:, -1] if has_bias else None
        found = []
        for output, z in zip(self.outputs, self.inputs, strict=True):
            added = F.linear(z.to(change.device).float(), weight, bias) * self.writer.scale
            found.append(kept((output.to(change.device).float() + added).to(output.dtype)))
        return found


@dataclass(frozen=True)
class LayerTask:
    """A layer, and what is expected of it.

    :param passes: over the batches
    :param index: of the layer
    :param small: [batch] (b, L, M) what the layer reads
    :param target: [batch] (b, L, M) what the stream behind it is to be
    """

    passes: LayerPasses
    index: int
    small: list[Tensor]
    target: list[Tensor]

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.passes.names[self.index]

    def stand_in(self, writer: Writer | None, any_values: bool = False) -> LayerFit:
        """Fit the last linear layer, so that the stream behind the layer is the target.

        :param writer: the linear layer; None if none can be fitted
        :param any_values: let the errors be infinite where there are NaN or infinite values
        :raises SparseSSMError: there are
        """
        passes, device = self.passes, self.passes.device
        scale, has_bias = 1.0, False
        weight = torch.empty(self.small[0].shape[-1], 0, device=device)
        if writer is not None:
            weight, scale = writer.linear.weight, writer.scale
            has_bias = writer.linear.bias is not None
        fitted, held = StandIn(weight, has_bias), StandIn(weight, has_bias)
        outputs, inputs = [], []
        with passes.reading(writer) as read:
            for i, stream in enumerate(self.small):
                output = passes.behind(self.index, i, stream)
                z = output[..., :0] if writer is None else read.pop()
                wanted, mask = self.target[i].to(output.device), passes.mask(i)
                real = torch.ones_like(wanted[..., 0]).bool() if mask is None else mask
                error = (wanted.float() - output.float()) / scale
                aside = passes.aside(i)
                for sums, rows in ((fitted, real & ~aside), (held, real & aside)):
                    sums.add_tokens(z[rows], error[rows], token_weights(wanted[rows]))
                outputs.append(kept(output))
                inputs.append(kept(z))
        name = self.name if writer is None else writer.name
        for sums in (fitted, held):
            distributed.reduce_fields(f"sums of {name}", sums, to=0)

        def solve() -> list[Tensor]:
            found = (fitted.gram, fitted.cross, fitted.energy, held.gram, held.cross, held.energy)
            if not all(bool(torch.isfinite(x).all()) for x in found):
                if not any_values:
                    raise SparseSSMError(f"{name}: NaN or infinite values during calibration")
                nothing = torch.zeros_like(fitted.cross).float()
                return [nothing, nothing, torch.full((2,), math.inf, dtype=torch.float64)]
            tried, change = fitted_changes(fitted, held)
            judged, left = judge(fitted, held).left(tried), (fitted + held).left(change)
            errors = torch.tensor([judged, left], dtype=torch.float64) * scale**2
            return [tried.float(), change.float(), errors]

        tried, change, errors = distributed.share(f"change of {name}", solve, device=device)
        return LayerFit(writer, outputs, inputs, change, tried, *map(float, errors))

    # -- gradient steps --------------------------------------------------------------

    def reconstruct(self, fit: LayerFit, steps: int, seed: int) -> list[Tensor] | None:
        """Fit all that is the layer's own by gradient steps.

        They see three rows of four, and stay if the error on the others is lower than after the
        closed form, and so is the error on all once the last linear layer has been fitted again.
        Several ranks take the same steps as one would.

        :param fit: of the last linear layer, from which the steps start
        :param steps: how many
        :param seed: of the order in which the steps see the text
        :return: the streams behind the layer, which the model now has; None if the steps were of
            no use: the model is then what it was
        """
        own = self.passes.own_parameters(self.index)
        if not own:
            return None
        weights = [p.detach().clone() for p in own]
        if fit.writer is not None:
            add_change(fit.writer, fit.tried)
        self._take_steps(own, steps, seed)
        found = None
        if all(bool(torch.isfinite(p).all()) for p in own):
            found = self._better(fit)
        if found is None:
            logger.info(
                f"{self.name}: {steps} steps of reconstruct did not lower the error; the weights "
                "are what they were before the steps"
            )
            for parameter, weight in zip(own, weights, strict=True):
                parameter.copy_(weight)
        return found

    def _better(self, fit: LayerFit) -> list[Tensor] | None:
        """The streams behind the layer after the steps, None if its error was lower before."""
        after = self.stand_in(fit.writer, any_values=True)
        if not (after.judged < fit.judged and after.left < fit.left):
            return None
        if after.writer is not None:
            add_change(after.writer, after.change)
        return after.streams(after.change)

    def _take_steps(self, own: list[nn.Parameter], steps: int, seed: int) -> None:
        chunks = list(self._chunks())
        counts = distributed.gather(f"text for {self.name}", len(chunks))
        everywhere = [(rank, i) for rank, count in enumerate(counts) for i in range(count)]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(everywhere), generator=generator).tolist()

        def loss(step: int) -> Tensor:
            rank, i = everywhere[order[step]]
            total = torch.zeros((), device=self.passes.device)
            if distributed.is_distributed():  # every rank has a gradient for every parameter
                total = 0.0 * torch.stack([p.sum() for p in own]).sum()
            if rank == distributed.rank():
                batch, rows = chunks[i]
                total = total + self._loss(batch, rows)
            return total

        def add_up(gradients: list[Tensor]) -> None:
            distributed.reduce_sum("gradients", {str(i): g for i, g in enumerate(gradients)})

        # steps are far coarser than what tf32 rounds away
        with differentiable(self.passes.model, own, checkpointing=False), tf32():
            pairs: list[tuple[nn.Parameter, Tensor | None]] = [(p, None) for p in own]
            reconstruct(pairs, loss, len(everywhere), steps, _LEARNING_RATE, add_up)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Batch and rows of a gradient step each, without the rows that are held back."""
        for batch, inputs in enumerate(self.passes.batches):
            rows = (~self.passes.aside(batch)[:, 0]).nonzero()[:, 0]
            at_once = max(1, _STEP_TOKENS // inputs["input_ids"].shape[1])
            yield from ((batch, part) for part in rows.split(at_once) if len(part))

    def _loss(self, batch: int, rows: Tensor) -> Tensor:
        x, wanted = (_rows(s[batch], rows, self.passes.device) for s in (self.small, self.target))
        found = self.passes.behind(self.index, batch, x, rows)
        each = (wanted.float() - found.float()).square().mean(-1) * token_weights(wanted)
        mask = self.passes.mask(batch)
        if mask is None:
            return each.mean()
        return (each * mask[rows]).sum() / mask[rows].sum().clamp(min=1)


def _rows(stream: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return stream[rows.to(stream.device)].to(device)


def add_change(writer: Writer, change: Tensor) -> None:
    """Add a change to a linear layer.

    :param writer: the linear layer
    :param change: of its weight and bias, (M, in + 1 with a bias)
    """
    linear = writer.linear
    columns = linear.weight.shape[1]
    linear.weight.copy_(linear.weight.float() + change[:, :columns])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.float() + change[:, columns])
