"""2:4 projections on a GPU's sparse tensor cores, against the dense ones, shape by shape.

The shapes are those of published checkpoints; the weights are random, 2:4 by magnitude, bfloat16.
"""

from collections.abc import Iterator
from typing import Any

import torch
from harness import Configuration, Experiment, Job, markdown, needs_gpu
from pydantic import Field
from torch import nn

from sparsessm_plugin.checkpoints.acceleration import ShapeTiming, check_support, measure

# model -> projection -> (outputs, inputs)
SHAPES = {
    "mamba-130m": {"in_proj": (3072, 768), "x_proj": (80, 1536), "out_proj": (768, 1536)},
    "mamba-2.8b": {"in_proj": (10240, 2560), "x_proj": (192, 5120), "out_proj": (2560, 5120)},
    "mamba2-130m": {"in_proj": (3352, 768), "out_proj": (768, 1536)},
    "mamba2-2.7b": {"in_proj": (10576, 2560), "out_proj": (2560, 5120)},
}
TOKENS = (1, 8, 64, 512, 4096, 32768)


class Fields(Configuration):
    """Which shapes."""

    models: list[str] = Field(list(SHAPES), description="shapes of")
    tokens: list[int] = Field(list(TOKENS), description="numbers of them")


def run(job: Job) -> Iterator[Any]:
    """Every projection, launched by Python and from a CUDA graph."""
    needs_gpu()
    check_support(nn.Linear(1, 1, device="cuda"))
    rows: list[dict[str, Any]] = job.numbers.setdefault("rows", [])
    done: dict[tuple[tuple[int, int], bool], ShapeTiming] = {}
    for model in job.configuration.models:
        for part, shape in SHAPES[model].items():
            for cuda_graphs in (False, True):
                key = (shape, cuda_graphs)
                if key not in done:
                    done[key], _ = measure(layer(*shape), job.configuration.tokens, cuda_graphs)
                named = {"model": model, "part": part, "cuda_graphs": cuda_graphs}
                rows.append({**named, **done[key].to_dict()})
                yield rows[-1]


@torch.no_grad()
def layer(outputs: int, inputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    fours = linear.weight.view(outputs, -1, 4)
    fours.scatter_(-1, fours.abs().topk(2, largest=False).indices, 0.0)
    return linear.requires_grad_(False)


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a shape and number of tokens."""
    lines = []
    for row in numbers["rows"]:
        launched = "graph" if row["cuda_graphs"] else "eager"
        shape = f"{row['out_features']} x {row['in_features']}"
        for i, (tokens, dense) in enumerate(zip(row["tokens"], row["dense_us"], strict=True)):
            times = {library: us[i] for library, us in row["sparse_us"].items()}
            cells = [row["model"], row["part"], shape, launched, str(tokens), f"{dense:.1f}"]
            if times:
                library = min(times, key=lambda k: times[k])
                cells += [f"{times[library]:.1f}", f"{dense / times[library]:.2f}", library]
            else:
                cells += ["-", "-", "none"]
            lines.append(cells)
    failed = sorted({(k, v) for row in numbers["rows"] for k, v in row["failed"].items()})
    head = ["model", "projection", "shape", "launched", "tokens"]
    head += ["dense", "sparse", "ratio", "library"]
    return (
        "# 2:4 projections: dense against semi-structured sparse\n\n"
        "Microseconds a call, medians; weights read from memory, bfloat16. Sparse is the fastest "
        "library at each number of tokens. eager: as Python launches it; graph: replayed from a "
        "CUDA graph.\n\n"
        + markdown(head, lines)
        + "\n\n"
        + "\n".join(f"{library} was left out where it said: {why}" for library, why in failed)
    )


EXPERIMENT = Experiment(
    measures="2:4 projections on sparse tensor cores against dense ones",
    device="GPU",
    seconds=120,
    subjects=", ".join(SHAPES),
    configuration=Fields,
    run=run,
    render=render,
    results={"semi_structured": {}},
    extends=("models",),
)
