"""The notebooks of examples/, cell by cell, on a smaller model and little text."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import DEMO
from transformers import AutoConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
SMALLER = (
    (r"mamba-demo-4m", str(DEMO)),
    (r"SAMPLES = 32", "SAMPLES = 2"),
    (r"LENGTH = 512", "LENGTH = 64"),
    (r"--num-samples 32", "--num-samples 2"),
    (r"--max-seq-length 512", "--max-seq-length 64"),
)


def cells(name, kind):
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def as_script(sources):
    """Python of a notebook's cells, in which IPython's ``!`` lines are calls of ``_shell``."""
    text = re.sub(r"\\\n *", "", "\n".join(sources))
    lines = [f"_shell({line[1:]!r})" if line.startswith("!") else line for line in text.split("\n")]
    return "\n".join(lines)


def test_there_is_one_for_each_way():
    assert NOTEBOOKS == ["command.ipynb", "python.ipynb", "recipe.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch, sparsessm, capsys):
    """In this process, where everything is imported already."""

    def shell(line):
        words, _, file = line.partition(" > ")
        program, *arguments = shlex.split(words)
        assert program == "sparsessm"
        code, stdout, stderr = sparsessm(*arguments)
        assert code == 0, stderr
        if file:
            Path(file).write_text(stdout, encoding="utf-8")

    script = as_script(cells(name, "code"))
    for pattern, smaller in SMALLER:
        script = re.sub(pattern, lambda _, smaller=smaller: smaller, script)
    assert "4m" not in script
    monkeypatch.chdir(tmp_path)
    exec(compile(script, name, "exec"), {"_shell": shell})
    assert AutoConfig.from_pretrained(tmp_path / "fewer-states").state_size == 8
    if "perplexity" in script:
        (ratio,) = re.findall(r"([\d.]+) times the perplexity", capsys.readouterr().out)
        assert 0.8 < float(ratio) < 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_output(name):
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert cells(name, "markdown")[0].startswith("# ")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
