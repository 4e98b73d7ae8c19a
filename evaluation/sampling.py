"""Samples images with a text encoder from noise and decodes them with the VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from secondcast.models.backbone import Backbone
from secondcast.models.families.encoders.interface import Conditioning
from secondcast.models.families.text import Text
from secondcast.models.geometry import Geometry
from secondcast.models.memory.conditions import Conditions
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.noise import draw_noise
from secondcast.models.sampler import bound, sample
from secondcast.models.schedule import Schedule
from secondcast.models.teacher.controlnet import Control, ControlNet, ControlNetFolder
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.models.teacher.lora import Lora
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Bar
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.prompts import prompt_id

# token_ids_BT -> encoder_hidden_states_BTD
Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class OwnTokensEmbed:
    """An Embed with its own tokenizer: `token_ids` tokenizes texts."""

    embed: Embed
    token_ids: Callable[[Sequence[str]], torch.Tensor]

    def __call__(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD."""
        return self.embed(token_ids_BT)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Turns embeddings into images: frozen backbone, schedule, decoder, tokenizer.

    The schedule is the pipeline's, independent of any cache.
    """

    backbone: Backbone
    decoder: ImageDecoder
    schedule: Schedule
    geometry: Geometry
    teacher: TeacherFolder
    guidance: float
    seed: int
    controlnet: ControlNet | None = None

    @classmethod
    def open(
        cls,
        teacher: TeacherFolder,
        *,
        resolution: int | None,
        steps: int,
        guidance: float,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        height: int | None = None,
        width: int | None = None,
        text_length: int | None = None,
        options: MemoryOptions = PLAIN,
        batch_rows: int | None = None,
        pooled_varies: bool = False,
        lora: Lora | None = None,
        controlnet: ControlNetFolder | None = None,
    ) -> "Generator":
        """Load transformer, scheduler and VAE of a teacher, without its text encoder.

        height, width: take precedence over resolution.
        text_length: default: the teacher's, which its tokenizer states.
        batch_rows: usual number of rows per call, for a modulation table; None: without a table.
        pooled_varies: whether pooled vectors will be given.
        lora, controlnet: of the transformer.
        """
        geometry = teacher.geometry(ImageSize(resolution=resolution, height=height, width=width))
        schedule = teacher.family.schedule(
            "diffusers", teacher.config("scheduler"), steps=steps, image_tokens=geometry.image_tokens, dtype=dtype
        )
        conditions = None
        if batch_rows is not None and not pooled_varies:
            value = guidance if teacher.family.takes_guidance(teacher.config("transformer")) else None
            pairs = tuple((timestep, value) for timestep in schedule.timesteps)
            conditions = Conditions(pairs=pairs, batch_rows=batch_rows)
        backbone = Backbone.load(
            teacher.path,
            geometry,
            text_length=text_length or teacher.text_length,
            dtype=dtype,
            device=device,
            options=options,
            conditions=conditions,
            pooled_varies=pooled_varies,
            lora=lora,
        )
        return cls(
            backbone=backbone,
            decoder=ImageDecoder.load(teacher, geometry, device=device),
            schedule=schedule,
            geometry=geometry,
            teacher=teacher,
            guidance=guidance,
            seed=seed,
            controlnet=None if controlnet is None else controlnet.load(dtype=dtype, device=device),
        )

    def token_ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Padded token ids, [N, T] int64."""
        tokenizer = self.teacher.family.tokenizer(self.teacher.part("large_tokenizer"))
        return tokenizer.padded(prompts, self.teacher.text_length)

    @torch.no_grad()
    def images(self, embed: Embed, prompts: Sequence[str], *, batch_size: int, bar: Bar) -> Array:
        """Sample uint8 images [N, H, W, 3]. The noise is a function of (seed, prompt), the same for every encoder."""
        ids_NT = embed.token_ids(prompts) if isinstance(embed, OwnTokensEmbed) else self.token_ids(prompts)
        parts = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            parts.append(self.pictures(embed(ids_NT[rows].to(self.backbone.device)), prompts[rows]))
            bar.advance(len(parts[-1]))
        return np.concatenate(parts)

    @torch.no_grad()
    def pictures(
        self,
        embedding_BTD: torch.Tensor,
        prompts: Sequence[str],
        conditioning: Conditioning | None = None,
        negative: Text | None = None,
        sample_index: int = 0,
        control_images: Sequence[Image.Image] = (),
    ) -> Array:
        """Sample uint8 images [B, H, W, 3] from one batch of embeddings.

        The noise is a function of (seed, prompt, sample_index).

        conditioning: default: zero as pooled vectors.
        negative: one row, for classifier-free guidance.
        control_images: of each prompt, with a ControlNet.

        NonFiniteError for a latent that is not finite, which would be decoded to a black image.
        """
        backbone, geometry = self.backbone, self.geometry
        noise = [
            draw_noise(
                seed=self.seed,
                prompt_id=prompt_id(text),
                sample_index=sample_index,
                image_tokens=geometry.image_tokens,
                channels=geometry.channels,
            )
            for text in prompts
        ]
        noise_BSC = torch.from_numpy(np.stack(noise)).to(device=backbone.device, dtype=backbone.dtype)
        guidance_B = torch.full((len(prompts),), self.guidance, dtype=torch.float32, device=backbone.device)
        if conditioning is None:
            conditioning = backbone.zero_pooled(len(prompts))
        text = Text(embedding_BTD=embedding_BTD.to(backbone.dtype), conditioning=conditioning)
        control = None
        if self.controlnet is not None:
            control = Control(controlnet=self.controlnet, latent_BSC=self.decoder.encode(control_images))
        walk = sample(bound(backbone, text, guidance_B, negative, control), noise_BSC, self.schedule)
        finite_B = walk.final_latent_BSC.isfinite().flatten(1).all(1)
        if not finite_B.all():
            first = prompts[int((~finite_B).nonzero()[0])]
            raise NonFiniteError(
                f"the final latent of the image of {first[:80]!r} is not finite: embedding or prediction overflowed; "
                f"try --dtype float32, or without --lora, --controlnet or --quantize if one is given"
            )
        return self.decoder.decode(walk.final_latent_BSC)
