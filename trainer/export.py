"""Export: the best student of a run as a folder that FluxPipeline takes as text_encoder_2."""

import os
import shutil
from pathlib import Path

from models.student import load_student, save_student, student_folder
from storage_schemas.errors import BadSettings, BadStudent
from trainer.run_folder import CONFIG_FILE
from trainer.settings import RunConfig

_CARD = """# A student of {backbone}

A T5 encoder with projection, {parameters:,} parameters, distilled from the T5 of `{backbone}` by Understudy.
It takes the place of `text_encoder_2` and was trained at **{text_length} text tokens**: always pass
`max_sequence_length={text_length}`, or it sees hundreds of padding tokens it never saw in training.

```python
import torch
from diffusers import FluxPipeline
from transformers import AutoModel

student = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True, torch_dtype=torch.bfloat16)
pipeline = FluxPipeline.from_pretrained("{backbone}", text_encoder_2=student, torch_dtype=torch.bfloat16)
image = pipeline("a red circle", max_sequence_length={text_length}).images[0]
```

`trust_remote_code` runs `student_network.py` of this folder, which needs torch and transformers only.

| | |
|---|---|
| steps | {warmup_steps} with the embedding loss, {steps} with the vision loss |
| batch, learning rate | {batch_size}, {learning_rate:g} |
| teacher digest | `{teacher_digest}` |
| sampling digest | `{sampling_digest}` |

The student is derived from the teacher's outputs: the teacher's licence applies to it.
"""


def export(run: Path, folder: Path) -> None:
    """Write config, safetensors, modelling file, tokenizer and a card into a new folder, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadSettings(f"{folder} exists and is not empty: give a new folder for the export")
    source = student_folder(run)
    if not (run / CONFIG_FILE).is_file() or source == run:
        raise BadStudent(f"{run} is not a run folder: give the folder that `understudy train` made")
    config = RunConfig.model_validate_json((run / CONFIG_FILE).read_bytes())
    student = load_student(source)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        save_student(student, temporary, tokenizer=None)
        for file in source.iterdir():
            # The checkpoint carries the tokenizer's files beside the student's.
            if not (temporary / file.name).exists():
                shutil.copyfile(file, temporary / file.name)
        settings = config.settings
        card = _CARD.format(
            backbone=config.backbone,
            parameters=student.num_parameters(),
            text_length=config.text_length,
            teacher_digest=config.teacher_digest,
            sampling_digest=config.sampling_digest,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
        )
        (temporary / "README.md").write_text(card)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise BadSettings(f"{folder} cannot be written ({error}): give another OUT") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
