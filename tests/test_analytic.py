"""The kernels of infinite random networks: known values, neural-tangents, wide finite networks; and those networks themselves.

The numbers of neural-tangents in ``data/neural_tangents_kernels.json`` were made once, in an environment of its own with
jax 0.4.26, jaxlib 0.4.26, numpy < 2, scipy < 1.13 and neural-tangents 0.6.5 (``jax_enable_x64``):

    x = numpy.random.default_rng(0).standard_normal((4, 3))
    dense = lambda width: stax.Dense(width, W_std=w**0.5, b_std=b**0.5, parameterization="ntk")
    kernel_fn = stax.serial(*[dense(512), stax.Relu() or stax.Erf()] * depth, dense(1))[2]
    kernel_fn(numpy.sqrt(3) * x, None, ("nngp", "ntk"))

for depth 1, 2, 3 and (w, b) = (2, 0) and (1.5, 0.3). Its dense layer divides by the root of the input's dimension and ours does
not, hence the root of three.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ntkft
from ntkft.analytic import finite_mlp_readout, gaussian_moments, mlp_kernels
from ntkft.errors import InputError
from tests.helpers import relative

STORED = json.loads(
    (Path(__file__).parent / "data" / "neural_tangents_kernels.json").read_text(encoding="utf-8")
)
X = np.array(STORED["inputs"])
TEXTS = [str(i) for i in range(len(X))]


def options(case):
    return {key: case[key] for key in ("depth", "activation", "weight_variance", "bias_variance")}


def name(case):
    return "-".join(str(v) for v in options(case).values())


@pytest.mark.parametrize("case", STORED["cases"], ids=name)
def test_equals_stored_neural_tangents(case):
    covariance, tangent = mlp_kernels(X, **options(case))
    np.testing.assert_allclose(covariance, case["nngp"], rtol=1e-12, atol=1e-12)
    off = ~np.eye(len(X), dtype=bool)
    np.testing.assert_allclose(tangent[off], np.array(case["ntk"])[off], rtol=1e-12, atol=1e-12)
    # On the diagonal its ReLU takes the arccos of a rounded one and is off by up to 1e-7.
    np.testing.assert_allclose(tangent, case["ntk"], rtol=1e-6)


def test_the_stored_inputs_are_those_of_the_recipe():
    np.testing.assert_array_equal(X, np.random.default_rng(STORED["seed"]).standard_normal((4, 3)))


@pytest.mark.parametrize("case", STORED["cases"][::3], ids=name)
def test_equals_neural_tangents_where_it_is_installed(case):
    stax = pytest.importorskip("neural_tangents.stax")
    act = {"relu": stax.Relu, "erf": stax.Erf}[case["activation"]]
    stds = {"W_std": case["weight_variance"] ** 0.5, "b_std": case["bias_variance"] ** 0.5}
    layers = [stax.Dense(512, **stds), act()] * case["depth"]
    kernel = stax.serial(*layers, stax.Dense(1, **stds))[2](np.sqrt(3) * X, None, ("nngp", "ntk"))
    for ours, theirs in zip(mlp_kernels(X, **options(case)), kernel, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)  # float32 by default


@pytest.mark.parametrize("depth", [1, 2])
def test_quadrature_equals_the_closed_form_of_erf(depth):
    closed = mlp_kernels(X / 3, depth=depth, activation="erf", bias_variance=0.2)
    numeric = mlp_kernels(X / 3, depth=depth, activation=torch.erf, bias_variance=0.2, nodes=100)
    for ours, theirs in zip(numeric, closed, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_relu_moments_by_simulation():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((2, 400_000))
    u[1] = 0.6 * u[0] + 0.8 * u[1]
    product, slopes = gaussian_moments(0.6, 1.0, 1.0)
    assert abs(np.maximum(u, 0).prod(0).mean() - product) < 0.005
    assert abs((u > 0).all(0).mean() - slopes) < 0.005


def test_depth_zero_is_the_linear_model():
    for kernel in mlp_kernels(X, depth=0, weight_variance=1.5, bias_variance=0.3):
        np.testing.assert_allclose(kernel, 1.5 * X @ X.T + 0.3)


def test_columns_are_those_of_the_square_kernel():
    whole, part = mlp_kernels(X, depth=2), mlp_kernels(X[:2], X[1:], depth=2)
    for square, rectangle in zip(whole, part, strict=True):
        np.testing.assert_allclose(rectangle, square[:2, 1:], rtol=1e-12)


def test_equal_inputs_and_the_zero_input():
    same = np.array([[0.1, 0.2, 0.3]]) * np.array([[1.0], [3.0], [0.0]])
    covariance, tangent = mlp_kernels(same, weight_variance=2.0)
    squared = 0.14 * np.outer([1, 3, 0], [1, 3, 0])
    np.testing.assert_allclose(covariance, 2 * squared, rtol=1e-14)  # parallel inputs: exact, no arccos noise
    np.testing.assert_allclose(tangent, 4 * squared, rtol=1e-14)


@pytest.mark.parametrize(
    ("activation", "bias"), [("relu", 0.0), ("relu", 0.3), ("erf", 0.3), (torch.tanh, 0.0)]
)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_engine_on_a_finite_network_equals_autograd(activation, bias, depth):
    readout = finite_mlp_readout(X, 20, depth, activation, seed=2, weight_variance=1.5, bias_variance=bias)
    names, theta = zip(*readout.module.named_parameters(), strict=True)

    def f(values):
        call = dict(zip(names, values, strict=True))
        return torch.func.functional_call(readout.module, call, kwargs=readout.collate(readout.encode(TEXTS)))

    jacobians = torch.func.jacrev(f)(tuple(p.detach() for p in theta))
    flat = torch.cat([j.reshape(len(X), -1) for j in jacobians], 1).numpy()
    kernel = ntkft.empirical_ntk(readout, TEXTS, progress=False)
    assert relative(kernel.matrix, flat @ flat.T) < 1e-10
    np.testing.assert_allclose(kernel.scores, readout.scores(TEXTS), atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf", torch.tanh])
def test_wide_networks_approach_the_limit(activation):
    settings = {"weight_variance": 1.5, "bias_variance": 0.2}
    covariance, tangent = mlp_kernels(X, depth=2, activation=activation, **settings)
    readouts = [finite_mlp_readout(X, 512, 2, activation, seed=s, **settings) for s in range(8)]
    kernels = [ntkft.empirical_ntk(r, TEXTS, progress=False).matrix for r in readouts]
    assert relative(np.mean(kernels, 0), tangent) < 0.08
    scores = np.array(
        [finite_mlp_readout(X, 128, 2, activation, seed=s, **settings).scores(TEXTS) for s in range(600)]
    )
    assert relative(scores.T @ scores / 600, covariance) < 0.2


def test_a_network_draws_from_its_own_generator():
    before = torch.random.get_rng_state()
    first, same, other = (finite_mlp_readout(X, 8, seed=s).scores(TEXTS) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mlp_kernels([1.0, 2.0]), r"shape \(2,\) .* one input a row"),
        (lambda: mlp_kernels(X, X[:, :2]), "dimension 3 and other of 2"),
        (lambda: mlp_kernels(X, activation="gelu"), "'gelu' and must be 'relu', 'erf'"),
        (lambda: mlp_kernels(X, depth=-1), "depth is -1"),
        (lambda: mlp_kernels(X, weight_variance=0.0), "must be positive"),
        (lambda: finite_mlp_readout(X, 0), "width is 0"),
        (lambda: finite_mlp_readout(X, 4).scores(["4"]), "'4' names no row: .* 0 to 3"),
        (lambda: finite_mlp_readout(X, 4).scores(["good"]), "'good' names no row"),
    ],
)
def test_errors_name_both_sides(call, message):
    with pytest.raises(InputError, match=message):
        call()
