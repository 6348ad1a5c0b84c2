"""What a user asks for: ``parameters=0.7``, ``memory=1.5GB``, ``state=0.25``, ``speed=1.5``."""

import re
from dataclasses import dataclass
from typing import Literal

from sparsessm_plugin.errors import SparseSSMError, shown

Kind = Literal["parameters", "memory", "state", "speed"]
KINDS: tuple[Kind, ...] = ("parameters", "memory", "state", "speed")
_NUMBERS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
_BYTES = {
    "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What the smaller model may cost, or how fast it must be.

    :param kind: what is counted or measured
    :param ratio: of the dense model's, below 1; of ``speed`` the factor, above 1
    :param most: parameters or bytes, in the place of a ratio
    :param text: as the user wrote it
    """

    kind: Kind
    ratio: float | None
    most: float | None
    text: str

    def limit(self, dense: float) -> float:
        """The largest cost that reaches it; of ``speed`` cost is seconds.

        :param dense: cost of the dense model
        :raises SparseSSMError: the dense model reaches it already
        """
        if self.ratio is not None:
            return dense / self.ratio if self.kind == "speed" else dense * self.ratio
        assert self.most is not None
        if self.most >= dense:
            raise SparseSSMError(
                f"target {self.text}: the model has {dense:,.0f} already; ask for less"
            )
        return self.most


def parse_target(text: str) -> Target:
    """Read one target.

    :raises SparseSSMError: showing it and what is allowed
    """
    kind, separator, value = (part.strip() for part in text.partition("="))
    if not separator or kind not in KINDS:
        raise SparseSSMError(
            f"--target must be parameters, memory, state or speed = a number, got {shown(text)}"
        )
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)", value)
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "")
    if kind == "speed":
        unit = "" if unit == "X" else unit  # 1.5x
        if match is None or unit or not 1 < number < 100:
            raise SparseSSMError(
                "--target speed must be a factor between 1 and 100, as speed=1.5, got "
                f"{shown(text)}"
            )
        return Target("speed", number, None, text)
    if match is not None and not unit and 0 < number < 1:
        return Target(kind, number, None, text)
    units = _NUMBERS if kind == "parameters" else _BYTES
    whole = kind == "parameters" and not unit and number >= 2
    if match is None or not (unit in units or whole) or number <= 0:
        example = "20M" if kind == "parameters" else "40MB"
        raise SparseSSMError(
            f"--target {kind} must be a share between 0 and 1 of what the model has, or a number "
            f"with its unit, as {kind}={example}, got {shown(text)}"
        )
    return Target(kind, None, number * units.get(unit, 1.0), text)


def parse_targets(texts: str | list[str] | tuple[str, ...]) -> tuple[Target, ...]:
    """Read targets that must all be reached, each kind once, with commas or one by one.

    :raises SparseSSMError: none, one that cannot be read, or a kind given twice
    """
    single = [texts] if isinstance(texts, str) else list(texts)
    targets = tuple(parse_target(part) for text in single for part in text.split(","))
    kinds = [target.kind for target in targets]
    if not targets:
        raise SparseSSMError("give a --target, as parameters=0.7")
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise SparseSSMError(f"--target {kind} is given twice")
    return targets
