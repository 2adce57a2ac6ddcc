"""Checks of the chapter "Many tasks, one model" on what sharing a kernel buys: complexity, norm, guarantee."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from ntkft import interference, stopping
from ntkft.checks import Claim, Verdict
from ntkft.checks.many_tasks import joint_tasks, task_rows
from ntkft.multitask import Joint
from ntkft.spectrum import Spectrum

CHAPTER = "many_tasks"
E = np.e


def peierls(broken: bool = False) -> Verdict:
    """Σφ(λ_i) <= Σφ(u_i'Au_i) for concave φ, random matrices and bases; a convex φ turns it around."""
    functions: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda x: np.minimum(x, 1.0),
        lambda x: x / (1 + x),
        lambda x: -np.expm1(-x),
        np.sqrt,
    )
    least = np.inf
    if broken:
        functions = (np.square,)
    for seed, phi in product(range(10), functions):
        rng = np.random.default_rng(seed)
        m = rng.standard_normal((7, 5))
        basis = np.linalg.qr(rng.standard_normal((7, 7)))[0]
        lam = np.clip(np.linalg.eigvalsh(m @ m.T / 5), 0, None)
        seen = np.einsum("ji,jk,ki->i", basis, m @ m.T / 5, basis)
        least = min(least, float(phi(seen).sum() - phi(lam).sum()))
    return Verdict(bool(least >= -1e-6), f"the right side is larger by at least {least:.2g}")


def sharing(broken: bool = False) -> Verdict:
    """Active dimension and critical radius of the joint kernel against those of the blocks; a convex count fails."""
    holds, largest = True, 0.0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        sizes = tuple(int(k) for k in rng.integers(2, 9, 3))
        phi = (rng.standard_normal((sum(sizes), 12)) + rng.uniform(0, 2)) * np.arange(1, 13) ** -0.7
        joint = Joint(joint_tasks(phi, np.ones(sum(sizes)), sizes, 1.0))
        together, apart = joint.spectrum.eigenvalues, joint.separate_spectrum.eigenvalues
        for eta in np.geomspace(0.01, 1e4, 25):
            count = [np.minimum(eta * lam, 1) for lam in (together, apart)]
            left, right = (
                ((eta * lam) ** 2).sum() if broken else c.sum()
                for c, lam in zip(count, (together, apart), strict=True)
            )
            holds &= left <= right * (1 + 1e-9)
        smooth = [(lam / (1 + lam)).sum() for lam in (together, apart)]
        holds &= smooth[0] < smooth[1]  # strictly concave, and the tasks do share
        for sigma in (0.05, 1.0):
            radii = [Spectrum(lam).critical_radius(sigma) for lam in (together, apart)]
            holds &= radii[0] <= radii[1] * (1 + 1e-9)
            largest = max(largest, radii[1] / radii[0])
    return Verdict(bool(holds), f"separate radii are up to {largest:.2f} times the joint one")


def joint_guarantee(broken: bool = False) -> Verdict:
    """The exact mean over tasks of the risk, with unequal tasks, against (1/2e + 1/4e²)R²ε̂²; two hundred stops fail."""
    worst, sigma = 0.0, 0.5
    for seed, sizes in product(range(6), ((12, 12), (5, 9, 16))):
        rng = np.random.default_rng(seed)
        n, tasks = sum(sizes), len(sizes)
        phi = (rng.standard_normal((n, 40)) + 0.3) * np.arange(1, 41) ** -0.6
        goal = rng.standard_normal(40)
        goal /= np.linalg.norm(goal)
        joint = Joint(joint_tasks(phi, np.zeros(n), sizes, 1.0))
        level = sigma * np.sqrt(n / (tasks * min(sizes)))  # so that σ²/n becomes σ²/(M min n)
        stop = stopping.rademacher_rule(joint.spectrum, level).eta
        scaled = phi / np.sqrt(tasks * np.repeat(sizes, sizes))[:, None]
        lam, u = np.linalg.eigh(scaled @ scaled.T)
        share = 1 - np.exp(-(200 if broken else 1) * stop * lam)
        smooth = (u * share) @ u.T
        bias = ((scaled @ goal - smooth @ (scaled @ goal)) ** 2).sum()
        noise = sigma**2 * (smooth**2 / (tasks * np.repeat(sizes, sizes))).sum()
        worst = max(worst, (bias + noise) * stop / (1 / (2 * E) + 1 / (4 * E**2)))
    return Verdict(bool(worst <= 1), f"the risk reaches {worst:.2f} of the bound")


def shared_norm(broken: bool = False) -> Verdict:
    """R² of one function for all tasks between ΣR_a²/(1±(M-1)c); a quarter of the cosine is too small for it."""
    holds, ranges = True, []
    for seed, common in product(range(12), (0.05, 0.2, 0.35)):
        rng = np.random.default_rng(seed)
        tasks, size = int(rng.integers(2, 4)), 3
        spans = [np.linalg.qr(rng.standard_normal((60, size)))[0] for _ in range(tasks)]
        shared = np.linalg.qr(rng.standard_normal((60, size)))[0]
        phi = np.concatenate([((1 - common) * s + common**0.5 * shared).T for s in spans])
        rows = task_rows((size,) * tasks)
        vectors = joint_tasks(phi, np.ones(size * tasks), (size,) * tasks, 1.0)
        pairs = [(a, b) for a in range(tasks) for b in range(a)]
        c = max(interference.principal_cosine(vectors, a, b) for a, b in pairs) / (4 if broken else 1)
        k = phi @ phi.T
        for g in (rng.standard_normal(len(k)), np.linalg.eigh(k)[1][:, 0], np.linalg.eigh(k)[1][:, -1]):
            whole = g @ np.linalg.solve(k, g)
            parts = [g[r] @ np.linalg.solve(k[np.ix_(r, r)], g[r]) for r in rows]
            total, wide = sum(parts), (tasks - 1) * c
            holds &= whole >= max(parts) * (1 - 1e-9) and whole >= total / (1 + wide) * (1 - 1e-9)
            holds &= wide >= 1 or whole <= total / (1 - wide) * (1 + 1e-9)
            ranges.append(whole / total)
    return Verdict(bool(holds), f"R² is {min(ranges):.2f} to {max(ranges):.2f} of the sum over tasks")


def gain(broken: bool = False) -> Verdict:
    """R²ε̂² = (4e²σ²/n)Σmin(η̂λ, 1), not falling in R; the joint guarantee is below the blocks' if R² <= ΣR_a²."""
    worst, holds = 0.0, True
    for seed in range(10):
        rng = np.random.default_rng(seed)
        phi = (rng.standard_normal((15, 9)) + 1) * np.arange(1, 10) ** -0.7
        joint = Joint(joint_tasks(phi, np.ones(15), (5, 5, 5), 1.0))
        together, apart, sigma, last = joint.spectrum, joint.separate_spectrum, 0.3, 0.0
        for norm in (0.1, 0.5, 1.0, 4.0):
            radius2 = together.critical_radius(sigma, norm) ** 2
            active = np.minimum(together.eigenvalues / radius2, 1).sum()
            value = norm**2 * radius2
            worst = max(worst, abs(value / ((2 if broken else 4) * E**2 * sigma**2 / 15 * active) - 1))
            holds &= value >= last * (1 - 1e-9) and value <= norm**2 * apart.critical_radius(
                sigma, norm
            ) ** 2 * (1 + 1e-9)
            last = value
    return Verdict(bool(holds and worst < 1e-9), f"identity to {worst:.0e}")


CLAIMS = (
    Claim(
        "lem-mt-peierls",
        CHAPTER,
        "For concave φ the sum of φ over the eigenvalues is at most that over the diagonal in any orthonormal basis.",
        "numeric",
        peierls,
    ),
    Claim(
        "thm-mt-sharing",
        CHAPTER,
        "Sharing never raises the active dimension nor the critical radius, at the same norm.",
        "numeric",
        sharing,
    ),
    Claim(
        "thm-mt-joint",
        CHAPTER,
        "Joint training stopped in time has a mean risk over tasks below (1/2e + 1/4e²)R²ε̂² of the joint kernel.",
        "numeric",
        joint_guarantee,
    ),
    Claim(
        "prop-mt-norm",
        CHAPTER,
        "One function for all tasks has R² between ΣR_a²/(1+(M-1)c) and ΣR_a²/(1-(M-1)c).",
        "numeric",
        shared_norm,
    ),
    Claim(
        "cor-mt-gain",
        CHAPTER,
        "If R² is at most ΣR_a², the joint guarantee is at most that of tasks that share nothing.",
        "numeric",
        gain,
    ),
)
