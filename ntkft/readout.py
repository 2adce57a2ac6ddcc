r"""A language model as one scalar function of a text, :math:`f(x; \theta)`.

Regression needs a number, a language model gives a distribution over words or a vector per token. A
*read-out* is the map from one to the other. Two of them cover the book:

* `prompt_readout`: :math:`f(x) = \mathrm{logit}(w_+) - \mathrm{logit}(w_-)` at the last token of a prompt.
  Every weight, and the read-out itself, is pretrained.
* `pooled_readout`: :math:`f(x) = d^{-1/2} \langle v, \bar h(x)\rangle`, the mean of the last hidden states
  against a Gaussian vector :math:`v`. The body is pretrained, the head is random: a mixed initialization.

Example
-------
>>> import ntkft
>>> loaded = ntkft.load_model("minilm")                       # doctest: +SKIP
>>> readout = ntkft.pooled_readout(loaded, seed=0)            # doctest: +SKIP
>>> readout.scores(["What a film!", "Not my cup of tea."])    # doctest: +SKIP
array([...])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.models import LoadedModel

MAX_TOKENS = 128


class Readout:
    """A scalar function f(x; θ) of texts, differentiable in every weight of a language model.

    Made by `prompt_readout` or `pooled_readout`, or by hand from any module that maps a padded batch
    (``input_ids`` and ``attention_mask``, both (n, T) and padded on the right) to a tensor (n,).

    Parameters
    ----------
    module : nn.Module
        Maps ``input_ids, attention_mask`` to the scores (n,). Its parameters are θ.
    loaded : LoadedModel
        The language model and its tokenizer.
    encode : callable
        One text to its token ids, a list of int.
    info : dict
        What the read-out is, for manifests (JSON-serialisable).
    """

    def __init__(
        self, module: nn.Module, loaded: LoadedModel, encode: Callable[[str], list[int]], info: dict
    ) -> None:
        self.module = module
        self.loaded = loaded
        self.info = info
        self._encode = encode
        pad = loaded.tokenizer.pad_token_id
        self._pad = 0 if pad is None else int(pad)  # any id does: padding is masked

    def __repr__(self) -> str:
        kind, model = self.info["readout"], self.loaded.info.get("name")
        return (
            f"Readout({kind} of {model}, {sum(p.numel() for p in self.parameters().values()):,} parameters)"
        )

    @property
    def model(self) -> nn.Module:
        """The language model underneath."""
        return self.loaded.model

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters θ by name; a tied weight appears once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without padding.

        Raises
        ------
        InputError
            If `texts` is a single string, is empty, or holds an empty text.
        """
        if isinstance(texts, str):
            raise InputError("texts is one string, a list of strings is needed: write [text].")
        if len(texts) == 0:
            raise InputError(
                "texts is empty, at least one text is needed: check the filter that made the list."
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {i} of {len(texts)} is {text!r}, not a text: drop it and its label.")
        return [self._encode(text) for text in texts]

    def collate(self, token_ids: Sequence[list[int]]) -> dict[str, Tensor]:
        """Pad token ids on the right into ``input_ids`` and ``attention_mask``, both (n, T)."""
        length = max(map(len, token_ids))
        ids = torch.full((len(token_ids), length), self._pad, dtype=torch.long)  # (n, T)
        mask = torch.zeros_like(ids)  # (n, T)
        for i, row in enumerate(token_ids):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = next(self.module.parameters()).device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return f(x_i; θ) as a differentiable tensor (n,)."""
        return self.module(**self.collate(self.encode(texts)))  # (n,)

    def scores(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Return f(x_i; θ) as a float64 array (n,), without gradients, in batches of similar length."""
        token_ids = self.encode(texts)
        out = np.empty(len(token_ids))
        with torch.no_grad():
            for batch in length_sorted_batches(token_ids, batch_size):
                values = self.module(**self.collate([token_ids[i] for i in batch]))
                out[batch] = values.double().cpu().numpy()
        return out


def length_sorted_batches(token_ids: Sequence[list[int]], batch_size: int) -> list[np.ndarray]:
    """Split the indices 0..n-1 into batches of texts of similar length, so that little work is padding."""
    order = np.argsort([len(row) for row in token_ids], kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class _PromptModule(nn.Module):
    """logit(positive) - logit(negative) at the last real token."""

    def __init__(self, model: nn.Module, positive: int, negative: int) -> None:
        super().__init__()
        self.model = model
        self.positive, self.negative = positive, negative
        # Asking only for the needed positions saves the (n, T, vocabulary) logits where the model can.
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        last = attention_mask.sum(1) - 1  # (n,)
        rows = torch.arange(len(last), device=last.device)
        # Padding is on the right, and a causal model never looks right: no position ids are needed.
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._can_select:
            kept, column = torch.unique(last, return_inverse=True)
            logits = self.model(**inputs, logits_to_keep=kept).logits[rows, column]  # (n, V)
        else:
            logits = self.model(**inputs).logits[rows, last]  # (n, V)
        return logits[:, self.positive] - logits[:, self.negative]  # (n,)


class _PooledModule(nn.Module):
    """⟨v, mean of the last hidden states⟩ / √d with v Gaussian."""

    def __init__(self, model: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        self.model = model
        # skip_init: the default initialisation would draw from torch's global generator.
        self.head = nn.utils.skip_init(nn.Linear, width, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        like = next(model.parameters())
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, width, generator=generator))
        self.head.to(device=like.device, dtype=like.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        body = getattr(self.model, "base_model", self.model)
        hidden = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (n, T, d)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (n, T, 1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)  # (n, d)
        return self.head(pooled).squeeze(-1) / hidden.shape[-1] ** 0.5  # (n,)


def prompt_readout(
    loaded: LoadedModel,
    template: str = "{text}\nOverall, it was",
    positive: str = " great",
    negative: str = " terrible",
    *,
    max_tokens: int = MAX_TOKENS,
) -> Readout:
    """Read a causal language model as logit(positive) - logit(negative) after a prompt.

    Parameters
    ----------
    loaded : LoadedModel
        A causal language model.
    template : str
        The prompt; ``{text}`` is where the text goes.
    positive, negative : str
        Two words of one token each, with the leading space that the tokenizer expects.
    max_tokens : int
        Longer texts are cut so that the whole prompt has at most about this many tokens.

    Raises
    ------
    InputError
        If the model is no causal language model, the template has no ``{text}``, or a word is not one token.

    Example
    -------
    >>> readout = prompt_readout(load_model("smollm2"))          # doctest: +SKIP
    >>> readout.scores(["I loved it."]) > 0                      # doctest: +SKIP
    array([ True])
    """
    tokenizer = loaded.tokenizer
    if loaded.info.get("kind") == "encoder" or loaded.model.get_output_embeddings() is None:
        raise InputError(
            f"{loaded.info.get('name')} is an encoder without next-word logits and prompt_readout needs a "
            "causal language model: use pooled_readout."
        )
    if template.count("{text}") != 1:
        raise InputError(
            f"The template {template!r} has {{text}} {template.count('{text}')} times and needs it once: "
            "put {text} where the text belongs."
        )
    if positive == negative:
        raise InputError(
            f"Both read-out words are {positive!r} and their difference is zero: choose two words."
        )
    before, after = template.split("{text}", 1)

    def word(text: str) -> int:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"{text!r} is {len(ids)} tokens of {loaded.info.get('name')} and a read-out word must be one: "
                "choose a commoner word, and mind the leading space."
            )
        return int(ids[0])

    room = max_tokens - len(tokenizer(before + after)["input_ids"])
    if room < 1:
        raise InputError(f"The template alone fills max_tokens={max_tokens}: shorten it or raise max_tokens.")

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > room:  # cut the text, never the question behind it
            text = tokenizer.decode(ids[:room])
        return tokenizer(before + text + after)["input_ids"]

    module = _PromptModule(loaded.model, word(positive), word(negative))
    info = {
        "readout": "prompt",
        "template": template,
        "positive": positive,
        "negative": negative,
        "max_tokens": max_tokens,
    }
    return Readout(module, loaded, encode, info)


def pooled_readout(loaded: LoadedModel, seed: int = 0, *, max_tokens: int = MAX_TOKENS) -> Readout:
    """Read a language model as a Gaussian linear head on its mean-pooled last hidden states.

    The head is v ~ N(0, I), scaled by 1/√d as in the NTK parametrisation, so f is of order one and the
    kernel has a limit as d grows. The head's own d parameters count as trainable.

    Parameters
    ----------
    loaded : LoadedModel
        Any language model with a ``last_hidden_state``.
    seed : int
        Seed of the head. Different seeds give different functions f0 on the same body.
    max_tokens : int
        Longer texts are cut to this many tokens.

    Example
    -------
    >>> readout = pooled_readout(load_model("minilm"), seed=0)   # doctest: +SKIP
    >>> readout(["A text.", "Another."]).shape                   # doctest: +SKIP
    torch.Size([2])
    """
    width = loaded.model.config.hidden_size
    tokenizer = loaded.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]

    module = _PooledModule(loaded.model, width, seed)
    return Readout(module, loaded, encode, {"readout": "pooled", "seed": seed, "max_tokens": max_tokens})
