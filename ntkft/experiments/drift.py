"""How far do real networks travel while they are fine-tuned, and does their kernel stay put?

Full-batch gradient descent on human ratings, with a free intercept: the model of the theory is then f minus its mean over the
texts, and gradients and kernels below are those of that centred model. The time to stop is computed from the kernel before
training; the run goes on past it, and looks at the network on the way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ntkft
from ntkft import stopping
from ntkft.finetune import preserved_weights, train
from ntkft.ntk import Kernel
from ntkft.ntk.kernel import centred
from ntkft.readout import Readout
from ntkft.tasks import Task

STEP = 0.5  # of 1/λ_1 of the centred kernel
LOOKS = (0.5, 1.0, 2.0, 4.0)  # in units of the predicted stop


def weights(readout: Readout) -> Tensor:
    """Return θ as one vector (P,), a copy."""
    return torch.cat([p.detach().flatten() for p in readout.parameters().values()])


def centred_gradients(readout: Readout, texts: list[str], probes: list[int], part: int = 16) -> Tensor:
    """Return ∇(f(x_i) - mean f) for the texts in `probes`, (len(probes), P); the mean is over all texts."""
    parameters = list(readout.parameters().values())

    def gradient(some: list[str]) -> Tensor:
        parts = torch.autograd.grad(readout(some).sum(), parameters)
        return torch.cat([g.flatten() for g in parts])

    mean = torch.zeros(sum(p.numel() for p in parameters))
    for start in range(0, len(texts), part):
        mean += gradient(texts[start : start + part])
    return torch.stack([gradient([texts[i]]) - mean / len(texts) for i in probes])


def drift_run(
    readout: Readout, task: Task, *, memory: str = "1GB", probes: int = 4, looks: tuple[float, ...] = LOOKS
) -> dict[str, np.ndarray]:
    """Fine-tune and look; every array has one entry for each look, the first before training.

    Returns
    -------
    dict
        eta, loss (of the centred model), distance (‖θ_t - θ0‖), kernel_op (‖K_t - K‖_op), kernel_entry (max |k_t - k_0|),
        kernel_trace (of K_t), gradient (max ‖∇f_t‖ over texts), gradient_change (max over probes of ‖∇f_t - ∇f_0‖), gap
        (‖f_t - f_lin,t‖_n), error and tangent_error (to the mean of all raters), stop (η̂ of K_t); and of the start:
        eigenvalues (n,), target (n,) the labels' parts along the eigenvectors, eta_stop, sigma, norm.
    """
    n, sigma = len(task.texts), float(np.sqrt(task.noise_variance or np.nan))
    found: dict[str, list[float]] = {}

    def kernel_now() -> Kernel:
        return ntkft.empirical_ntk(readout, task.texts, memory=memory, progress=False)

    start = kernel_now()
    path = ntkft.descend(start, task.y, intercept=True)
    lam = path.eigenvalues
    step = STEP / lam[0]
    path = ntkft.descend(start, task.y, intercept=True, step_size=step)
    stop = stopping.rademacher_rule(path.spectrum, sigma)
    total = sorted({max(1, round(c * stop.eta / step)) for c in looks})
    chosen = list(range(0, n, max(1, n // probes)))[:probes]
    first, theta0 = centred_gradients(readout, task.texts, chosen), weights(readout)
    matrix0 = centred(start.matrix)

    def look(steps: int, residual: float, fitted: np.ndarray, kernel: Kernel, gradients: Tensor) -> None:
        matrix, closed = centred(kernel.matrix), path.fitted(steps * step)
        entry = {
            "eta": steps * step,
            "loss": residual / 2,
            "distance": float((weights(readout) - theta0).norm()) if steps else 0.0,
            "kernel_op": np.linalg.norm(matrix - matrix0, 2) / n,
            "kernel_entry": np.abs(matrix - matrix0).max(),
            "kernel_trace": np.trace(matrix) / n,
            "gradient": np.sqrt(np.diag(matrix).max()),
            "gradient_change": float((gradients - first).norm(dim=1).max()),
            "gap": np.sqrt(((fitted - closed) ** 2).mean()),
            "error": ((fitted - task.reference) ** 2).mean(),
            "tangent_error": ((closed - task.reference) ** 2).mean(),
            "stop": stopping.rademacher_rule(kernel.spectrum(centre=True), sigma).eta,
        }
        for key, value in entry.items():
            found.setdefault(key, []).append(float(value))

    done = 0
    with preserved_weights(readout):
        for steps in total:
            run = train(
                readout, task.texts, task.y, step_size=step, epochs=steps - done, intercept=True, progress=False
            )
            if done == 0:
                look(0, run.residual[0], run.fitted[0], start, first)
            done = steps
            gradients = centred_gradients(readout, task.texts, chosen)
            look(steps, run.residual[-1], run.fitted[-1], kernel_now(), gradients)
    labels = task.y - start.scores
    extra = {
        "eigenvalues": lam,
        "target": path.vectors.T @ (labels - labels.mean()) / np.sqrt(n),
        "eta_stop": stop.eta,
        "sigma": sigma,
        "norm": path.hilbert_norm(task.reference),
    }
    return {k: np.array(v) for k, v in (found | extra).items()}
