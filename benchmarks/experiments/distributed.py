"""Two ranks against one: the calibration part and the whole, as ratios in one run.

torchrun --nproc-per-node 2 benchmarks/run.py distributed                    # one GPU a rank
torchrun --nproc-per-node 2 benchmarks/run.py distributed --hidden 256 --layers 4 \\
    --windows 16 --length 512 --name distributed_cpu                         # gloo on a CPU

Rank 0 first works alone, while the others wait; then each rank calibrates its share of the same
windows. A random model of Mamba's layout, random tokens: what is timed does not depend on them.
The calibration part is all but choosing and solving: forward passes and what is summed in them.
"""

import copy
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from harness import Configuration, Experiment, Job, markdown
from pydantic import Field

# torchrun gives each rank one thread unless it is told otherwise
if "RANK" in os.environ:
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

from sparsessm_plugin import distributed
from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource

VOCABULARY = 1024
SOLVING = ("compress", "allocate")  # stages of a modifier's cost that are no calibration


def modifiers() -> dict[str, Any]:
    from sparsessm_plugin.modifiers import SensitivitySparseGPTModifier, SparseSSMModifier

    return {
        "A_log, output_error": lambda: SparseSSMModifier(sparsity=0.5),
        "A_log, vote of the paper": lambda: SparseSSMModifier(sparsity=0.5, saliency="hessian"),
        "projections, defaults": lambda: SensitivitySparseGPTModifier(sparsity=0.5),
        "projections, SparseGPT": lambda: SensitivitySparseGPTModifier(
            sparsity=0.5, solver="sparsegpt", allocation="uniform"
        ),
    }


class Fields(Configuration):
    """Of the model, the windows and the methods."""

    hidden: int = Field(768, description="hidden_size")
    layers: int = Field(24, description="of the model")
    windows: int = Field(64, description="of random tokens")
    length: int = Field(2048, description="tokens a window")
    batch_size: int = Field(4, description="windows")
    repeats: int = Field(3, description="whose median counts")
    methods: list[str] = Field(list(modifiers()), description="beside each other")


def run(job: Job) -> Iterator[Any]:
    """Every method by rank 0 alone, then by all ranks."""
    if "RANK" not in os.environ:
        raise SystemExit("torchrun --nproc-per-node 2 benchmarks/run.py distributed")
    chosen: Fields = job.configuration
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=chosen.hidden, num_hidden_layers=chosen.layers
    )
    base: Any = MambaForCausalLM(config).eval().to(device)
    folder = tempfile.mkdtemp(prefix="distributed-")
    config.save_pretrained(folder)  # oneshot() reads it once more
    base.config._name_or_path = base.name_or_path = folder
    ids = torch.randint(1, VOCABULARY, (chosen.windows, chosen.length))
    batches = [{"input_ids": x} for x in ids.split(chosen.batch_size)]
    make = modifiers()
    alone = {}
    if os.environ["RANK"] == "0":  # no process group yet, so this is a single process
        for name in chosen.methods:
            alone[name] = timed(base, make[name], batches, chosen.repeats)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = [len(batches) * r // size for r in (rank, rank + 1)]
    share = batches[cuts[0] : cuts[1]]
    where = torch.cuda.get_device_name() if cuda else "CPU"
    job.numbers["title"] = (
        f"Mamba, hidden_size {chosen.hidden}, {chosen.layers} layers, {chosen.windows} x "
        f"{chosen.length} tokens, {size} ranks over {backend} on {where}, "
        f"{torch.get_num_threads()} threads a rank, median of {chosen.repeats}"
    )
    rows: list[dict[str, Any]] = []
    job.numbers["rows"] = rows
    for name in chosen.methods:
        together = timed(base, make[name], share, chosen.repeats)
        each = distributed.gather("costs", {k: together[k] for k in ("calibration", "total")})
        bits = distributed.gather("weights", sum(_bits(w) for w in together["weights"].values()))
        if rank == 0:
            same = len(set(bits)) == 1
            rows.append(row_of(name, alone[name], each, together["weights"], same))
            yield rows[-1]
    shutil.rmtree(folder)
    dist.barrier()
    dist.destroy_process_group()


def timed(base: Any, make: Any, batches: list[dict[str, Tensor]], repeats: int) -> dict[str, Any]:
    """Median seconds of a run on fresh copies of a model, after one to warm up; its weights."""
    from llmcompressor import oneshot

    tokenizer = ModelSource(DEMO_MODEL).load_tokenizer()
    calibration, total = [], []
    for repeat in range(repeats + 1):
        model, modifier = copy.deepcopy(base), make()
        ready = batches[:1] if repeat == 0 else batches
        loader: DataLoader[Any] = DataLoader(ready, batch_size=None)  # type: ignore[arg-type]
        oneshot(
            model=model,
            recipe=modifier,
            dataset=loader,
            processor=tokenizer,
            sequential_targets=["MambaBlock"],
        )
        if repeat:
            seconds = modifier.report()["cost"]["seconds"]
            total.append(seconds["total"])
            calibration.append(seconds["total"] - sum(seconds.get(s, 0.0) for s in SOLVING))
    return {
        "calibration": statistics.median(calibration),
        "total": statistics.median(total),
        "weights": {name: p.detach().cpu() for name, p in model.named_parameters()},
    }


def row_of(
    name: str, alone: dict[str, Any], each: list[dict[str, float]], weights: Any, same: bool
) -> dict[str, Any]:
    """One method: seconds of one process and of the slowest rank, and how the weights compare."""
    slowest = {key: max(rank[key] for rank in each) for key in ("calibration", "total")}
    pairs = [(alone["weights"][n].float(), w.float()) for n, w in weights.items()]
    return {
        "method": name,
        "one": {key: alone[key] for key in slowest},
        "ranks": slowest,
        "ratio": {key: alone[key] / value for key, value in slowest.items()},
        "same_bits_on_ranks": same,
        "difference": max(float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs),
    }


def _bits(tensor: Tensor) -> int:
    return int(tensor.view(torch.int32).sum(dtype=torch.int64))


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """A row a method."""
    lines = []
    for r in numbers["rows"]:
        figures = [
            f"{r[kind][key]:.2f}"
            for key in ("calibration", "total")
            for kind in ("one", "ranks", "ratio")
        ]
        same = "yes" if r["same_bits_on_ranks"] else "NO"
        lines.append([r["method"], *figures, same, f"{r['difference']:.1e}"])
    head = ["", "calibration s: one process", "ranks", "ratio", "total s: one process", "ranks"]
    head += ["ratio", "same bits on all ranks", "largest relative difference from one process"]
    return f"{numbers['title']}\n\n" + markdown(head, lines)


EXPERIMENT = Experiment(
    measures="two ranks against one process",
    device="CPU or GPU",
    seconds=300,
    subjects="Mamba shapes",
    configuration=Fields,
    run=run,
    render=render,
    results={
        "distributed_gpu": {"layers": 12, "repeats": 1},
        "distributed_gpu_wide": {"hidden": 1536, "layers": 12, "repeats": 1},
    },
)
