r"""How exact the products are: float32 (or whatever the model is in), or the machine's bf16 units.

A bf16 number keeps 8 bits, so rounding one gradient entry errs by up to 0.4 %. An inner product adds up thousands of such
errors of either sign, and most of them cancel. Two things make what is left small. The diagonal does not go through bf16 at
all. And all gradients have a large common part :math:`v`, which is taken off before rounding:

.. math:: \langle g_i, g_j\rangle = \langle g_i - v, g_j - v\rangle + c_i + c_j, \qquad
          c_i = \langle g_i, v\rangle - \tfrac12 \|v\|^2,

for any vector :math:`v`, with the :math:`c_i` in float32: they cost n products instead of n². The hardware sums in float32 and
rounds each block of a product once, and blocks are added in float64. What error remains is measured, not
hoped for: the kernel of a random sample of the texts is computed exactly too (`Sampled`).

Why not split each gradient into two bf16 numbers, hi + lo? Three products of two would be nearly exact. But then bf16
must be more than three times faster than float32 to gain anything, and on the machine of the book's benchmark it is twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkft.errors import InputError

TOLERANCE = 0.01  # of the eigenvalues down to rank n/2: it moves no stopping time of the book by more than one in a hundred
SAMPLE = 48  # texts whose kernel is computed exactly beside a fast one
SLICE = 4096  # entries that a bf16 product sums before its result is rounded; they also stay in the cache


@dataclass(frozen=True)
class Slice:
    """Some entries of the gradients of both sides, ready to be multiplied.

    left, right : (n, K), (m, K). left_shift, right_shift : the c of both sides, (n,) and (m,) float64, or None.
    """

    left: Tensor
    right: Tensor
    left_shift: Tensor | None = None
    right_shift: Tensor | None = None

    def product(self, rows: slice, columns: slice) -> Tensor:
        """Return ⟨g_i, g_j⟩ over these entries, without the shifts c_i + c_j."""
        a, b = self.left[rows], self.right[columns].T
        if a.is_cuda and a.dtype == torch.bfloat16:
            return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]
        thin = a.dtype != torch.bfloat16 and min(a.shape[0], b.shape[1]) < 512 and not a.is_cuda
        return _thin(a, b) if thin else a @ b


@dataclass(frozen=True)
class Precision:
    """How explicit products are made. `gain` is their speed against float32 ones.

    mode : "exact" (the model's own precision), "medium" (float32 in and out, bf16 inside) or "bf16" (bf16 in).
    """

    mode: str = "exact"
    gain: float = 1.0

    def slices(self, left: Tensor, right: Tensor | None, buffers: dict[str, Tensor]) -> Iterator[Slice]:
        """Cut formed gradients (n, K) and (m, K), or `left` twice, into what is multiplied at a time.

        `buffers` keeps memory from one call to the next; a slice is good until the next one is asked for.
        """
        if self.mode == "exact":
            yield Slice(left, left if right is None else right)
            return
        was = torch.get_float32_matmul_precision()
        for k in range(0, left.shape[1], SLICE):
            g = left[:, k : k + SLICE]
            v = g[:: max(1, len(g) // 128)].mean(0)  # (K,): the mean of some will do
            a, c = self._shifted(g, v, buffers, "left")
            b, d = (a, c) if right is None else self._shifted(right[:, k : k + SLICE], v, buffers, "right")
            try:
                if self.mode == "medium":
                    torch.set_float32_matmul_precision("medium")
                yield Slice(a, b, c, d)
            finally:
                torch.set_float32_matmul_precision(was)

    def _shifted(self, g: Tensor, v: Tensor, buffers: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
        shifted = torch.sub(g, v, out=reuse(buffers, side, g.shape, g.dtype, g.device))
        c = (shifted @ v).double() + 0.5 * (v @ v).double()  # ⟨g, v⟩ - ‖v‖²/2, while `shifted` is in the cache
        if self.mode == "bf16":
            shifted = reuse(buffers, side + "16", g.shape, torch.bfloat16, g.device).copy_(shifted)
        return shifted, c


def reuse(buffers: dict[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of a shape, the same as last time if it is large enough: fresh memory costs time."""
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size or buffers[name].dtype != dtype:
        buffers.pop(name, None)
        buffers[name] = torch.empty(size, dtype=dtype, device=device)
    return buffers[name][:size].view(*shape)


def _thin(a: Tensor, b: Tensor, parts: int = 4) -> Tensor:
    """Return a @ b, a few rows times a few columns: cut along the long side, so that every core has a part of its own."""
    length = a.shape[1]
    cut = length // parts * parts
    if cut == 0:
        return a @ b
    left = a[:, :cut].unflatten(1, (parts, -1)).transpose(0, 1)  # (parts, n, length / parts)
    right = b[:cut].unflatten(0, (parts, -1))  # (parts, length / parts, m)
    total = torch.bmm(left, right).sum(0)
    return total if cut == length else total.addmm_(a[:, cut:], b[cut:])


EXACT = Precision()


def candidates(device: torch.device, seconds: float = 0.05) -> dict[str, float]:
    """Measure the rate of float32, "medium" and "bf16" products on a device, in multiply-adds a second."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, SLICE, generator=generator).to(device)
    buffers: dict[str, Tensor] = {}

    def run(mode: str) -> None:
        for piece in Precision(mode).slices(a, None, buffers):
            piece.product(slice(None), slice(None))

    work = a.shape[0] ** 2 * a.shape[1]
    return {mode: work / best_time(partial(run, mode), device, seconds) for mode in ("exact", "medium", "bf16")}


def best_time(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the shortest of the runs that fit into `seconds`; the first one, which warms up, is not counted."""
    times: list[float] = []
    end = float("inf")
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        end = min(end, started + times[-1] + seconds)
    return min(times[1:])


def choose(precision: str, dtype: torch.dtype, device: torch.device) -> Precision:
    """Return how products are made: as asked for, with the fastest unit that the machine has.

    Raises
    ------
    InputError
        For an unknown word, or for "fast" with a model in float64.
    """
    if precision == "exact":
        return EXACT
    if precision != "fast":
        raise InputError(f"precision is {precision!r} and must be 'exact' or 'fast'.")
    if dtype != torch.float32:
        raise InputError(f"precision='fast' rounds float32 products and the model is in {dtype}: use precision='exact'.")
    rates = candidates(device)
    # Where "medium" runs no faster than float32 there are no bf16 units behind it.
    mode = max(("bf16", "medium"), key=lambda m: rates[m])
    gain = rates[mode] / rates["exact"]
    return Precision(mode, round(min(gain, 8.0) * 2) / 2) if gain >= 1.25 else EXACT


@dataclass(frozen=True)
class Sampled:
    """What the exact kernel of a random sample of texts says about a fast one.

    relative : Frobenius norm of the error of the sampled entries off the diagonal, relative to theirs.
    largest : largest error of an entry, relative to the largest entry.
    operator : estimated operator norm of the error of K/n, the constant direction left out.
    """

    texts: int
    relative: float
    largest: float
    operator: float

    def eigenvalue_error(self, eigenvalues: np.ndarray) -> float:
        """Return the estimated relative error of the eigenvalues (descending) down to rank n/2."""
        middle = float(eigenvalues[(len(eigenvalues) - 1) // 2])
        return self.operator / middle if middle > 0 else float("inf")


def compare(fast: np.ndarray, exact: np.ndarray, shape: tuple[int, int], *, square: bool) -> Sampled:
    """Compare the fast kernel of sampled texts with their exact one, (r, s) both, for a kernel of this `shape`.

    Rounding errors of different texts are independent, so beside the constant direction (which all errors share
    through the mean gradient, and which belongs to the largest eigenvalue) the operator norm of the error grows as the
    square root of the number of texts. K/n divides by n. By Weyl's inequality no eigenvalue moves further than that norm.
    """
    error = fast - exact
    centred = error - error.mean(0) - error.mean(1)[:, None] + error.mean()
    # The diagonal of a square kernel does not come from products.
    off = ~np.eye(len(exact), dtype=bool) if square else np.ones(exact.shape, bool)
    return Sampled(
        len(exact),
        float(np.linalg.norm(error[off]) / np.linalg.norm(exact[off])) if off.any() else 0.0,
        float(np.abs(error).max() / np.abs(exact).max()),
        float(np.linalg.norm(centred, 2) * (np.prod(shape) / error.size) ** 0.25 / shape[0]),
    )


def refuse(error: float, where: str) -> InputError:
    """Return the error of a fast kernel that is not exact enough."""
    return InputError(
        f"precision='fast' errs by about {error:.1%} in an eigenvalue down to rank n/2 ({where}) and "
        f"{TOLERANCE:.0%} is allowed: use precision='exact'."
    )
