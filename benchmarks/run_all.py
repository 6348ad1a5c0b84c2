"""Run the benchmarks on the GPUs at hand, in order of what matters, until a time is up.

python benchmarks/run_all.py --seconds 560    # again and again: each goes on from its results

One process a GPU: several on one GPU were measured to be slower together than one after the other
(15 on an H100 took 23 times as long each). A log for each job lies in --logs.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
BIG, SMALL = ("mamba-25m", "mamba2-25m"), ("mamba-6m", "mamba2-6m")
# Seconds that a job may run on after its budget, for the run it is in.
GRACE = 90


def jobs() -> dict[str, list[str]]:
    """Name of each job, which is that of its result -> its script and arguments."""
    found = {"speed_gpu": ["speed.py"]}
    for model in BIG:
        name = f"whole_model_quality_{model}"
        found[name] = ["whole_model_quality.py", "--models", model, "--resume"]
    for model in (*BIG, *SMALL):
        name = f"state_removal_quality_{model}"
        found[name] = ["state_removal_quality.py", "--models", model, "--resume"]
    found["gradient_quality"] = ["gradient_quality.py", "--sections", "prune", "components"]
    found["gradient_quality_tuned"] = ["gradient_quality.py", "--sections", "tune"]
    for model in BIG:
        output = str(HERE / "results" / f"results_table_{model}.runs.json")
        name = f"results_table_{model}"
        found[name] = ["results_table.py", "--models", model, "--output", output]
    for model in BIG[:1]:
        name = f"channel_removal_quality_{model}"
        script = ["state_removal_quality.py", "--models", model, "--channels", "0.25", "--resume"]
        found[name] = script
    found["state_removal_latency"] = ["state_removal_latency.py"]
    found["semi_structured"] = ["semi_structured.py"]
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
    end, lock = time.monotonic() + options.seconds, threading.Lock()

    def work(gpu: str) -> None:
        while True:
            with lock:
                if not waiting or end - time.monotonic() < GRACE:
                    return
                name = waiting.pop(0)
            print(f"{name}: {run(name, gpu, end, options.logs)}", flush=True)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if waiting:
        print(f"not begun: {', '.join(waiting)}")


def run(name: str, gpu: str, end: float, logs: Path) -> str:
    """Run one job to its end, or until the time is up; says how it went."""
    started = time.monotonic()
    script, *arguments = jobs()[name]
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
