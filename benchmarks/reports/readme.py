"""Write README's table and picture anew from the JSON in ``benchmarks/results``.

The table stands between two comments, ``<!-- table: front -->`` and ``<!-- end -->``.
"""

import re

from harness import ROOT

from reports.tables import table

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A text with its tables made anew."""
    return _TABLE.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", text)


def write() -> None:
    """README and its picture."""
    from reports.plots import plot

    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "images" / "front.svg").write_bytes(plot("front"))
