"""The streams after the first blocks: those of the whole forward, from a part of the weights, in every memory mode."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secondcast.models.backbone import Backbone
from secondcast.models.families.family import POOLED
from secondcast.models.geometry import Geometry
from secondcast.models.memory.conditions import Conditions
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.models.weights import part_loading
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.errors import TeacherError

CPU = torch.device("cpu")
ROWS, COLUMNS, TOKENS, BATCH = 4, 4, 6, 2
TEACHER = find_teacher(str(TEACHER_FOLDER), REPLAY_PARTS)
CONFIG = TEACHER.config("transformer")
BLOCKS = TEACHER.family.anatomy.block_count(CONFIG)
PAIRS = ((0.5, 2.0), (0.7, 3.0))


def load(blocks: int | None = None, options: MemoryOptions = PLAIN, **how) -> Backbone:
    geometry = Geometry(height=1, width=1, rows=ROWS, columns=COLUMNS, channels=CONFIG["in_channels"])
    conditions = Conditions(pairs=PAIRS, batch_rows=BATCH)
    return Backbone.load(
        TEACHER.path, geometry, text_length=TOKENS, dtype=torch.float32, device=CPU, options=options,
        conditions=conditions, blocks=blocks, **how,
    )  # fmt: skip


def inputs() -> list[Any]:
    torch.manual_seed(0)
    return [
        torch.randn(BATCH, ROWS * COLUMNS, CONFIG["in_channels"]),
        torch.randn(BATCH, TOKENS, CONFIG["joint_attention_dim"]),
        {POOLED: torch.zeros(BATCH, CONFIG["pooled_projection_dim"])},
        *torch.tensor(PAIRS).T,
    ]


def streams_and_gradient(backbone: Backbone, blocks: int) -> list[torch.Tensor]:
    hidden_BSC, embedding_BTD, *conditions = inputs()
    embedding_BTD.requires_grad_()
    found = backbone.streams(blocks, hidden_BSC, embedding_BTD, *conditions)
    sum(stream.square().sum() for stream in found).backward()
    assert all(parameter.grad is None for parameter in backbone.transformer.parameters())
    return [*(stream.detach() for stream in found), embedding_BTD.grad]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_after_all_blocks_the_head_makes_the_prediction_of_the_streams():
    backbone = load(options=MemoryOptions(modulation="gpu"))
    hidden_BSC, embedding_BTD, conditioning, timestep_B, guidance_B = inputs()
    image_BSI, text_BTI = backbone.streams(BLOCKS, *inputs())
    assert text_BTI.shape == (BATCH, TOKENS, image_BSI.shape[-1])
    transformer = backbone.transformer
    embedded_BI = backbone.family.embedded_conditions(
        transformer.time_text_embed, timestep_B, guidance_B, conditioning[POOLED]
    )
    found_BSC = transformer.proj_out(transformer.norm_out(image_BSI, embedded_BI))
    assert torch.equal(found_BSC, backbone.predict(hidden_BSC, embedding_BTD, conditioning, timestep_B, guidance_B))


@torch.no_grad()
@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_streams_are_what_each_block_passes_on_in_the_whole_forward(blocks):
    backbone, passed = load(), []
    block = backbone.family.anatomy.blocks(backbone.transformer)[blocks - 1]
    block.register_forward_hook(lambda module, given, output: passed.append(output))
    backbone.predict(*inputs())
    text_BTI, image_BSI = passed[0]
    assert all_equal([image_BSI, text_BTI], [*backbone.streams(blocks, *inputs())])


@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_a_part_of_the_weights_gives_the_streams_and_gradients_of_the_whole(blocks):
    part, whole = load(blocks), load()
    assert whole.predicts and not part.predicts
    assert all_equal(streams_and_gradient(part, blocks), streams_and_gradient(whole, blocks))


@pytest.mark.parametrize("blocks", [1, 3])
def test_only_the_weights_of_the_first_blocks_and_of_what_precedes_them_are_read(blocks, monkeypatch):
    names, read = set(), part_loading.read_tensor

    def reading(file, name, source):
        names.add(name)
        return read(file, name, source)

    monkeypatch.setattr(part_loading, "read_tensor", reading)
    monkeypatch.setattr("secondcast.models.backbone.load_checked", None)
    load(blocks)
    first = {name.split(".")[0] for name in names}
    assert first - {"single_transformer_blocks"} == {
        "x_embedder", "context_embedder", "time_text_embed", "transformer_blocks"
    }  # fmt: skip
    double = {name.split(".")[1] for name in names if name.startswith("transformer_blocks")}
    single = {name.split(".")[1] for name in names if name.startswith("single_transformer_blocks")}
    assert (len(double), len(single)) == (min(blocks, CONFIG["num_layers"]), max(0, blocks - CONFIG["num_layers"]))
    assert {"0"} <= double


def test_weights_that_lack_a_block_are_refused_even_if_it_is_not_read(tmp_path):
    shutil.copytree(TEACHER.path, tmp_path / "teacher")
    file = tmp_path / "teacher/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.weight"]
    save_file(tensors, file)
    geometry = Geometry(height=1, width=1, rows=ROWS, columns=COLUMNS, channels=CONFIG["in_channels"])
    with pytest.raises(TeacherError, match=r"transformer cannot be loaded: .*proj_out\.weight"):
        Backbone.load(tmp_path / "teacher", geometry, text_length=TOKENS, dtype=torch.float32, device=CPU, blocks=1)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return streams_and_gradient(load(), 3)


MODES = {
    "checkpointed": MemoryOptions(activation_checkpointing=1),
    "every second block checkpointed": MemoryOptions(activation_checkpointing=2),
    "streamed": MemoryOptions(gpu_blocks=0),
    "half streamed": MemoryOptions(gpu_blocks=2, activation_checkpointing=1),
    "modulation on the device": MemoryOptions(modulation="gpu"),
    "modulation on the host": MemoryOptions(modulation="cpu"),
}


@pytest.mark.parametrize("loaded", [None, 3])
@pytest.mark.parametrize("options", MODES.values(), ids=list(MODES))
def test_memory_options_keep_the_bits_of_streams_and_gradients(options, loaded, expected):
    for _ in range(2):
        assert all_equal(streams_and_gradient(load(loaded, options), 3), expected)


def test_streams_between_predictions_of_a_streamed_transformer_are_its_own():
    expected = streams_and_gradient(load(), 1), load().predict(*inputs())
    backbone = load(options=MemoryOptions(gpu_blocks=1))
    for _ in range(2):
        assert all_equal(streams_and_gradient(backbone, 1), expected[0])
        assert torch.equal(backbone.predict(*inputs()), expected[1])


@pytest.mark.thorough
@pytest.mark.parametrize("loaded", [None, 3])
def test_compiled_blocks_give_the_same_streams(loaded, expected):
    transformer = load(loaded, MemoryOptions(modulation="gpu")).transformer
    geometry = Geometry(height=1, width=1, rows=ROWS, columns=COLUMNS, channels=CONFIG["in_channels"])
    backbone = Backbone.holding(
        transformer, geometry, text_length=TOKENS, device=CPU, options=MemoryOptions(compile=True, modulation="gpu"),
        compiler="aot_eager",
    )  # fmt: skip
    for found, wanted in zip(streams_and_gradient(backbone, 3), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_blocks_give_about_the_same_streams(kind, expected):
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[kind])
    options = MemoryOptions(quantize=kind, activation_checkpointing=1)
    whole, part = (streams_and_gradient(load(loaded, options), 3) for loaded in (None, 3))
    assert all_equal(whole, part)
    assert 0 < float((part[0] - expected[0]).norm() / expected[0].norm()) < 0.3
