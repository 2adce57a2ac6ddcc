"""Checks of the chapter "Pretrained beginnings" on training: path, gap, guarantee, and the short path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkft import heads, stability
from ntkft.checks import Claim, Verdict
from ntkft.descent import Descent, descend
from ntkft.spectrum import Spectrum
from ntkft.stopping import rademacher_rule

KAPPA = 0.2  # curvature of the quadratic heads a(x; φ) = ⟨φ, x⟩ + κ/2 ⟨φ, x⟩², whose constants are known on any ball


@dataclass(frozen=True)
class _Run:
    """A trained model of quadratic heads, and what the theorems speak of."""

    path: Descent
    truth: np.ndarray
    fitted: np.ndarray
    distances: np.ndarray
    losses: np.ndarray
    L1: float
    beta: float
    L0: float
    eta: float
    radius: float
    sigma: float


def _quadratic_run(
    count: int, seed: int, *, sigma: float = 0.3, flow: bool = True, steps: int = 100, eta: float | None = None
) -> _Run:
    """Train to the predicted stop from weights that follow a pattern (no randomness), labels with Gaussian noise."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    x = np.stack([np.cos(angle), np.sin(angle)], 1)  # (n, 2)
    h = np.arange(count)
    theta0 = 0.5 * np.stack([np.sin(h), np.cos(2 * h)], 1)  # (H, 2), a regular pattern: nothing is random

    def value(theta: np.ndarray) -> np.ndarray:
        p = theta @ x.T  # (H, n)
        return (p + KAPPA / 2 * p**2).sum(0) / np.sqrt(count)

    def rows(theta: np.ndarray) -> np.ndarray:
        p = theta @ x.T
        return ((1 + KAPPA * p)[:, :, None] * x[None]).transpose(1, 0, 2).reshape(12, -1) / np.sqrt(count)

    phi, f0 = rows(theta0), value(theta0)
    delta = rng.standard_normal(phi.shape[1]) @ phi.T @ phi
    truth = f0 + phi @ (delta / np.linalg.norm(delta))  # a target of norm at most 1
    y = truth + sigma * rng.standard_normal(12)
    path = descend(phi @ phi.T, y, f0)
    stop = rademacher_rule(path.spectrum, sigma)
    eta = stop.eta if eta is None else eta

    def slope(theta: np.ndarray) -> np.ndarray:
        return (rows(theta).T @ (value(theta) - y) / 12).reshape(theta.shape)

    # Nothing in the integrator asks for torch: arrays do.
    visited: list[Any] = heads.descend_heads(theta0, slope, eta / steps, steps, flow=flow)  # type: ignore[arg-type]
    distances = np.array([np.linalg.norm(theta - theta0) for theta in visited])
    reach = float(np.linalg.norm(theta0, axis=1).max() + distances.max())  # every visited head is in this ball
    losses = np.array([0.5 * ((value(theta) - y) ** 2).mean() for theta in visited])
    return _Run(
        path, truth, value(visited[-1]), distances, losses, 1 + KAPPA * reach,
        stability.head_curvature(KAPPA, count), float(losses[0]), eta, stop.info["radius"], sigma,
    )  # fmt: skip


def _gap(run: _Run) -> float:
    return float(np.sqrt(((run.fitted - run.path.fitted(run.eta)) ** 2).mean()))


def travel_bound(broken: bool = False) -> Verdict:
    """R_t ≤ √(t(L0-L_t)) for flow and √(2t(L0-L_t)) for safe descent, at every visited weight; broken: half of it."""
    worst = {}
    for flow in (True, False):
        ratios = []
        for seed in range(3):
            run = _quadratic_run(16, seed, flow=flow)
            step = run.eta / 100
            safe = flow or step <= stability.safe_step(run.L1, run.beta, run.L0)
            falls = bool((np.diff(run.losses) <= 1e-15).all())
            for t in range(1, 101):
                bound = stability.travel(t * step, run.L0, run.losses[t], descent=not flow) / (2 if broken else 1)
                ratios.append(run.distances[t] / bound if safe and falls else np.inf)
        worst[flow] = max(ratios)
    return Verdict(
        bool(max(worst.values()) <= 1 + 1e-6),
        f"flow reaches {worst[True]:.4f} of its bound, descent {worst[False]:.3f} of its own",
    )


def gap_bound(broken: bool = False) -> Verdict:
    """Network against tangent for flow and descent; broken: the tangent at another start's kernel."""
    ratios = []
    for flow in (True, False):
        for count in (16, 256):
            run = _quadratic_run(count, 0, flow=flow, steps=200)
            step = None if flow else run.eta / 200
            bound = stability.dynamics_gap(run.L1, run.beta, run.L0, run.eta, step_size=step)
            path = run.path
            if broken:  # the same eigenvectors at twice the speed
                path = Descent(2 * path.eigenvalues, path.vectors, path.y, path.f0)
            elif not flow:
                path = Descent(path.eigenvalues, path.vectors, path.y, path.f0, step)
            ratios.append(float(np.sqrt(((run.fitted - path.fitted(run.eta)) ** 2).mean())) / bound)
    return Verdict(bool(max(ratios) <= 1), f"the gap reaches {max(ratios):.3f} of its bound")


def guarantee(broken: bool = False) -> Verdict:
    """Enough heads by the theorem's count: the error's bound fails in at most a share exp(-x) of draws; broken: a tenth of it."""
    x, fails, runs, tightest, count = 1.0, 0, 0, 0.0, 64
    for seed in range(20):
        run = _quadratic_run(count, seed)
        needed = stability.heads_needed(run.L1, KAPPA, run.L0, run.radius)
        if needed > count:
            continue
        runs += 1
        bound = (1 + 2 / np.e + 2 / np.e**2) * run.radius**2 + 12 * run.sigma**2 * x / 12
        error = float(((run.fitted - run.truth) ** 2).mean())
        fails += error > (bound / 20 if broken else bound)
        tightest = max(tightest, error / bound)
    return Verdict(
        bool(runs >= 10 and fails / runs <= np.exp(-x)),
        f"{runs} of 20 draws satisfy the condition ({count} heads); {fails} beyond the bound, the largest {tightest:.2f} of it",
    )


def tangent_stays_close(broken: bool = False) -> Verdict:
    """E‖θ_lin - θ0‖² ≤ R² + σ²η²R̂² ≤ (1+1/4e²)R² up to the stop: exact expectation for the target at the largest distance."""
    worst, holds = 0.0, True
    j = np.arange(1, 61)
    for lam in (j**-1.2, j**-2.0, np.exp(-0.3 * j), np.r_[np.ones(4), np.zeros(56)]):
        spectrum = Spectrum(lam)
        for sigma in (0.05, 0.5):
            stop = rademacher_rule(spectrum, sigma).eta
            for eta in stop * np.array([0.1, 0.5, 1.0, 30.0 if broken else 1.0]):
                share = -np.expm1(-eta * lam)
                inside = lam > 0
                noise = sigma**2 / 60 * (share[inside] ** 2 / lam[inside]).sum()
                exact = float((share[inside] ** 2).max() + noise)  # all of the target on the fastest eigenvector
                middle = 1 + sigma**2 * eta**2 * float(spectrum.rademacher(eta**-0.5)) ** 2
                holds &= exact <= middle + 1e-12 and exact <= 1 + 1 / (4 * np.e**2)
                worst = max(worst, exact)
    return Verdict(bool(holds), f"expected squared travel at most {worst:.4f} R², bound {1 + 1 / (4 * np.e**2):.4f} R²")


def _tangent_travel(run: _Run) -> float:
    z = run.path.vectors.T @ (run.path.y - run.path.f0) / np.sqrt(12)
    return stability.tangent_travel(run.path.eigenvalues, z, run.eta)


def short_path(broken: bool = False) -> Verdict:
    """Where the certificate holds: travel at most twice the tangent's, gap below its bound; broken: half the tangent's travel."""
    ratios, certified = [], 0
    for count in (256, 1024):
        for seed in range(3):
            run = _quadratic_run(count, seed)
            r = _tangent_travel(run)
            certificate, bound = stability.short_path(run.L1, run.beta, run.L0, run.eta, r)
            if certificate < 0.5:
                certified += 1
                ratios += [run.distances.max() / (2 * r) * (4 if broken else 1), _gap(run) / bound]
    return Verdict(
        bool(certified >= 3 and max(ratios) <= 1),
        f"{certified} runs certified; the largest ratio to a bound is {max(ratios):.3f}",
    )


def short_guarantee(broken: bool = False) -> Verdict:
    """With the corollary's heads its conditions hold and the gap's bound is at most Rε̂/√2; broken: a hundredth of the heads."""
    worst = 0.0
    for seed in range(4):
        run = _quadratic_run(64, seed)
        r = _tangent_travel(run)
        needed = int(np.ceil(stability.heads_needed_short(run.L1, KAPPA, run.L0, run.radius, r)))
        beta = stability.head_curvature(KAPPA, max(1, needed // 100) if broken else needed)
        certificate, bound = stability.short_path(run.L1, beta, run.L0, run.eta, r)
        worst = max(worst, certificate / 0.5, bound / (run.radius / np.sqrt(2)))
    return Verdict(bool(worst <= 1 + 1e-9), f"the larger of the two conditions is met to {worst:.3f}")


CHAPTER = "pretrained_ntk"


CLAIMS = (
    Claim(
        "lem-travel",
        CHAPTER,
        "Flow travels at most √(t(L0-L_t)), descent with safe steps at most √(2η(L0-L_t)).",
        "numeric",
        travel_bound,
    ),
    Claim(
        "thm-gap",
        CHAPTER,
        "Network and tangent separate by at most (4√2/3) L1 β L0 t^{3/2} (flow), (8/3) L1 β L0 η^{3/2} + εβL0 (descent).",
        "numeric",
        gap_bound,
    ),
    Claim(
        "thm-guarantee",
        CHAPTER,
        "With H ≥ (64/9) L1²L2²L0² ε̂⁻⁸/R² the stopped network's error is below (1+2/e+2/e²) R²ε̂² + 12σ²x/n.",
        "numeric",
        guarantee,
    ),
    Claim(
        "prop-tangent-travel",
        CHAPTER,
        "Up to the stop the tangent's expected squared travel is at most (1+1/4e²) R².",
        "numeric",
        tangent_stays_close,
    ),
    Claim(
        "thm-short",
        CHAPTER,
        "If βη(L1 r + √(2L0)) ≤ 1/2, flow stays within 2r and within 4√2 L1 β r √L0 η of the tangent.",
        "numeric",
        short_path,
    ),
    Claim(
        "cor-short",
        CHAPTER,
        "The guarantee holds under two conditions on β, with heads of order ε̂⁻⁶.",
        "numeric",
        short_guarantee,
    ),
)
