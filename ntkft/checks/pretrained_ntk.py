"""Checks of the chapter "Pretrained beginnings"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ntkft import heads, stability
from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import Descent, descend
from ntkft.heads import Shape
from ntkft.spectrum import Spectrum
from ntkft.stopping import rademacher_rule

SHAPE = Shape(d=4, k=2, T=4)
KAPPA = 0.2  # curvature of the quadratic heads


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


# --- Quadratic heads: a(x; φ) = ⟨φ, x⟩ + κ/2 ⟨φ, x⟩², whose constants are known on any ball --------------------------------


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


# --- Stored results --------------------------------------------------------------------------------------------------------


def kernel_slopes(broken: bool = False) -> Verdict:
    """The interval of the adversarial exponent contains -0.5, that of Gaussian heads lies below -0.65."""
    values = full_result("pretrained_ntk").values
    slow, fast = values["adversarial_kernel_slope"], values["gaussian_kernel_slope"]
    if broken:
        slow, fast = fast, slow
    return Verdict(
        bool(slow[1] <= -0.5 <= slow[2] and fast[2] < -0.65),
        f"equal heads {slow[0]:.2f} [{slow[1]:.2f}, {slow[2]:.2f}], independent {fast[0]:.2f} [{fast[1]:.2f}, {fast[2]:.2f}]",
    )


def mixed_rate(broken: bool = False) -> Verdict:
    """The exponent's interval contains -1/2, and the measured deviation is within a tenth of the exact one for every H."""
    result = full_result("pretrained_ntk")
    slope, low, high = result.values["mixed_slope"]
    wanted = -1.0 if broken else -0.5
    rms = np.sqrt((result.arrays["mixed_rms"] ** 2).mean(1))
    worst = float(np.abs(rms / result.arrays["mixed_exact"] - 1).max())
    return Verdict(
        bool(low <= wanted <= high and worst < 0.1),
        f"exponent {slope:.3f} [{low:.3f}, {high:.3f}]; deviation within {100 * worst:.1f} % of the formula",
    )


def lora_in_a_real_model(broken: bool = False) -> Verdict:
    """Exponent near -1/2, spread of entries as computed to a fifth, stop within 10 % for ranks of at least 4; broken: 1 %."""
    result = full_result("pretrained_ntk")
    slope, low, high = result.values["lora_slope"]
    arrays = result.arrays
    spread = float(np.sqrt(((arrays["lora_measured"] / arrays["lora_predicted"]) ** 2).mean()))
    stops = np.abs(arrays["lora_stop"][arrays["lora_ranks"] >= 4] - 1)
    return Verdict(
        bool(abs(slope + 0.5) < 0.05 and abs(spread - 1) < 0.2 and stops.max() < (0.01 if broken else 0.1)),
        f"exponent {slope:.3f} [{low:.3f}, {high:.3f}]; spread {spread:.2f} of the formula; stops off by {stops.max():.3f}",
    )


def kernels_that_leave(broken: bool = False) -> Verdict:
    """In every stored run of MiniLM the kernel's change at the predicted stop exceeds λ_1; broken: ten times λ_1."""
    arrays = full_result("pretrained_ntk").arrays
    changes = [change for domain in ("amazon", "tweets") for change in _at_stop(arrays, f"minilm_{domain}")]
    limit = 10.0 if broken else 1.0
    return Verdict(
        bool(min(changes) > limit),
        f"{len(changes)} runs: ‖K_t - K‖/λ_1 at the stop from {min(changes):.2f} to {max(changes):.2f}",
    )


def short_paths(broken: bool = False) -> Verdict:
    """In every stored run the travel at the stop is below lem-travel's bound and twice the tangent's; broken: half as much."""
    arrays = full_result("pretrained_ntk").arrays
    ratios: list[float] = []
    names = [name.removesuffix("_distance") for name in arrays if name.startswith("drift_") and name.endswith("_distance")]
    for name in names:
        for i, eta in enumerate(arrays[f"{name}_eta"]):
            stop = float(arrays[f"{name}_eta_stop"][i])
            look = _look_at_stop(eta, stop)
            distance, losses = arrays[f"{name}_distance"][i, look], arrays[f"{name}_loss"][i]
            allowed = stability.travel(eta[look], losses[0], losses[look], descent=True)
            tangent = stability.tangent_travel(arrays[f"{name}_eigenvalues"][i], arrays[f"{name}_target"][i], stop)
            ratios.append(max(distance / allowed, distance / (2 * tangent)) * (2 if broken else 1))
    return Verdict(
        bool(len(ratios) >= 6 and max(ratios) < 1), f"{len(ratios)} runs: at most {max(ratios):.2f} of the smaller allowance"
    )


def the_larger_model_drifts_less(broken: bool = False) -> Verdict:
    """On tweets SmolLM2's kernel has changed less at its stop, relative to λ_1, than MiniLM's; broken: a fiftieth of it."""
    arrays = full_result("pretrained_ntk").arrays
    small, large = _at_stop(arrays, "minilm_tweets"), _at_stop(arrays, "smollm2_tweets")
    return Verdict(
        bool(max(large) < min(small) / (50 if broken else 1)), f"SmolLM2 {max(large):.2f}, MiniLM at least {min(small):.2f}"
    )


def _look_at_stop(eta: np.ndarray, stop: float) -> int:
    return int(np.abs(eta - stop).argmin())


def _at_stop(arrays: dict[str, np.ndarray], run: str) -> list[float]:
    """Return ‖K_t - K‖_op/λ_1 at the look nearest to the predicted stop, for each head."""
    found = []
    for i, eta in enumerate(arrays[f"drift_{run}_eta"]):
        look = _look_at_stop(eta, float(arrays[f"drift_{run}_eta_stop"][i]))
        found.append(float(arrays[f"drift_{run}_kernel_op"][i, look] / arrays[f"drift_{run}_eigenvalues"][i, 0]))
    return found


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
    Claim(
        "obs-pn-slopes",
        CHAPTER,
        "The kernel's change falls like H^{-1/2} for equal heads, faster for independent ones.",
        "stored",
        kernel_slopes,
    ),
    Claim(
        "prop-mixed",
        CHAPTER,
        "Fresh Gaussian read-outs: the kernel's variance is 2Σc²/H², with a Bernstein tail.",
        "numeric",
        mixed_concentration,
    ),
    Claim(
        "obs-pn-mixed",
        CHAPTER,
        "The deviation of a mixed start's kernel falls with an exponent whose interval contains -1/2.",
        "stored",
        mixed_rate,
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
    Claim(
        "obs-pn-lora",
        CHAPTER,
        "On MiniLM LoRA's kernel error falls like r^{-1/2}, and its stop is within 10 % of the full kernel's from rank 4 on.",
        "stored",
        lora_in_a_real_model,
    ),
    Claim(
        "obs-pn-drift",
        CHAPTER,
        "In every stored run of MiniLM the kernel has changed by more than λ_1 at the predicted stop.",
        "stored",
        kernels_that_leave,
    ),
    Claim(
        "obs-pn-travel",
        CHAPTER,
        "In every stored run the travel at the stop is below the bound of lem-travel and below twice the tangent's.",
        "stored",
        short_paths,
    ),
    Claim(
        "obs-pn-size",
        CHAPTER,
        "On tweets SmolLM2's kernel has changed less at its stop, relative to λ_1, than MiniLM's in either of its runs.",
        "stored",
        the_larger_model_drifts_less,
    ),
)
