"""Which way to train is best on the pocket teacher, at equal optimizer steps and at equal time: exact scores.

python -m experiments.pocket_training DIR [--jobs 2] [--part calibrate|screen|finals|table|all]

One cache and one shape of student for all. `calibrate` times each kind of step alone; equal time means equal seconds by
that, on one core. `screen` runs every arm with one seed and a small grid of learning rates, `finals` the best of each
family with all seeds, `table` prints Markdown. A job has one core and one torch thread. Given again it goes on with
what is missing. --scale shortens all arms alike: below about 0.5 it only shows that everything runs.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.pocket_harness import (
    Job,
    do,
    judge,
    keep_asked,
    make_cache,
    metrics,
    read_json,
    result_of,
    results_below,
    run_parts,
    train,
    work_off,
    workers,
    write_json,
)
from experiments.training.arms import STEP_KINDS, Arm, Budget, best_warmups, finalists, main_arms, replay_arms

PARTS = ("calibrate", "screen", "finals", "table")
REFERENCES = ("teacher", "untrained")
CALIBRATION = "calibration.json"


def calibrate(folder: Path, asked: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one step of each kind: median of the second half of its steps, the lowest of four rounds."""
    rounds = [{kind: step_seconds(folder, kind, turn, asked) for kind in STEP_KINDS} for turn in range(4)]
    return {kind: min(found[kind] for found in rounds) for kind in STEP_KINDS}


def step_seconds(folder: Path, kind: str, turn: int, asked: Mapping[str, Any]) -> float:
    loss, _, tail = kind.partition("-")
    count = max(10, round((150 if loss != "vision" else 40) * min(1.0, asked["scale"])))
    order = "sequential" if tail == "sequential" else "shuffled"
    share = int(tail) if tail.isdigit() else 1
    arm = Arm(budget="steps", family=kind, loss=loss, steps=count, learning_rate=1e-3, order=order, share=share)
    run = folder / "calibration" / f"{kind}-{turn}"
    train(run, [folder / "cache"], arm.flags(asked["student"], 0))
    # The first half reads the cache.
    found = statistics.median(entry["seconds"] for entry in metrics(run)[count // 2 :])
    print(f"round {turn}, {kind}: {found:.4f} s a step", flush=True)
    return found


def run_reference(place: Path, folder: Path, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    found = judge(folder / "cache", asked["captions"]).reference(name, asked["student"])
    return {"name": name, "seed": 0, **found}


def run_arm(place: Path, folder: Path, arm: Arm, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Train and score."""
    flags = arm.flags(asked["student"], seed)
    trained = train(place / "run", [folder / "cache"], flags)
    found = judge(folder / "cache", asked["captions"]).student(place / "run")
    told = {"name": arm.name, "seed": seed, "arm": asdict(arm), "flags": flags}
    return {**told, "training_seconds": trained, **found}


def folder_of(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / "runs" / f"{arm.name}-seed{seed}"


class Experiment:
    """A folder, what was asked when it was begun, and what was measured since."""

    def __init__(self, folder: Path, asked: dict[str, Any], jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        keep_asked(folder, asked)
        self.asked = asked

    def calibrate(self) -> None:
        """Record, time each kind of step, and time the scoring."""
        if (self.folder / CALIBRATION).exists():
            return
        with workers(1) as pool:
            print("recording, then timing each kind of step alone", flush=True)
            pool.submit(make_cache, self.folder / "cache", self.asked["count"]).result()
            found = pool.submit(calibrate, self.folder, self.asked).result()
            aside = pool.submit(do, self._reference("untrained")).result()
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
        return read_json(file)

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

    def _reference(self, name: str) -> Job:
        place = self.folder / "runs" / name
        return Job(place=place, work=run_reference, arguments=(self.folder, name, self.asked))

    def _work(self, wanted: Sequence[tuple[Arm, int]], references: Sequence[str] = ()) -> None:
        jobs = [
            Job(
                place=folder_of(self.folder, arm, seed),
                work=run_arm,
                arguments=(self.folder, arm, seed, self.asked),
                seconds=self._seconds([arm]),
            )
            for arm, seed in wanted
        ]
        work_off([*(self._reference(name) for name in references), *jobs], self.jobs)

    def table(self) -> None:
        """Print Markdown."""
        from experiments.training.tables import print_tables

        arms, chosen = self.screened()
        print_tables(self.budget(), arms, chosen, results_below(self.folder / "runs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="pocket-small")
    parser.add_argument("--num-prompts", type=int, default=1024, help="Prompts to record.")
    parser.add_argument("--captions", type=int, default=384, help="Held-out captions to score.")
    parser.add_argument("--steps", type=int, default=500, help="Optimizer steps of the arms at equal steps.")
    parser.add_argument("--seconds", type=float, default=80.0, help="Of training, of the arms at equal time.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies --steps and --seconds.")
    run_parts(parser, PARTS, Experiment)


if __name__ == "__main__":
    main()
