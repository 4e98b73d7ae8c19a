"""Every part of a manifest has its consequence, looked up by the names that manifests have now."""

import pytest

from secondcast.storage_schemas.schema.comparing import _FOLLOWS, consequence
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Sampling, Storage, TextRecording


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("sampling.storage.compression", "different compression: `secondcast convert` makes them equal (only towards "),
        ("sampling.storage.embeddings", "one has no embeddings: `secondcast convert --no-store-embeddings` makes"),
        ("sampling.storage.format", "the same trajectories in another storage format: "),
        ("sampling.seed", "different noise: "),
        ("prompts.segments[0].samples_per_prompt", "different prompts, or another order or sharding of them: "),
        ("source", "informational only: no consequence"),
    ],
)
def test_a_difference_has_its_consequence(field, text):
    assert consequence(field).startswith(text)


def test_every_name_with_a_consequence_is_one_of_the_manifest():
    names = {field.alias or name for name, field in Manifest.model_fields.items()} | {"provenance"}
    names |= {f"text.{name}" for name in TextRecording.model_fields}
    names |= {f"sampling.{name}" for name in Sampling.model_fields}
    names |= {f"sampling.storage.{name}" for name in Storage.model_fields}
    assert {name for name, _ in _FOLLOWS} <= names
