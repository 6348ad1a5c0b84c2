"""2:4 projections on a GPU's sparse tensor cores, against the dense ones, shape by shape.

    python benchmarks/semi_structured.py    # needs a CUDA GPU

The shapes are those of published checkpoints; the weights are random, 2:4 by magnitude, bfloat16.
"""

import argparse
from typing import Any

import torch
from common import save
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--name", default="semi_structured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    check_support(nn.Linear(1, 1, device="cuda"))
    rows: list[dict[str, Any]] = []
    done: dict[tuple[tuple[int, int], bool], ShapeTiming] = {}
    for model in options.models:
        for part, shape in SHAPES[model].items():
            for cuda_graphs in (False, True):
                key = (shape, cuda_graphs)
                if key not in done:
                    done[key], _ = measure(layer(*shape), options.tokens, cuda_graphs)
                timing = done[key]
                print(model, part, "graph" if cuda_graphs else "eager", timing, flush=True)
                rows.append(
                    {"model": model, "part": part, "cuda_graphs": cuda_graphs, **timing.to_dict()}
                )
    save(options.name, table(rows), {"rows": rows})


@torch.no_grad()
def layer(outputs: int, inputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    fours = linear.weight.view(outputs, -1, 4)
    fours.scatter_(-1, fours.abs().topk(2, largest=False).indices, 0.0)
    return linear.requires_grad_(False)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# 2:4 projections: dense against semi-structured sparse",
        "",
        "Microseconds a call, medians; weights read from memory, bfloat16. Sparse is the fastest "
        "library at each number of tokens. eager: as Python launches it; graph: replayed from a "
        "CUDA graph.",
        "",
        "| model | projection | shape | launched | tokens | dense | sparse | ratio | library |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        launched = "graph" if row["cuda_graphs"] else "eager"
        shape = f"{row['out_features']} x {row['in_features']}"
        for i, (tokens, dense) in enumerate(zip(row["tokens"], row["dense_us"], strict=True)):
            times = {library: us[i] for library, us in row["sparse_us"].items()}
            name = f"| {row['model']} | {row['part']} | {shape} | {launched} | {tokens} "
            if not times:
                lines.append(f"{name}| {dense:.1f} | - | - | none |")
                continue
            library = min(times, key=lambda k: times[k])
            lines.append(
                f"{name}| {dense:.1f} | {times[library]:.1f} | {dense / times[library]:.2f} "
                f"| {library} |"
            )
    failed = {(k, v) for row in rows for k, v in row["failed"].items()}
    lines += ["", *(f"{library} was left out where it said: {why}" for library, why in failed)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
