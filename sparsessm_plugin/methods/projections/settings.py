"""The fields of projection pruning."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sparsessm_plugin.methods.base import TargetSettings
from sparsessm_plugin.selection.masks import (
    UNSTRUCTURED,
    check_quoted,
    check_sparsity,
    parse_structure,
)
from sparsessm_plugin.solvers.objective import DAMPENING
from sparsessm_plugin.solvers.projections import SOLVERS

_OF_DENSE_PREFIX = ("half_way", "dense")
# share of W* in the mean of W and W* that is pruned
_TARGET_SHARE = {"own": 0.0, "mixer": 1.0, "half_way": 0.5, "dense": 1.0}


class ProjectionSettings(TargetSettings):
    """The fields of :class:`sparsessm_plugin.SensitivitySparseGPTModifier`, which describes them.

    ``sparsity``, ``allocation``, ``target_output``, ``permute_channels`` and, for ``paper``,
    ``alpha`` are never None once they are checked.
    """

    sparsity: float | None = None
    mask_structure: str = UNSTRUCTURED
    solver: str = "alps"
    allocation: Literal["uniform", "paper", "optimal"] | None = None
    alpha: float | None = None
    target_output: Literal["own", "mixer", "half_way", "dense"] | None = None
    block_size: int = Field(default=128, ge=1)
    dampening_frac: float = Field(default=DAMPENING, ge=0.0, allow_inf_nan=False)
    permute_channels: bool | None = None
    offload_hessians: bool = False

    @property
    def watches_data(self) -> bool:
        return SOLVERS[self.solver].needs_hessian or self.needs_dense_model

    @property
    def needs_dense_model(self) -> bool:
        """Whether the data must pass the dense model first."""
        return self.allocation != "uniform" or self.keeps_dense_inputs

    @property
    def keeps_dense_inputs(self) -> bool:
        """Whether targets are what the dense model gives, behind its own layers."""
        return self.target_output in _OF_DENSE_PREFIX

    @property
    def share(self) -> float:
        """Of all entries, how many are to be zero; ``sparsity`` once it is checked."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def target_share(self) -> float:
        """Of the dense target W* in the mean of W and W*."""
        assert self.target_output is not None
        return _TARGET_SHARE[self.target_output]

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @field_validator("solver")
    @classmethod
    def _check_solver(cls, value: str) -> str:
        return SOLVERS.check(value)

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _check_mask_structure(cls, value: Any) -> Any:
        check_quoted(value)
        if isinstance(value, str):
            parse_structure(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "ProjectionSettings":
        n, m = parse_structure(self.mask_structure)
        if m and self.sparsity is None:
            self.sparsity = n / m
        if self.sparsity is None:
            raise ValueError('give sparsity, or mask_structure "n:m"')
        if m and abs(self.sparsity - n / m) > 1e-6:
            raise ValueError(
                f"mask_structure {self.mask_structure} makes {n / m:g} of the entries zero, "
                f"sparsity says {self.sparsity:g}"
            )
        solver = SOLVERS[self.solver]
        if self.allocation is None:
            self.allocation = "optimal" if solver.needs_hessian and not m else "uniform"
        if m and self.allocation != "uniform":
            raise ValueError(
                f"allocation {self.allocation!r} varies the sparsity, which mask_structure "
                f"{self.mask_structure} fixes; only uniform is allowed with it"
            )
        if self.permute_channels and not m:
            raise ValueError(
                "permute_channels has no meaning without groups: set mask_structure to n:m"
            )
        if self.permute_channels is None:
            self.permute_channels = bool(m)
        self._check_alpha(self.sparsity)
        if self.target_output is None:
            self.target_output = "mixer" if solver.updates else "own"
        if self.target_output != "own" and not solver.updates:
            raise ValueError(
                f"target_output {self.target_output!r} needs new weights, and solver "
                f"{self.solver!r} writes none; allowed: own"
            )
        return self

    def _check_alpha(self, sparsity: float) -> None:
        if self.allocation != "paper":
            if self.alpha is not None:
                raise ValueError(f"alpha has no meaning for allocation {self.allocation!r}")
            return
        self.alpha = 0.04 if self.alpha is None else self.alpha  # as the authors published it
        low, high = sparsity - self.alpha, sparsity + self.alpha
        if not (self.alpha >= 0 and low >= 0 and high < 1):
            raise ValueError(
                f"alpha {self.alpha:g} makes sparsities of {low:g} to {high:g} around "
                f"{sparsity:g}; all must lie in [0, 1)"
            )
