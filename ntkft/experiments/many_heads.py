"""A model of H softmax heads, trained from three kinds of start, and every bound of the chapter beside what happened.

*Many heads.* H = 4 to 1024 heads of 57 weights, 16 inputs, σ = 0.1. Starts: "gaussian", independent heads; "pretrained", heads
drawn from a pool that was trained hard on another task; "adversarial", the most curved of 64 heads, copied H times. The
target is f0 plus a function drawn in the unit ball of the start's own kernel. Gradient flow runs to the predicted stop; each
bound is compared with what happened, with L1 and L2 measured at the visited weights only, which makes the bounds as small as
they can be and the test as hard.

*Where it breaks.* Steps beyond the largest safe one, training beyond the stop, few heads.

*Mixed starts.* Fresh Gaussian read-outs on pretrained heads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ntkft
from ntkft import heads, stability
from ntkft.descent import Descent, descend
from ntkft.experiments.result import resumable
from ntkft.heads import DTYPE, Shape

SHAPE = Shape(d=6, k=3, T=5)
N, SIGMA = 16, 0.1
STARTS = ("gaussian", "pretrained", "adversarial")
HEADS = {"quick": (4, 16), "full": (4, 16, 64, 256, 1024)}
SEEDS = {"quick": 1, "full": 4}
BOUNDS = ("gradient", "kernel", "tangent", "travel", "gap", "short")


def pretrained_pool(size: int = 32, seed: int = 0, steps: int = 800) -> Tensor:
    """Return heads (size, P) after long training on another task, in the scaling that lets each head move: the mean of heads."""
    generator = torch.Generator().manual_seed(seed)
    x = heads.tokens(64, SHAPE, seed + 1)
    u, v = torch.randn(2, SHAPE.d, generator=generator, dtype=DTYPE)
    y = 2 * torch.tanh(4 * (x[:, 0] @ u) * (x.mean(1) @ v))
    theta = heads.gaussian_heads(size, SHAPE, seed + 2)
    slope = heads.loss_slope(x, y * size**0.5, SHAPE)  # f fits √size · y where the mean of heads fits y
    return heads.descend_heads(theta, slope, 0.1, steps, flow=False)[-1]


def start_heads(kind: str, count: int, seed: int, pool: Tensor | None = None) -> Tensor:
    """Return θ0 (H, P) of one of `STARTS`; see the module's docstring."""
    if kind == "gaussian":
        return heads.gaussian_heads(count, SHAPE, 2000 + seed)
    if kind == "pretrained":
        assert pool is not None
        generator = torch.Generator().manual_seed(1000 + seed)
        return pool[torch.randint(len(pool), (count,), generator=generator)].clone()
    candidates = heads.gaussian_heads(64, SHAPE, 3000 + seed, scale=1.5)
    curved = heads.head_hessian_norms(candidates, heads.tokens(N, SHAPE, seed), SHAPE).amax(0)
    return candidates[curved.argmax()].repeat(count, 1)


def problem(theta: Tensor, x: Tensor, seed: int, sigma: float = SIGMA) -> tuple[Descent, np.ndarray]:
    """Return the tangent's descent on noisy labels, and the truth (n,): f0 plus a target of Hilbert norm 1."""
    phi = heads.gradients(theta, x, SHAPE)
    n = len(x)
    lam, vectors = np.linalg.eigh((phi @ phi.T).numpy() / n)
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(n) / np.sqrt(np.arange(1, n + 1))[::-1]
    f0 = heads.model(theta, x, SHAPE).numpy()
    truth = f0 + np.sqrt(n) * vectors @ (np.sqrt(np.maximum(lam, 0)) * weights / np.linalg.norm(weights))
    y = truth + sigma * rng.standard_normal(n)
    return descend((phi @ phi.T).numpy(), y, f0), truth


def constants(points: list[Tensor], x: Tensor, part: int = 64) -> tuple[float, float]:
    """Return L1 and L2, the largest ‖∇a‖ and ‖∇²a‖_op over heads, inputs and the given weights."""
    first = max(float(heads.head_gradients(p, x, SHAPE).norm(dim=-1).max()) for p in points)
    second = max(float(heads.head_hessian_norms(p, x, SHAPE, part).max()) for p in points)
    return first, second


def tangent_distance(path: Descent, eta: float) -> float:
    """Return how far the weights of the trained tangent are from θ0 at η."""
    return stability.tangent_travel(path.eigenvalues, path.vectors.T @ (path.y - path.f0) / np.sqrt(path.n), eta)


def one_start(kind: str, count: int, seed: int, pool: Tensor | None) -> dict[str, float]:
    """Train one model by flow to the predicted stop; return each bound, what was measured, and the constants."""
    x = heads.tokens(N, SHAPE, seed)
    theta0 = start_heads(kind, count, seed, pool)
    path, truth = problem(theta0, x, seed)
    stop = ntkft.stopping.rademacher_rule(path.spectrum, SIGMA)
    steps = max(20, int(np.ceil(stop.eta * path.eigenvalues[0] / 0.25)))
    y = torch.tensor(path.y)
    visited = heads.descend_heads(theta0, heads.loss_slope(x, y, SHAPE), stop.eta / steps, steps, flow=True)
    theta = visited[-1]
    L1, L2 = constants([theta0, 0.5 * (theta0 + theta), theta], x)  # on the segment from start to stop
    L0, R = float(0.5 * ((path.f0 - path.y) ** 2).mean()), float((theta - theta0).norm())
    phi0, phi = heads.gradients(theta0, x, SHAPE), heads.gradients(theta, x, SHAPE)
    values = heads.model(theta, x, SHAPE)
    moved = phi @ phi.T - phi0 @ phi0.T
    tangent = torch.tensor(path.f0) + phi0 @ (theta - theta0).flatten()
    beta, r = stability.head_curvature(L2, count), tangent_distance(path, stop.eta)
    certificate, short = stability.short_path(L1, beta, L0, stop.eta, r)
    gap = float(np.sqrt(((values.numpy() - path.fitted(stop.eta)) ** 2).mean()))
    final = float(heads.loss(theta, x, y, SHAPE))
    return {
        "gradient": float((phi - phi0).norm(dim=1).max()),
        "gradient_bound": stability.gradient_change(beta, R),
        "kernel": float(moved.abs().max()),
        "kernel_bound": stability.kernel_change(L1, beta, R),
        "tangent": float((values - tangent).abs().max()),
        "tangent_bound": stability.tangent_gap(beta, R),
        "travel": R,
        "travel_bound": stability.travel(stop.eta, L0, final),
        "gap": gap,
        "gap_bound": stability.dynamics_gap(L1, beta, L0, stop.eta),
        "short": gap,
        "short_bound": short if certificate < 0.5 else np.nan,
        "certificate": certificate,
        "tangent_travel": r,
        "L1": L1,
        "L2": L2,
        "L0": L0,
        "eta": stop.eta,
        "error": float(((values.numpy() - truth) ** 2).mean()),
        "tangent_error": float(((path.fitted(stop.eta) - truth) ** 2).mean()),
        "needed": stability.heads_needed(L1, L2, L0, stop.info["radius"]),
        "needed_short": stability.heads_needed_short(L1, L2, L0, stop.info["radius"], r),
    }


def many_heads(tier: str, seed: int, pool: Tensor) -> dict[str, np.ndarray]:
    """Return ``heads_{start}_{quantity}``, each (counts, seeds)."""
    found = {}
    for kind in STARTS:
        rows = []
        for count in HEADS[tier]:

            def cells(kind: str = kind, count: int = count) -> dict[str, np.ndarray]:
                runs = [one_start(kind, count, 10 * seed + s, pool) for s in range(SEEDS[tier])]
                return {key: np.array([run[key] for run in runs]) for key in runs[0]}

            rows.append(resumable(__name__, f"heads_{kind}_{count}_{seed}", cells, keep=tier == "full"))
        for key in rows[0]:
            if key != "seconds":
                found[f"heads_{kind}_{key}"] = np.array([row[key] for row in rows])
    return found


def long_training(counts: tuple[int, ...] = (2, 8, 32, 128), seed: int = 0) -> dict[str, np.ndarray]:
    """Train Gaussian starts of few and many heads to 64 times the predicted stop; look 13 times on the way.

    Returns
    -------
    dict
        times (13,), in units of the stop; and (counts, 13) each: gap, the distance between network and trained tangent in
        units of the noise level σ; kernel, max |k_t - k_0| over the mean of the diagonal; error and tangent_error to the truth.
    """
    times = np.geomspace(1 / 64, 64, 13)
    found: dict[str, list[list[float]]] = {k: [] for k in ("gap", "kernel", "error", "tangent_error")}
    x = heads.tokens(N, SHAPE, seed)
    for count in counts:
        theta0 = start_heads("gaussian", count, seed)
        path, truth = problem(theta0, x, seed)
        eta = ntkft.stopping.rademacher_rule(path.spectrum, SIGMA).eta
        slope = heads.loss_slope(x, torch.tensor(path.y), SHAPE)
        phi0, theta, now = heads.gradients(theta0, x, SHAPE), theta0, 0.0
        rows: dict[str, list[float]] = {k: [] for k in found}
        for time in times * eta:
            steps = max(1, int(np.ceil((time - now) * path.eigenvalues[0] / 0.25)))
            theta = heads.descend_heads(theta, slope, (time - now) / steps, steps, flow=True)[-1]
            now, phi, values = time, heads.gradients(theta, x, SHAPE), heads.model(theta, x, SHAPE).numpy()
            closed = path.fitted(time)
            rows["gap"].append(float(np.sqrt(((values - closed) ** 2).mean())) / SIGMA)
            size = float((phi0**2).sum(1).mean())
            rows["kernel"].append(float((phi @ phi.T - phi0 @ phi0.T).abs().max()) / size)
            rows["error"].append(float(((values - truth) ** 2).mean()))
            rows["tangent_error"].append(float(((closed - truth) ** 2).mean()))
        for key, row in rows.items():
            found[key].append(row)
    return {"long_times": times, "long_heads": np.array(counts)} | {
        f"long_{k}": np.array(v) for k, v in found.items()
    }


def large_steps(count: int = 8, seed: int = 0, start: str = "gaussian") -> dict[str, np.ndarray]:
    """Gradient descent to the predicted stop with steps of 1/16 to 8 times 1/λ_1; the largest safe step is reported beside.

    Returns
    -------
    dict
        sizes (k,), step size times λ_1; rises (k,), the largest rise of the loss in one step, over L0; travel (k,), ‖θ_t - θ0‖
        over its bound for safe steps; gap (k,), in units of σ (infinite where training diverges); safe, the safe step times λ_1.
    """
    x = heads.tokens(N, SHAPE, seed)
    theta0 = start_heads(start, count, seed)
    path, _ = problem(theta0, x, seed)
    y, lam = torch.tensor(path.y), path.eigenvalues[0]
    eta = ntkft.stopping.rademacher_rule(path.spectrum, SIGMA).eta
    L0 = float(heads.loss(theta0, x, y, SHAPE))
    sizes = 2.0 ** np.arange(-4, 3.5, 0.5)
    rises, travel, gap = [], [], []
    for size in sizes:
        step = size / lam
        steps = max(1, int(eta / step))
        visited = heads.descend_heads(theta0, heads.loss_slope(x, y, SHAPE), step, steps, flow=False)
        losses = np.array([float(heads.loss(theta, x, y, SHAPE)) for theta in visited])
        final = visited[-1]
        fitted = heads.model(final, x, SHAPE).numpy()
        distance = float(np.sqrt(((fitted - path.fitted(steps * step)) ** 2).mean())) / SIGMA
        gap.append(distance if np.isfinite(distance) else np.inf)
        rises.append(np.nan_to_num(np.diff(losses).max() / L0, nan=np.inf))
        moved = float((final - theta0).norm()) / stability.travel(steps * step, L0, descent=True)
        travel.append(np.nan_to_num(moved, nan=np.inf))
    L1, L2 = constants([theta0], x)
    safe = stability.safe_step(L1, stability.head_curvature(L2, count), L0) * lam
    arrays = {"sizes": sizes, "rises": rises, "travel": travel, "gap": gap, "safe": safe}
    return {f"steps_{key}": np.array(value) for key, value in arrays.items()}


def mixed_heads(pool: Tensor, draws: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """Fresh Gaussian read-outs on pretrained heads: how fast does k_0 approach its conditional mean?

    Every head of the pool is used H/32 times, each copy with its own read-out, so that the mean is the same for every H.

    Returns
    -------
    dict
        heads (k,); rms (k, draws): root mean square over entries of k_0 - mean, relative to the mean's; exact (k,), the
        same from the variance 2Σc²/H²; failures (k,), the share of entries beyond the Bernstein bound at x = 3; score
        (k, draws), f0 at the first input; score_exact, its standard deviation.
    """
    x = heads.tokens(N, SHAPE, seed)
    phi = heads.each_head(pool, x, SHAPE).numpy()  # (n, 32)
    slopes = heads.head_gradients(pool, x, SHAPE).numpy()  # (n, 32, P)
    c = np.einsum("ihp,jhp->hij", slopes, slopes)  # (32, n, n)
    mean = (phi @ phi.T + c.sum(0)) / len(pool)
    size = np.sqrt((mean**2).mean())
    counts = len(pool) * 4 ** np.arange(5)
    rng = np.random.default_rng(seed)
    rms, exact, failures, score = [], [], [], []
    for count in counts:
        copies = int(count) // len(pool)
        v = rng.standard_normal((draws, len(pool), copies))
        gap = np.tensordot((v**2 - 1).sum(2), c, 1) / count  # (draws, n, n)
        second = copies * (c**2).sum(0)
        rms.append(np.sqrt((gap**2).mean((1, 2))) / size)
        exact.append(np.sqrt((2 * second / count**2).mean()) / size)
        bound = (2 * np.sqrt(3 * second) + 6 * np.abs(c).max(0)) / count
        failures.append((np.abs(gap) > bound).mean())
        score.append(v.sum(2) @ phi[0] / np.sqrt(count))
    arrays = {"heads": counts, "rms": rms, "exact": exact, "failures": failures, "score": score}
    arrays["score_exact"] = np.sqrt((phi[0] ** 2).mean())
    return {f"mixed_{key}": np.array(value) for key, value in arrays.items()}
