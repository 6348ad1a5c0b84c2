"""Equations as MathML, which browsers draw by themselves: no script, nothing from elsewhere."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def rendered(page: str) -> str:
    """A page of HTML with the equations that arithmatex has marked as MathML."""

    def equation(match: re.Match[str], display: str) -> str:
        mathml: str = convert(html.unescape(match[1]).strip(), display=display)
        return mathml

    page = _INLINE.sub(lambda m: equation(m, "inline"), page)
    return _DISPLAY.sub(lambda m: f'<div class="equation">{equation(m, "block")}</div>', page)
