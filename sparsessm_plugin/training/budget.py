"""How long weights are tuned, in steps or time, and in which order of text."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

WARM_UP = 0.1  # share of the work over which the learning rate rises


@dataclass(frozen=True)
class Plan:
    """How long and how fast weights are tuned.

    :param steps: at most so many; 0 where only the time counts
    :param minutes: at most so long, by the clock of rank 0; 0 where only steps count
    :param learning_rate: the highest
    :param checkpointing: whether layers are computed twice instead of kept; None where the
        memory that is free decides
    :param precision: what matrix products of float32 models are made in
    :param optimizer: ``adam``, or ``muon`` for the matrices of linear layers and Adam for the rest;
        ``auto``: Muon where a step reads enough tokens
    """

    steps: int = 0
    minutes: float = 0.0
    learning_rate: float = 3e-4
    checkpointing: bool | None = None
    precision: str = "auto"
    optimizer: Literal["auto", "adam", "muon"] = "adam"


class Budget:
    """How much of a plan is used up.

    Attributes: ``done``, steps; ``seconds``, that these took.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.done = 0
        self.seconds = 0.0
        self._since: float | None = None

    @property
    def limit(self) -> float:
        """Seconds, at most; infinite where only steps count."""
        return 60.0 * self.plan.minutes or math.inf

    def go(self) -> None:
        """The clock runs."""
        self._since = time.monotonic()

    def elapsed(self) -> float:
        """Seconds by this process's clock."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self.seconds + running

    def pause(self) -> None:
        """The clock stands still."""
        self.seconds, self._since = self.elapsed(), None

    def reached(self, seconds: float, part: int = 1, parts: int = 1) -> bool:
        """Whether the work is done, or the first so many of equal parts of it.

        :param seconds: that have passed, the same on all ranks
        """
        steps = self.plan.steps
        by_steps = bool(steps) and self.done * parts >= part * steps
        return by_steps or seconds * parts >= part * self.limit

    def learning_rate(self, seconds: float) -> float:
        """Of the next step: it rises over the first tenth and falls along a cosine."""
        share = min(1.0, seconds / self.limit)
        if self.plan.steps:
            share = max(share, (self.done + 0.5) / self.plan.steps)
        rise = max(share, 0.01 * WARM_UP) / WARM_UP
        fall = 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))
        return self.plan.learning_rate * (rise if share < WARM_UP else fall)


def batch_of_step(step: int, count: int, seed: int = 0) -> int:
    """Which of so many batches a step goes along.

    First all in their order, then, every time that all have been read, in another one. torch's
    global generator is left alone.

    :param step: counted from 0
    """
    epoch, position = divmod(step, count)
    if not epoch:
        return position
    return _order(epoch, count, seed)[position]


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(epoch: int, count: int, seed: int) -> list[int]:
    key = (epoch, count, seed)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
        _orders[key] = torch.randperm(count, generator=generator).tolist()
    return _orders[key]
