"""Equations as MathML, which browsers draw by themselves: no script, nothing from elsewhere."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
# what the converter has no name for
_OTHERS = (
    (r"\begin{aligned}", r"\begin{array}{rl}"),
    (r"\end{aligned}", r"\end{array}"),
)


def equation(latex: str, display: str) -> str:
    """One equation.

    :param latex: without its dollars
    :param display: ``inline`` or ``block``
    :raises ValueError: something in it is not known to the converter
    """
    for theirs, known in _OTHERS:
        latex = latex.replace(theirs, known)
    mathml: str = convert(latex, display=display)
    if re.search(r"\\[a-zA-Z]|>&<", mathml):  # commands as text, cells without a table
        raise ValueError(f"cannot be written as MathML: {latex}")
    return mathml


def rendered(page: str) -> str:
    """A page of HTML with the equations that arithmatex has marked as MathML."""

    def inline(match: re.Match[str]) -> str:
        return equation(html.unescape(match[1]).strip(), "inline")

    def block(match: re.Match[str]) -> str:
        return f'<div class="equation">{equation(html.unescape(match[1]).strip(), "block")}</div>'

    return _DISPLAY.sub(block, _INLINE.sub(inline, page))
