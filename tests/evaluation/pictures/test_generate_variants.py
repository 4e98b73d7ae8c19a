"""Pictures with a LoRA, and with the teacher's text encoder in 8 or 4 bits, as a user would run them."""

import json

import numpy as np
import pytest
import torch

from secondcast.evaluation.settings.generating import GenerateOptions
from secondcast.models.memory.quantized import quantize_text_encoder
from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from tests.evaluation.test_generate import (
    PROMPTS,
    Heard,
    pictures,
    pipeline_images,
    pipeline_with,
    read_pictures,
    run,
    student,
    t5_config,
    whole,
)
from tests.models.teacher.test_lora import lora_file

__all__ = ["lora_file", "student", "t5_config", "whole"]


def test_pictures_with_a_lora_are_the_pipelines_with_the_same_fused(whole, student, dev_teacher, lora_file, tmp_path):
    part = PROMPTS[2:4]
    run(student, dev_teacher, tmp_path / "out", lora=lora_file, lora_scale=0.5)
    pipeline = pipeline_with(student, dev_teacher)
    pipeline.load_lora_weights(lora_file)
    pipeline.fuse_lora(lora_scale=0.5)
    embedding, _, _ = pipeline.encode_prompt(part, None, max_sequence_length=10)
    expected = pipeline_images(pipeline, part, prompt_embeds=embedding, pooled_prompt_embeds=torch.zeros(2, 8))
    found = read_pictures(tmp_path / "out", (2, 3))
    # The pipeline's fused module still runs through peft, which may add in another order.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert pictures(tmp_path / "out") != pictures(whole)


def test_a_folder_holds_pictures_of_one_lora_at_one_scale(student, dev_teacher, lora_file, tmp_path):
    out, progress = tmp_path / "out", Heard()
    run(student, dev_teacher, out, PROMPTS[:1], lora=lora_file, progress=progress)
    assert json.loads((out / "generate.json").read_text())["lora"][1] == 1.0 and not progress.lines
    for changes in ({}, {"lora": lora_file, "lora_scale": 0.5}):
        with pytest.raises(SettingsMismatchError, match=r"out has images made with lora = \["):
            run(student, dev_teacher, out, PROMPTS[:1], **changes)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_teachers_text_encoder_is_quantized_as_a_user_would_do_it(dev_teacher, tmp_path, kind):
    run("teacher", dev_teacher, tmp_path / "out", PROMPTS[2:4], quantize_text_encoder=kind)
    from transformers import T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(dev_teacher / "text_encoder_2", dtype=torch.float32)
    quantize_text_encoder(encoder, kind)
    pipeline = pipeline_with(None, dev_teacher)
    pipeline.text_encoder_2 = encoder
    embedding, _, _ = pipeline.encode_prompt(PROMPTS[2:4], None, max_sequence_length=12)
    expected = pipeline_images(pipeline, PROMPTS[2:4], prompt_embeds=embedding, pooled_prompt_embeds=torch.zeros(2, 8))
    found = [np.asarray(image) for _, image in sorted(_images(tmp_path / "out").items())]
    assert np.array_equal(np.stack(found), expected)
    with pytest.raises(SettingsMismatchError, match="out has images made with student = "):
        run("teacher", dev_teacher, tmp_path / "out", PROMPTS[2:4])


def _images(folder):
    from PIL import Image

    return {file.name: Image.open(file) for file in folder.glob("*.png")}


def test_what_has_no_effect_is_refused(student, dev_teacher, tmp_path):
    with pytest.raises(SettingsError, match=r"--quantize-text-encoder is nf4, but .* is a student: export it with "):
        run(student, dev_teacher, tmp_path / "out", quantize_text_encoder="nf4")
    with pytest.raises(SettingsError, match=r"^--lora-scale has no effect without --lora: remove it, or give both$"):
        GenerateOptions.from_flags(lora_scale=0.5)
