"""Checks of the chapter "Adversaries" on adversaries that stop, and on the encoder that they train."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import chebyshev
from scipy import linalg, stats

from ntkft.checks import Verdict
from ntkft.checks.adversaries import as_tensor, numeric_claim
from ntkft.descent import descend
from ntkft.infomin.blindness import blindness, filter_shares, noise_spread, score
from ntkft.infomin.cca import canonical
from ntkft.infomin.chisquare import critical_value, upper_tail


def density_of_weighted_squares(broken: bool = False) -> Verdict:
    """Bounds of the lemma against the steepest slope of the exact tail, with and without shifts; two weights by an integral."""
    ratios = []
    for w in (np.r_[1.0, 0.7], np.r_[1.0, 0.2, 0.1, 0.05], np.ones(4), np.linspace(1, 0.1, 15)):
        bound = (
            1 / (2 * np.sqrt((w**2).sum()))
            if 4 * w[0] ** 2 <= (w**2).sum()
            else 1 / (2 * np.sqrt(w[0] * w[1]))
        )
        bound /= 3 if broken else 1
        for shift in (0.0, 1.5):
            if len(w) == 2:  # the tail converges slowly; the density by the angle's integral
                angle = np.linspace(0, 2 * np.pi, 2001)[:-1]
                x = np.linspace(1e-6, 4, 200)[:, None]
                y = (
                    np.sqrt(x) * np.cos(angle) / np.sqrt(w[0]) - shift,
                    np.sqrt(x) * np.sin(angle) / np.sqrt(w[1]),
                )
                density = (stats.norm.pdf(y[0]) * stats.norm.pdf(y[1])).mean(1) * np.pi / np.sqrt(w.prod())
                steepest = density.max()
            else:
                grid = np.linspace(0.02, 2.5 * w.sum(), 16)
                tail = np.array([upper_tail(point, w, np.r_[shift, np.zeros(len(w) - 1)]) for point in grid])
                steepest = (-np.diff(tail) / np.diff(grid)).max()
            ratios.append(steepest / bound)
    return Verdict(
        bool(max(ratios) <= 1 + 1e-9),
        f"steepest slope between {min(ratios):.2f} and {max(ratios):.2f} of the bound",
    )


def law_of_the_score(broken: bool = False) -> Verdict:
    """Moments by traces of the smoother that descent itself builds, step by step; the tail by simulation."""
    rng = np.random.default_rng(5)
    n, sigma, step, steps = 20, 0.7, 0.9, 6
    phi = rng.standard_normal((n, n)) * np.arange(1, n + 1) ** -0.8
    kernel = phi @ phi.T
    kernel *= n / np.linalg.eigvalsh(kernel)[-1]  # λ₁ = 1
    values, vectors = np.linalg.eigh(kernel / n)
    mean_t = 0.4 * rng.standard_normal(n)
    smoother = np.zeros((n, n))  # h after k steps is smoother @ t
    for _ in range(steps):
        smoother += step * kernel / n @ (np.eye(n) - smoother)
    s = filter_shares(values, (2 if broken else 1) * step * steps, step)
    a2 = (vectors.T @ mean_t) ** 2 / n
    ours = (
        (s * (sigma**2 / n + a2)).sum(),
        2 * sigma**4 / n**2 * (s**2).sum() + 4 * sigma**2 / n * (s**2 * a2).sum(),
    )
    theirs = (
        sigma**2 * np.trace(smoother) / n + mean_t @ smoother @ mean_t / n,
        2 * sigma**4 * np.trace(smoother @ smoother) / n**2
        + 4 * sigma**2 * mean_t @ smoother @ smoother @ mean_t / n**2,
    )
    gap = max(abs(x / y - 1) for x, y in zip(ours, theirs, strict=True))
    t = mean_t + sigma * rng.standard_normal((40_000, n))
    q = np.einsum("ri,ij,rj->r", t, smoother, t) / n
    x = float(np.quantile(q, 0.8))
    tail = upper_tail(x * n / sigma**2, s, np.sqrt(a2 * n) / sigma)
    agree = abs(score(descend(kernel, t[0], step_size=step), step * steps).item() - q[0])
    holds = gap < 1e-10 and abs(tail - 0.2) < 4 * np.sqrt(0.16 / 40_000) and agree < 1e-12
    return Verdict(bool(holds), f"moments agree to {gap:.0e}; tail {tail:.4f} where the simulation has 0.2")


def an_early_adversary_is_blind(broken: bool = False) -> Verdict:
    """Exact power against the bound, for one and several directions; simulated power against the exact curve at three times."""
    rng = np.random.default_rng(6)
    n, sigma, alpha = 40, 1.0, 0.05
    lam = np.arange(1, n + 1) ** -1.2
    worst, inside = 0.0, []
    for eta in (1.0, 5.0, 40.0):
        s = filter_shares(lam, eta)
        c = critical_value(alpha, s)
        spread = noise_spread(s)
        for leak in (np.eye(n)[0], np.eye(n)[12], np.eye(n)[-1], rng.random(n) / n):
            a2 = leak * sigma**2 / n * 3
            power = upper_tail(c, s, np.sqrt(n * a2) / sigma)
            bound = n / (2 * sigma**2) * (s * a2 / spread).sum() / (6 if broken else 1)
            worst = max(worst, (power - alpha) / bound)
        a = np.zeros(n)
        a[12] = 3 * sigma / np.sqrt(n)
        coefficients = a + sigma / np.sqrt(n) * rng.standard_normal((8000, n))
        alarms = (coefficients**2 @ s > c * sigma**2 / n).mean()
        predicted = upper_tail(c, filter_shares(lam, eta * (3 if broken else 1)), np.sqrt(n) * a / sigma)
        inside.append(abs(alarms - predicted) / np.sqrt(predicted * (1 - predicted) / 8000))
    return Verdict(
        bool(worst <= 1 and max(inside) < 3.5),
        f"power above the false alarms at most {worst:.2f} of the bound; simulation within {max(inside):.1f} standard errors",
    )


def the_tail_is_not_seen(broken: bool = False) -> Verdict:
    """Leaks as large as 2γσ²N/(nηλ) in the tail: the exact power rises by at most γ, and the leak is large where λ is small."""
    n, sigma, alpha, gamma, rises, sizes = 60, 1.0, 0.05, 0.2, [], []
    lam = np.arange(1, n + 1) ** -2.0
    for eta in (2.0, 20.0):
        s = filter_shares(lam, eta)
        c, spread = critical_value(alpha, s), noise_spread(s)
        for j in (20, 40, 59):
            a2 = gamma * 2 * sigma**2 * spread[j] / (n * eta * lam[j]) * (10 if broken else 1)
            shift = np.zeros(n)
            shift[j] = np.sqrt(n * a2) / sigma
            rises.append(upper_tail(c, s, shift) - alpha)
            sizes.append(a2)
    return Verdict(
        bool(max(rises) <= gamma),
        f"power rises by at most {max(rises):.3f}, γ = {gamma}; leaks up to {max(sizes):.0f} σ²",
    )


def a_large_leak_is_seen(broken: bool = False) -> Verdict:
    """At the leak that the condition names, with the threshold of Cantelli's inequality: exact level and exact power."""
    n, sigma, alpha, miss = 40, 0.8, 0.1, 0.2
    lam = np.arange(1, n + 1) ** -1.0
    levels, powers = [], []
    for eta in (1.0, 10.0):
        sight = blindness(lam, eta, sigma, alpha=alpha, power=1 - miss)
        c = (sight.null_mean + np.sqrt((1 - alpha) / alpha) * sight.null_sd) * n / sigma**2
        levels.append(upper_tail(c, sight.shares))
        for j in (0, 10, 39):
            shift = np.zeros(n)
            shift[j] = np.sqrt(n * sight.detected[j] / (6 if broken else 1)) / sigma
            powers.append(upper_tail(c, sight.shares, shift))
    holds = max(levels) <= alpha and min(powers) >= 1 - miss
    return Verdict(
        bool(holds),
        f"level at most {max(levels):.3f} (asked {alpha}), power at least {min(powers):.3f} ({1 - miss})",
    )


def best_time_for_each_direction(broken: bool = False) -> Verdict:
    """Signal to noise of each direction over time by finite differences: the sign falls where the formula says, ends monotone."""
    lam = np.arange(1, 31) ** -1.3
    eta = np.geomspace(0.05, 3000, 200)
    s = -np.expm1(-eta[:, None] * lam)
    ratio = s / np.sqrt((s**2).sum(1, keepdims=True))
    slopes = np.diff(np.log(ratio), axis=0)
    middle = np.sqrt(eta[1:] * eta[:-1])[:, None]
    with np.errstate(over="ignore"):
        g = lam / np.expm1(middle * lam)
    s_mid = -np.expm1(-middle * lam)
    formula = g - (s_mid**2 * (g if not broken else g[:, :1])).sum(1, keepdims=True) / (s_mid**2).sum(
        1, keepdims=True
    )
    clear = np.abs(slopes) > 1e-6 * np.abs(slopes).max()
    wrong = int((np.sign(slopes) != np.sign(formula))[clear & (np.abs(formula * middle) > 1e-2)].sum())
    ends = (slopes[:, 0] <= 1e-12).all() and (slopes[:, -1] >= -1e-12).all()
    limits = (
        abs(ratio[-1, 0] * np.sqrt(30) - 1) < 1e-2
        and abs(ratio[0, 3] / (lam[3] / np.linalg.norm(lam)) - 1) < 0.05
    )
    return Verdict(
        bool(wrong == 0 and ends and limits), f"{wrong} of {int(clear.sum())} signs differ from the formula"
    )


def what_the_encoder_keeps(broken: bool = False) -> Verdict:
    """Amplitudes by gradient descent on the encoder's loss against the formula; and a linear kernel with one quiet coordinate."""
    rng = np.random.default_rng(7)
    n, beta = 12, 30.0
    lam = np.arange(1, n + 1) ** -2.0
    b, worth = rng.random(n) + 0.5, rng.random(n) + 0.5
    vectors = np.linalg.qr(rng.standard_normal((n, n)))[0]
    smoother = np.eye(n) - linalg.expm(-2.0 * (vectors * lam) @ vectors.T)
    a = b.copy()
    for _ in range(4000):
        target = np.sqrt(n) * vectors @ a
        slope = (
            2 * vectors.T @ smoother @ target / np.sqrt(n)
        )  # of ⟨m, S m⟩_n, the part of E Q that depends on a
        a -= 0.01 * (2 * worth * (a - b) + beta * slope)
    s = filter_shares(lam, 4.0 if broken else 2.0)
    gap = np.abs(a - b / (1 + beta * s / worth)).max()
    tail = beta * 2.0 * lam <= worth
    loudest = 0.0
    kept = float((a**2 / b**2)[tail].min()) if tail.any() else np.nan
    # Part 3: divide the leaking coordinate by c; the score of real descent on z zᵀ falls below its bound, the leak stays.
    z = np.sqrt(n) * vectors[:, :4]
    for c in (1.0, 10.0, 100.0):
        quiet = z / np.array([1, 1, 1, c])
        path = descend(quiet @ quiet.T, 0.8 * z[:, 3])
        shrunk = score(path, 0.5).item() / (0.5 * 0.64 / c**2)
        loudest = max(loudest, shrunk)
    return Verdict(
        bool(gap < 1e-8 and kept >= 0.25 and loudest <= 1),
        f"largest gap {gap:.0e}; in the tail at least {kept:.2f} of the power is kept",
    )


def features_are_a_filter(broken: bool = False) -> Verdict:
    """Exact quadrature on the circle: T = cos mΦ against powers of cos Φ below m and at m; and the projection formula."""
    nodes = (np.arange(64) + 0.5) * np.pi / 64  # exact for trigonometric polynomials below degree 128
    u = np.cos(nodes)
    blind: list[float] = []
    seen: list[float] = []
    for m in (2, 3, 5):
        t = np.cos(m * nodes)
        on_t = as_tensor(np.stack([t**k for k in range(1, 4)], 1))
        for degree in (m - 1 + broken, m):
            on_u = as_tensor(np.stack([u**k for k in range(1, degree + 1)], 1))
            (blind if degree < m or broken else seen).append(
                float(canonical(on_u, on_t, 1e-10).correlations[0])
            )
    tau = np.exp(u) + np.sin(5 * u)
    tau = (tau - tau.mean()) / tau.std()
    coefficients = chebyshev.chebfit(u, tau, 63)
    norm = np.sqrt((coefficients[1:4] ** 2).sum() / 2)  # cos kΦ has mean square 1/2
    cube = float(canonical(as_tensor(np.stack([u, u**2, u**3], 1)), as_tensor(tau[:, None]), 0.0).correlations[0])
    # A ridge on one side: weights μ/(μ+κ) on the squared correlations with the principal components.
    kappa, design = 0.1, np.stack([u, u**2, u**3], 1)
    mu, axes = np.linalg.eigh(np.cov(design.T, bias=True))
    parts = (design - design.mean(0)) @ axes
    shares = ((parts * tau[:, None]).mean(0) ** 2 / mu) * mu / (mu + kappa)
    inverse = np.linalg.inv(np.cov(design.T, bias=True) + kappa * np.eye(3))
    covariance = ((design - design.mean(0)) * tau[:, None]).mean(0)
    ridge = abs(shares.sum() - covariance @ inverse @ covariance)
    holds = (
        ridge < 1e-12 and max(blind) < 1e-6 and min(seen, default=1.0) > 1 - 1e-6 and abs(cube - norm) < 1e-8
    )
    return Verdict(
        bool(holds),
        f"degree below m: {max(blind):.0e}; at m: {min(seen, default=1.0):.6f}; projection gap {abs(cube - norm):.0e}",
    )


CLAIMS = (
    numeric_claim(
        "thm-av-score",
        "The adversary's score is a weighted sum of non-central chi-squares with the filter's shares as "
        "weights.",
        law_of_the_score,
    ),
    numeric_claim(
        "lem-av-density",
        "A weighted sum of squared normals has density at most 1/(2√(w₁w₂)), and 1/(2‖w‖) if no weight "
        "dominates.",
        density_of_weighted_squares,
    ),
    numeric_claim(
        "thm-av-blind",
        "A leak raises the power of the score above the false alarms by at most n/(2σ²) Σ s_j a_j²/N_j.",
        an_early_adversary_is_blind,
    ),
    numeric_claim(
        "cor-av-tail",
        "In the tail leaks up to 2γσ²N_j/(nηλ_j) raise the power by at most γ.",
        the_tail_is_not_seen,
    ),
    numeric_claim(
        "thm-av-seen",
        "A leak with s_j a_j² above (x_α+y_δ) standard deviations of the score, as stated, is detected.",
        a_large_leak_is_seen,
    ),
    numeric_claim(
        "prop-av-clock",
        "The sight along the top eigenvector only falls with time, along the last only rises, and in "
        "between a threshold in λ divides them.",
        best_time_for_each_direction,
    ),
    numeric_claim(
        "prop-av-encoder",
        "Against an adversary stopped at η the encoder keeps the share (1+βs_j/g_j)^{-2} of the leak "
        "along u_j.",
        what_the_encoder_keeps,
    ),
    numeric_claim(
        "prop-av-degree",
        "Polynomial features pass the part of the conditional mean in their span and nothing else: cos "
        "mΦ is invisible to powers of cos Φ below m.",
        features_are_a_filter,
    ),
)
