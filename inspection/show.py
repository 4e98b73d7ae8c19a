"""`inspect show`: one trajectory in numbers. No torch."""

from typing import Any

import numpy as np

from storage_schemas.derivation import predicted_clean_latent
from storage_schemas.reader import Cache


def describe(cache: Cache, index: int) -> dict[str, Any]:
    """The facts of one trajectory, as plain JSON types."""
    trajectory = cache.trajectory(index)
    prompt = cache.prompts[trajectory.prompt]
    sampling = cache.manifest.sampling
    hidden_states = trajectory.hidden_states_KSC
    steps = []
    before = None
    for k, (sigma, timestep) in enumerate(zip(sampling.sigmas[:-1], sampling.timesteps, strict=True)):
        velocity = trajectory.velocity_KSC[k].astype(np.float32)
        clean = predicted_clean_latent(hidden_states[k], trajectory.velocity_KSC[k], sigma)
        steps.append(
            {
                "step": k,
                "sigma": sigma,
                "timestep": timestep,
                "latent_rms": _rms(hidden_states[k].astype(np.float32)),
                "velocity_rms": _rms(velocity),
                "clean_latent_moved": None if before is None else _rms(clean - before),
                "non_finite": int((~np.isfinite(velocity)).sum()),
            }
        )
        before = clean
    return {
        "index": index,
        "key": trajectory.key,
        "prompt": prompt.text,
        "prompt_index": trajectory.prompt,
        "sources": list(prompt.sources),
        "held_out": prompt.held_out,
        "replica": trajectory.replica,
        "seed": sampling.seed,
        "guidance": trajectory.guidance,
        "tokens": _pieces(cache, prompt.token_ids),
        "final_latent_rms": _rms(trajectory.final_latent_SC.astype(np.float32)),
        "steps": steps,
    }


def find_prompts(cache: Cache, word: str, *, limit: int) -> list[tuple[int, str, str]]:
    """(index of the first trajectory, id, text) of prompts that contain a word, in prompt order.

    One more than `limit` if there are more.
    """
    wanted = word.casefold()
    found = []
    for index, prompt in enumerate(cache.prompts):
        if wanted in prompt.text.casefold():
            found.append((index, prompt.id, prompt.text))
            if len(found) > limit:
                break
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _pieces(cache: Cache, token_ids: tuple[int, ...]) -> list[str]:
    from tokenizers import Tokenizer

    file = cache.tokenizer_files.get("tokenizer.json")
    if file is None:
        return [str(token) for token in token_ids]
    tokenizer = Tokenizer.from_buffer(file)
    return [tokenizer.id_to_token(token) or str(token) for token in token_ids]
