"""The fields of the removal of state dimensions."""

from typing import Any, Literal

from pydantic import Field, field_validator

from sparsessm_plugin.criteria.key_dims import KEY_DIM_CRITERIA
from sparsessm_plugin.criteria.states import STATE_CRITERIA
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.removal import RemovalSettings
from sparsessm_plugin.registry import Registry
from sparsessm_plugin.selection.subsets import EXHAUSTIVE

Compensation = Literal["D", "C", "B", "reconstruct", "out_proj"]

# Largest N for N^2 features, to mix C alone. B and C together take N^3, for N as in EXHAUSTIVE.
MOST_MIXED = 32
# The criteria of each kind of mixer, by its recurrence.
CRITERIA: dict[str, Registry[Any]] = {
    "selective": STATE_CRITERIA,
    "delta_rule": KEY_DIM_CRITERIA,
}

_KINDS = {
    "selective": "a mixer with a selective recurrence",
    "delta_rule": "a gated delta net",
}


class StateSettings(RemovalSettings):
    """The fields of :class:`sparsessm_plugin.StateRemovalModifier`, which describes them."""

    saliency: str = "output_energy"
    compensate: list[Compensation] | None = None
    reconstruct_steps: int = Field(default=200, ge=1)

    @field_validator("saliency")
    @classmethod
    def _check_saliency(cls, value: str) -> str:
        if not any(value in table for table in CRITERIA.values()):
            known = ", ".join(sorted({name for table in CRITERIA.values() for name in table}))
            raise SparseSSMError(f"saliency of states {shown(value)} is not known; known: {known}")
        return value

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: Any) -> Any:
        if isinstance(value, list | dict):
            raise ValueError(
                f"must be one number, got {shown(value)}: transformers, mamba-ssm and vLLM read "
                "one state size for all layers from the config"
            )
        if isinstance(value, bool):
            raise ValueError(f"must be a whole number, got {value}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, got {value}")
        return value

    @property
    def watches_data(self) -> bool:
        """Whether states are chosen or weights fitted by what enters the mixers."""
        entries = [table[self.saliency] for table in CRITERIA.values() if self.saliency in table]
        data_free = not any(e.needs_data for e in entries) and self.compensate == []
        return not data_free or self.distills

    def kept(self, state_size: int) -> int:
        """How many of the states of a group stay."""
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        return round(state_size * (1 - self.sparsity))

    def compensations(self, adapter: MixerAdapter) -> tuple[str, ...]:
        """What is fitted again in a mixer."""
        if self.compensate is not None:
            return tuple(self.compensate)
        if adapter.recurrence == "delta_rule":
            return ("reconstruct", "out_proj")
        if adapter.mixes_C:
            if adapter.sizes.state_size > MOST_MIXED:
                return ("D", "out_proj")
            if adapter.sizes.state_size > EXHAUSTIVE:
                return ("D", "C", "out_proj")
            return ("D", "C", "B", "out_proj")
        if adapter.norms_state:
            return ("D", "out_proj")
        return ("D", "reconstruct", "out_proj")

    def check_criterion(self, adapter: MixerAdapter, who: str) -> None:
        """Refuse a saliency that is for another kind of mixer.

        :raises SparseSSMError: naming those that this kind has
        """
        table = CRITERIA[adapter.recurrence]
        if self.saliency not in table:
            raise SparseSSMError(
                f"{who}: saliency {shown(self.saliency)} is not for {adapter.name} "
                f"({adapter.family}), {_KINDS[adapter.recurrence]}; allowed: {', '.join(table)}"
            )
