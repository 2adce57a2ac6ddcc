"""How fast does the kernel of a random network settle as its width grows, and how far does it move in training?

Three parts; the predictions were written before any number was seen. *Sweep*: for each depth and width, the kernels of
independent random ReLU networks on eight fixed points of the sphere, against the limit; the root mean square of the relative
Frobenius error is fitted by a power of the width, from width 64 on. Predicted: -1/2. *Movement*: the same points, one hidden
layer, gradient descent to a fixed kernel time; how far weights and kernel have moved. Predicted: -1/2 for the weights; for the
kernel -1 with a smooth activation and -3/4 with a kink. The last was wrong (the chapter says why), and a second run added wider
networks and *pairs*: units come in pairs of opposite sign, so that f_0 = 0, and the change of the kernel is split into its mean
over networks, predicted as -1/2, and its spread, -3/4. *Not iid*: one layer whose units are independent,
have heavy-tailed output weights (predicted: -1/3 for the median error), or share a common part (predicted: a plateau).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ntkft.analytic import cosine_of, finite_mlp_readout, gaussian_moments, input_rows, mlp_kernels
from ntkft.experiments.result import resumable
from ntkft.ntk.engine import empirical_ntk
from ntkft.readout import Readout

DEPTHS = (1, 2, 3)
WIDTHS = {"quick": 2 ** np.arange(4, 10), "full": 2 ** np.arange(4, 13)}
SEEDS = {"quick": 30, "full": 60}
TRAINED_WIDTHS = {"quick": 4 ** np.arange(2, 6), "full": 2 ** np.arange(4, 15)}
TRAINED_SEEDS = {"quick": 8, "full": 60}
PAIR_WIDTHS = {"quick": 4 ** np.arange(3, 6), "full": 4 ** np.arange(4, 8)}
PAIR_SEEDS = {"quick": 40, "full": 150}
UNITS = {"quick": 2 ** np.arange(4, 13), "full": 2 ** np.arange(4, 17)}
FIT_FROM = 64
POINTS, DIMENSION = 8, 4
TIME, STEP = 10.0, 0.2  # kernel time and step size of the movement, in units of 1/λ_1 of the limit kernel
SHARED = 0.25  # squared correlation of the units that share a common part
FAMILIES = ("independent", "heavy tails", "shared part")
NAME = "ntkft.experiments.random_ntk"


def relu_unit_variance(x: ArrayLike, other: ArrayLike | None = None) -> np.ndarray:
    r"""Return C(x, x'), the variance of one unit's share of the tangent kernel: one hidden layer, ReLU, ω² = 1, no bias.

    The kernel of m units has variance exactly C/m. At angle γ, with unit inputs,
    :math:`C = \kappa_2 + 2\cos\gamma\,\kappa_1 + 3\cos^2\gamma\,\kappa_0 - (\kappa_1 + \cos\gamma\,\kappa_0)^2`.

    Inputs (n, d) and (m, d) give (n, m).

    Example
    -------
    >>> relu_unit_variance([[1.0, 0.0]]).item()
    3.0
    """
    rows = input_rows(x)
    columns = rows if other is None else input_rows(other)
    a, b = (rows**2).sum(1)[:, None], (columns**2).sum(1)
    cosine = cosine_of(rows @ columns.T, a, b)
    one, zero = gaussian_moments(cosine, 1.0, 1.0)
    sine, angle = np.sqrt((1 - cosine) * (1 + cosine)), np.arccos(cosine)
    two = (3 * sine * cosine + (np.pi - angle) * (1 + 2 * cosine**2)) / (2 * np.pi)
    unit = two + 2 * cosine * one + 3 * cosine**2 * zero - (one + cosine * zero) ** 2
    return a * b * unit


def circle_coefficients(frequencies: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the exact eigenvalues of NNGP and NTK on the circle: one hidden ReLU layer, ω² = 1, no bias.

    The eigenfunctions are cos(jα) and sin(jα); for even j the eigenvalues are :math:`2/(\pi^2(j^2-1)^2)` and
    :math:`(j^2+3)/(\pi^2(j^2-1)^2)`, for j = 1 they are 1/8 and 1/4, and for odd j > 1 they are zero.

    Example
    -------
    >>> circle_coefficients([1, 3])[1]
    array([0.25, 0.  ])
    """
    j = np.abs(np.asarray(frequencies)).astype(np.float64)
    even = j % 2 == 0
    bottom = np.pi**2 * np.where(even, j**2 - 1, 1.0) ** 2
    covariance = np.where(even, 2 / bottom, np.where(j == 1, 1 / 8, 0.0))
    return covariance, np.where(even, (j**2 + 3) / bottom, np.where(j == 1, 1 / 4, 0.0))


def points(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the fixed inputs, (8, 4) of length one, and standard normal labels (8,)."""
    rng = np.random.default_rng((seed, 0))
    x = rng.standard_normal((POINTS, DIMENSION))
    return x / np.linalg.norm(x, axis=1, keepdims=True), rng.standard_normal(POINTS)


def kernel_of(readout: Readout) -> np.ndarray:
    """Return the tangent kernel (8, 8) of a network on its own inputs."""
    return empirical_ntk(readout, [str(i) for i in range(POINTS)], progress=False).matrix


def sweep(x: np.ndarray, depth: int, widths: np.ndarray, seeds: int, seed: int) -> dict[str, np.ndarray]:
    """Return relative errors of the kernel and outputs at x_0, both (widths, seeds)."""
    limit = mlp_kernels(x, depth=depth, weight_variance=2.0)[1]
    errors, outputs = np.empty((len(widths), seeds)), np.empty((len(widths), seeds))
    for i, width in enumerate(widths):
        for s in range(seeds):
            readout = finite_mlp_readout(
                x, int(width), depth, seed=_seed(seed, depth, width, s), weight_variance=2.0
            )
            errors[i, s] = np.linalg.norm(kernel_of(readout) - limit) / np.linalg.norm(limit)
            outputs[i, s] = readout.scores(["0"])[0]
    return {"errors": errors, "outputs": outputs}


def movement(
    x: np.ndarray, y: np.ndarray, activation: str, widths: np.ndarray, seeds: int, seed: int
) -> dict[str, np.ndarray]:
    """Train to kernel time TIME/λ_1; return relative movements and the residuals left, (widths, seeds) each."""
    top = np.linalg.eigvalsh(mlp_kernels(x, activation=activation)[1] / POINTS)[-1]
    target, texts = torch.from_numpy(y), [str(i) for i in range(POINTS)]
    kernel, weights, left = (np.empty((len(widths), seeds)) for _ in range(3))
    for i, width in enumerate(widths):
        for s in range(seeds):
            readout = finite_mlp_readout(x, int(width), 1, activation, _seed(seed, 9, width, s))
            before, ids = kernel_of(readout), readout.collate(readout.encode(texts))
            theta = list(readout.parameters().values())
            start, first = [p.detach().clone() for p in theta], readout.scores(texts) - y
            for _ in range(round(TIME / STEP)):
                loss = ((readout.module(**ids) - target) ** 2).sum() / (2 * POINTS)
                gradient = torch.autograd.grad(loss, theta)
                with torch.no_grad():
                    for p, g in zip(theta, gradient, strict=True):
                        p -= STEP / top * g
            after = kernel_of(readout)
            kernel[i, s] = np.linalg.norm(after - before) / np.linalg.norm(before)
            moved = sum(float(((p.detach() - q) ** 2).sum()) for p, q in zip(theta, start, strict=True))
            weights[i, s] = (moved / sum(float((q**2).sum()) for q in start)) ** 0.5
            left[i, s] = np.linalg.norm(readout.scores(texts) - y) / np.linalg.norm(first)
    return {"kernel": kernel, "weights": weights, "left": left}


def layer_kernel(x: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the tangent kernel of one hidden ReLU layer with weights w (m, d) and v (m,)."""
    z = x @ w.T  # (n, m)
    a, active = np.maximum(z, 0), (z > 0).astype(np.float64)
    return (a @ a.T + (active * v**2) @ active.T * (x @ x.T)) / len(v)


def pairs(x: np.ndarray, y: np.ndarray, widths: np.ndarray, seeds: int, seed: int) -> np.ndarray:
    """Train ReLU layers of paired units, f_0 = 0, to kernel time TIME/λ_1; return changes of the kernel, (widths, seeds, n²)."""
    limit = mlp_kernels(x)[1]
    step = STEP / np.linalg.eigvalsh(limit / POINTS)[-1]
    changes = np.empty((len(widths), seeds, POINTS**2))
    for i, m in enumerate(widths):
        for s in range(seeds):
            rng = np.random.default_rng((seed, 2, m, s))
            w, v = rng.standard_normal((m // 2, x.shape[1])), rng.standard_normal(m // 2)
            w, v = np.concatenate([w, w]), np.concatenate([v, -v])
            before = layer_kernel(x, w, v)
            for _ in range(round(TIME / STEP)):
                z = x @ w.T
                error = (np.maximum(z, 0) @ v / m**0.5 - y) / POINTS  # (n,)
                by_v = error @ np.maximum(z, 0) / m**0.5
                by_w = ((z > 0) * v * error[:, None]).T @ x / m**0.5
                w, v = w - step * by_w, v - step * by_v
            changes[i, s] = (layer_kernel(x, w, v) - before).ravel()
    return changes / np.linalg.norm(limit)


def mean_and_spread(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split changes (widths, seeds, n²): the norm of the mean over networks, less what sampling adds to it, and the spread."""
    squared_spread = changes.var(1, ddof=1).sum(-1)  # (widths,)
    squared_mean = (changes.mean(1) ** 2).sum(-1) - squared_spread / changes.shape[1]
    return np.sqrt(np.maximum(squared_mean, 1e-300)), np.sqrt(squared_spread)


def pair_powers(widths: np.ndarray, changes: np.ndarray, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return the powers of the width in mean and spread with 95 % bootstrap intervals over networks."""
    logs = np.log(widths) - np.log(widths).mean()
    rng, weights = np.random.default_rng(seed), logs / (logs**2).sum()
    fits = np.empty((501, 2))
    for k in range(501):  # the first is the fit itself
        picked = rng.integers(changes.shape[1], size=changes.shape[:2])
        sample = np.take_along_axis(changes, picked[..., None], 1) if k else changes
        fits[k] = [np.log(part) @ weights for part in mean_and_spread(sample)]
    low, high = np.quantile(fits[1:], [0.025, 0.975], axis=0)
    return {
        f"pair_{name}_slope": _interval((fits[0, c], low[c], high[c]))
        for c, name in enumerate(("mean", "spread"))
    }


def one_layer_kernel(x: np.ndarray, units: int, family: str, rng: np.random.Generator) -> np.ndarray:
    """Return the tangent kernel of random units; each unit alone has w ~ N(0, I) and E v² = 1 in every family."""
    w = rng.standard_normal((units, x.shape[1]))
    if family == "shared part":
        w = SHARED**0.5 * rng.standard_normal(x.shape[1]) + (1 - SHARED) ** 0.5 * w
    v = rng.standard_t(3, units) / 3**0.5 if family == "heavy tails" else rng.standard_normal(units)
    return layer_kernel(x, w, v)


def not_iid(x: np.ndarray, units: np.ndarray, seeds: int, seed: int) -> np.ndarray:
    """Return relative errors (families, units, seeds) against the limit kernel of independent units."""
    limit = mlp_kernels(x)[1]
    errors = np.empty((len(FAMILIES), len(units), seeds))
    for f, family in enumerate(FAMILIES):
        for i, m in enumerate(units):
            for s in range(seeds):
                rng = np.random.default_rng((seed, 1, f, m, s))
                errors[f, i, s] = np.linalg.norm(one_layer_kernel(x, int(m), family, rng) - limit)
    return errors / np.linalg.norm(limit)


def _rms(draws: np.ndarray) -> np.ndarray:
    return np.sqrt((draws**2).mean(-1))


def _median(draws: np.ndarray) -> np.ndarray:
    return np.median(draws, -1)


def power(
    widths: np.ndarray,
    draws: np.ndarray,
    level: float,
    seed: int = 0,
    *,
    size: Callable[[np.ndarray], np.ndarray] = _rms,
) -> tuple[float, float, float]:
    """Return the power of the width in the `size` of the draws (widths, seeds), with its bootstrap interval.

    Draws are resampled within each width, since networks of different widths are independent.
    """
    used = widths >= FIT_FROM
    logs, picked = np.log(widths[used]), draws[used]
    weights = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()

    rng = np.random.default_rng(seed)
    index = rng.integers(draws.shape[1], size=(2000, *picked.shape))
    resampled = np.take_along_axis(np.broadcast_to(picked, index.shape), index, -1)
    low, high = np.quantile(np.log(size(resampled)) @ weights, [(1 - level) / 2, (1 + level) / 2])
    return float(np.log(size(picked)) @ weights), float(low), float(high)


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run the three parts; see the module docstring."""
    (x, y), keep = points(seed), tier == "full"
    widths, seeds, trained = WIDTHS[tier], SEEDS[tier], TRAINED_WIDTHS[tier]
    arrays: dict[str, np.ndarray] = {"widths": widths, "trained_widths": trained, "units": UNITS[tier]}
    values: dict[str, Any] = {
        "seeds": seeds,
        "trained_seeds": TRAINED_SEEDS[tier],
        "points": POINTS,
        "fit_from": FIT_FROM,
    }
    for depth in DEPTHS:
        part = resumable(
            NAME, f"sweep-{depth}-{seed}", functools.partial(sweep, x, depth, widths, seeds, seed), keep=keep
        )
        arrays[f"errors_{depth}"], arrays[f"outputs_{depth}"] = part["errors"], part["outputs"]
        # Three intervals at once: each has level 1 - 0.05/3, together they have 95 %.
        values[f"slope_{depth}"] = _interval(power(widths, part["errors"], 1 - 0.05 / len(DEPTHS)))
        values[f"constant_{depth}"] = float(((part["errors"][-1] ** 2).mean() * widths[-1]) ** 0.5)
        values[f"output_{depth}"] = float((part["outputs"] ** 2).mean() ** 0.5)
    variance, limit = relu_unit_variance(x), mlp_kernels(x)[1]
    exact = float((variance.sum() / (limit**2).sum()) ** 0.5)
    values["exact_constant"] = exact
    values["constant_ratio"] = _interval(_ratio(widths, arrays["errors_1"], exact))
    for activation in ("relu", "erf"):
        part = resumable(
            NAME,
            f"movement-{activation}-{seed}",
            functools.partial(movement, x, y, activation, trained, TRAINED_SEEDS[tier], seed),
            keep=keep,
        )
        for what in ("kernel", "weights", "left"):
            arrays[f"{what}_{activation}"] = part[what]
        for what in ("kernel", "weights"):
            values[f"{what}_slope_{activation}"] = _interval(power(trained, part[what], 0.95))
        values[f"left_{activation}"] = float(np.median(part["left"]))
    widths_of_pairs, many = PAIR_WIDTHS[tier], PAIR_SEEDS[tier]
    changes = resumable(
        NAME, f"pairs-{seed}", lambda: {"changes": pairs(x, y, widths_of_pairs, many, seed)}, keep=keep
    )["changes"]
    values |= pair_powers(widths_of_pairs, changes) | {"pair_seeds": many}
    arrays["pair_widths"] = widths_of_pairs
    arrays["pair_mean"], arrays["pair_spread"] = mean_and_spread(changes)
    errors = resumable(
        NAME, f"not-iid-{seed}", lambda: {"errors": not_iid(x, UNITS[tier], seeds, seed)}, keep=keep
    )["errors"]
    for f, family in enumerate(FAMILIES):
        values[f"{family.replace(' ', '_')}_slope"] = _interval(
            power(UNITS[tier], errors[f], 0.95, size=_median)
        )
        values[f"{family.replace(' ', '_')}_last"] = float(np.median(errors[f, -1]))
    return values, arrays | {"not_iid": errors}


def _ratio(widths: np.ndarray, errors: np.ndarray, exact: float) -> tuple[float, float, float]:
    """Return √(mean m·error²) over all widths and draws, divided by its exact value, with a 95 % bootstrap interval."""
    scaled = errors**2 * widths[:, None] / exact**2
    rng = np.random.default_rng(0)
    index = rng.integers(scaled.shape[1], size=(2000, *scaled.shape))
    resampled = np.take_along_axis(np.broadcast_to(scaled, index.shape), index, -1).mean((1, 2)) ** 0.5
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(scaled.mean() ** 0.5), float(low), float(high)


def _interval(numbers: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), numbers, strict=True))


def _seed(seed: int, part: int, width: int, draw: int) -> int:
    """Return one integer for a torch generator, different for each network."""
    return int(np.random.SeedSequence((seed, part, int(width), draw)).generate_state(1)[0])
