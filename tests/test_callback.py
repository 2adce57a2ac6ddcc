"""The callback in real runs of transformers' Trainer: the time it counts is the time that the function feels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import ntkft
from ntkft.callback import KernelStoppingCallback, centred_mse_loss, sequence_readout
from ntkft.errors import InputError
from ntkft.ntk.oracle import loop_ntk
from tests import tiny

TOKENIZER = tiny.WordTokenizer()
N = len(tiny.TEXTS)
Y = np.random.default_rng(0).standard_normal(N) + 1
FOREVER = 1e6
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def classifier(dropout: float = 0.0, labels: int = 1):
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=64, num_labels=labels, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


class Rows(Dataset):
    def __init__(self, label="labels"):
        self.label = label

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"input_ids": TOKENIZER(tiny.TEXTS[i])["input_ids"], self.label: float(Y[i])}


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    pad = [[0] * (length - len(row["input_ids"])) for row in rows]
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + p for row, p in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - len(p)) + p for p in pad]),
    }
    return batch | {k: torch.tensor([row[k] for row in rows]) for k in rows[0] if k != "input_ids"}


@pytest.fixture
def train(tmp_path):
    """Train the tiny classifier with a callback; return the Trainer after it."""

    def run(callback, model=None, *, resume=None, before=None, optimizers=(None, None), data=None, **options):
        settings = {
            "output_dir": str(tmp_path / "run"), "optim": "sgd", "learning_rate": 0.01, "lr_scheduler_type": "constant",
            "max_grad_norm": 0, "num_train_epochs": 4, "per_device_train_batch_size": 3, "report_to": [], "logging_steps": 1,
            "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 0, "dataloader_pin_memory": False,
        }  # fmt: skip
        trainer = Trainer(
            model or classifier(),
            TrainingArguments(**(settings | options)),
            train_dataset=data or Rows(),
            data_collator=collate,
            callbacks=[callback] if callback else None,
            optimizers=optimizers,
        )
        if before:
            before(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def scores(model):
    return sequence_readout(model, TOKENIZER).scores(tiny.TEXTS)


def kept(trainer):
    """The callback of a Trainer: on request, it builds a new one from a checkpoint."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, KernelStoppingCallback))


# --- Time ---------------------------------------------------------------------------------------------------


def test_the_readout_is_the_function_that_the_trainer_trains(train):
    """One small step of learning rate ε on MSELoss moves the fitted values by 2ε K/n (y - f0)."""
    model = classifier()
    readout = sequence_readout(model, TOKENIZER)
    f0, matrix = scores(model), loop_ntk(readout, tiny.TEXTS)
    callback = KernelStoppingCallback(1.0, 1.0)
    train(callback, model, learning_rate=1e-3, per_device_train_batch_size=N, max_steps=1)
    assert callback.kernel_time == pytest.approx(2e-3)
    expected = 2e-3 * matrix @ (Y - f0) / N
    np.testing.assert_allclose(scores(model) - f0, expected, rtol=0.02, atol=1e-5)


def test_the_centred_loss_moves_the_function_by_the_centred_kernel(train):
    model = classifier()
    f0, matrix = scores(model), loop_ntk(sequence_readout(model, TOKENIZER), tiny.TEXTS)
    callback = KernelStoppingCallback(2e-3, 1.0)
    train(
        callback, model, learning_rate=1e-3, per_device_train_batch_size=N,
        before=lambda trainer: setattr(trainer, "compute_loss_func", centred_mse_loss),
    )  # fmt: skip
    left = Y - f0 - (Y - f0).mean()
    np.testing.assert_allclose(scores(model) - f0, 2e-3 * matrix @ left / N, rtol=0.02, atol=1e-5)
    assert callback.kernel_time == pytest.approx(2e-3)


@pytest.mark.parametrize(("eta", "steps"), [(0.1, 5), (0.105, 5), (0.1199, 5), (0.12, 6)])
def test_constant_rate_stops_before_the_step_that_would_pass(train, eta, steps):
    callback = KernelStoppingCallback(eta, 1.0)
    trainer = train(callback)
    assert trainer.state.global_step == steps and callback.stopped
    assert callback.kernel_time == pytest.approx(0.02 * steps)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["kernel_time"] for row in logged] == pytest.approx(0.02 * np.arange(1, steps + 1))
    assert {row["predicted_stop"] for row in logged} == {eta}
    assert [row["predicted_epochs"] for row in logged] == pytest.approx([steps / 3] * steps)


def test_half_of_the_mean_square_takes_twice_the_steps(train):
    def half(trainer):
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
            ((outputs.logits.squeeze(-1) - labels) ** 2).mean() / 2
        )

    callback = KernelStoppingCallback(0.06, 1.0, loss="half-mse")
    assert train(callback, before=half).state.global_step == 6


def test_spectrum_and_stopping_time_give_the_same_stop():
    spectrum = ntkft.Spectrum([1.0, 0.5, 0.1])
    stop = ntkft.stopping.rademacher_rule(spectrum, 0.7, 2.0)
    assert KernelStoppingCallback(spectrum, 0.7, norm=2.0).predicted_stop == stop.eta
    assert KernelStoppingCallback(stop, 0.7).predicted_stop == KernelStoppingCallback(stop.eta, 0.7).predicted_stop == stop.eta


def test_a_schedule_with_accumulation_is_summed_step_by_step(train):
    """Linear decay to 0 in 8 steps, the first of an epoch of two batches and the second of one: each batch's gradient counts."""
    callback = KernelStoppingCallback(FOREVER, 1.0)
    with pytest.warns(UserWarning, match="adds the gradients of 2"):
        trainer = train(callback, lr_scheduler_type="linear", gradient_accumulation_steps=2)
    assert trainer.state.global_step == 8 and not callback.stopped
    rates = 0.01 * (1 - np.arange(8) / 8)
    assert callback.kernel_time == pytest.approx(2 * (rates * np.tile([2, 1], 4)).sum())
    assert all(row["predicted_epochs"] == np.inf for row in trainer.state.log_history if "loss" in row)


def test_predicted_epochs_follow_the_schedule(train):
    """A warm-up that starts at 0 and a decay: the stop is predicted from the first log on, and kept."""
    options = {"lr_scheduler_type": "linear", "warmup_steps": 4, "num_train_epochs": 8}
    callback = KernelStoppingCallback(0.15, 1.0)
    trainer = train(callback, **options)
    said = [row["predicted_epochs"] for row in trainer.state.log_history if "loss" in row]
    assert said == pytest.approx([trainer.state.global_step / 3] * len(said))
    rates = 0.01 * np.minimum(np.arange(24) / 4, (24 - np.arange(24)) / 20)
    assert trainer.state.global_step == np.searchsorted(np.cumsum(2 * rates), 0.15)


@pytest.mark.parametrize("accumulated", ["sum", "mean"])
def test_accumulated_batches_move_the_function_as_counted(train, accumulated):
    """Three batches of three, accumulated, against one of nine: the sum moves three times as far, the mean as far."""
    moved, times = [], []
    for batches in (1, 3):
        model = classifier()
        f0 = scores(model)
        mean = accumulated == "mean" and batches > 1
        callback = KernelStoppingCallback(FOREVER, 1.0, accumulated="mean" if mean else "auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(
                callback, model, learning_rate=1e-4, gradient_accumulation_steps=batches, max_steps=1,
                per_device_train_batch_size=N // batches,
                before=lambda trainer, mean=mean: setattr(trainer, "loss_is_scaled_for_ga", False if mean else None),
            )  # fmt: skip
        moved.append(np.linalg.norm(scores(model) - f0))
        times.append(callback.kernel_time)
    assert times[1] / times[0] == pytest.approx(3 if accumulated == "sum" else 1)
    assert moved[1] / moved[0] == pytest.approx(times[1] / times[0], rel=0.02)


@pytest.mark.parametrize("extra", ["", ",nesterov=true", ",dampening=0.5"])
def test_momentum_moves_the_function_as_counted(train, extra):
    """While steps are tiny the fitted values move in proportion to kernel time, at any momentum."""
    speeds = []
    for args in (None, f"momentum=0.8{extra}"):
        model = classifier()
        f0 = scores(model)
        callback = KernelStoppingCallback(FOREVER, 1.0)
        train(callback, model, learning_rate=1e-5, per_device_train_batch_size=N, max_steps=6, optim_args=args)
        speeds.append(np.linalg.norm(scores(model) - f0) / callback.kernel_time)
    assert speeds[1] == pytest.approx(speeds[0], rel=0.02)
    if not extra:
        assert callback.kernel_time == pytest.approx(2e-5 * sum((1 - 0.8**t) / 0.2 for t in range(1, 7)))


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(train, tmp_path):
    options = {"optim_args": "momentum=0.5", "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = KernelStoppingCallback(0.2, 1.0)
    trainer = train(whole, **options)
    steps = trainer.state.global_step
    assert 4 < steps < 12 and whole.stopped
    for restore in (False, True):
        resumed = train(
            KernelStoppingCallback(0.2, 1.0), **options, resume=str(tmp_path / "run" / "checkpoint-4"),
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        assert resumed.state.global_step == steps and kept(resumed).stopped
        assert kept(resumed).kernel_time == pytest.approx(whole.kernel_time, rel=1e-12)
    with pytest.raises(InputError, match=r"0\.1\w+ is over and the next step takes"):
        train(KernelStoppingCallback(0.1, 1.0), **options, resume=str(tmp_path / "run" / "checkpoint-4"))


def test_a_second_run_begins_at_zero(train):
    callback = KernelStoppingCallback(0.1, 1.0)
    train(callback)
    assert train(callback).state.global_step == 5 and callback.kernel_time == pytest.approx(0.1)


# --- Rules that read the training error -----------------------------------------------------------------------


def test_adamw_stops_by_discrepancy(train):
    model = classifier()
    callback = KernelStoppingCallback(1.0, 0.9, rule="discrepancy", every=1)
    trainer = train(callback, model, optim="adamw_torch", learning_rate=3e-3, max_grad_norm=1.0, num_train_epochs=20)
    said = [row["train_residual"] for row in trainer.state.log_history if "loss" in row]
    assert callback.stopped and 1 < len(said) == trainer.state.global_step < 60
    assert min(said[:-1]) > 0.81 >= said[-1]
    assert said[-1] == pytest.approx(((Y - scores(model)) ** 2).mean(), rel=1e-5)
    assert not any("kernel_time" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_clock_reads_the_time_of_small_steps(train, intercept):
    """Plain descent with small steps on all texts: the clock and the sum of the steps agree."""
    model = classifier()
    matrix = loop_ntk(sequence_readout(model, TOKENIZER), tiny.TEXTS)
    descent = ntkft.descend(matrix, Y, scores(model), intercept=intercept)
    options = {"learning_rate": 1e-3, "per_device_train_batch_size": N, "num_train_epochs": 8}
    callback = KernelStoppingCallback(0.006 - 1e-4, 1.0, rule="clock", descent=descent)
    trainer = train(callback, model, **options)
    assert callback.kernel_time == pytest.approx(2e-3 * trainer.state.global_step)
    if not intercept:  # a batch is not centred in this run, so only then the path is the run's
        assert trainer.state.global_step == 3
    assert callback.intercept is intercept


def test_the_clock_survives_a_checkpoint_and_times_adamw(train, tmp_path):
    model = classifier()
    descent = ntkft.descend(loop_ntk(sequence_readout(model, TOKENIZER), tiny.TEXTS), Y, scores(model))
    options = {"optim": "adamw_torch", "learning_rate": 2e-3, "save_strategy": "epoch", "num_train_epochs": 10}

    def callback():
        return KernelStoppingCallback(0.4, 1.0, rule="clock", descent=descent)

    whole = train(callback(), **options)
    assert kept(whole).stopped and kept(whole).kernel_time >= 0.4 and whole.state.epoch > 1
    assert "kernel_time" in whole.state.log_history[-2] and "predicted_epochs" not in whole.state.log_history[-2]
    resumed = train(
        callback(), **options, resume=str(tmp_path / "run" / "checkpoint-3"), restore_callback_states_from_checkpoint=True
    )
    assert resumed.state.global_step == whole.state.global_step
    assert kept(resumed).kernel_time == pytest.approx(kept(whole).kernel_time, rel=1e-3)  # read off the stored curve


def test_looking_changes_nothing(train):
    """Predictions in between draw no random number and leave training mode, batches and weights alone."""
    runs = []
    for callback in (None, KernelStoppingCallback(FOREVER, 1e-9, rule="discrepancy", every=1)):
        model = classifier(dropout=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(callback, model, num_train_epochs=2)
        runs.append(scores(model))
    np.testing.assert_array_equal(runs[0], runs[1])


def test_own_predictions_and_a_limit_on_texts(train):
    seen = []

    def predict(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(1)
        return np.zeros(4), np.array([1.0, 1.0, 3.0, 3.0])

    callback = KernelStoppingCallback(1.0, 0.5, rule="discrepancy", predict=predict, intercept=True, stop=False)
    trainer = train(callback, num_train_epochs=3)
    assert callback.train_residual == 1.0 and len(seen) == 3 and not callback.stopped
    few = KernelStoppingCallback(1.0, 0.5, rule="discrepancy", max_texts=4, stop=False)
    trainer = train(few, num_train_epochs=1)
    rows = np.sort(np.random.default_rng(0).permutation(N)[:4])
    assert few.train_residual == pytest.approx(((Y - scores(trainer.model))[rows] ** 2).mean(), rel=1e-5)


# --- PEFT ---------------------------------------------------------------------------------------------------


def test_lora(train):
    """The kernel is that of the adapters and the head alone, and predicts their first step."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["query", "value"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(classifier(), config)
    readout = sequence_readout(model, TOKENIZER)
    names = list(readout.parameters())
    assert names and all("lora_" in name or "classifier" in name for name in names)
    kernel = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False)
    np.testing.assert_allclose(kernel.matrix, loop_ntk(readout, tiny.TEXTS), rtol=1e-4, atol=1e-6)
    f0 = scores(model)
    callback = KernelStoppingCallback(0.04, 1.0)
    trainer = train(callback, model, per_device_train_batch_size=N, learning_rate=0.002)
    assert trainer.state.global_step == 4  # the epochs end before
    expected = ntkft.descend(kernel, Y, step_size=0.004).fitted(callback.kernel_time) - f0
    np.testing.assert_allclose(scores(model) - f0, expected, rtol=0.1, atol=1e-3)
    assert train(KernelStoppingCallback(0.04, 1.0), model).state.global_step == 2


# --- What would be wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "soon"}, "rule is 'soon'"),
        ({"loss": "l1"}, "loss is 'l1'"),
        ({"accumulated": "twice"}, "accumulated is 'twice'"),
        ({"every": 0}, "every is 0"),
        ({"rule": "clock"}, "descent is None"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"spectrum": 0.0}, "the time to stop is 0.0"),
        ({"spectrum": ntkft.Spectrum([0.0, 0.0])}, "eigenvalues are zero"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(InputError, match=words):
        KernelStoppingCallback(**({"spectrum": 1.0, "sigma": 1.0} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "adamw_torch"}, "AdamW has no kernel time.*rule='discrepancy'"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0.*max_grad_norm=0"),
        ({"learning_rate": 3.0}, "the next step takes 6.*learning rate is too large"),
    ],
)
def test_runs_without_kernel_time_are_refused(train, options, words):
    with pytest.raises(InputError, match=words):
        train(KernelStoppingCallback(1.0, 1.0), **options)
    with pytest.warns(UserWarning, match=words.replace(".*", "[\\s\\S]*")):  # a watcher is only warned
        trainer = train(KernelStoppingCallback(1.0, 1.0, stop=False), **options, num_train_epochs=1)
    assert trainer.state.global_step == 3


def test_two_learning_rates_are_refused(train):
    model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.1}], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(InputError, match=r"learning rates \[0.01, 0.1\]"):
        train(KernelStoppingCallback(1.0, 1.0), model, optimizers=(optimizer, schedule))


def test_dropout_and_weight_decay_are_noticed(train):
    with pytest.warns(UserWarning, match="Dropout is active"):
        train(KernelStoppingCallback(0.02, 1.0), classifier(dropout=0.1), num_train_epochs=1)
    with pytest.warns(UserWarning, match="Weight decay"):
        train(KernelStoppingCallback(0.02, 1.0), num_train_epochs=1, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dropout|Weight decay|This Trainer adds")
        train(KernelStoppingCallback(0.02, 1.0), num_train_epochs=1)


def test_a_training_error_that_cannot_be_had(train):
    def callback(**options):
        return KernelStoppingCallback(1.0, 1.0, rule="discrepancy", every=1, **options)

    def two_logits(trainer):
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()

    with pytest.raises(InputError, match=r"num_labels=1"):
        train(callback(), classifier(labels=2), before=two_logits)
    with pytest.raises(InputError, match="predict must return"):
        train(callback(predict=lambda model: (np.zeros(3), np.zeros(4))))
    with pytest.raises(InputError, match="cannot be stored"):
        lost = callback()
        lost.needs_predict = True
        train(lost)


def test_a_checkpoint_without_time(train, tmp_path):
    train(None, save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(InputError, match="holds no kernel time"):
        train(KernelStoppingCallback(1.0, 1.0), resume=str(tmp_path / "run" / "checkpoint-2"))


def test_a_readout_needs_one_label():
    with pytest.raises(InputError, match="num_labels=2"):
        sequence_readout(classifier(labels=2), TOKENIZER)
