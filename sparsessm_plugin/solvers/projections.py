"""The solvers for projections, by name, with what each can do; all have one signature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsessm_plugin.registry import Registry
from sparsessm_plugin.solvers.objective import Solved

_Solve = TypeVar("_Solve", bound=Callable[..., Solved])


@dataclass(frozen=True)
class Solver:
    """A way to prune a weight, given the Hessian of its inputs.

    :param solve: (weight, hessian, sparsity, structure="0:0", *, keep=None, block_size=128,
        dampening_frac=0.01), with ``inverse=None`` besides if it updates
    :param updates: it writes new values into what is kept, so that a weight may be made to
        reproduce another output than its own
    :param needs_hessian: what it prunes depends on the inputs, so that it needs data
    """

    solve: Callable[..., Solved]
    updates: bool
    needs_hessian: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Solved:
        return self.solve(*args, **kwargs)


# The other files of the folder compute for these, and some are compiled for a device.
SOLVERS: Registry[Solver] = Registry(
    "solver", "sparsessm_plugin.solvers", frozenset({"alternation_gpu", "cpu", "gpu", "kernels"})
)


def register_solver(*, updates: bool, needs_hessian: bool) -> Callable[[_Solve], _Solve]:
    """Decorator: make a function known under its own name; see :class:`Solver`."""

    def register(solve: _Solve) -> _Solve:
        SOLVERS.register(solve.__name__, Solver(solve, updates, needs_hessian))
        return solve

    return register
