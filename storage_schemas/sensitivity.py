"""What the transformer is sensitive to in a text embedding, measured once for a cache; read without torch.

SENSITIVITY/ lies in the cache, or anywhere: plan.json (what is measured), parts/ (a part of the prompts each, written
once, whole), and when all parts are there record.json with arrays.safetensors in place of them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from storage_schemas.digests import digest, xxh3_128
from storage_schemas.errors import BadSettings, DamagedCache, SettingsDiffer
from storage_schemas.fields import Array
from storage_schemas.folders import Folder
from storage_schemas.manifest import Record, first_problem, shortened

SENSITIVITY_FOLDER = "sensitivity"
PLAN_FILE = f"{SENSITIVITY_FOLDER}/plan.json"
RECORD_FILE = f"{SENSITIVITY_FOLDER}/record.json"
ARRAYS_FILE = f"{SENSITIVITY_FOLDER}/arrays.safetensors"
PARTS_FOLDER = f"{SENSITIVITY_FOLDER}/parts"
SPECTRUM_SHOWN = 32
_PART = re.compile(rf"{PARTS_FOLDER}/\d{{6}}\.safetensors")
# An embedding of zeros stays one.
_NO_SCALE = 1e-6


class Plan(Record):
    """What is measured; two runs with the same plan give the same numbers, whoever does which part.

    prompt_ids: of the prompts that are sampled, in the order of the parts; part_size: prompts of a part. steps: of the
    trajectories. products: vector-Jacobian products per prompt.
    """

    format: Literal["understudy-sensitivity-plan"] = "understudy-sensitivity-plan"
    format_version: Literal[1] = 1
    teacher_digest: str
    sampling_digest: str
    products: int = Field(ge=1)
    seed: int = Field(ge=0)
    steps: tuple[int, ...] = Field(min_length=1)
    dtype: Literal["bfloat16", "float32"]
    quantize: str
    part_size: int = Field(ge=1)
    prompt_ids: tuple[str, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest(self.json_value())

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Ids of the prompts of each part."""
        return [self.prompt_ids[at : at + self.part_size] for at in range(0, len(self.prompt_ids), self.part_size)]


class SensitivityRecord(Record):
    """Where a sensitivity comes from. provenance: how each distinct way of making its parts was.

    predicted_correlation: of measured and predicted logarithms of token weights, on a fifth of the prompts that the
    prediction had not seen; None where there were too few. effective_rank: squared sum of the metric's eigenvalues per
    sum of their squares: how many directions matter. spectrum: its largest eigenvalues as parts of their sum.
    arrays_bytes, arrays_xxh3_128: of ARRAYS_FILE.
    """

    format: Literal["understudy-sensitivity"] = "understudy-sensitivity"
    format_version: Literal[1] = 1
    created_by: str
    plan: Plan
    provenance: tuple[dict[str, Any], ...]
    seconds: float
    predicted_correlation: float | None
    effective_rank: float
    spectrum: tuple[float, ...]
    arrays_bytes: int
    arrays_xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of the prompts of one part, float64: the sum of s s^T over products, prompts and tokens, and mean squares of s.

    outer_DD; squares_NT: mean over products and columns, per prompt and token. made: see SensitivityRecord.
    """

    outer_DD: Array
    squares_NT: Array
    made: dict[str, Any]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Which directions of an embedding move the prediction, and which of its tokens do. float32.

    metric_DD: mean of s s^T over products, prompts and tokens; d^T metric d is what a step d of one token costs in the
    units of the vision loss. weights_NT: of the sampled prompts' tokens, mean 1. predictor_D1: see predicted_weights;
    None where too few prompts were sampled.
    """

    record: SensitivityRecord
    metric_DD: Array
    weights_NT: Array
    predictor_D1: Array | None

    def weights_of(self, prompt_id: str) -> Array | None:
        """weights_T of a prompt that was sampled; None of others."""
        row = self._rows.get(prompt_id)
        return None if row is None else self.weights_NT[row]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {one: row for row, one in enumerate(self.record.plan.prompt_ids)}


def predicted_weights(predictor_D1: Array, embedding_TD: Array) -> Array:
    """weights_T of a prompt that was not sampled: exp of a linear function of its embedding, each token by itself.

    predictor_D1: of scaled_embedding, then the constant.
    """
    weights: Array = np.exp(scaled_embedding(embedding_TD) @ predictor_D1[:-1] + predictor_D1[-1])
    return weights


def scaled_embedding(embedding_TD: Array) -> Array:
    """Each token's embedding divided by its root mean square, float32."""
    embedding_TD = embedding_TD.astype(np.float32)
    scale_T1 = np.sqrt(np.mean(np.square(embedding_TD), axis=-1, keepdims=True))
    scaled: Array = embedding_TD / (scale_T1 + _NO_SCALE)
    return scaled


def part_path(number: int) -> str:
    """Where a part lies."""
    return f"{PARTS_FOLDER}/{number:06d}.safetensors"


def is_known(path: str) -> bool:
    """Whether a file below SENSITIVITY_FOLDER is one of those that this module writes."""
    return path in (PLAN_FILE, RECORD_FILE, ARRAYS_FILE) or _PART.fullmatch(path) is not None


def begin(folder: Folder, plan: Plan) -> None:
    """Write the plan down; SettingsDiffer where another one was begun."""
    if folder.publish(PLAN_FILE, _encode(plan)):
        return
    was = read_plan(folder)
    assert was is not None
    check_same_plan(folder, was, plan)


def read_plan(folder: Folder) -> Plan | None:
    """What was begun; None where nothing was. DamagedCache."""
    plan: Plan | None = _read_record(folder, PLAN_FILE, Plan)
    return plan


def check_same_plan(folder: Folder, was: Plan, plan: Plan) -> None:
    """Raise SettingsDiffer, naming the first field, unless two plans are the same."""
    if was == plan:
        return
    before, now = ({"prompts": len(one.prompt_ids)} | one.json_value() for one in (was, plan))
    field = next(name for name in before if before[name] != now[name])
    raise SettingsDiffer(
        f"{folder}/{SENSITIVITY_FOLDER} was begun with {field.replace('_', '-')} {shortened(before[field])}, this is "
        f"{shortened(now[field])}: sums of both would mean neither; give the flags of the first time, or --anew, which "
        f"deletes what was measured"
    )


def write_part(folder: Folder, plan: Plan, number: int, part: Part) -> None:
    """Put a part in place, whole or not at all."""
    from safetensors.numpy import save

    arrays = {"outer": np.ascontiguousarray(part.outer_DD), "squares": np.ascontiguousarray(part.squares_NT)}
    told = {"plan": plan.digest, "made": json.dumps(part.made), "seconds": repr(part.seconds)}
    told["xxh3_128"] = _checksum(arrays)
    folder.replace(part_path(number), save(arrays, metadata=told))


def read_part(folder: Folder, plan: Plan, number: int) -> Part | None:
    """A part; None if it is not there. DamagedCache if it is another's, or its bytes were changed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = part_path(number)
    try:
        data = folder.read(path)
    except FileNotFoundError:
        return None
    try:
        length = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + length])["__metadata__"]
        arrays = load(data)
        right = told["plan"] == plan.digest and told["xxh3_128"] == _checksum(arrays)
        made, seconds = json.loads(told["made"]), float(told["seconds"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise DamagedCache(
            f"{folder}/{path} is not as it was written: delete it, and give the same command again, which makes it anew"
        )
    return Part(outer_DD=arrays["outer"], squares_NT=arrays["squares"], made=made, seconds=seconds)


def spectrum_of(metric_DD: Array) -> tuple[float, tuple[float, ...]]:
    """effective_rank and spectrum of a record."""
    values_D = np.linalg.eigvalsh(metric_DD.astype(np.float64))[::-1].clip(min=0)
    shares = values_D / values_D.sum()
    return float(1 / np.square(shares).sum()), tuple(float(share) for share in shares[:SPECTRUM_SHOWN])


def write(folder: Folder, record: SensitivityRecord, arrays: dict[str, Array]) -> None:
    """Put the whole in place of its parts: arrays first, then the record, which says that they exist."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})
    folder.replace(ARRAYS_FILE, data)
    record = record.model_copy(update={"arrays_bytes": len(data), "arrays_xxh3_128": xxh3_128(data)})
    folder.replace(RECORD_FILE, _encode(record))
    forget_parts(folder)


def forget_parts(folder: Folder) -> None:
    """Delete the parts of what was put together."""
    for path in filter(is_known, folder.names(PARTS_FOLDER)):
        folder.remove(path)


def read(folder: Folder) -> Sensitivity | None:
    """What was measured; None where it was not, or is not finished. DamagedCache if it is not as it was written."""
    record = read_record(folder)
    if record is None:
        return None
    from safetensors.numpy import load

    try:
        data = folder.read(ARRAYS_FILE)
    except FileNotFoundError:
        data = b""
    if len(data) != record.arrays_bytes or xxh3_128(data) != record.arrays_xxh3_128:
        raise DamagedCache(
            f"{folder}/{ARRAYS_FILE} is not as it was written ({len(data)} bytes, expected {record.arrays_bytes} of "
            f"checksum {record.arrays_xxh3_128[:16]}): take both files of {SENSITIVITY_FOLDER}/ from a copy, or "
            f"`understudy sensitivity {folder} --anew` measures them again"
        )
    arrays = load(data)
    return Sensitivity(
        record=record,
        metric_DD=arrays["metric"],
        weights_NT=arrays["weights"],
        predictor_D1=arrays.get("predictor"),
    )


def unfinished(folder: Folder) -> tuple[int, int] | None:
    """Parts that are there of a measurement that was begun and is not finished, and how many it has; else None."""
    names = folder.names(SENSITIVITY_FOLDER)
    if PLAN_FILE not in names or RECORD_FILE in names or (plan := read_plan(folder)) is None:
        return None
    return sum(_PART.fullmatch(name) is not None for name in names), len(plan.parts)


def lacks_record(folder: Folder) -> bool:
    """Whether what was measured lies there without the record that says so."""
    names = folder.names(SENSITIVITY_FOLDER)
    # The parts go last: with them the record has not been written yet.
    return ARRAYS_FILE in names and RECORD_FILE not in names and not any(_PART.fullmatch(name) for name in names)


def read_record(folder: Folder) -> SensitivityRecord | None:
    """The record alone; None where there is none. DamagedCache, SettingsDiffer."""
    return _read_record(folder, RECORD_FILE, SensitivityRecord)


def forget(folder: Folder) -> None:
    """Delete all of it."""
    # The record first: without it nothing else counts. The plan last: parts without theirs would be taken for damaged.
    others = (path for path in folder.names(SENSITIVITY_FOLDER) if path != PLAN_FILE)
    for path in (RECORD_FILE, *others, PLAN_FILE):
        folder.remove(path)


def combined(all_of: Sequence[Sensitivity]) -> Array:
    """metric_DD of several measurements of one teacher, each by how many prompts and products it is a mean of."""
    if len({(one.record.plan.teacher_digest, one.metric_DD.shape) for one in all_of}) != 1:
        raise BadSettings(
            f"sensitivities of {len(all_of)} caches are of different teachers: what one transformer reads says nothing "
            f"of another; train with caches of one teacher"
        )
    counts = [len(one.record.plan.prompt_ids) * one.record.plan.products for one in all_of]
    metrics = np.stack([one.metric_DD for one in all_of]).astype(np.float64)
    metric: Array = np.average(metrics, axis=0, weights=counts).astype(np.float32)
    return metric


def _checksum(arrays: dict[str, Array]) -> str:
    return xxh3_128(b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays)))


def _encode(record: Record) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _read_record(folder: Folder, path: str, kind: type[Any]) -> Any:
    try:
        data = folder.read(path)
    except FileNotFoundError:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DamagedCache(
            f"{folder}/{path} is not as it was written ({first_problem(error)}): take it from a copy, or `understudy "
            f"sensitivity {folder} --anew` measures again"
        ) from error
