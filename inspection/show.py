"""`inspect show`: numbers of one trajectory. Does not import torch."""

from typing import Any

import numpy as np

from secondcast.inspection.text_layout import entry_lines, table_lines
from secondcast.inspection.token_pieces import token_pieces
from secondcast.models.families.registry import FAMILIES
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory, trajectory_key
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Sampling

# What a transformer predicts, by the prediction_type of a recorded scheduler; without one the velocity of a flow.
_PREDICTED = {"epsilon": "noise", "v_prediction": "velocity"}
# Samples shown on the line; the others are counted, and --json has all.
_SAMPLES_SHOWN = 8


def describe(cache: Cache, index: int) -> dict[str, Any]:
    """The facts of one trajectory, or of one prompt of a text cache, as plain JSON types.

    Norms are Euclidean over all S x C values, rms the root of their mean square. clean_latent_moved: rms of the
    change of the predicted clean latent since the previous step. Values that are not finite are counted for velocity
    and latent; their norm is None. prediction: what the array "velocity" has, such as noise for PixArt-Sigma.
    """
    if cache.manifest.is_text:
        return _describe_prompt(cache, index)
    trajectory = cache.trajectory(index)
    prompt = cache.prompts[trajectory.prompt]
    sampling = cache.manifest.sampling
    final = trajectory.final_latent_SC.astype(np.float32)
    return {
        "index": index,
        "key": trajectory.key,
        "prompt": prompt.text,
        "prompt_index": trajectory.prompt,
        "sources": list(prompt.sources),
        "held_out": prompt.held_out,
        "sample_index": trajectory.sample_index,
        "samples_per_prompt": samples_per_prompt_of(cache, trajectory.prompt),
        "seed": sampling.seed,
        "guidance": trajectory.guidance,
        "prediction": _predicted(sampling),
        "tokens": token_pieces(cache, prompt.token_ids),
        "final_latent_norm": _norm(final),
        "final_latent_rms": _rms(final),
        "final_latent_non_finite": _non_finite(final),
        "steps": _steps(trajectory, cache.manifest),
    }


def _describe_prompt(cache: Cache, number: int) -> dict[str, Any]:
    prompt, embedding_TD = cache.prompts[number], cache.embedding(number).astype(np.float32)
    return {
        "key": prompt.id,
        "prompt": prompt.text,
        "prompt_index": number,
        "sources": list(prompt.sources),
        "held_out": prompt.held_out,
        "tokens": token_pieces(cache, prompt.token_ids),
        "embedding_norm": _norm(embedding_TD),
        "embedding_rms": _rms(embedding_TD),
        "embedding_non_finite": _non_finite(embedding_TD),
    }


def prompt_lines(facts: dict[str, Any], *, width: int | None = None) -> list[str]:
    """The printed lines of the facts of a prompt of a text cache."""
    entries = [
        *_prompt_entries(facts),
        (
            "embedding",
            f"norm {_number(facts['embedding_norm'])}, rms {_number(facts['embedding_rms'])}, "
            f"{facts['embedding_non_finite']} not finite",
        ),
    ]
    return entry_lines(entries, width=width)


def _prompt_entries(facts: dict[str, Any]) -> list[tuple[str, str]]:
    pieces = facts["tokens"]
    return [
        ("prompt", f"{facts['prompt_index']}: {facts['prompt']}"),
        ("sources", ", ".join(facts["sources"]) + (" (held out)" if facts["held_out"] else "")),
        ("tokens", f"{len(pieces)}: {' '.join(pieces)}"),
    ]


def _predicted(sampling: Sampling) -> str:
    if sampling.scheduler is None:
        return "velocity"
    return _PREDICTED.get(sampling.scheduler.get("prediction_type", ""), "prediction")


def _steps(trajectory: Trajectory, manifest: Manifest) -> list[dict[str, Any]]:
    sampling = manifest.sampling
    # Of a family that this version does not know, everything else can be shown.
    family = next((known for known in FAMILIES if known.name == manifest.teacher.family), None)
    hidden_states, steps = trajectory.hidden_states_KSC, []
    before: Array | None = None
    for k, (sigma, timestep) in enumerate(zip(sampling.sigmas[:-1], sampling.timesteps, strict=True)):
        velocity, latent = (array[k].astype(np.float32) for array in (trajectory.velocity_KSC, hidden_states))
        with np.errstate(invalid="ignore", over="ignore"):
            clean: Array | None = None
            if family is not None:
                clean = family.predicted_clean_latent(hidden_states[k], trajectory.velocity_KSC[k], sigma)
            moved = None if before is None or clean is None else _rms(clean - before)
        steps.append(
            {
                "step": k,
                "sigma": sigma,
                "timestep": timestep,
                "latent_norm": _norm(latent),
                "latent_rms": _rms(latent),
                "velocity_norm": _norm(velocity),
                "velocity_rms": _rms(velocity),
                "clean_latent_moved": moved,
                "non_finite": _non_finite(velocity),
                "latent_non_finite": _non_finite(latent),
            }
        )
        before = clean
    return steps


def trajectory_lines(facts: dict[str, Any], cache: str, *, width: int | None = None) -> list[str]:
    """The printed lines of the facts; width: of the terminal, None for a file or a pipe."""
    *prompt, tokens = _prompt_entries(facts)
    entries = [
        ("trajectory", f"{facts['index']}, key {facts['key']}"),
        *prompt,
        ("sample", _sample_text(facts, cache)),
        ("seed", str(facts["seed"])),
        ("guidance", "none" if facts["guidance"] is None else f"{facts['guidance']:g}"),
        tokens,
    ]
    head = ["step", "sigma", "timestep", "latent norm", f"{facts['prediction']} norm", "clean moved", "not finite"]
    rows = [
        [
            str(step["step"]),
            f"{step['sigma']:.4f}",
            f"{step['timestep']:.4f}",
            _number(step["latent_norm"]),
            _number(step["velocity_norm"]),
            "" if step["clean_latent_moved"] is None else _number(step["clean_latent_moved"]),
            _counts(step["latent_non_finite"], step["non_finite"]),
        ]
        for step in facts["steps"]
    ]
    final = ["final", "0.0000", "", _number(facts["final_latent_norm"]), "", "", str(facts["final_latent_non_finite"])]
    return [
        *entry_lines(entries, width=width),
        "",
        *table_lines(head, [*rows, final], text_columns=()),
        f"clean moved: rms change of the predicted clean latent; not finite: latent + {facts['prediction']}",
    ]


def _sample_text(facts: dict[str, Any], cache: str) -> str:
    samples = facts["samples_per_prompt"]
    others = [sample for sample in samples if sample["index"] != facts["index"]]
    if not others:
        return f"{facts['sample_index']}, the only one of this prompt"
    shown = ", ".join(_other(sample) for sample in others[:_SAMPLES_SHOWN])
    more = f" and {len(others) - _SAMPLES_SHOWN} more" if len(others) > _SAMPLES_SHOWN else ""
    which = "the other is trajectory" if len(others) == 1 else "the others are trajectories"
    return (
        f"{facts['sample_index']}, one of {len(samples)} of this prompt; {which} {shown}{more}: "
        f"`secondcast inspect show {cache} {others[0]['index']}`"
    )


def _other(sample: dict[str, Any]) -> str:
    return f"{sample['index']}" + ("" if sample["committed"] else " (not built yet)")


def samples_per_prompt_of(cache: Cache, prompt: int) -> list[dict[str, Any]]:
    """All planned trajectories of a prompt, by sample, and whether each is committed."""
    numbers = {
        segment.first_sample + sample_index
        for segment in cache.manifest.prompts.segments
        if 0 <= prompt - segment.first_prompt < segment.prompts
        for sample_index in range(segment.samples_per_prompt)
    }
    identity = cache.prompts[prompt].id
    found = []
    for sample_index in sorted(numbers):
        index = cache.layout.find(prompt, sample_index)
        assert index is not None
        committed = ("trajectories", cache.layout.place(index).shard) in cache.records
        found.append(
            {
                "index": index,
                "key": trajectory_key(identity, sample_index),
                "sample_index": sample_index,
                "committed": committed,
            }
        )
    return found


def first_trajectory(cache: Cache, prompt: int) -> int:
    """Index of a prompt's first committed trajectory, or of its first planned one if none is committed.

    In a text cache the number of the prompt.
    """
    if cache.manifest.is_text:
        return prompt
    if prompt == cache.negative:
        raise NotInCacheError(f"the negative prompt of {cache.folder} has no trajectories: give another prompt")
    samples_per_prompt = samples_per_prompt_of(cache, prompt)
    found = next(
        (sample_index for sample_index in samples_per_prompt if sample_index["committed"]), samples_per_prompt[0]
    )
    return int(found["index"])


def find_prompts(cache: Cache, word: str, *, limit: int) -> list[tuple[int, str, str]]:
    """(index of the first trajectory, id, text) of prompts that contain a word, in prompt order.

    One more than `limit` if there are more.
    """
    wanted = word.casefold()
    found = []
    for number, prompt in enumerate(cache.prompts):
        if number != cache.negative and wanted in prompt.text.casefold():
            found.append((first_trajectory(cache, number), prompt.id, prompt.text))
            if len(found) > limit:
                break
    return found


def _norm(values: Array) -> float | None:
    """None for a value that is not finite, which JSON cannot represent."""
    norm = float(np.sqrt(np.sum(np.square(values, dtype=np.float64))))
    return norm if np.isfinite(norm) else None


def _rms(values: Array) -> float | None:
    norm = _norm(values)
    return None if norm is None else norm / float(np.sqrt(values.size))


def _non_finite(values: Array) -> int:
    return int((~np.isfinite(values)).sum())


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _counts(latent: int, velocity: int) -> str:
    return f"{latent} + {velocity}" if latent or velocity else "0"
