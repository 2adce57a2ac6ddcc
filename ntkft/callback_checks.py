"""What would make the numbers of `KernelStoppingCallback` wrong: options that do not fit, runs without kernel time.

Source: the book's page "Stopping on your own data", section "Where it breaks".
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ntkft.advice import LOSSES
from ntkft.errors import InputError

__all__ = ["RULES", "check_options", "check_run", "sums_batches"]

RULES = ("radius", "clock", "discrepancy")


def check_options(rule: str, loss: str, accumulated: str, descent: Any) -> None:
    """Raise `InputError` for an unknown option, or a clock without a path.

    Example
    -------
    >>> check_options("soon", "mse", "auto", None)
    Traceback (most recent call last):
    ntkft.errors.InputError: rule is 'soon': choose one of radius, clock, discrepancy.
    """
    for name, value, known in (
        ("rule", rule, RULES), ("loss", loss, tuple(LOSSES)), ("accumulated", accumulated, ("auto", "mean", "sum"))
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
    if rule == "clock" and descent is None:
        raise InputError("rule 'clock' compares the training error with a path and descent is None: pass ntkft.descend(...).")


def check_run(
    args: Any, model: nn.Module, optimizer: Any, *, rule: str, accumulated: str, refuse: Callable[[str], None]
) -> tuple[bool, bool]:
    """Refuse a run in which the rule has no meaning, and warn of what the theory does not know.

    Parameters
    ----------
    args, model, optimizer
        Of the Trainer.
    rule, accumulated : str
        As in `KernelStoppingCallback`.
    refuse : callable
        Told why "radius" has no meaning here.

    Returns
    -------
    tuple of bool
        Whether the optimiser has kernel time; whether accumulated batches are summed.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))
    groups = optimizer.param_groups
    rates, momenta = ({group.get(key, 0.0) for group in groups} for key in ("lr", "momentum"))
    timed = issubclass(kind, torch.optim.SGD) and len(rates) == 1 and len(momenta) == 1 and not args.max_grad_norm
    summed = args.gradient_accumulation_steps > 1 and (
        accumulated == "sum" or (accumulated == "auto" and sums_batches(model))
    )
    if rule == "radius":
        remedy = "use rule='discrepancy' or rule='clock', which read the training error."
        if not issubclass(kind, torch.optim.SGD):
            refuse(f"{kind.__name__} has no kernel time, only plain SGD has: {remedy}")
        elif len(rates) > 1 or len(momenta) > 1:
            refuse(f"The parameter groups have learning rates {sorted(rates)} and kernel time needs one for all: {remedy}")
        elif args.max_grad_norm:
            refuse(
                f"max_grad_norm is {args.max_grad_norm} and a clipped step moves less than its learning rate says: set "
                "max_grad_norm=0, or " + remedy
            )
    if summed and accumulated == "auto":
        warnings.warn(
            f"This Trainer adds the gradients of {args.gradient_accumulation_steps} accumulated batches and does not average "
            "them, so a step is that many times as long: kernel time counts it. For the mean set "
            "trainer.loss_is_scaled_for_ga = False and accumulated='mean'.",
            stacklevel=3,
        )
    if any(group.get("weight_decay", 0.0) for group in groups) and timed:
        warnings.warn("Weight decay pulls the weights to zero, which the kernel's path does not know: set it to 0.", stacklevel=3)
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        warnings.warn(
            "Dropout is active and the theory is about descent without it: set the dropout rates of the model's config "
            "(hidden_dropout_prob, attention_probs_dropout_prob, ...) and of PEFT (lora_dropout) to 0.",
            stacklevel=3,
        )
    return timed, summed


def sums_batches(model: nn.Module) -> bool:
    """Whether transformers leaves the accumulated gradient a sum: it trusts such a model to divide, and MSELoss does not."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    inner = unwrap()
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is None:
        accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(inner.forward).parameters.values())
    return bool(accepts) and getattr(getattr(inner, "config", None), "num_labels", None) == 1
