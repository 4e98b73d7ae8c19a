"""The Python code of a model card: complete programs, which need no more than a reader's own folder names."""

import json
from typing import Literal

from secondcast.models.teacher.pipeline_inputs import GUIDANCE, STEPS
from secondcast.trainer.settings import RecordedWith

Form = Literal["diffusers", "distillt5", "comfyui"]

POCKET = "pocket"
"""The name of the embedded teacher, which is a folder of the installed package."""
# The defaults of `secondcast build`, for students of which nothing was recorded.
_SIZE, _DTYPE = 512, "bfloat16"

_LOAD = """import torch
from diffusers import FluxPipeline
from transformers import {classes}
{pocket_import}
folder = "PATH_OF_THIS_FOLDER"
student = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype={dtype})
{tokenizer}pipeline = FluxPipeline.from_pretrained(
    {teacher}, text_encoder_2=student, {tokenizer_argument}torch_dtype={dtype}
)
"""
_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
_LOAD_WHOLE = """import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("my-pipeline", trust_remote_code=True, torch_dtype={dtype})
"""
_CALL = """if torch.cuda.is_available():
    pipeline.enable_model_cpu_offload()  # one network at a time; pipeline.to("cuda") where all of them fit
image = pipeline(
    "a red circle",
{arguments}
).images[0]
image.save("a-red-circle.png")
"""
_TEXT = """```python
{program}```
{remarks}
`trust_remote_code` runs `{file}` of this folder, which needs torch and transformers only. It was tried with
transformers 4.57 to 5.23 and diffusers 0.35 to 0.42; with diffusers 0.40 and newer `torch_dtype` may be called `dtype`.
diffusers reports that it expected a T5EncoderModel: the student takes its place.

A whole pipeline keeps the student (`pipeline.save_pretrained("my-pipeline")`), and another process loads it with:

```python
{whole}```
"""
_BOTH = """
Give both, `text_encoder_2` and `tokenizer_2`: with FLUX's own tokenizer the student reads nonsense.
"""
_POCKET_IMPORT = """
# The teacher comes with Secondcast, which has to be installed for this program.
from secondcast.pocket import TEACHER_FOLDER
"""
_UNRECORDED = """
Size and steps of its training were not recorded: these are the defaults of `secondcast build`.
"""


def diffusers_text(
    teacher: str,
    recorded: RecordedWith | None,
    *,
    guidance: tuple[float, ...] | None,
    text_length: int,
    own_tokenizer: bool,
) -> str:
    """How a folder of the form `diffusers` is used, as Markdown: alone, and in a saved pipeline.

    teacher: a hub name or a folder in the FluxPipeline layout. guidance: the values of its training, None where the
    teacher takes none.
    """
    dtype = f"torch.{recorded.dtype if recorded else _DTYPE}"
    call = _CALL.format(arguments=_arguments(recorded, guidance, text_length))
    program = _LOAD.format(
        classes="AutoModel, AutoTokenizer" if own_tokenizer else "AutoModel",
        pocket_import=_POCKET_IMPORT if teacher == POCKET else "",
        dtype=dtype,
        tokenizer="tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        if own_tokenizer
        else "",
        tokenizer_argument="tokenizer_2=tokenizer, " if own_tokenizer else "",
        teacher="TEACHER_FOLDER" if teacher == POCKET else json.dumps(teacher),
    )
    return _TEXT.format(
        program=program + call,
        whole=_LOAD_WHOLE.format(dtype=dtype) + call,
        remarks=(_BOTH if own_tokenizer else "") + ("" if recorded else _UNRECORDED),
        file="encoder_student_network.py" if own_tokenizer else "student_network.py",
    )


def _arguments(recorded: RecordedWith | None, guidance: tuple[float, ...] | None, text_length: int) -> str:
    steps = recorded.steps if recorded else STEPS
    values = {
        "height": recorded.height if recorded else _SIZE,
        "width": recorded.width if recorded else _SIZE,
        "num_inference_steps": steps,
        "guidance_scale": min(guidance, key=lambda value: abs(value - GUIDANCE)) if guidance else None,
        "max_sequence_length": text_length,
        # FluxPipeline's own end at 1 / steps.
        "sigmas": f"torch.linspace(1, 0.001, {steps}).tolist()"
        if recorded is not None and recorded.schedule == "distillt5"
        else None,
    }
    return "\n".join(f"    {name}={value}," for name, value in values.items() if value is not None)
