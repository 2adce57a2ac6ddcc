"""Differences of weights: the laws of a vector space, models changed and put back, files, and LoRA written out."""

from __future__ import annotations

import json
import math
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import ntkft
from ntkft.errors import InputError
from ntkft.task_vectors import TaskVector, shared_names
from tests import tiny

SHAPES = {"layers.0.weight": (2, 3), "layers.0.bias": (2,), "layers.1.weight": (1, 2)}
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
Double = partial(TaskVector, dtype=torch.float64)
WORDS = {"positive": "great", "negative": "bad"}


def moved(model, seed=0, size=0.01):
    """A copy of a module with every weight moved at random."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a, b):
    return same(a.tensors, b.tensors)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# --- The vector space ---------------------------------------------------------------------------------------


@st.composite
def vectors(draw):
    """Entries are small whole numbers, so that sums and dyadic multiples are exact and the laws hold to the bit."""
    whole = st.integers(-64, 64)
    return TaskVector.from_tensors(
        {
            name: torch.tensor(draw(st.lists(whole, min_size=math.prod(s), max_size=math.prod(s))), dtype=torch.float32).reshape(
                s
            )
            for name, s in SHAPES.items()
        },
        base="b",
    )


scales = st.integers(-16, 16).map(lambda k: k / 4)


@settings(deadline=None, max_examples=40)
@given(vectors(), vectors(), vectors(), scales, scales)
def test_task_vectors_obey_the_laws_of_a_vector_space(a, b, c, s, t):
    zero = 0 * a
    assert equal(a + b, b + a) and equal((a + b) + c, a + (b + c))
    assert equal(a + zero, a) and (a + -a).norm() == 0 and equal(a - b, a + -b)
    assert equal(s * (a + b), s * a + s * b) and equal((s + t) * a, s * a + t * a)
    assert equal(s * (t * a), (s * t) * a) and equal(1 * a, a) and equal(a / 4, 0.25 * a)
    assert equal(sum([a, b, c]), a + b + c) and equal(a * s, s * a) and equal(np.float64(s) * a, s * a)
    assert (a + b).base == (s * a).base == "b"


@settings(deadline=None, max_examples=40)
@given(vectors(), vectors(), vectors(), scales)
def test_the_inner_product_is_one(a, b, c, s):
    assert a.dot(b) == b.dot(a) and (s * a + c).dot(b) == s * a.dot(b) + c.dot(b)
    assert a.norm() ** 2 == pytest.approx(a.dot(a), rel=1e-14) and a.dot(a) >= 0
    assert (a + b).norm() <= (a.norm() + b.norm()) * (1 + 1e-14)
    if a.norm() and b.norm():
        assert abs(a.cosine(b)) <= 1 + 1e-14 and a.cosine(b) == pytest.approx(-a.cosine(-2 * b), abs=1e-14)


def test_norm_and_dot_are_those_of_the_flat_vectors():
    model = tiny.bert().model
    a, b = Double(model, moved(model)), Double(model, moved(model, 1))
    x, y = (np.concatenate([t.numpy().ravel() for t in v.tensors.values()]) for v in (a, b))
    assert a.norm() == pytest.approx(np.linalg.norm(x), rel=1e-13) and a.dot(b) == pytest.approx(x @ y, rel=1e-10)
    assert a.cosine(b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-10)


def test_sums_are_of_double_precision():
    """Each of these loses what it is after in float32: the small entry, the seventeenth digit, the last term of a square."""
    combine = ntkft.task_vectors.linear_combination
    big, small = (TaskVector.from_tensors({"w": torch.full((4,), x)}) for x in (2.0**24, 1.0))
    assert combine([big, small, big], [1, 1, -1]).tensors["w"].tolist() == [1.0] * 4
    third = combine([TaskVector.from_tensors({"w": torch.ones(1)}, dtype=torch.float64)], [1 / 3]).tensors["w"]
    assert third.item() == 1 / 3
    ones = TaskVector.from_tensors({"w": torch.full((1000,), 1 + 2.0**-12)})
    assert ones.dot(ones) == pytest.approx(1000 * (1 + 2.0**-12) ** 2, rel=1e-13)
    assert ones.norm() ** 2 == pytest.approx(ones.dot(ones), rel=1e-15)


def test_layers_have_norms_and_cosines():
    model = tiny.gpt2().model
    a, b = Double(model, moved(model)), Double(model, moved(model, 1))
    norms = a.per_layer()
    assert list(norms) == ["embedding", "layer 0", "layer 1", "final norm"]
    assert sum(x**2 for x in norms.values()) == pytest.approx(a.norm() ** 2, rel=1e-12)
    assert norms["layer 1"] == pytest.approx(a.select("transformer.h.1.*").norm())
    part = "transformer.h.0.*"
    assert a.per_layer(b)["layer 0"] == pytest.approx(a.select(part).cosine(b.select(part)), rel=1e-12)
    assert a.per_layer(-3 * a) == pytest.approx(dict.fromkeys(norms, -1.0), rel=1e-12)
    cosines = a.select("*.h.0.*").per_layer(a)  # what is not there is zero and has no direction
    assert cosines["layer 0"] == pytest.approx(1) and math.isnan(cosines["layer 1"])


def test_a_selection_and_its_rest_add_up():
    model = tiny.gpt2().model
    tau = Double(model, moved(model))
    attention = tau.select(["*.attn.*"])
    rest = tau.select([name for name in tau.tensors if ".attn." not in name])
    assert 0 < len(attention.tensors) < len(tau.tensors) and attention.base == tau.base
    assert {*(attention + rest).tensors} == {*tau.tensors} and (attention + rest - tau).norm() == 0
    assert attention.dot(rest) == 0 and attention.dot(tau) == pytest.approx(attention.norm() ** 2)
    attention.tensors[next(iter(attention.tensors))].fill_(7)  # a copy: the whole stays
    assert tau.norm() < 7


def test_low_rank_is_the_best_approximation():
    generator = torch.Generator().manual_seed(0)
    tau = TaskVector.from_tensors(
        {"w": torch.randn(6, 4, generator=generator), "b": torch.randn(6, generator=generator)}, dtype=torch.float64
    )
    cut = tau.low_rank(2)
    singular = torch.linalg.svdvals(tau.tensors["w"])
    assert torch.linalg.matrix_rank(cut.tensors["w"]) == 2 and torch.equal(cut.tensors["b"], tau.tensors["b"])
    assert (tau - cut).norm() == pytest.approx(float((singular[2:] ** 2).sum().sqrt()), rel=1e-12)
    assert equal(tau.low_rank(4), tau)


# --- Making and applying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.llama])
def test_before_plus_tau_is_after(make):
    before = make().model
    after = moved(before)
    tau = Double(before, after)
    model = deepcopy(before)
    assert tau.apply(model) is model
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, after.get_parameter(name), rtol=0, atol=1e-15)
    tau.apply(model, -1.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before.get_parameter(name), rtol=0, atol=1e-15)


def test_the_storage_type_is_float32_unless_asked():
    model = tiny.bert(torch.float32).model
    tau = TaskVector(model, moved(model))
    assert {t.dtype for t in (2 * tau + tau).tensors.values()} == {torch.float32}
    assert {t.dtype for t in (tau + Double(model, moved(model))).tensors.values()} == {torch.float64}
    half = deepcopy(model).to(torch.bfloat16)
    tau.apply(half)
    reference = deepcopy(model).to(torch.bfloat16).get_parameter("embeddings.LayerNorm.bias").double()
    exact = (reference + tau.tensors["embeddings.LayerNorm.bias"].double()).to(torch.bfloat16)  # rounded once
    assert torch.equal(half.get_parameter("embeddings.LayerNorm.bias"), exact)


def test_all_sources_give_one_vector(tmp_path):
    loaded = tiny.gpt2(torch.float32)
    after = moved(loaded.model)
    loaded.model.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after", max_shard_size="12KB")
    assert len(list((tmp_path / "after").glob("*.safetensors"))) > 1  # in shards
    reference = TaskVector(loaded, after)
    for before in (loaded.model, loaded.model.state_dict(), tmp_path / "before", str(tmp_path / "before/model.safetensors")):
        for end in (after, after.state_dict(), dict(after.named_parameters()), tmp_path / "after"):
            tau = TaskVector(before, end)
            assert {*tau.tensors} == {*reference.tensors} and tau.base == reference.base
            assert all(torch.equal(tau.tensors[name], t) for name, t in reference.tensors.items())
    readout = ntkft.prompt_readout(loaded, **WORDS)
    start = state(readout.module)
    reference.apply(readout)  # of a language model to a read-out of it
    tau = TaskVector(start, readout)
    assert [f"model.{name}" for name in reference.tensors] == list(tau.tensors)
    with pytest.raises(InputError, match=r"which the model lacks: apply it to the read-out"):
        tau.apply(loaded)


def test_a_tied_weight_appears_once(tmp_path):
    model = tiny.gpt2().model
    after = moved(model)
    tau = Double(model, after)
    assert "transformer.wte.weight" in tau.tensors and "lm_head.weight" not in tau.tensors
    assert list(tau.tensors) == [name for name, _ in model.named_parameters()]
    # A file that kept the other name of the pair.
    other = state(after)
    del other["transformer.wte.weight"]
    save_file(other, tmp_path / "other.safetensors")
    assert same(Double(model, tmp_path / "other.safetensors").tensors, tau.tensors)
    # A vector under the other name reaches the same weight.
    head = TaskVector.from_tensors({"lm_head.weight": torch.ones(97, 16)})
    with head.applied(model):
        torch.testing.assert_close(model.transformer.wte.weight, state(after)["lm_head.weight"] + 1, atol=0.1, rtol=0)
    both = TaskVector.from_tensors({name: torch.ones(97, 16) for name in ("lm_head.weight", "transformer.wte.weight")})
    with pytest.raises(InputError, match=r"are two tensors of the task vector and one tied weight of the model"):
        both.apply(model)
    untied = state(after)
    untied["lm_head.weight"] += 1
    with pytest.raises(InputError, match=r"lm_head.weight and transformer.wte.weight are one tied weight"):
        TaskVector(model, untied)


class Counter(nn.Module):
    """A weight, a saved float buffer, a saved count and an unsaved buffer."""

    def __init__(self, count=3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(count))
        self.register_buffer("cache", torch.rand(3), persistent=False)


def test_buffers_count_if_they_are_floats_and_must_agree_if_not():
    before, after = Counter(), Counter()
    after.mean += 2
    tau = TaskVector(before, after)
    assert list(tau.tensors) == ["weight", "mean"] and tau.norm() == pytest.approx(8**0.5)
    with tau.applied(before):
        assert before.mean.tolist() == [2, 2]
    assert before.mean.tolist() == [0, 0]
    with pytest.raises(InputError, match=r"count .*int64.* is no floating-point tensor and changed"):
        TaskVector(before, Counter(4))
    assert "count" not in TaskVector(before, {"weight": torch.ones(2), "mean": torch.ones(2)}).tensors


def test_applied_puts_every_bit_back():
    model = tiny.llama(torch.float32).model
    tau = TaskVector(model, moved(model, size=1e3))  # so far that subtracting it again would lose all digits
    before = state(model)
    with tau.applied(model, 0.3) as inside:
        assert inside is model and not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        with tau.applied(model):
            pass
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
    assert same(state(model), before)
    with pytest.raises(ZeroDivisionError), tau.applied(model):
        _ = 1 / 0
    assert same(state(model), before)
    tau.apply(model), tau.apply(model, -1.0)
    assert not same(state(model), before)  # the copy is needed


def test_applying_does_not_touch_gradients_or_the_graph():
    model = nn.Linear(2, 1)
    tau = TaskVector(model, moved(model))
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad.clone()
    tau.apply(model)
    assert model.weight.requires_grad and model.weight.is_leaf and torch.equal(model.weight.grad, gradient)


def test_a_model_that_does_not_fit_is_named_and_left_alone():
    model = tiny.bert().model
    other = state(moved(model))
    lacking = {name: t for name, t in other.items() if not name.endswith("output.dense.bias") or "attention" in name}
    with pytest.raises(InputError, match=r"encoder.layer.0.output.dense.bias \(16,\) is in `before` and missing in `after`"):
        TaskVector(model, lacking)
    with pytest.raises(InputError, match=r"encoder.layer.0.output.dense.bias \(16,\) is in `after` and missing in `before`"):
        TaskVector(lacking, model)
    with pytest.raises(InputError, match=r"embeddings.word_embeddings.weight has shape \(97, 16\) in `before` and \(96, 16\)"):
        TaskVector(model, other | {"embeddings.word_embeddings.weight": torch.zeros(96, 16)})
    tau = TaskVector(model, other)
    small = deepcopy(model)
    small.encoder.layer[1].output.dense = nn.Linear(23, 16).double()
    before = state(small)
    with pytest.raises(InputError, match=r"layer.1.output.dense.weight has shape \(16, 24\) in .* \(16, 23\) in the model"):
        tau.apply(small)
    with pytest.raises(InputError, match=r"encoder.layer.1.output.dense.weight has shape"), tau.applied(small):
        pass
    assert same(state(small), before)
    with pytest.raises(InputError, match=r"which the model lacks: list\(tau.tensors\)"):
        tau.apply(nn.Linear(2, 1))


def test_vectors_of_different_spaces_do_not_mix():
    a, b = (TaskVector.from_tensors({name: torch.ones(2)}, base="same") for name in "ab")
    assert (a + b).norm() == 2 and a.dot(b) == 0 and shared_names([a, b]) == ["a", "b"]
    for a.base, b.base in (("same", "other"), ("same", None), (None, None)):
        for act in (lambda: a + b, lambda: a - b, lambda: a.dot(b), lambda: a.cosine(b), lambda: a.per_layer(b)):
            with pytest.raises(InputError, match=r"a is missing in task vector 1 of 2, and the vectors have different bases"):
                act()
    wide = TaskVector.from_tensors({"a": torch.ones(3)}, base="same")
    with pytest.raises(InputError, match=r"a has shape \(2,\) in one task vector and \(3,\) in another"):
        a + wide
    a.base = "same"
    mixed = a + TaskVector.from_tensors({"a": torch.ones(2)}, base="other")
    assert mixed.base is None and "unknown or mixed" in repr(mixed)


def test_strict_asks_for_the_base():
    base = tiny.bert().model
    tau = TaskVector(base, moved(base))
    other = moved(base, 1)
    tau.apply(other)  # task arithmetic on another base is legitimate
    with pytest.raises(InputError, match=r"is not the base of TaskVector\(37 tensors"):
        tau.apply(other, strict=True)
    assert tau.base[:12] in repr(tau)
    tau.apply(base, strict=True)
    with pytest.raises(InputError, match="is not the base"):  # it has moved
        tau.apply(base, strict=True)


def test_the_fingerprint_hears_every_bit_and_no_order():
    weights = state(tiny.bert().model)
    reference = TaskVector(weights, weights).base
    assert TaskVector(dict(reversed(weights.items())), weights).base == reference
    weights["embeddings.LayerNorm.bias"][0] = np.nextafter(float(weights["embeddings.LayerNorm.bias"][0]), 9)
    assert TaskVector(weights, weights).base != reference


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda v: v / 0, "divided by 0"),
        (lambda v: v * math.nan, "scale is nan"),
        (lambda v: v.apply({"w": torch.ones(2)}, math.inf), "scale is inf"),
        (lambda v: v.cosine(0 * v), "zero has no direction"),
        (lambda v: v.select("x*"), "'x\\*' matches none of the vector's 1 tensors"),
        (lambda v: v.low_rank(0), "rank is 0"),
        (lambda v: v.apply("model.safetensors"), "a file is not changed"),
        (lambda v: v.apply(3), "Weights were asked of int"),
        (lambda v: TaskVector({"w": 1}, {"w": 1}), "'w' of the mapping is int"),
        (lambda v: TaskVector("no/such/place", v.tensors), "no safetensors file and no folder"),
        (lambda v: v.save("tau.pt"), r"a file named \*.safetensors"),
    ],
)
def test_bad_input_is_one_sentence(act, message):
    with pytest.raises(InputError, match=message):
        act(TaskVector.from_tensors({"w": torch.ones(2)}))


@pytest.mark.parametrize(
    "act", [lambda v: v + 1, lambda v: 1 + v, lambda v: v * "a", lambda v: v * v, lambda v: v - 0, lambda v: v / v]
)
def test_what_is_no_operation_is_a_type_error(act):
    with pytest.raises(TypeError):
        act(TaskVector.from_tensors({"w": torch.ones(2)}))


# --- Files --------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_vector(tmp_path):
    model = tiny.llama(torch.float32).model
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tau = TaskVector(model, moved(model), dtype=dtype, info={"task": "movies", "epochs": 2})
        again = TaskVector.load(tau.save(tmp_path / "deep" / "tau.safetensors"))
        assert equal(again, tau) and list(again.tensors) == list(tau.tensors)
        assert (again.base, again.info, again.norm()) == (tau.base, tau.info, tau.norm())
        assert next(iter(again.tensors.values())).dtype == dtype
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tau.safetensors"]
    assert {*load_file(tmp_path / "deep" / "tau.safetensors")} == {*tau.tensors}  # any reader of safetensors will do


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    tau = TaskVector.from_tensors({"w": torch.ones(2)})
    path = tau.save(tmp_path / "tau.safetensors")

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(ntkft.task_vectors, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        (2 * tau).save(path)
    assert TaskVector.load(path).norm() == tau.norm() and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_vectors_are_refused(tmp_path):
    tau = TaskVector.from_tensors({"w": torch.ones(2)}, info={"f": print})
    with pytest.raises(InputError, match="info cannot be written as JSON"):
        tau.save(tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="no task vector"):
        TaskVector.load(tmp_path / "plain.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 9)
    for name in ("noise", "absent"):
        with pytest.raises(InputError, match="cannot be read as a task vector"):
            TaskVector.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        TaskVector(tmp_path / "noise.safetensors", tau.tensors)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="no pickle is read"):
        TaskVector(tmp_path / "pickled", tau.tensors)
    manifest = {"version": "0", "shapes": {"w": [2]}, "norm": 2**0.5, "base": None, "info": {}}
    for tensors in ({"w": 2 * torch.ones(2)}, {"w": torch.ones(1, 2)}, {"v": torch.ones(2)}):
        save_file(tensors, tmp_path / "changed.safetensors", {"ntkft_task_vector": json.dumps(manifest)})
        with pytest.raises(InputError, match="are not those of its manifest"):
            TaskVector.load(tmp_path / "changed.safetensors")


# --- LoRA ---------------------------------------------------------------------------------------------------

GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
UNTIED = partial(tiny.llama, tied=False)
CASES = {
    "linear": (UNTIED, LLAMA),
    "conv1d": (tiny.gpt2, GPT2),
    "rslora": (UNTIED, LLAMA | {"use_rslora": True}),
    "ranks": (UNTIED, LLAMA | {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 11}}),
    "embedding": (UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": (tiny.gpt2, GPT2 | {"bias": "all"}),
    "some biases": (tiny.gpt2, GPT2 | {"bias": "lora_only"}),
    "bias of B": (tiny.gpt2, GPT2 | {"lora_bias": True}),
    "modules": (UNTIED, LLAMA | {"modules_to_save": ["lm_head", "norm"]}),
}


def adapted(make, options, seed=0, name="default"):
    """An adapter with random factors on a tiny model; everything that would train is moved."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(make().model, LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, **options), adapter_name=name).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_base_plus_a_lora_vector_is_the_adapted_model(case, saved, tmp_path):
    make, options = CASES[case]
    adapter, base = adapted(make, options), make().model
    if saved:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter.save_pretrained(tmp_path)
    needs_base = saved or options.get("bias")
    before, flags = state(base), [p.requires_grad for p in base.parameters()]
    generator = torch.get_rng_state()
    tau = TaskVector.from_lora(tmp_path if saved else adapter, base if needs_base else None, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), generator)
    # The base is as it was, has no adapter inside, and is the base of the vector as of any other.
    assert same(state(base), before) and flags == [p.requires_grad for p in base.parameters()]
    assert not any("lora" in name for name, _ in base.named_modules())
    assert tau.base == TaskVector(base, base).base
    gap = (logits(base) - logits(adapter)).abs().max()
    tau.apply(base)
    torch.testing.assert_close(logits(base), logits(adapter), rtol=0, atol=1e-12)
    assert gap > 0.01
    # And merging the adapter, peft's own way, gives the same difference.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = Double(before, adapter.merge_and_unload())
    assert (tau - merged).norm() < 1e-12 * merged.norm()


def test_half_precision_factors_are_multiplied_exactly():
    adapter = adapted(partial(UNTIED, torch.bfloat16), LLAMA)
    layer = adapter.get_base_model().model.layers[0].self_attn.q_proj
    tau = TaskVector.from_lora(adapter, dtype=torch.float64)
    exact = 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    torch.testing.assert_close(tau.tensors["model.layers.0.self_attn.q_proj.weight"], exact.detach(), rtol=1e-14, atol=0)
    assert not torch.equal(layer.get_delta_weight("default").double(), exact)  # peft rounds it


def test_sums_of_lora_vectors_are_sums_of_changes_not_of_factors():
    first, second = adapted(UNTIED, LLAMA, 1), adapted(UNTIED, LLAMA, 2)
    one, two = (TaskVector.from_lora(a, dtype=torch.float64) for a in (first, second))
    assert one.base == two.base
    base = UNTIED().model
    merged = [Double(base, deepcopy(a).merge_and_unload()) for a in (first, second)]
    both = one + two
    assert (both - sum(merged)).norm() < 1e-12 * both.norm()
    # (B1 + B2)(A1 + A2) has the cross terms B1 A2 + B2 A1 too many.
    factors = deepcopy(first)
    with torch.no_grad():
        for (name, p), (_, q) in zip(factors.named_parameters(), second.named_parameters(), strict=True):
            if "lora_" in name:
                p.add_(q)
    wrong = TaskVector.from_lora(factors, dtype=torch.float64)
    assert (wrong - both).norm() > 0.3 * both.norm()
    x, y = (a.get_base_model().model.layers[0].self_attn.q_proj for a in (first, second))
    cross = sum(3 * b.lora_B["default"].weight @ a.lora_A["default"].weight for a, b in ((x, y), (y, x)))
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close((wrong - both).tensors[key], cross.detach(), rtol=0, atol=1e-12)
    both.apply(base)
    assert (logits(base) - logits(factors)).abs().max() > 1e-3


def test_adapters_of_different_layers_add_up():
    one = TaskVector.from_lora(adapted(UNTIED, {"target_modules": ["q_proj"]}))
    two = TaskVector.from_lora(adapted(UNTIED, {"target_modules": ["v_proj"]}))
    assert not one.tensors.keys() & two.tensors.keys() and one.dot(two) == 0
    assert (one + two).norm() == pytest.approx(math.hypot(one.norm(), two.norm()), rel=1e-6)


def test_an_adapter_is_chosen_by_name():
    model = adapted(UNTIED, LLAMA, name="first")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules=["o_proj"], init_lora_weights=False))
    assert len(TaskVector.from_lora(model).tensors) == 6  # the active one
    second = TaskVector.from_lora(model, adapter_name="second")
    assert [*second.tensors] == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
    with pytest.raises(InputError, match=r"\['third'\] were asked for and the model has \['first', 'second'\]"):
        TaskVector.from_lora(model, adapter_name="third")


REFUSED = {
    "DoRA": (UNTIED, LLAMA | {"use_dora": True}, "DoraLinearVariant"),
    "PiSSA": (partial(UNTIED, torch.float32), LLAMA | {"init_lora_weights": "pissa"}, "started with 'pissa'"),
    "tied head": (tiny.llama, {"target_modules": ["lm_head"]}, "changes lm_head.weight in one place, .* tied"),
    "tied embedding": (tiny.llama, {"target_modules": ["embed_tokens"]}, "changes model.embed_tokens.weight in one place"),
    "tokens": (UNTIED, LLAMA | {"trainable_token_indices": {"embed_tokens": [1, 2]}}, "TrainableTokensWrapper"),
    "bias without a base": (tiny.gpt2, GPT2 | {"bias": "all"}, "pass base="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused(case):
    make, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        TaskVector.from_lora(adapted(make, options))


def test_adapters_that_cannot_be_read_are_refused(tmp_path):
    adapter = adapted(UNTIED, LLAMA)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a folder and base is None"):
        TaskVector.from_lora(tmp_path)
    with pytest.raises(InputError, match="is no LoRA adapter of GPT2LMHeadModel"):
        TaskVector.from_lora(tmp_path, tiny.gpt2())
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        TaskVector.from_lora(tmp_path / "absent", UNTIED())
    with pytest.raises(InputError, match=r"use TaskVector\.from_lora"):
        TaskVector(UNTIED(), tmp_path)
    with pytest.raises(InputError, match="LoRA layers inside"):
        TaskVector(UNTIED(), adapter)
    with pytest.raises(InputError, match="has no LoRA layers"):
        TaskVector.from_lora(UNTIED().model)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"has no model\.layers\.0\.mlp\.down_proj\.lora_A"):
        TaskVector.from_lora(tmp_path, UNTIED())
    ia3 = get_peft_model(UNTIED().model, peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(InputError, match="has no LoRA layers"):
        TaskVector.from_lora(ia3)
    adapter.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        TaskVector.from_lora(adapter)


def test_a_loaded_adapter_and_the_one_in_memory_are_one(tmp_path):
    adapter = adapted(UNTIED, LLAMA)
    adapter.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(UNTIED().model, tmp_path)
    vectors = [TaskVector.from_lora(adapter), TaskVector.from_lora(again), TaskVector.from_lora(tmp_path, UNTIED())]
    assert equal(vectors[0], vectors[1]) and equal(vectors[0], vectors[2]) and len({v.base for v in vectors}) == 1
