"""Commands that are run, watched and judged; cases that come again by their number."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness import HERE, QUIET, ROOT

COMMAND = [sys.executable, "-m", "sparsessm_plugin.cli"]
DEMO = str(ROOT / "tests" / "assets" / "mamba-demo-0.7m")
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
    own = {k: v for k, v in os.environ.items() if QUIET.get(k) != v}
    return {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}


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


SERVE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from reliability_cases.processes import serve
serve()
"""


class Server:
    """A process that has imported everything and runs commands in forks of itself."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
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
    from reliability_cases import checkpoints, recipes

    rng = draw(seed, section, number)
    module = recipes if section == "recipes" else checkpoints
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
