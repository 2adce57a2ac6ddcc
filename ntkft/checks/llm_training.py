"""Checks of the chapter "When the kernel drifts"."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from ntkft import monitor, stopping
from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import descend
from ntkft.spectrum import Spectrum

CHAPTER = "llm_training"
E = np.e


def _kernels(n: int, seed: int, *, commuting: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three (n, n) matrices A, B, C of which A + sB + s²C is a smooth path of positive semidefinite kernels."""
    rng = np.random.default_rng(seed)
    if commuting:
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        return tuple((q * rng.uniform(0, 1, n)) @ q.T for _ in range(3))  # type: ignore[return-value]
    return tuple((m := rng.standard_normal((n, 2))) @ m.T / n for _ in range(3))  # type: ignore[return-value]


def _propagator(parts: tuple[np.ndarray, ...], t: float) -> np.ndarray:
    """Return U_t of U' = -K_s U by a general solver."""
    a, b, c = parts
    n = len(a)
    found = solve_ivp(
        lambda s, u: (-(a + s * b + s * s * c) @ u.reshape(n, n)).ravel(), (0, t), np.eye(n).ravel(), rtol=1e-9, atol=1e-11
    )
    return found.y[:, -1].reshape(n, n)


def moving_kernel(broken: bool = False) -> Verdict:
    """‖U_t - exp(-A_t)‖ <= ½∫‖[K_s, A_s]‖; the kernel of the start in place of the average breaks it."""
    tightest, holds = 0.0, True
    for seed, t in product(range(3), (0.3, 2.0)):
        a, b, c = _kernels(5, seed)
        grid = np.linspace(0, t, 501)
        path = a + grid[:, None, None] * b + grid[:, None, None] ** 2 * c
        bound = monitor.commutator_bound(grid, path)[-1]
        total = a * t if broken else a * t + b * t**2 / 2 + c * t**3 / 3
        gap = np.linalg.norm(_propagator((a, b, c), t) - expm(-total), 2)
        holds &= bool(gap <= bound * (1 + 1e-5) + 1e-8)
        tightest = max(tightest, gap / bound)
    return Verdict(holds, f"the gap reaches {tightest:.2f} of the bound")


def drift_aware_guarantee(broken: bool = False) -> Verdict:
    """Commuting kernels: at the drift-aware stop the exact risk is below (1/2e + 1/4e²) R² ε̂² of the averaged kernel."""
    worst, holds = 0.0, True
    sigma, n = 0.7, 30
    for seed in range(4):
        rng = np.random.default_rng(seed)
        decay = np.arange(1, n + 1) ** -1.5
        times = np.linspace(0, 60, 61)
        lam = decay * (1 + np.outer(times, rng.uniform(0, 0.5, n)))  # (k, n): eigenvalues of commuting kernels
        average = np.array([np.trapezoid(lam[: k + 1], times[: k + 1], axis=0) / max(times[k], 1e-12) for k in range(len(times))])
        average[0] = lam[0]
        stop = monitor.drift_aware_rule(times, [Spectrum(row) for row in average], sigma)
        eta = stop.eta * (200 if broken else 1)
        total = eta * np.array([np.interp(stop.eta, times, average[:, j]) for j in range(n)])
        theta = np.sqrt(total / eta) * rng.standard_normal(n)
        theta /= np.sqrt((theta**2 / (total / eta)).sum())  # R = 1 in the averaged kernel's space
        risk = (np.exp(-2 * total) * theta**2).sum() + sigma**2 / n * ((1 - np.exp(-total)) ** 2).sum()
        radius2 = 1 / stopping.rademacher_rule(Spectrum(total / eta), sigma).eta
        ratio = risk / ((1 / (2 * E) + 1 / (4 * E**2)) * radius2)
        holds &= bool(stop.info["reached"] and ratio <= 1)
        worst = max(worst, ratio)
    return Verdict(holds, f"the risk reaches {worst:.2f} of the bound")


def scaled_kernel(broken: bool = False) -> Verdict:
    """η̂(cK) lies between η̂(K)/√c and η̂(K) for c >= 1, and with R/√c it is η̂(K)/c exactly."""
    rng, holds, worst = np.random.default_rng(0), True, 0.0
    for _ in range(40):
        lam = np.sort(rng.pareto(1.0, 60))[::-1] / 60
        c, sigma = float(rng.uniform(1, 20)), float(rng.uniform(0.2, 2))
        eta = stopping.rademacher_rule(Spectrum(lam), sigma).eta
        larger = stopping.rademacher_rule(Spectrum(c * lam), sigma).eta
        exact = stopping.rademacher_rule(Spectrum(c * lam), sigma, 1.0 if broken else 1 / np.sqrt(c)).eta
        holds &= eta / np.sqrt(c) * (1 - 1e-9) <= larger <= eta * (1 + 1e-9)
        worst = max(worst, abs(exact * c / eta - 1))
    return Verdict(bool(holds and worst < 1e-9), f"with R/√c the stop is η̂/c to {worst:.0e}")


def clock_reads_speed(broken: bool = False) -> Verdict:
    """Training that follows the kernel's path at any speed is read exactly; the sum of the step sizes is not."""
    rng = np.random.default_rng(1)
    m = rng.standard_normal((12, 12))
    descent = descend(m @ m.T / 12, rng.standard_normal(12))
    worst = 0.0
    for t in (0.2, 1.0, 3.0):
        tau = t + t**3  # ∫ c(s) ds with K_s = c(s) K, c = 1 + 3s²
        r = expm(-tau * (m @ m.T / 144)) @ descent.y
        read = monitor.residual_clock(descent, float(r @ r) / 12)
        worst = max(worst, abs(read / (t if broken else tau) - 1))
    return Verdict(bool(worst < 1e-9), f"read to a relative {worst:.0e}")


def twin_moments(broken: bool = False) -> Verdict:
    """Over all signs b, bᵀSb has mean tr S and variance Σ_{i<j}(S_ij + S_ji)²; twice the squared norm overstates it."""
    rng = np.random.default_rng(2)
    worst = 0.0
    for _ in range(5):
        s = rng.standard_normal((8, 8))
        y = rng.standard_normal(8)
        values = []
        for signs in product((-1.0, 1.0), repeat=8):
            b = np.array(signs)
            values.append(float(monitor.twin_degrees_of_freedom(s @ y, s @ (y + 0.3 * b), b, 0.3)))
        both = s + s.T
        variance = 2 * (s**2).sum() if broken else (both[np.triu_indices(8, 1)] ** 2).sum()
        worst = max(worst, abs(np.mean(values) - np.trace(s)), abs(np.var(values) - variance) / variance)
    return Verdict(bool(worst < 1e-9), f"mean and variance agree to {worst:.0e}")


def stein_is_unbiased(broken: bool = False) -> Verdict:
    """E[(y-f)² - σ² + 2σ² f'] = E(f-f*)² for smooth non-linear f and Gaussian noise, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    worst = 0.0
    for truth, sigma in product((-1.0, 0.3, 2.0), (0.4, 1.1)):
        y = truth + sigma * nodes
        f, slope = np.tanh(y) + 0.3 * np.sin(y), 1 / np.cosh(y) ** 2 + 0.3 * np.cos(y)
        left = weights @ ((y - f) ** 2 - sigma**2 + (1 if broken else 2) * sigma**2 * slope)
        worst = max(worst, abs(left - weights @ (f - truth) ** 2))
    return Verdict(bool(worst < 1e-7), f"both sides agree to {worst:.0e}")


def _column(name: str, rule: str) -> np.ndarray:
    """Return a rule's excess errors, (runs, 2): training texts, new texts."""
    result = full_result(CHAPTER)
    return result.arrays[f"{name}_excess"][:, result.values["rules"].index(rule)]


def average_describes(broken: bool = False) -> Verdict:
    """Stored runs: growth of the trace, and distance of the residual from the averaged and the fixed kernel's."""
    arrays = full_result(CHAPTER).arrays
    trace, gap = arrays["minilm_sgd_trace"], arrays["minilm_sgd_averaged_gap"][:, :, -2:]
    growth = (trace[:, -1] / trace[:, 0]).min()
    share = (gap[:, 0] / gap[:, 1]).max()
    holds = growth > 6 and share < (0.1 if broken else 1)
    return Verdict(bool(holds), f"trace at least {growth:.1f} times, averaged gap at most {share:.2f} of the fixed one")


def twin_wins(broken: bool = False) -> Verdict:
    """Stored runs: medians of all rules, and paired differences from the twin with bootstrap intervals."""
    rng = np.random.default_rng(0)
    holds, told = True, []
    for name, rivals in (
        ("minilm_sgd", ("discrepancy", "holdout", "three_epochs", "radius", "clock", "drift_aware")),
        ("minilm_adamw", ("discrepancy", "three_epochs", "clock")),
    ):
        twin = _column(name, "end" if broken else "twin")
        inside, test = np.median(twin, axis=0)
        holds &= inside < 0.10 and test < 0.03
        for rival in rivals:
            holds &= inside < np.median(_column(name, rival)[:, 0])
            if rival in ("discrepancy", "holdout", "three_epochs"):
                gap = _column(name, rival) - twin
                picks = rng.integers(0, len(gap), (4000, len(gap)))
                holds &= gap.mean(0).min() > 0 and np.quantile(gap[picks, 0].mean(1), 0.025) > 0
        told.append(f"{name}: {100 * inside:.1f} % and {100 * test:.1f} %")
    return Verdict(bool(holds), "; ".join(told))


def drift_is_not_enough(broken: bool = False) -> Verdict:
    """Stored runs: stops and medians of the rules that know the drift against those of the fixed kernel."""
    result = full_result(CHAPTER)
    order = result.values["rules"]
    at, excess = (np.median(result.arrays[f"minilm_sgd_{key}"], axis=0) for key in ("at", "excess"))
    base = order.index("twin" if broken else "radius")
    aware = [order.index(rule) for rule in ("clock", "drift_aware", "drift_scaled")]
    holds = all(at[k] < at[base] and (excess[k] > excess[base]).all() for k in aware) and excess[base, 0] > 0.1
    return Verdict(bool(holds), f"fixed kernel {excess[base]}, drift-aware {excess[aware[1]]}")


def two_classes(broken: bool = False) -> Verdict:
    """Stored runs: growth of λ_1, training losses from look to look, and test losses of network and fixed kernel."""
    result = full_result(CHAPTER)
    data, names = result.arrays, result.values["classes_runs"]
    small, large = ([k for k, name in enumerate(names) if f"-{share}-" in name] for share in (0.025, 0.1))
    growth = data["classes_lambda_1"].max(1) / data["classes_lambda_1"][:, 0]
    rise = np.diff(data["classes_real_train_loss"], axis=1).max(1)
    real, kernel = data["classes_real_loss"][small], data["classes_kernel_loss"][small]
    holds = len(small) > 1 and len(large) > 1 and growth.min() >= (1e4 if broken else 50)
    holds &= rise[small].max() <= 0.01 and rise[large].min() > 0.2
    holds &= bool((real.min(1) < kernel.min(1)).all() and (real[:, -1] > real.min(1)).all())
    told = f"λ_1 grows {growth.min():.0f} to {growth.max():.0f} times, jumps of {rise[large].min():.2f} nats"
    return Verdict(bool(holds), told)


CLAIMS = (
    Claim(
        "lem-lt-clock",
        CHAPTER,
        "The residual clock shows the kernel time of training at any speed, exactly.",
        "numeric",
        clock_reads_speed,
    ),
    Claim(
        "thm-lt-averaged",
        CHAPTER,
        "A moving kernel acts by its average, up to half the integral of the norm of its commutator with what has passed.",
        "numeric",
        moving_kernel,
    ),
    Claim(
        "cor-lt-drift",
        CHAPTER,
        "Where the kernels commute, the drift-aware stop has an expected error below (1/2e + 1/4e²) R²ε̂² of the averaged kernel.",
        "numeric",
        drift_aware_guarantee,
    ),
    Claim(
        "prop-lt-scale",
        CHAPTER,
        "A kernel c times as large stops between 1/√c and 1 times as late at the same R, and at 1/c with R/√c.",
        "numeric",
        scaled_kernel,
    ),
    Claim(
        "prop-lt-twin",
        CHAPTER,
        "For linear training the twin's estimate has mean tr S and variance Σ(S_ij + S_ji)² over pairs.",
        "numeric",
        twin_moments,
    ),
    Claim(
        "prop-lt-stein",
        CHAPTER,
        "Residual - σ² + 2σ² tr J/n is an unbiased estimate of the risk of any smooth training under Gaussian noise.",
        "numeric",
        stein_is_unbiased,
    ),
    Claim(
        "obs-lt-average",
        CHAPTER,
        "MiniLM's kernel grows at least sixfold, and its average describes the residual better than the kernel before training.",
        "stored",
        average_describes,
    ),
    Claim(
        "obs-lt-twin",
        CHAPTER,
        "On MiniLM the twin's median excess is the least, below 10 % on training and 3 % on new texts, with SGD and AdamW.",
        "stored",
        twin_wins,
    ),
    Claim(
        "obs-lt-drift",
        CHAPTER,
        "On MiniLM the clock and the drift-aware rules stop earlier than the fixed kernel's rule, and cost more.",
        "stored",
        drift_is_not_enough,
    ),
    Claim(
        "obs-lt-classes",
        CHAPTER,
        "Two classes: λ_1 grows fiftyfold at some look; small steps fall, turn, beat the fixed kernel; large ones jump.",
        "stored",
        two_classes,
    ),
)
