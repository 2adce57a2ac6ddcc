"""Checks of the chapter "Pretrained beginnings"."""

from __future__ import annotations

import numpy as np
import torch

from ntkft import heads, stability
from ntkft.checks import Claim, Verdict
from ntkft.heads import Shape
from ntkft.spectrum import Spectrum
from ntkft.stopping import rademacher_rule

SHAPE = Shape(d=4, k=2, T=4)


# --- Softmax heads: what holds at given weights ----------------------------------------------------------------------------


def _coherent(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return θ0, all heads equal and curved; a displacement of all heads along their top Hessian direction; inputs; the input."""
    x = heads.tokens(6, SHAPE, 0)
    candidates = heads.gaussian_heads(32, SHAPE, 0, scale=1.5)
    norms = heads.head_hessian_norms(candidates, x, SHAPE)
    where = int(norms.argmax())
    text, chosen = where // 32, where % 32
    one = candidates[chosen]
    full = torch.func.hessian(lambda th: heads.head(th, x[text], SHAPE))(one)
    values, vectors = torch.linalg.eigh(full)
    direction = vectors[:, int(values.abs().argmax())]
    return one.repeat(count, 1), (0.01 * direction).repeat(count, 1), x, text


def _measured(theta: torch.Tensor, delta: torch.Tensor, x: torch.Tensor) -> tuple[float, float, float, float]:
    """Return L1, L2 (on the segment), H and R."""
    points = [theta + s * delta for s in (0.0, 0.5, 1.0)]
    L1 = max(float(heads.head_gradients(p, x, SHAPE).norm(dim=-1).max()) for p in points)
    L2 = max(float(heads.head_hessian_norms(p, x, SHAPE).max()) for p in points)
    return L1, L2, len(theta), float(delta.norm())


def curvature_of_many_heads(broken: bool = False) -> Verdict:
    """The whole model's Hessian by autograd against L2/√H, for heads of every kind."""
    worst, x = 0.0, heads.tokens(3, SHAPE, 1)
    for seed, count in ((0, 2), (1, 3), (2, 5)):
        theta = heads.gaussian_heads(count, SHAPE, seed)
        L2 = float(heads.head_hessian_norms(theta, x, SHAPE).max())
        bound = stability.head_curvature(L2, count * count if broken else count)
        for xi in x:
            size = theta.numel()
            full = torch.func.hessian(lambda th, xi=xi: heads.model(th, xi[None], SHAPE)[0])(theta)
            worst = max(worst, float(torch.linalg.matrix_norm(full.reshape(size, size), 2)) / bound)
    return Verdict(bool(worst <= 1 + 1e-9), f"the largest Hessian is {worst:.6f} of the bound")


def _near(quantity: str, broken: bool) -> Verdict:
    ratios = []
    for count in (4, 36):
        theta, delta, x, _ = _coherent(count)
        L1, L2, H, R = _measured(theta, delta, x)
        beta = stability.head_curvature(L2, H)
        before, after = heads.gradients(theta, x, SHAPE), heads.gradients(theta + delta, x, SHAPE)
        if quantity == "gradient":
            got, bound = (after - before).norm(dim=1).max(), stability.gradient_change(beta, R)
        elif quantity == "kernel":
            got = (after @ after.T - before @ before.T).abs().max()
            bound = stability.kernel_change(L1, beta, R)
        else:
            linear = heads.model(theta, x, SHAPE) + before @ delta.flatten()
            got = (heads.model(theta + delta, x, SHAPE) - linear).abs().max()
            bound = stability.tangent_gap(beta, R)
        ratios.append(float(got) / bound * (np.sqrt(H) if broken else 1))
    return Verdict(bool(max(ratios) <= 1), f"equal heads, moved together: {max(ratios):.3f} of the bound for H = 4 and 36")


def gradient_bound(broken: bool = False) -> Verdict:
    """‖∇f - ∇f_0‖ ≤ βR where it is nearly sharp; broken: an additional 1/√H."""
    return _near("gradient", broken)


def kernel_bound(broken: bool = False) -> Verdict:
    """|k_θ - k_0| ≤ 2 L1 β R; broken: an additional 1/√H."""
    return _near("kernel", broken)


def tangent_bound(broken: bool = False) -> Verdict:
    """|f - f_lin| ≤ βR²/2; broken: an additional 1/√H."""
    return _near("tangent", broken)


# --- Mixed starts, sketches, perturbation ----------------------------------------------------------------------------------


def mixed_concentration(broken: bool = False) -> Verdict:
    """Fresh read-outs on fixed features: the Bernstein bound fails in at most 2exp(-x) of draws; broken: a third of the bound."""
    rng = np.random.default_rng(0)
    draws, holds, worst = 20_000, True, 0.0
    for count in (8, 64):
        c = rng.standard_normal(count) * np.arange(1, count + 1) ** 0.5  # signed, unequal
        gap = (rng.standard_normal((draws, count)) ** 2 - 1) @ c / count
        for x in (1.0, 2.0, 4.0):
            bound = (2 * np.sqrt(x * (c**2).sum()) + 2 * x * np.abs(c).max()) / count
            share = float((np.abs(gap) > (bound / 3 if broken else bound)).mean())
            holds &= share <= 2 * np.exp(-x)
            worst = max(worst, share / (2 * np.exp(-x)))
        exact = np.sqrt(2 * (c**2).sum()) / count
        holds &= bool(abs(gap.std() / exact - 1) < 0.05)
    return Verdict(bool(holds), f"{draws} draws; failures reach {worst:.3f} of the share allowed, spread as computed")


def symmetric_start(broken: bool = False) -> Verdict:
    """Each head twice, with read-outs v and -v: f0 = 0 and the same kernel, by autograd on softmax heads."""
    x, theta = heads.tokens(5, SHAPE, 0), heads.gaussian_heads(7, SHAPE, 0)
    mirrored = theta.clone()
    mirrored[:, -SHAPE.k :] *= -1
    both = torch.cat([theta, theta if broken else mirrored])
    one, two = heads.gradients(theta, x, SHAPE), heads.gradients(both, x, SHAPE)
    score = float(heads.model(both, x, SHAPE).abs().max())
    gap = float((one @ one.T - two @ two.T).abs().max() / (one @ one.T).abs().max())
    return Verdict(score < 1e-12 and gap < 1e-12, f"largest |f0| {score:.1e}, kernels differ by {gap:.1e}")


def sketched_kernel(broken: bool = False) -> Verdict:
    """LoRA's gradients by autograd through W0 + BA: mean and variance over 4000 draws of A against the formulas."""
    generator = torch.Generator().manual_seed(0)
    q, p, r, T, draws = 3, 5, 2, 4, 4000
    weight = torch.randn(q, p, generator=generator, dtype=torch.float64)
    x = torch.randn(2, T, p, generator=generator, dtype=torch.float64)

    def score(matrix: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        return torch.tanh(one @ matrix.T).sum(1).pow(2).sum()

    G = [torch.func.grad(score)(weight, one) for one in x]
    A = torch.randn(draws, r, p, generator=generator, dtype=torch.float64) / r**0.5
    zero = torch.zeros(q, r, dtype=torch.float64)

    def adapted(pair: tuple[torch.Tensor, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return score(weight + pair[0] @ pair[1], one)

    grads = [torch.func.vmap(lambda a, one=one: torch.func.grad(adapted)((zero, a), one))(A) for one in x]
    k = sum((u * v).flatten(1).sum(1) for u, v in zip(grads[0], grads[1], strict=True))
    M = G[0].T @ G[1]
    sym = M if broken else (M + M.T) / 2
    mean, variance = float((G[0] * G[1]).sum()), float(2 / r * (sym**2).sum())
    error = abs(float(k.mean()) - mean) / np.sqrt(variance / draws)
    spread = float(k.var()) / variance
    bounded = variance <= 2 / r * float((G[0] ** 2).sum() * (G[1] ** 2).sum())
    return Verdict(
        bool(error < 4 and abs(spread - 1) < 0.12 and bounded),
        f"mean off by {error:.1f} standard errors, variance {spread:.3f} of the formula",
    )


def perturbed_stop(broken: bool = False) -> Verdict:
    """The stop of a changed spectrum lies in the interval of the lemma; broken: an interval for a tenth of the change."""
    rng = np.random.default_rng(0)
    misses, tests, closest = 0, 0, np.inf
    j = np.arange(1, 81)
    for lam in (j**-1.0, j**-2.0, np.exp(-0.1 * j)):
        spectrum, scale = Spectrum(lam), 0.1 if broken else 1.0
        for sigma in (0.1, 0.5):
            eta = rademacher_rule(spectrum, sigma).eta
            size = float(spectrum.rademacher(eta**-0.5)) ** 2
            for _ in range(10):
                kappa = rng.uniform(0.02, 0.5)
                flat = lam * (1 + kappa * rng.choice([-1, 1]))
                new = rademacher_rule(Spectrum(flat), sigma).eta
                low, high = stability.stopping_interval(spectrum, sigma, ratio=kappa * scale)
                misses += not low * (1 - 1e-9) <= new <= high * (1 + 1e-9)
                shifted = np.abs(lam + rng.uniform(0.02, 0.2) * size * rng.choice([-1, 1], 80))
                change = float(np.abs(np.sort(shifted)[::-1] - lam).mean())
                new = rademacher_rule(Spectrum(shifted), sigma).eta
                low, high = stability.stopping_interval(spectrum, sigma, change=change * scale)
                misses += not low * (1 - 1e-9) <= new <= high * (1 + 1e-9)
                closest = min(closest, new / low, high / new)
                tests += 2
    return Verdict(misses == 0, f"{tests} changed spectra, {misses} outside the interval; closest to its end {closest:.3f}")


CHAPTER = "pretrained_ntk"


CLAIMS = (
    Claim(
        "lem-curvature",
        CHAPTER,
        "A sum of H heads has ‖∇f‖ ≤ L1 and ‖∇²f‖ ≤ L2/√H.",
        "numeric",
        curvature_of_many_heads,
    ),
    Claim(
        "lem-gradient",
        CHAPTER,
        "At distance R gradients have changed by at most βR.",
        "numeric",
        gradient_bound,
    ),
    Claim(
        "lem-kernel",
        CHAPTER,
        "At distance R the kernel has changed by at most 2 L1 β R.",
        "numeric",
        kernel_bound,
    ),
    Claim(
        "lem-tangent",
        CHAPTER,
        "At distance R the model is within βR²/2 of its tangent.",
        "numeric",
        tangent_bound,
    ),
    Claim(
        "prop-mixed",
        CHAPTER,
        "Fresh Gaussian read-outs: the kernel's variance is 2Σc²/H², with a Bernstein tail.",
        "numeric",
        mixed_concentration,
    ),
    Claim(
        "prop-symmetric",
        CHAPTER,
        "Doubling the heads with read-outs ±v gives f0 = 0 and the same kernel.",
        "numeric",
        symmetric_start,
    ),
    Claim(
        "prop-sketch",
        CHAPTER,
        "LoRA's kernel is unbiased up to scale, with variance (2/r) Σ ‖sym(GᵀG')‖².",
        "numeric",
        sketched_kernel,
    ),
    Claim(
        "lem-perturbation",
        CHAPTER,
        "A change of the eigenvalues moves the stop at most into the stated interval.",
        "numeric",
        perturbed_stop,
    ),
)
