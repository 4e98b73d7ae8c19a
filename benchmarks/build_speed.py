"""What recording costs beside the bare sampling, and what several workers gain. On the pocket teacher, or another.

python -m benchmarks.build_speed bare [--teacher FOLDER --device cuda --dtype bfloat16 --batch-size 8 ...]
    the sample stage of `build` (noise, embeddings read, sampling, copies, encoding, checks, writing) against a loop
    that runs FluxPipeline on the same embeddings and noise and throws the result away; in turn, medians of rounds
python -m benchmarks.build_speed workers [--workers 1 2 4]
    trajectories a second of `build --workers N --threads 1`, from the first batch to the last
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from secondcast.cache_builder.opening.open_build import open_build
from secondcast.cache_builder.sample_stage import prepare_batch, run_sample_stage
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.shard_builder import ShardBuilder
from secondcast.cache_builder.teacher_models import load_backbone
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.cache_builder.workers.job import Job
from secondcast.cache_builder.workers.local import run_local_workers
from secondcast.models.backbone import Backbone
from secondcast.models.device import quiet_libraries
from secondcast.models.families.reference import ReferencePipeline
from secondcast.models.geometry import recorded_geometry
from secondcast.models.teacher.folder import TeacherFolder, build_parts, find_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.writer import CacheWriter


def settings_of(asked: argparse.Namespace, prompts: Path) -> BuildSettings:
    return BuildSettings.from_flags(
        prompts=(prompts,),
        dtype=asked.dtype,
        batch_size=asked.batch_size,
        shard_size=asked.shard_size,
        compression=asked.compression,
        guidance=(3.5,),
        resolution=asked.resolution,
    )


class Bare:
    """FluxPipeline over all batches of a cache whose embeddings are there."""

    def __init__(self, cache: Cache, teacher: TeacherFolder, backbone: Backbone, batch_size: int) -> None:
        self._sampling, self._backbone = cache.manifest.sampling, backbone
        self._pipeline = ReferencePipeline(
            teacher.family,
            backbone.transformer,
            scheduler_config=teacher.config("scheduler"),
            vae_config=teacher.config("vae"),
        )
        self._starts = []
        for first in range(0, len(cache.layout), batch_size):
            start = prepare_batch(cache, range(first, min(first + batch_size, len(cache.layout))))
            noise_BSC = start.noise_BSC.to(device=backbone.device, dtype=backbone.dtype)
            self._starts.append((noise_BSC, start.text.on(backbone.device)))

    def run(self) -> None:
        """All batches, once."""
        sampling, device = self._sampling, self._backbone.device
        for noise_BSC, text in self._starts:
            self._pipeline.final_latents(
                noise_BSC, text, recorded_geometry(sampling), negative=None, guidance=3.5, steps=sampling.steps
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def seconds(run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure_bare(asked: argparse.Namespace, prompts: Path, folder: Path) -> None:
    teacher, device = find_teacher(asked.teacher, build_parts("zero")), torch.device(asked.device)
    settings = settings_of(asked, prompts)
    rates: dict[str, list[float]] = {"bare": [], "build": []}
    backbone: Backbone | None = None
    for turn in range(asked.rounds + 1):
        writer = open_build(folder / f"cache-{turn}", settings, teacher, device, Silent())
        builder = ShardBuilder(writer, teacher, WorkerConfig(batch_size=asked.batch_size), device, Silent())
        builder.encode(writer.missing("embeddings"))
        backbone = backbone or load_backbone(writer.manifest, teacher, device)
        bare = Bare(Cache.open(str(writer.folder)), teacher, backbone, asked.batch_size)
        found = {"bare": seconds(bare.run), "build": seconds(lambda w=writer, b=backbone: _sample(w, b, asked))}
        if turn:
            # The first round warms up.
            for name, took in found.items():
                rates[name].append(asked.num_prompts / took)
    bare_rate, build_rate = (statistics.median(rates[name]) for name in ("bare", "build"))
    ratios = sorted(build / bare for bare, build in zip(rates["bare"], rates["build"], strict=True))
    print(f"bare FluxPipeline {bare_rate:8.2f} trajectories/s")
    print(f"build             {build_rate:8.2f} trajectories/s")
    print(f"build / bare      {statistics.median(ratios):8.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def _sample(writer: CacheWriter, backbone: Backbone, asked: argparse.Namespace) -> None:
    shards = writer.missing("trajectories")
    cache = Cache.open(str(writer.folder))
    run_sample_stage(
        writer, cache, backbone, shards, share=asked.num_prompts, done=0, batch_size=asked.batch_size, progress=Silent()
    )


class Clock(Silent):
    """When the first and the last batch of the sample stage were shown, and what came between."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def bar(self, title, **counts):
        """See Progress."""
        self.times = []
        return super().bar(title, **counts)

    def advance(self, count, note=""):
        """See Bar."""
        self.times.append((time.perf_counter(), count))

    def rate(self) -> float:
        """Trajectories a second after the first batch."""
        (first, skipped), (last, _) = self.times[0], self.times[-1]
        return (sum(count for _, count in self.times) - skipped) / (last - first)


def measure_workers(asked: argparse.Namespace, prompts: Path, folder: Path) -> None:
    teacher = find_teacher(asked.teacher, build_parts("zero"))
    alone = None
    for workers in asked.workers:
        rates = []
        for turn in range(asked.rounds):
            writer = open_build(
                folder / f"{workers}-{turn}", settings_of(asked, prompts), teacher, torch.device(asked.device), Silent()
            )
            job = Job(
                location=str(writer.folder),
                teacher=asked.teacher,
                teacher_path=str(teacher.path),
                config=WorkerConfig(batch_size=asked.batch_size, wait_seconds=600),
                threads=1,
            )
            clock = Clock()
            run_local_workers(writer, job, [asked.device] * workers, clock)
            rates.append(clock.rate())
        rate = statistics.median(rates)
        alone = alone or rate / workers
        print(f"{workers} workers {rate:8.2f} trajectories/s, {rate / alone / workers:.2f} of linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bare", "workers"))
    parser.add_argument("--teacher", default=str(TEACHER_FOLDER))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compression", default="lossless")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name) / "prompts.txt"
        prompts.write_text("".join(f"{text}\n" for text in captions(asked.num_prompts, seed=0, split="train")))
        (measure_bare if asked.what == "bare" else measure_workers)(asked, prompts, Path(name))


if __name__ == "__main__":
    main()
