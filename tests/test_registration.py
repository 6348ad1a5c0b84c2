"""The three ways in which the modifiers become known, in fresh interpreters.

The package is installed twice, as a wheel and with ``pip install --editable``, each time into an
environment of its own that shares only the dependencies of the one that runs the tests.
"""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
from conftest import DEMO

ROOT = Path(__file__).parents[1]

PRUNE = """
from datasets import Dataset
data = Dataset.from_list([{"input_ids": list(range(1, 30)), "attention_mask": [1] * 29}] * 2)
model = oneshot(model=MODEL, recipe=RECIPE, dataset=data, max_seq_length=29)
A_log = model.backbone.layers[0].mixer.A_log
assert (A_log == 0).sum() == A_log.numel() // 2
print("pruned")
"""

RECIPE = """\
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      sparsity: 0.5
"""

BROKEN = {
    "broken_plugin.py": 'raise RuntimeError("broken on purpose")\n',
    "not_a_modifier.py": "def NotAModifier(): ...\n",
    "broken_plugin-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-plugin\n"
    "Version: 1.0\n",
    "broken_plugin-1.0.dist-info/entry_points.txt": "[llmcompressor.modifiers]\n"
    "BrokenModifier = broken_plugin:BrokenModifier\nX = not_a_modifier:NotAModifier\n",
}


def make_environment(how, folder):
    """An environment with the package installed; returns its interpreter."""
    pytest.importorskip("hatchling", reason="the package is built without a network")
    venv.create(folder / "env", with_pip=False)
    interpreter = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    find_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([interpreter, "-c", find_site], text=True).strip())
    # a path in a .pth file shares the packages there, but not their own .pth files: the
    # editable installation of the running environment stays invisible
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    what = ["--editable", str(ROOT)]
    if how == "wheel":
        build = [*pip, "wheel", *options, "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run(build, check=True)
        what = [str(next(folder.glob("sparsessm_plugin-*.whl")))]
    install = [*pip, "--python", str(interpreter), "install", "--force-reinstall", *options, *what]
    subprocess.run(install, check=True)
    return interpreter


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    made = {}

    def get(how):
        if how not in made:
            made[how] = make_environment(how, tmp_path_factory.mktemp(how))
        return made[how]

    return get


@pytest.fixture
def run(environments, tmp_path):
    """Run a script away from the sources; returns the finished process."""

    def run_script(script, how="wheel", check=True, path=None, **environment):
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        preamble = f"MODEL, RECIPE = {str(DEMO)!r}, 'recipe.yaml'\n"
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if path is not None:
            env["PYTHONPATH"] = str(path)
        done = subprocess.run(
            [environments(how), "-c", preamble + textwrap.dedent(script)],
            cwd=tmp_path,
            env={**env, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run_script


both_ways = pytest.mark.parametrize("how", ["wheel", "editable"])


@both_ways
def test_installed_as_meant(run, how):
    done = run("import sparsessm_plugin; print(sparsessm_plugin.__file__)", how)
    assert done.stdout.startswith(str(ROOT)) is (how == "editable")


LOADED = """
import sys
from llmcompressor import oneshot
assert "llmcompressor.modifiers.factory" in sys.modules
assert "sparsessm_plugin.modifiers" not in sys.modules
"""
ONCE = """
from llmcompressor.modifiers import ModifierFactory
assert "SparseSSMModifier" in ModifierFactory._registered_registry
ModifierFactory.refresh()
assert "SparseSSMModifier" in ModifierFactory._registered_registry
assert sum("Finder" in type(f).__name__ for f in sys.meta_path if "sparse" in repr(f)) == 0
"""


@both_ways
def test_plain_oneshot_without_any_import_of_ours(run, how):
    """Our modifiers load with the first recipe, and once."""
    done = run(LOADED + PRUNE + ONCE, how)
    assert "pruned" in done.stdout


OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def test_autoload_can_be_turned_off(run):
    done = run("from llmcompressor import oneshot\n" + PRUNE, check=False, **OFF)
    assert "No modifier of type 'SparseSSMModifier' found" in done.stderr


@pytest.mark.parametrize(("how", "first"), [("wheel", "ours"), ("editable", "theirs")])
def test_import_of_the_package(run, how, first):
    """In either order; how it is installed does not matter to an import."""
    lines = ["import sparsessm_plugin\n", "from llmcompressor import oneshot\n"]
    script = "".join(lines if first == "ours" else reversed(lines))
    assert "pruned" in run(script + PRUNE, how, **OFF).stdout


@both_ways
def test_the_command(environments, how):
    command = environments(how).parent / "sparsessm"
    done = subprocess.run([command, "recipes"], capture_output=True, text=True, check=True)
    assert "alog-50" in done.stdout
    assert "SparseSSMModifier" in subprocess.check_output(
        [command, "recipes", "alog-50"], text=True
    )


def test_importing_is_light(run):
    run(
        """
        import sys
        import sparsessm_plugin
        heavy = {"torch", "numpy", "numba", "pydantic", "llmcompressor", "transformers", "yaml"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert "SparseSSMModifier" in dir(sparsessm_plugin)
        try:
            sparsessm_plugin.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        """
    )


def test_importing_torch_imports_nothing_more_of_ours(run):
    run(
        """
        import sys
        import torch
        ours = {name for name in sys.modules if name.startswith("sparsessm_plugin")}
        assert ours == {"sparsessm_plugin", "sparsessm_plugin.registration"}, ours
        assert "llmcompressor" not in sys.modules
        """
    )


def test_looking_for_the_factory_without_importing_it_spoils_nothing(run):
    run(
        """
        import importlib.util, torch
        importlib.util.find_spec("llmcompressor.modifiers.factory")
        from llmcompressor.modifiers import ModifierFactory
        ModifierFactory.create(
            "SparseSSMModifier", allow_registered=True, allow_experimental=True, sparsity=0.5
        )
        """
    )


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "broken"
    for name, content in BROKEN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def count_warnings(done, words):
    return sum(words in line and "RuntimeWarning" in line for line in done.stderr.splitlines())


def test_somebody_elses_broken_plugins_cost_one_warning_each(run, broken):
    """One that cannot be imported, and one that is no modifier."""
    script = "import torch\nfrom llmcompressor import oneshot\n" + PRUNE + PRUNE
    done = run(script, path=broken)
    assert done.stdout.count("pruned") == 2
    assert count_warnings(done, "'BrokenModifier'") == 1
    assert "broken on purpose" in done.stderr
    assert count_warnings(done, "'X'") == 1
    assert count_warnings(done, "") == 2


OTHER_RECIPE = """
import torch
from llmcompressor.recipe import Recipe
text = "s_stage:\\n  s_modifiers:\\n    SparseGPTModifier: {sparsity: 0.5}\\n"
assert len(Recipe.create_instance(text).modifiers) == 1
assert len(Recipe.create_instance(text).modifiers) == 1
print("works")
"""


@pytest.mark.parametrize(
    "part", ["sparsessm_plugin.modifiers", "sparsessm_plugin.registration", "importlib.metadata"]
)
def test_our_own_breakage_harms_nobody(run, tmp_path, part):
    """Whatever of ours cannot be imported: torch and llmcompressor work, with one warning."""
    site = tmp_path / "site"
    site.mkdir()
    if part == "importlib.metadata":  # reading the entry points fails, as with damaged metadata
        breakage = """
            import importlib.metadata as metadata
            original = metadata.entry_points
            def entry_points(**parameters):
                if parameters.get("group") == "llmcompressor.modifiers":
                    raise RuntimeError("damaged")
                return original(**parameters)
            metadata.entry_points = entry_points
        """
    else:
        breakage = f"import sys\nsys.modules[{part!r}] = None\n"
    (site / "sitecustomize.py").write_text(textwrap.dedent(breakage))
    done = run(OTHER_RECIPE, path=site)
    assert "works" in done.stdout
    assert count_warnings(done, "") == 1, done.stderr


def test_warnings_turned_into_errors_do_not_stop_torch(run, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.modules['sparsessm_plugin.registration'] = None\n"
    )
    run("import torch; print(torch.__version__)", path=site, PYTHONWARNINGS="error::RuntimeWarning")
