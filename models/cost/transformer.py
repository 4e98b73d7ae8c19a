"""Costs of a teacher: parameters, FLOPs and activation bytes, from its configuration alone.

The real classes run on the meta device; no weights are read. All figures are per sample, and linear in the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from secondcast.models.geometry import Geometry, vae_scale_factor
from secondcast.models.memory.checkpointing import activation_checkpointing, recomputed_blocks
from secondcast.models.memory.meta_run import count_flops, parameter_count, peak_bytes, saved_bytes
from secondcast.models.memory.modulation_table import modulation_parameters, modulation_width
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.schema.manifest import Dtype, Manifest, Record

# A fused kernel's backward pass recomputes the scores: 5 products, compared with 2 of the forward pass.
_ATTENTION_BACKWARD = 2.5
# Counted on the meta device: 4 products.
_ATTENTION_BACKWARD_COUNTED = 2.0


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One of `count` blocks of a kind: its weights, its forward pass, and the bytes saved for its backward pass.

    modulation_parameters: part of `parameters` that a modulation table replaces.
    modulation_width: values of these modules in a row of the table.
    """

    count: int
    parameters: int
    modulation_parameters: int
    modulation_width: int
    forward_flops: float
    saved_bytes: int


@dataclass(frozen=True, kw_only=True)
class BackboneCost:
    """Costs of FLUX's transformer per sample, with frozen weights.

    modulation_parameters: parameters of the modulation linears.
    conditioning_parameters: parameters that compute their input; a modulation table replaces both.
    modulation_width: values of a row of that table.
    largest_linear: parameters of the largest linear.
    backward_flops: of the gradient of the text embedding.
    forward_peak_bytes: peak without gradients.
    saved_bytes: activations saved for the backward pass without checkpointing.
    checkpoint_bytes: activations saved per checkpointed block; outer_bytes: those outside of the blocks.
    """

    parameters: int
    modulation_parameters: int
    conditioning_parameters: int
    modulation_width: int
    largest_linear: int
    forward_flops: float
    attention_flops: float
    backward_flops: float
    forward_peak_bytes: int
    saved_bytes: int
    checkpoint_bytes: int
    outer_bytes: int
    double_blocks: BlockCost
    single_blocks: BlockCost

    @property
    def blocks(self) -> int:
        """Number of blocks, double ones first."""
        return self.double_blocks.count + self.single_blocks.count

    def kind_of(self, block: int) -> BlockCost:
        """The kind of a block by its index."""
        return self.double_blocks if block < self.double_blocks.count else self.single_blocks

    def training_flops(self, options: MemoryOptions = PLAIN) -> float:
        """FLOPs of one sample, forward and backward, including recomputed blocks."""
        again = sum(self.kind_of(block).forward_flops for block in recomputed_blocks(options, self.blocks))
        return self.forward_flops + again + self.backward_flops

    def training_bytes(self, options: MemoryOptions = PLAIN) -> int:
        """Activation bytes of one sample: all saved ones, and those of the largest recomputed block."""
        recomputed = recomputed_blocks(options, self.blocks)
        if not recomputed:
            return self.saved_bytes
        kept = self.outer_bytes + self.checkpoint_bytes * len(recomputed)
        kept += sum(self.kind_of(block).saved_bytes for block in set(range(self.blocks)) - recomputed)
        return kept + max(self.kind_of(block).saved_bytes for block in recomputed)


class CallShapes(Record):
    """The configuration of a transformer, and the shapes and the dtype of its calls."""

    config: dict[str, Any]
    image_tokens: int
    channels: int
    text_length: int
    text_width: int
    pooled_width: int
    takes_guidance: bool
    dtype: Dtype

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The calls of a (planned) cache, at its image size and text length, in its dtype."""
        sampling, teacher = manifest.sampling, manifest.teacher
        return cls(
            config=teacher.backbone_config,
            image_tokens=sampling.image_tokens,
            channels=sampling.channels,
            text_length=teacher.text_length,
            text_width=teacher.text_width,
            pooled_width=teacher.pooled_width,
            takes_guidance=sampling.guidance is not None,
            dtype=sampling.dtype,
        )


def backbone_cost(shapes: CallShapes) -> BackboneCost:
    """The costs of a transformer in calls of these shapes."""
    # Counting takes seconds, and several caches of a run may share a size.
    key = canonical_json(shapes.json_value())
    if key not in _COUNTED:
        _COUNTED[key] = _counted(shapes)
    return _COUNTED[key]


_COUNTED: dict[bytes, BackboneCost] = {}


def _counted(shapes: CallShapes) -> BackboneCost:
    config, dtype = shapes.config, DTYPES[shapes.dtype]
    depth = (int(config["num_layers"]), int(config["num_single_layers"]))
    runs = {at: _Run(shapes, _transformer(config, *at, dtype)) for at in _SMALL_DEPTHS}
    forward = {at: count_flops(run.forward) for at, run in runs.items()}
    attention_flops = _extrapolated(depth, {at: flops.attention for at, flops in forward.items()})
    forward_flops = _extrapolated(depth, {at: flops.total for at, flops in forward.items()})
    both_flops = _extrapolated(depth, {at: count_flops(run.both).total for at, run in runs.items()})
    saved = {at: saved_bytes(run.with_gradient, run.parameters) for at, run in runs.items()}
    inner = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
    checkpoint = (shapes.image_tokens + shapes.text_length) * inner * dtype.itemsize
    whole, small = _transformer(config, *depth, dtype), _transformer(config, 1, 1, dtype)
    double, single = (
        BlockCost(
            count=count,
            parameters=parameter_count(block),
            modulation_parameters=modulation_parameters(block),
            modulation_width=modulation_width(block),
            forward_flops=forward[at].total - forward[1, 1].total,
            saved_bytes=saved[at] - saved[1, 1],
        )
        for count, at, block in zip(
            depth,
            ((2, 1), (1, 2)),
            (small.transformer_blocks[0], small.single_transformer_blocks[0]),
            strict=True,
        )
    )
    return BackboneCost(
        parameters=parameter_count(whole),
        modulation_parameters=modulation_parameters(whole),
        conditioning_parameters=parameter_count(whole.time_text_embed),
        modulation_width=modulation_width(whole),
        largest_linear=max(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear)),
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        backward_flops=both_flops
        - forward_flops
        + (_ATTENTION_BACKWARD - _ATTENTION_BACKWARD_COUNTED) * attention_flops,
        forward_peak_bytes=peak_bytes(runs[1, 1].forward, runs[1, 1].parameters),
        saved_bytes=int(_extrapolated(depth, saved)),
        checkpoint_bytes=checkpoint,
        outer_bytes=runs[1, 1].checkpointed_bytes() - 2 * checkpoint,
        double_blocks=double,
        single_blocks=single,
    )


class _Run:
    """A transformer and one sample for it, as FluxBackbone calls it."""

    def __init__(self, shapes: CallShapes, model: FluxTransformer2DModel) -> None:
        self._shapes, self._model = shapes, model
        self.parameters = list(model.parameters())

    def forward(self) -> torch.Tensor:
        return self._run(gradient=False)

    def with_gradient(self) -> torch.Tensor:
        return self._run(gradient=True)

    def both(self) -> None:
        self._run(gradient=True).sum().backward()

    def checkpointed_bytes(self) -> int:
        activation_checkpointing(self._model, 1)
        kept = saved_bytes(self.with_gradient, self.parameters)
        activation_checkpointing(self._model, 0)
        return kept

    def _run(self, *, gradient: bool) -> torch.Tensor:
        shapes = self._shapes
        empty = partial(torch.empty, device="meta", dtype=DTYPES[shapes.dtype])
        velocity_BSC: torch.Tensor = self._model(
            hidden_states=empty(1, shapes.image_tokens, shapes.channels),
            timestep=empty(1),
            guidance=torch.empty(1, device="meta") if shapes.takes_guidance else None,
            pooled_projections=empty(1, shapes.pooled_width),
            encoder_hidden_states=empty(1, shapes.text_length, shapes.text_width, requires_grad=gradient),
            txt_ids=empty(shapes.text_length, 3),
            img_ids=empty(shapes.image_tokens, 3),
            return_dict=False,
        )[0]
        return velocity_BSC


def decoding_bytes(config: dict[str, Any], geometry: Geometry) -> int:
    """Bytes of activations while the VAE decodes one image in fp32, its weights left out."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config).eval().requires_grad_(False)
        scale = vae_scale_factor(config)
        latent = torch.empty(1, config["latent_channels"], geometry.height // scale, geometry.width // scale)
    weights = list(vae.parameters())
    return peak_bytes(lambda: vae.decode(latent, return_dict=False)[0], weights)


def vae_parameters(config: dict[str, Any]) -> int:
    """Parameters of the VAE, of which a build only reads the configuration."""
    with torch.device("meta"):
        return parameter_count(AutoencoderKL.from_config(config))


def clip_parameters(config: dict[str, Any]) -> int:
    """Parameters of the CLIP text encoder."""
    with torch.device("meta"):
        return parameter_count(CLIPTextModel(CLIPTextConfig.from_dict(config)))


# Blocks of a kind are equal: three small depths give the constant part and one block of each kind exactly.
_SMALL_DEPTHS = ((1, 1), (2, 1), (1, 2))


def _extrapolated(depth: tuple[int, int], values: Mapping[tuple[int, int], float]) -> float:
    base, two_double, two_single = (values[at] for at in _SMALL_DEPTHS)
    return base + (depth[0] - 1) * (two_double - base) + (depth[1] - 1) * (two_single - base)


def _transformer(config: dict[str, Any], double: int, single: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({**config, "num_layers": double, "num_single_layers": single})
    for parameter in model.parameters():
        # Not .to(), for which diffusers logs a warning.
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)
