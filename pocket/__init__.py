"""The embedded miniature: a procedural world, its exact scorer, a trained FLUX-architecture teacher over it.

Importing this package, its `world` or its `scorer` does not import torch; `training` does.
"""

from pathlib import Path

TEACHER_FOLDER: Path = Path(__file__).resolve().parent / "teacher"
"""The shipped teacher: a folder that the unmodified `diffusers.FluxPipeline` loads."""
STUDENTS_FOLDER: Path = Path(__file__).resolve().parent / "students"
"""Configurations of small T5 encoders with the teacher's vocabulary: `pocket-tiny`, `pocket-small`, `pocket-base`."""
PROMPTS_FOLDER: Path = Path(__file__).resolve().parent / "prompts"
"""Captions that differ in the picture (`visual.txt`), and captions of one picture (`non_visual.txt`)."""
