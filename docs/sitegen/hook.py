"""What MkDocs calls: pages that are made, directives that are filled in, links, equations.

A directive is a comment on a line of its own, so that a page also reads well where nothing
fills it in::

    <!-- fields: StateRemovalModifier -->   the fields, from the modifier's class
    <!-- results: states -->                a table, from the JSON in benchmarks/results
    <!-- plot: states -->                   a plot of it
"""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "benchmarks")]

import harness  # noqa: E402
from reports import plots, tables  # noqa: E402

from sitegen import docstrings, fields, links, mathml  # noqa: E402

_DIRECTIVE = re.compile(r"^<!-- (\w+): (.+?) -->$", re.MULTILINE)
_TABLE_LINK = re.compile(r"^\[table: ([\w.+-]+)\]\([^)]*\)$", re.MULTILINE)
_PLOTS = "images/plots"


def on_pre_build(config: MkDocsConfig) -> None:
    """Refuse to build where a public object does not say what it is."""
    problems = docstrings.problems()
    if problems:
        raise PluginError("docstrings: " + "; ".join(problems))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made of files elsewhere: README, change log, results, plots."""
    for uri, source in links.PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=links.moved(text, source, uri)))
    files.append(File.generated(config, "measurements/index.md", content=measurements()))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        uri = f"measurements/{path.name}"
        files.append(File.generated(config, uri, content=path.read_bytes()))
    for name, svg in plots.all_plots():
        files.append(File.generated(config, f"{_PLOTS}/{name}.svg", content=svg))
    return files


def measurements() -> str:
    """A page that lists every result: its table, its JSON, and what it was measured on."""
    lines = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        name = path.stem
        raw = f"[JSON]({name}.json)" if path.with_suffix(".json").exists() else ""
        found = harness.load(name).get("versions", {}) if raw else {}
        lines.append([f"[{name}]({name}.md)", raw, found.get("device", "")])
    head = (
        "# All tables\n\nEach as its benchmark wrote it, beside the numbers it was made from.\n\n"
    )
    return head + harness.markdown(["table", "numbers", "device"], lines) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in directives, and point links that leave the folder at pages of the site."""
    depth = "../" * page.file.src_uri.count("/")

    def fill(match: re.Match[str]) -> str:
        kind, key = match.groups()
        try:
            if kind == "fields":
                return fields.table(key)
            if kind == "results":
                return tables.table(key)
            if kind == "plot":
                if files.get_file_from_path(f"{_PLOTS}/{key}.svg") is None:
                    raise KeyError(key)
                return f"![{plots.TITLES[key]}]({depth}{_PLOTS}/{key}.svg)"
        except (KeyError, ValueError) as error:
            raise PluginError(f"{page.file.src_uri}: {match[0]}: {error!r}") from error
        return match[0]

    def include(match: re.Match[str]) -> str:
        text = (ROOT / "benchmarks" / "results" / f"{match[1]}.md").read_text(encoding="utf-8")
        # the page has headings of its own
        return re.sub(r"^#+ (.*)$", r"**\g<1>**", text, flags=re.MULTILINE)

    if page.file.src_uri not in links.PAGES:
        markdown = _TABLE_LINK.sub(include, markdown)
        source = f"docs/{page.file.src_uri}"
        markdown = links.moved(markdown, source, page.file.src_uri)
    return _DIRECTIVE.sub(fill, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write equations as MathML, and names of docstrings as code."""
    return docstrings.without_roles(mathml.rendered(html))
