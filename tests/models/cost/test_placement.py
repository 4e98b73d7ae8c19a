"""Where FLUX's weights go on cards of 24, 16 and 12 GB, at real sizes (calculated, not measured)."""

import pytest

from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.settings.memory import sampling_cost
from secondcast.models.cost.placement import SamplingCost, place
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.errors import SettingsError

GIB = 2**30
# A quarter of a million parameters more or less do not matter here: T5-Base's encoder.
STUDENT = 110_000_000


def cost_of(side: int, *, batch_size: int = 1, text_length: int = 77, pooled: str = "zero") -> SamplingCost:
    settings = PictureSettings(
        student="s", teacher="t", text_length=text_length, height=side, width=side, steps=28, schedule="diffusers",
        guidance=3.5, seed=0, dtype="bfloat16", pooled=pooled,
    )  # fmt: skip
    return sampling_cost(settings, planned_teacher("FLUX.1-dev")[0], batch_size=batch_size, student_parameters=STUDENT)


@pytest.fixture(scope="module")
def at_1024_px() -> SamplingCost:
    return cost_of(1024)


# Free memory of real cards is less than their label: see docs/small-gpus.md.
@pytest.mark.parametrize(("free_gib", "streamed"), [(79, False), (23.64, False), (15.6, True), (11.6, True)])
def test_flux_dev_at_1024_px_fits_real_cards_exactly(at_1024_px, free_gib, streamed):
    placed = place(at_1024_px, PLAIN, memory_bytes=free_gib * GIB, host_bytes=32 * GIB)
    assert placed.options.modulation == "precomputed" and (placed.options.gpu_blocks is not None) == streamed
    assert placed.options.quantize == "none" and placed.memory.total_bytes <= free_gib * GIB
    assert (placed.pinned_bytes > 0) == streamed
    if streamed:
        # One block more on the GPU would not fit.
        more = placed.options.model_copy(update={"gpu_blocks": placed.options.gpu_blocks + 1})
        assert at_1024_px.memory(more).needed_bytes > free_gib * GIB >= placed.memory.needed_bytes


def test_less_host_memory_than_the_streamed_blocks_need_is_refused(at_1024_px):
    with pytest.raises(SettingsError, match=r"^streamed blocks need \d+\.\d GiB of pinned host memory to fit into"):
        place(at_1024_px, PLAIN, memory_bytes=11.6 * GIB, host_bytes=2 * GIB)


def test_options_that_were_given_stay(at_1024_px):
    kept = MemoryOptions(modulation="gpu")
    placed = place(at_1024_px, kept, memory_bytes=15.6 * GIB, host_bytes=None, held={"modulation"})
    assert placed.options.modulation == "gpu" and placed.options.gpu_blocks is not None
    with pytest.raises(SettingsError, match="^nothing fits into 15.6 GiB: a batch of 1 needs"):
        place(at_1024_px, kept, memory_bytes=15.6 * GIB, host_bytes=None, held={"modulation", "gpu_blocks"})
    # Quantized blocks are never streamed.
    nf4 = MemoryOptions(quantize="nf4")
    placed = place(at_1024_px, nf4, memory_bytes=11.6 * GIB, host_bytes=None)
    assert placed.options.quantize == "nf4" and placed.options.gpu_blocks is None


def test_the_vae_counts_where_it_needs_more_than_the_transformer():
    one, four = cost_of(1024), cost_of(1024, batch_size=4)
    assert one.decoding_bytes > one.backbone.forward_peak_bytes
    # Images are decoded one by one: four need no more for it than one.
    assert four.memory(PLAIN).activations_bytes < 4 * one.memory(PLAIN).activations_bytes
