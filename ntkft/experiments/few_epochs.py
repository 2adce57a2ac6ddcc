"""How many epochs does the kernel ask for, and how many does a real network want?

The kernel is computed before training and the Rademacher rule (R = 1) turns its spectrum and the raters' noise into a
number of epochs. Then every weight of the network is trained by plain SGD, well past that number, on one person's
rating of each sentence; after each epoch the fit is compared with the mean of all raters.

Quick tier: MiniLM on tweets. Full tier: MiniLM on all four domains with three seeds each (head, texts' raters and batches),
and SmolLM2 on two domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import ntkft
from ntkft import stopping
from ntkft.experiments.result import resumable
from ntkft.experiments.stopping_rule import TRAIN, stored_kernel
from ntkft.finetune import preserved_weights, train

DOMAINS = ("tweets", "amazon", "movies", "nyt")
N, BATCH = 128, 16
STEP = {"minilm": 0.1, "smollm2": 0.5}  # of 1/λ_1 of the centred kernel
EPOCHS = {"quick": 7, "full": 12, "smollm2": 8}
SEEDS = {"quick": 1, "full": 3}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train and predict; see the module docstring."""
    domains = DOMAINS if tier == "full" else DOMAINS[:1]
    values: dict[str, Any] = {
        "n": N,
        "batch": BATCH,
        "step": STEP["minilm"],
        "seeds": SEEDS[tier],
        "epochs": EPOCHS[tier],
    }
    arrays: dict[str, np.ndarray] = {}
    for domain in domains:
        runs = [_minilm(domain, seed + k, EPOCHS[tier], tier) for k in range(SEEDS[tier])]
        _collect(f"minilm_{domain}", runs, values, arrays)
    if tier == "full":
        for domain in ("amazon", "tweets"):
            _collect(f"smollm2_{domain}", [_smollm2(domain, seed)], values, arrays)
        values["part_seconds"] = float(sum(v.sum() for k, v in arrays.items() if k.endswith("_seconds")))
    return values, arrays


def _minilm(domain: str, seed: int, epochs: int, tier: str) -> dict[str, np.ndarray]:
    def compute() -> dict[str, np.ndarray]:
        task = ntkft.load_task(domain, n=N, seed=0).redraw(1, seed=seed)
        readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=seed)
        kernel = ntkft.empirical_ntk(readout, task.texts, memory="800MB", progress=False)
        return _predict_then_train("minilm", readout, kernel, task, epochs, seed)

    return resumable(__name__, f"minilm-{domain}-{seed}-{epochs}", compute, keep=tier == "full")


def _smollm2(domain: str, seed: int) -> dict[str, np.ndarray]:
    def compute() -> dict[str, np.ndarray]:
        task = ntkft.load_task(domain, n=TRAIN, seed=0).redraw(
            1, seed=seed
        )  # the first texts of the stored kernel
        kernel = stored_kernel(domain).block(np.arange(TRAIN))
        readout = ntkft.prompt_readout(ntkft.load_model("smollm2"))
        return _predict_then_train("smollm2", readout, kernel, task, EPOCHS["smollm2"], seed)

    return resumable(__name__, f"smollm2-{domain}-{seed}", compute, keep=True)


def _predict_then_train(
    model: str, readout: ntkft.Readout, kernel: ntkft.Kernel, task: ntkft.Task, epochs: int, seed: int
) -> dict[str, np.ndarray]:
    """Predict the stop from the kernel; train past it; record the error against all raters along the way."""
    if not kernel.matches(task.texts):
        raise ntkft.errors.InputError(
            f"The kernel is not for these {len(task)} texts of {task.name}: rerun its full tier."
        )
    spectrum = kernel.spectrum(centre=True)
    sigma = float(np.sqrt(task.noise_variance or np.nan))
    step = STEP[model] / spectrum.eigenvalues[0]
    predicted = (
        stopping.rademacher_rule(spectrum, sigma).eta / step * BATCH / len(task)
    )  # before any label is seen
    path = ntkft.descend(kernel, task.y, intercept=True)
    with preserved_weights(readout):
        real = train(
            readout,
            task.texts,
            task.y,
            step_size=step,
            epochs=epochs,
            batch_size=BATCH,
            intercept=True,
            seed=seed,
            watch={"reference": (task.texts, task.reference)},
            progress=False,
        )
    error = real.errors["reference"]
    return {
        "predicted": np.array(predicted),
        "epoch": real.epoch,
        "eta": real.eta,
        "error": error,
        "residual": real.residual,
        "kernel_error": ((path.fitted(real.eta) - task.reference) ** 2).mean(-1),
        "kernel_residual": path.residual(real.eta),
        "sigma": np.array(sigma),
        "norm": np.array(path.hilbert_norm(task.reference - path.f0)),
        "centring": np.array(kernel.spectrum().eigenvalues[0] / spectrum.eigenvalues[0]),
        "sure": np.array(stopping.sure_rule(path, sigma).epochs(step, BATCH, len(task))),
        "discrepancy": np.array(float(np.interp(-(sigma**2), -real.residual, real.epoch))),
    }


def _collect(
    name: str, runs: list[dict[str, np.ndarray]], values: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    for key in runs[0]:
        arrays[f"{name}_{key}"] = np.stack([r[key] for r in runs])
    at_stop = np.array([np.interp(r["predicted"], r["epoch"], r["error"]) for r in runs])
    best = np.array([r["error"].min() for r in runs])
    values |= {
        f"{name}_predicted": float(np.mean([r["predicted"] for r in runs])),
        f"{name}_best_epoch": float(np.mean([r["epoch"][r["error"].argmin()] for r in runs])),
        f"{name}_error_before": float(np.mean([r["error"][0] for r in runs])),
        f"{name}_error_best": float(best.mean()),
        f"{name}_error_at_stop": float(at_stop.mean()),
        f"{name}_error_end": float(np.mean([r["error"][-1] for r in runs])),
        f"{name}_excess_at_stop": float((at_stop / best - 1).mean()),
        f"{name}_excess_end": float(np.mean([r["error"][-1] / r["error"].min() - 1 for r in runs])),
        f"{name}_discrepancy": float(np.mean([r["discrepancy"] for r in runs])),
        f"{name}_sure": float(np.mean([r["sure"] for r in runs])),
        f"{name}_norm": float(np.mean([r["norm"] for r in runs])),
        f"{name}_centring": float(np.mean([r["centring"] for r in runs])),
        f"{name}_sigma": float(np.mean([r["sigma"] for r in runs])),
    }
