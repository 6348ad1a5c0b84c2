"""What ``sparsessm`` does when it is killed, and with recipes and checkpoints that are wrong.

50 kills of ``prune`` and 10 of ``compare`` at random moments: afterwards the output folder is
whole, as it was before, or absent; the same command works; nothing else is left. 200 recipes and
100 checkpoints, right and wrong ones: each works, or is refused in one clear line that leaves
nothing behind. Every case is made from the seed and its number alone.

Kills happen to real processes. Recipes and checkpoints run in forks of a process that has imported
everything, with limits of time and memory; what goes wrong there is run once more in a process of
its own, and counts only if it goes wrong there too.

    python benchmarks/run.py reliability --only kills --resume    # one part anew
    python benchmarks/run.py reliability --only checkpoints --case 17    # one case again, in full
"""

import queue
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Configuration, Experiment, Job, joined
from harness import section as markdown_section
from pydantic import Field
from reliability_cases.kills import SIGNALS, Kill, run_kill
from reliability_cases.processes import (
    DEMO,
    GOOD,
    PRUNE,
    Outcome,
    Server,
    case_folder,
    replay,
    run_case,
)

SECTIONS = ("kills", "recipes", "checkpoints")


class Fields(Configuration):
    """Which cases."""

    seed: int = Field(0, description="that all cases are drawn from")
    only: list[str] = Field(list(SECTIONS), description="these parts, the others as they are")
    case: int | None = Field(None, description="replay this one, in full")
    first: int = Field(0, description="number of the first case")
    kills: int = Field(50, description="of prune")
    compares: int = Field(10, description="kills of compare")
    recipes: int = Field(200, description="cases")
    checkpoints: int = Field(100, description="cases")
    jobs: int = Field(2, description="cases at once")
    again: bool = Field(False, description="with --resume: only what was not right")


def run(job: Job) -> Iterator[Any]:
    """The parts that are asked for; the others stay as the file has them."""
    chosen: Fields = job.configuration
    # so that the commands do not inherit that it is ignored, as it is in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if chosen.case is not None:
        if len(chosen.only) != 1:
            raise SystemExit("--case wants one section: --only kills, recipes or checkpoints")
        place = Path(tempfile.mkdtemp(prefix="reliability-"))
        if chosen.only[0] == "kills":
            print(asdict(run_kill(chosen.seed, chosen.case, place, None, keep=True)))
        else:
            replay(chosen.only[0], chosen.seed, chosen.case, place)
        print(f"folder: {place}")
        return
    before = job.numbers.get("again", {})
    job.numbers |= {"seed": chosen.seed, "again": {}}
    if chosen.again:
        for section in SECTIONS:
            wrong = {r["number"] for r in job.numbers.get(section, []) if r["verdict"] not in GOOD}
            job.numbers["again"][section] = sorted(wrong | set(before.get(section, [])))
    servers = [Server() for _ in range(chosen.jobs)]
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        for name in ("alog-50", "state-50", "whole-50"):  # compiles what is compiled once
            with case_folder(Path(folder), f"warm-{name}") as place:
                servers[0].run(["prune", DEMO, "--recipe", name, *PRUNE], place)
        for section in SECTIONS:
            if section in chosen.only:
                with job.case(section):
                    run_section(section, job, Path(folder), servers)
                every = [row for s in SECTIONS for row in job.numbers.get(s, [])]
                wrong = sum(row["verdict"] not in GOOD for row in every)
                job.numbers |= {"cases": len(every), "not right": wrong}
                yield section
    for server in servers:
        server.close()


def run_section(section: str, job: Job, root: Path, servers: list[Server]) -> None:
    """Run all cases of a section."""
    chosen: Fields = job.configuration
    count = getattr(chosen, section) + (chosen.compares if section == "kills" else 0)

    def one(number: int, server: Server) -> Any:
        if section == "kills":
            return run_kill(chosen.seed, number, root, server, prunes=chosen.kills)
        return run_case(section, chosen.seed, number, root, server)

    found = job.numbers.get(section, [])
    kept = [row for row in found if chosen.again and row["verdict"] in GOOD]
    there = {row["number"] for row in kept}
    wanted = [n for n in range(chosen.first, chosen.first + count) if n not in there]
    done = in_parallel(wanted, one, servers, job.started + job.budget)
    rows = [*(asdict(row) for row in done), *kept]
    job.numbers[section] = sorted(rows, key=lambda row: row["number"])
    if left := count - len(rows):
        job.note(section, f"time was up, {left} cases were not run")


def in_parallel(
    numbers: list[int], work: Callable[[int, Server], Any], servers: list[Server], end: float
) -> list[Any]:
    """Do the cases on several servers at once; those that time does not suffice for are left."""
    waiting: queue.Queue[int] = queue.Queue()
    for number in numbers:
        waiting.put(number)
    done: dict[int, Any] = {}
    failed: list[BaseException] = []

    def go_on(server: Server) -> None:
        while time.monotonic() < end and not failed:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done[number] = work(number, server)
            except BaseException as error:
                failed.append(error)
                raise
            row = done[number]
            if row.verdict not in GOOD:
                print(f"{number} {row}", flush=True)

    threads = [threading.Thread(target=go_on, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [done[number] for number in sorted(done)]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def fault_table(section: str, seed: int, rows: list[Any]) -> tuple[list[str], list[list[str]]]:
    header = ["what", "expected", "verdict", "what it said", "replay"]
    table = []
    for row in rows:
        if row.verdict in GOOD:
            continue
        if section == "kills":
            what = f"{row.signal} to `{row.command}`, {row.moment}, after {row.seconds} s"
            expected = "fine"
        else:
            what, expected = row.what, row.expected
        again = f"--seed {seed} --only {section} --case {row.number}"
        table.append([cell(what), expected, row.verdict, cell(row.line), f"`{again}`"])
    return header, table


def show_kills(rows: list[Kill]) -> str:
    """A row a command and signal."""
    counts = Counter((row.command, row.signal, row.folder) for row in rows)
    states = ("absent", "old", "whole", "begun", "gone")
    table = []
    for command in ("prune", "compare"):
        for sent in SIGNALS:
            own = [r for r in rows if (r.command, r.signal) == (command, sent.name)]
            numbers = [str(counts[command, sent.name, state]) for state in states[:4]]
            fine = str(sum(r.verdict == "fine" for r in own))
            table.append([f"`{command}`", sent.name, str(len(own)), *numbers, fine])
    text = (
        "Output folder afterwards: absent, the earlier result bit by bit, the new result whole, "
        "or (a comparison) begun, with whole files. Fine: that, one line where the process could "
        "still write one, no child process 3 s later, the same command then works and leaves "
        "nothing but its output. A third of the kills of `prune` at any moment of the run, a third "
        "from when the model is loaded on, a third while the result is written."
    )
    header = ["command", "signal", "kills", *states[:4], "fine"]
    return markdown_section(f"Kills: {len(rows)}", text, header, table)


def show_cases(section: str, rows: list[Outcome]) -> str:
    """A row an expectation."""
    verdicts = Counter(row.verdict for row in rows)
    order = ["worked", "one line", *sorted(v for v in verdicts if v not in GOOD)]
    table = []
    for expected in ("works", "refused", "either"):
        own = Counter(row.verdict for row in rows if row.expected == expected)
        table.append([expected, str(own.total()), *(str(own[v]) for v in order)])
    table.append(["all", str(len(rows)), *(str(verdicts[v]) for v in order)])
    slowest = max(rows, key=lambda row: row.seconds)
    largest = max(rows, key=lambda row: row.peak_mib)
    text = (
        f"Slowest: {slowest.seconds} s ({slowest.what}); most memory: {largest.peak_mib} MiB "
        f"({largest.what}), of which the imported libraries are about 700."
    )
    title = f"{section.capitalize()}: {len(rows)}"
    return markdown_section(title, text, ["expected", "cases", *order], table)


def render(numbers: dict[str, Any], chosen: Fields) -> str:
    """What came of the cases, and those that were not right."""
    seed, parts = numbers["seed"], []
    for section in SECTIONS:
        kind = Kill if section == "kills" else Outcome
        rows: list[Any] = [kind(**row) for row in numbers.get(section, [])]
        if not rows:
            continue
        parts.append(show_kills(rows) if section == "kills" else show_cases(section, rows))
        header, table = fault_table(section, seed, rows)
        if table:
            title = f"{section.capitalize()}: what was not right"
            parts.append(markdown_section(title, "", header, table))
    return joined(
        "# Kills, recipes and checkpoints",
        "\n".join(
            [
                f"Made by `python benchmarks/run.py reliability --seed {seed}` on a CPU; "
                f"{numbers['cases']} cases, {numbers['not right']} of them not right. The same "
                "command replays a case with the options beside it.",
                *(
                    f"Of the {section}, {', '.join(map(str, cases))} were not right at first and "
                    "were run again after what they showed was mended."
                    for section, cases in numbers["again"].items()
                    if cases
                ),
            ]
        ),
        *parts,
        "\n".join(f"{name}: {failure}" for name, failure in numbers.get("failures", {}).items()),
    )


EXPERIMENT = Experiment(
    measures="kills, and recipes and checkpoints that are wrong",
    device="CPU",
    seconds=900,
    subjects="the packaged checkpoint, tiny models",
    configuration=Fields,
    run=run,
    render=render,
    results={"reliability": {}},
    quick={"": {"only": ["recipes"], "recipes": 10}},
    extends=(
        "only",
        "case",
        "first",
        "kills",
        "compares",
        "recipes",
        "checkpoints",
        "jobs",
        "again",
    ),
)
