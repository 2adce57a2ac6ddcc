r"""What a Trainer's model says about its own training texts while it trains, without disturbing the run.

A look must not change what is looked at: the model is put into evaluation mode and back module by module, no random number is
drawn, and the batches to come stay as they are. `TrainerLooks` is the base of callbacks that look again and again.

Source: the book's pages "Stopping on your own data" and "When the kernel drifts".

Example
-------
>>> check_every("epoch"), check_every(5)
('epoch', 5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback

from ntkft.errors import InputError

__all__ = ["TrainerLooks", "check_every", "evaluating", "fitted_values"]


def check_every(every: Literal["epoch"] | int) -> Literal["epoch"] | int:
    """Return `every`, or raise `InputError` unless it is "epoch" or a number of steps."""
    if every != "epoch" and not (isinstance(every, int) and every > 0):
        raise InputError(f"every is {every!r}: give 'epoch' or a number of steps.")
    return every


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and each of its modules back into the mode it was in.

    Example
    -------
    >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 1).eval())
    >>> with evaluating(model):
    ...     model[0].training, torch.is_grad_enabled()
    (False, False)
    >>> model[0].training, model[1].training
    (True, False)
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in was_training.items():
            module.training = flag


def fitted_values(model: nn.Module, dataloader: Any, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels of the Trainer's training set in its own order, or of a fixed random part of it.

    Parameters
    ----------
    model : nn.Module
        With one logit a text. `evaluating` is left to the caller.
    dataloader : DataLoader
        The Trainer's ``train_dataloader``: its dataset and its collate function are used, its order is not touched.
    most : int, optional
        At most so many texts; all by default.

    Returns
    -------
    tuple of (n,) and (n,)

    Raises
    ------
    InputError
        The data can be read only once, or has no labels; the model has not one logit a text.
    """
    data = getattr(dataloader, "dataset", None)
    if data is None or isinstance(data, IterableDataset):
        raise InputError("The training set cannot be read twice: give the callback a `predict` function.")
    if most is not None and len(data) > most:
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


class TrainerLooks(TrainerCallback):
    """Look at the fitted values of a run before training and every epoch, or every so many steps and after the last one.

    A subclass may say in `looked` what to do with a look.

    Parameters
    ----------
    labels : (n,)
        What the Trainer's training set should have as labels, in its order.
    every : "epoch" or int
    predict : callable, optional
        Model to fitted values (n,), in the order of the labels; by default the logits on the Trainer's own training set.

    Attributes
    ----------
    steps, epochs, fitted : lists
        Where the looks were, and the fitted values (n,) there.
    """

    def __init__(
        self, labels: np.ndarray, every: Literal["epoch"] | int, predict: Callable[[nn.Module], ArrayLike] | None
    ) -> None:
        self.labels, self.every, self.predict = labels, check_every(every), predict
        self.tolerance = 1e-6 * float(np.abs(labels).max(initial=1.0))  # labels may be kept in single precision
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.fitted: list[np.ndarray] = []

    def looked(self, state: Any, control: Any, model: nn.Module) -> None:
        """Do something with the look that was just added."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, and look before the first step."""
        if state.global_step:
            raise InputError(
                f"The run is resumed at step {state.global_step} and the looks before it are missing: train from the start."
            )
        self.steps, self.epochs, self.fitted = [], [], []
        self._look(state, control, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look if it is time."""
        step = state.global_step
        if isinstance(self.every, int) and (step % self.every == 0 or step >= state.max_steps):
            self._look(state, control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look if it is time."""
        if self.every == "epoch":
            self._look(state, control, kwargs)

    def _look(self, state: Any, control: Any, kwargs: Any) -> None:
        model = kwargs["model"]
        with evaluating(model):
            if self.predict is not None:
                fitted = np.asarray(self.predict(model), dtype=np.float64).reshape(-1)
            else:
                fitted, labels = fitted_values(model, kwargs["train_dataloader"])
                self._check(labels)
        if fitted.shape != self.labels.shape or not np.isfinite(fitted).all():
            raise InputError(
                f"At step {state.global_step} there are {len(fitted)} fitted values ({int((~np.isfinite(fitted)).sum())} not "
                f"finite) and {len(self.labels)} labels: one finite value is needed for each; if training diverged, lower the "
                "rate."
            )
        self.steps.append(int(state.global_step))
        self.epochs.append(float(state.epoch or 0.0))
        self.fitted.append(fitted)
        self.looked(state, control, model)

    def _check(self, labels: np.ndarray) -> None:
        if labels.shape != self.labels.shape:
            raise InputError(
                f"The Trainer's training set has {len(labels)} labels and {len(self.labels)} were given: train on all of them, "
                "and on nothing else."
            )
        off = float(np.abs(labels - self.labels).max())
        if off > self.tolerance:
            raise InputError(
                f"The labels of the Trainer's training set differ from those given by up to {off:.3g}: its rows must have them "
                "unchanged, in this order and unit, the perturbed ones in the twin's run."
            )
