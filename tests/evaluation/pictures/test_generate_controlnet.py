"""Pictures with a ControlNet are FluxControlNetPipeline's; each names its control image."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from diffusers.pipelines.flux import pipeline_flux_controlnet
from PIL import Image

from secondcast.evaluation import generate as generate_module
from secondcast.evaluation.pictures.control_images import ControlImages
from secondcast.evaluation.settings.generating import GenerateOptions
from secondcast.models.cost.gpu_memory import CUDA_BYTES, with_margin
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.student.student import load_student
from secondcast.models.teacher.controlnet import ControlNetFolder
from secondcast.models.teacher.folder import find_teacher
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.storage_schemas.errors import ImagesError, SettingsError, SettingsMismatchError
from tests.evaluation.test_generate import (
    PROMPTS,
    index_of,
    pictures,
    pipeline_images,
    read_pictures,
    run,
    student,
    t5_config,
)
from tests.models.teacher.test_controlnet import controlnet, make_controlnet

__all__ = ["controlnet", "student", "t5_config"]


def write_image(file, seed, *, size=(16, 16), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def edges(tmp_path):
    folder = tmp_path / "edges"
    folder.mkdir()
    for number in range(len(PROMPTS)):
        # Published detectors write grey images, and often larger ones.
        write_image(folder / f"{number:06d}.png", number, size=(32, 32) if number == 3 else (16, 16), mode="L")
    return folder


def pipeline_with(student, teacher, controlnet):
    pipeline = FluxControlNetPipeline.from_pretrained(
        teacher, text_encoder_2=load_student(student), torch_dtype=torch.float32,
        controlnet=FluxControlNetModel.from_pretrained(controlnet, torch_dtype=torch.float32),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("pooled", ["zero", "clip"])
@pytest.mark.parametrize("teacher", ["dev_teacher", "schnell_teacher"])
def test_a_picture_is_flux_controlnet_pipelines_for_the_same_noise(
    student, teacher, pooled, controlnet, edges, tmp_path, request, monkeypatch
):
    teacher, part = request.getfixturevalue(teacher), PROMPTS[2:4]
    given = {"controlnet": controlnet, "control_images": edges, "pooled": pooled}
    run(student, teacher, tmp_path / "out", controlnet_scale=0.7, **given)
    pipeline = pipeline_with(student, teacher, controlnet)
    # The pipeline draws from the VAE's distribution; its own option for the mean.
    mean = partial(pipeline_flux_controlnet.retrieve_latents, sample_mode="argmax")
    monkeypatch.setattr(pipeline_flux_controlnet, "retrieve_latents", mean)
    if pooled == "clip":
        text = {"prompt": part, "max_sequence_length": 10}
    else:
        embedding, _, _ = pipeline.encode_prompt(part, None, max_sequence_length=10)
        text = {"prompt_embeds": embedding, "pooled_prompt_embeds": torch.zeros(2, 8)}
    images = [
        Image.open(edges / f"{number:06d}.png").convert("RGB").resize((16, 16), Image.LANCZOS) for number in (2, 3)
    ]
    call = {"control_image": images, "controlnet_conditioning_scale": 0.7, **text}
    expected = pipeline_images(pipeline, part, **call)
    assert np.array_equal(read_pictures(tmp_path / "out", (2, 3)), expected)
    without = pipeline_images(pipeline, part, **call | {"controlnet_conditioning_scale": 0.0})
    assert not np.array_equal(without, expected)


def test_schnell_with_a_controlnet_that_takes_guidance_states_it(student, schnell_teacher, controlnet, edges, tmp_path):
    out = tmp_path / "out"
    run(student, schnell_teacher, out, PROMPTS[:1], controlnet=controlnet, control_images=edges)
    assert index_of(out)[0]["guidance"] == 3.5
    with pytest.raises(SettingsMismatchError, match=r"made with guidance = 3.5, requested 4.0"):
        run(student, schnell_teacher, out, PROMPTS[:1], controlnet=controlnet, control_images=edges, guidance=4.0)


@pytest.mark.parametrize("memory", [{"modulation": "gpu", "gpu_blocks": 0}, {"modulation": "precomputed"}])
def test_pictures_do_not_depend_on_the_placement(student, dev_teacher, controlnet, edges, tmp_path, memory):
    given = {"prompts": PROMPTS[:4], "controlnet": controlnet, "control_images": edges}
    run(student, dev_teacher, tmp_path / "plain", memory=SamplingMemory(modulation="gpu"), **given)
    run(student, dev_teacher, tmp_path / "placed", memory=SamplingMemory(**memory), **given)
    assert pictures(tmp_path / "plain") == pictures(tmp_path / "placed")


def test_a_folder_holds_pictures_of_one_controlnet_scale_and_set_of_control_images(
    student, dev_teacher, controlnet, edges, tmp_path
):
    out, given = tmp_path / "out", {"controlnet": controlnet, "control_images": edges}
    run(student, dev_teacher, out, PROMPTS[:2], **given)
    other = make_controlnet(tmp_path / "other", dev_teacher, seed=1)
    for changes in ({}, given | {"controlnet_scale": 0.5}, given | {"controlnet": other}):
        with pytest.raises(SettingsMismatchError, match=r"out has images made with controlnet = \["):
            run(student, dev_teacher, out, PROMPTS[:2], **changes)
    # More prompts are added, with control images of their own.
    assert run(student, dev_teacher, out, PROMPTS[:4], **given) == 2
    digests = [entry["control"] for entry in index_of(out)]
    assert len(set(digests)) == 4
    write_image(edges / "000001.png", 9)
    with pytest.raises(SettingsMismatchError) as caught:
        run(student, dev_teacher, out, PROMPTS[:4], **given)
    assert str(caught.value).startswith(
        f"{out} has 000001-two-cats.png made with the control image {digests[1][:12]}, requested "
    )


def test_a_sample_takes_its_own_control_image_or_that_of_the_first(student, dev_teacher, controlnet, tmp_path):
    made = tmp_path / "made"
    run(student, dev_teacher, made, PROMPTS[:2], samples_per_prompt=2)
    (made / "000001-two-cats_1.png").unlink()
    run(
        student, dev_teacher, tmp_path / "out", PROMPTS[:2], samples_per_prompt=2, controlnet=controlnet,
        control_images=made,
    )  # fmt: skip
    digests = {(entry["number"], entry.get("sample", 0)): entry["control"] for entry in index_of(tmp_path / "out")}
    assert digests[0, 0] != digests[0, 1] and digests[1, 0] == digests[1, 1]


def test_control_images_that_do_not_fit_are_refused_before_a_folder_is_made(
    student, dev_teacher, controlnet, edges, tmp_path
):
    def refused(prompts=PROMPTS, control_images=edges):
        with pytest.raises(ImagesError) as caught:
            run(student, dev_teacher, tmp_path / "out", prompts, controlnet=controlnet, control_images=control_images)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(control_images=tmp_path / "none") == (
        f"no folder {tmp_path / 'none'}: expected --control-images with a control image for each prompt"
    )
    assert refused([*PROMPTS, "no dogs"]) == (
        f"{edges} has no control image of prompt 5: expected 000005-no-dogs.png or 000005.png, the names by which "
        f"`secondcast generate` writes the images of these prompts"
    )
    write_image(edges / "000002.png", 0, size=(16, 24))
    assert refused() == (
        f"{edges / '000002.png'} is 16 x 24 px, expected the proportions of the images, 16 x 16 px: resizing would "
        f"distort it; crop it, or give --height and --width"
    )
    (edges / "000002.png").write_bytes(b"no image")
    assert refused().startswith(f"{edges / '000002.png'} cannot be read as an image (")


def test_a_control_image_that_changed_since_it_was_read_is_refused(dev_teacher, edges):
    file = edges / "000001.png"
    geometry = find_teacher(str(dev_teacher), ("transformer",)).geometry(ImageSize(height=16, width=16))
    found = ControlImages.read(edges, PROMPTS, samples=1, geometry=geometry)
    assert len(found.images([0, 1], 0)) == 2
    # Depth maps have 16 bits, which are scaled, not clipped.
    Image.fromarray(np.full((16, 16), 300, np.uint16)).save(file)
    deep = ControlImages.read(edges, PROMPTS, samples=1, geometry=geometry).images([1], 0)[0]
    assert deep.getextrema() == ((1, 1), (1, 1), (1, 1))
    write_image(file, 77)
    with pytest.raises(ImagesError, match=f"^{file} has changed since this command began: run it again$"):
        found.images([0, 1], 0)
    file.unlink()
    with pytest.raises(ImagesError, match=rf"^{file} cannot be read \(.*\): make it again$"):
        found.images([1], 0)


def test_options_that_need_each_other_are_refused_alone(tmp_path):
    for given, message in (
        ({"controlnet": tmp_path}, "--controlnet is given without --control-images: give both, or neither"),
        ({"control_images": tmp_path}, "--control-images is given without --controlnet: give both, or neither"),
        ({"controlnet_scale": 0.5}, "--controlnet-scale has no effect without --controlnet: remove it, or give both"),
    ):
        with pytest.raises(SettingsError, match=f"^{message}$"):
            GenerateOptions.from_flags(**given)


def test_a_limit_counts_the_controlnet(student, dev_teacher, controlnet, edges, tmp_path, monkeypatch):
    costs, real = [], generate_module.place

    def noting(cost, *words, **named):
        costs.append(cost)
        return real(cost, *words, **named)

    monkeypatch.setattr(generate_module, "place", noting)
    given = {"controlnet": controlnet, "control_images": edges}
    for name, more in (("without", {}), ("with", given)):
        run(student, dev_teacher, tmp_path / name, PROMPTS[:1], memory_bytes=with_margin(CUDA_BYTES + 2**24), **more)
    without, counted = costs
    found = ControlNetFolder.read(controlnet, find_teacher(str(dev_teacher), ("transformer",)), 1.0)
    assert counted.beside_bytes - without.beside_bytes == 4 * found.parameters
    assert counted.row_bytes - without.row_bytes == found.added_bytes(image_tokens=16, itemsize=4) > 0
