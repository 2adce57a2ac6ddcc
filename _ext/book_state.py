"""What the book is made of, what it costs, and whether the built pages are fresh.

Shared by the Sphinx extension, `tools/` and `tests/test_book.py`, so that all of them mean the same by "the book's inputs",
"the execution cache" and "the bars". It needs nothing beyond the book's own requirements.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import JupyterCacheAbstract
from myst_nb.core.config import NbParserConfig
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
STAMP = "build.json"

# The promises that every chapter keeps in its quick tier.
MAX_SECONDS = 60.0
MAX_BYTES = 2_000_000_000

# What a cell can read: a change here makes every stored output stale.
EXECUTION_INPUTS = ("ntkft/**/*", "results/**/*", "requirements.txt")
# What a page is made from.
PAGE_INPUTS = (
    *EXECUTION_INPUTS,
    *("_config.yml", "_toc.yml", "intro.md", "references.bib"),
    *("chapters/*.md", "_static/**/*", "_ext/*.py", "_vendor/**/*", "tools/build_book.py"),
)


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Return a SHA-256 over the names and contents of the files that match `patterns`, caches left out."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        name = path.relative_to(root)
        if "__pycache__" in name.parts or any(part.startswith(".") for part in name.parts):
            continue
        total.update(name.as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def cache_path(root: Path) -> Path:
    """Return the folder of the execution cache that belongs to the present package, lock and results."""
    return root / "_build" / "cache" / digest(root, EXECUTION_INPUTS)[:16]


def open_cache(root: Path) -> JupyterCacheAbstract:
    """Open (and create) the execution cache."""
    path = cache_path(root)
    path.mkdir(parents=True, exist_ok=True)
    return get_cache(str(path))


def config(root: Path) -> dict[str, Any]:
    """Return the book's `_config.yml`."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))


def pages(root: Path) -> list[str]:
    """Return the pages of the table of contents in reading order, as Sphinx names them."""
    site = parse_toc_yaml(root / "_toc.yml")
    order: list[str] = []

    def visit(name: str) -> None:
        order.append(name)
        for tree in site[name].subtrees:
            for child in tree.items:
                visit(str(child))

    visit(site.root.docname)
    return order


def title(root: Path, page: str) -> str:
    """Return a page's first heading."""
    text = (root / f"{page}.md").read_text(encoding="utf-8")
    heading = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    return heading.group(1).strip() if heading else page


def read_notebook(root: Path, page: str) -> nbformat.NotebookNode | None:
    """Read a page as MyST-NB will, so that the cache recognises it; None where it has no code cell."""
    path = root / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    extensions = config(root)["parse"]["myst_enable_extensions"]
    reader = create_nb_reader(str(path), MdParserConfig(enable_extensions=extensions), NbParserConfig(), text)
    notebook = reader.read(text) if reader is not None else None
    if notebook is None or not any(cell.cell_type == "code" for cell in notebook.cells):
        return None
    return notebook


@dataclass(frozen=True)
class Cost:
    """What one run of a page took."""

    page: str
    title: str
    seconds: float
    peak_bytes: int | None
    machine: str
    date: str

    @property
    def verdict(self) -> str:
        """Say whether the bars were kept, in the words of the table."""
        over = []
        if self.seconds > MAX_SECONDS:
            over.append("too slow")
        if self.peak_bytes is not None and self.peak_bytes > MAX_BYTES:
            over.append("too large")
        return " and ".join(over) or ("yes" if self.peak_bytes is not None else "memory unknown")

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Return the cells of this page's row."""
        memory = "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f} GB"
        return self.title, f"{self.seconds:.1f} s", memory, self.verdict


HEADER = ("Page", "Time", "Peak memory", f"Under {MAX_SECONDS:.0f} s and {MAX_BYTES / 1e9:.0f} GB?")


def costs(root: Path) -> list[Cost]:
    """Return the recorded cost of every executed page, in reading order; pages not in the cache are left out."""
    cache = open_cache(root)
    found = []
    for page in pages(root):
        notebook = read_notebook(root, page)
        if notebook is None:
            continue
        try:
            data = cache.match_cache_notebook(notebook).data
        except KeyError:
            continue
        peak = data.get("peak_bytes")
        machine, date = data.get("machine", "unknown"), data.get("date", "unknown")
        found.append(Cost(page, title(root, page), data["execution_seconds"], peak, machine, date))
    return found


def stamp(html: Path) -> dict[str, Any]:
    """Return the stamp that `tools/build_book.py` left in a built book; empty where there is none."""
    try:
        return json.loads((html / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_fresh(root: Path) -> bool:
    """Tell whether `_build/html` was built, without a warning or an error, from the present inputs."""
    html = root / "_build" / "html"
    return (html / "index.html").is_file() and stamp(html).get("inputs") == digest(root, PAGE_INPUTS)


def expand_macros(text: str, macros: dict[str, Any]) -> str:
    r"""Write the book's macros out in a text, for readers that do not know them (Colab).

    >>> expand_macros(r"$\norm{x_{1}} \in \R$", {"R": r"\mathbb{R}", "norm": [r"\| #1 \|", 1]})
    '$\\| x_{1} \\| \\in \\mathbb{R}$'
    """
    pattern = re.compile(
        r"\\(" + "|".join(map(re.escape, sorted(macros, key=len, reverse=True))) + r")(?![A-Za-z])"
    )
    found = pattern.search(text)
    while found:
        body = macros[found.group(1)]
        body, count = (body[0], body[1]) if isinstance(body, list) else (body, 0)
        end = found.end()
        for index in range(1, count + 1):
            argument, end = _argument(text, end)
            body = body.replace(f"#{index}", argument)
        # A macro that ends in a letter would swallow the letter that follows.
        gap = " " if body[-1:].isalpha() and text[end : end + 1].isalpha() else ""
        text = text[: found.start()] + body + gap + text[end:]
        found = pattern.search(text, found.start() + (0 if count else len(body)))
    return text


def _argument(text: str, start: int) -> tuple[str, int]:
    """Return the TeX argument that begins at `start`, braces stripped, and where it ends."""
    while text[start : start + 1].isspace():
        start += 1
    if text[start : start + 1] != "{":
        single = re.match(r"\\[A-Za-z]+|\\.|.", text[start:], flags=re.DOTALL)
        if single is None:
            raise ValueError(f"a macro lacks its argument at the end of {text[-40:]!r}")
        return single.group(), start + single.end()
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position], position + 1
    raise ValueError(f"a brace is not closed after {text[start : start + 40]!r}")
