"""Checks of the chapter "The kernel of attention"."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ntkft.attention import (
    Heads,
    Layer,
    Seen,
    attend,
    head_blocks,
    head_gradients,
    layer_gradients,
    rotate,
    scores_only,
)
from ntkft.checks import Claim, Verdict, full_result

D, D_K, TOKENS = 8, 4, 6


def _heads(count: int, seed: int = 0) -> tuple[Heads, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, x2 = rng.standard_normal((2, TOKENS, D))
    return Heads.draw(rng, count, D, D_K), x, x2


def _gap(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
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
    heads, x, _ = _heads(200)
    worst, holds, tightest = 0.0, True, 0.0
    p, _, C = attend(heads, x, 0, tau=3.0)
    diameter2 = ((x[:, None] - x[None]) ** 2).sum(2).max()
    for i in range(20):
        z = np.log(p[i])
        steps = np.exp(z[:, None] + 1e-30j * np.eye(TOKENS))
        numeric = (steps / steps.sum(0)).imag / 1e-30
        J = np.diag(p[i]) - (0 if broken else 1) * np.outer(p[i], p[i])
        worst = max(worst, _gap(J, numeric), _gap(x.T @ J @ x, C[i]))
    eigenvalues = np.linalg.eigvalsh(C)
    traces, bounds = eigenvalues.sum(1), (1 - p.max(1)) * diameter2
    holds = worst < 1e-12 and eigenvalues.min() > -1e-12 and bool((traces <= bounds * (1 + 1e-12)).all())
    tightest = float((traces / bounds).max())
    return Verdict(bool(holds), f"largest gap {worst:.1e}; tr C reaches {tightest:.2f} of its bound")


def head_gradient(broken: bool = False) -> Verdict:
    """The four formulas against autograd, 50 heads, every position."""
    heads, x, _ = _heads(50)
    worst = 0.0
    for q in range(TOKENS):
        ours, truth = head_gradients(heads, x, q), _autograd(heads, x, q)
        if broken:  # the covariance without the centre
            p = attend(heads, x, q)[0]
            b = np.einsum("nvd,nv->nd", heads.W_V, heads.w_O)
            raw = np.einsum("nt,td,te,ne->nd", p, x, x, b)
            ours["k"] = np.einsum("nk,nd->nkd", heads.W_Q @ x[q], raw) / D_K**0.5
        worst = max(worst, *(_gap(ours[block], truth[block]) for block in "ovqk"))
    return Verdict(worst < 1e-10, f"largest relative gap {worst:.1e} over {50 * TOKENS} heads and positions")


def head_kernel(broken: bool = False) -> Verdict:
    """The four blocks against inner products of autograd's gradients of two inputs."""
    heads, x, x2 = _heads(50, 1)
    ours, one, two = head_blocks(heads, x, 0, x2, 3), _autograd(heads, x, 0), _autograd(heads, x2, 3)
    if broken:
        ours["q"] *= D_K**0.5  # 1/√d_k instead of 1/d_k
    inner = {block: (one[block] * two[block]).reshape(50, -1).sum(1) for block in "ovqk"}
    worst = max(_gap(ours[block], inner[block]) for block in "ovqk")
    return Verdict(worst < 1e-10, f"largest relative gap of a block {worst:.1e}")


def one_hot(broken: bool = False) -> Verdict:
    """Bounds on the query and key blocks of the diagonal, many heads and temperatures; they decay with the gap."""
    heads, x, _ = _heads(300, 2)
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


def _layer(seed: int, groups: int, bias: float = 0.3) -> tuple[Layer, Seen]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    layer = Layer(
        *(draw(4, D_K, D), draw(groups, D_K, D), draw(groups, D_K, D), draw(4, D, D_K)),
        *(bias * draw(4, D_K), bias * draw(groups, D_K), bias * draw(groups, D_K)),
    )
    return layer, Seen(draw(TOKENS, D), draw(TOKENS, D))


def _layer_autograd(layer: Layer, seen: Seen) -> dict[str, Tensor]:
    """Gradients of Σ_q ⟨g_q, output_q⟩, by autograd of a plain forward pass, head by head."""
    names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
    w = {name: getattr(layer, name).clone().requires_grad_() for name in names}
    shared, output = len(layer.W_Q) // len(layer.W_K), torch.zeros_like(seen.g)
    for h in range(len(layer.W_Q)):
        k = h // shared
        query = rotate((seen.x @ w["W_Q"][h].T + w["b_Q"][h])[None], seen.rotary)[0]
        key = rotate((seen.x @ w["W_K"][k].T + w["b_K"][k])[None], seen.rotary)[0]
        z = query @ key.T / D_K**0.5
        if seen.causal:
            z = z + torch.full_like(z, -torch.inf).triu(1)
        output = output + z.softmax(1) @ (seen.x @ w["W_V"][k].T + w["b_V"][k]) @ w["W_O"][h].T
    found = torch.autograd.grad((seen.g * output).sum(), list(w.values()))
    return dict(zip(names, found, strict=True))


def _layer_gap(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    scale = max(float(t.abs().max()) for t in truth.values())  # a bias of keys has none of its own
    return max(float((ours[name] - t).abs().max()) / scale for name, t in truth.items())


def layer(broken: bool = False) -> Verdict:
    """All positions, heads and biases against autograd; and the double sum over positions for the query block."""
    weights, seen = _layer(0, 4)
    ours = layer_gradients(replace(weights, b_Q=0 * weights.b_Q) if broken else weights, seen)
    worst = _layer_gap(ours, _layer_autograd(weights, seen))
    # query block of the kernel with a second text, as a double sum over positions of ⟨x_q, x'_r⟩ ⟨W_K C_q b_q, W_K C_r b_r⟩
    other = Seen(_layer(1, 4)[1].x, _layer(1, 4)[1].g)
    double = torch.zeros((), dtype=torch.float64)
    for h in range(4):
        moved = []
        for text in (seen, other):
            z = (text.x @ weights.W_Q[h].T + weights.b_Q[h]) @ (text.x @ weights.W_K[h].T + weights.b_K[h]).T
            p = (z / D_K**0.5).softmax(1)
            away = text.x[None] - (p @ text.x)[:, None]  # (q, s, d)
            C = torch.einsum("qs,qsd,qse->qde", p, away, away)
            b = text.g @ weights.W_O[h] @ weights.W_V[h]
            moved.append(torch.einsum("qde,qe->qd", C, b) @ weights.W_K[h].T)
        double = double + ((seen.x @ other.x.T) * (moved[0] @ moved[1].T)).sum() / D_K
    direct = (layer_gradients(weights, seen)["W_Q"] * layer_gradients(weights, other)["W_Q"]).sum()
    apart = float(abs(double - direct) / abs(direct))
    return Verdict(
        worst < 1e-10 and apart < 1e-10, f"gradients off by {worst:.1e}, the double sum by {apart:.1e}"
    )


def key_bias(broken: bool = False) -> Verdict:
    """The key bias by autograd: zero to rounding without rotary positions, plainly not zero with them."""
    weights, seen = _layer(2, 2)
    angle = torch.arange(TOKENS, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1, 1.0, 0.1], dtype=torch.float64
    )
    turned = Seen(seen.x, seen.g, (angle.cos(), angle.sin()))
    plain, rotary = _layer_autograd(weights, seen), _layer_autograd(weights, turned)
    size, with_turns = (float(g["b_K"].norm() / g["b_Q"].norm()) for g in (plain, rotary))
    if broken:
        size = with_turns
    return Verdict(
        size < 1e-12 and with_turns > 1e-3,
        f"gradient of the key bias over that of the query bias: {size:.0e} plain, {with_turns:.2f} with rotary positions",
    )


def masks(broken: bool = False) -> Verdict:
    """Causal mask against autograd; padding, a permutation of heads, and one of the other tokens change no block."""
    weights, seen = _layer(3, 2)
    causal = replace(seen, causal=True)
    worst = _layer_gap(layer_gradients(weights, causal), _layer_autograd(weights, causal))
    # a causal layer padded on the right: tokens that no real position sees, upstream gradient zero
    padded = Seen(torch.cat([seen.x, 9 + seen.x]), torch.cat([seen.g, 0 * seen.g]), causal=not broken)
    worst = max(worst, _layer_gap(layer_gradients(weights, padded), layer_gradients(weights, causal)))
    alone = _layer(3, 4)[0]
    order = torch.tensor([2, 0, 3, 1])
    swapped = layer_gradients(
        Layer(*(getattr(alone, name)[order] for name in alone.__dataclass_fields__)), seen
    )
    before = layer_gradients(alone, seen)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        ours, truth = ((g[name] ** 2).sum() for g in (swapped, before))
        worst = max(worst, float(abs(ours - truth) / truth))
    heads, x, x2 = _heads(20, 4)
    moved = x[[0, 3, 1, 5, 4, 2]]
    one, two = head_blocks(heads, x, 0, x2, 0), head_blocks(heads, moved, 0, x2, 0)
    worst = max(worst, *(_gap(two[block], one[block]) for block in "ovqk"))
    return Verdict(worst < 1e-10, f"largest relative gap {worst:.1e}")


def rotary(broken: bool = False) -> Verdict:
    """Rotary positions, causal mask, four query heads on two keys and values: formulas against autograd."""
    worst = 0.0
    angle = torch.arange(TOKENS, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1, 1.0, 0.1], dtype=torch.float64
    )
    for seed in range(5):
        weights, seen = _layer(seed, 2)
        seen = Seen(seen.x, seen.g, (angle.cos(), angle.sin()), causal=True)
        ours = layer_gradients(weights, replace(seen, rotary=None) if broken else seen)
        worst = max(worst, _layer_gap(ours, _layer_autograd(weights, seen)))
    return Verdict(worst < 1e-10, f"largest relative gap {worst:.1e} over five layers")


def many_heads(broken: bool = False) -> Verdict:
    """Autograd's kernel of 5 heads is the mean of theirs; over 20 480 heads the variance of the mean of M is V/M."""
    heads, x, x2 = _heads(5, 5)
    one, two = _autograd(heads, x, 0), _autograd(heads, x2, 0)
    whole = sum(float((one[b] / 5**0.5 * two[b] / 5**0.5).sum()) for b in "ovqk")
    mean = float(sum(part.mean() for part in head_blocks(heads, x, 0, x2, 0).values()))
    exact = abs(whole - mean) / abs(mean)
    pool = np.asarray(sum(head_blocks(_heads(20_480, 6)[0], x, 0, x2, 0).values()))
    ratios = [M ** (2 if broken else 1) * pool.reshape(-1, M).mean(1).var() / pool.var() for M in (4, 16, 64)]
    holds = exact < 1e-10 and all(abs(r - 1) < 0.2 for r in ratios)
    return Verdict(
        bool(holds), f"kernel off by {exact:.0e}; M Var/V = " + ", ".join(f"{r:.2f}" for r in ratios)
    )


def integrated(broken: bool = False) -> Verdict:
    """Fixed scores, 20 000 draws of w_O and W_V (uniform, so that only variances count): the mean of each block."""
    heads, x, x2 = _heads(1, 7)
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
    heads, x, _ = _heads(30, 10)
    rho = 3.0
    turned = replace(heads, W_Q=rho * heads.W_Q, W_K=heads.W_K / rho)
    same = _gap(attend(turned, x, 0)[0], attend(heads, x, 0)[0])
    one, two = (
        {b: (g**2).reshape(30, -1).sum(1) for b, g in _autograd(h, x, 0).items()} for h in (heads, turned)
    )
    factors = {"o": 1.0, "v": 1.0, "q": rho**-2, "k": rho**2}
    if broken:
        factors |= {"q": rho**2, "k": rho**-2}
    worst = max(same, *(_gap(two[b], factors[b] * one[b]) for b in "ovqk"))
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


def stored_agreement(broken: bool = False) -> Verdict:
    """Stored gaps between formulas and engine, all layers and blocks of both models."""
    values = full_result("attention_ntk").values
    gaps = {model: values[f"gap_{model}"] for model in ("minilm", "smollm2")}
    limit = 1e-15 if broken else 1e-10
    told = ", ".join(f"{model} {gap:.0e}" for model, gap in gaps.items())
    return Verdict(max(gaps.values()) < limit, f"largest relative gap: {told}")


def stored_temperature(broken: bool = False) -> Verdict:
    """Stored toy heads: the median head's share of q and k falls below a thousandth, the mean kernel's does not."""
    arrays = full_result("attention_ntk").arrays
    cold = int(np.flatnonzero(arrays["taus"] == 64)[0])
    median = arrays["temperature_median" if not broken else "temperature_share"][cold]
    low = arrays["temperature_share_interval"][cold, 0]
    return Verdict(
        bool(median < 1e-3 and low > 0.5), f"at τ = 64: median {median:.0e}, mean kernel at least {low:.2f}"
    )


def stored_slope(broken: bool = False) -> Verdict:
    """Stored sweep: the interval of the slope holds -1/2 and is short."""
    values, wanted = full_result("attention_ntk").values, -1.0 if broken else -0.5
    low, high = values["slope_low"], values["slope_high"]
    return Verdict(
        bool(low <= wanted <= high and high - low < 0.05),
        f"slope {values['slope']:.3f}, {low:.3f} to {high:.3f}",
    )


def stored_shares(broken: bool = False) -> Verdict:
    """Stored shares of queries and keys: trace, centred trace and aligned part, differences beyond both half-widths."""
    result, holds, told = full_result("attention_ntk"), True, []
    kinds = result.values["kinds"]
    qk, vo = ([kinds.index(f"attention.{b}") for b in pair] for pair in ("qk", "vo"))
    cases = [
        f"minilm_{w}_{d}_0" for w in ("pretrained", "random") for d in ("amazon", "movies", "nyt", "tweets")
    ]
    cases += [f"smollm2_pretrained_{d}_0" for d in ("amazon", "tweets")]
    for case in cases:
        share, width = result.arrays[f"share_{case}"], result.arrays[f"width_{case}"]
        holds &= bool(share[0, qk].sum() < share[0, vo].sum())
        surplus = float(share[2, qk].sum() - share[1, qk].sum())
        error = float(width[1:, qk].sum())
        if case.startswith("minilm_pretrained"):
            holds &= (surplus if broken else -surplus) > error
            told.append(f"{100 * surplus:+.2f} (± {100 * error:.2f})")
        if case == "smollm2_pretrained_amazon_0":
            holds &= surplus > error
            told.append(f"SmolLM2, reviews {100 * surplus:+.2f} (± {100 * error:.2f})")
    return Verdict(bool(holds), "aligned minus centred share in per cent, MiniLM " + ", ".join(told))


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
        "obs-at-temperature",
        CHAPTER,
        "At τ = 64 the share of queries and keys is below 0.001 in the median head and above a half in the mean kernel.",
        "stored",
        stored_temperature,
    ),
    Claim(
        "thm-at-layer",
        CHAPTER,
        "The gradients of a whole layer with biases, and its kernel as double sums over positions.",
        "numeric",
        layer,
    ),
    Claim(
        "prop-at-key-bias",
        CHAPTER,
        "The key bias has gradient zero (without rotary positions).",
        "numeric",
        key_bias,
    ),
    Claim(
        "prop-at-mask",
        CHAPTER,
        "The formulas hold under a mask; padding, permuted heads and permuted other tokens change no block.",
        "numeric",
        masks,
    ),
    Claim(
        "prop-at-rotary",
        CHAPTER,
        "The gradients with rotary positions and with keys and values shared by groups of heads.",
        "numeric",
        rotary,
    ),
    Claim(
        "obs-at-agreement",
        CHAPTER,
        "Formulas and kernel engine agree to 1e-10 on six layers of MiniLM and on three of SmolLM2.",
        "stored",
        stored_agreement,
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
        "obs-at-slope",
        CHAPTER,
        "The measured distance from the many-head limit has a slope whose 95 % interval holds -1/2.",
        "stored",
        stored_slope,
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
    Claim(
        "obs-at-shares",
        CHAPTER,
        "Queries and keys have less of the trace than values and outputs in ten kernels of MiniLM, its twin and SmolLM2; "
        "aligned below centred share in MiniLM, above it in SmolLM2 on reviews.",
        "stored",
        stored_shares,
    ),
)
