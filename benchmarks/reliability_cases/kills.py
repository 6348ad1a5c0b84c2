"""Kills of ``prune`` and ``compare`` at random moments, and what they leave."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability_cases.processes import (
    DEMO,
    IMPORT_SECONDS,
    OUTPUT,
    PROCESSOR_SECONDS,
    PRUNE,
    SIZES,
    Ran,
    Server,
    case_folder,
    clean,
    draw,
    errors_of,
    problem_of,
    read_streams,
    run_alone,
    snapshot,
    start,
    watch,
)

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
MOMENTS = ("any", "working", "saving")
KILLED_PRUNE = ["prune", DEMO, "--recipe", "alog-50", *PRUNE]
OLD_RESULT = ["prune", DEMO, "--recipe", "alog-50-memoryless", *PRUNE]
COMPARE = ["compare", DEMO, "--recipes", "alog-50", "--calibration", "text.jsonl"]
COMPARE += ["--text", "text.jsonl", "--eval-samples", "2", *SIZES, "--output", OUTPUT]


@dataclass
class Kill:
    """One kill and what it left.

    :param moment: when, counted from the start (``any``), from when the output's partial folder
        appeared (``working``), or from its first file (``saving``)
    :param folder: ``absent``, ``old``, ``whole`` or, of a comparison, ``begun``
    """

    number: int
    command: str
    signal: str
    moment: str
    seconds: float
    code: int
    folder: str
    verdict: str
    line: str


# Seconds that commands take from each moment on, measured once.
timing: dict[str, float] = {}
timing_lock = threading.Lock()


def moment_comes(process: "subprocess.Popen[bytes]", moment: str, work: Path) -> bool:
    """Wait until counting begins; False if the process has ended before."""
    while process.poll() is None:
        if moment == "any":
            return True
        partial = next(work.glob(f".{OUTPUT}*.partial"), None)
        if partial is not None and (moment == "working" or any(partial.iterdir())):
            return True
        time.sleep(0.002)
    return False


def measure(arguments: list[str], root: Path, name: str) -> None:
    """How long a command runs from each moment on."""
    with case_folder(root, f"timing-{name}") as place:
        began, process = {}, start(arguments, place)
        for moment in MOMENTS if name == "prune" else ("any",):
            if moment_comes(process, moment, place / "work"):
                began[moment] = time.monotonic()
        while process.poll() is None and not (place / "work" / OUTPUT).exists():
            time.sleep(0.002)
        placed = time.monotonic()  # taking everything down takes another second or two
        process.wait()
        if process.returncode:
            raise RuntimeError((place / "stderr").read_text())
        for moment, at in began.items():
            end = time.monotonic() if moment == "any" else placed + 0.05
            timing[f"{name} {moment}"] = end - at


def run_kill(
    seed: int, number: int, root: Path, server: Server | None, keep: bool = False, prunes: int = 50
) -> Kill:
    """Kill a command, look at what it left, and run it again.

    :param server: runs what is not killed; None for processes of their own
    :param prunes: kills from this number on are of ``compare``
    """
    rng = draw(seed, "kills", number)
    command = "prune" if number < prunes else "compare"
    arguments = KILLED_PRUNE if command == "prune" else COMPARE
    sent = SIGNALS[number % len(SIGNALS)]
    moment = MOMENTS[number // len(SIGNALS) % len(MOMENTS)] if command == "prune" else "any"
    share, with_old = rng.random(), rng.random() < 0.5 and command == "prune"
    run: Callable[[list[str], Path], Ran] = server.run if server is not None else run_alone
    with timing_lock:
        if f"{command} any" not in timing:
            measure(arguments, root, command)
    seconds = share * timing.get(f"{command} {moment}", 0.1)
    with case_folder(root, f"kills-{number}", keep) as place:
        work, target = place / "work", place / "work" / OUTPUT
        old: dict[str, str] | None = None
        if with_old:
            run(OLD_RESULT, place)
            old = snapshot(target)
        inputs = {name for name in snapshot(work) if name.split("/")[0] != OUTPUT}
        for attempt in range(6):
            process = start(arguments, place)
            if moment_comes(process, moment, work):
                time.sleep(seconds)
            if process.poll() is None:
                break
            # it was faster than the one that was measured: put things back and try earlier
            seconds *= 0.6
            shutil.rmtree(target, ignore_errors=True)
            if with_old:
                run(OLD_RESULT, place)
                old = snapshot(target)
            assert attempt < 5, "the command always ends before it is killed"
        os.kill(process.pid, sent)
        ran = read_streams(watch(process, IMPORT_SECONDS + PROCESSOR_SECONDS), place)
        folder, verdict, line = after_kill(ran, sent, command, place, old, inputs)
        if verdict == "fine":
            verdict, line = after_next_run(run(arguments, place), command, place, inputs)
        return Kill(
            number=number,
            command=command,
            signal=sent.name,
            moment=moment,
            seconds=round(seconds, 2),
            code=ran.code,
            folder=folder,
            verdict=verdict,
            line=clean(line, place),
        )


def after_kill(
    ran: Ran,
    sent: signal.Signals,
    command: str,
    place: Path,
    old: dict[str, str] | None,
    inputs: set[str],
) -> tuple[str, str, str]:
    """State of the output folder, verdict and line."""
    target = place / "work" / OUTPUT
    folder, problem = "absent", None
    if target.exists():
        problem = problem_of(target) if command == "prune" else comparison_problem(target, False)
        folder = "whole" if command == "prune" else "begun"
        if old is not None and snapshot(target) == old:
            folder = "old"
    elif old is not None:
        folder, problem = "gone", "the earlier result is gone"
    if problem is not None:
        return folder, "folder damaged", problem
    if ran.children:
        return folder, "child processes left", ran.children[0]
    if ran.ended != "exit":
        return folder, "did not end", f"{ran.seconds:.0f} s"
    lines = errors_of(ran.stderr)
    if "Traceback" in ran.stderr:
        return folder, "traceback", lines[-1]
    if sent == signal.SIGKILL:
        return folder, "fine", ""  # it could not tidy up
    # a comparison announces its runs
    lines = [x for x in lines if not re.match(r"(dense|alog-50, seed 0): ", x)]
    if ran.code not in (*CODES[sent], 0):
        return folder, f"exit code {ran.code}", " / ".join(lines[:3])
    if ran.code > 0 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return folder, "not one line", " / ".join(lines[:3])
    # a process that dies before Python knows of signals has made nothing yet
    if folder == "whole" and "nothing was written" in ran.stderr:
        return folder, "says that it wrote nothing", lines[0]
    left = {n.split("/")[0] for n in snapshot(place / "work")} - inputs - {OUTPUT}
    left |= {path.name for path in (place / "tmp").iterdir()}
    if left:
        return folder, "left something behind", sorted(left)[0]
    return folder, "fine", lines[0] if lines else ""


def comparison_problem(folder: Path, finished: bool) -> str | None:
    """Why the folder of a comparison is not whole; None if it is."""
    state = folder / "comparison.json"
    try:
        if not finished and not state.exists():
            return None
        content = json.loads(state.read_text(encoding="utf-8"))
        if finished:
            if content["dense"] is None or "error" in content["runs"]["alog-50, seed 0"]:
                return "the run is not done"
            expected = {"comparison.json", "comparison.md", "comparison.png"}
            names = {path.name for path in folder.iterdir()}
            if names != expected:
                return f"holds {sorted(names ^ expected)[0]}, or lacks it"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def after_next_run(ran: Ran, command: str, place: Path, inputs: set[str]) -> tuple[str, str]:
    """Whether the same command works after the kill, and what is left then."""
    if ran.code != 0 or ran.ended != "exit":
        lines = errors_of(ran.stderr)
        return "the next run failed", lines[-1] if lines else f"exit code {ran.code}"
    target = place / "work" / OUTPUT
    problem = problem_of(target) if command == "prune" else comparison_problem(target, True)
    if problem is not None:
        return "the next run's result is not whole", problem
    left = {name.split("/")[0] for name in snapshot(place / "work")} - inputs - {OUTPUT}
    if left:
        return "the next run left something behind", sorted(left)[0]
    if ran.children:
        return "child processes left by the next run", ran.children[0]
    return "fine", ""
