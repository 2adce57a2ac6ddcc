"""Whether two runs begin the same, so that only their labels can make a difference.

Source: the book's page "When the kernel drifts", where the twin has the same seed of batches and head.

Example
-------
>>> require_same_values(np.zeros(2), np.array([0.0, 0.3]), 1e-3)                # doctest: +ELLIPSIS
Traceback (most recent call last):
ntkft.errors.InputError: Before training the fitted values of the two runs differ by up to 0.3: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ntkft.errors import InputError

__all__ = ["Start", "require_same_values"]

ARGUMENTS = (
    "seed", "data_seed", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
REMEDY = (
    "build the model anew each time and call transformers.set_seed before it is made, so that a new head and new adapters are "
    "drawn the same."
)


@dataclass(frozen=True)
class Start:
    """What a Trainer's run begins with: settings, random numbers (order of batches, dropout), weights.

    Attributes
    ----------
    settings : dict
        The `ARGUMENTS`, and the number of steps.
    random : bytes
        State of torch's generators.
    weights : dict
        Sum and norm of each trainable parameter: two draws of it have different sums.
    """

    settings: dict[str, Any]
    random: bytes
    weights: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, args: Any, state: Any, model: nn.Module) -> Start:
        """Read it off what the Trainer gives to a callback when training begins."""
        settings = {name: getattr(args, name) for name in ARGUMENTS} | {"max_steps": state.max_steps}
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
        with torch.no_grad():
            weights = {
                name: (float(p.float().sum()), float(p.float().norm())) for name, p in model.named_parameters() if p.requires_grad
            }
        return cls(settings, b"".join(s.cpu().numpy().tobytes() for s in states), weights)

    def require_same(self, other: Start) -> None:
        """Raise `InputError` unless `other`, the run on the true labels, begins as this one, its twin, did."""
        for name, value in self.settings.items():
            if value != other.settings[name]:
                raise InputError(
                    f"{name} is {value} in the twin's run and {other.settings[name]} in this one: give both the same."
                )
        if self.weights.keys() != other.weights.keys():
            odd = sorted(self.weights.keys() ^ other.weights.keys())
            raise InputError(f"{odd[0]} is trained in one of the two runs only: build the same model for both.")
        for name, (total, norm) in self.weights.items():
            if not np.allclose((total, norm), other.weights[name], rtol=0, atol=1e-4 * norm):
                raise InputError(f"The two runs begin with different weights {name}: {REMEDY}")
        if self.random != other.random:
            raise InputError(
                "The two runs begin with different random numbers, which order the batches and draw dropout: draw none between "
                "making the Trainer, which seeds them, and training."
            )


def require_same_values(mine: np.ndarray, other: np.ndarray, tolerance: float) -> None:
    """Raise `InputError` if the fitted values (n,) before training differ by more than `tolerance`, or a float's rounding."""
    off = np.abs(mine - other)
    if (off > tolerance + 1e-5 * np.abs(other)).any():
        raise InputError(f"Before training the fitted values of the two runs differ by up to {off.max():.3g}: {REMEDY}")
