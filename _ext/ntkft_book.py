"""The book's own Sphinx extension: where outputs are cached, the table of costs, macros for LaTeX, links to Colab, typography.

MyST-NB keys its cache on the code cells alone, so an edit of `ntkft/` would show stale outputs. Here the cache folder is named
after a hash of the package, the lock and the stored results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import book_state
import typography
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective


def set_cache_path(app: Sphinx, config: Config) -> None:
    """Point MyST-NB at the cache of the present package, lock and results."""
    config.nb_execution_cache_path = str(book_state.cache_path(Path(app.srcdir)))


def skip_hidden_folders(app: Sphinx, config: Config) -> None:
    """Keep Sphinx out of `.venv` and the like: `only_build_toc_files` does not look into hidden folders."""
    config.exclude_patterns = [*config.exclude_patterns, ".*", "**/.*"]


def set_latex_macros(app: Sphinx, config: Config) -> None:
    """Give LaTeX the macros that `mathjax3_config` gives to HTML."""
    lines = []
    for name, body in config.mathjax3_config["tex"]["macros"].items():
        text, count = (body[0], f"[{body[1]}]") if isinstance(body, list) else (body, "")
        lines.append(rf"\providecommand{{\{name}}}{{}}\renewcommand{{\{name}}}{count}{{{text}}}")
    preamble = config.latex_elements.get("preamble", "")
    config.latex_elements["preamble"] = "\n".join([preamble, *lines])


def set_type(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Apply `typography` to a page of the HTML book."""
    if app.builder.format == "html":
        typography.true_minus(doctree)
        typography.keep_together(doctree)


class ExecutionCosts(SphinxDirective):
    """`{execution-costs}`: the measured time and memory of every executed page."""

    def run(self) -> list[nodes.Node]:
        """Return the table, or a sentence that says how to get one."""
        self.env.note_reread()
        costs = book_state.costs(Path(self.env.app.srcdir))
        if not costs:
            return [nodes.paragraph(text="Nothing was measured in this build: run make book.")]
        table = nodes.table(classes=["colwidths-auto", "execution-costs"])
        table += nodes.title(text=self.caption(costs))
        group = nodes.tgroup(cols=len(book_state.HEADER))
        group.extend(nodes.colspec(colwidth=1) for _ in book_state.HEADER)
        head, body = nodes.thead(), nodes.tbody()
        head += self.row([nodes.Text(text) for text in book_state.HEADER])
        for cost in costs:
            link = pending_xref(
                "",
                nodes.inline(text=cost.title),
                refdoc=self.env.docname,
                refdomain="std",
                reftype="doc",
                reftarget=f"/{cost.page}",
                refexplicit=True,
                refwarn=True,
            )
            verdict = nodes.Text(cost.verdict) if cost.verdict == "yes" else nodes.strong(text=cost.verdict)
            body += self.row([link, nodes.Text(cost.row[1]), nodes.Text(cost.row[2]), verdict])
        group += [head, body]
        table += group
        self.set_source_info(table)
        return [table]

    @staticmethod
    def row(cells: list[nodes.Node]) -> nodes.row:
        """Return one row of the table."""
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))

    @staticmethod
    def caption(costs: list[book_state.Cost]) -> str:
        """Say where and when the numbers were measured."""
        machines = "; ".join(sorted({cost.machine for cost in costs}))
        dates = sorted({cost.date for cost in costs})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        return f"Time and peak memory of every executed page, measured {when} on {machines}."


def link_colab(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Point the Colab button at the converted notebook: the theme links the Markdown source, which Colab cannot open."""
    branch = app.config.html_theme_options["repository_branch"]
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                source = f"/blob/{branch}/{pagename}.md"
                button["url"] = button["url"].replace(
                    source, f"/blob/{app.config.colab_branch}/{pagename}.ipynb"
                )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything above."""
    app.add_config_value("colab_branch", "notebooks", "html", [str])
    app.add_directive("execution-costs", ExecutionCosts)
    app.connect("config-inited", set_cache_path)
    app.connect("config-inited", skip_hidden_folders)
    app.connect("config-inited", set_latex_macros)
    app.connect("doctree-resolved", set_type, priority=900)
    app.connect("html-page-context", link_colab, priority=900)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
