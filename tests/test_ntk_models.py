"""The kernel of the book's two models, with all their parameters, against autograd, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import ntkft
from ntkft.ntk.oracle import loop_ntk
from ntkft.readout import Readout
from tests import tiny
from tests.helpers import relative

TEXTS = [
    "A quiet triumph, start to finish.",
    "The battery died twice.",
    "Not for me, thanks.",
    "I would happily watch the second half again, but never the first.",
    "Overpriced!",
    "They promised soup and brought us lukewarm water with a carrot in it.",
    "Good value, slow delivery, friendly answers.",
    "What were they thinking when they glued the lid shut?",
]  # 1 to 13 words
LONG = "The plot keeps turning, and so does the reader's stomach. " * 40


def lean_loop(readout: Readout, texts: Sequence[str], at_once: int = 40_000_000) -> np.ndarray:
    """As `loop_ntk`, with memory for the gradients of about `at_once` parameters only: the loop once per group of them."""
    groups: list[list[torch.Tensor]] = [[]]
    for tensor in readout.parameters().values():
        if groups[-1] and sum(p.numel() for p in groups[-1]) + tensor.numel() > at_once:
            groups.append([])
        groups[-1].append(tensor)
    gram = torch.zeros(len(texts), len(texts), dtype=torch.float64)
    for group in groups:
        rows = [torch.autograd.grad(readout([text]).sum(), group, allow_unused=True) for text in texts]
        for column in zip(*rows, strict=True):  # one parameter's gradient for each text
            if column[0] is None:
                continue
            for pieces in zip(*(g.flatten().split(2**20) for g in column), strict=True):
                block = torch.stack(pieces).double()  # (n, up to 2^20)
                gram += block @ block.T
    return gram.numpy()


@pytest.mark.parametrize("at_once", [1, 3000, 10**9])
def test_the_lean_loop_is_the_loop(at_once):
    readout = ntkft.pooled_readout(tiny.llama(tied=False))  # its output weight has no gradient
    assert relative(lean_loop(readout, tiny.TEXTS, at_once), loop_ntk(readout, tiny.TEXTS)) < 1e-12


@pytest.mark.slow
def test_minilm_equals_the_loop():
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0)
    kernel = ntkft.empirical_ntk(readout, TEXTS, progress=False)
    assert kernel.info["parameters"]["count"] == 22_565_376 + 384
    assert relative(kernel.matrix, loop_ntk(readout, TEXTS)) < 1e-5
    np.testing.assert_allclose(kernel.scores, [readout([text]).item() for text in TEXTS], atol=1e-5)


@pytest.mark.slow
def test_smollm2_equals_the_loop():
    readout = ntkft.prompt_readout(ntkft.load_model("smollm2"))
    kernel = ntkft.empirical_ntk(readout, TEXTS, memory="1GB", progress=False)
    assert kernel.info["parameters"]["count"] == 134_515_008
    assert relative(kernel.matrix, lean_loop(readout, TEXTS)) < 1e-5
    np.testing.assert_allclose(kernel.scores, [readout([text]).item() for text in TEXTS], atol=1e-4)

    (ids,) = readout.encode([LONG])  # the real tokenizer: a long text is cut, the question behind it is not
    tokenizer = readout.loaded.tokenizer
    question = tokenizer("\nOverall, it was", add_special_tokens=False)["input_ids"]
    assert ids[-len(question) :] == question and 120 <= len(ids) <= 128
    assert ids[:100] == tokenizer(LONG)["input_ids"][:100]
