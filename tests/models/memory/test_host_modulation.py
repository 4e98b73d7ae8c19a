"""Modulation vectors computed by the host: the bits of the live weights, of which none is left in the transformer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.backbone import Backbone
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import Geometry
from secondcast.models.memory.host_modulation import take_to_host
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.modulation_table import modulation_parameters
from secondcast.models.memory.options import MemoryOptions, takes_host
from secondcast.models.teacher.planned import planned_teacher
from tests.models.flux_calls import GEOMETRY, call, load, pairs, wide_flux

FP32, BF16 = torch.float32, torch.bfloat16
GB = 10**9


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("wide")
    return {guidance: wide_flux(folder / str(guidance), guidance=guidance) for guidance in (True, False)}


def pooled(rows: int) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(*both) for both in zip(found, expected, strict=True))


def rows_of(backbone: Backbone, asked: list[tuple[float, float | None]], pooled_BP: torch.Tensor) -> torch.Tensor:
    timestep_B = torch.tensor([t for t, _ in asked])
    return backbone.host_modulation.rows(timestep_B, torch.tensor([g for _, g in asked]), pooled_BP)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("guidance", "rows", "dtype"),
    [(True, 1, FP32), (True, 3, FP32), (False, 7, FP32), (True, 2, BF16), (False, 3, BF16)],
)
def test_output_and_gradient_are_those_of_the_live_weights(wide, guidance, rows, dtype):
    live, host = load(wide[guidance], dtype), load(wide[guidance], dtype, modulation="cpu")
    assert host.host_modulation is not None and host.table is None and live.host_modulation is None
    asked = list(pairs(guidance=guidance) * 8)[2::3][:rows]
    for pooled_BP in (pooled(rows), None):
        assert same(call(host, asked, pooled_BP=pooled_BP), call(live, asked, pooled_BP=pooled_BP))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"activation_checkpointing": 1}, FP32),
        ({"activation_checkpointing": 2}, FP32),
        ({"gpu_blocks": 0}, FP32),
        ({"gpu_blocks": 2, "activation_checkpointing": 1}, BF16),
    ],
)
def test_blocks_that_are_computed_twice_or_streamed_read_the_same_rows(wide, options, dtype):
    live, host = load(wide[True], dtype), load(wide[True], dtype, modulation="cpu", **options)
    first, second = list(pairs(guidance=True))[:3], list(pairs(guidance=True))[9:12]
    for asked, pooled_BP in ((first, pooled(3)), (second, 2 * pooled(3))):
        assert same(call(host, asked, pooled_BP=pooled_BP), call(live, asked, pooled_BP=pooled_BP))


@pytest.mark.thorough
def test_rows_computed_beforehand_are_taken_in_place_of_the_conditions(wide):
    host = load(wide[True], BF16, modulation="cpu")
    asked, pooled_BP = list(pairs(guidance=True))[4:7], pooled(3)
    modulation_BM = rows_of(host, asked, pooled_BP)
    assert modulation_BM.dtype == BF16 and modulation_BM.nbytes == 3 * host.host_modulation.row_bytes
    expected = call(host, asked, pooled_BP=pooled_BP)
    # Of what is no longer read, another pooled vector changes nothing; other rows do.
    assert same(call(host, asked, modulation_BM=modulation_BM), expected)
    assert not same(call(host, asked, pooled_BP=pooled_BP, modulation_BM=modulation_BM.flip(0)), expected)


def test_another_geometry_reads_the_same_host_weights(wide):
    live, host = load(wide[True], FP32), load(wide[True], FP32, modulation="cpu")
    tall = Geometry(height=32, width=16, rows=8, columns=4, channels=16)
    assert host.at(tall).host_modulation is host.host_modulation
    asked = list(pairs(guidance=True))[:2]
    for geometry in (tall, GEOMETRY):
        found, expected = (call(one.at(geometry), asked, geometry, pooled_BP=pooled(2)) for one in (host, live))
        assert same(found, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_do_not_depend_on_the_thread_or_on_how_many_ask_at_once(wide, threads):
    host = load(wide[True], FP32, modulation="cpu")
    asked = [list(pairs(guidance=True) * 2)[first : first + 3] for first in range(12)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = [rows_of(host, one, pooled(3)) for one in asked]
        with ThreadPoolExecutor(4) as executor:
            found = list(executor.map(lambda one: rows_of(host, one, pooled(3)), asked * 2))
    finally:
        torch.set_num_threads(before)
    assert same(tuple(found), tuple(expected * 2))


def test_the_weights_are_in_the_transformer_no_more(wide):
    live, host = (load(wide[True], FP32, modulation=kind) for kind in ("gpu", "cpu"))
    gone = modulation_parameters(live.transformer, FLUX.anatomy) + parameter_count(live.transformer.time_text_embed)
    assert parameter_count(host.transformer) == parameter_count(live.transformer) - gone
    assert not list(host.transformer.buffers())
    assert host.host_modulation.weights_bytes == 4 * gone


def test_of_flux_dev_as_many_bytes_go_as_were_counted():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(planned_teacher("FLUX.1-dev")[0].config("transformer"))
    transformer.to(BF16)
    before, embedding = parameter_count(transformer), parameter_count(transformer.time_text_embed)
    host = take_to_host(transformer)
    assert before - parameter_count(transformer) == 3_247_448_064 + embedding
    assert host.row_bytes == 2_113_536 and host.weights_bytes == 2 * (3_247_448_064 + embedding)


@pytest.mark.parametrize(
    ("modulation", "pooled_varies", "gpu_bytes", "resident", "expected"),
    [
        ("auto", True, 24 * GB, None, True),
        ("auto", True, 80 * GB, None, False),
        # A resumed run may stream other blocks, and rounds as before.
        ("auto", True, 80 * GB, 10, False),
        ("auto", False, 24 * GB, None, False),
        ("auto", True, None, 10, False),
        ("gpu", True, 24 * GB, None, False),
        ("cpu", False, None, None, True),
    ],
)
def test_auto_is_the_host_where_pooled_vectors_meet_a_gpu_that_the_weights_would_fill_by_half(
    modulation, pooled_varies, gpu_bytes, resident, expected
):
    options = MemoryOptions(modulation=modulation, gpu_blocks=resident)
    found = takes_host(options, pooled_varies=pooled_varies, weights_bytes=23_800_000_000, gpu_bytes=gpu_bytes)
    assert found is expected
