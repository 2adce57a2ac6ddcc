"""The methods that are compared, each as one function: a read-out, token ids, options -> the kernel matrix.

Every method computes the same matrix, or says what it leaves out. None gets a worse chance than its authors' own recipe:
equal lengths and no mask where a mask would stop it, chunks where all at once would not fit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import ntkft
from ntkft.readout import Readout

Ids = list[list[int]]


class TokenReadout(Readout):
    """A read-out whose texts are lists of token ids already, written as words."""

    def __init__(self, plain: Readout) -> None:
        super().__init__(plain.module, plain.loaded, lambda text: [int(word) for word in text.split()], plain.info)


def as_texts(ids: Ids) -> list[str]:
    """Write token ids as a text that `TokenReadout` reads back."""
    return [" ".join(map(str, row)) for row in ids]


def ours(readout: Readout, ids: Ids, *, precision: str = "exact", memory: str = "2GB") -> tuple[np.ndarray, dict]:
    """`ntkft.empirical_ntk`."""
    kernel = ntkft.empirical_ntk(
        readout, as_texts(ids), precision=precision, memory=memory, progress=False  # type: ignore[arg-type]
    )
    return kernel.matrix, {"products": kernel.info["products"], "fast": kernel.info.get("fast", {})}


def _gradients(readout: Readout, one: list[int]) -> list[Tensor]:
    """Return one text's gradient of every parameter, by plain autograd."""
    parameters = list(readout.parameters().values())
    found = torch.autograd.grad(readout.module(**readout.collate([one])).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def loop(readout: Readout, ids: Ids) -> tuple[np.ndarray, dict]:
    """One ``autograd.grad`` per text, as it is usually written: a list of flat gradients, stacked, one product."""
    jacobian = torch.stack([torch.cat([g.flatten() for g in _gradients(readout, one)]) for one in ids])
    return (jacobian @ jacobian.T).double().numpy(), {}


def loop_lean(readout: Readout, ids: Ids) -> tuple[np.ndarray, dict]:
    """The same loop, written with care: every gradient goes straight to its place in one Jacobian."""
    sizes = [p.numel() for p in readout.parameters().values()]
    jacobian = torch.empty(len(ids), sum(sizes))
    for row, one in zip(jacobian, ids, strict=True):
        for piece, g in zip(row.split(sizes), _gradients(readout, one), strict=True):
            piece.copy_(g.flatten())
    return (jacobian @ jacobian.T).double().numpy(), {}


class Maskless(nn.Module):
    """The same score of texts of one length, without a mask, from input embeddings or token ids."""

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.inner = readout.module

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores (n,) of input embeddings (n, T, d) or token ids (n, T)."""
        inner = self.inner
        key = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        if readout_kind(inner) == "pooled":
            hidden = inner.model(**{key: inputs}).last_hidden_state  # (n, T, d)
            return inner.head(hidden.mean(1)).squeeze(-1) / hidden.shape[-1] ** 0.5
        logits = inner.model(**{key: inputs}, use_cache=False, logits_to_keep=1).logits[:, -1]  # (n, V)
        return logits[:, inner.positive] - logits[:, inner.negative]


def readout_kind(module: nn.Module) -> str:
    """Return "pooled" or "prompt"."""
    return "pooled" if hasattr(module, "head") else "prompt"


def torch_func(readout: Readout, ids: Ids, *, chunk: int = 16) -> tuple[np.ndarray, dict]:
    """torch.func: ``vmap(grad)`` in chunks, Jacobian held, one product; equal lengths, no mask."""
    module = Maskless(readout)
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def score(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x.unsqueeze(0),)).squeeze(0)

    per_text = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))
    inputs = torch.tensor(ids)
    rows = []
    for k in range(0, len(ids), chunk):
        gradients = per_text(parameters, inputs[k : k + chunk])
        rows.append(torch.cat([g.flatten(1) for g in gradients.values()], 1))
    jacobian = torch.cat(rows)
    return (jacobian @ jacobian.T).double().numpy(), {}


def nngeometry(readout: Readout, ids: Ids, *, chunk: int = 16) -> tuple[np.ndarray, dict]:
    """The Gram matrix of nngeometry, fed input embeddings because it cannot differentiate token ids."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    module = Maskless(readout)
    with torch.no_grad():
        embedded = readout.model.get_input_embeddings()(torch.tensor(ids))  # (n, T, d)
    layers = LayerCollection.from_model(module, ignore_unsupported_layers=True)
    data = DataLoader(TensorDataset(embedded), batch_size=chunk)
    gram = GramMatrix(module, data, function=lambda x: module(x).unsqueeze(1), layer_collection=layers)
    n = len(ids)
    return gram.to_torch().reshape(n, n).double().numpy(), {"without": "the token embeddings"}


def prototype(readout: Readout, ids: Ids) -> tuple[np.ndarray, dict]:
    """The prototype this engine began as: hooks, then each block linear's gradients in full and one product."""
    linear = {k: m for k, m in readout.module.named_modules() if isinstance(m, nn.Linear) and not _is_head(k)}
    inputs: dict[str, list[Tensor]] = {k: [] for k in linear}
    backs: dict[str, list[Tensor]] = {k: [] for k in linear}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), 16):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [m.register_forward_hook(partial(_note, seen, k)) for k, m in linear.items()]
        total = readout.module(**readout.collate([ids[i] for i in order[start : start + 16]])).sum()
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(total, [seen[k][1] for k in linear])
        for k, g in zip(linear, gradients, strict=True):
            inputs[k].append(seen[k][0])
            backs[k].append(g)
    gram = torch.zeros(len(ids), len(ids))
    for k in linear:
        pairs = zip(inputs.pop(k), backs.pop(k), strict=True)
        rows = torch.cat([torch.einsum("btp,btq->bpq", a, g).flatten(1) for a, g in pairs])  # (n, p q)
        gram += rows @ rows.T
    place = np.argsort(order)
    return gram.double().numpy()[np.ix_(place, place)], {"without": "embeddings, norms, biases"}


def _note(seen: dict[str, tuple[Tensor, Tensor]], name: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    seen[name] = args[0].detach(), out


def _is_head(name: str) -> bool:
    return "lm_head" in name or name == "head"


def passes(readout: Readout, batches: Sequence[Ids]) -> float:
    """Return the seconds of plain forward and backward passes, with weight gradients, over the same batches."""
    started = time.perf_counter()
    for batch in batches:
        readout.module(**readout.collate(batch)).sum().backward()
        readout.module.zero_grad()
    return time.perf_counter() - started
