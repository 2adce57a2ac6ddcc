r"""The tangent kernel of softmax attention, from formulas: no automatic differentiation inside.

A head reads tokens :math:`x_1, \dots, x_T` from position q: :math:`z_s = \langle W_Q x_q, W_K x_s\rangle/\sqrt{d_k}`,
:math:`p = \mathrm{softmax}(z)`, :math:`c = \sum_s p_s x_s`, :math:`a = \langle w_O, W_V c\rangle`. With
:math:`b = W_V^\top w_O` and the covariance :math:`C` of the tokens under p,

.. math:: \partial a/\partial w_O = W_V c, \quad \partial a/\partial W_V = w_O c^\top, \quad
          \partial a/\partial W_Q = d_k^{-1/2}\, W_K C b\, x_q^\top, \quad
          \partial a/\partial W_K = d_k^{-1/2}\, W_Q x_q (C b)^\top .

`head_gradients` and `head_blocks` are these formulas for many toy heads at once (numpy). `layer_gradients` is a whole layer
(torch): all positions, biases, a causal mask, rotary positions, keys and values shared by groups of heads. `layer_blocks`
takes a layer of a real model apart. Source: the book's chapter "The kernel of attention".

Example
-------
>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> heads, x = Heads.draw(rng, 3, d=8, d_k=4), rng.standard_normal((6, 8))
>>> {name: part.shape for name, part in head_blocks(heads, x, 0, x, 0).items()}
{'o': (3,), 'v': (3,), 'q': (3,), 'k': (3,)}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.readout import Readout


@dataclass(frozen=True)
class Heads:
    """N heads: W_Q, W_K (N, d_k, d), W_V (N, d_v, d), w_O (N, d_v)."""

    W_Q: np.ndarray
    W_K: np.ndarray
    W_V: np.ndarray
    w_O: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, d: int, d_k: int) -> Heads:
        """Draw independent Gaussian heads with d_v = d_k: variance 1/d in the matrices, 1/d_k in w_O."""
        W_Q, W_K, W_V = (rng.standard_normal((count, d_k, d)) / d**0.5 for _ in range(3))
        return cls(W_Q, W_K, W_V, rng.standard_normal((count, d_k)) / d_k**0.5)


def attend(
    heads: Heads, x: np.ndarray, q: int, tau: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p (N, T), the contexts c (N, d) and the covariances C (N, d, d) at position q of tokens x (T, d).

    `tau` multiplies the scores: an inverse temperature, 0 for uniform attention, large for one-hot attention.
    """
    x = np.asarray(x, dtype=float)
    if x.ndim != 2 or not -len(x) <= q < len(x):
        raise InputError(f"x has shape {x.shape} and q is {q}: x must be (T, d), and q one of its rows.")
    query = heads.W_Q @ x[q]  # (N, d_k)
    z = tau * np.einsum("nk,nkd,td->nt", query, heads.W_K, x, optimize=True) / heads.W_Q.shape[1] ** 0.5
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    c = p @ x
    away = x - c[:, None]  # (N, T, d)
    return p, c, np.einsum("nt,ntd,nte->nde", p, away, away, optimize=True)


def head_gradients(heads: Heads, x: np.ndarray, q: int, tau: float = 1.0) -> dict[str, np.ndarray]:
    """Return ∂a/∂w_O (N, d_v), ∂a/∂W_V (N, d_v, d), ∂a/∂W_Q and ∂a/∂W_K (N, d_k, d) of every head."""
    _, c, C = attend(heads, x, q, tau)
    b = np.einsum("nvd,nv->nd", heads.W_V, heads.w_O)
    Cb = np.einsum("nde,ne->nd", C, b)
    scale = tau / heads.W_Q.shape[1] ** 0.5
    return {
        "o": np.einsum("nvd,nd->nv", heads.W_V, c),
        "v": np.einsum("nv,nd->nvd", heads.w_O, c),
        "q": scale * np.einsum("nkd,nd,e->nke", heads.W_K, Cb, x[q], optimize=True),
        "k": scale * np.einsum("nk,nd->nkd", heads.W_Q @ x[q], Cb),
    }


def head_blocks(
    heads: Heads, x: np.ndarray, q: int, x2: np.ndarray, q2: int, tau: float = 1.0
) -> dict[str, np.ndarray]:
    """Return the four blocks of k(x, x'), each (N,), for tokens x read at q and x' read at q2."""
    (_, c, C), (_, c2, C2) = attend(heads, x, q, tau), attend(heads, x2, q2, tau)
    b = np.einsum("nvd,nv->nd", heads.W_V, heads.w_O)
    Cb, Cb2 = np.einsum("nde,ne->nd", C, b), np.einsum("nde,ne->nd", C2, b)
    scale = tau**2 / heads.W_Q.shape[1]

    def inner(W: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:  # ⟨W u, W v⟩, of each head
        return ((W @ u[..., None]) * (W @ v[..., None])).sum((1, 2))

    return {
        "o": inner(heads.W_V, c, c2),
        "v": (heads.w_O**2).sum(1) * (c * c2).sum(1),
        "q": scale * (x[q] @ x2[q2]) * inner(heads.W_K, Cb, Cb2),
        "k": scale * inner(heads.W_Q, x[q], x2[q2]) * (Cb * Cb2).sum(1),
    }


def scores_only(
    heads: Heads, x: np.ndarray, q: int, x2: np.ndarray, q2: int, var_V: float, var_O: float
) -> dict[str, np.ndarray]:
    """Return E[blocks | W_Q, W_K], each (N,): w_O and W_V integrated out, entries of variance var_O and var_V."""
    (_, c, C), (_, c2, C2) = attend(heads, x, q), attend(heads, x2, q2)
    d_v, d_k = heads.w_O.shape[1], heads.W_Q.shape[1]
    both, size = (c * c2).sum(1), d_v * var_O * var_V / d_k
    keys, keys2 = heads.W_K @ C, heads.W_K @ C2  # (N, d_k, d)
    return {
        "o": d_v * var_V * both,
        "v": d_v * var_O * both,
        "q": size * (x[q] @ x2[q2]) * (keys * keys2).sum((1, 2)),
        "k": size * ((heads.W_Q @ x[q]) * (heads.W_Q @ x2[q2])).sum(1) * (C * C2).sum((1, 2)),
    }


@dataclass(frozen=True)
class Layer:
    """Weights of one attention layer with H heads, of which each of G groups shares a key and a value.

    W_Q (H, d_k, d), W_K and W_V (G, d_k, d), W_O (H, d, d_k); biases b_Q (H, d_k), b_K and b_V (G, d_k), zero if absent.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor

    def __post_init__(self) -> None:
        if len(self.W_Q) % len(self.W_K) or len(self.W_K) != len(self.W_V):
            raise InputError(
                f"There are {len(self.W_Q)} query heads, {len(self.W_K)} keys and {len(self.W_V)} values: "
                "keys and values must be as many, and divide the query heads."
            )


@dataclass(frozen=True)
class Seen:
    """What one text shows at a layer: inputs x (T, d), upstream gradients g (T, d), rotary (cos, sin), each (T, d_k)."""

    x: Tensor
    g: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    causal: bool = False


def rotate(v: Tensor, rotary: tuple[Tensor, Tensor] | None, sign: int = 1) -> Tensor:
    """Turn v (H, T, d_k) by the position's rotation Ω; sign=-1 applies its transpose."""
    if rotary is None:
        return v
    cos, sin = rotary
    first, second = v.chunk(2, -1)
    return v * cos + sign * torch.cat((-second, first), -1) * sin


def layer_gradients(layer: Layer, seen: Seen) -> dict[str, Tensor]:
    r"""Return the gradient of f for one text in the shapes of `Layer`, and ``b_O`` (d,), by the formulas.

    With :math:`\delta_{qs} = p_{qs}(\beta_{qs} - \bar\beta_q)` and :math:`\beta_{qs} = \langle W_O^\top g_q, W_V x_s\rangle`;
    without rotary positions :math:`\sum_s \delta_{qs} x_s = C_q b_q`. Keys and values sum over the heads of their group.
    """
    x, g, shared = seen.x, seen.g, len(layer.W_Q) // len(layer.W_K)
    scale = layer.W_Q.shape[1] ** -0.5
    query = rotate(x @ layer.W_Q.mT + layer.b_Q[:, None], seen.rotary)  # (H, T, d_k)
    key = rotate(x @ layer.W_K.mT + layer.b_K[:, None], seen.rotary).repeat_interleave(shared, 0)
    W_V = layer.W_V.repeat_interleave(shared, 0)  # (H, d_k, d)
    z = scale * query @ key.mT  # (H, T, T)
    if seen.causal:
        z = z.masked_fill(torch.ones_like(z[0], dtype=torch.bool).triu(1), -torch.inf)
    p = z.softmax(-1)
    c = p @ x  # (H, T, d)
    back = g @ layer.W_O  # (H, T, d_k): W_O^T g_q
    beta = back @ (x @ W_V.mT).mT  # (H, T, T)
    delta = p * (beta - (p * beta).sum(-1, keepdim=True))
    to_query = scale * rotate(delta @ key, seen.rotary, -1)  # (H, T, d_k)
    to_key = scale * rotate(delta.mT @ query, seen.rotary, -1)  # (H, T, d_k)

    def group(gradient: Tensor) -> Tensor:  # (H, ...) -> (G, ...)
        return gradient.unflatten(0, (-1, shared)).sum(1)

    context = c @ W_V.mT + layer.b_V.repeat_interleave(shared, 0)[:, None]  # (H, T, d_k)
    return {
        "W_Q": to_query.mT @ x,
        "W_K": group(to_key.mT @ x),
        "W_V": group(back.mT @ c),
        "W_O": g.mT @ context,
        "b_Q": to_query.sum(1),
        "b_K": group(to_key.sum(1)),
        "b_V": group(back.sum(1)),
        "b_O": g.sum(0),
    }


# --- A layer of a real model --------------------------------------------------------------------------------------------

# Where the four projections live in a layer, for the two families of the book.
FAMILIES = {
    "bert": ("attention.self", [f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]),
    "llama": ("self_attn", [f"self_attn.{part}_proj" for part in "qkvo"]),
}  # fmt: skip


def find_layer(readout: Readout, index: int) -> tuple[str, str]:
    """Return the family and the name, in the read-out's module, of attention layer `index`."""
    names = {name for name, _ in readout.module.named_modules()}
    for family, (_, projections) in FAMILIES.items():
        for name in names:
            if name.endswith(f".{index}.{projections[0]}"):
                return family, name.removesuffix(f".{projections[0]}")
    raise InputError(
        f"{readout.loaded.info.get('name')} has no layer {index} with the attention of {' or '.join(FAMILIES)}: "
        "choose a smaller index or another model."
    )


def layer_patterns(readout: Readout, index: int) -> dict[str, str]:
    """Return the patterns of the layer's blocks q, k, v, o, for ``empirical_ntk(..., blocks=)``."""
    family, place = find_layer(readout, index)
    return {block: f"{place}.{name}.*" for block, name in zip("qkvo", FAMILIES[family][1], strict=True)}


def layer_weights(readout: Readout, index: int) -> Layer:
    """Return the weights of layer `index`, cut into heads (detached)."""
    family, place = find_layer(readout, index)
    config: Any = readout.model.config
    linears: list[Any] = [readout.module.get_submodule(f"{place}.{name}") for name in FAMILIES[family][1]]
    width = len(linears[0].weight) // config.num_attention_heads
    W_Q, W_K, W_V = (li.weight.detach().unflatten(0, (-1, width)) for li in linears[:3])  # (H, d_k, d)
    b_Q, b_K, b_V = (
        (li.weight.new_zeros(len(li.weight)) if li.bias is None else li.bias.detach()).unflatten(
            0, (-1, width)
        )
        for li in linears[:3]
    )
    W_O = linears[3].weight.detach().unflatten(1, (-1, width)).movedim(1, 0)  # (H, d, d_k)
    return Layer(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V)


def see_layers(readout: Readout, text: str, indices: Sequence[int]) -> Iterator[Seen]:
    """Run one text forward and backward, and yield what each of the layers saw."""
    found: list[dict[str, Any]] = [{} for _ in indices]
    handles, causal = [], []

    def before(at: dict[str, Any], module: nn.Module, args: Any, kwargs: Any) -> None:
        at["x"] = args[0] if args else kwargs["hidden_states"]
        at["rotary"] = kwargs.get("position_embeddings")

    def after(at: dict[str, Any], module: nn.Module, args: Any, output: Tensor) -> None:
        at["output"] = output

    for index, at in zip(indices, found, strict=True):
        family, place = find_layer(readout, index)
        inside, projections = FAMILIES[family]
        attention = readout.module.get_submodule(f"{place}.{inside}")
        causal.append(bool(getattr(attention, "is_causal", False)))
        handles.append(attention.register_forward_pre_hook(partial(before, at), with_kwargs=True))
        projection = readout.module.get_submodule(f"{place}.{projections[-1]}")
        handles.append(projection.register_forward_hook(partial(after, at)))
    try:
        score = readout([text])[0]
    finally:
        for handle in handles:
            handle.remove()
    upstream = torch.autograd.grad(score, [at["output"] for at in found])
    for at, g, masked in zip(found, upstream, causal, strict=True):
        rotary = None if at["rotary"] is None else tuple(part[0].detach() for part in at["rotary"])
        yield Seen(at["x"][0].detach(), g[0], rotary, masked)  # type: ignore[arg-type]


def layer_blocks(readout: Readout, texts: Sequence[str], index: int) -> dict[str, np.ndarray]:
    """Return the blocks q, k, v, o of the layer's kernel, each (n, n), biases included, by the formulas.

    Example
    -------
    >>> readout = ntkft.pooled_readout(ntkft.load_model("minilm"))               # doctest: +SKIP
    >>> layer_blocks(readout, ["Good.", "Bad."], 3)["q"].shape                   # doctest: +SKIP
    (2, 2)
    """
    layer, parameters = layer_weights(readout, index), readout.parameters()
    rows: dict[str, list[Tensor]] = {block: [] for block in "qkvo"}
    for text in texts:
        (seen,) = see_layers(readout, text, [index])
        gradients = layer_gradients(layer, seen)
        for block, pattern in layer_patterns(readout, index).items():
            kinds = "Wb" if pattern.replace("*", "bias") in parameters else "W"
            parts = [gradients[f"{kind}_{block.upper()}"].flatten() for kind in kinds]
            rows[block].append(torch.cat(parts))
    stacked = {block: torch.stack(found).double() for block, found in rows.items()}  # (n, P) each
    return {block: (found @ found.mT).cpu().numpy() for block, found in stacked.items()}
