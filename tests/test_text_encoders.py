"""Encoders of texts that forget the domain, on a tiny model: the cached blocks are the model's, and penalties are weighed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.experiments import audits, text_encoders
from ntkft.experiments.adversary_runs import Forget
from ntkft.infomin import slice_dependence
from ntkft.tasks import Task
from tests import tiny

TRAIN, TEST = 60, 20


class ListTokenizer:
    """A tokenizer of many texts, padded to one length."""

    def __call__(self, texts: list[str], max_length: int, **options: object) -> dict[str, torch.Tensor]:
        one = tiny.WordTokenizer()
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            found = one(text, max_length=max_length)["input_ids"]
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return {"input_ids": ids, "attention_mask": mask}


def task(name: str, n: int, seed: int) -> Task:
    """The rating counts one word; half of the other words are those of the domain."""
    rng = np.random.default_rng([seed, len(name)])
    good = rng.integers(0, 4, n)
    own, shared = [f"{name}{k}" for k in range(6)], [f"word{k}" for k in range(6)]
    texts = [
        " ".join(["good"] * k + ["bad"] * (3 - k) + [*rng.choice(own, 2), *rng.choice(shared, 2)])
        for k in good
    ]
    ratings = [k + rng.normal(0, 0.3, 5) for k in good]
    reference = np.array([r.mean() for r in ratings])
    return Task(name, texts, reference, reference, ratings=ratings)


@pytest.fixture
def small(monkeypatch):
    loaded = tiny.bert(torch.float32)
    model = ntkft.models.LoadedModel(loaded.model, ListTokenizer(), loaded.info)
    monkeypatch.setattr(ntkft, "load_model", lambda name: model)
    monkeypatch.setattr(ntkft, "load_task", lambda name, n, seed: task(name, n, seed))
    sizes = {
        "TRAIN": TRAIN,
        "TEST": TEST,
        "TOKENS": 8,
        "BATCH": 240,
        "EPOCHS": 100,
        "RATE": 1e-2,
        "BLOCK_RATE": 1e-3,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(text_encoders, name, value)
    monkeypatch.setattr(text_encoders, "resumable", lambda module, key, compute: compute())
    monkeypatch.setattr(audits, "NETWORKS", 0)
    text_encoders.texts.cache_clear()
    text_encoders.below.cache_clear()
    yield model
    text_encoders.texts.cache_clear()
    text_encoders.below.cache_clear()


def test_the_last_block_on_cached_states_is_the_whole_model(small):
    block, states, mask = text_encoders.below(0)
    represent = text_encoders.Block(block, states.shape[-1], 0)
    batch = small.tokenizer(text_encoders.texts(0)["texts"], max_length=8)
    hidden = small.model(**batch).last_hidden_state * mask[..., None]
    with torch.no_grad():
        expected = represent.neck(hidden.sum(1) / mask.sum(1, keepdim=True))
        assert (
            mask.sum(1).unique().numel() == 1 and (mask == 0).any()
        )  # the padding is there and does not count
        torch.testing.assert_close(represent(states, mask), expected, rtol=1e-5, atol=1e-6)


def test_training_changes_a_copy_of_the_block_only(small):
    before = {name: p.clone() for name, p in small.model.named_parameters()}
    one, two = (text_encoders.encoder(Forget("minilm", "slice", 1.0, 0)) for _ in range(2))
    assert all(torch.equal(p, before[name]) for name, p in small.model.named_parameters())
    assert np.array_equal(one["z"], two["z"]) and one["z"].shape == (4 * TEST, text_encoders.WIDTH)
    assert one["task"][-1] < one["task"][0]


def test_the_penalty_is_weighed_and_the_audit_is_of_what_was_held_out(small):
    none, zero, much = (
        text_encoders.encoder(Forget("minilm", *how, 0))
        for how in (("none", 0.0), ("slice", 0.0), ("slice", 2.0))
    )
    np.testing.assert_allclose(zero["z"], none["z"], atol=1e-5)
    seen = [
        float(slice_dependence(found["z"], np.eye(4)[found["t"]], slices=20, degree=3))
        for found in (none, much)
    ]
    assert seen[1] < seen[0] - 0.04 and much["task"][-1] > none["task"][-1]
    report = text_encoders.audited(Forget("minilm", "none", 0.0, 0))
    assert report["utility"][0] > 0.9 and report["error"] < 0.1
