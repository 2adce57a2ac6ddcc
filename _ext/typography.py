"""What a careful printer does: a formula keeps its comma, and a negative number has a minus, not a hyphen."""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes

HYPHEN_MINUS = re.compile(r"(?<![\w.)])-(?=\d)")
SPACE = re.compile(r"([^\S\xa0]+)")  # where a line may break
CODE = (nodes.literal, nodes.literal_block, nodes.math, nodes.raw)
LONGEST = 12  # characters that are held to a formula on either side; a longer word may break from it


def true_minus(document: nodes.Element) -> None:
    """Write a true minus before the numbers in tables and before those glued into the text; code is left alone."""
    for text in list(document.findall(nodes.Text)):
        around = list(_around(text))
        number = any(isinstance(p, nodes.entry) or "pasted-text" in p.get("classes", ()) for p in around)
        if number and not any(isinstance(p, CODE) for p in around):
            text.parent.replace(text, nodes.Text(HYPHEN_MINUS.sub("−", text.astext())))


def keep_together(document: nodes.Element) -> None:
    """Hold an inline formula and what touches it in one line: a browser would break between it and its comma.

    Only words are held, not a link or emphasis beside the formula.
    """
    for parent in {id(math.parent): math.parent for math in document.findall(nodes.math)}.values():
        children = list(_held(parent.children))
        parent.clear()
        parent.extend(children)


def _around(node: nodes.Node) -> Iterator[nodes.Element]:
    """Yield the elements around a node, the nearest first."""
    while (node := node.parent) is not None:
        yield node


def _pieces(children: list[nodes.Node]) -> Iterator[nodes.Node]:
    """Yield the children of an element, with every text cut into words and spaces."""
    for child in children:
        if isinstance(child, nodes.Text):
            yield from (nodes.Text(piece) for piece in SPACE.split(child.astext()) if piece)
        else:
            yield child


def _held(children: list[nodes.Node]) -> Iterator[nodes.Node]:
    """Yield the pieces of an element; those without a space between them are in one span if a formula is among them."""
    run: list[nodes.Node] = []
    for piece in [*_pieces(children), None]:
        short = isinstance(piece, nodes.Text) and len(piece) <= LONGEST and not SPACE.fullmatch(piece)
        if short or isinstance(piece, nodes.math):
            run.append(piece)
            continue
        if len(run) > 1 and any(isinstance(one, nodes.math) for one in run):
            yield nodes.inline("", "", *run, classes=["together"])
        else:
            yield from run
        run = []
        if piece is not None:
            yield piece
