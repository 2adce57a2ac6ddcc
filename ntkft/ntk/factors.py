r"""The three shapes in which a per-text gradient comes, and their squared norms.

A gradient of the size of the weights is never stored. What a layer leaves behind for text :math:`i` is one of

* `Outer`: :math:`G_i = \sum_t a_{it} \otimes g_{it}`, a sum over tokens, for linear layers;
* `Rows`: a few rows of a large table, for embeddings (and for an output layer of which only a few words are read);
* `Vector`: the gradient itself, for norms, biases and every other small parameter.

Example
-------
>>> import torch
>>> a, g = torch.ones(1, 2, 3), torch.ones(1, 2, 4)        # one text, two tokens, W is 3 x 4
>>> float(Outer(a, g).squares())                           # G = 2 everywhere: 12 entries of 4
48.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Outer:
    """Gradients G_i = Σ_t left_it ⊗ right_it.

    left : (b, T, p), what the layer saw. right : (b, T, q), what came back; zero where there is no token.
    """

    left: Tensor
    right: Tensor

    def squares(self) -> Tensor:
        """Return ‖G_i‖², (b,) float64."""
        left, right = self.left, self.right
        return ((left @ left.mT) * (right @ right.mT)).sum((1, 2), dtype=torch.float64)


@dataclass(frozen=True)
class Vector:
    """Gradients written out: rows (b, P)."""

    rows: Tensor

    def squares(self) -> Tensor:
        """Return ‖G_i‖², (b,) float64."""
        return self.rows.square().sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Rows:
    """Row-sparse gradients of a table (V, d): entry k says that row `row[k]` of text `text[k]` is `value[k]`.

    text : (M,) int64, position of the text in the batch. row : (M,) int64. value : (M, d).
    A pair (text, row) occurs at most once. `texts` is the number of texts of the batch.
    """

    text: Tensor
    row: Tensor
    value: Tensor
    texts: int

    def squares(self) -> Tensor:
        """Return ‖G_i‖², (texts,) float64."""
        each = self.value.square().sum(1, dtype=torch.float64)
        return each.new_zeros(self.texts).index_add_(0, self.text, each)


Factor = Outer | Vector | Rows


Chunk = tuple[Factor, ...]  # one batch of one site: one factor, or a table's dense and row-sparse use


def shape_of(factor: Outer) -> tuple[int, int]:
    """Return (texts, tokens a text) of a factor."""
    return factor.right.shape[0], factor.right.shape[1]


def tensors_of(factor: Factor) -> dict[str, Tensor]:
    """Return the tensors of a factor by field name."""
    return {f.name: v for f in fields(factor) if isinstance(v := getattr(factor, f.name), Tensor)}


def nbytes(factor: Factor) -> int:
    """Return the memory of a factor."""
    return sum(t.nbytes for t in tensors_of(factor).values())


def join_calls(pieces: Sequence[Factor]) -> list[Factor]:
    """Merge the uses of one parameter: at most one factor of each kind is left, and it holds the cross terms."""
    outer = [f for f in pieces if isinstance(f, Outer)]
    vector = [f for f in pieces if isinstance(f, Vector)]
    rows = [f for f in pieces if isinstance(f, Rows)]
    merged: list[Factor] = []
    if outer:  # G = Σ over the tokens of all calls
        merged.append(
            outer[0]
            if len(outer) == 1
            else Outer(torch.cat([f.left for f in outer], 1), torch.cat([f.right for f in outer], 1))
        )
    if rows:
        merged.append(rows[0] if len(rows) == 1 else _add_rows(rows))
    if vector:
        merged.append(Vector(sum((f.rows for f in vector[1:]), vector[0].rows)))
    return merged


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Put batches of one site together into one, shorter texts padded with zeros."""
    merged: list[Factor] = []
    for column in zip(*chunks, strict=True):
        first = column[0]
        if isinstance(first, Outer):
            longest = max(f.right.shape[1] for f in column)
            room = [(0, 0, 0, longest - f.right.shape[1]) for f in column]
            left = torch.cat([pad(f.left, r) for f, r in zip(column, room, strict=True)])
            merged.append(Outer(left, torch.cat([pad(f.right, r) for f, r in zip(column, room, strict=True)])))
        elif isinstance(first, Vector):
            merged.append(Vector(torch.cat([f.rows for f in column])))
        else:
            starts = [sum(f.texts for f in column[:k]) for k in range(len(column))]
            text = torch.cat([f.text + start for f, start in zip(column, starts, strict=True)])
            row, value = (torch.cat([getattr(f, k) for f in column]) for k in ("row", "value"))
            merged.append(Rows(text, row, value, sum(f.texts for f in column)))
    return tuple(merged)


def cross_squares(outer: Outer, rows: Rows) -> Tensor:
    """Return ⟨G_i, G'_i⟩ for a table's dense use (right over the table's rows) and its row-sparse use, (b,) float64."""
    weight = outer.right[rows.text, :, rows.row]  # (M, T)
    product = (outer.left[rows.text] @ rows.value.unsqueeze(2)).squeeze(2)  # (M, T)
    each = (product * weight).sum(1, dtype=torch.float64)
    return each.new_zeros(rows.texts).index_add_(0, rows.text, each)


def table_rows(ids: Tensor, g: Tensor) -> Rows:
    """Sum the gradients g (b, T, d) of looked-up rows ids (b, T) into one entry per (text, row); zero rows are dropped."""
    b = ids.shape[0]
    text, token = (g != 0).any(-1).nonzero(as_tuple=True)
    return _collect(text, ids[text, token], g[text, token], b)


def _add_rows(uses: Sequence[Rows]) -> Rows:
    text, row, value = (torch.cat([getattr(f, k) for f in uses]) for k in ("text", "row", "value"))
    return _collect(text, row, value, uses[0].texts)


def _collect(text: Tensor, row: Tensor, value: Tensor, texts: int) -> Rows:
    if len(row) == 0:
        return Rows(text, row, value, texts)
    key, place = torch.unique(row * texts + text, return_inverse=True)
    total = value.new_zeros(len(key), value.shape[1]).index_add_(0, place, value)
    return Rows(key % texts, key // texts, total, texts)
