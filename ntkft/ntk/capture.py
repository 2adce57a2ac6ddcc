r"""What a layer saw and what came back: the factors of every per-text gradient.

A linear layer :math:`z = W a` is used at the tokens :math:`t` of text :math:`i`. Its gradient is a sum of
outer products, :math:`\nabla_W f_i = \sum_t g_{it} a_{it}^\top` with :math:`g = \partial f / \partial z`.
So is an embedding's, with a one-hot :math:`a`. One forward and one backward pass of a batch give all
:math:`a` and :math:`g` at once, because text :math:`i` influences only its own output. Nothing of the size of the
weights is ever stored. For any other layer (norms, biases) the per-text gradient is small and is
computed outright by ``vmap(vjp)`` of that layer alone.

Some models call a layer on all tokens of all texts at once, or look a table up once for the whole batch.
There the texts of a batch cannot be told apart, and `MixedBatch` says so; one text at a time, nothing is mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from ntkft.errors import InputError
from ntkft.readout import Readout


class MixedBatch(InputError):
    """A layer's call does not keep the texts of a batch apart; capture them one by one."""


@dataclass(frozen=True)
class Factor:
    """Per-text gradients of one parameter in factored form, G_i = Σ_t left_it ⊗ right_it.

    left : (b, T, p) float, or (b, T) int64 when each row is one-hot in the vocabulary.
    right : (b, T, q) float, zero where there is no token.
    """

    left: Tensor
    right: Tensor

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds indices of one-hot rows."""
        return not self.left.is_floating_point()

    def bytes(self) -> int:
        """Memory of both factors."""
        return self.left.nbytes + self.right.nbytes


@dataclass
class _Call:
    """One call of one module: its inputs, and its output, whose gradient is still to come."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass
class Wanted:
    """The trainable parameters to capture, and for each module the names of those it holds."""

    names: tuple[str, ...]
    modules: dict[nn.Module, dict[str, str]] = field(default_factory=dict)  # module -> {local: full name}


def wanted(readout: Readout, names: Iterable[str]) -> Wanted:
    """Find every module that holds one of the named parameters; a tied weight is found at each of its places."""
    every = readout.parameters()
    chosen = {id(every[name]): name for name in names}
    result = Wanted(tuple(chosen.values()))
    for module in readout.module.modules():
        local = {k: chosen[id(p)] for k, p in module._parameters.items() if p is not None and id(p) in chosen}
        if local:
            result.modules[module] = local
    return result


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Switch weight gradients off for a while: we need ∂f/∂z of the layers, never ∂f/∂W."""
    was = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in was:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in was:
            p.requires_grad_(flag)


def capture(
    readout: Readout, token_ids: Sequence[list[int]], want: Wanted
) -> tuple[Tensor, dict[str, list[Factor]]]:
    """Run one batch forward and backward; return its scores (b,) and each parameter's factors, one per call.

    Raises
    ------
    MixedBatch
        If there are several texts and a layer's call has no row for each.
    InputError
        If a layer's output is not one tensor.
    """
    b = len(token_ids)
    calls: list[_Call] = []

    def expand(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Positions are often looked up once, as (1, T), for the whole batch. Looking them up per text
        # changes no value and keeps the texts apart in the backward pass.
        if b > 1 and args and isinstance(args[0], Tensor) and args[0].ndim == 2 and args[0].shape[0] == 1:
            return (args[0].expand(b, -1), *args[1:])
        return None

    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise InputError(
                _not_covered(want.modules[module].values(), module, "its output is not one tensor")
            )
        if b > 1 and output.shape[0] != b:
            reason = f"its output has first dimension {output.shape[0]} for {b} texts"
            raise MixedBatch(_not_covered(want.modules[module].values(), module, reason))
        if not output.requires_grad:
            output.requires_grad_()
        calls.append(_Call(module, args, kwargs, output))
        return output

    with ExitStack() as stack:
        stack.enter_context(_frozen(readout.module))
        for module in want.modules:
            if _plain(module) and isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(expand).remove)
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        with torch.enable_grad():
            scores = readout.module(**readout.collate(token_ids))  # (b,)
            gradients = torch.autograd.grad(scores.sum(), [c.output for c in calls], allow_unused=True)

    factors: dict[str, list[Factor]] = {name: [] for name in want.names}
    for call, g in zip(calls, gradients, strict=True):
        if g is not None:
            for name, factor in _factors(call, g, want.modules[call.module], b):
                factors[name].append(factor)
    return scores.detach(), factors


def _factors(call: _Call, g: Tensor, local: dict[str, str], b: int) -> Iterator[tuple[str, Factor]]:
    """Yield (parameter, factor) for one call with output gradient g (b, ..., d_out); any shape if b is 1."""
    module, rest = call.module, dict(local)
    if _plain(module) and "weight" in rest:
        g3 = g.reshape(b, -1, g.shape[-1])  # (b, T, d_out)
        source = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if isinstance(module, nn.Embedding):
            ids = source.reshape(b, -1)  # (b, T)
            if module.padding_idx is not None:  # torch gives the padding row no gradient
                g3 = g3 * (ids != module.padding_idx).unsqueeze(-1)
            yield rest.pop("weight"), _drop_zero_rows(ids, g3)
        else:
            a = source.detach().reshape(b, -1, source.shape[-1])  # (b, T, d_in)
            pair = _drop_zero_rows(a, g3)
            # nn.Linear stores W as (d_out, d_in), Conv1D as (d_in, d_out).
            flipped = isinstance(module, nn.Linear)
            yield rest.pop("weight"), Factor(pair.right, pair.left) if flipped else pair
        if "bias" in rest:
            yield rest.pop("bias"), explicit_factor(g3.sum(1))
    if rest:
        for key, gradient in _vmap_vjp(call, g, tuple(rest), b).items():
            yield rest[key], explicit_factor(gradient)


def _plain(module: nn.Module) -> bool:
    """Whether a layer is one of those with outer-product gradients, and no subclass with a forward of its own."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def explicit_factor(gradient: Tensor) -> Factor:
    """Wrap per-text gradients (b, ...) as a factor with one row per text: left = 1."""
    flat = gradient.reshape(gradient.shape[0], 1, -1)  # (b, 1, P)
    return Factor(torch.ones_like(flat[:, :, :1]), flat)


def _drop_zero_rows(a: Tensor, g: Tensor) -> Factor:
    """Keep the tokens that matter: drop those whose g is zero (padding; all but the last token in a last layer)."""
    keep = (g != 0).any(-1)  # (b, T)
    longest = max(int(keep.sum(1).max()), 1)
    if longest == g.shape[1]:
        return Factor(a, g)
    index = torch.argsort(~keep, dim=1, stable=True)[:, :longest].unsqueeze(-1)  # kept tokens first, in order
    g = torch.take_along_dim(g, index, 1)
    return Factor(a.gather(1, index.squeeze(-1)) if a.ndim == 2 else torch.take_along_dim(a, index, 1), g)


def _vmap_vjp(call: _Call, g: Tensor, local: tuple[str, ...], b: int) -> dict[str, Tensor]:
    """Per-text gradients (b, ...) of a module's own small parameters, by vmap over vjp of that module alone."""
    module = call.module
    parameters = {k: module._parameters[k].detach() for k in local}  # type: ignore[union-attr]
    args = [a.detach() if isinstance(a, Tensor) else a for a in call.args]
    if b == 1:  # one text: the call as it was, whatever its shapes
        kwargs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in call.kwargs.items()}
        pull_back = vjp(lambda p: functional_call(module, p, tuple(args), kwargs), parameters)[1]
        return {k: gradient.unsqueeze(0) for k, gradient in pull_back(g.detach())[0].items()}
    if call.kwargs or any(not isinstance(a, Tensor) or a.shape[:1] != (b,) for a in args):
        raise MixedBatch(_not_covered(local, module, "its inputs are not tensors with one row per text"))

    def one_text(g_i: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        def forward(p: dict[str, Tensor]) -> Tensor:
            return functional_call(module, p, tuple(x.unsqueeze(0) for x in inputs)).squeeze(0)

        return vjp(forward, parameters)[1](g_i)[0]

    return vmap(one_text)(g.detach(), *args)


def _not_covered(names: Iterable[str], module: nn.Module, reason: str) -> str:
    return (
        f"The gradient of {', '.join(names)} cannot be split by text: {type(module).__name__} is called, and {reason}. "
        "Freeze these parameters (requires_grad_(False)) or leave them out with parameters=."
    )
