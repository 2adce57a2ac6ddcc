"""The tangent of a model: its value, its gradient, its training in closed form, and the vector that training leaves."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ntkft
from ntkft.errors import InputError
from ntkft.finetune import preserved_weights, train
from ntkft.ntk.oracle import loop_ntk
from ntkft.outputs import words_readout
from ntkft.tangent import TangentModule, linearise
from ntkft.task_vectors import TaskVector
from tests import tiny
from tests.helpers import relative

N = len(tiny.TEXTS)
Y = np.random.default_rng(0).standard_normal(N)
OTHERS = ["thin film", "a good plot", "honestly", "the cast would see it again"]
WORDS = {"positive": "great", "negative": "bad"}
READOUTS = {
    "bert": lambda: ntkft.pooled_readout(tiny.bert()),
    "gpt2": lambda: ntkft.prompt_readout(tiny.gpt2(), **WORDS),
    "llama-tied": lambda: ntkft.prompt_readout(tiny.llama(), **WORDS),
    "llama-untied": lambda: ntkft.pooled_readout(tiny.llama(tied=False)),
}


@pytest.fixture(params=READOUTS)
def readout(request, monkeypatch):
    """Llama's norms and softmax are computed in float32 whatever the weights are; here they are not."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None: x.softmax(dim))
    return READOUTS[request.param]()


def move(readout, seed=0, size=0.1):
    """Move every weight in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in readout.parameters().values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return readout


def state(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def gradients(readout, texts):
    """∂f(x_i)/∂θ by plain autograd, one text at a time: a list of dicts."""
    rows = []
    for text in texts:
        # Without a use is the next-word head of a pooled Llama.
        found = torch.autograd.grad(readout([text])[0], list(readout.parameters().values()), materialize_grads=True)
        rows.append(dict(zip(readout.parameters(), found, strict=True)))
    return rows


# --- The function -------------------------------------------------------------------------------------------


def test_the_tangent_touches_the_model(readout):
    tangent = linearise(readout)
    assert isinstance(tangent, ntkft.Readout) and list(tangent.parameters()) == list(readout.parameters())
    np.testing.assert_allclose(tangent.scores(tiny.TEXTS), readout.scores(tiny.TEXTS), rtol=0, atol=1e-14)
    assert list(tangent.module.state_dict()) == list(readout.module.state_dict())


def test_the_tangent_is_the_first_order_expansion(readout):
    texts = tiny.TEXTS + OTHERS
    tangent = linearise(readout)
    move(tangent)
    tau = TaskVector(readout, tangent, dtype=torch.float64)
    change = [sum(float((g * tau.tensors[name]).sum()) for name, g in row.items()) for row in gradients(readout, texts)]
    expected = readout.scores(texts) + change
    np.testing.assert_allclose(tangent.scores(texts), expected, rtol=0, atol=1e-10)
    assert np.abs(change).max() > 0.1
    # And it is not the model there: the vector, applied to the model, gives another function.
    with tau.applied(readout):
        assert np.abs(readout.scores(texts) - expected).max() > 1e-3


def test_the_tangent_is_where_the_model_goes_for_small_steps(readout):
    """A tenth of the step: the gap between model and tangent falls to a hundredth."""
    tangent = linearise(readout)
    direction = TaskVector(readout, move(linearise(readout)), dtype=torch.float64)
    gaps = []
    for scale in (1e-2, 1e-3):
        with direction.applied(readout, scale), direction.applied(tangent, scale):
            gaps.append(np.linalg.norm(readout.scores(OTHERS) - tangent.scores(OTHERS)))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


def test_the_gradient_is_that_at_the_start_whatever_the_weights_are(readout):
    expected = gradients(readout, OTHERS)
    tangent = linearise(readout)
    for size in (0.0, 0.1, 10.0):
        for row, target in zip(gradients(move(tangent, size=size), OTHERS), expected, strict=True):
            for name, g in row.items():
                torch.testing.assert_close(g, target[name], rtol=0, atol=1e-12)


def test_the_kernel_is_that_of_the_model(readout):
    kernel = loop_ntk(readout, tiny.TEXTS)
    tangent = linearise(readout)
    np.testing.assert_allclose(ntkft.empirical_ntk(tangent, tiny.TEXTS, progress=False).matrix, kernel, rtol=1e-10, atol=1e-10)
    move(tangent)
    np.testing.assert_allclose(loop_ntk(tangent, tiny.TEXTS), kernel, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="the tangent has that of the model at θ0"):
        ntkft.empirical_ntk(tangent, tiny.TEXTS, progress=False)


# --- Training -----------------------------------------------------------------------------------------------


def test_training_the_tangent_is_the_closed_form(readout):
    """At a step size where the model itself is far from the closed form, and on texts it was not trained on."""
    kernel, cross = loop_ntk(readout, tiny.TEXTS), loop_ntk(readout, OTHERS, tiny.TEXTS)
    step = 1.5 / np.linalg.eigvalsh(kernel / N)[-1]
    descent = ntkft.descend(kernel, Y, readout.scores(tiny.TEXTS), step_size=step)
    tangent = linearise(readout)
    before = readout.scores(OTHERS)
    with preserved_weights(tangent):
        path = train(tangent, tiny.TEXTS, Y, step_size=step, epochs=30, progress=False)
        after = tangent.scores(OTHERS)
    assert relative(path.fitted, descent.fitted(path.eta)) < 1e-8
    assert relative(after, descent.predict(path.eta[-1], cross, before)) < 1e-8
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(tangent.scores(OTHERS), before, rtol=0, atol=1e-14)  # and the weights are back
    with preserved_weights(readout):
        real = train(readout, tiny.TEXTS, Y, step_size=step / 2, epochs=5, progress=False)
    half = ntkft.descend(kernel, Y, readout.scores(tiny.TEXTS), step_size=step / 2)
    assert relative(real.fitted, half.fitted(real.eta)) > 1e-3


def test_a_task_vector_is_a_kernel_expansion_carried_in_weight_space(readout):
    """τ = Σ_i α_i ∇f(x_i; θ0), with the closed form's coefficients."""
    kernel = loop_ntk(readout, tiny.TEXTS)
    step = 1 / np.linalg.eigvalsh(kernel / N)[-1]
    descent = ntkft.descend(kernel, Y, readout.scores(tiny.TEXTS), step_size=step)
    tangent = linearise(readout)
    train(tangent, tiny.TEXTS, Y, step_size=step, epochs=25, progress=False)
    tau = TaskVector(readout, tangent, dtype=torch.float64)
    alpha, rows = descent.coefficients(25 * step), gradients(readout, tiny.TEXTS)
    total = {name: sum(a * row[name] for a, row in zip(alpha, rows, strict=True)) for name in rows[0]}
    expansion = TaskVector.from_tensors(total, dtype=torch.float64, base=tau.base)
    assert (tau - expansion).norm() < 1e-8 * tau.norm()
    assert tau.norm() ** 2 == pytest.approx(alpha @ kernel @ alpha, rel=1e-8)


def test_llama_as_it_is_holds_to_the_rounding_of_its_norms():
    """With the norms and the softmax in float32, all of this is true to seven digits."""
    readout = READOUTS["llama-tied"]()
    kernel = loop_ntk(readout, tiny.TEXTS)
    step = 1 / np.linalg.eigvalsh(kernel / N)[-1]
    path = train(linearise(readout), tiny.TEXTS, Y, step_size=step, epochs=10, progress=False)
    descent = ntkft.descend(kernel, Y, readout.scores(tiny.TEXTS), step_size=step)
    assert relative(path.fitted, descent.fitted(path.eta)) < 1e-6


# --- What is shared and what is not -------------------------------------------------------------------------


def test_model_and_tangent_share_nothing():
    readout = READOUTS["bert"]()
    before, function = state(readout.module), readout.scores(OTHERS)
    tangent = linearise(readout)
    move(tangent)
    assert all(torch.equal(t, before[name]) for name, t in readout.module.state_dict().items())
    here = tangent.scores(OTHERS)
    move(readout, seed=1)  # also the other way: θ0 is a copy
    np.testing.assert_array_equal(tangent.scores(OTHERS), here)
    assert np.abs(readout.scores(OTHERS) - function).max() > 1e-3
    assert tangent.info["linearised"] and "linearised" not in readout.info
    # The language model inside has the weights θ: applying the vector and reading the model there agree.
    assert tangent.module.get_parameter("model.embeddings.LayerNorm.bias") is tangent.model.embeddings.LayerNorm.bias


def test_tied_weights_stay_tied():
    readout = READOUTS["gpt2"]()
    tangent = linearise(readout)
    assert tangent.model.lm_head.weight is tangent.model.transformer.wte.weight
    assert len(tangent.module._start) == len(list(readout.module.named_parameters()))


def test_frozen_weights_stay_out_of_the_training_and_in_the_function():
    readout = READOUTS["bert"]()
    for name, p in readout.module.named_parameters():
        p.requires_grad_("layer.1" in name)
    tangent = linearise(readout)
    assert list(tangent.parameters()) == list(readout.parameters())
    train(tangent, tiny.TEXTS, Y, step_size=0.01, epochs=2, progress=False)
    tau = TaskVector(readout, tangent)
    assert all((t.abs().max() > 0) == ("layer.1" in name) for name, t in tau.tensors.items() if not name.endswith("key.bias"))
    # A vector that moves a frozen weight moves the tangent as it would a free one.
    with torch.no_grad():
        tangent.module.get_parameter("model.embeddings.LayerNorm.bias").add_(0.1)
    free = linearise(READOUTS["bert"]())
    with torch.no_grad():
        for name, p in free.module.named_parameters():
            p.copy_(tangent.module.get_parameter(name))
    np.testing.assert_allclose(tangent.scores(OTHERS), free.scores(OTHERS), rtol=0, atol=1e-13)


def test_fused_attention_is_written_out_in_the_copy_only():
    model = tiny.bert().model
    model.set_attn_implementation("sdpa")
    readout = ntkft.pooled_readout(tiny.wrap(model, "encoder", torch.float64))
    tangent = linearise(readout)
    assert (model.config._attn_implementation, tangent.model.config._attn_implementation) == ("sdpa", "eager")
    np.testing.assert_allclose(move(tangent).scores(OTHERS), move(linearise(READOUTS["bert"]())).scores(OTHERS), atol=1e-12)


def test_several_outputs_are_linearised_at_once():
    readout = words_readout(tiny.gpt2(), ["great", "bad", "no"], "{text} it was")
    tangent = move(linearise(readout))
    first = move(linearise(ntkft.prompt_readout(tiny.gpt2(), "{text} it was", "great", "no")))
    assert tangent.scores(OTHERS).shape == (4, 2)
    np.testing.assert_allclose(tangent.scores(OTHERS)[:, 0], first.scores(OTHERS), rtol=0, atol=1e-12)


# --- Any module ---------------------------------------------------------------------------------------------


def test_a_module_is_linearised_with_all_it_returns():
    model = tiny.llama().model
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    tangent = linearise(model)
    assert isinstance(tangent, TangentModule)
    output = tangent(input_ids=ids, use_cache=False)
    torch.testing.assert_close(output.logits, model(input_ids=ids).logits, rtol=0, atol=1e-14)
    with pytest.raises(InputError, match="use_cache=False"):
        tangent(input_ids=ids)


def test_a_tangent_moves_copies_and_switches_as_a_whole():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double().eval()
    with torch.no_grad():
        model[1].running_mean.add_(0.5)
    tangent = linearise(model)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tangent.get_parameter("0.weight").add_(0.1)
    value = tangent(x)
    twin = deepcopy(tangent)
    with torch.no_grad():
        twin.get_parameter("0.weight").add_(0.1)
    assert torch.equal(tangent(x), value) and not torch.equal(twin(x), value)
    single = deepcopy(tangent).float()
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), value, rtol=1e-5, atol=1e-5)
    parts = [tangent, tangent._function[0], tangent.get_submodule("1")]
    for mode in (False, True, False):
        tangent.train(mode)
        assert [part.training for part in parts] == [mode] * 3
    again = linearise(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double().eval())
    again.load_state_dict(tangent.state_dict())  # the same names, so files fit
    assert torch.equal(again.get_parameter("0.weight"), tangent.get_parameter("0.weight"))


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Around(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


@pytest.mark.parametrize("function", [Odd.apply, lambda x: scaled_dot_product_attention(x, x, x)])
def test_an_operation_without_a_forward_derivative_is_named(function):
    with pytest.raises(InputError, match="no forward-mode derivative, write it in plain torch"):
        linearise(Around(function))(torch.ones(1, 2, 3, 4))


def test_an_error_of_the_model_stays_what_it_is():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linearise(nn.Linear(2, 1))(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.bert(), "A LoadedModel is a language model, not yet a function"),
        (lambda: nn.Tanh(), "The Tanh has no weights"),
        (lambda: linearise(nn.Linear(1, 1)), "The TangentModule is a tangent already"),
        (lambda: linearise(READOUTS["bert"]()), "The TangentModule is a tangent already"),
        (lambda: "minilm", "linearise was given str"),
    ],
)
def test_bad_input_is_one_sentence(model, message):
    with pytest.raises(InputError, match=message):
        linearise(model())
