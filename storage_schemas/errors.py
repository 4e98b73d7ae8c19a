"""Every error a user can cause or meet. Each message is one line: what, found and expected, why, the way out."""


class SecondcastError(Exception):
    """Base of all errors that the command line prints as one line instead of a traceback."""


class NotACacheError(SecondcastError):
    """The folder given as a cache holds something else, or nothing."""


class SettingsMismatchError(SecondcastError):
    """A cache exists already and was built with other settings than the ones asked for."""


class DamagedCacheError(SecondcastError):
    """A file that the cache vouches for is missing, short, or not the bytes that were committed."""


class UnreadableFileError(SecondcastError):
    """A file of a cache may not be read by this user; nothing is known of its bytes."""


class MisplacedFileError(DamagedCacheError):
    """A file that a cache does not have at this place: to be deleted, nothing is lost with it."""


class ExtensionPendingError(SecondcastError):
    """An extension of the cache has begun and is not through; whoever goes on with it finishes it."""


class NotInCacheError(SecondcastError):
    """A trajectory, prompt or key was asked for that this cache does not hold (yet)."""


class ShardLockedError(SecondcastError):
    """Another builder committed this shard first; nothing is damaged."""


class DerivationMismatchError(SecondcastError):
    """The stored noise and velocities do not lead to the latent that was sampled."""


class PromptsError(SecondcastError):
    """A source of prompts is missing, empty, or cannot be read as what its ending says."""


class TeacherError(SecondcastError):
    """A teacher (or a part of one) cannot be found, read, or used for what was asked."""


class StudentError(SecondcastError):
    """A student cannot be found, read, or does not fit the cache."""


class SettingsError(SecondcastError):
    """A flag or a key of a settings file is unknown, out of range, or does not go with another."""


class RunError(SecondcastError):
    """A run folder holds something else, other settings, or no readable checkpoint."""


class OutOfMemoryError(SecondcastError):
    """The GPU has too little memory for what was asked."""


class NonFiniteError(SecondcastError):
    """A prediction, a loss or a gradient is not finite; nothing of it was stored."""


class StorageError(SecondcastError):
    """An object store cannot be reached, refuses, or gives up; or a file system lacks what a cache needs."""


class MissingExtraError(SecondcastError):
    """What was asked for needs a package that is not installed."""


class MissingWeightsError(SecondcastError):
    """A metric's weights are not here, cannot be had, or are not what the metric reads."""


class ImagesError(SecondcastError):
    """A folder of pictures is missing or empty, holds a broken picture, or lacks what a metric needs of it."""


class WorkerFailedError(SecondcastError):
    """A worker of a build, or another process of a training run, failed or died; what was committed stays."""
