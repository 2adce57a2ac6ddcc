r"""`empirical_ntk`: probe, plan, capture, check, contract, sum.

Each batch of texts goes forward and backward once. Its factors are kept, in memory or on disk, and then multiplied site by
site. Every parameter's part of the diagonal is compared with plain autograd on the shortest and the longest text before
anything is multiplied, so a layer that the factors do not describe is an error, never a wrong kernel.

Example
-------
>>> kernel = empirical_ntk(readout, task.texts, blocks="kind")               # doctest: +SKIP
>>> {k: part.trace() for k, part in kernel.parts.items()}                    # doctest: +SKIP
"""

from __future__ import annotations

import fnmatch
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from ntkft.errors import InputError
from ntkft.files import sha256_text
from ntkft.ntk.capture import Captured, Wanted, capture, wanted
from ntkft.ntk.contract import contract
from ntkft.ntk.factors import Chunk, merge
from ntkft.ntk.kernel import Kernel
from ntkft.ntk.layout import Site, assemble, blocks_by
from ntkft.ntk.measure import estimate
from ntkft.ntk.oracle import check_all, truth_of_extremes
from ntkft.ntk.plan import Plan, Workload, describe, divide, parse_memory
from ntkft.ntk.precision import EXACT, SAMPLE, TOLERANCE, Precision, choose, compare, refuse
from ntkft.ntk.release import release_memory
from ntkft.ntk.store import Store, pack, unpack
from ntkft.provenance import code_hash
from ntkft.readout import Readout

Blocks = str | Mapping[str, str | Sequence[str]] | Callable[[str], str]


@overload
def empirical_ntk(
    readout: Readout,
    texts: Sequence[str],
    other: Sequence[str] | None = ...,
    *,
    parameters: str | Sequence[str] | None = ...,
    blocks: Blocks | None = ...,
    outputs: Literal["full", "trace"] = ...,
    precision: Literal["exact", "fast"] = ...,
    memory: str | int = ...,
    checkpoint: str | Path | None = ...,
    plan_only: Literal[False] = ...,
    progress: bool = ...,
) -> Kernel: ...
@overload
def empirical_ntk(
    readout: Readout,
    texts: Sequence[str],
    other: Sequence[str] | None = ...,
    *,
    parameters: str | Sequence[str] | None = ...,
    blocks: Blocks | None = ...,
    outputs: Literal["full", "trace"] = ...,
    precision: Literal["exact", "fast"] = ...,
    memory: str | int = ...,
    checkpoint: str | Path | None = ...,
    plan_only: Literal[True],
    progress: bool = ...,
) -> Plan: ...
def empirical_ntk(
    readout: Readout,
    texts: Sequence[str],
    other: Sequence[str] | None = None,
    *,
    parameters: str | Sequence[str] | None = None,
    blocks: Blocks | None = None,
    outputs: Literal["full", "trace"] = "full",
    precision: Literal["exact", "fast"] = "exact",
    memory: str | int = "2GB",
    checkpoint: str | Path | None = None,
    plan_only: bool = False,
    progress: bool = True,
) -> Kernel | Plan:
    r"""Compute the exact NTK :math:`k(x_i, x_j) = \langle\nabla f(x_i), \nabla f(x_j)\rangle` of a read-out.

    Parameters
    ----------
    readout : Readout
        From `prompt_readout`, `pooled_readout` or `words_readout`, or made by hand.
    texts : list of str, n of them
        The rows of the kernel, and its columns unless `other` is given.
    other : list of str, m of them, optional
        The columns.
    parameters : str or list of str, optional
        Names or shell patterns (``"*.attention.*"``) of the parameters that count; all trainable ones by default.
    blocks : "layer", "kind", dict of patterns, or function of a name, optional
        Also keep the kernel of each block of parameters, in the same pass: ``kernel.parts[label]``, which add up to the
        whole. "kind" cuts into attention.q/k/v/o, mlp, norm, embedding and head.
    outputs : "full" or "trace"
        For a read-out with c outputs: the (nc, nc) kernel, entry (i c + k, j c + l) between output k of text i and l of j; or
        its trace over outputs, (n, n).
    precision : "exact" or "fast"
        Products in the model's own precision; or in the machine's bf16 units, where that is faster, with the error
        measured on a random sample and refused where an eigenvalue down to rank n/2 may be off by more than one in a hundred.
        Sums over blocks are float64 in both.
    memory : str or int
        Working memory beside the model, as ``"2GB"`` or bytes. Factors that do not fit go to a temporary folder.
    checkpoint : path, optional
        A folder in which to keep what is done, so that the same call goes on after a crash; removed at the end.
    plan_only : bool
        Return a `Plan` of time, memory and the way of each layer instead, from a few seconds of measurement.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Kernel
        ``matrix`` (n, m) float64, unnormalised.

    Raises
    ------
    InputError
        If a text is empty, a pattern matches nothing, a parameter's gradient cannot be split by text, the memory is too
        small, the checkpoint is of another kernel, or "fast" is not exact enough.

    Notes
    -----
    Source: equation (k_θ) of the notation page; factors as in Goodfellow 2015. Cost: one forward and backward pass over the
    texts, and at most n²P/2 multiply-adds for P parameters, fewer where texts are short.

    Example
    -------
    >>> kernel = empirical_ntk(readout, task.texts)                          # doctest: +SKIP
    >>> kernel.spectrum().critical_radius(sigma=0.75)                        # doctest: +SKIP
    """
    started, code = time.perf_counter(), code_hash("ntkft.ntk.engine")
    if outputs not in ("full", "trace"):
        raise InputError(f"outputs is {outputs!r} and must be 'full' or 'trace'.")
    budget = parse_memory(memory)
    every = readout.parameters()
    names = select(list(every), parameters)
    label = blocks_by(names, blocks)
    like = every[names[0]]
    how = choose(precision, like.dtype, like.device)
    rows = readout.encode(texts)
    columns = None if other is None else readout.encode(other)

    want = wanted(readout, names)
    work = divide(
        readout, want, rows, columns, label, budget, keep=checkpoint is not None, trace=outputs == "trace"
    )
    if how.mode != "exact" and not work.worth(how):
        how = EXACT
    if plan_only:
        return estimate(describe(readout, work, budget, how), readout, work, want, rows, how)

    folder = None if checkpoint is None else Path(checkpoint)
    job = {} if folder is None else _job(readout, rows, columns, names, label, work, how)
    with Store(folder, room=work.held, job=job) as store, tqdm(
        total=len(work.rows) + len(work.columns or ()) + sum(1 for _ in work.steps()),
        disable=not progress,
        desc="empirical NTK",
        unit="step",
    ) as bar:
        truth = truth_of_extremes(readout, rows, names)  # before any factors are held: whole gradients need room
        scores, squares = _capture_side("row", work, work.rows, rows, readout, want, store, bar)
        check_all(squares, truth)
        other_scores = None
        if columns is not None and work.columns is not None:
            other_scores, _ = _capture_side("column", work, work.columns, columns, readout, want, store, bar)
        labels = list(dict.fromkeys(map(label, names)))
        sums = _contract_all(work, labels, store, like.device, how, bar)
        parts = _finish(work, sums, squares, label)
        matrix = sum(parts.values(), np.zeros_like(next(iter(parts.values()))))
        sampled = None
        if how.mode != "exact":
            sampled = _sample(readout, texts, other, names, outputs, budget, matrix)
        spilled = store.spilled
        store.close()

    info = {
        "model": readout.loaded.info,
        "readout": readout.info,
        "parameters": {
            "count": sum(every[k].numel() for k in names),
            "tensors": len(names),
            "sha256": sha256_text("\n".join(names)),
        },
        "trace": {k: float(v.sum()) for k, v in squares.items()} if columns is None else {},
        "outputs": work.outputs,
        "precision": precision,
        "products": how.mode,
        "dtype": str(like.dtype),
        "device": like.device.type,
        "batches": len(work.rows) + len(work.columns or ()),
        "apart": work.apart,
        "spilled_bytes": spilled,
        "seconds": round(time.perf_counter() - started, 1),
        "code_sha256": code,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if sampled is not None:
        info["fast"] = sampled
    c = 1 if work.trace else work.outputs
    return Kernel(
        matrix,
        _flat(scores, work),
        None if other_scores is None else _flat(other_scores, work),
        info,
        tuple(sha for sha in map(sha256_text, texts) for _ in range(c)),
        tuple(sha for sha in map(sha256_text, other or ()) for _ in range(c)),
        parts if blocks is not None else {},
    )


def ntk_diagonal(
    readout: Readout,
    texts: Sequence[str],
    *,
    parameters: str | Sequence[str] | None = None,
    blocks: Blocks | None = None,
    memory: str | int = "2GB",
    progress: bool = True,
) -> dict[str, np.ndarray]:
    r"""Compute :math:`k(x_i, x_i) = \|\nabla f(x_i)\|^2` alone, block by block: one pass, no products of texts.

    Returns
    -------
    dict of str to (n,) float64
        One entry for each block, "all" if `blocks` is None; summed over the outputs if there are several.

    Raises
    ------
    InputError
        As `empirical_ntk`, whose options these are.

    Example
    -------
    >>> ntk_diagonal(readout, task.texts, blocks="kind")["mlp"].mean()       # doctest: +SKIP
    """
    names = select(list(readout.parameters()), parameters)
    label, rows = blocks_by(names, blocks), readout.encode(texts)
    want = wanted(readout, names)
    work = divide(readout, want, rows, None, label, parse_memory(memory), trace=True)
    with tqdm(total=len(work.rows), disable=not progress, desc="NTK diagonal", unit="batch") as bar:
        _, squares = _capture_side("row", work, work.rows, rows, readout, want, None, bar)
    check_all(squares, truth_of_extremes(readout, rows, names))
    found: dict[str, np.ndarray] = {}
    for name, values in squares.items():
        found[label(name)] = found.get(label(name), 0.0) + values.sum(1)
    return found


def select(names: list[str], patterns: str | Sequence[str] | None) -> list[str]:
    """Return the names that match one of the shell patterns; all if there is none.

    >>> select(["a.weight", "a.bias", "b.weight"], "a.*")
    ['a.weight', 'a.bias']
    """
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


def _flat(scores: np.ndarray, work: Workload) -> np.ndarray:
    """Return scores (n, c) as they belong to the kernel's rows: (n,), (nc,), or (n, c) beside a trace."""
    if work.outputs == 1:
        return scores[:, 0]
    return scores if work.trace else scores.reshape(-1)


def _capture_side(
    side: str,
    work: Workload,
    batches: list[np.ndarray],
    token_ids: list[list[int]],
    readout: Readout,
    want: Wanted,
    store: Store | None,
    bar: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Capture every batch that the store does not hold; return scores (n, c) and each parameter's ‖∂f_k(x_i)/∂p‖² (n, c)."""
    n, c = len(token_ids), work.outputs
    scores, squares = np.empty((n, c)), {name: np.zeros((n, c)) for name in want.names}
    for k, batch in enumerate(batches):
        key = f"{side}{k}"
        if store is None or not store.has(key):
            found, tensors = _capture_batch(work, readout, [token_ids[i] for i in batch], want, keep=store is not None)
            if store is not None:
                store.put(key, tensors | {f"squares.{name}": t for name, t in found.items()})
            del tensors
            if work.disk_bytes or k == len(batches) - 1:  # where memory is short; asking for it anew takes time
                release_memory()
        else:
            found = store.get(key, "squares.")
        scores[batch] = found.pop("")
        for name, values in found.items():
            squares[name][batch] = values
        bar.update()
    return scores, squares


def _capture_batch(
    work: Workload, readout: Readout, token_ids: list[list[int]], want: Wanted, *, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ({name: squares (b, c)} with the scores under "", {stored name: tensor}) of one batch."""
    groups = [token_ids] if work.apart else [[row] for row in token_ids]
    captured = [_assemble_all(work.sites, capture(readout, group, want)) for group in groups]
    squares = {name: torch.cat([s[name] for s, _ in captured]) for name in captured[0][0]}
    tensors: dict[str, Tensor] = {}
    for k in range(work.outputs) if keep else ():
        for s in range(len(work.sites)):
            chunks = [found[k][s] for _, found in captured]
            tensors |= pack(chunks[0] if len(chunks) == 1 else merge(chunks), f"{k}.{s}.")
    return squares, tensors


def _assemble_all(sites: Sequence[Site], found: Captured) -> tuple[dict[str, Tensor], list[list[Chunk]]]:
    squares: dict[str, list[Tensor]] = {}
    chunks: list[list[Chunk]] = []
    for uses in found.uses:
        chunks.append([])
        for site in sites:
            chunk, each = assemble(site, uses)
            chunks[-1].append(chunk)
            for name, values in each.items():
                squares.setdefault(name, []).append(values)
    return {k: torch.stack(v, 1).cpu() for k, v in squares.items()} | {"": found.scores.double().cpu()}, chunks


def _contract_all(
    work: Workload, labels: Sequence[str], store: Store, device: torch.device, how: Precision, bar: Any
) -> dict[str, Tensor]:
    """Add up all products; return the sums by block, (c, n, c, m) float64 in the order of the batches."""
    c = 1 if work.trace else work.outputs
    row_starts = np.concatenate([[0], np.cumsum([b for b, _ in work.row_shapes])])
    column_shapes = work.column_shapes or work.row_shapes
    column_starts = np.concatenate([[0], np.cumsum([b for b, _ in column_shapes])])
    right_side = "row" if work.columns is None else "column"
    sums, finished = store.load_sums()
    if not sums:
        shape = (c, int(row_starts[-1]), c, int(column_starts[-1]))
        sums = {k: torch.zeros(shape, dtype=torch.float64) for k in labels}
    sums = {k: t.to(device) for k, t in sums.items()}

    def load(side: str, site: int, k: int, batches: range) -> list[Chunk]:
        return [unpack(store.get(f"{side}{i}", f"{k}.{site}."), device) for i in batches]

    held: tuple[Any, list[Chunk]] = (None, [])
    buffers: dict[str, Tensor] = {}
    for number, (step, last) in enumerate(_with_last(work)):
        if number >= finished:
            if held[0] != (step.site, step.k, step.rows):
                held = (None, [])  # freed before the next is loaded
                held = ((step.site, step.k, step.rows), load("row", step.site, step.k, step.rows))
            columns = None if step.columns is None else load(right_side, step.site, step.l, step.columns)
            k, l = (0, 0) if work.trace else (step.k, step.l)  # noqa: E741
            other = step.rows if step.columns is None else step.columns
            out = sums[work.sites[step.site].label][
                k, row_starts[step.rows.start] : row_starts[step.rows.stop], l,
                column_starts[other.start] : column_starts[other.stop],
            ]  # fmt: skip
            contract(held[1], columns, out, work.scratch, how, buffers)
            del columns
            store.save_sums(sums, number + 1)
        if last:
            held = (None, [])
            for side, batches in (("row", work.rows), ("column", work.columns or [])):
                for i in range(len(batches)):
                    for k in range(work.outputs):
                        store.drop(f"{side}{i}", f"{k}.{step.site}.")
        bar.update()
    return {k: t.cpu() for k, t in sums.items()}


def _with_last(work: Workload) -> Iterator[tuple[Any, bool]]:
    """Yield each step, and whether it is the last of its site."""
    steps = list(work.steps())
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        yield step, after is None or after.site != step.site


def _finish(
    work: Workload, sums: Mapping[str, Tensor], squares: Mapping[str, np.ndarray], label: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Mirror what was computed on one side of the diagonal, and put the texts back into their order."""
    order = np.concatenate(work.rows)
    other = order if work.columns is None else np.concatenate(work.columns)
    parts = {}
    for name, total in sums.items():
        block = total.numpy()  # (c, n, c, m)
        c, n, _, m = block.shape
        result = np.empty((n, c, m, c))
        for k in range(c):
            for l in range(c):  # noqa: E741
                if work.columns is None and l > k:
                    continue
                piece = block[k, :, l]
                if work.columns is None and k == l:  # the diagonal is known better, from each text alone
                    mine = [v for p, v in squares.items() if label(p) == name]
                    every = np.sum(mine, axis=0)  # (n, c)
                    piece = np.tril(piece, -1)
                    piece = piece + piece.T
                    np.fill_diagonal(piece, (every.sum(1) if work.trace else every[:, k])[order])
                result[order[:, None], k, other, l] = piece
                if work.columns is None and l < k:
                    result[order[:, None], l, other, k] = piece.T
        parts[name] = result.reshape(n * c, m * c)
    return parts


def _sample(
    readout: Readout,
    texts: Sequence[str],
    other: Sequence[str] | None,
    names: list[str],
    outputs: Literal["full", "trace"],
    budget: int,
    matrix: np.ndarray,
) -> dict[str, Any]:
    """Compute a random sample of the kernel exactly and say how far it is off; refuse a kernel that errs too much."""
    n = len(texts)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE])
    exact = empirical_ntk(
        readout,
        [texts[i] for i in chosen],
        None if other is None else list(other)[:SAMPLE],
        parameters=names,
        outputs=outputs,
        memory=budget,
        progress=False,
    ).matrix
    c = len(matrix) // n
    rows = (chosen[:, None] * c + np.arange(c)).reshape(-1)
    columns = rows if other is None else np.arange(exact.shape[1])
    sampled = compare(matrix[np.ix_(rows, columns)], exact, matrix.shape, square=other is None)
    # Of the eigenvalues down to rank n/2; a rectangular kernel has none.
    error = sampled.eigenvalue_error(np.linalg.eigvalsh(matrix / len(matrix))[::-1]) if other is None else None
    if error is not None and error > TOLERANCE:
        raise refuse(error, f"estimated from {len(chosen)} of {n} texts")
    return asdict(sampled) | {"eigenvalue_error": error}


def _job(
    readout: Readout,
    rows: list[list[int]],
    columns: list[list[int]] | None,
    names: list[str],
    label: Callable[[str], str],
    work: Workload,
    how: Precision,
) -> dict[str, Any]:
    """Describe what is computed, so that a checkpoint is never continued with something else."""
    weights = hashlib.sha256()
    with torch.no_grad():
        for name, p in readout.module.named_parameters():  # two sums tell weights apart, and are quick
            values = p.double() if p.numel() < 2**20 else p
            weights.update(f"{name} {float(values.sum(dtype=torch.float64))!r} {float(values.norm())!r}".encode())
    return {
        "texts": sha256_text(repr((rows, columns))),
        "weights": weights.hexdigest(),
        "readout": sha256_text(repr(sorted(readout.info.items()))),
        "parameters": sha256_text(repr([(name, label(name)) for name in names])),
        "outputs": [work.outputs, work.trace],
        "batches": sha256_text(repr([[b.tolist() for b in side] for side in (work.rows, work.columns or [])])),
        "memory": [work.scratch, work.limit],
        "precision": [how.mode, how.gain],
        "versions": [torch.__version__, transformers.__version__, str(torch.get_num_threads())],
    }
