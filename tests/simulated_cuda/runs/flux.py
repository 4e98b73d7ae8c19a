"""FLUX.1-dev at full size without weights, a student for it, and caches of made-up trajectories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from secondcast.models.cost.counting import transformer_of
from secondcast.models.cost.students import student_config
from secondcast.models.families.flux import FLUX
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import fields_of
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.prompts import Prompt, is_held_out, prompt_id
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields
from tests.simulated_cuda.runs.rows import STUDENT, TEACHER


def transformer(mode: FakeTensorMode, manifest: Manifest) -> Any:
    """The whole transformer on the host."""
    config = manifest.teacher.backbone_config
    depth = [int(config[kind.count_key]) for kind in FLUX.anatomy.block_lists]
    model = transformer_of(FLUX, config, depth, DTYPES[manifest.sampling.dtype])
    with mode:
        return model.to_empty(device="cpu")


def text_encoder(mode: FakeTensorMode, manifest: Manifest) -> TeacherTextEncoder:
    """T5-XXL's encoder on the host."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(manifest.teacher.text_encoder_config))
    with mode:
        model = model.to(DTYPES[manifest.sampling.dtype]).to_empty(device="cpu")
        return TeacherTextEncoder(model, FLUX, pad_token_id=0)


def vae(mode: FakeTensorMode) -> Any:
    """The VAE in fp32 on the host."""
    with torch.device("meta"):
        model = AutoencoderKL.from_config(TEACHER.config("vae"))
    with mode:
        return model.to_empty(device="cpu")


def student(mode: FakeTensorMode, manifest: Manifest) -> SecondcastStudent:
    """A student in fp32 on the host."""
    config, teacher = student_config(STUDENT).to_dict(), manifest.teacher
    config.pop("model_type", None)
    with mode:
        return SecondcastStudent(
            StudentConfig(
                project_in_dim=config["d_model"],
                project_out_dim=teacher.text_width,
                text_length=teacher.text_length,
                **config,
            )
        )


def cache_of(folder: Path, manifest: Manifest, *, held_out: bool = False) -> Cache:
    """A cache of zeros: of prompts to train on, or of held-out ones."""
    texts = prompts(manifest.prompts.count, held_out=held_out)
    prompt_set = manifest.prompts.model_copy(update=prompt_set_fields(texts))
    writer = CacheWriter.create_or_resume(
        str(folder), manifest.model_copy(update={"prompts": prompt_set}), texts, TEACHER.tokenizer_files()
    )
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            arrays = {
                field.name: np.zeros((shard.rows, *field.row_shape), dtype=field.dtype)
                for field in fields_of(writer.manifest, kind)
            }
            writer.commit(kind, shard, arrays, seconds=0, provenance={})
    writer.finish()
    return Cache.open(str(folder))


def prompts(count: int, *, held_out: bool = False) -> list[Prompt]:
    """Prompts to train on, or held-out ones."""
    texts: Sequence[str] = [f"prompt {number}" for number in range(100 * count)]
    chosen = [text for text in texts if is_held_out(prompt_id(text)) == held_out][:count]
    return [Prompt(id=prompt_id(text), text=text, sources=("made up",), token_ids=(3, 4, 1)) for text in chosen]
