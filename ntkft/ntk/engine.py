"""`empirical_ntk`: capture, contract, check, sum.

Parameters are visited in groups whose factors fit into the memory budget; each group costs one forward
and one backward pass over the texts. Every parameter's contribution is checked against plain autograd on
two texts before it is added, so a layer that the factors do not describe is an error, never a wrong kernel.
"""

from __future__ import annotations

import fnmatch
import platform
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from ntkft.errors import InputError
from ntkft.files import sha256_text
from ntkft.ntk.capture import Factor, MixedBatch, Wanted, capture, wanted
from ntkft.ntk.contract import contract
from ntkft.ntk.kernel import Kernel
from ntkft.provenance import code_hash
from ntkft.readout import Readout, length_sorted_batches

BATCH = 16  # texts per pass; more does not help on a few cores
TOLERANCE = 1e-3  # of the autograd check: far above rounding, far below a missing term


def empirical_ntk(
    readout: Readout,
    texts: Sequence[str],
    other: Sequence[str] | None = None,
    *,
    parameters: str | Sequence[str] | None = None,
    precision: str = "exact",
    memory: str | int = "2GB",
    progress: bool = True,
) -> Kernel:
    r"""Compute the exact NTK :math:`k(x_i, x_j) = \langle\nabla f(x_i), \nabla f(x_j)\rangle` of a read-out.

    Parameters
    ----------
    readout : Readout
        From `prompt_readout` or `pooled_readout`.
    texts : list of str, n of them
        The rows of the kernel, and its columns unless `other` is given.
    other : list of str, m of them, optional
        The columns.
    parameters : str or list of str, optional
        Names or shell patterns (``"*.attention.*"``) of the parameters that count; all trainable ones by default.
    precision : "exact"
        Products in the model's own precision, sums over blocks in float64.
    memory : str or int
        Working memory beside the model, as ``"2GB"`` or bytes: half for captured factors, a quarter for products. Less
        memory means more passes over the texts. A target, not yet a hard limit: the check against autograd also
        holds one gradient of all parameters for a moment.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Kernel
        ``matrix`` (n, m) float64, unnormalised.

    Raises
    ------
    InputError
        If a text is empty, a pattern matches nothing, or a parameter's gradient cannot be split by text.

    Notes
    -----
    Source: equation (k_θ) of the notation page; factors as in Goodfellow 2015. Cost: about
    (number of passes) forward+backward passes plus n²P multiply-adds, less where the ghost way is cheaper.

    Example
    -------
    >>> kernel = empirical_ntk(readout, task.texts)                          # doctest: +SKIP
    >>> kernel.spectrum().critical_radius(sigma=0.75)                        # doctest: +SKIP
    """
    if precision != "exact":
        raise InputError(f"precision is {precision!r} and this version knows 'exact' only: drop the option.")
    started, code = time.perf_counter(), code_hash("ntkft.ntk.engine")
    budget = parse_memory(memory)
    every = readout.parameters()
    names = _select(list(every), parameters)
    rows = readout.encode(texts)
    columns = None if other is None else readout.encode(other)

    check = _autograd_norms(readout, names, rows)
    batch, groups = _plan(readout, names, rows + (columns or []), budget // 2)
    n, m = len(rows), len(columns or rows)
    matrix = np.zeros((n, m))
    trace: dict[str, float] = {}
    steps = len(groups) * (-(-n // batch) + (0 if columns is None else -(-m // batch))) + len(names)
    with tqdm(total=steps, disable=not progress, desc="empirical NTK", unit="step") as bar:
        for group in groups:
            want = wanted(readout, group)
            scores, left, order = _capture_all(readout, rows, want, batch, bar)
            if columns is None:
                other_scores, right, other_order = None, left, order
            else:
                other_scores, right, other_order = _capture_all(readout, columns, want, batch, bar)
            for name in group:
                part = np.empty((n, m))
                block = (
                    contract(left[name], right[name], budget // 4).numpy() if left[name] else np.zeros((n, m))
                )
                part[np.ix_(order, other_order)] = block
                _check(name, part if columns is None else None, left[name], order, check)
                if columns is None:
                    trace[name] = float(np.trace(part))
                matrix += part
                left[name] = []  # its factors are done
                right[name] = []
                bar.update()
    if columns is None:
        matrix = (matrix + matrix.T) / 2
    info = {
        "model": readout.loaded.info,
        "readout": readout.info,
        "parameters": {
            "count": sum(every[k].numel() for k in names),
            "tensors": len(names),
            "sha256": sha256_text("\n".join(names)),
        },
        "trace": trace,
        "precision": precision,
        "dtype": str(every[names[0]].dtype),
        "passes": len(groups),
        "batch": batch,
        "seconds": round(time.perf_counter() - started, 1),
        "code_sha256": code,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    return Kernel(
        matrix,
        scores,
        other_scores,
        info,
        tuple(map(sha256_text, texts)),
        tuple(map(sha256_text, other or ())),
    )


def parse_memory(memory: str | int) -> int:
    """Return bytes for ``"2GB"``, ``"500 MB"`` or a plain number of bytes.

    >>> parse_memory("2GB")
    2000000000
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(memory))
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise InputError(f"memory is {memory!r}, which is no size: write it as '2GB' or '500MB'.")
    return int(float(match[1]) * units[match[2].upper()])


def _select(names: list[str], patterns: str | Sequence[str] | None) -> list[str]:
    if not names:
        raise InputError("The read-out has no trainable parameter: set requires_grad on those that count.")
    if patterns is None:
        return names
    wants = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wants:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"parameters={pattern!r} matches none of the {len(names)} trainable parameters "
                f"({names[0]}, ..., {names[-1]}): list(readout.parameters()) shows them all."
            )
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in wants)]


def _autograd_norms(
    readout: Readout, names: list[str], token_ids: list[list[int]]
) -> dict[int, dict[str, float]]:
    """Return ‖∂f(x_i)/∂p‖² of the shortest and the longest text by plain autograd: what the factors must give."""
    by_length = np.argsort([len(row) for row in token_ids], kind="stable")
    every = readout.parameters()
    tensors = [every[name] for name in names]
    result = {}
    for i in {int(by_length[0]), int(by_length[-1])}:
        gradients = _autograd(readout, token_ids[i], tensors)
        result[i] = {k: float(g.double().square().sum()) for k, g in zip(names, gradients, strict=True)}
    return result


def _autograd(readout: Readout, ids: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """Return one text's gradient with respect to each tensor by plain autograd; zeros where it has no part."""
    with torch.enable_grad():
        value = readout.module(**readout.collate([ids])).sum()
        found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, tensors, strict=True)]


def _check(
    name: str,
    part: np.ndarray | None,
    column: list[list[Factor]],
    order: np.ndarray,
    check: dict[int, dict[str, float]],
) -> None:
    """Compare one parameter's diagonal with autograd on the two texts; raise if they differ."""
    if part is not None:
        diagonal = {i: part[i, i] for i in check}
    else:  # a rectangular kernel has no diagonal: contract the two texts with themselves
        place = {int(i): k for k, i in enumerate(order)}
        diagonal = {i: _self_product(column, place[i]) for i in check}
    for i, norms in check.items():
        expected, total = norms[name], sum(norms.values())
        if abs(diagonal[i] - expected) > TOLERANCE * expected + 1e-9 * total:
            raise InputError(
                f"The kernel of parameter {name} is {diagonal[i]:.6g} on text {i} and autograd says {expected:.6g}: "
                "the model uses it in a way that ntkft does not cover; freeze it or leave it out with parameters=."
            )


def _self_product(column: list[list[Factor]], position: int) -> float:
    single = []
    for call in column:
        k = position
        for factor in call:
            if k < factor.right.shape[0]:
                single.append([Factor(factor.left[k : k + 1], factor.right[k : k + 1])])
                break
            k -= factor.right.shape[0]
    return float(contract(single, single, 2**26)) if single else 0.0


def _plan(
    readout: Readout, names: list[str], token_ids: list[list[int]], budget: int
) -> tuple[int, list[list[str]]]:
    """Choose the texts per batch, and split the parameters into groups whose factors fit into `budget` bytes.

    The longest text, twice, shows how large the factors are and whether the model keeps the texts of a batch apart.
    """
    longest, want = max(token_ids, key=len), wanted(readout, names)
    try:
        batch, probe = BATCH, capture(readout, [longest, longest], want)[1]
    except MixedBatch:
        batch, probe = 1, capture(readout, [longest], want)[1]
    batches = length_sorted_batches(token_ids, batch)
    padded = sum(len(b) * max(len(token_ids[i]) for i in b) for b in batches)
    groups: list[list[str]] = [[]]
    filled = 0
    for name in names:  # in the model's order
        size = 0
        for factor in probe[name]:
            texts, tokens = factor.right.shape[:2]
            rows = len(token_ids) if tokens == 1 else padded
            size += int(factor.bytes() * rows / (texts * tokens))
        if groups[-1] and filled + size > budget:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return batch, groups


def _capture_all(
    readout: Readout, token_ids: list[list[int]], want: Wanted, batch_size: int, bar: Any
) -> tuple[np.ndarray, dict[str, list[list[Factor]]], np.ndarray]:
    """Capture all texts; return scores (n,), the factors by parameter and call, and the order they are in."""
    scores = np.empty(len(token_ids))
    columns: dict[str, list[list[Factor]]] = {}
    batches = length_sorted_batches(token_ids, batch_size)
    for k, batch in enumerate(batches):
        values, factors = capture(readout, [token_ids[i] for i in batch], want)
        scores[batch] = values.double().cpu().numpy()
        for name, calls in factors.items():
            column = columns.setdefault(name, [[] for _ in calls])
            if len(column) != len(calls):
                raise InputError(
                    f"{name} is used {len(column)} times in one batch and {len(calls)} in batch {k}: "
                    "leave it out with parameters=."
                )
            for call, factor in zip(column, calls, strict=True):
                call.append(factor)
        bar.update()
    return scores, columns, np.concatenate(batches)


def loop_ntk(readout: Readout, texts: Sequence[str], other: Sequence[str] | None = None) -> np.ndarray:
    """Compute the same matrix by one ``autograd.grad`` per text: slow, short, and the oracle of every test."""
    tensors = list(readout.parameters().values())

    def gradients(batch: Sequence[str]) -> Tensor:
        rows = (_autograd(readout, ids, tensors) for ids in readout.encode(batch))
        return torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows])

    left = gradients(texts)
    right = left if other is None else gradients(other)
    return (left @ right.T).cpu().numpy()
