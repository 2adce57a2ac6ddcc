"""Real training against the closed form it should follow while steps are small, and what must not leak out of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.errors import InputError
from ntkft.finetune import _accumulate, preserved_weights, train
from ntkft.ntk.oracle import loop_ntk
from tests import tiny

N = len(tiny.TEXTS)
Y = np.random.default_rng(0).standard_normal(N)
Y[8] = Y[0]  # texts 0 and 8 are the same


@pytest.fixture
def readout():
    return ntkft.pooled_readout(tiny.bert())


def run(readout, y=Y, **options):
    settings = {"step_size": 0.01, "epochs": 3, "progress": False} | options
    return train(readout, tiny.TEXTS, y, **settings)


def weights(readout):
    return {k: v.detach().clone() for k, v in readout.parameters().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- The path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
def test_small_steps_follow_the_linear_path_to_second_order(readout, intercept):
    """Half the kernel time in as many steps: the distance halves, the error of the linear path falls to a quarter."""
    kernel = loop_ntk(readout, tiny.TEXTS)
    f0 = readout.scores(tiny.TEXTS)
    top = np.linalg.eigvalsh(kernel / N)[-1]
    gaps, distances = [], []
    for scale in (0.004, 0.002):
        step = scale / top
        with preserved_weights(readout):
            real = run(readout, step_size=step, epochs=4, intercept=intercept)
        closed = ntkft.descend(kernel, Y, f0, step_size=step, intercept=intercept).fitted(real.eta)
        np.testing.assert_allclose(real.fitted[0], f0 + intercept * (Y - f0).mean(), rtol=0, atol=1e-12)
        gaps.append(np.linalg.norm(real.fitted[1:] - closed[1:], axis=1))
        distances.append(np.linalg.norm(real.fitted[1:] - real.fitted[0], axis=1))
    np.testing.assert_allclose(distances[0] / distances[1], 2, rtol=0.02)
    np.testing.assert_allclose(gaps[0] / gaps[1], 4, rtol=0.1)
    assert (gaps[1] < 0.05 * distances[1]).all()


def test_kernel_time_is_the_sum_of_the_step_sizes(readout):
    with preserved_weights(readout):
        whole = run(readout, epochs=2)
    with preserved_weights(readout):
        batches = run(readout, epochs=2, batch_size=4)  # 3 steps an epoch, the last of a single text
    np.testing.assert_allclose(whole.eta, [0, 0.01, 0.02])
    np.testing.assert_allclose(batches.eta, [0, 0.03, 0.06])
    np.testing.assert_array_equal(batches.epoch, [0, 1, 2])


def test_a_training_reports_what_can_be_recomputed(readout):
    others = ["thin film", "a good plot", "honestly"]
    target = np.array([0.5, -1.0, 2.0])
    before = readout.scores(others)
    path = run(readout, batch_size=2, watch={"held out": (others, target), "train": (tiny.TEXTS, Y)})
    after = readout.scores(others)
    np.testing.assert_allclose(path.errors["held out"][0], ((before - target) ** 2).mean())
    np.testing.assert_allclose(path.errors["held out"][-1], ((after - target) ** 2).mean())
    np.testing.assert_allclose(path.errors["train"], path.residual)
    np.testing.assert_allclose(path.residual, ((path.fitted - Y) ** 2).mean(1))
    np.testing.assert_array_equal(path.fitted[-1], readout.scores(tiny.TEXTS))
    assert path.fitted.shape == (4, N) and len(path.epoch) == len(path.eta) == 4


def test_the_batches_depend_on_the_seed_only(readout):
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        with preserved_weights(readout):
            runs.append(run(readout, batch_size=2, seed=seed, epochs=2).fitted)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0][1] - runs[2][1]).max() > 1e-9


def test_adamw_lowers_the_residual(readout):
    head = readout.module.head.weight
    before = head.detach().clone()
    with preserved_weights(readout):
        run(readout, method="adamw", step_size=3e-3, epochs=1)
        np.testing.assert_allclose(
            (head - before).abs().detach(), 3e-3, rtol=0.05
        )  # Adam's first step is its step size
    path = run(readout, method="adamw", step_size=3e-3, epochs=10, batch_size=4)
    assert path.residual[-1] < 0.7 * path.residual[0]


def test_only_trainable_weights_move(readout):
    for name, p in readout.module.named_parameters():
        p.requires_grad_("attention" in name)
    frozen = {n: p.clone() for n, p in readout.module.named_parameters() if not p.requires_grad}
    trained = weights(readout)
    run(readout)
    assert same(frozen, {n: p for n, p in readout.module.named_parameters() if not p.requires_grad})
    moved = [not torch.equal(p, trained[n]) for n, p in readout.parameters().items()]
    assert sum(moved) >= len(moved) - 2  # a key's bias has no gradient: softmax does not see it


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("part", [1, 2, 4])
def test_a_gradient_in_parts_is_the_gradient(readout, part, intercept):
    token_ids, labels = readout.encode(tiny.TEXTS), torch.tensor(Y)

    def gradient(part):
        readout.module.zero_grad()
        _accumulate(readout, token_ids, labels, intercept, part=part)
        return {k: p.grad.clone() for k, p in readout.parameters().items()}

    whole, parts = gradient(32), gradient(part)
    gap = readout(tiny.TEXTS) - labels
    loss = ((gap - gap.mean() if intercept else gap) ** 2).mean() / 2
    plain = dict(zip(whole, torch.autograd.grad(loss, list(readout.parameters().values())), strict=True))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(whole[name], plain[name], rtol=1e-9, atol=1e-12)


# --- Weights come back --------------------------------------------------------------------------------------


def test_preserved_weights_come_back_to_the_bit(readout):
    before = weights(readout)
    with preserved_weights(readout):
        run(readout)
        assert not same(weights(readout), before)
    assert same(weights(readout), before)


def test_preserved_weights_come_back_after_an_error(readout):
    before = weights(readout)
    with pytest.raises(KeyboardInterrupt), preserved_weights(readout):
        run(readout, epochs=1)
        raise KeyboardInterrupt
    assert same(weights(readout), before)


def test_preserved_weights_come_back_when_they_are_frozen_or_thawed_inside(readout):
    body = dict(readout.model.named_parameters())
    before = weights(readout)
    for p in body.values():
        p.requires_grad_(False)
    with preserved_weights(readout):
        run(readout)
        for p in body.values():
            p.requires_grad_(True)
        run(readout)
        readout.module.head.weight.requires_grad_(False)
    assert same(dict(readout.module.named_parameters()), before)


# --- What does not fit --------------------------------------------------------------------------------------


def test_divergence_is_an_error_and_not_a_path_of_nan(readout):
    with pytest.raises(
        InputError, match=r"Training diverged in epoch \d+ at step_size=1e\+06: take a smaller one"
    ):
        run(readout, step_size=1e6, epochs=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": Y[:-1]}, f"for {N} texts and y has {N - 1} labels"),
        ({"y": np.append(Y[:-1], np.nan)}, "1 of 9 entries of y are not finite, first at index 8"),
        ({"method": "lbfgs"}, "method is 'lbfgs': choose one of sgd, adamw"),
        ({"step_size": 0.0}, "step_size is 0.0 and must be a positive"),
        ({"batch_size": 0}, "batch_size is 0 and must be a positive"),
        ({"batch_size": 0.5}, "batch_size is 0.5 and must be a"),
        ({"watch": {"test": (["good"], [1.0, 2.0])}}, "the targets of test has 2 labels"),
    ],
)
def test_bad_options(readout, options, message):
    before = weights(readout)
    with pytest.raises(InputError, match=message):
        run(readout, **options)
    assert same(weights(readout), before)  # nothing was trained before the error
