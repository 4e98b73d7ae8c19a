"""The Python code of a model card: complete programs, in which a reader only changes folder names."""

import json
from typing import Literal

from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import family_named
from secondcast.models.teacher.pipeline_inputs import GUIDANCE, STEPS
from secondcast.trainer.run.config import RecordedWith

Form = Literal["diffusers", "distillt5", "comfyui"]

POCKET = "pocket"
"""The name of the embedded teacher, a folder of the installed package."""
# The defaults of `secondcast build`, for students without recorded settings.
_SIZE, _DTYPE = 512, "bfloat16"

_LOAD = """import torch
from diffusers import {pipeline}
from transformers import {classes}
{pocket_import}
folder = "PATH_OF_THIS_FOLDER"
student = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype={dtype})
{tokenizer}pipeline = {pipeline}.from_pretrained(
    {teacher}, {slot}=student, {tokenizer_argument}torch_dtype={dtype}
)
"""
_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
_LOAD_WHOLE = """import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("my-pipeline", trust_remote_code=True, torch_dtype={dtype})
"""
_CALL = """if torch.cuda.is_available():
    pipeline.enable_model_cpu_offload()  # one network at a time; use pipeline.to("cuda") if all of them fit
image = pipeline(
    prompt="a red circle",
{arguments}
).images[0]
image.save("a-red-circle.png")
"""
_TEXT = """```python
{program}```
{remarks}
`trust_remote_code` runs `{file}` of this folder, which only needs torch and transformers. It was tested with
transformers 4.57 to 5.23, and in {tested}; with diffusers 0.40 and newer `torch_dtype`
may be called `dtype`. diffusers reports that it expected a {expected}, which is harmless: the student replaces it.

A saved pipeline (`pipeline.save_pretrained("my-pipeline")`) includes the student; another process loads it with:

```python
{whole}```
"""
_BOTH = """
Pass both `{slot}` and `{tokenizer_slot}`: the teacher's own tokenizer produces wrong token ids for the student.
"""
_POCKET_IMPORT = """
# The teacher is part of Secondcast, which must be installed for this program.
from secondcast.pocket import TEACHER_FOLDER
"""
_TESTED = "FluxPipeline with diffusers 0.35 to 0.42"
_UNRECORDED = """
The image size and steps of its training were not recorded: these are the defaults of `secondcast build`.
"""


def diffusers_text(
    teacher: str,
    recorded: RecordedWith | None,
    family: Family | None = None,
    *,
    guidance: tuple[float, ...] | None,
    text_length: int,
    own_tokenizer: bool,
    is_t5: bool,
) -> str:
    """Markdown on the use of an export for diffusers: alone, and in a saved pipeline.

    teacher: hub name or folder.
    family: of the teacher; None for that of the recording.
    guidance: guidance values of the training; None if the teacher takes none.
    """
    dtype = f"torch.{recorded.dtype if recorded else _DTYPE}"
    family = family or (FLUX if recorded is None else family_named(recorded.family))
    call = _CALL.format(arguments=_arguments(family, recorded, guidance, text_length))
    program = _LOAD.format(
        pipeline=family.pipeline,
        slot=family.slot,
        classes="AutoModel, AutoTokenizer" if own_tokenizer else "AutoModel",
        pocket_import=_POCKET_IMPORT if teacher == POCKET else "",
        dtype=dtype,
        tokenizer="tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        if own_tokenizer
        else "",
        tokenizer_argument=f"{family.tokenizer_slot}=tokenizer, " if own_tokenizer else "",
        teacher="TEACHER_FOLDER" if teacher == POCKET else json.dumps(teacher),
    )
    return _TEXT.format(
        program=program + call,
        whole=_LOAD_WHOLE.format(pipeline=family.pipeline, dtype=dtype) + call,
        remarks=(_BOTH.format(slot=family.slot, tokenizer_slot=family.tokenizer_slot) if own_tokenizer else "")
        + ("" if recorded else _UNRECORDED),
        file="student_network.py" if is_t5 else "encoder_student_network.py",
        tested=_TESTED if family.slot == FLUX.slot else f"{family.pipeline} with diffusers 0.42",
        expected=family.parts["large_text_encoder"].loaded_as,
    )


def _arguments(
    family: Family, recorded: RecordedWith | None, guidance: tuple[float, ...] | None, text_length: int
) -> str:
    steps = recorded.steps if recorded else STEPS
    values = {
        **family.image_size(height=recorded.height if recorded else _SIZE, width=recorded.width if recorded else _SIZE),
        "num_inference_steps": steps,
        "guidance_scale": min(guidance, key=lambda value: abs(value - GUIDANCE)) if guidance else None,
        "max_sequence_length": text_length,
        # FluxPipeline's own sigmas end at 1 / steps.
        "sigmas": f"torch.linspace(1, 0.001, {steps}).tolist()"
        if recorded is not None and recorded.schedule == "distillt5"
        else None,
    }
    return "\n".join(f"    {name}={value}," for name, value in values.items() if value is not None)
