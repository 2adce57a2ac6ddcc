r"""Real fine-tuning, watched: what the weights do when nobody linearises anything.

The loss is the book's, :math:`L(\theta) = \frac{1}{2n}\sum_i (f(x_i;\theta) - y_i)^2`, so a step of size ε moves kernel time η
by ε, whatever the batch. Dropout stays off: the theory is about gradient descent, not about its noise.

Example
-------
>>> readout = ntkft.pooled_readout(ntkft.load_model("minilm"))                       # doctest: +SKIP
>>> with preserved_weights(readout):                                                 # doctest: +SKIP
...     path = train(readout, task.texts, task.y, step_size=0.01, epochs=3, batch_size=16)
>>> path.residual                                                                    # doctest: +SKIP
array([...])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ntkft.descent import check_labels
from ntkft.errors import InputError
from ntkft.readout import Readout
from ntkft.spectrum import require_positive

OPTIMISERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Training:
    """A training run, one entry per look (the first is before training).

    Attributes
    ----------
    epoch, eta : (k,)
        Passes over the texts, and kernel time (for "adamw": sum of step sizes, which is no kernel time).
    residual : (k,)
        ‖y - f‖_n² on the training texts.
    fitted : (k, n)
        f on the training texts.
    errors : dict of (k,)
        Mean squared error on each watched set.
    """

    epoch: np.ndarray
    eta: np.ndarray
    residual: np.ndarray
    fitted: np.ndarray
    errors: dict[str, np.ndarray]


@contextmanager
def preserved_weights(readout: Readout) -> Iterator[None]:
    """Put the read-out's weights back when the block ends, also after an error."""
    # All of them: a weight may be frozen or thawed inside the block.
    before = [(p, p.detach().clone()) for p in readout.module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)


def train(
    readout: Readout,
    texts: Sequence[str],
    y: ArrayLike,
    *,
    step_size: float,
    epochs: int,
    batch_size: int | None = None,
    method: str = "sgd",
    intercept: bool = False,
    seed: int = 0,
    watch: Mapping[str, tuple[Sequence[str], ArrayLike]] | None = None,
    progress: bool = True,
) -> Training:
    """Fine-tune all trainable weights in place, and look at the fit before training and after each epoch.

    Parameters
    ----------
    readout : Readout
        Its weights change; wrap the call in `preserved_weights` to get them back.
    texts, y : n texts and (n,) labels
        The training set.
    step_size : float
        ε. For plain gradient descent, keep it below 2/λ_1 of the kernel K/n.
    epochs : int
        Passes over the texts.
    batch_size : int, optional
        Texts per step; all n (plain gradient descent) if None.
    method : "sgd" or "adamw"
        Optimiser, from torch.
    intercept : bool
        Fit a free constant beside the model: each batch is centred, f - mean f against y - mean y, and at every look the
        constant is the one that fits the training mean. Needs batches of at least two texts.
    seed : int
        Seed of the batches.
    watch : dict name -> (texts, targets), optional
        Further sets on which to measure the error.

    Raises
    ------
    InputError
        If counts differ, an option is unknown, or training diverges.
    """
    labels = torch.tensor(check_labels(y, len(texts)))
    n = len(labels)
    batch = n if batch_size is None else int(require_positive("batch_size", batch_size))
    if batch_size is not None and batch != batch_size:
        raise InputError(f"batch_size is {batch_size} and must be a whole number: it counts texts.")
    if method not in OPTIMISERS:
        raise InputError(f"method is {method!r}: choose one of {', '.join(OPTIMISERS)}.")
    texts = list(texts)
    watched = {
        k: (list(t), check_labels(v, len(t), f"the targets of {k}")) for k, (t, v) in (watch or {}).items()
    }
    if intercept and batch < 2:
        raise InputError(
            f"batch_size is {batch} and an intercept is fitted by centring each batch: take at least 2."
        )
    optimiser = OPTIMISERS[method](readout.parameters().values(), lr=require_positive("step_size", step_size))
    token_ids = readout.encode(texts)
    generator = np.random.default_rng(seed)
    steps = 0
    fitted: list[np.ndarray] = []
    when: list[tuple[int, float]] = []
    errors: dict[str, list[float]] = {k: [] for k in watched}

    def look(epoch: int) -> None:
        when.append((epoch, steps * step_size))
        scores = readout.scores(texts)
        if not np.isfinite(scores).all():
            raise InputError(
                f"Training diverged in epoch {epoch} at step_size={step_size:.4g}: take a smaller one."
            )
        constant = float(labels.mean()) - scores.mean() if intercept else 0.0
        fitted.append(scores + constant)
        for k, (other, target) in watched.items():
            values = scores if other == texts else readout.scores(other)
            errors[k].append(float(((values + constant - target) ** 2).mean()))

    look(0)
    for epoch in tqdm(range(1, epochs + 1), disable=not progress, desc="fine-tuning", unit="epoch"):
        order = generator.permutation(n)
        for start in range(0, n, batch):
            chosen = order[start : start + batch]
            if intercept and len(chosen) < 2:
                continue  # a centred batch of one says nothing, and no time passes
            optimiser.zero_grad(set_to_none=True)
            _accumulate(readout, [token_ids[i] for i in chosen], labels[chosen], intercept)
            optimiser.step()
            steps += 1
        look(epoch)
    epoch_axis, eta_axis = (np.array(column) for column in zip(*when, strict=True))
    path = np.array(fitted)
    return Training(
        epoch_axis,
        eta_axis,
        ((path - labels.numpy()) ** 2).mean(1),
        path,
        {k: np.array(v) for k, v in errors.items()},
    )


def _accumulate(
    readout: Readout,
    token_ids: list[list[int]],
    labels: torch.Tensor,
    intercept: bool = False,
    part: int = 16,
) -> None:
    """Add the gradient of the batch's mean loss, in parts, so that memory does not grow with the batch.

    The loss is 1/(2B) Σ (f - y)², or with an intercept 1/(2B) Σ (f - y - mean(f - y))², whose gradient needs the mean
    over the whole batch before the first part is differentiated.
    """
    parts = [slice(start, start + part) for start in range(0, len(token_ids), part)]
    offset = 0.0
    if intercept and len(parts) > 1:
        with torch.no_grad():
            scores = torch.cat([readout.module(**readout.collate(token_ids[p])) for p in parts])
            offset = float((scores.cpu() - labels).mean())
    for p in parts:
        values = readout.module(**readout.collate(token_ids[p]))
        target = labels[p].to(values)
        if intercept and len(parts) == 1:  # the usual case: one forward pass is enough
            offset = float((values.detach() - target).mean())
        ((values - target - offset) ** 2).sum().div(2 * len(token_ids)).backward()
