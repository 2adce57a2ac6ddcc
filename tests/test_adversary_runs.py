"""Encoders that forget, on little data: what a run keeps, and that the penalties push where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkft.experiments import adversaries, adversary_runs, audits, forgetting
from ntkft.experiments.adversary_runs import PENALTIES, Forget
from ntkft.tabular import COLUMNS, Table, load_adult


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(adversary_runs, "TOY_STEPS", 60)
    monkeypatch.setattr(adversary_runs, "TOY_EVERY", 20)
    monkeypatch.setattr(adversary_runs, "TOY_BATCH", 512)
    monkeypatch.setattr(adversary_runs, "RATE", 1e-2)


@pytest.mark.parametrize("kind", PENALTIES)
def test_toy_starts_at_its_information_and_the_penalties_lower_it(short, kind):
    found = adversary_runs.toy(Forget("toy", kind, 20.0 if kind != "club" else 0.05, 0))
    assert found["information"][0] == pytest.approx(0.5 * np.log(1 + 1 / adversary_runs.TOY_NOISE), rel=1e-6)
    last = 60 if kind in adversary_runs.SLICES else 120  # an adversary's step is cheaper
    assert found["step"].tolist() == list(range(0, last + 1, 20)) and (np.diff(found["spent"]) > 0).all()
    left = found["information"][-1]
    assert left < 0.7 if kind in (*adversary_runs.SLICES, "renyi") else left > 0.7  # CLUB with this weight is slow


def test_one_seed_is_one_run(short):
    one, two = (adversary_runs.toy(Forget("toy", "renyi", 5.0, 3)) for _ in range(2))
    assert np.array_equal(one["information"], two["information"])
    other = adversary_runs.toy(Forget("toy", "renyi", 5.0, 4))
    assert not np.array_equal(one["information"], other["information"])


def test_planted_leaks_are_found_as_often_as_predicted(monkeypatch):
    monkeypatch.setattr(adversaries, "STEPS", (1, 5, 30, 100))
    found = adversaries.planted(300, seed=1)
    error = np.sqrt(found["predicted"] * (1 - found["predicted"]) / 300)
    assert (np.abs(found["detected"] - found["predicted"]) < 4 * np.maximum(error, 5e-3)).all()
    assert (found["false"] < 0.12).all() and found["predicted"][0, 0] > 0.9 > 0.2 > found["predicted"][3, 0]
    assert (np.diff(found["passed"], axis=1) >= 0).all()  # the share that a filter passes only grows


def test_a_network_adversary_hears_a_low_frequency_first():
    low, high = (adversaries.network_adversary(f, 0, (0, 60), n=600)["reports"][-1] for f in (0.5, 4.0))
    assert low > 0.5 > high


def test_the_cost_of_a_step_is_measured_for_each_penalty_and_more_adversary_costs_more(short):
    seconds = forgetting.step_seconds(2, steps=20)
    assert all(rounds.shape == (2,) for rounds in seconds.values())
    costs = {name: rounds.min() for name, rounds in seconds.items()}
    assert set(costs) == {"slice x1", "renyi x1", "renyi x5", "club x1", "club x5"}
    assert costs["renyi x5"] > costs["renyi x1"] > 0


def test_runs_of_different_lengths_are_padded_with_nothing():
    both = forgetting.padded([[np.array([1.0, 2.0]), np.array([3.0])]])
    assert both.shape == (1, 2, 2) and both[0, 0].tolist() == [1, 2] and np.isnan(both[0, 1, 1]) and both[0, 1, 0] == 3
    assert forgetting.padded([[np.array(1.0)], [np.array(2.0)]]).tolist() == [[1.0], [2.0]]


def test_the_runs_are_each_named_once():
    keys = [run.key for data in forgetting.SETTINGS for row in forgetting.runs(data) for run in row]
    assert len(set(keys)) == len(keys) > 100
    first = forgetting.runs("adult")[1][2]
    assert (first.penalty, first.beta, first.inner, first.seed) == (*forgetting.ADULT[1], 2)


def test_equal_time_is_counted_in_seconds_and_not_in_steps():
    information = np.array([[[1.6, 0.5, 0.05, 0.2, 0.004]], [[1.6, 1.0, 0.4, np.nan, np.nan]]])
    step = np.array([[[0.0, 10, 20, 30, 40]], [[0.0, 10, 20, np.nan, np.nan]]])
    costs = np.array([0.1, 0.4])
    assert forgetting.at_equal_time(information, step, costs, 4.0).tolist() == [[0.004], [1.0]]
    assert forgetting.at_equal_time(information, step, costs, 2.9).tolist() == [[0.05], [1.6]]
    assert forgetting.at_equal_time(information, step, costs, 99.0).tolist() == [[0.004], [0.4]]
    # the fourth look is above again, so 0.1 is reached for good at the fifth
    assert forgetting.time_to(0.1, information, step, costs).tolist() == [[4.0], [np.inf]]
    assert forgetting.time_to(0.6, information, step, costs).tolist() == [[1.0], [8.0]]
    assert forgetting.time_to(0.4, information, step, costs).tolist() == [[2.0], [8.0]]


@pytest.fixture
def people(monkeypatch):
    """Seven columns: the first tells the task, the second the attribute, in which the task has a share."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 7)).astype(np.float32)
    t = (x[:, 1] > 0).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.float32)
    table = Table(x, y, t, 1000, tuple(f"column {k}" for k in range(7)))
    monkeypatch.setattr(adversary_runs, "load_adult", lambda: table)
    monkeypatch.setattr(adversary_runs, "ADULT_BATCH", 250)
    monkeypatch.setattr(adversary_runs, "ADULT_EPOCHS", 60)


def test_the_census_is_described_by_its_test_part(people, monkeypatch):
    table = adversary_runs.load_adult()
    monkeypatch.setattr(forgetting, "load_adult", lambda: table)
    known, y, t = forgetting.census(), table.y[1000:], table.t[1000:]
    assert (known["train"], known["test"], known["batches"]) == (1000, 500, 240)
    assert known["base"] == pytest.approx((y == 0).mean()) and known["income_and_sex"] == pytest.approx(np.corrcoef(y, t)[0, 1])


def test_an_encoder_of_the_census_forgets_and_an_auditor_says_so(people, monkeypatch):
    monkeypatch.setattr(adversary_runs, "resumable", lambda module, key, compute: compute())  # nothing is kept
    monkeypatch.setattr(audits, "NETWORKS", 0)
    kept, lost = (adversary_runs.audited(Forget("adult", *how)) for how in (("none", 0.0, 0), ("slice", 3.0, 0)))
    assert kept["right"] > 0.9 and kept["utility"][0] > 0.8 and kept["leakage"][0] > 0.5
    assert lost["leakage"][0] < kept["leakage"][0] - 0.25 and lost["utility"][0] > lost["leakage"][0]
    for found in (kept, lost):
        assert (found["leakage"][1] <= found["leakage"][0] <= found["leakage"][2]) and found["task"].shape == (60,)


@pytest.mark.slow
def test_the_census_table():
    people = load_adult()
    assert people.x.shape[0] == 48842 and people.train == 32561
    assert not any(name.startswith(("sex", "income", "fnlwgt")) for name in people.names) and len(COLUMNS) == 15
    assert people.y.mean() == pytest.approx(0.2393, abs=1e-3) and people.t.mean() == pytest.approx(0.3315, abs=1e-3)
    assert torch.isfinite(torch.tensor(people.x)).all()
    numbers = people.x[: people.train, [people.names.index("age"), people.names.index("hours-per-week")]]
    np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(numbers.std(0), 1, atol=1e-3)
