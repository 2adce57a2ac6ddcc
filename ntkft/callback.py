r"""Stop a `transformers.Trainer` at the book's time.

`KernelStoppingCallback` adds up kernel time while a Trainer trains. Three rules use it:

=============  ============================================  =================================================
rule           stops                                         works with
=============  ============================================  =================================================
"radius"       before the step that would pass η̂             SGD, with or without momentum; no gradient clipping
"clock"        when the training error says that η̂ is over   every optimiser
"discrepancy"  when the training error has fallen to σ²      every optimiser
=============  ============================================  =================================================

`callback_clock` says how much kernel time a step takes, `callback_checks` what is refused. Source: the book's pages "When to
stop" and "Stopping on your own data".

Example
-------
>>> readout = sequence_readout(model, tokenizer)                                     # doctest: +SKIP
>>> advice = ntkft.stopping_advice(readout, task, step_size=args.learning_rate)      # doctest: +SKIP
>>> callback = KernelStoppingCallback(advice.eta, advice.sigma)                      # doctest: +SKIP
>>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()           # doctest: +SKIP
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ntkft.callback_checks import RULES, check_options, check_run
from ntkft.callback_clock import (
    ROUNDING,
    felt_time,
    next_mass,
    predicted_epochs,
    step_time,
    steps_of_an_epoch,
)
from ntkft.callback_model import centred_mse_loss, sequence_readout
from ntkft.descent import Descent
from ntkft.errors import InputError
from ntkft.spectrum import Spectrum, require_positive
from ntkft.stopping import StoppingTime, rademacher_rule, time_grid
from ntkft.trainer_data import check_every, evaluating, fitted_values

__all__ = ["RULES", "KernelStoppingCallback", "centred_mse_loss", "sequence_readout"]


class KernelStoppingCallback(TrainerCallback, ExportableState):
    r"""Watch the kernel time of a Trainer's run, and end it.

    Parameters
    ----------
    spectrum : Spectrum, StoppingTime or float
        Eigenvalues of K/n, from which η̂ is computed by `rademacher_rule`; or η̂ itself, as `stopping_advice` gives it.
    sigma : float
        Noise level of the labels.
    norm : float
        R of `rademacher_rule`.
    rule : "radius", "clock" or "discrepancy"
        See the table of the module.
    loss : "mse" or "half-mse"
        What the Trainer averages over a batch: (f - y)², as a model with one label does, or half of it.
    descent : Descent, optional
        Gradient flow on the training labels (`ntkft.descend`, without step_size): needed by the clock.
    intercept : bool
        Take the mean residual off the training error, as `descend(..., intercept=True)` does; by default as in `descent`.
    predict : callable, optional
        Model to (fitted values, labels) of the training texts, (n,) each. By default the model's logits on the
        Trainer's own training set, at most `max_texts` of it.
    every : "epoch" or int
        When "clock" and "discrepancy" look at the training error: at the end of each epoch, or each so many steps.
    accumulated : "auto", "mean" or "sum"
        Whether the gradient of a step is the mean or the sum over its accumulated batches. transformers leaves the sum
        if the model's forward takes keyword arguments and its loss ignores ``num_items_in_batch``, as the squared loss of
        its sequence classifiers does; "auto" finds out. Set ``trainer.loss_is_scaled_for_ga = False`` for the mean.
    stop : bool
        Whether to end the run, or only to log.

    Attributes
    ----------
    kernel_time : float
        η_t so far: the sum of the steps; for an optimiser without kernel time, or with clipped gradients, what the clock
        reads if there is a `descent`, and it is not logged otherwise.
    predicted_stop : float
        η̂.
    stopped : bool
        Whether the stop was reached.

    Raises
    ------
    InputError
        Of the constructor: an unknown option, a number that is not positive, a clock without descent. When training begins:
        a setting under which the rule has no meaning, with the remedy.

    Notes
    -----
    Every log of the Trainer gets kernel_time, predicted_stop, predicted_epochs (by the schedule; infinity if it ends before
    η̂) and, where it is looked at, train_residual. A checkpoint keeps the time, so a resumed run stops where an uninterrupted
    one does. The kernel is that of the trainable parameters: with PEFT, of the adapters.
    """

    def __init__(
        self,
        spectrum: Spectrum | StoppingTime | float,
        sigma: float,
        *,
        norm: float = 1.0,
        rule: Literal["radius", "clock", "discrepancy"] = "radius",
        loss: Literal["mse", "half-mse"] = "mse",
        descent: Descent | Sequence[Sequence[float]] | None = None,
        intercept: bool | None = None,
        predict: Callable[[nn.Module], tuple[ArrayLike, ArrayLike]] | None = None,
        every: Literal["epoch"] | int = "epoch",
        max_texts: int = 1024,
        accumulated: Literal["auto", "mean", "sum"] = "auto",
        stop: bool = True,
    ) -> None:
        check_options(rule, loss, accumulated, descent)
        self.sigma = require_positive("sigma", sigma)
        if isinstance(spectrum, Spectrum):
            spectrum = rademacher_rule(spectrum, sigma, norm)
        eta = spectrum.eta if isinstance(spectrum, StoppingTime) else spectrum
        self.predicted_stop = require_positive("the time to stop", eta)
        if intercept is None:
            intercept = isinstance(descent, Descent) and descent.kernel_means is not None
        self._settings: dict[str, Any] = {
            "norm": float(norm), "rule": rule, "loss": loss, "intercept": intercept, "every": every,
            "max_texts": max_texts, "accumulated": accumulated, "stop": stop,
        }  # fmt: skip
        self.rule, self.loss, self.every, self.stop, self.intercept = rule, loss, check_every(every), stop, intercept
        self.descent, self.predict, self.max_texts, self.accumulated = descent, predict, max_texts, accumulated
        self.kernel_time, self.stopped, self.train_residual = 0.0, False, math.nan
        self.needs_predict = predict is not None  # of a checkpoint: a function cannot be stored
        self._mass, self._batches, self._pending = 0.0, 0, 0.0
        self._timed, self._summed = True, False  # whether this optimiser has kernel time, and sums accumulated batches

    # --- What a checkpoint keeps ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: enough to go on, and to build the callback anew."""
        path = None
        if isinstance(self.descent, Descent):  # the curve is enough to read the clock
            grid = np.concatenate([[0.0], time_grid(self.descent)])
            path = [grid.tolist(), self.descent.residual(grid).tolist()]
        elif self.descent is not None:
            path = [list(map(float, row)) for row in self.descent]
        arguments = {"spectrum": self.predicted_stop, "sigma": self.sigma, "descent": path, **self._settings}
        kept = ("kernel_time", "stopped", "needs_predict", "_mass")
        return {"args": arguments, "attributes": {name: getattr(self, name) for name in kept}}

    # --- The events of a run --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the time of a checkpoint, and check that the rule means something in this run."""
        if self.needs_predict and self.predict is None:
            raise InputError(
                "The checkpoint's callback had its own `predict`, which cannot be stored: leave "
                "restore_callback_states_from_checkpoint off; the kernel time is taken from the checkpoint all the same."
            )
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        saved = saved[0] if isinstance(saved, list) else saved
        self.kernel_time, self.stopped, self._mass, self._batches = 0.0, False, 0.0, 0
        if state.global_step and saved:
            self.kernel_time = float(saved["attributes"]["kernel_time"])
            self._mass = float(saved["attributes"]["_mass"])
        elif state.global_step:
            raise InputError(
                f"The run is resumed at step {state.global_step} and its checkpoint holds no kernel time: resume from a "
                "checkpoint that was written with this callback, or begin anew."
            )
        self._timed, self._summed = check_run(
            args, kwargs["model"], kwargs["optimizer"], rule=self.rule, accumulated=self.accumulated, refuse=self._refuse
        )
        following = self._step_time(kwargs["optimizer"], self._expected_batches(args))
        if self.rule == "radius" and self.kernel_time + following > self.predicted_stop * ROUNDING:
            already = f"{self.kernel_time:.4g} is over and " if self.kernel_time else ""
            self._refuse(
                f"Of the kernel time {self.predicted_stop:.4g} {already}the next step takes {following:.4g}: there is nothing "
                "left to train, or the learning rate is too large."
            )

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an accumulated batch."""
        self._batches += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the learning rate that the step is about to use: the scheduler changes it later."""
        self._pending = self._step_time(kwargs["optimizer"], self._batches + 1 if self._summed else 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let time pass, unless the step was skipped (overflow in half precision)."""
        self._batches = 0
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._mass = next_mass(kwargs["optimizer"].param_groups[0], self._mass)
            if self._timed:
                self.kernel_time += self._pending

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the next step would pass η̂; or look at the training error."""
        if self.rule == "radius":
            # The scheduler has moved on: this is the learning rate of the next step.
            following = self._step_time(kwargs["optimizer"], self._expected_batches(args))
            if self._timed and self.kernel_time + following > self.predicted_stop * ROUNDING:
                self._stop(control)
        elif isinstance(self.every, int) and state.global_step % self.every == 0:
            self._look(control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the training error."""
        if self.rule != "radius" and self.every == "epoch":
            self._look(control, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add kernel time, the predicted stop and the training error to the Trainer's log."""
        said = {"predicted_stop": self.predicted_stop}
        if self._timed or self.descent is not None:
            said["kernel_time"] = self.kernel_time
        if self._timed:
            said["predicted_epochs"] = self.predicted_epochs(args, state, kwargs)
        if not math.isnan(self.train_residual):
            said["train_residual"] = self.train_residual
        for target in (logs, state.log_history[-1] if state.log_history else None):
            if target is not None:
                target.update(said)

    # --- Time -----------------------------------------------------------------------------------------------------

    def _step_time(self, optimizer: Any, batches: int) -> float:
        return step_time(optimizer, self._mass, self.loss, batches)

    def _expected_batches(self, args: Any) -> int:
        return args.gradient_accumulation_steps if self._summed else 1

    def predicted_epochs(self, args: Any, state: Any, kwargs: Mapping[str, Any]) -> float:
        """Return the epoch at which η̂ is reached by the Trainer's schedule; infinity if the schedule ends before."""
        if self.stopped:
            return float(state.global_step / steps_of_an_epoch(args, state, kwargs["train_dataloader"]))
        return predicted_epochs(
            args, state, kwargs, now=self.kernel_time, stop=self.predicted_stop, mass=self._mass, loss=self.loss,
            batches=self._expected_batches(args),
        )  # fmt: skip

    # --- Training error -------------------------------------------------------------------------------------------

    def _look(self, control: Any, kwargs: Mapping[str, Any]) -> None:
        model = kwargs["model"]
        with evaluating(model):
            found = self.predict(model) if self.predict else fitted_values(model, kwargs["train_dataloader"], self.max_texts)
        fitted, labels = (np.asarray(v, dtype=np.float64).reshape(-1) for v in found)
        if fitted.shape != labels.shape or not np.isfinite(fitted).all():
            raise InputError(
                f"There are {len(fitted)} fitted values ({int((~np.isfinite(fitted)).sum())} not finite) and {len(labels)} "
                "labels: predict must return one finite value and one label for each text; if training diverged, lower the rate."
            )
        left = labels - fitted
        self.train_residual = float((left - left.mean() * self.intercept).var() if self.intercept else (left**2).mean())
        if self.descent is not None:
            read = felt_time(self.descent, self.train_residual)
            if not self._timed:
                self.kernel_time = read
            if self.rule == "clock" and read >= self.predicted_stop:
                self._stop(control)
        if self.rule == "discrepancy" and self.train_residual <= self.sigma**2:
            self._stop(control)

    def _stop(self, control: Any) -> None:
        self.stopped = True
        if self.stop:
            control.should_training_stop = True

    def _refuse(self, message: str) -> None:
        if self.stop:
            raise InputError(message)
        warnings.warn(message, stacklevel=3)
