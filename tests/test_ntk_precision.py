"""Fast products: what they cost in exactness, and that they refuse where it is too much."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.errors import InputError
from ntkft.ntk import engine
from ntkft.ntk import precision as module
from ntkft.ntk.contract import Cost, Piece, choose_way
from ntkft.ntk.precision import EXACT, Precision, Sampled, candidates, choose, compare
from tests import tiny
from tests.helpers import relative

CPU = torch.device("cpu")
FAST = [Precision("bf16", 2.0), Precision("medium", 2.0)]


def product(precision: Precision, left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """The whole product, put together as the contraction does."""
    out = torch.zeros(len(left), len(left if right is None else right), dtype=torch.float64)
    buffers: dict[str, torch.Tensor] = {}
    for piece in precision.slices(left, right, buffers):
        out += piece.product(slice(None), slice(None))
        if piece.left_shift is not None:
            out += piece.left_shift[:, None] + piece.right_shift
    return out


def gradients(n, entries, seed=0, common=10.0):
    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    return torch.randn(n, entries, generator=own) + common * torch.randn(entries, generator=shared)


@pytest.mark.parametrize("precision", FAST, ids=lambda p: p.mode)
@pytest.mark.parametrize("entries", [100, module.SLICE, 2 * module.SLICE + 7])
def test_the_common_part_is_taken_off_exactly(precision, entries):
    """With a common part ten times as large as the rest, plain bf16 would err in every digit that matters."""
    left, right = gradients(20, entries), gradients(9, entries, seed=1)
    for other in (None, right):
        exact = left.double() @ (left if other is None else other).double().T
        found = product(precision, left, other)
        assert relative(found.numpy(), exact.numpy()) < 1e-4
        plain = (left.bfloat16() @ (left if other is None else other).bfloat16().T).double()
        assert relative(found.numpy(), exact.numpy()) < 0.1 * relative(plain.numpy(), exact.numpy())


@pytest.mark.parametrize("shape", [(3, 5, 10), (64, 70, 4097), (600, 600, 33), (2, 2, 3)])
def test_thin_products_are_exact(shape):
    n, m, k = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(x, k, generator=generator, dtype=torch.float64) for x in (n, m))
    torch.testing.assert_close(product(EXACT, a, b), a @ b.T, rtol=1e-12, atol=1e-12)


def test_choose():
    assert choose("exact", torch.float64, CPU) is EXACT
    with pytest.raises(InputError, match="must be 'exact' or 'fast'"):
        choose("half", torch.float32, CPU)
    with pytest.raises(InputError, match=r"the model is in torch\.float64"):
        choose("fast", torch.float64, CPU)
    rates = candidates(CPU, seconds=0.01)
    assert rates.keys() == {"exact", "medium", "bf16"} and min(rates.values()) > 0


@pytest.mark.parametrize(("rates", "mode"), [((1, 1.1, 1.2), "exact"), ((1, 1.1, 3), "bf16"), ((1, 4, 3), "medium")])
def test_the_fastest_unit_is_taken_if_it_is_worth_it(monkeypatch, rates, mode):
    monkeypatch.setattr(module, "candidates", lambda device: dict(zip(("exact", "medium", "bf16"), rates, strict=True)))
    assert choose("fast", torch.float32, CPU).mode == mode


def test_the_sample_tells_the_operator_norm_of_the_error():
    """Independent errors of 400 texts, estimated from 48 of them, with a constant mode that is not to count."""
    rng = np.random.default_rng(0)
    n, scale = 400, 1e-3
    noise = scale * rng.standard_normal((n, n))
    noise = np.triu(noise, 1) + np.triu(noise, 1).T
    exact = np.eye(n) + 5.0
    shift = 0.003 * rng.standard_normal(n)
    fast = exact + noise + shift[:, None] + shift
    np.fill_diagonal(fast, np.diag(exact))
    pick = rng.permutation(n)[:48]
    sampled = compare(fast[np.ix_(pick, pick)], exact[np.ix_(pick, pick)], (n, n), square=True)
    centring = np.eye(n) - 1 / n
    truth = np.linalg.norm(centring @ (fast - exact) @ centring, 2) / n
    assert 0.7 * truth < sampled.operator < 1.6 * truth
    assert sampled.eigenvalue_error(np.array([4.0, 2.0, 1.0, 0.5])) == pytest.approx(sampled.operator / 2)
    assert Sampled(2, 0.0, 0.0, 1.0).eigenvalue_error(np.zeros(4)) == float("inf")


def every_product_explicit(rows, columns, p, q, precision):
    """Ghost is exact in both: leave it out."""
    return [Piece("explicit", 0, len(rows), 0, len(columns or rows))], precision, Cost()


def test_fast_products_are_for_many_texts():
    few, many = [(16, 24)] * 2, [(16, 24)] * 64
    fast = Precision("bf16", 2.0)
    assert choose_way(few, None, 384, 384, fast)[1] is EXACT
    pieces, how, cost = choose_way(many, None, 384, 384, fast)
    assert how is fast and any(x.way == "explicit" for x in pieces)
    assert cost.total < choose_way(many, None, 384, 384, EXACT)[2].total
    readout = ntkft.pooled_readout(tiny.bert(torch.float32))
    small = ntkft.empirical_ntk(readout, tiny.TEXTS, precision="fast", progress=False)
    assert small.info["products"] == "exact" and "fast" not in small.info


@pytest.fixture
def fast(monkeypatch):
    """Fast products also where this machine would not gain from them."""

    def use(precision):
        monkeypatch.setattr(engine, "choose", lambda name, *a: EXACT if name == "exact" else precision)
        monkeypatch.setattr("ntkft.ntk.plan.Workload.worth", lambda self, how: True)
        monkeypatch.setattr("ntkft.ntk.contract.choose_way", every_product_explicit)

    return use


@pytest.mark.parametrize("precision", FAST, ids=lambda p: p.mode)
def test_a_fast_kernel_is_near_the_exact_one_and_says_how_near(fast, monkeypatch, precision):
    fast(precision)
    monkeypatch.setattr(engine, "TOLERANCE", 10.0)  # nine texts in sixteen dimensions: the last eigenvalues are tiny
    readout = ntkft.pooled_readout(tiny.bert(torch.float32))
    exact = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False)
    found = ntkft.empirical_ntk(readout, tiny.TEXTS, precision="fast", progress=False)
    assert found.info["products"] == precision.mode and "fast" not in exact.info
    np.testing.assert_array_equal(np.diag(found.matrix), np.diag(exact.matrix))
    assert relative(found.matrix, exact.matrix) < 1e-3
    off = ~np.eye(len(exact.matrix), dtype=bool)
    error = np.linalg.norm((found.matrix - exact.matrix)[off]) / np.linalg.norm(exact.matrix[off])
    assert found.info["fast"]["relative"] == pytest.approx(error, rel=0.2)  # all nine texts are the sample
    rectangle = ntkft.empirical_ntk(readout, tiny.TEXTS[:3], tiny.TEXTS[3:], precision="fast", progress=False)
    assert relative(rectangle.matrix, exact.matrix[:3, 3:]) < 1e-3
    assert rectangle.info["fast"]["eigenvalue_error"] is None


def test_fast_refuses_when_it_is_not_exact_enough(fast, monkeypatch):
    class Coarse(Precision):
        def slices(self, left, right, buffers):
            noise = 1 + 0.3 * torch.rand(left.shape, generator=torch.Generator().manual_seed(0))
            yield from super().slices(left * noise, right, buffers)

    fast(Coarse("bf16", 2.0))
    readout = ntkft.pooled_readout(tiny.bert(torch.float32))
    with pytest.raises(InputError, match=r"precision='fast' errs by about [0-9.]+% .* use precision='exact'"):
        ntkft.empirical_ntk(readout, tiny.TEXTS, precision="fast", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_on_a_gpu(precision):
    readout = ntkft.pooled_readout(tiny.bert(torch.float32))
    here = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False)
    readout.module.to("cuda")
    there = ntkft.empirical_ntk(readout, tiny.TEXTS, precision=precision, progress=False)
    assert there.info["device"] == "cuda" and relative(there.matrix, here.matrix) < 1e-4
