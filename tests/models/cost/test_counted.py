"""The table of counted costs: it is what counting gives, and it has what plans of bundled configurations need."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.evaluation.settings.generating import PictureOptions
from secondcast.models.cost import counted
from secondcast.models.cost.bundled import bundled_shapes
from secondcast.models.cost.counted import (
    TABLE,
    backbone_cost,
    clip_parameters,
    decoding_bytes,
    student_cost,
    text_encoder_cost,
    vae_parameters,
)
from secondcast.models.cost.counting import count
from secondcast.models.cost.shapes import STUDENT_SIZES, CallShapes, Shapes, VaeConfig, fits_tokens
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import recorded_geometry
from secondcast.models.teacher.planned import bundled_teachers, planned_teacher

CONSTRAINTS = (Path(__file__).resolve().parents[3] / "constraints.txt").read_text().splitlines()
# Temporary tensors of T5 students depend on the version of transformers.
OF_THE_TABLE = pytest.mark.skipif(
    not all(f"{name}=={version(name).split('+')[0]}" in CONSTRAINTS for name in ("diffusers", "torch", "transformers")),
    reason="the table is of the versions of constraints.txt",
)
FIGURES = json.loads(TABLE.read_bytes())
# One of each network, which are counted within seconds.
FEW = (
    "transformer|image_tokens=256 |text_length=77 ",
    "text encoder|text_length=77 ",
    "student|text_length=77 ",
    "decoder|height=256 ",
    "VAE parameters|",
    "CLIP parameters|",
)


def recounted(shapes: Shapes) -> Any:
    """As the table holds it."""
    return json.loads(json.dumps(count(shapes)))


@pytest.fixture
def uncounted(monkeypatch) -> None:
    """Nothing is counted yet, and nothing can be."""
    counted._known.cache_clear()
    monkeypatch.setitem(sys.modules, "secondcast.models.cost.counting", None)
    yield
    counted._known.cache_clear()


def test_the_table_has_the_bundled_configurations_and_nothing_else():
    assert FIGURES.keys() == bundled_shapes().keys()


@OF_THE_TABLE
@pytest.mark.thorough
@pytest.mark.parametrize("few", FEW)
def test_a_figure_of_the_table_is_what_counting_gives(few):
    network, *parts = few.split("|")
    key, shapes = next(
        (key, shapes)
        for key, shapes in bundled_shapes().items()
        if shapes.network == network and all(part in f"{key} " for part in parts)
    )
    assert recounted(shapes) == FIGURES[key]


@OF_THE_TABLE
@pytest.mark.slow
def test_every_figure_of_the_table_is_what_counting_gives():
    assert {key: recounted(shapes) for key, shapes in bundled_shapes().items()} == FIGURES


@pytest.mark.parametrize("teacher", bundled_teachers())
def test_a_bundled_configuration_is_in_the_table_at_its_defaults(teacher, uncounted):
    folder, _ = planned_teacher(teacher)
    manifest = outline_manifest(PlannedBuild(), folder, prompt_count=1)
    assert PictureOptions().dtype == manifest.sampling.dtype
    geometry, vae = recorded_geometry(manifest.sampling), folder.config("vae")
    # 12 (FLUX.1), 2 (SD3) and 4.8 billion parameters.
    least = {"flux": 1e10, "sd3": 2e9, "pixart-sigma": 6e8, "flux2-klein": 3.8e9}[folder.family.name]
    assert backbone_cost(CallShapes.of(manifest)).parameters > least
    # The language model of FLUX.2-klein is cut.
    assert text_encoder_cost(manifest).parameters > 3e9
    # Images of 512 px in fp32, in 128 channels at full size.
    assert decoding_bytes(vae, folder.family, geometry) >= 512 * 512 * 128 * 4
    for encoder, _ in folder.family.conditioning_roles:
        assert vae_parameters(vae, folder.family) < clip_parameters(folder.config(encoder))
    assert 8e7 < vae_parameters(vae, folder.family) < 9e7
    for name in (name for name, config in STUDENT_SIZES.items() if fits_tokens(config, folder.family.text_layers)):
        assert student_cost(name, manifest).parameters < 2e9


def test_what_is_not_in_the_table_is_counted_once(monkeypatch):
    counts: list[Shapes] = []

    def counting(shapes: Shapes) -> int:
        counts.append(shapes)
        return count(shapes)

    monkeypatch.setattr("secondcast.models.cost.counting.count", counting)
    config = planned_teacher("FLUX.1-dev")[0].config("vae")
    smaller = config | {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 8}
    counted._known.cache_clear()
    assert vae_parameters(smaller, FLUX) == vae_parameters(smaller, FLUX) < vae_parameters(config, FLUX) == 83_819_683
    assert counts == [VaeConfig(config=smaller, kind="AutoencoderKL")]
    counted._known.cache_clear()
