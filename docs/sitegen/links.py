"""Links between files of the repository, as links between pages of the site."""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]

# pages that are files elsewhere in the repository
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "examples.md": "examples/README.md",
    "pipelines.md": "recipes/README.md",
    **{
        f"measurements/{path.name}": f"benchmarks/results/{path.name}"
        for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    },
}
_BY_SOURCE = {source: uri for uri, source in PAGES.items()}
_FOLDERS = {
    "benchmarks/results": "measurements/index.md",
    "docs": "index.md",
    "examples": "examples.md",
    "recipes": "pipelines.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def target(path: str, source: str) -> str:
    """What a link of a file names, from the root of the repository."""
    joined = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / path))
    return str(joined)


def uri_of(path: str) -> str | None:
    """The page of the site that shows a file, or the file itself where the site has it."""
    if path in _BY_SOURCE:
        return _BY_SOURCE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/results/") and path.endswith(".json"):
        return "measurements/" + path.rpartition("/")[2]
    return _FOLDERS.get(path)


def moved(text: str, source: str, uri: str) -> str:
    """The text of a file, with its links as they must be from a page.

    What the site does not show, source files and folders of them, stays as text.

    :param source: of the text, from the root of the repository
    :param uri: of the page
    """

    def link(match: re.Match[str]) -> str:
        image, label, address = match.groups()
        if re.match(r"[a-z]+:|#", address):
            return match[0]
        path, _, anchor = address.partition("#")
        found = target(path, source)
        if not (ROOT / found).exists():
            return match[0]  # MkDocs says so
        page = uri_of(found.rstrip("/"))
        if page is None:
            return label
        here = os.path.relpath(page, PurePosixPath(uri).parent)
        return f"{image}[{label}]({here}{'#' + anchor if anchor else ''})"

    parts = _CODE.split(text)
    return "".join(p if p.startswith("```") else _LINK.sub(link, p) for p in parts)
