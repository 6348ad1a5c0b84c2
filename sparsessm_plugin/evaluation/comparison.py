"""Recipes beside each other on one model, and beside the model as it was.

A comparison is a folder. ``comparison.json`` in it holds what was asked for and every run that
is finished, so that a comparison that was interrupted goes on where it stopped. The table and
the plot are made from it.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsessm_plugin.errors import SparseSSMError, SparseSSMWarning, cut, shown
from sparsessm_plugin.evaluation.comparison_table import DENSE, markdown, measures, summarize
from sparsessm_plugin.files import REPORT_NAME, partials, read_json, write_bytes, write_json
from sparsessm_plugin.processes import PARENT

COMPARISON, TABLE, PLOT = "comparison.json", "comparison.md", "comparison.png"

_FINGERPRINTED = (".safetensors", ".json", ".model")
WARNING = "warning: "  # how a line begins that a run should show
_GLANCE = 0.5  # seconds between two looks for a signal
_PATIENCE = 30.0  # seconds that a run has to tidy up after it was told to stop


@dataclass(frozen=True)
class Plan:
    """What to compare.

    :param model: folder, hub name or the demo's name, for the command
    :param identity: of the model: :func:`fingerprint`, or what else tells it from others
    :param recipes: label -> what to give to ``--recipe``, and the recipe's YAML
    :param runs: (label, seed), in the order in which they are to run
    :param settings: all else that the numbers depend on
    :param prune_options: for ``sparsessm prune``
    :param evaluate_options: for ``sparsessm evaluate``
    :param output: the folder
    :param keep: keep the pruned checkpoints
    """

    model: str
    identity: str
    recipes: Mapping[str, tuple[str, str]]
    runs: Sequence[tuple[str, int]]
    settings: Mapping[str, Any]
    prune_options: Sequence[str]
    evaluate_options: Sequence[str]
    output: Path
    keep: bool = False


# -- running -----------------------------------------------------------------------------


def run_comparison(
    plan: Plan,
    announce: Callable[[str], Any] = lambda line: None,
    check_stopped: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Do the runs that are not done yet, each in a process of its own, and write the folder.

    A run that fails is noted with its error and does not stop the others; it is tried again the
    next time. An interrupt ends the run that it meets and leaves those before it.

    :param announce: called with a line before and after each run
    :param check_stopped: called before each run; raises if a stop was asked for and got lost,
        as one does that comes within a destructor
    :return: what ``comparison.json`` holds
    :raises SparseSSMError: the folder holds something else, or another comparison; the dense model
        cannot be evaluated
    """
    check_folder(plan)
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseSSMError(f"cannot write {plan.output}: {error.strerror or error}") from error
    with _lock(plan.output):
        state = check_folder(plan)
        state["recipes"] |= {label: text for label, (_, text) in plan.recipes.items()}
        _write(plan.output, state)
        if state[DENSE] is None:
            announce(f"{DENSE}: evaluating")
            state[DENSE] = _evaluate(plan, plan.model, DENSE)
            _write(plan.output, state)
        for number, (label, seed) in enumerate(plan.runs, start=1):
            key = run_name(label, seed)
            if "error" not in state["runs"].get(key, {"error": "not run yet"}):
                continue
            announce(f"{key}: run {number} of {len(plan.runs)}")
            check_stopped()
            try:
                state["runs"][key] = _run(plan, label, seed)
            except _RunFailed as error:
                state["runs"][key] = {"recipe": label, "seed": seed, "error": str(error)}
                announce(f"{key}: {error}")
            _write(plan.output, state)
    return state


def run_name(label: str, seed: int) -> str:
    """What a run is called in ``comparison.json``."""
    return f"{label}, seed {seed}"


def check_folder(plan: Plan) -> dict[str, Any]:
    """What a folder already holds of a comparison; nothing of it is changed.

    :raises SparseSSMError: it holds something else, or a comparison of another model, with other
        settings or with another recipe of the same name
    """
    folder = plan.output
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SparseSSMError(f"output {folder} exists and is not a directory")
    fresh = {
        "model": {"name": plan.model, "identity": plan.identity},
        "settings": json.loads(json.dumps(plan.settings)),
        "recipes": {},
        DENSE: None,
        "runs": {},
    }
    path = folder / COMPARISON
    if not path.exists():
        begun = set(partials(path))  # by one that was killed before it had written anything
        if folder.is_dir() and set(folder.iterdir()) - begun:
            raise SparseSSMError(
                f"output directory {folder} exists and holds no {COMPARISON}; choose another"
            )
        return fresh
    try:
        state = read_json(path)
        found = {key: state[key] for key in fresh}
        runs = {key: dict(run) for key, run in found["runs"].items()}
        same_model = found["model"]["identity"] == plan.identity
        model = cut(str(found["model"]["name"]))
        differing = [
            key
            for key in {**found["settings"], **fresh["settings"]}
            if found["settings"].get(key) != fresh["settings"].get(key)
        ]
        known = {key: str(text) for key, text in found["recipes"].items()}
        complete = [run for run in runs.values() if "error" not in run]
        if found[DENSE] is not None:
            summarize(found[DENSE], complete)  # whether all is there that the table needs
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise SparseSSMError(
            f"{path} is not readable as a comparison: {shown(error)}; nothing in it was changed, "
            "choose another --output"
        ) from error
    advice = "nothing in it was changed; choose another --output"
    if not same_model:
        raise SparseSSMError(f"{folder} compares recipes on another model, {model}; {advice}")
    if differing:
        key = differing[0]
        raise SparseSSMError(
            f"{folder} was made with {key} {shown(found['settings'].get(key))}, not "
            f"{shown(fresh['settings'].get(key))}; {advice}"
        )
    for label, (_, text) in plan.recipes.items():
        if known.get(label, text) != text:
            raise SparseSSMError(f"{folder} knows another recipe called {label}; {advice}")
    return {**found, "runs": runs}


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, or of one file."""
    root = Path(path)
    files = [root]
    if root.is_dir():
        files = sorted(
            file for file in root.iterdir() if file.suffix in _FINGERPRINTED and file.is_file()
        )
    digest = hashlib.sha256()
    for file in files:
        if root.is_dir():
            digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class _RunFailed(Exception):
    """A run ended with an error, which is the message."""


def _run(plan: Plan, label: str, seed: int) -> dict[str, Any]:
    """Prune with a recipe, evaluate what comes out."""
    recipe, text = plan.recipes[label]
    checkpoint = plan.output / "models" / _slug(run_name(label, seed))
    arguments = ["--recipe", recipe, *plan.prune_options, "--seed", str(seed)]
    report = _report(checkpoint, text)
    if report is None:  # else only the evaluation is missing
        name = run_name(label, seed)
        command = ["prune", plan.model, *arguments, "--output", str(checkpoint)]
        _command(command, plan.output, name)
        report = _report(checkpoint, text)
        if report is None:
            raise _RunFailed(f"recipe {label} has changed since the comparison began")
    measured = _evaluate(plan, str(checkpoint), run_name(label, seed))
    if not plan.keep:
        shutil.rmtree(checkpoint)
        if not any(checkpoint.parent.iterdir()):
            checkpoint.parent.rmdir()
    return {
        "recipe": label,
        "seed": seed,
        **measured,
        "parameters": report["after"]["parameters"],
        "zeros": report["after"]["zeros"],
        "seconds": report["seconds"]["oneshot"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "command": shlex.join(["sparsessm", "prune", plan.model, *arguments, "--output", "DIR"]),
    }


def _report(checkpoint: Path, recipe: str) -> dict[str, Any] | None:
    """The report of a checkpoint that this very recipe made, if it is there."""
    try:
        report = read_json(checkpoint / REPORT_NAME)
        report["after"]["parameters"], report["after"]["zeros"]
        report["seconds"]["oneshot"], report["peak_memory_bytes"]
        return report if report["recipe"]["yaml"] == recipe else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _evaluate(plan: Plan, model: str, name: str) -> dict[str, Any]:
    # in the folder of the comparison, where the next run finds what a killed one left
    report = plan.output / f".{_slug(name)}.evaluation.json"
    report.unlink(missing_ok=True)
    command = ["evaluate", model, *plan.evaluate_options, "--output", str(report)]
    try:
        _command(command, plan.output, name)
        found = read_json(report)
    except _RunFailed as error:
        if name == DENSE:  # then no other run would do better
            raise SparseSSMError(f"{model}: {error}") from error
        raise
    finally:
        report.unlink(missing_ok=True)
    return {
        "parameters": found["inventory"]["parameters"],
        "zeros": found["inventory"]["zeros"],
        "measures": measures(found["perplexity"], found["tasks"], found.get("tasks_asked_for", [])),
        "perplexity": found["perplexity"],
        "tasks": found["tasks"],
        "versions": found["versions"],
    }


def _command(arguments: Sequence[str], folder: Path, name: str) -> None:
    """Run ``sparsessm`` in a process of its own; its output is kept only if it fails.

    :raises _RunFailed: with its error
    """
    log = folder / "logs" / f"{_slug(name)}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file, _HeldSignals() as held:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsessm_plugin.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, PARENT: str(os.getpid())},
        )
        try:
            code = held.wait(process)
        except BaseException:
            _stop(process)
            raise
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code != 0:
        lines = [line.strip() for line in lines if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else "no output"
        if code < 0:
            reason = f"killed by signal {-code}"
        raise _RunFailed(f"{reason} (see {log})")
    for line in lines:
        if line.startswith(WARNING):
            text = f"{name}: {line.removeprefix(WARNING)}"
            warnings.warn(text, SparseSSMWarning, stacklevel=2)
    log.unlink()
    if not any(log.parent.iterdir()):
        log.parent.rmdir()


class _HeldSignals:
    """Lets an interrupt wait: within ``Popen`` it would leave a process that nobody stops.

    Nor is it raised wherever Python happens to be while that process runs, in a destructor
    perhaps, which would pass over it: it is looked for.
    """

    def __enter__(self) -> "_HeldSignals":
        self._handlers: dict[int, Any] = {}
        self._waiting: list[int] = []
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):  # else it is ignored, or ends us at once
                    self._handlers[number] = signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: Any) -> None:
        self._waiting.append(number)

    def deliver(self) -> None:
        """Let signals through again, those first that have come."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())
        while self._waiting:
            signal.raise_signal(self._waiting.pop(0))

    def wait(self, process: "subprocess.Popen[bytes]") -> int:
        """The exit code of a process, unless a signal comes first."""
        while True:
            if self._waiting:
                self.deliver()
            try:
                return process.wait(_GLANCE)
            except subprocess.TimeoutExpired:
                continue

    def __exit__(self, *error: object) -> None:
        self.deliver()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one process works on a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SparseSSMError(f"another process is working on {folder}") from error
        yield
    finally:
        os.close(handle)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    """The results so far, as JSON and as a table."""
    write_json(folder / COMPARISON, state)
    if state[DENSE] is not None:
        rows = summarize(state[DENSE], state["runs"].values())
        text = f"# Recipes on {state['model']['name']}\n\n{markdown(rows)}\n"
        write_bytes(folder / TABLE, text.encode())
