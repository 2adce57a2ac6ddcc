r"""From factors to the kernel: two ways to the same inner product.

With :math:`G_i = \sum_t l_{it} \otimes r_{it}` there are two ways to :math:`\langle G_i, G_j\rangle`:

* *explicit*: form :math:`G_i` in blocks of columns and multiply, :math:`n^2 p q` multiply-adds;
* *ghost*: :math:`\sum_{s,t} \langle l_{is}, l_{jt}\rangle \langle r_{is}, r_{jt}\rangle`, without ever forming a
  gradient, :math:`n^2 T^2 (p + q)` multiply-adds.

Ghost wins when :math:`T^2 < pq/(p+q)`. When :math:`l` is one-hot (an embedding), its inner product is
"same token or not", so only the ghost way makes sense. A weight that is used as an embedding and as an
output layer (tied) has factors of both kinds, and the cross terms come out of the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkft.ntk.capture import Factor

Column = Sequence[Factor]  # the factors of one call, batch after batch: the texts in order


def contract(rows: Sequence[Column], columns: Sequence[Column], scratch: int) -> Tensor:
    """Return Σ over calls of ⟨G_i, G_j⟩, (n, m) float64, using about `scratch` bytes of working memory."""
    total: Tensor | None = None
    for left in rows:
        for right in columns:
            part = (
                _ghost(left, right, scratch)
                if _prefer_ghost(left, right)
                else _explicit(left, right, scratch)
            )
            total = part if total is None else total + part
    assert total is not None
    return total


def _texts(column: Column) -> int:
    return sum(f.right.shape[0] for f in column)


def _prefer_ghost(rows: Column, columns: Column) -> bool:
    """Compare multiply-adds; a one-hot side leaves no choice."""
    if rows[0].one_hot or columns[0].one_hot:
        return True
    p, q = rows[0].left.shape[-1], rows[0].right.shape[-1]
    n, m = _texts(rows), _texts(columns)
    tokens_n = sum(f.right.shape[0] * f.right.shape[1] for f in rows)
    tokens_m = sum(f.right.shape[0] * f.right.shape[1] for f in columns)
    explicit = (n * m + tokens_n + (0 if rows is columns else tokens_m)) * p * q
    return tokens_n * tokens_m * (p + q) < explicit


def _explicit(rows: Column, columns: Column, scratch: int) -> Tensor:
    """Form the gradients in blocks of columns of `left` and multiply."""
    p, q = rows[0].left.shape[-1], rows[0].right.shape[-1]
    n, m = _texts(rows), _texts(columns)
    per_column = (n + (0 if rows is columns else m)) * q * rows[0].right.element_size()
    width = max(1, min(p, scratch // max(per_column, 1)))
    total = torch.zeros(n, m, dtype=torch.float64)
    for start in range(0, p, width):
        g_rows = _gradient_block(rows, start, start + width)  # (n, width * q)
        g_columns = g_rows if rows is columns else _gradient_block(columns, start, start + width)
        total += (g_rows @ g_columns.T).double().cpu()
    return total


def _gradient_block(column: Column, start: int, stop: int) -> Tensor:
    """Return the explicit gradients G_i[start:stop] of all texts, (n, (stop - start) * q)."""
    p, q = column[0].left.shape[-1], column[0].right.shape[-1]
    block = column[0].right.new_empty(_texts(column), min(stop, p) - start, q)
    i = 0
    for f in column:
        b = f.right.shape[0]
        torch.matmul(f.left[:, :, start:stop].mT, f.right, out=block[i : i + b])
        i += b
    return block.flatten(1)


def _ghost(rows: Column, columns: Column, scratch: int) -> Tensor:
    """Sum products of token Gram matrices, block of texts by block of texts."""
    total = torch.zeros(_texts(rows), _texts(columns), dtype=torch.float64)
    merged = _merged(rows)
    rows, columns = merged, merged if columns is rows else _merged(columns)
    i = 0
    for a in rows:
        j = 0
        for b in columns:
            for block, k in _split(a, b, scratch):
                total[i + k : i + k + block.right.shape[0], j : j + b.right.shape[0]] = _ghost_block(block, b)
            j += b.right.shape[0]
        i += a.right.shape[0]
    return total


def _merged(column: Column) -> Column:
    """Join the batches of factors with one row per text (biases, norms, heads): no padding keeps them apart."""
    if column[0].one_hot or any(f.right.shape[1] > 1 for f in column):
        return column
    return [Factor(torch.cat([f.left for f in column]), torch.cat([f.right for f in column]))]


def _split(a: Factor, b: Factor, scratch: int) -> list[tuple[Factor, int]]:
    """Cut the texts of `a` so that the token Gram matrices with `b` fit into `scratch` bytes."""
    tokens_b = b.right.shape[0] * b.right.shape[1]
    per_text = 3 * a.right.shape[1] * tokens_b * a.right.element_size()
    size = max(1, scratch // max(per_text, 1))
    n = a.right.shape[0]
    return [(Factor(a.left[k : k + size], a.right[k : k + size]), k) for k in range(0, n, size)]


def _ghost_block(a: Factor, b: Factor) -> Tensor:
    """Σ_{s,t} ⟨l_is, l_jt⟩⟨r_is, r_jt⟩ for all pairs of texts, (n_a, n_b) float64 on the CPU."""
    (na, ta), (nb, tb) = a.right.shape[:2], b.right.shape[:2]
    product = a.right.flatten(0, 1) @ b.right.flatten(0, 1).T  # (na*ta, nb*tb)
    la, lb = a.left.flatten(0, 1), b.left.flatten(0, 1)
    if a.one_hot and b.one_hot:
        product = product * (la[:, None] == lb[None, :])
    elif a.one_hot:
        product = product * lb[:, la].T  # ⟨e_token, l⟩ is one entry of l
    elif b.one_hot:
        product = product * la[:, lb]
    else:
        product = product * (la @ lb.T)
    return product.reshape(na, ta, nb, tb).sum((1, 3), dtype=torch.float64).cpu()
