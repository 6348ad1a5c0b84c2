"""Run the benchmarks on the GPUs at hand, in order of what matters, until a time is up.

python benchmarks/run_all.py --seconds 560    # again and again: each goes on from its results

What trains or is timed has a GPU to itself: three that train on one H100 were measured to take
three times as long each, and 15 of any kind 23 times. Pruning waits for the host most of the time,
so that a few share a GPU. A log for each job lies in --logs.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
BIG, SMALL = ("mamba-25m", "mamba2-25m"), ("mamba-6m", "mamba2-6m")
PLACES = 3  # of a GPU; a job takes one or all of them
# Seconds that a job may run on after its budget, for the run it is in.
GRACE = 60
PROJECTIONS = (
    "magnitude",
    "wanda",
    "SparseGPT of LLM Compressor",
    "SparseGPT uniform",
    "paper, alpha 0.04",
    "sparsegpt, optimal, mixer",
    "defaults",
)
TUNED = "tuned to the dense model, 8 rounds"
OTHERS = (TUNED, "tuned, 8 rounds", "tuned to the dense model, 1 round")


@dataclass(frozen=True)
class Job:
    """A script, its arguments, and whether it wants a GPU for itself."""

    arguments: tuple[str, ...]
    alone: bool = True

    @property
    def places(self) -> int:
        return PLACES if self.alone else 1


def jobs() -> dict[str, Job]:
    """Name of each job, which is that of its result -> what to run."""
    found = {"speed_pipeline": Job(("speed.py", "--sections", "pipeline"))}
    for model in BIG:
        found[f"whole_model_quality_{model}"] = Job(
            ("whole_model_quality.py", "--models", model, "--resume", "--methods", *PROJECTIONS),
            alone=False,
        )
    tune = (
        "gradient_quality.py",
        "--resume",
        "--sections",
        "tune",
        "--fields",
        "distill_learning_rate: 5e-4",
    )
    found["gradient_quality_tuned"] = Job(
        (*tune, "--tuned", TUNED, "--tune-seconds", "220", "--tune-seeds", "2")
    )
    found["gradient_quality_tuned_short"] = Job((*tune, "--tuned", *OTHERS, "--tune-seconds", "60"))
    for model in BIG:
        found[f"state_removal_quality_{model}"] = Job(
            ("state_removal_quality.py", "--models", model, "--resume")
        )
    for model in BIG:
        found[f"results_table_{model}"] = Job(
            ("results_table.py", "--models", model, "--resume", "--limit", "200"), alone=False
        )
    for model in SMALL:
        found[f"state_removal_quality_{model}"] = Job(
            ("state_removal_quality.py", "--models", model, "--resume")
        )
    found["gradient_quality"] = Job(
        ("gradient_quality.py", "--resume", "--sections", "prune", "components")
    )
    for model in BIG[:1]:
        script = ("state_removal_quality.py", "--models", model, "--channels", "0.25", "--resume")
        found[f"channel_removal_quality_{model}"] = Job(script)
    found["speed_gpu"] = Job(("speed.py", "--sections", "alog", "growth"))
    found["state_removal_latency"] = Job(("state_removal_latency.py",))
    found["semi_structured"] = Job(("semi_structured.py",))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="for all of it")
    parser.add_argument("--jobs", nargs="+", default=list(jobs()), choices=list(jobs()))
    parser.add_argument("--gpus", nargs="+", default=None, help="default all")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/benchmarks"))
    options = parser.parse_args()
    gpus = options.gpus or [str(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        raise SystemExit("there is no CUDA device; each benchmark says how to run it on a CPU")
    options.logs.mkdir(parents=True, exist_ok=True)
    waiting = list(options.jobs)
    end = time.monotonic() + options.seconds
    free = dict.fromkeys(gpus, PLACES)
    changed = threading.Condition()

    def work(name: str, gpu: str) -> None:
        print(f"{name}: {run(name, gpu, end, options.logs)}", flush=True)
        with changed:
            free[gpu] += jobs()[name].places
            changed.notify()

    threads = []
    with changed:
        while waiting and end - time.monotonic() > GRACE:
            fitting = [
                (name, gpu) for name in waiting for gpu in gpus if free[gpu] >= jobs()[name].places
            ]
            if not fitting:
                changed.wait(end - time.monotonic())
                continue
            name, gpu = max(fitting, key=lambda pair: (-waiting.index(pair[0]), free[pair[1]]))
            waiting.remove(name)
            free[gpu] -= jobs()[name].places
            threads.append(threading.Thread(target=work, args=(name, gpu)))
            threads[-1].start()
    for thread in threads:
        thread.join()
    if waiting:
        print(f"not begun: {', '.join(waiting)}")


def run(name: str, gpu: str, end: float, logs: Path) -> str:
    """Run one job to its end, or until the time is up; says how it went."""
    started = time.monotonic()
    script, *arguments = jobs()[name].arguments
    command = [sys.executable, str(HERE / script), *arguments]
    if script != "semi_structured.py":
        command += ["--budget", str(max(1, int(end - started - GRACE)))]
    command += ["--name", name]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
    with (logs / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = str(process.wait(end - started))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "none, it was stopped"
    return f"exit code {code}, {time.monotonic() - started:.0f} s on GPU {gpu}"


if __name__ == "__main__":
    main()
