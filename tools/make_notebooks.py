"""Convert the executable pages to `_build/notebooks/**.ipynb` for Colab, which cannot open MyST Markdown.

The text is made readable outside the book: macros are written out, directives become bold titles, glued numbers are those of
the last build, citations and references become plain words. The first cell installs the package on Colab. The workflow
pushes the folder to the `notebooks` branch.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_ext"))

import book_state  # noqa: E402
import jupytext  # noqa: E402
import nbformat  # noqa: E402

SETUP = """\
# On Colab: install the book's package and go where its chapters run. Elsewhere this does nothing.
import os, sys
if "google.colab" in sys.modules and not os.path.isdir("/content/book"):
    !git clone --quiet --depth 1 --branch {branch} {url} /content/book
    %pip install --quiet -e /content/book
    sys.path.insert(0, "/content/book")
    os.chdir("/content/book/{folder}")
"""
SILENT = {"grid", "glue", "glue:figure", "figure", "bibliography", "execution-costs", "tableofcontents"}


def plain(text: str, macros: dict[str, Any], glued: dict[str, Any] | None = None) -> str:
    """Turn MyST Markdown into Markdown that any notebook viewer shows well."""
    text = unfenced(re.sub(r"^\(([\w:-]+)\)=\n", "", text, flags=re.MULTILINE))
    text = re.sub(r"^\$\$ *\([\w:-]+\)$", "$$", text, flags=re.MULTILINE)
    text = re.sub(r"\{glue(?::text)?\}`([^`:]+)(?::([^`]*))?`", lambda found: value(found, glued or {}), text)
    text = re.sub(r"\{[\w:]+\}`([^`<]+?)\s*<[^`>]+>`", r"\1", text)  # {ref}`words <target>`
    text = re.sub(r"\{cite[:\w]*\}`([^`]+)`", r"[\1]", text)
    text = re.sub(r"\{(?:eq|numref|ref|prf:ref|doc)\}`([^`]+)`", r"(\1)", text)
    return book_state.expand_macros(text, macros)


def unfenced(text: str) -> str:
    """Replace directive fences by bold titles, and drop their options and closing fences."""
    out: list[str] = []
    fences: list[tuple[str, str]] = []  # the opening marker, and what stands for its end
    in_options = False
    for line in text.splitlines():
        opening = re.match(r"^\s*([:`]{3,})\{([\w:-]+)\}\s*(.*)$", line)
        code = re.match(r"^\s*(`{3,})\w*\s*$", line)
        if fences and line.strip() and set(line.strip()) == {fences[-1][0][0]} and len(line.strip()) >= 3:
            out.append(fences.pop()[1])
        elif opening:
            marker, name, argument = opening.groups()
            begin, end = boundary(name, argument)
            out.append(begin)
            fences.append((marker, end))
        elif code:
            out.append(line)
            fences.append((code.group(1), code.group(1)))
        elif not (in_options and re.match(r"^\s*:[\w-]+:", line)):
            out.append(line)
        in_options = bool(opening) or (in_options and bool(re.match(r"^\s*:[\w-]+:", line)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def boundary(name: str, argument: str) -> tuple[str, str]:
    """Return what stands for a directive's first and last fence."""
    if name == "math":
        return "$$", "$$"
    if name in {"code-block", "code"}:
        return f"```{argument}", "```"
    if name in SILENT or name.endswith("-end"):
        return "", ""
    words = name.split(":")[-1].removesuffix("-start").replace("-", " ").capitalize()
    if words in {"Solution", "Admonition", "Grid item card", "Dropdown"}:
        words, argument = ("Solution", "") if words == "Solution" else (argument, "")
    return f"**{f'{words}. {argument}'.strip() if argument else words}**\n", ""


def value(found: re.Match[str], glued: dict[str, Any]) -> str:
    """Return a glued number as the page shows it; its name in code where the book was not built."""
    name, form = found.group(1), found.group(2) or ""
    if name not in glued:
        return f"`{name}`"
    return format(glued[name], form)


def glued_values(page: str) -> dict[str, Any]:
    """Return what a page glued in the last build."""
    notebook = book_state.read_notebook(ROOT, page)
    cache = book_state.open_cache(ROOT)
    try:
        _, notebook = cache.merge_match_into_notebook(notebook)
    except KeyError:
        return {}
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name is None:
                continue
            text = next((text for kind, text in output["data"].items() if kind.endswith("text/plain")), "")
            try:
                found[name] = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                continue
    return found


def main() -> int:
    """Write every notebook; return the exit status."""
    settings = book_state.config(ROOT)
    macros = settings["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    target = ROOT / "_build" / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    for page in book_state.pages(ROOT):
        if book_state.read_notebook(ROOT, page) is None:
            continue
        notebook, glued = jupytext.read(ROOT / f"{page}.md"), glued_values(page)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = plain(cell.source, macros, glued)
        source = SETUP.format(**settings["repository"], folder=Path(page).parent.as_posix())
        notebook.cells.insert(0, nbformat.v4.new_code_cell(source.rstrip()))
        path = target / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.from_dict(notebook), path)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
