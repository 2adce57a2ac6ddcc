"""Checks of the chapter "Arithmetic with fine-tuned models" on analogies: a fit on other texts, and three of them."""

from __future__ import annotations

from itertools import product

import numpy as np

from ntkft import interference, stopping
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.checks import Claim, Verdict
from ntkft.spectrum import Spectrum

CHAPTER = "task_vectors"
E = np.e


def _risk_elsewhere(
    phi: np.ndarray, there: np.ndarray, weights: np.ndarray, sigma: float, eta: float
) -> float:
    """Return E‖ĝ - g‖² on other texts for flow on noisy labels of g = φ·weights, exactly, through the weights."""
    n = len(phi)
    left, lam, right = np.linalg.svd(phi / n**0.5, full_matrices=False)
    share = 1 - np.exp(-eta * lam**2)
    fit = (right.T * (share / lam)) @ left.T / n**0.5  # displacement for labels y
    bias, noise = there @ (fit @ phi @ weights - weights), there @ fit
    return float((bias**2).mean() + sigma**2 * (noise**2).sum() / len(there))


def _world(seed: int, n: int = 14, m: int = 5, p: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gradients of n texts and of m others, and weights of length one, all with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    decay = np.arange(1, p + 1) ** -0.8
    weights = rng.standard_normal(p)
    return (
        rng.standard_normal((n, p)) * decay,
        rng.standard_normal((m, p)) * decay,
        weights / np.linalg.norm(weights),
    )


def transfer(broken: bool = False) -> Verdict:
    """The exact error on other texts, at the stop and before, against κ(1 + 1/2e²)R²/η; the κ of a's own texts is too small."""
    holds, tightest, sigma = True, 0.0, 0.3
    for seed in range(12):
        phi, there, weights = _world(seed)
        there = 4 * there  # texts with larger gradients than those that were trained on
        stop = stopping.rademacher_rule(Spectrum(np.linalg.eigvalsh(phi @ phi.T / 14)), sigma).eta
        for eta in (0.2 * stop, stop):
            both = np.concatenate([phi, there])
            vectors = TaskVectors(both @ both.T, [FineTuning(range(14), np.zeros(14), eta)])
            factor = interference.transfer(vectors, 0, range(14) if broken else range(14, 19))
            # the worst of the directions in which the others differ, so that the bound is put to the test
            for g in (weights, np.linalg.svd(there - there @ np.linalg.pinv(phi) @ phi)[2][0]):
                ratio = _risk_elsewhere(phi, there, g, sigma, eta) / (factor * (1 + 1 / (2 * E**2)) / eta)
                holds &= ratio <= 1
                tightest = max(tightest, ratio)
    return Verdict(bool(holds), f"the error reaches {tightest:.2f} of the bound")


def analogy(broken: bool = False) -> Verdict:
    """The exact root mean squared error of τ_C + τ_B - τ_A on D's texts against the defect and three transfers."""
    holds, tightest, sigma = True, 0.0, 0.2
    for seed, size in product(range(6), (0.0, 3.0)):
        phi, there, _ = _world(seed, n=30)
        rng = np.random.default_rng(seed)
        goals = rng.standard_normal((3, 30))
        goals /= np.linalg.norm(goals, axis=1, keepdims=True)  # R = 1, as the stops assume
        defect = there @ (size * rng.standard_normal(30))
        rows = [np.arange(10 * a, 10 * a + 10) for a in range(3)]
        stops = [
            stopping.rademacher_rule(Spectrum(np.linalg.eigvalsh(phi[r] @ phi[r].T / 10)), sigma).eta
            for r in rows
        ]
        both = np.concatenate([phi, there])
        tuned = [FineTuning(r, phi[r] @ g, eta) for r, g, eta in zip(rows, goals, stops, strict=True)]
        vectors = TaskVectors(both @ both.T, tuned)
        truth = there @ (goals[2] + goals[1] - goals[0]) + defect
        bias = vectors.analogy(0, 1, 2, range(30, 35)) - truth
        silent = np.zeros(30)
        noise = sum(
            _risk_elsewhere(phi[r], there, silent, sigma, eta) for r, eta in zip(rows, stops, strict=True)
        )  # independent labels
        error = np.sqrt((bias**2).mean() + noise)
        bound = 0.0 if broken else np.sqrt((defect**2).mean())
        for a, eta in enumerate(stops):
            bound += np.sqrt((1 + 1 / (2 * E**2)) * interference.transfer(vectors, a, range(30, 35)) / eta)
        holds &= bool(error <= bound)
        tightest = max(tightest, error / bound)
    return Verdict(holds, f"the error reaches {tightest:.2f} of the bound")


CLAIMS = (
    Claim(
        "lem-tv-transfer",
        CHAPTER,
        "A fit that stops in time has on other texts an expected error of at most κ(1 + 1/2e²)R²/η.",
        "numeric",
        transfer,
    ),
    Claim(
        "thm-tv-analogy",
        CHAPTER,
        "The error of an analogy is at most the parallelogram's defect and the three transferred errors.",
        "numeric",
        analogy,
    ),
)
