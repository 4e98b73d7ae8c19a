"""The low-rank output projection of a student: its last matrix is a product of two."""

from secondcast.storage_schemas.errors import SettingsError


def check_rank(rank: int | None, text_width: int) -> None:
    """Raise SettingsError for a rank at which two factors are not smaller than one matrix; None: a full matrix."""
    if rank is not None and not 1 <= rank < text_width / 2:
        raise SettingsError(
            f"--projection-rank is {rank}, expected 1 to {(text_width - 1) // 2}: the text width is {text_width}, and "
            f"from half of it on two factors are not smaller than one matrix; give a smaller rank, or none"
        )
