"""What ``sparsessm`` does when it is killed, and with recipes and checkpoints that are wrong.

    python benchmarks/reliability.py                                  # about 15 minutes, 2 cores
    python benchmarks/reliability.py --only kills --keep    # one part anew, the others as they are
    python benchmarks/reliability.py --only checkpoints --case 17     # one case again, in full

50 kills of ``prune`` and 10 of ``compare`` at random moments: afterwards the output folder is
whole, as it was before, or absent; the same command works; nothing else is left. 200 recipes and
100 checkpoints, right and wrong ones: each works, or is refused in one clear line that leaves
nothing behind. Every case is made from the seed and its number alone.

Kills happen to real processes. Recipes and checkpoints run in forks of a process that has imported
everything, with limits of time and memory; what goes wrong there is run once more in a process of
its own, and counts only if it goes wrong there too.
"""

import argparse
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

SECTIONS = ("kills", "recipes", "checkpoints")
COMMAND = [sys.executable, "-m", "sparsessm_plugin.cli"]
DEMO = str(Path(__file__).parents[1] / "tests" / "assets" / "mamba-demo-0.7m")
OUTPUT = "out"
SIZES = ["--num-samples", "2", "--max-seq-length", "32", "--batch-size", "2", "--device", "cpu"]
PRUNE = ["--calibration", "text.jsonl", *SIZES, "--output", OUTPUT]

IMPORT_SECONDS = 20.0  # of the processor; a process of its own has to import everything first
PROCESSOR_SECONDS = 25.0  # the slowest recipe that is right takes about 5
WALL_SECONDS = 60.0  # for what waits and does not compute
MEMORY_BYTES = 3 * 2**30  # of which the libraries are 0.8
CHILD_SECONDS = 3.0  # for children to end after their parent was killed
LONGEST_LINE = 700

# What a reader cannot act on.
UNCLEAR = re.compile(
    r":$|object at 0x|'NoneType' object|list index out of range|has no attribute|"
    r"unexpected keyword argument|not subscriptable|not iterable|positional argument"
)


# -- running a command ---------------------------------------------------------------------


@dataclass
class Ran:
    """How a command ended.

    :param code: exit code, negative for a signal
    :param ended: ``exit``, ``time`` or ``memory``
    :param peak: bytes
    :param children: commands of processes that were still there some seconds later
    """

    code: int
    ended: str
    seconds: float
    peak: int
    children: list[str] = field(default_factory=list)
    stdout: str = ""
    stderr: str = ""


class Forked:
    """A forked child, polled as ``Popen`` is."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def watch(process: Any, processor_seconds: float) -> Ran:
    """Wait for the leader of a session, within limits; ends all that is left of the session."""
    started, peak, ended = time.monotonic(), 0, "exit"
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        try:
            proc = Path(f"/proc/{process.pid}")
            peak = max(peak, int((proc / "statm").read_text().split()[1]) * page)
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / tick
        except (OSError, IndexError):
            continue
        if peak > MEMORY_BYTES:
            ended = "memory"
        elif used > processor_seconds or time.monotonic() - started > WALL_SECONDS:
            ended = "time"
        if ended != "exit":
            kill_session(process.pid)
            while process.poll() is None:
                time.sleep(0.01)
            break
        time.sleep(0.02)
    seconds = time.monotonic() - started
    return Ran(process.poll(), ended, seconds, peak, end_children(process.pid))


def session(leader: int) -> dict[int, str]:
    """Processes of a session that are not zombies, with their commands."""
    found = {}
    for proc in Path("/proc").iterdir():
        if not proc.name.isdecimal():
            continue
        try:
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found[int(proc.name)] = (
                    (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
        except (OSError, IndexError):
            continue
    return found


def kill_session(leader: int) -> None:
    for pid in session(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def end_children(leader: int) -> list[str]:
    """Commands of the children that outlive the leader by some seconds; they are ended then."""
    end = time.monotonic() + CHILD_SECONDS
    while (left := session(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    kill_session(leader)
    return list(left.values())


def environment(place: Path) -> dict[str, str]:
    """Of a command: offline, one thread, with a folder of its own for temporary files."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(place / "tmp"),
    }


def start(arguments: list[str], place: Path) -> "subprocess.Popen[bytes]":
    with (place / "stdout").open("wb") as out, (place / "stderr").open("wb") as err:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=place / "work",
            env=environment(place),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def read_streams(ran: Ran, place: Path) -> Ran:
    for name in ("stdout", "stderr"):
        setattr(ran, name, (place / name).read_text(encoding="utf-8", errors="replace"))
    return ran


def run_alone(arguments: list[str], place: Path) -> Ran:
    """Run a command in a process of its own."""
    ran = watch(start(arguments, place), IMPORT_SECONDS + PROCESSOR_SECONDS)
    return read_streams(ran, place)


class Server:
    """A process that has imported everything and runs commands in forks of itself."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def run(self, arguments: list[str], place: Path) -> Ran:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, str(place)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the forking process has ended")
        return read_streams(Ran(**json.loads(answer)), place)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Read commands from standard input, run each in a fork, say how it ended."""
    os.environ.update(
        LLM_COMPRESSOR_LOG_LEVEL="ERROR", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1"
    )
    import llmcompressor
    import torch
    import transformers

    import sparsessm_plugin.cli
    import sparsessm_plugin.evaluation.components
    import sparsessm_plugin.modifiers

    assert llmcompressor.oneshot
    assert transformers.AutoModelForCausalLM
    assert sparsessm_plugin.cli.main
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments, folder = json.loads(line)
        place = Path(folder)
        pid = os.fork()
        if pid == 0:
            _run_fork(arguments, place)
        print(json.dumps(asdict(watch(Forked(pid), PROCESSOR_SECONDS))), flush=True)


def _run_fork(arguments: list[str], place: Path) -> None:
    """Be the command ``sparsessm`` from here on."""
    import resource
    import traceback

    code = 1
    try:
        os.setsid()
        os.chdir(place / "work")
        os.environ.update(environment(place))
        tempfile.tempdir = None
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = size + 4 * MEMORY_BYTES  # one allocation may come faster than anybody looks
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["sparsessm", *arguments]
        from sparsessm_plugin.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


# -- what a command has left ---------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Contents of a folder: path -> hash, or what else it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file():
            found[name] = "no file"
        else:
            found[name] = sha256(path.read_bytes()).hexdigest()
    return found


def problem_of(folder: Path) -> str | None:
    """Why a result is not whole; None if it is."""
    import torch
    from safetensors import safe_open

    from sparsessm_plugin.files import REPORT_NAME, list_files

    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        listed = {REPORT_NAME, *report["files"]}
        if listed != set(list_files(folder)):
            return f"files differ from the report: {sorted(listed ^ set(list_files(folder)))}"
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            return "holds no weights"
        for shard in shards:
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                        return f"{name} is not finite"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def errors_of(stderr: str) -> list[str]:
    """Lines of standard error without our warnings."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return [line for line in lines if not re.match(r"warning: ", line, re.IGNORECASE)]


def judge(ran: Ran, expected: str, place: Path, before: dict[str, str]) -> tuple[str, str]:
    """A verdict on a command, and the line to show for it.

    :param expected: ``works``, ``refused`` or ``either``
    :param before: what the working folder held
    """
    lines = errors_of(ran.stderr)
    line = lines[-1] if lines else ""
    after = snapshot(place / "work")
    fresh = sorted(name for name in after if name not in before)
    changed = sorted(name for name in before if after.get(name) != before[name])
    temporary = sorted(path.name for path in (place / "tmp").iterdir())
    if (place / "payload").exists():
        return "A PAYLOAD RAN", line
    if ran.ended != "exit":
        return {"time": "hang", "memory": "memory"}[ran.ended], f"after {ran.seconds:.0f} s {line}"
    if "Traceback (most recent call last)" in ran.stderr + ran.stdout:
        return "traceback", line
    if "(--verbose shows where)" in ran.stderr:  # an error that nobody has foreseen
        return "traceback in one line", line
    if ran.code < 0:
        return f"died of signal {-ran.code}", line
    if ran.children:
        return "child processes left", ran.children[0]
    if changed:
        return "changed its inputs", changed[0]
    if temporary:
        return "temporary files left", temporary[0]
    output = place / "work" / OUTPUT
    if ran.code == 0:
        foreign = [name for name in fresh if name.split("/")[0] not in (OUTPUT, "report.json")]
        if foreign:
            return "left something behind", foreign[0]
        if problem := problem_of(output):
            return "exit 0, result not whole", problem
        if expected == "refused":
            return "accepted", "exit 0"
        return "worked", ""
    if fresh:
        return "left something behind", f"{fresh[0]}; {line}"
    if len(lines) != 1:
        return ("several lines" if lines else "no message"), " / ".join(lines[:3])
    if not line.startswith("error: "):
        return "no error line", line
    if len(line) > LONGEST_LINE:
        return "too long", f"{len(line)} characters: {line}"
    if UNCLEAR.search(line):
        return "unclear", line
    if expected == "works":
        return "refused, though right", line
    return "one line", line


GOOD = ("worked", "one line", "fine")


# -- cases ---------------------------------------------------------------------------------


@dataclass
class Case:
    """One command and what is to come of it.

    :param what: in words
    :param arguments: of ``sparsessm``
    :param expected: ``works``, ``refused`` or ``either``
    """

    what: str
    arguments: list[str]
    expected: str


@dataclass
class Outcome:
    """One row of the result."""

    number: int
    what: str
    expected: str
    verdict: str
    line: str
    code: int
    seconds: float
    peak_mib: int
    confirmed: bool = True


def draw(seed: int, section: str, number: int) -> random.Random:
    return random.Random(f"{seed} {section} {number}")


def write_text(place: Path) -> None:
    """Calibration text, the same in every case."""
    lines = [
        json.dumps({"text": f"Line {i}. The river runs to the sea, and nobody stops it. " * 4})
        for i in range(40)
    ]
    (place / "work" / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def case_folder(root: Path, name: str, keep: bool = False) -> Iterator[Path]:
    place = root / name
    shutil.rmtree(place, ignore_errors=True)
    for part in ("work", "tmp"):
        (place / part).mkdir(parents=True)
    write_text(place)
    try:
        yield place
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def clean(line: str, place: Path) -> str:
    """A line without this machine's paths, at most 300 characters."""
    import sparsessm_plugin

    package = str(Path(sparsessm_plugin.__file__).parent)
    for path, name in ((str(place), "CASE"), (package, "sparsessm_plugin"), (sys.prefix, "ENV")):
        line = line.replace(path, name)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= 300 else line[:300] + "..."


def make_case(section: str, seed: int, number: int, place: Path) -> Case:
    """Write what a case needs and say what to run."""
    import reliability_checkpoints
    import reliability_recipes

    rng = draw(seed, section, number)
    module = reliability_recipes if section == "recipes" else reliability_checkpoints
    return module.make(number, rng, place)


def run_case(section: str, seed: int, number: int, root: Path, server: Server) -> Outcome:
    """Run a case in a fork, and where that goes wrong once more in a process of its own."""
    found: list[Outcome] = []
    for attempt in (server.run, run_alone):
        with case_folder(root, f"{section}-{number}") as place:
            case = make_case(section, seed, number, place)
            before = snapshot(place / "work")
            ran = attempt(case.arguments, place)
            verdict, line = judge(ran, case.expected, place, before)
            found.append(
                Outcome(
                    number=number,
                    what=case.what,
                    expected=case.expected,
                    verdict=verdict,
                    line=clean(line, place),
                    code=ran.code,
                    seconds=round(ran.seconds, 1),
                    peak_mib=ran.peak // 2**20,
                )
            )
        if verdict in GOOD:
            break
    return found[-1]


def replay(section: str, seed: int, number: int, root: Path) -> None:
    """Run one case in a process of its own and show all of it; its folder stays."""
    if section == "kills":
        print(json.dumps(asdict(run_kill(seed, number, root, None, keep=True)), indent=2))
        print(f"folder: {root}")
        return
    with case_folder(root, f"{section}-{number}", keep=True) as place:
        case = make_case(section, seed, number, place)
        print(f"{case.what}; expected: {case.expected}")
        print(f"cd {place / 'work'} && sparsessm {shlex.join(case.arguments)}", flush=True)
        before = snapshot(place / "work")
        ran = run_alone(case.arguments, place)
        verdict, line = judge(ran, case.expected, place, before)
        print(ran.stdout + ran.stderr)
        print(f"exit code {ran.code}, {ran.seconds:.1f} s, {ran.peak // 2**20} MiB")
        print(f"verdict: {verdict}: {line}")


# -- kills ---------------------------------------------------------------------------------

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


# -- the campaign --------------------------------------------------------------------------


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


def show_kills(result: Any, rows: list[Kill]) -> None:
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
    result.table(f"Kills: {len(rows)}", text, header, table)


def show_cases(result: Any, section: str, rows: list[Outcome]) -> None:
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
    result.table(f"{section.capitalize()}: {len(rows)}", text, ["expected", "cases", *order], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--case", type=int, default=None, help="replay this one, in full")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kills", type=int, default=50, help="of prune")
    parser.add_argument("--compares", type=int, default=10, help="kills of compare")
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--again", action="store_true", help="with --keep: only what was not right")
    parser.add_argument("--keep", action="store_true", help="other parts of this name's .json")
    parser.add_argument("--name", default="reliability", help="of the files under results/")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    # so that the commands do not inherit that it is ignored, as it is in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.case is not None:
        if len(options.only) != 1:
            parser.error("--case wants one section: --only kills, recipes or checkpoints")
        place = Path(tempfile.mkdtemp(prefix="reliability-"))
        replay(options.only[0], options.seed, options.case, place)
        return
    campaign(options)


def campaign(options: argparse.Namespace) -> None:
    from common import RESULTS, Result, save

    result = Result(options.budget, options.name)
    rows: dict[str, list[Any]] = {}
    again: dict[str, list[int]] = {}
    path = RESULTS / f"{options.name}.json"
    if options.keep and path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["seed"] != options.seed:
            raise SystemExit(f"{path} was made with --seed {content['seed']}")
        for section in SECTIONS:
            kind = Kill if section == "kills" else Outcome
            rows[section] = [kind(**row) for row in content.get(section, [])]
            if options.again:
                wrong = {row.number for row in rows[section] if row.verdict not in GOOD}
                again[section] = sorted(wrong | set(content.get("again", {}).get(section, [])))
    servers = [Server() for _ in range(options.jobs)]
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        for name in ("alog-50", "state-50", "whole-50"):  # compiles what is compiled once
            with case_folder(Path(folder), f"warm-{name}") as place:
                servers[0].run(["prune", DEMO, "--recipe", name, *PRUNE], place)
        for section in SECTIONS:
            if section in options.only:
                work = partial(run_section, section, options, Path(folder), servers, rows)
                result.section(section, work)
    for server in servers:
        server.close()
    for section in SECTIONS:
        if rows.get(section):
            show(result, section, options.seed, rows[section])
    faults = sum(row.verdict not in GOOD for own in rows.values() for row in own)
    total = sum(map(len, rows.values()))
    lines = [
        "# Kills, recipes and checkpoints",
        "",
        f"Made by `python benchmarks/reliability.py --seed {options.seed}` on a CPU; {total} "
        f"cases, {faults} of them not right. The same script replays a case with the options "
        "beside it.",
        *(
            f"Of the {section}, {', '.join(map(str, cases))} were not right at first and were "
            "run again after what they showed was mended."
            for section, cases in again.items()
            if cases
        ),
        "",
        "\n\n".join(result.parts),
        *([""] if result.failures else []),
        *(f"{name}: {failure}" for name, failure in result.failures.items()),
    ]
    numbers = {"seed": options.seed, "cases": total, "not right": faults}
    numbers["again"], numbers["failures"] = again, result.failures
    numbers |= {name: [asdict(row) for row in rows[name]] for name in SECTIONS if name in rows}
    save(options.name, "\n".join(lines), numbers)


def run_section(
    section: str,
    options: argparse.Namespace,
    root: Path,
    servers: list[Server],
    rows: dict[str, list[Any]],
    result: Any,
) -> None:
    """Run all cases of a section."""
    numbers = {
        "kills": options.kills + options.compares,
        "recipes": options.recipes,
        "checkpoints": options.checkpoints,
    }[section]

    def one(number: int, server: Server) -> Any:
        if section == "kills":
            return run_kill(options.seed, number, root, server, prunes=options.kills)
        return run_case(section, options.seed, number, root, server)

    chosen = list(range(options.first, options.first + numbers))
    kept = [row for row in rows.get(section, []) if options.again and row.verdict in GOOD]
    chosen = [number for number in chosen if number not in {row.number for row in kept}]
    rows[section] = in_parallel(chosen, one, servers, result.started + options.budget)
    rows[section] = sorted([*rows[section], *kept], key=lambda row: row.number)
    if left := numbers - len(rows[section]):
        result.note(section, f"time was up, {left} cases were not run")


def show(result: Any, section: str, seed: int, rows: list[Any]) -> None:
    """The tables of a section."""
    if section == "kills":
        show_kills(result, rows)
    else:
        show_cases(result, section, rows)
    header, table = fault_table(section, seed, rows)
    if table:
        result.table(f"{section.capitalize()}: what was not right", "", header, table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
