"""The student: a small T5 encoder and the paper's projection to the teacher's text width.

Source: "Scaling Down Text Encoders of Text-to-Image Diffusion Models" (CVPR 2025), section 3.2; parameter names
as in its published checkpoint. This file only imports torch and transformers: an export includes a copy of it.
"""

import copy
import itertools
import math
import sys
import warnings
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

# The published code book of NF4 ("QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64


class StudentConfig(T5Config):
    """T5's configuration and the projection's, and of which form its matrices are.

    text_length: number of text tokens of its training.
    projection_rank: of the projection's last matrix, then a product of two; absent for a full one.
    quantization: "int8" or "nf4"; absent for floating-point weights.
    negative_token_ids: only with an embedding of a negative prompt; see put_negative.
    masks_padding: absent unless the student neither reads nor gives padding, as its teacher.
    """

    model_type = "secondcast_student"
    # Saving a student saves this file beside it.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        project_in_dim: int = 512,
        project_out_dim: int = 4096,
        projection_dropout: float = 0.1,
        text_length: int = 77,
        projection_rank: int | None = None,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Absent values stay absent from config.json.
        if projection_rank is not None:
            self.projection_rank = projection_rank
        if quantization is not None:
            self.quantization = quantization
        self.project_in_dim = project_in_dim
        self.project_out_dim = project_out_dim
        self.projection_dropout = projection_dropout
        self.text_length = text_length


class QuantizedMatrix(nn.Module):
    """A matrix [rows, columns] as integer codes, with a scale per row (int8) or per NF4_BLOCK columns of it (nf4).

    It computes in the dtype of the scales, which is the model's. Codes are int8 in both cases: T5 casts the input of a
    linear to the dtype of its weight, unless that is int8.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, rows: int, columns: int, kind: str) -> None:
        super().__init__()
        self.columns, self.kind = columns, kind
        self.quantized_weights = rows * columns
        blocks = 1 if kind == "int8" else math.ceil(columns / NF4_BLOCK)
        # nf4: two codes per byte, padded to whole blocks.
        width = columns if kind == "int8" else blocks * NF4_BLOCK // 2
        self.register_buffer("weight", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(rows, blocks))

    def values(self, rows: Any) -> torch.Tensor:
        """Rows [..., columns] by their numbers, or a slice of them."""
        codes, scale = self.weight[rows], self.scale[rows]
        if self.kind == "int8":
            return codes.to(scale.dtype) * scale
        levels = torch.tensor(NF4_LEVELS, dtype=scale.dtype, device=scale.device)
        pairs = torch.cartesian_prod(levels, levels)[codes.view(torch.uint8).int()]
        blocks = pairs.flatten(-2).unflatten(-1, (-1, NF4_BLOCK)) * scale.unsqueeze(-1)
        return blocks.flatten(-2)[..., : self.columns]


class QuantizedLinear(QuantizedMatrix):
    """A linear without bias."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """As nn.Linear."""
        return nn.functional.linear(hidden.to(self.scale.dtype), self.values(slice(None)))


class QuantizedEmbedding(QuantizedMatrix):
    """A token embedding."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As nn.Embedding; only the rows in use are computed."""
        return self.values(input_ids)


class SecondcastStudent(PreTrainedModel):
    """T5 encoder, then Linear - ReLU - Dropout - Linear (no biases). Replaces T5-XXL in a pipeline."""

    # diffusers records a component by the module of its class, and loads it from a file of that name in the
    # component's folder: only the bare name of this file is there when a whole pipeline is saved and loaded.
    __module__ = __name__.rpartition(".")[2]
    config_class = StudentConfig
    base_model_prefix = "secondcast"
    _auto_class = "AutoModel"
    negative_TD: torch.Tensor | None
    # As T5's own class: in float16 these matrices overflow. transformers 4 asks the outermost model only.
    _keep_in_fp32_modules: ClassVar[list[str]] = ["wo"]
    _no_split_modules: ClassVar[list[str]] = ["T5Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"encoder.encoder.embed_tokens.weight": "encoder.shared.weight"}

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        # T5EncoderModel changes the config it is given.
        self.encoder = T5EncoderModel(copy.deepcopy(config))
        wide, rank = config.project_out_dim, getattr(config, "projection_rank", None)
        widths = (wide, wide) if rank is None else (wide, rank, wide)
        self.final_projection = nn.Sequential(
            nn.Linear(config.project_in_dim, wide, bias=False),
            nn.ReLU(),
            nn.Dropout(config.projection_dropout),
            *(nn.Linear(*shape, bias=False) for shape in itertools.pairwise(widths)),
        )
        self._warned = False
        ids = getattr(config, "negative_token_ids", None)
        negative_TD = None if ids is None else torch.zeros(len(ids), config.project_out_dim)
        self.register_buffer("negative_TD", negative_TD)
        self.post_init()
        if kind := getattr(config, "quantization", None):
            self._quantize(kind)

    def _quantize(self, kind: str) -> None:
        """Replace all linears and the token embedding by quantized ones without values."""
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, attribute = name.rpartition(".")
                # torch below 2.5 has no set_submodule.
                linear = QuantizedLinear(module.out_features, module.in_features, kind)
                setattr(self.get_submodule(owner), attribute, linear)
        tokens = self.encoder.shared
        self.encoder.encoder.embed_tokens = QuantizedEmbedding(tokens.num_embeddings, tokens.embedding_dim, kind)
        # Its other name; transformers ties parameters only, and reads what is tied from the instance.
        self.encoder.shared, self.encoder.config.tie_word_embeddings = None, False
        self._tied_weights_keys = self.all_tied_weights_keys = {}  # type: ignore[misc, var-annotated]
        # Not the codes: a cast would widen them.
        self._keep_in_fp32_modules = ["wo.scale"]  # type: ignore[misc]

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
        return self.encoder.encoder.embed_tokens

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """last_hidden_state [B, T, project_out_dim] of token ids [B, T].

        attention_mask: [B, T], 1 for text. None, as FluxPipeline calls T5: padding is read, or config.masks_padding.
        """
        if input_ids.shape[1] != self.config.text_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"this student was trained at {self.config.text_length} text tokens, found {input_ids.shape[1]}: pass "
                f"max_sequence_length={self.config.text_length}",
                stacklevel=2,
            )
        masks = getattr(self.config, "masks_padding", False)
        if attention_mask is None and masks:
            attention_mask = (input_ids != (self.config.pad_token_id or 0)).long().flip(1).cummax(1).values.flip(1)
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embedding_BTD = self.final_projection(hidden_BTD)
        if attention_mask is not None and masks:
            embedding_BTD = embedding_BTD * attention_mask[..., None].to(embedding_BTD.dtype)
        return BaseModelOutput(last_hidden_state=self._with_negative(input_ids, embedding_BTD))

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


sys.modules[SecondcastStudent.__module__] = sys.modules[__name__]
