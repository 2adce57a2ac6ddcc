"""What fine-tunings do to each other: the report against its definitions, and the command that prints it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import ntkft
from ntkft import cli, cli_tasks, printed
from ntkft.errors import InputError
from ntkft.reports import task_report
from ntkft.task_vectors import TaskVector
from ntkft.tasks import Task
from tests import tiny

N = 12


def make(name: str, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    texts = [f"{tiny.TEXTS[i % len(tiny.TEXTS)]} {name} {i * seed}" for i in range(N)]
    y = rng.standard_normal(N)
    return Task(name, texts, y, y, noise_variance=0.2)


@pytest.fixture(scope="module")
def readout():
    return ntkft.pooled_readout(tiny.bert())


@pytest.fixture(scope="module")
def tasks():
    return [make(name, seed) for seed, name in enumerate(("films", "cars", "cars"), 1)]


@pytest.fixture(scope="module")
def report(readout, tasks):
    return task_report(readout, tasks, progress=False)


def test_names_sizes_and_shapes(report):
    assert report.names == ["films", "cars", "cars 2"]
    assert report.train == [9, 9, 9] and report.held_out == [3, 3, 3]
    for name in ("overlap", "interference", "cosines"):
        assert getattr(report, name).shape == (3, 3)
    assert np.allclose(np.diag(report.overlap), 1) and (report.eta > 0).all()


def test_small_vectors_do_what_the_report_says(readout, tasks):
    """For short times a real vector, one backward pass, does what the kernel says: told and measured agree."""
    eta = 1e-3
    told = task_report(readout, tasks, eta=eta, progress=False)
    start = readout.scores([t for task in tasks for t in task.texts])
    vectors = []
    for k, task in enumerate(tasks):
        order = np.random.default_rng((0, k)).permutation(N)
        rows = np.sort(order[3:])
        gap = task.y[rows] - start[k * N + rows]
        gap = gap - gap.mean()
        values = readout([task.texts[i] for i in rows])
        weight = np.array(eta * gap / len(rows))
        readout.module.zero_grad()
        (values * values.new_tensor(weight)).sum().backward()
        vectors.append(TaskVector.from_tensors({n: p.grad for n, p in readout.parameters().items() if p.grad is not None}))
    found = task_report(readout, tasks, eta=eta, vectors=vectors, progress=False)
    assert found.measured is not None
    scale = np.abs(told.interference).max()
    np.testing.assert_allclose(found.measured["interference"], told.interference, atol=0.05 * scale)
    np.testing.assert_allclose(found.measured["alone"], told.alone, atol=0.05 * np.abs(1 - told.alone).max())
    np.testing.assert_allclose(found.measured["cosines"], told.cosines, atol=0.02)
    assert "measured with the given vectors" in str(found)


def test_a_kernel_given_is_the_kernel_computed(readout, tasks, report):
    texts = [t for task in tasks for t in task.texts]
    kernel = ntkft.empirical_ntk(readout, texts, progress=False)
    again = task_report(None, tasks, kernel=kernel)
    np.testing.assert_allclose(again.interference, report.interference, rtol=1e-9)
    with pytest.raises(InputError, match="The kernel is for 12 texts and the tasks have 36"):
        task_report(None, tasks, kernel=kernel.block(np.arange(N)))


def test_recommendation_names_the_least_loss(report):
    words = report.recommendation()
    assert len(words[-1]) > printed.WIDTH >= max(map(len, str(report).splitlines()))
    assert words[-1] in " ".join(str(report).split())
    means = {"keep": report.alone.mean(), "add": report.sums[report.best_scale].mean(), "train": report.joint.mean()}
    assert words[-1].startswith(f"Best: {min(means, key=means.get)}")
    assert report.best_scale in report.sums
    assert report.sums[report.best_scale].mean() == min(v.mean() for v in report.sums.values())
    for a, name in enumerate(report.names):
        harmed = [report.names[b] for b in range(3) if report.interference[a, b] > 0.02]
        assert all(other in words[a] for other in harmed) and words[a].startswith(name)


def test_twins_help_and_opposites_harm(readout, tasks):
    """A smooth task and itself, and itself with signs turned: for a short time the one helps and the other harms."""
    texts = tasks[0].texts
    offset = readout.scores(texts)
    matrix = ntkft.empirical_ntk(readout, texts, progress=False).matrix
    y = offset + matrix @ np.sin(np.arange(N)) / N
    same, turned = (Task(name, [t + pad for t in texts], labels, labels) for name, pad, labels in (
        ("same", " ", y), ("turned", "  ", 2 * offset - y)
    ))  # fmt: skip
    found = task_report(readout, [Task("one", texts, y, y), same, turned], eta=1e-3, progress=False).interference
    assert found[0, 1] < 0 < found[0, 2]


def test_plot_is_a_heat_map(report, tmp_path):
    ax = report.plot(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown, 100 * report.interference)
    with pytest.raises(InputError, match="must end in"):
        report.plot(tmp_path / "heat.txt")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tasks": 1}, "interference needs two"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"vectors": []}, "3 tasks and 0 task vectors"),
        ({"sigma": [0.1]}, "sigma has 1 entries and there are 3"),
        ({"readout": None}, "readout is None and is needed"),
    ],
)
def test_what_does_not_fit_is_said(readout, tasks, change, match):
    options = {"readout": readout, "tasks": tasks, "progress": False} | change
    if options["tasks"] == 1:
        options["tasks"] = tasks[:1]
    with pytest.raises(InputError, match=match):
        task_report(options.pop("readout"), options.pop("tasks"), **options)


def test_short_tasks_are_refused(readout, tasks):
    with pytest.raises(InputError, match="has 4 texts and too few"):
        task_report(readout, [tasks[0], tasks[1].subset(range(4))])


# --- The command ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tasks, tmp_path):
    for k, task in enumerate(tasks[:2]):
        rows = [f'"{text}",{label}' for text, label in zip(task.texts, task.y, strict=True)]
        (tmp_path / f"{task.name}{k}.csv").write_text("\n".join(["text,label", *rows]))
    return sorted(map(str, tmp_path.glob("*.csv")))


@pytest.fixture
def small(readout, monkeypatch):
    monkeypatch.setattr(cli_tasks, "make_readout", lambda *_: readout)


def test_the_command_prints_plan_matrix_and_advice(files, small, tmp_path):
    done = CliRunner().invoke(cli.app, ["tasks", *files, "--sigma", "0.4", "--plot", str(tmp_path / "heat.svg")])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("plan") and "Best: " in done.output and (tmp_path / "heat.svg").is_file()


def test_the_command_speaks_json_and_measures_given_models(files, small, readout, tmp_path):
    paths = []
    for k in range(2):
        moved = {n: 1e-3 * (k + 1) * p.abs() for n, p in readout.parameters().items()}
        paths += ["--vector", str(TaskVector.from_tensors(moved).save(tmp_path / f"{k}.safetensors"))]
    done = CliRunner().invoke(cli.app, ["tasks", *files, *paths, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert np.array(found["interference"]).shape == np.array(found["measured"]["interference"]).shape == (2, 2)
    assert found["names"] == ["cars1", "films0"] and set(found["sums"]) == set(found["measured"]["sums"])


def test_a_folder_tuned_through_another_head_is_refused(files, small, tmp_path):
    with pytest.raises(InputError, match="tuned through a head of its own"):
        cli_tasks.tasks(files, vector=[str(tmp_path), str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [([], "interference needs two"), (["--sigma", "1", "--sigma", "1", "--sigma", "1"], "--sigma is given 3 times")],
)
def test_the_command_refuses_before_it_computes(files, arguments, match, monkeypatch):
    monkeypatch.setattr(cli_tasks, "make_readout", lambda *_: pytest.fail("computed"))
    data = files if arguments else files[:1]
    with pytest.raises(InputError, match=match):
        cli_tasks.tasks(data, sigma=[1.0] * (len(arguments) // 2) or None)
