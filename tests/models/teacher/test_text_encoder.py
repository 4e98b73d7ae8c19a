"""Law 10: token ids and embeddings are those of FluxPipeline.encode_prompt, bit for bit at the same batch size."""

import shutil
import warnings
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline

from secondcast.cache_builder.prompts.files import SourcedText
from secondcast.cache_builder.text_stage import tokenised_prompts
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.errors import TeacherError

TEXTS = [
    "a red car on the left of a green bench",
    "two dogs",
    "A sign that says 'xyz', and a very long story about many other things that nobody can see at all " * 2,
]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["pocket", "dev_teacher"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beyond", [0, 1, 30])
def test_ids_embeddings_and_pooled_vectors_equal_the_pipelines(name, dtype, beyond, request):
    folder = TEACHER_FOLDER if name == "pocket" else request.getfixturevalue(name)
    teacher = TeacherFolder(path=folder, source=name)
    length = teacher.text_length + beyond
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], local_files_only=True)
    expected_ids = pipeline.tokenizer_2(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    # As in FluxPipeline.__call__: with gradients T5's attention takes another kernel and rounds otherwise.
    with torch.no_grad():
        expected, expected_pooled, _ = pipeline.encode_prompt(TEXTS, None, max_sequence_length=length)

    sourced = [SourcedText(text=t.strip(), sources=("s",)) for t in TEXTS]
    prompts, cut = tokenised_prompts(sourced, teacher, text_length=length)
    pad = pipeline.tokenizer_2.pad_token_id
    ids_BT = torch.tensor([[*p.token_ids, *[pad] * (length - len(p.token_ids))] for p in prompts])
    assert torch.equal(ids_BT, expected_ids)
    assert cut == [TEXTS[2].strip()]
    encoder = TeacherTextEncoder.load(teacher, dtype=DTYPES[dtype], device=torch.device("cpu"), pooled="clip")
    assert torch.equal(encoder.encode(ids_BT), expected)
    assert encoder.conditioning is not None
    found = encoder.conditioning.encode([prompt.text for prompt in prompts])
    assert torch.equal(found["pooled_projections"], expected_pooled)
    assert bool(expected_pooled.any()) == (name == "dev_teacher")


def test_clip_is_loaded_only_where_it_is_asked_for(dev_teacher, tmp_path):
    shutil.copytree(dev_teacher, tmp_path / "t", ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    teacher = TeacherFolder(path=tmp_path / "t", source="t")
    load = partial(TeacherTextEncoder.load, teacher, dtype=torch.float32, device=torch.device("cpu"))
    assert load().conditioning is None
    with pytest.raises(TeacherError, match="t has no text_encoder/, expected a folder in the FluxPipeline layout"):
        load(pooled="clip")
