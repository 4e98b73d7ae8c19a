"""The manifest: digests that outlive what was added after them."""

import pytest

from secondcast.storage_schemas.errors import SettingsMismatchError
from secondcast.storage_schemas.schema.comparing import check_same_settings
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.storage_schemas.caches import some_manifest, some_prompts

# As version 1 wrote them before storage.embeddings existed.
DIGESTS = {
    "teacher": "614f1906f2c7ea7cb48a9cff9231622c",
    "sampling": "49e7503fdae2c56f11c1783c017203a6",
    "prompts": "8949069487179e4fab144ac46542b025",
}


def test_a_manifest_without_the_embeddings_key_reads_and_keeps_its_digests():
    manifest = some_manifest(some_prompts(3))
    data = manifest.encode()
    assert manifest.digests() == DIGESTS and b'"embeddings"' not in data
    read = Manifest.decode(data, "manifest.json")
    assert read == manifest and read.sampling.storage.embeddings == "stored"


def test_a_cache_without_embeddings_says_so_in_its_manifest_and_its_digest():
    manifest = some_manifest(some_prompts(3), embeddings="none")
    assert manifest.digests()["sampling"] != DIGESTS["sampling"] and b'"embeddings": "none"' in manifest.encode()
    assert Manifest.decode(manifest.encode(), "manifest.json") == manifest
    with pytest.raises(SettingsMismatchError, match='sampling.storage.embeddings = "stored", requested "none"'):
        check_same_settings(some_manifest(some_prompts(3)), manifest, "c")


def test_the_manifest_names_the_codec():
    manifest = some_manifest(some_prompts(3), compression="int8", latents="stored")
    assert b'"compression": "int8"' in manifest.encode()
    with pytest.raises(SettingsMismatchError, match='sampling.storage.compression = "int8", requested "lossless"'):
        check_same_settings(manifest, some_manifest(some_prompts(3), compression="lossless", latents="stored"), "c")
