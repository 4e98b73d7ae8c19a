"""Other families than FLUX.1 through all commands: built, kept, trained, exported, inspected, planned."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from secondcast.api.students import load_student
from secondcast.inspection.report.run import PROMPTS_KEY, sample_file
from secondcast.models.families.family import Family
from secondcast.models.families.klein import KLEIN
from secondcast.models.families.pixart import PIXART_SIGMA
from secondcast.models.families.sd3 import SD3
from secondcast.models.geometry import recorded_geometry
from secondcast.models.noise import draw_noise
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import prompt_id
from tests.cache_builder.building import data_files
from tests.commands.running import run_commands
from tests.models.families.random_klein import make_klein, make_qwen_config, vocabulary_of
from tests.models.families.random_pixart import make_pixart
from tests.models.families.random_sd3 import make_sd3
from tests.project.programs import programs, run_program

HELD_OUT = "red blue car"
PROMPTS = ["a red dog on the left", "two cats", "a blue car", HELD_OUT, "a sign that says 7", "the bench"]


class Road:
    """A folder with a teacher, prompts and the commands that were run in it."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        self.teacher = MAKE[family.name](folder / "teacher")
        if family.text_layers is None:
            config = json.loads((self.teacher / family.slot / "config.json").read_bytes())
            small = config | {"d_model": 16, "num_layers": 1, "num_heads": 2}
            (folder / "small").mkdir()
            (folder / "small/config.json").write_text(json.dumps(small))
        else:
            make_qwen_config(folder / "small", vocabulary_of(self.teacher))
        (folder / "p.txt").write_text("\n".join(PROMPTS[:4]) + "\n")
        (folder / "m.txt").write_text("\n".join(f"{number} blue cars on the left" for number in range(1, 30)) + "\n")
        (folder / "q.txt").write_text("\n".join(PROMPTS[4:]) + "\n")

    def run(self, *lines: str) -> list[str]:
        """Stdout of each command; {F} in a line is the folder."""
        words = [line.replace("{F}", str(self.folder)).split() for line in lines]
        answers = run_commands([{"words": line, "limit": None} for line in words], home=self.folder / "home")
        for line, answer in zip(lines, answers, strict=True):
            # Without an exit code a command ran to its end, or was ended by an exception.
            ended = answer["code"] == 0 or (answer["code"] is None and "Traceback" not in answer["heard"])
            assert ended, (line, answer["heard"])
        return [str(answer["said"]) for answer in answers]


MAKE = {"sd3": make_sd3, "pixart-sigma": make_pixart, "flux2-klein": make_klein}
BUILD = "--teacher {F}/teacher --steps 3 --dtype float32 --batch-size 4 --shard-size 4"


@pytest.fixture(scope="module", params=[SD3, PIXART_SIGMA, KLEIN], ids=lambda family: family.name)
def road(request, tmp_path_factory) -> Road:
    road = Road(tmp_path_factory.mktemp("road"), request.param)
    road.run(
        f"build {{F}}/c --prompts {{F}}/p.txt {BUILD}",
        "train {F}/r --cache {F}/c --student {F}/small --pretrain-steps 2 --steps 3 --batch-size 2 --sample-every 4",
        "export {F}/r {F}/s",
    )
    return road


@pytest.mark.thorough
def test_a_run_samples_its_held_out_trajectory(road):
    sheets = {}
    for step in (0, 4, 5):
        with Image.open(sample_file(road.folder / "r", step)) as sheet:
            assert sheet.info[PROMPTS_KEY].partition(": ")[2] == HELD_OUT
            sheets[step] = np.asarray(sheet)
    teacher, student = np.split(sheets[0][:, : sheets[0].shape[1] // 2 * 2], 2, axis=1)
    assert (sheets[0] == sheets[5])[:, : teacher.shape[1]].all() and (sheets[0] != sheets[5]).any()
    assert teacher.std() > 0 and student.std() > 0


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["r", "s"], ids=["run", "export"])
def test_a_loaded_student_reads_prompts_as_its_teacher(road, place):
    cache, student = Cache.open(road.folder / "c"), load_student(road.folder / place, device="cpu")
    for number, prompt in enumerate(cache.prompts):
        assert student.token_ids(prompt.text)[0].tolist() == cache.padded_token_ids(number).tolist()
    texts = [prompt.text for prompt in cache.prompts]
    assert student(texts).shape == (len(texts), *cache.embedding(0).shape)


@pytest.mark.thorough
def test_a_cache_is_extended_merged_converted_cut_and_repaired(road):
    f = road.folder
    shutil.copytree(f / "c", f / "extended")
    road.run(
        f"build {{F}}/extended --prompts {{F}}/p.txt --prompts {{F}}/q.txt {BUILD} --extend",
        f"build {{F}}/q --prompts {{F}}/q.txt {BUILD} --format webdataset",
        "convert {F}/c {F}/tars --format webdataset",
        "merge {F}/tars {F}/q {F}/merged",
        "convert {F}/merged {F}/zarr --format zarr",
        "subset {F}/zarr {F}/cut --source p",
    )
    caches = {name: Cache.open(f / name) for name in ("extended", "merged", "zarr", "cut")}
    for cache in caches.values():
        assert (cache.negative == 0 and cache.prompts[0].text == "") == (road.family.guidance_rule == "cfg")
    assert {name: len(cache) for name, cache in caches.items()} == {"extended": 6, "merged": 6, "zarr": 6, "cut": 4}
    original = data_files(f / "c")
    for name in ("trajectories.zarr", "embeddings.zarr"):
        shards = {path: data for path, data in original.items() if path.startswith(name)}
        assert shards and all(data_files(f / "cut")[path] == data for path, data in shards.items())
    shutil.copytree(f / "c", f / "damaged")
    record = Cache.open(f / "damaged").records["embeddings", 0]
    for file in record.files:
        (f / "damaged" / file.path).write_bytes(b"")
    road.run("repair {F}/damaged --teacher {F}/teacher --device cpu", "inspect verify {F}/damaged --resample 2")
    assert data_files(f / "damaged") == original


@pytest.mark.thorough
def test_samples_are_added_to_prompts_but_not_to_the_negative_one(road):
    shutil.copytree(road.folder / "c", road.folder / "twice")
    said = road.run(
        f"build {{F}}/twice --prompts {{F}}/p.txt {BUILD} --extend --samples-per-prompt 2",
        f"build {{F}}/other --prompts {{F}}/q.txt {BUILD} --samples-per-prompt 2",
        "merge {F}/twice {F}/other {F}/both",
    )
    assert "8 trajectories of 4 prompts" in said[0] and "12 trajectories of 6 prompts" in said[2]
    cache = Cache.open(road.folder / "both")
    assert len(cache) == 12
    assert cache.negative not in {cache.trajectory(index).prompt for index in range(12)}


@pytest.mark.thorough
def test_an_interrupted_build_and_two_workers_give_the_same_bytes(road):
    f = road.folder
    shutil.copytree(f / "c", f / "resumed")
    for name in ("index", "trajectories-000000"):
        (f / f"resumed/commits/{name}.json").unlink()
    workers = [
        f"build {{F}}/shared --prompts {{F}}/p.txt {BUILD} --stage {stage} --worker {worker}/2"
        for stage in ("text", "sample")
        for worker in (0, 1)
    ]
    road.run(f"build {{F}}/resumed --prompts {{F}}/p.txt {BUILD}", *workers)
    assert data_files(f / "resumed") == data_files(f / "shared") == data_files(f / "c")


@pytest.mark.thorough
def test_a_student_that_was_trained_for_some_steps_has_a_lower_loss(road):
    road.run(
        "train {F}/longer --cache {F}/c --student {F}/small --steps 60 --batch-size 4 --learning-rate 3e-3 --dropout 0"
    )
    lines = [json.loads(line) for line in (road.folder / "longer/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # Most steps of a random teacher are easier than the others, so means of many.
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.thorough
def test_a_picture_is_the_pipelines_with_the_exported_student_in_a_process_without_us(road, tmp_path):
    f = road.folder
    road.run(
        "generate {F}/s --out {F}/pictures --teacher {F}/teacher --prompts {F}/p.txt --steps 2 --guidance 4 --seed 7"
        " --dtype float32 --batch-size 4 --height 16 --width 24"
    )
    index = [json.loads(line) for line in (f / "pictures/index.jsonl").read_text().splitlines()]
    texts = [entry["prompt"] for entry in index]
    cache = Cache.open(f / "c")
    geometry = recorded_geometry(cache.manifest.sampling)
    noise = [
        draw_noise(seed=7, prompt_id=prompt_id(text), sample_index=0, image_tokens=24, channels=16) for text in texts
    ]
    wide = type(geometry)(height=16, width=24, rows=4, columns=6, channels=16)
    np.save(tmp_path / "noise.npy", road.family.unpacked(torch.from_numpy(np.stack(noise)), wide).numpy())
    size, length = road.family.image_size(height=16, width=24), cache.manifest.teacher.text_length
    program = f"""
import json
import numpy as np
import torch
from diffusers import {road.family.pipeline}
from transformers import AutoModel

student = AutoModel.from_pretrained({str(f / "s")!r}, trust_remote_code=True, dtype=torch.float32)
pipeline = {road.family.pipeline}.from_pretrained(
    {str(road.teacher)!r}, {road.family.slot}=student, torch_dtype=torch.float32
)
images = pipeline(
    prompt={texts!r}, latents=torch.from_numpy(np.load({str(tmp_path / "noise.npy")!r})), **{size!r},
    num_inference_steps=2, guidance_scale=4.0, max_sequence_length={length}, output_type="np",
).images
np.save({str(tmp_path / "images.npy")!r}, (images * 255).round().astype("uint8"))
"""
    run_program(program, tmp_path, without_us=True)
    found = np.stack([np.asarray(Image.open(f / "pictures" / entry["file"])) for entry in index])
    # The pipeline encodes the negative prompt of every image, generate one: sums may differ in their last bits.
    assert np.abs(found.astype(int) - np.load(tmp_path / "images.npy")).max() <= 1


@pytest.mark.thorough
def test_the_card_of_an_export_runs_as_it_is(road, tmp_path):
    alone, _ = programs((road.folder / "s/README.md").read_text())
    assert f"{road.family.slot}=student" in alone and road.family.pipeline in alone
    run_program(alone.replace("PATH_OF_THIS_FOLDER", str(road.folder / "s")), tmp_path, without_us=True)
    assert (tmp_path / "a-red-circle.png").is_file()


@pytest.mark.thorough
def test_what_is_trained_resumed_with_options_of_memory_is_inspected_evaluated_and_planned(road):
    place = "cpu" if road.family.anatomy.modulation else "auto"
    initial = (
        "init-student {F}/initial --teacher {F}/teacher --prompts {F}/m.txt --size 1x16 --kind cut --dtype float32",
        "train {F}/from-initial --cache {F}/text --student {F}/initial --steps 2 --batch-size 2 --loss context",
    )
    said = road.run(
        "train {F}/depth --cache {F}/c --student {F}/s --steps 2 --batch-size 2 --loss depth --depth-blocks 1",
        "train {F}/streamed --cache {F}/c --student {F}/s --steps 2 --batch-size 2 --gpu-blocks 1",
        f"train {{F}}/host --cache {{F}}/c --student {{F}}/s --steps 2 --batch-size 2 --modulation {place}",
        "train {F}/plain --cache {F}/c --student {F}/s --steps 2 --batch-size 2",
        "build {F}/text --prompts {F}/p.txt --teacher {F}/teacher --dtype float32 --text-only",
        "train {F}/context --cache {F}/text --student {F}/s --steps 2 --batch-size 2 --loss context",
        "evaluate score {F}/s --cache {F}/c --backbone {F}/teacher --closed-loop 1 --json",
        "inspect compare {F}/c 0 1 --student {F}/r --out {F}/compare.png",
        "inspect show {F}/c 0",
        "inspect images {F}/c 0 --out {F}/strips.png",
        "inspect summary {F}/c",
        "inspect report {F}/c --out {F}/report.html",
        "plan build --teacher {F}/teacher --num-prompts 10",
        "plan train --cache {F}/c --student {F}/small",
        "plan generate --teacher {F}/teacher",
        *(initial if road.family.makes_initial_students else ()),
    )
    streamed, plain = (load_file(_weights(road.folder / name)) for name in ("streamed", "plain"))
    if not road.family.anatomy.cross_attention:
        # Where text enters every block, streaming adds its gradients in another order (test_guided_families.py).
        assert all(torch.equal(streamed[name], plain[name]) for name in plain)
    assert ("negative 1, p 4" in said[10]) == (road.family.guidance_rule == "cfg")


def _weights(run: Path) -> Path:
    return next(run.glob("checkpoint-*")) / "student/model.safetensors"
