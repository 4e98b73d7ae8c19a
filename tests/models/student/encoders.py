"""Tiny text encoders of real families with real tokenizers, as folders that AutoModel and AutoTokenizer load."""

import json
import string
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    GPT2Tokenizer,
    ModernBertConfig,
    ModernBertModel,
    MT5Config,
    MT5EncoderModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from tests.models.families.random_teacher import WORDS, clip_tokenizer, t5_tokenizer

WIDTH = 16
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART_SIZE = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
}
FAMILIES = ("bert", "distilbert", "roberta", "clip_text_model", "bart", "modernbert", "mt5", "gpt2", "qwen3")


def make_encoder_folder(folder: Path, family: str = "bert", *, seed: int = 0, weights: bool = True) -> Path:
    """Write configuration, tokenizer and random weights of a family; RoBERTa's has positions for 10 tokens."""
    tokenizer = _tokenizer(family, folder)
    model_class, config = _model(family, len(tokenizer))
    torch.manual_seed(seed)
    (model_class(config) if weights else config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(family: str, folder: Path):
    if family in ("bert", "distilbert", "modernbert"):
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *string.ascii_lowercase, *string.digits]
        tokens += [f"##{letter}" for letter in string.ascii_lowercase]
        return BertTokenizer(vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))})
    if family == "clip_text_model":
        return clip_tokenizer(folder)
    if family == "mt5":
        return t5_tokenizer(64)
    letters = ["Ġ", *string.ascii_letters, *string.digits, *string.punctuation]
    special = ["<|endoftext|>"] if family in ("gpt2", "qwen3") else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *letters, "Ġa", "re", "red"]))}
    merges = [("Ġ", "a"), ("r", "e"), ("re", "d")]
    return (GPT2Tokenizer if family in ("gpt2", "qwen3") else RobertaTokenizer)(vocab=vocabulary, merges=merges)


def _model(family: str, vocabulary: int):
    size = {**SIZE, "vocab_size": vocabulary}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    if family == "bert":
        return BertModel, BertConfig(**size, max_position_embeddings=20)
    if family == "distilbert":
        return DistilBertModel, DistilBertConfig(vocab_size=vocabulary, dim=WIDTH, n_layers=1, n_heads=2, hidden_dim=16)
    if family == "roberta":
        return RobertaModel, RobertaConfig(**size, **ends, max_position_embeddings=12)
    if family == "clip_text_model":
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        return CLIPTextModel, CLIPTextConfig(**size, **ends, max_position_embeddings=16)
    if family == "bart":
        return BartModel, BartConfig(
            vocab_size=vocabulary, d_model=WIDTH, **BART_SIZE, **ends, max_position_embeddings=20
        )
    if family == "modernbert":
        ends = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
        # One layer would be of one kind of attention, which transformers 5.6 to 5.9 refused beside rope values for two.
        return ModernBertModel, ModernBertConfig(**size | {"num_hidden_layers": 2}, **ends)
    if family == "mt5":
        size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return MT5EncoderModel, MT5Config(vocab_size=vocabulary, **size)
    if family == "qwen3":
        return Qwen3Model, Qwen3Config(
            **size, num_key_value_heads=1, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return GPT2Model, GPT2Config(
        vocab_size=vocabulary, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0
    )


def rewrite_config(folder: Path, name: str = "config.json", **changes) -> None:
    """Replace entries of a JSON file; None takes one out."""
    config = json.loads((folder / name).read_bytes()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
