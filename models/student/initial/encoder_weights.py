"""The tensors of a teacher's T5 encoder, read one at a time: T5-XXL is never in memory as a whole.

Suffixes: V vocabulary, N buckets of the position bias, H heads, J heads x their width, F feed-forward units.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from secondcast.models.weights.checked_loading import read_tensor
from secondcast.models.weights.files import TRANSFORMERS, CheckpointSource, tensor_files
from secondcast.storage_schemas.errors import SecondcastError


def check_gated(config: dict[str, Any], where: str, error: type[SecondcastError]) -> None:
    """Raise `error` unless a configuration is that of a T5 with gated feed-forward units (T5 v1.1)."""
    form = config.get("feed_forward_proj", "relu")
    if config.get("model_type") != "t5" or not str(form).startswith("gated-"):
        raise error(
            f"{where} is a {config.get('model_type')!r} model with feed_forward_proj = {form!r}, expected 't5' with "
            f"'gated-gelu': an initial student has the gated shape of T5 v1.1; give such an encoder, for example "
            f"google/t5-v1_1-base"
        )


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """The weights of a gated T5 encoder in fp32, with each RMSNorm's weight absorbed into the linears that read it.

    config: its config.json.
    files: the safetensors file of each tensor.
    """

    config: dict[str, Any]
    files: dict[str, Path]
    source: CheckpointSource

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any], source: CheckpointSource) -> Self:
        """Read the headers of the files of a folder; source.error for a file that is not whole, or another shape."""
        check_gated(config, source.where, source.error)
        return cls(config=config, files=tensor_files(folder, TRANSFORMERS, source), source=source)

    def embedding_VD(self) -> torch.Tensor:
        """The token embedding."""
        name = "shared.weight"
        return self._read(name if name in self.files else "encoder.embed_tokens.weight")

    def bias_NH(self) -> torch.Tensor:
        """The relative position bias, which all layers share."""
        return self._read("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")

    def attention(self, layer: int) -> dict[str, torch.Tensor]:
        """q, k, v [J, D] and o [D, J] of a layer."""
        return self._part(f"encoder.block.{layer}.layer.0", "SelfAttention", reads=("q", "k", "v"), writes="o")

    def feed_forward(self, layer: int) -> dict[str, torch.Tensor]:
        """wi_0, wi_1 [F, D] and wo [D, F] of a layer."""
        return self._part(f"encoder.block.{layer}.layer.1", "DenseReluDense", reads=("wi_0", "wi_1"), writes="wo")

    def _part(self, prefix: str, module: str, *, reads: tuple[str, ...], writes: str) -> dict[str, torch.Tensor]:
        norm_D = self._read(f"{prefix}.layer_norm.weight")
        read = {name: self._read(f"{prefix}.{module}.{name}.weight").mul_(norm_D) for name in reads}
        return read | {writes: self._read(f"{prefix}.{module}.{writes}.weight")}

    def _read(self, name: str) -> torch.Tensor:
        # A copy in any case: what is multiplied in place must not be the file's own memory.
        return read_tensor(self.files[name], name, self.source).to(torch.float32, copy=True)
