"""What does an optimizer step cost offline, beside the same step in the loop of the paper? On the pocket teacher, fp32.

taskset -c 3 python -m benchmarks.online_step [--students small base] [--batch-sizes 16 64] [--rounds 3] [--clock cpu]

online: the loop of the paper (section 3), written here: teacher's text encoder, teacher's prediction, student, the
    transformer with the student's embedding, backward, AdamW, Euler step. Its reference script encodes the text at
    every step; once per trajectory is what is left when it is encoded once and kept.
offline: `seconds` in metrics.jsonl of secondcast.trainer.train on a recording of the same batch, order `following`: all
    that a step does, waiting for data included; and its parts in a plain loop. A walk's trajectories are decoded once:
    "and reading" adds that, spread over the walk, which a run on a CPU does beside its steps, on the same core.
Both in turn, so that drift of the machine meets both; both begin with the same student and end with the same losses.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from transformers import T5EncoderModel

from secondcast.cache_builder.build import OneProcess, build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.cost.counted import backbone_cost, student_cost, text_encoder_cost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.device import quiet_libraries
from secondcast.models.student.student import new_student
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.teacher.folder import REPLAY_PARTS, build_parts, find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import is_held_out, prompt_id
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train

CPU = torch.device("cpu")
RATE, WEIGHT_DECAY, CLIP, DROPOUT, SEED = 1e-4, 1e-3, 1.0, 0.0, 0
# The first steps of a round warm up, and the first of a run waits for its trajectories.
WARM_STEPS = 2
LARGEST_LOSS_GAP = 1e-4
PARTS = ("text", "teacher", "data", "student", "backbone", "backward", "optimizer", "latent")


class Clock:
    """Seconds of the named parts of each step."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.seconds = now, defaultdict[str, list[float]](list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        begun = self.now()
        yield
        self.seconds[name].append(self.now() - begun)


class Ticks(Silent):
    """CPU seconds of the training thread from one optimizer step to the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def bar(self, title, **counts):
        """See Progress."""
        self.times.append(time.thread_time())
        return super().bar(title, **counts)

    def advance(self, count, note=""):
        """See Bar."""
        self.times.append(time.thread_time())


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The pocket teacher, frozen, fp32."""

    transformer: FluxTransformer2DModel
    text_encoder: T5EncoderModel

    @classmethod
    def load(cls) -> "Networks":
        """From its folder."""
        dtype = torch.float32
        transformer = FluxTransformer2DModel.from_pretrained(TEACHER_FOLDER, subfolder="transformer", torch_dtype=dtype)
        encoder = T5EncoderModel.from_pretrained(TEACHER_FOLDER, subfolder="text_encoder_2", torch_dtype=dtype)
        return cls(
            transformer=transformer.eval().requires_grad_(False), text_encoder=encoder.eval().requires_grad_(False)
        )


class Replay:
    """One batch of a cache, and a student that begins anew with each round."""

    def __init__(self, cache: Cache, networks: Networks, student: str) -> None:
        self.cache, self.networks, self.source = cache, networks, str(STUDENTS_FOLDER / student)
        self.batch = len(cache)
        trajectories = [cache.trajectory(index) for index in range(self.batch)]
        self.ids_BT = torch.stack([torch.from_numpy(cache.padded_token_ids(t.prompt)) for t in trajectories])
        self.noise_BSC = torch.stack([torch.from_numpy(t.noise_SC) for t in trajectories])
        self.scheduler = self._scheduler()
        self._given = {
            "guidance": torch.tensor([t.guidance for t in trajectories]),
            "pooled_projections": torch.zeros(self.batch, networks.transformer.config.pooled_projection_dim),
            "txt_ids": torch.zeros(cache.manifest.teacher.text_length, 3),
            "img_ids": self._image_ids(),
            "return_dict": False,
        }

    def online(self, steps: int, clock: Clock) -> list[float]:
        """The loop of the paper; the losses."""
        student, optimizer = self._student()
        x_BSC, losses, scheduler = self.noise_BSC, [], self._scheduler()
        for t in scheduler.timesteps[:steps]:
            with clock.part("text"), torch.no_grad():
                teacher_BTD = self.networks.text_encoder(self.ids_BT)[0]
            with clock.part("teacher"), torch.no_grad():
                target_BSC = self._predict(x_BSC, teacher_BTD, t)
            losses.append(self._student_step(student, optimizer, x_BSC, target_BSC, t, clock))
            with clock.part("latent"):
                x_BSC = scheduler.step(target_BSC, t, x_BSC, return_dict=False)[0]
        return losses

    def offline(self, steps: int, run: Path, *, cpu: bool) -> tuple[list[float], list[float]]:
        """Seconds and losses of the steps of `secondcast train`."""
        settings = TrainFlags.from_flags(
            student=self.source, init="random", data_order="sequential", steps=steps, batch_size=self.batch,
            dropout=DROPOUT,
            learning_rate=RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, seed=SEED, checkpoint_every=steps,
        ).settings()  # fmt: skip
        teacher = find_teacher(str(TEACHER_FOLDER), REPLAY_PARTS)
        ticks = Ticks()
        train(
            run,
            settings,
            {"cache": self.cache},
            teacher,
            CPU,
            ticks,
            student_source=self.source,
            ignore_replay_error=False,
        )
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        made = [entry for entry in entries if "kind" in entry]
        seconds = [b - a for a, b in pairwise(ticks.times)] if cpu else [entry["seconds"] for entry in made]
        return seconds, [entry["loss"] for entry in made]

    def offline_parts(self, steps: int, clock: Clock) -> None:
        """The same steps from the cache in a plain loop. "data" is its reading, spread over the steps of the walk."""
        student, optimizer = self._student()
        begun = clock.now()
        trajectories = [self.cache.trajectory(index) for index in range(self.batch)]
        latents, velocities = ([getattr(t, n) for t in trajectories] for n in ("hidden_states_KSC", "velocity_KSC"))
        reading = (clock.now() - begun) / len(self.scheduler.timesteps)
        for k, t in enumerate(self.scheduler.timesteps[:steps]):
            begun = clock.now()
            x_BSC, target_BSC = (torch.stack([torch.from_numpy(a[k]) for a in kind]) for kind in (latents, velocities))
            clock.seconds["data"].append(reading + clock.now() - begun)
            self._student_step(student, optimizer, x_BSC, target_BSC, t, clock)

    def _student_step(
        self,
        student: SecondcastStudent,
        optimizer: torch.optim.Optimizer,
        x_BSC: torch.Tensor,
        target_BSC: torch.Tensor,
        t: torch.Tensor,
        clock: Clock,
    ) -> float:
        with clock.part("student"):
            student_BTD = student(self.ids_BT)[0]
        with clock.part("backbone"):
            found_BSC = self._predict(x_BSC, student_BTD, t)
            loss = torch.nn.functional.mse_loss(found_BSC.float(), target_BSC.float())
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def _predict(self, x_BSC: torch.Tensor, embedding_BTD: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.networks.transformer(x_BSC, embedding_BTD, timestep=t.expand(self.batch) / 1000, **self._given)[0]

    def _student(self) -> tuple[SecondcastStudent, torch.optim.Optimizer]:
        teacher = self.cache.manifest.teacher
        student = new_student(self.source, teacher, init="random", dropout=DROPOUT, seed=SEED).train()
        groups: list[dict[str, Any]] = [
            {"params": student.encoder.parameters(), "weight_decay": WEIGHT_DECAY},
            {"params": student.final_projection.parameters(), "weight_decay": 0.0},
        ]
        return student, torch.optim.AdamW(groups, lr=RATE)

    def _scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        steps = self.cache.manifest.sampling.steps
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TEACHER_FOLDER, subfolder="scheduler")
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(self.noise_BSC.shape[1], *(scheduler.config[name] for name in names))
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler

    def _image_ids(self) -> torch.Tensor:
        side = int(self.noise_BSC.shape[1] ** 0.5)
        return FluxPipeline._prepare_latent_image_ids(self.batch, side, side, CPU, torch.float32)


@dataclass
class Result:
    """Seconds of one student and batch size, without the warm steps: of each round, and the parts of all together."""

    student: str
    batch: int
    expected: tuple[float, float]
    every: list[list[float]] = field(default_factory=list)
    once: list[list[float]] = field(default_factory=list)
    offline: list[list[float]] = field(default_factory=list)
    parts: dict[str, Clock] = field(default_factory=lambda: {"online": Clock(), "offline": Clock()})
    loss_gap: float = 0.0

    def row(self) -> str:
        """Totals and ratios, as Markdown; a ratio is the median of those of the rounds."""
        data = statistics.median(self.parts["offline"].seconds["data"])
        read = [[total + data for total in turn] for turn in self.offline]
        cells = [milliseconds([*chain.from_iterable(rounds)]) for rounds in (self.every, self.once, self.offline)]
        cells += [ratio(self.every, self.offline), ratio(self.once, self.offline)]
        cells += [ratio(self.every, read), ratio(self.once, read), *(f"{value:.2f}" for value in self.expected)]
        return f"| {self.student} | {self.batch} | {' | '.join(cells)} |"

    def part_rows(self) -> list[str]:
        """Medians of the parts of both, as Markdown, in ms."""
        rows = []
        for name, clock in self.parts.items():
            found = clock.seconds
            cells = [f"{1000 * statistics.median(found[part]):.1f}" if part in found else "-" for part in PARTS]
            rows.append(f"| {self.student} | {self.batch} | {name} | {' | '.join(cells)} |")
        return rows


def ratio(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """Median and range over the rounds of the ratio of medians."""
    found = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f}-{found[-1]:.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
    """Median (first to third quartile)."""
    low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4, method="inclusive"))
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


HEADER = (
    "| student | batch | online, text at each step, ms | online, text once, ms | offline, ms | online : offline | text "
    "once : offline | online : offline and reading | text once : it | by FLOPs | text once, by FLOPs |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
PART_HEADER = (
    "| student | batch | loop | teacher's text | teacher's forward | data | student | backbone | backward | optimizer "
    "| Euler step |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def expected_ratios(cache: Cache, source: str) -> tuple[float, float]:
    """FLOPs of an online step by those of an offline one: the text encoded at each step, and once."""
    backbone, text = backbone_cost(CallShapes.of(cache.manifest)), text_encoder_cost(cache.manifest).forward_flops
    offline = backbone.training_flops() + 3 * student_cost(source, cache.manifest).forward_flops
    online = backbone.forward_flops + offline
    return (online + text) / offline, (online + text / cache.manifest.sampling.steps) / offline


def record(folder: Path, batch: int) -> Cache:
    """A cache of one batch, none of it held out, recorded at the batch size of training."""
    texts = [text for text in captions(2 * batch, seed=SEED, split="train") if not is_held_out(prompt_id(text))]
    prompts = folder / f"{batch}.txt"
    prompts.write_text("".join(f"{text}\n" for text in texts[:batch]))
    settings = BuildSettings.from_flags(
        prompts=(prompts,), dtype="float32", batch_size=batch, shard_size=batch, seed=SEED
    )
    teacher = find_teacher(str(TEACHER_FOLDER), build_parts("zero"))
    build(str(folder / f"cache-{batch}"), settings, teacher, CPU, Silent(), OneProcess(WorkerConfig(batch_size=batch)))
    return Cache.open(str(folder / f"cache-{batch}"))


def measure(replay: Replay, student: str, asked: argparse.Namespace, folder: Path) -> Result:
    result = Result(student, replay.batch, expected_ratios(replay.cache, replay.source))
    # Encoded once and kept, a trajectory pays for one of its steps' encodings.
    saved = 1 - 1 / replay.cache.manifest.sampling.steps
    for turn in range(asked.rounds):
        now = time.thread_time if asked.clock == "cpu" else time.perf_counter
        online, parts = Clock(now), Clock(now)
        online_losses = replay.online(asked.steps, online)
        run = folder / f"run-{student}-{replay.batch}-{turn}"
        seconds, losses = replay.offline(asked.steps, run, cpu=asked.clock == "cpu")
        replay.offline_parts(min(asked.steps, WARM_STEPS + 3), parts)
        every = [sum(step) for step in zip(*online.seconds.values(), strict=True)]
        once = [total - saved * text for total, text in zip(every, online.seconds["text"], strict=True)]
        for rounds, values in ((result.every, every), (result.once, once), (result.offline, seconds)):
            rounds.append(values[WARM_STEPS:])
        for total, found in zip(result.parts.values(), (online, parts), strict=True):
            for name, values in found.seconds.items():
                total.seconds[name] += values[WARM_STEPS:]
        gaps = [abs(a - b) / b for a, b in zip(online_losses, losses, strict=True)]
        result.loss_gap = max(result.loss_gap, *gaps)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["small", "base"], help="of the pocket")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=7, help=f"of a round, the first {WARM_STEPS} not counted; up to 20"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of the computing thread, for a busy machine"
    )
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not WARM_STEPS < asked.steps <= 20:
        parser.error(f"--steps is {asked.steps}, expected {WARM_STEPS + 1} to 20, the steps of a trajectory")
    if asked.clock == "cpu" and asked.threads > 1:
        parser.error(f"--clock cpu counts one thread, --threads is {asked.threads}")
    torch.set_num_threads(asked.threads)
    quiet_libraries()
    networks = Networks.load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = [record(folder, batch) for batch in asked.batch_sizes]
        results = [
            measure(Replay(cache, networks, student), student, asked, folder)
            for student in asked.students
            for cache in caches
        ]
    print("\n".join([HEADER, *(result.row() for result in results)]), end="\n\n")
    print("\n".join([PART_HEADER, *(row for result in results for row in result.part_rows())]), end="\n\n")
    gap = max(result.loss_gap for result in results)
    print(f"losses of the two loops differ by at most {gap:.1e} of the loss")
    if not gap < LARGEST_LOSS_GAP:
        raise SystemExit(f"expected at most {LARGEST_LOSS_GAP:g}: these are not the same steps")


if __name__ == "__main__":
    main()
