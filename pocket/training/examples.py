"""What the pocket teacher learns from: captions with their pictures, then latents and embeddings with their noise.

Shape letters: N pool, B batch, S image tokens, C packed channels, T text tokens, D text width, F tag fields,
A arrangements, R draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from transformers import T5EncoderModel

from secondcast.pocket.training.networks import TEXT_LENGTH, make_tokenizer
from secondcast.pocket.training.pictures import TOKEN, arrangement_tokens, draw, preferred
from secondcast.pocket.training.text import token_tags
from secondcast.pocket.world import IMAGE_SIZE, caption, draw_scene

LATENT_SIZE = IMAGE_SIZE // 2
SIDE = IMAGE_SIZE // TOKEN
WHIM_DRAWS = 128
KIND_WEIGHTS = (0.22, 0.5, 0.28)
"""Parts of scenes, compositions and signs among what is trained on: counts and letters take longest."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Captions of the training split: ids int64 [N, T], tags int64 [N, T, F], images float32 [N, 3, H, W].

    places: bool [N, A, S], the image tokens of each arrangement that a caption allows, none for those beyond its own.
    placed: int64 [N], the arrangement of the image.
    """

    ids: Tensor
    tags: Tensor
    images: Tensor
    places: Tensor
    placed: Tensor


def token_ids(texts: list[str]) -> Tensor:
    """Token ids as FluxPipeline makes them: int64 [N, T], padded and truncated to the text length."""
    ids: Tensor = make_tokenizer()(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def make_pool(count: int, seed: int) -> Pool:
    """`count` captions of the training split with their pictures (float32 in -1..1), ids and tags."""
    rng = np.random.default_rng([seed, 1])
    scenes = [draw_scene(rng, split="train", weights=KIND_WEIGHTS) for _ in range(count)]
    texts = [caption(scene, rng) for scene in scenes]
    whims = rng.standard_normal((count, SIDE * SIDE))
    placed = [preferred(scene, whim) for scene, whim in zip(scenes, whims, strict=True)]
    pictures = np.stack([draw(scene, where) for scene, where in zip(scenes, placed, strict=True)])
    masks = [arrangement_tokens(scene) for scene in scenes]
    places = np.zeros((count, max(map(len, masks)), SIDE * SIDE), dtype=np.bool_)
    for row, mask in zip(places, masks, strict=True):
        row[: len(mask)] = mask
    offsets = make_tokenizer()(texts, padding="max_length", return_offsets_mapping=True).offset_mapping
    tags = np.stack([token_tags(text, spans) for text, spans in zip(texts, offsets, strict=True)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pool(
        ids=token_ids(texts),
        tags=torch.from_numpy(tags),
        images=images,
        places=torch.from_numpy(places),
        placed=torch.tensor(placed),
    )


@torch.no_grad()
def embed(encoder: T5EncoderModel, ids_NT: Tensor) -> Tensor:
    """Embeddings without any mask, as FluxPipeline makes them: bfloat16 [N, T, D]."""
    return torch.cat([encoder(ids).last_hidden_state.bfloat16() for ids in torch.split(ids_NT, 64)])


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images_NCHW: Tensor) -> Tensor:
    """Packed normalised latents, float32 [N, S, C]; sets the VAE's scale and shift from the data."""
    latents = torch.cat([vae.encode(images).latent_dist.mean for images in torch.split(images_NCHW, 256)])
    shift, scale = round(float(latents.mean()), 4), round(1 / float(latents.std()), 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    packed: Tensor = FluxPipeline._pack_latents(
        (latents - shift) * scale, len(latents), latents.shape[1], LATENT_SIZE, LATENT_SIZE
    )
    return packed


@torch.no_grad()
def packed_latents(vae: AutoencoderKL, images_NCHW: Tensor) -> Tensor:
    """Packed latents by the VAE's own scale and shift, float32 [N, S, C]."""
    latents = torch.cat([vae.encode(images).latent_dist.mean for images in torch.split(images_NCHW, 256)])
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(scaled, *scaled.shape)
    return packed


def quiet_direction(latents_NSC: Tensor) -> Tensor:
    """The unit vector [C] along which packed latents vary least: a token of x_sigma tells its noise there."""
    tokens = latents_NSC.reshape(-1, latents_NSC.shape[-1])
    direction = torch.linalg.eigh(torch.cov(tokens.T.double())).eigenvectors[:, 0]
    return (direction * direction[direction.abs().argmax()].sign()).float()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What the transformer learns from: latents [N, S, C], text bfloat16 [N, T, D], the empty prompt's [T, D].

    places, placed: see Pool. whim: [C], the direction in which latents vary least; what noise holds along it, token
    by token, decides between the arrangements that a caption leaves open.
    """

    latents: Tensor
    text: Tensor
    empty: Tensor
    places: Tensor
    placed: Tensor
    whim: Tensor

    def noise(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Noise [B, S, C] that would choose the arrangement of these rows' images: normal, over all arrangements."""
        noise_BSC = torch.randn((len(rows), *self.latents.shape[1:]), generator=generator)
        whims_RBS = torch.randn((WHIM_DRAWS, *noise_BSC.shape[:2]), generator=generator)
        places_BAS = self.places[rows]
        sums_RBA = torch.einsum("rbs,bas->rba", whims_RBS, places_BAS.float())
        sums_RBA[:, ~places_BAS.any(-1)] = -torch.inf
        fits_RB = sums_RBA.argmax(-1) == self.placed[rows]
        whims_BS = whims_RBS[fits_RB.int().argmax(0), torch.arange(len(rows))]
        return noise_BSC + (whims_BS - noise_BSC @ self.whim)[..., None] * self.whim

    def draw(
        self, count: int, shift: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_sigma, sigma, text, velocity, rows."""
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        clean_BSC, text_BTD = self.latents[rows], self.text[rows].float()
        noise_BSC = self.noise(rows, generator)
        uniform_B = torch.rand(count, generator=generator).clamp(min=1e-3)
        sigma_B = shift * uniform_B / (1 + (shift - 1) * uniform_B)
        sigma_B11 = sigma_B[:, None, None]
        return (
            (1 - sigma_B11) * clean_BSC + sigma_B11 * noise_BSC,
            sigma_B,
            text_BTD,
            noise_BSC - clean_BSC,
            rows,
        )
