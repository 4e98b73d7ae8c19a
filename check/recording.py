"""The first rows: a small cache is built, and the invariants of a recording are checked on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from secondcast.cache_builder.checks.equivalence import EquivalenceCheck, check_equivalence
from secondcast.cache_builder.sample_stage import run_sample_stage, sample_shard
from secondcast.cache_builder.text_stage import run_text_stage
from secondcast.check.machine import with_memory
from secondcast.check.results import CheckRow
from secondcast.check.teachers import WHOLE, CheckTeacher
from secondcast.models.backbone import Backbone
from secondcast.models.cost.placement import place, sample_stage_cost
from secondcast.models.device import total_bytes
from secondcast.models.families.family import Role
from secondcast.models.memory.host_memory import free_host_bytes
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.peak import begin_peak, release_memory
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.progress import Progress, Silent, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch
from secondcast.storage_schemas.writer import CacheWriter

_CLAIMS = {
    "weights": "the loaded weights are those of the files",
    "embedding": "the recorded embeddings are the pipeline's (invariant 10)",
    "pipeline": "sampling ends with the pipeline's final latents (invariant 1)",
    "latents": "latents derive from noise and predictions (invariant 2)",
    "replay": "the recorded embeddings replay to the recorded predictions (invariant 3)",
    "build": "memory and time of the sample stage of a build",
}
_OF_FILES = ("weights", "embedding")
_RESULTS: dict[bool | None, Any] = {True: "holds", False: "broken", None: "not run"}


def recording_names(teacher: CheckTeacher) -> tuple[str, ...]:
    """Names of the rows; random weights have no files, and no tokenizer."""
    return tuple(name for name in _CLAIMS if teacher.has_files or name not in _OF_FILES)


def _options(teacher: CheckTeacher) -> MemoryOptions:
    """All weights on the device as they are in the files, or the first placement that fits."""
    gpu_bytes = total_bytes(teacher.device)
    if gpu_bytes is None:
        return WHOLE
    cost = sample_stage_cost(teacher.planned[0], teacher.scale.batch_size)
    return place(cost, WHOLE, memory_bytes=gpu_bytes, host_bytes=free_host_bytes()).options


def recording_rows(teacher: CheckTeacher, folder: Path, progress: Progress) -> Iterator[CheckRow]:
    """Build the cache in `folder`, or take the one that is there, and check it; a row after each check."""
    manifest, prompts = teacher.planned
    writer = CacheWriter.create_or_resume(str(folder), manifest, prompts, teacher.folder.tokenizer_files())
    progress_and_sizes: dict[str, Any] = {
        "done": 0, "share": len(prompts), "batch_size": teacher.scale.batch_size, "progress": progress
    }  # fmt: skip
    encoder = teacher.text_encoder()
    text_weights = _weights(teacher, "large_text_encoder", encoder.model) if teacher.has_files else None
    run_text_stage(writer, encoder, writer.missing("embeddings"), **progress_and_sizes)
    if teacher.has_files:
        yield _embedding(teacher, Cache.open(str(folder)), encoder)
    del encoder
    release_memory(teacher.device)
    options = _options(teacher)
    backbone = teacher.backbone(options)
    if text_weights is not None:
        whole = options == WHOLE
        weights = _weights(teacher, "transformer", backbone.transformer) if whole else None
        yield _joined(text_weights, weights, remark="" if whole else "; the transformer is not whole on this GPU")
    begin_peak(teacher.device)
    if shards := writer.missing("trajectories"):
        of_trajectories = progress_and_sizes | {"share": len(writer.layout)}
        run_sample_stage(writer, Cache.open(str(folder)), backbone, shards, **of_trajectories)
    else:
        sample_shard(
            Cache.open(str(folder)), backbone, writer.layout.trajectories[0], len(writer.layout), Silent(), _go_on
        )
    writer.finish()
    yield _build(teacher, backbone, options)
    checks = check_equivalence(Cache.open(str(folder)), backbone, teacher.folder, range(len(writer.layout)))
    for name, check in zip(("pipeline", "latents", "replay"), checks, strict=True):
        yield _of_check(name, check)


def _go_on() -> None:
    pass


def _of_check(name: str, check: EquivalenceCheck) -> CheckRow:
    return CheckRow(name=name, claim=_CLAIMS[name], result=_RESULTS[check.holds], detail=check.description)


def _build(teacher: CheckTeacher, backbone: Backbone, options: MemoryOptions) -> CheckRow:
    planned = sample_stage_cost(teacher.planned[0], teacher.scale.batch_size).memory(options)
    detail = f"attention kernel {backbone.attention_kernel}"
    row = CheckRow(name="build", claim=_CLAIMS["build"], result="measured", detail=detail)
    return with_memory(row, teacher.device, planned)


@torch.no_grad()
def _embedding(teacher: CheckTeacher, cache: Cache, encoder: TeacherTextEncoder) -> CheckRow:
    name = "embedding"
    # The negative prompt was encoded alone.
    rows = [row for row in range(len(cache.prompts)) if row != cache.negative]
    texts, length = [cache.prompts[row].text for row in rows], cache.manifest.teacher.text_length
    expected_BTD, ids_BT = teacher.folder.family.reference_embedding(
        teacher.folder.path, encoder.model, texts, text_length=length
    )
    equal = sum(
        same_bits(cache.embedding(row), from_torch(expected_BTD[number]))
        and cache.padded_token_ids(row).tolist() == ids_BT[number].tolist()
        for number, row in enumerate(rows)
    )
    holds = equal == len(texts)
    return CheckRow(
        name=name,
        claim=_CLAIMS[name],
        result=_RESULTS[holds],
        detail=f"token ids and embeddings, bit for bit, of {equal} of {counted(len(texts), 'prompt')}",
    )


def _weights(teacher: CheckTeacher, role: Role, model: torch.nn.Module) -> tuple[int, list[str]]:
    """Number of tensors in the files of a part, and the names of those that differ."""
    loaded, compared, differing, known = model.state_dict(), 0, list[str](), set[int]()
    for file in teacher.folder.weights(role):
        with safe_open(file, framework="pt") as tensors:
            for written in tensors.keys():  # noqa: SIM118  # it is no mapping
                name = teacher.folder.family.loaded_name(written) if role == "large_text_encoder" else written
                if name is None:
                    continue
                compared += 1
                stored = tensors.get_tensor(written).to(teacher.torch_dtype)
                if name not in loaded or not torch.equal(loaded[name].cpu(), stored):
                    differing.append(name)
                else:
                    known.add(loaded[name].data_ptr())
    # Parameters that no file has; shared ones have two names.
    differing += [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in known]
    return compared, list(dict.fromkeys(differing))


def _joined(*parts: tuple[int, list[str]] | None, remark: str) -> CheckRow:
    given = [part for part in parts if part is not None]
    differing = [name for _, names in given for name in names]
    count = counted(sum(number for number, _ in given), "tensor")
    detail = f"{len(differing)} of {count} differ, the first is {differing[0]}" if differing else f"all {count}"
    return CheckRow(name="weights", claim=_CLAIMS["weights"], result=_RESULTS[not differing], detail=detail + remark)
