"""FLUX.2-klein from a folder that diffusers saved: a chat template, layers of a language model, its tokens."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import AutoModel, Qwen3ForCausalLM

from secondcast.cache_builder.checks.equivalence import check_equivalence
from secondcast.cache_builder.teacher_models import load_backbone
from secondcast.check.recording import recording_rows
from secondcast.check.teachers import TeacherOnDisk
from secondcast.models.backbone import Backbone
from secondcast.models.cost.counted import text_encoder_cost
from secondcast.models.cost.students import counted_student
from secondcast.models.families.klein import KLEIN
from secondcast.models.families.text import recorded_text
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student import check_fits, load_student, new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import REPLAY_PARTS, build_parts, find_teacher
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import SettingsError, StudentError, TeacherError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from tests.cache_builder.building import build_cache
from tests.check.conftest import TINY
from tests.models.families.random_klein import (
    LAYERS,
    TEXT_LENGTH,
    make_klein,
    make_qwen_config,
    qwen_config,
    vocabulary_of,
)
from tests.models.student.encoders import make_encoder_folder

# The second is cut, with the end of the template.
PROMPTS = ["a red car", "two cats and a red dog", "a", "<|endoftext|> two"]
CPU = torch.device("cpu")
build = partial(build_cache, batch_size=4, shard_size=4, seed=5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_klein(tmp_path_factory.mktemp("teachers") / "klein")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def recorded(teacher, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "c"
    build(folder, teacher, prompts, dtype="float32", height=16, width=24)
    return folder


@pytest.fixture(scope="module")
def qwen(teacher, tmp_path_factory) -> Path:
    return make_qwen_config(tmp_path_factory.mktemp("students") / "qwen", vocabulary_of(teacher))


def test_a_cache_states_the_layers_and_has_neither_guidance_nor_pooled_vector(teacher, recorded):
    cache = Cache.open(recorded)
    stated, sampling = cache.manifest.teacher, cache.manifest.sampling
    assert (stated.family, stated.text_layers, stated.text_width) == ("flux2-klein", (9, 18, 27), 24)
    assert (stated.pooled_width, stated.pad_token_id, stated.text_length) == (0, 0, TEXT_LENGTH)
    assert (sampling.guidance, sampling.storage.latents, sampling.negative_prompt) == (None, "derived", None)
    assert cache.conditioning(0) == {}
    assert set(stated.tokenizer) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
def test_the_recorded_latents_and_text_are_the_unmodified_pipelines(teacher, prompts, tmp_path, dtype, height, width):
    build(tmp_path / "c", teacher, prompts, dtype=dtype, height=height, width=width)
    cache = Cache.open(tmp_path / "c")
    pipeline = Flux2KleinPipeline.from_pretrained(teacher, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline.text_encoder.model.layers) == LAYERS
    asked: list[torch.Tensor] = []
    pipeline.text_encoder.register_forward_pre_hook(
        lambda _, given, named: asked.append(named["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        embedding_BTD, _ = pipeline.encode_prompt(
            [prompt.text for prompt in cache.prompts], max_sequence_length=TEXT_LENGTH
        )
    for row in range(len(PROMPTS)):
        assert cache.padded_token_ids(row).tolist() == asked[0][row].tolist()
        assert same_bits(cache.embedding(row), from_torch(embedding_BTD[row]))
    trajectories = [cache.trajectory(index) for index in range(len(PROMPTS))]
    noise_BSC = torch.stack([to_torch(t.noise_SC) for t in trajectories])
    last: dict[str, Any] = {}
    pipeline(
        prompt_embeds=embedding_BTD[[t.prompt for t in trajectories]],
        latents=KLEIN.unpacked(noise_BSC, recorded_geometry(cache.manifest.sampling)), height=height, width=width,
        num_inference_steps=4, output_type="latent", callback_on_step_end=lambda *call: last.update(call[-1]) or {},
    )  # fmt: skip
    for trajectory, latent_SC in zip(trajectories, last["latents"], strict=True):
        assert same_bits(trajectory.final_latent_SC, from_torch(latent_SC))


def test_the_checks_of_a_pilot_hold(teacher, recorded):
    cache = Cache.open(recorded)
    found = find_teacher(str(teacher), build_parts(None))
    checks = check_equivalence(cache, load_backbone(cache.manifest, found, CPU), found, range(len(cache)))
    assert [check.holds for check in checks] == [True, True, True]


def test_the_layers_behind_the_deepest_one_that_is_read_are_not_loaded(teacher):
    folder = find_teacher(str(teacher), build_parts(None))
    network = TeacherTextEncoder.load(folder, dtype=torch.float32, device=CPU).model
    assert len(network.layers) == 27 and network.cast_from == ("BF16",)
    whole = AutoModel.from_config(qwen_config(vocabulary_of(teacher), LAYERS, 8))
    names = {name for name, _ in whole.named_parameters()} - {name for name, _ in network.named_parameters()}
    assert {name.split(".")[1] for name in names} == {"27", "28", "weight"}
    assert {KLEIN.loaded_name(f"model.{name}") for name in names} == {KLEIN.loaded_name("lm_head.weight")} == {None}
    assert KLEIN.loaded_name("model.layers.26.mlp.up_proj.weight") == "layers.26.mlp.up_proj.weight"


def test_a_language_model_that_was_saved_alone_is_read_as_well(teacher, prompts, tmp_path):
    folder = make_klein(tmp_path / "teacher")
    Qwen3ForCausalLM.from_pretrained(folder / "text_encoder").model.save_pretrained(folder / "text_encoder")
    for name, source in (("c", folder), ("d", teacher)):
        build(tmp_path / name, source, prompts, steps=1)
    assert same_bits(Cache.open(tmp_path / "c").embedding(0), Cache.open(tmp_path / "d").embedding(0))


def test_the_check_compares_the_layers_that_are_loaded_with_the_files(teacher, qwen, tmp_path):
    scale = replace(TINY, student=qwen)
    folder = find_teacher(str(teacher), build_parts(None))
    rows = {row.name: row for row in recording_rows(TeacherOnDisk(folder, scale, CPU), tmp_path / "c", Silent())}
    assert {name: row.result for name, row in rows.items() if name != "build"} == dict.fromkeys(
        ("embedding", "weights", "pipeline", "latents", "replay"), "holds"
    )


def backbone_of(cache: Cache, teacher: Path, *, blocks: int | None = None, **options: Any) -> Backbone:
    return Backbone.load(
        teacher, recorded_geometry(cache.manifest.sampling), text_length=TEXT_LENGTH, dtype=torch.float32, device=CPU,
        options=MemoryOptions(**options), blocks=blocks,
    )  # fmt: skip


def gradient_of(cache: Cache, teacher: Path, **options: Any) -> torch.Tensor:
    x_BSC = torch.stack([to_torch(cache.trajectory(index).noise_SC) for index in range(len(cache))])
    text = recorded_text(cache, [cache.trajectory(index).prompt for index in range(len(cache))])
    embedding_BTD, backbone = text.embedding_BTD.clone().requires_grad_(), backbone_of(cache, teacher, **options)
    backbone.predict(x_BSC, embedding_BTD, text.conditioning, torch.ones(len(x_BSC)), None).square().sum().backward()
    assert all(parameter.grad is None for parameter in backbone.transformer.parameters())
    assert embedding_BTD.grad is not None
    return embedding_BTD.grad


@pytest.mark.parametrize("options", [{"activation_checkpointing": 1}, {"gpu_blocks": 1}, {"gpu_blocks": 0}])
def test_checkpointed_and_streamed_blocks_give_the_same_gradient_of_every_token(teacher, recorded, options):
    cache = Cache.open(recorded)
    plain_BTD = gradient_of(cache, teacher)
    assert bool((plain_BTD.abs().sum(-1) > 0).all())
    assert torch.equal(gradient_of(cache, teacher, **options), plain_BTD)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_streams_after_the_first_blocks_are_those_of_the_whole_transformer(teacher, recorded, blocks):
    cache = Cache.open(recorded)
    text, found = recorded_text(cache, [0]), dict[int, Any]()
    given = (to_torch(cache.trajectory(0).noise_SC)[None], text.embedding_BTD, text.conditioning, torch.ones(1), None)
    backbone = backbone_of(cache, teacher)
    for number, block in enumerate(KLEIN.anatomy.blocks(backbone.transformer), 1):
        block.register_forward_hook(lambda _, __, output, number=number: found.__setitem__(number, output))
    backbone.predict(*given)
    image_BSI, text_BTI = backbone_of(cache, teacher, blocks=blocks).streams(blocks, *given)
    if blocks > 1:
        found[blocks] = found[blocks][:, :TEXT_LENGTH], found[blocks][:, TEXT_LENGTH:]
    assert torch.equal(text_BTI, found[blocks][0]) and torch.equal(image_BSI, found[blocks][1])


def test_training_reads_the_transformer_alone_and_lowers_the_loss(teacher, recorded, qwen, tmp_path):
    from tests.trainer.test_train import run_training

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "transformer").symlink_to(teacher / "transformer")
    before = Flux2Transformer2DModel.from_pretrained(alone, subfolder="transformer").state_dict()
    run_training(tmp_path / "r", recorded, alone, qwen, steps=60, batch_size=3, learning_rate=3e-3, dropout=0.0)
    assert find_teacher(str(alone), REPLAY_PARTS).family is KLEIN
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    after = Flux2Transformer2DModel.from_pretrained(alone, subfolder="transformer").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def student_of(source: Path, cache: Path, **options: Any):
    teacher = Cache.open(cache).manifest.teacher
    return new_student(str(source), teacher, init="auto", dropout=0.0, seed=0, **options).eval()


def test_a_student_reads_the_caches_tokens_and_gives_each_layer_by_its_number(recorded, qwen, tmp_path):
    cache, student = Cache.open(recorded), student_of(qwen, recorded, projection_rank=2)
    assert own_tokens(qwen, student) is None
    assert [list(part[-1].weight.shape) for part in student.final_projection] == [[8, 2]] * 3
    save_student(student, tmp_path / "s", tokenizer=None)
    ids_1T = torch.from_numpy(cache.padded_token_ids(0))[None]
    with torch.no_grad():
        # As the pipeline calls it: with the mask that the student makes itself.
        found = load_student(tmp_path / "s")(
            input_ids=ids_1T, attention_mask=(ids_1T != 0).long(), output_hidden_states=True, use_cache=False
        )
        embedding_1TD = student(ids_1T)[0]
        hidden_1TD = student.encoder(ids_1T, attention_mask=(ids_1T != 0).long()).last_hidden_state
        for layer, project in zip((9, 18, 27), student.final_projection, strict=True):
            assert torch.equal(found.hidden_states[layer], project(hidden_1TD))
    assert torch.equal(found[0], embedding_1TD)


def test_a_student_gives_the_pipeline_what_it_gives_us(teacher, recorded, qwen):
    cache, student = Cache.open(recorded), student_of(qwen, recorded)
    pipeline = Flux2KleinPipeline.from_pretrained(teacher, text_encoder=student, transformer=None, vae=None)
    with torch.no_grad():
        found_BTD, _ = pipeline.encode_prompt([p.text for p in cache.prompts], max_sequence_length=TEXT_LENGTH)
        ids_BT = torch.stack([torch.from_numpy(cache.padded_token_ids(row)) for row in range(len(PROMPTS))])
        assert torch.equal(found_BTD, student(ids_BT)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 20},
            "has a vocabulary of 20, but this teacher's has {tokens} tokens: a student of it reads the tokens of its "
            "language model; give one with the same tokenizer, such as Qwen/Qwen3-0.6B",
        ),
        (
            {"max_position_embeddings": 20},
            "has positions for 20 tokens, but the cache's token ids are 28: a student of this teacher reads all of "
            "them; give a longer one, such as Qwen/Qwen3-0.6B",
        ),
        (
            {"model_type": "t5"},
            "is a T5, but this teacher has a language model, whose tokens its student reads: give Qwen/Qwen3-0.6B, or "
            "another with the same tokenizer",
        ),
    ],
)
def test_a_student_that_cannot_read_the_tokens_is_refused(teacher, recorded, qwen, tmp_path, change, message):
    config = json.loads((qwen / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(StudentError) as error:
        student_of(tmp_path, recorded)
    assert str(error.value) == f"{tmp_path} {message.format(tokens=vocabulary_of(teacher))}"


def test_a_rank_is_that_of_one_layers_projection(recorded, qwen):
    with pytest.raises(SettingsError) as error:
        student_of(qwen, recorded, projection_rank=4)
    assert str(error.value) == (
        "--projection-rank is 4, expected 1 to 3: the text width is 8, and from half of it on two factors are not "
        "smaller than one matrix; give a smaller rank, or none"
    )


def test_a_student_only_fits_a_teacher_with_its_layers(recorded, qwen, tmp_path):
    stated, student = Cache.open(recorded).manifest.teacher, student_of(qwen, recorded)
    check_fits(student, 24, "s", layers=(9, 18, 27))
    message = (
        "s gives the layers 9, 18, 27, but this teacher reads the last layer of its text encoder: it was trained for "
        "another kind; train one from a cache of this one"
    )
    with pytest.raises(StudentError) as error:
        check_fits(student, 24, "s")
    assert str(error.value) == message
    save_student(student, tmp_path / "s", tokenizer=None)
    again = new_student(str(tmp_path / "s"), stated, init="pretrained", dropout=0.0, seed=0)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    make_encoder_folder(tmp_path / "bert")
    of_t5 = stated.model_copy(update={"text_layers": None, "text_encoder_config": {"vocab_size": 10}})
    other = new_student(str(tmp_path / "bert"), of_t5, init="auto", dropout=0.0, seed=0)
    with pytest.raises(StudentError) as error:
        check_fits(other, 24, "s", layers=(9, 18, 27))
    assert str(error.value) == (
        "s gives the last layer of its text encoder, but this teacher reads the layers 9, 18, 27: it was trained for "
        "another kind; train one from a cache of this one"
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"is_distilled": False},
            "has is_distilled = False, expected true: a base model is sampled with classifier-free guidance in two "
            "calls, which is not supported; give FLUX.2-klein-4B or FLUX.2-klein-9B",
        ),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 26},
            "has num_hidden_layers = 26, expected at least 27, the deepest layer that Flux2KleinPipeline reads: give "
            "FLUX.2-klein-4B or FLUX.2-klein-9B",
        ),
        (
            "text_encoder/config.json",
            {"hidden_size": "8"},
            "has hidden_size = '8', expected a number: download it again",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": None},
            "has no pad_token: download it again",
        ),
        (
            "transformer/config.json",
            {"guidance_embeds": True},
            "has guidance_embeds = True, in_channels = 16 and out_channels = None, expected false and equal numbers: "
            "it is none of FLUX.2-klein-4B, FLUX.2-klein-9B; give one of them",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"padding_side": "left"},
            "has padding_side = 'left', expected 'right': caches are padded on the right; download it again",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "<none>"},
            "the files in tokenizer/ do not state the id of the padding (KeyError: '<none>'): download tokenizer/ "
            "again",
        ),
    ],
)
def test_another_folder_is_refused_in_one_line(prompts, tmp_path, file, change, message):
    folder = make_klein(tmp_path / "teacher")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    with pytest.raises(TeacherError, match=re.escape(message)) as error:
        find_teacher(str(folder), build_parts(None))
        build(tmp_path / "c", folder, prompts)
    assert str(error.value) in (message, f"{folder / file} {message}")
    assert not (tmp_path / "c").exists()


def test_a_tokenizer_without_a_chat_template_or_with_a_damaged_one_is_refused(prompts, tmp_path):
    folder = make_klein(tmp_path / "teacher")
    template = folder / "tokenizer/chat_template.jinja"
    template.write_text("{% for message in %}")
    with pytest.raises(TeacherError, match="teacher/tokenizer cannot be loaded .*: download it again$"):
        build(tmp_path / "c", folder, prompts)
    template.unlink()
    with pytest.raises(TeacherError) as error:
        build(tmp_path / "c", folder, prompts)
    assert str(error.value) == (
        f"{folder}/tokenizer has no chat template, with which every prompt begins: download it again"
    )


def test_the_padding_of_published_tokenizers_is_found_among_the_tokens_of_their_configuration():
    config = {"pad_token": {"content": "<p>"}, "added_tokens_decoder": {"7": {"content": "<p>"}}}
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    assert KLEIN.pad_token_id({}, files) == KLEIN.pad_token_id({"pad_token_id": 3}, files) == 7


def test_a_plan_counts_the_cut_language_model_and_a_projection_for_each_layer(recorded, teacher, qwen):
    manifest = Cache.open(recorded).manifest
    folder = find_teacher(str(teacher), build_parts(None))
    network = TeacherTextEncoder.load(folder, dtype=torch.float32, device=CPU).model
    assert text_encoder_cost(manifest).parameters == sum(weight.numel() for weight in network.parameters())
    student = student_of(qwen, recorded)
    expected = sum(weight.numel() for weight in student.parameters())
    assert counted_student(str(qwen), manifest.teacher).parameters == expected
