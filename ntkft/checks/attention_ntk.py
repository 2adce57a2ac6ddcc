"""Checks of the chapter "The kernel of attention"."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ntkft.attention import (
    Heads,
    attend,
    head_blocks,
    head_gradients,
    scores_only,
)
from ntkft.checks import Claim, Verdict

D, D_K, TOKENS = 8, 4, 6


def small_heads(count: int, seed: int = 0) -> tuple[Heads, np.ndarray, np.ndarray]:
    """Return random heads and two texts of `TOKENS` tokens."""
    rng = np.random.default_rng(seed)
    x, x2 = rng.standard_normal((2, TOKENS, D))
    return Heads.draw(rng, count, D, D_K), x, x2


def relative_gap(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def _autograd(heads: Heads, x: np.ndarray, q: int) -> dict[str, np.ndarray]:
    """Gradients of the sum of all heads' outputs, which are those of each head, by torch."""
    names = ("w_O", "W_V", "W_Q", "W_K")
    w = {name: torch.tensor(getattr(heads, name), requires_grad=True) for name in names}
    tokens = torch.tensor(x)
    keys = torch.einsum("nkd,td->ntk", w["W_K"], tokens)
    scores = torch.einsum("nkd,d,ntk->nt", w["W_Q"], tokens[q], keys) / heads.W_Q.shape[1] ** 0.5
    values = torch.einsum("nvd,td->ntv", w["W_V"], tokens)
    outputs = torch.einsum("nt,ntv,nv->n", scores.softmax(1), values, w["w_O"])
    found = torch.autograd.grad(outputs.sum(), list(w.values()))
    return {block: g.numpy() for block, g in zip("ovqk", found, strict=True)}


def covariance(broken: bool = False) -> Verdict:
    """Softmax by complex steps against diag(p) - pp'; C = X'JX, no negative eigenvalue, tr C <= (1 - p_max) D²."""
    heads, x, _ = small_heads(200)
    worst, holds, tightest = 0.0, True, 0.0
    p, _, C = attend(heads, x, 0, tau=3.0)
    diameter2 = ((x[:, None] - x[None]) ** 2).sum(2).max()
    for i in range(20):
        z = np.log(p[i])
        steps = np.exp(z[:, None] + 1e-30j * np.eye(TOKENS))
        numeric = (steps / steps.sum(0)).imag / 1e-30
        J = np.diag(p[i]) - (0 if broken else 1) * np.outer(p[i], p[i])
        worst = max(worst, relative_gap(J, numeric), relative_gap(x.T @ J @ x, C[i]))
    eigenvalues = np.linalg.eigvalsh(C)
    traces, bounds = eigenvalues.sum(1), (1 - p.max(1)) * diameter2
    holds = worst < 1e-12 and eigenvalues.min() > -1e-12 and bool((traces <= bounds * (1 + 1e-12)).all())
    tightest = float((traces / bounds).max())
    return Verdict(bool(holds), f"largest gap {worst:.1e}; tr C reaches {tightest:.2f} of its bound")


def head_gradient(broken: bool = False) -> Verdict:
    """The four formulas against autograd, 50 heads, every position."""
    heads, x, _ = small_heads(50)
    worst = 0.0
    for q in range(TOKENS):
        ours, truth = head_gradients(heads, x, q), _autograd(heads, x, q)
        if broken:  # the covariance without the centre
            p = attend(heads, x, q)[0]
            b = np.einsum("nvd,nv->nd", heads.W_V, heads.w_O)
            raw = np.einsum("nt,td,te,ne->nd", p, x, x, b)
            ours["k"] = np.einsum("nk,nd->nkd", heads.W_Q @ x[q], raw) / D_K**0.5
        worst = max(worst, *(relative_gap(ours[block], truth[block]) for block in "ovqk"))
    return Verdict(worst < 1e-10, f"largest relative gap {worst:.1e} over {50 * TOKENS} heads and positions")


def head_kernel(broken: bool = False) -> Verdict:
    """The four blocks against inner products of autograd's gradients of two inputs."""
    heads, x, x2 = small_heads(50, 1)
    ours, one, two = head_blocks(heads, x, 0, x2, 3), _autograd(heads, x, 0), _autograd(heads, x2, 3)
    if broken:
        ours["q"] *= D_K**0.5  # 1/√d_k instead of 1/d_k
    inner = {block: (one[block] * two[block]).reshape(50, -1).sum(1) for block in "ovqk"}
    worst = max(relative_gap(ours[block], inner[block]) for block in "ovqk")
    return Verdict(worst < 1e-10, f"largest relative gap of a block {worst:.1e}")


def one_hot(broken: bool = False) -> Verdict:
    """Bounds on the query and key blocks of the diagonal, many heads and temperatures; they decay with the gap."""
    heads, x, _ = small_heads(300, 2)
    diameter4 = ((x[:, None] - x[None]) ** 2).sum(2).max() ** 2
    b2 = (np.einsum("nvd,nv->nd", heads.W_V, heads.w_O) ** 2).sum(1)
    holds, tightest = True, 0.0
    z = np.sort(np.log(attend(heads, x, 0)[0]), axis=1)
    gap = z[:, -1] - z[:, -2]
    for tau in (0.5, 1.0, 2.0, 4.0, 8.0):
        blocks = head_blocks(heads, x, 0, x, 0, tau)
        rest = np.minimum(1, (TOKENS - 1) * np.exp(-tau * gap))
        common = tau**2 / D_K * b2 * diameter4 * rest**2 * (1e-3 if broken else 1)
        bounds = {
            "q": common * (x[0] @ x[0]) * np.linalg.norm(heads.W_K, 2, axis=(1, 2)) ** 2,
            "k": common * ((heads.W_Q @ x[0]) ** 2).sum(1),
        }
        for block, bound in bounds.items():
            holds &= bool((blocks[block] <= bound * (1 + 1e-9)).all())
            tightest = max(tightest, float((blocks[block] / bound).max()))
    return Verdict(bool(holds), f"the blocks reach {tightest:.3f} of the bound")


def ties(broken: bool = False) -> Verdict:
    """Two tokens, W_K and b fixed, W_Q Gaussian: mean query block divided by τ against its limit, by Monte Carlo at τ = 60."""
    rng = np.random.default_rng(3)
    x, count, tau, d_k = rng.standard_normal((2, D)), 200_000, 60.0, D_K
    W_K, b = rng.standard_normal((d_k, D)) / D**0.5, rng.standard_normal(D)
    apart = x[0] - x[1]
    # the scores' difference, by drawing the query W_Q x_q, which is Gaussian with variance |x_q|²/d in each entry
    query = rng.standard_normal((count, d_k)) * np.linalg.norm(x[0]) / D**0.5
    u = tau * query @ (W_K @ apart) / d_k**0.5
    both = 1 / (2 + 2 * np.cosh(np.clip(u, -600, 600)))  # p(1-p)
    block = tau**2 / d_k * (x[0] @ x[0]) * (W_K @ apart) @ (W_K @ apart) * (apart @ b) ** 2 * both**2
    limit = (apart @ b) ** 2 * np.linalg.norm(x[0]) * np.linalg.norm(W_K @ apart) * D**0.5
    limit /= (3 if broken else 6) * (2 * np.pi * d_k) ** 0.5
    error = float(block.std() / count**0.5)
    mean, median = float(block.mean()), float(np.median(block))
    holds = abs(mean - tau * limit) < 4 * error and median < 1e-3 * mean
    return Verdict(
        bool(holds),
        f"mean {mean:.2f} ± {error:.2f}, τ times the limit {tau * limit:.2f}, median {median:.0e}",
    )


def many_heads(broken: bool = False) -> Verdict:
    """Autograd's kernel of 5 heads is the mean of theirs; over 20 480 heads the variance of the mean of M is V/M."""
    heads, x, x2 = small_heads(5, 5)
    one, two = _autograd(heads, x, 0), _autograd(heads, x2, 0)
    whole = sum(float((one[b] / 5**0.5 * two[b] / 5**0.5).sum()) for b in "ovqk")
    mean = float(sum(part.mean() for part in head_blocks(heads, x, 0, x2, 0).values()))
    exact = abs(whole - mean) / abs(mean)
    pool = np.asarray(sum(head_blocks(small_heads(20_480, 6)[0], x, 0, x2, 0).values()))
    ratios = [M ** (2 if broken else 1) * pool.reshape(-1, M).mean(1).var() / pool.var() for M in (4, 16, 64)]
    holds = exact < 1e-10 and all(abs(r - 1) < 0.2 for r in ratios)
    return Verdict(
        bool(holds), f"kernel off by {exact:.0e}; M Var/V = " + ", ".join(f"{r:.2f}" for r in ratios)
    )


def integrated(broken: bool = False) -> Verdict:
    """Fixed scores, 20 000 draws of w_O and W_V (uniform, so that only variances count): the mean of each block."""
    heads, x, x2 = small_heads(1, 7)
    rng, count = np.random.default_rng(8), 20_000
    w_O = 0.7 * 3**0.5 * rng.uniform(-1, 1, (count, D_K))
    W_V = 0.4 * 3**0.5 * rng.uniform(-1, 1, (count, D_K, D))
    many = Heads(np.repeat(heads.W_Q, count, 0), np.repeat(heads.W_K, count, 0), W_V, w_O)
    found = head_blocks(many, x, 0, x2, 0)
    closed = scores_only(heads, x, 0, x2, 0, 0.4**2, (0.7 if broken else 0.7**2))
    worst = max(
        abs(found[b].mean() - closed[b][0]) / (found[b].std() / count**0.5) for b in "ovqk"
    )  # in standard errors
    return Verdict(bool(worst < 4), f"largest deviation of a block {worst:.1f} Monte-Carlo standard errors")


def wide(broken: bool = False) -> Verdict:
    """Two tokens: scores' differences a Gaussian pair (quadrature), against 2000 heads with d_k = 400, block by block."""
    rng = np.random.default_rng(9)
    x, x2 = 2 * rng.standard_normal((2, 2, 3))
    var, d_k, count = 1 / 3, 400, 2000  # of the entries of W_Q and W_K
    u, v = x[0] - x[1], x2[0] - x2[1]
    tokens = np.array([[u @ u, u @ v], [u @ v, v @ v]])
    queries = np.array([[x[0] @ x[0], x[0] @ x2[0]], [x[0] @ x2[0], x2[0] @ x2[0]]])
    root = np.linalg.cholesky(var**2 * tokens * (1 if broken else queries))
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = np.outer(weight, weight).ravel() / weight.sum() ** 2
    p = 1 / (
        1 + np.exp(-root @ np.stack(np.meshgrid(node, node, indexing="ij")).reshape(2, -1))
    )  # first token's
    c, c2 = (y[1] + q[:, None] * (y[0] - y[1]) for y, q in zip((x, x2), p, strict=True))
    spread = float(weight @ (p * (1 - p)).prod(0)) * (u @ v) ** 2  # E tr(CC')
    limits = {"o": float(weight @ (c * c2).sum(1)), "q": var * queries[0, 1] * spread}
    limits["k"] = limits["q"]
    found = scores_only(Heads.draw(rng, count, 3, d_k), x, 0, x2, 0, var_V=1.0, var_O=1 / d_k)
    found["o"] = found["o"] / d_k
    worst = max(abs(found[b].mean() - t) / (found[b].std() / count**0.5) for b, t in limits.items())
    told = ", ".join(f"{b} {found[b].mean():.3f} and {t:.3f}" for b, t in limits.items())
    return Verdict(bool(worst < 4), f"heads and limit: {told}")


def rescaling(broken: bool = False) -> Verdict:
    """(ρ W_Q, W_K/ρ): same scores, same o and v blocks by autograd; q divided and k multiplied by ρ²."""
    heads, x, _ = small_heads(30, 10)
    rho = 3.0
    turned = replace(heads, W_Q=rho * heads.W_Q, W_K=heads.W_K / rho)
    same = relative_gap(attend(turned, x, 0)[0], attend(heads, x, 0)[0])
    one, two = (
        {b: (g**2).reshape(30, -1).sum(1) for b, g in _autograd(h, x, 0).items()} for h in (heads, turned)
    )
    factors = {"o": 1.0, "v": 1.0, "q": rho**-2, "k": rho**2}
    if broken:
        factors |= {"q": rho**2, "k": rho**-2}
    worst = max(same, *(relative_gap(two[b], factors[b] * one[b]) for b in "ovqk"))
    return Verdict(worst < 1e-10, f"largest relative gap {worst:.1e} at ρ = 3")


def rate(broken: bool = False) -> Verdict:
    """The loss of a centred read-out after one tiny step in one block, against r'K_b r/n."""
    rng = np.random.default_rng(11)
    n, blocks = 20, (5, 9, 30)
    phi = [rng.standard_normal((n, width)) + 1 for width in blocks]
    r = rng.standard_normal(n) + 2

    def loss(values: np.ndarray) -> float:
        return float(((values - values.mean()) ** 2).mean() / 2)

    centred = r if broken else r - r.mean()
    worst = 0.0
    for part in phi:
        gradient = part.T @ (r - r.mean()) / n  # of this block's weights
        step = 1e-6
        measured = (loss(r) - loss(r - step * part @ gradient)) / step
        claimed = float(centred @ (part @ part.T / n) @ centred / n)
        worst = max(worst, abs(measured - claimed) / measured)
    return Verdict(worst < 1e-3, f"largest relative gap {worst:.1e} over {len(blocks)} blocks")


CHAPTER = "attention_ntk"


CLAIMS = (
    Claim(
        "lem-at-covariance",
        CHAPTER,
        "Softmax has the Jacobian diag(p) - pp', and the tokens' covariance C has tr C ≤ (1 - p_max) D².",
        "numeric",
        covariance,
    ),
    Claim(
        "thm-at-head",
        CHAPTER,
        "The four gradients of a head are W_V c, w_O c', W_K C b x_q'/√d_k and W_Q x_q (C b)'/√d_k.",
        "numeric",
        head_gradient,
    ),
    Claim(
        "cor-at-blocks",
        CHAPTER,
        "The kernel of a head is the sum of an output, a value, a query and a key block in closed form.",
        "numeric",
        head_kernel,
    ),
    Claim(
        "prop-at-one-hot",
        CHAPTER,
        "Query and key blocks are at most a multiple of τ²(1 - p_max)², with 1 - p_max ≤ (T-1) exp(-τγ).",
        "numeric",
        one_hot,
    ),
    Claim(
        "prop-at-ties",
        CHAPTER,
        "With two tokens and Gaussian W_Q the query block tends to zero almost surely while its mean grows like τ.",
        "numeric",
        ties,
    ),
    Claim(
        "thm-at-many-heads",
        CHAPTER,
        "The kernel of M heads is the mean of theirs, with variance V/M for independent heads.",
        "numeric",
        many_heads,
    ),
    Claim(
        "prop-at-scores",
        CHAPTER,
        "With w_O and W_V integrated out each block is a function of the scores' softmax, W_Q and W_K in closed form.",
        "numeric",
        integrated,
    ),
    Claim(
        "cor-at-wide",
        CHAPTER,
        "For wide keys the limit is d_v(σ_O²+σ_V²) E⟨c,c'⟩ + S(σ_Q²+σ_K²)⟨x_q,x'_q⟩ E tr(CC') over Gaussian scores.",
        "numeric",
        wide,
    ),
    Claim(
        "prop-at-rescaling",
        CHAPTER,
        "(ρW_Q, W_K/ρ) is the same function; its query block is divided and its key block multiplied by ρ².",
        "numeric",
        rescaling,
    ),
    Claim(
        "prop-at-rate",
        CHAPTER,
        "A block's part in the initial rate of learning is r'K_b r/n, r the centred residual.",
        "numeric",
        rate,
    ),
)
