r"""What a layer saw and what came back: the factors of every per-text gradient.

A linear layer :math:`z = W a` is used at the tokens :math:`t` of text :math:`i`. Its gradient is a sum of
outer products, :math:`\nabla_W f_i = \sum_t a_{it} \otimes g_{it}` with :math:`g = \partial f / \partial z`.
So is an embedding's, with a one-hot :math:`a`. One forward and one backward pass of a batch give all
:math:`a` and :math:`g` at once, because text :math:`i` influences only its own output. Nothing of the size of the
weights is ever stored. For any other layer (norms, biases) the per-text gradient is small and is
computed outright by ``vmap(vjp)`` of that layer alone.

Some models call a layer on all tokens of all texts at once, or look a table up once for the whole batch.
There the texts of a batch cannot be told apart, and `MixedBatch` says so; one text at a time, nothing is mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from ntkft.errors import InputError
from ntkft.ntk.factors import Factor, Outer, Rows, Vector, table_rows
from ntkft.readout import Readout

TABLE = 8192  # an output layer this wide is looked at: if few of its words are read, its gradient is row-sparse


class MixedBatch(InputError):
    """A layer's call does not keep the texts of a batch apart; capture them one by one."""


@dataclass
class Wanted:
    """The trainable parameters to capture, and for each module the names of those it holds."""

    names: tuple[str, ...]
    modules: dict[nn.Module, dict[str, str]] = field(default_factory=dict)  # module -> {local: full name}


@dataclass
class _Call:
    """One call of one module: its inputs, and its output, whose gradient is still to come."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Use:
    """One use of one parameter: the factor, and which tensor the layer saw (layers that share it can share work)."""

    factor: Factor
    source: int = 0


@dataclass
class Captured:
    """One batch: scores (b, c), and for each of the c outputs the uses of each parameter."""

    scores: Tensor
    uses: list[dict[str, list[Use]]]


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
def only_trainable(module: nn.Module, names: Iterable[str] = ()) -> Iterator[None]:
    """Let only the named parameters ask for gradients for a while; by default none does."""
    keep = set(names)
    was = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for name, p in module.named_parameters():
            p.requires_grad_(name in keep)
        yield
    finally:
        for p, flag in was:
            p.requires_grad_(flag)


def capture(
    readout: Readout,
    token_ids: Sequence[list[int]],
    want: Wanted,
    saving: Callable[[Tensor], Tensor] | None = None,
) -> Captured:
    """Run one batch forward and backward; return its scores (b, c) and each parameter's factors, one per use.

    `saving`, if given, is shown every tensor that the forward pass saves for the backward pass.

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
        stack.enter_context(only_trainable(readout.module))
        for module in want.modules:
            if _plain(module) and isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(expand).remove)
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        saved = saved_tensors_hooks(saving, lambda t: t) if saving else nullcontext()
        with torch.enable_grad(), saved:
            out = readout.module(**readout.collate(token_ids))  # (b,) or (b, c)
            if out.ndim not in (1, 2) or out.shape[0] != b:
                raise InputError(
                    f"The read-out gives shape {tuple(out.shape)} for {b} texts: it must be ({b},) or ({b}, c)."
                )
            scores = out.reshape(b, -1)
            totals = scores.sum(0)  # (c,): text i influences its own score only
    outputs, c = [call.output for call in calls], scores.shape[1]
    uses = []
    for k in range(c):
        gradients = torch.autograd.grad(totals[k], outputs, retain_graph=k + 1 < c, allow_unused=True)
        uses.append(_uses(calls, gradients, want, b))
        del gradients
    return Captured(scores.detach(), uses)


def _uses(
    calls: list[_Call], gradients: Sequence[Tensor | None], want: Wanted, b: int
) -> dict[str, list[Use]]:
    """Turn the calls and their output gradients into factors, by parameter."""
    uses: dict[str, list[Use]] = {name: [] for name in want.names}
    with torch.no_grad():
        for call, g in zip(calls, gradients, strict=True):
            if g is not None:
                for name, use in _factors(call, g, want.modules[call.module], b):
                    uses[name].append(use)
    return uses


def _factors(call: _Call, g: Tensor, local: dict[str, str], b: int) -> Iterator[tuple[str, Use]]:
    """Yield (parameter, use) for one call with output gradient g (b, ..., d_out); any shape if b is 1."""
    module, rest = call.module, dict(local)
    if _plain(module) and "weight" in rest:
        g3 = g.reshape(b, -1, g.shape[-1])  # (b, T, d_out)
        source = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if isinstance(module, nn.Embedding):
            ids = source.reshape(b, -1)  # (b, T)
            if module.padding_idx is not None:  # torch gives the padding row no gradient
                g3 = g3 * (ids != module.padding_idx).unsqueeze(-1)
            yield rest.pop("weight"), Use(table_rows(ids, g3))
        else:
            a = source.detach().reshape(b, -1, source.shape[-1])  # (b, T, d_in)
            sparse = _few_words(a, g3) if isinstance(module, nn.Linear) else None
            yield rest.pop("weight"), Use(sparse) if sparse else Use(Outer(a, g3), id(source))
        if "bias" in rest:
            yield rest.pop("bias"), Use(Vector(g3.sum(1)))
    if rest:
        for key, gradient in _vmap_vjp(call, g, tuple(rest), b).items():
            yield rest[key], Use(Vector(gradient.reshape(b, -1)))


def _few_words(a: Tensor, g: Tensor) -> Rows | None:
    """Return the row-sparse gradient of a wide output layer of which at most 16 words are read, else None."""
    if g.shape[-1] < TABLE:
        return None
    words = (g != 0).flatten(0, 1).any(0).nonzero().squeeze(1)  # (W,)
    if len(words) > 16:
        return None
    b, width = g.shape[0], len(words)
    value = g[:, :, words].mT @ a  # (b, W, d)
    text = torch.arange(b, device=g.device).repeat_interleave(width)
    return Rows(text, words.repeat(b), value.flatten(0, 1), b)


def _plain(module: nn.Module) -> bool:
    """Whether a layer is one of those with outer-product gradients, and no subclass with a forward of its own."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


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
