r"""Kernel time of a Trainer's optimiser: of one step, of the schedule to come, and read off the training error.

A step of learning rate ε on the book's loss :math:`\frac{1}{2n}\sum(f-y)^2` moves kernel time by ε, on ``MSELoss`` by 2ε. With
momentum μ the step also repeats what is left of the earlier ones: the buffer of a constant gradient has the mass
:math:`m_t = \mu m_{t-1} + 1` (1 - dampening in the place of 1 after the first step), and time moves by :math:`\varepsilon m_t`,
soon ε/(1-μ). Source: the book's page "Stopping on your own data", exercises on the loss and on momentum.

Example
-------
>>> next_mass({"momentum": 0.5}, next_mass({"momentum": 0.5}, 0.0))
1.5
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkft.advice import LOSSES
from ntkft.descent import Descent
from ntkft.monitor import residual_clock

__all__ = ["ROUNDING", "felt_time", "next_mass", "predicted_epochs", "step_time", "steps_of_an_epoch"]

ROUNDING = 1 + 1e-9  # η̂/ε steps fit although their sum is a little more than η̂ in floating point


def next_mass(group: Mapping[str, Any], mass: float) -> float:
    """Return the mass of the momentum buffer after the next step of a parameter group."""
    damping = 0.0 if mass == 0 else group.get("dampening", 0.0)  # torch does not damp the first step
    return group.get("momentum", 0.0) * mass + 1 - damping


def step_time(optimizer: Any, mass: float, loss: str, batches: int) -> float:
    """Return the kernel time of a step from now: learning rate, loss, momentum, accumulated batches."""
    group = optimizer.param_groups[0]
    following = next_mass(group, mass)
    if group.get("nesterov"):
        following = 1 + group["momentum"] * following
    return float(group["lr"]) * LOSSES[loss] * following * batches


def predicted_epochs(
    args: Any, state: Any, kwargs: Mapping[str, Any], *, now: float, stop: float, mass: float, loss: str, batches: int
) -> float:
    """Return the epoch at which kernel time gets from `now` to `stop` by the Trainer's schedule; infinity if it ends before.

    Parameters
    ----------
    args, state, kwargs
        What the Trainer gives to a callback.
    now, stop : float
        Kernel times.
    mass, loss, batches
        As in `step_time`.
    """
    loader, optimizer, scheduler = kwargs["train_dataloader"], kwargs["optimizer"], kwargs.get("lr_scheduler")
    ahead = np.full(max(state.max_steps - state.global_step, 0), step_time(optimizer, mass, loss, batches))
    plan = getattr(scheduler, "lr_lambdas", None)
    lr = float(optimizer.param_groups[0]["lr"])
    if plan and scheduler is not None:
        done = scheduler.last_epoch
        future = np.array([plan[0](done + k) for k in range(len(ahead))]) * scheduler.base_lrs[0]
        ahead = ahead * (future / lr) if lr > 0 else future * LOSSES[loss] * batches
    reached = np.flatnonzero(now + np.cumsum(ahead) > stop * ROUNDING)
    return float((state.global_step + reached[0]) / steps_of_an_epoch(args, state, loader)) if reached.size else math.inf


def steps_of_an_epoch(args: Any, state: Any, loader: Any) -> float:
    """Return the number of steps of an epoch; without a length of the data, what the schedule says."""
    batches = len(loader) if hasattr(loader, "__len__") else 0
    return math.ceil(batches / args.gradient_accumulation_steps) or state.max_steps / max(state.num_train_epochs, 1)


def felt_time(descent: Descent | Sequence[Sequence[float]], residual: float) -> float:
    """Return the kernel time at which the path has this training error: of a `Descent`, or of times and errors kept from one.

    Example
    -------
    >>> felt_time([[0.0, 1.0, 2.0], [4.0, 2.0, 1.0]], 3.0), felt_time([[0.0, 1.0], [4.0, 2.0]], 1.0)
    (0.5, inf)
    """
    if isinstance(descent, Descent):
        return residual_clock(descent, residual)
    times, path = descent
    return float(np.interp(-residual, -np.asarray(path), times)) if residual > path[-1] else math.inf
