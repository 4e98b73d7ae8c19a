"""Figures of planning against the published or separately calculated ones; all on the meta device."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.models.cost.cards import CARDS, find_card
from secondcast.models.cost.counted import (
    backbone_cost,
    clip_parameters,
    student_cost,
    text_encoder_cost,
    vae_parameters,
)
from secondcast.models.cost.gpu_memory import (
    CUDA_BYTES,
    GpuMemory,
    WeightBytes,
    held_weights,
    table_rows,
    training_memory,
)
from secondcast.models.cost.network_costs import BackboneCost
from secondcast.models.cost.placement import SamplingCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.memory.meta_run import count_flops, peak_bytes, saved_bytes
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.errors import SettingsError, StudentError, TeacherError
from secondcast.storage_schemas.schema.manifest import Manifest

REAL_CONFIGS = Path(__file__).parents[2] / "cache_builder/flux_dev"
T = 1e12
CHECKPOINTED = MemoryOptions(activation_checkpointing=1)


def outline(name: str | Path = "FLUX.1-dev", *, text_length: int | None = None, **flags) -> Manifest:
    folder = find_teacher(str(name), BUILD_PARTS) if isinstance(name, Path) else planned_teacher(name)[0]
    manifest = outline_manifest(PlannedBuild(**flags), folder, prompt_count=10)
    if text_length is None:
        return manifest
    return manifest.model_copy(
        update={"teacher": manifest.teacher.model_copy(update={"text_length": text_length})},
    )


@pytest.fixture(scope="module")
def at_512_px() -> BackboneCost:
    return backbone_cost(CallShapes.of(outline()))


def test_parameters_of_flux_dev_are_exact(at_512_px):
    assert at_512_px.parameters == 11_901_408_320
    assert at_512_px.modulation_parameters == 3_247_448_064
    assert text_encoder_cost(outline()).parameters == 4_762_310_656
    folder, _ = planned_teacher("FLUX.1-dev")
    assert round(vae_parameters(folder.config("vae"), folder.family) / 1e6, 1) == 83.8
    assert round(clip_parameters(folder.config("pooled_text_encoder")) / 1e6) == 123


@pytest.mark.parametrize(
    ("size", "text_length", "forward", "checkpointed", "plain"),
    [
        (512, 77, 15.1, 46.5, 31.4),
        (512, 512, 21.5, 67.0, 45.5),
        (1024, 77, 66.1, 217, 151),
        (1024, 512, 74.4, 246, 171),
    ],
)
def test_flops_of_flux_dev_agree_with_other_calculations(size, text_length, forward, checkpointed, plain):
    cost = backbone_cost(CallShapes.of(outline(resolution=size, text_length=text_length)))
    assert cost.forward_flops == pytest.approx(forward * T, rel=0.02)
    assert cost.training_flops() == pytest.approx(plain * T, rel=0.02)
    assert cost.training_flops(CHECKPOINTED) == pytest.approx(checkpointed * T, rel=0.02)
    # Activations: tests/simulated_cuda.
    assert cost.forward_peak_bytes < cost.training_bytes() / 20


def test_attention_is_counted(at_512_px):
    # Two products of all tokens with all, 24 heads of 128, 57 blocks.
    tokens = 1024 + 77
    assert at_512_px.attention_flops == 57 * 2 * 2 * tokens * tokens * 24 * 128


def test_text_flops_are_two_per_weight_and_token_and_attention():
    flops = text_encoder_cost(outline()).forward_flops
    weights = 4_762_310_656 - 32128 * 4096
    assert flops == pytest.approx(2 * weights * 77, rel=0.01)


@pytest.mark.slow
def test_extrapolated_depths_equal_the_whole_network(tmp_path, dev_teacher):
    deeper = json.loads((dev_teacher / "transformer/config.json").read_bytes()) | {
        "num_layers": 3,
        "num_single_layers": 4,
    }
    manifest = outline(dev_teacher, dtype="float32")
    teacher = manifest.teacher.model_copy(update={"backbone_config": deeper})
    cost = backbone_cost(CallShapes.of(manifest.model_copy(update={"teacher": teacher})))
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(deeper).eval().requires_grad_(False)
    sampling, text = manifest.sampling, manifest.teacher
    arguments = {
        "hidden_states": torch.empty(1, sampling.image_tokens, sampling.channels, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "pooled_projections": torch.empty(1, text.pooled_width, device="meta"),
        "encoder_hidden_states": torch.empty(1, text.text_length, text.text_width, device="meta", requires_grad=True),
        "txt_ids": torch.empty(text.text_length, 3, device="meta"),
        "img_ids": torch.empty(sampling.image_tokens, 3, device="meta"),
    }
    assert count_flops(lambda: model(**arguments)).total == cost.forward_flops
    # The first block of a kind keeps other tensors than those that follow.
    kept = cost.outer_bytes + sum(kind.count * kind.saved_bytes for kind in cost.kinds)
    found = saved_bytes(lambda: model(**arguments, return_dict=False)[0], list(model.parameters()))
    assert found == pytest.approx(kept, rel=0.03)
    assert cost.parameters == model.num_parameters()


def test_live_bytes_are_those_of_a_chain_of_operations():
    weight = torch.empty(256, 256, device="meta")
    x = torch.empty(1, 256, device="meta")
    # Two results of 1 KiB live together: the input of the second product and what it gives.
    assert peak_bytes(lambda: (x @ weight) @ weight.t(), [weight, x]) == 2 * 256 * 4
    kept = torch.nn.Linear(256, 256, bias=False, device="meta").requires_grad_(False)
    given = torch.empty(3, 256, device="meta", requires_grad=True)
    # exp keeps its result; a frozen linear keeps nothing but its weight.
    assert saved_bytes(lambda: kept(given).exp(), list(kept.parameters())) == 3 * 256 * 4


@pytest.mark.parametrize(
    ("name", "millions"), [("small", 54), ("base", 130), ("large", 362), ("xl", 1249), ("google-t5/t5-base", 130)]
)
def test_students_have_the_published_sizes(name, millions):
    assert round(student_cost(name, outline()).parameters / 1e6) == millions


def test_a_student_may_be_a_config_file_and_must_know_the_tokens(tmp_path):
    config = {"model_type": "t5", "d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 32128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_file = student_cost(str(tmp_path / "config.json"), outline())
    assert by_file == student_cost(str(tmp_path), outline())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(StudentError, match=r"has a vocabulary of 100, but the teacher's token ids go up to 32127"):
        student_cost(str(tmp_path), outline())


def test_the_embedded_configurations_are_flux_devs_own():
    folder, words = planned_teacher("black-forest-labs/FLUX.1-dev")
    assert words == "configuration files of black-forest-labs/FLUX.1-dev included in secondcast"
    for file in REAL_CONFIGS.rglob("*.json"):
        assert (folder.path / file.relative_to(REAL_CONFIGS)).read_bytes() == file.read_bytes()
    schnell, _ = planned_teacher("flux.1-schnell")
    assert schnell.config("transformer") == folder.config("transformer") | {"guidance_embeds": False}
    assert outline("FLUX.1-schnell").sampling.guidance is None


def test_an_unknown_teacher_is_one_line():
    with pytest.raises(
        TeacherError,
        match=r"no teacher 'a/b' to plan for, expected .* one of FLUX.1-dev, FLUX.1-schnell, FLUX.2-klein-4B, P",
    ):
        planned_teacher("a/b")


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100 SXM"),
        ("H100-PCIe", "H100 PCIe"),
        ("3060", "RTX 3060 12GB"),
        ("a6000", "RTX A6000"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
        ("NVIDIA A10G", "A10G"),
    ],
)
def test_a_card_has_many_names(name, card):
    assert find_card(name).name == card


def test_every_card_is_found_by_its_name_and_an_unknown_one_lists_them():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)
    # As drivers print them.
    for name, card in {
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA L4": "L4",
        "NVIDIA A100-SXM4-80GB": "A100 80GB", "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
        "Tesla V100-SXM2-32GB": "V100 32GB",
    }.items():  # fmt: skip
        assert find_card(name).name == card
    with pytest.raises(SettingsError, match=r"--gpu 'voodoo' is unknown, expected one of RTX 3060 12GB, .*B200; or"):
        find_card("voodoo")


def test_an_h100_takes_the_published_time_for_a_picture_and_a_v100_has_no_bf16():
    # FLUX.1-dev, 28 steps at 1024 px, eager: 6.71 s, published by its authors.
    cost = backbone_cost(CallShapes.of(outline(resolution=1024, text_length=512)))
    bytes_per_flop = cost.moved_bytes / cost.forward_flops
    assert 28 * cost.forward_flops / find_card("h100").flops_per_s(bytes_per_flop) == pytest.approx(6.71, rel=0.02)
    assert find_card("v100").flops_per_s(bytes_per_flop) is None


def test_a_card_takes_the_time_of_its_products_and_of_its_other_kernels():
    card = find_card("4090")
    alone = card.matrix_fraction * card.bf16_tflops * T
    assert card.flops_per_s(0.0) == pytest.approx(alone)
    seconds = 1 / alone + 0.002 / (0.85 * card.bandwidth_gb_per_s * 1e9)
    assert card.flops_per_s(0.002) == pytest.approx(1 / seconds)


def test_memory_of_training_is_that_of_the_fit_plan(at_512_px):
    student = student_cost("base", outline())
    memory = training_memory(at_512_px, student, dtype_bytes=2, batch_size=4)
    # With the modulation weights, and no margin.
    assert memory.total_bytes / 2**30 == pytest.approx(42, rel=0.02)
    alone = training_memory(None, student, dtype_bytes=2, batch_size=4)
    # Gradients and activations are not there together: the larger ones count.
    larger = max(4 * student.parameters, 4 * student.saved_bytes)
    assert alone.total_bytes == CUDA_BYTES + 14 * student.parameters + larger
    parts = training_memory(None, student, dtype_bytes=2, batch_size=4, accumulates=True)
    assert parts.total_bytes == CUDA_BYTES + 18 * student.parameters + 4 * student.saved_bytes


def test_table_and_checkpointing_fit_a_24_gb_card(at_512_px):
    manifest, student = outline(), student_cost("base", outline())
    rows = table_rows(manifest)
    clip = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"pooled": "clip"})})
    assert rows == 20 * 7 and table_rows(clip) is None
    held = held_weights(at_512_px, PLAIN, dtype_bytes=2, table_rows=rows)
    assert held == WeightBytes(device_bytes=2 * 8_621_698_112 + 140 * 2_113_536)
    memory = training_memory(
        at_512_px, student, dtype_bytes=2, batch_size=4, options=CHECKPOINTED, table_rows=rows
    )  # fmt: skip
    assert memory.total_bytes / 2**30 == pytest.approx(20.8, rel=0.05)


@pytest.mark.parametrize(
    ("options", "device_gib", "pinned_gib"),
    [
        ({"modulation": "gpu"}, 22.17, 0),
        ({}, 16.33, 0),
        ({"quantize": "int8", "activation_checkpointing": 1}, 8.03 + 0.28 + 0.42 + 0.03, 0),
        ({"quantize": "nf4"}, 4.52 + 0.28 + 0.09 + 0.03, 0),
        ({"gpu_blocks": 0}, 0.05 + 2 * 0.43, 16.28),
        ({"gpu_blocks": 57}, 16.33, 0),
    ],
)
def test_weights_of_flux_take_what_the_options_leave_of_them(at_512_px, options, device_gib, pinned_gib):
    held = held_weights(at_512_px, MemoryOptions(**options), dtype_bytes=2, table_rows=140)
    assert held.device_bytes / 2**30 == pytest.approx(device_gib, abs=0.03)
    assert held.pinned_bytes / 2**30 == pytest.approx(pinned_gib, abs=0.03)


def test_with_pooled_vectors_of_clip_a_small_gpu_leaves_modulation_to_the_host(at_512_px):
    def of(gpu_gib: float | None) -> WeightBytes:
        gpu_bytes = None if gpu_gib is None else gpu_gib * 2**30
        return held_weights(at_512_px, PLAIN, dtype_bytes=2, table_rows=None, gpu_bytes=gpu_bytes)

    assert of(None) == of(80) == WeightBytes(device_bytes=2 * 11_901_408_320)
    assert of(24).device_bytes == 2 * 8_621_698_112 and of(24).host_bytes == 2 * (11_901_408_320 - 8_621_698_112)


def test_a_table_that_is_larger_than_its_weights_is_none_unless_asked_for(at_512_px):
    def of(modulation: str) -> int:
        options = MemoryOptions(modulation=modulation)
        return held_weights(at_512_px, options, dtype_bytes=2, table_rows=5000).device_bytes

    assert of("auto") == of("gpu") < of("precomputed")


def test_the_largest_batch_fits_and_one_more_does_not(at_512_px):
    def memory(batch_size: int) -> GpuMemory:
        cost = SamplingCost(backbone=at_512_px, dtype_bytes=2, batch_size=batch_size, row_bytes=2 * 41 * 2**17)
        return cost.memory(MemoryOptions(modulation="gpu"))

    largest = memory(16).largest_batch(26 * 2**30)
    assert largest > 0
    assert memory(largest).needed_bytes <= 26 * 2**30 < memory(largest + 1).needed_bytes
    assert memory(16).largest_batch(16 * 2**30) == 0
