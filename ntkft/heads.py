r"""The model of the theory: H softmax heads, small, :math:`f(x;\theta) = H^{-1/2}\sum_h a(x;\theta_h)`.

A head reads tokens x (T, d) at position 0: :math:`a = w_O \cdot W_V \sum_s p_s x_s` with
:math:`p = \mathrm{softmax}(\langle W_Q x_0, W_K x_s\rangle/\sqrt k)`. Its weights θ_h are one row of a matrix (H, P). Gradients,
Hessians and training come from autograd, so that a bound is compared with something that knows nothing about the proof.

Source: the book's chapters "The kernel of attention" and "Pretrained beginnings".

Example
-------
>>> shape = Shape(d=6, k=3)
>>> x, theta = tokens(8, shape, seed=0), gaussian_heads(16, shape, seed=0)
>>> model(theta, x, shape).shape
torch.Size([8])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

DTYPE = torch.float64


@dataclass(frozen=True)
class Shape:
    """Sizes of a head: d inputs of a token, k queries (and keys, and values), T tokens."""

    d: int = 6
    k: int = 3
    T: int = 5

    @property
    def parameters(self) -> int:
        """Weights of one head, P = 3kd + k."""
        return 3 * self.k * self.d + self.k


def tokens(n: int, shape: Shape, seed: int) -> Tensor:
    """Return n Gaussian inputs (n, T, d), tokens of mean square length one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, shape.T, shape.d, generator=generator, dtype=DTYPE) / shape.d**0.5


def gaussian_heads(heads: int, shape: Shape, seed: int, scale: float = 1.0) -> Tensor:
    """Return θ (H, P) with Gaussian entries: query, key and value of standard deviation `scale`, read-out `scale`/√k."""
    generator = torch.Generator().manual_seed(seed)
    theta = scale * torch.randn(heads, shape.parameters, generator=generator, dtype=DTYPE)
    theta[:, -shape.k :] /= shape.k**0.5
    return theta


def head(theta: Tensor, x: Tensor, shape: Shape) -> Tensor:
    """Return a(x; θ_h) for one head θ_h (P,) and one input x (T, d)."""
    size = shape.k * shape.d
    query, key, value = (theta[i * size : (i + 1) * size].view(shape.k, shape.d) for i in range(3))
    scores = (x @ key.T) @ (query @ x[0]) / shape.k**0.5  # (T,)
    context = torch.softmax(scores, 0) @ x  # (d,)
    return theta[3 * size :] @ (value @ context)


def each_head(theta: Tensor, x: Tensor, shape: Shape) -> Tensor:
    """Return a(x_i; θ_h), (n, H)."""
    return vmap(lambda xi: vmap(lambda th: head(th, xi, shape))(theta))(x)


def model(theta: Tensor, x: Tensor, shape: Shape) -> Tensor:
    """Return f(x_i; θ), (n,)."""
    return each_head(theta, x, shape).sum(1) / theta.shape[0] ** 0.5


def head_gradients(theta: Tensor, x: Tensor, shape: Shape) -> Tensor:
    """Return ∇a(x_i; θ_h), (n, H, P)."""
    one = grad(lambda th, xi: head(th, xi, shape))
    return vmap(lambda xi: vmap(lambda th: one(th, xi))(theta))(x)


def gradients(theta: Tensor, x: Tensor, shape: Shape) -> Tensor:
    """Return the rows ∇f(x_i; θ) of Φ, (n, H·P)."""
    return head_gradients(theta, x, shape).flatten(1) / theta.shape[0] ** 0.5


def head_hessian_norms(theta: Tensor, x: Tensor, shape: Shape, part: int = 64) -> Tensor:
    """Return ‖∇²a(x_i; θ_h)‖_op, (n, H), from full Hessians in parts of `part` heads."""
    one = hessian(lambda th, xi: head(th, xi, shape))
    norms = []
    for some in theta.split(part):
        full = vmap(lambda xi, some=some: vmap(lambda th: one(th, xi))(some))(x)  # (n, part, P, P)
        norms.append(torch.linalg.eigvalsh(full).abs().amax(-1))
    return torch.cat(norms, 1)


def loss(theta: Tensor, x: Tensor, y: Tensor, shape: Shape) -> Tensor:
    """Return L(θ) = 1/(2n) Σ (f(x_i;θ) - y_i)²."""
    return 0.5 * ((model(theta, x, shape) - y) ** 2).mean()


def descend_heads(
    theta: Tensor, slope: Callable[[Tensor], Tensor], step_size: float, steps: int, *, flow: bool
) -> list[Tensor]:
    """Return θ_0..θ_steps under dθ/dt = -slope(θ): gradient flow by Runge-Kutta of order four, or gradient descent."""
    path = [theta]
    for _ in range(steps):
        k1 = slope(theta)
        if flow:
            k2 = slope(theta - 0.5 * step_size * k1)
            k3 = slope(theta - 0.5 * step_size * k2)
            k4 = slope(theta - step_size * k3)
            theta = theta - step_size * (k1 + 2 * k2 + 2 * k3 + k4) / 6
        else:
            theta = theta - step_size * k1
        path.append(theta)
    return path


def loss_slope(x: Tensor, y: Tensor, shape: Shape) -> Callable[[Tensor], Tensor]:
    """Return θ -> ∇L(θ), (H, P)."""
    return grad(lambda theta: loss(theta, x, y, shape))
