"""Costs of a teacher: parameters, FLOPs and activation bytes, from its configuration alone.

The real classes run on the meta device; no weights are read. All figures are per sample, and linear in the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import diffusers
import torch
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel

from secondcast.models.families.family import BlockList, Family
from secondcast.models.families.registry import family_named
from secondcast.models.geometry import Geometry
from secondcast.models.memory.checkpointing import activation_checkpointing, recomputed_blocks
from secondcast.models.memory.meta_run import count_flops, moved_bytes, parameter_count, peak_bytes, saved_bytes
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

    recomputed_bytes: peak of a block whose forward pass is repeated before its backward pass, without its inputs.
    modulation_parameters: part of `parameters` that a modulation table replaces.
    modulation_width: values of these modules in a row of the table.
    """

    count: int
    parameters: int
    modulation_parameters: int
    modulation_width: int
    forward_flops: float
    saved_bytes: int
    recomputed_bytes: int


@dataclass(frozen=True, kw_only=True)
class BackboneCost:
    """Costs of a transformer per sample, with frozen weights.

    modulation_parameters: parameters of the modulation linears.
    conditioning_parameters: parameters that compute their input; a modulation table replaces both.
    modulation_width: values of a row of that table.
    largest_linear: parameters of the largest linear.
    backward_flops: of the gradient of the text embedding.
    moved_bytes: bytes that the kernels without matrix products of a forward pass read and write.
    forward_peak_bytes: peak without gradients.
    backward_bytes: peak of the backward pass beyond the saved activations, without checkpointing.
    checkpoint_bytes: activations saved per checkpointed block; outer_bytes: those outside of the blocks.
    kinds: of its blocks, in the order of computation.
    """

    parameters: int
    modulation_parameters: int
    conditioning_parameters: int
    modulation_width: int
    largest_linear: int
    forward_flops: float
    attention_flops: float
    backward_flops: float
    moved_bytes: float
    forward_peak_bytes: int
    backward_bytes: int
    checkpoint_bytes: int
    outer_bytes: int
    kinds: tuple[BlockCost, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(kind.count for kind in self.kinds)

    def kind_of(self, block: int) -> BlockCost:
        """The kind of a block by its index."""
        for kind in self.kinds:
            if block < kind.count:
                return kind
            block -= kind.count
        raise IndexError(f"block is {block + self.blocks}, expected one of {self.blocks}")

    def training_flops(self, options: MemoryOptions = PLAIN) -> float:
        """FLOPs of one sample, forward and backward, including recomputed blocks."""
        again = sum(self.kind_of(block).forward_flops for block in recomputed_blocks(options, self.blocks))
        return self.forward_flops + again + self.backward_flops

    def training_bytes(self, options: MemoryOptions = PLAIN) -> int:
        """Peak activation bytes of one sample, which is where the backward pass of a block begins."""
        recomputed, kept, peak = recomputed_blocks(options, self.blocks), self.outer_bytes, 0
        for number in range(self.blocks):
            kind, again = self.kind_of(number), number in recomputed
            kept += self.checkpoint_bytes if again else kind.saved_bytes
            peak = max(peak, kept + (kind.recomputed_bytes if again else self.backward_bytes))
        return peak


class CallShapes(Record):
    """The configuration of a transformer, and the shapes and the dtype of its calls."""

    family: str
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
            family=teacher.family,
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
    family, config, dtype = family_named(shapes.family), shapes.config, DTYPES[shapes.dtype]
    anatomy = family.anatomy
    depth = tuple(int(config[kind.count_key]) for kind in anatomy.block_lists)
    # Blocks of a kind are equal: small depths give the constant part and one block of each kind exactly.
    base = (1,) * len(depth)
    larger = [tuple(1 + (kind == number) for number in range(len(depth))) for kind in range(len(depth))]
    runs = {at: _Run(family, shapes, at) for at in (base, *larger)}

    def whole(values: Mapping[tuple[int, ...], float]) -> float:
        more = [values[at] - values[base] for at in larger]
        return values[base] + sum((count - 1) * one for count, one in zip(depth, more, strict=True))

    forward = {at: count_flops(run.forward) for at, run in runs.items()}
    attention_flops = whole({at: flops.attention for at, flops in forward.items()})
    forward_flops = whole({at: flops.total for at, flops in forward.items()})
    both_flops = whole({at: count_flops(run.both).total for at, run in runs.items()})
    saved = {at: saved_bytes(run.with_gradient, run.parameters) for at, run in runs.items()}
    inner = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
    checkpoint = (shapes.image_tokens + shapes.text_length) * inner * dtype.itemsize
    model = transformer_of(family, config, depth, dtype)
    kinds = tuple(
        BlockCost(
            count=count,
            parameters=parameter_count(block),
            modulation_parameters=modulation_parameters(block, anatomy),
            modulation_width=modulation_width(block, anatomy),
            forward_flops=forward[at].total - forward[base].total,
            saved_bytes=saved[at] - saved[base],
            recomputed_bytes=runs[at].recomputed_bytes(kind),
        )
        for kind, count, at, block in zip(
            anatomy.block_lists, depth, larger, anatomy.blocks(runs[base].model), strict=True
        )
    )
    return BackboneCost(
        parameters=parameter_count(model),
        modulation_parameters=modulation_parameters(model, anatomy),
        conditioning_parameters=parameter_count(model.get_submodule(anatomy.conditioning)),
        modulation_width=modulation_width(model, anatomy),
        largest_linear=max(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)),
        forward_flops=forward_flops,
        attention_flops=attention_flops,
        backward_flops=both_flops
        - forward_flops
        + (_ATTENTION_BACKWARD - _ATTENTION_BACKWARD_COUNTED) * attention_flops,
        moved_bytes=whole({at: moved_bytes(run.forward) for at, run in runs.items()}),
        forward_peak_bytes=peak_bytes(runs[base].forward, runs[base].parameters),
        backward_bytes=peak_bytes(runs[base].both, runs[base].parameters, gradients=True) - saved[base],
        checkpoint_bytes=checkpoint,
        outer_bytes=runs[base].checkpointed_bytes() - len(depth) * checkpoint,
        kinds=kinds,
    )


class _Run:
    """A transformer of a depth and one sample for it, as Backbone calls it."""

    def __init__(self, family: Family, shapes: CallShapes, depth: tuple[int, ...]) -> None:
        self._family, self._shapes = family, shapes
        self.model = transformer_of(family, shapes.config, depth, DTYPES[shapes.dtype])
        self.parameters = list(self.model.parameters())

    def forward(self) -> torch.Tensor:
        return self._run(gradient=False)

    def with_gradient(self) -> torch.Tensor:
        return self._run(gradient=True)

    def both(self) -> None:
        self._run(gradient=True).sum().backward()

    def checkpointed_bytes(self) -> int:
        activation_checkpointing(self.model, 1)
        kept = saved_bytes(self.with_gradient, self.parameters)
        activation_checkpointing(self.model, 0)
        return kept

    def recomputed_bytes(self, kind: BlockList) -> int:
        """Peak of the forward and backward pass of the last block of a kind, without its inputs."""
        block, calls = getattr(self.model, kind.attribute)[-1], list[tuple[Any, ...]]()
        handle = block.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
        self.with_gradient()
        handle.remove()
        given, named = tree_map_only(
            torch.Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), calls[0]
        )

        def both() -> None:
            outputs = [output for output in block(*given, **named) if output.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

        return peak_bytes(both, self.parameters, gradients=True)

    def _run(self, *, gradient: bool) -> torch.Tensor:
        shapes, dtype = self._shapes, DTYPES[self._shapes.dtype]
        empty = partial(torch.empty, device="meta", dtype=dtype)
        # The positions have the shapes of any image with so many tokens.
        geometry = Geometry(height=1, width=1, rows=shapes.image_tokens, columns=1, channels=shapes.channels)
        return self._family.call(
            self.model,
            empty(1, shapes.image_tokens, shapes.channels),
            empty(1, shapes.text_length, shapes.text_width, requires_grad=gradient),
            empty(1, shapes.pooled_width),
            empty(1, dtype=self._family.timestep_dtype(dtype)),
            torch.empty(1, device="meta") if shapes.takes_guidance else None,
            self._family.positions(geometry, shapes.text_length, device=torch.device("meta"), dtype=dtype),
        )


def decoding_bytes(config: dict[str, Any], family: Family, geometry: Geometry) -> int:
    """Bytes of activations while the VAE decodes one image in fp32, its weights left out."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(config).eval().requires_grad_(False)
        packed = torch.empty(1, geometry.image_tokens, geometry.channels)
        latent = family.vae_input(packed, geometry, config)
    weights = list(vae.parameters())
    return peak_bytes(lambda: vae.decode(latent, return_dict=False)[0], weights)


def vae_parameters(config: dict[str, Any]) -> int:
    """Parameters of the VAE, of which a build only reads the configuration."""
    with torch.device("meta"):
        return parameter_count(diffusers.AutoencoderKL.from_config(config))


def clip_parameters(config: dict[str, Any]) -> int:
    """Parameters of the CLIP text encoder."""
    with torch.device("meta"):
        return parameter_count(CLIPTextModel(CLIPTextConfig.from_dict(config)))


def transformer_of(family: Family, config: Mapping[str, Any], depth: Sequence[int], dtype: torch.dtype) -> Any:
    """A transformer without memory, on the meta device, with `depth` blocks of each kind."""
    counts = {kind.count_key: count for kind, count in zip(family.anatomy.block_lists, depth, strict=True)}
    with torch.device("meta"):
        model = getattr(diffusers, family.transformer).from_config({**config, **counts})
    for parameter in model.parameters():
        # Not .to(), for which diffusers logs a warning.
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)
