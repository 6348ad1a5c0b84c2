"""What a user expects of any command: help in panels, JSON, exit codes, completion, no colours."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO
from typer.main import get_command

from sparsessm_plugin import cli, recipes
from sparsessm_plugin.cli import reference
from sparsessm_plugin.cli.options import PANELS
from sparsessm_plugin.cli.stopping import EXIT_CODES

PAGE = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = get_command(cli.app).commands
SHORT = ("--num-samples", 1, "--max-seq-length", 16, "--batch-size", 1)


def run_alone(*arguments, **environment):
    command = [sys.executable, "-m", "sparsessm_plugin.cli", *map(str, arguments)]
    surrounding = {**os.environ, **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=surrounding)


# -- streams ------------------------------------------------------------------------------


def test_closed_streams_are_no_defect():
    for arguments, code in (("recipes --json", 0), ("--help", 0), ("recipes none", 1)):
        line = f"exec {sys.executable} -m sparsessm_plugin.cli {arguments} >&-"
        done = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_no_color_is_no_escape_at_all():
    """On a terminal, where rich keeps bold and italic."""
    assert b"alog-50" in (shown := on_a_terminal("recipes", NO_COLOR="1"))
    assert b"\x1b" not in shown
    assert b"\x1b" not in on_a_terminal("bench", "--help", NO_COLOR="1")


def test_a_narrow_terminal_cuts_no_column():
    shown = on_a_terminal("inspect", DEMO, NO_COLOR="1", COLUMNS="60").decode()
    assert "…" not in shown
    assert "out_proj" in shown


def test_what_is_quantized_shows_no_bar_of_a_library(sparsessm, tmp_path):
    recipe, out = tmp_path / "w8a8.yaml", tmp_path / "out"
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    QuantizationModifier:\n      targets: [Linear]\n"
        "      scheme: W8A8\n      ignore: [lm_head, 're:.*dt_proj$']\n"
    )
    assert sparsessm("prune", DEMO, "--recipe", recipe, "--output", out)[0] == 0
    steps = ("--decode-steps", 1, "--repeats", 1, "--batch-sizes", 1, "--prompt-length", 4)
    for arguments in (("inspect", out), ("bench", out, *steps)):
        done = run_alone(*arguments)
        assert done.returncode == 0
        assert "it/s" not in done.stderr


def on_a_terminal(*arguments, **environment):
    source, terminal = os.openpty()
    command = [sys.executable, "-m", "sparsessm_plugin.cli", *map(str, arguments)]
    surrounding = {**os.environ, "TERM": "xterm", **environment}
    process = subprocess.Popen(command, stdout=terminal, env=surrounding)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(source, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(source)
    assert process.wait() == 0
    return shown


# -- threads ------------------------------------------------------------------------------

_WATCHED = """
import os, sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch sees", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)  # before seconds of imports
sys.meta_path.insert(0, Watch)
import sparsessm_plugin.cli as cli
print("imported", os.environ.get("OMP_WAIT_POLICY"))
cli.main()
"""


@pytest.mark.parametrize(("given", "seen"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_where_others_work_too(given, seen):
    """The command asks for it before torch is there; importing the package asks for nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    command = [sys.executable, "-c", _WATCHED, "inspect", "/nowhere"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"imported {given}", f"torch sees {seen}"]


# -- help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_groups_every_option(name):
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    for option in options:
        if option.name != "help":
            assert option.rich_help_panel in ("Options", *PANELS), option.name
            assert option.help, option.name
    assert "--json" in [option.opts[0] for option in options]


def test_panels_hold_only_options_that_exist():
    known = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    for names in PANELS.values():
        assert set(names) <= known


def test_help_shows_panels_and_defaults(sparsessm):
    code, stdout, _ = sparsessm("bench", "--help")
    assert code == 0
    assert {"Options", "Model", "Result"} <= set(re.findall(r"─ (\w+) ─", stdout))
    assert "[default: 64]" in stdout


def test_page_has_the_options_of_the_commands():
    """To make it true again: python -m sparsessm_plugin.cli.reference docs/cli.md."""
    assert reference.update(PAGE, get_command(cli.app)) == PAGE


# -- JSON ----------------------------------------------------------------------------------


def printed(sparsessm, *arguments):
    code, stdout, _ = sparsessm(*arguments, "--json")
    assert code == 0
    return json.loads(stdout)


def test_json_of_results(sparsessm, text_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "a_stage:\n  a_modifiers:\n    SparseSSMModifier: {saliency: magnitude, sparsity: 0.5}\n"
    )
    out = tmp_path / "out"
    report = printed(sparsessm, "prune", DEMO, "--recipe", recipe, "--output", out)
    assert report.pop("output") == str(out)
    assert report == json.loads((out / "sparsessm_report.json").read_text())

    exported = tmp_path / "exported"
    report = printed(sparsessm, "export", DEMO, "--output", exported)
    assert report["format"] == "mamba_ssm"
    assert report["output"] == str(exported)


def test_json_of_measurements(sparsessm, text_file, tmp_path):
    file = tmp_path / "report.json"
    report = printed(sparsessm, "evaluate", DEMO, "--text", text_file, *SHORT, "--output", file)
    assert report == json.loads(file.read_text())
    assert report["perplexity"][str(text_file)]["windows"] == 1

    options = ("--prompt-length", 2, "--decode-steps", 1, "--repeats", 1, "--batch-sizes", 1)
    report = printed(sparsessm, "bench", DEMO, *options)
    assert {timing["phase"] for timing in report["timings"]} == {"prefill", "decode"}

    parts = ("--by", "kind", "--sparsities", "0.5", "--solver", "magnitude", "--eval-samples", 1)
    options = ("--calibration", text_file, *SHORT, *parts)
    file = tmp_path / "losses.json"
    report = printed(sparsessm, "component-loss", DEMO, *options, "--output", file)
    assert report == json.loads(file.read_text())


def test_json_of_descriptions(sparsessm):
    described = printed(sparsessm, "recipes")
    assert list(described) == recipes.recipe_names()
    assert all(described.values())
    text = Path(recipes.recipe_path("state-50")).read_text(encoding="utf-8")
    assert printed(sparsessm, "recipes", "state-50")["yaml"] == text

    report = printed(sparsessm, "inspect", DEMO)
    assert report["inventory"]["parameters"] == 728704
    assert {"runtime", "answer", "reasons"} <= set(report["runtimes"][0])


# -- exit codes ----------------------------------------------------------------------------


def test_page_lists_every_exit_code():
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {0, 1, 2, *EXIT_CODES.values()}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("recipes",), 0),
        (("recipes", "none"), 1),
        (("inspect", "/nowhere"), 1),
        (("nothing",), 2),
        (("inspect",), 2),
        (("evaluate", DEMO, "--batch-size", 0), 2),
    ],
)
def test_exit_codes(sparsessm, arguments, code):
    assert sparsessm(*arguments)[0] == code


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt, 130), (cli.stopping.Terminated, 143)]
)
def test_exit_codes_of_stopped_commands(sparsessm, monkeypatch, error, code):
    def stop():
        raise error

    monkeypatch.setattr(recipes, "recipe_names", stop)
    assert sparsessm("recipes")[0] == code


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("evaluate", DEMO, "--text", "none.txt"), "--text"),
        (("prune", DEMO, "--recipe", "none.yaml", "--output", "x"), "--recipe"),
        (
            *[("prune", DEMO, "--recipe", "alog-50", "--output", "x", "--calibration", "none.txt")],
            "--calibration",
        ),
        (("evaluate", DEMO, "--text", "none.txt", "--dtype", "int3"), "--dtype"),
        (("bench", DEMO, "--output", "x.yaml"), "--output"),
    ],
)
def test_errors_begin_with_the_option(refused, arguments, option):
    assert refused(*arguments).startswith(f"error: {option}")


# -- the shell -----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("sparsessm component", ["component-loss"]),
        ("sparsessm prune MODEL --recipe state-", ["state-50", "state-50-w8a8", "state-75"]),
        ("sparsessm recipes width", ["width-25"]),
        ("sparsessm evaluate MODEL --dtype b", ["bfloat16"]),
    ],
)
def test_completion(monkeypatch, capsys, words, offered):
    for name, value in (
        ("_SPARSESSM_COMPLETE", "complete_bash"),
        ("COMP_WORDS", words),
        ("COMP_CWORD", str(len(words.split()) - 1)),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.app(prog_name="sparsessm")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == offered


def test_the_page_names_all_that_is_completed():
    said = " ".join(re.search(r"^It completes .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)[0].split())
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter._custom_shell_complete is not None:
                option = parameter.param_type_name == "option"
                word = parameter.opts[0] if option else f"argument of `{name}`"
                assert (f"`{word}`" if option else word) in said


def test_no_color_takes_colours_away():
    loud = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    plain = run_alone("recipes", "none", **loud, NO_COLOR="1")
    coloured = run_alone("recipes", "none", **loud)
    codes = re.compile(r"\x1b\[[0-9;]*m")
    assert any("31" in code for code in codes.findall(coloured.stderr))  # red
    assert not any(re.search(r"\b[349]\d\b", code) for code in codes.findall(plain.stderr))
    assert "error: " in codes.sub("", plain.stderr)
