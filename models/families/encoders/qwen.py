"""Qwen3 as a large text encoder: a language model with its chat template, of which inner layers are read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from secondcast.models.families.encoders.interface import TextTokenizer, text_mask
from secondcast.models.weights.checked_loading import check_weights, note_cast
from secondcast.models.weights.files import TRANSFORMERS, CheckpointSource
from secondcast.models.weights.part_loading import fill
from secondcast.storage_schemas.errors import TeacherError, reason

# Of the language model within Qwen3ForCausalLM.
_PREFIX = "model."
_LAYER = re.compile(r"layers\.(\d+)\.")


class QwenTokens(TextTokenizer):
    """Qwen's tokenizer with a text as the message of a user; only the class named here is ever constructed.

    Source: Flux2KleinPipeline._get_qwen3_prompt_embeds of diffusers.
    """

    def __init__(self, folder: Path) -> None:
        """TeacherError for damaged files, or without what the pipeline needs of them."""
        try:
            self._tokenizer: Any = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
            if self._tokenizer.chat_template:
                self.token_ids([""])
        # The tokenizers package raises bare Exception for an invalid file, and a template may raise anything.
        except Exception as error:
            raise TeacherError(f"{folder} cannot be loaded ({reason(error)}): download it again") from error
        if not self._tokenizer.chat_template:
            raise TeacherError(f"{folder} has no chat template, with which every prompt begins: download it again")
        if self._tokenizer.pad_token_id is None:
            raise TeacherError(f"{folder}/tokenizer_config.json has no pad_token: download it again")
        if (side := self._tokenizer.padding_side) != "right":
            raise TeacherError(
                f"{folder}/tokenizer_config.json has padding_side = {side!r}, expected 'right': caches are padded on "
                f"the right; download it again"
            )
        self.pad_token_id = int(self._tokenizer.pad_token_id)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See TextTokenizer; the tokens of the template are included."""
        messages = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for text in texts
        ]
        ids: list[list[int]] = self._tokenizer(messages, padding=False, truncation=False, verbose=False).input_ids
        return ids

    def cut(self, ids: Sequence[int], text_length: int) -> tuple[int, ...]:
        """See TextTokenizer; the end of the template is lost with that of the text."""
        return tuple(ids[:text_length])


def make_qwen(config: Mapping[str, Any], layers: Sequence[int]) -> Qwen3Model:
    """The part of a language model up to the deepest of these layers, with random weights, on torch's current device.

    Without the norm behind the last layer of the whole, the cut one gives the same bits.
    """
    whole = Qwen3Config.from_dict(dict(config))
    # layer_types has an entry for each layer.
    cut = {"num_hidden_layers": max(layers), "layer_types": whole.layer_types[: max(layers)]}
    model = Qwen3Model(Qwen3Config.from_dict({**config, **cut}))
    model.norm = torch.nn.Identity()
    return model


def load_qwen(folder: Path, source: CheckpointSource, layers: Sequence[int], dtype: torch.dtype) -> Qwen3Model:
    """That part of the language model in a folder, on the host; the weights of the other layers are not read."""
    stored = check_weights(Qwen3ForCausalLM, folder, source)
    # Positions are computed, not read.
    with init_empty_weights(include_buffers=False):
        model = make_qwen(Qwen3Config.from_pretrained(folder).to_dict(), layers)
    # Saved alone, the language model has no prefix.
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in stored.tensors) else ""
    fill(model, folder, TRANSFORMERS, source, dtype=dtype, prefix=prefix)
    note_cast(model, stored, dtype)
    return model


def loaded_name(stored: str, layers: Sequence[int]) -> str | None:
    """The name in a cut model of a tensor of the whole one's files; None for one of what is cut off."""
    name = stored.removeprefix(_PREFIX)
    layer = _LAYER.match(name)
    cut = name in ("lm_head.weight", "norm.weight") or (layer is not None and int(layer[1]) >= max(layers))
    return None if cut else name


@torch.no_grad()
def encode_with_qwen(
    model: Qwen3Model, token_ids_BT: torch.Tensor, layers: Sequence[int], pad_token_id: int
) -> torch.Tensor:
    """encoder_hidden_states_BTD: the hidden states behind these layers, side by side.

    The language model does not read padding, but gives rows for it, which the transformer reads.
    """
    mask_BT = text_mask(token_ids_BT, pad_token_id)
    found = model(input_ids=token_ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False)
    return torch.cat([found.hidden_states[layer] for layer in layers], dim=-1)
