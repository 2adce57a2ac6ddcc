"""How far the kernel moves when training begins: a short training on a few texts, and the kernel again.

Source: the book's page "When the kernel drifts".

Example
-------
>>> drift_probe(readout, task, advice.eta)["trace"]                                  # doctest: +SKIP
0.4
"""

from __future__ import annotations

import numpy as np

from ntkft.finetune import preserved_weights, train
from ntkft.ntk import empirical_ntk
from ntkft.readout import Readout
from ntkft.tasks import Task

__all__ = ["drift_probe"]


def drift_probe(
    readout: Readout, task: Task, eta: float, *, size: int = 48, seed: int = 0, most: int = 16, memory: str | int = "2GB"
) -> dict[str, float]:
    """Train on a few texts for a quarter of `eta`, and measure how far their kernel moves; the weights are put back.

    Parameters
    ----------
    readout, task
        The function, and texts with labels; at most `size` of them are used, drawn by `seed`.
    eta : float
        The kernel time that is planned.
    most : int
        At most so many steps; on a kernel with a large λ_1 they may not reach eta/4.

    Returns
    -------
    dict
        "texts", "eta" (kernel time of the probe), "lambda_1" and "trace" (relative changes).
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(task))[:size])
    few = task.subset(rows)
    before = empirical_ntk(readout, few.texts, memory=memory, progress=False)
    top = float(before.spectrum().eigenvalues[0])
    steps = int(np.clip(np.ceil(eta / 4 * top), 4, most))
    step = min(eta / 4 / steps, 1 / top)
    if step <= 0:
        return {"texts": len(few), "eta": 0.0, "lambda_1": 0.0, "trace": 0.0}
    with preserved_weights(readout):
        train(readout, few.texts, few.y, step_size=step, epochs=steps, progress=False)
        after = empirical_ntk(readout, few.texts, memory=memory, progress=False)
    change = {
        "lambda_1": float(after.spectrum().eigenvalues[0]) / top - 1,
        "trace": float(after.matrix.trace() / before.matrix.trace()) - 1,
    }
    return {"texts": len(few), "eta": steps * step} | change
