"""How close to the best time does each rule stop? SmolLM2 read through a prompt, human ratings, known noise.

The kernels (256 texts of each domain) are computed in the full tier and stored beside the result. A draw splits the
texts into 192 for training and 64 for testing and gives each training text the rating of one randomly drawn person.
Every rule then names its time; errors are measured against the mean of all raters. The whole training path is
closed form, so a draw takes a fraction of a second.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import ntkft
from ntkft import stopping
from ntkft.experiments.result import RESULTS
from ntkft.ntk import Kernel
from ntkft.provenance import code_hash
from ntkft.tasks import Task

DOMAINS = ("amazon", "tweets")
TEXTS, TRAIN = 256, 192
DRAWS = {"quick": 10, "full": 100}
BATCH = 16  # of the hold-out practitioner, who looks once an epoch at step size 1/λ_1
RULES = ("rademacher", "sure", "gcv", "discrepancy", "holdout", "holdout_refit", "never")
NORMS = np.geomspace(0.1, 10, 21)
GRID = np.geomspace(1e-4, 1e2, 120)  # kernel time of the stored curves


def stored_kernel(domain: str, *, make: bool = False) -> Kernel:
    """Return SmolLM2's kernel on a domain from ``results/``; compute it first if `make` and it is missing or stale."""
    path = RESULTS / "stopping_rule" / f"smollm2-{domain}.npz"
    if make:
        if path.is_file() and Kernel.load(path).info["code_sha256"] == code_hash("ntkft.ntk.engine"):
            return Kernel.load(path)
        readout = ntkft.prompt_readout(ntkft.load_model("smollm2"))
        task = ntkft.load_task(domain, n=TEXTS, seed=0)
        ntkft.empirical_ntk(readout, task.texts, memory="6GB").save(path)
    return Kernel.load(path)


def one_draw(kernel: Kernel, task: Task, draw: int, seed: int) -> dict[str, Any]:
    """Split, draw one rater for each text, stop by every rule; return times and errors."""
    order = np.random.default_rng((seed, draw)).permutation(TEXTS)
    train, test = order[:TRAIN], order[TRAIN:]
    rated = task.redraw(1, seed=seed * 10_000 + draw)
    y, sigma = rated.y[train], float(np.sqrt(rated.noise_variance or np.nan))
    square, cross = kernel.block(train), kernel.block(test, train)
    path, spectrum = ntkft.descend(square, y), square.spectrum()

    def test_error(eta: Any) -> Any:
        return ((path.predict(eta, cross) - task.reference[test]) ** 2).mean(-1)

    def sample_error(eta: Any) -> Any:
        return ((path.fitted(eta) - task.reference[train]) ** 2).mean(-1)

    epoch = (0.8 * TRAIN / BATCH) / spectrum.eigenvalues[0]
    holdout = stopping.holdout_rule(square, y, every=epoch, seed=draw)
    times = {
        "rademacher": stopping.rademacher_rule(spectrum, sigma).eta,
        "sure": stopping.sure_rule(path, sigma).eta,
        "gcv": stopping.gcv_rule(path).eta,
        "discrepancy": stopping.discrepancy_rule(path, sigma).eta,
        "holdout_refit": holdout.eta,  # the time is found on four fifths, then all texts are trained on
        "never": stopping.time_grid(path)[-1],
        "oracle": stopping.oracle_rule(path, task.reference[test], cross).eta,
        "oracle_sample": stopping.oracle_rule(path, task.reference[train]).eta,
    }
    guesses = [stopping.rademacher_rule(spectrum, sigma, norm).eta for norm in NORMS]
    errors = {
        "test": {k: float(test_error(eta)) for k, eta in times.items()},
        "sample": {k: float(sample_error(eta)) for k, eta in times.items()},
    }
    # The practitioner keeps the model that was watched: it has seen four fifths of the texts.
    kept = np.array(holdout.info["kept"])
    watched = ntkft.descend(square.block(kept), y[kept])
    for where, block, rows in (
        ("test", kernel.block(test, train[kept]), test),
        ("sample", square.block(np.arange(TRAIN), kept), train),
    ):
        fit = watched.predict(holdout.eta, block)
        errors[where]["holdout"] = float(((fit - task.reference[rows]) ** 2).mean())
    times["holdout"] = holdout.eta
    return {
        "times": times,
        **errors,
        "norm": path.hilbert_norm(task.reference[train] - path.f0),
        "sigma": sigma,
        "before": float(test_error(0.0)),
        "lambda_1": float(spectrum.eigenvalues[0]),
        "lambda_1_centred": float(square.spectrum(centre=True).eigenvalues[0]),
        "test_curve": test_error(GRID),
        "sample_curve": sample_error(GRID),
        "by_norm": test_error(np.array(guesses)),
    }


def median_interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Return the median and its percentile bootstrap interval over draws."""
    rng = np.random.default_rng(seed)
    resampled = np.median(rng.choice(values, (4000, len(values))), axis=1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(values)), float(low), float(high)


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run all draws on all domains; see the module docstring."""
    values: dict[str, Any] = {"texts": TEXTS, "train": TRAIN, "draws": DRAWS[tier], "rules": list(RULES)}
    arrays: dict[str, np.ndarray] = {"grid": GRID, "norms": NORMS}
    for domain in DOMAINS:
        kernel = stored_kernel(domain, make=tier == "full")
        task = ntkft.load_task(domain, n=TEXTS, seed=0)
        if not kernel.matches(task.texts):
            raise ntkft.errors.InputError(
                f"The stored kernel of {domain} is for other texts: rerun the full tier."
            )
        draws = [one_draw(kernel, task, k, seed) for k in range(DRAWS[tier])]
        for where, best in (("test", "oracle"), ("sample", "oracle_sample")):
            for rule in RULES:
                excess = np.array([d[where][rule] / d[where][best] - 1 for d in draws])
                arrays[f"{domain}_{where}_excess_{rule}"] = excess
                middle, low, high = median_interval(excess)
                values[f"{domain}_{where}_{rule}"] = {
                    "median": middle,
                    "low": low,
                    "high": high,
                    "mean": excess.mean(),
                }
        for name in (*RULES, "oracle", "oracle_sample"):
            arrays[f"{domain}_eta_{name}"] = np.array([d["times"][name] for d in draws])
        for name in ("norm", "sigma", "before", "lambda_1", "lambda_1_centred"):
            values[f"{domain}_{name}"] = float(np.median([d[name] for d in draws]))
        values[f"{domain}_sample_error"] = float(np.median([d["sample"]["rademacher"] for d in draws]))
        values[f"{domain}_oracle_error"] = float(np.median([d["test"]["oracle"] for d in draws]))
        arrays[f"{domain}_oracle_test"] = np.array([d["test"]["oracle"] for d in draws])
        for name in ("test_curve", "sample_curve", "by_norm"):
            arrays[f"{domain}_{name}"] = np.array([d[name] for d in draws])
        values[f"{domain}_zero_shot_correlation"] = float(np.corrcoef(kernel.scores, task.reference)[0, 1])
    return values, arrays
