r"""A language model as several numbers for a text: one for each of some words.

Where the answer is one of c + 1 words, the model's opinion is c numbers: how far each word is ahead of the last one. The
kernel of such a read-out has a (c, c) block for each pair of texts.

Example
-------
>>> readout = words_readout(load_model("smollm2"), [" sport", " business", " world"], "{text}\nTopic:")   # doctest: +SKIP
>>> empirical_ntk(readout, texts, outputs="trace").matrix.shape == (len(texts), len(texts))           # doctest: +SKIP
True
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ntkft.errors import InputError
from ntkft.models import LoadedModel
from ntkft.readout import MAX_TOKENS, Readout, _PromptModule, length_sorted_batches, prompt_readout


class OutputsReadout(Readout):
    """A read-out with c outputs: ``readout(texts)`` is (n, c)."""

    def scores(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Return f(x_i; θ) as a float64 array (n, c), without gradients, in batches of similar length."""
        token_ids = self.encode(texts)
        rows: list[np.ndarray] = []
        batches = length_sorted_batches(token_ids, batch_size)
        with torch.no_grad():
            for batch in batches:
                rows.append(self.module(**self.collate([token_ids[i] for i in batch])).double().cpu().numpy())
        return np.concatenate(rows)[np.argsort(np.concatenate(batches))]


def words_readout(
    loaded: LoadedModel, words: Sequence[str], template: str = "{text}\nOverall, it was", *, max_tokens: int = MAX_TOKENS
) -> OutputsReadout:
    """Read a causal language model as logit(word_k) - logit(last word) after a prompt, for k = 1..c.

    Parameters
    ----------
    loaded : LoadedModel
        A causal language model.
    words : list of str
        c + 1 >= 2 different words of one token each, with the leading space that the tokenizer expects.
    template : str
        The prompt; ``{text}`` is where the text goes.
    max_tokens : int
        Longer texts are cut so that the whole prompt has at most about this many tokens.

    Raises
    ------
    InputError
        If there are fewer than two words or one comes twice; otherwise as `prompt_readout`.

    Example
    -------
    >>> words_readout(load_model("smollm2"), [" good", " fair", " bad"])(["Fine."]).shape        # doctest: +SKIP
    torch.Size([1, 2])
    """
    if isinstance(words, str) or len(words) < 2 or len(set(words)) < len(words):
        raise InputError(f"words is {words!r} and must be at least two different words: one for each answer.")
    last = words[-1]
    pairs = [prompt_readout(loaded, template, word, last, max_tokens=max_tokens) for word in words[:-1]]
    modules = [pair.module for pair in pairs]
    positive = torch.tensor([module.positive for module in modules])
    # Indexed by several words at once, the difference of two logits becomes (n, c).
    module = _PromptModule(loaded.model, positive, torch.tensor([modules[0].negative]))  # type: ignore[arg-type]
    info = {"readout": "words", "template": template, "words": list(words), "max_tokens": max_tokens}
    return OutputsReadout(module, loaded, pairs[0]._encode, info)
