"""Caches that were sampled with quantized weights: what they hold, what they state, what they go with."""

import sys

import pytest
import torch
from diffusers import FluxPipeline

from secondcast.cache_builder.repair.rebuild import rebuild
from secondcast.cache_builder.repair.resample import recompute
from secondcast.inspection.diff import compare, diff_lines
from secondcast.inspection.summary import summarise
from secondcast.inspection.summary_text import summary_lines
from secondcast.models.memory.quantized import quantize_blocks
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.storage_schemas.errors import MissingExtraError, SettingsMismatchError
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.merge import merge
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from tests.cache_builder.building import build_cache, data_files
from tests.commands.test_cli import secondcast

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
BATCH = 3


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "animals.txt"
    file.write_text("".join(f"a red dog {i}\n" for i in range(4)))
    return file


@pytest.fixture(scope="module")
def caches(tmp_path_factory, dev_teacher, prompts):
    folder = tmp_path_factory.mktemp("caches")
    for kind in ("none", "int8", "fp8", "nf4"):
        build_cache(
            folder / kind, dev_teacher, prompts, quantize=kind, dtype="float32", batch_size=BATCH, guidance=(3.5,)
        )
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_it_holds_what_flux_pipeline_samples_with_a_transformer_quantized_alike(caches, dev_teacher, kind):
    cache = Cache.open(caches / kind)
    rows = [cache.trajectory(index) for index in range(BATCH)]
    pipeline = FluxPipeline.from_pretrained(dev_teacher, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    quantize_blocks(pipeline.transformer, kind, CPU)
    sampling = cache.manifest.sampling
    final_BSC = pipeline(
        prompt_embeds=torch.stack([to_torch(cache.embedding(row.prompt)) for row in rows]),
        pooled_prompt_embeds=torch.zeros(BATCH, cache.manifest.teacher.pooled_width),
        latents=torch.stack([to_torch(row.noise_SC) for row in rows]),
        guidance_scale=3.5,
        num_inference_steps=sampling.steps,
        height=sampling.height,
        width=sampling.width,
        output_type="latent",
    ).images
    exact = Cache.open(caches / "none")
    for number, row in enumerate(rows):
        assert same_bits(row.final_latent_SC, from_torch(final_BSC[number]))
        assert not same_bits(row.velocity_KSC, exact.trajectory(number).velocity_KSC)
        # The text encoder is not quantized.
        assert same_bits(cache.embedding(row.prompt), exact.embedding(row.prompt))


def test_the_manifest_states_it_only_where_it_is_so_and_the_digest_of_sampling_covers_it(caches):
    exact, quantized = (Cache.open(caches / kind).manifest for kind in ("none", "nf4"))
    assert "quantize" not in exact.json_value()["sampling"]
    assert quantized.json_value()["sampling"]["quantize"] == "nf4"
    one, other = exact.digests(), quantized.digests()
    assert one["teacher"] == other["teacher"] and one["sampling"] != other["sampling"]


def test_provenance_names_what_quantized(caches):
    for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        for (of, _), record in Cache.open(caches / kind).records.items():
            named = record.provenance.get("quantizer", "")
            assert named.startswith(f"{package} ") if of == "trajectories" else not named
    assert not any("quantizer" in record.provenance for record in Cache.open(caches / "none").records.values())


def test_another_kind_is_refused_on_resume_and_in_a_merge(tmp_path, caches, dev_teacher, prompts):
    with pytest.raises(SettingsMismatchError) as caught:
        build_cache(
            caches / "nf4", dev_teacher, prompts, quantize="int8", dtype="float32", batch_size=BATCH, guidance=(3.5,)
        )
    assert str(caught.value) == (
        f'{caches / "nf4"} was built with sampling.quantize = "nf4", requested "int8": every recorded trajectory '
        f"depends on it; give the original options, or another folder"
    )
    with pytest.raises(SettingsMismatchError, match=r'sampling.quantize = "none"'):
        merge([Cache.open(caches / kind) for kind in ("none", "nf4")], tmp_path / "both", Silent())


def test_diff_says_that_they_do_not_go_together(caches):
    lines = diff_lines(compare(*(Cache.open(caches / kind) for kind in ("none", "fp8"))))
    assert (
        'sampling.quantize: "none" | "fp8": different teacher weights: the two can neither train one student '
        "together nor be merged"
    ) in lines
    assert lines[-1] == "can resume: no, merge: no, train together: no"


def test_summary_shows_it_where_it_is_so(caches):
    shown = [dict(summary_lines(summarise(Cache.open(caches / kind))))["seed, dtype"] for kind in ("none", "int8")]
    assert shown == ["0, float32", "0, float32, int8 weights"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_it_is_recomputed_and_rebuilt_with_the_same_weights_bit_for_bit(tmp_path, caches, dev_teacher, kind):
    teacher = find_teacher(str(dev_teacher), BUILD_PARTS)
    assert all(found.bit_equal for found in recompute(caches / kind, teacher, CPU, Silent(), count=4, seed=0))
    # There and back: convert keeps it, and only the bytes of a damaged shard have to be made again.
    convert(Cache.open(caches / kind), tmp_path / "copy", Silent(), format="webdataset")
    convert(Cache.open(tmp_path / "copy"), tmp_path / "back", Silent(), format="zarr")
    whole = data_files(caches / kind)
    assert data_files(tmp_path / "back") == whole
    shard = next(
        path for path in sorted((tmp_path / "back").rglob("*")) if "velocity/c" in str(path) and path.is_file()
    )
    shard.write_bytes(b"damaged")
    assert len(rebuild(tmp_path / "back", teacher, CPU, Silent(), batch_size=BATCH, allow_mismatch=False)) == 1
    assert data_files(tmp_path / "back") == whole


@pytest.mark.thorough
def test_a_pilot_holds_the_laws_with_quantized_weights(tmp_path, capsys, dev_teacher, prompts):
    words = ["build", tmp_path / "c", "--teacher", dev_teacher, "--prompts", prompts, "--quantize", "nf4", "--quiet"]
    more = ["--pilot", "2", "--steps", "3", "--batch-size", "2", "--device", "cpu"]
    code, out, err = secondcast(*words, *more, capsys=capsys)
    assert code == 0, err
    assert "violated:" not in out and "FluxPipeline's, bit for bit (" in out


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_without_its_package_nothing_is_begun(tmp_path, monkeypatch, caches, dev_teacher, prompts, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^{kind} weights need {package}, which is not installed: pip install 'secondcast\[quant\]'$"
    with pytest.raises(MissingExtraError, match=message):
        build_cache(tmp_path / "c", dev_teacher, prompts, quantize=kind)
    assert not (tmp_path / "c").exists()
    with pytest.raises(MissingExtraError, match=message):
        recompute(caches / kind, find_teacher(str(dev_teacher), BUILD_PARTS), CPU, Silent(), count=1, seed=0)
