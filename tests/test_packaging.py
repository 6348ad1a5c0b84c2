"""What is given away: wheel and sdist, built here, whole, small, and usable where they lie."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHEEL_BYTES = 4_000_000  # docs/start.md says so
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel's files and nothing else of this project."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(folder)
    return folder


def run(folder, *arguments):
    """As a user would, whose Python finds the installed package first."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv[0] = 'sparsessm'\n"
    program += "import sparsessm_plugin\nfrom sparsessm_plugin.cli import main\n"
    program += f"assert sparsessm_plugin.__file__.startswith({str(folder)!r})\nmain()"
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    if sys.version_info < (3, 11):
        command.remove("-P")
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_wheel_is_small_and_whole(built):
    wheel, _ = built
    assert wheel.stat().st_size <= WHEEL_BYTES
    said = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert f"at most {WHEEL_BYTES // 1_000_000} MB" in said
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("sparsessm_plugin/")}
    tracked = (ROOT / "sparsessm_plugin").rglob("*")
    files = {p.relative_to(ROOT).as_posix() for p in tracked if p.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}


def test_metadata(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "sparsessm-plugin"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "sparsessm = sparsessm_plugin.cli:main" in entry_points
    assert "StateRemovalModifier" in entry_points


def test_twine_finds_nothing(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_installed_command(built, installed):
    (version,) = (built[0].name.split("-")[1],)
    process = run(installed, "--version")
    assert process.stdout == f"sparsessm {version}\n", process.stderr
    assert "state-50" in run(installed, "recipes").stdout


def test_installed_checkpoint(installed):
    process = run(installed, "inspect", "mamba-demo-4m")
    assert "state-space mixers (mamba)" in process.stdout, process.stderr


def test_sdist_has_what_it_takes_to_build_test_and_cite(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "mkdocs.yml"}
    needed |= {"CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "tests/conftest.py"}
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_citation_says_what_the_package_says():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    tree = ast.parse((ROOT / "sparsessm_plugin" / "__init__.py").read_text(encoding="utf-8"))
    stated = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in pyproject
    assert all(version == citation["version"] for version in stated if isinstance(version, str))
    cited = {r["identifiers"][0]["value"] for r in citation["references"]}
    assert cited == {"arXiv:2506.09613", "arXiv:2505.08299"}
