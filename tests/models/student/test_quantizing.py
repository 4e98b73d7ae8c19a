"""Quantized students: each value within half a step, the same in every process, and nothing of them missing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.folder import weight_bytes
from secondcast.models.student.quantizing import _codes, quantized
from secondcast.models.student.student import load_student, save_student, untrained_like
from secondcast.models.student.student_network import NF4_BLOCK, NF4_LEVELS, QuantizedLinear
from secondcast.storage_schemas.errors import StudentError
from tests.models.student.test_projection_rank import IDS_BT, low  # noqa: F401
from tests.models.student.test_student import config_folder, make, teacher  # noqa: F401

KINDS = ("int8", "nf4")


def rebuilt(weight_NX: torch.Tensor, kind: str) -> torch.Tensor:
    module = QuantizedLinear(*weight_NX.shape, kind)
    module.weight, scale = _codes(weight_NX, kind)
    module.scale = scale.float()
    return module.values(slice(None))


@pytest.mark.parametrize("columns", [1, 63, 64, 70, 200])
def test_values_are_within_half_a_step_of_their_block(columns):
    weight_NX = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    weight_NX[1] = 0
    found = rebuilt(weight_NX, "int8")
    # A scale in bfloat16 differs by up to 1/256, which may cut the largest values: less than half a step of 127.
    step = weight_NX.abs().amax(1, keepdim=True) / 127
    assert ((found - weight_NX).abs() <= 0.51 * step).all() and not found[1].any()
    found = rebuilt(weight_NX, "nf4")
    levels = torch.tensor(NF4_LEVELS)
    widest = float((levels[1:] - levels[:-1]).max()) / 2
    for start in range(0, columns, NF4_BLOCK):
        block, was = found[:, start : start + NF4_BLOCK], weight_NX[:, start : start + NF4_BLOCK]
        assert ((block - was).abs() <= (widest + 1 / 256) * was.abs().amax(1, keepdim=True)).all()


def test_every_nf4_value_is_a_level_of_its_block():
    levels = torch.tensor(NF4_LEVELS)
    # In bfloat16 already, so that no scale is rounded.
    weight_NX = (0.5 * levels.repeat(2, 8)).clone()
    assert torch.equal(rebuilt(weight_NX, "nf4"), weight_NX)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_it_is_near_the_student_with_its_number_of_parameters_and_fewer_bytes(low, kind, tmp_path):  # noqa: F811
    save_student(low, tmp_path / "full", tokenizer=None)
    save_student(quantized(low, kind), tmp_path / "q", tokenizer=None)
    student = load_student(tmp_path / "q")
    assert parameter_count(student) == parameter_count(low) and student.config.projection_rank == 2
    with torch.no_grad():
        first, again, exact = student(IDS_BT)[0], load_student(tmp_path / "q")(IDS_BT)[0], low(IDS_BT)[0]
    assert torch.equal(first, again) and not torch.equal(first, exact)
    assert float((first - exact).norm() / exact.norm()) < (0.1 if kind == "int8" else 0.7)
    stored = load_file(tmp_path / "q/model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.int8", "torch.bfloat16", "torch.float32"}
    assert all("norm" in name or "bias" in name for name, one in stored.items() if one.dtype == torch.float32)
    assert weight_bytes(tmp_path / "q") == (tmp_path / "q/model.safetensors").stat().st_size


def test_a_random_student_like_a_quantized_one_has_floating_point_weights(low):  # noqa: F811
    other = untrained_like(quantized(low, "nf4"), seed=0)
    assert torch.isfinite(other(IDS_BT)[0]).all() and other.final_projection[0].weight.dtype == torch.float32


@pytest.mark.parametrize("lost", ["final_projection.0.weight", "encoder.encoder.embed_tokens.scale"])
def test_a_missing_tensor_is_refused_by_name(low, tmp_path, lost):  # noqa: F811
    save_student(quantized(low, "int8"), tmp_path / "q", tokenizer=None)
    tensors = load_file(tmp_path / "q/model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudentError, match=rf"q cannot be loaded: .*{lost}"):
        load_student(tmp_path / "q")


def test_codes_are_refused_where_floating_point_weights_are_read(low, tmp_path):  # noqa: F811
    save_student(low, tmp_path / "s", tokenizer=None)
    tensors = load_file(tmp_path / "s/model.safetensors")
    tensors["final_projection.0.weight"] = tensors["final_projection.0.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "s/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudentError, match=r"s cannot be loaded: .*I8"):
        load_student(tmp_path / "s")


def test_training_from_it_is_refused(low, teacher, tmp_path):  # noqa: F811
    save_student(quantized(low, "nf4"), tmp_path / "q", tokenizer=None)
    with pytest.raises(StudentError, match=r"q has nf4 weights, which cannot be trained: give the run that it was exp"):
        make(tmp_path / "q", teacher)
