"""Checks of the chapter "Gradient descent is a filter"."""

from __future__ import annotations

import numpy as np
import sympy as sp

from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import descend


def filter_is_gradient_descent(broken: bool = False) -> Verdict:
    """Gradient descent on the weights, run step by step, against the closed form; on and off the sample."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for p in (4, 12, 40):  # singular, nearly square and over-parametrised
        phi, new = rng.standard_normal((12, p)), rng.standard_normal((5, p))
        y, f0, f0_new = rng.standard_normal(12), rng.standard_normal(12), rng.standard_normal(5)
        step = 1.2 / np.linalg.eigvalsh(phi @ phi.T / 12)[-1]
        closed = descend(phi @ phi.T, y, f0, step_size=None if broken else step)
        theta = np.zeros(p)
        for t in range(1, 61):
            theta -= step * phi.T @ (f0 + phi @ theta - y) / 12
            gaps = (
                closed.fitted(t * step) - (f0 + phi @ theta),
                closed.predict(t * step, new @ phi.T, f0_new) - (f0_new + new @ theta),
            )
            worst = max(worst, *(np.abs(gap).max() for gap in gaps))
    return Verdict(
        bool(worst < 1e-10), f"60 steps, three shapes, on and off the sample: largest gap {worst:.1e}"
    )


def flow_is_close_to_descent(broken: bool = False) -> Verdict:
    """0 <= exp(-ηλ) - (1-ελ)^t <= ελ/2 for 0 <= ελ <= 1, on a fine grid."""
    x = np.linspace(0, 1, 4001)[None, :]  # x = ελ
    t = np.array([1, 2, 3, 5, 10, 30, 100, 1000])[:, None]
    gap = np.exp(-x * t) - (1 - x) ** t
    bound = x / 6 if broken else x / 2
    ratio = float((gap[:, 1:] / (x[:, 1:] / 2)).max())
    holds = bool((gap >= -1e-15).all() and (gap <= bound + 1e-15).all())
    return Verdict(holds, f"largest gap is {ratio:.2f} of the bound ελ/2, over t = 1..1000")


def two_bounds(broken: bool = False) -> Verdict:
    """Check max λ(1-ελ)^{2t} <= 1/(2eη) and filter <= min(1, ηλ); both against the package's filter."""
    lam = np.linspace(0, 1, 501)
    constant = 4 if broken else 2
    tightest, holds = 0.0, True
    for t in (1, 2, 5, 20, 100, 1000):
        path = descend(len(lam) * np.diag(lam), np.zeros(len(lam)), step_size=1.0)
        share = path.filter(float(t))
        peak = float((path.eigenvalues * (1 - share) ** 2).max())
        tightest = max(tightest, peak * 2 * np.e * t)
        holds &= peak <= 1 / (constant * np.e * t) and bool(
            (share <= np.minimum(1, t * path.eigenvalues) + 1e-12).all()
        )
    return Verdict(holds, f"the largest residual weight reaches {tightest:.4f} of 1/(2eη)")


def ridge_twin(broken: bool = False) -> Verdict:
    """Flow's filter is between 1 and 1.2984 times ridge's; descent's between 1 and 2. Constant by sympy, ratio by grid."""
    x = sp.symbols("x", positive=True)
    ratio = (1 - sp.exp(-x)) * (1 + x) / x
    top = sp.nsolve(sp.diff(ratio, x), x, 1.8)
    constant = float(ratio.subs(x, top)) * (0.95 if broken else 1.0)
    grid = np.geomspace(1e-6, 1e6, 200_001)
    flow = -np.expm1(-grid) * (1 + grid) / grid
    lam, worst, least = np.geomspace(1e-6, 1, 2000), 0.0, np.inf
    for t in (1, 3, 10, 100, 1000):
        descent = -np.expm1(t * np.log1p(-lam * (1 - 1e-12))) * (1 + t * lam) / (t * lam)
        worst, least = max(worst, float(descent.max())), min(least, float(descent.min()))
    holds = flow.min() >= 1 - 1e-9 and flow.max() <= constant + 1e-9 and least >= 1 - 1e-9 and worst <= 2
    return Verdict(
        bool(holds),
        f"flow/ridge in [{flow.min():.4f}, {flow.max():.4f}], descent/ridge in [{least:.4f}, {worst:.4f}]",
    )


def norm_of_the_smallest_function(broken: bool = False) -> Verdict:
    """[Σ θ_j²/λ_j]^{1/2} against the least-squares solution of smallest norm, computed without any kernel."""
    rng = np.random.default_rng(1)
    phi = rng.standard_normal((8, 30))
    values = rng.standard_normal(8)
    smallest = np.linalg.norm(np.linalg.lstsq(phi, values, rcond=None)[0])
    claimed = descend(phi @ phi.T, np.zeros(8)).hilbert_norm(values) * (np.sqrt(8) if broken else 1.0)
    gap = abs(claimed / smallest - 1)
    return Verdict(bool(gap < 1e-10), f"relative gap {gap:.1e}")


def minilm_follows_then_leaves(broken: bool = False) -> Verdict:
    """Stored run: the gap is below 10 % of the way after one step and above 20 % at the end, for every head seed."""
    arrays = full_result("kernel_descent").arrays
    first, last = arrays["gap"][:, 0], arrays["gap"][:, -1]  # (heads,)
    ahead = (arrays["residual"][:, 0, -1] < arrays["residual"][:, 1, -1]).all()  # real below closed form
    holds = (first < (0.001 if broken else 0.1)).all() and (last > 0.2).all() and ahead
    return Verdict(
        bool(holds),
        f"first step at most {first.max():.3f}, last step at least {last.min():.2f}, network ahead",
    )


CHAPTER = "kernel_descent"
CLAIMS = (
    Claim(
        "thm-filter",
        CHAPTER,
        "Gradient descent on the linearised model is the spectral filter 1-(1-ελ)^t, on and off the sample.",
        "numeric",
        filter_is_gradient_descent,
    ),
    Claim(
        "lem-flow",
        CHAPTER,
        "Descent and flow differ by at most ελ/2 along an eigenvector with eigenvalue λ.",
        "numeric",
        flow_is_close_to_descent,
    ),
    Claim(
        "lem-two-bounds",
        CHAPTER,
        "λ(1-ελ)^{2t} ≤ 1/(2eη) and 1-(1-ελ)^t ≤ min(1, ηλ).",
        "numeric",
        two_bounds,
    ),
    Claim(
        "prop-ridge",
        CHAPTER,
        "Flow fits between 1 and 1.2984 times as much as ridge with ν = 1/η; descent between 1 and 2.",
        "numeric",
        ridge_twin,
    ),
    Claim(
        "prop-norm",
        CHAPTER,
        "The smallest function through given values has squared norm Σ θ_j²/λ_j.",
        "numeric",
        norm_of_the_smallest_function,
    ),
    Claim(
        "obs-first-steps",
        CHAPTER,
        "MiniLM's first full-batch steps follow the filter to a few per cent; after twenty steps it has run ahead.",
        "stored",
        minilm_follows_then_leaves,
    ),
)
