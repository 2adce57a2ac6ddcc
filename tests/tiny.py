"""Small random models of the real architectures, with a tokenizer that needs no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ntkft.models import LoadedModel

VOCABULARY = 97
TEXTS = [
    "good",
    "a bad film",
    "what a good good thing this is",
    "no",
    "the plot was thin but the cast was fine",
    "fine",
    "thin plot",
    "I would not see it again for money, honestly",
    "good",
]  # different lengths, repeated words, one duplicate


class WordTokenizer:
    """Words to ids by a fixed hash; the two things that a read-out asks of a tokenizer."""

    pad_token_id = 0

    def __call__(
        self, text: str, add_special_tokens: bool = True, truncation: bool = False, max_length: int = 512
    ) -> dict:
        ids = [1 + sum(map(ord, word)) % (VOCABULARY - 1) for word in text.split()]
        return {"input_ids": ids[:max_length]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def wrap(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> LoadedModel:
    return LoadedModel(model.eval().to(dtype), WordTokenizer(), {"name": type(model).__name__, "kind": kind})


def build(factory: type, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> LoadedModel:
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory(config, **options)
        # Initial biases are zero and norms one: move them, or mistakes there hide.
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    return wrap(model, "encoder" if factory is BertModel else "causal", dtype)


def bert(dtype: torch.dtype = torch.float64) -> LoadedModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    return build(BertModel, config, dtype, add_pooling_layer=False)


def gpt2(dtype: torch.dtype = torch.float64) -> LoadedModel:
    """Conv1D layers and tied embeddings."""
    return build(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64),
        dtype,
    )


def llama(dtype: torch.dtype = torch.float64, tied: bool = True) -> LoadedModel:
    """RMSNorm, rotary positions, grouped-query attention: SmolLM2's architecture."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return build(LlamaForCausalLM, config, dtype)
