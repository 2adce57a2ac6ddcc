r"""Stop a `transformers.Trainer` at the book's time.

`KernelStoppingCallback` adds up kernel time while a Trainer trains. Three rules use it:

=============  ============================================  =================================================
rule           stops                                         works with
=============  ============================================  =================================================
"radius"       before the step that would pass η̂             SGD, with or without momentum; no gradient clipping
"clock"        when the training error says that η̂ is over   every optimiser
"discrepancy"  when the training error has fallen to σ²      every optimiser
=============  ============================================  =================================================

A step of learning rate ε on the book's loss :math:`\frac{1}{2n}\sum(f-y)^2` moves kernel time by ε, on ``MSELoss`` by 2ε. With
momentum μ the step also repeats what is left of the earlier ones: the buffer of a constant gradient has the mass
:math:`m_t = \mu m_{t-1} + 1` (1 - dampening in the place of 1 after the first step), and time moves by :math:`\varepsilon m_t`,
soon ε/(1-μ). Source: the book's pages "When to stop" and "Stopping on your own data".

Example
-------
>>> readout = sequence_readout(model, tokenizer)                                     # doctest: +SKIP
>>> advice = ntkft.stopping_advice(readout, task, step_size=args.learning_rate)      # doctest: +SKIP
>>> callback = KernelStoppingCallback(advice.eta, advice.sigma)                      # doctest: +SKIP
>>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()           # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ntkft.advice import LOSSES
from ntkft.descent import Descent
from ntkft.errors import InputError
from ntkft.models import LoadedModel
from ntkft.monitor import residual_clock
from ntkft.readout import MAX_TOKENS, Readout
from ntkft.spectrum import Spectrum, require_positive
from ntkft.stopping import StoppingTime, rademacher_rule, time_grid

__all__ = ["RULES", "KernelStoppingCallback", "centred_mse_loss", "sequence_readout"]

RULES = ("radius", "clock", "discrepancy")
ROUNDING = 1 + 1e-9  # η̂/ε steps fit although their sum is a little more than η̂ in floating point


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
        for name, value, known in (
            ("rule", rule, RULES), ("loss", loss, tuple(LOSSES)), ("accumulated", accumulated, ("auto", "mean", "sum"))
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
        if every != "epoch" and not (isinstance(every, int) and every > 0):
            raise InputError(f"every is {every!r}: give 'epoch' or a number of steps.")
        if rule == "clock" and descent is None:
            raise InputError("rule 'clock' compares the training error with a path and descent is None: pass ntkft.descend(...).")
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
        self.rule, self.loss, self.every, self.stop, self.intercept = rule, loss, every, stop, intercept
        self.descent, self.predict, self.max_texts, self.accumulated = descent, predict, max_texts, accumulated
        self.kernel_time, self.stopped, self.train_residual = 0.0, False, math.nan
        self.needs_predict = predict is not None  # of a checkpoint: a function cannot be stored
        self._mass, self._batches, self._pending = 0.0, 0, 0.0
        self._timed = True  # whether this optimiser has kernel time

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
        self._check(args, kwargs["model"], kwargs["optimizer"])
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
            self._mass = self._next_mass(kwargs["optimizer"].param_groups[0])
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

    def _next_mass(self, group: Mapping[str, Any]) -> float:
        damping = 0.0 if self._mass == 0 else group.get("dampening", 0.0)  # torch does not damp the first step
        return group.get("momentum", 0.0) * self._mass + 1 - damping

    def _step_time(self, optimizer: Any, batches: int) -> float:
        """Return the kernel time of a step from now: learning rate, loss, momentum, accumulated batches."""
        group = optimizer.param_groups[0]
        mass = self._next_mass(group)
        if group.get("nesterov"):
            mass = 1 + group["momentum"] * mass
        return float(group["lr"]) * LOSSES[self.loss] * mass * batches

    def _expected_batches(self, args: Any) -> int:
        return args.gradient_accumulation_steps if self._summed else 1

    def predicted_epochs(self, args: Any, state: Any, kwargs: Mapping[str, Any]) -> float:
        """Return the epoch at which η̂ is reached by the Trainer's schedule; infinity if the schedule ends before."""
        batches = len(kwargs["train_dataloader"]) if hasattr(kwargs["train_dataloader"], "__len__") else 0
        steps = math.ceil(batches / args.gradient_accumulation_steps) or state.max_steps / max(state.num_train_epochs, 1)
        optimizer, scheduler = kwargs["optimizer"], kwargs.get("lr_scheduler")
        ahead = np.full(max(state.max_steps - state.global_step, 0), self._step_time(optimizer, self._expected_batches(args)))
        plan = getattr(scheduler, "lr_lambdas", None)
        lr = float(optimizer.param_groups[0]["lr"])
        if plan and scheduler is not None:
            done = scheduler.last_epoch
            future = np.array([plan[0](done + k) for k in range(len(ahead))]) * scheduler.base_lrs[0]
            ahead = ahead * (future / lr) if lr > 0 else future * LOSSES[self.loss] * self._expected_batches(args)
        reached = np.flatnonzero(self.kernel_time + np.cumsum(ahead) > self.predicted_stop * ROUNDING)
        if self.stopped:
            return float(state.global_step / steps)
        return float((state.global_step + reached[0]) / steps) if reached.size else math.inf

    # --- Training error -------------------------------------------------------------------------------------------

    def _look(self, control: Any, kwargs: Mapping[str, Any]) -> None:
        model = kwargs["model"]
        was_training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                found = self.predict(model) if self.predict else _fitted(model, kwargs["train_dataloader"], self.max_texts)
        finally:
            for module, flag in was_training.items():
                module.training = flag
        fitted, labels = (np.asarray(v, dtype=np.float64).reshape(-1) for v in found)
        if fitted.shape != labels.shape or not np.isfinite(fitted).all():
            raise InputError(
                f"There are {len(fitted)} fitted values ({int((~np.isfinite(fitted)).sum())} not finite) and {len(labels)} "
                "labels: predict must return one finite value and one label for each text; if training diverged, lower the rate."
            )
        left = labels - fitted
        self.train_residual = float((left - left.mean() * self.intercept).var() if self.intercept else (left**2).mean())
        if self.descent is not None:
            read = self._clock(self.train_residual)
            if not self._timed:
                self.kernel_time = read
            if self.rule == "clock" and read >= self.predicted_stop:
                self._stop(control)
        if self.rule == "discrepancy" and self.train_residual <= self.sigma**2:
            self._stop(control)

    def _clock(self, residual: float) -> float:
        if isinstance(self.descent, Descent):
            return residual_clock(self.descent, residual)
        assert self.descent is not None
        times, path = self.descent
        return float(np.interp(-residual, -np.asarray(path), times)) if residual > path[-1] else math.inf

    def _stop(self, control: Any) -> None:
        self.stopped = True
        if self.stop:
            control.should_training_stop = True

    # --- What would make the numbers wrong --------------------------------------------------------------------------

    def _refuse(self, message: str) -> None:
        if self.stop:
            raise InputError(message)
        warnings.warn(message, stacklevel=3)

    def _check(self, args: Any, model: nn.Module, optimizer: Any) -> None:
        kind = type(getattr(optimizer, "optimizer", optimizer))
        groups = optimizer.param_groups
        rates, momenta = ({group.get(key, 0.0) for group in groups} for key in ("lr", "momentum"))
        remedy = "use rule='discrepancy' or rule='clock', which read the training error."
        self._timed = issubclass(kind, torch.optim.SGD) and len(rates) == 1 and len(momenta) == 1 and not args.max_grad_norm
        self._summed = args.gradient_accumulation_steps > 1 and (
            self.accumulated == "sum" or (self.accumulated == "auto" and _sums_batches(model))
        )
        if self.rule == "radius":
            if not issubclass(kind, torch.optim.SGD):
                self._refuse(f"{kind.__name__} has no kernel time, only plain SGD has: {remedy}")
            elif len(rates) > 1 or len(momenta) > 1:
                self._refuse(
                    f"The parameter groups have learning rates {sorted(rates)} and kernel time needs one for all: {remedy}"
                )
            elif args.max_grad_norm:
                self._refuse(
                    f"max_grad_norm is {args.max_grad_norm} and a clipped step moves less than its learning rate says: set "
                    "max_grad_norm=0, or " + remedy
                )
        if self._summed and self.accumulated == "auto":
            warnings.warn(
                f"This Trainer adds the gradients of {args.gradient_accumulation_steps} accumulated batches and does not average "
                "them, so a step is that many times as long: kernel time counts it. For the mean set "
                "trainer.loss_is_scaled_for_ga = False and accumulated='mean'.",
                stacklevel=3,
            )
        if any(group.get("weight_decay", 0.0) for group in groups) and self._timed:
            warnings.warn(
                "Weight decay pulls the weights to zero, which the kernel's path does not know: set it to 0.", stacklevel=3
            )
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            warnings.warn(
                "Dropout is active and the theory is about descent without it: set the dropout rates of the model's config "
                "(hidden_dropout_prob, attention_probs_dropout_prob, ...) and of PEFT (lora_dropout) to 0.",
                stacklevel=3,
            )


class _LogitModule(nn.Module):
    """The one logit of a sequence classifier, (n,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)  # (n,)


def sequence_readout(model: Any, tokenizer: Any, *, max_tokens: int = MAX_TOKENS) -> Readout:
    """Read a sequence classifier with one label as a scalar function: the one that a Trainer fits with its squared loss.

    Parameters
    ----------
    model : transformers model, PEFT or not
        With ``num_labels=1``. It is put into evaluation mode; a Trainer puts it back.
    tokenizer : its tokenizer
        Texts are cut to `max_tokens` tokens: cut those of the Trainer in the same way.

    Raises
    ------
    InputError
        If the model has not one label.

    Example
    -------
    >>> model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)          # doctest: +SKIP
    >>> kernel = ntkft.empirical_ntk(sequence_readout(model, tokenizer), task.texts)            # doctest: +SKIP
    """
    config = getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    if labels != 1:
        raise InputError(f"The model has num_labels={labels} and a squared loss needs one number: load it with num_labels=1.")

    def encode(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]

    name = getattr(config, "name_or_path", "") or type(model).__name__
    about = {"name": name, "kind": "sequence classifier", "architecture": type(model).__name__}
    loaded = LoadedModel(model.eval(), tokenizer, about)
    return Readout(_LogitModule(model), loaded, encode, {"readout": "sequence classifier", "max_tokens": max_tokens})


def centred_mse_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the squared loss with a free constant in each batch, a Trainer's ``compute_loss_func``.

    The constant direction of the kernel, often by far its largest eigenvalue, then no longer limits the step. The constant
    itself is fitted after training: add mean(y - f) over the training texts to the predictions. Accumulated batches are
    summed, as ``accumulated="auto"`` assumes.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> outputs = SimpleNamespace(logits=torch.tensor([[1.0], [2.0]]))
    >>> centred_mse_loss(outputs, torch.tensor([6.0, 7.0]))       # off by a constant only
    tensor(0.)
    """
    left = outputs.logits.squeeze(-1) - labels.to(outputs.logits)
    return ((left - left.mean()) ** 2).mean()


def _sums_batches(model: nn.Module) -> bool:
    """Whether transformers leaves the accumulated gradient a sum: it trusts such a model to divide, and MSELoss does not."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    inner = unwrap()
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is None:
        accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(inner.forward).parameters.values())
    return bool(accepts) and getattr(getattr(inner, "config", None), "num_labels", None) == 1


def _fitted(model: nn.Module, dataloader: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels of the training set, or of a fixed random part of it."""
    data = getattr(dataloader, "dataset", None)
    if data is None or isinstance(data, IterableDataset):
        raise InputError("The training set cannot be read twice: give the callback a `predict` function.")
    if len(data) > most:
        data = Subset(data, np.sort(np.random.default_rng(0).permutation(len(data))[:most]).tolist())
    # A loader of our own with its own generator: iterating the Trainer's would change its batches to come.
    own = torch.Generator().manual_seed(0)
    loader: Any = DataLoader(data, batch_size=32, collate_fn=dataloader.collate_fn, generator=own)
    device = next(model.parameters()).device
    fitted, labels = [], []
    for batch in loader:
        if "labels" not in batch:
            raise InputError(f"A batch has {', '.join(batch)} and no labels: give the callback a `predict` function.")
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        values = model(**inputs).logits
        if values.numel() != len(batch["labels"]):
            raise InputError(
                f"The model has logits of shape {tuple(values.shape)} for {len(batch['labels'])} labels and one number a text is "
                "needed: load it with num_labels=1, or give the callback a `predict` function."
            )
        fitted.append(values.double().reshape(-1).cpu().numpy())
        labels.append(batch["labels"].double().reshape(-1).cpu().numpy())
    return np.concatenate(fitted), np.concatenate(labels)
