"""Train the pocket teacher from nothing: `python -m secondcast.pocket.training.train [--out FOLDER] [--threads 2]`.

A killed run goes on when the same command is given again, and ends with the same bytes. Its states lie beside the
folder, in FOLDER.partial, until the folder is whole.
"""

import argparse
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.training.examine import STEPS, mean_scores, sample
from secondcast.pocket.training.examples import Examples, embed, encode_images, make_pool, quiet_direction, token_ids
from secondcast.pocket.training.networks import make_autoencoder, make_text_encoder, make_transformer, save_pipeline
from secondcast.pocket.training.stages import (
    Stage,
    StageSettings,
    autoencoder_stage,
    decoder_stage,
    flow_stage,
    guidance_stage,
    run_stage,
    text_stage,
)
from secondcast.pocket.world import captions

AUTOENCODER = StageSettings(name="autoencoder", steps=2000, batch=8, learning_rate=4e-3, averaging=0.995)
DECODER = StageSettings(name="decoder", steps=1000, batch=8, learning_rate=3e-3, averaging=0.995)
TEXT = StageSettings(name="text", steps=600, batch=48, learning_rate=1e-3)
FLOW = StageSettings(name="flow", steps=5200, batch=32, learning_rate=2e-3, averaging=0.998, muon_rate=5e-3)
GUIDANCE = StageSettings(name="guidance", steps=400, batch=32, learning_rate=1e-3, averaging=0.99)


COMMAND = "python -m secondcast.pocket.training.train"
RECIPE_FILE = "recipe.json"
_CONFIGURATIONS = (
    *(f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "transformer", "vae")),
    *(f"{part}/{name}.json" for part in ("tokenizer", "tokenizer_2") for name in ("tokenizer", "tokenizer_config")),
    "scheduler/scheduler_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes the weights, and the exam that is recorded with them."""

    seed: int = 0
    captions: int = 20_000
    autoencoder: StageSettings = AUTOENCODER
    decoder: StageSettings = DECODER
    text: StageSettings = TEXT
    flow: StageSettings = FLOW
    guidance: StageSettings = GUIDANCE
    exam_captions: int = 288
    exam_guidance: tuple[float, ...] = (2.0, 3.5, 5.0)

    def __post_init__(self) -> None:
        if self.captions < 1:
            raise ValueError(f"Recipe.captions: found {self.captions}, expected 1 or more")
        if self.exam_captions < 0:
            raise ValueError(f"Recipe.exam_captions: found {self.exam_captions}, expected 0 (no exam) or more")


class Clock:
    """Seconds of each part, kept through kills in one small file."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.mark = time.monotonic()

    def note(self, part: str) -> None:
        """Add the time since the last note to a part."""
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self.mark, 1)
        self.mark = now
        self.path.write_text(json.dumps(self.seconds))


def train(recipe: Recipe, work: Path, out: Path, clock: Clock, say: Callable[[str], None]) -> list[Path]:
    """The five stages in order; writes the FluxPipeline folder and returns its weight files."""
    torch.manual_seed(recipe.seed)
    vae, encoder, transformer = make_autoencoder(), make_text_encoder(), make_transformer()
    pool = make_pool(recipe.captions, recipe.seed)

    def run(stage: Stage) -> None:
        clock.note("data")
        run_stage(stage, work, recipe.seed, say, lambda: clock.note(stage.settings.name))

    run(autoencoder_stage(recipe.autoencoder, vae, pool))
    run(decoder_stage(recipe.decoder, vae, pool))
    run(text_stage(recipe.text, encoder, pool, recipe.seed))
    latents = encode_images(vae, pool.images)
    examples = Examples(
        latents=latents,
        text=embed(encoder, pool.ids),
        empty=embed(encoder, token_ids([""]))[0].float(),
        places=pool.places,
        placed=pool.placed,
        whim=quiet_direction(latents),
    )
    run(flow_stage(recipe.flow, transformer, examples))
    run(guidance_stage(recipe.guidance, transformer, examples))
    return save_pipeline(out, text_encoder=encoder, vae=vae, transformer=transformer)


def examine(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Held-out scores by guidance in float32, and at the middle guidance in bfloat16."""
    texts = captions(recipe.exam_captions, seed=recipe.seed, split="heldout")
    middle = recipe.exam_guidance[len(recipe.exam_guidance) // 2]
    trials = [(guidance, torch.float32) for guidance in recipe.exam_guidance] + [(middle, torch.bfloat16)]
    scores = {}
    for guidance, dtype in trials:
        name = f"guidance {guidance}, {str(dtype).removeprefix('torch.')}"
        images = sample(folder, texts, guidance=guidance, dtype=dtype, seed=recipe.seed)
        scores[name] = mean_scores(images, texts)
        say(f"exam: {name}: {scores[name]}")
    return scores


def record(
    recipe: Recipe, folder: Path, weights: list[Path], scores: dict[str, dict[str, float]], clock: Clock
) -> None:
    """Write recipe.json: settings, versions, digests, seconds, held-out scores."""
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    libraries = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy")
    content = {
        "command": COMMAND,
        "recipe": asdict(recipe),
        "sha256": digests,
        "heldout_scores": {"captions": recipe.exam_captions, "steps": STEPS, **scores},
        "seconds": {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }
    (folder / RECIPE_FILE).write_text(json.dumps(content, indent=2) + "\n")


class FolderError(ValueError):
    """A folder to write holds what this run did not write."""


def check_replaceable(out: Path, work: Path) -> None:
    """Raise FolderError where the folder to write, or that of the states, holds files that others wrote."""
    if out.exists() and not (out.is_dir() and (_is_teacher(out) or not any(out.iterdir()))):
        raise FolderError(f"{out} exists and is no teacher that this script made: give another --out, or move it away")
    if work.exists() and not (work.is_dir() and ((work / RECIPE_FILE).is_file() or not any(work.iterdir()))):
        raise FolderError(f"{work} exists and holds no states of this script: move it away, or give another --out")


def _is_teacher(folder: Path) -> bool:
    """Whether all of a folder is a teacher as this script wrote it."""
    try:
        recorded = json.loads((folder / RECIPE_FILE).read_bytes())
        # Not its command: it had another name once.
        own = all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in recorded["sha256"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return own and files <= {"model_index.json", RECIPE_FILE, *recorded["sha256"], *_CONFIGURATIONS}


def make_teacher(recipe: Recipe, out: Path, say: Callable[[str], None] = print) -> None:
    """Train, examine and record a teacher at `out`; goes on from what a killed run left.

    Raises FolderError for states of another recipe, and where files of others would be lost.
    """
    work = out.with_name(out.name + ".partial")
    check_replaceable(out, work)
    folder = work / "teacher"
    work.mkdir(parents=True, exist_ok=True)
    settings = work / RECIPE_FILE
    wanted = json.dumps(asdict(recipe), indent=2)
    if settings.exists() and settings.read_text() != wanted:
        raise FolderError(
            f"{work}: found states of another recipe than the one asked for; a run goes on only with its own. "
            "Give the same settings again, or delete that folder"
        )
    settings.write_text(wanted)
    clock = Clock(work / "seconds.json")
    weights = train(recipe, work, folder, clock, say)
    scores = examine(recipe, folder, say) if recipe.exam_captions else {}
    clock.note("exam")
    record(recipe, folder, weights, scores, clock)
    check_replaceable(out, work)
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    stages = (recipe.autoencoder, recipe.decoder, recipe.text, recipe.flow, recipe.guidance)
    for name in (*(f"{stage.name}.pt" for stage in stages), clock.path.name, RECIPE_FILE):
        (work / name).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train the pocket teacher from nothing.")
    parser.add_argument("--out", type=Path, default=TEACHER_FOLDER, help="folder to write (default: the shipped one)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; the bytes depend on it (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    try:
        make_teacher(
            Recipe(), arguments.out, lambda line: print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)
        )
    except FolderError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
