r"""Adversaries: penalties that are themselves trained, step by step, against the encoder.

Claim: the maximal correlation :math:`\sup_{g,h} \mathrm{corr}(g(Z), h(T))` is zero exactly under independence, and a pair of
networks finds a lower bound of it; CLUB, :math:`\E\log q(T|Z) - \E_{Z\perp T}\log q(T|Z)`, is an upper bound of I(Z;T) if q is
the true conditional law. Both are only as good as their training, so both need a decision when to stop.

Each has ``step(z, t)``, which trains the adversary on a batch and leaves z alone, and ``forward(z, t)``, the penalty for the
encoder.

Source: Rényi 1959, Gebelein 1941 and Mary, Calauzènes & El Karoui 2019 for the first; Cheng et al. 2020 for the second.

Example
-------
>>> g = torch.Generator().manual_seed(0)
>>> z = torch.randn(256, 2, generator=g)
>>> adversary = MaximalCorrelation(2, 1, seed=0)
>>> before = adversary(z, z[:, :1] ** 2).item()
>>> adversary.step(z, z[:, :1] ** 2, steps=200)
>>> adversary(z, z[:, :1] ** 2).item() > max(0.8, before)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntkft.infomin.cca import correlation
from ntkft.infomin.slices import as_pair

LEARNING_RATE = 1e-3  # Adam as it comes


def network(
    inputs: int, outputs: int, hidden: int, seed: int, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Return a network with two hidden layers, its weights drawn from `seed` without touching the global generator.

    Example
    -------
    >>> network(3, 2, hidden=8, seed=0)(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(inputs, hidden),
            activation(),
            nn.Linear(hidden, hidden),
            activation(),
            nn.Linear(hidden, outputs),
        )


class MaximalCorrelation(nn.Module):
    """Two networks g(z), h(t) that are trained to correlate: the neural form of Rényi's maximal correlation.

    Parameters
    ----------
    d, q : int
        Coordinates of z and of t (classes one-hot).
    hidden, seed : int
        Width of both networks and the seed of their weights.

    Example
    -------
    >>> g = torch.Generator().manual_seed(0)
    >>> bool(abs(MaximalCorrelation(2, 1)(torch.randn(64, 2, generator=g), torch.randn(64, generator=g))) <= 1)
    True
    """

    def __init__(self, d: int, q: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.on_z, self.on_t = network(d, 1, hidden, seed), network(q, 1, hidden, seed + 1)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the correlation of g(z) and h(t), a scalar."""
        a, b = (x.to(next(self.parameters()).dtype) for x in as_pair(z, t))
        return correlation(self.on_z(a)[:, 0], self.on_t(b)[:, 0])

    def step(self, z: Tensor, t: Tensor, steps: int = 1) -> None:
        """Take `steps` steps of Adam that raise the correlation on this batch."""
        _train(self.optimizer, lambda: -self(z.detach(), t), steps)


class Club(nn.Module):
    """CLUB with a Gaussian q(t|z), whose mean and logarithm of variance are networks.

    Parameters are those of `MaximalCorrelation`. ``step`` maximises the likelihood of t given z.

    Example
    -------
    >>> z = torch.linspace(-1, 1, 32)[:, None]
    >>> Club(1, 1)(z, z).shape
    torch.Size([])
    """

    def __init__(self, d: int, q: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.mean, self.log_variance = network(d, q, hidden, seed), network(d, q, hidden, seed + 1)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def _gaussian(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (x.to(next(self.parameters()).dtype) for x in as_pair(z, t))
        # Bounded, because a variance that runs to zero makes the bound infinite before it is any use.
        return self.mean(a), torch.tanh(self.log_variance(a) / 6) * 6, b

    def likelihood(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the mean of log q(t|z), without its constant."""
        mean, log_variance, b = self._gaussian(z, t)
        return -0.5 * ((b - mean) ** 2 / log_variance.exp() + log_variance).sum(1).mean()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the estimated bound in nats: own pairs minus all n² pairs."""
        mean, log_variance, b = self._gaussian(z, t)
        precision = (-log_variance).exp()
        own = ((b - mean) ** 2 * precision).sum(1).mean()
        # The mean over all t of (t - μ)² needs two moments of t and no n² table.
        centre = b.mean(0)
        spread = ((b - centre) ** 2).mean(0)
        every = (((centre - mean) ** 2 + spread) * precision).sum(1).mean()
        return 0.5 * (every - own)

    def step(self, z: Tensor, t: Tensor, steps: int = 1) -> None:
        """Take `steps` steps of Adam on the likelihood of this batch."""
        _train(self.optimizer, lambda: -self.likelihood(z.detach(), t), steps)


def _train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.zero_grad()
