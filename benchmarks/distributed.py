"""Two ranks against one: the calibration part and the whole, as ratios in one run.

torchrun --nproc-per-node 2 benchmarks/distributed.py                        # one GPU a rank
torchrun --nproc-per-node 2 benchmarks/distributed.py --hidden 256 --layers 4 \
    --windows 16 --length 512                                                # gloo on a CPU

Rank 0 first works alone, while the others wait; then each rank calibrates its share of the same
windows. A random model of Mamba's layout, random tokens: what is timed does not depend on them.
The calibration part is all but choosing and solving: forward passes and what is summed in them.
"""

import argparse
import copy
import os
import shutil
import statistics
import tempfile
from datetime import timedelta
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# torchrun gives each rank one thread unless it is told otherwise
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))

import torch
import torch.distributed as dist
from common import save
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(modifiers()))
    parser.add_argument("--name", default=None)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, num_hidden_layers=options.layers
    )
    base: Any = MambaForCausalLM(config).eval().to(device)
    folder = tempfile.mkdtemp(prefix="distributed-")
    config.save_pretrained(folder)  # oneshot() reads it once more
    base.config._name_or_path = base.name_or_path = folder
    ids = torch.randint(1, VOCABULARY, (options.windows, options.length))
    batches = [{"input_ids": x} for x in ids.split(options.batch_size)]
    make = modifiers()

    alone = {}
    if os.environ["RANK"] == "0":  # no process group yet, so this is a single process
        for name in options.methods:
            alone[name] = timed(base, make[name], batches, options.repeats)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = [len(batches) * r // size for r in (rank, rank + 1)]
    share = batches[cuts[0] : cuts[1]]
    rows = []
    for name in options.methods:
        together = timed(base, make[name], share, options.repeats)
        each = distributed.gather("costs", {k: together[k] for k in ("calibration", "total")})
        bits = distributed.gather("weights", sum(_bits(w) for w in together["weights"].values()))
        if rank == 0:
            rows.append(row(name, alone[name], each, together["weights"], len(set(bits)) == 1))
    if rank == 0:
        where = torch.cuda.get_device_name() if cuda else "CPU"
        title = (
            f"Mamba, hidden_size {options.hidden}, {options.layers} layers, {options.windows} x "
            f"{options.length} tokens, {size} ranks over {backend} on {where}, "
            f"{torch.get_num_threads()} threads a rank, median of {options.repeats}"
        )
        found = options.name or f"distributed_{'gpu' if cuda else 'cpu'}"
        save(found, table(title, rows), {"title": title, "rows": rows})
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


def row(
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


def table(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        title,
        "",
        "| | calibration s: one process | ranks | ratio | total s: one process | ranks | ratio | "
        "same bits on all ranks | largest relative difference from one process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = [
            f"{r[kind][key]:.2f}"
            for key in ("calibration", "total")
            for kind in ("one", "ranks", "ratio")
        ]
        same = "yes" if r["same_bits_on_ranks"] else "NO"
        lines.append(f"| {r['method']} | {' | '.join(numbers)} | {same} | {r['difference']:.1e} |")
    return "\n".join(lines)


def _bits(tensor: Tensor) -> int:
    return int(tensor.view(torch.int32).sum(dtype=torch.int64))


if __name__ == "__main__":
    main()
