"""FLUX's modulation vectors computed by the host, in whose memory the weights stay that make them.

For pooled vectors of CLIP, with which every prompt has modulation vectors of its own and no table can hold them.
Further letter here: M modulation values of a row, of all norms together.
"""

import threading
from collections.abc import Iterable

import torch
from diffusers import FluxTransformer2DModel
from torch.nn.functional import silu

from secondcast.models.memory.modulation_table import HandsOn, embedded_conditions, modulated_norms
from secondcast.models.memory.options import MemoryOptions


class HostModulation:
    """The modulation linears of a transformer and their input's embedding, on the host and no longer part of it."""

    def __init__(
        self,
        embed: torch.nn.Module,
        linears: Iterable[torch.nn.Linear],
        *,
        dtype: torch.dtype,
        takes_guidance: bool,
    ) -> None:
        self._embed, self._linears = embed, list(linears)
        self._dtype, self._takes_guidance = dtype, takes_guidance
        # One call has all of torch's threads and reads all the weights: a second one beside it makes both slower.
        self._alone = threading.Lock()

    @property
    def row_bytes(self) -> int:
        """Of one row of results."""
        return sum(linear.out_features for linear in self._linears) * self._dtype.itemsize

    @property
    def weights_bytes(self) -> int:
        """Of the weights, in host memory."""
        modules = (self._embed, *self._linears)
        return sum(weight.nbytes for module in modules for weight in module.parameters())

    @torch.no_grad()
    def rows(
        self, timestep_B: torch.Tensor, guidance_B: torch.Tensor | None, pooled_projections_BP: torch.Tensor
    ) -> torch.Tensor:
        """modulation_BM on the host, of the transformer's dtype: what its forward takes in place of pooled.

        Arguments as FluxBackbone.predict takes them, of any dtype and device. May be called from several threads: the
        bits depend on the number of rows and of torch's threads alone, and are those of the live weights on a CPU.
        """
        timestep_B, pooled_projections_BP = (
            tensor.to("cpu", self._dtype) for tensor in (timestep_B, pooled_projections_BP)
        )
        if guidance_B is not None:
            guidance_B = guidance_B.to("cpu", self._dtype)
        with self._alone:
            embedded_BD = embedded_conditions(
                self._embed, timestep_B, guidance_B if self._takes_guidance else None, pooled_projections_BP
            )
            activated_BD = silu(embedded_BD)
            return torch.cat([linear(activated_BD) for linear in self._linears], dim=1)


def take_to_host(transformer: FluxTransformer2DModel) -> HostModulation:
    """Take the modulation weights out of a transformer that was loaded on the host; they stay where they are.

    The transformer then takes modulation_BM where it took pooled_projections_BP.
    """
    linears: list[torch.nn.Linear] = []
    first, dtype = 0, transformer.dtype
    for norm in modulated_norms(transformer):
        linears.append(norm.linear.eval())
        norm.silu, norm.linear = torch.nn.Identity(), _Columns(first, norm.linear.out_features)
        first += linears[-1].out_features
    embed, takes_guidance = transformer.time_text_embed.eval(), bool(transformer.config.guidance_embeds)
    transformer.time_text_embed = HandsOn()
    return HostModulation(embed, linears, dtype=dtype, takes_guidance=takes_guidance)


def takes_host(options: MemoryOptions, *, pooled_varies: bool, weights_bytes: int, gpu_bytes: float | None) -> bool:
    """Whether the host computes the modulation vectors.

    pooled_varies: prompts have pooled vectors of their own. weights_bytes: of the whole transformer; gpu_bytes: memory
    of the GPU in all, None where there is none. "auto" is the host where the weights would fill more than half of the
    GPU: elsewhere nothing is gained that is worth another device's rounding. It does not depend on the options that a
    resumed run may change.
    """
    if options.modulation != "auto":
        return options.modulation == "cpu"
    if not pooled_varies or gpu_bytes is None:
        return False
    return 2 * weights_bytes > gpu_bytes


class _Columns(torch.nn.Module):
    """Stands for a linear of a norm: its part of what all of them give."""

    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.first, self.end = first, first + width

    def forward(self, modulation_BM: torch.Tensor) -> torch.Tensor:
        return modulation_BM[:, self.first : self.end]
