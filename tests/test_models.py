"""Models: the right class, exact weights, a reproducible random twin, and no trace on torch's global generator."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from ntkft import assets
from ntkft.errors import InputError
from ntkft.models import LoadedModel, load_model

torch.set_num_threads(1)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The film was great, wasn't it?\n\nOverall, it was  good — naïve 😀 123"


def tokenizer(pad: str | None = "[PAD]", eos: str | None = "[EOS]") -> transformers.PreTrainedTokenizerFast:
    words = ["[PAD]", "[EOS]", "[UNK]", "a", "good", "bad", "film"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token=pad, eos_token=eos
    )


SMALL: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
GPT2 = transformers.GPT2Config(vocab_size=7, n_embd=8, n_layer=2, n_head=2, n_positions=32)
BERT = transformers.BertConfig(**SMALL, max_position_embeddings=24)


def folder_of(model: Any, path: Path, tok: Any = None) -> str:
    model.save_pretrained(path)
    (tok or tokenizer()).save_pretrained(path)
    return str(path)


@pytest.fixture
def gpt2_folder(tmp_path):
    torch.manual_seed(7)
    return folder_of(transformers.GPT2LMHeadModel(copy.deepcopy(GPT2)), tmp_path / "gpt2")


def same(left: Any, right: Any) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ready(loaded: LoadedModel) -> bool:
    return (
        not any(module.training for module in loaded.model.modules())
        and all(parameter.requires_grad for parameter in loaded.model.parameters())
        and loaded.model.config._attn_implementation == "eager"
        and loaded.tokenizer.pad_token_id is not None
    )


def test_minilm():
    loaded = load_model("minilm")
    assert ready(loaded) and loaded.info["kind"] == "encoder" and loaded.info["parameters"] == 22_565_376
    assert not any("pooler" in key for key, _ in loaded.model.named_parameters())
    assert loaded.info["weights_sha256"] == assets.verify("minilm")["model.safetensors"]
    texts = ["A splendid film.", "A wonderful movie.", "Prices of copper fell."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model(**batch).last_hidden_state  # (3, T, 384)
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = mean @ mean.T
    assert (
        similarity[0, 1] > 0.7 and similarity[0, 2] < 0.2
    )  # the pretrained encoder knows what the texts mean


def test_random_twin_is_reproducible_and_another_seed_is_not():
    pretrained, one, again = (
        load_model("minilm"),
        *(load_model("minilm", weights="random", seed=1) for _ in range(2)),
    )
    other = load_model("minilm", weights="random", seed=2)
    assert ready(one) and one.info["parameters"] == pretrained.info["parameters"]
    assert same(one.model, again.model) and one.info == again.info
    assert not same(one.model, other.model) and not same(one.model, pretrained.model)
    hashes = {loaded.info["weights_sha256"] for loaded in (pretrained, one, other)}
    assert len(hashes) == 3
    assert (pretrained.info["seed"], one.info["seed"], other.info["seed"]) == (None, 1, 2)
    weight = one.model.encoder.layer[0].intermediate.dense.weight
    assert abs(weight.std().item() - one.model.config.initializer_range) < 1e-3  # the architecture's own law


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_global_generator_is_untouched(weights, tmp_path):
    # A masked-language-model checkpoint has no pooler: transformers draws one when it loads the encoder.
    path = folder_of(transformers.BertForMaskedLM(copy.deepcopy(BERT)), tmp_path / "bert")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_model(path, weights=weights, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_gpt2_is_causal_and_bert_an_encoder(gpt2_folder, tmp_path):
    causal = load_model(gpt2_folder)
    assert (
        isinstance(causal.model, transformers.GPT2LMHeadModel)
        and causal.info["kind"] == "causal"
        and ready(causal)
    )
    assert same(causal.model, transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder))
    encoder = load_model(folder_of(transformers.BertForMaskedLM(copy.deepcopy(BERT)), tmp_path / "bert"))
    assert (
        isinstance(encoder.model, transformers.BertModel)
        and encoder.info["kind"] == "encoder"
        and ready(encoder)
    )
    assert encoder.model.pooler is None
    assert encoder.tokenizer.model_max_length == 24
    out = encoder.model(**encoder.tokenizer("a good film", return_tensors="pt")).last_hidden_state
    assert out.shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPT2, "causal"),
        (transformers.LlamaConfig(**SMALL), "causal"),
        (BERT, "encoder"),
        (transformers.BertConfig(**SMALL, is_decoder=True), "causal"),
        (transformers.RobertaConfig(**SMALL), "encoder"),
        (transformers.DistilBertConfig(vocab_size=7, dim=8, n_layers=1, n_heads=2, hidden_dim=16), "encoder"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_family_decides_where_the_checkpoint_does_not_say(config, kind, tmp_path):
    config = copy.deepcopy(config)
    config.architectures = None
    config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("architectures") is None
    loaded = load_model(tmp_path, weights="random")
    assert loaded.info["kind"] == kind and ready(loaded)


def test_what_the_checkpoint_says_comes_before_its_family(tmp_path):
    config = transformers.RobertaConfig(**SMALL, architectures=["RobertaForCausalLM"])
    config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, weights="random").info["kind"] == "causal"


def test_types_hold_the_same_random_draw(gpt2_folder):
    single, double = (
        load_model(gpt2_folder, weights="random", seed=4, dtype=d) for d in (torch.float32, torch.float64)
    )
    assert {p.dtype for p in double.model.parameters()} == {torch.float64} and double.info[
        "dtype"
    ] == "float64"
    assert same(single.model.double(), double.model)
    half = load_model(gpt2_folder, dtype=torch.bfloat16)
    assert half.model.lm_head.weight.dtype == torch.bfloat16 and len(half.info["weights_sha256"]) == 64


def test_smollm2_equals_its_gguf_file():
    loaded = load_model("smollm2")
    assert ready(loaded) and loaded.info["kind"] == "causal" and loaded.info["parameters"] == 134_515_008
    assert loaded.info["weights_sha256"] == assets.verify("smollm2")[GGUF]
    from gguf import GGUFReader, dequantize

    # The file's own numbers, unpacked by the gguf package and not by transformers, which made the copy.
    tensors = {tensor.name: tensor for tensor in GGUFReader(assets.fetch("smollm2") / GGUF).tensors}
    layers, state = loaded.model.model.layers, {}
    state["token_embd.weight"] = loaded.model.model.embed_tokens.weight
    state["output_norm.weight"] = loaded.model.model.norm.weight
    for i in (0, 29):
        state[f"blk.{i}.ffn_down.weight"] = layers[i].mlp.down_proj.weight
        state[f"blk.{i}.attn_v.weight"] = layers[i].self_attn.v_proj.weight
        state[f"blk.{i}.attn_norm.weight"] = layers[i].input_layernorm.weight
    for name, weight in state.items():
        expected = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        assert weight.dtype == torch.float32 and torch.equal(
            weight.detach(), expected.reshape(weight.shape)
        ), name


def test_smollm2_tokenizer_and_next_word():
    loaded = load_model("smollm2")
    tok = loaded.tokenizer
    assert tok.decode(tok(TEXT)["input_ids"]) == TEXT
    assert [len(tok(word)["input_ids"]) for word in (" great", " terrible", " good", " bad")] == [1, 1, 1, 1]
    assert tok.model_max_length == loaded.model.config.max_position_embeddings == 8192
    with (
        torch.no_grad()
    ):  # query and key weights are permuted in a GGUF file: a wrong order would not say Paris
        logits = loaded.model(**tok("The capital of France is", return_tensors="pt")).logits  # (1, T, 49152)
    assert tok.decode(logits[0, -1].argmax()) == " Paris"


def test_derivatives_of_second_order(gpt2_folder):
    loaded = load_model(gpt2_folder)
    weight = loaded.model.transformer.h[0].attn.c_attn.weight
    out = loaded.model(**loaded.tokenizer("a good film", return_tensors="pt")).logits.sum()
    (first,) = torch.autograd.grad(out, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.abs().max() > 0


def test_a_tokenizer_without_padding(tmp_path):
    model = transformers.GPT2LMHeadModel(copy.deepcopy(GPT2))
    loaded = load_model(folder_of(model, tmp_path / "end", tokenizer(pad=None)))
    assert loaded.tokenizer.pad_token == "[EOS]"
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        load_model(folder_of(model, tmp_path / "none", tokenizer(pad=None, eos=None)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    path = folder_of(transformers.LlamaModel(config), tmp_path / "no-head")
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForCausalLM \(first: lm_head.weight\)"):
        load_model(path)


def test_a_pickled_checkpoint_is_refused(gpt2_folder, tmp_path):
    model = load_model(gpt2_folder).model
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "gpt2" / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors weights"):
        load_model(gpt2_folder)


def test_an_encoder_decoder_is_refused(tmp_path):
    transformers.T5Config(vocab_size=7, d_model=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is an encoder-decoder"):
        load_model(tmp_path)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unknown_name_is_one_sentence_at_once(monkeypatch, offline):
    monkeypatch.setenv("NTKFT_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_model("ntkft-no-such-model/smolm2")
    message = str(caught.value)
    assert "'ntkft-no-such-model/smolm2'" in message and "minilm, smollm2" in message and "\n" not in message
    assert "folder" in message and ("NTKFT_OFFLINE" in message) == (offline == "1")
    assert caught.value.__cause__ is None
    assert (
        caught.value.__suppress_context__ or caught.value.__context__ is None
    )  # no chain of retries is printed
    assert time.monotonic() - start < 15
    with pytest.raises(InputError, match="did you mean 'smollm2'"):
        load_model("smolm2")


def test_wrong_weights_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="weights is 'fresh' and must be"):
        load_model("minilm", weights="fresh")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"holds no model that transformers can load .*config.json"):
        load_model(tmp_path)


def test_progress_bars_and_verbosity_are_restored(gpt2_folder):
    logging = transformers.utils.logging
    usual = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load_model(gpt2_folder)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        load_model(gpt2_folder)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(usual)
        logging.enable_progress_bar()
    assert "parameters=" in repr(load_model(gpt2_folder)) and "tensor" not in repr(load_model(gpt2_folder))
