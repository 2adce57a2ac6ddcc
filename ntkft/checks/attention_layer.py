"""Checks of the chapter "The kernel of attention" on a whole layer: norms, biases, masks, rotary positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ntkft.attention import Layer, Seen, head_blocks, layer_gradients, rotate
from ntkft.checks import Claim, Verdict
from ntkft.checks.attention_ntk import D_K, TOKENS, D, relative_gap, small_heads


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
    heads, x, x2 = small_heads(20, 4)
    moved = x[[0, 3, 1, 5, 4, 2]]
    one, two = head_blocks(heads, x, 0, x2, 0), head_blocks(heads, moved, 0, x2, 0)
    worst = max(worst, *(relative_gap(two[block], one[block]) for block in "ovqk"))
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


CHAPTER = "attention_ntk"


CLAIMS = (
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
)
