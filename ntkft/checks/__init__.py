"""The checks behind the claim ledger, one module per chapter.

A check is a function ``check(broken=False) -> Verdict``. It compares two computations that share as little as
possible. With ``broken=True`` it runs the same comparison on a deliberately wrong version of the claim and must
then fail: a check that cannot fail is no check. Each module ends with ``CLAIMS``, its chapter's part of the ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ntkft.experiments.result import RESULTS, Result


@dataclass(frozen=True)
class Verdict:
    """Whether the claim held in this run, and the figures that say so."""

    holds: bool
    evidence: str


@dataclass(frozen=True)
class Claim:
    """One numbered statement.

    Attributes
    ----------
    id : str
        The label in the chapter.
    chapter : str
        File stem of the chapter.
    statement : str
        The claim in one sentence.
    kind : str
        "numeric", "stored" or "cited".
    check : callable
        ``check(broken=False) -> Verdict``.
    refuted : bool
        Whether the data contradict the claim; the check then verifies that they do.
    """

    id: str
    chapter: str
    statement: str
    kind: str
    check: Callable[..., Verdict]
    refuted: bool = False


def full_result(chapter: str) -> Result:
    """Return the stored full-tier result of a chapter."""
    return Result.load(RESULTS / chapter, "full")
