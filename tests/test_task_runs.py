"""The training runs behind the chapters on task vectors, on a tiny model: what is stored is what the definitions say."""

from __future__ import annotations

import numpy as np
import pytest

import ntkft
from ntkft.descent import descend
from ntkft.experiments import task_runs
from ntkft.experiments.task_runs import Family, Setting
from ntkft.finetune import train
from ntkft.tasks import Task
from tests import tiny

N, TEST = 8, 4
NAMES = ("amazon", "movies", "nyt", "tweets")


class Small(Family):
    """Four tasks of twelve texts for a tiny model."""

    @property
    def tasks(self):
        rng = np.random.default_rng(self.seed)
        found = {}
        for k, name in enumerate(NAMES):
            texts = [f"{tiny.TEXTS[i % len(tiny.TEXTS)]} {name} {i * k}" for i in range(N + TEST)]
            ratings = [rng.normal(np.sin(i + k), 0.1, 6) for i in range(N + TEST)]
            reference = np.array([r.mean() for r in ratings])
            found[name] = Task(name, texts, reference, reference, ratings=ratings).redraw(1, seed=self.seed)
        return found

    def readout(self):
        return ntkft.pooled_readout(tiny.bert(), seed=self.seed)


@pytest.fixture
def family(monkeypatch, tmp_path):
    monkeypatch.setenv("NTKFT_HOME", str(tmp_path))
    setting = Setting(NAMES, N, TEST, 0.1, True, (("amazon", "movies"),), (-1.0, 0.0, 1.0))
    monkeypatch.setitem(task_runs.SETTINGS, "minilm", setting)
    for name, value in (("BATCH", 4), ("MOST", 3), ("SCALES", (0.5, 1.0)), ("LINE", (-1.0, 1.0))):
        monkeypatch.setattr(task_runs, name, value)
    task_runs.vector.cache_clear()
    task_runs._LAST.clear()
    return Small("minilm", 3)


def test_tangent_vector_moves_the_tangent_where_the_kernel_says(family):
    about = task_runs.start(family)
    tau = task_runs.vector(family, "nyt", "tangent")
    rows = family.rows("nyt")[:N]
    own, y = about["kernel"][np.ix_(rows, rows)].astype(float), family.values("nyt")[0][:N]
    path = descend(own, y, about["scores"][rows], intercept=True)
    k = family.labels.index("nyt")
    step = 1e-3
    moved = task_runs.scores(family, {"nyt": step}, "tangent")
    expected = about["kernel"][:, rows].astype(float) @ path.coefficients(float(about["eta"][k]))
    np.testing.assert_allclose((moved - about["scores"]) / step, expected, atol=2e-3 * np.abs(expected).max())
    length = path.coefficients(float(about["eta"][k]))
    assert tau.norm() ** 2 == pytest.approx(length @ about["kernel"][np.ix_(rows, rows)] @ length, rel=1e-4)


def test_the_early_vector_is_where_training_was_at_its_stop(family):
    record = task_runs.training(family, "amazon")
    early, k = int(record["early"]), family.labels.index("amazon")
    assert len(record["residual"]) == task_runs.OVER * early + 1
    assert (record["residual"][1:early] > record["level"]).all()
    readout, rows = family.readout(), family.rows("amazon")[:N]
    for epoch in range(1, early + 1):
        step = float(task_runs.start(family)["step_size"])
        seed = 1000 * family.seed + 50 * k + epoch
        texts, y = [family.texts[i] for i in rows], family.values("amazon")[0][:N]
        train(readout, texts, y, step_size=step, epochs=1, batch_size=4, intercept=True, seed=seed, progress=False)
    np.testing.assert_allclose(task_runs.scores(family, {"amazon": 1.0}, "early"), readout.scores(family.texts), atol=2e-5)
    assert task_runs.vector(family, "amazon", "over").info["epochs"] == task_runs.OVER * early


def test_scores_leave_the_weights_alone_and_add_vectors(family):
    before = task_runs._readout(family).scores(family.texts)
    both = task_runs.scores(family, {"amazon": 0.5, "tweets": -2.0}, "early")
    np.testing.assert_array_equal(task_runs._readout(family).scores(family.texts), before)
    readout = family.readout()
    task_runs.vector(family, "amazon", "early").apply(readout, 0.5)
    task_runs.vector(family, "tweets", "early").apply(readout, -2.0)
    np.testing.assert_allclose(both, readout.scores(family.texts), atol=1e-6)


def test_measures_agree_where_they_meet(family):
    found = {what: task_runs.measure(family, what, "early")["scores"] for what in task_runs.MEASURES}
    rows = {name: family.rows(name) for name in NAMES}
    single = found["single"]
    np.testing.assert_allclose(found["line"][0, 1, : N + TEST], single[0][rows["amazon"]], atol=1e-6)
    both = found["pairs"][0]
    held = np.concatenate([rows["amazon"][N:], rows["movies"][N:]])
    at = np.searchsorted(np.concatenate([rows["amazon"], rows["movies"]]), held)
    np.testing.assert_allclose(found["plane"][0, 2, 2], both[at], atol=1e-6)
    np.testing.assert_allclose(found["plane"][0, 1, 1], task_runs.start(family)["scores"][held], atol=1e-6)
    np.testing.assert_allclose(found["plane"][0, 2, 1], single[0][held], atol=1e-6)
    assert found["sum"].shape == (1, 2, len(family.texts)) and found["merge"].shape == (2, 2, len(family.texts))
    assert found["analogy"].shape == (12, N + TEST)


def test_joint_training_lowers_every_tasks_error_and_stops_after_the_mean_number_of_epochs(family):
    found = task_runs.joint(family, NAMES)
    alone = [int(task_runs.training(family, name)["early"]) for name in NAMES]
    assert found["epochs"][0] == round(np.mean(alone)) and found["scores"].shape == (2, len(family.texts))
    before, after = task_runs.start(family)["scores"], found["scores"][1]
    losses = []
    for scores in (before, after):
        left = [scores[family.rows(n)[:N]] - family.values(n)[0][:N] for n in NAMES]
        losses.append(np.mean([x.var() for x in left]))
    assert losses[1] < losses[0]
