"""FLUX's modulation vectors computed on the host, where the modulation weights stay.

For CLIP's pooled vectors: every prompt has its own modulation vectors, which no table can hold.
Shape letter in this module: M modulation values of a row, of all norms together.
"""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import silu

from secondcast.models.families.family import Family
from secondcast.models.families.registry import family_of_transformer
from secondcast.models.memory.modulation_table import PassThrough, modulated_norms


class HostModulation:
    """The modulation linears of a transformer and the embedding of their input, moved out of it to the host."""

    def __init__(
        self,
        family: Family,
        embed: torch.nn.Module,
        linears: Iterable[torch.nn.Linear],
        *,
        dtype: torch.dtype,
        takes_guidance: bool,
    ) -> None:
        self._family, self._embed, self._linears = family, embed, list(linears)
        self._dtype, self._takes_guidance = dtype, takes_guidance
        # One call uses all of torch's threads and reads all weights: concurrent calls would slow each other down.
        self._alone = threading.Lock()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of results."""
        return sum(linear.out_features for linear in self._linears) * self._dtype.itemsize

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights in host memory."""
        modules = (self._embed, *self._linears)
        return sum(weight.nbytes for module in modules for weight in module.parameters())

    @torch.no_grad()
    def rows(
        self, timestep_B: torch.Tensor, guidance_B: torch.Tensor | None, pooled_projections_BP: torch.Tensor
    ) -> torch.Tensor:
        """modulation_BM on the host, in the transformer's dtype; its forward takes it in place of pooled.

        Arguments: as for Backbone.predict, of any dtype and device. Thread-safe. The bits only depend on the number
        of rows and of torch's threads, and equal those of the original linears on a CPU.
        """
        timestep_B, pooled_projections_BP = (
            tensor.to("cpu", self._dtype) for tensor in (timestep_B, pooled_projections_BP)
        )
        if guidance_B is not None:
            guidance_B = guidance_B.to("cpu", self._dtype)
        with self._alone:
            embedded_BD = self._family.embedded_conditions(
                self._embed, timestep_B, guidance_B if self._takes_guidance else None, pooled_projections_BP
            )
            activated_BD = silu(embedded_BD)
            return torch.cat([linear(activated_BD) for linear in self._linears], dim=1)


def take_to_host(transformer: Any) -> HostModulation:
    """Move the modulation weights out of a transformer on the host; they stay in host memory.

    The transformer then takes modulation_BM in place of pooled_projections_BP.
    """
    family, linears = family_of_transformer(transformer), list[torch.nn.Linear]()
    first, dtype = 0, transformer.dtype
    for norm in modulated_norms(transformer, family.anatomy):
        linears.append(norm.linear.eval())
        norm.silu, norm.linear = torch.nn.Identity(), _Columns(first, norm.linear.out_features)
        first += linears[-1].out_features
    embed = transformer.get_submodule(family.anatomy.conditioning).eval()
    takes_guidance = family.takes_guidance(transformer.config)
    transformer.set_submodule(family.anatomy.conditioning, PassThrough())
    return HostModulation(family, embed, linears, dtype=dtype, takes_guidance=takes_guidance)


class _Columns(torch.nn.Module):
    """Replaces a linear of a norm: returns its columns of modulation_BM."""

    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.first, self.end = first, first + width

    def forward(self, modulation_BM: torch.Tensor) -> torch.Tensor:
        return modulation_BM[:, self.first : self.end]
