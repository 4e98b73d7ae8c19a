"""Streamed blocks compute what resident ones do, and each weight is copied when it has to be. On a CPU.

There the slots are plain host tensors and a copy is done at once, the earliest that a GPU could begin it; `Late` spoils
the slot then, and copies at the latest moment that is allowed.
"""

import copy
from itertools import chain

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.backbone import Backbone
from secondcast.models.cost.gpu_memory import held_weights
from secondcast.models.cost.network_costs import BackboneCost, BlockCost
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import geometry_of
from secondcast.models.memory.blocks import streamed_blocks
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.modulation_table import modulation_parameters, modulation_width
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.ring import Slot, Transfers, _pinned
from secondcast.models.memory.streaming import Streaming, stream_blocks
from secondcast.storage_schemas.errors import SettingsError

CPU = torch.device("cpu")
DOUBLE, SINGLE = 3, 4
BLOCKS = DOUBLE + SINGLE
GEOMETRY = geometry_of(height=16, width=16, token_px=4, channels=16)
TEXT_LENGTH = 6


def transformer(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).to(dtype)  # fmt: skip


class Recorder(Transfers):
    """Notes which block is copied."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.copied: list[int] = []

    def copy(self, slot: Slot, flat: torch.Tensor) -> None:
        assert slot.holds is not None
        self.copied.append(slot.holds)
        super().copy(slot, flat)

    def take(self) -> list[int]:
        copied, self.copied = self.copied, []
        return copied


class Late(Transfers):
    """Spoils a slot when a copy is asked for, and copies when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.waiting: dict[int, tuple[Slot, torch.Tensor]] = {}

    def copy(self, slot: Slot, flat: torch.Tensor) -> None:
        slot.buffer.fill_(255)
        self.waiting[id(slot)] = (slot, flat)

    def acquire(self, slot: Slot) -> None:
        if id(slot) in self.waiting:
            super().copy(*self.waiting.pop(id(slot)))


def streamed(model: FluxTransformer2DModel, transfers: Transfers, **options) -> Streaming:
    streaming = stream_blocks(copy.deepcopy(model), device=CPU, **options)
    if streaming.ring is not None:
        streaming.ring.transfers = transfers
    return streaming


class Replay:
    """Steps of training with one model: predictions of given inputs, and gradients of the embedding."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        self.backbone = Backbone(model, GEOMETRY, text_length=TEXT_LENGTH)

    def predict(self, step: int, *, gradient: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(step)
        dtype = self.backbone.dtype
        x_BSC = torch.randn(2, GEOMETRY.image_tokens, GEOMETRY.channels, generator=draw).to(dtype)
        embedding_BTD = torch.randn(2, TEXT_LENGTH, 24, generator=draw).to(dtype).requires_grad_(gradient)
        timestep_B = torch.tensor([0.9, 0.3], dtype=dtype)
        found_BSC = self.backbone.predict(
            x_BSC, embedding_BTD, self.backbone.zero_pooled(2), timestep_B, torch.tensor([3.5, 2.0])
        )
        return embedding_BTD, found_BSC

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        embedding_BTD, found_BSC = self.predict(step)
        found_BSC.float().square().mean().backward()
        assert embedding_BTD.grad is not None
        return found_BSC.detach(), embedding_BTD.grad


def assert_same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) and bool(b.isfinite().all()) and bool(b.abs().sum() > 0)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def plain(request) -> tuple[FluxTransformer2DModel, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model, and what its steps give."""
    model = transformer(request.param)
    replay = Replay(copy.deepcopy(model))
    return model, [replay.step(step) for step in range(2)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("resident", "slots", "checkpoint_resident"),
    [(0, 1, True), (0, 2, True), (0, 9, True), (3, 1, False), (3, 2, True), (6, 2, False), (7, 2, True)],
)
def test_outputs_and_gradients_are_the_plain_model_s_bit_for_bit(plain, resident, slots, checkpoint_resident):
    model, wanted = plain
    options = {"resident": resident, "slots": slots, "checkpoint_resident": checkpoint_resident}
    ours = Replay(streamed(model, Late(), **options).transformer)
    for step, expected in enumerate(wanted):
        assert_same(ours.step(step), expected)


def test_each_block_is_copied_once_in_each_direction_and_none_again_at_the_turn():
    recorder = Recorder()
    replay = Replay(streamed(transformer(), recorder, resident=0).transformer)
    _, found_BSC = replay.predict(0)
    assert recorder.take() == [0, 1, 2, 3, 4, 5, 6]
    found_BSC.sum().backward()
    assert recorder.take() == [4, 3, 2, 1, 0]
    for step in (1, 2):
        _, found_BSC = replay.predict(step)
        assert recorder.take() == [2, 3, 4, 5, 6]
        found_BSC.sum().backward()
        assert recorder.take() == [4, 3, 2, 1, 0]


def test_a_block_is_copied_while_the_one_before_it_computes():
    seen = []
    recorder = Recorder()
    streaming = streamed(transformer(), recorder, resident=0)
    for number, block in enumerate(streaming.transformer.transformer_blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: seen.append((number, recorder.copied[-1])))
    _, found_BSC = Replay(streaming.transformer).predict(0)
    assert seen == [(0, 1), (1, 2), (2, 3)]
    seen.clear()
    found_BSC.sum().backward()
    assert seen == [(2, 1), (1, 0), (0, 0)]


def test_a_streamed_block_computes_with_the_weights_in_a_slot():
    streaming = streamed(transformer(), Recorder(), resident=3)
    assert streaming.ring is not None
    slots = {slot.buffer.data_ptr(): slot for slot in streaming.ring.slots}
    model = streaming.transformer
    seen = []

    def note(block, *_):
        seen.append({parameter.untyped_storage().data_ptr() for parameter in block.parameters()} <= slots.keys())

    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        next(block.children()).register_forward_hook(note)
    Replay(model).step(0)
    forward = [False, True, False, True, False, True, True]
    assert seen == forward + forward[::-1]


def test_passes_without_gradients_begin_where_the_last_one_led_to():
    model, recorder = transformer(), Recorder()
    plain, ours = Replay(copy.deepcopy(model)), Replay(streamed(model, recorder, resident=2).transformer)
    with torch.no_grad():
        wanted = plain.predict(0)[1]
        assert torch.equal(ours.predict(0)[1], wanted)
        assert recorder.take() == [0, 1, 2, 3, 4, 0, 1]
        assert torch.equal(ours.predict(0)[1], wanted)
        assert recorder.take() == [2, 3, 4, 0, 1]
    with torch.inference_mode():
        assert torch.equal(ours.predict(0)[1], wanted)
        assert recorder.take() == [2, 3, 4, 0, 1]
    # Nothing that requires a gradient: no backward pass follows either.
    assert torch.equal(ours.predict(0, gradient=False)[1], wanted)
    assert recorder.take() == [2, 3, 4, 0, 1]
    assert_same(ours.step(1), plain.step(1))
    assert recorder.take() == [2, 3, 4, 2, 1, 0]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_order_that_nobody_foresaw_is_slower_and_right(slots):
    model = transformer()
    plain, ours = Replay(copy.deepcopy(model)), Replay(streamed(model, Late(), resident=1, slots=slots).transformer)
    wanted = [plain.step(step) for step in range(2)]
    ours.predict(5)  # a forward pass that nothing follows
    (first_BTD, first_BSC), (second_BTD, second_BSC) = ours.predict(0), ours.predict(1)
    with torch.no_grad():
        ours.predict(6)
    (first_BSC.square().mean() + second_BSC.square().mean()).backward()
    assert_same((first_BSC, first_BTD.grad), wanted[0])
    assert_same((second_BSC, second_BTD.grad), wanted[1])


def test_a_block_that_fails_gives_its_slot_back():
    model = transformer()
    streaming = streamed(model, Late(), resident=0)
    replay = Replay(streaming.transformer)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = streaming.transformer.transformer_blocks[1].ff.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        replay.step(0)
    hook.remove()
    assert_same(replay.step(0), Replay(model).step(0))


@pytest.mark.thorough
def test_a_streamed_block_keeps_its_inputs_alone_for_the_backward_pass():
    def saved_elements(model: FluxTransformer2DModel) -> int:
        kept: dict[int, torch.Tensor] = {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = Replay(model).predict(0)
        del result
        return sum(tensor.numel() for tensor in kept.values())

    tokens = 2 * (GEOMETRY.image_tokens + TEXT_LENGTH)
    plain, inputs = saved_elements(transformer()), BLOCKS * tokens * 32
    for resident in (0, 3, BLOCKS):
        found = saved_elements(streamed(transformer(), Late(), resident=resident).transformer)
        assert inputs < found < 1.5 * inputs < plain / 5
    kept = saved_elements(streamed(transformer(), Late(), resident=3, checkpoint_resident=False).transformer)
    assert 1.5 * inputs < kept < plain


def test_the_model_stays_whole_and_frozen():
    model = transformer(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    ours = streamed(model, Recorder(), resident=2).transformer
    Replay(ours).step(0)
    after = ours.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("resident", range(BLOCKS + 1))
def test_bytes_are_those_of_the_buffers_and_every_weight_is_counted(resident):
    model = transformer(torch.bfloat16)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    streaming = stream_blocks(model, device=CPU, resident=resident)
    hosts = streaming.hosts
    assert len(hosts) == BLOCKS - resident
    ring = 2 * max((len(host.flat) for host in hosts), default=0) if len(hosts) > 1 else streaming.host_bytes
    weights = streaming.device_bytes - ring + streaming.host_bytes
    # A tensor begins at a multiple of 512 bytes.
    assert whole <= weights <= whole + 512 * sum(len(host.tensors) for host in hosts)
    assert all(tensor.data_ptr() % 2 == 0 for tensor in chain(model.parameters(), model.buffers()))


@pytest.mark.parametrize(("resident", "expected"), [(0, range(7)), (4, (2, 4, 6)), (5, (3, 6)), (6, (6,)), (7, ())])
def test_streamed_blocks_are_spread_among_the_resident_ones(resident, expected):
    model = transformer()
    streaming = stream_blocks(model, device=CPU, resident=resident)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(host.flat.untyped_storage().data_ptr() in held for host in streaming.hosts)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    own = {host.flat.untyped_storage().data_ptr() for host in streaming.hosts}
    found = [i for i, block in enumerate(blocks) if next(block.parameters()).untyped_storage().data_ptr() in own]
    assert found == list(expected)


def test_a_number_of_blocks_that_the_model_does_not_have_is_refused():
    with pytest.raises(SettingsError) as error:
        stream_blocks(transformer(), device=CPU, resident=8)
    assert str(error.value) == (
        "--gpu-blocks is 8, expected 0 to 7, the number of loaded blocks of this transformer: use 7"
    )
    with pytest.raises(SettingsError) as error:
        stream_blocks(transformer(), device=CPU, resident=-1)
    assert str(error.value).endswith(": use 0")
    with pytest.raises(SettingsError, match="slots is 0, expected at least 1"):
        stream_blocks(transformer(), device=CPU, resident=0, slots=0)


class Runtime:
    """The two calls of CUDA's runtime that pin memory, with its rule that a page is registered once."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.pinned = answer, {}

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        pages = range(address // 4096, -(-(address + size_bytes) // 4096))
        assert address % 4096 == 0 and not any(page in other for other in self.pinned.values() for page in pages)
        self.pinned[address] = pages
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_buffers_have_pages_of_their_own_and_are_unpinned_when_they_go(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = (512, 4096, 4608, 100_352)
    buffers = [_pinned(size) for size in sizes]
    assert [len(buffer) for buffer in buffers] == list(sizes)
    for size, pages in zip(sizes, runtime.pinned.values(), strict=True):
        assert len(pages) == -(-size // 4096)
    # Every dtype can be viewed in it.
    assert buffers[0][512 - 16 :].view(torch.float64).shape == (2,)
    del buffers[1:]
    assert list(runtime.pinned) == [buffers[0].data_ptr()]


def test_host_memory_that_cannot_be_pinned_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(answer=2))
    with pytest.raises(SettingsError) as error:
        _pinned(2**29)
    assert str(error.value) == (
        "0.50 GiB of host memory for a streamed block cannot be pinned (CUDA error 2): raise the limit of locked "
        "memory (ulimit -l), or --gpu-blocks"
    )


@pytest.mark.parametrize("resident", [0, 3, BLOCKS])
def test_streamed_weights_lie_where_planning_says(resident):
    model, anatomy = transformer(), FLUX.anatomy
    kinds = [model.transformer_blocks[0], model.single_transformer_blocks[0]]
    blocks = [
        BlockCost(
            count=count, parameters=parameter_count(block), modulation_parameters=modulation_parameters(block, anatomy),
            modulation_width=modulation_width(block, anatomy), forward_flops=0, attention_flops=0,
            backward_flops=0, moved_bytes=0, saved_bytes=0, recomputed_bytes=0,
        )
        for count, block in zip((DOUBLE, SINGLE), kinds, strict=True)
    ]  # fmt: skip
    cost = BackboneCost(
        parameters=parameter_count(model), modulation_parameters=modulation_parameters(model, anatomy),
        conditioning_parameters=parameter_count(model.time_text_embed),
        head_parameters=sum(parameter_count(model.get_submodule(name)) for name in anatomy.head),
        modulation_width=modulation_width(model, anatomy),
        largest_linear=0, forward_flops=0, attention_flops=0, backward_flops=0, moved_bytes=0, forward_peak_bytes=0,
        backward_bytes=0, checkpoint_bytes=0, outer_bytes=0, kinds=tuple(blocks),
    )  # fmt: skip
    options = MemoryOptions(modulation="gpu", gpu_blocks=resident)
    held = held_weights(cost, options, dtype_bytes=4, table_rows=None)
    streaming = stream_blocks(model, device=CPU, resident=resident)
    # Tensors begin at multiples of 512 bytes.
    assert held.pinned_bytes <= streaming.host_bytes < 1.2 * held.pinned_bytes + 1
    rings = sum(slot.buffer.nbytes for slot in streaming.ring.slots) if streaming.ring else 0
    assert streaming.device_bytes - rings == held.device_bytes - held_ring(cost, resident)


def held_ring(cost, resident):
    if resident == BLOCKS:
        return 0
    streamed = [cost.kind_of(block).parameters for block in streamed_blocks(resident, BLOCKS)]
    return 2 * 4 * max(streamed)
