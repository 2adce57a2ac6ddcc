r"""The kernels of infinitely wide random networks, and the finite random networks that approach them.

Claim: for independent Gaussian weights, a network with L hidden layers whose widths go to infinity has the kernels

.. math::

    \Sigma^1 = \omega^2\langle x, x'\rangle + \beta^2, \qquad
    \Sigma^{l+1} = \omega^2\,\mathbb{E}\,\phi(u)\phi(u') + \beta^2, \qquad
    \Theta^{l+1} = \Sigma^{l+1} + \omega^2\,\mathbb{E}\,\phi'(u)\phi'(u')\;\Theta^l, \qquad \Theta^1 = \Sigma^1,

with (u, u') Gaussian of covariance Σ^l. Σ^{L+1} is the covariance of the outputs (NNGP), Θ^{L+1} the tangent kernel.
The input is taken as it is: for the convention that divides it by the root of its dimension, divide it before.

Source: Jacot, Gabriel & Hongler 2018; Cho & Saul 2009 for ReLU, Williams 1997 for erf; proofs in the chapter
"Random beginnings".

Example
-------
>>> import numpy as np
>>> x = np.eye(2)
>>> covariance, tangent = mlp_kernels(x)
>>> bool(np.isclose(tangent[0, 0], 1)), bool(np.isclose(tangent[0, 1], 1 / (2 * np.pi)))
(True, True)
>>> readout = finite_mlp_readout(x, width=64, seed=0)
>>> readout.scores(["0", "1"]).shape
(2,)
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.models import LoadedModel
from ntkft.readout import Readout

Activation = str | Callable[[Tensor], Tensor]
_TORCH: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "erf": torch.erf}


def mlp_kernels(
    x: ArrayLike,
    other: ArrayLike | None = None,
    *,
    depth: int = 1,
    activation: Activation = "relu",
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    nodes: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Return covariance (NNGP) and tangent kernel (NTK) of the infinitely wide random network.

    Parameters
    ----------
    x : (n, d) array
        Inputs, one a row.
    other : (m, d) array, optional
        The columns of the kernels; `x` by default.
    depth : int
        L, the number of hidden layers; 0 is a linear model.
    activation : "relu", "erf" or function
        φ. A function maps a torch tensor elementwise; its moments come from Gauss-Hermite quadrature, its slope from autograd.
    weight_variance, bias_variance : float
        ω² and β². ω² = 2 keeps the scale of a ReLU network from layer to layer.
    nodes : int
        Nodes a direction of the quadrature. Smooth functions need few; across a kink no number is exact.

    Returns
    -------
    Σ^{L+1} and Θ^{L+1}, both (n, m) arrays

    Raises
    ------
    InputError
        If the shapes do not fit, a variance is negative, or the activation is unknown.

    Example
    -------
    >>> covariance, tangent = mlp_kernels([[1.0, 0.0]], depth=3, weight_variance=2.0)
    >>> covariance.item(), tangent.item()  # Σ stays at 2 and Θ gains 2 with each layer
    (2.0, 8.0)
    """
    rows, _ = input_rows(x), _function(activation)
    columns = rows if other is None else input_rows(other)
    if rows.shape[1] != columns.shape[1]:
        raise InputError(
            f"x has inputs of dimension {rows.shape[1]} and other of {columns.shape[1]}: they must agree."
        )
    _check_network(depth, weight_variance, bias_variance)
    sigma = weight_variance * rows @ columns.T + bias_variance  # (n, m)
    of_rows = weight_variance * (rows**2).sum(1) + bias_variance  # (n,)
    of_columns = weight_variance * (columns**2).sum(1) + bias_variance  # (m,)
    theta = sigma
    for _ in range(depth):
        product, slopes = gaussian_moments(sigma, of_rows[:, None], of_columns, activation, nodes)
        of_rows, of_columns = (
            weight_variance * gaussian_moments(q, q, q, activation, nodes)[0] + bias_variance
            for q in (of_rows, of_columns)
        )
        sigma = weight_variance * product + bias_variance
        theta = sigma + weight_variance * slopes * theta
    return sigma, theta


def gaussian_moments(
    covariance: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    activation: Activation = "relu",
    nodes: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return :math:`\mathbb{E}\,\phi(u)\phi(u')` and :math:`\mathbb{E}\,\phi'(u)\phi'(u')` for centred Gaussian (u, u').

    The three arrays are Cov(u, u'), Var(u) and Var(u') and broadcast; the rest is as in `mlp_kernels`.

    Example
    -------
    >>> product, slopes = gaussian_moments(0.0, 1.0, 1.0)  # ReLU, independent u and u'
    >>> bool(np.isclose(product, 1 / (2 * np.pi))), float(slopes)
    (True, 0.25)
    """
    function = _function(activation)
    q, a, b = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (covariance, first, second)))
    if activation == "relu":
        scale, cosine = np.sqrt(a * b), cosine_of(q, a, b)
        angle = np.arccos(cosine)
        product = scale * (np.sqrt((1 - cosine) * (1 + cosine)) + (np.pi - angle) * cosine) / (2 * np.pi)
        return product, (np.pi - angle) / (2 * np.pi)
    if activation == "erf":
        determinant = (1 + 2 * a) * (1 + 2 * b)
        ratio = np.clip(2 * q / np.sqrt(determinant), -1, 1)
        return 2 / np.pi * np.arcsin(ratio), 4 / np.pi / np.sqrt(determinant - 4 * q**2)
    return _quadrature(q, a, b, function, nodes)


def finite_mlp_readout(
    x: ArrayLike,
    width: int,
    depth: int = 1,
    activation: Activation = "relu",
    seed: int = 0,
    *,
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
) -> Readout:
    """Return a random network of finite width as a `Readout`, so that `empirical_ntk` computes its kernel.

    Its "texts" are row numbers: ``"3"`` stands for the input ``x[3]``. Weights are float64, standard normal, from a generator of
    their own; the scale 1/√m stands in the forward pass (the NTK parametrisation).

    Parameters
    ----------
    x : (n, d) array
        Inputs; they are stored in the network.
    width : int
        m, the number of units of each hidden layer.
    depth, activation, weight_variance, bias_variance
        As in `mlp_kernels`, whose kernels are the limits of this network's. `seed` is that of the weights.

    Raises
    ------
    InputError
        If a number is out of range, the activation unknown, or (later) a text names no row.

    Example
    -------
    >>> import ntkft
    >>> readout = finite_mlp_readout(np.eye(3), width=32, depth=2, seed=1)
    >>> ntkft.empirical_ntk(readout, ["0", "1", "2"], progress=False).matrix.shape
    (3, 3)
    """
    inputs = input_rows(x)
    _check_network(depth, weight_variance, bias_variance)
    if width < 1:
        raise InputError(f"width is {width} and a hidden layer needs at least one unit.")
    network = _RandomNetwork(
        inputs, [width] * depth, _function(activation), weight_variance**0.5, bias_variance**0.5, seed
    )
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", "function")
    info = {"readout": "rows", "width": width, "depth": depth, "activation": name, "seed": seed}
    loaded = LoadedModel(
        network, SimpleNamespace(pad_token_id=0), {"name": f"random {name} network", "kind": "rows"}
    )

    def encode(text: str) -> list[int]:
        if not text.isdecimal() or int(text) >= len(inputs):
            raise InputError(f"The text {text!r} names no row: this network has rows 0 to {len(inputs) - 1}.")
        return [int(text)]

    return Readout(network, loaded, encode, info | {"variances": [weight_variance, bias_variance]})


class _RandomNetwork(nn.Module):
    """z = ω W a/√m + β b, layer after layer; the bias is the weight of a constant input β."""

    inputs: Tensor

    def __init__(
        self,
        inputs: np.ndarray,
        widths: list[int],
        activation: Callable[[Tensor], Tensor],
        weight_scale: float,
        bias_scale: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.from_numpy(inputs))
        self.activation, self.weight_scale, self.bias_scale = activation, weight_scale, bias_scale
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        extra = 1 if bias_scale > 0 else 0
        for before, after in zip([inputs.shape[1], *widths], [*widths, 1], strict=True):
            # skip_init: the default initialisation would draw from torch's global generator.
            layer = nn.utils.skip_init(nn.Linear, before + extra, after, bias=False, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(
                    torch.randn(after, before + extra, generator=generator, dtype=torch.float64)
                )
            self.layers.append(layer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        a = self.inputs[input_ids[:, 0]]  # (n, d)
        for l, layer in enumerate(self.layers):  # noqa: E741
            if l > 0:
                a = self.activation(a) / a.shape[1] ** 0.5  # (n, m)
            a = self.weight_scale * a
            if self.bias_scale > 0:
                a = torch.cat([a, a.new_full((len(a), 1), self.bias_scale)], 1)
            a = layer(a)
        return a[:, 0]  # (n,)


def cosine_of(q: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return q/√(ab) in [-1, 1]; a distance to 1 of the size of rounding is 1, since arccos would blow it up to 1e-8."""
    scale = np.sqrt(a * b)
    cosine = np.clip(np.divide(q, scale, out=np.zeros_like(scale * q), where=scale > 0), -1, 1)
    return np.where(np.abs(cosine) > 1 - 1e-15, np.sign(cosine), cosine)


def _quadrature(
    q: np.ndarray, a: np.ndarray, b: np.ndarray, function: Callable[[Tensor], Tensor], nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integrate over u = √a s, u' = √b (ρ s + √(1-ρ²) t) with s, t independent standard normal."""
    points, weights = special.roots_hermitenorm(nodes)
    weights = weights / weights.sum()
    rho = cosine_of(q, a, b)
    product, slopes = np.empty(q.shape), np.empty(q.shape)
    for index in np.ndindex(q.shape):  # (nodes, nodes) numbers at a time
        u, du = _value_and_slope(function, np.sqrt(a[index]) * points)
        mixed = rho[index] * points[:, None] + np.sqrt(1 - rho[index] ** 2) * points
        v, dv = _value_and_slope(function, np.sqrt(b[index]) * mixed)
        product[index] = (weights * u) @ v @ weights
        slopes[index] = (weights * du) @ dv @ weights
    return product, slopes


def _value_and_slope(function: Callable[[Tensor], Tensor], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = torch.from_numpy(np.array(at)).requires_grad_()
    value = function(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    return value.detach().numpy(), slope.numpy()


def input_rows(x: ArrayLike) -> np.ndarray:
    """Return inputs as float64 (n, d), or raise `InputError`."""
    array = np.array(x, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            f"Inputs of shape {array.shape} are given and finite rows (n, d) are needed: one input a row."
        )
    return array


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str):
        if activation not in _TORCH:
            raise InputError(
                f"activation is {activation!r} and must be 'relu', 'erf' or an elementwise torch function."
            )
        return _TORCH[activation]
    return activation


def _check_network(depth: int, weight_variance: float, bias_variance: float) -> None:
    if depth < 0:
        raise InputError(f"depth is {depth} and counts hidden layers: it must be 0 or more.")
    if not (weight_variance > 0 and bias_variance >= 0):
        raise InputError(
            f"weight_variance is {weight_variance} and bias_variance {bias_variance}: "
            "the first must be positive, the second not negative."
        )
