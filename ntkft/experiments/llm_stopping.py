"""All stopping rules on the same footing: language models, domains, raters, sample sizes, both losses.

The kernels are stored (`llm_kernels`). A draw permutes the texts of a domain (the first 512, or as many as the kernel has),
takes 128 for testing (64 where the kernel is too small) and the next n for training, and gives each training text the mean of m
raters drawn at random. The path is that of the centred kernel with a free intercept. Errors are measured against the mean of
all raters. Conventions, fixed before any error was seen: batches of 16, steps of 0.5/λ_1 of the centred kernel (logistic:
2/λ_1, since its curvature is a quarter); the practitioner looks once an epoch with patience 3, never beyond `LOOKS` epochs.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, xlogy

import ntkft
from ntkft import stopping
from ntkft.descent import Descent
from ntkft.experiments.llm_kernels import DOMAINS, TOPICS, stored
from ntkft.experiments.llm_kernels import path as kernel_path
from ntkft.experiments.result import resumable
from ntkft.logistic import cross_entropy, logistic_path
from ntkft.ntk import Kernel
from ntkft.tasks import Task

TEXTS, TEST, BATCH, STEP, LOOKS, PATIENCE = 512, 128, 16, 0.5, 1024, 3
SIZES, RATERS, MIDDLE, PAIRS = (64, 128, 256, 384), (1, 2, 5, 10), 128, 96
DRAWS = {"quick": 6, "full": 40}
PRETRAINED = (*(f"smollm2-{d}" for d in DOMAINS), *(f"minilm-{d}-{s}" for s in (0, 1, 2) for d in DOMAINS))
TWINS = (*(f"random-{d}-0" for d in DOMAINS), "smollm2random-amazon", "smollm2random-tweets")
TWO_CLASS = (
    *(f"smollm2-{t}" for t in (*DOMAINS, *TOPICS)),
    *(f"minilm-{t}-0" for t in (*DOMAINS, *TOPICS)),
)
KERNELS = {
    "quick": (("smollm2-tweets", "minilm-amazon-0"), ("minilm-newsgroups-0", "minilm-amazon-0")),
    "full": ((*PRETRAINED, *TWINS), TWO_CLASS),
}
NORM_RULES = ("rademacher", "true_norm", "plug_in", "truncated", "prior_norm")
RULES = (
    *NORM_RULES,
    "evidence",
    "sure",
    "gcv",
    "discrepancy",
    "holdout",
    "holdout_refit",
    "epochs3",
    "never",
)
LOGISTIC_RULES = ("worst_case", "known_noise", "deviance", "holdout", "holdout_refit", "epochs3", "never")
NORMS = np.geomspace(0.03, 30, 25)
BUDGETS = np.geomspace(0.05, 50, 19)  # epochs times ελ_1
LEAST = 10  # raters with an opinion, for a text to have a sign


@lru_cache(maxsize=2)
def loaded(name: str) -> tuple[Kernel, Task]:
    """Return kernel and task of the first texts."""
    kernel, task = stored(name)
    first = np.arange(min(TEXTS, kernel.n))
    return kernel.block(first), task.subset(first)


@cache
def labels(domain: str, n: int, raters: int, seed: int) -> tuple[np.ndarray, float]:
    """Return the labels of the first n texts by `raters` raters, and σ (exact, over the texts)."""
    task = ntkft.load_task(domain, n=n, seed=0).redraw(raters, seed)
    return task.y, float(np.sqrt(task.noise_variance or np.nan))


def cut(n: int, size: int, draw: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training, and TEST rows for testing or what is left."""
    order = np.random.default_rng((seed, draw)).permutation(n)
    test = min(TEST, n - size)
    return order[test : test + size], order[:test]


def patient(errors: np.ndarray) -> int:
    """Return the best look before the first PATIENCE looks in a row without improvement."""
    best, waited = 0, 0
    for look in range(1, len(errors)):
        best, waited = (look, 0) if errors[look] < errors[best] else (best, waited + 1)
        if waited >= PATIENCE:
            break
    return best


def prior_scale(path: Descent, sigma: float) -> float:
    """Return τ² of greatest likelihood when the target is a Gaussian process with kernel τ²k: z_j²/n ~ τ²λ_j + σ²/n."""
    power, noise = (path.vectors.T @ centred_labels(path)) ** 2 / path.n, sigma**2 / path.n
    real = path.eigenvalues > 1e-9 * path.eigenvalues[0]
    lam, power = path.eigenvalues[real], power[real]

    def surprise(log_scale: float) -> float:
        variance = np.exp(log_scale) * lam + noise
        return float((np.log(variance) + power / variance).sum())

    # The grid finds the valley, Brent its floor. The unit of τ²: all of the labels' power is signal.
    grid = np.log(power.sum() / lam.sum()) + np.linspace(-12, 6, 73)
    k = int(np.argmin([surprise(g) for g in grid]))
    ends = (grid[max(k - 1, 0)], grid[min(k + 1, 72)])
    return float(np.exp(minimize_scalar(surprise, bounds=ends, method="bounded").x))


def centred_labels(path: Descent) -> np.ndarray:
    """Return y - f0 minus its mean, (n,)."""
    left = path.y - path.f0
    return left - left.mean()


def true_norm(path: Descent, truth: np.ndarray) -> float:
    """Return the Hilbert norm of the truth's centred part; two texts that the model cannot tell apart do not count."""
    real = path.eigenvalues > 1e-9 * path.eigenvalues[0]
    theta = path.vectors.T @ (truth - path.f0 - (truth - path.f0).mean())
    return float(np.sqrt((theta[real] ** 2 / (path.n * path.eigenvalues[real])).sum()))


def truncated_norm(path: Descent, sigma: float) -> float:
    """Return R with R² = Σ_{j≤k}(z_j²/n - σ²/n)/λ_j, k the rank at which the rule with this R stops."""
    lam = path.eigenvalues[path.eigenvalues > 1e-9 * path.eigenvalues[0]]
    power = (path.vectors.T @ centred_labels(path))[: len(lam)] ** 2 / path.n
    squared = np.cumsum((power - sigma**2 / path.n) / lam)
    count = np.minimum(path.eigenvalues / lam[:, None], 1).sum(1)  # N at η = 1/λ_k
    over = count / (path.n * lam) > squared / (4 * np.e**2 * sigma**2)
    k = int(np.argmax(over)) if over.any() else len(lam) - 1
    return float(np.sqrt(max(squared[k], squared[0] / 100, 1e-6)))


def plug_in_norm(path: Descent, sigma: float) -> float:
    """Return the fixed point R = ‖f - f0‖ at the rule's own time, from R = 1."""
    real = path.eigenvalues > 1e-9 * path.eigenvalues[0]
    power = (path.vectors.T @ centred_labels(path))[real] ** 2 / (path.n * path.eigenvalues[real])
    norm = 1.0
    for _ in range(25):
        eta = stopping.rademacher_rule(path.spectrum, sigma, norm).eta
        norm = max(float(np.sqrt((path.filter(eta)[real] ** 2 * power).sum())), 1e-3)
    return norm


def square_draw(kernel: Kernel, task: Task, size: int, raters: int, draw: int, seed: int) -> dict[str, Any]:
    """Stop by every rule on one draw; return times, errors on test and training texts, and what explains them."""
    train, test = cut(kernel.n, size, draw, seed)
    y, sigma = labels(task.name, kernel.n, raters, seed * 10_000 + draw)
    square, cross, f_star = kernel.block(train), kernel.block(test, train), task.reference
    path = ntkft.descend(square, y[train], intercept=True)
    spectrum, top = path.spectrum, path.eigenvalues[0]
    scale = prior_scale(path, sigma)

    def test_error(eta: Any) -> Any:
        return ((path.predict(eta, cross) - f_star[test]) ** 2).mean(-1)

    kept = train[np.random.default_rng((seed, draw, 1)).permutation(size) >= round(0.2 * size)]
    held = np.setdiff1d(train, kept)
    watched = ntkft.descend(kernel.block(kept), y[kept], intercept=True)
    gap = len(kept) / BATCH * STEP / watched.eigenvalues[0]
    looks = np.arange(LOOKS) * gap
    seen = ((watched.predict(looks, kernel.block(held, kept)) - y[held]) ** 2).mean(-1)
    found = float(looks[patient(seen)])

    norms = {
        "rademacher": 1.0,
        "true_norm": true_norm(path, f_star[train]),
        "plug_in": plug_in_norm(path, sigma),
        "truncated": truncated_norm(path, sigma),
    }
    eta = {rule: stopping.rademacher_rule(spectrum, sigma, norm).eta for rule, norm in norms.items()}
    eta |= {
        "prior_norm": size * scale / (4 * np.e**2 * sigma**2),
        "evidence": size * scale / sigma**2,
        "sure": stopping.sure_rule(path, sigma).eta,
        "gcv": stopping.gcv_rule(path).eta,
        "discrepancy": stopping.discrepancy_rule(path, sigma).eta,
        "holdout_refit": found,
        "epochs3": 3 * size / BATCH * STEP / top,
        "never": stopping.time_grid(path)[-1],
        "oracle": stopping.oracle_rule(path, f_star[test], cross).eta,
        "oracle_sample": stopping.oracle_rule(path, f_star[train]).eta,
    }
    out: dict[str, Any] = {f"eta_{rule}": value for rule, value in eta.items()} | {"eta_holdout": found}
    for rule, value in eta.items():
        out[f"test_{rule}"] = float(test_error(value))
        out[f"sample_{rule}"] = float(((path.fitted(value) - f_star[train]) ** 2).mean())
    for where, rows in (("test", test), ("sample", train)):
        by_part = watched.predict(found, kernel.block(rows, kept))
        out[f"{where}_holdout"] = float(((by_part - f_star[rows]) ** 2).mean())
    if raters == 1 and size == MIDDLE:
        times = np.array([stopping.rademacher_rule(spectrum, sigma, norm).eta for norm in NORMS])
        out["by_norm"] = test_error(times)
        out["by_budget"] = test_error(BUDGETS * size / BATCH / top)
    raw = square.spectrum()
    active = np.minimum(eta["rademacher"] * path.eigenvalues, 1)
    return out | {
        "sigma": sigma,
        "norm": norms["true_norm"],
        "norm_truncated": norms["truncated"],
        "prior_scale": scale,
        "lambda_1": top,
        "lambda_1_raw": raw.eigenvalues[0],
        "eta_raw": stopping.rademacher_rule(raw, sigma).eta,
        "dimension": active.sum(),
        "above": (active >= 1).mean(),
        "tail_share": active[active < 1].sum() / active.sum(),
        "before": float(test_error(0.0)),
    }


def signs(task: Task, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows with enough opinions, the share p* of positive ones, and the sign of one rater for each.

    Ratings of zero are dropped. Topics have p* in {0, 1}: every text is kept.
    """
    if task.ratings is None:
        return np.arange(len(task)), (1 + task.y) / 2, task.y
    opinions = [r[r != 0] for r in task.ratings]
    rows = np.array([i for i, r in enumerate(opinions) if len(r) >= LEAST])
    rng = np.random.default_rng((seed, 2))
    drawn = np.array([np.sign(rng.choice(opinions[i])) for i in rows])
    return rows, np.array([(opinions[i] > 0).mean() for i in rows]), drawn


def logistic_draw(kernel: Kernel, task: Task, size: int, draw: int, seed: int) -> dict[str, Any]:
    """Stop the logistic flow by every rule on one draw; test error is the cross-entropy against p*, less its entropy."""
    rows, share, drawn = signs(task, seed * 10_000 + draw)
    train, test = cut(len(rows), size, draw, seed)
    square = kernel.block(rows[train])
    y, cross = drawn[train], kernel.block(rows[test], rows[train])
    spectrum = square.spectrum(centre=True)
    grid = np.concatenate([[0.0], np.geomspace(0.03, 1e4, 240)]) / spectrum.eigenvalues[0]
    path = logistic_path(square, y, grid, intercept=True, tolerance=1e-5)
    entropy = -(xlogy(share, share) + xlogy(1 - share, 1 - share))
    scores = path.predict(cross)

    def judge(predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss = cross_entropy(predicted, 2 * share[test] - 1) - entropy[test].mean()
        return loss, ((predicted > 0) == (share[test] > 0.5)).mean(-1)

    kept = np.sort(np.random.default_rng((seed, draw, 1)).permutation(size)[round(0.2 * size) :])
    held = np.setdiff1d(np.arange(size), kept)
    part = square.block(kept)
    gap = len(kept) / BATCH * 4 * STEP / part.spectrum(centre=True).eigenvalues[0]
    looks = np.arange(LOOKS) * gap
    watched = logistic_path(part, y[kept], looks, intercept=True, tolerance=1e-5)
    seen = watched.predict(square.block(held, kept))
    best = patient(cross_entropy(seen, y[held]))
    bayes = 2 * np.sqrt((share[train] * (1 - share[train])).mean())
    if task.ratings is None:  # nobody knows the noise: ask the held-out probabilities
        bayes = 2 * float(np.sqrt((expit(seen[best]) * expit(-seen[best])).mean()))
    loss, accuracy = judge(scores)
    below = path.loss <= entropy[train].mean()
    eta = {
        "worst_case": 4 * stopping.rademacher_rule(spectrum, 1.0).eta,
        "known_noise": 4 * stopping.rademacher_rule(spectrum, float(bayes)).eta,
        "deviance": float(grid[np.argmax(below)] if below.any() else grid[-1]),
        "holdout_refit": float(looks[best]),
        "epochs3": 3 * size / BATCH * 4 * STEP / spectrum.eigenvalues[0],
        "never": float(grid[-1]),
        "oracle": float(grid[np.argmin(loss)]),
    }
    out: dict[str, Any] = {f"eta_{rule}": value for rule, value in eta.items()} | {
        "eta_holdout": float(looks[best])
    }
    for rule, value in eta.items():
        nearest = int(np.argmin(np.abs(grid - value)))  # the grid is fine: 5 % from point to point
        out[f"loss_{rule}"], out[f"accuracy_{rule}"] = float(loss[nearest]), float(accuracy[nearest])
    by_part = watched.predict(kernel.block(rows[test], rows[train][kept]))[best]
    out["loss_holdout"], out["accuracy_holdout"] = (float(v) for v in judge(by_part))
    return out | {"curve": loss[::3], "bayes": bayes, "flips": ((y > 0) != (share[train] > 0.5)).mean()}


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return median and mean over draws, each with its 95 % percentile bootstrap interval."""
    resampled = np.random.default_rng(seed).choice(values, (2000, len(values)))
    out = {"median": np.median(values), "mean": np.mean(values)}
    for name, statistic in (("median", np.median(resampled, axis=1)), ("mean", resampled.mean(1))):
        out[f"{name}_low"], out[f"{name}_high"] = np.quantile(statistic, [0.025, 0.975])
    return {name: round(float(value), 5) for name, value in out.items()}


def lean(values: np.ndarray) -> np.ndarray:
    """Return float32 without its last nine bits, which compresses well; what is left is exact to 1e-4."""
    return (values.astype(np.float32).view(np.int32) & ~0x1FF).view(np.float32)


def cases(name: str, n: int, tier: str) -> list[tuple[int, int]]:
    """Return the (size, raters) that a kernel of n texts allows."""
    if tier == "quick":
        return [(MIDDLE, 1)]
    sizes = [(size, 1) for size in SIZES if size <= n - TEST // 2]
    if name in TWINS or name.endswith(("-1", "-2")):  # other heads and random weights: for comparison only
        return [(MIDDLE, 1)]
    return sizes + [(MIDDLE, raters) for raters in RATERS[1:]]


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run all draws on the kernels that are stored; the lists among the values say which.

    Arrays are named kernel/size/raters/quantity and kernel/logistic/quantity; their first axis is the draw.
    """
    square, two_class = ([name for name in names if kernel_path(name).is_file()] for names in KERNELS[tier])
    arrays: dict[str, np.ndarray] = {"norms": NORMS, "budgets": BUDGETS}

    def stack(draws: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {key: np.array([d[key] for d in draws], dtype=np.float32) for key in draws[0]}

    def square_part(name: str, tier: str) -> dict[str, np.ndarray]:
        kernel, task = loaded(name)
        found: dict[str, np.ndarray] = {}
        for size, raters in cases(name, kernel.n, tier):
            draws = [square_draw(kernel, task, size, raters, k, seed) for k in range(DRAWS[tier])]
            found |= {f"{size}.{raters}.{key}": value for key, value in stack(draws).items()}
        return found

    def logistic_part(name: str, tier: str) -> dict[str, np.ndarray]:
        kernel, task = loaded(name)
        return stack([logistic_draw(kernel, task, PAIRS, k, seed) for k in range(DRAWS[tier])])

    for kind, names, part in (("square", square, square_part), ("logistic", two_class, logistic_part)):
        for name in names:
            compute = partial(part, name, tier)
            found = resumable(__name__, f"{kind}-{name}-{tier}-{seed}", compute, keep=tier == "full")
            prefix = f"{name}/logistic" if kind == "logistic" else name
            arrays |= {f"{prefix}/{k.replace('.', '/')}": lean(v) for k, v in found.items() if k != "seconds"}
    values: dict[str, Any] = {"draws": DRAWS[tier], "kernels": square, "two_class": two_class}
    for key in [k for k in arrays if k.split("/")[-1].startswith(("test_", "sample_", "loss_"))]:
        where, quantity = key.rsplit("/", 1)
        measure, rule = quantity.split("_", 1)
        best = arrays[f"{where}/{measure}_oracle{'_sample' if measure == 'sample' else ''}"]
        # Cross-entropy in nats: the best loss may be near zero, so a ratio would say little.
        excess = arrays[key] - best if measure == "loss" else arrays[key] / best - 1
        values[f"{where}/{'sample_' if measure == 'sample' else ''}{rule}"] = interval(excess)
    return values, arrays
