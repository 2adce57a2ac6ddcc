"""How reports are printed: keys in a column, and lines that fit a page of the book.

Example
-------
>>> print(entry("stop", "after 2 epochs"))
stop           after 2 epochs
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line loads this module before anything heavy
    from ntkft.ntk.plan import Plan

__all__ = ["KEY", "WIDTH", "entry", "plan_entry", "sentence"]

WIDTH = 84  # characters in a line
KEY = 15  # characters of the column of keys


def entry(key: str, text: str) -> str:
    """Return a key and what it says; further lines are indented as far as the first."""
    return _filled(text, f"{key:<{KEY}}", KEY)


def sentence(text: str, indent: int) -> str:
    """Return a sentence in lines, all but the first of them indented."""
    return _filled(text, "", indent)


def _filled(text: str, first: str, indent: int) -> str:
    """Return text in lines; options and names of models stay whole, so that they can be copied."""
    lines = textwrap.TextWrapper(WIDTH, first, " " * indent, break_long_words=False, break_on_hyphens=False)
    return lines.fill(text)


def plan_entry(texts: str, plan: Plan) -> str:
    """Return what the kernel of that many texts will cost."""
    cost = f"about {plan.seconds:.0f} s and {plan.peak_bytes / 1e6:,.0f} MB beside the model"
    return entry("plan", f"kernel of {texts} texts, {plan.parameters:,} parameters: {cost}")
