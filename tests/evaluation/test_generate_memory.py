"""Pictures do not depend on where the weights are, and a limit chooses where they go."""

import re

import pytest

from secondcast.evaluation import generate as generate_module
from secondcast.evaluation.sampling import Generator
from secondcast.models.cost.gpu_memory import CUDA_BYTES, with_margin
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import SettingsError
from tests.evaluation.test_generate import Heard, pictures, run, student, t5_config

__all__ = ["student", "t5_config"]

FOUR = ["a red dog on the left", "two cats", "a blue car", "a sign that says no"]


@pytest.fixture(scope="module")
def plain(student, dev_teacher, tmp_path_factory):
    """Whole batches: a row of a smaller one rounds differently on a CPU, whatever the placement."""
    folder = tmp_path_factory.mktemp("plain") / "p"
    run(student, dev_teacher, folder, FOUR, memory=SamplingMemory(modulation="gpu"))
    return pictures(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modulation": "precomputed"},
        {"modulation": "gpu", "gpu_blocks": 0},
        {"modulation": "precomputed", "gpu_blocks": 1},
    ],
)
def test_every_exact_placement_gives_the_same_pictures(options, plain, student, dev_teacher, tmp_path):
    run(student, dev_teacher, tmp_path / "p", FOUR, memory=SamplingMemory(**options))
    assert pictures(tmp_path / "p") == plain


def test_pictures_with_clip_are_the_same_in_every_placement(student, dev_teacher, tmp_path):
    for name, options in {"a": {}, "b": {"gpu_blocks": 1}, "c": {"gpu_blocks": 0}}.items():
        run(student, dev_teacher, tmp_path / name, FOUR, memory=SamplingMemory(**options), pooled="clip")
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") == pictures(tmp_path / "c")
    with pytest.raises(SettingsError, match=r"^--modulation is precomputed, expected gpu: with CLIP's pooled vectors "):
        run(student, dev_teacher, tmp_path / "d", FOUR, memory=SamplingMemory(modulation="precomputed"), pooled="clip")


@pytest.mark.thorough
def test_a_limit_is_answered_with_the_placement_or_with_what_is_missing(plain, student, dev_teacher, tmp_path):
    heard = Heard()
    run(student, dev_teacher, tmp_path / "p", FOUR, memory_bytes=with_margin(CUDA_BYTES + 2**20), progress=heard)
    assert pictures(tmp_path / "p") == plain
    assert re.fullmatch(
        r"to fit into 1\.6 GiB: --modulation precomputed, 1\.0 GiB by calculation \(weights [\d.]+ KiB, a batch "
        r"of 2 [\d.]+ KiB\); the weights stay exact",
        heard.lines[-1],
    )
    with pytest.raises(SettingsError) as caught:
        run(student, dev_teacher, tmp_path / "none", FOUR, memory_bytes=with_margin(CUDA_BYTES))
    assert str(caught.value) == (
        "nothing fits into 1.6 GiB: a batch of 2 needs 1.6 GiB or more, 0.0 of it for weights: give a smaller "
        "--batch-size, or a larger GPU"
    )
    # Nothing was written that would refuse the corrected command.
    assert not (tmp_path / "none").exists()
    for wrong, message in (
        ({"gpu_blocks": 1000}, "--gpu-blocks is 1000, expected 0 to 3"),
        ({"modulation": "cpu"}, "--modulation is cpu, expected auto, precomputed or gpu"),
    ):
        with pytest.raises(SettingsError, match=f"^{message}"):
            run(student, dev_teacher, tmp_path / "none", FOUR, memory=SamplingMemory(**wrong))
    assert not (tmp_path / "none").exists()


def test_a_given_option_is_kept_by_the_limit(student, dev_teacher, tmp_path):
    with pytest.raises(SettingsError, match="nothing fits into"):
        run(
            student, dev_teacher, tmp_path / "p", FOUR, memory=SamplingMemory(modulation="gpu", gpu_blocks=2),
            memory_bytes=with_margin(CUDA_BYTES + 200_000),
        )  # fmt: skip


def test_the_teachers_text_encoder_is_freed_before_the_transformer_is_loaded(dev_teacher, tmp_path, monkeypatch):
    events: list[str] = []
    load, open_generator, release = TeacherTextEncoder.load, Generator.open, generate_module.release_memory

    def noting(name, function):
        def noted(*args, **options):
            events.append(name)
            return function(*args, **options)

        return noted

    monkeypatch.setattr(TeacherTextEncoder, "load", noting("load T5", load))
    monkeypatch.setattr(Generator, "open", noting("load transformer", open_generator))
    monkeypatch.setattr(generate_module, "release_memory", noting("free", release))
    run("teacher", dev_teacher, tmp_path / "whole", FOUR)
    assert events == ["load T5", "free", "load transformer", "free"]
    # Host memory for the embeddings of one batch: two passes.
    events.clear()
    monkeypatch.setattr(generate_module, "free_host_bytes", lambda: 1)
    run("teacher", dev_teacher, tmp_path / "passes", FOUR)
    assert events == ["load T5", "free", "load transformer", "free"] * 2
    assert pictures(tmp_path / "passes") == pictures(tmp_path / "whole")
