"""Checks of the chapter "When to stop"."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ntkft import stopping
from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import Descent, descend
from ntkft.experiments.stopping_rule import DOMAINS
from ntkft.spectrum import Spectrum

E = np.e


def _spectra() -> Iterator[np.ndarray]:
    """Eigenvalues of many kinds: polynomial, exponential, finite rank, flat, one dominant mode."""
    j = np.arange(1, 101)
    yield from (j**-1.0, j**-2.0, j**-4.0, np.exp(-0.2 * j), np.where(j <= 5, 1.0, 0.0), np.full(100, 0.01))
    yield np.where(j == 1, 50.0, 0.1 / j)


def _descent(eigenvalues: np.ndarray, target: np.ndarray, step_size: float | None = None) -> Descent:
    """Return a problem given in its eigenbasis: target values (n,) = √n θ_j, f0 = 0."""
    return descend(len(eigenvalues) * np.diag(eigenvalues), target, step_size=step_size)


def _worst_target(eigenvalues: np.ndarray, eta: float, norm: float) -> np.ndarray:
    """Return the target of Hilbert norm R with the largest bias at η: all its mass on one eigenvector."""
    n = len(eigenvalues)
    j = np.argmax(eigenvalues * np.exp(-2 * eta * eigenvalues))
    target = np.zeros(n)
    target[j] = norm * np.sqrt(n * eigenvalues[j])
    return target


def bias_bound(broken: bool = False) -> Verdict:
    """bias² <= R²/(2eη): exact bias of the worst and of random targets of norm R."""
    rng = np.random.default_rng(0)
    tightest, holds = 0.0, True
    for lam in _spectra():
        for eta in np.geomspace(0.01, 1e4, 25) / lam[0]:
            for norm in (0.5, 3.0):
                theta = rng.standard_normal(len(lam)) * np.sqrt(lam)
                inside = lam > 0
                theta *= norm / np.sqrt((theta[inside] ** 2 / lam[inside]).sum())
                for target in (np.sqrt(len(lam)) * theta, _worst_target(lam, eta, norm)):
                    bias = float(_descent(lam, target).bias2(eta, target))
                    bound = norm**2 / (2 * E * eta) / (4 if broken else 1)
                    holds &= bias <= bound * (1 + 1e-9)
                    tightest = max(tightest, bias * 2 * E * eta / norm**2)
    return Verdict(bool(holds), f"the worst target reaches {tightest:.3f} of the bound")


def variance_bounds(broken: bool = False) -> Verdict:
    """(1-1/e)² σ²/n Σ min(1,ηλ)² <= variance <= σ² η R̂(1/√η)²."""
    up, low, holds = 0.0, np.inf, True
    for lam in _spectra():
        spectrum, path = Spectrum(lam), _descent(lam, np.zeros(len(lam)))
        for eta in np.geomspace(0.001, 1e5, 60) / lam[0]:
            variance = float(path.variance(eta, 0.7))
            upper = 0.49 * eta * spectrum.rademacher(eta**-0.5) ** 2
            lower = (1 if broken else (1 - 1 / E) ** 2) * 0.49 * float((np.minimum(1, eta * lam) ** 2).mean())
            holds &= lower * (1 - 1e-9) <= variance <= upper * (1 + 1e-9)
            up, low = max(up, variance / upper), min(low, variance / lower)
    return Verdict(bool(holds), f"variance/upper at most {up:.3f}, variance/lower at least {low:.3f}")


def radius_is_the_rule(broken: bool = False) -> Verdict:
    """T̂ found by walking step by step against floor(1/(ε ε̂²))."""
    misses, walks = 0, 0
    for lam in _spectra():
        for sigma, norm in ((0.3, 1.0), (1.0, 1.0), (1.0, 2.0)):
            spectrum = Spectrum(lam)
            step = 0.7 / lam[0]
            closed = int(spectrum.critical_radius(sigma, norm) ** -2 / step) + (1 if broken else 0)
            t = 1
            while spectrum.rademacher((t * step) ** -0.5) <= norm / (2 * E * sigma * t * step):
                t += 1
            walks, misses = walks + 1, misses + (t - 1 != closed)
    return Verdict(misses == 0, f"{walks} walks, {misses} disagree")


def expected_error(broken: bool = False) -> Verdict:
    """E‖f_T̂ - f*‖² <= (1/2e + 1/4e²) R² ε̂² (flow) and (1/e + 1/4e²) R² ε̂² (descent): exact risk, worst target."""
    flow_constant, step_constant = 1 / (2 * E) + 1 / (4 * E**2), 1 / E + 1 / (4 * E**2)
    factor = 0.25 if broken else 1.0
    tightest, holds = 0.0, True
    for lam in _spectra():
        spectrum = Spectrum(lam)
        for sigma in (0.05, 0.3, 1.0):
            stop = stopping.rademacher_rule(spectrum, sigma)
            size = stop.info["radius"] ** 2
            target = _worst_target(lam, stop.eta, 1.0)
            path = _descent(lam, target)
            risk = float(path.bias2(stop.eta, target) + path.variance(stop.eta, sigma))
            holds &= risk <= factor * flow_constant * size
            tightest = max(tightest, risk / (flow_constant * size))
            step = min(1 / lam[0], stop.eta / 2)
            eta = stop.steps(step) * step
            path = _descent(lam, target, step)
            risk = float(path.bias2(eta, target) + path.variance(eta, sigma))
            holds &= risk <= factor * step_constant * size
    return Verdict(bool(holds), f"the exact risk reaches {tightest:.2f} of the bound")


def high_probability(broken: bool = False) -> Verdict:
    """Gaussian noise: the bound of the theorem with x = c n ε̂² R²/σ² fails at most in a share exp(-x) of draws."""
    rng = np.random.default_rng(0)
    holds, worst, draws = True, 0.0, 4000
    for lam in _spectra():
        sigma = 0.5
        stop = stopping.rademacher_rule(Spectrum(lam), sigma)
        target = _worst_target(lam, stop.eta, 1.0)
        n, size = len(lam), stop.info["radius"] ** 2
        share = -np.expm1(-stop.eta * lam)
        noise = sigma * rng.standard_normal((draws, n))
        errors = ((share * (target + noise) - target) ** 2).mean(1)
        for x in (0.5, 1.0, 2.0):
            bound = size / E + 2 * (size / (2 * E**2) + 3 * sigma**2 * x / n)
            failures = float((errors > (0.1 * bound if broken else bound)).mean())
            holds &= failures <= np.exp(-x)
            worst = max(worst, failures / np.exp(-x))
    return Verdict(bool(holds), f"{draws} draws a case; failures reach {worst:.3f} of the share allowed")


def lower_bound_past_the_stop(broken: bool = False) -> Verdict:
    """Past any η the risk is at least the variance bound with the square; the first power is refuted by an example."""
    sigma, delta, n = 100.0, 0.05, 10
    lam = np.ones(n)
    eta, spectrum = delta, Spectrum(lam)
    past = spectrum.rademacher(eta**-0.5) > 1 / (2 * E * sigma * eta)  # the rule has stopped before
    target = np.full(n, 1.0)  # Hilbert norm 1
    path = _descent(lam, target)
    risk = float(path.bias2(eta, target) + path.variance(eta, sigma))
    first_power = sigma**2 / 4 * eta * spectrum.rademacher(eta**-0.5) ** 2
    squared = (1 - 1 / E) ** 2 * sigma**2 * float((np.minimum(1, eta * lam) ** 2).mean())
    refuted, valid = risk < first_power, risk >= squared
    if broken:
        refuted = risk < squared
    return Verdict(
        bool(past and refuted and valid),
        f"risk {risk:.1f}, with the square {squared:.1f} (holds), first power {first_power:.1f} (fails)",
    )


def sure_is_unbiased(broken: bool = False) -> Verdict:
    """Compare the mean of SURE over noise draws with the exact risk, noise uniform (not Gaussian) to use only its variance."""
    rng = np.random.default_rng(2)
    lam = np.arange(1, 61) ** -1.5
    target = np.sqrt(60) * np.sqrt(lam) * rng.standard_normal(60) / 8
    sigma, eta, draws = 0.6, 6.0, 20_000
    share = -np.expm1(-eta * lam)
    exact = _descent(lam, target)
    risk = float(exact.bias2(eta, target) + exact.variance(eta, sigma))
    noise = sigma * np.sqrt(3) * rng.uniform(-1, 1, (draws, 60))
    residual = (((1 - share) * (target + noise)) ** 2).mean(1)
    sure = residual - sigma**2 + (1 if broken else 2) * sigma**2 * share.mean()
    error = float(sure.std() / np.sqrt(draws))
    gap = abs(float(sure.mean()) - risk)
    return Verdict(
        gap < 4 * error, f"mean of SURE {sure.mean():.5f}, risk {risk:.5f}, Monte-Carlo error {error:.5f}"
    )


def rule_on_smollm2(broken: bool = False) -> Verdict:
    """Stored draws: the median excess of the Rademacher rule (R = 1) is at most 3 % and below hold-out's, in both domains."""
    values = full_result("stopping_rule").values
    limit = 0.003 if broken else 0.03
    medians = {
        d: tuple(values[f"{d}_test_{rule}"]["median"] for rule in ("rademacher", "holdout", "holdout_refit"))
        for d in DOMAINS
    }
    holds = all(ours <= limit and ours < min(others) for ours, *others in medians.values())
    told = "; ".join(
        f"{d}: {100 * a:.1f} % against {100 * b:.1f} and {100 * c:.1f} %" for d, (a, b, c) in medians.items()
    )
    return Verdict(holds, told)


def norm_is_tolerant(broken: bool = False) -> Verdict:
    """Stored draws: R in [0.63, 1.26] costs at most 3 %; R = 0.1 more than 15 %, and on tweets R = 10 too."""
    result = full_result("stopping_rule")
    norms, holds, worst, least = result.arrays["norms"], True, 0.0, np.inf
    for domain in DOMAINS:
        excess = (
            np.median(
                result.arrays[f"{domain}_by_norm"] / result.arrays[f"{domain}_oracle_test"][:, None], axis=0
            )
            - 1
        )
        inner = excess[(norms > 0.62) & (norms < (10 if broken else 1.27))]
        worst, least = max(worst, float(inner.max())), min(least, float(excess[0]))
        holds &= bool((inner <= 0.03).all() and excess[0] > 0.15)
        if domain == "tweets":
            holds &= bool(excess[-1] > 0.15)
    return Verdict(
        holds, f"inner guesses cost at most {100 * worst:.1f} %, R = 0.1 at least {100 * least:.1f} %"
    )


def bias_plus_variance(broken: bool = False) -> Verdict:
    """B² + V against the mean error of 20 000 noisy runs; noise is ±σ, so only its variance can matter."""
    rng = np.random.default_rng(3)
    lam = np.arange(1, 41) ** -1.2
    target, sigma, eta, draws = rng.standard_normal(40), 0.8, 3.0, 20_000
    path = _descent(lam, target)
    claimed = float(path.bias2(eta, target)) + (0 if broken else 1) * float(path.variance(eta, sigma))
    share = -np.expm1(-eta * lam)
    errors = ((share * (target + sigma * rng.choice([-1.0, 1.0], (draws, 40))) - target) ** 2).mean(1)
    spread = float(errors.std() / np.sqrt(draws))
    gap = abs(float(errors.mean()) - claimed)
    return Verdict(gap < 4 * spread, f"B² + V = {claimed:.5f}, mean error {errors.mean():.5f} ± {spread:.5f}")


def bias_and_variance_bounds(broken: bool = False) -> Verdict:
    """Both halves of the lemma."""
    bias, variance = bias_bound(broken), variance_bounds(broken)
    return Verdict(bias.holds and variance.holds, f"{bias.evidence}; {variance.evidence}")


CHAPTER = "stopping_rule"
CLAIMS = (
    Claim(
        "lem-decomposition",
        CHAPTER,
        "The expected error is squared bias plus variance, B² + V.",
        "numeric",
        bias_plus_variance,
    ),
    Claim(
        "lem-bias-variance",
        CHAPTER,
        "B² ≤ R²/(2eη), and V lies between (1-1/e)² σ²/n Σ min(1,ηλ)² and σ²η R̂(1/√η)².",
        "numeric",
        bias_and_variance_bounds,
    ),
    Claim(
        "lem-radius",
        CHAPTER,
        "The stopping time by its definition is the whole number of steps in 1/ε̂².",
        "numeric",
        radius_is_the_rule,
    ),
    Claim(
        "thm-expectation",
        CHAPTER,
        "Stopping by the rule has expected error below (1/2e + 1/4e²) R²ε̂² for flow, (1/e + 1/4e²) R²ε̂² for descent.",
        "numeric",
        expected_error,
    ),
    Claim(
        "thm-high-probability",
        CHAPTER,
        "For Gaussian noise the error exceeds (1/e + 1/e²) R²ε̂² + 6σ²x/n with probability at most exp(-x).",
        "numeric",
        high_probability,
    ),
    Claim(
        "thm-overfit",
        CHAPTER,
        "Going on costs at least (1-1/e)² σ²/n Σ min(1,ηλ)²; the same with the first power is false in general.",
        "numeric",
        lower_bound_past_the_stop,
    ),
    Claim(
        "prop-sure",
        CHAPTER,
        "SURE is an unbiased estimate of the risk at every time.",
        "numeric",
        sure_is_unbiased,
    ),
    Claim(
        "obs-smollm2-rules",
        CHAPTER,
        "On SmolLM2 the Rademacher rule's median excess test error is at most 3 % and below that of hold-out, retrained or not.",
        "stored",
        rule_on_smollm2,
    ),
    Claim(
        "obs-norm",
        CHAPTER,
        "R between 0.63 and 1.26 costs at most 3 % on SmolLM2; R = 0.1, and on tweets R = 10, more than 15 %.",
        "stored",
        norm_is_tolerant,
    ),
)
