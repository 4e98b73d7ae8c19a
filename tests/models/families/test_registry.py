"""Families are found by what a manifest, a folder or a transformer states."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers import FluxTransformer2DModel, LuminaNextDiT2DModel

from secondcast.inspection.show import describe, trajectory_lines
from secondcast.models.families.registry import FAMILIES, family_named, family_of_pipeline, family_of_transformer
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.teacher.configs import family_of_folder
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.cache_builder.building import build_cache


def test_every_family_is_found_by_its_name_and_by_its_pipeline_and_names_classes_of_diffusers():
    for family in FAMILIES:
        assert family_named(family.name) is family and family_of_pipeline(family.pipeline) is family
        assert {family.pipeline, family.transformer} <= set(dir(diffusers))
        # The slots are arguments of the pipeline.
        arguments = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters
        assert {family.slot, family.tokenizer_slot} <= set(arguments)


def test_a_family_of_a_newer_version_is_named_with_the_known_ones():
    with pytest.raises(TeacherError) as error:
        family_named("sd9")
    known = ", ".join(family.name for family in FAMILIES)
    assert str(error.value) == (
        f"the cache was recorded with a teacher of the family 'sd9', this version knows {known}: a newer version "
        f"recorded it; upgrade secondcast"
    )


def test_a_transformer_of_no_family_is_a_bug():
    tiny = FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, num_attention_heads=1)
    assert family_of_transformer(tiny) is FAMILIES[0]
    with pytest.raises(TypeError, match="no family has the transformer LuminaNextDiT2DModel, expected one of"):
        family_of_transformer(LuminaNextDiT2DModel.__new__(LuminaNextDiT2DModel))


def test_a_folder_is_of_the_family_that_its_model_index_names_and_of_the_first_one_without(tmp_path):
    assert family_of_folder(tmp_path) is FAMILIES[0]
    for family in FAMILIES:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family.pipeline, "is_distilled": True}))
        assert family_of_folder(tmp_path) is family


def test_the_families_are_known_without_torch_and_diffusers():
    program = (
        "import sys, secondcast.models.families.registry, secondcast.models.teacher.folder\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cache_of_a_family_that_is_not_known_can_be_read_and_shown_and_not_replayed(cache_of_another_family):
    cache = Cache.open(cache_of_another_family)
    facts = describe(cache, 0)
    assert [step["clean_latent_moved"] for step in facts["steps"]] == [None] * 4
    assert all(step["velocity_norm"] > 0 for step in facts["steps"])
    assert "clean moved" in "\n".join(trajectory_lines(facts, "c"))
    with pytest.raises(TeacherError, match="of the family 'sd9', this version knows"):
        recorded_schedule(cache.manifest)


@pytest.fixture
def cache_of_another_family(tmp_path, dev_teacher, prompt_file) -> Path:
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    file = tmp_path / "c/manifest.json"
    manifest = Manifest.decode(file.read_bytes(), "m")
    teacher = manifest.teacher.model_copy(update={"family": "sd9"})
    file.write_bytes(manifest.model_copy(update={"teacher": teacher}).encode())
    return tmp_path / "c"
