"""An exported student in what users run with FLUX: other pipelines, adapters, offloading, quantized transformers.

For a prompt, a pipeline with the student gives the picture that it gives for the student's embedding: it asks the
student, and reads nothing else of the text encoder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel, TorchAoConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import AutoModel

from secondcast.models.memory.quantized import quantize_blocks
from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import find_teacher
from secondcast.trainer.run.export import export

PROMPT = "a red dog on the left"
LENGTH = 12
CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": LENGTH, "output_type": "np"}
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def exports(tmp_path_factory, dev_teacher, t5_config) -> Path:
    """One student in float32, and quantized."""
    folder, teacher = tmp_path_factory.mktemp("exports"), find_teacher(str(dev_teacher), ())
    student = new_student(str(t5_config), teacher.identity(text_length=LENGTH), init="random", dropout=0.0, seed=0)
    save_student(student, folder / "saved", tokenizer=teacher.tokenizer_files())
    export(folder / "saved", folder / "plain")
    for kind in ("int8", "nf4"):
        export(folder / "saved", folder / kind, quantize=kind)
    return folder


def loaded(export: Path) -> Any:
    return AutoModel.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)


def with_student(kind: Any, teacher: Path, student: Any, **parts: Any) -> Any:
    """A pipeline of diffusers around a student."""
    pipeline = kind.from_pretrained(teacher, text_encoder_2=student, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same_picture(pipeline: Any, student: Any, **call: Any) -> np.ndarray:
    """The picture for a prompt, which equals that for the embeddings of the prompt."""
    ids_1T = pipeline.tokenizer_2(
        [PROMPT], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        embedding_1TD = student(ids_1T)[0]
        pooled_1P = pipeline._get_clip_prompt_embeds([PROMPT])

    def picture(**text: Any) -> np.ndarray:
        return pipeline(**text, **CALL | call, generator=torch.Generator().manual_seed(0)).images

    found = picture(prompt=PROMPT)
    assert np.array_equal(found, picture(prompt_embeds=embedding_1TD, pooled_prompt_embeds=pooled_1P))
    assert not np.array_equal(found, picture(prompt_embeds=-embedding_1TD, pooled_prompt_embeds=pooled_1P))
    return found


@pytest.mark.parametrize("form", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("teacher", ["dev_teacher", "schnell_teacher"])
def test_a_student_of_dev_leads_dev_and_schnell(exports, form, teacher, request):
    student = loaded(exports / form)
    same_picture(with_student(FluxPipeline, request.getfixturevalue(teacher), student), student)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("FluxImg2ImgPipeline", {"image": image(0), "strength": 0.9}),
        ("FluxInpaintPipeline", {"image": image(0), "mask_image": image(1).convert("L"), "strength": 0.9}),
    ],
)
def test_pipelines_that_begin_with_a_picture_take_a_student(exports, dev_teacher, kind, call):
    student = loaded(exports / "plain")
    same_picture(with_student(getattr(diffusers, kind), dev_teacher, student), student, **call)


def test_a_controlnet_works_beside_a_student(exports, dev_teacher):
    student = loaded(exports / "plain")
    torch.manual_seed(0)
    controlnet = FluxControlNetModel.from_transformer(
        FluxTransformer2DModel.from_pretrained(dev_teacher, subfolder="transformer"), num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    )  # fmt: skip
    for parameter in controlnet.parameters():
        # Its own outputs begin as zeros.
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = with_student(diffusers.FluxControlNetPipeline, dev_teacher, student, controlnet=controlnet)
    call = {"control_image": image(0), "control_guidance_end": 1.0}
    strong, none = (
        same_picture(pipeline, student, controlnet_conditioning_scale=scale, **call) for scale in (1.0, 0.0)
    )
    assert not np.array_equal(strong, none)


def test_a_lora_of_the_transformer_works_beside_a_student(exports, dev_teacher, tmp_path):
    student = loaded(exports / "plain")
    trained = FluxTransformer2DModel.from_pretrained(dev_teacher, subfolder="transformer")
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained))
    pipeline = with_student(FluxPipeline, dev_teacher, student)
    without = same_picture(pipeline, student)
    pipeline.load_lora_weights(tmp_path)
    assert not np.array_equal(same_picture(pipeline, student), without)
    pipeline.unload_lora_weights()
    assert np.array_equal(same_picture(pipeline, student), without)


def in_eight_bits(teacher: Path) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"transformer": FluxTransformer2DModel.from_pretrained(teacher / "transformer", quantization_config=config)}


def offloaded(network: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(network, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def in_four_bits(teacher: Path) -> dict[str, Any]:
    # BitsAndBytesConfig of diffusers refuses a CPU; its linears are these.
    transformer = FluxTransformer2DModel.from_pretrained(teacher / "transformer")
    quantize_blocks(transformer, "nf4", torch.device("cpu"))
    return {"transformer": transformer}


@pytest.mark.parametrize("parts", [in_eight_bits, in_four_bits], ids=["8 bits", "4 bits"])
def test_a_quantized_transformer_works_beside_a_student(exports, dev_teacher, parts: Callable[[Path], dict[str, Any]]):
    student = loaded(exports / "plain")
    same_picture(with_student(FluxPipeline, dev_teacher, student, **parts(dev_teacher)), student)


def test_group_offloading_takes_student_and_transformer(exports, dev_teacher):
    student = loaded(exports / "plain")
    pipeline = with_student(FluxPipeline, dev_teacher, student)
    plain = same_picture(pipeline, student)
    for network in (pipeline.transformer, student):
        offloaded(network)
    assert np.array_equal(same_picture(pipeline, student), plain)


def test_a_student_is_compiled_as_one_graph(exports, dev_teacher):
    student = loaded(exports / "plain")
    pipeline = with_student(FluxPipeline, dev_teacher, student)
    plain = same_picture(pipeline, student)
    # Without a C++ compiler: what can fail is the capture of one whole graph.
    student.forward = torch.compile(student.forward, fullgraph=True, backend="eager")
    assert np.array_equal(same_picture(pipeline, student), plain)


def test_a_saved_pipeline_is_loaded_with_its_student(exports, dev_teacher, tmp_path):
    student = loaded(exports / "plain")
    pipeline = with_student(FluxPipeline, dev_teacher, student)
    plain = same_picture(pipeline, student)
    pipeline.save_pretrained(tmp_path / "whole")
    again = FluxPipeline.from_pretrained(tmp_path / "whole", trust_remote_code=True, torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    # Weights that are mapped from a file may lie at other addresses, by which a sum's last bits differ: 3e-7 here.
    np.testing.assert_allclose(same_picture(again, again.text_encoder_2), plain, atol=1e-5)
