"""The formulas of attention's kernel against autograd and against the kernel engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkft
from ntkft.attention import (
    Heads,
    Layer,
    attend,
    find_layer,
    head_blocks,
    head_gradients,
    layer_blocks,
    layer_gradients,
    layer_patterns,
    layer_weights,
    scores_only,
    see_layers,
)
from ntkft.errors import InputError
from ntkft.experiments.attention_ntk import block_shares
from tests import tiny
from tests.helpers import relative


def readouts():
    """Tiny BERT and Llama in float64. Llama's eager attention rounds softmax to float32; torch's own does not."""
    for build in (tiny.bert, tiny.llama):
        loaded = build()
        loaded.model.set_attn_implementation("sdpa")
        yield ntkft.pooled_readout(loaded)


BOTH = list(readouts())
each_readout = pytest.mark.parametrize("readout", BOTH, ids=["bert", "llama"])


@each_readout
@pytest.mark.parametrize("index", [0, 1])
def test_a_layers_gradients_are_autograds(readout, index):
    text = tiny.TEXTS[4]
    (seen,) = see_layers(readout, text, [index])
    layer = layer_weights(readout, index)
    ours = layer_gradients(layer, seen)
    parameters = readout.parameters()
    for block, pattern in layer_patterns(readout, index).items():
        weight = parameters[pattern.replace("*", "weight")]
        (truth,) = torch.autograd.grad(readout([text])[0], weight)
        got = ours[f"W_{block.upper()}"]
        got = torch.cat(list(got), 1 if block == "o" else 0)  # heads side by side, as in the model
        assert relative(got.numpy(), truth.numpy()) < 1e-10
        bias = pattern.replace("*", "bias")
        if bias in parameters and block != "k":
            (truth,) = torch.autograd.grad(readout([text])[0], parameters[bias])
            assert relative(ours[f"b_{block.upper()}"].flatten().numpy(), truth.numpy()) < 1e-10


@each_readout
def test_a_layers_blocks_are_the_engines(readout):
    for index in (0, 1):
        patterns = layer_patterns(readout, index)
        engine = ntkft.empirical_ntk(readout, tiny.TEXTS, blocks=patterns, progress=False)
        ours = layer_blocks(readout, tiny.TEXTS, index)
        assert max(relative(ours[b], engine.parts[b]) for b in "qkvo") < 1e-10


def test_key_bias_has_no_gradient_in_bert():
    (seen,) = see_layers(BOTH[0], tiny.TEXTS[4], [0])
    gradients = layer_gradients(layer_weights(BOTH[0], 0), seen)
    assert gradients["b_K"].norm() < 1e-12 * gradients["b_Q"].norm()


def test_several_layers_are_seen_in_one_pass():
    together = list(see_layers(BOTH[1], tiny.TEXTS[2], [0, 1]))
    alone = [next(see_layers(BOTH[1], tiny.TEXTS[2], [i])) for i in (0, 1)]
    for a, b in zip(together, alone, strict=True):
        assert a.causal and torch.equal(a.x, b.x) and torch.allclose(a.g, b.g)


def test_blocks_of_heads_are_inner_products_of_their_gradients():
    rng = np.random.default_rng(0)
    heads, (x, x2) = Heads.draw(rng, 7, 8, 4), rng.standard_normal((2, 6, 8))
    one, two = head_gradients(heads, x, 2, tau=1.7), head_gradients(heads, x2, 5, tau=1.7)
    blocks = head_blocks(heads, x, 2, x2, 5, tau=1.7)
    for b in "ovqk":
        assert np.allclose(blocks[b], (one[b] * two[b]).reshape(7, -1).sum(1), rtol=1e-12)


def test_temperature_gradients_are_slopes():
    """∂a/∂W_Q and ∂a/∂W_K at τ by central differences of the output."""
    rng = np.random.default_rng(1)
    heads, x = Heads.draw(rng, 1, 8, 4), rng.standard_normal((6, 8))
    gradients = head_gradients(heads, x, 0, tau=2.5)

    def output(W_Q, W_K):
        moved = Heads(W_Q, W_K, heads.W_V, heads.w_O)
        return float(heads.w_O[0] @ heads.W_V[0] @ attend(moved, x, 0, tau=2.5)[1][0])

    step = rng.standard_normal((1, 4, 8))
    for b, one, two in (("q", 1e-6 * step, 0), ("k", 0, 1e-6 * step)):
        slope = (output(heads.W_Q + one, heads.W_K + two) - output(heads.W_Q - one, heads.W_K - two)) / 2e-6
        assert np.isclose(slope, (gradients[b] * step).sum(), rtol=1e-6)


def test_scores_only_is_the_mean_over_values_and_outputs():
    rng = np.random.default_rng(2)
    heads, (x, x2) = Heads.draw(rng, 100_000, 8, 4), rng.standard_normal((2, 6, 8))
    whole, part = head_blocks(heads, x, 0, x2, 1), scores_only(heads, x, 0, x2, 1, 1 / 8, 1 / 4)
    for b in "ovqk":
        difference = whole[b] - part[b]
        assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_shares_add_up_and_follow_their_definition():
    rng = np.random.default_rng(3)
    phi = [rng.standard_normal((30, width)) for width in (3, 5)]
    residual = rng.standard_normal(30) + 1
    shares, width = block_shares({"a": phi[0] @ phi[0].T, "b": phi[1] @ phi[1].T}, residual)
    r = residual - residual.mean()
    rates = [((r @ p) ** 2).sum() for p in phi]
    assert np.allclose(shares.sum(1), 1) and np.allclose(shares[2], np.array(rates) / sum(rates))
    centred = [((p - p.mean(0)) ** 2).sum() for p in phi]
    assert np.allclose(shares[1], np.array(centred) / sum(centred))
    assert (width > 0).all()


def test_errors_name_both_sides():
    heads = Heads.draw(np.random.default_rng(0), 1, 8, 4)
    with pytest.raises(InputError, match=r"q is 6: x must be"):
        attend(heads, np.zeros((6, 8)), 6)
    with pytest.raises(InputError, match="has no layer 9"):
        find_layer(BOTH[0], 9)
    with pytest.raises(InputError, match="3 query heads, 2 keys"):
        Layer(*(torch.zeros(k, 4, 8) for k in (3, 2, 2, 3)), *(torch.zeros(k, 4) for k in (3, 2, 2)))
