"""Several ranks that calibrate together: sums, choices and errors that all of them share.

Each rank reads its share of the data, as LLM Compressor deals it out under ``torchrun``. What is
summed over data is summed over ranks once a layer, never once a batch, so that shares may differ
in size. Without a process group every function here does nothing but hand back what it was given.

Ranks meet through the key-value store of their process group, whatever the backend: a small value
from each, a check that all stand at the same point, and one decision, the same everywhere, to
go on or to stop. Only after that are tensors sent, so that no rank waits for one that has failed.
Every rank gives signs of life to the store; one that falls silent stops the others.
"""

import atexit
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from sparsessm_plugin.errors import SparseSSMError

T = TypeVar("T")

# Seconds between signs of life, and without one until a rank counts as dead. Python code that
# does not let other threads run, a compiled CPU kernel say, must end well before that.
_SIGN, _SILENT = 2.0, 40.0
# A rank that lives but does not come: it has left the run by an error that nobody told us of.
_LONGEST = 1800.0
# Seconds that rank 0 is given to tidy up before the others end: torchrun kills it when one does.
_TIDY = 10.0
_PAUSE = 0.01  # seconds between looks at what the others do, at most
_BUCKET = 2**24  # numbers that are summed over ranks in one go


class RanksError(SparseSSMError):
    """Another rank failed, died, or does not fit; the message names it on every rank."""


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def start(cuda: bool) -> Iterator[None]:
    """Make the process group of a program that torchrun has started on several ranks.

    Around all that the program does. Elsewhere, and where there is a group already, it does
    nothing. Of the ranks that leave by an error only the first hands it on, to be shown; the
    others raise SystemExit.

    :param cuda: over NCCL, the GPU of its local rank to each; otherwise over gloo
    :raises SparseSSMError: there are fewer GPUs than ranks on this machine
    """
    several = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not several or dist.is_initialized():
        yield
        return
    ranks_here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if cuda and ranks_here <= gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    ranks = _Ranks.get()
    ranks.patience = math.inf  # every error is told, so a rank that lives is at work
    try:
        if cuda and ranks_here > gpus:
            raise SparseSSMError(
                f"{ranks_here} ranks need a GPU each, and there are {gpus}; start as many ranks as "
                "there are GPUs, or choose the CPU"
            )
        yield
        gather("the end", None)
    except BaseException as error:
        fail(error)
        if ranks.part():
            raise
        raise SystemExit(1) from error
    # not after an error, when NCCL might wait for a rank that is gone
    ranks.ended.set()
    dist.destroy_process_group()


def gather(what: str, value: T) -> list[T]:
    """What every rank gives, in the order of ranks.

    :param what: names the point of the program; all ranks must come to the same one
    :param value: something that JSON can hold
    :raises RanksError: a rank has failed, died or stands at another point; on every rank alike
    """
    return _Ranks.get().meet(what, value) if is_distributed() else [value]


def total(what: str, *numbers: float) -> list[float]:
    """Sums over ranks, in the order of ranks, so the same bits everywhere; see :func:`gather`."""
    each = gather(what, list(numbers))
    return [sum(column) for column in zip(*each, strict=True)]


def first(what: str, value: T) -> T:
    """What rank 0 gives; see :func:`gather`."""
    return gather(what, value if rank() == 0 else None)[0]  # type: ignore[return-value]


def reduce_sum(
    what: str, tensors: Mapping[str, Tensor | None], to: int | None = None
) -> dict[str, Tensor]:
    """Sums over ranks, in float64 whatever the dtype, the same bits on every rank.

    :param what: see :func:`gather`
    :param tensors: by name; one that a rank lacks, or has None of, counts as zeros there. Shapes
        may differ in the first dimension: shorter ones count as zeros behind their end. They are
        overwritten where the shape stays
    :param to: the only rank that gets the sums; what the others are given back is of no use
    :return: the sums, in the dtype and on the device of what was given
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not is_distributed():
        return given
    described: dict[str, Any] = {n: [list(t.shape), str(t.dtype)] for n, t in given.items()}
    plan: dict[str, tuple[list[int], torch.dtype]] = {}
    for other, has in enumerate(gather(what, described)):
        for name, (shape, dtype) in has.items():
            known = plan.setdefault(name, (shape, _dtype(dtype)))[0]
            if shape[1:] != known[1:] or len(shape) != len(known):
                raise RanksError(
                    f"{what}: {name} is {tuple(shape)} on rank {other}, {tuple(known)} before it"
                )
            if shape:
                known[0] = max(known[0], shape[0])
    device = next((t.device for t in given.values()), torch.device("cpu"))
    sums = {
        name: _grown(given.get(name), shape, dtype, device) for name, (shape, dtype) in plan.items()
    }
    for bucket in _buckets(list(sums.values())):
        packed = torch.cat([t.reshape(-1).to(_device(), torch.float64) for t in bucket])
        _finish(what, dist.reduce(packed, dst=to or 0, async_op=True))
        if to is None:  # and not all_reduce, which need not give all ranks the same bits
            _finish(what, dist.broadcast(packed, src=0, async_op=True))
        if to in (None, rank()):
            for t, part in zip(bucket, packed.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view(t.shape))
    return sums


def average(what: str, tensors: Sequence[Tensor]) -> None:
    """Means over ranks, in place, in float32 and the same bits on every rank.

    For what all ranks do equally often, such as gradient steps: they do not meet before it, and
    one that is gone is noticed all the same.

    :param what: for messages
    :param tensors: of the same shapes on every rank
    :raises RanksError: a rank has failed or died
    """
    if not is_distributed():
        return
    for bucket in _buckets(list(tensors)):
        packed = torch.cat([t.reshape(-1).to(_device(), torch.float32) for t in bucket])
        _finish(what, dist.reduce(packed, dst=0, async_op=True))
        _finish(what, dist.broadcast(packed, src=0, async_op=True))
        packed /= world_size()
        for t, part in zip(bucket, packed.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view(t.shape))


def reduce_fields(what: str, statistics: Any, to: int | None = None) -> None:
    """:func:`reduce_sum` of all tensors that an object holds as attributes, in place."""
    held = {n: v for n, v in vars(statistics).items() if v is None or isinstance(v, Tensor)}
    vars(statistics).update(reduce_sum(what, held, to))


def share(
    what: str,
    compute: Callable[[], Sequence[Tensor]],
    source: int = 0,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Let one rank compute, and give all of them what it found, bit by bit.

    :param what: see :func:`gather`
    :param compute: called on rank ``source`` only; where it raises, all ranks stop
    :param source: the rank that computes
    :param device: where the others want the tensors; default the CPU
    """
    if not is_distributed():
        return list(compute())
    tensors: list[Tensor] | None = None
    if rank() == source:
        try:
            tensors = [t.detach() for t in compute()]
        except BaseException as error:
            fail(error)
            raise
    described: list[Any] = [[list(t.shape), str(t.dtype)] for t in tensors or ()]
    received = []
    for i, (shape, dtype) in enumerate(gather(what, described)[source]):
        new = torch.empty(shape, dtype=_dtype(dtype), device=_device())
        if tensors is not None:
            new.copy_(tensors[i])
        # as bytes: not every backend knows every dtype
        if new.numel():
            _finish(what, dist.broadcast(new.view(-1).view(torch.uint8), src=source, async_op=True))
        received.append(new.to(device or "cpu"))
    return received if tensors is None else tensors


def fail(error: BaseException) -> None:
    """Tell the other ranks that this one stops; they raise when they come to meet it."""
    if is_distributed() and not isinstance(error, RanksError):
        with suppress(Exception):  # the error itself must not be hidden
            _Ranks.get().leave(str(error).strip() or type(error).__name__)


@contextmanager
def together(what: str) -> Iterator[None]:
    """Raise on all ranks what is raised inside on any, naming the ranks unless all agree.

    For checks before anything is changed. All ranks can go on afterwards.
    """
    try:
        yield
    except RanksError:
        raise
    except SparseSSMError as error:
        if not is_distributed():
            raise
        messages: list[str | None] = gather(what, str(error))
        alike = len(set(messages)) == 1
        raise RanksError(str(error) if alike else _by_rank(messages)) from error
    except BaseException as error:
        fail(error)
        raise
    else:
        messages = gather(what, None)
        if any(messages):
            raise RanksError(_by_rank(messages))


def named(ranks: Sequence[int]) -> str:
    """Ranks in words, for a message."""
    numbers = [str(r) for r in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def _by_rank(messages: list[str | None]) -> str:
    by_message: dict[str, list[int]] = {}
    for r, message in enumerate(messages):
        if message:
            by_message.setdefault(message, []).append(r)
    return "; ".join(f"{named(ranks)}: {message}" for message, ranks in by_message.items())


# -- tensors -----------------------------------------------------------------------------


def _device() -> torch.device:
    """Where the process group's backend wants tensors."""
    for entry in dist.get_backend_config().split(","):
        kind, _, backend = entry.partition(":")
        if backend not in ("gloo", "mpi"):
            return torch.device(kind, torch.accelerator.current_device_index())
    return torch.device("cpu")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _grown(
    tensor: Tensor | None, shape: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if tensor is not None and list(tensor.shape) == shape:
        return tensor.detach()
    grown = torch.zeros(shape, dtype=dtype, device=device)
    if tensor is not None:
        grown[: len(tensor)] = tensor
    return grown


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Views of the tensors, a limited number of numbers at a time."""
    bucket: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if tensor.ndim > 0 and tensor.numel() > _BUCKET:
            pieces = tensor.split(max(1, _BUCKET // tensor[0].numel()))
        else:
            pieces = (tensor,)
        for piece in pieces:
            if bucket and count + piece.numel() > _BUCKET:
                yield bucket
                bucket, count = [], 0
            bucket.append(piece)
            count += piece.numel()
    if bucket:
        yield bucket


def _finish(what: str, work: Any) -> None:
    """Wait for a collective, and for no rank that has died in it."""
    ranks, pause = _Ranks.get(), 1e-5
    try:
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
            if pause == _PAUSE and (reason := ranks.who_is_gone(what, range(ranks.size))):
                raise RanksError(reason)
        work.wait()
    except RuntimeError as error:  # gloo's way to say that a connection was closed
        until = time.monotonic() + _SILENT + _SIGN
        while time.monotonic() < until:
            if reason := ranks.who_is_gone(what, range(ranks.size)):
                raise RanksError(reason) from error
            time.sleep(0.1)
        raise RanksError(f"{what}: {str(error).splitlines()[0]}") from error


# -- meeting -----------------------------------------------------------------------------


class _Ranks:
    """This process among the ranks of the default process group."""

    _known: "_Ranks | None" = None

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = dist.PrefixStore("sparsessm", _get_default_store())
        self.meetings = 0
        self.patience = _LONGEST
        # rank -> its latest sign of life, and when it was first seen
        self.signs: dict[int, tuple[bytes, float]] = {}
        self.ended = threading.Event()
        # a connection of its own: a store's connection does one thing at a time
        own: Any = self.store
        threading.Thread(target=self._live, args=(own.clone(),), daemon=True).start()
        atexit.register(self._exit)

    @classmethod
    def get(cls) -> "_Ranks":
        if cls._known is None or cls._known.group is not dist.group.WORLD:
            if cls._known is not None:
                cls._known.ended.set()
            cls._known = cls()
        return cls._known

    def _live(self, store: Any) -> None:
        me, count = f"{socket.gethostname()}, process {os.getpid()}", 0
        with suppress(Exception):  # the store ends with the run
            while not self.ended.is_set():
                store.set(f"alive/{self.rank}", f"{me}\n{count}")
                count += 1
                self.ended.wait(_SIGN)

    def _exit(self) -> None:
        if dist.is_initialized() and dist.group.WORLD is self.group:
            with suppress(Exception):
                self.leave("its process ended")

    def leave(self, reason: str) -> None:
        """Leave word that this rank comes to no meeting any more."""
        self.store.compare_set(f"failed/{self.rank}", "", reason)

    def part(self) -> bool:
        """Leave the program after an error; whether this rank is the first to do so."""
        me = str(self.rank)
        try:
            first = self.store.compare_set("parted", "", me).decode() == me
        except RuntimeError:  # nothing left to agree by
            return True
        with suppress(RuntimeError):
            if self.rank == 0:
                self.store.set("tidy", "")
            else:
                self.store.wait(["tidy"], timedelta(seconds=_TIDY))
        return first

    def meet(self, what: str, value: Any) -> list[Any]:
        """See :func:`gather`."""
        self.meetings += 1
        n = self.meetings
        keys = [f"{n}/{r}" for r in range(self.size)]
        with self._store_errors(what):
            self.store.set(keys[self.rank], json.dumps([what, value]))
            decision = self._decide(what, n, keys)
            if decision:
                raise RanksError(decision)
            each = [json.loads(self.store.get(key)) for key in keys]
            # all have come here, so nobody reads what the meeting before the last one left
            self.store.delete_key(f"{n - 2}/{self.rank}")
            if self.rank == 0:
                self.store.delete_key(f"{n - 2}/decision")
        points = [point for point, _ in each]
        if len(set(points)) > 1:
            raise RanksError(
                "the ranks do different things, so their scripts or recipes differ: "
                + _by_rank(points)
            )
        return [value for _, value in each]

    def _decide(self, what: str, n: int, keys: list[str]) -> str:
        """Empty once all ranks have come; why to stop if one of them never will.

        Whoever knows first decides for all: otherwise one rank might go on, and then wait for
        another that has seen a reason to stop.
        """
        decided = f"{n}/decision"
        missing = [r for r in range(self.size) if r != self.rank]
        started, pause = time.monotonic(), 1e-4
        while not self.store.check([decided]):
            missing = [r for r in missing if not self.store.check([keys[r]])]
            reason = self.who_is_gone(what, missing)
            if missing and not reason and time.monotonic() - started > self.patience:
                reason = (
                    f"{named(missing)} did not come to {what} for {self.patience / 60:.0f} minutes"
                )
            if reason or not missing:
                return self._decision(decided, reason)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return self._decision(decided, "")

    def _decision(self, key: str, reason: str) -> str:
        proposal = json.dumps(reason)
        return str(json.loads(self.store.compare_set(key, "", proposal)))

    def who_is_gone(self, what: str, ranks: Sequence[int]) -> str:
        """Which of these ranks has failed or died, and why; empty if none has."""
        for r in ranks:
            if self.store.check([f"failed/{r}"]):
                return f"rank {r} stopped: {self.store.get(f'failed/{r}').decode()}"
            if r == self.rank or not self.store.check([f"alive/{r}"]):
                continue
            now, sign = time.monotonic(), self.store.get(f"alive/{r}")
            if r not in self.signs or self.signs[r][0] != sign:
                self.signs[r] = sign, now
            elif now - self.signs[r][1] > _SILENT:
                where = sign.decode().partition("\n")[0]
                return (
                    f"rank {r} ({where}) has died: no sign of life for {_SILENT:.0f} s; the others "
                    f"have come to {what}"
                )
        return ""

    @contextmanager
    def _store_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            keeper = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") else "rank 0"
            raise RanksError(
                f"{keeper}, which keeps what the ranks have in common, has stopped; this rank has "
                f"come to {what}"
            ) from error
