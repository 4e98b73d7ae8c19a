"""Generates images with a text encoder in place of the large one, from the same noise for every text encoder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secondcast.evaluation.pictures.control_images import ControlImages
from secondcast.evaluation.pictures.folder import PictureFolder, PictureSettings
from secondcast.evaluation.sampling import Generator
from secondcast.evaluation.settings.generating import TEACHER, GenerateOptions
from secondcast.evaluation.settings.memory import sampling_cost, sampling_options
from secondcast.evaluation.text_encoder import TextEncoder, open_text_encoder
from secondcast.models.cost.gpu_memory import CUDA_BYTES, with_margin
from secondcast.models.cost.placement import place
from secondcast.models.families.encoders.interface import Conditioning, ConditioningEncoder
from secondcast.models.families.family import Role
from secondcast.models.families.text import Text
from secondcast.models.memory.host_memory import free_host_bytes
from secondcast.models.memory.options import MemoryOptions, SamplingMemory
from secondcast.models.memory.peak import release_memory
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.memory.streaming import check_placement
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.controlnet import ControlNetFolder
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.lora import Lora
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.models.teacher.text_encoder import load_conditioning_encoder
from secondcast.storage_schemas.io.digests import digest, weight_sha256
from secondcast.storage_schemas.progress import Progress, counted, size_text
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import NEGATIVE_TEXT

# Of the free host memory, for embeddings that wait for the transformer.
_SHARE_OF_HOST = 0.5


def generate(
    student: str,
    teacher: TeacherFolder,
    prompts: Sequence[str],
    folder: Path,
    asked: GenerateOptions,
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
    memory: SamplingMemory = SamplingMemory(),
    memory_bytes: float | None = None,
    categories: Sequence[tuple[str, ...]] | None = None,
) -> int:
    """Write PNGs of each prompt and an index; return how many images were missing. Resumes when called again.

    student: a run folder, an export, or `teacher`, whose text encoder is freed before the transformer is loaded.
    memory: options for the transformer's weights; they keep the images, but for the last bit in a smaller last batch.
    memory_bytes: GPU memory to fit into, by the options that are not given; None: the options as they are.
    categories: source names of each prompt, for the index.

    Batches are defined by prompt numbers and have one sample of each prompt, so that a resumed run, and one with more
    samples, gives the same images as an uninterrupted one.
    """
    # Before the text encoder is loaded.
    controlnet, controls = _control(asked, teacher, prompts)
    text_device = device
    if student == TEACHER and device.type == "cuda" and memory_bytes is not None:
        text_device = _text_device(teacher, device, memory_bytes, progress)
    encoder = open_text_encoder(
        student, teacher, text_length=asked.text_length, dtype=DTYPES[asked.dtype], device=text_device,
        quantize=asked.quantize_text_encoder,
    )  # fmt: skip
    lora = None if asked.lora is None else Lora.read(asked.lora, teacher.family, asked.lora_scale)
    settings = _settings(asked, teacher, encoder, controlnet)
    texts = list(prompts)
    batch_size = max(1, min(batch_size, len(texts)))
    options = _placed_options(settings, teacher, encoder, controlnet, memory, memory_bytes, batch_size, progress)
    pictures = PictureFolder.open(
        folder, settings, texts, samples=asked.samples_per_prompt, categories=categories,
        controls=None if controls is None else controls.digests, earlier_digest=encoder.weights_digest,
    )  # fmt: skip
    _warn_about_guidance(settings.guidance, encoder, progress)
    count, total = pictures.missing_count, len(texts) * asked.samples_per_prompt
    if not count:
        return 0
    if lora is not None and lora.others:
        progress.say(f"--lora: {counted(lora.others, 'tensor')} for other parts than the transformer are not used")
    networks = _Networks(
        teacher=teacher, encoder=encoder, asked=asked, settings=settings, options=options, lora=lora,
        controlnet=controlnet, controls=controls, batch_size=batch_size, device=device, text_device=text_device,
    )  # fmt: skip
    with progress.bar("generate", total=total, done=total - count, unit="images") as bar:
        for batches in _passes(_batches(pictures.missing, batch_size, len(texts)), encoder):
            for numbers, sample, images_BHWC in networks.images(batches, texts, pictures):
                bar.advance(pictures.add(numbers, images_BHWC, sample=sample))
    pictures.finish()
    return count


@dataclass(frozen=True, kw_only=True)
class _Networks:
    """What images are generated by; networks are in memory only while `images` runs."""

    teacher: TeacherFolder
    encoder: TextEncoder
    asked: GenerateOptions
    settings: PictureSettings
    options: MemoryOptions
    lora: Lora | None
    controlnet: ControlNetFolder | None
    controls: ControlImages | None
    batch_size: int
    device: torch.device
    text_device: torch.device

    def images(
        self, batches: Sequence[range], texts: Sequence[str], pictures: PictureFolder
    ) -> Iterator[tuple[range, int, Array]]:
        """Of each batch the images that are missing, images_BHWC, with the batch and the sample."""
        guided, pooled_varies = self.teacher.family.guidance_rule == "cfg", self.settings.pooled == "clip"
        embeddings = _Embeddings(self.encoder, texts, batches, self.device, self.text_device, guided=guided)
        generator = self._generator(pooled_varies=pooled_varies)
        beside = None
        if pooled_varies:
            beside = load_conditioning_encoder(self.teacher, dtype=DTYPES[self.asked.dtype], device=self.device)
        negative = embeddings.negative(beside) if guided else None
        for numbers in batches:
            batch = [texts[number] for number in numbers]
            embedding_BTD, conditioning = embeddings.of(numbers), embeddings.conditioning(batch, beside)
            for sample in pictures.missing_samples(numbers):
                controls = () if self.controls is None else self.controls.images(numbers, sample)
                images_BHWC = generator.pictures(
                    embedding_BTD, batch, conditioning, negative, sample_index=sample, control_images=controls
                )
                yield numbers, sample, images_BHWC
        del generator, beside
        release_memory(self.device)

    def _generator(self, *, pooled_varies: bool) -> Generator:
        return Generator.open(
            self.teacher, resolution=None, height=self.settings.height, width=self.settings.width,
            text_length=self.settings.text_length, steps=self.asked.steps, guidance=self.asked.guidance,
            seed=self.asked.seed, dtype=DTYPES[self.asked.dtype], device=self.device, options=self.options,
            batch_rows=self.batch_size, pooled_varies=pooled_varies, lora=self.lora, controlnet=self.controlnet,
        )  # fmt: skip


def _batches(missing: Iterable[int], batch_size: int, prompts: int) -> list[range]:
    """The batches that have a missing prompt: which prompts a batch has depends on their numbers alone."""
    firsts = sorted({number // batch_size * batch_size for number in missing})
    return [range(first, min(first + batch_size, prompts)) for first in firsts]


def _control(
    asked: GenerateOptions, teacher: TeacherFolder, prompts: Sequence[str]
) -> tuple[ControlNetFolder | None, ControlImages | None]:
    if asked.controlnet is None or asked.control_images is None:
        return None, None
    return (
        ControlNetFolder.read(asked.controlnet, teacher, asked.controlnet_scale),
        ControlImages.read(
            asked.control_images, prompts, samples=asked.samples_per_prompt, geometry=teacher.geometry(asked)
        ),
    )


def _placed_options(
    settings: PictureSettings,
    teacher: TeacherFolder,
    encoder: TextEncoder,
    controlnet: ControlNetFolder | None,
    memory: SamplingMemory,
    memory_bytes: float | None,
    batch_size: int,
    progress: Progress,
) -> MemoryOptions:
    options = sampling_options(memory, settings)
    check_quantizer(options.quantize)
    check_placement(options, teacher.family.anatomy, teacher.config("transformer"))
    if memory_bytes is None:
        return options
    cost = sampling_cost(settings, teacher, batch_size=batch_size, student_parameters=encoder.parameters)
    if controlnet is not None:
        geometry = teacher.geometry(ImageSize(height=settings.height, width=settings.width))
        added = controlnet.added_bytes(geometry.image_tokens, cost.dtype_bytes)
        weights = cost.dtype_bytes * controlnet.parameters
        cost = replace(cost, beside_bytes=cost.beside_bytes + weights, row_bytes=cost.row_bytes + added)
    placed = place(cost, options, memory_bytes=memory_bytes, host_bytes=free_host_bytes(), held=memory.held)
    progress.say(placed.text(memory_bytes))
    return placed.options


def _warn_about_guidance(guidance: float | None, encoder: TextEncoder, progress: Progress) -> None:
    if guidance is None or encoder.trained_guidance is None:
        return
    low, high = encoder.trained_guidance
    if not low <= guidance <= high:
        progress.say(f"guidance {guidance:g} is outside the student's training range, {low:g} to {high:g}")


class _Embeddings:
    """Embeddings of batches: a student's when they are needed, the teacher's in advance, on the host."""

    def __init__(
        self,
        encoder: TextEncoder,
        texts: Sequence[str],
        batches: Sequence[range],
        device: torch.device,
        text_device: torch.device,
        *,
        guided: bool,
    ) -> None:
        self._encoder, self._texts = encoder, texts
        self._device, self._text_device = device, text_device
        self._ready: dict[range, torch.Tensor] = {}
        if encoder.free is not None:
            self._ready = {numbers: self._encoded(numbers).cpu() for numbers in batches}
            if guided:
                self._negative_1TD = self._of_texts([NEGATIVE_TEXT]).cpu()
            encoder.free()
            release_memory(device)

    def of(self, numbers: range) -> torch.Tensor:
        """embedding_BTD of a batch."""
        if self._encoder.free is not None:
            return self._ready.pop(numbers).to(self._device)
        return self._encoded(numbers)

    def conditioning(self, texts: Sequence[str], beside: ConditioningEncoder | None) -> Conditioning | None:
        """What else the transformer reads of texts; None: zero as pooled vectors, and nothing else."""
        masks = {name: mask.to(self._device) for name, mask in self._encoder.masks(texts).items()}
        encoded = {} if beside is None else beside.encode(texts)
        return {**encoded, **masks} or None

    def negative(self, beside: ConditioningEncoder | None) -> Text:
        """The rows of the negative prompt, for classifier-free guidance."""
        if self._encoder.free is None:
            self._negative_1TD = self._of_texts([NEGATIVE_TEXT])
        conditioning = self.conditioning([NEGATIVE_TEXT], beside)
        assert conditioning is not None
        return Text(embedding_BTD=self._negative_1TD.to(self._device), conditioning=conditioning)

    def _encoded(self, numbers: range) -> torch.Tensor:
        return self._of_texts([self._texts[number] for number in numbers])

    def _of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._encoder.embeddings(texts, self._text_device)


def _text_device(teacher: TeacherFolder, device: torch.device, memory_bytes: float, progress: Progress) -> torch.device:
    """The GPU for the teacher's text encoder if its files fit, else the CPU."""
    weights = sum(file.stat().st_size for file in teacher.weights("large_text_encoder"))
    needed = int(with_margin(CUDA_BYTES + weights))
    if needed <= memory_bytes:
        return device
    progress.say(f"the text encoder ({size_text(needed)}) does not fit into the limit: it encodes on the CPU")
    return torch.device("cpu")


def _passes(batches: Sequence[range], encoder: TextEncoder) -> Iterator[Sequence[range]]:
    """All batches, but for the teacher only as many at a time as there is host memory for embeddings."""
    if encoder.free is None or (free := free_host_bytes()) is None:
        yield batches
        return
    rows = max(1, int(_SHARE_OF_HOST * free) // encoder.row_bytes)
    count = max(1, rows // max(map(len, batches)))
    for first in range(0, len(batches), count):
        yield batches[first : first + count]


def _settings(
    asked: GenerateOptions, teacher: TeacherFolder, encoder: TextEncoder, controlnet: ControlNetFolder | None
) -> PictureSettings:
    geometry = teacher.geometry(asked)
    pooled = teacher.family.pooled_choice(asked.pooled)
    teacher.family.check_guidance([asked.guidance])
    parts: tuple[Role, ...] = ("transformer", "vae")
    if pooled == "clip":
        parts = (*parts, *(role for role, _ in teacher.family.conditioning_roles))
    guided = teacher.family.takes_guidance(teacher.config("transformer"))
    guided = guided or (controlnet is not None and controlnet.takes_guidance)
    return PictureSettings.from_flags(
        student=encoder.digest,
        teacher=digest([*(teacher.weight_hashes(part) for part in parts), teacher.config("scheduler")]),
        text_length=encoder.text_length,
        height=geometry.height,
        width=geometry.width,
        steps=asked.steps,
        schedule="diffusers",
        guidance=asked.guidance if guided else None,
        seed=asked.seed,
        dtype=asked.dtype,
        pooled=pooled,
        quantize=asked.quantize,
        lora=None if asked.lora is None else (weight_sha256(asked.lora), asked.lora_scale),
        controlnet=None if controlnet is None else (controlnet.digest, controlnet.scale),
    )
