"""The kernel engine against its oracle, one autograd.grad per text, and against what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ntkft
from ntkft.errors import InputError
from ntkft.ntk.oracle import loop_ntk
from ntkft.ntk.plan import parse_memory
from ntkft.readout import Readout
from tests import tiny
from tests.helpers import relative

WORDS = {"template": "{text} it was", "positive": "good", "negative": "bad"}


def pooled_bert(dtype=torch.float64):
    return ntkft.pooled_readout(tiny.bert(dtype))


READOUTS = {
    "bert": pooled_bert,
    "gpt2": lambda dtype=torch.float64: ntkft.prompt_readout(tiny.gpt2(dtype), **WORDS),
    "llama-tied": lambda dtype=torch.float64: ntkft.prompt_readout(tiny.llama(dtype), **WORDS),
    "llama-untied": lambda dtype=torch.float64: ntkft.prompt_readout(tiny.llama(dtype, tied=False), **WORDS),
    "llama-pooled": lambda dtype=torch.float64: ntkft.pooled_readout(tiny.llama(dtype)),
}


def kernel(readout, texts=tiny.TEXTS, other=None, **options):
    return ntkft.empirical_ntk(readout, texts, other, progress=False, **options)


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_loop(name, dtype, tolerance):
    readout = READOUTS[name](dtype)
    result = kernel(readout)
    assert relative(result.matrix, loop_ntk(readout, tiny.TEXTS)) < tolerance
    np.testing.assert_allclose(result.scores, readout.scores(tiny.TEXTS), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied"])
def test_rectangular_equals_the_loop(name):
    readout = READOUTS[name]()
    rows, columns = tiny.TEXTS[:4], tiny.TEXTS[3:]
    result = kernel(readout, rows, columns)
    assert result.matrix.shape == (4, 6)
    assert relative(result.matrix, loop_ntk(readout, rows, columns)) < 1e-10
    np.testing.assert_allclose(result.other_scores, readout.scores(columns), atol=1e-10)


def test_order_duplicates_and_batch_mates_do_not_matter():
    readout = READOUTS["llama-tied"]()
    whole = kernel(readout).matrix
    order = np.random.default_rng(0).permutation(len(tiny.TEXTS))
    shuffled = kernel(readout, [tiny.TEXTS[i] for i in order]).matrix
    np.testing.assert_allclose(shuffled, whole[np.ix_(order, order)], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole[0], whole[8], rtol=1e-9)  # the same text twice
    alone = kernel(readout, [tiny.TEXTS[4]]).matrix  # no batch mates, no padding
    np.testing.assert_allclose(alone[0, 0], whole[4, 4], rtol=1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied"])
def test_the_memory_budget_changes_where_factors_wait_and_not_the_kernel(name):
    readout = READOUTS[name]()
    texts = tiny.TEXTS * 3
    rich, poor = kernel(readout, texts), kernel(readout, texts, memory="450kB")
    assert rich.info["spilled_bytes"] == 0 < poor.info["spilled_bytes"]
    assert poor.info["batches"] > rich.info["batches"]
    np.testing.assert_allclose(poor.matrix, rich.matrix, rtol=1e-9, atol=1e-9)


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(InputError, match=r"memory is 0\.1 MB and this kernel needs at least ([0-9.]+) MB") as caught:
        kernel(READOUTS["gpt2"](), memory="60kB")
    needed = str(caught.value).split("at least ")[1].split(" MB")[0]
    kernel(READOUTS["gpt2"](), memory=f"{float(needed) + 0.1} MB")  # and that is enough


def test_frozen_parameters_and_patterns():
    readout = READOUTS["bert"]()
    attention = kernel(readout, parameters="*attention*")
    rest = kernel(readout, parameters=[n for n in readout.parameters() if "attention" not in n])
    whole = kernel(readout)
    np.testing.assert_allclose(attention.matrix + rest.matrix, whole.matrix, rtol=1e-9, atol=1e-9)
    for name, p in readout.module.named_parameters():
        p.requires_grad_("attention" in name)
    np.testing.assert_allclose(kernel(readout).matrix, attention.matrix, rtol=1e-12)
    assert all(
        p.requires_grad == ("attention" in n) for n, p in readout.module.named_parameters()
    )  # left as they were


def test_the_shares_of_the_trace_add_up():
    result = kernel(READOUTS["gpt2"]())
    assert sum(result.info["trace"].values()) == pytest.approx(np.trace(result.matrix))


def test_a_use_that_the_factors_do_not_cover_is_an_error_and_names_the_parameter():
    class Sneaky(nn.Module):
        """Reads a layer's weight behind the layer's back."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            score = self.inner(input_ids, attention_mask)
            return score + self.inner.head.weight.sum() * score.detach()

    plain = pooled_bert()
    sneaky = Readout(Sneaky(plain.module), plain.loaded, plain._encode, {"readout": "sneaky"})
    with pytest.raises(InputError, match=r"parameter inner\.head\.weight .* autograd says"):
        kernel(sneaky)


def test_a_module_called_once_for_all_texts_is_exact_too():
    """Its output has no row for each text, so the texts are captured one by one."""

    class Shared(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.table = inner, nn.Linear(3, 1).double()
            self.norm = nn.LayerNorm(3).double()

        def forward(self, input_ids, attention_mask):
            shared = self.table(self.norm(torch.arange(3.0, dtype=torch.float64)[None, :]))[0, 0]
            return self.inner(input_ids, attention_mask) * (1 + shared)

    plain = pooled_bert()
    shared = Readout(Shared(plain.module), plain.loaded, plain._encode, {"readout": "shared"})
    result = kernel(shared)
    assert relative(result.matrix, loop_ntk(shared, tiny.TEXTS)) < 1e-10
    assert not result.info["apart"] and kernel(plain).info["apart"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "*nothing*"}, "matches none of the"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"precision": "fast"}, "the model is in torch.float64"),
        ({"outputs": "some"}, "outputs is 'some'"),
        ({"blocks": "colour"}, "blocks is 'colour'"),
        ({"blocks": {"mine": "*nothing*"}}, "Block 'mine' has the pattern"),
        ({"memory": "lots"}, "memory is 'lots'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        kernel(READOUTS["bert"](), **options)


def test_bad_texts():
    readout = READOUTS["bert"]()
    for texts, message in (
        (["a", " "], r"text 1 of 2 is ' '"),
        ([], "texts is empty"),
        ("one string", "list of strings"),
    ):
        with pytest.raises(InputError, match=message):
            kernel(readout, texts)


def test_parse_memory():
    assert (
        parse_memory("2GB") == 2 * 10**9
        and parse_memory("1.5 MiB") == 3 * 2**19
        and parse_memory(1000) == 1000
    )


def test_save_and_load_round_trip(tmp_path):
    result = kernel(READOUTS["bert"](), tiny.TEXTS[:3], tiny.TEXTS[3:])
    back = ntkft.Kernel.load(result.save(tmp_path / "k.npz"))
    np.testing.assert_array_equal(back.matrix, result.matrix)
    np.testing.assert_array_equal(back.other_scores, result.other_scores)
    assert back.info == result.info and back.texts == result.texts and back.other_texts == result.other_texts
    assert back.matches(tiny.TEXTS[:3]) and not back.matches(tiny.TEXTS[:2])
    assert not any(text.encode() in (tmp_path / "k.npz").read_bytes() for text in tiny.TEXTS if len(text) > 6)
    assert [p.name for p in tmp_path.iterdir()] == ["k.npz"]


def test_loading_what_is_no_kernel(tmp_path):
    missing, text, pickled, other = (tmp_path / n for n in ("a.npz", "b.npz", "c.npz", "d.npz"))
    text.write_text("hello")
    np.savez(
        pickled, matrix=np.array([{}], dtype=object), scores=np.zeros(1), header=np.array({}, dtype=object)
    )
    np.savez(other, weights=np.ones(3))
    good = ntkft.Kernel(np.eye(3), np.zeros(3)).save(tmp_path / "good.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(good.read_bytes()[:-200])
    for path, message in (
        (missing, "no kernel at"),
        (text, "no ntkft kernel"),
        (pickled, "no ntkft kernel"),
        (other, "it has no"),
        (cut, "no ntkft kernel"),
    ):
        with pytest.raises(InputError, match=message):
            ntkft.Kernel.load(path)
    with pytest.raises(InputError, match=r"stored as \.npz"):
        ntkft.Kernel(np.eye(2), np.zeros(2)).save(tmp_path / "k.pkl")


def test_kernel_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="rows and scores must be as many"):
        ntkft.Kernel(np.eye(3), np.zeros(2))
    with pytest.raises(InputError, match="other_scores is None"):
        ntkft.Kernel(np.ones((2, 3)), np.zeros(2))
    with pytest.raises(InputError, match="1 kernel entries"):
        ntkft.Kernel(np.array([[np.nan, 0], [0, 1]]), np.zeros(2))


def test_centred_spectrum_is_that_of_the_projected_matrix():
    matrix = np.random.default_rng(0).standard_normal((6, 6))
    matrix = matrix @ matrix.T + 5
    centring = np.eye(6) - 1 / 6
    result = ntkft.Kernel(matrix, np.zeros(6)).spectrum(centre=True)
    np.testing.assert_allclose(
        result.eigenvalues, np.linalg.eigvalsh(centring @ matrix @ centring / 6)[::-1], atol=1e-12
    )
