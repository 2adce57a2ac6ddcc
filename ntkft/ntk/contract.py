r"""From factors to the kernel: two ways to the same inner product, and which is cheaper where.

With :math:`G_i = \sum_t a_{it} \otimes g_{it}` there are two ways to :math:`\langle G_i, G_j\rangle`:

* *explicit*: form :math:`G_i`, a block of its entries at a time, and multiply: :math:`p q` multiply-adds a pair;
* *ghost*: :math:`\sum_{s,t} \langle a_{is}, a_{jt}\rangle \langle g_{is}, g_{jt}\rangle`, without ever forming a
  gradient: :math:`T_i T_j (p + q)` multiply-adds a pair.

Ghost wins when :math:`T_i T_j < pq/(p+q)`: for short texts, for wide layers, and where only one token matters. The texts
are sorted by length, so the plane of pairs is cut, by bisection, into rectangles on each of which one way is cheaper
(`schedule`). Of a symmetric kernel only what lies on and below the diagonal is computed. Products are of the model's
precision, sums over blocks and layers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ntkft.ntk.factors import Chunk, Outer, Rows, Vector, shape_of
from ntkft.ntk.precision import EXACT, Precision, reuse

# A product of a few rows runs slower than one of many: relative speed by the smaller side, measured on two cores. It only
# steers the choice of way, so a rough table does; it is fixed, so that a resumed computation makes the same choices.
SPEED = ((512, 1.0), (256, 0.95), (128, 0.87), (64, 0.72), (32, 0.55), (0, 0.35))
GHOST_EXTRA = 40  # multiplying and summing two token Gram matrices costs about this many multiply-adds an entry
FORMING = 0.65  # speed of forming gradients, relative to a large product
SHIFT = 50  # rounding an entry of a gradient to bf16 takes about as long as this many multiply-adds
LEAF = 64  # texts; smaller rectangles are not cut
TILE = 2**20  # bytes of a token Gram matrix, which should stay in the cache
WIDE = 512  # entries of the right factor that are formed together

Shape = tuple[int, int]  # (texts, tokens a text) of one batch


@dataclass(frozen=True)
class Piece:
    """A rectangle of batches, rows [i0, i1) x columns [j0, j1), and the way that is cheaper there."""

    way: str
    i0: int
    i1: int
    j0: int
    j1: int


Priced = tuple[float, tuple[Piece, ...]]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds by kind: explicit products, forming their gradients, ghost products. They run at different speeds.

    `slowness` is what the explicit products would be at the speed of large exact ones. `entries` counts what is formed.
    """

    explicit: float = 0.0
    forming: float = 0.0
    ghost: float = 0.0
    slowness: float = 0.0
    entries: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(a * times for a in self.astuple()))

    def astuple(self) -> tuple[float, ...]:
        """Return the five numbers."""
        return self.explicit, self.forming, self.ghost, self.slowness, self.entries

    @property
    def total(self) -> float:
        """Everything, in multiply-adds at the speed of large exact products."""
        return self.slowness + self.forming / FORMING + self.ghost

    @property
    def multiply_adds(self) -> float:
        """All of them."""
        return self.explicit + self.forming + self.ghost


def schedule(rows: Sequence[Shape], columns: Sequence[Shape] | None, p: int, q: int, gain: float = 1.0) -> list[Piece]:
    """Cut the plane of batch pairs into pieces, each with the cheaper way.

    Parameters
    ----------
    rows, columns : list of (texts, tokens a text) of each batch; columns None for a symmetric kernel
    p, q : int
        Sizes of the two factors.
    gain : float
        How much faster explicit products are than ghost ones; above 1 with ``precision="fast"``.

    Example
    -------
    >>> schedule([(8, 10), (8, 100)], None, 384, 384)        # short texts by ghost, long ones explicitly
    [Piece(way='ghost', i0=0, i1=1, j0=0, j1=1), Piece(way='explicit', i0=1, i1=2, j0=0, j1=2)]
    """
    other = rows if columns is None else columns
    (ni, ti), (nj, tj) = _sums(rows), _sums(other)

    def price(i0: int, i1: int, j0: int, j1: int) -> tuple[float, str]:
        n, m = ni[i1] - ni[i0], nj[j1] - nj[j0]
        explicit = n * m * p * q / (_speed(min(n, m)) * gain)
        ghost = (ti[i1] - ti[i0]) * (tj[j1] - tj[j0]) * (p + q + GHOST_EXTRA)
        return (explicit, "explicit") if explicit < ghost else (ghost, "ghost")

    def cheaper(whole: tuple[float, Piece], parts: Sequence[Priced]) -> Priced:
        cost = sum(c for c, _ in parts)
        return (cost, tuple(x for _, ps in parts for x in ps)) if cost < whole[0] else (whole[0], (whole[1],))

    @cache
    def rectangle(i0: int, i1: int, j0: int, j1: int) -> Priced:
        cost, way = price(i0, i1, j0, j1)
        whole = (cost, Piece(way, i0, i1, j0, j1))
        if max(ni[i1] - ni[i0], nj[j1] - nj[j0]) <= LEAF or (i1 - i0 == 1 and j1 - j0 == 1):
            return cost, (whole[1],)
        i, j = _middle(ni, i0, i1), _middle(nj, j0, j1)
        sides_i = [(a, b) for a, b in ((i0, i), (i, i1)) if b > a]
        sides_j = [(a, b) for a, b in ((j0, j), (j, j1)) if b > a]
        return cheaper(whole, [rectangle(*a, *b) for a in sides_i for b in sides_j])

    def triangle(i0: int, i1: int) -> Priced:
        cost, way = price(i0, i1, i0, i1)
        if way == "ghost":  # of a ghost square only what lies on and below the diagonal is done
            cost *= 0.5 + 0.17 / (i1 - i0)
        whole = (cost, Piece(way, i0, i1, i0, i1))
        if i1 - i0 == 1:
            return cost, (whole[1],)
        i = _middle(ni, i0, i1)
        return cheaper(whole, [triangle(i0, i), triangle(i, i1), rectangle(i, i1, i0, i)])

    if columns is None:
        cost, pieces = triangle(0, len(rows))
        ghost = ti[-1] ** 2 * (p + q + GHOST_EXTRA) * (0.5 + 0.17 / len(rows))
    else:
        cost, pieces = rectangle(0, len(rows), 0, len(other))
        ghost = ti[-1] * tj[-1] * (p + q + GHOST_EXTRA)
    # Explicit pieces need their gradients formed first, once for each text: then all ghost may be cheaper after all.
    if ghost < cost + cost_of(pieces, rows, columns, p, q).forming / FORMING:
        return [Piece("ghost", 0, len(rows), 0, len(other))]
    return _joined(pieces)


def cost_of(pieces: Sequence[Piece], rows: Sequence[Shape], columns: Sequence[Shape] | None, p: int, q: int) -> Cost:
    """Return the multiply-adds of a schedule."""
    other = rows if columns is None else columns
    (ni, ti), (nj, tj) = _sums(rows), _sums(other)
    explicit = ghost = slowness = 0.0
    for x in pieces:
        n, m = ni[x.i1] - ni[x.i0], nj[x.j1] - nj[x.j0]
        if x.way == "explicit":
            explicit += n * m * p * q
            slowness += n * m * p * q / _speed(min(n, m))
        elif columns is None and (x.i0, x.i1) == (x.j0, x.j1):
            tokens = [ti[k + 1] - ti[k] for k in range(x.i0, x.i1)]
            ghost += (sum(tokens) ** 2 / 2 + sum(t * t for t in tokens) / 6) * (p + q)
        else:
            ghost += (ti[x.i1] - ti[x.i0]) * (tj[x.j1] - tj[x.j0]) * (p + q)
    left, right = _explicit_batches(pieces, columns is None)
    forming = sum(rows[i][0] * rows[i][1] for i in left)
    formed = sum(rows[i][0] for i in left)
    if columns is not None:
        forming += sum(other[j][0] * other[j][1] for j in right)
        formed += sum(other[j][0] for j in right)
    return Cost(explicit, float(forming * p * q), ghost, slowness, float(formed * p * q))


def choose_way(
    rows: Sequence[Shape], columns: Sequence[Shape] | None, p: int, q: int, precision: Precision
) -> tuple[list[Piece], Precision, Cost]:
    """Return the cheapest schedule, and whether its explicit products are worth being fast.

    Taking off the common part and rounding costs `SHIFT` multiply-adds for each entry of a gradient, so fast products pay
    for many texts and not for few.
    """
    pieces = schedule(rows, columns, p, q)
    cost = cost_of(pieces, rows, columns, p, q)
    if precision.mode == "exact":
        return pieces, precision, cost
    fast = schedule(rows, columns, p, q, precision.gain)
    found = cost_of(fast, rows, columns, p, q)
    found = replace(found, slowness=found.slowness / precision.gain + SHIFT * found.entries)
    return (fast, precision, found) if found.explicit and found.total < cost.total else (pieces, EXACT, cost)


def contract(
    rows: Sequence[Chunk],
    columns: Sequence[Chunk] | None,
    out: Tensor,
    scratch: int,
    precision: Precision = EXACT,
    buffers: dict[str, Tensor] | None = None,
) -> None:
    """Add Σ ⟨G_i, G_j⟩ of one site to `out` (n, m) float64, with about `scratch` bytes of working memory.

    `columns` is None for a symmetric kernel: then only the entries on and below the diagonal are meant. `buffers` keeps
    working memory from one call to the next.
    """
    buffers = {} if buffers is None else buffers
    right = rows if columns is None else columns
    for a in range(len(rows[0])):
        for b in range(len(right[0])):
            left_column, right_column = [c[a] for c in rows], [c[b] for c in right]
            same = columns is None and a == b
            kinds = (type(left_column[0]), type(right_column[0]))
            if kinds == (Outer, Outer):
                _outer(left_column, None if same else right_column, out, scratch, precision, buffers)  # type: ignore[arg-type]
            elif kinds == (Vector, Vector):
                _vector(left_column, None if same else right_column, out, scratch)  # type: ignore[arg-type]
            elif kinds == (Rows, Rows):
                _rows(left_column, right_column, out)  # type: ignore[arg-type]
            elif kinds == (Outer, Rows):
                _mixed(left_column, right_column, out)  # type: ignore[arg-type]
            else:
                _mixed(right_column, left_column, out.T)  # type: ignore[arg-type]


def _outer(
    rows: Sequence[Outer],
    columns: Sequence[Outer] | None,
    out: Tensor,
    scratch: int,
    precision: Precision,
    buffers: dict[str, Tensor],
) -> None:
    p, q = rows[0].left.shape[-1], rows[0].right.shape[-1]
    right = rows if columns is None else columns
    shapes, other = [shape_of(f) for f in rows], None if columns is None else [shape_of(f) for f in columns]
    pieces, precision, _ = choose_way(shapes, other, p, q, precision)
    si, sj = _starts(rows), _starts(right)
    for x in pieces:
        if x.way == "ghost":
            for j in range(x.j0, x.j1):
                for i in range(max(x.i0, j) if columns is None else x.i0, x.i1):
                    same = columns is None and i == j
                    _ghost(rows[i], right[j], out[si[i] : si[i + 1], sj[j] : sj[j + 1]], buffers, same)
    explicit = [x for x in pieces if x.way == "explicit"]
    if explicit:
        _explicit(rows, columns, explicit, out, scratch, precision, buffers)


def _ghost(a: Outer, b: Outer, out: Tensor, buffers: dict[str, Tensor], same: bool = False) -> None:
    """Add Σ_{s,t} ⟨a_is, a_jt⟩⟨g_is, g_jt⟩ for all pairs of texts of two batches to `out` (n_a, n_b).

    If both batches are the `same`, only what lies on and below the diagonal is meant.
    """
    (na, ta), (nb, tb) = shape_of(a), shape_of(b)
    other_left, other_right = b.left.flatten(0, 1), b.right.flatten(0, 1)  # (nb*tb, p), (nb*tb, q)
    step = max(1, TILE // (ta * nb * tb * a.right.element_size()))
    if same:
        step = min(step, -(-na // 3))
    for k in range(0, na, step):
        m = min(k + step, nb) if same else nb
        left, right = a.left[k : k + step].flatten(0, 1), a.right[k : k + step].flatten(0, 1)
        tile = (len(left), m * tb)
        product = torch.mm(right, other_right[: m * tb].T, out=reuse(buffers, "g", tile, right.dtype, out.device))
        product *= torch.mm(left, other_left[: m * tb].T, out=reuse(buffers, "a", tile, left.dtype, out.device))
        # Sums over the tokens of two texts are short; the sums over layers, in `out`, are float64.
        out[k : k + step, :m] += product.view(-1, ta, m, tb).sum(3).sum(1)


def _explicit(
    rows: Sequence[Outer],
    columns: Sequence[Outer] | None,
    pieces: Sequence[Piece],
    out: Tensor,
    scratch: int,
    precision: Precision,
    buffers: dict[str, Tensor],
) -> None:
    """Form the gradients of the batches that take part, a block of entries at a time, and multiply piece by piece."""
    used_i, used_j = _explicit_batches(pieces, columns is None)
    (i0, i1), (j0, j1) = (min(used_i), max(used_i) + 1), (min(used_j), max(used_j) + 1)
    part, other = rows[i0:i1], None if columns is None else columns[j0:j1]
    si, sj = _starts(part), _starts(part if other is None else other)
    oi, oj = _starts(rows)[i0], _starts(rows if columns is None else columns)[j0]
    p, q = part[0].left.shape[-1], part[0].right.shape[-1]
    texts = si[-1] + (0 if other is None else sj[-1])
    room = max(1, scratch // (texts * part[0].right.element_size()))  # entries of a gradient at a time
    wide = min(q, WIDE, room)
    high = max(1, min(p, room // wide))
    like = part[0].right
    buffer = reuse(buffers, "rows", [si[-1] * high * wide], like.dtype, like.device)
    other_buffer = buffer
    if other is not None:
        other_buffer = reuse(buffers, "columns", [sj[-1] * high * wide], like.dtype, like.device)
    shift_i, shift_j = out.new_zeros(si[-1]), out.new_zeros(sj[-1])
    regions = [(slice(si[x.i0 - i0], si[x.i1 - i0]), slice(sj[x.j0 - j0], sj[x.j1 - j0])) for x in pieces]
    out = out[oi : oi + si[-1], oj : oj + sj[-1]]
    for start in range(0, p, high):
        for begin in range(0, q, wide):
            window = (slice(start, start + high), slice(begin, begin + wide))
            left = _gradients(part, window, buffer)
            right = None if other is None else _gradients(other, window, other_buffer)
            for entries in precision.slices(left, right, buffers):
                for i, j in regions:
                    out[i, j] += entries.product(i, j)
                if entries.left_shift is not None and entries.right_shift is not None:
                    shift_i += entries.left_shift
                    shift_j += entries.right_shift
    for i, j in regions:
        out[i, j] += shift_i[i, None] + shift_j[j]


def _gradients(column: Sequence[Outer], window: tuple[slice, slice], buffer: Tensor) -> Tensor:
    """Return a window of the explicit gradients G_i of all texts, flat: (n, high * wide), in the buffer."""
    starts = _starts(column)
    high, wide = column[0].left[0, 0, window[0]].numel(), column[0].right[0, 0, window[1]].numel()
    block = buffer[: starts[-1] * high * wide].view(starts[-1], high, wide)
    for k, f in enumerate(column):
        torch.matmul(f.left[:, :, window[0]].mT, f.right[:, :, window[1]], out=block[starts[k] : starts[k + 1]])
    return block.flatten(1)


def _vector(rows: Sequence[Vector], columns: Sequence[Vector] | None, out: Tensor, scratch: int) -> None:
    """Add the products of written-out gradients, a block of entries at a time, in float64."""
    n = sum(f.rows.shape[0] for f in rows) + sum(f.rows.shape[0] for f in columns or ())
    width = max(1, scratch // (16 * n))
    for start in range(0, rows[0].rows.shape[1], width):
        left = torch.cat([f.rows[:, start : start + width].double() for f in rows])
        right = left if columns is None else torch.cat([f.rows[:, start : start + width].double() for f in columns])
        out += left @ right.T


def _rows(rows: Sequence[Rows], columns: Sequence[Rows], out: Tensor) -> None:
    """Add the products of row-sparse gradients: for each row of the table, the texts that touch it, in float64."""
    text_i, row_i, value_i = _by_row(rows)
    text_j, row_j, value_j = (text_i, row_i, value_i) if columns is rows else _by_row(columns)
    ids_i, count_i = row_i.unique_consecutive(return_counts=True)
    ids_j, count_j = row_j.unique_consecutive(return_counts=True)
    ends = count_j.cumsum(0).tolist()
    place = {r: (end - k, end) for r, k, end in zip(ids_j.tolist(), count_j.tolist(), ends, strict=True)}
    end = 0
    for r, k in zip(ids_i.tolist(), count_i.tolist(), strict=True):
        start, end = end, end + k
        if r in place:
            j0, j1 = place[r]
            block = value_i[start:end].double() @ value_j[j0:j1].double().T
            out[text_i[start:end, None], text_j[None, j0:j1]] += block  # each text once: no entry is hit twice


def _by_row(column: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """Join batches and sort their entries by row of the table: text (M,), row (M,), value (M, d)."""
    shift, texts = 0, []
    for f in column:
        texts.append(f.text + shift)
        shift += f.texts
    row = torch.cat([f.row for f in column])
    order = torch.argsort(row, stable=True)
    return torch.cat(texts)[order], row[order], torch.cat([f.value for f in column])[order]


def _mixed(outer: Sequence[Outer], rows: Sequence[Rows], out: Tensor) -> None:
    """Add the cross terms of a table that is also a dense output layer: outer texts x rows texts.

    The table's rows are the output words, so they are `right`'s last axis.
    """
    i = 0
    for f in outer:
        n = f.right.shape[0]
        j = 0
        for g in rows:
            product = torch.einsum("btd,md->mbt", f.left, g.value)
            product *= f.right[:, :, g.row].permute(2, 0, 1)  # (M, b, T)
            each = product.sum(2, dtype=torch.float64)  # (M, b)
            out[i : i + n, j : j + g.texts] += each.new_zeros(g.texts, n).index_add_(0, g.text, each).T
            j += g.texts
        i += n


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join explicit neighbours of the same rows: one product of many columns is faster than several of few."""
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda x: (x.way, x.i0, x.i1, x.j0)):
        last = done[-1] if done else None
        if last and piece.way == "explicit" == last.way and (last.i0, last.i1, last.j1) == (piece.i0, piece.i1, piece.j0):
            done[-1] = Piece("explicit", last.i0, last.i1, last.j0, piece.j1)
        else:
            done.append(piece)
    return sorted(done, key=lambda x: (x.i0, x.j0))


def _explicit_batches(pieces: Sequence[Piece], symmetric: bool) -> tuple[list[int], list[int]]:
    """List the row and the column batches whose gradients are formed; the same ones when the kernel is symmetric."""
    rows = {i for x in pieces if x.way == "explicit" for i in range(x.i0, x.i1)}
    columns = {j for x in pieces if x.way == "explicit" for j in range(x.j0, x.j1)}
    if symmetric:
        rows = columns = rows | columns
    return sorted(rows), sorted(columns)


def _sums(batches: Sequence[Shape]) -> tuple[list[int], list[int]]:
    """Return running sums of texts and of tokens."""
    texts, tokens = [0], [0]
    for b, t in batches:
        texts.append(texts[-1] + b)
        tokens.append(tokens[-1] + b * t)
    return texts, tokens


def _middle(starts: Sequence[int], lo: int, hi: int) -> int:
    """Return the batch boundary nearest to half of the texts, strictly inside when there is one."""
    if hi - lo == 1:
        return hi
    half = (starts[lo] + starts[hi]) / 2
    return min(range(lo + 1, hi), key=lambda k: abs(starts[k] - half))


def _speed(side: int) -> float:
    return next(speed for least, speed in SPEED if side >= least)


def _starts(column: Sequence[Outer]) -> list[int]:
    return _sums([shape_of(f) for f in column])[0]
