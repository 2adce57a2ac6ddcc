"""Merging rules against sums by hand, their limits, and what must not depend on them."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import task_arithmetic

from ntkft.errors import InputError
from ntkft.merging import LINEAR, PRUNING, merge
from ntkft.task_vectors import TaskVector


def vector(*entries, base="b", name="w"):
    return TaskVector.from_tensors({name: torch.tensor(entries)}, base=base, dtype=torch.float64)


def random(seed, names=("a", "b"), shape=(7, 5)):
    generator = torch.Generator().manual_seed(seed)
    return TaskVector.from_tensors({n: torch.randn(shape, generator=generator) for n in names}, base="b", dtype=torch.float64)


def entries(tau, name="w"):
    return tau.tensors[name].tolist()


# Three vectors of six entries; with density 1/2 the three largest of each stay (marked *):
A = vector(+6.0, -4.0, +1.0, +0.5, -5.0, 0.0)  #  6* -4*  1   .5 -5*  0
B = vector(-2.0, +9.0, +8.0, -0.1, -3.0, 0.2)  # -2   9*  8* -.1 -3*  .2
C = vector(-7.0, +3.0, -1.0, +2.0, +0.3, 0.1)  # -7*  3* -1   2*  .3  .1


def test_ties_by_hand():
    # Sums of what stays: -1, 8, 8, 2, -8, 0. So the signs are -, +, +, +, -, and the means of those that agree:
    assert entries(merge([A, B, C], "ties", density=0.5)) == [-7.0, 6.0, 8.0, 2.0, -4.0, 0.0]


def test_ties_elects_the_sign_before_it_weighs():
    """With weights 3, 1, 2 the first entry's weighted sum is 3·6 - 2·7 > 0, and its sign stays negative."""
    merged = merge([A, B, C], "ties", weights=[3, 1, 2], density=0.5)
    assert entries(merged) == [-14.0, (9 + 6) / 2, 8.0, 4.0, (-15 - 3) / 2, 0.0]


def test_magnitude_prune_by_hand():
    assert entries(merge([A, B, C], "magnitude_prune", density=0.5)) == [-1.0, 8.0, 8.0, 2.0, -8.0, 0.0]
    assert entries(merge([A, B, C], "magnitude_prune", weights=[1, -1, 2], density=0.17)) == [6 - 14, -9.0, 0, 0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 99))
def test_sums_and_means_are_linear(weights, seed):
    parts = [random(seed + k) for k in range(3)]
    total = merge(parts, "sum", weights=weights)
    for name in ("a", "b"):
        oracle = task_arithmetic([v.tensors[name] for v in parts], torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(total.tensors[name], oracle, rtol=0, atol=1e-14)
    if abs(sum(weights)) > 0.1:
        mean = merge(parts, "mean", weights=weights)
        assert (sum(weights) * mean - total).norm() < 1e-12 * (1 + total.norm())
        assert (merge([parts[0]] * 3, "mean", weights=weights) - parts[0]).norm() < 1e-12


def test_nothing_pruned_leaves_the_sum():
    parts = [random(k) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("magnitude_prune", "dare_linear"):
            assert (merge(parts, method, density=1) - sum(parts)).norm() < 1e-12
        assert (merge(parts, "ties", density=1) - merge(parts, "dare_ties", density=1)).norm() == 0
        assert (merge(parts[:1], "ties", density=1) - parts[0]).norm() == 0  # one vector agrees with itself


@pytest.mark.parametrize("method", LINEAR + PRUNING)
def test_merging_respects_scale_and_sign(method):
    parts = [random(k) for k in range(3)]
    merged = merge(parts, method, density=0.4)
    for scale in (4.0, -0.5):  # powers of two: no rounding
        assert (merge([scale * v for v in parts], method, density=0.4) - scale * merged).norm() == 0
    if "dare" not in method:  # the random masks go by the order of the vectors
        assert (merge(parts[::-1], method, density=0.4) - merged).norm() < 1e-12


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_pruning_has_a_seed_and_leaves_the_generator_alone(method):
    parts = [random(k) for k in range(2)]
    before = torch.get_rng_state()
    one = merge(parts, method, density=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert (merge(parts, method, density=0.5, seed=1) - one).norm() == 0
    assert (merge(parts, method, density=0.5, seed=2) - one).norm() > 0.1
    assert not torch.equal(one.tensors["a"] == 0, one.tensors["b"] == 0)  # no mask is used twice


def test_dare_is_unbiased_with_the_variance_of_its_mask():
    """Of p entries, each is τ/d with probability d: mean τ, variance τ²(1-d)/d. Both within five standard errors."""
    p, d = 200_000, 0.25
    tau = TaskVector.from_tensors({"w": torch.full((p,), 3.0)}, dtype=torch.float64)
    got = merge([tau], "dare_linear", density=d, seed=0).tensors["w"]
    assert {*got.tolist()} == {0.0, 12.0}
    assert abs(float(got.mean()) - 3) < 5 * (9 * (1 - d) / d / p) ** 0.5
    assert abs(float((got > 0).double().mean()) - d) < 5 * (d * (1 - d) / p) ** 0.5


def test_density_holds_in_each_tensor():
    small, large = torch.arange(1.0, 11.0), 100 * torch.arange(1.0, 21.0)
    tau = TaskVector.from_tensors({"small": small, "large": large, "two": torch.ones(2)})
    kept = merge([tau], "magnitude_prune", density=0.3)
    assert [int((kept.tensors[n] != 0).sum()) for n in ("small", "large", "two")] == [3, 6, 0]
    assert kept.tensors["small"].tolist() == [0.0] * 7 + [8, 9, 10]


def test_a_missing_tensor_is_a_zero_if_the_base_is_one():
    one, two = vector(2.0, -4.0, name="a"), vector(1.0, 3.0, name="b")
    for method in LINEAR + PRUNING:
        merged = merge([one, two], method, density=1)
        factor = 0.5 if method == "mean" else 1.0  # TIES averages over those that are not zero
        assert (entries(merged, "a"), entries(merged, "b")) == ([2 * factor, -4 * factor], [factor, 3 * factor])
        assert merged.base == "b"
    with pytest.raises(InputError, match="a is missing in task vector 1 of 2"):
        merge([one, vector(1.0, 3.0, name="b", base="other")], "ties")


def test_the_result_keeps_type_and_leaves_the_vectors():
    parts = [TaskVector.from_tensors({"w": torch.randn(50)}, base=base) for base in ("x", "y")]
    copies = [v.tensors["w"].clone() for v in parts]
    for method in LINEAR + PRUNING:
        merged = merge(parts, method)
        assert merged.tensors["w"].dtype == torch.float32 and merged.base is None
    assert all(torch.equal(v.tensors["w"], c) for v, c in zip(parts, copies, strict=True))


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ([], {}, "at least one TaskVector"),
        ([A, 3], {}, r"\['TaskVector', 'int'\]"),
        ([A], {"method": "fisher"}, "method is 'fisher': choose one of sum, mean, ties"),
        ([A, B], {"weights": [1]}, r"weights is \[1.0\] and there are 2"),
        ([A, B], {"weights": [1, float("nan")]}, "one finite number for each"),
        ([A, B], {"method": "mean", "weights": [1, -1]}, "sum to zero"),
        ([A], {"method": "ties", "density": 0}, r"density is 0 and must be in \(0, 1\]"),
        ([A], {"method": "ties", "density": 1.5}, "density is 1.5"),
        ([A, vector(1.0)], {"method": "ties"}, r"\(6,\) in one task vector and \(1,\) in another"),
    ],
)
def test_bad_input_is_one_sentence(vectors, options, message):
    with pytest.raises(InputError, match=message):
        merge(vectors, **options)
