"""Random networks of the architectures that score, in the layout of transformers, made on the spot."""

import json
import string
from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    RobertaTokenizer,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

SIDE = 16
_SIZE = {"height": SIDE, "width": SIDE}
_LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_LENGTH = 20


def make_clip(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    folder.mkdir(parents=True)
    _byte_pairs(folder, words)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_LENGTH)
    text = {**_LAYERS, "vocab_size": len(words), "max_position_embeddings": TEXT_LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**_LAYERS, "image_size": SIDE, "patch_size": 8}
    # Large weights: with the usual ones random embeddings hardly differ.
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
    _save(folder, CLIPModel(config), tokenizer, CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SIZE))
    return folder


def make_blip(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", "a", "red", "blue", "book", "cup"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    # Behind the vocabulary are [DEC] and [ENC], as in the published model.
    text = {**_LAYERS, "vocab_size": len(words) + 2, "bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0}
    text |= {"encoder_hidden_size": 16, "initializer_range": 0.5, "max_position_embeddings": 40}
    vision = {**_LAYERS, "image_size": SIDE, "patch_size": 8, "initializer_range": 0.5}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    _save(folder, BlipForQuestionAnswering(config), tokenizer, BlipImageProcessorPil(size=_SIZE))
    return folder


def make_trocr(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    folder.mkdir(parents=True)
    _byte_pairs(folder, words)
    tokenizer = RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    vision = ViTConfig(**_LAYERS, image_size=SIDE, patch_size=8, initializer_range=0.5)
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=80, cross_attention_hidden_size=16, init_std=0.5,
    )  # fmt: skip
    network = VisionEncoderDecoderModel(encoder=ViTModel(vision), decoder=TrOCRForCausalLM(decoder))
    for config in (network.config, network.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
    _save(folder, network, tokenizer, ViTImageProcessorPil(size=_SIZE))
    return folder


def _byte_pairs(folder: Path, words: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _save(folder: Path, *parts: object) -> None:
    for part in parts:
        part.save_pretrained(folder)
