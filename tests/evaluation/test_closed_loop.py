"""Sampling led from the cached noise ends where the teacher's ended, or as far from it as is measured."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from secondcast.evaluation.closed_loop import closed_loop
from secondcast.evaluation.held_out import held_out_trajectories
from secondcast.evaluation.on_cache import evaluate_on_cache
from secondcast.evaluation.pictures import distances as picture_distances
from secondcast.evaluation.pictures.distances import check_measurable, lpips_missing, psnr_db, ssim
from secondcast.evaluation.replaying import CacheStudent, cached_embeddings
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.recorded_backbone import load_recorded_backbone
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.evaluation.recorded import CPU, ROWS, build_recorded, replayed
from tests.trainer.test_train import Listening

pytest.importorskip("skimage")


def led(cache: Cache, teacher, text_encoders, count: int, lpips=None, keep=None):
    backbone = load_recorded_backbone(
        [cache.manifest], replayed(teacher), dtype=torch.float32, batch_rows=ROWS, options=MemoryOptions(),
        attention_backend=None, device=CPU,
    )  # fmt: skip
    decoder = ImageDecoder.load(replayed(teacher), recorded_geometry(cache.manifest.sampling), device=CPU)
    chosen = held_out_trajectories(cache)[:count]
    return closed_loop(
        cache, backbone, decoder, text_encoders, chosen, lpips=lpips, batch_size=ROWS, progress=Silent(), keep=keep
    )  # fmt: skip


@pytest.mark.thorough
def test_a_student_that_is_the_teacher_ends_where_it_ended_bit_for_bit(recorded, dev_teacher):
    cache = Cache.open(recorded)
    encoder = TeacherTextEncoder.load(replayed(dev_teacher), dtype=torch.float32, device=CPU)

    def taught(prompts):
        return encoder.encode(torch.from_numpy(np.stack([cache.padded_token_ids(prompt) for prompt in prompts])))

    text_encoders = {"student": taught, "teacher": cached_embeddings(cache, CPU)}
    # Five: the second batch is filled up.
    for found in led(cache, dev_teacher, text_encoders, 5).values():
        assert found.latent_fraction == (0.0,) * 5 and found.psnr_db == (None,) * 5 and found.ssim == (1.0,) * 5
        assert found.lpips is None


@pytest.mark.thorough
def test_a_student_ends_where_flux_pipeline_ends_with_its_embedding(tmp_path, student, dev_teacher):
    cache = Cache.open(build_recorded(tmp_path / "c", dev_teacher, guidance=(3.5,), held_out=ROWS, trained=0))
    opened = CacheStudent.open(student, cache, CPU)
    seen = []

    def distance(ours, theirs):
        seen.append((ours, theirs))
        return 0.25

    found = led(cache, dev_teacher, {"student": opened.embeddings}, ROWS, distance)["student"]
    recorded = [cache.trajectory(one.index) for one in held_out_trajectories(cache)]
    pipeline = FluxPipeline.from_pretrained(dev_teacher, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    text_BTD = opened.embeddings([trajectory.prompt for trajectory in recorded])
    noise_BSC = torch.from_numpy(np.stack([trajectory.noise_SC for trajectory in recorded]))
    final_BSC = pipeline(
        prompt_embeds=text_BTD, pooled_prompt_embeds=torch.zeros(ROWS, 8), height=16, width=16,
        num_inference_steps=3, guidance_scale=3.5, latents=noise_BSC, output_type="latent",
    ).images  # fmt: skip
    wanted = np.stack([trajectory.final_latent_SC for trajectory in recorded]).astype(np.float64)
    away = np.linalg.norm((final_BSC.numpy() - wanted).reshape(ROWS, -1), axis=1)
    assert found.latent_fraction == pytest.approx(away / np.linalg.norm(wanted.reshape(ROWS, -1), axis=1), rel=1e-12)
    assert min(found.latent_fraction) > 0
    decoder = ImageDecoder.load(replayed(dev_teacher), recorded_geometry(cache.manifest.sampling), device=CPU)
    for row, (ours, theirs) in enumerate(seen):
        assert np.array_equal(ours, decoder.decode(final_BSC[row : row + 1])[0])
        assert np.array_equal(theirs, decoder.decode(torch.from_numpy(recorded[row].final_latent_SC)[None])[0])
        assert found.psnr_db[row] == psnr_db(ours, theirs) and found.ssim[row] == ssim(ours, theirs)
    assert found.lpips == (0.25,) * ROWS


@pytest.mark.thorough
def test_each_picture_is_handed_on_once_the_recorded_one_first(student, recorded, dev_teacher):
    cache = Cache.open(recorded)
    text_encoders = {
        "student": CacheStudent.open(student, cache, CPU).embeddings,
        "teacher": cached_embeddings(cache, CPU),
    }
    kept = []
    # Five: the second batch is filled up.
    led(
        cache,
        dev_teacher,
        text_encoders,
        5,
        keep=lambda name, chosen, picture: kept.append((name, chosen.index, picture)),
    )
    indices = [one.index for one in held_out_trajectories(cache)][:5]
    assert [(name, index) for name, index, _ in kept] == [
        (name, index)
        for batch in (indices[:ROWS], indices[ROWS:])
        for names in (("recorded", "student"), ("teacher",))
        for index in batch
        for name in names
    ]
    pictures = {(name, index): picture for name, index, picture in kept}
    for index in indices:
        assert pictures["recorded", index].dtype == np.uint8 and pictures["recorded", index].shape == (16, 16, 3)
        assert np.array_equal(pictures["recorded", index], pictures["teacher", index])


@pytest.mark.thorough
def test_teacher_and_untrained_student_lead_beside_the_student(student, recorded, dev_teacher):
    heard = Listening()
    chosen = CacheScoring.from_flags(
        closed_loop=2, num_trajectories=4, random_baseline=True, batch_size=ROWS, timesteps=(0,), seed=5
    )
    found = evaluate_on_cache(student, Cache.open(recorded), replayed(dev_teacher), chosen, device=CPU, progress=heard)
    closed = found.closed_loop
    assert list(closed.text_encoders) == ["student", "teacher", "untrained"] and len(closed.trajectories) == 2
    assert {found.trajectories[place].sources for place in closed.trajectories} == {("few",), ("many",)}
    assert closed.text_encoders["teacher"].latent_fraction == (0.0, 0.0)
    ends = {closed.text_encoders[name].latent_fraction for name in ("student", "untrained")}
    assert len(ends) == 2 and all(min(end) > 0 for end in ends)
    assert "no LPIPS: AlexNet needs images of at least 31 pixels, these have 16" in heard.heard


@pytest.mark.thorough
def test_a_cache_without_embeddings_has_no_replay_error_and_no_teacher_that_leads(tmp_path, student, dev_teacher):
    cache = build_recorded(tmp_path / "c", dev_teacher, trained=0, held_out=ROWS, store_embeddings=False)
    heard = Listening()
    chosen = CacheScoring.from_flags(closed_loop=1, num_trajectories=1, batch_size=ROWS, timesteps=(0,))
    found = evaluate_on_cache(student, Cache.open(cache), replayed(dev_teacher), chosen, device=CPU, progress=heard)
    assert found.replay_error is None and list(found.closed_loop.text_encoders) == ["student"]
    assert (
        f"no replay error: {cache} was built with --no-store-embeddings; it needs a cache built with --store-embeddings"
    ) in heard.heard


PICTURES = st.integers(0, 255).flatmap(lambda a: st.tuples(st.just(a), st.integers(0, 255)))


@pytest.mark.thorough
@given(PICTURES)
def test_psnr_and_ssim_of_even_pictures_are_those_of_their_formulas(values):
    one, other = (np.full((16, 16, 3), value, dtype=np.uint8) for value in values)
    a, b = map(float, values)
    # Wang et al. 2004, equation 13: where nothing varies the term of luminance alone is left.
    constant = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * a * b + constant) / (a * a + b * b + constant), abs=1e-6)
    found = psnr_db(one, other)
    assert (found is None) == (a == b)
    if found is not None:
        assert found == pytest.approx(20 * np.log10(255 / abs(a - b)))


def test_what_lpips_wants_is_told_in_one_line():
    said = lpips_missing(64, 64)
    if find_spec("torchvision") is None:
        assert said == "no LPIPS: it needs torchvision; pip install torchvision"
    elif said is not None:
        assert "it needs AlexNet's weights in" in said


def test_what_pictures_cannot_be_measured_is_told_before_any_weight_is_read(monkeypatch):
    with pytest.raises(SettingsError, match=r"have 8 x 16 pixels, SSIM needs 11 x 11: give --closed-loop 0"):
        check_measurable(8, 16)
    monkeypatch.setattr(picture_distances, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secondcast\[metrics\]', or give --closed-loop 0"):
        check_measurable(64, 64)
