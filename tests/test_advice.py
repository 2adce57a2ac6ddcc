"""The advice against the rules it is made of, and each warning against a case that must and one that must not raise it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ntkft
from ntkft import Kernel, Task, printed, stopping
from ntkft.advice import LOSSES, RULES, WholePath, drift_probe, stopping_advice
from ntkft.errors import InputError
from ntkft.files import sha256_text
from tests import tiny
from tests.helpers import relabelled


def problem(n=60, sigma=0.5, seed=0, decay=1.5, size=1.0):
    """A centred kernel with power-law eigenvalues, a target of norm `size` in its space, one noisy label for each text."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((n, n))
    basis[:, 0] = 1.0
    vectors = np.linalg.qr(basis)[0][:, ::-1]  # the constant is the last one
    values = np.arange(1, n + 1) ** -decay
    values[-1] = 0.0
    theta = rng.standard_normal(n) * np.sqrt(values)
    theta *= size / np.sqrt((theta[:-1] ** 2 / values[:-1]).sum())
    truth = vectors @ theta * np.sqrt(n)
    y = truth + sigma * rng.standard_normal(n)
    texts = [f"text {i}" for i in range(n)]
    kernel = Kernel(n * (vectors * values) @ vectors.T, np.zeros(n), texts=tuple(map(sha256_text, texts)))
    return Task("toy", texts, y, truth, sigma**2), kernel


# --- The numbers ----------------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_library():
    task, kernel = problem(size=5.0)
    advice = stopping_advice(None, task, kernel=kernel, norm=0.7)
    descent = ntkft.descend(kernel, task.y, intercept=True)
    expected = {
        "rademacher": stopping.rademacher_rule(descent.spectrum, 0.5, 0.7),
        "sure": stopping.sure_rule(descent, 0.5),
        "discrepancy": stopping.discrepancy_rule(descent, 0.5),
    }
    for name, stop in expected.items():
        assert advice.rules[name]["eta"] == pytest.approx(stop.eta, rel=1e-6), name
    assert set(advice.rules) == set(RULES) and advice.rule == "discrepancy" and advice.sigma_from == "given"
    assert advice.stop_error == pytest.approx(float(descent.residual(advice.eta))) == pytest.approx(0.25)


@pytest.mark.parametrize("loss", LOSSES)
def test_steps_and_epochs(loss):
    task, kernel = problem(size=5.0)
    advice = stopping_advice(None, task, kernel=kernel, step_size=0.03, batch_size=4, loss=loss)
    steps = int(advice.eta / (0.03 * {"mse": 2, "half-mse": 1}[loss]))
    assert advice.steps == steps and advice.epochs == pytest.approx(steps * 4 / 60) and not advice.suggested
    top = kernel.spectrum().eigenvalues[0]
    assert advice.largest_step == pytest.approx({"mse": 1, "half-mse": 2}[loss] / top)
    assert stopping_advice(None, task, kernel=kernel, loss=loss).step_size == pytest.approx(advice.largest_step / 4)


def test_the_largest_step_is_where_descent_turns():
    """In plain simulated descent on MSELoss: below the largest step the error falls, above it grows."""
    task, kernel = problem(size=5.0)
    largest = stopping_advice(None, task, kernel=kernel).largest_step
    for rate, falls in ((0.98 * largest, True), (1.02 * largest, False)):
        left = task.y.copy()
        for _ in range(500):
            left = left - 2 * rate * kernel.matrix @ left / len(task)
        assert bool((left**2).mean() < (task.y**2).mean()) is falls


def test_centred_batches_allow_larger_steps():
    task, kernel = problem(size=5.0)
    shifted = Kernel(kernel.matrix + 50.0, kernel.scores)
    plain, centred = (stopping_advice(None, task, kernel=shifted, centred_batches=flag) for flag in (False, True))
    assert plain.largest_step == pytest.approx(1 / 50) and centred.largest_step == pytest.approx(1.0)
    assert centred.step_size == pytest.approx(centred.largest_step / 4)
    assert any("constant direction limits" in text for text in plain.warnings)
    assert not any("constant direction limits" in text for text in centred.warnings)


def test_part_of_the_texts_speaks_for_all():
    """Half of the texts: the training error on all of them, in expectation over labels, from the path of the half."""
    rng = np.random.default_rng(1)
    n, m, sigma, eta = 400, 200, 0.6, np.array([0.5, 2.0, 10.0])
    features = rng.standard_normal((n, 40)) * np.arange(1, 41) ** -0.5
    truth = features @ rng.standard_normal(40) * 0.3
    all_texts, half = (ntkft.descend(features[:k] @ features[:k].T, truth[:k], intercept=True) for k in (n, m))
    whole, guessed = np.zeros(3), np.zeros(3)
    for _ in range(60):
        y = truth + sigma * rng.standard_normal(n)
        whole += relabelled(all_texts, y).residual(eta) / 60
        guessed += WholePath(relabelled(half, y[:m]), n, sigma).residual(eta) / 60
    np.testing.assert_allclose(guessed, whole, rtol=0.06)
    naive = half.residual(eta[-1]) + 0  # without the correction the half fits its noise better
    assert abs(guessed[-1] - whole[-1]) < abs(naive - whole[-1])


def test_with_all_texts_the_path_is_the_path():
    task, kernel = problem(size=5.0)
    descent = ntkft.descend(kernel, task.y, intercept=True)
    path = WholePath(descent, len(task), 0.5)
    np.testing.assert_array_equal(path.residual([0.1, 1.0]), descent.residual([0.1, 1.0]))
    assert path.n == 60


def test_a_part_gives_nearly_the_stops_of_the_whole():
    rng = np.random.default_rng(2)
    n = 600
    features = rng.standard_normal((n, 200)) * np.arange(1, 201) ** -0.6
    truth = features @ (rng.standard_normal(200) * np.arange(1, 201) ** -0.6)
    task = Task("toy", [str(i) for i in range(n)], truth + rng.standard_normal(n), truth, 1.0)
    hashes = tuple(map(sha256_text, task.texts))
    kernel = Kernel(features @ features.T, np.zeros(n), texts=hashes)
    rows = np.sort(rng.permutation(n)[:200])
    whole, part = (stopping_advice(None, task, kernel=k) for k in (kernel, kernel.block(rows)))
    assert part.used == 200 and part.n == whole.used == 600
    for rule in ("rademacher", "sure", "discrepancy"):
        assert part.rules[rule]["eta"] == pytest.approx(whole.rules[rule]["eta"], rel=0.35), rule
    alone = stopping_advice(None, task.subset(rows), kernel=kernel.block(rows))
    assert alone.rules["rademacher"]["eta"] < 0.75 * whole.rules["rademacher"]["eta"]  # fewer texts stop earlier


def test_kernels_are_matched_by_their_texts():
    task, kernel = problem(size=5.0)
    order = np.random.default_rng(3).permutation(60)
    same = stopping_advice(None, task, kernel=kernel.block(order))
    assert same.rules["sure"]["eta"] == pytest.approx(stopping_advice(None, task, kernel=kernel).rules["sure"]["eta"], rel=1e-6)
    with pytest.raises(InputError, match="60 of the kernel's 60 texts are not among"):
        stopping_advice(None, Task("other", [t + "!" for t in task.texts], task.y, task.y), kernel=kernel)
    with pytest.raises(InputError, match="59 of the kernel's 59"):
        stopping_advice(None, task, kernel=Kernel(kernel.matrix[:59, :59], np.zeros(59)))


# --- The noise --------------------------------------------------------------------------------------------------


def test_sigma_is_estimated_where_the_signal_is_clear():
    found = []
    for seed in range(10):
        task, kernel = problem(n=200, sigma=0.3, seed=seed, decay=2.5)
        unknown = Task("toy", task.texts, task.y, task.reference)
        advice = stopping_advice(None, unknown, kernel=kernel)
        assert advice.sigma_from == "estimated" and advice.rule == "gcv"
        assert any("σ is unknown" in text for text in advice.warnings)
        found.append(advice.sigma)
    assert np.mean(found) == pytest.approx(0.3, rel=0.08)


def test_gcv_never_spends_more_than_half_of_the_freedom():
    """A target that is all in the last directions: GCV's own minimum is at interpolation, 0/0."""
    task, kernel = problem(n=40, sigma=0.01, decay=0.2)
    descent = ntkft.descend(kernel, task.y, intercept=True)
    assert descent.degrees_of_freedom(stopping.gcv_rule(descent).eta) > 20
    advice = stopping_advice(None, Task("t", task.texts, task.y, task.y), kernel=kernel)
    assert descent.degrees_of_freedom(advice.rules["gcv"]["eta"]) <= 20


def test_measured_noise_is_named():
    task = ntkft.load_task("tweets", n=40, seed=0)
    kernel = Kernel(np.diag(np.arange(1.0, 41)), np.zeros(40))
    advice = stopping_advice(None, task, kernel=kernel)
    assert advice.sigma_from == "measured from single ratings" and advice.sigma == pytest.approx(task.noise_variance**0.5)
    assert stopping_advice(None, task, kernel=kernel, sigma=0.5).sigma == 0.5


# --- Warnings ---------------------------------------------------------------------------------------------------


def said(words, task=None, kernel=None, **options):
    made, matrix = problem(size=5.0)
    advice = stopping_advice(None, task or made, kernel=kernel or matrix, **options)
    return any(words in text for text in advice.warnings)


def test_each_warning_has_its_case():
    task, kernel = problem(size=5.0)
    again = {"kernel": kernel}

    def labelled(y):
        return Task("toy", task.texts, y, y, 0.25)

    assert said("two values", labelled(np.sign(task.y)), **again) and not said("two values")
    assert said("All labels are 2", labelled(np.full(60, 2.0)), **again) and not said("All labels")
    assert said("larger than the labels' own", sigma=50.0) and not said("larger than the labels' own")
    assert said("before training", sigma=50.0) and not said("before training")
    top = stopping_advice(None, task, kernel=kernel).largest_step
    assert said("diverges", step_size=1.1 * top) and not said("diverges", step_size=0.9 * top)
    assert said("swings", step_size=0.6 * top) and not said("swings", step_size=0.4 * top)
    assert said("take a smaller learning rate", step_size=0.4 * top, batch_size=1)
    assert not said("take a smaller learning rate", batch_size=60)
    assert said("learning rate is small", step_size=1e-4 * top) and not said("epochs: ", batch_size=1)
    assert said("rules disagree", norm=100.0)
    assert said("not the kernel", kernel=Kernel(60 * np.eye(60), np.zeros(60)), norm=100.0) and not said("not the kernel")
    assert said("before the strongest direction", norm=1e-3) and not said("before the strongest direction", norm=30.0)
    assert said("With AdamW", optimizer="adamw") and not said("With AdamW")
    assert not said("diverges", step_size=1.1 * top, optimizer="adamw")  # no kernel time, no such bound


def test_cross_entropy_begins_as_squared_loss_towards_twice_the_label():
    """What the warning says: at f = 0 the gradient of log(1 + e^{-yf}) is (f - 2y)/4 up to third order."""
    f = np.array([-0.05, 0.0, 0.05])
    for y in (-1.0, 1.0):
        gradient = -y / (1 + np.exp(y * f))
        np.testing.assert_allclose(gradient, (f - 2 * y) / 4, atol=0.05**3 / 48 * 1.01)


# --- Output -----------------------------------------------------------------------------------------------------


def test_text_and_json_tell_the_same():
    task, kernel = problem(size=5.0)
    advice = stopping_advice(None, task, kernel=kernel, sigma=0.4, step_size=0.02)
    values = json.loads(json.dumps(advice.to_dict()))
    assert values["steps"] == advice.steps and values["rules"]["discrepancy"]["eta"] == advice.eta and values["drift"] is None
    assert values["warnings"] == list(advice.warnings) and "curves" not in values
    text = str(advice)
    assert text.startswith("stop ") and f"= {advice.steps:,} steps of 16 texts" in text and "σ = 0.4 (given)" in text
    assert advice.warnings and max(map(len, text.splitlines())) <= printed.WIDTH
    flat = " ".join(text.split())
    assert all(" ".join(note.split()) in flat for note in advice.warnings) and text.count("Note: ") == len(advice.warnings)
    adam = str(stopping_advice(None, task, kernel=kernel, optimizer="adamw"))
    assert "when the training error (mean square) has fallen to" in adam.splitlines()[0]


def test_options_and_names_are_printed_whole():
    name = "HuggingFaceTB/" + "x" * printed.WIDTH
    lines = printed.sentence(f"{'word ' * 15}--check-drift measures {name} and more", 4).splitlines()
    assert len(lines) == 4 and lines[1].startswith("    --check-drift") and lines[2] == f"    {name}"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, suffix):
    task, kernel = problem(size=5.0)
    advice = stopping_advice(None, task, kernel=kernel)
    figure = advice.plot(tmp_path / f"stop.{suffix}")
    ax = figure.axes[0]
    assert [p.name for p in tmp_path.iterdir()] == [f"stop.{suffix}"] and (tmp_path / f"stop.{suffix}").stat().st_size > 5000
    stops = {line.get_xdata()[0] for line in ax.lines if str(line.get_label()).startswith("stop")}
    assert stops == {row["eta"] for row in advice.rules.values()}
    risk = next(line for line in ax.lines if "risk" in str(line.get_label()))
    lowest = risk.get_xdata()[np.argmin(risk.get_ydata())]
    assert lowest == pytest.approx(advice.rules["sure"]["eta"], rel=0.1)
    (top,) = ax.child_axes  # epochs
    figure.canvas.draw()
    assert top.get_xlim()[1] / ax.get_xlim()[1] == pytest.approx(16 / (2 * advice.step_size * 60))
    with pytest.raises(InputError, match=r"stop\.txt"):
        advice.plot(tmp_path / "stop.txt")


# --- A real model -------------------------------------------------------------------------------------------------


def test_on_a_network():
    readout = ntkft.pooled_readout(tiny.bert())
    texts = tiny.TEXTS[:8]
    y = np.random.default_rng(0).standard_normal(8)
    task = Task("tiny", texts, y, y, 0.09)
    before = readout.scores(texts)
    advice = stopping_advice(readout, task, check_drift=True, progress=False)
    np.testing.assert_array_equal(readout.scores(texts), before)  # the probe put the weights back
    assert advice.used == 8 and advice.drift["texts"] == 8 and 0 < advice.drift["eta"] <= advice.eta / 4
    assert any("After kernel time" in text for text in advice.warnings)
    part = stopping_advice(readout, task, max_texts=5, progress=False)
    assert part.used == 5 and part.n == 8


def test_the_probe_sees_a_kernel_that_moves():
    """Longer training moves the kernel further; none does not move it."""
    readout = ntkft.pooled_readout(tiny.bert())
    task = Task("tiny", tiny.TEXTS[:8], y := 3 * np.random.default_rng(0).standard_normal(8), y)
    moved = [drift_probe(readout, task, eta) for eta in (0.0, 0.001, 0.01)]
    assert moved[0]["lambda_1"] == moved[0]["eta"] == 0
    assert 0 < abs(moved[1]["trace"]) < abs(moved[2]["trace"])
    assert len(drift_probe(readout, task, 0.1, size=3)) == 4


def test_what_does_not_fit():
    task, kernel = problem(size=5.0)
    for options, words in (
        ({"loss": "l1"}, "loss is 'l1'"),
        ({"rule": "luck"}, "rule is 'luck'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"norm": 0.0}, "norm is 0.0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"check_drift": True}, "readout is None"),
        ({"kernel": None}, "readout is None"),
        ({"kernel": kernel.block([0, 1], [2, 3])}, "square kernel"),
    ):
        with pytest.raises(InputError, match=words):
            stopping_advice(None, task, **({"kernel": kernel} | options))
    with pytest.raises(InputError, match="3 texts"):
        stopping_advice(None, task.subset([0, 1, 2]), kernel=kernel)
