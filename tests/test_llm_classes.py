"""Two classes, trained for real, on a tiny model: what is stored, and when a step is stable."""

from __future__ import annotations

import numpy as np
import pytest

import ntkft
from ntkft.experiments import llm_classes, llm_training
from ntkft.experiments.llm_classes import Classes
from ntkft.tasks import Task
from tests import tiny


@pytest.fixture
def made(monkeypatch):
    readout = ntkft.pooled_readout(tiny.bert())
    texts = [f"{text} {word}" for word in ("good", "bad") for text in tiny.TEXTS]
    y = np.where(np.arange(len(texts)) % 2 == 0, 1.0, -1.0)
    kernel = ntkft.empirical_ntk(readout, texts, progress=False)
    n = len(texts) // 2
    monkeypatch.setattr(llm_classes, "N", n)
    monkeypatch.setattr(llm_classes, "TEST", len(texts) - n)
    monkeypatch.setattr(llm_classes, "LOOKS", 16)
    monkeypatch.setattr(llm_classes, "STEPS", {0.1: 16})
    monkeypatch.setattr(llm_classes, "stored", lambda name: (kernel, Task("toy", texts, y, y)))
    monkeypatch.setattr(llm_classes.Wanted, "readout", lambda self: readout)
    return llm_classes._make(Classes("newsgroups", 0.1, 3)), n, kernel, texts


def test_the_kernel_is_that_of_the_texts_in_their_new_order(made):
    found, n, kernel, texts = made
    rows = np.random.default_rng((3, 9)).permutation(len(texts))
    np.testing.assert_allclose(found["kernel"], kernel.matrix[np.ix_(rows, rows)], rtol=1e-6)
    np.testing.assert_allclose(found["scores"][0], kernel.scores[rows], atol=1e-6)
    assert found["kernel_step"].tolist() == [1, 2, 4, 8, 16] and found["kernels"].shape == (5, n, n)


def test_a_small_step_follows_the_kernels_own_path(made, monkeypatch):
    found, n, *_ = made
    monkeypatch.setattr(llm_training, "load", lambda run: found)
    paths = llm_training.classes(Classes("newsgroups", 0.1, 3))
    assert paths is not None
    assert paths["real_train_loss"][0] == pytest.approx(paths["kernel_train_loss"][0], abs=1e-6)
    assert paths["real_train_loss"][-1] < paths["real_train_loss"][0]
    start = found["kernel"][:n, :n] - found["kernel"][:n, :n].mean(0)
    top = np.linalg.eigvalsh(start - start.mean(1)[:, None])[-1] / n
    assert paths["lambda_1"][0] == pytest.approx(top, rel=1e-5)
    assert float(found["step_size"]) * top == pytest.approx(0.4, rel=1e-5)


def test_descent_on_the_logistic_loss_is_stable_below_eight_over_lambda():
    """The Hessian is at most K/4: ε λ_1 / 4 < 2 never raises the loss, and a step beyond it does near the minimum."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 5))
    y = np.sign(features @ rng.standard_normal(5) + rng.standard_normal(40))
    top = np.linalg.eigvalsh(features @ features.T)[-1] / 40

    def loss(w):
        return np.log1p(np.exp(-y * (features @ w))).mean()

    def last(step):
        w = np.zeros(5)
        for _ in range(400):
            w = w + step * features.T @ (y / (1 + np.exp(y * (features @ w)))) / 40
        return loss(w)

    stable, best = last(7.9 / top), last(4 / top)
    assert stable == pytest.approx(best, rel=1e-6)
    assert last(40 / top) > best + 0.05
