"""The twin rule in a Trainer: `TwinRecorder` for the run on perturbed labels, `TwinCallback` for the one on the true labels.

`ntkft.twin.train_with_twin` puts them together. Source: the book's page "When the kernel drifts".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from ntkft.errors import InputError
from ntkft.spectrum import require_positive
from ntkft.trainer_data import TrainerLooks
from ntkft.twin_checks import Start, require_same_values
from ntkft.twin_rule import twin_stop

__all__ = ["TwinCallback", "TwinRecorder"]


class TwinRecorder(TrainerLooks):
    """Record the fitted values of the twin's run. It keeps the run from saving checkpoints: they are not the real run's.

    Parameters
    ----------
    labels : (n,)
        Those of the twin, from `twin_labels`.
    every : "epoch" or int
        Look before training, and each epoch or each so many steps and after the last one.
    predict : callable, optional
        Model to fitted values (n,) of the training texts, in the order of the labels: by default the logits on the Trainer's
        own training set, whose labels are compared with these.
    intercept : bool
        Shift the fitted values to the mean of the labels, for a loss that leaves a constant free (`centred_mse_loss`).

    Example
    -------
    >>> from ntkft.twin import twin_labels
    >>> labels, probe = twin_labels([1.0, 2.0, 3.0], 0.1)
    >>> recorder = TwinRecorder(labels, every=5)             # Trainer(..., callbacks=[recorder]).train() on the twin's labels
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        every: Literal["epoch"] | int = "epoch",
        predict: Callable[[nn.Module], ArrayLike] | None = None,
        intercept: bool = False,
    ) -> None:
        super().__init__(np.asarray(labels, dtype=np.float64), every, predict)
        self.intercept = intercept
        self.start: Start | None = None  # what the second run must have in common with this one

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the run begins with, and look."""
        self.start = Start.of(args, state, kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look if it is time, and save nothing."""
        super().on_step_end(args, state, control, **kwargs)
        control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look if it is time, and save nothing."""
        super().on_epoch_end(args, state, control, **kwargs)
        control.should_save = False


class TwinCallback(TrainerLooks):
    """Watch the run on the true labels beside the record of its twin, and end it where the estimated risk is least.

    Parameters
    ----------
    twin : TwinRecorder
        Of a run that is over; `every`, `predict` and `intercept` are taken from it.
    y, probe : (n,)
        The true labels, and b of `twin_labels`.
    delta, sigma : float
        δ of `twin_labels`, and the noise level of the labels.
    patience : int
        End the run after so many looks without a new least risk.

    Attributes
    ----------
    steps, epochs, risk, degrees_of_freedom, residual : lists
        One entry a look; the first one is before training.
    best : int
        The look of least risk. Its trainable weights and buffers are kept in memory, and put back when training ends.
    stopped : bool
        Whether patience has ended the run.

    Raises
    ------
    InputError
        Of the constructor: numbers of labels disagree, the twin has not run. In training: the two runs do not begin the same,
        do not look at the same steps, or have other labels than said.

    Notes
    -----
    Each look is in the Trainer's log as twin_risk and degrees_of_freedom. The last checkpoint on disk is not the best look: save
    the model after training. The optimiser's state is that of the last step, so do not train on.
    """

    def __init__(
        self, twin: TwinRecorder, y: ArrayLike, probe: ArrayLike, delta: float, sigma: float, *, patience: int = 3
    ) -> None:
        labels, self.probe = np.asarray(y, dtype=np.float64), np.asarray(probe, dtype=np.float64)
        if not twin.labels.shape == labels.shape == self.probe.shape:
            raise InputError(
                f"The twin has labels of shape {twin.labels.shape}, y is {labels.shape} and the probe {self.probe.shape}: both "
                "trainings need the same texts."
            )
        self.delta, self.sigma = require_positive("delta", delta), require_positive("sigma", sigma)
        if not np.allclose(twin.labels, labels + delta * self.probe, rtol=0, atol=1e-3 * delta):
            raise InputError("The twin's labels are not y + δb: give y, probe and delta as they were given to twin_labels.")
        if not twin.steps:
            raise InputError("The twin has no looks and must train first: train on its labels with the TwinRecorder as callback.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise InputError(f"patience is {patience!r} and counts looks: give a whole number, at least 1.")
        super().__init__(labels, twin.every, twin.predict)
        self.twin, self.patience = twin, patience
        self._reset()

    def _reset(self) -> None:
        self.risk: list[float] = []
        self.degrees_of_freedom: list[float] = []
        self.residual: list[float] = []
        self.best, self.stopped = 0, False
        self._kept: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the run begins as its twin did, and look."""
        self._reset()
        assert self.twin.start is not None
        self.twin.start.require_same(Start.of(args, state, kwargs["model"]))
        super().on_train_begin(args, state, control, **kwargs)

    def looked(self, state: Any, control: Any, model: nn.Module) -> None:
        """Estimate the risk at this look; keep the weights if it is the least, end the run if it has not been for long."""
        k, step = len(self.steps) - 1, self.steps[-1]
        theirs = self.twin.steps[k] if k < len(self.twin.steps) else None
        if step != theirs:
            there = f"its twin at step {theirs}" if theirs is not None else f"its twin ended at step {self.twin.steps[-1]}"
            raise InputError(
                f"Look {k} of this run is at step {step} and {there}: train both on the same number of texts, with the same "
                "batch size, epochs and callbacks."
            )
        mine, other = self.fitted[k], self.twin.fitted[k]
        if k == 0:
            require_same_values(mine, other, 1e-3 * self.delta)
        if self.twin.intercept:
            mine = mine + (self.labels - mine).mean()
            other = other + (self.twin.labels - other).mean()
        found = twin_stop(mine[None], other[None], self.labels, self.probe, self.delta, self.sigma)
        self.risk.append(float(found.risk[0]))
        self.degrees_of_freedom.append(float(found.degrees_of_freedom[0]))
        self.residual.append(float(found.residual[0]))
        if k == 0 or self.risk[k] < self.risk[self.best]:
            self.best = k
            self._kept = {name: value.detach().cpu().clone() for name, value in _changing(model).items()}
        elif k - self.best >= self.patience:
            self.stopped = control.should_training_stop = True
        self._log(state, control)

    def _log(self, state: Any, control: Any) -> None:
        # At the end of an epoch the Trainer may have logged this step already; it does not do so twice.
        rows = [row for row in state.log_history if "loss" in row and row["step"] == state.global_step]
        for row in rows:
            row.update(self._last())
        control.should_log = control.should_log or (state.global_step > 0 and not rows)

    def _last(self) -> dict[str, float]:
        return {"twin_risk": self.risk[-1], "degrees_of_freedom": self.degrees_of_freedom[-1]}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add risk and degrees of freedom to the log of the step at which they were estimated."""
        if self.steps and self.steps[-1] == state.global_step:
            for target in (logs, state.log_history[-1] if state.log_history else None):
                if target is not None:
                    target.update(self._last())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back the weights of the best look."""
        with torch.no_grad():
            for name, value in _changing(kwargs["model"]).items():
                if name in self._kept:  # a buffer may be younger than the best look
                    value.copy_(self._kept[name])


def _changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: trainable parameters and buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())
