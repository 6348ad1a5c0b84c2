"""Options of every command as Markdown, from their declarations, for docs/cli.md.

python -m sparsessm_plugin.cli.reference docs/cli.md    # writes them into the file anew
"""

import sys
from pathlib import Path
from typing import Any

from sparsessm_plugin.cli.options import PANELS

BEGIN = "<!-- options, written by sparsessm_plugin.cli.reference -->"
END = "<!-- end of options -->"


def reference(group: Any) -> str:
    """A section with a table for each command of the application, panel by panel."""
    sections = []
    for name, command in group.commands.items():
        summary = " ".join((command.help or "").split())
        lines = [f"### {name}", "", f"`{_usage(name, command)}`", "", summary, ""]
        rows = [_row(parameter) for parameter in _options(command)]
        if rows:
            lines += ["| option | default | what it says |", "|---|---|---|", *rows, ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def update(text: str, group: Any) -> str:
    """A page with the part between the two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{reference(group)}\n{END}{rest.partition(END)[2]}"


def _usage(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    words += [f"{p.opts[0]} ..." for p in command.params if _is_option(p) and p.required]
    return " ".join(["sparsessm", name, *words])


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _options(command: Any) -> list[Any]:
    """Those of the command itself first, then panel by panel."""
    order = ["Options", *PANELS]
    options = [p for p in command.params if _is_option(p) and p.name != "help"]
    return sorted(options, key=lambda p: order.index(p.rich_help_panel))


def _row(parameter: Any) -> str:
    if parameter.required:
        default = "required"
    elif parameter.default is None or parameter.default is False or parameter.default == []:
        default = ""
    else:
        default = f"`{parameter.default}`"
    said = (parameter.help or "").replace("|", "\\|")
    return f"| `{parameter.opts[0]}` | {default} | {said} |"


def main() -> None:
    """Write the options into the page that the command line names."""
    from typer.main import get_command

    from sparsessm_plugin.cli import app

    page = Path(sys.argv[1])
    page.write_text(update(page.read_text(encoding="utf-8"), get_command(app)), encoding="utf-8")


if __name__ == "__main__":
    main()
