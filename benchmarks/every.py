"""Run result files on the GPUs at hand until a time is up; each goes on from what is there.

What trains or is timed has a GPU to itself: three that train on one H100 were measured to take
three times as long each, and 15 of any kind 23 times. Pruning waits for the host most of the time,
so that a few share a GPU.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness

PLACES = 3  # of a GPU; a job takes one or all of them
GRACE = 60  # seconds that a job may run on after its budget, for the run it is in


def jobs() -> dict[str, str]:
    """Result file -> experiment, of all that is measured on a GPU."""
    return {
        result: name
        for name in harness.names()
        for result in harness.experiment(name).results
        if "GPU" in harness.experiment(name).device
        and not result.endswith("cpu")
        and name != "distributed"  # which torchrun starts
    }


def run_all(seconds: float, wanted: list[str], gpus: list[str], logs: Path) -> None:
    """Run jobs, the first of them first.

    :param wanted: result files
    :param logs: folder for a log of each
    """
    logs.mkdir(parents=True, exist_ok=True)
    names, waiting = jobs(), list(wanted)
    places = {n: PLACES if harness.experiment(names[n]).alone else 1 for n in wanted}
    end = time.monotonic() + seconds
    free = dict.fromkeys(gpus, PLACES)
    changed = threading.Condition()

    def work(name: str, gpu: str) -> None:
        print(f"{name}: {run(names[name], name, gpu, end, logs)}", flush=True)
        with changed:
            free[gpu] += places[name]
            changed.notify()

    threads = []
    with changed:
        while waiting and end - time.monotonic() > GRACE:
            fitting = [(name, gpu) for name in waiting for gpu in gpus if free[gpu] >= places[name]]
            if not fitting:
                changed.wait(end - time.monotonic())
                continue
            name, gpu = max(fitting, key=lambda pair: (-waiting.index(pair[0]), free[pair[1]]))
            waiting.remove(name)
            free[gpu] -= places[name]
            threads.append(threading.Thread(target=work, args=(name, gpu)))
            threads[-1].start()
    for thread in threads:
        thread.join()
    if waiting:
        print(f"not begun: {', '.join(waiting)}")


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
