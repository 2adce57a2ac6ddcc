"""The claim ledger: every numbered statement of the book, and the check that backs it.

A statement is known by the label that it has in its chapter. ``kind`` says what the check is made of: "numeric"
(two independent computations), "stored" (a full-tier result in ``results/``), or "cited" (proved elsewhere; the check
then tests the statement as it is quoted). Proofs are in the chapters; a check guards them against slips.

Example
-------
>>> verify("lem-two-bounds").holds
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ntkft.checks import Verdict, few_epochs, kernel_descent, stopping_rule
from ntkft.errors import InputError


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


_K, _S, _F = "kernel_descent", "stopping_rule", "few_epochs"

LEDGER = (
    Claim("thm-filter", _K, "Gradient descent on the linearised model is the spectral filter 1-(1-ελ)^t, on and off the sample.",
          "numeric", kernel_descent.filter_is_gradient_descent),
    Claim("lem-flow", _K, "Descent and flow differ by at most ελ/2 along an eigenvector with eigenvalue λ.",
          "numeric", kernel_descent.flow_is_close_to_descent),
    Claim("lem-two-bounds", _K, "λ(1-ελ)^{2t} ≤ 1/(2eη) and 1-(1-ελ)^t ≤ min(1, ηλ).", "numeric", kernel_descent.two_bounds),
    Claim("prop-ridge", _K, "Flow fits between 1 and 1.2985 times as much as ridge with ν = 1/η; descent between 1 and 2.",
          "numeric", kernel_descent.ridge_twin),
    Claim("prop-norm", _K, "The smallest function through given values has squared norm Σ θ_j²/λ_j.",
          "numeric", kernel_descent.norm_of_the_smallest_function),
)


def claim(claim_id: str) -> Claim:
    """Return the ledger's entry with this id."""
    for entry in LEDGER:
        if entry.id == claim_id:
            return entry
    raise InputError(f"There is no claim {claim_id!r}: the ledger has {', '.join(c.id for c in LEDGER)}.")


def verify(claim_id: str) -> Verdict:
    """Run the check of one claim."""
    return claim(claim_id).check()
