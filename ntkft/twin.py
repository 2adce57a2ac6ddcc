r"""Train twice and stop where the estimated risk is least: the twin rule, for a `transformers.Trainer`.

The first training fits labels that differ from yours by a small known vector, :math:`y + \delta b` with random signs b. The
second one fits y, with the same seeds. How far the two fits differ along b says how many degrees of freedom training has used at
that moment, and from them follows an estimate of the risk on the training texts:

.. math:: \mathrm{df} = \tfrac1\delta\langle b, f(y+\delta b) - f(y)\rangle, \qquad
          \|y - f\|_n^2 - \sigma^2 + 2\sigma^2\,\mathrm{df}/n .

No kernel, no held-out labels, any optimiser; the price is the first training. In the book's real runs of MiniLM this rule stopped
best. Source: the book's page "When the kernel drifts", propositions on degrees of freedom from a twin and on the risk of any
training; Ramani, Blu & Unser 2008; Stein 1981.

Example
-------
>>> def make_trainer(labels):                                                       # doctest: +SKIP
...     return Trainer(fresh_model(seed=0), args, train_dataset=rows(texts, labels))
>>> result = train_with_twin(make_trainer, y, sigma=0.8)                            # doctest: +SKIP
>>> result.epoch, result.trainer.predict(new)                                       # doctest: +SKIP
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import nn
from transformers import Trainer

from ntkft.spectrum import require_positive
from ntkft.trainer_data import TrainerLooks
from ntkft.twin_callback import TwinCallback, TwinRecorder
from ntkft.twin_rule import TwinStop, twin_labels, twin_stop

__all__ = ["TwinCallback", "TwinRecorder", "TwinResult", "TwinStop", "train_with_twin", "twin_labels", "twin_stop"]

# δ in units of σ. Small, because df is a derivative and errs by O(δ) where training is not linear in its labels; not tiny,
# because what rounding leaves of the difference is divided by δ. Noise of the estimate does not depend on it.
DELTA = 1 / 8


@dataclass(frozen=True)
class TwinResult:
    """Where training twice says to stop, and a Trainer that holds the weights of that moment.

    Attributes
    ----------
    step, epoch : int, float
        Of the least estimated risk; 0 means that training does not help.
    steps, epochs, risk, degrees_of_freedom, residual : (k,)
        The looks; training error and risk are means of squares. The first look is before training.
    fitted : (k, n)
        Fitted values of the training texts, as the model gives them.
    trainer : Trainer
        Of the run on the true labels; ``trainer.model`` has the best weights, ``trainer.save_model()`` keeps them.
    delta, sigma : float
        δ and σ.
    """

    step: int
    epoch: float
    steps: np.ndarray
    epochs: np.ndarray
    risk: np.ndarray
    degrees_of_freedom: np.ndarray
    residual: np.ndarray
    fitted: np.ndarray = field(repr=False)
    trainer: Trainer = field(repr=False)
    delta: float
    sigma: float

    @property
    def falling(self) -> bool:
        """Whether the least risk is at the last look, so that more epochs might be better."""
        return self.step == int(self.steps[-1])


def train_with_twin(
    make_trainer: Callable[[np.ndarray], Trainer],
    y: ArrayLike,
    sigma: float,
    *,
    delta: float | None = None,
    seed: int = 0,
    every: Literal["epoch"] | int = "epoch",
    patience: int = 3,
    predict: Callable[[nn.Module], ArrayLike] | None = None,
    intercept: bool = False,
) -> TwinResult:
    """Train on y + δb, then on y, and stop where the estimated risk is least.

    Parameters
    ----------
    make_trainer : callable
        Labels (n,) to a `transformers.Trainer`. It is called twice and must build model, arguments and data anew, with the same
        seeds: that of the head too, which is drawn when the model is loaded. Labels belong into the training set unchanged.
    y : (n,)
        The labels of the training texts.
    sigma : float
        Their noise level.
    delta : float, optional
        δ, in the unit of the labels; by default σ/8: small against the noise, large against rounding.
    seed : int
        Of the signs b.
    every : "epoch" or int
        When to look; a look is a forward pass over the training texts.
    patience : int
        End the second run after so many looks without a new least risk.
    predict, intercept
        As in `TwinRecorder`.

    Raises
    ------
    InputError
        The two runs do not begin the same, or do not look at the same steps: the message says what differs.

    Example
    -------
    >>> result = train_with_twin(make_trainer, task.y, task.noise_variance**0.5)                    # doctest: +SKIP
    >>> print(f"best after {result.epoch:.0f} epochs"); result.trainer.save_model("best")           # doctest: +SKIP
    """
    delta = DELTA * require_positive("sigma", sigma) if delta is None else delta
    values = np.asarray(y, dtype=np.float64)
    labels, probe = twin_labels(values, delta, seed=seed)
    twin = TwinRecorder(labels, every=every, predict=predict, intercept=intercept)
    _train(make_trainer, labels, twin)
    gc.collect()  # the twin's model and optimiser: a Trainer is full of cycles, and two of them may not fit
    callback = TwinCallback(twin, values, probe, delta, sigma, patience=patience)
    trainer = _train(make_trainer, values.copy(), callback)
    best = callback.best
    return TwinResult(
        step=callback.steps[best],
        epoch=callback.epochs[best],
        steps=np.array(callback.steps),
        epochs=np.array(callback.epochs),
        risk=np.array(callback.risk),
        degrees_of_freedom=np.array(callback.degrees_of_freedom),
        residual=np.array(callback.residual),
        fitted=np.array(callback.fitted),
        trainer=trainer,
        delta=delta,
        sigma=float(sigma),
    )


def _train(make_trainer: Callable[[np.ndarray], Trainer], labels: np.ndarray, callback: TrainerLooks) -> Trainer:
    trainer = make_trainer(labels)
    trainer.add_callback(callback)
    trainer.train()
    return trainer
