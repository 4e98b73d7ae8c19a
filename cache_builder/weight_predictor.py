"""Token weights of prompts that were not sampled: a ridge regression from embeddings, fitted on those that were."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from storage_schemas.fields import Array
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import predicted_weights, scaled_embedding

# What is added to the mean square of each column, which is about 1.
RIDGE = 0.03
# With fewer prompts a fifth of them says nothing.
FEWEST_PROMPTS = 20
# Its logarithm is taken; no token that matters is so small.
_SMALLEST_WEIGHT = 1e-6


def fit_predictor(cache: Cache, prompt_ids: Sequence[str], weights_NT: Array) -> tuple[Array | None, float | None]:
    """predictor_D1 (see storage_schemas.sensitivity), and how well the same without a fifth of the prompts tells them.

    The second is the correlation of logarithms. None and None for fewer than 20 prompts. Predicted weights of the
    sampled prompts have the mean 1, as the measured ones have.
    """
    if len(prompt_ids) < FEWEST_PROMPTS:
        return None, None
    numbers = {prompt.id: number for number, prompt in enumerate(cache.prompts)}
    embeddings = [numbers[identity] for identity in prompt_ids]
    logs_NT = np.log(weights_NT.clip(min=_SMALLEST_WEIGHT))
    fitted, judged = (_Sums.of(cache.manifest.teacher.text_width) for _ in range(2))
    for at, prompt in enumerate(embeddings):
        (fitted if at % 5 else judged).add(cache.embedding(prompt), logs_NT[at])
    judge_D1 = fitted.solved()
    told = [np.log(predicted_weights(judge_D1, cache.embedding(prompt))) for prompt in embeddings[::5]]
    correlation = float(np.corrcoef(np.concatenate(told), logs_NT[::5].ravel())[0, 1])
    predictor_D1 = (fitted + judged).solved()
    mean = np.mean([predicted_weights(predictor_D1, cache.embedding(prompt)).mean() for prompt in embeddings])
    predictor_D1[-1] -= np.log(mean)
    return predictor_D1, correlation


@dataclass
class _Sums:
    """What least squares need of the rows: x x^T and x y, a constant behind x."""

    squares: Array
    products: Array
    rows: int = field(default=0)

    @classmethod
    def of(cls, width: int) -> Self:
        return cls(squares=np.zeros((width + 1, width + 1)), products=np.zeros(width + 1))

    def add(self, embedding_TD: Array, values_T: Array) -> None:
        scaled_TD = scaled_embedding(embedding_TD).astype(np.float64)
        features = np.concatenate([scaled_TD, np.ones((len(scaled_TD), 1))], axis=1)
        self.squares += features.T @ features
        self.products += features.T @ values_T
        self.rows += len(features)

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.squares + other.squares, self.products + other.products, self.rows + other.rows)

    def solved(self) -> Array:
        ridge = np.full(len(self.products), RIDGE * self.rows)
        # The constant is free.
        ridge[-1] = 0
        found: Array = np.linalg.solve(self.squares + np.diag(ridge), self.products).astype(np.float32)
        return found
