"""Does text rendering gain from a weight on tokens inside quotation marks, or from more signs late: exact scores.

python -m experiments.pocket_text_rendering DIR [--jobs 1] [--captions 192] [--seeds 3] [--scale 1]

Students cut out of the teacher, one cache of each kind of caption, equal steps, two stages of the context loss: three
quarters of the steps at a constant learning rate, the last quarter with a decaying one. Of the smallest student some
arms end with a vision stage. A job has one core and one torch thread. The same command resumes.
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.pocket_harness import (
    Job,
    as_flags,
    command,
    judge,
    keep_asked,
    make_cache,
    results_below,
    train,
    work_off,
)
from experiments.training.arms import BATCH_SIZE
from secondcast.pocket.scorer import DIMENSIONS
from secondcast.pocket.world import KINDS

ALL = "all"
CAPTIONS_OF_A_KIND = 342
# Half of the sampler's usual steps: twice as many captions are scored in the same time.
SAMPLER_STEPS = 10
TEXT = ("characters", "words")
# Shares of a batch.
EVEN = dict.fromkeys(KINDS, 1)
SIGNS = {"scene": 1, "composition": 1, "sign": 6}
# After these the letters are what students of both sizes lack most.
CONTEXT_STEPS = {"tiny": 400, "small": 200}
VISION_SIZE, VISION_STEPS = "tiny", 40
RATES = {"context": 3e-3, "vision": 3e-4}


@dataclass(frozen=True, kw_only=True)
class StageOfArm:
    """Optimizer steps with a loss, a learning-rate schedule and shares of the kinds of captions."""

    loss: str
    steps: int
    schedule: str
    shares: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a student of a size."""

    size: str
    name: str
    stages: tuple[StageOfArm, ...]
    quoted_token_weight: float = 1.0

    def recipe(self, student: Path) -> str:
        """The TOML of its run."""
        lines = [
            f'student = "{student}"',
            "dropout = 0.0",
            "position-bias-lr-scale = 20.0",
            "checkpoint-every = 1000000",
        ]
        for number, stage in enumerate(self.stages):
            shares = ", ".join(f"{kind} = {share}" for kind, share in stage.shares.items())
            lines += ["", "[[stage]]", f'name = "{number}-{stage.loss}"', f'loss = "{stage.loss}"']
            lines += [f"steps = {stage.steps}", f"caches = {{{shares}}}", 'weight = "rows"']
            lines += [f"batch-size = {BATCH_SIZE}", f"learning-rate = {RATES[stage.loss]}"]
            lines += [f'lr-schedule = "{stage.schedule}"']
        return "\n".join(lines) + "\n"


def arms(scale: float) -> list[Arm]:
    """The arms of each size, without a vision stage and with one."""
    made = []
    for size, steps in CONTEXT_STEPS.items():
        late = max(1, round(scale * steps / 4))
        early = StageOfArm(loss="context", steps=3 * late, schedule="constant", shares=EVEN)
        even, signs = (StageOfArm(loss="context", steps=late, schedule="cosine", shares=s) for s in (EVEN, SIGNS))
        plain = Arm(size=size, name="plain", stages=(early, even))
        weighted = replace(plain, name="quoted tokens x 3", quoted_token_weight=3.0)
        made += [
            plain,
            weighted,
            replace(plain, name="quoted tokens x 10", quoted_token_weight=10.0),
            replace(plain, name="signs late", stages=(early, signs)),
        ]
        if size == VISION_SIZE:
            steps = max(1, round(scale * VISION_STEPS))
            vision = StageOfArm(loss="vision", steps=steps, schedule="cosine", shares=EVEN)
            made += [
                replace(arm, name=f"{arm.name}, vision", stages=(*arm.stages, vision)) for arm in (plain, weighted)
            ]
    return made


@contextlib.contextmanager
def quoted_tokens_weighted(weight: float) -> Iterator[None]:
    """In training on embeddings, multiply the squared errors of tokens between two quotation marks by a weight."""
    from secondcast.pocket.training.examples import token_ids
    from secondcast.trainer.data.replay_dataset import EmbeddingBatch
    from secondcast.trainer.losses.objective import Objective

    # After the piece of a word's first space.
    mark, plain = int(token_ids(['"'])[0, 1]), Objective.training_loss

    def weighted(self: Any, stage: Any, student_BTD: Any, batch: Any) -> Any:
        if isinstance(batch, EmbeddingBatch):
            marks_BT = batch.token_ids_BT == mark
            inside_BT = (marks_BT.cumsum(1) % 2 == 1) & ~marks_BT
            root_BT1 = (1 + (weight - 1) * inside_BT).sqrt()[..., None]
            student_BTD = student_BTD * root_BT1
            batch = replace(batch, encoder_hidden_states_BTD=batch.encoder_hidden_states_BTD * root_BT1)
        return plain(self, stage, student_BTD, batch)

    with mock.patch.object(Objective, "training_loss", weighted) if weight != 1 else contextlib.nullcontext():
        yield


def record(place: Path, kind: str, count: int) -> dict[str, Any]:
    make_cache(place / "cache", count, kind)
    return {"kind": kind, "count": count}


def merge(place: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """The cache of all kinds, whose held-out trajectories give the vision loss."""
    command("merge", *sources, place / "cache", "--quiet")
    return {}


def cut(place: Path, prompts: Sequence[Path], size: str) -> dict[str, Any]:
    given = [word for file in prompts for word in ("--prompts", file)]
    made = {"teacher": "pocket", "size": f"pocket-{size}", "kind": "cut", "dtype": "float32", "device": "cpu"}
    command("init-student", place / "student", *given, "--quiet", *as_flags(made))
    return {"size": size}


def run_arm(place: Path, folder: Path, arm: Arm, seed: int, captions: int) -> dict[str, Any]:
    """Train and score."""
    (place / "recipe.toml").write_text(arm.recipe(folder / "students" / arm.size / "student"))
    caches = [f"{kind}={cache_of(folder, kind)}" for kind in KINDS]
    with quoted_tokens_weighted(arm.quoted_token_weight):
        trained = train(place / "run", caches, {"config": place / "recipe.toml", "seed": seed})
    found = judge(cache_of(folder, ALL), captions, SAMPLER_STEPS).student(place / "run")
    return {**asdict(arm), "seed": seed, "training_seconds": trained, **found}


def cache_of(folder: Path, name: str) -> Path:
    return folder / "caches" / name / "cache"


def jobs_of(folder: Path, asked: Mapping[str, Any]) -> list[Job]:
    """Every arm with every seed."""
    return [
        Job(
            place=folder / "runs" / f"{arm.size}-{arm.name.replace(' ', '-')}-seed{seed}",
            work=run_arm,
            arguments=(folder, arm, seed, asked["captions"]),
            seconds=60.0,
        )
        for seed in range(asked["seeds"])
        for arm in arms(asked["scale"])
    ]


def print_table(folder: Path) -> None:
    """Print Markdown: means over seeds, the range in brackets."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results_below(folder / "runs"):
        found.setdefault((result["size"], result["name"]), []).append(result)
    print("| student | arm | seeds | text | others | " + " | ".join(DIMENSIONS) + " | vision loss |")
    print("|---" * (6 + len(DIMENSIONS)) + "|")
    for (size, name), results in found.items():
        scores = [{key: score["mean"] for key, score in result["scores"].items()} for result in results]
        text = [statistics.mean(one[key] for key in TEXT) for one in scores]
        others = [statistics.mean(value for key, value in one.items() if key not in TEXT) for one in scores]
        each = [f"{statistics.mean(one[key] for one in scores):.2f}" for key in DIMENSIONS]
        cells = [size, name, str(len(results)), ranged(text), ranged(others), *each]
        print(f"| {' | '.join(cells)} | {ranged([result['vision_loss'] for result in results])} |")


def ranged(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--captions", type=int, default=192, help="Held-out captions to score.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies all steps and recorded captions.")
    asked = vars(parser.parse_args())
    folder, jobs = asked.pop("folder").absolute(), asked.pop("jobs")
    keep_asked(folder, asked)
    count = round(CAPTIONS_OF_A_KIND * asked["scale"])
    caches = [cache_of(folder, kind) for kind in KINDS]
    prompts = [cache.with_suffix(".txt") for cache in caches]
    work_off([Job(place=folder / "caches" / kind, work=record, arguments=(kind, count)) for kind in KINDS], jobs)
    work_off([Job(place=folder / "caches" / ALL, work=merge, arguments=(caches,))], jobs)
    work_off(
        [Job(place=folder / "students" / size, work=cut, arguments=(prompts, size)) for size in CONTEXT_STEPS], jobs
    )
    work_off(jobs_of(folder, asked), jobs)
    print_table(folder)


if __name__ == "__main__":
    main()
