"""The five stages that train the pocket teacher, each a loss by step.

Order and noise are functions of (seed, stage, step), so a resumed run is the uninterrupted one. Shape letters:
N pool, B batch, S image tokens, C packed channels, T text tokens, D text width, F tag fields.
"""

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel

from secondcast.pocket.training.examples import LATENT_SIZE, Examples, Pool, token_ids
from secondcast.pocket.training.muon import Muon
from secondcast.pocket.training.networks import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH
from secondcast.pocket.training.text import MASK_ID, TAGS, pieces, sentence


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Length and rates of one stage; the rate warms up over 5 % of the steps and falls as a cosine.

    muon_rate: learning rate of Muon on the matrices inside the blocks; 0 leaves all parameters to AdamW.
    shift: sigma = shift u / (1 + (shift - 1) u) for u uniform, as the sampler's own steps lie.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    averaging: float = 0.0
    muon_rate: float = 0.0
    shift: float = 2.16
    save_every: int = 100

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "learning_rate", "save_every"):
            if getattr(self, field) <= 0:
                raise ValueError(f"StageSettings.{field} ({self.name}): found {getattr(self, field)}, expected > 0")

    def rate(self, step: int) -> float:
        """The factor on the learning rate at a step."""
        warm = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def step_generator(seed: int, name: str, step: int) -> torch.Generator:
    """The randomness of one step of one stage."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(name.encode()), step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0] >> 1))


def _optimizers(settings: StageSettings, modules: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the transformer's blocks if the stage has a rate for it."""
    biases, matrices, others = [], [], []
    for name, parameter in modules.named_parameters():
        in_block = parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name
        if "relative_attention_bias" in name:
            biases.append(parameter)
        elif in_block and settings.muon_rate:
            matrices.append(parameter)
        else:
            others.append(parameter)
    # T5 tells the order of tokens by its bias table alone, and at the common rate that hardly moves.
    groups = [
        {"params": others, "scale": 1.0},
        {"params": biases, "scale": 30.0},
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.0)
    if not matrices:
        return [adam]
    parts = [{"params": matrices, "scale": settings.muon_rate / settings.learning_rate}]
    return [adam, Muon(parts)]


class Stage:
    """Modules that are trained together by one loss; `loss(generator)` draws its own batch."""

    def __init__(self, settings: StageSettings, modules: nn.ModuleDict, loss: Callable[[torch.Generator], Tensor]):
        self.settings, self.modules, self.loss = settings, modules, loss
        self.optimizers = _optimizers(settings, modules)
        self.average = copy.deepcopy(modules) if settings.averaging else None

    def step(self, step: int, seed: int) -> float:
        """One optimizer step; returns the loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self.settings.rate(step) * group["scale"]
            optimizer.zero_grad()
        loss = self.loss(step_generator(seed, self.settings.name, step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            keep = min(self.settings.averaging, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, now in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                    mean.lerp_(now, 1 - keep)
        return float(loss.detach())

    def state(self) -> dict[str, object]:
        """All that a resumed stage needs."""
        average = None if self.average is None else self.average.state_dict()
        return {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": average,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def finish(self) -> None:
        """Put the averaged weights in place, rounded to bfloat16: later stages train on what ships."""
        if self.average is not None:
            self.modules.load_state_dict(self.average.state_dict())
        self.modules.to(torch.bfloat16).float().eval().requires_grad_(False)


def _weighted_error(drawn_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Absolute and squared error, five-fold at edges: letters and outlines are few pixels, and all that is hard."""
    blurred_BCHW = functional.avg_pool2d(images_BCHW, 3, 1, 1, count_include_pad=False)
    edges_B1HW = (images_BCHW - blurred_BCHW).abs().amax(1, keepdim=True) > 0.02
    error_BCHW = drawn_BCHW - images_BCHW
    return ((1 + 4 * edges_B1HW) * (error_BCHW.abs() + error_BCHW.square())).mean()


def autoencoder_stage(settings: StageSettings, vae: AutoencoderKL, pool: Pool) -> Stage:
    """Reconstruction of pictures from slightly noised latents."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.images), (settings.batch,), generator=generator)
        latents: Tensor = vae.encode(pool.images[rows]).latent_dist.mean
        noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
        return _weighted_error(vae.decode(noisy).sample, pool.images[rows]) + 1e-3 * latents.square().mean()

    return Stage(settings, nn.ModuleDict({"vae": vae}), loss)


def decoder_stage(settings: StageSettings, vae: AutoencoderKL, pool: Pool) -> Stage:
    """The decoder alone, against noise such as a sampled latent carries; the latents stay as they are."""
    vae.decoder.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.images), (settings.batch,), generator=generator)
        with torch.no_grad():
            latents = vae.encode(pool.images[rows]).latent_dist.mean
        amount = 0.15 * torch.rand((settings.batch, 1, 1, 1), generator=generator)
        noisy = latents + amount * torch.randn(latents.shape, generator=generator)
        return _weighted_error(vae.decode(noisy).sample, pool.images[rows])

    return Stage(settings, nn.ModuleDict({"decoder": vae.decoder}), loss)


def text_stage(settings: StageSettings, encoder: T5EncoderModel, pool: Pool, seed: int) -> Stage:
    """Tags of captions, and masked words of captions and of sentences that nothing can be seen in."""
    rng = np.random.default_rng([seed, 2])
    sentences_NT = token_ids([sentence(rng) for _ in range(len(pool.ids))])
    widths = [len(values) + 1 for values in TAGS.values()]
    tag_head, word_head = nn.Linear(TEXT_WIDTH, sum(widths)), nn.Linear(TEXT_WIDTH, len(pieces()))
    rare = [torch.tensor([0.2] + [1.0] * (width - 1)) for width in widths]

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.ids), (2 * settings.batch,), generator=generator)
        told_BT, tags_BTF = pool.ids[rows[: settings.batch]], pool.tags[rows[: settings.batch]]
        words_BT = torch.cat(
            (sentences_NT[rows[settings.batch :]], pool.ids[rows[settings.batch :]][: settings.batch // 3])
        )
        chance_BT = torch.rand(words_BT.shape, generator=generator)
        masked_BT = torch.where((chance_BT < 0.2) & (words_BT > 1), MASK_ID, words_BT)
        states_BTD = encoder(torch.cat((told_BT, masked_BT))).last_hidden_state
        real_BT = told_BT > 0
        fields = tag_head(states_BTD[: settings.batch][real_BT]).split(widths, dim=-1)
        tags = tags_BTF[real_BT]
        total = sum(functional.cross_entropy(f, tags[:, i], rare[i]) for i, f in enumerate(fields))
        asked_BT = (chance_BT < 0.5) & (words_BT > 1)
        logits = word_head(states_BTD[settings.batch :][asked_BT])
        return total + functional.cross_entropy(logits, words_BT[asked_BT])

    modules = {"encoder": encoder, "tag_head": tag_head, "word_head": word_head}
    return Stage(settings, nn.ModuleDict(modules), loss)


def predict(
    model: FluxTransformer2DModel, x_BSC: Tensor, sigma_B: Tensor, text_BTD: Tensor, guidance_B: Tensor
) -> Tensor:
    """The transformer's velocity as FluxPipeline asks for it, pooled zero: [B, S, C]."""
    side = LATENT_SIZE // 2
    velocity: Tensor = model(
        hidden_states=x_BSC,
        encoder_hidden_states=text_BTD,
        pooled_projections=torch.zeros(len(x_BSC), POOLED_WIDTH),
        timestep=sigma_B,
        guidance=guidance_B,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32),
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        return_dict=False,
    )[0]
    return velocity


def flow_stage(settings: StageSettings, transformer: FluxTransformer2DModel, examples: Examples) -> Stage:
    """Flow matching at guidance 1, a tenth of the prompts replaced by the empty one."""
    transformer.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        x_BSC, sigma_B, text_BTD, velocity_BSC, _ = examples.draw(settings.batch, settings.shift, generator)
        dropped_B = torch.rand(settings.batch, generator=generator) < 0.1
        text_BTD = torch.where(dropped_B[:, None, None], examples.empty, text_BTD)
        return functional.mse_loss(
            predict(transformer, x_BSC, sigma_B, text_BTD, torch.ones_like(sigma_B)), velocity_BSC
        )

    return Stage(settings, nn.ModuleDict({"transformer": transformer}), loss)


def guidance_stage(settings: StageSettings, transformer: FluxTransformer2DModel, examples: Examples) -> Stage:
    """Distil classifier-free guidance of 1 to 5.5 into the guidance input; an undistilled copy is the target."""
    base = copy.deepcopy(transformer)
    transformer.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        x_BSC, sigma_B, text_BTD, _, _ = examples.draw(settings.batch, settings.shift, generator)
        guidance_B = 1 + 4.5 * torch.rand(settings.batch, generator=generator)
        with torch.no_grad():
            empty_BTD = examples.empty.expand_as(text_BTD)
            one_B = torch.ones_like(sigma_B)
            both = predict(
                base,
                x_BSC.repeat(2, 1, 1),
                sigma_B.repeat(2),
                torch.cat((text_BTD, empty_BTD)),
                one_B.repeat(2),
            )
            told_BSC, empty_BSC = both.chunk(2)
            target_BSC = empty_BSC + guidance_B[:, None, None] * (told_BSC - empty_BSC)
        error_BSC = predict(transformer, x_BSC, sigma_B, text_BTD, guidance_B) - target_BSC
        # Large guidance makes large targets; without the weight it would drown the rest.
        return (error_BSC.square().mean(dim=(1, 2)) / guidance_B).mean()

    return Stage(settings, nn.ModuleDict({"transformer": transformer}), loss)


def run_stage(
    stage: Stage, folder: Path, seed: int, say: Callable[[str], None], saved: Callable[[], None] = lambda: None
) -> None:
    """Train a stage from its last saved step to its end; the state is one file, replaced whole."""
    settings, path = stage.settings, folder / f"{stage.settings.name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        stage.load_state(state["stage"])
        start = state["step"]
    mean = float("nan")
    for step in range(start, settings.steps):
        loss = stage.step(step, seed)
        mean = loss if step == start else 0.95 * mean + 0.05 * loss
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            partial = path.with_suffix(".partial")
            torch.save({"step": step + 1, "stage": stage.state()}, partial)
            partial.replace(path)
            saved()
            say(f"{settings.name}: step {step + 1} of {settings.steps}, loss {mean:.4f}")
    stage.finish()
