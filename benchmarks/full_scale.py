"""What does a training step cost at full scale, online and offline, and on which cards does it fit? On one GPU.

python -m benchmarks.full_scale                  # every row, 9 minutes at most; the GPU has to hold the whole teacher
python -m benchmarks.full_scale --scale tiny     # the same on a CPU, in miniature: that it works, no figures

FLUX.1-dev's configuration with random bf16 weights made on the device, a T5-base student (fp32, bf16 autocast, AdamW),
caches of the random teacher's own walks, read as training reads them. Nothing is downloaded. Needs the project's
dependencies and no more: torch, diffusers, transformers, accelerate, safetensors, sentencepiece, protobuf, zarr,
numcodecs, ml_dtypes, webdataset, xxhash, pydantic, numpy.

online: the loop of the paper: T5-XXL encodes, the teacher predicts, the student encodes, the backbone with the
    student's embedding, backward, AdamW, Euler step; every step. Checkpointed too, which is compared with where the
    other does not fit.
offline: the same steps from a cache. plain; checkpointed (diffusers' own); streamed (models/streaming.py) with so many
    resident blocks; fsdp2 (PyTorch's fully_shard of each block with CPUOffloadPolicy), to compare with streamed.
The losses of all ways are those of online but for rounding: the last column has the largest relative difference.
A cap is imposed by torch.cuda.set_per_process_memory_fraction, so "fits" is a run that did: emulated on the card that
the head names, with CUDA's context (about 0.5 GiB) outside of it. A streamed model under a cap has as many resident
blocks as the first shape leaves room for. "of the matrix rate": FLOPs that were computed, recomputing among them, per
second, as part of what a large product of matrices reaches here. Rows that were not run are not printed.
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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmarks.full_scale_modes import OFFLINE, ONLINE, process_group
from benchmarks.full_scale_rows import GIB, HEADER, Row, copy_rate, impose
from benchmarks.full_scale_step import Measured, offline_steps, online_steps
from benchmarks.random_teacher import SCALES, Scale, Shape, random_text_encoder, record
from models.cost import BackboneCost, backbone_cost
from models.device import quiet_libraries, usable_device
from models.matrix_rate import matrix_rate
from models.memory_options import MemoryOptions
from models.text_cost import student_cost, text_encoder_cost
from models.text_encoder import TeacherTextEncoder
from storage_schemas.manifest import Manifest
from storage_schemas.reader import Cache

CAPS_GIB = (23.0, 15.0, 11.0)
# Steps that are not counted: the first allocates and waits for its trajectories.
WARM_STEPS = 2
# Left free beside the measured peak when resident blocks are chosen: the caching allocator's fragments.
SLACK_GIB = 0.5


class Bench:
    """The rows of one run; `deadline` is the time after which no further one begins."""

    def __init__(self, scale: Scale, device: torch.device, *, steps: int, deadline: float) -> None:
        self.scale, self.device, self.steps, self.deadline = scale, device, steps, deadline
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rate = matrix_rate(device, dtype, sides=(scale.matmul,), limit_seconds=2.0)
        self.caches: dict[Shape, Cache] = {}
        self.rows: list[Row] = []
        self.left_out = 0

    def run(self, modes: Sequence[str], caps: Sequence[float]) -> None:
        """All rows, online first: the others are compared with it."""
        with tempfile.TemporaryDirectory() as folder:
            text_encoder = random_text_encoder(self.scale, self.device)
            model = ONLINE["online"].prepare(self.scale, self.device, 0)
            for number, shape in enumerate(self.scale.shapes):
                manifest = self.scale.manifest(shape, steps=self.steps)
                self.caches[shape] = record(Path(folder) / str(number), manifest, text_encoder, model)
            for mode in ONLINE:
                if mode != "online":
                    del model
                    model = self.prepare(mode, None)
                self.measure(mode, model, None, None, text_encoder)
            del text_encoder, model
            for mode in modes:
                self.of_mode(mode, caps)

    def of_mode(self, mode: str, caps: Sequence[float]) -> None:
        """Rows without a cap, of a streamed model with no block resident; then with each cap."""
        if self.over:
            self.left_out += 1
            return
        streams = OFFLINE[mode].streams
        resident = 0 if streams else None
        model = self.prepare(mode, resident)
        blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
        block_gib = sum(p.nbytes for name, p in model.named_parameters() if "blocks." in name) / GIB / blocks
        self.measure(mode, model, resident, None)
        for cap in caps:
            if self.over:
                self.left_out += 1
                continue
            if streams:
                del model
                resident = min(blocks, max(0, int((cap - SLACK_GIB - self._peak_of_first(mode)) / block_gib)))
                model = self.prepare(mode, resident)
            self.measure(mode, model, resident, cap)

    def prepare(self, mode: str, resident: int | None) -> FluxTransformer2DModel:
        """The transformer of a mode."""
        _forget(self.device)
        return (OFFLINE | ONLINE)[mode].prepare(self.scale, self.device, resident or 0)

    @property
    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline

    def measure(
        self,
        mode: str,
        model: FluxTransformer2DModel,
        resident: int | None,
        cap: float | None,
        text_encoder: TeacherTextEncoder | None = None,
    ) -> None:
        """A row for each shape and batch size."""
        for recorded in self.caches.values():
            for batch_size in self.scale.batch_sizes:
                if self.over:
                    self.left_out += 1
                    continue
                row = self._row(mode, model, recorded, batch_size, resident, cap, text_encoder)
                self.rows.append(row)
                print(row.cells(), flush=True)

    def _row(
        self,
        mode: str,
        model: FluxTransformer2DModel,
        recorded: Cache,
        batch_size: int,
        resident: int | None,
        cap: float | None,
        text_encoder: TeacherTextEncoder | None,
    ) -> Row:
        manifest = recorded.manifest
        at: dict[str, Any] = {
            "mode": mode, "resolution": manifest.sampling.height, "text_length": manifest.teacher.text_length,
            "batch_size": batch_size, "cap_gib": cap, "resident": resident,
        }  # fmt: skip
        _forget(self.device)
        impose(self.device, cap)
        try:
            if text_encoder is not None:
                found = online_steps(self.scale, model, text_encoder, recorded, batch_size, self.device)
            else:
                found = offline_steps(self.scale, model, recorded, batch_size, self.device)
        except torch.OutOfMemoryError:
            return Row(**at, problem="out of memory")
        finally:
            impose(self.device, None)
        return self._figures(at, found, manifest)

    def _figures(self, at: dict[str, Any], found: Measured, manifest: Manifest) -> Row:
        seconds = statistics.median(found.seconds[WARM_STEPS:])
        row = Row(
            **at,
            step_ms=1000 * seconds,
            wait_ms=1000 * statistics.median(found.waits[WARM_STEPS:]),
            rate_part=step_flops(self.scale, manifest, at["mode"]) * at["batch_size"] / seconds / self.rate,
            peak_gib=torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else math.nan,
            host_gib=_host_bytes() / GIB,
            losses=tuple(found.losses),
        )
        online = row if at["mode"] == "online" else self._online_like(row)
        if online is None:
            return row
        differences = (abs(a - b) / b for a, b in zip(row.losses, online.losses, strict=True))
        return replace(row, online_ratio=online.step_ms / row.step_ms, loss_difference=max(differences))

    def _online_like(self, row: Row) -> Row | None:
        def place(of: Row) -> tuple[int, int, int]:
            return of.resolution, of.text_length, of.batch_size

        online = (done for done in self.rows if done.mode in ONLINE and done.problem is None)
        return next((done for done in online if place(done) == place(row)), None)

    def _peak_of_first(self, mode: str) -> float:
        """GiB of the first shape and the largest batch of it, without a cap."""
        first = [row for row in self.rows if row.mode == mode and row.cap_gib is None][: len(self.scale.batch_sizes)]
        return max((row.peak_gib for row in first if row.problem is None), default=0.0)


@cache
def _costs(scale: Scale, manifest_json: str) -> tuple[BackboneCost, float, float]:
    manifest = Manifest.model_validate_json(manifest_json)
    student = student_cost(scale.student, manifest).forward_flops
    return backbone_cost(manifest), text_encoder_cost(manifest).forward_flops, student


def step_flops(scale: Scale, manifest: Manifest, mode: str) -> float:
    """Of one sample in one optimizer step."""
    backbone, text, student = _costs(scale, manifest.model_dump_json())
    options = MemoryOptions(checkpoint_blocks=int((OFFLINE | ONLINE)[mode].recomputes))
    offline = backbone.training_flops(options) + 3 * student
    return offline + (backbone.forward_flops + text if mode in ONLINE else 0)


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _host_bytes() -> int:
    """Memory of this process now, pinned memory among it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    asked = _asked(arguments)
    deadline = time.monotonic() + 60 * asked.minutes
    quiet_libraries()
    device = usable_device(asked.device)
    on_gpu = device.type == "cuda"
    if asked.scale == "full" and not on_gpu:
        raise SystemExit("--scale full needs a GPU that holds the whole teacher; --scale tiny runs here")
    bench = Bench(SCALES[asked.scale], device, steps=asked.steps, deadline=deadline)
    print(f"torch {torch.__version__}, {bench.rate / 1e12:.3g} TFLOP/s in products of matrices", end="")
    if on_gpu:
        print(f", {copy_rate(device) / 1e9:.3g} GB/s from pinned memory; caps emulated on", end=" ")
        print(torch.cuda.get_device_name(device), end="")
    print(f"\n\n{HEADER}")
    try:
        with process_group(device):
            bench.run(asked.modes, asked.caps if on_gpu else ())
    finally:
        if asked.json:
            asked.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in bench.rows))
    if bench.left_out:
        print(f"\nleft out, for {asked.minutes:g} minutes were over: {bench.left_out} rows or more")
    return bench.rows


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--modes", nargs="+", choices=list(OFFLINE), default=list(OFFLINE))
    parser.add_argument("--caps", nargs="*", type=float, default=list(CAPS_GIB), help="GiB")
    parser.add_argument("--steps", type=int, default=7, help=f"of each row; the first {WARM_STEPS} are not counted")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins after these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    asked = parser.parse_args(arguments)
    if asked.steps <= WARM_STEPS:
        parser.error(f"--steps is {asked.steps}, expected more than {WARM_STEPS}: the first ones are not counted")
    return asked


if __name__ == "__main__":
    main()
