"""Two sets of weights under the same names: where they come from, which of them are tied, and what tells a base from another.

Example
-------
>>> sorted(tensors_of(torch.nn.Linear(2, 1)))
['bias', 'weight']
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.files import read_json
from ntkft.models import LoadedModel
from ntkft.readout import Readout

__all__ = ["Source", "both_sides", "difference", "fingerprint", "place", "tensors_of", "untie"]

Source = Readout | LoadedModel | nn.Module | Mapping[str, Tensor] | str | Path


def both_sides(before: Source, after: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the floating-point tensors of both sides under the same names, or raise."""
    (old, ties), (new, more) = untie(tensors_of(before)), untie(tensors_of(after))
    ties = more | ties
    old, new = _tie(old, ties, "before"), _tie(new, ties, "after")
    for name in [*old, *new]:
        sides = {side: tensors.get(name) for side, tensors in (("before", old), ("after", new))}
        a, b = sides.values()
        if a is None or b is None:
            there, lacks = ("before", "after") if b is None else ("after", "before")
            found: Tensor = sides[there]  # type: ignore[assignment]
            if not found.is_floating_point():
                continue  # old checkpoints hold position ids, newer models do not
            raise InputError(
                f"{name} {tuple(found.shape)} is in `{there}` and missing in `{lacks}`: "
                "give two sets of weights of one architecture."
            )
        if a.shape != b.shape:
            raise InputError(
                f"{name} has shape {tuple(a.shape)} in `before` and {tuple(b.shape)} in `after`: "
                "give two sets of weights of one architecture."
            )
        if a.is_floating_point() != b.is_floating_point() or not (a.is_floating_point() or torch.equal(a.cpu(), b.cpu())):
            raise InputError(
                f"{name} ({a.dtype} in `before`, {b.dtype} in `after`) is no floating-point tensor and changed: "
                "only weights can be subtracted; give models with equal buffers, or leave it out of both mappings."
            )
    names = [name for name, t in old.items() if t.is_floating_point()]
    return {name: old[name] for name in names}, {name: new[name] for name in names}


def tensors_of(source: Source) -> dict[str, Tensor]:
    """Return all saved tensors of a source by name; a tied weight under each of its names."""
    if isinstance(source, Readout):
        source = source.module
    elif isinstance(source, LoadedModel):
        source = source.model
    if isinstance(source, nn.Module):
        found = dict(source.state_dict(keep_vars=True))
        if any("lora_" in name for name in found):
            raise InputError(
                "The model has LoRA layers inside: TaskVector.from_lora writes them out as differences of weights."
            )
        return found
    if isinstance(source, Mapping):
        for name, t in source.items():
            if not isinstance(t, Tensor):
                raise InputError(f"{name!r} of the mapping is {type(t).__name__} and must be a tensor: pass name -> tensor.")
        return dict(source)
    if not isinstance(source, str | Path):
        raise InputError(
            f"Weights were asked of {type(source).__name__}: give a Readout, a LoadedModel, a module, a mapping of tensors "
            "or a path."
        )
    tensors: dict[str, Tensor] = {}
    for file in _files(Path(source).expanduser()):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{str(file)!r} cannot be read as safetensors ({error}): write the weights anew.") from None
    return tensors


def _files(path: Path) -> list[Path]:
    """Return the safetensors files of a path: itself, or the shards of a folder."""
    if path.is_file():
        return [path]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / "model.safetensors.index.json").is_file():
        return [path / name for name in sorted(set(read_json(path / "model.safetensors.index.json")["weight_map"].values()))]
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{str(path)!r} is a LoRA adapter: use TaskVector.from_lora(folder, base=model).")
    raise InputError(
        f"{str(path)!r} is no safetensors file and no folder with model.safetensors: write one with save_pretrained "
        "(no pickle is read)."
    )


def place(t: Tensor) -> tuple:
    """Return where a tensor lies in memory: tied weights lie in one place, slices of one file do not."""
    if t.numel() == 0 or t.device.type == "meta":
        return (id(t),)
    return (t.device, t.data_ptr(), t.shape, t.stride())


def untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors with each tied one under its first name only, and {other name: first name}."""
    first: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name, t in tensors.items():
        kept = first.setdefault(place(t), name)
        if kept != name:
            ties[name] = kept
    return {name: t for name, t in tensors.items() if name not in ties}, ties


def _tie(tensors: dict[str, Tensor], ties: Mapping[str, str], side: str) -> dict[str, Tensor]:
    """Bring tensors whose weights are stored twice, or under the other name, to the names of the side that ties them."""
    out = dict(tensors)
    for name, kept in ties.items():
        if name not in out:
            continue
        value = out.pop(name)
        if not torch.equal(out.setdefault(kept, value), value):
            raise InputError(
                f"{name} and {kept} are one tied weight on the other side and two different tensors in `{side}`: "
                "untie the weights of both models."
            )
    return out


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes of the floating-point tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        if t.is_floating_point():
            digest.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
            # A view as bytes, because numpy has no bfloat16.
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def difference(new: Tensor, old: Tensor) -> Tensor:
    """Return new - old in float64, on the CPU."""
    return new.detach().cpu().double() - old.detach().cpu().double()
