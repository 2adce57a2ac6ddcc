r"""Real fine-tuning on two classes, with the logistic loss, at two sizes of step.

The texts are a random part of a stored kernel's, so the kernel before training is known; kernels along the way tell whether the
step that was comfortable at the start still is. A step of ε on :math:`\frac1B\sum\log(1+e^{-yf})` meets a Hessian of at most
K/4, so descent is stable while :math:`\varepsilon\lambda_1/4 < 2`.

Example
-------
>>> Classes("newsgroups", 0.1, 0).key
'minilm-newsgroups-logistic-0.1-0'
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkft import stopping
from ntkft.experiments.llm_kernels import Wanted, stored
from ntkft.experiments.llm_runs import BATCH, run_path
from ntkft.experiments.result import resumable

N, TEST = 128, 128
LOOKS = 16
STEPS = {0.1: 64, 0.025: 256}  # share of 4/λ_1: number of steps; the same kernel time
SIGMA = 2.0  # the largest noise that a coin can have, for the linearised labels 2y (see the chapter)


@dataclass(frozen=True)
class Classes:
    """One run of MiniLM: the topic task, the step in units of 4/λ_1, the seed of texts and batches."""

    task: str
    share: float
    seed: int

    @property
    def key(self) -> str:
        """Name of the stored part."""
        return f"minilm-{self.task}-logistic-{self.share}-{self.seed}"


def outcome(run: Classes) -> dict[str, np.ndarray]:
    """Return a run's looks, its labels and its predictions; made once, then read from disk."""
    return resumable(__name__, run.key, lambda: _make(run))


def _make(run: Classes) -> dict[str, np.ndarray]:
    kernel, task = stored(f"minilm-{run.task}-0")
    rows = np.random.default_rng((run.seed, 9)).permutation(len(task))[: N + TEST]
    kernel, task, train = kernel.block(rows), task.subset(rows), np.arange(N)
    spectrum = kernel.block(train).spectrum(centre=True)
    lambda_1, steps = float(spectrum.eigenvalues[0]), STEPS[run.share]
    # The clock of the logistic loss is four times slower than that of the square loss.
    about = {
        "y": task.y[:N],
        "reference": task.reference,
        "rows": train,
        "kernel": kernel.matrix.astype(np.float32),
        "lambda_1": np.array(lambda_1),
        "eta": np.array(4 * stopping.rademacher_rule(spectrum, SIGMA).eta),
        "step_size": np.array(run.share * 4 / lambda_1),
    }
    readout = Wanted("minilm", "pretrained", run.task, len(task)).readout()
    every = steps // LOOKS
    found = run_path(
        readout,
        task.texts,
        task.y[:N],
        train,
        method="sgd",
        step_size=float(about["step_size"]),
        steps=steps,
        batch_size=BATCH,
        every=every,
        seed=run.seed,
        loss="logistic",
        kernels=tuple(every * k for k in (1, 2, 4, 8, 16)),
    )
    return about | found
