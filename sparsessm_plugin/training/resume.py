"""What an interrupted run of gradient steps goes on from: a file, written whole or not at all."""

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.files import check_path, resumable, write_through
from sparsessm_plugin.training.flat import FlatWeights

_FORMAT = "sparsessm gradient steps 1"
_EVERY = 60.0  # seconds between two writings, or
_SHARE = 20  # so many times what a writing takes, if that is longer
# How far the weights at the start may be from those of the interrupted run, relative: sums on a
# GPU differ in their order.
_SAME = 0.02


@dataclass(frozen=True)
class Progress:
    """How far the interrupted run was.

    :param done: steps
    :param seconds: that these took
    :param skipped: see :class:`NonFiniteGradients`
    """

    done: int
    seconds: float
    skipped: list[str]


class ResumeFile:
    """A file with weights, moments and position of gradient steps.

    Rank 0 writes it and reads it for all.

    :param path: of the file, in a folder that is there
    :param who: for messages: the field and its value
    :param key: what must be alike in the interrupted run, such as settings
    """

    def __init__(self, path: str, who: str, key: Any) -> None:
        self.path = Path(path)
        self.who = who
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._start: Tensor | None = None
        self._due = time.monotonic() + _EVERY

    def is_due(self) -> bool:
        """Whether it is time to write it again; on rank 0, which alone writes."""
        return time.monotonic() >= self._due

    def load(self, weights: FlatWeights, batches: int) -> Progress | None:
        """Go on from the file, if it is there.

        :param weights: as they are before the first step; afterwards as the run had left them
        :param batches: of this rank
        :raises SparseSSMError: the file is damaged or belongs to another run, on every rank alike
        """
        self._start = weights.sample()
        with distributed.together(f"{self.who}, looked for"):
            state = self._read(weights, batches) if distributed.rank() == 0 else None
        numbers = None
        if state is not None:
            numbers = [state["done"], state["seconds"], state["skipped"]]
        numbers = distributed.first(f"{self.who}, read", numbers)
        if numbers is None:
            return None
        done, seconds, skipped = numbers
        if distributed.is_distributed():
            state = self._shared(state, weights)
        assert state is not None
        weights.load(state["weights"])
        return Progress(done, seconds, skipped)

    def save(
        self,
        weights: FlatWeights,
        batches: int,
        done: int,
        seconds: float,
        skipped: list[str],
        finished: bool,
    ) -> None:
        """Write it, without moments where no step follows; rank 0 does."""
        if distributed.rank() != 0:
            return
        begun = time.monotonic()
        content = {
            "format": _FORMAT,
            "key": self._key,
            "described": weights.described(),
            "batches": batches,
            "start": self._start,
            "done": done,
            "seconds": seconds,
            "skipped": list(skipped),
            "finished": finished,
            "weights": weights.state(moments=not finished),
        }
        write_through(self.path, lambda file: torch.save(content, file))
        resumable.add(self.path)
        now = time.monotonic()
        self._due = now + max(_EVERY, _SHARE * (now - begun))

    def check(self) -> None:
        """Refuse a file that is there and of another run, as far as that is known by now.

        :raises SparseSSMError: it is damaged, or of other settings or data
        """
        if self.path.exists():
            self._state()

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=True
            )
            known = state["format"] == _FORMAT
        except Exception as error:
            raise SparseSSMError(
                f"{self.who} holds no gradient steps of an interrupted run; delete it or choose "
                "another file"
            ) from error
        if not known or state["key"] != self._key:
            raise self._other("settings or data")
        return state

    def _other(self, what: str) -> SparseSSMError:
        return SparseSSMError(
            f"{self.who} is of a run with other {what}; delete it or choose another file"
        )

    def _read(self, weights: FlatWeights, batches: int) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state = self._state()
        if state["described"] != weights.described() or state["batches"] != batches:
            raise self._other("weights or sizes")
        if not _alike(state["start"], self._start):
            raise self._other("weights at its start")
        return state

    def _shared(self, state: dict[str, Any] | None, weights: FlatWeights) -> dict[str, Any]:
        """Rank 0's tensors, on all ranks."""
        groups = [] if state is None else state["weights"]
        shape = [[len(group["moments"]), group["steps"]] for group in groups]
        shape = distributed.first(f"{self.who}, sizes", shape)
        tensors = distributed.share(
            f"{self.who}, weights",
            lambda: [t for group in groups for t in (group["masters"], *group["moments"])],
        )
        rest, received = iter(tensors), []
        for moments, steps in shape:
            masters = next(rest)
            received.append(
                {
                    "masters": masters,
                    "moments": [next(rest) for _ in range(moments)],
                    "steps": steps,
                }
            )
        return {"weights": received}


def check_resume_path(path: str) -> None:
    """Refuse a path to which no state can be written.

    :raises ValueError: saying what is wrong with it
    """
    try:
        check_path(path)
    except SparseSSMError as error:
        raise ValueError(str(error)) from error
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the path of a file")
    if not folder.is_dir():
        raise ValueError(f"the folder of {path} does not exist")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder of {path} cannot be written to")


def _alike(saved: Tensor, found: Tensor | None) -> bool:
    if found is None or saved.shape != found.shape:
        return False
    return float((saved - found).norm()) <= _SAME * max(float(found.norm()), math.ulp(0.0))
