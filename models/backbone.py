"""The frozen diffusion transformer behind one call: a latent and a text embedding in, a velocity out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import diffusers
import torch

from secondcast.models.attention import RECORDED_NATIVE, attention_kernel, recorded_attention, set_attention
from secondcast.models.device import total_bytes
from secondcast.models.families.encoders.interface import Conditioning
from secondcast.models.families.family import POOLED, Family
from secondcast.models.families.registry import anatomy_of, family_of_transformer
from secondcast.models.geometry import Geometry
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.compiling import compile_blocks
from secondcast.models.memory.conditions import Conditions
from secondcast.models.memory.host_modulation import HostModulation, take_to_host
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.modulation_table import ModulationTable, check_modulation, make_table, worthwhile
from secondcast.models.memory.options import PLAIN, MemoryOptions, takes_host
from secondcast.models.memory.quantized import check_quantizer, quantize_blocks
from secondcast.models.memory.streaming import stream_blocks
from secondcast.models.teacher.configs import family_of_folder
from secondcast.models.teacher.controlnet import Control
from secondcast.models.teacher.folder import part_source
from secondcast.models.teacher.lora import Lora
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.part_loading import load_part
from secondcast.storage_schemas.errors import SettingsError


class Backbone:
    """A frozen transformer in eval mode, for one geometry, called exactly as its family's pipeline does."""

    def __init__(
        self,
        transformer: Any,
        geometry: Geometry,
        *,
        text_length: int,
        table: ModulationTable | None = None,
        host_modulation: HostModulation | None = None,
        device: torch.device | None = None,
        family: Family | None = None,
    ) -> None:
        """family: None for the first one with this transformer."""
        self.transformer = transformer.eval().requires_grad_(False)
        self.table, self.host_modulation = table, host_modulation
        self.family = family or family_of_transformer(transformer)
        self.takes_guidance = self.family.takes_guidance(transformer.config)
        # Streamed weights are on the host. With quantized weights, transformer.dtype may be their storage dtype.
        entry = transformer.get_parameter(self.family.anatomy.text_entry)
        self.dtype, self.device = entry.dtype, device or transformer.device
        self.attention_backend: str | None = None
        self._geometry, self._text_length = geometry, text_length
        self._positions = self.family.positions(geometry, text_length, device=self.device, dtype=self.dtype)
        self._pooled_width = self.family.pooled_width(transformer.config)

    @classmethod
    def load(
        cls,
        folder: Path,
        geometry: Geometry,
        *,
        text_length: int,
        dtype: torch.dtype,
        device: torch.device,
        attention_backend: str | None = None,
        options: MemoryOptions = PLAIN,
        conditions: Conditions | None = None,
        pooled_varies: bool = False,
        blocks: int | None = None,
        lora: Lora | None = None,
    ) -> Self:
        """Load `folder`/transformer and nothing else.

        attention_backend: see models/attention.py.
        conditions: all conditions of later predict calls; None if unknown or if pooled is not zero, which excludes a
            modulation table. Weights that a table replaces are on the device one linear at a time; the host holds the
            whole transformer once.
        pooled_varies: whether each prompt has its own pooled vector, so that the host may compute the modulation
            vectors (see takes_host).
        blocks: of the transformer, only its first blocks and what precedes them, for `streams`; None: all of it.
        lora: merged into the weights, before they are quantized.
        """
        check_quantizer(options.quantize)
        family = family_of_folder(folder)
        transformer = _read(folder, family, dtype, blocks)
        if lora is not None:
            lora.merge_into(transformer)
        return cls.holding(
            transformer,
            geometry,
            family=family,
            text_length=text_length,
            device=device,
            attention_backend=attention_backend,
            options=options,
            conditions=conditions,
            pooled_varies=pooled_varies,
        )

    @classmethod
    def holding(
        cls,
        transformer: Any,
        geometry: Geometry,
        *,
        text_length: int,
        device: torch.device,
        attention_backend: str | None = None,
        options: MemoryOptions = PLAIN,
        conditions: Conditions | None = None,
        pooled_varies: bool = False,
        compiler: str = "inductor",
        family: Family | None = None,
    ) -> Self:
        """Wrap a transformer, changed in place, as `load` does after reading it.

        transformer: on the host or on `device`; the weights that the options keep on the device must fit.
        compiler: backend of torch.compile if options.compile is set.

        Raises MissingExtraError, SettingsError.
        """
        table = host_modulation = None
        check_modulation(options, anatomy_of(transformer))
        if _takes_host(transformer, options, device, pooled_varies=pooled_varies):
            host_modulation = take_to_host(transformer)
        elif _takes_table(transformer, options, conditions):
            assert conditions is not None
            table = make_table(transformer, conditions, device)
        quantize_blocks(transformer, options.quantize, device)
        if options.gpu_blocks is None:
            activation_checkpointing(transformer.to(device), options.activation_checkpointing)
        backbone = cls(
            transformer,
            geometry,
            text_length=text_length,
            table=table,
            host_modulation=host_modulation,
            device=device,
            family=family,
        )
        backbone.use_attention(attention_backend)
        if options.compile:
            # Before streaming, which wraps the forward of a block.
            compile_blocks(transformer, backend=compiler)
        if options.gpu_blocks is not None:
            again = options.activation_checkpointing > 0
            stream_blocks(transformer, device=device, resident=options.gpu_blocks, checkpoint_resident=again)
        return backbone

    def use_attention(self, backend: str | None) -> None:
        """Switch to this attention backend of diffusers; None for its default."""
        if backend != self.attention_backend:
            set_attention(self.transformer, backend)
            self.attention_backend = backend

    def at(self, geometry: Geometry) -> Self:
        """The same transformer (not a copy) for another geometry."""
        other = type(self)(
            self.transformer,
            geometry,
            text_length=self._text_length,
            table=self.table,
            host_modulation=self.host_modulation,
            device=self.device,
            family=self.family,
        )
        other.attention_backend = self.attention_backend
        return other

    @property
    def attention_kernel(self) -> str | None:
        """The kernel of torch's attention for one image and its text; None with another attention backend."""
        if recorded_attention(self.attention_backend) != RECORDED_NATIVE:
            return None
        config = self.transformer.config
        return attention_kernel(
            self.device,
            self.dtype,
            heads=config["num_attention_heads"],
            tokens=self._geometry.image_tokens + self._text_length,
            head_width=config["attention_head_dim"],
        )

    @property
    def timestep_dtype(self) -> torch.dtype:
        """The dtype in which the transformer receives timesteps."""
        return self.family.timestep_dtype(self.dtype)

    def zero_pooled(self, batch: int) -> Conditioning:
        """The conditioning of the paper's training: zeros as pooled vectors, [B, P]."""
        return {POOLED: torch.zeros(batch, self._pooled_width, device=self.device, dtype=self.dtype)}

    def predict(
        self,
        hidden_states_BSC: torch.Tensor,
        encoder_hidden_states_BTD: torch.Tensor,
        conditioning: Conditioning,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        *,
        modulation_BM: torch.Tensor | None = None,
        control: Control | None = None,
    ) -> torch.Tensor:
        """velocity_BSC, for any number of text tokens. Gradients flow to `encoder_hidden_states_BTD`.

        timestep_B: as in the schedule, of `timestep_dtype`.
        guidance_B: fp32, as in the pipeline.
        modulation_BM: result of host_modulation for these rows; None computes it now and waits for it.
        control: a ControlNet with the control images of these rows.

        Raises SettingsError for conditions that a modulation table does not contain.
        """
        transformer, positions = self.transformer, self._positions_for(encoder_hidden_states_BTD.shape[1])
        conditioning = self._in_dtype(conditioning)
        if control is not None:
            # It has modulation weights of its own: pooled vectors, not what replaces them.
            rows = (hidden_states_BSC, encoder_hidden_states_BTD, conditioning[POOLED], timestep_B, guidance_B)
            transformer = control.bound_to(transformer, *rows, positions)
        return self.family.call(
            transformer,
            hidden_states_BSC,
            encoder_hidden_states_BTD,
            self._with_modulation(timestep_B, guidance_B, conditioning, modulation_BM),
            timestep_B,
            guidance_B if self.takes_guidance else None,
            positions,
        )

    @property
    def predicts(self) -> bool:
        """Whether the whole transformer is loaded; else `streams` alone can be called."""
        return all(hasattr(self.transformer, name) for name in self.family.anatomy.head)

    def streams(
        self,
        blocks: int,
        hidden_states_BSC: torch.Tensor,
        encoder_hidden_states_BTD: torch.Tensor,
        conditioning: Conditioning,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        *,
        modulation_BM: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states_BSI and encoder_hidden_states_BTI after the first `blocks` blocks; see `predict`."""
        conditioning = self._with_modulation(timestep_B, guidance_B, self._in_dtype(conditioning), modulation_BM)
        return self.family.streams(
            self.transformer,
            blocks,
            hidden_states_BSC,
            encoder_hidden_states_BTD,
            conditioning,
            timestep_B,
            guidance_B if self.takes_guidance else None,
            self._positions_for(encoder_hidden_states_BTD.shape[1]),
        )

    def _in_place_of_pooled(
        self,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        pooled_projections_BP: torch.Tensor,
        modulation_BM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the transformer takes as pooled: with modulation weights replaced, their results or a selection."""
        if self.host_modulation is not None:
            if modulation_BM is None:
                modulation_BM = self.host_modulation.rows(timestep_B, guidance_B, pooled_projections_BP)
            return modulation_BM.to(self.device)
        if self.table is not None:
            return self.table.select(timestep_B, guidance_B, pooled_projections_BP)
        return pooled_projections_BP

    def _with_modulation(
        self,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        conditioning: Conditioning,
        modulation_BM: torch.Tensor | None,
    ) -> Conditioning:
        """Conditioning with, in place of pooled, what a table or the host has computed."""
        if self.modulation is None:
            return conditioning
        taken = self._in_place_of_pooled(timestep_B, guidance_B, conditioning[POOLED], modulation_BM)
        return {**conditioning, POOLED: taken}

    def _in_dtype(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning in the transformer's dtype."""
        return {name: rows.to(self.dtype) if rows.is_floating_point() else rows for name, rows in conditioning.items()}

    @contextmanager
    def called_by_a_pipeline(self) -> Iterator[None]:
        """A context in which the transformer itself takes pooled vectors, as unmodified pipelines call it."""

        def replace(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            taken = self._in_place_of_pooled(named["timestep"], named.get("guidance"), named[POOLED])
            return arguments, named | {POOLED: taken}

        if self.modulation is None:
            yield
            return
        hook = self.transformer.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @property
    def modulation(self) -> str | None:
        """What replaces the modulation weights: "precomputed", "cpu", or None."""
        if self.table is not None:
            return "precomputed"
        return "cpu" if self.host_modulation is not None else None

    def _positions_for(self, text_length: int) -> dict[str, torch.Tensor]:
        if text_length != self._text_length:
            self._text_length = text_length
            self._positions = self.family.positions(self._geometry, text_length, device=self.device, dtype=self.dtype)
        return self._positions


def _read(folder: Path, family: Family, dtype: torch.dtype, blocks: int | None) -> Any:
    """Load on the host, where the weights are memory-mapped from their files until they are changed."""
    part = folder / family.parts["transformer"].folder
    kind, source, anatomy = getattr(diffusers, family.transformer), part_source(part), family.anatomy
    if blocks is None:
        return load_checked(kind, part, source, dtype=dtype)
    counts, surplus = anatomy.first_blocks(kind.load_config(part), blocks)
    return load_part(kind, part, source, dtype=dtype, config=counts, without=surplus)


def _takes_table(transformer: Any, options: MemoryOptions, conditions: Conditions | None) -> bool:
    if options.modulation == "gpu" or not anatomy_of(transformer).modulation:
        return False
    if conditions is not None:
        return options.modulation == "precomputed" or worthwhile(transformer, conditions)
    if options.modulation == "precomputed":
        raise SettingsError(
            "--modulation is precomputed, but the cache has CLIP's pooled vectors, so every prompt has its own "
            "modulation vectors: give --modulation cpu, which computes them a batch ahead, or auto, or a cache built "
            "with --pooled zero"
        )
    return False


def _takes_host(transformer: Any, options: MemoryOptions, device: torch.device, *, pooled_varies: bool) -> bool:
    whole_bytes = parameter_count(transformer) * transformer.dtype.itemsize
    pooled_varies = pooled_varies and bool(anatomy_of(transformer).modulation)
    return takes_host(options, pooled_varies=pooled_varies, weights_bytes=whole_bytes, gpu_bytes=total_bytes(device))
