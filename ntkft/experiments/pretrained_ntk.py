"""Pretrained beginnings, measured: every bound on a model of many heads, mixed starts, LoRA, and the drift of real networks.

The parts are in modules of their own: `many_heads`, `sketch` (LoRA) and `drift`; this one puts them together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import ntkft
from ntkft.descent import descend
from ntkft.experiments import drift, sketch
from ntkft.experiments.many_heads import (
    BOUNDS,
    HEADS,
    SHAPE,
    SIGMA,
    STARTS,
    N,
    large_steps,
    long_training,
    many_heads,
    mixed_heads,
    pretrained_pool,
)
from ntkft.experiments.result import resumable
from ntkft.ntk.kernel import centred

# name: (model, weights, domain, texts, head seeds, looks in units of the predicted stop)
DRIFT = {
    "minilm_amazon": ("minilm", "pretrained", "amazon", 64, (0, 1), (0.5, 1.0, 2.0, 4.0)),
    "minilm_tweets": ("minilm", "pretrained", "tweets", 64, (0, 1), (0.5, 1.0, 2.0, 4.0)),
    "random_tweets": ("minilm", "random", "tweets", 64, (0,), (0.5, 1.0, 2.0, 4.0)),
    "smollm2_tweets": ("smollm2", "pretrained", "tweets", 32, (None,), (0.5, 1.0)),
}


def drift_part(name: str, head: int | None) -> dict[str, np.ndarray]:
    """Return one run of `DRIFT`; kept, so that the full tier goes on where it stopped."""
    model, kind, domain, n, _, looks = DRIFT[name]

    def compute() -> dict[str, np.ndarray]:
        loaded = ntkft.load_model(model, weights=kind)  # type: ignore[arg-type]
        readout = ntkft.prompt_readout(loaded) if head is None else ntkft.pooled_readout(loaded, seed=head)
        task = ntkft.load_task(domain, n=n, seed=0)
        return drift.drift_run(readout, task, probes=2 if head is None else 4, looks=looks)

    return resumable(drift.__name__, f"{name}_{head}", compute)


def drift_full() -> dict[str, np.ndarray]:
    """Return ``drift_{run}_{quantity}`` of every run, head seeds along the first axis."""
    found: dict[str, np.ndarray] = {}
    for name, run in DRIFT.items():
        parts = [drift_part(name, head) for head in run[4]]
        found |= {f"drift_{name}_{key}": np.stack([part[key] for part in parts]) for key in parts[0] if key != "seconds"}
    return found


def drift_quick() -> dict[str, np.ndarray]:
    """Return a run that a page can afford: MiniLM, 24 tweets, to the predicted stop."""
    readout, task = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0), ntkft.load_task("tweets", n=24, seed=0)
    found = drift.drift_run(readout, task, memory="300MB", probes=1, looks=(1.0,))
    return {f"drift_quick_{key}": value[None] for key, value in found.items()}


def mixed_minilm(n: int = 64, seeds: int = 10) -> dict[str, np.ndarray]:
    """Return what depends on the random head of MiniLM: kernel, f0, time to stop, norm of the target with and without f0."""
    task = ntkft.load_task("tweets", n=n, seed=0)
    sigma = float(np.sqrt(task.noise_variance or np.nan))
    loaded = ntkft.load_model("minilm")
    matrices, scores, stops, norms, norms_without = [], [], [], [], []
    for head in range(seeds):
        kernel = ntkft.empirical_ntk(ntkft.pooled_readout(loaded, seed=head), task.texts, memory="1GB", progress=False)
        path = descend(kernel, task.y, intercept=True)
        matrices.append(centred(kernel.matrix) / n)
        scores.append(kernel.scores - kernel.scores.mean())
        stops.append(ntkft.stopping.rademacher_rule(path.spectrum, sigma).eta)
        norms.append(path.hilbert_norm(task.reference - kernel.scores))
        norms_without.append(path.hilbert_norm(task.reference))
    spread = np.array(matrices)
    relative = np.sqrt(((spread - spread.mean(0)) ** 2).sum((1, 2)).sum() / (seeds - 1)) / np.linalg.norm(spread.mean(0))
    arrays = {"spread": relative, "score": np.std(scores), "stop": stops, "norm": norms, "norm_without": norms_without}
    return {f"minilm_{key}": np.array(value) for key, value in arrays.items()}


def slope_interval(
    abscissa: np.ndarray, values: np.ndarray, seed: int = 0, draws: int = 2000, *, paired: bool = False
) -> tuple[float, float, float]:
    """Return the log-log slope of the root mean square over columns, and its 95 % bootstrap interval over columns.

    Columns are resampled for each row anew, or for all rows together if they are `paired`, as runs from the same start are.

    Parameters
    ----------
    abscissa : (k,)
    values : (k, m)
        Positive; m independent repetitions.
    """
    x = np.log(abscissa) - np.log(abscissa).mean()

    def slope(some: np.ndarray) -> float:
        return float(x @ (0.5 * np.log((some**2).mean(1)))) / float(x @ x)

    rng = np.random.default_rng(seed)
    m = values.shape[1]

    def resample() -> np.ndarray:
        if paired:
            return values[:, rng.integers(0, m, m)]
        return np.stack([row[rng.integers(0, m, m)] for row in values])

    resampled = [slope(resample()) for _ in range(draws)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return slope(values), float(low), float(high)


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run every part; see the module's docstring."""
    keep = tier == "full"
    pool = pretrained_pool(seed=seed)
    arrays = many_heads(tier, seed, pool) | mixed_heads(pool, 400 if keep else 100, seed)
    arrays |= sketch.run_sketch(tier, seed)
    values: dict[str, Any] = {"n": N, "sigma": SIGMA, "heads": list(HEADS[tier]), "parameters": SHAPE.parameters}
    for kind in STARTS:
        for key in BOUNDS:
            ratio = arrays[f"heads_{kind}_{key}"] / arrays[f"heads_{kind}_{key}_bound"]
            values[f"{kind}_{key}_ratio"] = None if np.isnan(ratio).all() else float(np.nanmax(ratio))
    values["mixed_slope"] = slope_interval(arrays["mixed_heads"], arrays["mixed_rms"], seed)
    values["lora_slope"] = slope_interval(arrays["lora_ranks"], arrays["lora_error"], seed)
    if keep:
        arrays |= resumable(__name__, f"long_{seed}", lambda: long_training(seed=seed))
        arrays |= resumable(__name__, f"steps_{seed}", lambda: large_steps(seed=seed))
        arrays |= resumable(__name__, "minilm", mixed_minilm)
        arrays |= drift_full()
        for kind in STARTS:
            for key in ("gradient", "kernel", "gap"):
                column = arrays[f"heads_{kind}_{key}"]
                values[f"{kind}_{key}_slope"] = slope_interval(np.array(HEADS[tier]), column, seed, paired=True)
    else:
        arrays |= drift_quick()
    arrays.pop("seconds", None)
    return values, arrays
