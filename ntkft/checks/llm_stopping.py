"""Checks of the chapter "Stopping language models": the rules on stored kernels, and the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import expit

from ntkft import stopping
from ntkft.checks import Claim, Verdict
from ntkft.descent import descend
from ntkft.logistic import logistic_path
from ntkft.spectrum import Spectrum

E = np.e


def _spectra() -> Iterator[np.ndarray]:
    """Eigenvalues of many kinds: power laws, exponential, finite rank, flat, one dominant mode."""
    j = np.arange(1, 101)
    yield from (j**-0.7, j**-1.5, j**-4.0, np.exp(-0.2 * j), np.where(j <= 5, 1.0, 0.0), np.full(100, 0.01))
    yield np.where(j == 1, 50.0, 0.1 / j)


def better_raters(broken: bool = False) -> Verdict:
    """σ² -> σ²/m moves η̂ by a factor between √m and m, with slope 1/(1+s); the rule is solved by bisection."""
    holds, low, high, worst = True, np.inf, 0.0, 0.0
    for lam in _spectra():
        for sigma in np.geomspace(0.01, 10, 13):
            first = stopping.rademacher_rule(Spectrum(lam), sigma).eta
            for m in (2.0, 10.0):
                power = np.log(stopping.rademacher_rule(Spectrum(lam), sigma / m**0.5).eta / first) / np.log(
                    m
                )
                low, high = min(low, power), max(high, power)
            active = first * lam
            if np.abs(active - 1).min() > 1e-3:  # away from a kink
                s = active[active < 1].sum() / np.minimum(active, 1).sum()
                near = stopping.rademacher_rule(Spectrum(lam), sigma * np.exp(-5e-6)).eta
                worst = max(worst, abs(np.log(near / first) / 1e-5 - 1 / (1 + s)))
    bottom = 0.6 if broken else 0.5
    holds = low >= bottom - 1e-9 and high <= 1 + 1e-9 and worst < 1e-4
    return Verdict(
        bool(holds), f"η̂ grows as m to a power from {low:.3f} to {high:.3f}; slopes agree to {worst:.1e}"
    )


def power_law_slope(broken: bool = False) -> Verdict:
    """λ_j = A j^(-a): the tail's share of the dimension goes to 1/a, and the slope to a/(1+a)."""
    gaps = []
    for a in (1.5, 2.0, 3.0):
        lam = 3.0 * np.arange(1, 1_000_001) ** -a
        for eta in (1e3, 1e5 if a > 1.5 else 1e4):
            active = eta * lam
            # what the million ranks leave out is an integral
            rest = eta * 3.0 * 1_000_000.5 ** (1 - a) / (a - 1)
            s = (active[active < 1].sum() + rest) / (np.minimum(active, 1).sum() + rest)
            gaps.append(abs(1 / (1 + s) - (a - 1 if broken else a) / (1 + a)))
    return Verdict(bool(max(gaps[1::2]) < 0.01), f"the slope misses a/(1+a) by at most {max(gaps[1::2]):.4f}")


def number_of_epochs(broken: bool = False) -> Verdict:
    """η̂ λ_1 B/(cn) against B λ_1 R²/(4e² c σ² N): bisection against the identity, and the bound without N."""
    worst, holds = 0.0, True
    for lam in _spectra():
        for sigma in (0.1, 1.0):
            for norm in (0.5, 2.0):
                stop = stopping.rademacher_rule(Spectrum(lam), sigma, norm)
                epochs = stop.eta * lam[0] / 0.5 * 16 / len(lam)
                ratio = 16 * lam[0] * norm**2 / (4 * E**2 * 0.5 * sigma**2)
                count = np.minimum(stop.eta * lam, 1).sum()
                worst = max(worst, abs(epochs * count / ratio - 1))
                if stop.eta * lam[0] >= 1:
                    holds &= epochs <= ratio / (count if not broken else 10 * count) * (1 + 1e-9)
    return Verdict(bool(holds and worst < 1e-9), f"the identity holds to {worst:.1e}")


def mini_batches(broken: bool = False) -> Verdict:
    """Independent batches: mean of 4000 runs against full descent, and the mean square deviation against its bound."""
    rng = np.random.default_rng(0)
    n, size, runs, steps = 20, 4, 4000, 30
    phi = rng.standard_normal((n + 1, 30)) / 5
    kernel, y = phi @ phi.T, rng.standard_normal(n)
    b = kernel.diagonal()[:n].max()
    step = 0.5 / b
    # all runs at once; the last entry is a new text
    f, full = np.zeros((runs, n + 1)), np.zeros(n + 1)
    for _ in range(steps):
        chosen = rng.random((runs, n)).argsort(1) < size  # a uniform subset of `size` texts for each run
        f = f - step / size * ((f[:, :n] - y) * chosen) @ kernel[:n]
        full = full - step / n * (full[:n] - y) @ kernel[:n]
    deviation = ((f - full) ** 2).mean(0)
    scores = np.abs(f.mean(0) - full) / (f.std(0) / runs**0.5)
    bound = kernel.diagonal() * step * steps * step * b / size * (n - size) / (n - 1) * (y**2).mean()
    reach = float((deviation / bound).max())
    holds = scores.max() < 4.5 and reach < (0.02 if broken else 1)
    return Verdict(
        bool(holds),
        f"means within {scores.max():.1f} standard errors; deviation reaches {reach:.2f} of the bound",
    )


def norm_of_a_prior(broken: bool = False) -> Verdict:
    """R² = τ²N(η̂) in the rule gives η̂ = nτ²/(4e²σ²), 4e² before ridge's best time; and E‖Π_k g‖² = τ²k by simulation."""
    worst, holds, rng = 0.0, True, np.random.default_rng(1)
    for lam in _spectra():
        n, tau2, sigma = len(lam), 0.7, 0.4
        claimed = n * tau2 / ((2 if broken else 4) * E**2 * sigma**2)
        norm = np.sqrt(tau2 * np.minimum(claimed * lam, 1).sum())
        worst = max(worst, abs(stopping.rademacher_rule(Spectrum(lam), sigma, norm).eta / claimed - 1))
        # the best ridge penalty for the prior, among many: exact risk τ²λν²/(λ+ν)² + σ²/n λ²/(λ+ν)²
        factors = np.geomspace(0.2, 5, 201)
        nu = factors[:, None] * sigma**2 / (n * tau2)
        risk = ((tau2 * lam * nu**2 + sigma**2 / n * lam**2) / (lam + nu) ** 2).sum(1)
        holds &= abs(np.log(factors[np.argmin(risk)])) < 0.02
    lam = np.arange(1, 31) ** -1.5
    theta = np.sqrt(0.7 * lam) * rng.standard_normal((20_000, 30))
    norms = (theta[:, :8] ** 2 / lam[:8]).sum(1)
    holds &= abs(norms.mean() - 0.7 * 8) < 4 * norms.std() / 20_000**0.5
    return Verdict(
        bool(holds and worst < 1e-9), f"the rule stops there to {worst:.1e}; ridge is best at nτ²/σ²"
    )


def _two_class(n: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a kernel (n, n), labels ±1 and scores before training."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((n, 40)) * np.arange(1, 41) ** -0.7
    return phi @ phi.T, rng.choice([-1.0, 1.0], n), rng.standard_normal(n) / 3


def logistic_flow(broken: bool = False) -> Verdict:
    """The loss falls, and two paths with the same labels approach each other in the Hilbert norm."""
    kernel, y, start = _two_class()
    times = np.concatenate([[0.0], np.geomspace(0.01, 1e3, 40)])
    shifted = start + kernel @ np.random.default_rng(1).standard_normal(24) / 24
    first, second = (logistic_path(kernel, y, times, f0=f0) for f0 in (start, shifted))
    if broken:  # other labels: nothing keeps the paths together
        second = logistic_path(kernel, -y, times, f0=shifted)
    gap = first.fitted - second.fitted
    distance = (gap * np.linalg.solve(kernel, gap.T).T).sum(1)
    rises = float(np.diff(distance).max() / distance[0])
    holds = (np.diff(first.loss) < 0).all() and rises < 1e-6
    return Verdict(bool(holds), f"loss {first.loss[0]:.3f} to {first.loss[-1]:.3f}; largest rise {rises:.1e}")


def logistic_clock(broken: bool = False) -> Verdict:
    """‖f_η - φ_{η/4}‖_n <= max ‖f³‖_n/48 · G(η): the solver against the closed form, at many times and scales."""
    kernel, y, start = _two_class()
    reach, holds = 0.0, True
    for scale in (0.01, 1.0):
        top = np.linalg.eigvalsh(scale * kernel / 24)[-1]
        times = np.concatenate([[0.0], np.geomspace(0.01, 300, 50) / top])
        path = logistic_path(scale * kernel, y, times, f0=start)
        square = descend(scale * kernel, 2 * y, start).fitted(times if broken else times / 4)
        cubes = np.maximum.accumulate(np.sqrt((path.fitted**6).mean(1))) / 48
        u = top * times
        growth = np.where(u <= 4 / E, u, 4 / E * (1 + np.log(np.maximum(E * u / 4, 1))))
        gap = np.sqrt(((path.fitted - square) ** 2).mean(1))
        holds &= bool((gap <= cubes * growth + 1e-6).all())
        reach = max(reach, float((gap[1:] / (cubes * growth)[1:]).max()))
    u = np.linspace(-30, 30, 100_001)
    holds &= bool((np.abs(expit(u) - 0.5 - u / 4) <= np.abs(u) ** 3 / 48 + 1e-15).all())
    return Verdict(holds, f"the gap reaches {reach:.2f} of the bound")


def two_class_rule(broken: bool = False) -> Verdict:
    """Coin-flip labels with known p: the mean error of the linearised flow at 4η̂(2, R) is below 0.22 R²/η̂."""
    rng = np.random.default_rng(2)
    kernel, _, _ = _two_class(40)
    path = descend(kernel, np.zeros(40))
    spread = (path.vectors * path.eigenvalues) @ path.vectors.T @ rng.standard_normal(40)
    target = 2 * np.tanh(spread / np.abs(spread).max())
    p = (1 + target / 2) / 2
    norm = path.hilbert_norm(target)
    stop = stopping.rademacher_rule(path.spectrum, 2.0, norm)
    labels = 2 * np.where(rng.random((4000, 40)) < p, 1.0, -1.0)
    share = (path.vectors * path.filter(stop.eta)) @ path.vectors.T
    errors = ((labels @ share - target) ** 2).mean(1)
    bound = (1 / (2 * E) + 1 / (4 * E**2)) * norm**2 / stop.eta
    variance = float(labels.var(0).max())
    holds = errors.mean() <= bound * (0.05 if broken else 1) and variance <= 4 + 1e-12
    return Verdict(
        bool(holds), f"mean error {errors.mean():.3f}, bound {bound:.3f}, noise at most {variance:.2f}"
    )


def separable(broken: bool = False) -> Verdict:
    """Bounds on loss and norm along a path that never ends, and the margins that the loss forces."""
    kernel, y, start = _two_class(12)
    n = len(y)
    times = np.geomspace(1, 1e5, 40)
    path = logistic_path(kernel, y, np.concatenate([[0.0], times]), f0=start)
    size2 = float(y @ np.linalg.solve(kernel, y))  # yᵀK⁻¹y/n with K = kernel/n
    before = float(np.exp(-y * start).mean())
    loss, moved = path.loss[1:], path.fitted[1:] - start
    norm = np.sqrt((moved * np.linalg.solve(kernel, moved.T).T).sum(1))
    low = (before + size2 * np.log(times) ** 2 / 2) / times * (0.01 if broken else 1)
    high = 2 * np.sqrt(size2) * np.log(times) + np.sqrt(2 * before)
    margins = (path.fitted[1:] * y).min(1)
    forced = -np.log(np.expm1(n * loss))
    holds = (loss <= low).all() and (norm <= high).all() and (margins >= forced - 1e-9).all()
    return Verdict(
        bool(holds), f"loss {loss[-1]:.1e} (bound {low[-1]:.1e}), norm {norm[-1]:.2f} (bound {high[-1]:.2f})"
    )


CHAPTER = "llm_stopping"


CLAIMS = (
    Claim(
        "thm-lp-raters",
        CHAPTER,
        "Dividing σ² by m lengthens training by a factor between √m and m, with slope 1/(1+s).",
        "numeric",
        better_raters,
    ),
    Claim(
        "cor-lp-power",
        CHAPTER,
        "For λ_j = A j^(-a) the tail's share goes to 1/a and the slope to a/(1+a).",
        "numeric",
        power_law_slope,
    ),
    Claim(
        "prop-lp-epochs",
        CHAPTER,
        "The rule stops after B λ_1 R²/(4e² c σ² N) epochs.",
        "numeric",
        number_of_epochs,
    ),
    Claim(
        "prop-lp-batches",
        CHAPTER,
        "Independent batches have full descent as their mean path, and a mean square deviation of order ε.",
        "numeric",
        mini_batches,
    ),
    Claim(
        "prop-lp-prior",
        CHAPTER,
        "With the norm of a typical target the rule stops 4e² times before ridge's best.",
        "numeric",
        norm_of_a_prior,
    ),
    Claim(
        "lem-lp-flow",
        CHAPTER,
        "The logistic flow lowers the loss and brings two paths with the same labels closer.",
        "numeric",
        logistic_flow,
    ),
    Claim(
        "lem-lp-clock",
        CHAPTER,
        "The logistic flow is the square-loss flow towards 2y at a quarter of the time, up to max ‖f³‖/48 times G(λ_1 η).",
        "numeric",
        logistic_clock,
    ),
    Claim(
        "prop-lp-two-class",
        CHAPTER,
        "At 4η̂(2, R) the linearised logistic flow has expected error below 0.22 R²/η̂, whatever the noise of two-class labels.",
        "numeric",
        two_class_rule,
    ),
    Claim(
        "prop-lp-separable",
        CHAPTER,
        "On separable data the loss falls at least like log²η/η and the norm grows at most like log η.",
        "numeric",
        separable,
    ),
)
