"""A student that is not T5: any text encoder of transformers, and the paper's projection to the teacher's text width.

It reads prompts with its own tokenizer, or in place of a language model with the teacher's. FluxPipeline passes no
attention mask, which such encoders need, so it is derived from the padding. This file only imports torch and
transformers: an export includes a copy of it.
"""

import itertools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel


class EncoderStudentConfig(PretrainedConfig):
    """The encoder's own configuration (a dictionary with its model_type) and the projection's.

    text_length: number of text tokens of its training.
    longest_text: maximum number of tokens; None: unlimited.
    pad_is_end: whether the tokenizer pads with its end token, the first of which is text.
    negative_token_ids: only with an embedding of a negative prompt; see put_negative.
    projection_rank: of the projection's last matrix, then a product of two; absent for a full one.
    hidden_state_layers: the layers of a language model in whose place it is, each with a projection of its own, side by
        side in an embedding: it then reads the tokens of that model. Absent in place of T5.
    """

    model_type = "secondcast_encoder_student"
    # Saving a student saves this file beside it.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        encoder_config: dict[str, Any] | None = None,
        project_in_dim: int = 768,
        project_out_dim: int = 4096,
        projection_dropout: float = 0.1,
        text_length: int = 77,
        longest_text: int | None = None,
        pad_token_id: int = 0,
        pad_is_end: bool = False,
        projection_rank: int | None = None,
        hidden_state_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if projection_rank is not None:
            self.projection_rank = projection_rank
        if hidden_state_layers is not None:
            self.hidden_state_layers = list(hidden_state_layers)
        self.encoder_config = encoder_config or {"model_type": "bert"}
        self.project_in_dim = project_in_dim
        self.project_out_dim = project_out_dim
        self.projection_dropout = projection_dropout
        self.text_length = text_length
        self.longest_text = longest_text
        self.pad_token_id = pad_token_id
        self.pad_is_end = pad_is_end


def auto_class(config: Any) -> Any:
    """The auto class of transformers for the smallest model with a configuration's text encoder."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def encoder_within(model: Any) -> Any:
    """The text encoder of a model of `auto_class`, without its decoder and pooler."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None
    return encoder


def make_encoder(encoder_config: dict[str, Any]) -> Any:
    """A text encoder with random weights, by its configuration."""
    config = AutoConfig.for_model(**encoder_config)
    # As for T5 students: attention implementations round differently, and only eager applies dropout to its weights.
    model = auto_class(config).from_config(config, attn_implementation="eager", trust_remote_code=False)
    return encoder_within(model)


def _other_names(found: dict[str, Any]) -> dict[str, str]:
    """Patterns that map names of weights in a file to those of the model; empty if that does not help.

    The names of CLIP's text models lost a level within transformers 5.
    """
    levels = ("encoder.", "encoder.text_model.")
    for key, (old, new) in (("missing_keys", levels), ("unexpected_keys", levels[::-1])):
        if found[key] and all(name.startswith(levels[1]) for name in found[key]):
            # Whole names: some versions replace every occurrence of what a pattern finds.
            return {f"^{name}$": new + name.removeprefix(old) for name in found["unexpected_keys"]}
    return {}


def _projection(config: EncoderStudentConfig, wide: int) -> nn.Sequential:
    rank = getattr(config, "projection_rank", None)
    widths = (wide, wide) if rank is None else (wide, rank, wide)
    return nn.Sequential(
        nn.Linear(config.project_in_dim, wide, bias=False),
        nn.ReLU(),
        nn.Dropout(config.projection_dropout),
        *(nn.Linear(*shape, bias=False) for shape in itertools.pairwise(widths)),
    )


class EncoderStudent(PreTrainedModel):
    """Text encoder, then Linear - ReLU - Dropout - Linear (no biases). Replaces a large text encoder in a pipeline."""

    # diffusers records a component by the module of its class, and loads it from a file of that name in the
    # component's folder: only the bare name of this file is there when a whole pipeline is saved and loaded.
    __module__ = __name__.rpartition(".")[2]
    config_class = EncoderStudentConfig
    base_model_prefix = "secondcast"
    main_input_name = "input_ids"
    _auto_class = "AutoModel"
    negative_TD: torch.Tensor | None

    def __init__(self, config: EncoderStudentConfig) -> None:
        super().__init__(config)
        self.encoder = make_encoder(config.encoder_config)
        # What the encoder's own class keeps in float32: transformers 4 asks the outermost model only.
        self._keep_in_fp32_modules = getattr(self.encoder, "_keep_in_fp32_modules", None)
        self._layers = getattr(config, "hidden_state_layers", None)
        self.final_projection = (
            _projection(config, config.project_out_dim)
            if self._layers is None
            else nn.ModuleList(_projection(config, config.project_out_dim // len(self._layers)) for _ in self._layers)
        )
        self._warned = False
        ids = getattr(config, "negative_token_ids", None)
        negative_TD = None if ids is None else torch.zeros(len(ids), config.project_out_dim)
        self.register_buffer("negative_TD", negative_TD)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """See PreTrainedModel. ValueError if weights are missing, which transformers would initialize randomly.

        With output_loading_info the caller checks them instead.
        """
        student, found = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        if found["missing_keys"] and "key_mapping" not in options and (names := _other_names(found)):
            return cls.from_pretrained(
                name, *arguments, output_loading_info=output_loading_info, key_mapping=names, **options
            )
        if output_loading_info:
            return student, found
        if wrong := [*sorted(found["missing_keys"]), *sorted(found["unexpected_keys"])]:
            raise ValueError(
                f"{name} lacks {len(found['missing_keys'])} weights of the student and has "
                f"{len(found['unexpected_keys'])} others, among them {wrong[0]}: export it again, or load it with the "
                f"transformers that config.json names"
            )
        return student

    def _init_weights(self, module: nn.Module) -> None:
        # The encoder's own parts are initialised by its class; here only the projection.
        if isinstance(module, nn.Linear) and any(module is part for part in self.final_projection.modules()):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.encoder.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """last_hidden_state [B, T, project_out_dim] of token ids [B, T], as a pipeline calls it.

        In place of a language model also its hidden_states, by the numbers of the layers that are read.

        attention_mask: default: all but the padding at the end. ValueError for more tokens than it has positions.
        """
        self._check_length(input_ids.shape[1])
        if attention_mask is None:
            attention_mask = self.mask_of(input_ids)
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self._layers is None:
            return BaseModelOutput(last_hidden_state=self._with_negative(input_ids, self.final_projection(hidden_BTD)))
        layers = {
            layer: project(hidden_BTD) for layer, project in zip(self._layers, self.final_projection, strict=True)
        }
        return BaseModelOutput(last_hidden_state=torch.cat([*layers.values()], dim=-1), hidden_states=layers)

    def put_negative(self, token_ids: list[int] | None, embedding_TD: torch.Tensor | None = None) -> None:
        """Give this embedding for the text with these token ids from now on: the teacher's, of the negative prompt.

        None: take it out.
        """
        self.negative_TD = None if token_ids is None else embedding_TD
        if token_ids is not None:
            self.config.negative_token_ids = token_ids
        elif hasattr(self.config, "negative_token_ids"):
            del self.config.negative_token_ids

    def _with_negative(self, input_ids: torch.Tensor, embedding_BTD: torch.Tensor) -> torch.Tensor:
        if self.negative_TD is None or input_ids.shape[1] != len(self.negative_TD):
            return embedding_BTD
        ids_T = torch.tensor(self.config.negative_token_ids, device=input_ids.device)
        is_negative_B11 = (input_ids == ids_T).all(1)[:, None, None]
        return torch.where(is_negative_B11, self.negative_TD.to(embedding_BTD), embedding_BTD)

    def mask_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] int64: 1 for text, 0 for the padding behind it; the first token is always text."""
        number_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        text_BT = input_ids != self.config.pad_token_id
        length_B1 = ((number_T + 1) * text_BT).amax(dim=1, keepdim=True) + int(self.config.pad_is_end)
        return (number_T < length_B1.clamp(min=1)).long()

    def _check_length(self, length: int) -> None:
        trained, longest = self.config.text_length, self.config.longest_text
        if longest is not None and length > longest:
            raise ValueError(
                f"this student has positions for {longest} text tokens, found {length}: pass "
                f"max_sequence_length={trained}"
            )
        if length != trained and not self._warned:
            self._warned = True
            warnings.warn(
                f"this student was trained at {trained} text tokens, found {length}: pass "
                f"max_sequence_length={trained}",
                stacklevel=3,
            )


sys.modules[EncoderStudent.__module__] = sys.modules[__name__]
