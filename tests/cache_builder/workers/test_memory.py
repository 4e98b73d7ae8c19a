"""A build's bytes do not depend on where the transformer's weights are; a limit chooses where they go."""

import pytest
import torch

from secondcast.cache_builder.checks.pilot import run_pilot
from secondcast.cache_builder.repair.resample import recompute
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.teacher_models import check_text_encoder_fits
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.cost.gpu_memory import CUDA_BYTES, with_margin
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, build_settings, data_files
from tests.evaluation.test_generate import Heard

# Whole batches: on a CPU a row of a smaller one rounds differently with a table that was made for whole ones.
FLAGS = {"steps": 2, "batch_size": 3, "shard_size": 3}
MIB = 2**20


def built(path, teacher, prompts, *, progress=None, **changes):
    settings = build_settings(prompts, **FLAGS | changes)
    build_cache(path, teacher, prompts, progress=progress, config=WorkerConfig.of(settings), **FLAGS | changes)
    return data_files(path)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "precomputed"},
        {"gpu_blocks": 0},
        {"modulation": "precomputed", "gpu_blocks": 1},
    ],
)
def test_every_exact_placement_gives_the_same_bytes(tmp_path, dev_teacher, prompt_file, options, dtype):
    plain = built(tmp_path / "plain", dev_teacher, prompt_file, dtype=dtype)
    assert built(tmp_path / "c", dev_teacher, prompt_file, dtype=dtype, **options) == plain


def test_with_clip_blocks_are_streamed_and_a_table_is_refused(tmp_path, dev_teacher, prompt_file):
    plain = built(tmp_path / "plain", dev_teacher, prompt_file, pooled="clip")
    assert built(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", gpu_blocks=0) == plain
    with pytest.raises(SettingsError, match="^--modulation is precomputed, expected gpu: with CLIP's pooled vectors "):
        built(tmp_path / "d", dev_teacher, prompt_file, pooled="clip", modulation="precomputed")
    assert not (tmp_path / "d").exists()


@pytest.mark.thorough
def test_a_limit_is_answered_with_the_placement_or_with_what_is_missing(tmp_path, dev_teacher, prompt_file):
    heard = Heard()
    limit = f"{with_margin(CUDA_BYTES + 8 * MIB) / MIB:.3f}MiB"
    plain = built(tmp_path / "plain", dev_teacher, prompt_file)
    assert built(tmp_path / "c", dev_teacher, prompt_file, max_gpu_memory=limit, progress=heard) == plain
    [said] = [line for line in heard.lines if line.startswith("to fit into")]
    assert said.startswith("to fit into 1.6 GiB: --modulation gpu, 1.0 GiB by calculation (weights ")
    with pytest.raises(SettingsError, match="^nothing fits into 1.6 GiB: a batch of 3 needs 1.6 GiB or more"):
        built(tmp_path / "d", dev_teacher, prompt_file, max_gpu_memory=f"{with_margin(CUDA_BYTES) / MIB:.3f}MiB")
    with pytest.raises(SettingsError, match="^--max-gpu-memory auto uses the free GPU memory, but this run is on cpu"):
        built(tmp_path / "d", dev_teacher, prompt_file, max_gpu_memory="auto")
    with pytest.raises(
        SettingsError, match="^--gpu-blocks is 1000, expected 0 to 3, the number of loaded blocks of this"
    ):
        built(tmp_path / "d", dev_teacher, prompt_file, gpu_blocks=1000)
    assert not (tmp_path / "d").exists()
    # The text stage needs none of it.
    text = WorkerConfig.of(build_settings(prompt_file, **FLAGS, max_gpu_memory="auto"), stage="text")
    done = build_cache(tmp_path / "t", dev_teacher, prompt_file, config=text, max_gpu_memory="auto", **FLAGS)
    assert (done.embeddings, done.trajectories) == (6, 0)


def test_a_text_encoder_that_does_not_fit_the_gpu_is_sent_to_the_cpu(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, **FLAGS)
    manifest = Cache.open(tmp_path / "c").manifest
    small = SamplingMemory(max_gpu_memory=f"{with_margin(CUDA_BYTES) / MIB:.3f}MiB")
    check_text_encoder_fits(manifest, small, 3, torch.device("cpu"))
    with pytest.raises(SettingsError) as caught:
        check_text_encoder_fits(manifest, small, 3, torch.device("cuda"))
    assert str(caught.value) == (
        "the text encoder needs 1.6 GiB at batch 3, by calculation, --max-gpu-memory leaves 1.6 GiB: first build with "
        "--stage text --device cpu, then with --stage sample"
    )


def test_a_table_is_recorded_and_a_check_on_plain_weights_says_so(tmp_path, dev_teacher, prompt_file):
    # Batches of 3, as large as a shard: the table is for calls of 3.
    flags = {**FLAGS, "batch_size": 16, "dtype": "float32"}
    plain, table = (
        built(tmp_path / name, dev_teacher, prompt_file, **flags, modulation=name) for name in ("gpu", "precomputed")
    )
    assert plain == table
    records = Cache.open(tmp_path / "precomputed").records
    assert {record.provenance.get("modulation") for record in records.values()} == {None, "precomputed"}
    teacher = find_teacher(str(dev_teacher), BUILD_PARTS)
    found = recompute(str(tmp_path / "precomputed"), teacher, torch.device("cpu"), Silent(), count=2, seed=0)
    assert all("modulation" in " ".join(one.differs) for one in found)


@pytest.mark.parametrize("options", [{"modulation": "precomputed"}, {"gpu_blocks": 0}])
def test_a_pilot_checks_the_same_invariants_in_every_placement(tmp_path, dev_teacher, prompt_file, options):
    settings = build_settings(prompt_file, **FLAGS, **options)
    found = run_pilot(
        str(tmp_path / "c"), settings, find_teacher(str(dev_teacher), BUILD_PARTS), torch.device("cpu"), Silent(),
        count=3,
    )  # fmt: skip
    assert found.holds and [check.holds for check in found.checks] == [True, True, True]


def test_modulation_on_the_host_is_refused_before_anything_is_written(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(SettingsError, match="^--modulation is cpu, expected auto, precomputed or gpu: what the host"):
        built(tmp_path / "c", dev_teacher, prompt_file, modulation="cpu")
    assert not (tmp_path / "c").exists()


def test_quantized_weights_are_not_streamed(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(SettingsError, match="^quantize is nf4 with gpu-blocks 1, expected one of the two: "):
        built(tmp_path / "c", dev_teacher, prompt_file, quantize="nf4", gpu_blocks=1)
    assert not (tmp_path / "c").exists()


def test_the_placement_reaches_workers_in_other_processes_as_given():
    asked = BuildSettings.from_flags(prompts=("p.txt",), gpu_blocks=2, max_gpu_memory="16GiB")
    sent = WorkerConfig.model_validate_json(WorkerConfig.of(asked).model_dump_json())
    assert sent.memory == SamplingMemory(gpu_blocks=2, max_gpu_memory="16GiB") and sent.memory.held == {"gpu_blocks"}
