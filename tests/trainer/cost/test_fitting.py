"""Which options make a run fit: by the arithmetic of costs, in the stated order."""

import pytest

from secondcast.models.cost.gpu_memory import with_margin
from secondcast.models.cost.network_costs import BackboneCost, BlockCost, TextEncoderCost
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.cost.fitting import fit, helping_flag
from secondcast.trainer.cost.stage_cost import Costs
from secondcast.trainer.settings import TrainFlags, TrainSettings
from tests.models.cost.test_cost import outline

GIB = 2**30
PER_BLOCK = 10**9
# Ten blocks of a billion weights, of which a fourth is modulation; a row keeps 1 GiB of each, or 0.01 as a checkpoint.
BLOCK = BlockCost(
    count=5, parameters=PER_BLOCK, modulation_parameters=PER_BLOCK // 4, modulation_width=100, forward_flops=1e12,
    attention_flops=1e11, backward_flops=1e12, moved_bytes=1e9, saved_bytes=GIB, recomputed_bytes=GIB,
)  # fmt: skip
BACKBONE = BackboneCost(
    parameters=10 * PER_BLOCK, modulation_parameters=10 * PER_BLOCK // 4, conditioning_parameters=0,
    head_parameters=0, modulation_width=1000, largest_linear=PER_BLOCK // 10, forward_flops=1e13, attention_flops=1e12,
    backward_flops=1e13, moved_bytes=1e10, forward_peak_bytes=GIB, backward_bytes=0,
    checkpoint_bytes=GIB // 100, outer_bytes=0,
    kinds=(BLOCK, BLOCK),
)  # fmt: skip
STUDENT = TextEncoderCost(parameters=10**8, forward_flops=1e9, forward_peak_bytes=0, saved_bytes=GIB // 100)


def costs(*, ranks: int = 1, local_ranks: int = 1, quantize: str = "none", **teacher) -> Costs:
    manifest = outline()
    parts = {"teacher": teacher, "sampling_or_none": {"quantize": quantize}}
    changed = {name: getattr(manifest, name).model_copy(update=update) for name, update in parts.items()}
    manifest = manifest.model_copy(update=changed)
    return Costs(
        manifests={"c": manifest}, backbones={"c": BACKBONE}, student=STUDENT, ranks=ranks, local_ranks=local_ranks
    )  # fmt: skip


def asked(**flags) -> TrainSettings:
    return TrainFlags.from_flags(student="any", **{"batch_size": 4} | flags).settings()


def chosen(settings: TrainSettings) -> tuple:
    stage = settings.stages[-1]
    return settings.activation_checkpointing, stage.grad_accum_steps, settings.gpu_blocks, settings.quantize


def fitted(gib: float, *, ranks: int = 1, flags=(), **more):
    return fit(asked(**dict(flags)), costs(ranks=ranks), memory_bytes=with_margin(gib * GIB), **more)


# Weights 14.0 GiB (1.4 of a block), student and AdamW 1.3 (1.7 with gradients), CUDA 1.0; a checkpointed row 1.11.
@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (80, (0, 1, None, "none")),
        (50, (8, 1, None, "none")),
        (24, (1, 1, None, "none")),
        (19, (1, 2, None, "none")),
        (18, (1, 4, None, "none")),
        (17, (1, 1, 5, "none")),
        (10.5, (1, 1, 0, "none")),
        (9, (1, 2, 0, "none")),
        (6.8, (1, 4, 0, "none")),
    ],
)
def test_exact_weights_whole_then_fewer_rows_then_streamed_blocks(gib, expected):
    found = fitted(gib)
    assert chosen(found.settings) == expected
    assert found.memory.total_bytes <= gib * GIB
    assert found.memory == costs().memory(found.settings)


def test_no_fewer_blocks_computed_twice_and_no_more_resident_ones_would_fit():
    every = fitted(50).settings
    fewer = every.model_copy(update={"activation_checkpointing": every.activation_checkpointing + 1})
    assert costs().memory(fewer).total_bytes > 0.97 * 50 * GIB > costs().memory(every).total_bytes
    streamed = fitted(17).settings
    more = streamed.model_copy(update={"gpu_blocks": streamed.gpu_blocks + 1})
    assert costs().memory(more).total_bytes > 0.97 * 17 * GIB


def test_without_host_memory_for_streamed_blocks_weights_are_quantized():
    found = fitted(13, host_bytes=12 * GIB)
    assert chosen(found.settings) == (1, 4, None, "int8")
    assert found.flags == "--activation-checkpointing 1 --quantize int8 --grad-accum-steps 4"
    need = costs().host_bytes(fitted(13, flags={"grad_accum_steps": 4}).settings) / GIB
    assert found.reasons == (
        "the exact weights need 19.0 GiB or more",
        f"streamed blocks need {need:.1f} GiB of host memory, 12.0 GiB are free",
    )
    assert chosen(fitted(13, host_bytes=12 * GIB, quantizers=("nf4",)).settings) == (1, 1, None, "nf4")


def test_what_was_asked_for_stays():
    assert chosen(fitted(24, held={"grad_accum_steps"}).settings) == (1, 1, None, "none")
    assert chosen(fitted(19, held={"grad_accum_steps"}).settings) == (1, 1, 6, "none")
    assert chosen(fitted(30, held={"activation_checkpointing"}).settings) == (0, 4, None, "none")
    assert chosen(fitted(30, flags={"gpu_blocks": 3}, held={"gpu_blocks"}).settings) == (1, 1, 3, "none")
    eight = {"quantize": "int8", "activation_checkpointing": 1}
    assert chosen(fitted(17, flags=eight, held={"quantize"}).settings) == (1, 1, None, "int8")
    # Exact weights were asked for: no other ones, not even where there is no host memory.
    with pytest.raises(SettingsError, match="streamed blocks need"):
        fitted(13, held={"quantize"}, host_bytes=8 * GIB)


def test_each_of_several_processes_has_its_part_of_the_rows():
    assert chosen(fitted(19).settings)[1] == 2
    assert chosen(fitted(19, ranks=2).settings)[1] == 1


def test_the_stage_that_needs_most_is_divided_and_no_other():
    settings = asked(batch_size=8, pretrain_steps=5, steps=5, pretrain_loss="embedding")
    found = fit(settings, costs(), memory_bytes=with_margin(19 * GIB))
    assert [stage.grad_accum_steps for stage in found.settings.stages] == [1, 4]
    assert found.flags == "--activation-checkpointing 1 --grad-accum-steps 4 in stage main"


def test_a_run_without_the_transformer_is_divided_alone():
    settings = asked(loss="embedding", batch_size=512)
    found = fit(settings, costs(), memory_bytes=with_margin(4 * GIB))
    assert found.settings.stages[0].grad_accum_steps > 1 and found.settings.activation_checkpointing == 0


def test_what_nothing_makes_fit_is_told_with_the_least_there_is():
    with pytest.raises(SettingsError) as raised:
        fitted(5)
    text = str(raised.value)
    assert text.startswith(
        "nothing fits into 5.7 GiB: the exact weights need 19.0 GiB or more; streamed blocks need 7.4 GiB or more; "
        "int8 weights need 13.2 GiB or more; nf4 weights need "
    )
    assert text.endswith(
        "The student and AdamW need 1.7 GiB and each row 1.11 GiB: use a smaller student, a cache with fewer pixels or "
        "text tokens, or a larger GPU"
    )


@pytest.mark.parametrize(
    ("flags", "held", "expected"),
    [
        ({"modulation": "gpu"}, (), "--modulation auto"),
        ({"modulation": "gpu"}, ("modulation",), "--activation-checkpointing 1"),
        ({}, (), "--activation-checkpointing 1"),
        ({"activation_checkpointing": 3}, (), "--activation-checkpointing 1"),
        ({"activation_checkpointing": 1}, (), "--grad-accum-steps 2"),
        ({"activation_checkpointing": 1, "grad_accum_steps": 2}, (), "--grad-accum-steps 4"),
        ({"activation_checkpointing": 1}, ("grad_accum_steps",), "--gpu-blocks 5"),
        ({"activation_checkpointing": 1, "grad_accum_steps": 4}, (), "--gpu-blocks 5"),
        ({"grad_accum_steps": 4, "gpu_blocks": 5}, (), "--gpu-blocks 2"),
        ({"grad_accum_steps": 4, "gpu_blocks": 0}, (), None),
        ({"activation_checkpointing": 1, "grad_accum_steps": 4, "quantize": "int8"}, (), "--quantize nf4"),
        ({"activation_checkpointing": 1, "grad_accum_steps": 4, "quantize": "nf4"}, (), None),
        ({"loss": "embedding"}, (), "--grad-accum-steps 2"),
        ({"loss": "embedding", "batch_size": 1}, (), None),
    ],
)
def test_the_flag_that_helps_next_is_the_least_harmful_that_is_left(flags, held, expected):
    assert helping_flag(asked(**flags), costs(), held=held) == expected


def test_a_warm_up_before_the_transformers_steps_has_its_weights_beside_it():
    settings = asked(batch_size=256, pretrain_steps=5, steps=5, pretrain_loss="embedding", activation_checkpointing=1)
    pretrain, main = (costs().stage_memory(settings, stage) for stage in settings.stages)
    assert pretrain.weights_bytes == main.weights_bytes > 10 * GIB
    alone = asked(loss="embedding", batch_size=256)
    assert costs().memory(alone).weights_bytes == 0
    # Its own rows are what is too much here, once the others are few.
    found = fit(settings, costs(), memory_bytes=with_margin(17.9 * GIB), held={"gpu_blocks", "quantize"})
    assert found.settings.stages[0].grad_accum_steps > 1
    assert all(costs().stage_memory(found.settings, s).total_bytes < 17.9 * GIB for s in found.settings.stages)


def test_an_average_of_the_student_takes_memory_of_its_own():
    with_one, without = (costs().memory(asked(ema_decay=ema)) for ema in (0.99, None))
    assert with_one.student_bytes - without.student_bytes == 4 * STUDENT.parameters


def test_fewer_rows_are_tried_before_blocks_are_not_streamed_for_want_of_host_memory():
    needs = [costs().host_bytes(fitted(13, held=held).settings) for held in ({"grad_accum_steps"}, ())]
    divided = asked(grad_accum_steps=4)
    least = costs().host_bytes(fit(divided, costs(), memory_bytes=with_margin(13 * GIB)).settings)
    assert least < min(needs)
    found = fitted(13, host_bytes=least)
    assert found.settings.gpu_blocks is not None and found.settings.stages[0].grad_accum_steps == 4
    assert costs().host_bytes(found.settings) <= least
    # Of all the processes of a machine.
    both = fit(asked(), costs(local_ranks=2), memory_bytes=with_margin(13 * GIB), host_bytes=2 * least - 1)
    assert chosen(both.settings)[2:] == (None, "int8")
    assert f"streamed blocks need {2 * least / GIB:.1f} GiB of host memory, " in both.reasons[-1]


def test_host_memory_is_asked_for_only_where_blocks_are_pinned_in_it():
    assert chosen(fitted(24, host_bytes=GIB).settings) == (1, 1, None, "none")


@pytest.mark.parametrize(("kind", "activation_checkpointing"), [("int8", 1), ("fp8", 1), ("nf4", 0)])
def test_quantized_caches_are_replayed_with_the_weights_they_were_sampled_with(kind, activation_checkpointing):
    found = fit(asked(), costs(quantize=kind), memory_bytes=with_margin(80 * GIB))
    assert chosen(found.settings) == (activation_checkpointing, 1, None, kind)
    assert f"--quantize {kind}" in found.flags
    exact = fit(asked(), costs(quantize=kind), memory_bytes=with_margin(80 * GIB), held={"quantize"})
    assert exact.settings.quantize == "none"
    # Without the transformer it does not matter.
    assert (
        fit(asked(loss="embedding"), costs(quantize=kind), memory_bytes=with_margin(80 * GIB)).settings.quantize
        == "none"
    )


def test_weights_that_do_not_go_with_what_was_asked_for_are_refused_in_one_line():
    with pytest.raises(SettingsError) as raised:
        fit(
            asked(activation_checkpointing=2),
            costs(quantize="int8"),
            memory_bytes=with_margin(80 * GIB),
            held={"activation_checkpointing"},
        )
    assert str(raised.value).startswith(
        "quantize is int8 with activation-checkpointing 2, expected 1: each linear keeps"
    )


def test_resident_blocks_stay_as_they_were_asked_to_be_checkpointed():
    flags, held = {"gpu_blocks": 3}, {"gpu_blocks", "activation_checkpointing"}
    assert chosen(fitted(60, flags=flags, held=held).settings) == (0, 1, 3, "none")


def test_a_stage_that_states_its_parts_keeps_them_and_the_others_are_divided():
    settings = asked(batch_size=8, pretrain_steps=5, steps=5, pretrain_loss="embedding")
    assert (
        chosen(fit(settings, costs(), memory_bytes=with_margin(19 * GIB), held={"grad_accum_steps pretrain"}).settings)[
            1
        ]
        == 4
    )
    kept = fit(settings, costs(), memory_bytes=with_margin(19 * GIB), held={"grad_accum_steps main"}).settings
    assert chosen(kept)[1] == 1 and kept.gpu_blocks is not None


def test_weights_that_no_package_here_quantizes_are_named_where_nothing_fits():
    with pytest.raises(
        SettingsError, match=r"; int8 and nf4 weights are not tried without pip install 'secondcast\[quant\]'\. The"
    ):
        fitted(5, quantizers=())
    with pytest.raises(SettingsError) as raised:
        fitted(5, quantizers=(), held={"quantize"})
    assert "not tried" not in str(raised.value)
