"""Read-outs: one text at a time is the truth, and padding, batches, seeds and frozen weights must not disturb it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.errors import InputError
from tests import tiny

WORDS = {"template": "now {text} it was", "positive": "good", "negative": "bad"}
LONG = " ".join(f"word{i}" for i in range(300))

READOUTS = {
    "bert-pooled": lambda: ntkft.pooled_readout(tiny.bert()),
    "gpt2-pooled": lambda: ntkft.pooled_readout(tiny.gpt2()),
    "llama-pooled": lambda: ntkft.pooled_readout(tiny.llama()),
    "gpt2-prompt": lambda: ntkft.prompt_readout(tiny.gpt2(), **WORDS),
    "llama-prompt": lambda: ntkft.prompt_readout(tiny.llama(), **WORDS),
    "llama-untied-prompt": lambda: ntkft.prompt_readout(tiny.llama(tied=False), **WORDS),
}
each_readout = pytest.mark.parametrize("name", READOUTS)


class Remembering(tiny.WordTokenizer):
    """A tokenizer that can decode what it has seen: cutting a text is then exact."""

    def __init__(self):
        self.words = {}

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=512):
        ids = super().__call__(text, max_length=max_length)["input_ids"]
        self.words |= dict(zip(ids, text.split(), strict=False))
        return {"input_ids": ids}

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


# --- Values -------------------------------------------------------------------------------------------------


@each_readout
def test_scores_are_those_of_one_text_at_a_time(name):
    readout = READOUTS[name]()
    alone = np.array([readout([text]).item() for text in tiny.TEXTS])  # a batch of one has no padding
    assert np.ptp(alone) > 1e-3  # the texts differ, or the comparison proves nothing
    for batch_size in (2, 4, 32):
        np.testing.assert_allclose(readout.scores(tiny.TEXTS, batch_size), alone, rtol=0, atol=1e-10)


@each_readout
def test_the_padding_token_does_not_matter(name):
    readout = READOUTS[name]()
    scores = readout.scores(tiny.TEXTS)
    readout._pad = 5
    np.testing.assert_allclose(readout.scores(tiny.TEXTS), scores, rtol=0, atol=1e-10)


@each_readout
def test_a_call_is_differentiable_and_equals_the_scores(name):
    readout = READOUTS[name]()
    values = readout(tiny.TEXTS)
    assert values.shape == (len(tiny.TEXTS),) and values.requires_grad
    scores = readout.scores(tiny.TEXTS)
    assert scores.dtype == np.float64 and scores.shape == (len(tiny.TEXTS),)
    np.testing.assert_allclose(values.detach().numpy(), scores, rtol=0, atol=1e-10)


@each_readout
def test_the_derivative_is_that_of_the_scores(name):
    """Along a random direction, against a symmetric difference of `scores`; Llama's norms are in float32 at any rate."""
    readout = READOUTS[name]()
    weights = list(readout.parameters().values())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]
    gradients = torch.autograd.grad(readout(tiny.TEXTS[:3]).sum(), weights, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    step, ends = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append(readout.scores(tiny.TEXTS[:3]).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=5e-3 if "llama" in name else 1e-5)


def test_pooled_is_the_mean_of_the_last_hidden_states_against_the_head():
    readout = READOUTS["bert-pooled"]()
    ids = torch.tensor(readout.encode([tiny.TEXTS[2]]))
    hidden = readout.model(input_ids=ids).last_hidden_state[0]  # (T, d)
    head = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).double()
    expected = (hidden @ head[0]).mean() / 16**0.5
    assert readout.scores([tiny.TEXTS[2]])[0] == pytest.approx(expected.item(), rel=1e-10)


def test_prompt_is_the_difference_of_two_logits_after_the_last_word():
    readout = READOUTS["llama-prompt"]()
    tokenizer = readout.loaded.tokenizer
    ids = tokenizer(f"now {tiny.TEXTS[2]} it was")["input_ids"]
    logits = readout.model(input_ids=torch.tensor([ids])).logits[0, -1]
    good, bad = (tokenizer(word)["input_ids"][0] for word in ("good", "bad"))
    expected = (logits[good] - logits[bad]).item()
    assert readout.scores([tiny.TEXTS[2]])[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["gpt2-prompt", "llama-prompt", "llama-untied-prompt"])
def test_selected_positions_give_what_all_logits_give(name, monkeypatch):
    readout = READOUTS[name]()
    seen = []
    forward = readout.model.forward

    def spy(**inputs):
        seen.append(inputs)
        return forward(**inputs)

    monkeypatch.setattr(readout.model, "forward", spy)
    assert readout.module._can_select
    selected = readout(tiny.TEXTS)
    readout.module._can_select = False
    full = readout(tiny.TEXTS)
    assert ["logits_to_keep" in inputs for inputs in seen] == [True, False]
    assert seen[0]["logits_to_keep"].tolist() == sorted({len(ids) - 1 for ids in readout.encode(tiny.TEXTS)})
    np.testing.assert_allclose(selected.detach(), full.detach(), rtol=0, atol=1e-10)


# --- The random head ----------------------------------------------------------------------------------------


def test_the_head_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = ntkft.pooled_readout(tiny.bert(), seed=4).scores(tiny.TEXTS)
    torch.manual_seed(2)
    np.testing.assert_array_equal(ntkft.pooled_readout(tiny.bert(), seed=4).scores(tiny.TEXTS), first)
    other = ntkft.pooled_readout(tiny.bert(), seed=5).scores(tiny.TEXTS)
    assert np.abs(other - first).max() > 1e-3


def test_the_head_is_standard_gaussian():
    """1000 seeds of 16 numbers: mean 0, variance 1, within five standard errors."""
    body = tiny.bert()
    draws = np.concatenate(
        [ntkft.pooled_readout(body, seed=k).module.head.weight.detach().ravel() for k in range(1000)]
    )
    assert abs(draws.mean()) < 5 / len(draws) ** 0.5 and abs(draws.var() - 1) < 5 * (2 / len(draws)) ** 0.5


@pytest.mark.parametrize(
    ("make", "load", "options"),
    [(ntkft.pooled_readout, tiny.bert, {}), (ntkft.prompt_readout, tiny.gpt2, WORDS)],
)
def test_torch_global_generator_is_left_as_it_was(make, load, options):
    loaded = load()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    make(loaded, **options)
    assert torch.equal(torch.get_rng_state(), before)


# --- Parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tied"), [("gpt2-prompt", True), ("llama-prompt", True), ("llama-untied-prompt", False)]
)
def test_a_tied_weight_appears_once(name, tied):
    readout = READOUTS[name]()
    parameters = readout.parameters()
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)
    assert sum(p.shape == (tiny.VOCABULARY, 16) for p in parameters.values()) == (1 if tied else 2)
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in readout.model.parameters())


def test_the_head_counts_and_frozen_weights_do_not():
    readout = READOUTS["bert-pooled"]()
    everything = readout.parameters()
    assert len(everything) == 1 + len(list(readout.model.parameters()))
    assert any(p is readout.module.head.weight for p in everything.values())
    for parameter in readout.model.parameters():
        parameter.requires_grad_(False)
    (left,) = readout.parameters().values()
    assert left is readout.module.head.weight
    readout(tiny.TEXTS[:2]).sum().backward()
    assert left.grad is not None and all(p.grad is None for p in readout.model.parameters())


def test_repr_counts_the_parameters():
    count = sum(p.numel() for p in READOUTS["gpt2-prompt"]().parameters().values())
    assert repr(READOUTS["gpt2-prompt"]()) == f"Readout(prompt of GPT2LMHeadModel, {count:,} parameters)"


# --- What does not fit --------------------------------------------------------------------------------------


@each_readout
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("good film", r"texts is one string, a list of strings is needed: write \[text\]"),
        ([], "texts is empty, at least one text is needed"),
        (["good", "  \n"], r"text 1 of 2 is '  \\n', not a text"),
        (["good", "bad", None], "text 2 of 3 is None, not a text"),
    ],
)
def test_texts_that_are_none(name, texts, message):
    readout = READOUTS[name]()
    for use in (readout, readout.scores, readout.encode):
        with pytest.raises(InputError, match=message):
            use(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template": "it was"},
            r"The template 'it was' has \{text\} 0 times and needs it once: put \{text\} where the text belongs",
        ),
        (
            {"positive": "very good"},
            "'very good' is 2 tokens of GPT2LMHeadModel and a read-out word must be one",
        ),
        ({"negative": " "}, "' ' is 0 tokens of GPT2LMHeadModel"),
        ({"max_tokens": 3}, "The template alone fills max_tokens=3"),
    ],
)
def test_prompts_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        ntkft.prompt_readout(tiny.gpt2(), **(WORDS | options))


def test_an_encoder_has_no_next_word():
    with pytest.raises(
        InputError, match=r"BertModel is an encoder without next-word logits .* use pooled_readout"
    ):
        ntkft.prompt_readout(tiny.bert(), **WORDS)


# --- Long texts ---------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_and_the_question_behind_it_survives():
    loaded = tiny.gpt2()
    tokenizer = Remembering()
    loaded = type(loaded)(loaded.model, tokenizer, loaded.info)
    readout = ntkft.prompt_readout(loaded, **WORDS, max_tokens=20)
    (ids,) = readout.encode([LONG])
    head = " ".join(LONG.split()[:17])
    assert ids == tokenizer(f"now {head} it was")["input_ids"] and len(ids) == 20
    (fits,) = readout.encode([head])
    assert fits == ids  # 17 words are just not cut
    assert len(readout.encode(["good"])[0]) == 4


def test_a_long_text_is_cut_for_the_pooled_readout():
    readout = ntkft.pooled_readout(tiny.bert(), max_tokens=7)
    head = " ".join(LONG.split()[:7])
    assert readout.encode([LONG]) == readout.encode([head])
    assert readout.encode([LONG]) != readout.encode([head.rsplit(" ", 1)[0]])
