"""Does a real network follow the filter? First steps of full-batch gradient descent on MiniLM.

The kernel is computed once, before training. Then the network, all its weights free, is trained by plain gradient
descent in torch, and its fitted values are compared with the closed form, as a whole and along eigenvectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import ntkft
from ntkft.finetune import preserved_weights, train

# tier: (texts, steps, head seeds)
SIZES = {"quick": (40, 10, 1), "full": (128, 20, 5)}
STEP = 0.5  # of 1/λ_1: a quarter of the size at which descent diverges
SHOWN = (1, 2, 5, 10)  # eigenvectors, by rank


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Compare real and closed-form paths; see the module docstring."""
    n, steps, heads = SIZES[tier]
    task = ntkft.load_task("amazon", n=n, seed=seed)
    loaded = ntkft.load_model("minilm")
    gaps, measured, predicted, residuals, lam_1 = [], [], [], [], []
    for head in range(heads):
        readout = ntkft.pooled_readout(loaded, seed=head)
        kernel = ntkft.empirical_ntk(readout, task.texts, memory="800MB", progress=False)
        lam = kernel.spectrum().eigenvalues
        path = ntkft.descend(kernel, task.y, step_size=STEP / lam[0])
        with preserved_weights(readout):
            real = train(readout, task.texts, task.y, step_size=STEP / lam[0], epochs=steps, progress=False)
        closed = path.fitted(real.eta)  # (steps + 1, n)
        travelled = np.linalg.norm(real.fitted - kernel.scores, axis=1)[1:]
        gaps.append(np.linalg.norm(real.fitted - closed, axis=1)[1:] / travelled)
        ranks = [j - 1 for j in SHOWN]
        start = (kernel.scores - task.y) @ path.vectors
        measured.append(((real.fitted - task.y) @ path.vectors / start)[:, ranks])
        predicted.append(1 - path.filter(real.eta)[:, ranks])
        residuals.append(np.stack([real.residual, path.residual(real.eta)]))
        lam_1.append(lam[0])
    gap = np.array(gaps)  # (heads, steps)
    values = {
        "n": n,
        "steps": steps,
        "heads": heads,
        "step_size_times_lambda_1": STEP,
        "gap_first_step": gap[:, 0].mean(),
        "gap_first_step_max": gap[:, 0].max(),
        "gap_last_step": gap[:, -1].mean(),
        "gap_last_step_min": gap[:, -1].min(),
        "lambda_1": float(np.mean(lam_1)),
    }
    arrays = {
        "gap": gap,
        "measured": np.array(measured),  # (heads, steps + 1, len(SHOWN))
        "predicted": np.array(predicted),
        "residual": np.array(residuals),  # (heads, 2, steps + 1): real, closed form
    }
    return values, arrays
