"""The analysis of the task runs in a world where it must come out exactly: scores that are linear in the vectors."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

import ntkft
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.experiments import many_tasks, task_run_list, task_runs, task_vectors
from ntkft.experiments.task_runs import KINDS, LINE, SCALES
from ntkft.experiments.task_vectors import FamilyRuns, predicted
from ntkft.multitask import Joint
from tests import tiny
from tests.test_task_runs import NAMES, TEST, N, Small


@pytest.fixture(scope="module")
def runs():
    patch = pytest.MonkeyPatch()
    setting = task_runs.Setting(NAMES, N, TEST, 0.1, True, (("amazon", "movies"), ("nyt", "tweets")), (-1.0, 0.0, 1.0))
    patch.setitem(task_runs.SETTINGS, "minilm", setting)
    family = Small("minilm", 3)
    rng = np.random.default_rng(0)
    size = len(family.texts)
    features = rng.standard_normal((size, 2 * size)) * np.arange(1, 2 * size + 1) ** -0.5
    data = {
        "start/kernel": features @ features.T,
        "start/scores": rng.standard_normal(size),
        "start/eta": np.full(len(family.labels), 2.0),
        "start/step_size": np.array(0.5),
        "joint-4/epochs": np.array([4, 16]),
    } | {f"train-{label}/early": np.array(4 + (label == "nyt")) for label in family.labels}
    closed = {kind: predicted(family, data, kind) for kind in KINDS}
    for kind, vectors in closed.items():
        data |= simulated(family, vectors, data["start/scores"], kind)
    four = TaskVectors(data["start/kernel"], closed["early"].tunings[:4], data["start/scores"])
    data["joint-4/scores"] = data["start/scores"] + np.stack([Joint(four).move(2.0)] * 2)
    yield FamilyRuns(family, data, closed)
    patch.undo()


def simulated(family, vectors, start, kind):
    """What `task_runs` would have measured if scores were linear."""
    labels = family.labels.index

    def at(parts, rows=slice(None)):
        return (start + sum(c * vectors.moves[labels(name)] for name, c in parts.items()))[rows]

    names = family.setting.tasks
    two = list(itertools.combinations(names, 2))
    both = [np.concatenate([family.rows(a), family.rows(b)]) for a, b in two]
    held = [np.concatenate([family.rows(a)[N:], family.rows(b)[N:]]) for a, b in family.setting.pairs]
    grid = family.setting.plane
    line = []
    for k, name in enumerate(names):
        rows = np.concatenate([family.rows(name), family.rows(names[(k + 1) % len(names)])])
        line.append([at({name: c}, rows) for c in LINE])
    found = {
        "single": [at({name: 1.0}) for name in family.labels],
        "sum": [[at(dict.fromkeys(NAMES, c)) for c in SCALES]],
        "merge": [[at(dict.fromkeys(NAMES, c)) for c in SCALES]] * 2,
        "pairs": [at({a: 1.0, b: 1.0}, rows) for (a, b), rows in zip(two, both, strict=True)],
        "line": line,
        "plane": [
            [[at({a: one, b: other}, rows) for other in grid] for one in grid]
            for (a, b), rows in zip(family.setting.pairs, held, strict=True)
        ],
        "analogy": [
            at({s: 1.0, f"length-{s}": -1.0, f"length-{d}": 1.0}, family.rows(d)) for s, d in itertools.permutations(NAMES, 2)
        ],
    }
    out = {f"{what}-{kind}/scores": np.array(values) for what, values in found.items()}
    return out | {f"single-{kind}/gram": vectors.gram()[:4, :4]}


@pytest.mark.parametrize("kind", KINDS)
def test_told_is_found(runs, kind):
    single = task_vectors.singles(runs, kind)
    np.testing.assert_allclose(single[..., 0], 1, atol=1e-9)
    np.testing.assert_allclose(single[..., 1], 0, atol=1e-9)
    sums = task_vectors.sums(runs, kind)
    assert sums.shape == (1, len(SCALES), 4, 2, 2)
    np.testing.assert_allclose(sums[..., 1], 0, atol=1e-9)
    told, found = task_vectors.lines(runs, kind)["losses"]
    np.testing.assert_allclose(found, told, rtol=1e-9)
    assert told.shape == (4, 3, len(LINE) + 1) and (told[..., np.searchsorted(LINE, 0)] == 1).all()
    pairs = task_vectors.analogies(runs, kind)
    np.testing.assert_allclose(pairs[:, :2], pairs[:, 3:], rtol=1e-9)
    own = [float(runs.vectors[kind].loss(k, runs.vectors[kind].moves[k], True)) for k in range(4)]
    zero = [float(runs.vectors[kind].loss(k, np.zeros(len(runs.family.texts)), True)) for k in range(4)]
    targets = [d for _, d in itertools.permutations(range(4), 2)]
    np.testing.assert_allclose(pairs[:, 2], [own[d] / zero[d] for d in targets], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_clock_is_epochs_times_steps_times_step_size(runs, kind):
    """All labels were trained for four epochs of one step of ½, the foretold time; one label for longer."""
    longer = np.array([label == "nyt" for label in runs.family.labels])
    np.testing.assert_allclose(runs.trained_time, np.where(longer, 2.5, 2.0))
    clock = task_vectors.singles_by_clock(runs, kind)
    np.testing.assert_allclose(clock[~longer], task_vectors.singles(runs, kind)[~longer], atol=1e-9)
    assert (clock[longer][..., 1] > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_planes_and_pairs(runs, kind):
    told, found = many_tasks.planes(runs, kind)
    np.testing.assert_allclose(found, told, rtol=1e-9, atol=1e-12)
    assert found[0, 1, 1] == pytest.approx(0) and (found[0, 2, 1] > 0).all()
    pairs = many_tasks.pair_losses(runs, kind)
    assert len(pairs["told"]) == 12
    np.testing.assert_allclose(pairs["found"], pairs["told"], atol=1e-9)
    vectors = runs.vectors[kind]
    a, b = int(pairs["own"][1]), int(pairs["other"][1])
    assert (a, b) == (1, 0)
    cost = vectors.loss(a, vectors.moves[a] + vectors.moves[b], True) - vectors.loss(a, vectors.moves[a], True)
    assert pairs["told"][1] == pytest.approx(float(cost / vectors.loss(a, 0 * vectors.moves[a], True)))


def test_joint_training_and_sums(runs):
    found = many_tasks.joint_training(runs)
    np.testing.assert_allclose(found["joint"], found["joint_told"], rtol=1e-9)
    np.testing.assert_allclose(found["joint"], found["joint_clock"], rtol=1e-9)  # four epochs of ½ are the foretold time
    np.testing.assert_allclose(
        many_tasks.linear_losses(runs, "early"), many_tasks.losses(runs, runs.moved("sum-early"), "early")[0], rtol=1e-9
    )


def test_the_constant_and_the_accuracy_are_those_of_their_definitions(runs):
    vectors, start = runs.vectors["early"], runs.data["start/scores"]
    found = many_tasks.constant_losses(runs)
    a = 2
    reference = np.asarray(vectors.tunings[a].reference)
    rows = vectors.held_out[a]
    offset = (np.asarray(vectors.tunings[a].y) - start[vectors.rows[a]]).mean()
    before = ((reference - start[rows] - offset) ** 2).mean()
    assert found[a] == pytest.approx(reference.var() / before)
    assert np.isnan(many_tasks.accuracies(runs, np.zeros((2, len(start))), "early")).all()  # ratings have no right side


def test_accuracy_counts_the_texts_on_the_right_side():
    tuning = FineTuning([0, 1], [1.0, -1.0], 1.0, None, True, [2, 3, 4, 5], [1.0, 1.0, -1.0, -1.0])
    vectors = TaskVectors(np.eye(6), [tuning])
    world = SimpleNamespace(vectors={"early": vectors}, family=SimpleNamespace(setting=SimpleNamespace(tasks=("one",))))
    moves = np.array([[1.0, -1.0, 2, 2, -2, 2], [1.0, -1.0, 2, 2, -2, -2], [9.0, 7.0, 9, 7, 9, 7]])
    assert many_tasks.accuracies(world, moves, "early")[:, 0].tolist() == [0.75, 1.0, 0.5]


def test_rank_correlation_of_one_order_is_one_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(0)
    told = rng.standard_normal((3, 30))
    assert many_tasks.rank_correlation(told, told**3)[0] == pytest.approx(1)
    value, low, high = many_tasks.rank_correlation(told, told + rng.standard_normal((3, 30)), draws=300)
    assert low < value < high and 0.3 < value < 0.9


def test_rank_correlation_gives_ties_their_mean_rank():
    told, found = np.random.default_rng(0).integers(0, 4, (2, 3, 30)).astype(float)
    expected = np.mean([spearmanr(t, f).statistic for t, f in zip(told, found, strict=True)])
    assert many_tasks.rank_correlation(told, found, draws=10)[0] == pytest.approx(expected, abs=1e-12)


def test_tangent_vectors_do_in_the_linearised_model_what_the_kernel_says():
    readout = ntkft.pooled_readout(tiny.bert())
    texts = [f"{text} {k}" for k, text in enumerate(tiny.TEXTS)]
    y = np.random.default_rng(0).standard_normal(len(texts))
    found = task_vectors.tangent_check(readout, texts, y, 4, (0.5, 2.0))
    assert found["error"].max() < 1e-4
    assert np.abs(found["found"]).max() > 1e-3


def test_families_are_packed_and_read_back(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(task_run_list, "FOLDER", tmp_path)
    assert task_run_list.load(runs.family) is None
    size = len(runs.family.texts)
    data = runs.data | {"start/kernel": runs.data["start/kernel"][np.triu_indices(size)]}
    np.savez_compressed(tmp_path / f"{runs.family.key}.npz", **data)
    again = FamilyRuns.load(runs.family)
    assert again is not None
    np.testing.assert_allclose(again.data["start/kernel"], runs.data["start/kernel"])
    np.testing.assert_allclose(again.vectors["over"].moves, runs.vectors["over"].moves)
