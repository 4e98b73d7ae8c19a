"""The teacher's embedding of the negative prompt, which a student for classifier-free guidance gives unchanged.

Guidance moves away from the prediction with the negative prompt, so that an error of its embedding is in every guided
prediction. docs/experiments.md has what was measured.
"""

from collections.abc import Iterable

import torch

from secondcast.models.families.registry import family_named
from secondcast.models.student.student import Student
from secondcast.models.student.tokens import StudentTokens
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import NEGATIVE_TEXT
from secondcast.storage_schemas.tensors import to_torch


def keep_negative(student: Student, caches: Iterable[Cache], tokens: StudentTokens | None) -> None:
    """Put the negative prompt's embedding of the first cache that has one into a student.

    Text caches have none: a student on those alone keeps its own. A family without classifier-free guidance has none:
    a student's own is taken out.

    tokens: of a student with its own tokenizer.
    """
    caches = list(caches)
    cache = next((cache for cache in caches if cache.negative is not None), None)
    if cache is None:
        if family_named(caches[0].manifest.teacher.family).guidance_rule != "cfg":
            student.put_negative(None)
        return
    assert cache.negative is not None
    ids_T = (
        torch.from_numpy(cache.padded_token_ids(cache.negative)) if tokens is None else tokens.batch([NEGATIVE_TEXT])[0]
    )
    # A student may have positions for fewer tokens than the cache.
    embedding_TD = to_torch(cache.embedding(cache.negative))[: len(ids_T)]
    student.put_negative(ids_T.tolist(), embedding_TD.float())
