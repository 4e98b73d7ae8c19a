"""A build's bytes do not depend on where the transformer's weights are; a limit chooses where they go."""

import re

import pytest

from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.cost.gpu_memory import CUDA_BYTES
from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.errors import SettingsError
from tests.cache_builder.building import build_cache, build_settings, data_files
from tests.evaluation.test_generate import Heard

# Whole batches: on a CPU a row of a smaller one rounds differently with a table that was made for whole ones.
FLAGS = {"steps": 2, "batch_size": 3, "shard_size": 3}
MIB = 2**20


def built(path, teacher, prompts, *, progress=None, **changes):
    settings = build_settings(prompts, **FLAGS | changes)
    build_cache(path, teacher, prompts, progress=progress, config=WorkerConfig.of(settings), **FLAGS | changes)
    return data_files(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "precomputed"},
        {"gpu_blocks": 0},
        {"modulation": "precomputed", "gpu_blocks": 1},
        {"modulation": "cpu"},
    ],
)
def test_every_exact_placement_gives_the_same_bytes(tmp_path, dev_teacher, prompt_file, options, dtype):
    plain = built(tmp_path / "plain", dev_teacher, prompt_file, dtype=dtype)
    assert built(tmp_path / "c", dev_teacher, prompt_file, dtype=dtype, **options) == plain


def test_with_clip_blocks_are_streamed_and_a_table_is_refused(tmp_path, dev_teacher, prompt_file):
    plain = built(tmp_path / "plain", dev_teacher, prompt_file, pooled="clip")
    assert built(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", gpu_blocks=0) == plain
    with pytest.raises(SettingsError, match="^--modulation is precomputed with --pooled clip, expected gpu or cpu: "):
        built(tmp_path / "d", dev_teacher, prompt_file, pooled="clip", modulation="precomputed")
    assert not (tmp_path / "d").exists()


def test_a_limit_is_answered_with_the_placement_or_with_what_is_missing(tmp_path, dev_teacher, prompt_file):
    heard = Heard()
    limit = f"{CUDA_BYTES // MIB + 8}MiB"
    plain = built(tmp_path / "plain", dev_teacher, prompt_file)
    assert built(tmp_path / "c", dev_teacher, prompt_file, max_gpu_memory=limit, progress=heard) == plain
    [said] = [line for line in heard.lines if line.startswith("to fit into")]
    assert said.startswith("to fit into 1.0 GiB: --modulation gpu, 1.0 GiB by calculation (weights ")
    with pytest.raises(SettingsError) as caught:
        built(tmp_path / "d", dev_teacher, prompt_file, max_gpu_memory=f"{CUDA_BYTES // MIB}MiB")
    assert re.fullmatch(
        r"the text encoder needs 1\.0 GiB at batch 3, by calculation, --max-gpu-memory leaves 1\.0 GiB: first build "
        r"with --stage text --device cpu, then with --stage sample",
        str(caught.value),
    )
    with pytest.raises(SettingsError, match="^--max-gpu-memory auto uses the free GPU memory, but this run is on cpu"):
        built(tmp_path / "e", dev_teacher, prompt_file, max_gpu_memory="auto")
    assert not (tmp_path / "e").exists()


def test_quantized_weights_are_not_streamed(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(SettingsError, match="^quantize is nf4 with gpu-blocks 1, expected one of the two: "):
        built(tmp_path / "c", dev_teacher, prompt_file, quantize="nf4", gpu_blocks=1)
    assert not (tmp_path / "c").exists()


def test_the_placement_reaches_workers_in_other_processes_as_given():
    asked = BuildSettings.from_flags(prompts=("p.txt",), gpu_blocks=2, max_gpu_memory="16GiB")
    sent = WorkerConfig.model_validate_json(WorkerConfig.of(asked).model_dump_json())
    assert sent.memory == SamplingMemory(gpu_blocks=2, max_gpu_memory="16GiB") and sent.memory.held == {"gpu_blocks"}
