"""The fields of methods that take gradient steps through the whole model."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.methods.base import MethodSettings
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.distillation import Distillation, Distilled, Weights
from sparsessm_plugin.training.resume import ResumeFile, check_resume_path


class TuneSettings(MethodSettings):
    """How long gradient steps are taken, how fast, and in how much memory."""

    distill_steps: int = Field(default=0, ge=0)
    distill_minutes: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    distill_learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    distill_checkpointing: Literal["auto"] | bool = "auto"
    distill_precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def distills(self) -> bool:
        """Whether any steps are asked for."""
        return self.distill_steps > 0 or self.distill_minutes > 0

    @property
    def distilled_by(self) -> str:
        """The fields that ask for it, for messages."""
        fields = ("distill_steps", "distill_minutes")
        return " and ".join(field for field in fields if getattr(self, field))

    def plan(self, repeated: int = 1) -> Plan:
        """For the tuner.

        :param repeated: how often ``distill_steps`` are taken
        """
        checkpointing = self.distill_checkpointing
        return Plan(
            steps=repeated * self.distill_steps,
            minutes=self.distill_minutes,
            learning_rate=self.distill_learning_rate,
            checkpointing=None if checkpointing == "auto" else checkpointing,
            precision=self.distill_precision,
        )


class DistillSettings(TuneSettings):
    """How a model that has become smaller is fitted to what the dense one predicted."""

    fitted_by_default: ClassVar[Weights] = "mixers"

    distill_weights: Literal["auto", "mixers", "all", "all_but_vocabulary"] = "auto"
    distill_optimizer: Literal["auto", "adam", "muon"] = "adam"
    distill_generated: int = Field(default=0, ge=0)
    distill_resume: str | None = None

    @field_validator("distill_resume")
    @classmethod
    def _check_resume(cls, value: str | None) -> str | None:
        if value is not None:
            check_resume_path(value)
        return value

    @model_validator(mode="after")
    def _check_distilled(self) -> "DistillSettings":
        if not self.distills:
            own = ("distill_resume", "distill_weights", "distill_generated", "distill_optimizer")
            for field in own:
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(
                        f"{field} has no meaning without distill_steps or distill_minutes"
                    )
        return self

    def plan(self, repeated: int = 1) -> Plan:
        """For the tuner; see :meth:`TuneSettings.plan`."""
        return replace(super().plan(repeated), optimizer=self.distill_optimizer)

    @property
    def distilled_weights(self) -> Weights | None:
        """Which weights are fitted; None where none are."""
        if not self.distills:
            return None
        given = self.distill_weights
        return self.fitted_by_default if given == "auto" else given

    def distillation(self, model: Any, batches: CalibrationBatches) -> Distillation | None:
        """What a fit needs of the dense model; None where no steps are asked for.

        :raises SparseSSMError: see :class:`Distillation`
        """
        if not self.distills:
            return None
        resume = None
        if self.distill_resume is not None:
            settings = self.model_dump(mode="json", exclude={"distill_resume", "report_path"})
            key = [settings, batches.digest()]
            resume = ResumeFile(self.distill_resume, f"distill_resume = {self.distill_resume}", key)
            with distributed.together(resume.who):
                if distributed.rank() == 0:
                    resume.check()
        return Distillation(
            model, batches, self.distilled_by, self.plan(), resume, self.distill_generated
        )

    def distill(self, distillation: Distillation, model: Any) -> Distilled:
        """Fit a model as these fields say."""
        assert self.distilled_weights is not None
        return distillation.fit(model, self.distilled_weights)
