"""What holds for all families with classifier-free guidance: replay, gradients, memory options, streams, training."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from secondcast.cache_builder.checks.equivalence import check_equivalence
from secondcast.cache_builder.teacher_models import load_backbone
from secondcast.models.backbone import Backbone
from secondcast.models.families.family import TEXT_MASK, Family
from secondcast.models.families.pixart import PIXART_SIGMA
from secondcast.models.families.registry import family_named
from secondcast.models.families.sd3 import SD3
from secondcast.models.families.text import Text, recorded_text
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.student.student import load_student
from secondcast.models.teacher.folder import REPLAY_PARTS, build_parts, find_teacher
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from tests.cache_builder.building import build_cache
from tests.models.families.random_pixart import make_pixart
from tests.models.families.random_sd3 import make_sd3

MAKE = {"sd3": make_sd3, "pixart-sigma": make_pixart}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = ["a red dog on the left", "two cats", "a blue car", "three dogs"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[SD3, PIXART_SIGMA], ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory) -> Path:
    return MAKE[family.name](tmp_path_factory.mktemp("teachers") / family.name)


@pytest.fixture(scope="module")
def recorded(teacher, tmp_path_factory) -> Path:
    """Not square, in fp32, at several guidance scales."""
    folder = tmp_path_factory.mktemp("caches")
    (folder / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    build = partial(build_cache, batch_size=4, shard_size=4, seed=5)
    build(folder / "c", teacher, folder / "p.txt", dtype="float32", height=16, width=24)
    return folder / "c"


def backbone_of(cache: Cache, teacher: Path, **options: Any) -> Backbone:
    sampling = cache.manifest.sampling
    return Backbone.load(
        teacher,
        recorded_geometry(sampling),
        text_length=cache.manifest.teacher.text_length,
        dtype=DTYPES[sampling.dtype],
        device=CPU,
        options=MemoryOptions(**options),
        pooled_varies=True,
    )


def first_calls(cache: Cache, k: int) -> tuple[torch.Tensor, Text, torch.Tensor]:
    """Latents, text and timesteps of all trajectories at step k."""
    trajectories = [cache.trajectory(index) for index in range(len(cache))]
    x_BSC = torch.stack([to_torch(t.hidden_states_KSC[k]) for t in trajectories])
    sampling, family = cache.manifest.sampling, family_named(cache.manifest.teacher.family)
    timestep_B = torch.full((len(x_BSC),), sampling.timesteps[k], dtype=family.timestep_dtype(DTYPES[sampling.dtype]))
    return x_BSC, recorded_text(cache, [t.prompt for t in trajectories]), timestep_B


def test_the_checks_of_a_pilot_hold_in_both_halves_of_a_call(teacher, recorded):
    cache = Cache.open(recorded)
    found = find_teacher(str(teacher), build_parts(None))
    checks = check_equivalence(cache, load_backbone(cache.manifest, found, CPU), found, range(len(cache)))
    assert [check.holds for check in checks] == [True, None, True]


@pytest.mark.parametrize("k", [0, 3])
def test_the_conditional_half_alone_replays_within_rounding(teacher, recorded, k):
    cache = Cache.open(recorded)
    x_BSC, text, timestep_B = first_calls(cache, k)
    with torch.no_grad():
        found_BSC = backbone_of(cache, teacher).predict(x_BSC, text.embedding_BTD, text.conditioning, timestep_B, None)
    wanted_BSC = torch.stack([to_torch(cache.trajectory(i).velocity_KSC[k]) for i in range(len(cache))])
    # Half of the rows may be summed in another order: 2e-7 to 6e-7 here, some of fp32's roundings of 6e-8 each. Text of
    # another prompt gives more than 1e-3.
    assert float((found_BSC - wanted_BSC).norm() / wanted_BSC.norm()) < 1e-5


def gradient_of(backbone: Backbone, x_BSC: torch.Tensor, text: Text, timestep_B: torch.Tensor) -> torch.Tensor:
    embedding_BTD = text.embedding_BTD.clone().requires_grad_()
    backbone.predict(x_BSC, embedding_BTD, text.conditioning, timestep_B, None).square().sum().backward()
    assert embedding_BTD.grad is not None
    return embedding_BTD.grad


@pytest.mark.parametrize("options", [{"activation_checkpointing": 1}, {"gpu_blocks": 1}, {"gpu_blocks": 0}])
def test_checkpointed_and_streamed_blocks_give_the_same_gradient_of_the_text(family, teacher, recorded, options):
    cache = Cache.open(recorded)
    calls, plain = first_calls(cache, 1), backbone_of(cache, teacher)
    wanted_BTD = gradient_of(plain, *calls)
    # Of every token that the transformer reads, and of no other.
    mask_BT = calls[1].conditioning.get(TEXT_MASK, torch.ones(wanted_BTD.shape[:2]))
    assert torch.equal(wanted_BTD.abs().sum(-1) > 0, mask_BT > 0)
    assert all(parameter.grad is None for parameter in plain.transformer.parameters())
    found_BTD = gradient_of(backbone_of(cache, teacher, **options), *calls)
    if family.anatomy.cross_attention and "gpu_blocks" in options:
        # Text enters every block: its gradient is a sum over blocks, whose order differs where they are recomputed.
        assert float((found_BTD - wanted_BTD).norm() / wanted_BTD.norm()) < 1e-5
    else:
        assert torch.equal(found_BTD, wanted_BTD)


def test_modulation_vectors_computed_on_the_host_replace_their_weights(family, teacher, recorded):
    if not family.anatomy.modulation:
        with pytest.raises(SettingsError) as error:
            backbone_of(Cache.open(recorded), teacher, modulation="cpu")
        assert str(error.value) == (
            "--modulation is cpu, expected auto: this transformer has no modulation weights, whose place it states; "
            "remove it"
        )
        return
    cache = Cache.open(recorded)
    calls = first_calls(cache, 1)
    kept = backbone_of(cache, teacher, modulation="cpu")
    assert kept.modulation == "cpu"
    found_BTD, wanted_BTD = gradient_of(kept, *calls), gradient_of(backbone_of(cache, teacher), *calls)
    # All vectors are computed in one call, whose sums may differ in their last bits.
    assert float((found_BTD - wanted_BTD).norm() / wanted_BTD.norm()) < 1e-5


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_streams_after_the_first_blocks_are_those_of_the_whole_transformer(teacher, recorded, blocks):
    cache = Cache.open(recorded)
    x_BSC, text, timestep_B = first_calls(cache, 1)
    given = (x_BSC, text.embedding_BTD, text.conditioning, timestep_B, None)
    backbone, found = backbone_of(cache, teacher), dict[int, Any]()
    for number, block in enumerate(backbone.transformer.transformer_blocks, 1):
        block.register_forward_hook(lambda _, __, output, number=number: found.__setitem__(number, output))
    backbone.predict(*given)
    part = Backbone.load(
        teacher, recorded_geometry(cache.manifest.sampling), text_length=12, dtype=torch.float32, device=CPU,
        options=MemoryOptions(), blocks=blocks,
    )  # fmt: skip
    image_BSI, text_BTI = part.streams(blocks, *given)
    if isinstance(found[blocks], torch.Tensor):
        # The text passes beside the blocks.
        assert torch.equal(image_BSI, found[blocks])
        assert torch.equal(text_BTI, backbone.transformer.caption_projection(text.embedding_BTD))
    else:
        assert torch.equal(image_BSI, found[blocks][1])
        # The last block gives no text: it is that before it.
        assert torch.equal(text_BTI, found[min(blocks, 2)][0])


def test_training_reads_the_transformer_alone_and_moves_the_student_alone(family, teacher, recorded, tmp_path):
    from tests.trainer.test_train import run_training

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "transformer").symlink_to(teacher / "transformer")
    (alone / "model_index.json").symlink_to(teacher / "model_index.json")
    before = getattr(diffusers, family.transformer).from_pretrained(alone, subfolder="transformer").state_dict()
    student = write_t5(teacher / family.slot, tmp_path / "t5")
    run_training(tmp_path / "r", recorded, alone, student, steps=2, batch_size=2)
    assert find_teacher(str(alone), REPLAY_PARTS).family is family_named(family.name)
    made = load_student(next((tmp_path / "r").glob("checkpoint-*")) / "student")
    cache = Cache.open(recorded)
    ids_1T = torch.from_numpy(cache.padded_token_ids(0))[None]
    assert same_bits(from_torch(made(ids_1T)[0][0]), cache.embedding(0))
    after = getattr(diffusers, family.transformer).from_pretrained(alone, subfolder="transformer").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def write_t5(encoder: Path, folder: Path) -> Path:
    """The configuration of a smaller T5."""
    folder.mkdir()
    config = json.loads((encoder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    return folder
