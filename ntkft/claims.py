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

from ntkft.checks import (
    Claim,
    Verdict,
    adversaries,
    adversaries_measured,
    adversaries_stopped,
    analogies,
    attention_layer,
    attention_measured,
    attention_ntk,
    few_epochs,
    kernel_descent,
    kernel_engine,
    llm_spectra,
    llm_stopping,
    llm_stopping_measured,
    llm_training,
    many_tasks,
    many_tasks_sharing,
    pretrained_measured,
    pretrained_ntk,
    pretrained_training,
    random_ntk,
    rates,
    stopping_rule,
    task_vectors,
    tasks_measured,
)
from ntkft.errors import InputError

LEDGER = (
    *few_epochs.CLAIMS,
    *kernel_descent.CLAIMS,
    *stopping_rule.CLAIMS,
    *rates.CLAIMS,
    *random_ntk.CLAIMS,
    *attention_ntk.CLAIMS,
    *attention_layer.CLAIMS,
    *attention_measured.CLAIMS,
    *pretrained_ntk.CLAIMS,
    *pretrained_training.CLAIMS,
    *pretrained_measured.CLAIMS,
    *llm_spectra.CLAIMS,
    *llm_stopping.CLAIMS,
    *llm_stopping_measured.CLAIMS,
    *llm_training.CLAIMS,
    *task_vectors.CLAIMS,
    *analogies.CLAIMS,
    *many_tasks.CLAIMS,
    *many_tasks_sharing.CLAIMS,
    *tasks_measured.CLAIMS,
    *adversaries.CLAIMS,
    *adversaries_stopped.CLAIMS,
    *adversaries_measured.CLAIMS,
    *kernel_engine.CLAIMS,
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
