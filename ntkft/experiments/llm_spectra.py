r"""What the spectrum of a language model's kernel, and the target's place in it, foretell of learning curves; what comes true.

Three parts. `describe` reads a kernel: decay, effective dimension, where the target lies, the best time. `draw_curve` trains
(in closed form, with a free intercept) on n = 32..768 texts with one rater each and measures errors against all raters.
`foretell` and `off_sample` compute such curves without any training, from the eigenvalues and the target of a large kernel.

Kernels come stored from `ntkft.experiments.llm_kernels`, those of a pretraining run from ``results/llm_spectra/pretraining``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ntkft
from ntkft import stopping
from ntkft.decay import ranks, select_decay
from ntkft.descent import Descent
from ntkft.experiments.llm_kernels import FOLDER, stored
from ntkft.experiments.llm_kernels import path as kernel_path
from ntkft.experiments.result import resumable
from ntkft.ntk import Kernel
from ntkft.tasks import Task

DOMAINS = ("amazon", "movies", "nyt", "tweets")
TOPICS = ("newsgroups", "reuters")
FULL = (
    *(f"minilm-{task}-0" for task in (*DOMAINS, *TOPICS)),
    *(f"random-{task}-0" for task in (*DOMAINS, *TOPICS)),
    *(f"smollm2-{task}" for task in (*DOMAINS, *TOPICS)),
    *(f"minilm-{task}-{head}" for head in (1, 2) for task in DOMAINS),
    *(f"smollm2random-{task}" for task in ("amazon", "tweets")),
)
QUICK = ("minilm-amazon-0", "smollm2-amazon")
CURVES = {
    "full": [f"minilm-{d}-0" for d in DOMAINS] + [f"smollm2-{d}" for d in DOMAINS],
    "quick": list(QUICK),
}
SIZES = (32, 64, 128, 192, 256, 384, 512, 768)
LARGEST = {"full": 10_000, "quick": 128}
DRAWS, SPLITS = {"full": 40, "quick": 8}, {"full": 20, "quick": 4}
COMMON = 192  # texts of every kernel when kernels are compared
AT = (1, 2, 5, 10, 20, 50, 100)  # ranks of the cumulative power
POINTS = 240  # kernel times
NOISES = (1, 4, 16, 64)  # multiples of one rater's variance, for risks in closed form
ERRORS = ("sample", "test_at_sample", "test", "sample_rule", "test_rule", "test_start", "eta", "eta_rule")
STATS = (*ERRORS, *(f"expected_{factor}" for factor in NOISES))
PRETRAINING = FOLDER / "pretraining"


def theta2(path: Descent, reference: np.ndarray) -> np.ndarray:
    """Return θ_j² = (u_j·(f* - f0))²/n in the centred kernel's eigenvectors, (n,); they add up to the variance of f* - f0."""
    g = reference - path.f0
    return (path.vectors.T @ (g - g.mean())) ** 2 / path.n


def times(eigenvalues: np.ndarray) -> np.ndarray:
    """Return 0 and `POINTS` kernel times, from before the first eigenvector is learned to long after the middle one is."""
    middle = eigenvalues[len(eigenvalues) // 2]
    return np.r_[0.0, np.geomspace(0.01 / eigenvalues[0], 30 / middle, POINTS)]


def expected_risk(eigenvalues: np.ndarray, power: np.ndarray, variance: float, eta: np.ndarray) -> np.ndarray:
    """Return squared bias plus variance at each η, (k,); `variance` is σ²/n, and the intercept costs one more of it."""
    share = -np.expm1(-eta[:, None] * eigenvalues)
    return (1 - share) ** 2 @ power + variance * ((share**2).sum(1) + 1)


def off_sample(eigenvalues: np.ndarray, power: np.ndarray, sigma: float, n: int) -> float:
    """Return the least error that ridge on n texts is foretold to have on new ones (deterministic equivalent).

    Source: Canatar, Bordelon & Pehlevan 2021; Simon et al. 2023.
    """
    kappa = np.geomspace(eigenvalues[0] * 1e3, eigenvalues[eigenvalues > 1e-9 * eigenvalues[0]][-1], 400)[
        :, None
    ]
    kept = eigenvalues / (eigenvalues + kappa)
    free, squared = kept.sum(1), (kept**2).sum(1)
    inside = free < n  # κ below this would need a negative ridge penalty
    risk = ((1 - kept) ** 2 @ power + sigma**2 * (squared + 1) / n)[inside] / (1 - squared[inside] / n)
    return float(risk.min())


def folded(k: np.ndarray, s: float, n: int) -> np.ndarray:
    """Return k^(-s) - n^(-s) k/n: a power law of the tail when all beyond rank n is spread evenly over the n directions."""
    return k**-s - float(n) ** -s * k / n


def tail_exponent(power: np.ndarray, first: int, last: int) -> float:
    """Return s of a `folded` tail power, by least squares of logarithms over ranks first..last and s on a grid."""
    tail = power.sum() - np.cumsum(power)  # (n,) entry k-1: power beyond the k largest eigenvalues
    k, grid = np.arange(first, last + 1, dtype=np.float64), np.arange(0.0, 1.5, 0.0025)
    left = [(np.log(tail[first - 1 : last]) - np.log(folded(k, s, len(power)))).var() for s in grid]
    return float(grid[int(np.argmin(left))])


def describe(kernel: Kernel, task: Task, splits: int, seed: int) -> dict[str, np.ndarray]:
    """Read one kernel: decay, target, effective dimension, best time; `half_*` hold one entry for each random half."""
    n = kernel.n
    chosen = select_decay(kernel, splits=splits, seed=seed)
    path = ntkft.descend(kernel, task.reference, intercept=True)
    eigenvalues, power = path.eigenvalues, theta2(path, task.reference)
    first, last = ranks(n, None, None)
    found: dict[str, Any] = {
        "n": n,
        "best": chosen.best,
        "floor": chosen.floor,
        "raw": kernel.spectrum().eigenvalues[0],
        "eigenvalues": eigenvalues,
        "theta2": power,
        "s": tail_exponent(power, first, last),
        "halves_a": chosen.halves["polynomial"]["exponent"],
    }
    for model, fit in chosen.fits.items():
        found |= {f"{model}_{key}": value for key, value in fit.parameters.items()}
        found |= {
            f"score_{model}": chosen.scores[model],
            f"apart_{model}": np.array(chosen.difference[model]),
        }
    rng, halves = np.random.default_rng((seed, n)), []
    for _ in range(splits):
        order = rng.permutation(n)
        halves += [order[: n // 2], order[n // 2 :]]
    each = [ntkft.descend(kernel.block(h), task.reference[h], intercept=True) for h in halves]
    powers = [theta2(p, task.reference[h]) for p, h in zip(each, halves, strict=True)]
    found["halves_s"] = np.array([tail_exponent(p, first, last) for p in powers])
    found["halves_cumulative"] = np.array(
        [np.cumsum(p)[np.minimum(AT, len(p)) - 1] / p.sum() for p in powers]
    )
    if task.ratings is not None:
        found |= _noisy(path, task, each, powers)
    return {key: np.asarray(value) for key, value in found.items()}


def _noisy(path: Descent, task: Task, halves: list[Descent], powers: list[np.ndarray]) -> dict[str, Any]:
    """Return what needs the noise of one rater: the two times, their risks, and the curve foretold from the large kernel."""
    sigma = float(np.sqrt(task.noise_variance or np.nan))
    eigenvalues, power = path.eigenvalues, theta2(path, task.reference)
    grid, rule = times(eigenvalues), stopping.rademacher_rule(path.spectrum, sigma).eta
    risk = expected_risk(eigenvalues, power, sigma**2 / path.n, grid)
    best = int(risk.argmin())
    own = np.array(
        [r.var(ddof=1) / len(r) for r in task.ratings or []]
    )  # variance of each text's mean rating
    blur = (path.vectors**2).T @ own / path.n  # its expected share in θ_j²
    first, last = ranks(path.n, None, None)
    sizes = [n for n in SIZES if n <= 0.75 * path.n]
    few = [n for n in sizes if n <= path.n // 4]
    over_halves = np.array(
        [[off_sample(p.eigenvalues, q, sigma, n) for n in few] for p, q in zip(halves, powers, strict=True)]
    )
    whole = np.array([off_sample(eigenvalues, power, sigma, n) for n in few])
    return {
        "sigma": sigma,
        "eta_rule": rule,
        "d_rule": path.spectrum.effective_dimension(rule),
        "eta_oracle": grid[best],
        "d_oracle": path.spectrum.effective_dimension(grid[best]),
        "risk_oracle": risk[best],
        "norm": path.hilbert_norm(task.reference - path.f0),
        "blur": blur.sum() / power.sum(),
        "s_clear": tail_exponent(np.maximum(power - blur, 0.0), first, last),
        "foretold_n": np.array(sizes),
        "foretold": foretell(path, power, sigma, sizes),
        "off_n": np.array(few),
        "off": whole,
        # one entry for each split: linear in 1/N from N/2 and N texts to infinitely many
        "off_limit": 2 * whole - over_halves.reshape(-1, 2, len(few)).mean(1),
    }


def foretell(path: Descent, power: np.ndarray, sigma: float, sizes: list[int]) -> np.ndarray:
    """Return the least expected risk for n texts, (noises, sizes), when eigenvalues and target stay those of the large kernel."""
    grid, s2 = times(path.eigenvalues), sigma**2
    return np.array(
        [[expected_risk(path.eigenvalues, power, f * s2 / n, grid).min() for n in sizes] for f in NOISES]
    )


def draw_curve(
    kernel: Kernel, task: Task, sizes: tuple[int, ...], test: int, draw: int, seed: int
) -> np.ndarray:
    """Train on the first n of a random order of the texts, for each n, one rater a text; return (sizes, `STATS`)."""
    order = np.random.default_rng((seed, draw)).permutation(kernel.n)
    rated = task.redraw(1, seed=seed * 10_000 + draw)
    sigma, held, rows = float(np.sqrt(rated.noise_variance or np.nan)), order[-test:], []
    for n in sizes:
        train = order[:n]
        path = ntkft.descend(kernel.block(train), rated.y[train], intercept=True)
        rule = stopping.rademacher_rule(path.spectrum, sigma).eta
        grid = np.r_[times(path.eigenvalues), rule]
        sample = ((path.fitted(grid) - task.reference[train]) ** 2).mean(1)
        off = ((path.predict(grid, kernel.block(held, train)) - task.reference[held]) ** 2).mean(1)
        expected = foretell(path, theta2(path, task.reference[train]), sigma, [n])[:, 0]
        best = int(sample[:-1].argmin())
        errors = [sample[best], off[best], off[:-1].min(), sample[-1], off[-1], off[0]]
        rows.append([*errors, grid[best], rule, *expected])
    return np.array(rows)


def slope(sizes: Any, errors: np.ndarray, seed: int = 0) -> list[float]:
    """Return the log-log slope of the mean of `errors` (draws, sizes) and its 95 % bootstrap interval over whole draws."""
    x = np.log(np.asarray(sizes, dtype=np.float64))
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(errors), (2000, len(errors)))
    means = np.vstack([errors.mean(0), errors[picks].mean(1)])
    slopes = np.log(means) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return [float(slopes[0]), *map(float, np.quantile(slopes[1:], [0.025, 0.975]))]


def curves(name: str, tier: str, seed: int) -> dict[str, np.ndarray]:
    """Return all draws of one kernel, (draws, sizes, `STATS`)."""
    kernel, task = stored(name)
    test = kernel.n // 4
    sizes = tuple(n for n in SIZES if n <= min(kernel.n - test, LARGEST[tier]))
    draws = [draw_curve(kernel, task, sizes, test, draw, seed) for draw in range(DRAWS[tier])]
    return {"sizes": np.array(sizes), "draws": np.array(draws)}


def checkpoints(folder: Path = PRETRAINING) -> dict[tuple[int, str, str], Kernel]:
    """Return the kernels of a pretraining run by (step, task, read-out); empty if there is none."""
    found = {}
    for path in sorted(folder.glob("*-*-*.npz")):
        step, task, readout = path.stem.split("-")
        found[int(step), task, readout] = Kernel.load(path)
    return dict(sorted(found.items()))


def corner(kernel: Kernel, task: Task, n: int) -> tuple[Kernel, Task]:
    """Return the kernel of the first n texts, and their task."""
    return kernel.block(np.arange(n)), task.subset(np.arange(n))


def part_name(label: str, kernel: Kernel) -> str:
    """Name a resumable part by the kernel's content, so that a kernel computed anew is described anew."""
    return f"{label}-{hashlib.sha256(kernel.matrix.tobytes()).hexdigest()[:12]}"


def available(names: Sequence[str]) -> list[str]:
    """Return those kernels that have been computed and stored."""
    return [name for name in names if kernel_path(name).is_file()]


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the numbers of a description that the page tells, with intervals over the halves."""
    power = found["theta2"]
    share = np.cumsum(power) / power.sum()
    told: dict[str, Any] = {key: v.item() for key, v in found.items() if v.ndim == 0}
    told |= {
        f"apart_{model}": found[f"apart_{model}"]
        for model in ("polynomial", "exponential", "stretched", "broken")
    }
    for key in ("a", "s"):
        told[f"{key}_interval"] = np.quantile(found[f"halves_{key}"], [0.025, 0.975])
    told["cumulative"] = {k: share[k - 1] for k in AT}
    told["cumulative_interval"] = np.quantile(found["halves_cumulative"], [0.025, 0.975], axis=0).T
    told |= {
        "half": int(np.searchsorted(share, 0.5) + 1),
        "power": power.sum(),
        "centred": found["eigenvalues"][0],
    }
    return told | {"ratio": told["raw"] / told["centred"]}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describe all kernels, draw the learning curves, follow the pretraining run; see the module docstring."""
    keep = tier == "full"
    values: dict[str, Any] = {"stats": list(STATS), "draws": DRAWS[tier], "splits": SPLITS[tier]}
    values["kernels"], values["missing"] = available(FULL), sorted(set(FULL) - set(available(FULL)))
    arrays: dict[str, np.ndarray] = {}
    for name in available(FULL if keep else QUICK):
        for n in (None, COMMON) if keep else (COMMON,):
            kernel, task = stored(name)
            if n is not None:
                kernel, task = corner(kernel, task, n)
            label = name if n is None else f"{name}@{n}"
            key = part_name(label, kernel)
            found = resumable(__name__, key, partial(describe, kernel, task, SPLITS[tier], seed), keep=keep)
            values[label] = summary(found)
            for key in ("eigenvalues", "theta2", "foretold_n", "foretold", "off_n", "off", "off_limit"):
                if key in found:
                    arrays[f"{label}_{key}"] = found[key]
    for name in available(CURVES[tier]):
        key = part_name(f"curves-{name}", stored(name)[0])
        drawn = resumable(__name__, key, partial(curves, name, tier, seed), keep=keep)
        arrays |= {f"{name}_sizes": drawn["sizes"], f"{name}_draws": drawn["draws"]}
        per = {stat: drawn["draws"][:, :, i] for i, stat in enumerate(STATS)}
        values[f"{name}_slopes"] = {s: slope(drawn["sizes"], e, seed) for s, e in per.items()}
    for (step, name, readout), kernel in (checkpoints() if keep else {}).items():
        task, label = ntkft.load_task(name, n=kernel.n, seed=0), f"step-{step}-{name}-{readout}"
        key = part_name(label, kernel)
        found = resumable(__name__, key, partial(describe, kernel, task, SPLITS[tier], seed), keep=keep)
        values[label] = summary(found)
        arrays |= {f"{label}_{key}": found[key] for key in ("eigenvalues", "theta2")}
    return values, arrays
