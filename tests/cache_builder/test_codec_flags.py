"""--compression and --embeddings: what a build keeps, and that a kill at any point loses nothing."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from secondcast.storage_schemas.errors import NotInCacheError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.writer import CacheWriter
from tests.cache_builder.building import build_cache, data_files

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


class StopIn(Silent):
    """Ctrl-C at the n-th unit of a stage."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage, self.left = stage, count

    def bar(self, title, **counts):
        return nullcontext(self if title == self.stage else Silent())

    def advance(self, count, note=""):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def holds_embeddings(path: Path) -> list[str]:
    files = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    return [name for name in files if "embeddings" in name and not name.endswith("zarr.json")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "animals.txt"
    file.write_text("".join(f"a red dog {i}\n" for i in range(6)))
    for form in ("zarr", "webdataset"):
        build_cache(folder / form, dev_teacher, file, format=form, store_embeddings=False)
    return folder


@pytest.mark.thorough
@BOTH
def test_a_finished_cache_without_embeddings_has_no_trace_of_them_and_the_same_trajectories(
    tmp_path, dev_teacher, whole, form
):
    build_cache(tmp_path / "kept", dev_teacher, whole / "animals.txt", format=form)
    kept, cache = Cache.open(tmp_path / "kept"), Cache.open(whole / form)
    assert cache.finished and len(cache) == 6 and not holds_embeddings(whole / form)
    assert {kind for kind, _ in cache.records} == {"trajectories"}
    for i in range(6):
        assert same_bits(cache.trajectory(i).velocity_KSC, kept.trajectory(i).velocity_KSC)
    with pytest.raises(
        NotInCacheError, match=r"embedding of prompt 2 is not in .*--no-store-embeddings; build another cache"
    ):
        cache.embedding(2)


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize(("stage", "count"), [("text", 1), ("text", 2), ("sample", 1), ("sample", 3), ("sample", 4)])
def test_stopped_in_any_stage_it_ends_with_the_same_bytes(tmp_path, dev_teacher, whole, form, stage, count):
    flags = {"format": form, "store_embeddings": False}
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", progress=StopIn(stage, count), **flags)
    assert holds_embeddings(tmp_path / "c")
    build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", **flags)
    assert Cache.open(tmp_path / "c").finished and not holds_embeddings(tmp_path / "c")
    assert data_files(tmp_path / "c") == data_files(whole / form)


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("deleted", [0, 1, 2, 3])
def test_stopped_while_dropping_it_drops_the_rest_without_the_teacher(
    tmp_path, dev_teacher, whole, form, deleted, monkeypatch
):
    flags = {"format": form, "store_embeddings": False}
    left = deleted
    unlink = Path.unlink

    def interrupted(path, **how):
        nonlocal left
        if "embeddings" in str(path) and not path.name.startswith("."):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        unlink(path, **how)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", **flags)
    cache = Cache.open(tmp_path / "c")
    assert not cache.finished and len(cache) == 6 and holds_embeddings(tmp_path / "c")
    monkeypatch.setattr(CacheWriter, "commit", None)
    build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", **flags)
    assert Cache.open(tmp_path / "c").finished and data_files(tmp_path / "c") == data_files(whole / form)


@pytest.mark.thorough
def test_a_lost_shard_is_sampled_anew_and_the_embeddings_go_again(tmp_path, dev_teacher, whole):
    build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", store_embeddings=False)
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000001.json").unlink()
    build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", store_embeddings=False)
    assert not holds_embeddings(tmp_path / "c") and data_files(tmp_path / "c") == data_files(whole / "zarr")


@pytest.mark.thorough
@BOTH
def test_every_codec_records_the_same_latents(tmp_path, dev_teacher, whole, form):
    caches = {}
    for compression in ("none", "lossless", "int8"):
        flags = {"compression": compression, "latents": "stored", "format": form}
        build_cache(tmp_path / compression, dev_teacher, whole / "animals.txt", **flags)
        caches[compression] = Cache.open(tmp_path / compression)
        assert caches[compression].manifest.sampling.storage.compression == compression
    for i in range(6):
        plain, compact, int8 = (caches[compression].trajectory(i) for compression in ("none", "lossless", "int8"))
        assert same_bits(plain.velocity_KSC, compact.velocity_KSC)
        assert same_bits(plain.hidden_states_KSC, int8.hidden_states_KSC)
        difference = int8.velocity_KSC.astype("f4") - plain.velocity_KSC.astype("f4")
        assert 0 < (difference**2).sum() < 1e-3 * (plain.velocity_KSC.astype("f4") ** 2).sum()


def test_compact_is_what_a_build_takes_by_itself(whole):
    assert Cache.open(whole / "zarr").manifest.sampling.storage.compression == "lossless"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"compression": "int8"}, r"compression int8 rounds the velocity, .* exact one; use --latents stored"),
        ({"compression": "zip"}, r"--compression is 'zip', expected 'none', 'lossless' or 'int8'"),
        ({"store_embeddings": "some"}, "--store-embeddings is .some., expected true or false"),
    ],
)
def test_codecs_that_do_not_go_are_refused_by_name(tmp_path, dev_teacher, whole, flags, message):
    with pytest.raises(SettingsError, match=message):
        build_cache(tmp_path / "c", dev_teacher, whole / "animals.txt", **flags)
    assert not (tmp_path / "c").exists()
