"""The twin rule in real runs of transformers' Trainer: against algebra where training is linear, against plain runs elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import ntkft
from ntkft.advice import stopping_advice
from ntkft.advice_path import WholePath
from ntkft.advice_warnings import advice_warnings
from ntkft.callback import centred_mse_loss
from ntkft.errors import InputError
from ntkft.ntk import Kernel
from ntkft.tasks import Task
from ntkft.twin import TwinCallback, TwinRecorder, train_with_twin, twin_labels, twin_stop
from tests import tiny

N, D = 24, 24
X = np.random.default_rng(0).standard_normal((N, D)) * np.arange(1, D + 1) ** -0.7
Y = X @ np.random.default_rng(1).standard_normal(D) * 0.5 + np.random.default_rng(2).standard_normal(N)
SEEDS = count()
TOKENIZER, TEXTS = tiny.WordTokenizer(), tiny.TEXTS
Z = np.random.default_rng(0).standard_normal(len(TEXTS)) + 1
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Linear(nn.Module):
    """f = Xw in double precision, from a given start, with a buffer that counts forward passes of training."""

    def __init__(self, start=0.0, dropout=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((D,), float(start), dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x, labels=None):
        if self.training:
            self.passes += 1
        logits = (self.drop(x) @ self.w)[:, None]
        return SequenceClassifierOutput(loss=((logits[:, 0] - labels) ** 2).mean() if labels is not None else None, logits=logits)

    def fitted(self):
        return X @ self.w.detach().numpy()


class Table(Dataset):
    def __init__(self, labels, order=None):
        self.labels, self.order = labels, np.arange(len(labels)) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return {"x": X[self.order[i]], "labels": self.labels[self.order[i]]}


class Words(Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return {"input_ids": TOKENIZER(TEXTS[i])["input_ids"], "labels": float(self.labels[i])}


def stack(rows):
    return {k: torch.tensor(np.array([row[k] for row in rows])) for k in rows[0]}


def pad(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": labels}


def classifier(seed=0, adapters=None, dropout=0.0):
    """A tiny BERT; with `adapters`, LoRA drawn from that seed."""
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=64, num_labels=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    if adapters is None:
        return model
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["query", "value"])
    with torch.random.fork_rng():
        torch.manual_seed(adapters)
        return peft.get_peft_model(model, lora)


@pytest.fixture
def build(tmp_path):
    """Make `make_trainer`: of the linear model, or of a model that `model` returns, with options that may depend on the call."""

    def maker(model=None, data=None, prepare=None, optimizers=(None, None), **options):
        calls = []

        def make_trainer(labels):
            calls.append(labels)
            settings = {
                "output_dir": str(tmp_path / "run"), "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
                "max_grad_norm": 0, "num_train_epochs": 6, "per_device_train_batch_size": 8, "report_to": [], "seed": 0,
                "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False,
                "logging_steps": 1000,
            }  # fmt: skip
            settings |= {k: v(len(calls)) if callable(v) else v for k, v in options.items()}
            trainer = Trainer(
                model(len(calls)) if model else Linear(),
                TrainingArguments(**settings),
                train_dataset=(data or (lambda labels, _: Table(labels)))(labels, len(calls)),
                data_collator=pad if data is words else stack,
            )
            if prepare:
                prepare(trainer)
            return trainer

        make_trainer.calls = calls
        return make_trainer

    return maker


def words(labels, _):
    return Words(labels)


def scores(model):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in pad(list(Words(Z))).items() if k != "labels"}).logits[:, 0].double().numpy()


# --- The estimate -----------------------------------------------------------------------------------------------


def test_degrees_of_freedom_of_linear_descent_are_the_quadratic_form(build):
    """Full-batch SGD on MSELoss: f_t = S_t y with S_t = I - (I - 2εK/n)^t, so df_t = b'S_t b to rounding."""
    result = train_with_twin(build(per_device_train_batch_size=N), Y, 1.0, delta=0.3, seed=4, patience=99)
    b = twin_labels(Y, 0.3, seed=4)[1]
    assert result.steps.tolist() == list(range(7)) and result.epochs.tolist() == list(range(7))
    for t, step in enumerate(result.steps):
        smoother = np.eye(N) - np.linalg.matrix_power(np.eye(N) - 2 * 0.05 * X @ X.T / N, step)
        left = Y - smoother @ Y
        assert result.degrees_of_freedom[t] == pytest.approx(b @ smoother @ b, abs=1e-9)
        np.testing.assert_allclose(result.fitted[t], smoother @ Y, atol=1e-12)
        assert result.residual[t] == pytest.approx((left**2).mean(), rel=1e-12)
        assert result.risk[t] == pytest.approx((left**2).mean() - 1 + 2 * (b @ smoother @ b) / N, rel=1e-9)


def momentum(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.02, momentum=0.8, nesterov=True)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 2},
        {"prepare": momentum},
        {"model": lambda _: Linear(0.3, dropout=0.2)},
    ],
)
def test_whatever_is_linear_in_the_labels_has_no_step_in_delta(build, options):
    """Shuffled batches, accumulation, schedule, momentum, even dropout drawn alike: δ a hundred times as large, the same df."""
    small, large = (train_with_twin(build(**options), Y, 1.0, delta=d, every=2, patience=99) for d in (0.05, 5.0))
    assert len(small.steps) > 3 and small.degrees_of_freedom[-1] > 0.3
    np.testing.assert_allclose(small.degrees_of_freedom, large.degrees_of_freedom, rtol=1e-8, atol=1e-8)


def test_own_loop():
    """Three looks at a shrinkage that knows its degrees of freedom."""
    b = twin_labels(Y, 0.1, seed=1)[1]
    shares = np.array([[0.0], [0.3], [1.0]])
    stop = twin_stop(shares * Y, shares * (Y + 0.1 * b), Y, b, 0.1, 1.0)
    np.testing.assert_allclose(stop.degrees_of_freedom, N * shares[:, 0], atol=1e-9)
    risk = (1 - shares[:, 0]) ** 2 * (Y**2).mean() - 1 + 2 * shares[:, 0]
    np.testing.assert_allclose(stop.risk, risk, atol=1e-9)
    assert stop.best == np.argmin(risk)
    assert twin_stop(np.zeros((2, N)), np.zeros((2, N)), Y, b, 0.1, 1.0).best == 0  # of equals the first


def test_labels_of_the_twin():
    labels, b = twin_labels(Y, 0.25, seed=3)
    assert set(b) == {-1.0, 1.0} and not np.array_equal(b, twin_labels(Y, 0.25, seed=4)[1])
    np.testing.assert_array_equal(labels, Y + 0.25 * b)
    np.testing.assert_array_equal(b, twin_labels(Y, 0.5, seed=3)[1])


# --- The run ----------------------------------------------------------------------------------------------------


def test_the_twin_goes_first_with_a_step_of_an_eighth_of_sigma(build):
    make = build(num_train_epochs=1)
    result = train_with_twin(make, Y, 2.0, seed=5)
    assert len(make.calls) == 2 and result.delta == 0.25 and result.sigma == 2.0
    np.testing.assert_array_equal(make.calls[0], twin_labels(Y, 0.25, seed=5)[0])
    np.testing.assert_array_equal(make.calls[1], Y)


def test_the_best_weights_are_put_back_and_patience_ends_the_run(build):
    options = {"per_device_train_batch_size": N, "num_train_epochs": 60, "learning_rate": 0.5}
    whole = train_with_twin(build(**options), Y, 1.0, patience=99)
    best = int(np.argmin(whole.risk))
    assert 0 < best < 50 and len(whole.steps) == 61 and not whole.falling
    assert whole.step == best and whole.epoch == best
    for patience in (1, 4):
        result = train_with_twin(build(**options), Y, 1.0, patience=patience)
        # the first look that is so far from the least risk until then
        stop = next(k for k in range(1, 61) if k - np.argmin(whole.risk[: k + 1]) == patience)
        assert result.steps.tolist() == list(range(stop + 1)) and result.trainer.state.global_step == stop
        at = int(np.argmin(whole.risk[: stop + 1]))
        assert result.step == at
        assert ((Y - result.trainer.model.fitted()) ** 2).mean() == pytest.approx(whole.residual[at], rel=1e-12)
        assert int(result.trainer.model.passes) == at  # buffers too


def test_nothing_to_learn_and_more_to_learn(build):
    """Pure noise of large σ: the weights before training; a short run: the last look is the best, and it says so."""
    noise = train_with_twin(build(learning_rate=0.3), Y, 10.0, patience=2)
    assert noise.step == 0 and noise.epoch == 0.0 and len(noise.steps) == 3 and not noise.falling
    np.testing.assert_array_equal(noise.trainer.model.fitted(), np.zeros(N))
    short = train_with_twin(build(num_train_epochs=1), Y, 0.3)
    assert short.falling and short.step == 3


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (4, {}, [0, 4, 8, 12, 16, 18]),  # the last step too
        ("epoch", {"max_steps": 7}, [0, 3, 6, 7]),
        ("epoch", {"gradient_accumulation_steps": 2}, [0, 2, 4, 6, 8, 10, 12]),
    ],
)
def test_looks(build, every, options, steps):
    result = train_with_twin(build(**options), Y, 0.3, every=every, patience=99)
    assert result.steps.tolist() == steps


@pytest.mark.parametrize(("every", "logging"), [("epoch", 1), ("epoch", 5), ("epoch", 1000), (2, 1), (2, 5), (2, 1000)])
def test_each_look_is_in_the_log_at_its_own_step(build, every, logging):
    result = train_with_twin(build(logging_steps=logging), Y, 0.3, every=every, patience=99)
    logged = {}
    for row in result.trainer.state.log_history:
        if "twin_risk" in row:
            logged.setdefault(row["step"], []).append((row["twin_risk"], row["degrees_of_freedom"]))
    expected = zip(result.steps[1:], result.risk[1:], result.degrees_of_freedom[1:], strict=True)
    assert {k: set(v) for k, v in logged.items()} == {int(k): {(r, d)} for k, r, d in expected}
    losses = [row["step"] for row in result.trainer.state.log_history if "loss" in row]
    assert losses == sorted(set(result.steps[1:]) | set(range(logging, 19, logging)))  # nothing else, nothing twice


def test_watching_changes_nothing(build):
    """The watched run takes the very steps of a run that nobody looks at."""
    make = build(model=lambda _: Linear(0.1, dropout=0.3), num_train_epochs=3)
    alone = make(Y)
    alone.train()
    result = train_with_twin(make, Y, 0.01, every=2, patience=99)
    assert result.falling
    np.testing.assert_array_equal(result.trainer.model.fitted(), alone.model.fitted())


def test_the_twin_leaves_no_checkpoints(build, tmp_path):
    seen = []

    def watch(trainer):
        seen.append(sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")))

    train_with_twin(build(prepare=watch, save_strategy="epoch", num_train_epochs=2), Y, 0.3)
    assert seen == [[], []] and len(list((tmp_path / "run").glob("checkpoint-*"))) == 2


def test_adamw_against_two_runs_by_hand(build):
    """A network with AdamW, clipping and decay: risk and weights at the stop are those of plain Trainers stopped there."""
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0, "per_device_train_batch_size": 3}
    options |= {"model": lambda _: classifier(), "data": words}
    result = train_with_twin(build(**options, max_steps=15), Z, 0.8, every=3, patience=99)
    b = twin_labels(Z, 0.1)[1]
    for k in (2, int(np.argmin(result.risk))):
        fits = []
        for labels in (Z, Z + 0.1 * b):
            trainer = build(**options, max_steps=int(result.steps[k]))(labels)
            if k:
                trainer.train()
            fits.append(scores(trainer.model))
        free = (fits[1] - fits[0]) @ b / 0.1
        assert result.degrees_of_freedom[k] == pytest.approx(free, abs=1e-4)
        assert result.residual[k] == pytest.approx(((Z - fits[0]) ** 2).mean(), rel=1e-5)
        assert result.risk[k] == pytest.approx(result.residual[k] - 0.64 + 1.28 * free / len(Z), abs=1e-4)
    assert result.step > 0
    np.testing.assert_allclose(scores(result.trainer.model), fits[0], atol=1e-6)


def test_lora(build):
    """Only adapters and head are kept in memory and put back."""
    options = {"model": lambda _: classifier(adapters=1), "data": words, "learning_rate": 0.3, "num_train_epochs": 8}
    result = train_with_twin(build(**options, per_device_train_batch_size=3), Z, 0.9, patience=2)
    assert 0 < result.step < result.steps[-1]
    at = int(np.argmin(result.risk))
    assert ((Z - scores(result.trainer.model)) ** 2).mean() == pytest.approx(result.residual[at], rel=1e-5)
    callback = next(c for c in result.trainer.callback_handler.callbacks if isinstance(c, TwinCallback))
    parameters = {name for name, _ in result.trainer.model.named_parameters()} & callback._kept.keys()
    assert parameters and all("lora_" in name or "classifier" in name for name in parameters)


def test_a_loss_that_leaves_a_constant_free(build):
    """Centred loss and labels far from 0: with the intercept the fits are those of the centred model plus the mean label."""

    def centre(trainer):
        trainer.compute_loss_func = centred_mse_loss

    options = {"prepare": centre, "per_device_train_batch_size": N, "num_train_epochs": 4}
    result = train_with_twin(build(**options), Y + 7, 1.0, intercept=True, patience=99)
    middle = np.eye(N) - 1 / N
    smoother = np.eye(N) - np.linalg.matrix_power(np.eye(N) - 0.1 * middle @ X @ X.T @ middle / N, 4)
    b = twin_labels(Y, 1 / 8)[1]
    smoother = middle @ smoother @ middle + 1 / N  # the constant is fitted
    assert result.degrees_of_freedom[-1] == pytest.approx(b @ smoother @ b, abs=1e-6)
    assert result.degrees_of_freedom[0] == pytest.approx(b.sum() ** 2 / N, abs=1e-9)
    assert result.residual[-1] == pytest.approx(((Y - smoother @ Y) ** 2).mean(), rel=1e-6)


def test_own_predictions(build):
    """`predict` gives the fitted values alone, in evaluation mode."""
    modes = []

    def predict(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return model.fitted()

    one = train_with_twin(build(model=lambda _: Linear(0.1, dropout=0.2)), Y, 0.5, predict=predict)
    two = train_with_twin(build(model=lambda _: Linear(0.1, dropout=0.2)), Y, 0.5)
    assert set(modes) == {(False, False)}
    np.testing.assert_allclose(one.risk, two.risk, rtol=1e-12)


# --- What does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"model": lambda call: Linear(0.1 * call)}, r"different weights w: build the model anew.*set_seed"),
        ({"model": lambda call: classifier(seed=call), "data": words}, "different weights .*embeddings"),
        ({"model": lambda call: classifier(adapters=call), "data": words}, "different weights .*lora_A"),
        ({"seed": lambda call: call}, "seed is 1 in the twin's run and 2"),
        ({"learning_rate": lambda call: 0.01 * call}, "learning_rate is 0.01 in the twin's run and 0.02"),
        ({"num_train_epochs": lambda call: call + 1}, "max_steps is 6 in the twin's run and 9"),
        ({"prepare": lambda _: torch.manual_seed(next(SEEDS))}, "different random numbers"),
        ({"data": lambda labels, call: Table(labels, np.roll(np.arange(N), call))}, "differ from those given by up to"),
        ({"data": lambda labels, _: Table(Y)}, r"differ from those given by up to 0.125"),  # the labels are not passed on
        ({"data": lambda labels, _: Table(labels, np.arange(N - 2))}, "has 22 labels and 24 were given"),
        ({"learning_rate": 1e300}, "At step 3 there are 24 fitted values \\(24 not finite\\)"),
    ],
)
def test_runs_that_cannot_be_compared(build, options, words_):
    y = Z if options.get("data") is words else Y
    with pytest.raises(InputError, match=words_):
        train_with_twin(build(**options), y, 1.0)


def test_one_model_trained_twice(build):
    """The second run begins where the first one ended: refused."""
    model = Linear()
    with pytest.raises(InputError, match="different weights w"):
        train_with_twin(build(model=lambda _: model), Y, 1.0)


def test_frozen_weights_that_differ(build):
    """Only the fitted values before training can show it."""
    with pytest.raises(InputError, match="Before training the fitted values of the two runs differ by up to"):
        frozen = iter((0.0, 0.3))

        def model(_):
            made, shift = Linear(), next(frozen)
            original = made.forward

            def forward(x, labels=None):
                found = original(x, labels)
                return SequenceClassifierOutput(loss=found.loss, logits=found.logits + shift)

            made.forward = forward
            return made

        train_with_twin(build(model=model), Y, 1.0, delta=0.1)


def test_looks_that_do_not_pair(build):
    def early(trainer, after):
        class Stop(type(trainer.callback_handler.callbacks[0])):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= after

        trainer.add_callback(Stop)

    calls = iter((4, 99))
    with pytest.raises(InputError, match="Look 3 of this run is at step 6 and its twin ended at step 4"):
        train_with_twin(build(prepare=lambda trainer: early(trainer, next(calls))), Y, 1.0, every=2, patience=99)

    labels, b = twin_labels(Y, 0.1)
    twin = TwinRecorder(labels)
    first = build()(labels)
    first.add_callback(twin)
    first.train()
    twin.steps[1] = 2  # as if its epochs were shorter
    second = build()(Y)
    second.add_callback(TwinCallback(twin, Y, b, 0.1, 1.0))
    with pytest.raises(InputError, match="Look 1 of this run is at step 3 and its twin at step 2"):
        second.train()


def test_a_resumed_run_is_refused(build, tmp_path):
    make = build(save_strategy="steps", save_steps=2, max_steps=4)
    make(Y).train()
    trainer = make(Y)
    trainer.add_callback(TwinRecorder(Y))
    with pytest.raises(InputError, match="resumed at step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_options_that_do_not_fit(build):
    for options, words_ in (
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"every": 0}, "every is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"y": np.array([1.0, np.nan])}, r"y has shape \(2,\)"),
        ({"y": np.ones((2, 2))}, r"y has shape \(2, 2\)"),
    ):
        with pytest.raises(InputError, match=words_):
            train_with_twin(build(num_train_epochs=1), **({"y": Y, "sigma": 1.0} | options))
    labels, b = twin_labels(Y, 0.1)
    with pytest.raises(InputError, match="has no looks"):
        TwinCallback(TwinRecorder(labels), Y, b, 0.1, 1.0)
    with pytest.raises(InputError, match=r"labels of shape \(24,\), y is \(23,\)"):
        TwinCallback(TwinRecorder(labels), Y[1:], b, 0.1, 1.0)
    with pytest.raises(InputError, match="not y \\+ δb"):
        TwinCallback(TwinRecorder(labels), Y, -b, 0.1, 1.0)
    with pytest.raises(InputError, match=r"fitted is \(2, 24\) and y \(23,\)"):
        twin_stop(np.zeros((2, N)), np.zeros((2, N)), Y[1:], b, 0.1, 1.0)
    with pytest.raises(InputError, match="looks and texts must agree"):
        twin_stop(np.zeros((2, N)), np.zeros((3, N)), Y, b, 0.1, 1.0)


# --- The advice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "drift", "said"),
    [
        ("sgd", None, False), ("sgd", 0.1, False), ("sgd", 0.3, True), ("sgd", -0.3, True), ("adamw", None, True),
        ("adamw", 0.3, True),
    ],
)
def test_the_advice_names_the_twin_where_kernel_time_is_no_guide(optimizer, drift, said):
    task = Task("toy", [str(i) for i in range(N)], Y, Y, 1.0)
    kernel = Kernel(X @ X.T, np.zeros(N))
    advice = stopping_advice(None, task, kernel=kernel, optimizer=optimizer)
    if drift is not None:
        measured = {"texts": 24, "eta": 0.1, "lambda_1": drift / 2, "trace": drift}
        advice = replace(advice, drift=measured)
        path = WholePath(ntkft.descend(kernel, Y, intercept=True), N, 1.0)
        advice = replace(advice, warnings=tuple(advice_warnings(advice, task, path, 1.0, 1.0)))
    lines = [line for line in advice.warnings if "ntkft.train_with_twin" in line]
    assert len(lines) == said and ("ntkft.train_with_twin" in str(advice)) == said
