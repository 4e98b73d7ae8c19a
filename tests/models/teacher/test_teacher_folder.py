"""A folder that is no FLUX teacher, or not a whole one, is refused in one line that names the file and what it says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from secondcast.models.families.flux import FLUX
from secondcast.models.teacher.folder import BUILD_PARTS, POOLED_PARTS, TeacherFolder, find_teacher
from secondcast.models.teacher.text_encoder import TeacherTextEncoder, load_conditioning_encoder
from secondcast.storage_schemas.errors import TeacherError

ALL = (*BUILD_PARTS, *POOLED_PARTS)
RECORDED = (
    "this version supports FLUX.1-dev, FLUX.1-schnell, FLUX.1-Krea-dev, FLUX.1-Kontext-dev, "
    "stable-diffusion-3-medium-diffusers, stable-diffusion-3.5-medium, stable-diffusion-3.5-large, "
    "PixArt-Sigma-XL-2-512-MS, PixArt-Sigma-XL-2-1024-MS, FLUX.2-klein-4B, FLUX.2-klein-9B, and models with t"
)


@pytest.fixture
def teacher(tmp_path, dev_teacher) -> Path:
    return shutil.copytree(dev_teacher, tmp_path / "t")


def refused(teacher: Path, message: str) -> None:
    with pytest.raises(TeacherError, match=f"^{message}") as caught:
        find_teacher(str(teacher), ALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"_class_name": "FluxFillPipeline"}, "_class_name = 'FluxFillPipeline', expected 'FluxPi"),
        (
            "model_index.json",
            {"_class_name": "ChromaPipeline"},
            "_class_name = 'ChromaPipeline', expected 'F",
        ),
        ("transformer/config.json", {"_class_name": "ChromaTransformer2DModel"}, "_class_name = 'ChromaTransformer2D"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name = 'DDIMScheduler', expec"),
        ("text_encoder_2/config.json", {"model_type": "umt5"}, "model_type = 'umt5', expected 't5'"),
        ("text_encoder/config.json", {"model_type": "clip"}, "model_type = 'clip', expected 'clip_text_model'"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name = 'AutoencoderTiny', expected 'Autoen"),
    ],
)
def test_a_part_of_another_class_is_refused_by_its_name(teacher, file, changes, says):
    change(teacher / file, changes)
    refused(teacher, f"{re.escape(str(teacher / file))} has {says}.*: {RECORDED}heir layout$")


def change(file: Path, changes: dict[str, Any]) -> None:
    config = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("transformer/config.json", "guidance_embeds"),
        ("transformer/config.json", "joint_attention_dim"),
        ("vae/config.json", "block_out_channels"),
        ("text_encoder_2/config.json", "d_model"),
        ("text_encoder/config.json", "hidden_size"),
    ],
)
def test_a_configuration_without_a_key_that_is_needed_is_refused(teacher, file, key):
    change(teacher / file, {key: None})
    refused(teacher, f"{re.escape(str(teacher / file))} has no {key}: not the {file.split('/')[0]} of a FLUX.1 teacher")


def test_a_transformer_that_reads_an_image_besides_is_refused(teacher):
    change(teacher / "transformer/config.json", {"in_channels": 96, "out_channels": 16})
    refused(
        teacher,
        ".* has in_channels = 96 and out_channels = 16, expected equal numbers: it reads an image in addition to the l",
    )


@pytest.mark.parametrize("part", ALL)
def test_a_folder_without_a_part_says_which(teacher, part):
    folder = FLUX.parts[part].folder
    shutil.rmtree(teacher / folder)
    refused(teacher, f"{re.escape(str(teacher))} has no {folder}/, expected a folder in the FluxPipeline layout")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(teacher, data):
    (teacher / "scheduler/scheduler_config.json").write_bytes(data)
    refused(teacher, r".*scheduler_config.json (cannot be read|is a list, expected an object)")


@pytest.mark.parametrize("missing", ["config.json", "*.safetensors"])
def test_a_part_without_its_file_is_refused_by_name(teacher, missing):
    for file in (teacher / "text_encoder_2").glob(missing):
        file.unlink()
    with pytest.raises(
        TeacherError, match="text_encoder_2(/config.json cannot be read| has no .*: download text_encoder_2/ again)"
    ):
        find_teacher(str(teacher), ALL).identity(text_length=12)


def test_parts_of_two_models_are_refused(teacher):
    change(teacher / "text_encoder_2/config.json", {"d_model": 32})
    with pytest.raises(TeacherError, match="_2 gives 32 values per token, but its transformer reads 24: "):
        find_teacher(str(teacher), ALL).identity(text_length=12)
    change(teacher / "text_encoder_2/config.json", {"d_model": 24})
    change(teacher / "text_encoder/config.json", {"hidden_size": 9})
    assert find_teacher(str(teacher), ALL).identity(text_length=12).pooled == "zero"
    with pytest.raises(TeacherError, match="of .*t/text_encoder have 9 values, but the transformer reads 8: "):
        find_teacher(str(teacher), ALL).identity(text_length=12, pooled="clip")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("data", [b"", b"no safetensors file"])
def test_damaged_weights_of_a_text_encoder_are_one_line(teacher, part, data):
    (teacher / part / "model.safetensors").write_bytes(data)
    load = load_conditioning_encoder if part == "text_encoder" else TeacherTextEncoder.load
    with pytest.raises(
        TeacherError, match=f"t/{part} cannot be loaded: model.safetensors is not .*; download it again$"
    ) as caught:
        load(TeacherFolder(path=teacher, source="t"), dtype=torch.float32, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_one_line(teacher):
    (teacher / "tokenizer_2/tokenizer.json").write_text("{")
    with pytest.raises(TeacherError, match="t/tokenizer_2 cannot be loaded .*: download it again$"):
        FLUX.tokenizer(teacher / "tokenizer_2")
    (teacher / "tokenizer_2/tokenizer_config.json").unlink()
    with pytest.raises(
        TeacherError, match="tokenizer_config.json cannot be read .*: the teacher's tokenizer_2 is incom"
    ):
        _ = find_teacher(str(teacher), ALL).text_length


def test_a_revision_of_a_folder_is_refused(teacher):
    with pytest.raises(
        TeacherError, match="--revision is 'main', but .*/t is a folder, and only hub repositories have revis"
    ):
        find_teacher(str(teacher), ALL, revision="main")


def test_a_part_that_was_not_asked_for_may_be_anything(teacher):
    change(teacher / "text_encoder/config.json", {"model_type": "clip"})
    (teacher / "vae/config.json").write_text("{")
    assert find_teacher(str(teacher), ("transformer",)).path == teacher
