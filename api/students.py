"""`secondcast.load_student`."""

from pathlib import Path

from secondcast.models.device import quiet_libraries, usable_device
from secondcast.models.student.folder import student_folder
from secondcast.models.student.prompt_encoder import PromptEncoder


def load_student(location: str | Path, *, device: str = "auto") -> PromptEncoder:
    """Load the student of a run folder (its best checkpoint) or of an export, with its tokenizer.

    device: auto (a GPU if available), cpu, cuda, or for example cuda:1.

    Raises StudentError, and SettingsError for a device that is not available.
    """
    quiet_libraries()
    return PromptEncoder(student_folder(Path(location)), usable_device(device))
