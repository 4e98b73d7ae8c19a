"""What the replay floor of a run means: a wrong backbone, or the bias of quantized weights."""

from storage_schemas.errors import BadTeacher
from storage_schemas.manifest import Quantization
from trainer.validation import Floor

# Law 3: above this part of the velocity's norm, the replay of the teacher's own embedding means a wrong backbone.
LARGEST_FLOOR = 0.03
# The embedded teacher, whose small matrices suffer most from rounding, is off by 14 % in NF4, the coarsest kind: twice
# that is no rounding any more. A backbone that has nothing to do with the recorded one is off by 100 % and more.
LARGEST_BIAS = 0.3


def floor_text(floor: Floor, recorded: Quantization, here: Quantization) -> str:
    """The line that tells the floor; recorded, here: the kinds of the cache's backbone and of this run's."""
    how = ""
    if here == recorded != "none":
        how = f", {here} weights as recorded"
    elif here != recorded:
        how = f", {_weights(here)}, recorded with {_weights(recorded)}"
    return (
        f"replay floor {floor.error:.3g} ({100 * floor.relative:.2f} % of the velocity's norm{how}): no student's loss "
        f"can be lower"
    )


def check_floor(floor: Floor, recorded: Quantization, here: Quantization) -> None:
    """Raise BadTeacher for a floor that the weights do not explain."""
    quantized = here not in ("none", recorded)
    limit = LARGEST_BIAS if quantized else LARGEST_FLOOR
    # Not a number is above it too.
    if floor.relative <= limit:
        return
    found = f"the cached embeddings replay with an error of {100 * floor.relative:.1f} % of the velocity's norm"
    if here == "none" != recorded:
        raise BadTeacher(
            f"{found}, expected at most {100 * limit:.0f} %: the cache was built with --quantize {recorded}, this run "
            f"has the exact weights; give --quantize {recorded}, or --accept-floor"
        )
    more = f" with {here} weights" if quantized else ""
    raise BadTeacher(
        f"{found}, expected at most {100 * limit:.0f} %{more}: other weights, another dtype or a faulty device; check "
        f"--backbone, or give --accept-floor"
    )


def bias_text(floor: Floor, recorded: Quantization, here: Quantization) -> str | None:
    """What a floor says that comes of quantized weights, where it is above what others may have; else None."""
    if here in ("none", recorded) or floor.relative <= LARGEST_FLOOR:
        return None
    off = f"{here} weights put the prediction off by {100 * floor.relative:.1f} % of the velocity's norm"
    exact = f", --quantize {recorded} trains without" if recorded != "none" else ""
    return (
        f"{off} from the {_weights(recorded)} of the cache: the student is trained against that bias; a cache built "
        f"with --quantize {here} has none{exact}"
    )


def _weights(kind: Quantization) -> str:
    return "exact weights" if kind == "none" else f"{kind} weights"
