"""Checks of the chapter "Adversaries"."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import linalg

from ntkft.checks import Claim, Verdict
from ntkft.infomin.cca import canonical, top_correlation
from ntkft.infomin.gaussian import gaussian_information


def as_tensor(x: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor of doubles."""
    return torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float64)


def _information(table: np.ndarray) -> float:
    """Mutual information in nats of a joint law on a grid."""
    product = table.sum(1, keepdims=True) * table.sum(0)
    seen = table > 0
    return float((table[seen] * np.log(table[seen] / product[seen])).sum())


def _slice_information(law: dict[tuple[tuple[int, int], int], float], theta: np.ndarray) -> float:
    """Information between θᵀz and t for a law on finitely many (z, t)."""
    values = sorted({round(float(np.dot(theta, z)), 9) for z, _ in law})
    tags = sorted({t for _, t in law})
    table = np.zeros((len(values), len(tags)))
    for (z, t), p in law.items():
        table[values.index(round(float(np.dot(theta, z)), 9)), tags.index(t)] += p
    return _information(table)


def slices_see_all_dependence(broken: bool = False) -> Verdict:
    """An XOR hides from both coordinates and not from other slices; the distance of characteristic functions obeys √(2ε)."""
    rng = np.random.default_rng(0)
    bits = [(a, b) for a in (0, 1) for b in (0, 1)]
    xor = {((a, b), a ^ b): 0.25 for a, b in bits}
    product = {
        ((a, b), t): (0.1 + 0.2 * a + 0.4 * a * b) / 1.2 * (0.3 + 0.4 * t) for a, b in bits for t in (0, 1)
    }
    normal = np.eye(2) if broken else rng.standard_normal((40, 2))
    thetas = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    found = max(_slice_information(xor, theta) for theta in thetas)
    nothing = max(_slice_information(product, theta) for theta in thetas)
    worst = 0.0
    # Random laws close to independence. Almost every slice of a finite law has all its information, so ε is that.
    for _ in range(20):
        table = np.outer(rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(2))) + 0.05 * rng.random((4, 2))
        table /= table.sum()
        u, v = 3 * rng.standard_normal((500, 2)), 3 * rng.standard_normal(500)
        on_z = np.exp(1j * u @ np.array(bits).T)  # (500, 4)
        on_t = np.exp(1j * v[:, None] * np.arange(2))
        joint = np.einsum("ka,ab,kb->k", on_z, table, on_t)
        gap = np.abs(joint - (on_z @ table.sum(1)) * (on_t @ table.sum(0))).max()
        worst = max(worst, gap / np.sqrt(2 * _information(table)))
    pairs = torch.kron(as_tensor(np.array([[1, 0.3], [0.3, 1]])), torch.eye(6, dtype=torch.float64))
    whole = float(gaussian_information(pairs, 6)) / (-0.5 * np.log(1 - 0.09))
    holds = found > 0.3 and nothing < 1e-12 and worst <= 1 and abs(whole - 6) < 1e-9
    return Verdict(
        bool(holds),
        f"XOR: {found:.2f} nats in a slice; product law: {nothing:.0e}; distance at most {worst:.2f} of √(2ε); "
        f"six weak pairs have {whole:.3f} times the information of one",
    )


def joined_features_see_no_less(broken: bool = False) -> Verdict:
    """Top correlation of joined blocks against all pairs of blocks; adding blocks; and zero together."""
    rng = np.random.default_rng(1)
    tops, grows, zero = [], [], []
    for _ in range(20):
        a, b = as_tensor(rng.standard_normal((60, 3, 2))), as_tensor(rng.standard_normal((60, 2, 2)))
        pairs = max(
            float(canonical(a[:, i], b[:, j], 0.0).correlations[0]) for i in range(3) for j in range(2)
        )
        steps = [float(canonical(a[:, :k].flatten(1), b.flatten(1), 0.0).correlations[0]) for k in (1, 2, 3)]
        joined = float(canonical(a.mean(1), b.mean(1), 0.0).correlations[0]) if broken else steps[-1]
        tops.append(joined - pairs)
        grows += np.diff(steps).tolist()
        white = np.linalg.qr(np.c_[np.ones(60), rng.standard_normal((60, 10))])[0]
        zero.append(float(canonical(as_tensor(white[:, 1:7]), as_tensor(white[:, 7:]), 0.0).correlations[0]))
    holds = min(tops) >= -1e-12 and min(grows) >= -1e-12 and max(zero) < 1e-12
    return Verdict(
        bool(holds),
        f"joined minus best pair at least {min(tops):.3f}; uncorrelated features: {max(zero):.0e}",
    )


def powers_decide_independence(broken: bool = False) -> Verdict:
    """On a grid of k by k values, uncorrelated powers up to k-1 leave only the product law (linear algebra, exact rank)."""
    dependent = []
    for k in (2, 3, 4):
        u = np.linspace(-1, 1, k)
        top = k - 2 if broken else k - 1  # all powers that are linearly independent on k points
        marginal = np.full(k, 1 / k)
        rows = []
        for a in range(1, top + 1):
            for b in range(1, top + 1):
                f, g = u**a - (u**a * marginal).sum(), u**b - (u**b * marginal).sum()
                rows.append(np.outer(f, g).ravel())
        # Perturbations D of the product law with both margins fixed: D 1 = 0, 1'D = 0.
        for i in range(k):
            e = np.zeros((k, k))
            e[i] = 1
            rows += [e.ravel(), e.T.ravel()]
        dependent.append(int(k * k - np.linalg.matrix_rank(np.array(rows))))
    return Verdict(
        bool(max(dependent) == 0), f"dimensions of dependent laws with uncorrelated powers: {dependent}"
    )


def ridge_correlation_in_closed_form(broken: bool = False) -> Verdict:
    """Singular value against the eigenproblem of the Lagrange conditions; monotone in the ridge; below what its weights have."""
    rng = np.random.default_rng(2)
    gap, falls, below = 0.0, [], []
    for _ in range(10):
        a, b = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
        b[:, 0] += a[:, 0]
        a, b = a - a.mean(0), b - b.mean(0)
        before = np.inf
        for ridge in (0.0, 0.05, 0.5):
            best = canonical(as_tensor(a), as_tensor(b), ridge)
            zero = np.zeros((4, 4)), np.zeros((3, 3))
            c_ab = a.T @ b / 30
            left = np.block([[zero[0], c_ab], [c_ab.T, zero[1]]])
            inflated = ridge if not broken else 2 * ridge
            right = linalg.block_diag(a.T @ a / 30 + inflated * np.eye(4), b.T @ b / 30 + ridge * np.eye(3))
            top = float(best.correlations[0])
            gap = max(gap, abs(top - linalg.eigh(left, right, eigvals_only=True)[-1]))
            falls.append(before - top)
            below.append(np.corrcoef(a @ best.w[:, 0].numpy(), b @ best.v[:, 0].numpy())[0, 1] - top)
            before = top
    holds = gap < 1e-10 and min(falls) > 0 and min(below) > -1e-12
    return Verdict(bool(holds), f"largest gap {gap:.0e}; reported at least {min(below):.0e} below achieved")


def correlation_of_nothing(broken: bool = False) -> Verdict:
    """Skew features of independent samples: Σ r² has mean pq/(n-1); Gaussian ones keep the upper bound; held-out 0, 1/(m-1)."""
    rng = np.random.default_rng(3)
    n, p, q, runs = 24, 5, 3, 3000
    x = rng.exponential(size=n)
    a = np.stack([x**k for k in range(1, p + 1)], 1)
    left = np.linalg.qr(a - a.mean(0))[0]
    sums, tops, outside = np.empty(runs), np.empty(runs), np.empty(runs)
    for r in range(runs):
        u = rng.poisson(2.0, n) + 0.1 * rng.random(n)
        b = np.stack([u**k for k in range(1, q + 1)], 1)
        sums[r] = (np.linalg.svd(left.T @ np.linalg.qr(b - b.mean(0))[0], compute_uv=False) ** 2).sum()
        g = rng.standard_normal((n, q))
        tops[r] = np.linalg.norm(left.T @ np.linalg.qr(g - g.mean(0))[0], 2)
        outside[r] = np.corrcoef(x, b[:, -1])[0, 1]
    expected = p * q / (n - (5 if broken else 1))
    z = (sums.mean() - expected) / (sums.std() / np.sqrt(runs))
    z_mean = outside.mean() / (outside.std() / np.sqrt(runs))
    square = outside**2
    z_square = (square.mean() - 1 / (n - 1)) / (square.std() / np.sqrt(runs))
    beyond = float((tops > (np.sqrt(p) + np.sqrt(q) + 1.0) / (np.sqrt(n - 1) - np.sqrt(q) - 1.0)).mean())
    holds = max(abs(z), abs(z_mean), abs(z_square)) < 4 and beyond <= 2 * np.exp(-0.5)
    holds &= (tops**2).mean() >= max(p, q) / (n - 1)
    return Verdict(
        bool(holds),
        f"mean of Σr² {sums.mean():.4f}, exact {expected:.4f}; held-out z {z_mean:.1f} and {z_square:.1f}",
    )


def envelope_gradient(broken: bool = False) -> Verdict:
    """Gradient with weights held fixed against finite differences of the largest singular value."""
    rng = np.random.default_rng(4)
    worst = 0.0
    for ridge in (0.0, 0.1):
        a, b = as_tensor(rng.standard_normal((25, 3))).requires_grad_(), as_tensor(rng.standard_normal((25, 2)))
        (gradient,) = torch.autograd.grad(top_correlation(a, b, 0.5 if broken else ridge), a)
        for _ in range(5):
            move, h = as_tensor(rng.standard_normal((25, 3))), 1e-5
            up, down = (
                float(canonical(a.detach() + s * h * move, b, ridge).correlations[0]) for s in (1, -1)
            )
            slope = float((gradient * move).sum())
            worst = max(worst, abs((up - down) / (2 * h) - slope) / (1e-3 + abs(slope)))
    return Verdict(bool(worst < 1e-4), f"largest relative gap of ten directional derivatives: {worst:.0e}")


CHAPTER = "adversaries"


def numeric_claim(label: str, statement: str, check: Callable[..., Verdict]) -> Claim:
    """Return an entry of this chapter whose check compares two computations."""
    return Claim(label, CHAPTER, statement, "numeric", check)


CLAIMS = (
    numeric_claim(
        "thm-av-slices",
        "Z and T are independent exactly if all their slices are, and slices with information at most ε "
        "put the joint characteristic function within √(2ε) of the product.",
        slices_see_all_dependence,
    ),
    numeric_claim(
        "prop-av-joint",
        "The top correlation of joined features is at least that of every pair of blocks, grows with "
        "slices and degree, and is zero exactly if all features are uncorrelated.",
        joined_features_see_no_less,
    ),
    numeric_claim(
        "prop-av-powers",
        "Bounded variables are independent exactly if all their powers are uncorrelated.",
        powers_decide_independence,
    ),
    numeric_claim(
        "prop-av-cca",
        "The ridge correlation is a singular value, falls with the ridge, and is at most the correlation "
        "of its own weights.",
        ridge_correlation_in_closed_form,
    ),
    numeric_claim(
        "lem-av-bias",
        "For independent samples the squared sample correlations sum to pq/(n-1) in the mean; held out, "
        "a correlation has mean 0 and mean square 1/(m-1).",
        correlation_of_nothing,
    ),
    numeric_claim(
        "prop-av-envelope",
        "Where the top correlation is simple its gradient is that with the best weights held fixed.",
        envelope_gradient,
    ),
)
