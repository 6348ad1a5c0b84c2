"""The solvers for projections, by name; all have one signature."""

from collections.abc import Callable

from sparsessm_plugin.solvers.alps import alps
from sparsessm_plugin.solvers.magnitude import magnitude
from sparsessm_plugin.solvers.objective import Solved
from sparsessm_plugin.solvers.sparsegpt import sparsegpt
from sparsessm_plugin.solvers.wanda import wanda

# (weight, hessian, sparsity, structure="0:0", *, keep=None, block_size=128, dampening_frac=0.01)
SOLVERS: dict[str, Callable[..., Solved]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
}
