"""Training by what the transformer reads, on the pocket teacher: what is worth measuring, and what it brings.

python -m benchmarks.pocket_sensitivity DIR [--jobs 2] [--part PART]

`measure` takes the products, many and few, on one recording and on others. `screen` trains the small student for a
short time by each measurement and variation of it, one seed. `rates` and `finals` compare naive, context and
sensitivity, and vision after the latter two, at equal time: three sizes, three seeds. A job has one core and one torch
thread. Given again it goes on with what is missing.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pocket_arms import training_flags
from benchmarks.pocket_harness import (
    Job,
    judge,
    keep_asked,
    make_cache,
    metrics,
    read_json,
    result_of,
    results_below,
    train,
    work_off,
)
from benchmarks.pocket_metrics import (
    CHANGES,
    CONTEXT_METRIC,
    FULL,
    MEASUREMENTS,
    OTHERS,
    QUARTERS,
    Places,
    change,
    measure,
)

PARTS = ("record", "measure", "calibrate", "screen", "rates", "finals", "table", "picture")
SIZES = ("tiny", "small", "base")
LOSSES = ("embedding", "context", "sensitivity", "vision")
RATES = {"tiny": (3e-3, 1e-2), "small": (3e-3, 1e-2), "base": (3e-3, 1e-2)}
VISION_RATE = 3e-4
VISION_ALONE_RATES = (1e-3, 3e-3)
ROOTED = "root of the weights"
THEN_VISION = ", vision"
# Warm-up, and what follows it.
METHODS: Mapping[str, tuple[str | None, str]] = {
    "naive": (None, "embedding"),
    "context": (None, "context"),
    "sensitivity": (None, "sensitivity"),
    "weights on context": (None, "sensitivity"),
    ROOTED: (None, "sensitivity"),
    "context, vision": ("context", "vision"),
    "sensitivity, vision": ("sensitivity", "vision"),
    ROOTED + THEN_VISION: ("sensitivity", "vision"),
}
CHEAP = ("naive", "context", "sensitivity")
# Methods that are not trained with what was measured as it is.
CHANGED = {"weights on context": CONTEXT_METRIC}
WARMUP_PART = 0.75
# Of the sensitivity loss: the weights as measured, where nothing else is said.
AS_MEASURED = {"weight_power": 1.0}
SETTINGS = {
    ROOTED: {"weight_power": 0.5},
    "quarter power of the weights": {"weight_power": 0.25},
    "metric floor 0.0001": {"metric_floor": 1e-4},
    "metric floor 0.1": {"metric_floor": 0.1},
    "weight floor 0": {"weight_floor": 0.0},
    "weight floor 0.3": {"weight_floor": 0.3},
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One student. measured: which measurement its cache has. warmup_steps: before `steps`, with the loss `warmup`."""

    table: str
    row: str
    size: str
    loss: str
    steps: int
    learning_rate: float
    measured: str = FULL
    warmup: str | None = None
    warmup_steps: int = 0
    settings: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        """A folder's name."""
        words = [self.table, self.size, self.row, f"{self.learning_rate:g}"]
        return "-".join(words).replace(" ", "-").replace(",", "")

    def flags(self, seed: int) -> dict[str, Any]:
        """What `understudy train` is given, by the names of TrainFlags."""
        rate = VISION_RATE if self.warmup else self.learning_rate
        flags = training_flags(
            f"pocket-{self.size}", self.loss, self.steps, rate, seed, self.warmup, self.warmup_steps, self.learning_rate
        )
        reads = "sensitivity" in (self.loss, self.warmup)
        return flags | (AS_MEASURED | dict(self.settings or {}) if reads else {})


def record(place: Path, count: int) -> dict[str, Any]:
    make_cache(place.parent / "cache", count)
    return {"count": count}


def time_steps(place: Path, folder: Path, size: str, loss: str) -> dict[str, Any]:
    """Seconds of one step: median of the second half."""
    count = 30 if loss == "vision" else 100
    trial = Trial(table="", row="", size=size, loss=loss, steps=count, learning_rate=1e-3)
    train(place / "run", [Places(folder=folder).cache(FULL)], trial.flags(0))
    found = statistics.median(entry["seconds"] for entry in metrics(place / "run")[count // 2 :])
    return {"size": size, "loss": loss, "step_seconds": found}


def run_trial(place: Path, folder: Path, trial: Trial, seed: int, captions: int) -> dict[str, Any]:
    """Train and score."""
    from benchmarks.pocket_surrogate import surrogate_of

    places = Places(folder=folder)
    if trial.measured in CHANGES and not (places.cache(trial.measured) / "sensitivity" / "record.json").exists():
        change(folder, trial.measured)
    trained = train(place / "run", [places.cache(trial.measured)], trial.flags(seed))
    found = judge(places.recording, captions).student(place / "run")
    surrogate = surrogate_of(place / "run", places.cache(FULL))
    return {"name": trial.name, "seed": seed, **asdict(trial), "training_seconds": trained, **found} | {
        "surrogate": surrogate
    }


class Experiment:
    """A folder, what was asked when it was begun, and what was measured since."""

    def __init__(self, folder: Path, asked: dict[str, Any], jobs: int) -> None:
        self.folder, self.asked, self.jobs = folder, asked, jobs
        keep_asked(folder, asked)

    def record(self) -> None:
        """One cache."""
        work_off([Job(place=self.folder / "recorded", work=record, arguments=(self.asked["count"],))], 1)

    def measure(self) -> None:
        """The largest first; variations of it are made where they are trained with."""
        names = [*MEASUREMENTS, *QUARTERS, *OTHERS]
        jobs = [
            Job(
                place=self.folder / "measurements" / name.replace(" ", "-"),
                work=measure,
                arguments=(self.folder, name),
                seconds=float(len(names) - at),
            )
            for at, name in enumerate(names)
        ]
        work_off(jobs, self.jobs)

    def calibrate(self) -> None:
        """Seconds of each kind of step of each size, with all cores at work; the lower of two turns counts."""
        work_off(
            [
                Job(
                    place=self.folder / "calibration" / f"{size}-{loss}-{turn}",
                    work=time_steps,
                    arguments=(self.folder, size, loss),
                )
                for turn in range(2)
                for size in SIZES
                for loss in LOSSES
            ],
            self.jobs,
        )

    def step_seconds(self, size: str, loss: str) -> float:
        """By calibration."""
        found = [result_of(self.folder / "calibration" / f"{size}-{loss}-{turn}") for turn in range(2)]
        if None in found:
            raise SystemExit(f"{self.folder} has no calibration yet: give --part calibrate first")
        return min(one["step_seconds"] for one in found if one is not None)

    def screened(self) -> list[Trial]:
        """The small student for a short time: the losses by their rates, and every variation of the third."""
        steps = self.asked["short_steps"]

        def trial(row: str, loss: str, rate: float, measured: str = FULL, **rest: Any) -> Trial:
            return Trial(
                table="screen", row=row, size="small", loss=loss, steps=steps, learning_rate=rate, measured=measured,
                **rest,
            )  # fmt: skip

        found = [trial(row, METHODS[row][1], rate) for row in CHEAP for rate in RATES["small"]]
        rate = self._best_rate([one for one in found if one.row == "sensitivity"])
        found += [trial("vision", "vision", vision_rate) for vision_rate in VISION_ALONE_RATES]
        others = [name for name in (*MEASUREMENTS, *QUARTERS, *CHANGES) if name != FULL]
        found += [trial(name, "sensitivity", rate, name) for name in others]
        return found + [trial(name, "sensitivity", rate, settings=settings) for name, settings in SETTINGS.items()]

    def _best_rate(self, trials: Sequence[Trial]) -> float:
        def mean(trial: Trial) -> float:
            return float((result_of(self._place(trial, 0)) or {"mean": 0.0})["mean"])

        return max(trials, key=mean).learning_rate

    def screen(self) -> None:
        """One seed; the rates first, for the variations take the better one."""
        work_off([self._job(trial, 0) for trial in self.screened() if trial.row in CHEAP], self.jobs)
        work_off([self._job(trial, 0) for trial in self.screened()], self.jobs)

    def _final(self, size: str, method: str, rate: float) -> Trial:
        warmup, loss = METHODS[method]
        seconds, each = self.asked["seconds"], self.step_seconds(size, loss)
        common: dict[str, Any] = {"table": "finals", "row": method, "size": size, "loss": loss, "learning_rate": rate}
        common |= {"measured": CHANGED.get(method, FULL), "settings": SETTINGS.get(method.removesuffix(THEN_VISION))}
        if warmup is None:
            return Trial(**common, steps=max(1, round(seconds / each)))
        steps = max(1, round((1 - WARMUP_PART) * seconds / each))
        before = max(1, round((seconds - steps * each) / self.step_seconds(size, warmup)))
        return Trial(**common, steps=steps, warmup=warmup, warmup_steps=before)

    def rated(self) -> list[Trial]:
        """The losses without a transformer by their rates, at equal time."""
        return [self._final(size, method, rate) for size in SIZES for method in CHEAP for rate in RATES[size]]

    def rates(self) -> None:
        """One seed."""
        work_off([self._job(trial, 0) for trial in self.rated()], self.jobs)

    def chosen(self) -> list[Trial]:
        """Each method at each size with the better rate of its loss, or of its warm-up's."""
        found = []
        for size in SIZES:
            best = {
                METHODS[method][1]: self._best_rate([t for t in self.rated() if (t.size, t.row) == (size, method)])
                for method in CHEAP
            }
            found += [self._final(size, method, best[warmup or loss]) for method, (warmup, loss) in METHODS.items()]
        return found

    def finals(self) -> None:
        """All seeds."""
        work_off([self._job(t, seed) for t in self.chosen() for seed in range(self.asked["seeds"])], self.jobs)

    def _place(self, trial: Trial, seed: int) -> Path:
        return self.folder / "runs" / f"{trial.name}-seed{seed}"

    def _job(self, trial: Trial, seed: int) -> Job:
        return Job(
            place=self._place(trial, seed),
            work=run_trial,
            arguments=(self.folder, trial, seed, self.asked["captions"]),
            seconds=float(trial.steps + trial.warmup_steps),
        )

    def table(self) -> None:
        """Print Markdown."""
        from benchmarks.pocket_sensitivity_tables import print_all

        measured = [read_json(file) for file in sorted((self.folder / "measurements").glob("*/result.json"))]
        print_all(self.folder, self.screened(), self.chosen(), results_below(self.folder / "runs"), measured)

    def picture(self) -> None:
        """That of docs/sensitivity.md."""
        from benchmarks.pocket_sensitivity_picture import draw

        print(draw(self.folder, results_below(self.folder / "runs")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--count", type=int, default=1024, help="Prompts to record.")
    parser.add_argument("--captions", type=int, default=256, help="Held-out captions to score.")
    parser.add_argument("--short-steps", type=int, default=400, help="Optimizer steps of the screening.")
    parser.add_argument("--seconds", type=float, default=55.0, help="Of training, of each finalist.")
    parser.add_argument("--seeds", type=int, default=3)
    asked = vars(parser.parse_args())
    folder, part, jobs = (asked.pop(key) for key in ("folder", "part", "jobs"))
    experiment = Experiment(folder.absolute(), asked, jobs)
    for name in PARTS if part == "all" else (part,):
        getattr(experiment, name)()


if __name__ == "__main__":
    main()
