"""What the command says beside its results, and where."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, stock_process

import sparsessm_plugin
from sparsessm_plugin import recipes

PACKAGE = Path(sparsessm_plugin.__file__).parent
LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"
FEW = ("--num-samples", 2, "--max-seq-length", 32)


def test_every_warning_of_the_package_is_known_as_ours():
    for path in PACKAGE.rglob("*.py"):
        if path in (PACKAGE / "__init__.py", PACKAGE / "registration.py"):
            continue  # seen by their text, before anything can be imported
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                category = [ast.unparse(part) for part in node.args[1:]]
                assert category == ["SparseSSMWarning"], f"{path}, line {node.lineno}"


def prune(sparsessm, text_file, out, *options):
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        "a_stage: {a_modifiers: {StateRemovalModifier: {keep: 8, compensate: [out_proj]}}}"
    )
    arguments = ("--recipe", recipe, "--calibration", text_file, "--output", out, *FEW)
    code, stdout, stderr = sparsessm("prune", DEMO, *arguments, *options)
    assert code == 0
    return stdout, stderr


def test_warnings_of_ours_reach_stderr(sparsessm, text_file, tmp_path):
    stdout, stderr = prune(sparsessm, text_file, tmp_path / "out")
    assert "warning: backbone.layers.0.mixer: 64 calibration tokens are few for" in stderr
    assert "info:" not in stderr
    assert "UserWarning" not in stderr
    assert "StateRemovalModifier: removed" in stdout
    assert "calibration tokens" not in stdout


def test_nothing_to_say_is_nothing_on_stderr(text_file, tmp_path):
    """No bars or logs of libraries, in a process as users start it, up to what is saved."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sparsessm_plugin.cli", "prune", str(DEMO)),
            *("--recipe", "alog-50", "--calibration", str(text_file), *map(str, FEW)),
            *("--output", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=False,
        # as users have them, and not as this suite sets them
        env={k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", LEVEL)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_verbose_shows_the_libraries_on_stderr_too(sparsessm, text_file, tmp_path, monkeypatch):
    monkeypatch.delenv(LEVEL)
    stdout, stderr = prune(sparsessm, text_file, tmp_path / "out", "--verbose")
    assert "info: Compression lifecycle initialized for 1 modifiers" in stderr
    assert "calibration tokens are few" in stderr
    starts = [line.split()[0] for line in stdout.splitlines()]
    assert starts == ["before", "parameters", "zeros", "StateRemovalModifier:", "saved"]


SCRIPT = """
import json, os, sys, warnings
from sparsessm_plugin import registration
from sparsessm_plugin.errors import SparseSSMWarning
from sparsessm_plugin.messages import show_messages

def say():
    shown.clear()
    from loguru import logger
    for name in ("sparsessm_plugin.training.gradients", "llmcompressor.core"):
        code = "for say in (log.info, log.warning, log.error): say(name)"
        exec(code, {"__name__": name, "log": logger, "name": name})
    warnings.warn("ours", SparseSSMWarning)
    warnings.warn("theirs", UserWarning)
    registration.warned.clear()
    registration._warn("registered")
    return list(shown)

class Ranks:
    get_rank = staticmethod(lambda: 0)

shown = []
warnings.simplefilter("always")
show_messages(lambda level, text: shown.append([level, text]), False)
assert "llmcompressor" not in sys.modules
import llmcompressor  # sets its log up, on stdout
quiet = say()
show_messages(lambda level, text: shown.append([level, text]), True)
verbose = say()
sys.modules["llmcompressor.logger"].configure_distributed_logger.__globals__["dist"] = Ranks
sys.modules["llmcompressor.logger"].configure_distributed_logger()
again = say()
print(json.dumps([quiet, verbose, again]))
"""


def test_logs_and_warnings_go_to_one_place():
    quiet, verbose, again = stock_process(SCRIPT, LLM_COMPRESSOR_LOG_LEVEL="INFO")
    ours = [[level, "sparsessm_plugin.training.gradients"] for level in ("warning", "error")]
    theirs = [["error", "llmcompressor.core"]]
    assert quiet == [*ours, *theirs, ["warning", "ours"], ["warning", "registered"]]
    assert again == verbose
    texts = [text for _, text in verbose]
    assert texts.count("sparsessm_plugin.training.gradients") == 3
    assert texts.count("llmcompressor.core") == 3
    assert any(text.startswith("UserWarning: theirs (") for text in texts)


def test_verbose_shows_tracebacks(sparsessm, refused, tmp_path, monkeypatch):
    assert "cannot load model" in refused("inspect", tmp_path / "nowhere")
    code, _, stderr = sparsessm("inspect", tmp_path / "nowhere", "--verbose")
    assert code == 1
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1].startswith("error: cannot load model")

    def fail(name):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(recipes, "load_recipe", fail)
    options = ("--recipe", "alog-50", "--output", tmp_path / "out")
    message = refused("prune", DEMO, *options)
    assert message == "error: ZeroDivisionError: two lines (--verbose shows where)"
    assert "in fail" in sparsessm("prune", DEMO, *options, "--verbose")[2]


def test_version(sparsessm):
    expected = (0, f"sparsessm {sparsessm_plugin.__version__}\n", "")
    assert sparsessm("--version") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune",), "Missing argument"),
        (("nothing",), "No such command"),
        (("prune", DEMO, "--nothing"), "No such option"),
        (("prune", DEMO, "--batch-size", "9" * 20), "--batch-size"),
        (("prune", DEMO, "--batch-size", "9" * 5000), "--batch-size"),
        (("evaluate", DEMO, "--max-seq-length", "x" * 5000), "--max-seq-length"),
        (("bench", DEMO, "--batch-sizes", "9" * 5000), "--batch-sizes must be whole numbers"),
        (("bench", DEMO, "--batch-sizes", "\uff11"), "--batch-sizes must be whole numbers"),
        (("evaluate", DEMO, "--text", "n" * 5000), "no data set of that name"),
        (("evaluate", DEMO, "--text", "n" * 5000 + ".txt"), "does not exist"),
        (("evaluate", DEMO, "--text", "/dev/zero"), "is no regular file"),
        (("inspect", DEMO, "--dtype", "d" * 5000), "--dtype must be one of"),
        (("recipes", "r" * 5000), "built in: "),
    ],
)
def test_bad_arguments_are_one_short_line(refused, arguments, message):
    line = refused(*arguments)
    assert message in line
    assert len(line) < 1200


def test_a_folder_with_a_pipe_in_it_is_no_model(refused, tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    assert "config.json is no regular file" in refused("inspect", tmp_path / "model")


def test_a_report_that_another_process_wrote_meanwhile(sparsessm, text_file, tmp_path, monkeypatch):
    output = tmp_path / "report.json"
    real = sparsessm_plugin.evaluate_perplexity

    def meanwhile(*arguments):
        output.write_text("{}")
        return real(*arguments)

    monkeypatch.setattr("sparsessm_plugin.evaluation.perplexity.evaluate_perplexity", meanwhile)
    options = ("--text", text_file, "--max-seq-length", 32, "--num-samples", 1)
    code, _, stderr = sparsessm("evaluate", DEMO, *options, "--output", output)
    assert code == 0
    assert "written by another process meanwhile; it is replaced" in stderr
    assert "perplexity" in output.read_text()
