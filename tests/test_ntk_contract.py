"""The two contractions, the cutting of the plane between them, and the factors, against dense gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ntkft
from ntkft.ntk import contract as module
from ntkft.ntk.contract import Piece, contract, cost_of, schedule
from ntkft.ntk.factors import Outer, Rows, Vector, cross_squares, join_calls, merge, table_rows
from tests import tiny
from tests.helpers import relative

BATCHES = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=12)


@given(BATCHES, st.none() | BATCHES, st.integers(1, 900), st.integers(1, 900), st.sampled_from([1.0, 2.0]))
@settings(deadline=None)
def test_the_pieces_cover_every_pair_of_batches_once(rows, columns, p, q, gain):
    pieces = schedule(rows, columns, p, q, gain)
    hits = np.zeros((len(rows), len(columns or rows)), dtype=int)
    for x in pieces:
        hits[x.i0 : x.i1, x.j0 : x.j1] += 1
    wanted = np.ones_like(hits, dtype=bool) if columns is not None else np.tril(np.ones_like(hits, dtype=bool))
    assert (hits[wanted] == 1).all() and hits.max() == 1
    cost = cost_of(pieces, rows, columns, p, q)
    assert (cost.explicit > 0) == any(x.way == "explicit" for x in pieces)
    assert (cost.ghost > 0) == any(x.way == "ghost" for x in pieces)
    assert cost.slowness >= cost.explicit and (cost.entries > 0) == (cost.explicit > 0)


def test_short_texts_by_ghost_and_long_ones_explicitly():
    assert {x.way for x in schedule([(64, 2)] * 4, None, 384, 384)} == {"ghost"}
    assert {x.way for x in schedule([(64, 200)] * 4, None, 384, 384)} == {"explicit"}
    assert {x.way for x in schedule([(64, 2), (64, 200)] * 2, None, 384, 384)} == {"ghost", "explicit"}


def random_outer(shapes, p, q, seed):
    generator = torch.Generator().manual_seed(seed)
    make = [torch.randn(b, t, d, generator=generator, dtype=torch.float64) for b, t in shapes for d in (p, q)]
    return [(Outer(a, g),) for a, g in zip(make[::2], make[1::2], strict=True)]


def dense(chunks):
    return torch.cat([torch.einsum("btp,btq->bpq", f.left, f.right).flatten(1) for (f,) in chunks])


@pytest.mark.parametrize("ways", ["ghost", "explicit", "chosen"])
@pytest.mark.parametrize("scratch", [10, 10**4, 10**8])  # entry by entry, in blocks, at once
@pytest.mark.parametrize("square", [True, False])
def test_contractions_equal_dense_gradients(monkeypatch, ways, scratch, square):
    shapes, other = [(3, 2), (5, 4), (1, 9), (4, 30)], [(2, 3), (6, 20)]
    rows, columns = random_outer(shapes, 7, 11, 0), None if square else random_outer(other, 7, 11, 1)
    if ways != "chosen":
        whole = Piece(ways, 0, len(rows), 0, len(columns or rows))
        monkeypatch.setattr(module, "schedule", lambda *a: [whole])
    left, right = dense(rows), dense(rows if columns is None else columns)
    out = torch.ones(len(left), len(right), dtype=torch.float64)  # what is there already must stay
    contract(rows, columns, out, scratch)
    expected = left @ right.T + 1
    lower = torch.ones_like(out, dtype=torch.bool).tril() if square else torch.ones_like(out, dtype=torch.bool)
    torch.testing.assert_close(out[lower], expected[lower], rtol=1e-12, atol=1e-10)


def test_a_large_ghost_batch_is_cut_into_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", 1000)
    rows = random_outer([(9, 3), (7, 5)], 4, 6, 0)
    out = torch.zeros(16, 16, dtype=torch.float64)
    monkeypatch.setattr(module, "schedule", lambda *a: [Piece("ghost", 0, 2, 0, 2)])
    contract(rows, None, out, 10**6)
    torch.testing.assert_close(out.tril(), (dense(rows) @ dense(rows).T).tril())


def test_a_table_used_twice_densely_and_by_rows_has_its_cross_terms():
    """W (V, d) as embedding and as output layer: G_i = Σ_t onehot(id) ⊗ g + Σ_t h ⊗ a."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, d = 13, 5

    def batch(b, t):
        ids = torch.randint(vocabulary, (b, t), generator=generator)
        g, a = (torch.randn(b, t, d, generator=generator, dtype=torch.float64) for _ in range(2))
        h = torch.randn(b, t, vocabulary, generator=generator, dtype=torch.float64)
        table = torch.einsum("btv,btd->bvd", torch.nn.functional.one_hot(ids, vocabulary).double(), g)
        return (Outer(a, h), table_rows(ids, g)), (table + torch.einsum("btv,btd->bvd", h, a)).flatten(1)

    (first, g1), (second, g2) = batch(3, 4), batch(2, 6)
    gradients = torch.cat([g1, g2])
    out = torch.zeros(5, 5, dtype=torch.float64)
    contract([first, second], None, out, 10**6)
    torch.testing.assert_close(out.tril(), (gradients @ gradients.T).tril())
    rectangle = torch.zeros(3, 2, dtype=torch.float64)
    contract([first], [second], rectangle, 10**6)
    torch.testing.assert_close(rectangle, g1 @ g2.T)
    squares = first[0].squares() + first[1].squares() + 2 * cross_squares(*first)
    torch.testing.assert_close(squares, g1.square().sum(1))
    joined = torch.zeros(5, 5, dtype=torch.float64)
    contract([merge([first, second])], None, joined, 10**6)
    torch.testing.assert_close(joined.tril(), out.tril())


def test_uses_of_one_parameter_are_joined_with_their_cross_terms():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    (vector,) = join_calls([Vector(rows[0]), Vector(rows[1])])
    torch.testing.assert_close(vector.squares(), (rows[0] + rows[1]).square().sum(1))
    ids = torch.tensor([[1, 2, 1], [4, 4, 4]])
    values = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    (table,) = join_calls([table_rows(ids, values), table_rows(ids, 2 * values)])
    assert isinstance(table, Rows) and len(table.row) == 3  # rows 1 and 2 of text 0, row 4 of text 1
    total = torch.stack([values[0, [0, 2]].sum(0), values[0, 1], values[1].sum(0)]) * 3
    torch.testing.assert_close(table.squares(), torch.stack([total[:2].square().sum(), total[2].square().sum()]))


@pytest.mark.parametrize("way", ["ghost", "explicit"])
def test_either_way_gives_the_kernel_of_a_model(monkeypatch, way):
    readout = ntkft.pooled_readout(tiny.bert())
    chosen = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False).matrix
    monkeypatch.setattr(
        module,
        "schedule",
        lambda rows, columns, p, q, gain=1.0: [Piece(way, 0, len(rows), 0, len(columns or rows))],
    )
    forced = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False).matrix
    assert relative(forced, chosen) < 1e-12
