"""What does a training step cost at full scale, online and offline, and on which cards does it fit? On one GPU.

python -m benchmarks.full_scale                  # every row, 9 minutes at most; the GPU has to hold the whole teacher
python -m benchmarks.full_scale --scale tiny     # the same on a CPU, in miniature, half a minute: that it works
python -m benchmarks.full_scale --calculate      # what is calculated alone, and no GPU

FLUX.1-dev's configuration with random bf16 weights made on the device, a T5-base student (fp32, bf16 autocast, AdamW),
caches of the random teacher's own walks, read as training reads them. Nothing is downloaded. Needs 80 GB of GPU memory
(34 of them for the teacher), 64 GB of the host's, and the wheels of the project's own dependencies: torch, diffusers,
transformers, accelerate, safetensors, sentencepiece, protobuf, zarr, numcodecs, ml_dtypes, webdataset, xxhash,
pydantic, numpy. Rows of int8 and fp8 need torchao besides, those of nf4 bitsandbytes (both: secondcast[quant]);
compiled ones triton, which comes with torch's wheels for CUDA, and a C compiler. Rows without theirs say "not run".

online: the loop of the paper: T5-XXL encodes, the teacher predicts, the student encodes, the backbone with the
    student's embedding, backward, AdamW, Euler step; every step. +checkpointed, +compiled: held so.
plain, checkpointed, streamed, table (models/memory/modulation_table.py), +compiled: the same steps from a cache, the
    backbone held as `secondcast train` holds it with these options (Backbone.holding).
int8, fp8, nf4: quantized (models/memory/quantized.py), with a table, checkpointed. None of them compiled: torch 2.13
    refuses the single block, of which two outputs share memory, with torchao 0.18's weights.
fsdp2: PyTorch's fully_shard of each block with CPUOffloadPolicy, checkpointed, to compare with streamed.

"online : this" compares a step with that of the online loop with the same checkpointing and compilation, which is
named. Losses and the first gradient of all ways are those of online but for rounding, and for quantization: the last
columns have the relative differences. A cap is imposed by torch.cuda.set_per_process_memory_fraction before the weights
are put on the device, from the host, so "fits" is a run that did, loading among it: emulated on the card that the head
names, with CUDA's context (about 0.5 GiB) outside of it. A streamed model under a cap has as many resident blocks as
--max-gpu-memory would leave on such a card. "calculated" is models/cost/gpu_memory.py's, to compare with
what was allocated. "of the matrix rate": FLOPs that were computed, recomputing among them, per second,
as part of what a large product of
matrices reaches here. Half a GB of the host's memory is the benchmark's own for each size and batch: the gradient to
compare with. The most important rows come first; what would not end in time is left out. The last thing printed is the
table.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_scale_rows as figures
from benchmarks.full_scale_modes import MODES, ONLINE, prepare, process_group, why_not
from benchmarks.full_scale_plan import Calculated, Group, Place, estimated_seconds, plan
from benchmarks.full_scale_rows import GIB, HEADER, Row, impose, machine
from benchmarks.full_scale_step import Measured, Training, offline_steps, online_steps
from benchmarks.random_teacher import SCALES, Scale, Shape, random_text_encoder, random_transformer, record
from secondcast.models.backbone import Backbone
from secondcast.models.cost.matrix_rate import matrix_rate
from secondcast.models.device import quiet_libraries, usable_device
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.reader import Cache

CAPS_GIB = (23.0, 15.0, 11.0, 7.5)
# Steps that are not counted: the first allocates, compiles, and waits for its trajectories.
WARM_STEPS = 2
# Of an H100, assumed for --calculate's estimate.
H100_MATRIX_RATE = 700e12


class Bench:
    """The rows of one run; what would last beyond `deadline` does not begin."""

    def __init__(self, scale: Scale, device: torch.device, *, steps: int, deadline: float) -> None:
        self.scale, self.device, self.steps, self.deadline = scale, device, steps, deadline
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rate = matrix_rate(device, dtype, sides=(scale.matmul,), limit_seconds=2.0)
        self.caches: dict[Shape, Cache] = {}
        self.rows: list[Row] = []
        self.left_out = 0
        # Of the online loop, the first row of each place.
        self.gradients: dict[Any, torch.Tensor] = {}

    def run(self, groups: Sequence[Group]) -> None:
        """All rows, in their order."""
        with tempfile.TemporaryDirectory() as folder:
            self._record(Path(folder), {place.shape for group in groups for place in group.places})
            for group in groups:
                self._of_group(group)

    def _record(self, folder: Path, shapes: set[Shape]) -> None:
        text_encoder = random_text_encoder(self.scale, self.device)
        model = random_transformer(self.scale, self.device)
        for shape in self.scale.shapes:
            if shape in shapes:
                manifest = self.scale.manifest(shape, steps=self.steps)
                self.caches[shape] = record(folder / shape.name, manifest, text_encoder, model)

    def _of_group(self, group: Group) -> None:
        calculated = Calculated(self.scale, group, steps=self.steps)
        problem = why_not(MODES[group.mode], self.scale, self.device)
        first = calculated.row_seconds(group.places[0], self.rate)
        if problem is None and self._lasts_beyond(calculated.preparing_seconds() + first):
            self.left_out += len(group.places)
            return
        _forget(self.device)
        impose(self.device, group.cap_gib)
        backbone = text_encoder = None
        try:
            if problem is None and group.mode in ONLINE:
                text_encoder = random_text_encoder(self.scale, self.device)
            if problem is None:
                backbone = self._prepare(group, calculated)
        except torch.OutOfMemoryError:
            problem = "out of memory, while loading"
        except SecondcastError as error:
            problem = f"not run: {error}"
        try:
            for place in group.places:
                self._of_place(group, place, calculated, backbone, text_encoder, problem)
        finally:
            del backbone, text_encoder
            _forget(self.device)
            impose(self.device, None)

    def _prepare(self, group: Group, calculated: Calculated) -> Backbone:
        caches = {place.shape: self.caches[place.shape] for place in group.places}
        return prepare(
            MODES[group.mode],
            self.scale,
            self.device,
            [one.manifest for one in caches.values()],
            # A table has the bits of calls of so many rows: those of the recording.
            batch_rows=max(self.scale.batch_sizes),
            resident=calculated.resident,
            home=torch.device("cpu") if group.from_host else self.device,
        )

    def _of_place(
        self,
        group: Group,
        place: Place,
        calculated: Calculated,
        backbone: Backbone | None,
        text_encoder: TeacherTextEncoder | None,
        problem: str | None,
    ) -> None:
        if backbone is not None and self._lasts_beyond(calculated.row_seconds(place, self.rate)):
            self.left_out += 1
            return
        row = empty_row(group, place, calculated)
        if backbone is None:
            row = replace(row, problem=problem)
        else:
            row = self._measured(row, group, place, calculated, backbone, text_encoder)
        self.rows.append(row)
        print(row.cells(), flush=True)

    def _measured(
        self,
        row: Row,
        group: Group,
        place: Place,
        calculated: Calculated,
        backbone: Backbone,
        text_encoder: TeacherTextEncoder | None,
    ) -> Row:
        _forget(self.device)
        try:
            training = Training(row.student, backbone, self.caches[place.shape], place.batch_size)
            found = offline_steps(training) if text_encoder is None else online_steps(training, text_encoder)
        except torch.OutOfMemoryError:
            return replace(row, problem="out of memory")
        except SecondcastError as error:
            return replace(row, problem=f"not run: {error}")
        row = self._figures(row, found, calculated.step_flops(place))
        assert training.first_gradient is not None
        row = self._compared(row, training.first_gradient)
        if self.device.type != "cuda":
            return row
        return replace(
            row,
            peak_gib=torch.cuda.max_memory_allocated(self.device) / GIB,
            reserved_gib=torch.cuda.max_memory_reserved(self.device) / GIB,
            pinned_gib=figures.pinned_bytes(backbone.transformer) / GIB,
        )

    def _figures(self, row: Row, found: Measured, step_flops: float) -> Row:
        seconds = statistics.median(found.seconds[WARM_STEPS:])
        return replace(
            row,
            step_ms=1000 * seconds,
            wait_ms=1000 * statistics.median(found.waits[WARM_STEPS:]),
            rate_part=step_flops / seconds / self.rate,
            host_gib=figures.resident_bytes() / GIB,
            losses=tuple(found.losses),
        )

    def _compared(self, row: Row, gradient: torch.Tensor) -> Row:
        """With the online loop: time with the same one, numbers with the first of the place."""
        if row.mode in ONLINE:
            self.gradients.setdefault(row.place, gradient)
        online = [r for r in [*self.rows, row] if r.mode in ONLINE and r.problem is None and r.place == row.place]
        if not online:
            return row
        expected = self.gradients[row.place]
        alike = next((one for one in online if one.mode == row.like), None)
        return replace(
            row,
            online_ratio=alike.step_ms / row.step_ms if alike else math.nan,
            loss_difference=figures.largest_difference(row.losses, online[0].losses),
            gradient_difference=float((gradient - expected).norm() / expected.norm()),
        )

    def _lasts_beyond(self, seconds: float) -> bool:
        return time.monotonic() + seconds > self.deadline


def empty_row(group: Group, place: Place, calculated: Calculated) -> Row:
    """What is known before anything runs."""
    manifest = calculated.scale.manifest(place.shape, steps=calculated.steps)
    return Row(
        mode=group.mode,
        student=group.student(calculated.scale),
        resolution=manifest.sampling.height,
        text_length=manifest.teacher.text_length,
        batch_size=place.batch_size,
        cap_gib=group.cap_gib,
        resident=calculated.resident,
        like=MODES[group.mode].like,
        calculated_gib=calculated.peak_gib(place),
    )


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    asked = _asked(arguments)
    deadline = time.monotonic() + 60 * asked.minutes
    quiet_libraries()
    scale = SCALES[asked.scale]
    groups = plan(asked.scale, modes=asked.modes, shapes=asked.shapes, caps=asked.caps)
    if asked.calculate:
        return _calculated(scale, groups, asked.steps)
    device = usable_device(asked.device)
    if asked.scale == "full" and device.type != "cuda":
        raise SystemExit("--scale full needs a GPU that holds the whole teacher; --scale tiny runs here")
    bench = Bench(scale, device, steps=asked.steps, deadline=deadline)
    head = machine(device, bench.rate)
    print(f"{head}\n\n{HEADER}", flush=True)
    try:
        with process_group(device):
            bench.run(groups)
    finally:
        if asked.json:
            asked.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in bench.rows))
        if bench.left_out:
            print(f"\nleft out, for {asked.minutes:g} minutes would be over: {bench.left_out} rows")
        print("\n".join(["\nFor docs/benchmarks.md:\n", head, "", HEADER, *(row.cells() for row in bench.rows)]))
    return bench.rows


def _calculated(scale: Scale, groups: Sequence[Group], steps: int) -> list[Row]:
    rows = []
    for group in groups:
        calculated = Calculated(scale, group, steps=steps)
        rows += [empty_row(group, place, calculated) for place in group.places]
    seconds = estimated_seconds(scale, groups, steps=steps, matrix_rate=H100_MATRIX_RATE)
    print(f"calculated, nothing was run; on an H100 about {seconds / 60:.1f} minutes, assumed rates among it\n")
    print("\n".join([HEADER, *(row.cells() for row in rows)]))
    return rows


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--shapes", nargs="+", help="pixels and text tokens, as 512-77; default all of the scale")
    parser.add_argument("--caps", nargs="*", type=float, default=list(CAPS_GIB), help="GiB")
    parser.add_argument("--steps", type=int, default=6, help=f"of each row; the first {WARM_STEPS} are not counted")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row begins that would not end within these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--calculate", action="store_true", help="only the table of what is calculated; needs no GPU")
    asked = parser.parse_args(arguments)
    if asked.steps <= WARM_STEPS:
        parser.error(f"--steps is {asked.steps}, expected more than {WARM_STEPS}: the first ones are not counted")
    names = [shape.name for shape in SCALES[asked.scale].shapes]
    if unknown := sorted({*(asked.shapes or names)} - {*names}):
        parser.error(f"--shapes has {', '.join(unknown)}, expected some of {', '.join(names)}")
    asked.shapes = asked.shapes or names
    return asked


if __name__ == "__main__":
    main()
