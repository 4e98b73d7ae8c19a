"""The student: a small T5 encoder and the paper's projection to the teacher's text width.

Source: "Scaling Down Text Encoders of Text-to-Image Diffusion Models" (CVPR 2025), section 3.2; parameter names
as in its published checkpoint. This file only imports torch and transformers: an export includes a copy of it.
"""

import copy
import sys
import warnings
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel


class StudentConfig(T5Config):
    """T5's configuration and the projection's; `text_length` is the number of text tokens of its training."""

    model_type = "secondcast_student"
    # Saving a student saves this file beside it.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        project_in_dim: int = 512,
        project_out_dim: int = 4096,
        projection_dropout: float = 0.1,
        text_length: int = 77,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.project_in_dim = project_in_dim
        self.project_out_dim = project_out_dim
        self.projection_dropout = projection_dropout
        self.text_length = text_length


class SecondcastStudent(PreTrainedModel):
    """T5 encoder, then Linear - ReLU - Dropout - Linear (no biases). Replaces T5-XXL as text_encoder_2."""

    # diffusers records a component by the module of its class, and loads it from a file of that name in the
    # component's folder: only the bare name of this file is there when a whole pipeline is saved and loaded.
    __module__ = __name__.rpartition(".")[2]
    config_class = StudentConfig
    base_model_prefix = "secondcast"
    _auto_class = "AutoModel"
    # As T5's own class: in float16 these matrices overflow. transformers 4 asks the outermost model only.
    _keep_in_fp32_modules: ClassVar[list[str]] = ["wo"]
    _no_split_modules: ClassVar[list[str]] = ["T5Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"encoder.encoder.embed_tokens.weight": "encoder.shared.weight"}

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        # T5EncoderModel changes the config it is given.
        self.encoder = T5EncoderModel(copy.deepcopy(config))
        self.final_projection = nn.Sequential(
            nn.Linear(config.project_in_dim, config.project_out_dim, bias=False),
            nn.ReLU(),
            nn.Dropout(config.projection_dropout),
            nn.Linear(config.project_out_dim, config.project_out_dim, bias=False),
        )
        self._warned = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """See PreTrainedModel. ValueError if weights are missing, which transformers would initialize randomly.

        With output_loading_info the caller checks them instead.
        """
        student, found = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        if output_loading_info:
            return student, found
        if wrong := [*sorted(found["missing_keys"]), *sorted(found["unexpected_keys"])]:
            raise ValueError(
                f"{name} lacks {len(found['missing_keys'])} weights of the student and has "
                f"{len(found['unexpected_keys'])} others, among them {wrong[0]}: export it again"
            )
        return student

    def _init_weights(self, module: nn.Module) -> None:
        # T5's own parts are initialised by T5EncoderModel; here only the projection.
        if isinstance(module, nn.Linear) and any(module is part for part in self.final_projection):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.encoder.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """last_hidden_state [B, T, project_out_dim] of token ids [B, T]; no mask, as FluxPipeline calls T5."""
        if input_ids.shape[1] != self.config.text_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"this student was trained at {self.config.text_length} text tokens, found {input_ids.shape[1]}: pass "
                f"max_sequence_length={self.config.text_length}",
                stacklevel=2,
            )
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.final_projection(hidden_BTD))


sys.modules[SecondcastStudent.__module__] = sys.modules[__name__]
