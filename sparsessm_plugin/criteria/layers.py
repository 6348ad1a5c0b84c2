"""How much a layer does to the stream that passes it."""

import torch
from torch import Tensor


class BlockInfluence:
    """Mean of ``1 - cos(x, x + f(x))`` over tokens: what ShortGPT calls block influence.

    Attributes: ``summed`` (1,) over tokens, ``count`` (1,) of them; both float64.

    :param device: of the stream
    """

    def __init__(self, device: torch.device) -> None:
        self.summed = torch.zeros(1, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, before: Tensor, behind: Tensor, mask: Tensor | None) -> None:
        """Take in the stream before and behind a layer.

        :param before: (b, L, M)
        :param behind: (b, L, M)
        :param mask: (b, L) bool, False at padding; None where there is none
        """
        cosine = torch.cosine_similarity(before.float(), behind.float(), dim=-1)
        distance = (1 - cosine).double()
        if mask is not None:
            distance = distance[mask]
        self.summed += distance.sum()
        self.count += distance.numel()

    @property
    def mean(self) -> float:
        """0 where the layer does nothing, 2 where it turns the stream round."""
        return float(self.summed / self.count.clamp(min=1))
