"""Law 10: token ids and embeddings are those of FluxPipeline.encode_prompt, bit for bit at the same batch size."""

import warnings

import pytest
import torch
from diffusers import FluxPipeline

from cache_builder.prompt_files import SourcedText
from cache_builder.text_stage import tokenised_prompts
from models.schedule import DTYPES
from models.teacher_folder import TeacherFolder
from models.text_encoder import TeacherTextEncoder
from pocket import TEACHER_FOLDER

TEXTS = [
    "a red car on the left of a green bench",
    "two dogs",
    "A sign that says 'xyz', and a very long story about many other things that nobody can see at all " * 2,
]


@pytest.mark.parametrize("name", ["pocket", "dev_teacher"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_and_embeddings_equal_the_pipelines(name, dtype, request):
    folder = TEACHER_FOLDER if name == "pocket" else request.getfixturevalue(name)
    teacher = TeacherFolder(path=folder, source=name)
    length = teacher.text_length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], local_files_only=True)
    expected_ids = pipeline.tokenizer_2(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    # As in FluxPipeline.__call__: with gradients T5's attention takes another kernel and rounds otherwise.
    with torch.no_grad():
        expected = pipeline.encode_prompt(TEXTS, None, max_sequence_length=length)[0]

    prompts, cut = tokenised_prompts([SourcedText(text=t.strip(), sources=("s",)) for t in TEXTS], teacher)
    pad = pipeline.tokenizer_2.pad_token_id
    ids_BT = torch.tensor([[*p.token_ids, *[pad] * (length - len(p.token_ids))] for p in prompts])
    assert torch.equal(ids_BT, expected_ids)
    assert cut == [TEXTS[2].strip()]
    encoder = TeacherTextEncoder.load(teacher, dtype=DTYPES[dtype], device=torch.device("cpu"))
    assert torch.equal(encoder.encode(ids_BT), expected)
