"""The book as a reader meets it: its sources are in order, and the built pages are whole.

Every check is a function from a text to a list of complaints. It is run on the book, where it must find nothing, and on a
small broken example, where it must find the fault: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_ext"))
sys.path.insert(0, str(ROOT / "tools"))

bs4 = pytest.importorskip("bs4", reason="the book's requirements are not installed")
book_state = pytest.importorskip("book_state", reason="the book's requirements are not installed")
import make_notebooks  # noqa: E402
import typography  # noqa: E402
from docutils import nodes  # noqa: E402

PAGES = book_state.pages(ROOT)
SETTINGS = book_state.config(ROOT)
NOTEBOOKS = [
    page for page in PAGES if (ROOT / f"{page}.md").is_file() and book_state.read_notebook(ROOT, page)
]
MACROS = SETTINGS["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
MAX_LINES = 25


# --- The sources -----------------------------------------------------------------------------------------------------------


def code_cells(text: str) -> list[tuple[dict[str, Any], str]]:
    """Return the metadata and the source of every code cell of a page."""
    import nbformat
    from myst_nb.core.read import create_nb_reader

    reader = create_nb_reader("page.md", book_state.MdParserConfig(), book_state.NbParserConfig(), text)
    notebook = reader.read(text) if reader else nbformat.v4.new_notebook()
    return [(dict(cell.metadata), cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def prose(text: str) -> str:
    """Return a page without its fenced code."""
    return re.sub(r"^```+(\{code-cell\}|\w+).*?^```+$", "", text, flags=re.MULTILINE | re.DOTALL)


def long_cells(text: str) -> list[str]:
    return [
        f"a cell has {source.count(chr(10)) + 1} lines, at most {MAX_LINES} are readable"
        for _, source in code_cells(text)
        if source.count("\n") >= MAX_LINES
    ]


def bare_figures(text: str) -> list[str]:
    """Complain about plotting cells without alt text, caption or name."""
    found = []
    for metadata, source in code_cells(text):
        if not re.search(r"\bplt\.(subplots|figure|plot)\(|\.figure\(|\bfig, ax|\bplot\w*\(", source):
            continue
        if {"remove-output", "remove-cell"} & set(metadata.get("tags", [])):
            continue
        options = metadata.get("mystnb", {})
        wanted = {"image": ("alt",), "figure": ("caption", "name")}
        for section, keys in wanted.items():
            for key in keys:
                if not str((options.get(section) or {}).get(key, "")).strip():
                    found.append(
                        f"the plotting cell {source.splitlines()[0]!r} has no mystnb.{section}.{key}"
                    )
    return found


def unknown_citations(text: str, known: set[str]) -> list[str]:
    cited = {
        key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")
    }
    return [f"{key} is cited but not in references.bib" for key in sorted(cited - known)]


def typed_numbers(text: str) -> list[str]:
    """Complain about percentages and decimals with three or more digits typed in a notebook's prose: glue them."""
    text = re.sub(
        r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\{[^}]*\}|\]\([^)]*\)|^---.*?^---$",
        "",
        prose(text),
        flags=re.S | re.M,
    )
    return [
        f"the number {number} is typed, not glued"
        for number in re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.])", text)
    ]


def double_subscripts(text: str) -> list[str]:
    r"""Complain about a subscript after a macro that ends in one, which MathJax does not set: a second `_` needs braces."""
    subscripted = [name for name, body in MACROS.items() if isinstance(body, str) and re.search(r"_(\w|\{[^{}]*\})$", body)]
    return [found for name in subscripted for found in re.findall(rf"\\{name}_\S{{0,5}}", prose(text))]


def known_keys() -> set[str]:
    return set(
        re.findall(
            r"^@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )


FRONT = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
GOOD_FIGURE = """```{code-cell} python
---
mystnb:
  image: {alt: A falling curve}
  figure: {caption: The error falls., name: fig-error}
---
fig, ax = plt.subplots()
```
"""


@pytest.mark.parametrize("page", PAGES)
def test_page_exists(page: str) -> None:
    assert (ROOT / f"{page}.md").is_file(), f"_toc.yml lists {page}, and {page}.md does not exist"


@pytest.mark.parametrize("page", NOTEBOOKS)
@pytest.mark.parametrize("check", [long_cells, bare_figures, typed_numbers, double_subscripts])
def test_sources(page: str, check: Callable[[str], list[str]]) -> None:
    assert check((ROOT / f"{page}.md").read_text(encoding="utf-8")) == []


def test_citations() -> None:
    for page in PAGES:
        assert unknown_citations((ROOT / f"{page}.md").read_text(encoding="utf-8"), known_keys()) == []


def test_bibliography_has_no_key_twice() -> None:
    keys = re.findall(
        r"^@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(keys) == len(set(keys)) > 30


def test_no_chapter_is_left_out_of_the_contents() -> None:
    listed = {page for page in PAGES if page.startswith("chapters/")}
    assert {f"chapters/{path.stem}" for path in (ROOT / "chapters").glob("*.md")} == listed


def test_the_landing_page_names_what_the_package_has() -> None:
    import ntkft

    names = set(
        re.findall(r"\bntkft\.(\w+)", "\n".join(re.findall(r"```python\n(.*?)```", page_text("intro"), re.S)))
    )
    assert names and all(hasattr(ntkft, name) for name in names)


def page_text(page: str) -> str:
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


def test_the_source_checks_can_fail() -> None:
    many = "\n".join(f"x = {line}" for line in range(MAX_LINES + 1))
    assert long_cells(f"{FRONT}\n```{{code-cell}} python\n{many}\n```\n")
    assert not bare_figures(FRONT + GOOD_FIGURE)
    assert bare_figures(FRONT + GOOD_FIGURE.replace("alt: A falling curve", ""))
    assert bare_figures(FRONT + GOOD_FIGURE.replace("caption: The error falls., ", ""))
    assert unknown_citations("{cite:t}`nobody1900`", known_keys())
    assert double_subscripts(r"the radius $\epshat_J(R)$") == [r"\epshat_J(R)$"]
    assert not double_subscripts(r"the radius $\epshat^2$ and $\That_1$")
    assert typed_numbers("The error falls to 0.932 after training.")
    assert not typed_numbers("It falls to {glue:text}`error:.3f` for $p = 0.932$, in version `1.234`.")


# --- The built pages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def html() -> Path:
    """Return the built book: as it lies in `_build/html` when that is fresh, built now (under a lock) when it is not."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_book.py"), "--if-stale"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the book does not build:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return ROOT / "_build" / "html"


def soup(page_html: str) -> Any:
    return bs4.BeautifulSoup(page_html, "html.parser")


def faults(page_html: str) -> list[str]:
    """Complain about traces of a failed cell, an unresolved reference or markup that reached the reader raw."""
    article = soup(page_html).find("article") or soup(page_html)
    found = [
        f"an error output: {block.get_text()[:60]!r}"
        for block in article.select(".output.traceback, .cell_output .stderr")
    ]
    for code in article.select("pre, code, .math"):
        if code.name == "pre" and "Traceback (most recent call last)" in code.get_text():
            found.append("a stack trace")
        code.extract()
    words = article.get_text(" ")
    found += [f"raw markup: {raw!r}" for raw in re.findall(r"\{\w[\w:-]*\}`[^`]*`|:::+|\$\$|\?\?", words)]
    found += [
        f"an unresolved reference: {node.get_text()!r}"
        for node in article.select(".problematic, .system-message, .xref.myst")
    ]
    return found


def bare_images(page_html: str) -> list[str]:
    """Complain about images in the text whose alt text is missing or only a file's path."""
    article = soup(page_html).find("article") or soup(page_html)
    return [
        f"{image.get('src')} has no alt text"
        for image in article.find_all("img")
        if not image.get("alt", "").strip()
        or re.search(r"\.(png|svg|jpe?g)$|_images/|/", image["alt"].strip())
    ]


def bare_plots(page_html: str) -> list[str]:
    """Complain about images that a cell drew and that stand without a caption."""
    found = []
    for image in soup(page_html).select(".cell_output img"):
        caption = (image.find_parent("figure") or soup("")).find("figcaption")
        if caption is None or not caption.get_text(strip=True):
            found.append(f"{image.get('src')} has no caption")
    return found


def launch_faults(page_html: str, page: str) -> list[str]:
    """Complain when the Binder or the Colab link of a page is missing or leads elsewhere."""
    repository, path = (
        SETTINGS["repository"],
        SETTINGS["repository"]["url"].removeprefix("https://github.com/"),
    )
    colab_branch = SETTINGS["sphinx"]["config"]["colab_branch"]
    wanted = (
        f"https://mybinder.org/v2/gh/{path}/{repository['branch']}?urlpath=lab/tree/{page}.md",
        f"https://colab.research.google.com/github/{path}/blob/{colab_branch}/{page}.ipynb",
    )
    links = {link.get("href") for link in soup(page_html).find_all("a")}
    return [f"there is no link to {url}" for url in wanted if url not in links]


def cost_faults(page_html: str, titles: list[str]) -> list[str]:
    """Complain when the table of costs lacks a page, a time or a memory."""
    rows = [
        [cell.get_text(" ", strip=True) for cell in row.find_all("td")]
        for row in soup(page_html).select("table tr")
    ]
    # Read a title's letters only: formulas and quotes are typeset in a heading.
    found = {re.sub(r"\W", "", row[0]): row[1:] for row in rows if len(row) == 4}
    return [
        f"no measured cost for {title!r}"
        for title in titles
        if not re.fullmatch(r"[\d.]+ s [\d.]+ GB .+", " ".join(found.get(re.sub(r"\W", "", title), [])))
    ]


def dead_links(page_html: str, folder: Path) -> list[str]:
    """Complain about links to files of the book that are not there."""
    found = []
    for tag in soup(page_html).select("a[href], img[src], script[src], link[href]"):
        target = (tag.get("href") or tag.get("src")).partition("#")[0].partition("?")[0]
        if target and not re.match(r"^[a-z]+:|^//", target) and not (folder / target).exists():
            found.append(f"{target} does not exist")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_built_page(html: Path, page: str) -> None:
    path = html / f"{page}.html"
    text = path.read_text(encoding="utf-8")
    assert faults(text) + bare_images(text) + bare_plots(text) + dead_links(text, path.parent) == []
    if page in NOTEBOOKS:
        assert launch_faults(text, page) == []


@pytest.mark.slow
def test_costs_are_shown_for_every_executed_page(html: Path) -> None:
    titles = [book_state.title(ROOT, page) for page in NOTEBOOKS]
    assert cost_faults((html / "chapters/costs.html").read_text(encoding="utf-8"), titles) == []


@pytest.mark.slow
def test_bibliography_is_not_empty(html: Path) -> None:
    entries = soup((html / "chapters/bibliography.html").read_text(encoding="utf-8")).select(".citation")
    assert len(entries) >= 3


@pytest.mark.slow
def test_formulas_need_no_network(html: Path) -> None:
    assert (html / "mathjax/tex-chtml-full.js").is_file()
    text = (html / "chapters/kernel_descent.html").read_text(encoding="utf-8")
    assert "mathjax/tex-chtml-full.js" in text and not re.search(
        r"<script[^>]+src=\"https?://[^\"]*mathjax", text
    )


@pytest.mark.slow
def test_formulas_keep_their_commas_and_numbers_have_a_minus(html: Path) -> None:
    page = soup((html / "chapters/rates.html").read_text(encoding="utf-8"))
    assert any(span.get_text().endswith(",") for span in page.select("span.together:has(.math)"))
    assert any(span.get_text().startswith("−") for span in page.select(".pasted-text"))
    assert not any(span.get_text().startswith("-") for span in page.select(".pasted-text"))


@pytest.mark.slow
def test_pages_name_no_folder_of_this_machine(html: Path) -> None:
    for page in PAGES:
        assert str(ROOT) + os.sep not in (html / f"{page}.html").read_text(encoding="utf-8")


def test_the_page_checks_can_fail() -> None:
    wrap = "<article>{}</article>".format
    assert not faults(wrap("<p>Fine: <code>{cite}`x`</code></p>"))
    assert faults(wrap("<pre>Traceback (most recent call last): no</pre>"))
    assert faults(wrap('<div class="output traceback">ValueError</div>'))
    assert faults(wrap("<p>See {ref}`nowhere`.</p>"))
    assert faults(wrap('<span class="problematic">nowhere</span>'))
    assert not bare_images(wrap('<img src="a.png" alt="A curve that falls">'))
    assert bare_images(wrap('<img src="a.png" alt="../_images/a.png">')) and bare_images(
        wrap('<img src="a.png">')
    )
    plot = (
        '<div class="cell_output"><figure><img src="a.png"><figcaption>Read it.</figcaption></figure></div>'
    )
    assert (
        not bare_plots(plot)
        and bare_plots(plot.replace("Read it.", ""))
        and bare_plots(plot.replace("figure", "p"))
    )
    assert len(launch_faults(wrap("<a href='https://mybinder.org'>Binder</a>"), "chapters/few_epochs")) == 2
    good = "<table><tr><td>A $K$</td><td>1.0 s</td><td>0.20 GB</td><td>yes</td></tr></table>"
    assert not cost_faults(good, ["A $K$"])
    assert cost_faults(good, ["B"]) and cost_faults(good.replace("0.20 GB", "-"), ["A $K$"])
    assert dead_links(wrap('<a href="missing.html">x</a>'), ROOT) and not dead_links(
        wrap('<a href="_toc.yml">x</a>'), ROOT
    )


# --- The tools -------------------------------------------------------------------------------------------------------------


def test_a_change_of_the_package_makes_outputs_and_pages_stale(tmp_path: Path) -> None:
    for name in ("ntkft/a.py", "chapters/one.md", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    cache, inputs = book_state.cache_path(tmp_path), book_state.digest(tmp_path, book_state.PAGE_INPUTS)
    (tmp_path / "chapters/one.md").write_text("text\n")
    assert book_state.cache_path(tmp_path) == cache
    assert book_state.digest(tmp_path, book_state.PAGE_INPUTS) != inputs
    (tmp_path / "ntkft/a.py").write_text("x = 2\n")
    assert book_state.cache_path(tmp_path) != cache


def test_a_cost_over_a_bar_is_flagged() -> None:
    def cost(seconds: float, peak: int | None) -> str:
        return book_state.Cost("p", "P", seconds, peak, "a machine", "2026-01-01").verdict

    assert cost(59.0, 1_999_999_999) == "yes"
    assert cost(61.0, 10) == "too slow"
    assert cost(61.0, 2_000_000_001) == "too slow and too large"
    assert cost(1.0, None) == "memory unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$\norm{x_{1}}_n$", r"$\lVert x_{1} \rVert_n$"),
        (r"$\E x \in \R$", r"$\mathbb{E} x \in \mathbb{R}$"),
        (r"$\inner{u}{\norm{v}}$", r"$\langle u, \lVert v \rVert \rangle$"),
        (r"$\Error \triangle$", r"$\Error \triangle$"),
    ],
)
def test_macros_are_written_out_for_colab(text: str, expected: str) -> None:
    assert book_state.expand_macros(text, MACROS) == expected


def test_text_for_colab_is_plain() -> None:
    source = """(here)=
# A

:::{prf:theorem} The filter
:label: thm
For all $t$, see {eq}`e` and {cite:t}`jacot2018ntk`; it is {glue:text}`share:.1f`, not {glue:text}`other`.
:::

```{solution-start} ex
:class: dropdown
```
Easy.
```{solution-end}
```

```{math}
:label: m
\\E x
```
"""
    text = make_notebooks.plain(source, MACROS, {"share": 0.25})
    assert "**Theorem. The filter**" in text and "[jacot2018ntk]" in text and "**Solution**" in text
    assert "it is 0.2, not `other`." in text and "$$\n\\mathbb{E} x\n$$" in text
    assert not re.search(r":::|```|\(here\)=|:label:|:class:", text)


def test_notebooks_begin_by_installing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    assert make_notebooks.main() == 0
    for page in NOTEBOOKS:
        notebook = nbformat.read(ROOT / "_build" / "notebooks" / f"{page}.ipynb", as_version=4)
        nbformat.validate(notebook)
        assert SETTINGS["repository"]["url"] in notebook.cells[0].source


def test_the_lock_is_full_and_portable() -> None:
    lines = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.!]+", line) for line in lines), (
        "only exact, public versions"
    )
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    asked = re.findall(r"^([A-Za-z][\w.-]*)", (ROOT / "requirements.in").read_text(), flags=re.MULTILINE)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in asked} <= pinned
    assert "torch==2.13.0" in lines and "ntkft" not in pinned


# --- Typography ------------------------------------------------------------------------------------------------------------


def formula(text: str) -> Any:
    """Return an inline formula."""
    return nodes.math("", text)


def paragraph(*children: Any) -> Any:
    """Return a paragraph of strings and nodes."""
    return nodes.paragraph("", "", *(nodes.Text(c) if isinstance(c, str) else c for c in children))


@pytest.mark.parametrize(
    ("children", "held"),
    [
        (("for all (", formula("n"), "), and ", formula("k"), "-th of"), ["(n),", "k-th"]),
        ((formula("a"), "/", formula("b"), " is", " ", formula("c")), ["a/b"]),
        ((formula("p"), "\xa0% of"), ["p\xa0%"]),
        ((formula("d"), "-dimensionally ", nodes.emphasis("", "x"), formula("y"), ";"), ["y;"]),
    ],
)
def test_a_formula_keeps_its_comma(children, held) -> None:
    whole = paragraph(*children)
    before = whole.astext()
    typography.keep_together(whole)
    spans = [span for span in whole.findall(nodes.inline) if "together" in span["classes"]]
    assert [span.astext() for span in spans] == held
    assert whole.astext() == before


def test_numbers_in_tables_and_glued_ones_have_a_minus() -> None:
    glued = nodes.inline("", "-0.668 of minilm-4 (-3)", classes=["pasted-text"])
    cell = nodes.entry("", paragraph("-1.0 to -0.5, 1e-05", formula("a-1")), nodes.literal("", "-1"))
    page = nodes.section("", paragraph("pages 3-4, -7 ", glued), cell)
    typography.true_minus(page)
    assert glued.astext() == "−0.668 of minilm-4 (−3)"
    assert cell.astext() == "−1.0 to −0.5, 1e-05a-1\n\n-1" and page[0][0].astext() == "pages 3-4, -7 "
