"""The laws of decay: exact spectra are recovered, the right law wins on data, and bad input is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest

from ntkft.decay import MODELS, fit_decay, select_decay
from ntkft.errors import InputError
from ntkft.ntk import Kernel

J = np.arange(1, 301, dtype=np.float64)


def kernel_of(eigenvalues: np.ndarray, n: int = 240, seed: int = 0) -> Kernel:
    """Return the kernel of n Gaussian texts whose population has these eigenvalues."""
    features = np.random.default_rng(seed).standard_normal((n, len(eigenvalues))) * np.sqrt(eigenvalues)
    return Kernel(features @ features.T, np.zeros(n))


@pytest.mark.parametrize(
    ("model", "eigenvalues", "wanted"),
    [
        ("polynomial", 3 * J**-1.3, {"scale": 3, "exponent": 1.3}),
        ("exponential", 2 * np.exp(-0.05 * J), {"scale": 2, "rate": 0.05}),
        ("stretched", np.exp(-0.7 * J**0.5), {"scale": 1, "rate": 0.7, "power": 0.5}),
        ("broken", np.where(J < 40, J**-0.8, 40**1.2 * J**-2.0), {"exponent": 0.8, "tail": 2.0, "at": 40}),
    ],
)
def test_an_exact_law_is_recovered(model: str, eigenvalues: np.ndarray, wanted: dict[str, float]) -> None:
    fit = fit_decay(eigenvalues, model, first=5, last=150)  # type: ignore[arg-type]
    assert {key: fit.parameters[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert fit.residual < 1e-18 and np.allclose(fit.predicted, eigenvalues[4:150])
    assert fit.break_rank == wanted.get("at")
    others = [fit_decay(eigenvalues, other, first=5, last=150).residual for other in MODELS if other != model]
    nested = {"polynomial": ("broken",)}.get(model, ())
    assert min(others) > 1e-6 or nested


def test_the_right_law_wins_on_texts_that_it_has_not_seen() -> None:
    power = select_decay(kernel_of(J**-1.5), splits=6, first=5, last=40)
    assert power.scores["exponential"] > 5 * power.scores[power.best]
    low, high = power.interval["polynomial"]["exponent"]
    assert low < power.fits["polynomial"].parameters["exponent"] < high
    fast = select_decay(kernel_of(np.exp(-0.1 * J)), splits=6, first=2, last=30)
    assert fast.scores["exponential"] < fast.scores["polynomial"] / 5
    assert fast.difference[fast.best] == (0.0, 0.0, 0.0) and fast.difference["polynomial"][1] > 0


def test_the_floor_is_no_law_and_the_seed_fixes_everything() -> None:
    kernel = kernel_of(J**-1.2)
    one, two = (select_decay(kernel, splits=3, seed=5) for _ in range(2))
    assert one.scores == two.scores and one.interval == two.interval and one.floor > 0
    assert select_decay(kernel, splits=3, seed=6).scores != one.scores
    assert len(one.halves["broken"]["at"]) == 6
    raw = select_decay(kernel, splits=3, seed=5, centre=False)
    assert raw.scores != one.scores


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_decay(J**-1.0, "cubic"), "no law 'cubic'"),  # type: ignore[arg-type]
        (lambda: fit_decay(J**-1.0, first=10, last=15), "at least twelve ranks"),
        (lambda: fit_decay(J**-1.0, first=0, last=50), "positive eigenvalues"),
        (lambda: fit_decay(np.r_[np.ones(20), np.zeros(30)], first=1, last=40), "20 positive"),
        (lambda: select_decay(kernel_of(J**-1.0, 40), last=30), "half of 40 texts has 20"),
        (lambda: select_decay(kernel_of(J**-1.0, 80), splits=0), "at least 1"),
        (lambda: select_decay(kernel_of(J**-1.0, 80).block([1, 2], [3])), "square"),
    ],
)
def test_bad_input_is_one_clear_line(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
