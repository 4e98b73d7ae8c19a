"""Count the costs of a network from its configuration alone.

The real classes run on the meta device; no weights are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isqrt
from typing import Any, Self

import diffusers
import torch
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel

from secondcast.models.cost.network_costs import BackboneCost, BlockCost, TextEncoderCost
from secondcast.models.cost.shapes import (
    CallShapes,
    ClipConfig,
    DecodingShapes,
    Shapes,
    StudentShapes,
    TextEncoderShapes,
    VaeConfig,
)
from secondcast.models.families.anatomy import Anatomy, BlockList
from secondcast.models.families.family import POOLED, TEXT_MASK, Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import family_named
from secondcast.models.geometry import Geometry, geometry_of
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.meta_run import count_flops, moved_bytes, parameter_count, peak_bytes, saved_bytes
from secondcast.models.memory.modulation_table import modulation_parameters, modulation_width
from secondcast.models.schedule import DTYPES
from secondcast.models.student.encoder_student_network import EncoderStudent, EncoderStudentConfig
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig

# A fused kernel's backward pass recomputes the scores: 5 products, compared with 2 of the forward pass.
_ATTENTION_BACKWARD = 2.5
# Counted on the meta device: 4 products.
_ATTENTION_BACKWARD_COUNTED = 2.0


def count(shapes: Shapes) -> Any:
    """The figures of a network in calls of these shapes, as JSON types; it takes up to seconds."""
    match shapes:
        case CallShapes():
            return asdict(_transformer(shapes))
        case TextEncoderShapes():
            return asdict(_text_encoder(shapes))
        case StudentShapes():
            return asdict(_student(shapes))
        case DecodingShapes():
            return _decoding_bytes(shapes)
        case VaeConfig():
            return parameter_count(_vae(shapes.kind, shapes.config))
        case ClipConfig():
            with torch.device("meta"):
                return parameter_count(CLIPTextModel(CLIPTextConfig.from_dict(shapes.config)))
    raise TypeError(f"{type(shapes).__name__} has no count")


def _transformer(shapes: CallShapes) -> BackboneCost:
    family, config, dtype = family_named(shapes.family), shapes.config, DTYPES[shapes.dtype]
    anatomy = family.anatomy
    depth = tuple(int(config[kind.count_key]) for kind in anatomy.block_lists)
    # Blocks of a kind are equal: small depths give the constant part and one block of each kind exactly.
    base = _Run(family, shapes, (1,) * len(depth))
    larger = [
        _Run(family, shapes, tuple(1 + (kind == number) for number in range(len(depth)))) for kind in range(len(depth))
    ]
    least = _Figures.of(base)
    of_block = [_Figures.of(run).minus(least) for run in larger]
    whole = least.plus(of_block, [count - 1 for count in depth])
    inner = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
    # Where text enters every block, all of them save the same text.
    tokens = shapes.image_tokens if anatomy.cross_attention else shapes.tokens
    checkpoint = tokens * inner * dtype.itemsize
    model = transformer_of(family, config, depth, dtype)
    return BackboneCost(
        parameters=parameter_count(model),
        modulation_parameters=modulation_parameters(model, anatomy),
        conditioning_parameters=parameter_count(model.get_submodule(anatomy.conditioning)),
        head_parameters=sum(parameter_count(model.get_submodule(name)) for name in anatomy.head),
        modulation_width=modulation_width(model, anatomy),
        largest_linear=max(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)),
        forward_flops=whole.forward_flops,
        attention_flops=whole.attention_flops,
        backward_flops=whole.backward_flops,
        moved_bytes=whole.moved_bytes,
        forward_peak_bytes=peak_bytes(base.forward, base.parameters),
        backward_bytes=peak_bytes(base.both, base.parameters, gradients=True) - least.saved_bytes,
        checkpoint_bytes=checkpoint,
        outer_bytes=base.checkpointed_bytes() - len(depth) * checkpoint,
        kinds=tuple(
            _block_cost(run, kind, count, figures, anatomy)
            for run, kind, count, figures in zip(larger, anatomy.block_lists, depth, of_block, strict=True)
        ),
    )


def _block_cost(run: "_Run", kind: BlockList, count: int, figures: "_Figures", anatomy: Anatomy) -> BlockCost:
    # The first of two, because the last one of a transformer may have fewer weights.
    block = getattr(run.model, kind.attribute)[0]
    return BlockCost(
        count=count,
        parameters=parameter_count(block),
        modulation_parameters=modulation_parameters(block, anatomy),
        modulation_width=modulation_width(block, anatomy),
        **asdict(figures),
        recomputed_bytes=run.recomputed_bytes(kind),
    )


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """What grows with the number of blocks: of a transformer, or of one block."""

    forward_flops: float
    attention_flops: float
    backward_flops: float
    moved_bytes: int
    saved_bytes: int

    @classmethod
    def of(cls, run: "_Run") -> Self:
        forward = count_flops(run.forward)
        recomputed = (_ATTENTION_BACKWARD - _ATTENTION_BACKWARD_COUNTED) * forward.attention
        return cls(
            forward_flops=forward.total,
            attention_flops=forward.attention,
            backward_flops=count_flops(run.both).total - forward.total + recomputed,
            moved_bytes=moved_bytes(run.forward),
            saved_bytes=saved_bytes(run.with_gradient, run.parameters),
        )

    def minus(self, other: Self) -> Self:
        mine, theirs = asdict(self), asdict(other)
        return type(self)(**{name: mine[name] - theirs[name] for name in mine})

    def plus(self, others: Sequence[Self], counts: Sequence[int]) -> Self:
        more = [(count, asdict(other)) for count, other in zip(counts, others, strict=True)]
        return type(self)(
            **{name: value + sum(count * other[name] for count, other in more) for name, value in asdict(self).items()}
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
            found = block(*given, **named)
            found = found if isinstance(found, tuple) else (found,)
            outputs = [output for output in found if output is not None and output.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

        return peak_bytes(both, self.parameters, gradients=True)

    def _run(self, *, gradient: bool) -> torch.Tensor:
        shapes, dtype = self._shapes, DTYPES[self._shapes.dtype]
        empty = partial(torch.empty, device="meta", dtype=dtype)
        # Any image with so many tokens; some transformers limit its sides.
        tokens = shapes.image_tokens
        rows = next(side for side in range(isqrt(tokens), 0, -1) if tokens % side == 0)
        geometry = Geometry(height=1, width=1, rows=rows, columns=tokens // rows, channels=shapes.channels)
        conditioning: dict[str, torch.Tensor] = {
            array.name: empty(1, *array.shape) for array in shapes.conditioning or ()
        }
        if shapes.pooled_width:
            conditioning[POOLED] = empty(1, shapes.pooled_width)
        if shapes.masked:
            conditioning[TEXT_MASK] = torch.empty(1, shapes.text_length, dtype=torch.int64, device="meta")
        return self._family.call(
            self.model,
            empty(1, shapes.image_tokens, shapes.channels),
            empty(1, shapes.text_length, shapes.text_width, requires_grad=gradient),
            conditioning,
            torch.empty(1, device="meta", dtype=self._family.timestep_dtype(dtype)),
            torch.empty(1, device="meta") if shapes.takes_guidance else None,
            self._family.positions(geometry, shapes.text_length, device=torch.device("meta"), dtype=dtype),
        )


def transformer_of(family: Family, config: Mapping[str, Any], depth: Sequence[int], dtype: torch.dtype) -> Any:
    """A transformer without memory, on the meta device, with `depth` blocks of each kind."""
    counts = {kind.count_key: count for kind, count in zip(family.anatomy.block_lists, depth, strict=True)}
    with torch.device("meta"):
        model = getattr(diffusers, family.transformer).from_config({**config, **counts})
    for parameter in model.parameters():
        # Not .to(), for which diffusers logs a warning.
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _decoding_bytes(shapes: DecodingShapes) -> int:
    family, config = family_named(shapes.family), shapes.config
    token_px, channels = family.token_px(config), family.token_channels(config)
    geometry = geometry_of(height=shapes.height, width=shapes.width, token_px=token_px, channels=channels)
    vae = _vae(family.vae, config).eval().requires_grad_(False)
    with torch.device("meta"):
        packed = torch.empty(1, geometry.image_tokens, geometry.channels)
        latent = family.vae_input(packed, geometry, vae)
    weights = list(vae.parameters())
    return peak_bytes(lambda: vae.decode(latent, return_dict=False)[0], weights)


def _vae(kind: str, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def _text_encoder(shapes: TextEncoderShapes) -> TextEncoderCost:
    with torch.device("meta"):
        family = FLUX if shapes.family is None else family_named(shapes.family)
        model = family.make_text_encoder(shapes.config)
    model = model.to(DTYPES[shapes.dtype]).eval().requires_grad_(False)
    return text_cost(model, shapes.text_length, saved=False)


def _student(shapes: StudentShapes) -> TextEncoderCost:
    config, length = shapes.config, shapes.text_length
    with torch.device("meta"):
        model: torch.nn.Module
        if shapes.text_layers is None:
            projection: dict[str, Any] = {"project_in_dim": config["d_model"], "project_out_dim": shapes.text_width}
            model = SecondcastStudent(StudentConfig(**projection, text_length=length, **config))
        else:
            model = EncoderStudent(
                EncoderStudentConfig(
                    encoder_config={key: value for key, value in config.items() if key != "projection_rank"},
                    project_in_dim=config["hidden_size"],
                    project_out_dim=shapes.text_width,
                    projection_rank=config.get("projection_rank"),
                    text_length=length,
                    hidden_state_layers=shapes.text_layers,
                )
            )
    return text_cost(model.float().train(), length, saved=True)


def text_cost(model: torch.nn.Module, length: int, *, saved: bool) -> TextEncoderCost:
    """Of a text encoder on the meta device, for one text of this length; saved: whether it is trained."""

    def run() -> Any:
        return model(torch.empty(1, length, dtype=torch.int64, device="meta"))[0]

    parameters = list(model.parameters())
    with torch.no_grad():
        flops = count_flops(run)
    return TextEncoderCost(
        parameters=parameter_count(model),
        forward_flops=flops.total,
        forward_peak_bytes=peak_bytes(run, parameters),
        saved_bytes=saved_bytes(run, parameters) if saved else 0,
    )
