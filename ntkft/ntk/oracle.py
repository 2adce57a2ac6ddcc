"""Plain autograd: the slow loop that every test trusts, and the two texts on which every computation is checked.

Example
-------
>>> loop_ntk(readout, ["Good.", "Bad."]).shape                       # doctest: +SKIP
(2, 2)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ntkft.errors import InputError
from ntkft.ntk.capture import only_trainable
from ntkft.readout import Readout

TOLERANCE = 1e-3  # of the check: far above rounding, far below a missing term


def loop_ntk(readout: Readout, texts: Sequence[str], other: Sequence[str] | None = None) -> np.ndarray:
    """Compute the kernel by one ``autograd.grad`` per text and output: slow, short, and the oracle of every test."""
    tensors = list(readout.parameters().values())

    def gradients(batch: Sequence[str]) -> Tensor:
        rows = []
        for ids in readout.encode(batch):
            with torch.enable_grad():
                values = readout.module(**readout.collate([ids])).flatten()  # (c,)
                for k in range(len(values)):
                    found = torch.autograd.grad(values[k], tensors, retain_graph=k + 1 < len(values), allow_unused=True)
                    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, tensors, strict=True)]
                    rows.append(torch.cat([g.flatten() for g in parts]).double())
        return torch.stack(rows)

    left = gradients(texts)
    right = left if other is None else gradients(other)
    return (left @ right.T).cpu().numpy()


def autograd_squares(readout: Readout, ids: list[int], names: Sequence[str]) -> list[dict[str, float]]:
    """Return ‖∂f_k(x)/∂p‖² of one text, for each output k and parameter p.

    Each gradient is reduced to its norm as soon as it is there, so never more than one or two of them are held.
    """
    every = readout.parameters()
    found: dict[str, float] = {}
    before = {name: every[name].grad for name in names}

    def reduce(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            found[name] = float(torch.linalg.vector_norm(p.grad, dtype=torch.float64) ** 2)
            p.grad = None

        return hook

    result = []
    handles = []
    try:
        with only_trainable(readout.module, names), torch.enable_grad():
            for name in names:
                every[name].grad = None
                handles.append(every[name].register_post_accumulate_grad_hook(reduce(name)))
            values = readout.module(**readout.collate([ids])).flatten()  # (c,)
            for k in range(len(values)):
                found.clear()
                if values.requires_grad:
                    values[k].backward(retain_graph=k + 1 < len(values))
                result.append({name: found.get(name, 0.0) for name in names})
    finally:
        for handle in handles:
            handle.remove()
        for name, grad in before.items():
            every[name].grad = grad
    return result


Truth = dict[int, list[dict[str, float]]]  # place of a text -> its `autograd_squares`


def truth_of_extremes(readout: Readout, token_ids: list[list[int]], names: Sequence[str]) -> Truth:
    """Return `autograd_squares` of the shortest and the longest text; of one if all are equally long."""
    lengths = [len(row) for row in token_ids]
    places = sorted({int(np.argmin(lengths)), int(np.argmax(lengths))})
    return {i: autograd_squares(readout, token_ids[i], names) for i in places}


def check_all(squares: Mapping[str, np.ndarray], truth: Truth) -> None:
    """Compare the factors' squares (n, c) of each parameter with the truth that is known of some texts."""
    for i, expected in truth.items():
        check(i, {name: values[i] for name, values in squares.items()}, expected)


def check(text: int, squares: Mapping[str, Sequence[float]], expected: Sequence[Mapping[str, float]]) -> None:
    """Compare each parameter's ‖∂f_k(x)/∂p‖² from the factors with autograd's; raise on the first that differs."""
    for k, norms in enumerate(expected):
        total = sum(norms.values())
        for name, truth in norms.items():
            ours = float(squares[name][k]) if name in squares else 0.0
            if abs(ours - truth) > TOLERANCE * truth + 1e-9 * total:
                raise InputError(
                    f"The kernel of parameter {name} is {ours:.6g} on text {text} and autograd says {truth:.6g}: "
                    "the model uses it in a way that ntkft does not cover; freeze it or leave it out with parameters=."
                )
