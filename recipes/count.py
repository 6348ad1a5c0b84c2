"""Write the table of README.md: what pipelines.yaml makes of each checkpoint, by its config.

python recipes/count.py CONFIGS.json    # name on the hub -> content of its config.json
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sparsessm_plugin.checkpoints.runtimes import RUNTIMES, ModelFacts, planned_limits
from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.fitting.costs import Census, state_bytes
from sparsessm_plugin.fitting.shapes import Shapes
from sparsessm_plugin.recipes import load_recipe
from sparsessm_plugin.recipes.memory import count_memory
from sparsessm_plugin.recipes.pruning import ModelSource

HERE = Path(__file__).parent
BEGIN, END = "<!-- counted -->", "<!-- end -->"
CONTEXT = 8192  # tokens of the attention cache
RATE = 30e12  # products and sums a second, a guess for the table
_TOKENS = 8192  # of a gradient step
# passes over all calibration tokens: of the model, which LLM Compressor runs twice, and of each
# mixer by itself, for the sums, the fits and their errors
_MODEL_PASSES, _MIXER_PASSES = 2, 9


@dataclass(frozen=True)
class Pipeline:
    """One line of pipelines.yaml."""

    model: str
    recipe: str
    calibration: str
    samples: int
    length: int
    batch: int
    note: str = ""

    @property
    def arguments(self) -> list[str]:
        """What ``sparsessm prune`` is called with."""
        return [
            *(self.model, "--recipe", self.recipe, "--calibration", self.calibration),
            *("--num-samples", str(self.samples), "--max-seq-length", str(self.length)),
            *("--batch-size", str(self.batch)),
            *("--output", f"{self.model.rpartition('/')[2]}-{self.recipe}"),
        ]


def defaults() -> dict[str, Any]:
    """Data and sizes where a line names no others."""
    content: dict[str, Any] = _content()["defaults"]
    return content


def pipelines() -> list[Pipeline]:
    return [Pipeline(**{**defaults(), **line}) for line in _content()["pipelines"]]


def _content() -> Any:
    return yaml.safe_load((HERE / "pipelines.yaml").read_text(encoding="utf-8"))


def skeleton_of(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json, on the meta device, in 16 bits."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return Shapes(ModelSource(folder).load_skeleton(), torch.bfloat16).dense


@dataclass(frozen=True)
class Counted:
    """What a pipeline makes of a model.

    :param size: of the states, before and after
    :param parameters: before and after
    :param weights: bytes of all weights, before and after; 8-bit ones with one byte
    :param state: bytes of the cache of a sequence of CONTEXT tokens, before and after
    :param memory: bytes on the GPU while it is pruned
    :param from_disk: the same with weights on disk
    :param work: products and sums with weights
    :param slow: runtimes that leave their fast kernels
    :param refusing: runtimes that do not load it
    """

    size: tuple[int, int]
    parameters: tuple[float, float]
    weights: tuple[float, float]
    state: tuple[float, float]
    memory: float
    from_disk: float
    work: float
    slow: tuple[str, ...]
    refusing: tuple[str, ...]


def count(pipeline: Pipeline, skeleton: nn.Module) -> Counted:
    """What a pipeline makes of a model.

    :param skeleton: on the meta device
    """
    recipe = load_recipe(pipeline.recipe)
    recipe.check_model(skeleton)
    mixers = find_mixers(skeleton)
    N = mixers[0].sizes.state_size
    removal = recipe.modifiers[0]
    kept = removal.kept(N) if hasattr(removal, "kept") else N
    small = Shapes(skeleton).model({"states": kept}) if kept < N else skeleton
    quantized = any("Quantization" in type(m).__name__ for m in recipe.modifiers)
    before, after = Census.of(skeleton).total(), Census.of(small).total()
    facts = ModelFacts.from_model(small)
    met = {
        name: {limit.answer for limit in planned_limits(name, facts)}
        for name in RUNTIMES
        if name != "transformers"
    }
    tokens = pipeline.samples * pipeline.length
    config: Any = skeleton.config.get_text_config()
    mixing = sum(p.numel() for mixer in mixers for p in mixer.mixer.parameters())
    fitted = "reconstruct" in removal.compensations(mixers[0]) if kept < N else False
    steps = removal.reconstruct_steps if fitted else 0
    batch = min(_TOKENS, pipeline.batch * pipeline.length)
    work = 2 * tokens * (_MODEL_PASSES * _active(skeleton) + _MIXER_PASSES * mixing)
    work += 6 * steps * batch * mixing
    from_disk = count_memory(
        skeleton, recipe.modifiers, pipeline.samples, pipeline.length, pipeline.batch
    )
    return Counted(
        (N, kept),
        (before[0], after[0]),
        (before[1], after[1] - (_linear(small) if quantized else 0)),
        (state_bytes(before, CONTEXT), state_bytes(after, CONTEXT)),
        # weights; what enters and leaves a layer and a mixer, float32; copies of a mixer
        before[1] + 16 * tokens * config.hidden_size + 24 * mixing / len(mixers),
        from_disk.computing,
        work,
        tuple(name for name, answers in met.items() if answers == {"slow"}),
        tuple(name for name, answers in met.items() if "no" in answers),
    )


def _active(model: nn.Module) -> float:
    """Weights that a token passes: of experts as many as it is sent to, no embeddings."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 0)
    share = config.num_experts_per_tok / experts if experts > 1 else 1.0
    embeddings = model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    total = sum(
        p.numel() * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()
    )
    return total if config.tie_word_embeddings else total - embeddings


def _linear(model: nn.Module) -> int:
    """Linear weights that 8 bits are written for."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )


def table(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each pipeline, and the notes."""
    made = cache(lambda name: skeleton_of(configs[name]))
    lines = [
        "| checkpoint | recipe | N | parameters | weights | cache | memory | from disk | work "
        "| time | slow | no |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for pipeline in pipelines():
        lines.append(row(pipeline, count(pipeline, made(pipeline.model))))
        if pipeline.note:
            notes.append(f"- `{pipeline.model}` {pipeline.note}.")
    return "\n".join([*lines, "", *notes])


def row(pipeline: Pipeline, found: Counted) -> str:
    cells = [
        f"`{pipeline.model}`",
        f"`{pipeline.recipe}`",
        _arrow(found.size, lambda n: f"{n}"),
        _arrow(found.parameters, lambda n: f"{n / 1e9:.3f} B"),
        _arrow(found.weights, lambda n: f"{n / 1e9:.2f} GB"),
        _arrow(found.state, lambda n: f"{n / 1e6:.1f} MB"),
        _gb(found.memory),
        _gb(found.from_disk),
        f"{found.work / 1e15:.1f} PFLOP",
        f"{max(1, round(found.work / RATE / 60))} min",
        ", ".join(found.slow),
        ", ".join(found.refusing),
    ]
    return "| " + " | ".join(cells) + " |"


def _gb(value: float) -> str:
    return f"{value / 1e9:.0f} GB" if value > 1e10 else f"{value / 1e9:.1f} GB"


def _arrow(pair: tuple[float, float], shown: Any) -> str:
    first, last = map(shown, pair)
    return first if first == last else f"{first} -> {last}"


def main() -> None:
    configs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path = HERE / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(configs)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
