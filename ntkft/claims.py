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

from ntkft.checks import Verdict, few_epochs, kernel_descent, kernel_engine, stopping_rule
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


_K, _S, _F, _E = "kernel_descent", "stopping_rule", "few_epochs", "kernel_engine"

LEDGER = (
    Claim(
        "thm-filter",
        _K,
        "Gradient descent on the linearised model is the spectral filter 1-(1-ελ)^t, on and off the sample.",
        "numeric",
        kernel_descent.filter_is_gradient_descent,
    ),
    Claim(
        "lem-flow",
        _K,
        "Descent and flow differ by at most ελ/2 along an eigenvector with eigenvalue λ.",
        "numeric",
        kernel_descent.flow_is_close_to_descent,
    ),
    Claim(
        "lem-two-bounds",
        _K,
        "λ(1-ελ)^{2t} ≤ 1/(2eη) and 1-(1-ελ)^t ≤ min(1, ηλ).",
        "numeric",
        kernel_descent.two_bounds,
    ),
    Claim(
        "prop-ridge",
        _K,
        "Flow fits between 1 and 1.2984 times as much as ridge with ν = 1/η; descent between 1 and 2.",
        "numeric",
        kernel_descent.ridge_twin,
    ),
    Claim(
        "prop-norm",
        _K,
        "The smallest function through given values has squared norm Σ θ_j²/λ_j.",
        "numeric",
        kernel_descent.norm_of_the_smallest_function,
    ),
    Claim(
        "obs-first-steps",
        _K,
        "MiniLM's first full-batch steps follow the filter to a few per cent; after twenty steps it has run ahead.",
        "stored",
        kernel_descent.minilm_follows_then_leaves,
    ),
    Claim(
        "lem-decomposition",
        _S,
        "The expected error is squared bias plus variance, B² + V.",
        "numeric",
        stopping_rule.bias_plus_variance,
    ),
    Claim(
        "lem-bias-variance",
        _S,
        "B² ≤ R²/(2eη), and V lies between (1-1/e)² σ²/n Σ min(1,ηλ)² and σ²η R̂(1/√η)².",
        "numeric",
        stopping_rule.bias_and_variance_bounds,
    ),
    Claim(
        "lem-radius",
        _S,
        "The stopping time by its definition is the whole number of steps in 1/ε̂².",
        "numeric",
        stopping_rule.radius_is_the_rule,
    ),
    Claim(
        "thm-expectation",
        _S,
        "Stopping by the rule has expected error below (1/2e + 1/4e²) R²ε̂² for flow, (1/e + 1/4e²) R²ε̂² for descent.",
        "numeric",
        stopping_rule.expected_error,
    ),
    Claim(
        "thm-high-probability",
        _S,
        "For Gaussian noise the error exceeds (1/e + 1/e²) R²ε̂² + 6σ²x/n with probability at most exp(-x).",
        "numeric",
        stopping_rule.high_probability,
    ),
    Claim(
        "thm-overfit",
        _S,
        "Going on costs at least (1-1/e)² σ²/n Σ min(1,ηλ)²; the same with the first power is false in general.",
        "numeric",
        stopping_rule.lower_bound_past_the_stop,
    ),
    Claim(
        "prop-sure",
        _S,
        "SURE is an unbiased estimate of the risk at every time.",
        "numeric",
        stopping_rule.sure_is_unbiased,
    ),
    Claim(
        "obs-smollm2-rules",
        _S,
        "On SmolLM2 the Rademacher rule's median excess test error is at most 3 % and below that of hold-out, retrained or not.",
        "stored",
        stopping_rule.rule_on_smollm2,
    ),
    Claim(
        "obs-norm",
        _S,
        "R between 0.63 and 1.26 costs at most 3 % on SmolLM2; R = 0.1, and on tweets R = 10, more than 15 %.",
        "stored",
        stopping_rule.norm_is_tolerant,
    ),
    Claim(
        "obs-u-shape",
        _F,
        "MiniLM on tweets and editorials ends more than 30 % above its least error, for every seed.",
        "stored",
        few_epochs.training_on_leaves_the_truth,
    ),
    Claim(
        "obs-few-epochs",
        _F,
        "In every stored MiniLM run the best of twelve epochs is among epochs 2 to 8.",
        "stored",
        few_epochs.a_few_epochs_are_best,
    ),
    Claim(
        "obs-prediction",
        _F,
        "In every stored MiniLM run the predicted epoch comes before the best one, by at most a factor of three.",
        "stored",
        few_epochs.prediction_is_early_and_of_the_right_size,
    ),
    Claim(
        "prop-contractions",
        _E,
        "⟨G_i, G_j⟩ = Σ_{s,t} ⟨a_is, a_jt⟩⟨g_is, g_jt⟩ for a linear layer.",
        "numeric",
        kernel_engine.two_contractions,
    ),
    Claim(
        "prop-shift",
        _E,
        "⟨g, h⟩ = ⟨g-v, h-v⟩ + c_g + c_h with c_g = ⟨g, v⟩ - ‖v‖²/2.",
        "numeric",
        kernel_engine.shifted_products,
    ),
    Claim(
        "obs-engine-peers",
        _E,
        "In the stored run every other method that finished took more time and more memory, and found the same kernel.",
        "stored",
        kernel_engine.faster_than_peers,
    ),
    Claim(
        "obs-engine-exponent",
        _E,
        "Between 256 and 2048 reviews the exponent of time in n lies between 1 and 2.",
        "stored",
        kernel_engine.scaling_exponent,
    ),
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
