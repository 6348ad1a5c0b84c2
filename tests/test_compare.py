"""Recipes beside each other: the folder, going on after an interrupt, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from conftest import DEMO, saved_tiny_model, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from sparsessm_plugin import cli, files, processes
from sparsessm_plugin.cli.options import command_line, repeated
from sparsessm_plugin.errors import SparseSSMError, SparseSSMWarning
from sparsessm_plugin.evaluation import comparison
from sparsessm_plugin.evaluation.comparison_table import Spread, markdown, summarize

HALF = "a_stage: {a_modifiers: {SparseSSMModifier: {sparsity: %s, saliency: %s}}}"


@pytest.fixture
def text_file(topics, tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics)[:6]), encoding="utf-8")
    return path


@pytest.fixture
def setup(tmp_path, text_file):
    """Two recipes, one of which draws calibration windows, and the options of a comparison."""
    (tmp_path / "magnitude.yaml").write_text(HALF % (0.5, "magnitude"))
    (tmp_path / "error.yaml").write_text(HALF % (0.25, "output_error"))
    return [
        *("--recipes", f"mag={tmp_path / 'magnitude.yaml'},{tmp_path / 'error.yaml'}"),
        *("--calibration", text_file, "--text", f"topics={text_file}", "--seeds", "0,1"),
        *("--num-samples", 2, "--max-seq-length", 32, "--eval-samples", 3),
        *("--output", tmp_path / "out"),
    ]


@pytest.fixture
def here(monkeypatch, sparsessm):
    """Children in this process, which saves their imports; returns the commands as they ran."""
    ran = []

    def run(arguments, folder, name):
        ran.append((arguments[0], name))
        handler, argv = signal.getsignal(signal.SIGTERM), sys.argv
        try:
            sys.argv = ["sparsessm", *map(str, arguments)]
            cli.main()
        except SystemExit as error:
            if error.code:
                raise comparison._RunFailed(f"exit code {error.code}") from error
        finally:
            sys.argv = argv
            signal.signal(signal.SIGTERM, handler)

    monkeypatch.setattr(comparison, "_command", run)
    return ran


def test_a_recipe_that_reads_the_data_itself_runs_with_every_seed(
    sparsessm, here, text_file, tmp_path
):
    gradient = "a_stage: {a_modifiers: {GradientMagnitudeModifier: {sparsity: 0.5, rounds: 1}}}"
    (tmp_path / "gradient.yaml").write_text(gradient)
    code, _, _ = sparsessm(
        *("compare", DEMO, "--recipes", tmp_path / "gradient.yaml", "--seeds", "0,1"),
        *("--calibration", text_file, "--text", f"topics={text_file}", "--output", tmp_path / "o"),
        *("--num-samples", 2, "--max-seq-length", 32, "--eval-samples", 3),
    )
    assert code == 0
    assert ("prune", "gradient, seed 1") in here
    runs = json.loads((tmp_path / "o" / "comparison.json").read_text())["runs"]
    assert runs["gradient, seed 0"]["measures"] != runs["gradient, seed 1"]["measures"]


def test_a_comparison_and_going_on_with_it(sparsessm, here, setup, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = sparsessm("compare", DEMO, *setup)
    assert code == 0
    names = ["mag, seed 0", "error, seed 0", "error, seed 1"]  # magnitude draws nothing
    assert here == [
        ("evaluate", "dense"),
        *((command, name) for name in names for command in ("prune", "evaluate")),
    ]
    assert sorted(os.listdir(out)) == ["comparison.json", "comparison.md", "comparison.png"]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((out / "comparison.json").read_text())
    assert list(state["runs"]) == names
    assert set(state["settings"]) == {
        *("--calibration", "--text", "--tasks", "--tasks-data", "--limit", "--num-samples"),
        *("--max-seq-length", "--eval-samples", "--text-field", "--pipeline", "--device"),
        "--dtype",
    }
    dense = state["dense"]
    for name, share in zip(names, (0.5, 0.25, 0.25), strict=True):
        run = state["runs"][name]
        assert run["zeros"] == dense["zeros"] + share * 16384
        assert run["parameters"] == dense["parameters"] == 728704
        assert run["seconds"] > 0
        assert run["peak_memory_bytes"] > 0
    first, second = (state["runs"][f"error, seed {n}"]["measures"] for n in (0, 1))
    assert first != second
    table = (out / "comparison.md").read_text()
    assert "| dense |" in table
    assert "| error | 2 | 728,704 | 0.0% | 0.6% | 0.6% |" in table
    assert table.split("\n", 2)[2].strip() in stdout

    # the command that stands beside a run makes it again
    here.clear()
    command = state["runs"]["error, seed 1"]["command"].split()
    assert command[:2] == ["sparsessm", "prune"]
    again = tmp_path / "again"
    assert sparsessm(*command[1:-1], again)[0] == 0
    samples = ("--num-samples", 3, "--max-seq-length", 32)
    report = tmp_path / "again.json"
    text = setup[setup.index("--text") + 1]
    assert sparsessm("evaluate", again, "--text", text, *samples, "--output", report)[0] == 0
    value = json.loads(report.read_text())["perplexity"]["topics"]["perplexity"]
    assert value == second["topics, perplexity"]["value"]

    # nothing is done twice, and what is new is added
    here.clear()
    assert sparsessm("compare", DEMO, *setup)[0] == 0
    assert here == []
    (tmp_path / "more.yaml").write_text(HALF % (0.75, "magnitude"))
    setup[1] = tmp_path / "more.yaml"
    assert sparsessm("compare", DEMO, *setup)[0] == 0
    assert here == [("prune", "more, seed 0"), ("evaluate", "more, seed 0")]
    after = json.loads((out / "comparison.json").read_text())
    assert list(after["runs"]) == [*names, "more, seed 0"]
    assert after["runs"]["error, seed 1"] == state["runs"]["error, seed 1"]


def test_a_run_that_fails_does_not_stop_the_others(
    sparsessm, here, setup, tmp_path, monkeypatch, text_file
):
    run = comparison._command

    def fail_once(arguments, folder, name):
        if name == "mag, seed 0" and arguments[0] == "evaluate":
            here.append(("failed", name))
            raise comparison._RunFailed("the machine caught fire")
        run(arguments, folder, name)

    monkeypatch.setattr(comparison, "_command", fail_once)
    code, stdout, stderr = sparsessm("compare", DEMO, *setup)
    assert code == 1
    assert "1 of 3 runs failed, mag, seed 0 with: the machine caught fire" in stderr
    assert "| error |" in stdout
    assert "| mag |" not in stdout
    # tried again, and what was pruned already is not pruned again
    monkeypatch.setattr(comparison, "_command", run)
    here.clear()
    assert sparsessm("compare", DEMO, *setup, "--keep")[0] == 0
    assert here == [("evaluate", "mag, seed 0")]
    assert os.listdir(tmp_path / "out" / "models") == ["mag-seed-0"]


def test_refuses_the_folder_of_another_comparison(sparsessm, refused, here, setup, tmp_path):
    out = tmp_path / "out"
    assert sparsessm("compare", DEMO, *setup)[0] == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    other = saved_tiny_model(tmp_path / "other", vocab_size=2048)
    other.save_pretrained(tmp_path / "other")
    assert "another model" in refused("compare", tmp_path / "other", *setup)
    assert "made with --num-samples 2, not 3" in refused(
        "compare", DEMO, *setup, "--num-samples", 3
    )
    (tmp_path / "magnitude.yaml").write_text(HALF % (0.6, "magnitude"))
    assert "knows another recipe called mag" in refused("compare", DEMO, *setup)
    (tmp_path / "magnitude.yaml").write_text(HALF % (0.5, "magnitude"))
    (tmp_path / "topics.txt").write_text("another text of the same name " * 500)
    assert "made with --calibration" in refused("compare", DEMO, *setup)
    assert {file: file.read_bytes() for file in out.iterdir()} == before

    (out / "comparison.json").write_text("{}")
    assert "not readable as a comparison" in refused("compare", DEMO, *setup)
    (out / "comparison.json").unlink()
    assert "holds no comparison.json" in refused("compare", DEMO, *setup)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alog-50",), "nothing to compare by"),
        (("alog-50", "--text", "a.txt", "--seeds", "0,x"), "--seeds must be whole numbers"),
        (("alog-51", "--text", "a.txt"), "built in: all-50-w8a8"),
        (("x=alog-50,x=state-50", "--text", "a.txt"), "--recipes: two are called 'x'"),
        (("alog-50", "--text", "a.txt"), "give --calibration"),
        (("alog-50", "--tasks", "piqa_local", "--calibration", "a.txt"), "give --tasks-data"),
        (("dense=alog-50", "--text", "a.txt"), "'dense' is the model as it was"),
        (("alog-50", "--calibration", "none.txt", "--text", __file__), "none.txt does not exist"),
    ],
)
def test_bad_arguments(refused, tmp_path, arguments, message):
    assert message in refused(
        "compare", DEMO, "--output", tmp_path / "out", "--recipes", *arguments
    )


def test_a_model_that_a_recipe_does_not_fit(refused, tmp_path):
    tiny_model("mamba2").save_pretrained(tmp_path / "model")
    options = ("--recipes", "state-50,mine=alog-50", "--calibration", "a.txt", "--text", "a.txt")
    message = refused("compare", tmp_path / "model", *options, "--output", tmp_path / "out")
    assert "mine: SparseSSMModifier: A_log of" in message
    assert "has one entry a head" in message


def test_an_interrupt(setup, tmp_path):
    """In processes of their own: an interrupt ends the run that it meets and keeps the rest."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparsessm_plugin.cli", "compare", str(DEMO), *setup]
    command = [str(part) for part in command]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509
            signal.SIGINT, signal.default_int_handler
        ),
    )
    lines = []
    for line in process.stderr:  # the dense model is done when the first run begins
        lines.append(line)
        if line.startswith("mag, seed 0"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=240)[1]  # the run may be loading torch
    assert process.returncode == 130, (lines, rest)
    assert f"finished runs are kept in {out}" in " ".join(rest.split())
    state = json.loads((out / "comparison.json").read_text())
    assert state["dense"]["measures"]["topics, perplexity"]["value"] > 1
    assert state["runs"] == {}
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    time.sleep(0.1)
    assert "sparsessm_plugin.cli prune" not in _commands(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_process_starts(number, tmp_path, monkeypatch):
    """It has begun, and nobody has its handle yet."""
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **kwargs)
            started.append(self)
            signal.raise_signal(number)

    def handler(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.subprocess, "Popen", Interrupted)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            comparison._command(["prune"], tmp_path, "run")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert started[0].poll() is not None


def test_an_interrupt_that_a_destructor_would_pass_over(tmp_path, monkeypatch):
    """It comes while a run is waited for, within a destructor, where errors are ignored."""
    seconds, waited = 20, []
    begun = time.monotonic()
    wait = subprocess.Popen.wait

    class Fleeting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    class Sleeping(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            code = f"import time; time.sleep({seconds})"
            super().__init__([sys.executable, "-c", code], **kwargs)

        def wait(self, timeout=None):
            if not waited:
                waited.append(timeout)
                Fleeting()
            return wait(self, timeout)

    def handler(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.subprocess, "Popen", Sleeping)
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            comparison._command(["prune"], tmp_path, "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < seconds


def test_a_stop_that_got_lost_is_found_before_the_next_run(tmp_path, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "_evaluate", lambda *arguments: {"measures": {}})
    monkeypatch.setattr(comparison, "_write", lambda *arguments: None)
    monkeypatch.setattr(comparison, "_run", lambda *arguments: pytest.fail("it went on"))
    plan = comparison.Plan("m", "i", {"r": ("r", "text")}, [("r", 0)], {}, [], [], tmp_path, False)
    with pytest.raises(KeyboardInterrupt):
        comparison.run_comparison(plan, check_stopped=stopped)


def test_a_child_is_told_whose_end_it_must_not_outlive(tmp_path, monkeypatch):
    told = []

    class Told(subprocess.Popen):
        def __init__(self, *args, env, **kwargs):
            told.append(env[processes.PARENT])
            super().__init__([sys.executable, "-c", ""], env=env, **kwargs)

    monkeypatch.setattr(comparison.subprocess, "Popen", Told)
    comparison._command(["prune"], tmp_path, "run")
    assert told == [str(os.getpid())]


CHILD = """
import signal, sys, time
from sparsessm_plugin.processes import end_with_parent
time.sleep(float(sys.argv[1]))
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys
from sparsessm_plugin.processes import PARENT
env = {**os.environ, PARENT: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=env)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_ends_with_its_comparison(delay):
    """However that ends; also if it ends before the run has asked to be told."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(delay)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    if not delay:
        assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_warnings_of_a_run_are_shown(tmp_path, monkeypatch):
    code = "print('loading'); print('warning: few tokens'); print('Warning: theirs')"

    class Warns(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__([sys.executable, "-c", code], **kwargs)

    monkeypatch.setattr(comparison.subprocess, "Popen", Warns)
    with pytest.warns(SparseSSMWarning, match="mag, seed 0: few tokens") as caught:
        comparison._command(["prune"], tmp_path, "mag, seed 0")
    assert len(caught) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: "",
        lambda state: "[" * 100_000,
        lambda state: json.dumps({**state, "runs": {"a": 5}}),
        lambda state: json.dumps({**state, "runs": {"a": {"recipe": "a"}}}),
        lambda state: json.dumps({**state, "dense": {"measures": {}}}),
        lambda state: json.dumps({**state, "dense": {**state["dense"], "parameters": 0}}),
        lambda state: json.dumps({**state, "recipes": []}),
        lambda state: json.dumps({**state, "model": "x"}),
        lambda state: json.dumps({**state, "settings": None}),
    ],
)
def test_a_damaged_comparison_is_refused(tmp_path, damage):
    plan = comparison.Plan("m", "id", {}, [], {}, [], [], tmp_path)
    state = comparison.check_folder(plan)
    state["dense"] = run("dense", 9.0)
    path = tmp_path / comparison.COMPARISON
    path.write_text(json.dumps(state))
    assert comparison.check_folder(plan)["dense"] == state["dense"]
    path.write_text(damage(state))
    with pytest.raises(SparseSSMError, match="is not readable as a comparison") as error:
        comparison.check_folder(plan)
    assert "\n" not in str(error.value)


def test_a_measure_that_is_not_finite_is_no_damage(tmp_path):
    plan = comparison.Plan("m", "id", {}, [], {}, [], [], tmp_path)
    state = comparison.check_folder(plan)
    state["dense"] = run("dense", 9.0)
    state["runs"]["a, seed 0"] = run("a", 9.0)
    state["runs"]["a, seed 0"]["measures"]["a, perplexity"]["value"] = None  # as JSON has it
    (tmp_path / comparison.COMPARISON).write_text(json.dumps(state))
    found = comparison.check_folder(plan)
    assert "nan" in markdown(summarize(found["dense"], found["runs"].values()))


@pytest.mark.parametrize("missing", ["after", "seconds", "peak_memory_bytes", "recipe"])
def test_a_damaged_report_is_made_again(tmp_path, missing):
    report = {
        "recipe": {"yaml": "r"},
        "after": {"parameters": 1, "zeros": 1},
        "seconds": {"oneshot": 1.0},
        "peak_memory_bytes": 1,
    }
    path = tmp_path / "sparsessm_report.json"
    path.write_text(json.dumps(report))
    assert comparison._report(tmp_path, "r") == report
    path.write_text(json.dumps({k: v for k, v in report.items() if k != missing}))
    assert comparison._report(tmp_path, "r") is None


def test_a_folder_that_was_only_begun_is_taken(tmp_path):
    plan = comparison.Plan("m", "id", {}, [], {}, [], [], tmp_path)
    left = f".{comparison.COMPARISON}.{files._host()}.{files._boot()}.abc.partial"
    (tmp_path / left).write_text("{")
    assert comparison.check_folder(plan)["runs"] == {}
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SparseSSMError, match="holds no comparison"):
        comparison.check_folder(plan)


def _commands(folder):
    """Command lines of all processes that name a folder."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    line = file.read().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return "\n".join(found)


def test_a_child_that_fails_leaves_its_error(tmp_path):
    with pytest.raises(comparison._RunFailed, match="nothing to evaluate") as error:
        comparison._command(["evaluate", "none"], tmp_path, "dense")
    log = tmp_path / "logs" / "dense.log"
    assert str(log) in str(error.value)
    assert "error: nothing to evaluate" in log.read_text()


def test_two_processes_do_not_share_a_folder(tmp_path):
    with (
        comparison._lock(tmp_path),
        pytest.raises(SparseSSMError, match="another process is working on"),
        comparison._lock(tmp_path),
    ):
        pass
    with comparison._lock(tmp_path):
        pass


# -- summing up --------------------------------------------------------------------------


def run(recipe, value, parameters=90, zeros=20, stderr=None):
    return {
        "recipe": recipe,
        "parameters": parameters,
        "zeros": zeros,
        "measures": {
            "a, perplexity": {"value": value, "stderr": None, "higher_is_better": False},
            "b, acc": {"value": value / 100, "stderr": stderr, "higher_is_better": True},
        },
        "seconds": value,
        "peak_memory_bytes": 2**20 * value,
    }


def test_table():
    dense = run("", 10.0, parameters=100, zeros=5, stderr=0.01)
    runs = [run("x", 11.0), run("y", 14.0, 100, 50, stderr=0.02), run("x", 13.0)]
    rows = summarize(dense, [*runs, {"recipe": "z", "seed": 0, "error": "failed"}])
    assert [row.label for row in rows] == ["dense", "x", "y"]
    x, y = rows[1:]
    assert x.measures["a, perplexity"] == Spread(12.0, 1.0)
    assert x.ratio == {"a, perplexity": pytest.approx(1.2)}
    assert x.removed.mean == pytest.approx(0.1)
    assert x.zeros.mean == pytest.approx(0.2)
    assert (x.stderr, y.stderr) == ({}, {"b, acc": 0.02})
    lines = markdown(rows).splitlines()
    assert lines[2].startswith("| dense |  | 100 | 0.0% | 5.0% | 5.0% | 10.00 | 0.1000 ± 0.0100 |")
    assert (
        "| x | 2 | 90 | 10.0% | 20.0% | 30.0% | 12.00 ± 1.00 (1.200) | 0.1200 ± 0.0100 |"
        in (lines[3])
    )
    assert lines[4].startswith("| y | 1 | 100 | 0.0% | 50.0% | 50.0% | 14.00 (1.400) |")
    assert lines[3].count("|") == lines[0].count("|")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_spread_reaches_every_value(values):
    spread = Spread.of(values)
    middle = (max(values) + min(values)) / 2
    assert abs(spread.mean - middle) <= (spread.half_range or 0) + 1e-6
    assert (spread.half_range is None) == (len(values) == 1)


def test_fingerprint_sees_every_byte(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    seen = set()
    for name, content in (
        ("config.json", b"{}"),
        ("model.safetensors", b"weights"),
        ("model.safetensors", b"Weights"),
        ("more.safetensors", b""),
    ):
        (folder / name).write_bytes(content)
        seen.add(comparison.fingerprint(folder))
    assert len(seen) == 4
    (folder / "notes.txt").write_text("not a part of the model")
    assert comparison.fingerprint(folder) in seen


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (
            "compare M --recipes A B,C D --seeds 0 --text x=1 2 --output O",
            "compare M --recipes A --recipes B,C --recipes D --seeds 0 --text x=1 --text 2 "
            "--output O",
        ),
        ("compare M --recipes A --recipes B --keep", "compare M --recipes A --recipes B --keep"),
        ("compare --recipes A M", "compare --recipes A M"),
        ("evaluate M --text A B", "evaluate M --text A B"),
        ("compare", "compare"),
        ("", ""),
    ],
)
def test_several_values_of_an_option(given, understood):
    assert repeated(given.split()) == understood.split()


def of_command(name):
    return typer.main.get_command(cli.app).commands[name]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        # Recipes that are compared name their runtimes themselves, if they remove anything at all.
        # What is compared is evaluated, for which all weights are loaded anyway.
        (
            "prune",
            {"recipe", "output", "seed", "text", "runtime", "offload", "offload_folder"},
        ),
        ("evaluate", {"output", "num_samples"}),
    ],
)
def test_compare_knows_every_option_of_what_it_runs(name, own):
    known, asked = ({p.name: p for p in of_command(n).params} for n in ("compare", name))
    assert asked.keys() - own <= known.keys()
    for option in asked.keys() - own:
        assert known[option].default == asked[option].default, option
        assert known[option].opts == asked[option].opts
        assert known[option].multiple == asked[option].multiple


@pytest.mark.parametrize(
    "line",
    [
        "--calibration a=b.txt --max-seq-length 8 --trust-remote-code --device cpu",
        "--tasks a,b --tasks c --text x=y --text z --limit 3 --tasks-data d --eval-samples 2",
        "--allow-unused-tensors --text-field -x --batch-size 1",
    ],
)
def test_a_command_line_says_what_was_given(line):
    given = ["M", "--recipes", "R", "--output", "O", *line.split()]
    command = of_command("compare")
    values = command.make_context("compare", list(given)).params
    again = ["M", *command_line(command, values)]
    assert command.make_context("compare", list(again)).params == values
    assert set(given) <= set(again)
