"""The modulation table: the rows that the dropped weights would have given, and no weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.models.backbone import Backbone
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import Geometry
from secondcast.models.memory.conditions import Conditions, recorded_conditions
from secondcast.models.memory.meta_run import parameter_count, peak_bytes
from secondcast.models.memory.modulation_table import (
    make_table,
    modulation_parameters,
    modulation_width,
    worthwhile,
)
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.models.flux_calls import CPU, GEOMETRY, WIDE, call, load, pairs, wide_flux

DTYPES = (torch.float32, torch.bfloat16)
META = torch.device("meta")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("wide")
    return {guidance: wide_flux(folder / str(guidance), guidance=guidance) for guidance in (True, False)}


def meta_flux_dev() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(planned_teacher("FLUX.1-dev")[0].config("transformer"))


def outline(**flags: Any) -> Manifest:
    return outline_manifest(PlannedBuild(**flags), planned_teacher("FLUX.1-dev")[0], prompt_count=10)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("guidance", [True, False])
def test_output_and_gradient_are_those_of_a_live_call_of_as_many_rows(wide, guidance, rows, dtype):
    live, table = load(wide[guidance], dtype), load(wide[guidance], dtype, batch_rows=rows)
    assert table.table is not None and live.table is None
    asked = list(pairs(guidance=guidance) * 8)[2::3][:rows]
    for found, expected in zip(call(table, asked), call(live, asked), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("teacher", "guidance"), [("dev_teacher", True), ("schnell_teacher", False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_live_call_of_all_rows_equals_the_table_made_in_one_call(teacher, guidance, dtype, request):
    folder, asked = request.getfixturevalue(teacher), list(pairs(guidance=guidance))
    table = load(folder, dtype, batch_rows=len(asked))
    assert len(table.table) == len(asked)
    for found, expected in zip(call(table, asked), call(load(folder, dtype), asked), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_at_another_batch_size_the_difference_is_rounding(wide, dtype, rounding):
    live = load(wide[True], dtype)
    asked = list(pairs(guidance=True))[5:8]
    for made_in in (1, 20):
        table = load(wide[True], dtype, batch_rows=made_in)
        for found, expected in zip(call(table, asked), call(live, asked), strict=True):
            assert (found - expected).float().norm() <= rounding * expected.float().norm()
    # Another row would be far off.
    other, expected = call(live, list(pairs(guidance=True))[4:7])[0], call(live, asked)[0]
    assert (other - expected).float().norm() > 2e-2 * expected.float().norm()


def test_another_geometry_and_other_calls_in_between_read_their_own_rows(wide):
    live, table = load(wide[True], torch.float32), load(wide[True], torch.float32, batch_rows=2)
    tall = Geometry(height=32, width=16, rows=8, columns=4, channels=16)
    first, second = list(pairs(guidance=True))[:2], list(pairs(guidance=True))[9:11]
    assert table.at(tall).transformer is table.transformer
    for asked, geometry in ((first, tall), (second, GEOMETRY), (first, tall)):
        expected = call(live.at(geometry), asked, geometry)
        assert all(torch.equal(*both) for both in zip(call(table.at(geometry), asked, geometry), expected, strict=True))


def test_the_weights_are_gone(wide):
    live, table = load(wide[True], torch.float32).transformer, load(wide[True], torch.float32, batch_rows=4).transformer
    left = parameter_count(live) - modulation_parameters(live, FLUX.anatomy) - parameter_count(live.time_text_embed)
    assert parameter_count(table) == left < 0.7 * parameter_count(live)
    # In the meantime, nothing but the table has come: 20 rows in float32.
    assert sum(buffer.nbytes for buffer in table.buffers()) == 20 * 4 * modulation_width(live, FLUX.anatomy)


def test_of_flux_dev_as_many_parameters_go_as_were_counted():
    transformer = meta_flux_dev().to(torch.bfloat16)
    before, conditioning = parameter_count(transformer), parameter_count(transformer.time_text_embed)
    # 2.11 MB a row in bfloat16.
    assert modulation_width(transformer, FLUX.anatomy) * 2 == 2_113_536
    recorded = recorded_conditions([outline()], batch_rows=140)
    assert len(recorded.pairs) == 20 * 7 and worthwhile(transformer, recorded)
    many = Conditions(pairs=tuple((step / 4000, 3.5) for step in range(4000)), batch_rows=4)
    assert not worthwhile(transformer, many)
    make_table(transformer, recorded, META)
    assert before - conditioning - parameter_count(transformer) == 3_247_448_064
    assert sum(buffer.nbytes for buffer in transformer.buffers()) == 140 * 2_113_536


def test_there_is_never_more_than_one_of_the_dropped_linears_on_the_device():
    transformer = FluxTransformer2DModel(**WIDE | {"num_layers": 6}, guidance_embeds=True)
    largest = 4 * parameter_count(transformer.transformer_blocks[0].norm1.linear)
    all_of_them = 4 * modulation_parameters(transformer, FLUX.anatomy)
    embedding = 4 * parameter_count(transformer.time_text_embed)
    table = 2 * 4 * modulation_width(transformer, FLUX.anatomy)
    conditions = Conditions(pairs=((1.0, 2.0), (0.5, 2.0)), batch_rows=2)
    on_cpu = list(transformer.parameters())
    peak = peak_bytes(lambda: make_table(transformer, conditions, META), on_cpu)
    assert largest < peak < 1.05 * (largest + embedding + table) < all_of_them / 4
    assert not any(parameter.is_meta for parameter in transformer.parameters())


def test_conditions_are_those_of_all_caches_and_there_are_none_with_pooled_vectors():
    few, many = outline(steps=4, guidance=(2.0,)), outline(steps=20, guidance=(2.0, 3.5))
    both = recorded_conditions([few, many], batch_rows=3)
    expected = {(t, 2.0) for t in few.sampling.timesteps}
    expected |= {(t, g) for t in many.sampling.timesteps for g in (2.0, 3.5)}
    assert set(both.pairs) == expected and len(both.pairs) == len(expected) and both.batch_rows == 3
    clip = few.model_copy(update={"teacher": few.teacher.model_copy(update={"pooled": "clip"})})
    assert recorded_conditions([few, clip], batch_rows=3) is None


@pytest.mark.thorough
def test_values_that_the_dtype_does_not_tell_apart_share_a_row(wide):
    def table(dtype: torch.dtype) -> Backbone:
        near = Conditions(pairs=((0.9, 3.5), (0.9001, 3.5), (0.9, 3.501)), batch_rows=2)
        return Backbone.load(wide[True], GEOMETRY, text_length=5, dtype=dtype, device=CPU, conditions=near)

    assert (len(table(torch.float32).table), len(table(torch.bfloat16).table)) == (3, 1)
    asked = [(0.9001, 3.5), (0.9, 3.501)]
    for dtype in DTYPES:
        expected = call(load(wide[True], dtype), asked)
        assert all(torch.equal(*both) for both in zip(call(table(dtype), asked), expected, strict=True))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            [(1.0, 2.0), (1.0, 3.25)],
            "row 1 of a batch has timestep 1 and guidance 3.25, but the modulation table has timesteps 0.0625, 0.25, "
            "0.65, 0.9, 1 with guidance 2, 2.5, 3.5, 5 and the weights it replaces are not loaded: give --modulation "
            "gpu",
        ),
        ([(0.5, 2.0), (1.0, 2.0)], "row 0 of a batch has timestep 0.5 and guidance 2, but the modulation table has "),
    ],
)
def test_conditions_that_the_table_does_not_hold_are_named(wide, asked, text):
    with pytest.raises(SettingsError) as caught:
        call(load(wide[True], torch.float32, batch_rows=2), asked)
    assert str(caught.value).startswith(text)


def test_a_timestep_that_schnells_table_does_not_hold_is_named(wide):
    with pytest.raises(
        SettingsError, match=r"row 0 of a batch has timestep 0.5, but the modulation table has timesteps 0"
    ):
        call(load(wide[False], torch.float32, batch_rows=2), [(0.5, None)])


def test_a_pooled_vector_beside_the_table_is_refused(wide):
    backbone = load(wide[True], torch.float32, batch_rows=1)
    pooled_BP = backbone.zero_pooled(2)["pooled_projections"]
    pooled_BP[1, 3] = 0.5
    text = r"row 1 of a batch has a pooled vector, but .* zeros: give --modulation gpu"
    with pytest.raises(SettingsError, match=text):
        backbone.table.select(torch.ones(2), torch.full((2,), 2.0), pooled_BP)


def test_rows_that_are_checked_at_the_end_are_refused_there_in_the_same_words(wide):
    backbone = load(wide[True], torch.float32, batch_rows=1)
    known, other = (torch.full((1,), value) for value in (1.0, 0.123))
    guidance_B, pooled_BP = torch.full((1,), 2.0), backbone.zero_pooled(1)["pooled_projections"]
    with pytest.raises(SettingsError) as at_once:
        backbone.table.select(other, guidance_B, pooled_BP)
    reached = False
    with pytest.raises(SettingsError) as at_the_end, backbone.table.checked_at_the_end():
        for timestep_B in (known, other, known):
            backbone.table.select(timestep_B, guidance_B, pooled_BP)
        reached = True
    assert reached and str(at_the_end.value) == str(at_once.value)
    with pytest.raises(KeyError), backbone.table.checked_at_the_end():
        backbone.table.select(other, guidance_B, pooled_BP)
        raise KeyError
    # Outside of it each call is checked again.
    with pytest.raises(SettingsError):
        backbone.table.select(other, guidance_B, pooled_BP)


def test_the_table_is_the_default_where_there_can_be_one_and_live_where_asked(wide):
    assert load(wide[True], torch.float32, batch_rows=2).table is not None
    assert load(wide[True], torch.float32, batch_rows=2, modulation="gpu").table is None
    assert load(wide[True], torch.float32).table is None
    with pytest.raises(
        SettingsError, match=r"--modulation is precomputed, but .* CLIP's .*: give --modulation cpu, .*, or auto, "
    ):
        load(wide[True], torch.float32, modulation="precomputed")
    with pytest.raises(SettingsError, match="--modulation is 'tables', expected 'auto', 'precomputed', 'cpu' or"):
        MemoryOptions.from_flags(modulation="tables")
