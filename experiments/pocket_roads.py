"""Which road reaches the pocket teacher for the fewest FLOPs of FLUX, what small students lose, what vision adds late.

python -m experiments.pocket_roads DIR [--jobs 2] [--part prepare|roads|late|sizes|table|all]

`roads` trains random and teacher-made students by the context, depth and vision loss on some numbers of prompts,
`late` continues the student of the first road by each loss, `sizes` trains random ones of about 10,000 and 25,000
encoder parameters, `table` prints Markdown. Checkpoints on a geometric series are measured: equal steps and equal
FLOPs are read from one curve. A job has one core and one torch thread; all checkpoints stay, 2 GB. The same command
resumes. --scale changes the lengths of all alike: below about 0.5 it only shows that everything runs.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.pocket_harness import (
    Job,
    as_flags,
    command,
    judge,
    keep_asked,
    make_cache,
    result_of,
    results_below,
    run_parts,
    train,
    work_off,
    write_json,
)
from experiments.roads.arms import (
    INITIAL_PROMPTS,
    RECORDED,
    SIZES,
    STUDENT,
    TEXT,
    Road,
    late,
    roads,
    sizes,
    start_of_late,
)

PARTS = ("prepare", "roads", "late", "sizes", "table")
JUDGED_BY = f"recorded-{RECORDED}"
# Of a T5 like the embedded students, with heads of 16.
SIZE_CONFIG = {
    "model_type": "t5", "vocab_size": 557, "d_kv": 16, "relative_attention_max_distance": 64, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip


def make_caches(place: Path, folder: Path) -> dict[str, Any]:
    """The prompts, all recordings and texts, and the initial student made of the teacher."""
    make_cache(folder / JUDGED_BY, RECORDED)
    whole = folder / f"text-{TEXT[-1]}"
    make_cache(whole, TEXT[-1], text_only=True)
    for count in TEXT[:-1]:
        command("subset", whole, folder / f"text-{count}", "--num-prompts", count, "--quiet")
    made = {"teacher": "pocket", "size": STUDENT, "kind": "cut", "limit": INITIAL_PROMPTS, "dtype": "float32"}
    command("init-student", folder / "teacher-initial", "--prompts", f"{whole}.txt", "--device", "cpu", *as_flags(made))
    for name, (width, layers, heads, units) in SIZES.items():
        shape = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_ff": units}
        write_json(folder / name / "config.json", SIZE_CONFIG | shape)
    return {}


def measure_reference(place: Path, folder: Path, name: str, captions: int) -> dict[str, Any]:
    """Of the teacher, or of an untrained student."""
    judged = judge(folder / JUDGED_BY, captions)
    if name == "teacher-initial":
        return {"name": name, **judged.saved(folder / name)}
    return {"name": name, **judged.reference(name, STUDENT)}


def run_road(place: Path, folder: Path, road: Road, student: str, seed: int, captions: int) -> dict[str, Any]:
    """Train; losses of the checkpoints on the series, scores of the last."""
    run = place / "run"
    seconds = train(run, [folder / name for name in road.caches], road.flags(student, seed))
    judged = judge(folder / JUDGED_BY, captions)
    folders = {steps: run / f"checkpoint-{steps:08d}" for steps in road.measured()}
    curve = [{"steps": steps, **judged.errors(found / "student")} for steps, found in folders.items()]
    last = judged.saved(folders[road.steps] / "student")
    return {"name": road.name, "seed": seed, "road": asdict(road), "training_seconds": seconds, "curve": curve, **last}


class Experiment:
    """A folder, what was asked when it was begun, and what was measured since."""

    def __init__(self, folder: Path, asked: dict[str, Any], jobs: int) -> None:
        self.folder, self.asked, self.jobs = folder, asked, jobs
        keep_asked(folder, asked)

    def prepare(self) -> None:
        """Caches, initial students and references."""
        work_off([Job(place=self.folder / "prepared", work=make_caches, arguments=(self.folder,))], 1)
        names = ("teacher", "untrained", "teacher-initial")
        given = {name: (self.folder, name, self.asked["captions"]) for name in names}
        places = {name: self.folder / "references" / name for name in names}
        work_off([Job(place=places[name], work=measure_reference, arguments=given[name]) for name in names], self.jobs)

    def roads(self) -> None:
        """Every road."""
        self._work(roads(self.asked["scale"]))

    def sizes(self) -> None:
        """The small students."""
        self._work(sizes(self.asked["scale"]))

    def late(self) -> None:
        """What follows the first road of seed 0; a seed is then of the data order."""
        if result_of(self._place(start_of_late(self.asked["scale"]), 0)) is None:
            raise SystemExit(f"{self.folder} lacks the student to continue: give --part roads first")
        self._work(late(self.asked["scale"]))

    def table(self) -> None:
        """Print Markdown."""
        from experiments.roads.tables import print_tables

        references = {result["name"]: result for result in results_below(self.folder / "references")}
        print_tables(references, results_below(self.folder / "runs"))

    def _student(self, road: Road) -> str:
        if road.table == "late":
            start = start_of_late(self.asked["scale"])
            return str(self._place(start, 0) / "run" / f"checkpoint-{start.steps:08d}" / "student")
        return STUDENT if road.initial == "random" else str(self.folder / _INITIAL_FOLDERS[road.initial])

    def _place(self, road: Road, seed: int) -> Path:
        return self.folder / "runs" / f"{road.name}-seed{seed}"

    def _work(self, wanted: Sequence[Road]) -> None:
        for seed in range(self.asked["seeds"]):
            given: Mapping[Road, tuple[Any, ...]] = {
                road: (self.folder, road, self._student(road), seed, self.asked["captions"]) for road in wanted
            }
            jobs = [
                Job(place=self._place(road, seed), work=run_road, arguments=arguments)
                for road, arguments in given.items()
            ]
            work_off(jobs, self.jobs)


_INITIAL_FOLDERS = {"teacher": "teacher-initial", **{name: name for name in SIZES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=128, help="Held-out captions to score.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies the steps of all students.")
    run_parts(parser, PARTS, Experiment)


if __name__ == "__main__":
    main()
