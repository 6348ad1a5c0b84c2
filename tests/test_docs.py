"""README and documentation: blocks parse and run, links lead somewhere, tables are up to date."""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest
from conftest import batches, run, tiny_model

import sparsessm_plugin
from sparsessm_plugin.criteria.scores import SALIENCIES
from sparsessm_plugin.criteria.states import STATE_CRITERIA
from sparsessm_plugin.families.registry import _ADAPTERS
from sparsessm_plugin.fitting.axes import AXES
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.solvers.projections import SOLVERS

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
import harness  # noqa: E402
from reports import tables  # noqa: E402
from sitegen import docstrings, fields, links  # noqa: E402

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "recipes").glob("*.md"),
    ]
}
MODIFIERS = [name for name in sparsessm_plugin.__all__ if name.endswith("Modifier")]
# the tiny model on which a modifier's page runs, where not Mamba as it is
HYBRID = ("granitemoehybrid", {})
MODELS = {
    "mlp": HYBRID,
    "attention": HYBRID,
    "layers": ("mamba", {"num_hidden_layers": 4}),
    "channels": ("mamba", {"hidden_size": 128}),
}
TABLES = (SOLVERS, STATE_CRITERIA, SALIENCIES, _ADAPTERS, AXES)


def blocks(text, language):
    """Code blocks of a page, with whether they are marked to run."""
    pattern = rf"(<!-- runs -->\n)?^```{language}\n(.*?)^```$"
    return [(bool(m), code) for m, code in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_parse(page):
    """Python is Python, and recipes are recipes."""
    for _, code in blocks(PAGES[page], "python"):
        ast.parse(code)
    for _, code in blocks(PAGES[page], "yaml"):
        if "_modifiers:" in code:
            assert parse_recipe(code, page).modifiers


@pytest.mark.parametrize("page", [p for p, text in PAGES.items() if "<!-- runs -->" in text])
def test_marked_blocks_run(page):
    """As they stand, one after the other; what they register is taken out again."""
    before = [dict(table) for table in TABLES]
    names = {"__name__": "an example"}
    try:
        for number, (marked, code) in enumerate(blocks(PAGES[page], "python")):
            if marked:
                exec(compile(code, f"{page}, block {number}", "exec"), names)
    finally:
        for table, entries in zip(TABLES, before, strict=True):
            for name in set(table) - set(entries):
                del table[name]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "modifiers").glob("*.md")), ids=lambda p: p.stem
)
def test_recipe_of_a_modifier_runs(page):
    """Its page's recipe, on a tiny model, and the page names every part that it must have."""
    text = page.read_text(encoding="utf-8")
    for heading in ("The equation", "A recipe", "Fields", "When not to use it"):
        assert f"\n## {heading}\n" in text
    (recipe, *_) = (code for _, code in blocks(text, "yaml"))
    modifiers = parse_recipe(recipe, page.name).modifiers
    assert type(modifiers[-1]).__name__ == text.splitlines()[0].removeprefix("# ")
    family, changes = MODELS.get(page.stem, ("mamba", {}))
    model = tiny_model(family, **changes)
    for modifier in modifiers:
        run(model, modifier, batches())


def test_a_page_for_every_modifier():
    pages = [text for page, text in PAGES.items() if page.startswith("docs/modifiers/")]
    assert sorted(text.splitlines()[0].removeprefix("# ") for text in pages) == sorted(MODIFIERS)
    for name in MODIFIERS:
        assert f"<!-- fields: {name} -->" in "".join(pages)


@pytest.mark.parametrize("name", MODIFIERS)
def test_fields_are_described(name):
    """Every field that a recipe may give has a meaning, and none is described that is not there."""
    modifier = getattr(sparsessm_plugin, name)
    table = fields.table(name)
    assert {f"`{field}`" for field in fields.own_fields(modifier)} <= set(
        re.findall(r"`\w+`", table)
    )
    own = re.findall(r":param (\w+):", modifier.__doc__)
    assert set(own) <= set(fields.own_fields(modifier)) | {"loss_fn"}


def test_recipes_page_lists_every_field():
    """Those of LLM Compressor's own GPTQModifier it names in a sentence."""
    sections = re.findall(
        r"^## (\w+Modifier.*?)\n(.*?)(?=^## )", PAGES["docs/recipes.md"], re.MULTILINE | re.DOTALL
    )
    assert sorted(n for head, _ in sections for n in head.split(", ")) == sorted(MODIFIERS)
    for head, text in sections:
        if head == "SparseGPTQModifier":
            continue
        cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        listed = {field for cell in cells for field in re.findall(r"`([\w.]+)`", cell)}
        known = {"loss_fn"}  # from Python only
        for name in head.split(", "):
            own = set(fields.own_fields(getattr(sparsessm_plugin, name)))
            known |= own
            if "distill_..." in listed:  # in a table of their own
                own = {field for field in own if not field.startswith("distill_")}
            assert own <= listed, name
        assert listed - {"distill_..."} <= known, head


def test_public_objects_say_what_they_are():
    assert docstrings.problems() == []


def test_what_a_docstring_leaves_out_is_found():
    text = '''
def nothing(a): pass
def one(a, b):
    """Add.

    :param a: a number
    """
def refuses(a, b):
    """Add.

    :param a: a number
    :param b: a number
    """
    raise SparseSSMError("never")
class Thing:
    """A thing."""
    def does(self): pass
'''
    found = [docstrings.problems_of(Path("a.py"), node) for node in ast.parse(text).body]
    assert [line for lines in found for line in lines] == [
        "nothing has no docstring",
        "one does not describe b",
        "refuses does not say that it raises an error",
        "Thing.does has no docstring",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files that a page links to are there; `mkdocs build --strict` looks at the anchors."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for address in re.findall(r"\]\(([^()\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", address):
            assert (ROOT / links.target(address.partition("#")[0], page)).exists(), address


def test_readme_is_short_and_up_to_date():
    """Two screens; its table is what `python benchmarks/run.py readme` makes of the results."""
    from reports.readme import rendered

    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) < 100
    assert rendered(text) == text


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_of_results(name):
    """Every table that a page may ask for is made, with as many cells in each row."""
    lines = [line for line in tables.table(name).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) <= 1
    asked = {d for text in PAGES.values() for d in re.findall(r"<!-- results: (\w+) -->", text)}
    assert asked <= set(tables.TABLES)


def test_what_was_measured_again_stands_in_the_table():
    """The defaults at 2:4 since channels are ordered, and nowhere fewer draws than there were."""
    for model in ("mamba-25m", "mamba2-25m"):
        before, again = (
            {(row["case"], row["method"]): row for row in harness.load(name)["rows"]}
            for name in (f"whole_model_quality_{model}", f"whole_model_quality_{model}_h200")
        )
        shown = {(row["case"], row["method"]): row for row in tables.projection_rows(model)}
        assert set(shown) == set(before) | set(again)
        assert shown["2:4", "defaults"]["corpus"] == again["2:4", "defaults"]["corpus"]
        assert all(len(shown[key]["seeds"]) >= len(row["seeds"]) for key, row in before.items())


def test_readme_says_how_long_its_rows_were_distilled():
    """They are the best of what was distilled, which may have taken more steps."""
    for name, model in (("Mamba-2", "mamba2-25m"), ("Mamba", "mamba-25m")):
        rows = harness.load(f"state_removal_quality_{model}")["rows"]
        case = next(row["case"] for row in rows if row.get("case"))
        distilled = [
            row
            for row in rows
            if (row.get("case"), row.get("calibration")) == (case, "corpus")
            and "distilled" in row["criterion"]
        ]
        best = min(distilled, key=lambda row: fmean(row["corpus"]))
        steps = int(re.search(r"distilled \((\d+)", best["criterion"])[1])
        assert f"of {name} {steps:,}" in PAGES["README.md"]


def test_tables_follow_their_numbers(monkeypatch, tmp_path):
    """Other numbers of whole models that are served stand in README's table."""
    models = [{"model": f"N {n}", "speedup": s} for n, s in ((128, 1.0), (64, 1.37), (32, 1.61))]
    row = {"shape": "Mamba-2, 2.7B", "what": "decode", "batch": 128, "models": models}
    content = {"rows": [row], "versions": {"device": "NVIDIA H200"}}
    for path in harness.RESULTS.glob("[!s]*.json"):
        (tmp_path / path.name).symlink_to(path)
    for path in harness.RESULTS.glob("state*.json"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "serving_cuda.json").write_text(json.dumps(content))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    table = tables.table("front")
    assert "| 1.37 ¹ |" in table
    assert "| Mamba-2, 2.7B | decode | 128 | 1.00 | 1.37 | 1.61 |" in tables.table("serving")
