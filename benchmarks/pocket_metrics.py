"""The measurements and their variations that `python -m benchmarks.pocket_sensitivity` trains with."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.pocket_harness import as_flags, command, make_cache
from cache_builder.sensitivity_plan import SensitivitySettings
from cache_builder.weight_predictor import fit_predictor
from storage_schemas import sensitivity
from storage_schemas.fields import Array
from storage_schemas.folders import LocalFolder
from storage_schemas.reader import Cache

# Prompts and products of each measurement; the first one is what the others are changes of.
MEASUREMENTS: Mapping[str, Mapping[str, int]] = {
    "full": {"prompts": 1024, "products": 4},
    "256 prompts x 4": {"prompts": 256, "products": 4},
    "64 prompts x 4": {"prompts": 64, "products": 4},
    "64 prompts x 1": {"prompts": 64, "products": 1},
    "16 prompts x 1": {"prompts": 16, "products": 1},
    "4 steps of 20": {"prompts": 256, "products": 4, "steps": 4},
    "1 step of 20": {"prompts": 256, "products": 4, "steps": 1},
}
# Each on five steps in a row, by the number of its first: from noise at the first to nearly the image at the last.
QUARTER = 5
QUARTERS: Mapping[str, int] = {f"steps {at + 1} to {at + QUARTER}": at for at in range(0, 20, QUARTER)}
FULL = "full"
# Other recordings of the same teacher, measured by themselves: how they are built, and of which captions.
OTHERS: Mapping[str, Mapping[str, object]] = {
    "scenes only": {"kind": "scene"},
    "signs only": {"kind": "sign"},
    "guidance 1": {"guidance": 1.0},
    "guidance 7": {"guidance": 7.0},
}
OTHERS_PROMPTS = 128
FEW = 51
CONTEXT_METRIC = "metric of the context loss"
RANK = 16

Arrays = dict[str, Array]
Change = Callable[[Cache, sensitivity.Sensitivity, Arrays], Arrays]


def _metric_only(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    return {"metric": arrays["metric"], "weights": np.ones_like(arrays["weights"])}


def _weights_only(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    width = len(arrays["metric"])
    return arrays | {"metric": np.eye(width) * np.trace(arrays["metric"]) / width}


def _few(predicted: bool) -> Change:
    def change(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
        weights_NT, rest = arrays["weights"][:FEW], {}
        if predicted:
            predictor_D1, _ = fit_predictor(cache, found.record.plan.prompt_ids[:FEW], weights_NT)
            assert predictor_D1 is not None
            rest = {"predictor": predictor_D1}
        return {"metric": arrays["metric"], "weights": weights_NT / weights_NT.mean(), **rest}

    return change


def _low_rank(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    """The largest eigenvalues as they are, the others by their mean."""
    values_D, vectors_DD = np.linalg.eigh(arrays["metric"].astype(np.float64))
    values_D[:-RANK] = values_D[:-RANK].mean()
    return arrays | {"metric": (vectors_DD * values_D) @ vectors_DD.T}


def _of_scenes(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    """Metric and predictor of another recording, no weights measured of these prompts."""
    scenes = sensitivity.read(LocalFolder(cache.folder.path.parent / "others" / _folder_of("scenes only")))
    assert scenes is not None and scenes.predictor_D1 is not None
    return {"metric": scenes.metric_DD, "weights": arrays["weights"][:1], "predictor": scenes.predictor_D1}


def _projected(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    """The metric of the context loss in place of the measured one, with its trace; the weights stay."""
    import torch

    from commands.resolve import POCKET, resolve_teacher
    from models.context_projection import load_context_projection
    from models.teacher_folder import REPLAY_PARTS

    teacher = resolve_teacher(POCKET, REPLAY_PARTS)
    weight_ID = load_context_projection(teacher, cache.manifest.teacher, torch.device("cpu")).numpy()
    metric_DD = weight_ID.T.astype(np.float64) @ weight_ID
    return arrays | {"metric": metric_DD * np.trace(arrays["metric"]) / np.trace(metric_DD)}


def _rooted_metric(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    """Half way to all directions alike: the metric's root, with its trace."""
    values_D, vectors_DD = np.linalg.eigh(arrays["metric"].astype(np.float64))
    root_DD = (vectors_DD * values_D.clip(min=0) ** 0.5) @ vectors_DD.T
    return arrays | {"metric": root_DD * np.trace(arrays["metric"]) / np.trace(root_DD)}


def _quarters_alike(cache: Cache, found: sensitivity.Sensitivity, arrays: Arrays) -> Arrays:
    """Each quarter of the steps counts the same, whatever its share of the vision loss is: metrics of equal trace."""
    places = Places(folder=cache.folder.path.parent)
    quarters = [sensitivity.read(LocalFolder(places.cache(name))) for name in QUARTERS]
    metrics = [one.metric_DD / np.trace(one.metric_DD) for one in quarters if one is not None]
    weights_QNT = np.stack([one.weights_NT for one in quarters if one is not None])
    assert len(metrics) == len(QUARTERS)
    sampled = quarters[0].record.plan.prompt_ids if quarters[0] is not None else ()
    assert sampled == found.record.plan.prompt_ids[: len(sampled)]
    predictor_D1, _ = fit_predictor(cache, sampled, weights_QNT.mean(0))
    assert predictor_D1 is not None
    metric_DD = np.mean(metrics, axis=0) * np.trace(arrays["metric"])
    return {"metric": metric_DD, "weights": weights_QNT.mean(0), "predictor": predictor_D1}


CHANGES: Mapping[str, Change] = {
    "metric only": _metric_only,
    "weights only": _weights_only,
    f"weights of {FEW} prompts, others predicted": _few(True),
    f"weights of {FEW} prompts, others 1": _few(False),
    f"rank {RANK} and a diagonal": _low_rank,
    "measured on scenes": _of_scenes,
    CONTEXT_METRIC: _projected,
    "root of the metric": _rooted_metric,
    "quarters of the steps alike": _quarters_alike,
}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where caches with each measurement lie: the same recording, linked."""

    folder: Path

    @property
    def recording(self) -> Path:
        """What all of them are measured on, but for OTHERS."""
        return self.folder / "cache"

    def cache(self, name: str) -> Path:
        """The recording with one of MEASUREMENTS or CHANGES."""
        return self.folder / "measured" / _folder_of(name)

    def other(self, name: str) -> Path:
        """One of OTHERS."""
        return self.folder / "others" / _folder_of(name)

    def link(self, name: str) -> Path:
        """Make `cache` of links to the recording."""
        place = self.cache(name)
        place.mkdir(parents=True, exist_ok=True)
        for entry in self.recording.iterdir():
            if entry.name != sensitivity.SENSITIVITY_FOLDER and not (place / entry.name).exists():
                (place / entry.name).symlink_to(entry)
        return place


def _folder_of(name: str) -> str:
    return name.replace(" ", "-")


class QuarterSettings(SensitivitySettings):
    """Of steps in a row, where the command spreads them evenly. first_step: from 0."""

    first_step: int

    def plan(self, cache: Cache) -> sensitivity.Plan:
        """As the command's, on QUARTER steps."""
        steps = tuple(range(self.first_step, self.first_step + QUARTER))
        return super().plan(cache).model_copy(update={"steps": steps})


def measure_quarter(cache: Path, first_step: int, *, products: int = 4) -> None:
    """By what the command calls."""
    import torch

    from cache_builder.sensitivity import measure as take
    from cache_builder.workers import Worker
    from commands.resolve import POCKET, resolve_teacher
    from models.teacher_folder import REPLAY_PARTS
    from storage_schemas.progress import Silent

    teacher = resolve_teacher(POCKET, REPLAY_PARTS)
    asked = QuarterSettings(prompts=256, products=products, batch_size=20, first_step=first_step)
    opened, cpu = Cache.open(str(cache)), torch.device("cpu")
    take(opened, teacher, asked, device=cpu, progress=Silent(), worker=Worker())


def measure(place: Path, folder: Path, name: str) -> dict[str, object]:
    """By the command, but for QUARTERS; done already it takes a second."""
    places = Places(folder=folder)
    cache = places.other(name) if name in OTHERS else places.link(name)
    asked = MEASUREMENTS.get(name, {"prompts": OTHERS_PROMPTS, "products": 4})
    if name in OTHERS:
        make_cache(cache, OTHERS_PROMPTS + 8, **OTHERS[name])
    if name in QUARTERS:
        measure_quarter(cache, QUARTERS[name])
    else:
        command("sensitivity", cache, "--device", "cpu", "--batch-size", 20, "--quiet", *as_flags(asked))
    found = sensitivity.read(LocalFolder(cache))
    assert found is not None
    return {"name": name, "effective_rank": found.record.effective_rank, "seconds": found.record.seconds} | {
        "correlation": found.record.predicted_correlation
    }


def change(folder: Path, name: str) -> None:
    """A variation of the full measurement beside a link to the recording."""
    places = Places(folder=folder)
    found = sensitivity.read(LocalFolder(places.cache(FULL)))
    assert found is not None
    arrays = {"metric": found.metric_DD, "weights": found.weights_NT}
    if found.predictor_D1 is not None:
        arrays["predictor"] = found.predictor_D1
    made = CHANGES[name](Cache.open(str(places.recording)), found, arrays)
    kept = found.record.plan.prompt_ids[: len(made["weights"])]
    record = found.record.model_copy(update={"plan": found.record.plan.model_copy(update={"prompt_ids": kept})})
    place = places.link(name)
    shutil.rmtree(place / sensitivity.SENSITIVITY_FOLDER, ignore_errors=True)
    sensitivity.write(LocalFolder(place), record, made)


def agreement(folder: Path, name: str) -> tuple[float, float | None]:
    """How near a measurement is to the full one: cosine of the metrics, correlation of the logarithms of weights.

    The second is None for measurements on other prompts.
    """
    places = Places(folder=folder)
    full = sensitivity.read(LocalFolder(places.cache(FULL)))
    other = sensitivity.read(LocalFolder(places.other(name) if name in OTHERS else places.cache(name)))
    assert full is not None and other is not None
    cosine = _cosine(full.metric_DD.astype(np.float64), other.metric_DD.astype(np.float64))
    rows = {one: row for row, one in enumerate(full.record.plan.prompt_ids)}
    both = [(rows[one], at) for at, one in enumerate(other.record.plan.prompt_ids) if one in rows]
    if len(both) < len(other.record.plan.prompt_ids):
        return cosine, None
    logs = [np.log(weights.clip(min=1e-6)).ravel() for weights in _matched(full, other, both)]
    return cosine, float(np.corrcoef(*logs)[0, 1])


def _matched(full: sensitivity.Sensitivity, other: sensitivity.Sensitivity, both: list[tuple[int, int]]) -> list[Array]:
    return [full.weights_NT[[a for a, _ in both]], other.weights_NT[[b for _, b in both]]]


def _cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
