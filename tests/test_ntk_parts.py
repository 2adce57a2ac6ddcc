"""Blocks of parameters, several outputs, the diagonal, and what a read-out may do with padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

import ntkft
from ntkft.errors import InputError
from ntkft.ntk.layout import kind_of, layer_of
from ntkft.ntk.oracle import loop_ntk
from ntkft.outputs import OutputsReadout
from ntkft.readout import Readout
from tests import tiny
from tests.helpers import relative
from tests.test_ntk_architectures import CAUSAL, ENCODERS, prompt

WORDS = ["good", "bad", "plot", "fine"]


def words(loaded: ntkft.LoadedModel) -> OutputsReadout:
    return ntkft.words_readout(loaded, WORDS, "{text} it was")


def bert() -> Readout:
    return ntkft.pooled_readout(tiny.bert())


def kernel(readout, texts=tiny.TEXTS, other=None, **options):
    return ntkft.empirical_ntk(readout, texts, other, progress=False, **options)


@pytest.mark.parametrize("make", [bert, lambda: prompt(tiny.gpt2()), lambda: prompt(tiny.llama())])
@pytest.mark.parametrize("blocks", ["kind", "layer", {"first": "*.0.*", "second": ["*.1.*"]}, lambda name: name.split(".")[-2]])
def test_parts_are_the_kernels_of_their_parameters_and_add_up(make, blocks):
    readout = make()
    whole = kernel(readout, blocks=blocks)
    assert relative(whole.matrix, loop_ntk(readout, tiny.TEXTS)) < 1e-10
    np.testing.assert_allclose(sum(whole.parts.values()), whole.matrix, rtol=1e-12, atol=1e-12)
    label = ntkft.ntk.layout.blocks_by(list(readout.parameters()), blocks)
    assert len(whole.parts) > 1
    for name, part in whole.parts.items():
        mine = [p for p in readout.parameters() if label(p) == name]
        assert relative(part, kernel(readout, parameters=mine).matrix) < 1e-10
    some = whole.part(next(iter(whole.parts)))
    assert some.n == whole.n and some.info["part"] in whole.parts and not some.parts
    with pytest.raises(InputError, match="no part 'nothing'; its parts are"):
        whole.part("nothing")


def test_parts_survive_a_file_and_a_block(tmp_path):
    whole = kernel(bert(), blocks="kind")
    back = ntkft.Kernel.load(whole.save(tmp_path / "k.npz"))
    assert back.parts.keys() == whole.parts.keys()
    small = back.block([1, 3]).parts["mlp"]
    np.testing.assert_array_equal(small, whole.parts["mlp"][np.ix_([1, 3], [1, 3])])


@pytest.mark.parametrize("name", [*ENCODERS, *CAUSAL])
def test_every_architecture_has_its_kinds_and_layers(name):
    factory, config = (ENCODERS | CAUSAL)[name]()
    options = {"add_pooling_layer": False} if name.startswith(("RoBERTa", "ALBERT")) else {}
    loaded = tiny.build(factory, config, torch.float64, **options)
    readout = ntkft.pooled_readout(loaded) if name in ENCODERS else prompt(loaded)
    kinds = {kind_of(parameter) for parameter in readout.parameters()}
    assert "other" not in kinds and {"mlp", "norm", "embedding"} <= kinds
    attention = {k for k in kinds if k.startswith("attention")}
    assert attention in ({f"attention.{x}" for x in "qkvo"}, {"attention.qkv", "attention.o"})
    depth = 1 if "ALBERT" in name else 2  # its layers are one layer, used twice
    assert sum(x.startswith("layer ") for x in map(layer_of, readout.parameters()) if x in ("layer 0", "layer 1")) >= depth


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_several_outputs_equal_the_loop(make):
    readout = words(make())
    exact = loop_ntk(readout, tiny.TEXTS)  # (n c, n c), text by text
    n, c = len(tiny.TEXTS), len(WORDS) - 1
    full = kernel(readout)
    assert full.matrix.shape == (n * c, n * c) and full.info["outputs"] == c
    assert relative(full.matrix, exact) < 1e-10
    np.testing.assert_allclose(full.scores, readout.scores(tiny.TEXTS).reshape(-1), atol=1e-10)
    assert full.matches(tiny.TEXTS) and not full.matches(tiny.TEXTS[:-1])
    trace = kernel(readout, outputs="trace")
    np.testing.assert_allclose(trace.matrix, np.einsum("ikjk->ij", exact.reshape(n, c, n, c)), rtol=1e-9, atol=1e-9)
    assert trace.scores.shape == (n, c) and trace.matches(tiny.TEXTS)
    rectangle = kernel(readout, tiny.TEXTS[:2], tiny.TEXTS[2:])
    assert relative(rectangle.matrix, exact[: 2 * c, 2 * c :]) < 1e-10
    poor = kernel(readout, tiny.TEXTS * 3, memory="2MB")
    assert poor.info["spilled_bytes"] > 0
    assert relative(poor.matrix[: n * c, n * c : 2 * n * c], exact) < 1e-10


def test_an_output_is_the_prompt_read_out_of_its_two_words():
    loaded = tiny.llama()
    pair = ntkft.prompt_readout(loaded, "{text} it was", WORDS[1], WORDS[-1])
    np.testing.assert_allclose(words(loaded).scores(tiny.TEXTS)[:, 1], pair.scores(tiny.TEXTS), atol=1e-12)
    for bad in (["good"], "good", ["good", "good"]):
        with pytest.raises(InputError, match="at least two different words"):
            ntkft.words_readout(loaded, bad, "{text} it was")


def test_the_diagonal_alone():
    readout = bert()
    whole = kernel(readout, blocks="kind")
    diagonal = ntkft.ntk_diagonal(readout, tiny.TEXTS, blocks="kind", progress=False)
    assert diagonal.keys() == whole.parts.keys()
    for name, values in diagonal.items():
        np.testing.assert_allclose(values, np.diag(whole.parts[name]), rtol=1e-12)
    every = ntkft.ntk_diagonal(readout, tiny.TEXTS, progress=False)["all"]
    np.testing.assert_allclose(every, np.diag(loop_ntk(readout, tiny.TEXTS)), rtol=1e-10)


class Padded(Readout):
    """Pads more than it must, on the left, on the right, or both."""

    left = right = 0

    def collate(self, token_ids):
        plain = super().collate(token_ids)
        return {k: torch.nn.functional.pad(v, (self.left, self.right)) for k, v in plain.items()}


def t5() -> ntkft.LoadedModel:
    config = tf.T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    return tiny.build(tf.T5EncoderModel, config, torch.float64)


@pytest.mark.parametrize(("make", "left", "right"), [(tiny.llama, 0, 5), (tiny.bert, 0, 7), (t5, 4, 0), (t5, 3, 2)])
def test_padding_does_not_matter(make, left, right):
    """On the left only for a model with relative positions that looks both ways: others are not the same function there."""
    plain = ntkft.pooled_readout(make())
    padded = Padded(plain.module, plain.loaded, plain._encode, plain.info)
    padded.left, padded.right = left, right
    assert relative(kernel(padded).matrix, kernel(plain).matrix) < 1e-9


def test_a_read_out_of_the_wrong_shape_is_an_error():
    class Tokens(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    plain = bert()
    with pytest.raises(InputError, match=r"The read-out gives shape .* for 2 texts"):
        kernel(Readout(Tokens(plain.model), plain.loaded, plain._encode, {}))
