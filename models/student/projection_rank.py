"""The low-rank output projection of a student: its last matrix is a product of two."""

from collections.abc import Mapping
from typing import Any

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Teacher


def layer_width(teacher: Teacher) -> int:
    """Width of a projection's last matrix: the text width, or that of one of several layers."""
    return teacher.text_width // len(teacher.text_layers or (None,))


def check_rank(rank: int | None, text_width: int) -> None:
    """Raise SettingsError for a rank at which two factors are not smaller than one matrix; None: a full matrix."""
    if rank is not None and not 1 <= rank < text_width / 2:
        raise SettingsError(
            f"--projection-rank is {rank}, expected 1 to {(text_width - 1) // 2}: the text width is {text_width}, and "
            f"from half of it on two factors are not smaller than one matrix; give a smaller rank, or none"
        )


def check_fitted_rank(rank: int | None, inner_width: int) -> None:
    """Raise SettingsError for a rank that a fit cannot have: the transformer reads fewer directions."""
    if rank is not None and rank > inner_width:
        raise SettingsError(
            f"--projection-rank is {rank}, expected at most {inner_width}: the transformer reads no more directions of "
            f"the embedding; give a smaller rank, or none"
        )


def check_kept_rank(rank: int | None, source: str, config: Mapping[str, Any]) -> None:
    """Raise SettingsError for another rank than that of an earlier student, by its config.json."""
    own = config.get("projection_rank")
    if rank is not None and "project_out_dim" in config and own != rank:
        raise SettingsError(
            f"--projection-rank is {rank}, but {source} is a student with "
            f"{'a full projection' if own is None else f'a projection of rank {own}'}, which it keeps: omit the option"
        )
