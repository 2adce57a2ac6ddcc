"""Checks of the chapter "Many tasks, one model"."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
from scipy.integrate import quad_vec
from scipy.linalg import block_diag, expm

from ntkft import interference, stopping
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.checks import Claim, Verdict
from ntkft.multitask import Joint
from ntkft.spectrum import Spectrum

CHAPTER = "many_tasks"


E = np.e


def task_rows(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Return the rows of tasks of these sizes, one after the other."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def _flow(phi: np.ndarray, y: np.ndarray, eta: float) -> np.ndarray:
    """Return the displacement of a linear model's weights after gradient flow, by a matrix exponential of the weights' own."""
    p = phi.shape[1]
    generator = np.zeros((p + 1, p + 1))  # δ' = -Cδ + b as one linear system
    generator[:p, :p], generator[:p, p] = -phi.T @ phi / len(y), phi.T @ y / len(y)
    return expm(eta * generator)[:p, p]


def joint_tasks(phi: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], eta: float) -> TaskVectors:
    """Return tasks of these sizes, one after the other, that all train for one kernel time."""
    return TaskVectors(phi @ phi.T, [FineTuning(r, y[r], eta) for r in task_rows(sizes)])


def cross_talk(broken: bool = False) -> Verdict:
    """Cross-talk of trained weights against √λ_1 cos φ ‖τ‖, cos φ ‖τ‖ the part of τ in a's span, and cos θ >= cos φ."""
    holds, tightest = True, 0.0
    for seed, common in product(range(8), (0.0, 1.0, 4.0)):
        rng = np.random.default_rng(seed)
        phi = rng.standard_normal((9, 14)) + common * rng.standard_normal(14)
        y, (a, b) = rng.standard_normal(9) + 1, task_rows((4, 5))
        vectors, tau = joint_tasks(phi, y, (4, 5), 0.7), _flow(phi[b], y[b], 0.7)
        talk = np.sqrt(((phi[a] @ tau) ** 2).mean())
        inside = np.linalg.norm(np.linalg.pinv(phi[a]) @ phi[a] @ tau)
        top = np.linalg.eigvalsh(phi[a] @ phi[a].T / 4)[-1]
        cosine = interference.principal_cosine(vectors, 0, 1) ** (3 if broken else 1)
        gram = (
            np.linalg.norm(phi[a] @ phi[b].T, 2)
            / 20**0.5
            * np.sqrt(5)
            * np.linalg.norm(vectors.coefficients[1])
        )
        holds &= talk <= top**0.5 * inside * (1 + 1e-9) and inside <= cosine * np.linalg.norm(tau) * (
            1 + 1e-9
        )
        holds &= (
            talk <= gram * (1 + 1e-9) and abs(interference.cross_talk_sizes(vectors)[0, 1] - talk) < 1e-10
        )
        tightest = max(tightest, talk / (top**0.5 * cosine * np.linalg.norm(tau)))
    return Verdict(bool(holds), f"cross-talk reaches {tightest:.2f} of the bound")


def noise_talk(broken: bool = False) -> Verdict:
    """Mean cross-talk of pure noise over all signs against (σ²/n)Σ(s²/λ)q, q from the weights' directions; it grows."""
    worst, holds, sigma = 0.0, True, 0.8
    for seed in range(3):
        rng = np.random.default_rng(seed)
        phi, (a, b), last = rng.standard_normal((10, 11)), task_rows((4, 6)), 0.0
        _, root, right = np.linalg.svd(phi[b] / 6**0.5, full_matrices=False)
        q = ((phi[a] @ right.T) ** 2).mean(0)
        for eta in (0.1, 1.0, 30.0):
            share = 1 - np.exp(-eta * root**2)
            formula = sigma**2 / 6 * (share ** (1 if broken else 2) / root**2 * q).sum()
            silent = joint_tasks(phi, np.zeros(10), (4, 6), eta)
            sizes = []
            for signs in product((-1.0, 1.0), repeat=6):
                noisy = [silent.tunings[0], replace(silent.tunings[1], y=sigma * np.array(signs))]
                sizes.append((interference.cross_talk(TaskVectors(phi @ phi.T, noisy), 0, 1) ** 2).mean())
            worst = max(worst, abs(formula / np.mean(sizes) - 1))
            holds &= formula >= last
            last = formula
    return Verdict(bool(holds and worst < 1e-9), f"mean and formula agree to {worst:.0e}")


def sum_is_joint(broken: bool = False) -> Verdict:
    """Cross-talk that vanishes on what residuals reach, though k_ab does not: sum and joint agree. Cancelling: not for all c."""
    worst, holds = 0.0, True
    for seed in range(4):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
        # both tasks have three gradients; the third of each is shared, and no residual has a part along it
        phi = np.concatenate([q[:, [0, 1, 4]].T, q[:, [2, 3, 4]].T]) * rng.uniform(0.5, 2, 6)[:, None]
        r = rng.standard_normal(6)
        r[[2, 5]] = 0.3 if broken else 0.0
        holds &= bool(np.abs(phi[:3] @ phi[3:].T).max() > 0.2)
        for eta in (0.3, 4.0):
            joint, _, added = Joint(joint_tasks(phi, r, (3, 3), eta)).residuals(eta)
            worst = max(worst, float(np.abs(joint - added).max()))
    x, r = np.random.default_rng(9).standard_normal((2, 3, 3))
    both, labels = np.concatenate([x, x]), np.concatenate([r[0], -r[0]])  # one task, and its opposite
    vectors = joint_tasks(both, labels, (3, 3), 1.0)
    together, _, added = Joint(vectors).residuals(1.0)
    apart, _, other = Joint(joint_tasks(both, labels * np.r_[1, 1, 1, -1, -1, -1], (3, 3), 1.0)).residuals(1.0)
    holds &= bool(np.abs(together - added).max() < 1e-12 and np.abs(apart - other).max() > 0.01)
    holds &= bool(interference.cross_talk_sizes(vectors)[0, 1] > 0.01)
    return Verdict(bool(holds and worst < 1e-12), f"sum and joint training agree to {worst:.0e}")


def _duhamel_integrand(
    whole: np.ndarray, inner: np.ndarray, off: np.ndarray, start: np.ndarray, eta: float, s: float
) -> np.ndarray:
    return (np.eye(len(start)) - expm(-(eta - s) * whole)) @ off @ expm(-s * inner) @ start


def duhamel(broken: bool = False) -> Verdict:
    """Residuals of weights trained one by one, and together, against the integral; its two bounds and its first order."""
    worst, tightest, holds = 0.0, 0.0, True
    sizes = (3, 5, 4)
    for seed, eta in product(range(3), (0.2, 1.5, 9.0)):
        rng = np.random.default_rng(seed)
        phi, r = rng.standard_normal((12, 10)) + 0.5, rng.standard_normal(12)
        root = np.sqrt(np.repeat(sizes, sizes))
        scaled = phi / root[:, None]
        whole = scaled @ scaled.T
        inner = block_diag(*[whole[np.ix_(p, p)] for p in task_rows(sizes)])
        off, start = whole - inner, r / root
        added = start - scaled @ sum(_flow(phi[p], r[p], eta) for p in task_rows(sizes))
        joint = start - scaled @ _flow(scaled * 12**0.5, start * 12**0.5, eta)

        integrand = partial(_duhamel_integrand, whole, inner, off, start, eta)
        integral = quad_vec(integrand, 0, eta, epsabs=1e-11, epsrel=1e-11)[0]
        worst = max(worst, float(np.abs(added - joint + (-1 if broken else 1) * integral).max()))
        top, size = float(np.linalg.norm(whole, 2)), float(np.linalg.norm(off, 2) * np.linalg.norm(start))
        gap = float(np.linalg.norm(added - joint))
        measured, bound = Joint(joint_tasks(phi, r, sizes, eta)).sum_against_joint(eta)
        holds &= abs(measured - gap) < 1e-9 and gap <= bound * (1 + 1e-6)
        holds &= bound <= size * min(eta, eta**2 * top / 2) * (1 + 1e-6)
        tightest = max(tightest, gap / bound)
        early = Joint(joint_tasks(phi, r, sizes, 1e-4)).residuals(1e-4)
        second = -(1e-4**2) / 2 * whole @ off @ start
        holds &= bool(np.linalg.norm(early[2] - early[0] - second) <= 1e-2 * np.linalg.norm(second))
    return Verdict(
        bool(holds and worst < 1e-8), f"identity to {worst:.0e}, distance up to {tightest:.2f} of the bound"
    )


def _model(phi: np.ndarray, hessian: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return phi @ delta + 0.5 * np.einsum("i,nij,j->n", delta, hessian, delta)


def disentangled(broken: bool = False) -> Verdict:
    """ξ by its definition from trained weights against the quadratic; and its distance for a curved model against the bound."""
    worst, holds, tightest = 0.0, True, 0.0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        phi, y, (a, b) = rng.standard_normal((9, 7)), rng.standard_normal(9), task_rows((4, 5))
        vectors = joint_tasks(phi, y, (4, 5), 0.8)
        taus = [_flow(phi[p], y[p], 0.8) for p in (a, b)]
        half = rng.standard_normal((9, 7, 7))
        hessian = 0.2 * (half + half.transpose(0, 2, 1))
        beta = np.abs(np.linalg.eigvalsh(hessian)).max()

        for c_a, c_b in ((1.0, 1.0), (-1.0, 0.5), (2.0, 0.0)):
            both = c_a * taus[0] + c_b * taus[1]
            xi = [
                sum(
                    ((_model(phi, bent, c * tau) - _model(phi, bent, both))[rows] ** 2).mean()
                    for rows, c, tau in ((a, c_a, taus[0]), (b, c_b, taus[1]))
                )
                for bent in (0 * hessian, hessian)
            ]
            scales = (c_b, c_a) if broken else (c_a, c_b)
            worst = max(worst, abs(float(interference.disentanglement(vectors, 0, 1, *scales)) - xi[0]))
            size = [abs(c) * np.linalg.norm(tau) for c, tau in ((c_a, taus[0]), (c_b, taus[1]))]
            bound = beta * np.hypot(
                size[1] ** 2 / 2 + size[0] * size[1], size[0] ** 2 / 2 + size[0] * size[1]
            )
            gap = abs(xi[1] ** 0.5 - xi[0] ** 0.5)
            holds &= gap <= bound
            tightest = max(tightest, gap / bound)
    return Verdict(
        bool(holds and worst < 1e-10),
        f"ξ agrees to {worst:.0e}, curvature's share {tightest:.2f} of the bound",
    )


def early_stops(broken: bool = False) -> Verdict:
    """The mean composition error of a quadratic over all signs of the noise, at the stops, against the bound; late it fails."""
    worst, n, sigma = 0.0, 5, 0.3
    c = np.array([-1.0, -1.0])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        phi = rng.standard_normal((2 * n, 12)) * np.r_[6.0, np.arange(1, 12) ** -1.0]
        goal, hessian, beta = np.eye(12)[0], np.eye(12), 1.0  # R = 1, along a direction that is soon learned
        fits, goals = [], []
        for part in task_rows((n, n)):
            left, root, right = np.linalg.svd(phi[part] / n**0.5, full_matrices=False)
            stop = stopping.rademacher_rule(Spectrum(root**2), sigma).eta * (1e6 if broken else 1)
            fits.append((right.T * (-np.expm1(-stop * root**2) / root)) @ left.T / n**0.5)
            goals.append(phi[part] @ goal)
        errors = []
        for signs in product((-1.0, 1.0), repeat=2 * n):
            noise = sigma * np.array(signs)
            taus = [fit @ (g + w) for fit, g, w in zip(fits, goals, (noise[:n], noise[n:]), strict=True)]
            delta = c @ taus
            errors.append(
                abs(
                    delta @ hessian @ delta - sum(w * (t @ hessian @ t) for w, t in zip(c, taus, strict=True))
                )
                / 2
            )
        total = np.abs(c).sum()
        bound = beta / 2 * (1 + total) * total * (1 + 1 / (4 * E**2))
        worst = max(worst, float(np.mean(errors)) / bound)
    return Verdict(bool(worst <= 1), f"the error reaches {worst:.2f} of the bound")


CLAIMS = (
    Claim(
        "prop-mt-crosstalk",
        CHAPTER,
        "Cross-talk is at most √λ_1 times the cosine of the smallest principal angle times the length of the vector.",
        "numeric",
        cross_talk,
    ),
    Claim(
        "prop-mt-noise",
        CHAPTER,
        "Label noise alone gives a mean squared cross-talk of (σ²/n)Σ(s²/λ)q, which grows with the training time.",
        "numeric",
        noise_talk,
    ),
    Claim(
        "thm-mt-sum",
        CHAPTER,
        "All weighted sums are joint training at all times if and only if cross-talk vanishes on what the residuals reach.",
        "numeric",
        sum_is_joint,
    ),
    Claim(
        "thm-mt-duhamel",
        CHAPTER,
        "Sum and joint training differ by an integral over the cross-talk, of second order in time and first in the overlap.",
        "numeric",
        duhamel,
    ),
    Claim(
        "prop-mt-xi",
        CHAPTER,
        "In the tangent the disentanglement error is a separable quadratic; curvature changes its root by β times lengths.",
        "numeric",
        disentangled,
    ),
    Claim(
        "prop-mt-early",
        CHAPTER,
        "At their stops vectors compose with a mean error of at most 0.52β(1+C)Σ|c|R², C = Σ|c|, in a model of curvature β.",
        "numeric",
        early_stops,
    ),
)
