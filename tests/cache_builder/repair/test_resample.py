"""`inspect verify --resample`: the teacher gives the recorded bits again, or it is said how far off and why."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from secondcast import cli
from secondcast.cache_builder.repair import resample as module
from secondcast.cache_builder.repair.resample import changes, recompute
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.errors import NotInCacheError, SettingsMismatchError
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.writer import CacheWriter
from tests.cache_builder.building import build_cache
from tests.cache_builder.test_codec_flags import StopIn

CASES = {
    "zarr": {"format": "zarr", "dtype": "float32"},
    "webdataset": {"format": "webdataset", "dtype": "float32"},
    "none": {"store_embeddings": False, "dtype": "float32"},
    "int8": {"compression": "int8", "latents": "stored"},
    "clip": {"pooled": "clip", "dtype": "float32", "attention_backend": "_native_math", "resolution": 16},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "animals.txt"
    file.write_text("".join(f"a red dog {i}\n" for i in range(7)))
    return file


@pytest.fixture(scope="module")
def caches(tmp_path_factory, dev_teacher, prompts):
    """Seven prompts, two samples each, shards of five, batches of two: the last of a shard is of one."""
    folder = tmp_path_factory.mktemp("caches")
    for name, flags in CASES.items():
        build_cache(folder / name, dev_teacher, prompts, samples_per_prompt=2, shard_size=5, steps=3, **flags)
    return folder


def recomputed(path, teacher, count=14, seed=0):
    folder = find_teacher(str(teacher), build_parts(read_manifest(open_folder(path)).teacher.pooled))
    return recompute(path, folder, torch.device("cpu"), Silent(), count=count, seed=seed)


def secondcast(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["secondcast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out.splitlines(), captured.err


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_every_trajectory_comes_out_bit_for_bit(caches, dev_teacher, name):
    made = recomputed(caches / name, dev_teacher)
    assert [m.index for m in made] == list(range(14))
    assert all(m.bit_equal and m.differs == () and not m.is_fault for m in made)
    assert all(m.velocity_errors == (0.0, 0.0, 0.0) for m in made)
    assert {m.embedding_error for m in made} == ({None} if name == "none" else {0.0})
    assert {m.pooled_error for m in made} == ({0.0} if name == "clip" else {None})


@pytest.mark.thorough
def test_the_seed_draws_and_no_more_than_whole_batches_are_sampled(caches, dev_teacher, monkeypatch):
    sampled = []
    real = module.sample_shard

    def watching(cache, backbone, shard, *rest):
        sampled.append((shard.first, shard.rows))
        return real(cache, backbone, shard, *rest)

    monkeypatch.setattr(module, "sample_shard", watching)
    drawn = [m.index for m in recomputed(caches / "zarr", dev_teacher, count=3, seed=5)]
    assert drawn == [m.index for m in recomputed(caches / "zarr", dev_teacher, count=3, seed=5)]
    assert drawn != [m.index for m in recomputed(caches / "zarr", dev_teacher, count=3, seed=6)]
    batches = [(0, 2), (2, 2), (4, 1), (5, 2), (7, 2), (9, 1), (10, 2), (12, 2)]
    expected = [(first, rows) for first, rows in batches if set(range(first, first + rows)) & set(drawn)]
    assert sampled[: len(expected)] == expected and set(sampled) <= set(batches)


def test_a_backend_that_does_not_work_here_is_replaced_by_torchs_own_and_that_is_said(caches, dev_teacher, monkeypatch):
    monkeypatch.setattr("secondcast.cache_builder.teacher_models.backend_of_record", lambda name: "flash")
    made = recomputed(caches / "clip", dev_teacher, count=4)
    assert {m.differs for m in made} == {("attention _native_math -> sdpa",)} and not any(m.is_fault for m in made)
    # Another backend gives other bits: those of the recorded one are what the case above is equal to.
    assert not all(m.bit_equal for m in made) and max(max(m.velocity_errors) for m in made) < 1e-4


def test_other_weights_of_clip_are_refused(tmp_path, caches, dev_teacher):
    shutil.copytree(dev_teacher, tmp_path / "t")
    file = tmp_path / "t/text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("final_layer_norm.weight"))
    save_file(tensors | {name: tensors[name] * 2}, file)
    with pytest.raises(
        SettingsMismatchError, match=r"with teacher\.weights\.text_encoder/model\.safetensors = .* give the rec"
    ):
        recomputed(caches / "clip", tmp_path / "t")
    assert all(m.bit_equal for m in recomputed(caches / "zarr", tmp_path / "t", count=2))


def commit_otherwise(path, dev_teacher, prompts, monkeypatch, *, provenance, **flags):
    """A cache whose first velocity of trajectory 1 and embedding of prompt 2 are off by one in a thousand.

    With CLIP the pooled vector of prompt 3, too.
    """
    real = CacheWriter.commit

    def off(writer, kind, shard, arrays: Arrays, **how):
        if shard.shard == 0 and kind == "embeddings":
            arrays["encoder_hidden_states"][2] *= 1.001
            if "pooled_projections" in arrays:
                arrays["pooled_projections"][3] *= 1.001
        if shard.shard == 0 and kind == "trajectories":
            arrays["velocity"][1, 0] *= 1.001
        return real(writer, kind, shard, arrays, **(how | {"provenance": how["provenance"] | provenance}))

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "commit", off)
        build_cache(path, dev_teacher, prompts, steps=3, shard_size=4, latents="stored", dtype="float32", **flags)


@pytest.mark.thorough
def test_another_pooled_vector_is_a_fault(tmp_path, dev_teacher, prompts, monkeypatch, capsys):
    commit_otherwise(tmp_path / "c", dev_teacher, prompts, monkeypatch, provenance={}, pooled="clip")
    made = recomputed(tmp_path / "c", dev_teacher)
    assert [m.index for m in made if m.is_fault] == [1, 2, 3]
    assert (made[2].embedding_error, made[2].pooled_error) == (pytest.approx(0.001 / 1.001, rel=1e-3), 0.0)
    assert (made[3].embedding_error, made[3].pooled_error) == (0.0, pytest.approx(0.001 / 1.001, rel=1e-3))
    # The teacher is the one that the manifest names.
    words = ("inspect", "verify", tmp_path / "c", "--resample", 7, "--device", "cpu", "--quiet")
    code, lines, _ = secondcast(monkeypatch, capsys, *words)
    assert code == 1 and lines[4].endswith("0.0e+00; of the embedding 0.0e+00; of the pooled vector 1.0e-03")
    assert lines[-1].endswith("the velocity 1.0e-03, of the embedding 1.0e-03, of the pooled vector 1.0e-03")


@pytest.mark.thorough
def test_other_bits_are_a_fault_and_told_step_by_step(tmp_path, dev_teacher, prompts, monkeypatch, capsys):
    commit_otherwise(tmp_path / "c", dev_teacher, prompts, monkeypatch, provenance={})
    made = recomputed(tmp_path / "c", dev_teacher)
    # The backbone gets the recorded embedding, so that the one that is off does not reach the velocity.
    assert [m.index for m in made if m.is_fault] == [1, 2]
    off = 0.001 / 1.001
    assert made[1].velocity_errors == (pytest.approx(off, rel=1e-3), 0.0, 0.0) and made[1].embedding_error == 0.0
    assert made[2].velocity_errors == (0.0, 0.0, 0.0) and made[2].embedding_error == pytest.approx(off, rel=1e-3)

    words = ("inspect", "verify", tmp_path / "c", "--resample", 99, "--device", "cpu", "--quiet")
    code, lines, _ = secondcast(monkeypatch, capsys, *words)
    key = made[1].key
    assert code == 1 and lines[2] == (
        f"{key}: bits differ (recorded under the same conditions); relative error of the velocity by step "
        f"1.0e-03 0.0e+00 0.0e+00; of the embedding 0.0e+00"
    )
    assert lines[-1] == "5 of 7 recomputed bit for bit; largest error of the velocity 1.0e-03, of the embedding 1.0e-03"
    code, lines, _ = secondcast(monkeypatch, capsys, *words, "--json")
    found = json.loads("\n".join(lines))
    assert code == 1 and found["problems"] == [] and [m["bit_equal"] for m in found["recomputed"]].count(False) == 2
    assert found["recomputed"][1]["velocity_errors"][0] == pytest.approx(off, rel=1e-3)


@pytest.mark.thorough
def test_where_it_was_recorded_otherwise_that_is_said_and_is_no_fault(
    tmp_path, dev_teacher, prompts, monkeypatch, capsys
):
    elsewhere = {"device": "NVIDIA H100", "threads": 7}
    commit_otherwise(tmp_path / "c", dev_teacher, prompts, monkeypatch, provenance=elsewhere)
    words = ("inspect", "verify", tmp_path / "c", "--resample", 7, "--device", "cpu", "--quiet")
    code, lines, _ = secondcast(monkeypatch, capsys, *words)
    assert code == 0 and lines[-1].startswith("5 of 7 recomputed bit for bit; ")
    assert (
        "bits differ (recorded with other device NVIDIA H100 -> " in lines[2] and "threads 7 -> 1); relati" in lines[2]
    )


def test_the_threads_of_the_host_explain_nothing_on_a_gpu():
    was, now = {"device": "H100", "threads": 8, "torch": "2.12"}, {"device": "H100", "threads": 4, "torch": "2.13"}
    assert changes(was, now, on_gpu=True) == ["torch 2.12 -> 2.13"]
    assert changes(was, now, on_gpu=False) == ["torch 2.12 -> 2.13", "threads 8 -> 4"]


def test_embeddings_of_unknown_batches_make_no_fault(tmp_path, dev_teacher, prompts):
    flags = {"store_embeddings": False, "dtype": "float32", "steps": 2, "shard_size": 4}
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, prompts, batch_size=4, progress=StopIn("sample", 2), **flags)
    build_cache(tmp_path / "c", dev_teacher, prompts, batch_size=1, **flags)
    made = recomputed(tmp_path / "c", dev_teacher)
    said = "embeddings not stored, and shards of batch sizes [1, 4]: theirs is unknown"
    assert {m.differs for m in made} == {(said,)} and not any(m.is_fault for m in made)
    assert max(max(m.velocity_errors) for m in made) < 1e-4


def test_a_converted_cache_gives_its_bits_and_says_that_it_is_a_copy(tmp_path, caches, dev_teacher):
    convert(Cache.open(caches / "zarr"), tmp_path / "c", Silent(), format="webdataset")
    made = recomputed(tmp_path / "c", dev_teacher, count=5)
    assert all(m.bit_equal for m in made)
    assert {m.differs for m in made} == {("copied from another cache, possibly with other batches",)}


def test_another_teacher_and_an_empty_cache_are_refused(tmp_path, caches, dev_teacher, schnell_teacher, prompts):
    with pytest.raises(SettingsMismatchError, match=r"zarr was recorded with teacher\.\S+ = .*, this teacher has "):
        recomputed(caches / "zarr", schnell_teacher)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, prompts, progress=StopIn("text", 1))
    with pytest.raises(
        NotInCacheError, match=rf"{tmp_path}/c has no trajectory to recompute yet: run the build command first"
    ):
        recomputed(tmp_path / "c", dev_teacher)


@pytest.mark.thorough
def test_an_unfinished_cache_is_recomputed_as_far_as_it_goes_with_the_teacher_it_names(
    tmp_path, dev_teacher, prompts, monkeypatch, capsys
):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, prompts, progress=StopIn("sample", 3))
    words = ("inspect", "verify", tmp_path / "c", "--resample", 20, "--device", "cpu", "--quiet")
    code, lines, _ = secondcast(monkeypatch, capsys, *words)
    assert code == 0 and len(lines) == 5 and "2 shards not built yet, 0 problems" in lines[0]
    assert lines[-1].startswith(
        "3 of 3 recomputed bit for bit; largest error of the velocity 0.0e+00, of the embedding"
    )


def test_a_damaged_cache_is_not_recomputed(tmp_path, caches, monkeypatch, capsys):
    shutil.copytree(caches / "webdataset", tmp_path / "c")
    (tmp_path / "c/trajectories/000001.tar").write_bytes(b"")
    words = ("inspect", "verify", tmp_path / "c", "--resample", 1, "--teacher", "nobody", "--quiet")
    code, lines, heard = secondcast(monkeypatch, capsys, *words)
    assert code == 1 and lines[0].endswith(", 1 problem") and heard == ""
