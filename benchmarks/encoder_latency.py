"""Seconds per prompt and bytes of weights of text encoders on this CPU: the large one, in 8 bits, and students.

python -m benchmarks.encoder_latency                                # minutes, 12 GB of memory
python -m benchmarks.encoder_latency --teacher FLUX.2-klein-4B

All have the published sizes, and random weights in bfloat16 before they are quantized.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from secondcast.check.random_weights import random_text_encoder
from secondcast.models.cost.shapes import STUDENT_SIZES
from secondcast.models.families.family import Family
from secondcast.models.memory.options import TextQuantization
from secondcast.models.memory.quantized import held_bytes, quantize_text_encoder
from secondcast.models.student.quantizing import quantized
from secondcast.models.student.student import Student, new_student
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.progress import size_text

_T5_STUDENTS = ("small", "base", "large")
_KINDS: tuple[TextQuantization, ...] = ("int8", "nf4")
_CPU = torch.device("cpu")
Encode = Callable[[torch.Tensor], Any]


def encoders(teacher: TeacherFolder, text_length: int) -> Iterator[tuple[str, torch.nn.Module, Encode]]:
    """Each encoder, one at a time: its name, its network, and the call for token ids."""
    family, pad_token_id = teacher.family, teacher.pad_token_id
    for kind in (None, *_KINDS):
        network = random_text_encoder(teacher, torch.bfloat16, _CPU).eval()
        if kind is not None:
            quantize_text_encoder(network, kind)
        yield _named("large text encoder", kind), network, partial(_large, family, network, pad_token_id)
        # Two do not fit into memory.
        del network
    for name in _T5_STUDENTS if family.text_layers is None else (family.student,):
        student = made_student(name, teacher, text_length)
        yield f"student {name}", student, student
        if isinstance(student, SecondcastStudent):
            for kind in _KINDS:
                small = quantized(student.float(), kind).bfloat16()
                yield _named(f"student {name}", kind), small, small


def _named(name: str, kind: TextQuantization | None) -> str:
    return name if kind is None else f"{name}, {kind}"


def _large(family: Family, network: torch.nn.Module, pad_token_id: int, ids_1T: torch.Tensor) -> torch.Tensor:
    return family.encode(network, ids_1T, pad_token_id)


def made_student(name: str, teacher: TeacherFolder, text_length: int) -> Student:
    """A student of a published size with random weights in bfloat16."""
    identity = teacher.identity(text_length=text_length, hashed=False)
    with TemporaryDirectory() as folder:
        config = {"model_type": "t5"} | STUDENT_SIZES[name]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return new_student(folder, identity, init="random", dropout=0.0, seed=0).bfloat16().eval()


@torch.inference_mode()
def seconds_per_prompt(encode: Encode, text_length: int, runs: int) -> float:
    """The median over runs, after one that is not counted."""
    ids_1T, taken = torch.randint(3, 1000, (1, text_length)), []
    for _ in range(runs + 1):
        began = time.perf_counter()
        encode(ids_1T)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    """Print a row of a Markdown table for each encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="FLUX.1-dev", help="a bundled configuration")
    parser.add_argument("--text-length", type=int, default=None, help="default: the family's")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    teacher = planned_teacher(asked.teacher)[0]
    length = teacher.checked_text_length(asked.text_length)
    print(f"{teacher.source}, {length} text tokens, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| text encoder | weights | s per prompt |\n|---|---|---|")
    for name, network, encode in encoders(teacher, length):
        print(f"| {name} | {size_text(held_bytes(network))} | {seconds_per_prompt(encode, length, asked.runs):.3g} |")
        del network, encode
        gc.collect()


if __name__ == "__main__":
    main()
