"""A tiny BERT with a word tokenizer of its own, made from the pocket's words: the folder of a student."""

import re
import string
from pathlib import Path

from transformers import BertConfig, BertTokenizer

from secondcast.pocket.lexicon import PHRASES, PREFIXES, SUFFIXES, WORDS
from secondcast.pocket.training.networks import TEXT_LENGTH

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Letters of a sign are pieces of a word, some punctuation stands between words.
POSITIONS = 2 * TEXT_LENGTH


def write_bert(folder: Path) -> None:
    """config.json without weights and the tokenizer: about as many parameters as pocket-small."""
    texts = (*PREFIXES, *SUFFIXES, *(text for texts in PHRASES.values() for text in texts))
    words = [word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", text))]
    words += [word for phrases in WORDS.values() for phrase in phrases for word in phrase.split()]
    letters = string.ascii_letters
    tokens = dict.fromkeys((*SPECIAL, *words, *letters, *(f"##{one}" for one in letters), *string.punctuation))
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, do_lower_case=False)
    tokenizer.save_pretrained(folder)
    BertConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
    ).save_pretrained(folder)
