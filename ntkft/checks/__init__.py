"""The checks behind the claim ledger, one module per chapter.

A check is a function ``check(broken=False) -> Verdict``. It compares two computations that share as little as
possible. With ``broken=True`` it runs the same comparison on a deliberately wrong version of the claim and must
then fail: a check that cannot fail is no check.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether the claim held in this run, and the figures that say so."""

    holds: bool
    evidence: str
