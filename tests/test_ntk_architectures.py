"""The kernel of other architectures than the book's, against one autograd.grad per text."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import ntkft
from ntkft.ntk.oracle import loop_ntk
from ntkft.readout import Readout
from tests import tiny
from tests.helpers import relative

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
COMMON = {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64}
END = {"bos_token_id": 1, "eos_token_id": 2}

ENCODERS = {
    "DistilBERT": lambda: (
        tf.DistilBertModel,
        tf.DistilBertConfig(dim=16, n_layers=2, n_heads=4, hidden_dim=24, **COMMON),
    ),
    "RoBERTa": lambda: (tf.RobertaModel, tf.RobertaConfig(pad_token_id=0, **BERT, **COMMON)),
    "ALBERT (layers used twice)": lambda: (
        tf.AlbertModel,
        tf.AlbertConfig(embedding_size=8, **BERT, **COMMON),
    ),
}
CAUSAL = {
    "GPT-Neo": lambda: (
        tf.GPTNeoForCausalLM,
        tf.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            intermediate_size=24, **COMMON, **END,
        ),
    ),
    "Pythia": lambda: (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**BERT, **COMMON)),
    "Qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(num_key_value_heads=2, **BERT, **COMMON)),
    "Qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(num_key_value_heads=2, head_dim=4, **BERT, **COMMON)),
}  # fmt: skip


def prompt(loaded: ntkft.LoadedModel) -> Readout:
    return ntkft.prompt_readout(loaded, template="{text} it was", positive="good", negative="bad")


def error(readout: Readout) -> float:
    exact = loop_ntk(readout, tiny.TEXTS)
    kernel = ntkft.empirical_ntk(readout, tiny.TEXTS, progress=False)
    return relative(kernel.matrix, exact)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    factory, config = ENCODERS[name]()
    options = {} if "Distil" in name else {"add_pooling_layer": False}
    loaded = tiny.build(factory, config, torch.float64, **options)
    assert error(ntkft.pooled_readout(loaded)) < 1e-9


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name):
    factory, config = CAUSAL[name]()
    assert error(prompt(tiny.build(factory, config, torch.float64))) < 1e-9  # GPT-Neo's softmax is in float32


def test_lora_adapter():
    """Only the adapter is trainable; both of its factors count."""
    model = get_peft_model(tiny.llama().model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    readout = prompt(tiny.wrap(model, "causal", torch.float64))
    assert len(readout.parameters()) == 8 and all("lora" in name for name in readout.parameters())
    assert error(readout) < 1e-9


@pytest.mark.parametrize(
    ("factory", "config"),
    [
        # Its layers flatten the batch into one row per token.
        (tf.OPTForCausalLM, tf.OPTConfig(hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2,
                                         num_attention_heads=4, ffn_dim=24, **COMMON)),
        # Its position bias is looked up once for all texts.
        (tf.T5EncoderModel, tf.T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2,
                                        num_heads=4)),
    ],
)  # fmt: skip
def test_models_that_mix_the_texts_of_a_batch(factory, config):
    loaded = tiny.build(factory, config, torch.float64)
    readout = prompt(loaded) if "Causal" in factory.__name__ else ntkft.pooled_readout(loaded)
    assert error(readout) < 1e-9
