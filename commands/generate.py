"""`secondcast generate`: sample images with a student in place of T5-XXL."""

from pathlib import Path
from typing import Annotated

import typer

from secondcast.cache_builder.settings import PromptLimit
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import check_folder_name
from secondcast.commands.shell.resolve import (
    Device,
    PromptSources,
    Quiet,
    Revision,
    TeacherName,
    quiet_device,
    resolve_teacher,
    terminal,
)
from secondcast.evaluation.settings.generating import GenerateOptions
from secondcast.models.memory.limit import free_bytes
from secondcast.models.memory.optional_packages import show_peft
from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.progress import counted

ImageBatch = Annotated[int, typer.Option(min=1, help="Number of images sampled at once.")]
IMAGES_AT_ONCE = 4


def generate(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Run folder, export, or `teacher`.")],
    teacher: TeacherName,
    prompts: PromptSources,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the images and index.jsonl.")],
    selection: PromptLimit = PromptLimit(),
    asked: GenerateOptions = GenerateOptions(),
    memory: SamplingMemory = SamplingMemory(),
    batch_size: ImageBatch = IMAGES_AT_ONCE,
    revision: Revision = None,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Generate images from prompts, and an index. Run the same command again to resume, or to add prompts or samples.

    For a student, the large text encoder is not loaded.

    Example: secondcast generate my-student --teacher pocket --prompts prompts.txt --out pictures
    """
    check_folder_name(out)
    from secondcast.cache_builder.prompts.files import read_prompts

    read = read_prompts(prompts, limit=selection.limit)
    texts = [text.text for text in read.texts]
    if asked.lora is not None:
        show_peft()
    torch_device = quiet_device(device)
    from secondcast.evaluation.generate import generate as run_generate
    from secondcast.evaluation.text_encoder import teacher_parts

    found = resolve_teacher(teacher, teacher_parts(student, asked.pooled), revision)
    memory_bytes = None if memory.max_gpu_memory is None else free_bytes(memory.max_gpu_memory, torch_device)
    made = run_generate(
        student, found, texts, out, asked, batch_size=batch_size, device=torch_device, progress=terminal(quiet),
        memory=memory, memory_bytes=memory_bytes, categories=read.categories,
    )  # fmt: skip
    there = len(texts) * asked.samples_per_prompt - made
    print_line(f"{out}: {counted(made, 'picture')}" + (f", {there} existed before" if there else ""))
