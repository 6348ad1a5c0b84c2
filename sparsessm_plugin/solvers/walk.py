"""Algorithm 1 of SparseGPT (arXiv 2301.00774): along the columns of a weight, block by block.

A walk is hundreds of kernels of some microseconds each, and launching them takes longer than they
do. Layers have weights of the same few shapes, so on a GPU a walk that comes again is launched as
one CUDA graph, in :func:`walks_captured`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor

from sparsessm_plugin.backends.memory import handed
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.solvers.kernels import WIDTH, choose, sweep

# How far the weights of a replayed walk may be from those of the walk, relative: a product that is
# summed in another order may let another entry stay.
_SAME = 1e-2


@dataclass(frozen=True)
class Counts:
    """How many entries of each block stay, chosen among all rows and problems.

    :param allowed: (..., out, in) bool, what may stay; None for all
    :param kept: for each sparsity, of each block; weights of one sparsity after the other stand
        along the first dimension if there are several
    """

    allowed: Tensor | None
    kept: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Groups:
    """An n:m pattern of each problem.

    :param allowed: (..., out, in) bool, what may stay
    :param size: m, columns of a group
    :param zeros: n, for all problems or one for each along the first dimension
    """

    allowed: Tensor
    size: int
    zeros: Sequence[int]


def walk(
    weight: Tensor, factor: Tensor, rule: Counts | Groups, block_size: int
) -> tuple[Tensor, Tensor]:
    """Weight and mask, (..., out, in) both.

    :param weight: (..., out, in)
    :param factor: (..., in, in), or (in, in) for all problems: upper Cholesky factor of the
        inverse Hessian
    :param rule: how many entries of a block stay, which are chosen when all columns before are
        final; or groups, which are chosen one by one
    :param block_size: columns of a block, rounded up to whole groups
    """
    *problems, out, size = weight.shape
    U = factor.to(weight.dtype)
    if U.dim() > 2:
        U = U.expand(*problems, size, size)
    U = U.reshape(-1, size, size)
    # (P, in, out): a column is contiguous
    W = weight.mT.reshape(-1, size, out).clone(memory_format=torch.contiguous_format)
    group, zeros, counts, allowed = 0, None, None, None
    if isinstance(rule, Groups):
        group = rule.size
        block_size = -(-block_size // group) * group
        mask = rule.allowed.expand(weight.shape).mT.reshape(W.shape).contiguous()
        zeros = handed(rule.zeros, torch.int32, W.device)
        zeros = zeros.repeat_interleave(len(W) // len(zeros))
    else:
        mask = torch.empty_like(W, dtype=torch.bool)
        if rule.allowed is not None:
            allowed = rule.allowed.expand(weight.shape).mT.reshape(W.shape).contiguous()
        # (blocks, sparsities)
        counts = handed(list(zip(*rule.kept, strict=True)), torch.int32, W.device)
    pivots = U.diagonal(dim1=1, dim2=2).contiguous()  # (P or 1, in)
    # a block may be more than a kernel walks in one go
    step = min(block_size, max(WIDTH // (group or 1) * (group or 1), group))
    tensors = _Tensors(W, mask, U, pivots, counts, zeros, allowed)
    found = _run(tensors, _Plan(group, block_size, step))
    # copies, as a graph writes to the same memory again
    pruned, mask = (x.mT.reshape(weight.shape) for x in (found.weight, found.mask))
    kind = torch.contiguous_format
    return pruned.clone(memory_format=kind), mask.clone(memory_format=kind)


class _Tensors(NamedTuple):
    """What a walk reads; the first two are what it makes of them, too.

    :param weight: (P, in, out)
    :param mask: (P, in, out) bool
    :param factor: (P or 1, in, in)
    :param pivots: (P or 1, in)
    :param counts: (blocks, sparsities) int32
    :param zeros: (P,) int32
    :param allowed: (P, in, out) bool
    """

    weight: Tensor
    mask: Tensor
    factor: Tensor
    pivots: Tensor
    counts: Tensor | None
    zeros: Tensor | None
    allowed: Tensor | None


class _Plan(NamedTuple):
    """Columns of a group or 0, of a block, and of what a kernel walks in one go."""

    group: int
    block_size: int
    step: int


def _walk_columns(tensors: _Tensors, plan: _Plan) -> None:
    """Change weight and mask in place."""
    W, mask, U, pivots, counts, zeros, allowed = tensors
    size = W.shape[1]
    for start in range(0, size, plan.block_size):
        end = min(start + plan.block_size, size)
        if counts is not None:
            choose(W, mask, pivots, start, end, counts[start // plan.block_size], allowed)
        for first in range(start, end, plan.step):
            last = min(first + plan.step, end)
            errors = sweep(W, mask, U, first, last, plan.group, zeros)
            if last < size:
                rest = U[:, first:last, last:].mT.expand(len(W), -1, -1)
                W[:, last:].baddbmm_(rest, errors, alpha=-1)


# -- one launch a walk ---------------------------------------------------------------------


class _Graph:
    """A walk as a CUDA graph, with tensors of its own.

    :param tensors: of the first walk; they are not changed
    :raises Exception: whatever a graph cannot hold
    """

    def __init__(self, tensors: _Tensors, plan: _Plan) -> None:
        self._own = _Tensors(*(None if x is None else x.clone() for x in tensors))  # type: ignore[arg-type]
        self._graph = torch.cuda.CUDAGraph()
        home, device = torch.cuda.current_stream(), torch.cuda.current_device()
        # The workspace of cuBLAS is that of the stream which is captured: graphs that may be
        # replayed at once must not share it. The default stream alone cannot be captured.
        at_home = home != torch.cuda.default_stream()
        stream = home if at_home else _stream_to_capture(device)
        stream.wait_stream(home)
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            # torch.cuda.graph would collect garbage and wait for all of the GPU first
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                _walk_columns(self._own, plan)
            finally:
                try:
                    self._graph.capture_end()
                except Exception:  # torch would go on to take memory from the graph's pool
                    with suppress(Exception):
                        torch._C._cuda_endAllocateToPool(device, pool)
                    raise
        home.wait_stream(stream)

    def __call__(self, tensors: _Tensors) -> _Tensors:
        """The tensors of this graph, until it is called again, with the walk's result."""
        for own, given in zip(self._own, tensors, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self._graph.replay()
        return self._own


class _Graphs:
    """The graphs of walks that have come before; a stream has its own."""

    def __init__(self) -> None:
        self.users = 0
        self._found: dict[Any, _Graph | None] = {}
        self._seen: set[Any] = set()
        self._captures = True

    def run(self, tensors: _Tensors, plan: _Plan) -> _Tensors:
        """The walk, in one launch where its like has come twice."""
        kinds = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in tensors)
        key = (_stream_of(tensors.weight.device), plan, kinds)
        graph = self._found.get(key)
        if graph is not None:
            return graph(tensors)
        if key in self._seen and key not in self._found:
            self._found[key] = graph = self._capture(tensors, plan)
        self._seen.add(key)  # once without a graph: kernels are compiled, libraries make plans
        if graph is None:
            _walk_columns(tensors, plan)
            return tensors
        replayed = graph(tensors)
        _walk_columns(tensors, plan)
        apart = torch.linalg.vector_norm(replayed.weight - tensors.weight)
        if not float(apart) <= _SAME * float(torch.linalg.vector_norm(tensors.weight)):
            logger.info("SparseGPT's walk runs without a CUDA graph: replayed it differs")
            self._found[key] = None
        return tensors

    def _capture(self, tensors: _Tensors, plan: _Plan) -> _Graph | None:
        device = tensors.weight.device
        size = sum(x.nbytes for x in tensors if x is not None)
        if not self._captures or not has_room(device, 2 * size):
            return None
        try:
            with torch.cuda.device(device):
                return _Graph(tensors, plan)
        except Exception as error:  # whatever CUDA or cuBLAS does not allow
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.info(f"SparseGPT's walk runs without a CUDA graph: {reason}")
            torch.cuda.synchronize(device)
            self._captures = False
            return None


@cache
def _stream_to_capture(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


_graphs: ContextVar[_Graphs | None] = ContextVar("graphs of walks", default=None)


@contextmanager
def walks_captured() -> Iterator[None]:
    """On a GPU, launch walks that come again as one: many weights of few shapes are pruned."""
    graphs = _graphs.get() or _Graphs()
    graphs.users += 1
    _graphs.set(graphs)
    try:
        yield
    finally:  # those who share them may end in any order
        graphs.users -= 1
        if not graphs.users:
            _graphs.set(None)


def _run(tensors: _Tensors, plan: _Plan) -> _Tensors:
    graphs = _graphs.get()
    if graphs is not None and tensors.weight.is_cuda:
        return graphs.run(tensors, plan)
    _walk_columns(tensors, plan)
    return tensors
