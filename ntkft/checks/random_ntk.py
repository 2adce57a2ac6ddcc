"""Checks of the chapter "Random beginnings"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import integrate, special, stats

from ntkft.analytic import finite_mlp_readout, gaussian_moments, mlp_kernels
from ntkft.checks import Claim, Verdict, full_result
from ntkft.experiments.random_ntk import circle_coefficients, relu_unit_variance
from ntkft.ntk.engine import empirical_ntk


def arc_cosine_integrals(broken: bool = False) -> Verdict:
    """κ_0, κ_1, κ_2 against quadrature of E[(uu')^k 1{u,u'>0}], the inner integral by the law of u' given u."""
    worst = 0.0
    for gamma in (0.2, 1.0, np.pi / 2, 2.0, 3.0):
        c, s, left = np.cos(gamma), np.sin(gamma), np.pi - gamma
        closed = [left, s + left * c, (3 if not broken else 2) * s * c + left * (1 + 2 * c**2)]
        for k, value in enumerate(closed):

            def outer(u: float, k: int = k, c: float = c, s: float = s) -> float:
                at = c * u / s  # u' = c u + s g is positive for g > -at
                density, tail = stats.norm.pdf(at), stats.norm.cdf(at)
                inner = (
                    tail,
                    c * u * tail + s * density,
                    ((c * u) ** 2 + s**2) * tail + c * u * s * density,
                )[k]
                return float(u**k * np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi) * inner)

            numeric = integrate.quad(outer, 0, 12, epsabs=1e-11)[0]
            worst = max(worst, abs(numeric - value / (2 * np.pi)))
    return Verdict(bool(worst < 1e-8), f"largest difference from quadrature {worst:.1e}, five angles")


def erf_integrals(broken: bool = False) -> Verdict:
    """The closed form of erf against Gauss-Hermite quadrature with autograd slopes."""
    q, a, b = np.array([0.5, -0.3, 0.0, 0.9]), np.array([1.0, 0.4, 2.0, 1.0]), np.array([1.3, 0.5, 1.0, 0.9])
    closed = gaussian_moments(q * (1.1 if broken else 1), a, b, "erf")
    numeric = gaussian_moments(q, a, b, torch.erf)
    worst = max(float(np.abs(c - n).max()) for c, n in zip(closed, numeric, strict=True))
    return Verdict(worst < 1e-8, f"largest difference {worst:.1e}")


def one_layer(broken: bool = False) -> Verdict:
    """Mean Θ and variance C/m at m = 3, from 100 000 networks with tanh; C and Θ from Gauss-Hermite in (u, u') and E v⁴ = 3."""
    rng = np.random.default_rng(0)
    m, draws, angle = 3, 100_000, 0.7
    x, other = np.array([1.0, 0.0]), np.array([np.cos(angle), np.sin(angle)])
    w, v = rng.standard_normal((draws, m, 2)), rng.standard_normal((draws, m))
    u, t = w @ x, w @ other
    slopes = (1 - np.tanh(u) ** 2) * (1 - np.tanh(t) ** 2) * np.cos(angle)
    kernels = (np.tanh(u) * np.tanh(t) + v**2 * slopes).mean(1)
    points, weights = special.roots_hermitenorm(80)
    weights = weights / weights.sum()
    g, h = points[:, None], np.cos(angle) * points[:, None] + np.sin(angle) * points
    p, s = np.tanh(g) * np.tanh(h), (1 - np.tanh(g) ** 2) * (1 - np.tanh(h) ** 2) * np.cos(angle)

    def mean(value: np.ndarray) -> float:
        return float(weights @ value @ weights)

    theta = mean(p + s)
    constant = mean(p**2 + 2 * p * s + (1 if broken else 3) * s**2) - theta**2
    z = (kernels.mean() - theta) / (constant / m / draws) ** 0.5
    ratio = kernels.var() * m / constant
    return Verdict(
        bool(abs(z) < 4 and abs(ratio - 1) < 0.03), f"mean off by {z:.1f} errors, variance {ratio:.3f} C/m"
    )


def relu_error(broken: bool = False) -> Verdict:
    """C(γ) of ReLU from its formula against simulated units; exactly 3 at γ = 0."""
    rng = np.random.default_rng(1)
    w, v = rng.standard_normal((1_000_000, 2)), rng.standard_normal(1_000_000)
    x = np.array([1.0, 0.0])
    at_zero = relu_unit_variance(x[None]).item() - (2 if broken else 3)
    worst = 0.0
    for angle in (0.0, 0.8, 1.6, 2.4):
        other = np.array([np.cos(angle), np.sin(angle)])
        u, t = w @ x, w @ other
        unit = np.where((u > 0) & (t > 0), u * t + v**2 * np.cos(angle), 0.0)
        exact = relu_unit_variance(x[None], other[None]).item()
        error = np.sqrt(((unit - unit.mean()) ** 2).var() / len(v))
        worst = max(worst, abs(unit.var() - exact) / error)
    holds = abs(at_zero) < 1e-12 and worst < 4
    return Verdict(bool(holds), f"C(0) - 3 = {at_zero:.1e}; simulated C within {worst:.1f} standard errors")


def deep_limit(broken: bool = False) -> Verdict:
    """The recursion against networks of growing width, depth 1 to 3, relu and erf, with and without bias."""
    x = np.random.default_rng(0).standard_normal((4, 3)) / 3**0.5
    texts, narrow, wide = [str(i) for i in range(4)], 0.0, 0.0
    for depth, activation, bias in ((1, "erf", 0.3), (2, "relu", 0.0), (3, "erf", 0.3)):
        options: dict[str, Any] = {"weight_variance": 1.5, "bias_variance": bias}
        covariance, theta = mlp_kernels(x, depth=depth, activation=activation, **options)
        if broken:  # forget what the layers below contribute
            theta = covariance
        for m in (24, 1024):
            readout = finite_mlp_readout(x, m, depth, activation, seed=1, **options)
            kernel = empirical_ntk(readout, texts, progress=False).matrix
            off = float(np.linalg.norm(kernel - theta) / np.linalg.norm(theta))
            narrow, wide = (max(narrow, off), wide) if m == 24 else (narrow, max(wide, off))
    return Verdict(
        wide < 0.15 and wide < narrow, f"largest error {narrow:.2f} at width 24, {wide:.3f} at width 1024"
    )


def circle(broken: bool = False) -> Verdict:
    """Exact coefficients against integrals of the kernels; j² μ_j with bias against its limit."""
    power, worst = (3 if broken else 2), 0.0
    for j in (0, 1, 2, 3, 4, 5, 8, 20):
        for which in (0, 1):

            def integrand(gamma: float, which: int = which, j: int = j) -> float:
                one, zero = gaussian_moments(np.cos(gamma), 1.0, 1.0)
                return float((one + which * np.cos(gamma) * zero) * np.cos(j * gamma)) / np.pi

            numeric = integrate.quad(integrand, 0, np.pi, limit=200)[0]
            worst = max(worst, abs(numeric - float(circle_coefficients(j)[which])))
    n, beta = 4096, 0.8
    angle = 2 * np.pi * np.arange(n) / n
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    mu = np.fft.rfft(mlp_kernels(ring[:1], ring, bias_variance=beta**2)[1][0]).real / n
    limit = np.sqrt(1 + beta**2) / (2 * np.pi**2)
    ratios = mu[[100, 101]] * np.array([100.0, 101.0]) ** power / limit
    holds = worst < 1e-7 and bool((np.abs(ratios - 1) < 0.02).all())
    return Verdict(
        holds,
        f"coefficients to {worst:.0e}; with bias j²μ_j/limit {ratios[0]:.3f} (even), {ratios[1]:.3f} (odd)",
    )


def _contains(entry: dict, power: float) -> bool:
    return bool(entry["low"] <= power <= entry["high"])


def width(broken: bool = False) -> Verdict:
    """Stored sweep: each joint 95 % interval contains -1/2, and the constant of depth 1 its exact value."""
    values, power = full_result("random_ntk").values, (-1.0 if broken else -0.5)
    slopes = [values[f"slope_{depth}"] for depth in (1, 2, 3)]
    holds = all(_contains(s, power) for s in slopes) and _contains(values["constant_ratio"], 1.0)
    told = ", ".join(f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in slopes)
    return Verdict(holds, f"{told}; constant {values['constant_ratio']['value']:.3f} of the exact one")


def movement(broken: bool = False) -> Verdict:
    """Stored: -1/2 for weights, -1 for erf's kernel; ReLU's lies between -3/4 and -1/2, in pairs the mean outlives the spread."""
    values = full_result("random_ntk").values
    weights, erf, relu = (values[k] for k in ("weights_slope_relu", "kernel_slope_erf", "kernel_slope_relu"))
    holds = _contains(weights, -0.5) and _contains(values["weights_slope_erf"], -0.5)
    holds &= _contains(erf, -0.5 if broken else -1.0) and relu["low"] > -0.75 and relu["high"] < -0.5
    mean, spread = values["pair_mean_slope"], values["pair_spread_slope"]
    holds &= mean["low"] > spread["high"] and mean["high"] < -0.5
    return Verdict(
        bool(holds),
        f"weights {weights['value']:.3f}, kernel erf {erf['value']:.3f}, relu {relu['value']:.3f}; pairs: "
        f"mean {mean['value']:.3f}, spread {spread['value']:.3f}",
    )


def not_iid(broken: bool = False) -> Verdict:
    """Stored averages: -1/2 for independent units, slower for heavy tails, none for units with a shared part."""
    values = full_result("random_ntk").values
    names = ("independent", "heavy_tails", "shared_part")
    free, heavy, shared = (values[f"{name}_slope"] for name in names)
    holds = _contains(free, -0.5) and heavy["low"] > -0.45 and heavy["high"] < -0.3
    holds &= _contains(shared, -0.5 if broken else 0.0) and values["shared_part_last"] > 0.4
    return Verdict(
        bool(holds), f"powers {free['value']:.3f}, {heavy['value']:.3f}, {shared['value']:.3f}; plateau "
        f"{values['shared_part_last']:.2f}"
    )  # fmt: skip


CHAPTER = "random_ntk"
CLAIMS = (
    Claim(
        "lem-rn-arc-cosine",
        CHAPTER,
        "The moments κ_0, κ_1, κ_2 of a Gaussian pair on the positive quadrant have the stated closed forms.",
        "numeric",
        arc_cosine_integrals,
    ),
    Claim(
        "lem-rn-erf",
        CHAPTER,
        "The Gaussian moments of erf and of its slope are an arcsine and an inverse root.",
        "numeric",
        erf_integrals,
    ),
    Claim(
        "prop-rn-one-layer",
        CHAPTER,
        "The tangent kernel of one random hidden layer has mean Θ and variance C/m at every width m.",
        "numeric",
        one_layer,
    ),
    Claim(
        "cor-rn-relu",
        CHAPTER,
        "For ReLU and unit inputs C has the stated form, and k_m(x, x) has the relative error √(3/m).",
        "numeric",
        relu_error,
    ),
    Claim(
        "thm-rn-deep",
        CHAPTER,
        "As the widths grow, the tangent kernel of a random network tends to the recursion's Θ^{L+1}.",
        "numeric",
        deep_limit,
    ),
    Claim(
        "prop-rn-circle",
        CHAPTER,
        "On the circle μ_j(Θ) = (j²+3)/(π²(j²-1)²) for even j and 0 for odd j ≥ 3; with bias j²μ_j → √(1+β²)/(2π²).",
        "numeric",
        circle,
    ),
    Claim(
        "obs-rn-width",
        CHAPTER,
        "The error of the kernel falls as m^(-1/2) for one, two and three hidden layers, with the exact constant for one.",
        "stored",
        width,
    ),
    Claim(
        "obs-rn-moves",
        CHAPTER,
        "In training the weights move as m^(-1/2), the kernel as m^(-1) for erf and between m^(-3/4) and m^(-1/2) for ReLU.",
        "stored",
        movement,
    ),
    Claim(
        "obs-rn-not-iid",
        CHAPTER,
        "The kernel's error falls as m^(-1/2) for independent units, more slowly for heavy tails, not at all with a shared part.",
        "stored",
        not_iid,
    ),
)
