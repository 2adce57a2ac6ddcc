r"""A LoRA adapter written out as what it adds to each weight, :math:`\Delta W = s\,BA`.

Source: Hu et al. 2022 (arXiv:2106.09685). `ntkft.TaskVector.from_lora` is the way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.models import LoadedModel
from ntkft.weights import difference, fingerprint, tensors_of, untie

__all__ = ["lora_changes"]

# Starts that leave the base weights as they are; PiSSA, OLoRA and the like move a part of W into the factors.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def lora_changes(
    adapter: nn.Module | str | Path, base: LoadedModel | nn.Module | None, name: str | None
) -> tuple[dict[str, Tensor], str]:
    """Return what an adapter adds to each weight, and the fingerprint of its base."""
    model, config, name = _adapted(adapter, base, name)
    inside = _without_adapters(model)
    start, ties = untie(inside if base is None else tensors_of(base))
    found = dict(_changes(model, name, start))
    if config.bias != "none":
        if base is None:
            raise InputError(
                f"The adapter was trained with bias={config.bias!r} and the old biases are gone: "
                "pass base=, the model without it."
            )
        for key, value in inside.items():
            if key.endswith("bias") and key in start and not torch.equal(value, start[key]):
                found[key] = found.get(key, 0) + difference(value, start[key])
    shared = ties.keys() | set(ties.values())
    for key, delta in found.items():
        if key in shared:
            raise _refusal(f"changes {key} in one place, and that weight is tied with another place")
        if key not in start or start[key].shape != delta.shape:
            there = tuple(start[key].shape) if key in start else "no such tensor"
            raise InputError(
                f"The adapter changes {key} {tuple(delta.shape)} and the base has {there}: give the adapter's own base."
            )
    if not found:
        raise InputError(f"The adapter {name!r} changes no weight of the model: check its name and its target modules.")
    return {key: found[key] for key in start if key in found}, fingerprint(start)


def _refusal(what: str) -> InputError:
    return InputError(
        f"The adapter {what}: from_lora writes out plain LoRA; take TaskVector(base, merged), "
        "with merged = adapter.merge_and_unload()."
    )


def _adapted(
    adapter: nn.Module | str | Path, base: LoadedModel | nn.Module | None, name: str | None
) -> tuple[nn.Module, Any, str]:
    """Return the model with the LoRA layers inside, the adapter's configuration and its name."""
    try:
        import peft
    except ImportError:
        raise InputError("LoRA adapters need the package peft, which is not installed: pip install peft.") from None
    if isinstance(adapter, str | Path):
        return _from_folder(Path(adapter).expanduser(), base)
    if not isinstance(adapter, nn.Module):
        raise InputError(
            f"The adapter is {type(adapter).__name__} and must be a PeftModel, a module with LoRA layers or a folder."
        )
    model: Any = adapter.get_base_model() if isinstance(adapter, peft.PeftModel) else adapter
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    configs = getattr(model, "peft_config", None)
    if not layers or not configs:
        raise InputError(
            f"{type(model).__name__} has no LoRA layers: for a model trained as a whole take TaskVector(before, after)."
        )
    active = layers[0].active_adapters if name is None else [name]
    if len(active) != 1 or active[0] not in configs:
        raise InputError(
            f"The adapters {active} were asked for and the model has {list(configs)}: name one of these with adapter_name=."
        )
    if any(layer.merged for layer in layers):
        raise InputError("The adapter is merged into the weights: call unmerge_adapter first, so that the base is there.")
    return model, _checked(configs[active[0]]), active[0]


def _from_folder(folder: Path, base: LoadedModel | nn.Module | None) -> tuple[nn.Module, Any, str]:
    """Load an adapter onto a copy of the base that shares its weights."""
    import peft

    module = base.model if isinstance(base, LoadedModel) else base
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{str(folder)!r} is a folder and base is {base!r}: pass base=, the model that the adapter was trained on."
        )
    if not (folder / "adapter_config.json").is_file():  # peft would look for it on the network
        raise InputError(f"{str(folder)!r} has no adapter_config.json: give a folder that PeftModel.save_pretrained wrote.")
    try:
        config = _checked(peft.PeftConfig.from_pretrained(str(folder)))
        # peft puts its layers into the model that it is given, and freezes its weights: the user's stays out of it. With
        # low_cpu_mem_usage, trained tensors replace the old ones and nothing is written into the shared memory.
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        with torch.random.fork_rng(devices=[]):  # new layers draw from torch's global generator
            wrapped = peft.PeftModel(deepcopy(module, shared), config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
        weights = peft.utils.load_peft_weights(str(folder), device="cpu")
        report: Any = peft.utils.set_peft_model_state_dict(wrapped, weights, low_cpu_mem_usage=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{str(folder)!r} is no LoRA adapter of {type(module).__name__} ({str(error).strip().splitlines()[0]}): "
            "give a folder that PeftModel.save_pretrained wrote, and its own base."
        ) from None
    absent = [key for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    if absent:
        first = absent[0].removeprefix("base_model.model.")
        raise InputError(f"{str(folder)!r} has no {first}, which {type(module).__name__} needs: give the adapter's own base.")
    return wrapped.get_base_model(), config, "default"


def _checked(config: Any) -> Any:
    if config.peft_type != "LORA":
        raise _refusal(f"is of type {config.peft_type.value}")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise _refusal(f"was started with {config.init_lora_weights!r}, which may change the base weights")
    return config


def _without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model under the adapter, by the names that they had before it came."""
    found = {}
    for key, t in model.state_dict(keep_vars=True).items():
        if "lora_" not in key and "modules_to_save." not in key:
            found[key.replace(".base_layer.", ".").replace("original_module.", "")] = t
    return found


def _changes(model: nn.Module, name: str, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what the adapter adds to each tensor of the base, in float64."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if name not in module.modules_to_save:
                continue
            for part, value in module.modules_to_save[name].state_dict().items():
                key = f"{path}.{part}"
                if key not in start or start[key].shape != value.shape:
                    raise InputError(
                        f"The adapter has its own {key}, which the base lacks or has in another shape: give its own base."
                    )
                if value.is_floating_point():
                    yield key, difference(value, start[key])
        elif isinstance(module, AuxiliaryTrainingWrapper) or (
            isinstance(module, BaseTunerLayer) and type(module) not in (lora.Linear, lora.Embedding)
        ):
            raise _refusal(f"has a {type(module).__name__} at {path}")
        elif isinstance(module, lora.Linear | lora.Embedding):
            if name not in module.scaling:
                continue
            if name in module.lora_variant:
                raise _refusal(f"is a {type(module.lora_variant[name]).__name__}, whose change of weights is not s·BA")
            embedding = isinstance(module, lora.Embedding)
            a: Any = module.lora_embedding_A[name] if embedding else module.lora_A[name].weight
            b: Any = module.lora_embedding_B[name] if embedding else module.lora_B[name].weight
            # peft's get_delta_weight rounds to the adapter's own type, which may have 16 bits.
            delta = (b.detach().cpu().double() @ a.detach().cpu().double()) * module.scaling[name]
            yield f"{path}.weight", delta.T if embedding or module.fan_in_fan_out else delta
            if module.lora_bias.get(name):
                if f"{path}.bias" not in start:
                    raise _refusal(f"has a bias at {path}, where the base has none")
                bias: Any = module.lora_B[name].bias
                yield f"{path}.bias", bias.detach().cpu().double() * module.scaling[name]
