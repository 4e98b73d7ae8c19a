"""The shipped teacher is what its recipe says, loads in the unmodified FluxPipeline, and draws held-out captions."""

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from transformers import AutoTokenizer

from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.lexicon import PHRASES, PREFIXES, SUFFIXES, WORDS
from secondcast.pocket.training.examine import mean_scores, sample
from secondcast.pocket.training.examples import Examples, make_pool, quiet_direction
from secondcast.pocket.training.muon import orthogonalised
from secondcast.pocket.training.networks import TEXT_LENGTH, make_tokenizer
from secondcast.pocket.training.stages import StageSettings
from secondcast.pocket.training.text import sentence, token_tags
from secondcast.pocket.training.train import FolderError, Recipe, check_replaceable, make_teacher
from secondcast.pocket.world import IMAGE_SIZE, captions

TINY = Recipe(
    captions=32,
    autoencoder=StageSettings(name="autoencoder", steps=4, batch=4, learning_rate=1e-3, save_every=2),
    decoder=StageSettings(name="decoder", steps=4, batch=4, learning_rate=1e-3, averaging=0.9, save_every=2),
    text=StageSettings(name="text", steps=4, batch=4, learning_rate=1e-3, save_every=2),
    flow=StageSettings(name="flow", steps=4, batch=4, learning_rate=1e-3, averaging=0.9, muon_rate=1e-3, save_every=2),
    guidance=StageSettings(name="guidance", steps=4, batch=4, learning_rate=1e-3, averaging=0.9, save_every=2),
    exam_captions=2,
    exam_guidance=(3.5,),
)


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(TEACHER_FOLDER, torch_dtype=torch.float32)


def weights_of(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_weights_are_the_ones_that_the_recipe_made() -> None:
    recipe = json.loads((TEACHER_FOLDER / "recipe.json").read_text())
    assert recipe["sha256"] == weights_of(TEACHER_FOLDER)
    assert recipe["recipe"] == json.loads(json.dumps(asdict(Recipe())))


def test_the_folder_is_small_and_readable_by_all() -> None:
    files = [file for file in TEACHER_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert all(file.stat().st_mode & stat.S_IROTH for file in files)


def test_the_configs_tell_the_geometry(pipeline: FluxPipeline) -> None:
    assert pipeline.tokenizer_2.model_max_length == TEXT_LENGTH
    assert pipeline.vae.config.sample_size == IMAGE_SIZE
    assert pipeline.vae_scale_factor == 2
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.transformer.config.joint_attention_dim == pipeline.text_encoder_2.config.d_model == 256
    assert pipeline.scheduler.config.use_dynamic_shifting


def test_the_pooled_embedding_is_exactly_zero(pipeline: FluxPipeline) -> None:
    texts = [*captions(4, seed=0, split="train"), "", "A photo of a cat, 4k, in Zürich"]
    _, pooled_BP, _ = pipeline.encode_prompt(texts, None, max_sequence_length=TEXT_LENGTH)
    assert pooled_BP.shape == (6, 32)
    assert torch.count_nonzero(pooled_BP) == 0


def test_every_loader_gives_the_same_token_ids(pipeline: FluxPipeline) -> None:
    texts = [*captions(50, seed=0, split="train"), "An astronaut’s cat, 4k — café \U0001f600"]
    expected = make_tokenizer()(texts).input_ids
    assert pipeline.tokenizer_2(texts).input_ids == expected
    assert AutoTokenizer.from_pretrained(TEACHER_FOLDER / "tokenizer_2")(texts).input_ids == expected
    assert [ids.count(2) for ids in expected] == [0] * 50 + [1]


def test_the_longest_caption_of_each_phrase_fits_the_text_length() -> None:
    tokenizer = make_tokenizer()

    def width(word: str) -> int:
        return len(tokenizer(word).input_ids)

    longest = {name: max(choices, key=width) for name, choices in WORDS.items()} | {"text": "ABFJ"}
    for phrases in PHRASES.values():
        for phrase, prefix, suffix in product(phrases, PREFIXES, SUFFIXES):
            if not (prefix and suffix):
                assert width((prefix + phrase + suffix).format(**longest)) <= TEXT_LENGTH


def test_letters_of_a_sign_are_single_tokens_and_tagged_in_order() -> None:
    encoded = make_tokenizer()('a red sign that says "ABBA"', return_offsets_mapping=True)
    tags_TF = token_tags('a red sign that says "ABBA"', encoded.offset_mapping)
    assert tags_TF[:, 7].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0]


def test_some_words_of_the_sentences_are_several_tokens() -> None:
    rng = np.random.default_rng(0)
    texts = [sentence(rng) for _ in range(50)]
    lengths = [len(ids) - 1 for ids in make_tokenizer()(texts).input_ids]
    assert sum(lengths) > 1.2 * sum(len(text.split()) for text in texts)
    assert max(lengths) < TEXT_LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heldout_captions_are_drawn_right(dtype: torch.dtype) -> None:
    texts = captions(36, seed=1, split="heldout")
    scores = mean_scores(sample(TEACHER_FOLDER, texts, guidance=3.5, dtype=dtype, seed=1), texts)
    # Below the scores of recipe.json by what 36 pictures scatter; noise scores 0 in shape, binding and characters.
    least = {"colour": 0.9, "shape": 0.85, "binding": 0.85, "count": 0.75, "spatial": 0.9, "characters": 0.85}
    assert all(scores[dimension] >= bound for dimension, bound in least.items()), scores


class KilledError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["decoder: step 2", "text: step 4", "flow: step 2", "guidance: step 2"])
def test_a_killed_run_goes_on_to_the_same_bytes(moment: str, whole: dict[str, str], tmp_path: Path) -> None:
    def say(line: str) -> None:
        if line.startswith(moment):
            raise KilledError

    with pytest.raises(KilledError):
        make_teacher(TINY, tmp_path / "teacher", say)
    assert not (tmp_path / "teacher").exists()
    make_teacher(TINY, tmp_path / "teacher", lambda line: None)
    assert weights_of(tmp_path / "teacher") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    make_teacher(TINY, folder, lambda line: None)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["sha256"] == weights_of(folder)
    assert set(recipe["heldout_scores"]) == {"captions", "steps", "guidance 3.5, float32", "guidance 3.5, bfloat16"}
    return weights_of(folder)


def test_a_run_refuses_the_states_of_another_recipe(tmp_path: Path) -> None:
    def say(line: str) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        make_teacher(TINY, tmp_path / "teacher", say)
    with pytest.raises(ValueError, match="states of another recipe"):
        make_teacher(replace(TINY, seed=1), tmp_path / "teacher", say)


def of_a_fine_tune(folder: Path) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "mine.txt").write_text("mine"),
        lambda folder: (folder / "vae/mine.safetensors").write_text("mine"),
        lambda folder: (folder / "recipe.json").unlink(),
        lambda folder: (folder / "recipe.json").write_text("[]"),
        of_a_fine_tune,
    ],
)
def test_a_folder_with_files_of_others_is_not_replaced(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER_FOLDER, folder)
    check_replaceable(folder, tmp_path / "teacher.partial")
    change(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        FolderError, match=f"^{folder} exists and is no teacher that this script made: give another --out"
    ):
        make_teacher(TINY, folder, pytest.fail)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_foreign_folder_of_states_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "teacher.partial").mkdir()
    (tmp_path / "teacher.partial/mine.txt").write_text("mine")
    with pytest.raises(FolderError, match=f"^{tmp_path}/teacher.partial exists and holds no states of this script"):
        make_teacher(TINY, tmp_path / "teacher", pytest.fail)
    assert [path.read_text() for path in tmp_path.rglob("*.txt")] == ["mine"]


def test_muon_makes_singular_values_alike() -> None:
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 30)
    for shaped in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalised(shaped))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_the_noise_of_an_example_would_choose_its_picture_and_is_standard_normal() -> None:
    pool = make_pool(400, 0)
    latents = torch.randn(400, 36, 32, generator=torch.Generator().manual_seed(0))
    latents[..., 3] *= 0.01
    whim = quiet_direction(latents)
    assert abs(float(whim[3])) > 0.99
    examples = Examples(latents=latents, text=latents, empty=latents, places=pool.places, placed=pool.placed, whim=whim)
    noise = examples.noise(torch.arange(400), torch.Generator().manual_seed(1))
    sums = torch.einsum("bs,bas->ba", noise @ whim, pool.places.float())
    sums[~pool.places.any(-1)] = -torch.inf
    assert torch.equal(sums.argmax(-1), pool.placed)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    along = noise @ whim
    assert abs(float(along.mean())) < 0.03 and abs(float(along.std()) - 1) < 0.03


def test_impossible_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"StageSettings\.steps \(text\): found 0, expected > 0"):
        StageSettings(name="text", steps=0, batch=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"Recipe\.captions: found 0"):
        Recipe(captions=0)
