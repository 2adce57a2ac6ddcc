"""Checks of the chapter "Arithmetic with fine-tuned models"."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
from scipy.optimize import brentq

from ntkft import interference
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.checks import Claim, Verdict
from ntkft.descent import descend

CHAPTER = "task_vectors"


E = np.e


def _signs(n: int) -> np.ndarray:
    """Return all 2ⁿ vectors of signs: as noise they are uncorrelated, and their mean is exact."""
    return np.array(list(product((-1.0, 1.0), repeat=n)))


def _train(phi: np.ndarray, y: np.ndarray, step: float, steps: int, intercept: bool) -> np.ndarray:
    """Return the displacement of a linear model's weights after gradient descent, step by step."""
    delta = np.zeros(phi.shape[1])
    for _ in range(steps):
        left = y - phi @ delta
        delta += step * phi.T @ (left - left.mean() if intercept else left) / len(y)
    return delta


def expansion(broken: bool = False) -> Verdict:
    """Weights trained step by step against Φᵀα, their inner products against αᵀkα; without centring they differ."""
    worst = 0.0
    for seed, intercept in product(range(3), (False, True)):
        rng = np.random.default_rng(seed)
        phi, y, step, steps = rng.standard_normal((11, 8)), rng.standard_normal(11) + 1, 0.05, 60
        sides = [np.arange(5), np.arange(5, 11)]
        tuned = [FineTuning(rows, y[rows], step * steps, step, intercept and not broken) for rows in sides]
        vectors = TaskVectors(phi @ phi.T, tuned)
        taus = [_train(phi[rows], y[rows], step, steps, intercept) for rows in sides]
        worst = max(worst, abs(taus[0] @ taus[1] - vectors.gram()[0, 1]))
        for rows, tau, alpha in zip(sides, taus, vectors.coefficients, strict=True):
            worst = max(worst, float(np.abs(phi[rows].T @ alpha - tau).max()))
            worst = max(worst, abs(alpha.sum())) if intercept else worst
    return Verdict(bool(worst < 1e-11), f"weights and expansion agree to {worst:.0e}")


def length(broken: bool = False) -> Verdict:
    """‖τ‖² of trained weights against Σ s²z²/λ; monotone, below 0.4073 η‖r‖², which one eigenvector reaches."""
    root = brentq(lambda x: np.exp(x) - 1 - 2 * x, 0.5, 3)
    constant = 4 * root / (1 + 2 * root) ** 2
    holds, worst = abs(constant - 0.4073) < 5e-5, 0.0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        phi, y = rng.standard_normal((9, 6)), rng.standard_normal(9)
        lam, u = np.linalg.eigh(phi @ phi.T / 9)
        z, step, last = u.T @ y / 3, 0.5 / lam[-1], 0.0
        for steps in (1, 4, 30, 400):
            share = 1 - (1 - step * np.clip(lam, 0, None)) ** steps
            real = lam > 1e-9
            formula = (share[real] ** (1 if broken else 2) * z[real] ** 2 / lam[real]).sum()
            size = (_train(phi, y, step, steps, False) ** 2).sum()
            worst = max(worst, abs(formula / size - 1))
            holds &= last <= size <= steps * step * (y**2).mean()
            last = size
            flow = TaskVectors(phi @ phi.T, [FineTuning(range(9), y, steps * step)]).norms[0] ** 2
            holds &= flow <= constant * steps * step * (y**2).mean() * (1 + 1e-12)
    sharp = TaskVectors(np.array([[0.7]]), [FineTuning([0], [2.0], root / 0.7)]).norms[0] ** 2
    holds &= abs(sharp / (constant * root / 0.7 * 4) - 1) < 1e-12
    return Verdict(bool(holds and worst < 1e-9), f"length agrees to {worst:.0e}, constant {constant:.4f}")


def noisy_length(broken: bool = False) -> Verdict:
    """E‖τ‖² over all signs of the noise: signal and noise part, and the latter's bounds and limit."""
    worst, holds, sigma, n = 0.0, True, 0.7, 7
    for seed in range(3):
        rng = np.random.default_rng(seed)
        phi, truth = rng.standard_normal((n, 10)), rng.standard_normal(n)
        lam, last = np.linalg.eigvalsh(phi @ phi.T / n), 0.0
        for eta in (0.05, 0.6, 8.0, 1e4):
            tuned = FineTuning(range(n), truth, eta)
            clean = TaskVectors(phi @ phi.T, [tuned])
            mean = np.mean(
                [
                    TaskVectors(phi @ phi.T, [replace(tuned, y=truth + sigma * s)]).norms[0] ** 2
                    for s in _signs(n)
                ]
            )
            noise = sigma**2 / n * ((1 - np.exp(-eta * lam)) ** 2 / lam ** (2 if broken else 1)).sum()
            worst = max(worst, abs(clean.norms[0] ** 2 + noise - mean) / mean)
            above = sigma**2 * eta / n * np.minimum(eta * lam, 1 / (eta * lam)).sum()
            holds &= (
                (1 - 1 / E) ** 2 * above <= noise * (1 + 1e-9)
                and noise <= above * (1 + 1e-9)
                and noise >= last
            )
            last = noise
        holds &= abs(last / (sigma**2 / n * (1 / lam).sum()) - 1) < 1e-6
    return Verdict(bool(holds and worst < 1e-9), f"mean and formula agree to {worst:.0e}")


def _curved(seed: int, p: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return slopes, directions and their scales of f(δ) = a·δ + Σ_i w_i tanh²(v_i·δ), and a bound on its Hessian."""
    rng = np.random.default_rng(seed)
    a, v, w = rng.standard_normal(p), rng.standard_normal((4, p)), rng.standard_normal(4)
    return a, v, w, 2 * float((np.abs(w) * (v**2).sum(1)).sum())  # |(tanh²)''| <= 2, reached at zero


def arithmetic(broken: bool = False) -> Verdict:
    """The three bounds for random smooth functions, and quadratics that reach them; nine tenths of them do not hold."""
    share, tightest, holds = (0.9 if broken else 1.0), np.zeros(3), True

    def compare(f, slope, beta, taus, c):
        nonlocal holds, tightest
        delta, sizes = c @ taus, np.linalg.norm(taus, axis=1)
        gaps = (
            f(delta) - f(0 * delta) - slope @ delta,
            f(delta) - f(0 * delta) - sum(w * (f(tau) - f(0 * tau)) for w, tau in zip(c, taus, strict=True)),
            f(delta) - f(0 * delta) - sum(f(w * tau) - f(0 * tau) for w, tau in zip(c, taus, strict=True)),
        )
        pairs = sum(abs(c[i] * c[j]) * sizes[i] * sizes[j] for i, j in combinations(range(len(c)), 2))
        square = delta @ delta
        bounds = beta * np.array([square / 2, (square + np.abs(c) @ sizes**2) / 2, pairs])
        ratio = np.abs(gaps) / (share * bounds)
        holds &= bool((ratio <= 1 + 1e-9).all())
        tightest = np.maximum(tightest, ratio)

    for seed in range(20):
        a, v, w, beta = _curved(seed)
        rng = np.random.default_rng(100 + seed)
        taus, c = rng.uniform(0.05, 1) * rng.standard_normal((3, 5)), rng.uniform(-1.5, 1.5, 3)
        compare(lambda d, a=a, v=v, w=w: a @ d + w @ np.tanh(v @ d) ** 2, a, beta, taus, c)
    line = np.array([[1.0], [2.0]])
    for c in (np.array([-1.0, 0.0]), np.array([1.0, 1.0])):  # ½δ² in one dimension: equalities
        if c[1]:
            compare(lambda d: 0.5 * float(d @ d), np.zeros(1), 1.0, line, c)
        else:
            compare(
                lambda d: 0.5 * float(d @ d),
                np.zeros(1),
                1.0,
                np.array([[1.0], [1.0]]),
                np.array([-1.0, 1e-9]),
            )
    return Verdict(holds, f"the gaps reach {tightest.round(3)} of the bounds")


def along_the_vector(broken: bool = False) -> Verdict:
    """Losses of the moved weights against ½Σ(1-cs)²z²; best scale >= 1; at most 4 L_0 at c = -1. Steps past 1/λ_1 break it."""
    holds, worst, least = True, 0.0, np.inf
    for seed in range(10):
        rng = np.random.default_rng(seed)
        phi, y = rng.standard_normal((8, 6)), rng.standard_normal(8)
        lam, u = np.linalg.eigh(phi @ phi.T / 8)
        lam, z = np.clip(lam, 0, None), u.T @ y / 8**0.5
        step, steps = (1.9 if broken else 0.8) / lam[-1], 1 + 2 * int(rng.integers(0, 6))
        tau, share = _train(phi, y, step, steps, False), 1 - (1 - step * lam) ** steps
        start = (y**2).mean() / 2
        for c in (-1.0, 0.5, 1.0, 2.0):
            formula = ((1 - c * share) ** 2 * z**2).sum() / 2
            worst = max(worst, abs(formula - ((y - c * phi @ tau) ** 2).mean() / 2))
        best = (share * z**2).sum() / (share**2 * z**2).sum()
        least = min(least, best)
        negated = ((y + phi @ tau) ** 2).mean() / 2
        holds &= bool(best >= 1 - 1e-12 and start < negated <= 4 * start * (1 + 1e-12))
    return Verdict(
        bool(holds and worst < 1e-10), f"losses agree to {worst:.0e}, least best scale {least:.3f}"
    )


def scale_on_the_risk(broken: bool = False) -> Verdict:
    """The scale of least mean risk over all signs of the noise against the formula; it falls from above one to below."""
    worst, crosses, sigma, n = 0.0, True, 0.8, 7
    for seed in range(4):
        rng = np.random.default_rng(seed)
        phi, truth = rng.standard_normal((n, 9)), rng.standard_normal(n)
        lam, u = np.linalg.eigh(phi @ phi.T / n)
        theta, seen = u.T @ truth / n**0.5, []
        for eta in (0.01, 0.3, 5.0, 1e4):
            share = 1 - np.exp(-eta * lam)
            variance = 0.0 if broken else sigma**2 / n * (share**2).sum()
            formula = (share * theta**2).sum() / ((share**2 * theta**2).sum() + variance)
            fits = [descend(phi @ phi.T, truth + sigma * s).fitted(eta) for s in _signs(n)]
            best = np.mean([f @ truth for f in fits]) / np.mean([f @ f for f in fits])
            worst = max(worst, abs(formula / best - 1))
            above = variance < (share * (1 - share) * theta**2).sum()
            crosses &= bool(above == (formula > 1))
            seen.append(formula)
        crosses &= seen[0] > 1 > seen[-1]
    return Verdict(bool(worst < 1e-10 and crosses), f"scales agree to {worst:.0e}")


def control_task(broken: bool = False) -> Verdict:
    """A control task's loss along another task's trained weights: its quadratic, and the cost of negation."""
    worst = 0.0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        phi, y = rng.standard_normal((12, 9)), rng.standard_normal(12)
        vectors = TaskVectors(
            phi @ phi.T, [FineTuning(range(6), y[:6], 3.0, 0.1), FineTuning(range(6, 12), y[6:], 1.0)]
        )
        tau = _train(phi[:6], y[:6], 0.1, 30, False)
        talk = interference.cross_talk(vectors, 1, 0)
        slope = (1 if broken else -1) * (y[6:] @ talk) / 6
        for c in (-1.0, 0.5, 2.0):
            measured = ((y[6:] - c * phi[6:] @ tau) ** 2).mean() / 2
            formula = (y[6:] ** 2).mean() / 2 + c * slope + c**2 / 2 * (talk**2).mean()
            worst = max(worst, abs(formula - measured))
    return Verdict(bool(worst < 1e-11), f"loss and quadratic agree to {worst:.0e}")


CLAIMS = (
    Claim(
        "thm-tv-expansion",
        CHAPTER,
        "Training the tangent moves the weights by Φᵀα; inner products of such vectors are αᵀkα, with a free constant, too.",
        "numeric",
        expansion,
    ),
    Claim(
        "prop-tv-length",
        CHAPTER,
        "A task vector's squared length never falls and is at most 0.4073 η‖r‖² for flow, η‖r‖² for descent.",
        "numeric",
        length,
    ),
    Claim(
        "prop-tv-noise",
        CHAPTER,
        "Noise adds (σ²/n)Σ s²/λ to the mean squared length, which grows until it is (σ²/n)Σ 1/λ.",
        "numeric",
        noisy_length,
    ),
    Claim(
        "thm-tv-arithmetic",
        CHAPTER,
        "Adding vectors adds their effects up to the curvature times squares, or products, of their lengths.",
        "numeric",
        arithmetic,
    ),
    Claim(
        "prop-tv-line",
        CHAPTER,
        "The training loss along a task's own vector is ½Σ(1-cs)²z², least at a scale of one or more, and at most 4 L_0 at -1.",
        "numeric",
        along_the_vector,
    ),
    Claim(
        "prop-tv-risk",
        CHAPTER,
        "Against the truth the best scale is Σsθ²/(Σs²θ² + V), which is above one early and below one late.",
        "numeric",
        scale_on_the_risk,
    ),
    Claim(
        "prop-tv-control",
        CHAPTER,
        "A control task's loss is a quadratic in the scale of another's vector, with a slope given by the cross-talk.",
        "numeric",
        control_task,
    ),
)
