"""Every error a user can cause or see. Each message is one line: what happened, found and expected, why, the fix."""

from textwrap import shorten


class SecondcastError(Exception):
    """Base of all errors that the command line prints as one line instead of a traceback."""


class NotACacheError(SecondcastError):
    """The folder given as a cache holds something else, or nothing."""


class NewerCacheError(NotACacheError):
    """An intact file of a cache that a newer version wrote: it is neither damaged nor to be replaced."""


class SettingsMismatchError(SecondcastError):
    """A cache already exists and was built with settings other than the requested ones."""


class DamagedCacheError(SecondcastError):
    """A file recorded by the cache is missing or truncated, or its bytes differ from the committed ones."""


class UnreadableFileError(SecondcastError):
    """The user has no permission to read a file of a cache; its bytes are not checked."""


class MisplacedFileError(DamagedCacheError):
    """A record file at a path where the cache does not expect it; deleting it loses nothing."""


class ExtensionPendingError(SecondcastError):
    """An extension of the cache was started but not finished; the next builder completes it."""


class NotInCacheError(SecondcastError):
    """A requested trajectory, prompt or key is not in this cache (yet)."""


class NoTrajectoriesError(SecondcastError):
    """A text cache was given where trajectories are needed."""


class ShardLockedError(SecondcastError):
    """Another builder holds the lock on this shard, or committed it first; nothing is damaged."""


class DerivationMismatchError(SecondcastError):
    """The latent derived from the stored noise and velocities differs from the sampled one."""


class PromptsError(SecondcastError):
    """A prompt source is missing, empty, or cannot be read in the format of its file extension."""


class TeacherError(SecondcastError):
    """A teacher (or a component of one) cannot be found, read, or used for the requested task."""


class StudentError(SecondcastError):
    """A student cannot be found or read, or does not match the cache."""


class SettingsError(SecondcastError):
    """An option or config key is unknown, out of range, or incompatible with another."""


class RunError(SecondcastError):
    """A run folder has unrelated contents, other settings, or no readable checkpoint."""


class HubError(SecondcastError):
    """The hub has no token of the user, refuses a request, or cannot be reached."""


class OutOfMemoryError(SecondcastError):
    """The GPU has too little memory for the requested settings."""


class NonFiniteError(SecondcastError):
    """A prediction, a loss or a gradient is not finite; it was not stored."""


class StorageError(SecondcastError):
    """An object store is unreachable or refuses a request, or a file system lacks an operation that a cache needs."""


class MissingExtraError(SecondcastError):
    """The requested feature needs a package that is not installed."""


class MissingWeightsError(SecondcastError):
    """A metric's weights are missing, cannot be downloaded, or are not in the expected format."""


class ImagesError(SecondcastError):
    """An image folder is missing or empty, has a broken image, or lacks what a metric needs."""


class WorkerFailedError(SecondcastError):
    """A build worker or another process of a training run failed or died; committed data is kept."""


def reason(error: BaseException) -> str:
    """What an error reports in one line, a library's in at most 200 characters; its class if it has no text."""
    if isinstance(error, SecondcastError):
        return str(error)
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    return shorten(text.splitlines()[0], 200, placeholder=" ...") if text else type(error).__name__
