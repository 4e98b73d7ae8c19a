"""Which way to train is best on the pocket teacher, at equal optimizer steps and at equal time: exact scores.

python -m benchmarks.pocket_training DIR [--jobs 2] [--part calibrate|screen|finals|table|all]

One cache and one shape of student for all. `calibrate` times each kind of step alone; equal time means equal seconds by
that, on one core. `screen` runs every arm with one seed and a small grid of learning rates, `finals` the best of each
family with all seeds, `table` prints Markdown. A job has one core and one torch thread. Given again it goes on with
what is missing. --scale shortens all arms alike: below about 0.5 it only shows that everything runs.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache as remembered
from pathlib import Path
from typing import Any

from benchmarks.pocket_arms import STEP_KINDS, Arm, Budget, best_warmups, finalists, main_arms, replay_arms
from storage_schemas import durable

PARTS = ("calibrate", "screen", "finals", "table")
REFERENCES = ("teacher", "untrained")
CALIBRATION = "calibration.json"


def command(*words: object) -> None:
    """A command line of understudy, in this process: no second start of torch. Its errors come through."""
    import cli

    cli.app([str(word) for word in words], standalone_mode=False)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def start_worker(cores: Any) -> None:
    """One core and one thread for this process, which ends when the one that began it does."""
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    from models.device import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def workers(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for number in range(jobs):
        cores.put(own[number % len(own)] if own else None)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(cores,))


def make_cache(folder: Path, asked: Mapping[str, Any]) -> None:
    """Captions and the recording, by the commands; done already it takes a second."""
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        command("prompts", "pocket", prompts, "--count", asked["count"])
    recording = {"teacher": "pocket", "prompts": prompts, "dtype": "float32", "batch_size": 64, "device": "cpu"}
    command("build", folder / "cache", *as_flags(recording))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "seconds" in entry]


def train(run: Path, cache: Path, flags: Mapping[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command("train", run, "--cache", cache, "--device", "cpu", "--quiet", *as_flags(flags))


def calibrate(folder: Path, asked: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one step of each kind: median of the second half of its steps, the lowest of four rounds."""
    rounds = [{kind: step_seconds(folder, kind, turn, asked) for kind in STEP_KINDS} for turn in range(4)]
    return {kind: min(found[kind] for found in rounds) for kind in STEP_KINDS}


def step_seconds(folder: Path, kind: str, turn: int, asked: Mapping[str, Any]) -> float:
    loss, _, tail = kind.partition("-")
    count = max(10, round((150 if loss != "vision" else 40) * min(1.0, asked["scale"])))
    order = "following" if tail == "following" else "shuffled"
    share = int(tail) if tail.isdigit() else 1
    arm = Arm(budget="steps", family=kind, loss=loss, steps=count, learning_rate=1e-3, order=order, share=share)
    run = folder / "calibration" / f"{kind}-{turn}"
    train(run, folder / "cache", arm.flags(asked["student"], 0))
    # The first half reads the cache.
    found = statistics.median(entry["seconds"] for entry in metrics(run)[count // 2 :])
    print(f"round {turn}, {kind}: {found:.4f} s a step", flush=True)
    return found


@remembered
def judge(folder: Path, captions: int) -> Any:
    from benchmarks.pocket_judge import Judge

    return Judge(folder / "cache", captions)


def run_reference(folder: Path, name: str, asked: Mapping[str, Any]) -> float:
    began = time.monotonic()
    found = judge(folder, asked["captions"]).reference(name, asked["student"])
    took = time.monotonic() - began
    write_json(folder / "runs" / name / "result.json", {"name": name, "seed": 0, "wall_seconds": took, **found})
    return took


def run_arm(folder: Path, arm: Arm, seed: int, asked: Mapping[str, Any]) -> float:
    """Train and score; result.json comes last and whole."""
    began = time.monotonic()
    place = folder_of(folder, arm, seed)
    flags = arm.flags(asked["student"], seed)
    train(place / "run", folder / "cache", flags)
    trained = sum(entry["seconds"] for entry in metrics(place / "run"))
    found = judge(folder, asked["captions"]).student(place / "run")
    took = time.monotonic() - began
    told = {"name": arm.name, "seed": seed, "arm": asdict(arm), "flags": flags}
    write_json(place / "result.json", {**told, "training_seconds": trained, "wall_seconds": took, **found})
    return took


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(file, (json.dumps(value, indent=1) + "\n").encode())


def folder_of(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / "runs" / f"{arm.name}-seed{seed}"


def result_of(place: Path) -> dict[str, Any] | None:
    file = place / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


class Experiment:
    """A folder, what was asked when it was begun, and what was measured since."""

    def __init__(self, folder: Path, asked: dict[str, Any], jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        file = folder / "asked.json"
        if file.exists() and (was := json.loads(file.read_text())) != asked:
            raise SystemExit(f"{folder} was begun with {was}, you asked for {asked}: give the same, or another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
        self.asked = asked

    def calibrate(self) -> None:
        """Record, time each kind of step, and time the scoring."""
        if (self.folder / CALIBRATION).exists():
            return
        with workers(1) as pool:
            print("recording, then timing each kind of step alone", flush=True)
            pool.submit(make_cache, self.folder, self.asked).result()
            found = pool.submit(calibrate, self.folder, self.asked).result()
            aside = pool.submit(run_reference, self.folder, "untrained", self.asked).result()
        write_json(self.folder / CALIBRATION, {"step_seconds": found, "aside_seconds": aside})

    def budget(self) -> Budget:
        """Steps and seconds that the arms get."""
        steps, seconds = (self.asked[key] * self.asked["scale"] for key in ("steps", "seconds"))
        return Budget(steps=round(steps), seconds=seconds, step_seconds=self._calibration["step_seconds"])

    @property
    def _calibration(self) -> dict[str, Any]:
        file = self.folder / CALIBRATION
        if not file.exists():
            raise SystemExit(f"{self.folder} has no {CALIBRATION} yet: give --part calibrate first")
        return json.loads(file.read_text())

    def means(self, arms: Iterable[Arm]) -> dict[str, float]:
        """Mean score of seed 0 by arm, of those that are done."""
        done = ((arm.name, result_of(folder_of(self.folder, arm, 0))) for arm in arms)
        return {name: result["mean"] for name, result in done if result is not None}

    def screened(self) -> tuple[list[Arm], list[Arm]]:
        """All arms, and of them the finalists; SystemExit where the screening is not through."""
        arms = main_arms(self.budget())
        means = self.means(arms)
        if len(means) == len(arms):
            arms += replay_arms(self.budget(), best_warmups(arms, means))
            means = self.means(arms)
        if missing := [arm.name for arm in arms if arm.name not in means]:
            raise SystemExit(f"the screening lacks {', '.join(missing)}: give --part screen first")
        return arms, finalists(arms, means)

    def screen(self) -> None:
        """Every arm with seed 0."""
        arms = main_arms(self.budget())
        self._estimate(arms)
        self._work([(arm, 0) for arm in arms], references=REFERENCES)
        self._work([(arm, 0) for arm in replay_arms(self.budget(), best_warmups(arms, self.means(arms)))])

    def finals(self) -> None:
        """The finalists with all seeds."""
        _, chosen = self.screened()
        self._work([(arm, seed) for seed in range(self.asked["seeds"]) for arm in chosen])

    def _seconds(self, arms: Iterable[Arm]) -> float:
        steps, aside = self._calibration["step_seconds"], self._calibration["aside_seconds"]
        # Beside its steps and its scores an arm opens the cache and validates.
        return sum(arm.seconds(steps) + 1.3 * aside for arm in arms)

    def _estimate(self, arms: Sequence[Arm]) -> None:
        guess = {arm.name: 0.0 for arm in arms}
        every = [*arms, *replay_arms(self.budget(), best_warmups(arms, guess))]
        chosen = finalists(every, {arm.name: 0.0 for arm in every})
        screen, finals = self._seconds(every), self._seconds(chosen) * (self.asked["seeds"] - 1)
        minutes = (screen + finals) / self.jobs / 60
        print(
            f"{len(every)} arms to screen, {screen / 60:.0f} job-minutes; {len(chosen)} finalists, {finals / 60:.0f}: "
            f"about {minutes:.0f} minutes with --jobs {self.jobs}",
            flush=True,
        )

    def _work(self, wanted: Sequence[tuple[Arm, int]], references: Sequence[str] = ()) -> None:
        todo = [(arm, seed) for arm, seed in wanted if result_of(folder_of(self.folder, arm, seed)) is None]
        # The longest first, so that the last ones do not leave a core idle for long.
        todo.sort(key=lambda item: -self._seconds([item[0]]))
        left = sum(self._seconds([arm]) for arm, _ in todo)
        with workers(self.jobs) as pool:
            futures = {
                pool.submit(run_reference, self.folder, name, self.asked): (name, 0.0)
                for name in references
                if result_of(self.folder / "runs" / name) is None
            }
            for arm, seed in todo:
                future = pool.submit(run_arm, self.folder, arm, seed, self.asked)
                futures[future] = (f"{arm.name} seed {seed}", self._seconds([arm]))
            failed = []
            for number, future in enumerate(as_completed(futures), 1):
                name, planned = futures[future]
                left -= planned
                minutes = math.ceil(left / self.jobs / 60)
                if error := future.exception():
                    failed.append(f"{name}: {error}")
                said = error or f"{future.result():.0f} s"
                print(f"{number}/{len(futures)} {name}: {said}; about {minutes} minutes left here", flush=True)
        if failed:
            raise SystemExit("\n".join(["failed, the rest is done; the same command tries again:", *failed]))

    def table(self) -> None:
        """Print Markdown."""
        from benchmarks.pocket_tables import print_tables

        arms, chosen = self.screened()
        places = (self.folder / "runs").iterdir()
        results = [result for place in sorted(places) if (result := result_of(place)) is not None]
        print_tables(self.budget(), arms, chosen, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--student", default="pocket-small")
    parser.add_argument("--count", type=int, default=1024, help="Prompts to record.")
    parser.add_argument("--captions", type=int, default=384, help="Held-out captions to score.")
    parser.add_argument("--steps", type=int, default=500, help="Optimizer steps of the arms at equal steps.")
    parser.add_argument("--seconds", type=float, default=80.0, help="Of training, of the arms at equal time.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies --steps and --seconds.")
    asked = vars(parser.parse_args())
    folder, part, jobs = (asked.pop(key) for key in ("folder", "part", "jobs"))
    experiment = Experiment(folder.absolute(), asked, jobs)
    for name in PARTS if part == "all" else (part,):
        getattr(experiment, name)()


if __name__ == "__main__":
    main()
