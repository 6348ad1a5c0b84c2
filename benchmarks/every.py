"""Run result files on the GPUs at hand until a time is up; each goes on from what is there.

What trains or is timed has a GPU to itself: three that train on one H100 were measured to take
three times as long each, and 15 of any kind 23 times. Pruning waits for the host most of the time,
so that a few share a GPU.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

PLACES = 3  # jobs that share a GPU
GRACE = 60  # seconds that a job may run on after its budget, for the run it is in


def jobs() -> dict[str, str]:
    """Result file -> experiment, of all that is measured on a GPU, but for what torchrun starts."""
    found = {
        result: name
        for name in harness.names()
        for result in harness.experiment(name).results
        if "GPU" in harness.experiment(name).device and name != "distributed"
    }
    return {k: v for k, v in found.items() if "CPU" not in harness.load(k)["versions"]["device"]}


def run_all(seconds: float, wanted: list[str], gpus: list[str], logs: Path) -> None:
    """Run jobs, the first of them first.

    :param wanted: result files
    :param logs: folder for a log of each
    """
    logs.mkdir(parents=True, exist_ok=True)
    names, end = jobs(), time.monotonic() + seconds
    waiting: dict[bool, list[str]] = {True: [], False: []}
    for name in wanted:
        waiting[harness.experiment(names[name]).alone].append(name)

    def go_on(gpu: str, alone: bool) -> None:
        while waiting[alone] and end - time.monotonic() > GRACE:
            name = waiting[alone].pop(0)
            print(f"{name}: {run(names[name], name, gpu, end, logs)}", flush=True)

    def use(gpu: str) -> None:
        go_on(gpu, alone=True)
        with ThreadPoolExecutor(PLACES) as pool:
            list(pool.map(lambda _: go_on(gpu, alone=False), range(PLACES)))

    with ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(use, gpus))
    if left := waiting[True] + waiting[False]:
        print(f"not begun: {', '.join(left)}")


def run(experiment: str, name: str, gpu: str, end: float, logs: Path) -> str:
    """Run one job to its end, or until the time is up; says how it went."""
    started = time.monotonic()
    command = [sys.executable, str(harness.HERE / "run.py"), experiment, "--name", name]
    command += ["--resume", "--budget", str(max(1, int(end - started - GRACE)))]
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
