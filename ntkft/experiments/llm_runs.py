r"""Real fine-tuning, looked at often enough to try every stopping rule on it afterwards.

The model that is trained is the centred one of the book: f minus its mean over the batch, plus the mean label, so the constant
mode takes no time. A run keeps the scores of all texts at each look, and the kernel of the training texts at some of them; which
rule stops where is then arithmetic. The loss is square, :math:`\frac1{2B}\sum(f-y)^2`, a step of size ε moving kernel time
by ε, or logistic, :math:`\frac1B\sum\log(1+e^{-yf})`.

`Run` names one run of the chapter; what it predicts from the kernel is stored before it trains.

Example
-------
>>> found = run_path(readout, task.texts, task.y[:128], np.arange(128), method="sgd", step_size=0.01, steps=64)   # doctest: +SKIP
>>> found["scores"].shape                                                                           # doctest: +SKIP
(9, 192)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

import ntkft
from ntkft import stopping
from ntkft.experiments.llm_kernels import TOPICS, Wanted
from ntkft.experiments.result import resumable
from ntkft.finetune import OPTIMISERS, preserved_weights
from ntkft.readout import Readout

PART = 8  # texts of similar length that go through the network together: little of the work is padding


def run_path(
    readout: Readout,
    texts: Sequence[str],
    y: np.ndarray,
    rows: np.ndarray,
    *,
    method: Literal["sgd", "adamw"],
    step_size: float,
    steps: int,
    batch_size: int | None = 16,
    every: int = 8,
    seed: int = 0,
    loss: Literal["square", "logistic"] = "square",
    kernels: Sequence[int] = (),
    memory: str = "1GB",
) -> dict[str, np.ndarray]:
    """Fine-tune all weights on the texts in `rows`, look every few steps, and put the weights back.

    Parameters
    ----------
    readout : Readout
    texts : N texts
        All that are looked at.
    y : (n,)
        Labels of the training texts; ±1 for the logistic loss.
    rows : (n,) int
        Which texts are trained on.
    method, step_size, steps, batch_size, seed
        Optimiser, ε, number of steps, texts per step (all n if None), seed of the batches.
    every : int
        Steps between two looks.
    loss : "square" or "logistic"
    kernels : ints
        Steps (multiples of `every`) at which the kernel of the training texts is computed.
    memory : str
        For the kernels.

    Returns
    -------
    dict
        step (k,), scores (k, N) of the raw read-out, kernel_step (q,), kernels (q, n, n) as float32.
    """
    labels, n = torch.tensor(y, dtype=torch.float32), len(rows)
    train = [texts[i] for i in rows]
    token_ids = readout.encode(train)
    batch = n if batch_size is None else batch_size
    generator = np.random.default_rng(seed)
    looks: list[int] = []
    scores: list[np.ndarray] = []
    measured: list[np.ndarray] = []

    def look(step: int) -> None:
        looks.append(step)
        scores.append(readout.scores(texts))
        if step in kernels:
            kernel = ntkft.empirical_ntk(readout, train, memory=memory, progress=False)
            measured.append(kernel.matrix.astype(np.float32))

    with preserved_weights(readout):
        optimiser = OPTIMISERS[method](readout.parameters().values(), lr=step_size)
        step, order = 0, np.empty(0, dtype=int)
        look(0)
        while step < steps:
            if len(order) == 0:
                order = generator.permutation(n)
            chosen, order = order[:batch], order[batch:]
            optimiser.zero_grad(set_to_none=True)
            _backward(readout, [token_ids[i] for i in chosen], labels[chosen], loss)
            optimiser.step()
            step += 1
            if step % every == 0:
                look(step)
    return {
        "step": np.array(looks),
        "scores": np.array(scores),
        "kernel_step": np.array([s for s in looks if s in kernels]),
        "kernels": np.array(measured, dtype=np.float32).reshape(len(measured), n, n),
    }


def _backward(readout: Readout, token_ids: list[list[int]], labels: torch.Tensor, loss: str) -> None:
    """Add the gradient of the batch's loss for the centred model: its derivative in each raw score, then one backward pass."""
    order = np.argsort([len(row) for row in token_ids], kind="stable")
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    values = torch.cat([readout.module(**readout.collate([token_ids[i] for i in part])) for part in parts])
    target = labels[order].to(values)
    centred = values.detach() - values.detach().mean()
    if loss == "square":
        slope = centred - (target - target.mean())
    else:
        slope = torch.sigmoid(centred) - (1 + target) / 2
    slope = (slope - slope.mean()) / len(order)  # the mean of f depends on every text of the batch
    (slope * values).sum().backward()


@dataclass(frozen=True)
class Setting:
    """How a model is trained: numbers of texts, step sizes, looks."""

    n: int
    test: int
    step: float  # of SGD, in units of 1/λ_1 of the centred kernel
    steps: int
    every: int
    kernels: tuple[int, ...]
    adamw: float
    adamw_steps: int


SETTINGS = {
    "minilm": Setting(128, 64, 0.1, 64, 8, (8, 16, 32, 64), 2e-5, 64),
    "smollm2": Setting(64, 32, 0.5, 80, 8, (16, 40, 80), 1e-5, 32),
}
BATCH = 16
FULL_BATCH_STEP, BEYOND = 0.25, 1.5  # gradient descent: ε in 1/λ_1; how far past the predicted stop it goes
DELTA = 0.1  # size of the twin's perturbation, in units of the rating
HELD_OUT = 0.2


@dataclass(frozen=True)
class Run:
    """One run: model, task, optimiser, seed of head, ratings and batches; "twin" has perturbed labels, "holdout" fewer texts."""

    model: str
    task: str
    method: Literal["gd", "sgd", "adamw"]
    seed: int
    kind: Literal["main", "twin", "holdout"] = "main"

    @property
    def loss(self) -> Literal["square", "logistic"]:
        """Topics are classes, ratings are numbers."""
        return "logistic" if self.task in TOPICS else "square"

    @property
    def key(self) -> str:
        """Name of the stored part."""
        return f"{self.model}-{self.task}-{self.method}-{self.kind}-{self.seed}"


def probe(seed: int, n: int) -> np.ndarray:
    """Return the signs b of the twin run, (n,)."""
    return np.random.default_rng((seed, 7)).choice([-1.0, 1.0], n)


def kept(seed: int, n: int) -> np.ndarray:
    """Return the texts that a hold-out run trains on, in their order."""
    return np.sort(np.random.default_rng((seed, 8)).permutation(n)[round(HELD_OUT * n) :])


def outcome(run: Run) -> dict[str, np.ndarray]:
    """Return a run's looks, its labels and its predictions; made once, then read from disk."""
    return resumable(__name__, run.key, lambda: _make(run))


def _make(run: Run) -> dict[str, np.ndarray]:
    setting = SETTINGS[run.model]
    n = setting.n
    total = n + setting.test * (2 if run.loss == "logistic" else 1)  # a share of right answers needs more texts
    wanted = Wanted(run.model, "pretrained", run.task, total, run.seed)
    task, readout = wanted.texts(), wanted.readout()
    if run.loss == "square":
        task = task.redraw(1, seed=run.seed)
    y, rows = task.y[:n], np.arange(n)
    about = {"y": y, "reference": task.reference}
    if run.kind == "main" and run.method == "sgd":
        about |= _predict(readout, task, n)
    else:  # the same read-out at the same weights: the kernel is known
        first = outcome(replace(run, method="sgd", kind="main"))
        about |= {key: first[key] for key in ("lambda_1", "eta", "sigma")}
    unit = (4.0 if run.loss == "logistic" else 1.0) / float(about["lambda_1"])  # a logistic step moves f a quarter as far
    if run.kind == "twin":
        y = y + DELTA * probe(run.seed, n)
    if run.kind == "holdout":
        rows = kept(run.seed, n)
        y = y[rows]
    every, steps, step_size, batch = setting.every, setting.steps, setting.step * unit, BATCH
    if run.method == "adamw":
        steps, step_size = setting.adamw_steps, setting.adamw
    elif run.method == "gd":
        step_size, batch, every = FULL_BATCH_STEP * unit, n, 2
        steps = 2 * int(np.ceil(BEYOND * float(about["eta"]) / step_size / 2))
    looked = {"sgd": setting.kernels, "adamw": (steps // 2, steps), "gd": (2 * (steps // 4), steps)}[run.method]
    found = run_path(
        readout,
        task.texts,
        y,
        rows,
        method="adamw" if run.method == "adamw" else "sgd",
        step_size=step_size,
        steps=steps,
        batch_size=batch,
        every=every,
        seed=run.seed,
        loss=run.loss,
        kernels=looked if run.kind == "main" and run.loss == "square" else (),
    )
    return about | found | {"rows": rows, "step_size": np.array(step_size)}


def _predict(readout: Readout, task: ntkft.Task, n: int) -> dict[str, np.ndarray]:
    """Return the kernel of all texts and, from that of the training texts, the time to stop (R = 1)."""
    kernel = ntkft.empirical_ntk(readout, task.texts, memory="1GB", progress=False)
    spectrum = kernel.block(np.arange(n)).spectrum(centre=True)
    # Topic labels have no known noise: the largest that a coin can have, σ = 2 for the linearised labels 2y (see the chapter).
    sigma = 2.0 if task.ratings is None else float(np.sqrt(task.subset(np.arange(n)).noise_variance or np.nan))
    eta = stopping.rademacher_rule(spectrum, sigma).eta * (4 if task.ratings is None else 1)
    return {
        "kernel": kernel.matrix.astype(np.float32),
        "lambda_1": spectrum.eigenvalues[0],
        "eta": np.array(eta),
        "sigma": np.array(sigma),
    }
