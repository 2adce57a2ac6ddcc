"""Runs of the language-model chapters on tiny models: the loop, what is stored, pretraining that goes on after a crash."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.errors import InputError
from ntkft.experiments import llm_classes, llm_kernels, llm_pretraining, llm_runs, llm_training
from ntkft.experiments.llm_classes import Classes
from ntkft.experiments.llm_run_list import CLASSES, RUNS
from ntkft.experiments.llm_runs import Run, run_path
from ntkft.finetune import train
from ntkft.provenance import code_hash
from tests import tiny

N = len(tiny.TEXTS)
Y = np.random.default_rng(0).standard_normal(N)
ROWS = np.arange(N - 2)


@pytest.fixture
def readout():
    return ntkft.pooled_readout(tiny.bert())


# --- The loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sgd", "adamw"])
@pytest.mark.parametrize("batch", [4, None])
def test_square_loss_is_the_books_training(readout, method, batch):
    """Another loop, the same batches: the centred model of `finetune.train`."""
    some, y = [tiny.TEXTS[i] for i in ROWS], Y[ROWS]
    per_epoch = 1 if batch is None else -(-len(ROWS) // batch)
    options = {"step_size": 0.02, "batch_size": batch, "method": method, "seed": 5}
    found = run_path(readout, tiny.TEXTS, y, ROWS, steps=2 * per_epoch, every=per_epoch, **options)
    before = {k: v.detach().clone() for k, v in readout.parameters().items()}
    book = train(readout, some, y, epochs=2, intercept=True, progress=False, **options)
    centred = found["scores"][:, ROWS] + (y.mean() - found["scores"][:, ROWS].mean(1))[:, None]
    np.testing.assert_allclose(centred, book.fitted, atol=2e-6)
    assert not all(torch.equal(before[k], v) for k, v in readout.parameters().items())  # train moved them


def test_weights_are_put_back_and_kernels_are_where_they_were_asked_for(readout):
    before = {k: v.detach().clone() for k, v in readout.parameters().items()}
    found = run_path(
        readout, tiny.TEXTS, Y[ROWS], ROWS, method="sgd", step_size=0.01, steps=4, every=2, batch_size=3, kernels=(2, 4)
    )
    assert all(torch.equal(before[k], v) for k, v in readout.parameters().items())
    assert found["step"].tolist() == [0, 2, 4] and found["kernel_step"].tolist() == [2, 4]
    assert found["kernels"].shape == (2, len(ROWS), len(ROWS)) and found["scores"].shape == (3, N)


def test_logistic_gradient_is_that_of_the_centred_model(readout):
    labels = torch.tensor(np.sign(Y[ROWS]))
    ids = readout.encode([tiny.TEXTS[i] for i in ROWS])
    llm_runs._backward(readout, ids, labels, "logistic")
    ours = {k: v.grad.clone() for k, v in readout.parameters().items() if v.grad is not None}
    readout.module.zero_grad()
    f = readout([tiny.TEXTS[i] for i in ROWS])
    torch.log1p(torch.exp(-labels * (f - f.mean()))).mean().backward()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, readout.parameters()[name].grad, atol=1e-12, rtol=1e-9)


# --- What is stored -----------------------------------------------------------------------------------------


def test_packing_keeps_everything_to_single_precision(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 6)), rng.standard_normal((2, 4, 4))
    made = {
        "y": rng.standard_normal(4),
        "rows": np.arange(4),
        "scores": rng.standard_normal((3, 6)),
        "kernel": (a + a.T).astype(np.float32),
        "kernels": (b + np.swapaxes(b, 1, 2)).astype(np.float32),
        "seconds": np.array(1.5),
    }
    monkeypatch.setattr(llm_training, "FOLDER", tmp_path)
    monkeypatch.setattr(llm_runs, "outcome", lambda run: made)
    run = Run("minilm", "tweets", "sgd", 0)
    assert llm_training.load(run) is None
    llm_training.pack(run)
    monkeypatch.setattr(llm_runs, "outcome", lambda run: pytest.fail("made twice"))
    llm_training.pack(run)  # it is there, and made by this code
    found = llm_training.load(run)
    assert found is not None
    for key in ("kernel", "kernels", "y", "rows"):
        np.testing.assert_array_equal(found[key], made[key])
    np.testing.assert_allclose(found["scores"], made["scores"], rtol=1e-6)
    assert ntkft.files.read_json(tmp_path / "index.json")[run.key]["seconds"] == 1.5


def test_runs_made_by_other_code_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_training, "FOLDER", tmp_path)
    monkeypatch.setattr(llm_classes, "outcome", lambda run: {"scores": np.zeros((1, 2)), "rows": np.arange(2), "seconds": 1.0})
    run = Classes("newsgroups", 0.1, 0)
    monkeypatch.setattr(llm_training, "code", lambda run: "old")
    llm_training.pack(run)
    monkeypatch.undo()
    monkeypatch.setattr(llm_training, "FOLDER", tmp_path)
    made = []
    monkeypatch.setattr(llm_classes, "outcome", lambda run: made.append(run) or {"scores": np.ones((1, 2)), "seconds": 2.0})
    llm_training.pack(run)
    assert made == [run]
    assert ntkft.files.read_json(tmp_path / "index.json")[run.key]["code_sha256"] == code_hash(llm_classes.__name__)


def test_every_run_of_the_list_is_stored_and_none_twice():
    keys = [run.key for run in (*RUNS, *CLASSES)]
    assert len(set(keys)) == len(keys)
    missing = [key for key in keys if not (llm_training.FOLDER / f"{key}.npz").is_file()]
    assert not missing, f"`ntkft run llm_training --tier full` makes {', '.join(missing)}"


def test_stored_runs_are_whole_and_made_by_the_present_code():
    index = ntkft.files.read_json(llm_training.FOLDER / "index.json")
    assert sorted(index) == sorted(path.stem for path in llm_training.FOLDER.glob("*.npz"))
    stale = [run.key for run in (*RUNS, *CLASSES) if index[run.key]["code_sha256"] != llm_training.code(run)]
    assert not stale, f"made by other code: {', '.join(stale)}"
    for run in (*RUNS, *CLASSES):
        found = llm_training.load(run)
        assert found is not None and len(found["step"]) == len(found["scores"])
        assert all(np.isfinite(found[key]).all() for key in ("scores", "y", "kernels") if key in found)


def test_patience_keeps_the_best_look_before_it_waited_in_vain():
    errors = np.array([3.0, 2.0, 2.5, 2.4, 2.3, 1.0])
    held = {"scores": np.sqrt(errors)[:, None] * np.ones((1, 4)), "rows": np.array([0, 1])}
    held["scores"][:, :2] = 0.0  # trained on: its mean fixes the constant
    assert llm_training._patience(held, np.zeros(4), np.array([0, 1])) == 1


def test_crossing_joins_looks_by_lines():
    when = np.array([0.0, 8.0, 16.0])
    assert llm_training.crossing(when, np.array([3.0, 2.0, 0.0]), 1.0) == 12.0
    assert llm_training.crossing(when, np.array([3.0, 2.0, 1.5]), 1.0) == 16.0
    assert llm_training.crossing(when, np.array([0.5, 0.2, 0.1]), 1.0) == 0.0


# --- Kernels ------------------------------------------------------------------------------------------------


def test_names_say_what_a_kernel_is():
    assert llm_kernels.Wanted("minilm", "random", "nyt", 8, 2).name == "random-nyt-2"
    assert llm_kernels.Wanted("smollm2", "pretrained", "tweets", 8).name == "smollm2-tweets"
    with pytest.raises(InputError, match="There is no kernel at"):
        llm_kernels.stored("minilm-nowhere-0")


def test_compact_file_is_the_same_kernel(tmp_path, readout):
    kernel = ntkft.empirical_ntk(readout, tiny.TEXTS, blocks="kind", progress=False)
    again = ntkft.Kernel.load(kernel.save(tmp_path / "k.npz", compact=True))
    np.testing.assert_allclose(again.matrix, kernel.matrix, rtol=1e-7)
    assert np.array_equal(again.matrix, again.matrix.T) and again.texts == kernel.texts
    for label, part in kernel.parts.items():
        np.testing.assert_allclose(again.parts[label], part, rtol=1e-7, atol=1e-12)
    across = ntkft.empirical_ntk(readout, tiny.TEXTS[:2], tiny.TEXTS[2:], progress=False)
    with pytest.raises(InputError, match="keeps one triangle"):
        across.save(tmp_path / "c.npz", compact=True)


# --- Pretraining --------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(llm_pretraining, "STEPS", (0, 2, 4))
    monkeypatch.setattr(llm_pretraining, "BATCH", 2)
    monkeypatch.setattr(llm_pretraining, "LENGTH", 8)
    monkeypatch.setattr(llm_pretraining, "VOCABULARY", 300)


def test_pretraining_goes_on_after_an_interrupt_to_the_same_weights(tmp_path, small, monkeypatch):
    texts = [f"{text} and {other}" for text in tiny.TEXTS for other in tiny.TEXTS]
    steps = (0, 2, 4)
    whole = llm_pretraining.checkpoints(texts, tmp_path / "whole", steps=steps, progress=False)
    batch = llm_pretraining.sequences

    def crash(stream, step, seed):
        if step == 3:
            raise KeyboardInterrupt
        return batch(stream, step, seed)

    monkeypatch.setattr(llm_pretraining, "sequences", crash)
    with pytest.raises(KeyboardInterrupt):
        llm_pretraining.checkpoints(texts, tmp_path / "cut", steps=steps, progress=False)
    monkeypatch.setattr(llm_pretraining, "sequences", batch)
    resumed = llm_pretraining.checkpoints(texts, tmp_path / "cut", steps=steps, progress=False)
    one, two = (ntkft.load_model(places[-1]).model.state_dict() for places in (whole, resumed))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["transformer.wte.weight"], ntkft.load_model(whole[0]).model.state_dict()["transformer.wte.weight"])


def test_kernels_of_public_checkpoints_from_a_folder(tmp_path, small):
    """What `pythia` does with a network, from ``step{N}`` folders."""
    texts = [f"{text} good bad" for text in tiny.TEXTS]
    places = llm_pretraining.checkpoints(texts, tmp_path / "run", steps=(0, 2), progress=False)
    for step, place in zip((0, 2), places, strict=True):
        place.rename(tmp_path / f"step{step}")
    found = list(llm_pretraining.revisions(str(tmp_path), (0, 2)))
    assert [step for step, _ in found] == [0, 2]
    llm_pretraining.kernels(2, found[1][1], tmp_path / "out", tasks=("tweets",), n=6)
    kernel = ntkft.Kernel.load(tmp_path / "out" / "2-tweets-pooled.npz")
    assert kernel.n == 6 and kernel.info["step"] == 2
    assert kernel.matches(ntkft.load_task("tweets", n=6, seed=0).texts)
