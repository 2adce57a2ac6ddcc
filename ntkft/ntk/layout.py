r"""Which parameters are contracted together: the sites of a model.

The layers of attention all read the same tensor, so :math:`q, k, v` share their left factor. Stored once and
contracted together, they cost one Gram matrix of tokens instead of three. Norms and biases are short: side by side
they make one matrix product. A `Site` is such a group; the kernel is a sum over sites.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkft.errors import InputError
from ntkft.ntk.capture import Use
from ntkft.ntk.factors import Chunk, Outer, Rows, Vector, cross_squares, join_calls

SHORT = 2**16  # a parameter with fewer entries is put beside others


@dataclass(frozen=True)
class Site:
    """Parameters that are contracted together, in one block of the kernel.

    kinds : the factors that a chunk of this site holds: ("Outer",), ("Rows",), ("Vector",) or, for a table that is also a
    dense output layer, ("Outer", "Rows"), whose cross terms count.
    widths : entries of the right factor (or of the vector) that belong to each name.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    kinds: tuple[str, ...]
    label: str


def find_sites(uses: Mapping[str, list[Use]], label: Callable[[str], str]) -> list[Site]:
    """Group the parameters of a captured probe into sites, in the model's order."""
    groups: dict[object, list[tuple[str, int]]] = {}
    kinds: dict[object, tuple[str, ...]] = {}
    for name, found in uses.items():
        pieces = join_calls([u.factor for u in found])
        if not pieces:
            continue  # it has no part in the score; the check against autograd confirms it
        first = pieces[0]
        key: object = name
        if isinstance(first, Outer):
            width = first.right.shape[-1]
            if len(found) == 1:
                key = ("outer", found[0].source, int(_tokens(first.right).sum()), label(name))
        elif isinstance(first, Vector):
            width = first.rows.shape[1]
            key = ("vector", label(name)) if width <= SHORT else name
        else:
            width = first.value.shape[1]
        groups.setdefault(key, []).append((name, width))
        kinds[key] = tuple(type(piece).__name__ for piece in pieces)
    return [
        Site(tuple(n for n, _ in group), tuple(w for _, w in group), kinds[key], label(group[0][0]))
        for key, group in groups.items()
    ]


def assemble(site: Site, uses: Mapping[str, list[Use]]) -> tuple[Chunk, dict[str, Tensor]]:
    """Join one batch's uses into the site's chunk; also return each parameter's ‖∂f(x_i)/∂p‖², (b,) float64."""
    pieces = {name: join_calls([u.factor for u in uses[name]]) for name in site.names}
    for name, found in pieces.items():
        if tuple(type(piece).__name__ for piece in found) != site.kinds:
            raise InputError(
                f"{name} is used as {site.kinds} in one batch and {[type(f).__name__ for f in found]} in another: "
                "leave it out with parameters=."
            )
    if site.kinds == ("Vector",):
        vectors = {name: found[0] for name, found in pieces.items()}
        squares = {name: v.squares() for name, v in vectors.items()}
        return (Vector(torch.cat([v.rows for v in vectors.values()], 1)),), squares  # type: ignore[union-attr]
    if site.kinds == ("Rows",):
        (found,) = pieces.values()
        return (found[0],), {site.names[0]: found[0].squares()}
    outers = [found[0] for found in pieces.values()]
    left = outers[0].left  # type: ignore[union-attr]
    if any(f.left.data_ptr() != left.data_ptr() for f in outers):  # type: ignore[union-attr]
        raise InputError(
            f"{', '.join(site.names)} read one tensor in one batch and several in another: leave them out with parameters=."
        )
    right = torch.cat([f.right for f in outers], 2) if len(outers) > 1 else outers[0].right  # type: ignore[union-attr]
    outer = _drop_empty_tokens(left, right)
    gram = outer.left @ outer.left.mT  # (b, T, T), shared by all the names
    squares = {
        name: (gram * (g @ g.mT)).sum((1, 2), dtype=torch.float64)
        for name, g in zip(site.names, outer.right.split(site.widths, 2), strict=True)
    }
    if site.kinds == ("Outer",):
        return (outer,), squares
    rows = pieces[site.names[0]][1]
    assert isinstance(rows, Rows)
    squares[site.names[0]] += rows.squares() + 2 * cross_squares(outer, rows)
    return (outer, rows), squares


def _tokens(g: Tensor) -> Tensor:
    """Whether anything came back at a token, (b, T)."""
    return (g != 0).any(-1)


def _drop_empty_tokens(a: Tensor, g: Tensor) -> Outer:
    """Keep the tokens that matter: drop those whose g is zero (padding; all but the last token in a last layer)."""
    keep = _tokens(g)  # (b, T)
    longest = max(int(keep.sum(1).max()), 1)
    if longest == g.shape[1]:
        return Outer(a, g)
    index = torch.argsort(~keep, dim=1, stable=True)[:, :longest].unsqueeze(-1)  # kept tokens first, in order
    return Outer(torch.take_along_dim(a, index, 1), torch.take_along_dim(g, index, 1))


def blocks_by(
    names: Sequence[str], blocks: str | Mapping[str, str | Sequence[str]] | Callable[[str], str] | None
) -> Callable[[str], str]:
    """Return the function from a parameter's name to the block it counts in.

    Parameters
    ----------
    blocks : None, "layer", "kind", a mapping {label: shell pattern(s)}, or a function of the name
        ``"layer"`` cuts by depth, ``"kind"`` into attention.q/k/v/o, mlp, norm, embedding and head. A name that no pattern of a
        mapping matches counts as ``"rest"``.
    """
    if blocks is None:
        return lambda name: "all"
    if callable(blocks):
        return blocks
    if isinstance(blocks, Mapping):
        table = {k: [v] if isinstance(v, str) else list(v) for k, v in blocks.items()}
        for k, patterns in table.items():
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise InputError(
                        f"Block {k!r} has the pattern {pattern!r}, which matches none of the {len(names)} parameters."
                    )
        return lambda name: next(
            (k for k, patterns in table.items() if any(fnmatch.fnmatch(name, p) for p in patterns)), "rest"
        )
    if blocks == "layer":
        return layer_of
    if blocks == "kind":
        return kind_of
    raise InputError(f"blocks is {blocks!r} and must be 'layer', 'kind', a mapping of patterns or a function.")


def layer_of(name: str) -> str:
    """Return the depth at which a parameter sits: ``"layer 3"``, or ``"embedding"``, ``"head"``, ``"final norm"``.

    >>> layer_of("model.encoder.layer.3.attention.self.query.weight"), layer_of("model.embeddings.word_embeddings.weight")
    ('layer 3', 'embedding')
    """
    for part in name.split("."):
        if part.isdigit():
            return f"layer {int(part)}"
    kind = kind_of(name)
    return "final norm" if kind == "norm" else kind


# Names of the parts of a block in the models of Hugging Face; the first that occurs decides.
_KINDS = (
    ("norm", ("norm", "ln_", "ln1", "ln2")),
    ("attention.qkv", ("query_key_value", "c_attn", "qkv")),
    ("attention.q", ("query", "q_proj", "q_lin", "selfattention.q.")),
    ("attention.k", ("key", "k_proj", "k_lin", "selfattention.k.")),
    ("attention.v", ("value", "v_proj", "v_lin", "selfattention.v.")),
    ("attention.o", ("o_proj", "out_proj", "out_lin", "attention.output", "attn.c_proj", "attention.dense", "selfattention.o.")),
    ("embedding", ("embed", "wte", "wpe", "shared")),
    ("mlp", ("mlp", "ffn", "intermediate", "output.dense", "fc1", "fc2", "densereludense", "fc_in", "fc_out")),
    ("head", ("head", "embed_out", "score", "classifier")),
)  # fmt: skip


def kind_of(name: str) -> str:
    """Return what part of a transformer a parameter belongs to; ``"other"`` if its name does not say.

    >>> kind_of("model.layers.0.self_attn.q_proj.weight"), kind_of("transformer.h.0.mlp.c_proj.weight")
    ('attention.q', 'mlp')
    """
    lowered = name.lower()
    for kind, marks in _KINDS:
        if any(mark in lowered for mark in marks):
            return kind
    return "other"
