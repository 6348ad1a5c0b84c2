"""The notebooks of examples/, cell by cell, on a smaller model and little text."""

import json
import os
import re
import shlex
import subprocess
import sys
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
    """Python of a notebook's cells; IPython's ``!`` lines run in a shell that must succeed."""
    lines = ["import subprocess as _subprocess"]
    for line in re.sub(r"\\\n *", "", "\n".join(sources)).splitlines():
        if line.startswith("!"):
            command = re.sub(
                r"^sparsessm", f"{shlex.quote(sys.executable)} -m sparsessm_plugin.cli", line[1:]
            )
            line = f"_subprocess.run({command!r}, shell=True, check=True)"
        lines.append(line)
    return "\n".join(lines)


def test_there_is_one_for_each_way():
    assert NOTEBOOKS == ["command.ipynb", "python.ipynb", "recipe.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path):
    script = as_script(cells(name, "code"))
    for pattern, smaller in SMALLER:
        script = re.sub(pattern, lambda _, smaller=smaller: smaller, script)
    assert "4m" not in script
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert AutoConfig.from_pretrained(tmp_path / "fewer-states").state_size == 8
    if "perplexity" in script:
        (ratio,) = re.findall(r"([\d.]+) times the perplexity", process.stdout)
        assert 0.8 < float(ratio) < 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_output(name):
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert cells(name, "markdown")[0].startswith("# ")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
