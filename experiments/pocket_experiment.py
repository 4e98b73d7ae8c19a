"""The paper's experiments in miniature, and what it left open, on the pocket teacher: exact scores.

python -m experiments.pocket_experiment DIR [--jobs 2] [--part record|calibrate|screen|finals|questions|table|all]

Three sizes of student by four methods at equal time, and at equal steps; scenes, compositions or signs alone against
all three; the paper's three stages against one; a student with a tokenizer of its own; then the small students of all
seeds at other sampler steps, guidance and text lengths, and on a backbone with a LoRA. A job has one core and one torch
thread. Given again it goes on with what is missing. --scale shortens all training alike: below about 0.5 it only shows
that everything runs.
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.pocket_harness import (
    Job,
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
)
from experiments.pocket_questions import LORA, TEACHER, Setting, ask, settings
from experiments.pocket_trials import ALL, BERT, KINDS, LOSSES, SIZES, Plan, Trial, best_rows, recipe_text, small_vision

PARTS = ("record", "calibrate", "screen", "finals", "questions", "table")
REFERENCES = ("teacher", "untrained")
TURNS = 2
# Seconds on one core beside the training, for the estimate: opening, scoring, recording a prompt, a step of the LoRA.
ASIDE_SECONDS, ASK_SECONDS, PROMPT_SECONDS, LORA_SECONDS = 25.0, 20.0, 0.09, 0.35


def record(place: Path, count: int, kind: str | None) -> dict[str, Any]:
    make_cache(place / "cache", count, kind)
    return {"kind": kind, "count": count}


def time_steps(place: Path, folder: Path, size: str, loss: str, scale: float) -> dict[str, Any]:
    """Seconds of one step: median of the second half."""
    count = max(10, round((30 if loss == "vision" else 150) * min(1.0, scale)))
    trial = Trial(table="", row="", size=size, caches=(ALL,), loss=loss, steps=count, learning_rate=1e-3)
    train(place / "run", [cache_of(folder, ALL)], trial.flags(0, folder / BERT))
    # The first half reads the cache.
    found = statistics.median(entry["seconds"] for entry in metrics(place / "run")[count // 2 :])
    return {"size": size, "loss": loss, "step_seconds": found}


def run_reference(place: Path, folder: Path, name: str, captions: int) -> dict[str, Any]:
    found = judge(cache_of(folder, ALL), captions).reference(name, "pocket-small")
    return {"name": name, "row": name, "table": "references", "seed": 0, **found}


def run_trial(place: Path, folder: Path, trial: Trial, seed: int, captions: int) -> dict[str, Any]:
    """Train and score."""
    caches = [f"{name}={cache_of(folder, name)}" for name in trial.caches]
    if trial.order is None:
        if trial.size == BERT:
            from experiments.training.pocket_bert import write_bert

            write_bert(folder / BERT)
        flags = trial.flags(seed, folder / BERT)
    else:
        recipe = place / "recipe.toml"
        recipe.write_text(recipe_text(trial))
        flags = {"config": recipe, "seed": seed}
    trained = train(place / "run", caches, flags)
    found = judge(cache_of(folder, ALL), captions).student(place / "run")
    return {"name": trial.name, "seed": seed, **asdict(trial), "training_seconds": trained, **found}


def run_lora(place: Path, steps: int) -> dict[str, Any]:
    from experiments.pocket_lora import train_lora

    return train_lora(place, steps, seed=0)


def cache_of(folder: Path, name: str) -> Path:
    return folder / "caches" / name / "cache"


class Experiment:
    """A folder, what was asked when it was begun, and what was measured since."""

    def __init__(self, folder: Path, asked: dict[str, Any], jobs: int) -> None:
        self.folder, self.asked, self.jobs = folder, asked, jobs
        keep_asked(folder, asked)

    def record(self) -> None:
        """Four caches: all kinds together, and each alone."""
        self._estimate()
        count = self.asked["count"]
        work_off([self._job("caches", name, record, count, kind) for name, kind in _CACHES.items()], self.jobs)

    def calibrate(self) -> None:
        """Seconds of each kind of step of each size, with all cores at work; the lowest of the turns counts."""
        work_off(
            [
                self._job("calibration", f"{size}-{loss}-{turn}", time_steps, self.folder, size, loss, self._scale)
                for turn in range(TURNS)
                for size in SIZES
                for loss in LOSSES
            ],
            self.jobs,
        )

    def plan(self) -> Plan:
        """Every trial, by the calibration."""
        found: dict[str, dict[str, float]] = {size: {} for size in SIZES}
        for size in SIZES:
            for loss in LOSSES:
                places = [self.folder / "calibration" / f"{size}-{loss}-{turn}" for turn in range(TURNS)]
                timed = [result["step_seconds"] for place in places if (result := result_of(place))]
                if len(timed) < TURNS:
                    raise SystemExit(f"{self.folder} has no calibration yet: give --part calibrate first")
                found[size][loss] = min(timed)
        return self._plan(found)

    def _plan(self, step_seconds: Mapping[str, Mapping[str, float]]) -> Plan:
        seconds, own = (self.asked[key] * self._scale for key in ("seconds", "own_seconds"))
        return Plan(seconds=seconds, own_seconds=own, step_seconds=step_seconds)

    @property
    def _scale(self) -> float:
        return float(self.asked["scale"])

    def screen(self) -> None:
        """What is tuned, with seed 0; one student with a tokenizer of its own; the LoRA."""
        plan = self.plan()
        jobs = [self._trial(trial, 0) for trial in (*plan.scaling(), plan.bert())]
        jobs += [
            self._job("references", name, run_reference, self.folder, name, self.asked["captions"], seconds=20.0)
            for name in REFERENCES
        ]
        steps = max(1, round(self.asked["lora_steps"] * self._scale))
        lora = Job(place=self.folder / LORA, work=run_lora, arguments=(steps,), seconds=LORA_SECONDS * steps)
        work_off([*jobs, lora], self.jobs)

    def chosen(self) -> list[Trial]:
        """The rows of the scaling table; SystemExit where the screening is not through."""
        tuned = self.plan().scaling()
        means = {}
        for trial in tuned:
            if (result := result_of(self._place(trial, 0))) is None:
                raise SystemExit(f"the screening lacks {trial.name}: give --part screen first")
            means[trial.name] = result["mean"]
        return best_rows(tuned, means)

    def finals(self) -> None:
        """The rows of the scaling table, and what depends on its rates, with all seeds."""
        plan, chosen, seeds = self.plan(), self.chosen(), range(self.asked["seeds"])
        rival = small_vision(chosen)
        rows = [*chosen, *plan.equal_steps(chosen), *plan.ablation(rival), *plan.stages(rival)]
        work_off([self._trial(trial, seed) for trial in rows for seed in seeds], self.jobs)

    def questions(self) -> None:
        """The small students that were trained by vision, beside the teacher."""
        work_off([self._ask(setting, who) for setting in settings() for who in self._asked_ones()], self.jobs)

    def _asked_ones(self) -> list[str]:
        trial = small_vision(self.chosen())
        return [TEACHER, *(self._place(trial, seed).name for seed in range(self.asked["seeds"]))]

    def _ask(self, setting: Setting, who: str) -> Job:
        name = f"{setting.question}-{setting.value}-{who}"
        count = self.asked["question_captions"]
        seconds = ASK_SECONDS * setting.work * count / 256
        return self._job("questions", name, ask, setting, who, self.folder, count, seconds=seconds)

    def _place(self, trial: Trial, seed: int) -> Path:
        return self.folder / "runs" / f"{trial.name}-seed{seed}"

    def _trial(self, trial: Trial, seed: int) -> Job:
        return Job(
            place=self._place(trial, seed),
            work=run_trial,
            arguments=(self.folder, trial, seed, self.asked["captions"]),
            seconds=trial.seconds(self.plan().step_seconds) + ASIDE_SECONDS,
        )

    def _job(self, part: str, name: str, work: Any, *arguments: Any, seconds: float = 0.0) -> Job:
        return Job(place=self.folder / part / name, work=work, arguments=arguments, seconds=seconds)

    def _estimate(self) -> None:
        """Before anything is measured: training takes what it is given, the rest what it took once."""
        plan = self._plan({size: dict.fromkeys(LOSSES, 0.1) for size in SIZES})
        seeds, tuned = self.asked["seeds"], plan.scaling()
        chosen = best_rows(tuned, {})
        # Of each row the best rate of seed 0 is there already.
        rivals = [*plan.ablation(small_vision(chosen)), *plan.stages(small_vision(chosen))]
        trials = len(tuned) + len(chosen) * (seeds - 1) + len(rivals) * seeds
        shorter = plan.equal_steps(chosen)
        training = trials * plan.seconds + seeds * sum(trial.seconds(plan.step_seconds) for trial in shorter)
        trials += len(shorter) * seeds
        asked = sum(ASK_SECONDS * setting.work for setting in settings()) * (1 + seeds)
        parts = {
            "recording": PROMPT_SECONDS * self.asked["count"] * len(_CACHES),
            f"training {trials} students": training + trials * ASIDE_SECONDS + plan.own_seconds + ASIDE_SECONDS,
            "questions": asked * self.asked["question_captions"] / 256,
            "LoRA": LORA_SECONDS * self.asked["lora_steps"] * self._scale,
        }
        said = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in parts.items())
        minutes = sum(parts.values()) / self.jobs / 60
        print(f"minutes of one core: {said}; about {minutes:.0f} minutes with --jobs {self.jobs}", flush=True)

    def table(self) -> None:
        """Print Markdown."""
        from experiments.pocket_experiment_tables import print_all

        parts = ("references", "runs", "questions")
        results = {part: results_below(self.folder / part) for part in parts}
        print_all(self.plan(), self.chosen(), results, lora=read_json(self.folder / LORA / "result.json"))


_CACHES: dict[str, str | None] = {ALL: None, **{kind: kind for kind in KINDS}}


def experiment_of(folder: Path, asked: dict[str, Any], jobs: int) -> Experiment:
    if find_spec("peft") is None:
        raise SystemExit("peft is not installed, by which diffusers fine-tunes with a LoRA: pip install peft")
    return Experiment(folder, asked, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=1024, help="Prompts to record, for each of the four caches.")
    parser.add_argument("--captions", type=int, default=256, help="Held-out captions to score.")
    parser.add_argument("--question-captions", type=int, default=192, help="Of the open questions.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of training, of each student.")
    parser.add_argument("--own-seconds", type=float, default=600.0, help="Of the student with its own tokenizer.")
    parser.add_argument("--lora-steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies the seconds and the LoRA's steps.")
    run_parts(parser, PARTS, experiment_of)


if __name__ == "__main__":
    main()
